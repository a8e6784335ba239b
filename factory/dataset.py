"""The finished data set: training files that `datasets` and TRL read as they are, and a card that says what they are.

dataset/README.md train.jsonl test.jsonl            one config
dataset/README.md <config>/train.jsonl ...          several, the last one the default

Every row of a config has the same columns and the same form, so that readers which look at the first rows only are not
misled. The same rows give the same bytes: no times, costs or paths of this machine.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import msgspec
import yaml

from factory.rows import Message, Pair, TrainRow, Unpaired
from factory.run import fsync_folder, write_bytes

AnyRow: TypeAlias = TrainRow | Pair | Unpaired


class Config(NamedTuple):
    """One data set of the folder. The callables give the rows afresh each time they are called."""

    name: str
    train: Callable[[], Iterator[AnyRow]]
    test: Callable[[], Iterator[TrainRow]]


class Form:
    """What a config's rows have in common; learnt by reading them once, so that memory does not grow with them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rows = {"train": 0, "test": 0}
        self.texts = True
        self.first: AnyRow | None = None
        self.scores: set[str] = set()
        self.beside: set[str] = set()
        for split, row in self.read():
            self.rows[split] += 1
            self.first = self.first or row
            self.texts = self.texts and _is_text(row)
            if isinstance(row, TrainRow):
                self.scores.update(row.scores)
                self.beside |= {name for name, plain in (("weight", 1.0), ("masked", 0)) if getattr(row, name) != plain}

    def read(self) -> Iterator[tuple[str, AnyRow]]:
        yield from (("train", row) for row in self.config.train())
        yield from (("test", row) for row in self.config.test())

    @property
    def splits(self) -> list[str]:
        """A test split only where there are test rows; a train split always."""
        return ["train", "test"] if self.rows["test"] else ["train"]

    def columns(self, row: AnyRow) -> dict[str, Any]:
        """One line of the file: always the same columns in the same order, null where a row has no value."""
        said = self._said
        if isinstance(row, Pair):
            return {
                "prompt": said(row.prompt), "chosen": said(row.chosen), "rejected": said(row.rejected), "id": row.id,
                "margin": row.margin, "chosen_model": row.chosen_model, "rejected_model": row.rejected_model,
                "chosen_score": row.chosen_score, "rejected_score": row.rejected_score,
                "source": row.source, "parents": row.parents,
            }  # fmt: skip
        if isinstance(row, Unpaired):
            return {
                "prompt": said(row.prompt), "completion": said(row.completion), "label": row.label, "id": row.id,
                "score": row.score, "model": row.model, "source": row.source, "parents": row.parents,
            }  # fmt: skip
        return {
            "prompt": said(row.prompt), "completion": said(row.completion), "id": row.id,
            "source": row.source, "model": row.model, "task": row.task,
            **{name: getattr(row, name) for name in sorted(self.beside)},
            **{f"score_{name}": row.scores.get(name) for name in sorted(self.scores)},
            "parents": row.parents,
        }  # fmt: skip

    def _said(self, messages: list[Message]) -> str | list[Message]:
        return messages[0]["content"] if self.texts else messages

    def features(self) -> list[dict[str, Any]]:
        """The columns' types, as the card's header has them: otherwise readers guess them from the first rows."""
        said = {"prompt", "completion", "chosen", "rejected"}
        numbers = {
            "margin",
            "chosen_score",
            "rejected_score",
            "score",
            "weight",
            *(f"score_{name}" for name in self.scores),
        }

        def kind(column: str) -> dict[str, Any]:
            if column == "parents":
                return {"list": "string"}
            if column in said and not self.texts:
                return {"list": [{"name": "role", "dtype": "string"}, {"name": "content", "dtype": "string"}]}
            others = {"label": "bool", "masked": "int64"}
            return {"dtype": "float64" if column in numbers else others.get(column, "string")}

        return [{"name": column, **kind(column)} for column in self.columns(self.first)] if self.first else []


