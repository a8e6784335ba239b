"""`factory export`: a run's data set in the form that another tool reads, nothing lost.

    alpaca              instruction, input, output (+ system): one question, one answer
    sharegpt            conversations: from, value
    messages            messages: role, content
    prompt_completion   prompt, completion
    preference          prompt, chosen, rejected
    kto                 prompt, completion, label: the two sides of a pair, or rows that have a label

The other columns (id, source, model, scores, parents) stand beside. What a form cannot hold is an error that counts the
rows, before anything is written. `prompt_rows.py` reads each of them back as the same messages.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import yaml

from factory.errors import RecipeError
from factory.mistakes import nearest
from factory.prompt_files import extra
from factory.rows import Message
from factory.run import write_lines

FORMS = ("alpaca", "sharegpt", "messages", "prompt_completion", "preference", "kto")
OF_PAIRS = ("preference", "kto")
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
SUFFIXES = (".jsonl", ".parquet")
BATCH = 1000
"""Rows of a parquet file that are in memory at once."""

Line = dict[str, Any]
Lines = Callable[[], Iterator[Line]]


def export(run: Path, form: str, to: Path, config: str | None = None, split: str = "train") -> str:
    """Write one split of one config to a new file; returns what was done, for people."""
    if form not in FORMS:
        raise RecipeError(f"there is no form {form!r}; {nearest(form, FORMS)}")
    if to.suffix not in SUFFIXES:
        raise RecipeError(f"--to {to}: a file is {' or '.join(SUFFIXES)}")
    if to.exists():
        raise RecipeError(f"--to {to}: it exists already; name a new file")
    if not to.parent.is_dir():
        raise RecipeError(f"--to {to}: there is no folder {to.parent}")
    file = _file(run / "dataset", config, split)
    cannot = Counter(why for row in rows(file) if (why := _cannot(form, row)))
    if cannot:
        told = "; ".join(f"{count} rows: {why}" for why, count in cannot.items())
        raise RecipeError(f"{file}: the form {form} cannot hold all of it: {told}. Nothing was written")

    def lines() -> Iterator[Line]:
        return (line for row in rows(file) for line in FORM[form](row))

    write = _write_parquet if to.suffix == ".parquet" else _write_jsonl
    return f"{write(to, lines)} rows of {file} in the form {form}: {to}"


def header(folder: Path) -> dict[str, Any]:
    """What a data set's card says to programs."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        data: dict[str, Any] = yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n"))
    except (OSError, yaml.YAMLError) as e:
        raise RecipeError(f"{folder} holds no data set ({e}); let the run end first") from None
    return data


def _file(folder: Path, config: str | None, split: str) -> Path:
    """The file of one split; the default config where none is named."""
    configs = {one["config_name"]: one for one in header(folder)["configs"]}
    default = next((name for name, one in configs.items() if one.get("default")), next(iter(configs)))
    if (name := config or default) not in configs:
        raise RecipeError(f"{folder}: there is no config {name!r}; {nearest(name, configs)}")
    files = {one["split"]: one["path"] for one in configs[name]["data_files"]}
    if split not in files:
        raise RecipeError(f"{folder}: config {name!r} has no split {split!r}; {nearest(split, files)}")
    return folder / str(files[split])


def rows(file: Path) -> Iterator[Line]:
    """The rows of a data set's file, one at a time."""
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    with file.open("rb") as lines:
        yield from map(decode, lines)


# -- forms ---------------------------------------------------------------------------------------------------------------


def _alpaca(row: Line) -> Iterator[Line]:
    *before, last = _said(row["prompt"], "user")
    system = {"system": before[0]["content"]} if before else {}
    yield {"instruction": last["content"], "input": "", "output": _answer(row), **system, **_rest(row)}


def _sharegpt(row: Line) -> Iterator[Line]:
    turns = [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in _talk(row)]
    yield {"conversations": turns, **_rest(row)}


def _messages(row: Line) -> Iterator[Line]:
    yield {"messages": _talk(row), **_rest(row)}