def _is_text(row: AnyRow) -> bool:
    """One user message, answered by one message: nothing is lost when only the texts are written."""
    answers = [row.chosen, row.rejected] if isinstance(row, Pair) else [row.completion]
    return [m["role"] for m in row.prompt] == ["user"] and all(len(answer) == 1 for answer in answers)


def write(folder: Path, *, name: str, configs: list[Config], card: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Write the whole folder beside its place and swap it in, so that stale files go and half a data set never shows.

    Returns the rows of each split by config.

    `card`: {"recipe": name, "lists": [prompt lists' funnels], "funnel": [stage manifests],
    "teachers": {name: {"model", "terms"}}, "prompts": [{"name", "path", "licence"}],
    "decontamination": [{"stage", "knobs", "reasons"}]}.
    """
    partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    forms = [Form(config) for config in configs] or [Form(Config("default", lambda: iter(()), lambda: iter(())))]
    places = _places(forms)
    contents = [_write_rows(partial / place, form) for form, place in zip(forms, places, strict=True)]
    write_bytes(partial / "README.md", _card(name, forms, places, contents, card).encode())
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    return {label: form.rows for label, form in zip(_labels(forms), forms, strict=True)}


def _places(forms: list[Form]) -> list[str]:
    """The folder of each config: the root for a single one, else its name without what file systems refuse."""
    if len(forms) == 1:
        return [""]
    places: list[str] = []
    for form in forms:
        plain = re.sub(r"[^A-Za-z0-9_-]", "-", form.config.name) or "config"
        places.append(plain if plain not in places else f"{plain}-{len(places) + 1}")
    return places


def _write_rows(folder: Path, form: Form) -> str:
    """Write the files of a config; returns a hash of their content."""
    folder.mkdir(exist_ok=True)
    read = {"train": form.config.train, "test": form.config.test}
    running = hashlib.blake2b(digest_size=8)
    for split in form.splits:
        running.update(split.encode())
        with (folder / f"{split}.jsonl").open("wb") as file:
            for row in read[split]():
                line = msgspec.json.encode(form.columns(row)) + b"\n"
                running.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
    return running.hexdigest()


# -- the card ----------------------------------------------------------------------------------------------------------

SIZES = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]


def _card(name: str, forms: list[Form], places: list[str], contents: list[str], card: dict[str, Any]) -> str:
    total = sum(sum(form.rows.values()) for form in forms)
    size = next((label for limit, label in SIZES if total < limit), "n>1M")
    header = {
        "pretty_name": name,
        "license": "other",
        "tags": ["synthetic", "distillation"],
        "size_categories": [size],
        "configs": _configs(forms, places, contents),
        "dataset_info": [
            {"config_name": label, "features": form.features()}
            for form, label in zip(forms, _labels(forms), strict=True)
            if form.first
        ],
    }
    if not header["dataset_info"]:
        del header["dataset_info"]
    body = chain(_about(name, card, total), _counts(forms), _funnel(card), _decontamination(card), _sources(card))
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(body) + "\n"


def _labels(forms: list[Form]) -> list[str]:
    return [form.config.name for form in forms] if len(forms) > 1 else ["default"]


def _configs(forms: list[Form], places: list[str], contents: list[str]) -> list[dict[str, Any]]:
    """`datasets` takes two folders of one name for the same where their headers are: the content's hash tells them apart."""
    found: list[dict[str, Any]] = []
    for form, place, content, label in zip(forms, places, contents, _labels(forms), strict=True):
        files = [{"split": s, "path": str(PurePosixPath(place, f"{s}.jsonl"))} for s in form.splits]
        found.append({"config_name": label, "data_files": files, "description": f"content {content}"})
    if len(found) > 1:
        found[-1]["default"] = True
    return found


def _about(name: str, card: dict[str, Any], total: int) -> Iterator[str]:
    yield f"# {_cell(name)}"
    yield ""
    yield f"Made by the recipe {_cell(card['recipe'])}. The answers are the output of language models, not of people:"
    yield "they can be wrong, and what may be done with them is set by the terms of the models below."
    if total == 0:
        yield ""
        yield "**This data set has no rows.** The table below says at which stage they went, and why."


def _counts(forms: list[Form]) -> Iterator[str]:
    yield from ("", "## Rows", "", "| config | train | test | form |", "|---|---:|---:|---|")
    for form, label in zip(forms, _labels(forms), strict=True):
        kinds: dict[type, str] = {Pair: "prompt, chosen, rejected", Unpaired: "prompt, completion, label (KTO)"}
        kind = kinds.get(type(form.first), "prompt, completion")
        how = "texts; the prompt is one user turn" if form.texts else "lists of messages (role, content)"
        if "masked" in form.beside:
            how += "; the first `masked` characters of a completion are to be seen, not learned"
        said = f"{kind}: {how}" if form.first else "empty"
        yield f"| {_cell(label)} | {form.rows['train']} | {form.rows['test']} | {said} |"


def _funnel(card: dict[str, Any]) -> Iterator[str]:
    yield from ("", "## How the rows were made", "", "Nothing is lost in silence: in = kept + dropped + failed.", "")
    yield "| stage | unit | in | kept | dropped | failed | reasons |"
    yield "|---|---|---:|---:|---:|---:|---|"
    lists = [{**told, "stage": f"prompts {told['name']}"} for told in card.get("lists", [])]
    for stage in [*lists, *card["funnel"]]:
        counts = " | ".join(str(stage[key]) for key in ("in", "kept", "dropped", "failed"))
        reasons = ", ".join(f"{_cell(reason)} {count}" for reason, count in stage["reasons"].items())
        yield f"| {_cell(stage['stage'])} | {_cell(stage['unit'])} | {counts} | {reasons} |"


def _decontamination(card: dict[str, Any]) -> Iterator[str]:
    """What was looked for, and what was found; a data set that was not compared with any benchmark says so."""
    yield from ("", "## Decontamination", "")
    checks = card.get("decontamination", [])
    if not checks:
        yield "The rows were not compared with any benchmark."
        return
    yield from ("| stage | compared with | settings | reasons of the stage |", "|---|---|---|---|")
    for check in checks:
        knobs = {name: value for name, value in check["knobs"].items() if name != "kind" and value is not None}
        files = [_portable(one) for value in knobs.values() for one in _paths(value)]
        rest = ", ".join(f"{name} {value}" for name, value in knobs.items() if not _paths(value))
        reasons = ", ".join(f"{reason} {count}" for reason, count in check["reasons"].items()) or "none"
        yield f"| {_cell(check['stage'])} | {_cell(', '.join(files))} | {_cell(rest)} | {_cell(reasons)} |"


def _paths(value: Any) -> list[str]:
    """The files that a knob names: a text or a list of texts, or of records with a `path`."""
    if isinstance(value, dict):
        return _paths(value.get("path"))
    if isinstance(value, list):
        return [path for one in value for path in _paths(one)]
    return [value] if isinstance(value, str) and re.search(r"[/.]", value) else []


def _sources(card: dict[str, Any]) -> Iterator[str]:
    yield from ("", "## Prompts", "", "| list | source | licence |", "|---|---|---|")
    for prompts in card["prompts"]:
        licence = prompts.get("licence") or "not stated"
        yield f"| {_cell(prompts['name'])} | {_cell(_portable(prompts['path']))} | {_cell(licence)} |"
    yield from ("", "## Models", "", "| name | model | terms |", "|---|---|---|")
    for name, model in card["teachers"].items():
        yield f"| {_cell(name)} | {_cell(_portable(model['model']))} | {_cell(model['terms'] or 'not stated')} |"


def _portable(path: Any) -> str:
    """A path of this machine says nothing elsewhere and may name its owner: only its last part is told."""
    path = PurePath(str(path))
    return path.name if path.is_absolute() or path.parts[0] in ("..", "~") else str(path)


def _cell(text: Any) -> str:
    """Text that cannot break out of a table's cell, nor be taken for HTML."""
    plain = " ".join(str(text).split())
    return re.sub(r"([|\\`*_\[\]])", r"\\\1", plain).replace("<", "&lt;")