def _as_it_is(row: Line) -> Iterator[Line]:
    yield row


def _kto(row: Line) -> Iterator[Line]:
    if "label" in row:
        yield row
        return
    for side, wanted in (("chosen", True), ("rejected", False)):
        yield {
            "prompt": row["prompt"], "completion": row[side], "label": wanted, "id": f"{row['id']}-{side}",
            "model": row[f"{side}_model"], "score": row[f"{side}_score"], "source": row["source"],
            "parents": row["parents"],
        }  # fmt: skip


FORM: dict[str, Callable[[Line], Iterator[Line]]] = {
    "alpaca": _alpaca, "sharegpt": _sharegpt, "messages": _messages, "prompt_completion": _as_it_is,
    "preference": _as_it_is, "kto": _kto,
}  # fmt: skip
"""From a row of the data set to the rows of a form."""


def _cannot(form: str, row: Line) -> str | None:
    """Why a form cannot hold a row."""
    if "chosen" in row:
        return None if form in OF_PAIRS else f"they are pairs; forms for these: {', '.join(OF_PAIRS)}"
    if "label" in row:
        return None if form == "kto" else "they have a label, which only the form kto holds"
    if form in OF_PAIRS:
        return f"they are answers, not pairs; forms for these: {', '.join(f for f in FORMS if f not in OF_PAIRS)}"
    if form != "prompt_completion" and len(_said(row["completion"], "assistant")) != 1:
        return "the answer has several messages"
    roles = [m["role"] for m in _said(row["prompt"], "user")]
    if form == "alpaca" and roles not in (["user"], ["system", "user"]):
        return "the prompt has several turns"
    return None


def _said(value: str | list[Message], role: str) -> list[Message]:
    return [Message(role=role, content=value)] if isinstance(value, str) else value


def _talk(row: Line) -> list[Message]:
    return [*_said(row["prompt"], "user"), *_said(row["completion"], "assistant")]


def _answer(row: Line) -> str:
    return _said(row["completion"], "assistant")[0]["content"]


def _rest(row: Line) -> Line:
    return {name: value for name, value in row.items() if name not in ("prompt", "completion")}


# -- files ---------------------------------------------------------------------------------------------------------------


def _write_jsonl(to: Path, lines: Lines) -> int:
    count = 0

    def encoded() -> Iterator[bytes]:
        nonlocal count
        for line in lines():
            count += 1
            yield msgspec.json.encode(line) + b"\n"

    write_lines(to, encoded())
    return count


def _write_parquet(to: Path, lines: Lines) -> int:
    """Rows by batches under one schema, which comes from all of them: a column may have its first value late."""
    pyarrow, parquet = extra("pyarrow", to), extra("pyarrow.parquet", to)
    schema, count, temporary = _schema(pyarrow, lines()), 0, to.with_name(to.name + ".tmp")
    left = lines()
    with parquet.ParquetWriter(temporary, schema) as file:
        while batch := list(islice(left, BATCH)):
            file.write_table(pyarrow.Table.from_pylist(batch, schema))
            count += len(batch)
    temporary.rename(to)
    return count


def _schema(pyarrow: Any, lines: Iterable[Line]) -> Any:
    """Columns in the order of the first row, each with the type of its first value; text where there is none."""
    found: dict[str, Any] = {}
    for line in lines:
        for name, value in line.items():
            if found.get(name) is None and value not in (None, []):
                found[name] = _type(pyarrow, value)
            found.setdefault(name, None)
    empty = {"parents": pyarrow.list_(pyarrow.string())}
    return pyarrow.schema([(name, kind or empty.get(name, pyarrow.string())) for name, kind in found.items()])


def _type(pyarrow: Any, value: Any) -> Any:
    match value:
        case bool():
            return pyarrow.bool_()
        case int() | float():
            return pyarrow.float64()
        case [first, *_]:
            return pyarrow.list_(_type(pyarrow, first))
        case dict():
            return pyarrow.struct([(name, _type(pyarrow, inner)) for name, inner in value.items()])
        case _:
            return pyarrow.string()
