"""`factory show RUN --row ID` and `--drops REASON`: one row's whole life, and all rows that ended for a reason.

Read from the run folder's own files, a line at a time: no index is kept, and nothing is opened for writing. Where a
prompt stands in its list is found by reading the list again, so a list that has changed since cannot tell it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from factory.errors import RecipeError
from factory.mistakes import nearest
from factory.prompt_files import is_hub_id, read
from factory.prompt_rows import Unreadable, prompt_reader
from factory.prompts import Dropped, PromptSet
from factory.recipe_file import find
from factory.rows import Message, Pair, Prompt, Sample, TrainRow, Verdict, kind_of
from factory.run import PROMPTS_DROPPED

ENDINGS = ("kept", "dropped", "failed")
SHOWN = 600
"""Characters of a text that are shown of a row's life."""
IN_LIST = 70
"""The same in a list of rows."""
MANY = 1000
"""Ids with the same beginning after which no more are looked for."""

Row = Sample | TrainRow | Pair
_dict = msgspec.json.Decoder(dict[str, Any]).decode
_dropped = msgspec.json.Decoder(Dropped).decode


class Seen(NamedTuple):
    """A row where a stage left it."""

    stage: str
    ending: str
    row: Row


class Asked(NamedTuple):
    """A prompt where it stands in a list; `line` is None where that is not known any more."""

    name: str
    line: int | None
    prompt: Prompt


# -- a row's life ------------------------------------------------------------------------------------------------------


def life(folder: Path, said: str) -> str:
    """All that became of a row, by its id or the beginning of it."""
    if not re.fullmatch(r"[0-9a-f]{1,32}", said):
        raise RecipeError(f"--row {said[:60]!r}: an id is of the letters a to f and digits; `--drops` lists some")
    id_, prompt = _resolve(folder, said)
    family = {id_} if prompt is None else {id_, prompt}
    seen = list(_seen(folder, family))
    children = {row.row.id for row in seen} | {parent for one in seen for parent in _parents(one.row)}
    if not children <= family:  # of a prompt its answers, of a pair its parents: and what became of all these
        seen = list(_seen(folder, family | children))
    if not _is_prompt(id_, seen):  # a row's life is its own and its parents', not that of other answers to the prompt
        near = {id_, *(parent for one in seen if one.row.id == id_ for parent in _parents(one.row))}
        seen = [one for one in seen if one.row.id in near or near & set(_parents(one.row))]
    prompts = {one.row.prompt.id: one.row.prompt for one in seen if isinstance(one.row, Sample)}
    asked = prompt or next(iter(prompts), id_)
    lines = [*_told_prompt(folder, asked, prompts.get(asked)), *_told_rows(folder, seen)]
    return "\n".join(lines)


def _resolve(folder: Path, said: str) -> tuple[str, str | None]:
    """The whole id, and the id of its prompt where rows tell it; RecipeError for none or several."""
    found: dict[str, str] = {}
    of: dict[str, str] = {}
    for _, what, row in _with(folder, [f'"{said}']):
        ids = {"row": row.get("id"), **{f"parent {i}": p for i, p in enumerate(row.get("parents", []))}}
        if isinstance(row.get("prompt"), dict):
            ids["prompt"] = row["prompt"]["id"]
            of[str(row.get("id"))] = ids["prompt"]
        for part, one in ids.items():
            if str(one).startswith(said):
                found.setdefault(str(one), "a prompt" if part == "prompt" else what if part == "row" else "an answer")
        if len(found) > MANY:
            break
    if not found:
        found = {asked.prompt.id: "a prompt" for asked in _in_lists(folder, said)}
        found |= {e.id: "a row that is no prompt" for e in _no_prompts(folder) if e.id and e.id.startswith(said)}
    if said not in found and len(found) > 1:
        some = ", ".join(f"{one} ({what})" for one, what in islice(found.items(), 6))
        raise RecipeError(
            f"--row {said}: {len(found)}{' or more' if len(found) > MANY else ''} rows begin so: {some}; give more of the id"
        )
    if not found:
        raise RecipeError(f"--row {said}: no row of {folder} has an id that begins so; `--drops REASON` lists some")
    id_ = said if said in found else next(iter(found))
    return id_, of.get(id_)


def _seen(folder: Path, ids: Iterable[str]) -> Iterator[Seen]:
    """The rows that have one of these ids, or come of one, in the order of the stages."""
    wanted = set(ids)
    kinds: dict[str, type[Row]] = {"an answer": Sample, "a pair": Pair, "a training row": TrainRow}
    for (stage, ending), what, row in _with(folder, [f'"{one}"' for one in wanted]):
        prompt = row["prompt"]["id"] if isinstance(row.get("prompt"), dict) else None
        if {row["id"], prompt, *row.get("parents", [])} & wanted:
            yield Seen(stage, ending, msgspec.convert(row, kinds[what]))


def _with(folder: Path, needles: list[str]) -> Iterator[tuple[tuple[str, str], str, dict[str, Any]]]:
    """The stages' lines that hold one of these texts: (stage, ending), what they are, and the row. Others are not parsed."""
    sought = re.compile(b"|".join(re.escape(needle.encode()) for needle in needles))
    for stage in _stages(folder):
        for ending in ENDINGS:
            for shard in sorted((folder / stage).glob(f"{ending}-*.jsonl")):
                with shard.open("rb") as lines:
                    for row in map(_dict, filter(sought.search, lines)):
                        what = "an answer" if "asked" in row else "a pair" if "chosen" in row else "a training row"
                        yield (stage.rpartition("-")[0], ending), what, row


def _stages(folder: Path) -> list[str]:
    """The folders of a run's last start, in order."""
    return [str(name) for name in _read(folder / "manifest.json")["stages"]]


def _parents(row: Row) -> list[str]:
    return row.parents


def _is_prompt(id_: str, seen: list[Seen]) -> bool:
    return any(isinstance(one.row, Sample) and one.row.prompt.id == id_ for one in seen)


# -- told for people -----------------------------------------------------------------------------------------------------


def _told_prompt(folder: Path, id_: str, prompt: Prompt | None) -> Iterator[str]:
    """Where a prompt comes from, and what it says."""
    found = next(_in_lists(folder, id_, whole=True), None)
    if found is None and prompt is None:
        endings = [e for e in _no_prompts(folder) if e.id == id_]
        if not endings:
            yield f"prompt of {id_}: not in the run folder"
    else:
        asked = found or Asked(prompt.source if prompt else "", None, prompt or Prompt(id=id_, messages=[]))
        line = (
            f"line {asked.line}"
            if asked.line is not None
            else "its line is not known: the list is away, or has changed"
        )
        yield f"prompt {id_}  list {asked.name}, {line}"
        yield from _turns(asked.prompt.messages)
        if asked.prompt.reference:
            yield f"  reference: {_cut(asked.prompt.reference, SHOWN)}"
    for e in (e for e in _no_prompts(folder) if e.id == id_):
        evidence = f"  evidence {e.evidence}" if e.evidence else ""
        yield f"  {e.list}, line {e.line}: left out, {e.reason}{evidence}"


def _told_rows(folder: Path, seen: list[Seen]) -> Iterator[str]:
    answers: dict[str, list[Seen]] = {}
    for one in seen:
        if isinstance(one.row, Sample):
            answers.setdefault(one.row.id, []).append(one)
    made = [one for one in seen if not isinstance(one.row, Sample)]
    if not seen:
        yield ""
        yield "no stage has a row of it"
    for id_, steps in answers.items():
        yield ""
        yield from _told_answer(steps)
        into = [one for one in made if id_ in _parents(one.row)]
        if into:
            yield "  became " + ", ".join(f"{_what(one.row)} {one.row.id} in {one.stage}" for one in into)
        elif steps[-1].ending == "kept":
            yield f"  stands after {steps[-1].stage}: no later row was made of it"
    for one in made:
        yield ""
        yield from _told_made(folder, one)


def _told_answer(steps: list[Seen]) -> Iterator[str]:
    """An answer, and at each stage what that stage said of it."""
    first = steps[0].row
    assert isinstance(first, Sample)
    yield f"answer {first.id}  {first.model}, draw {first.draw}, finish {first.finish}"
    if first.asked != first.prompt.messages:
        yield "  asked:"
        yield from _turns(first.asked, "    ")
    yield f"  {_cut(first.response, SHOWN) or '(no text)'}"
    before: Sample | None = None
    for stage, ending, row in steps:
        assert isinstance(row, Sample)
        known = before.verdicts if before else []
        scores = {name: s for name, s in row.scores.items() if before is None or before.scores.get(name) != s}
        told = [
            *(_verdict(one) for one in row.verdicts[len(known) :]),
            *(f"{name} {score:g}" for name, score in scores.items()),
            *(["the answer is another one now"] if before and row.response != before.response else []),
        ]
        yield f"  {stage:22} {ending:8} {'; '.join(told)}".rstrip()
        before = row


def _told_made(folder: Path, one: Seen) -> Iterator[str]:
    row = one.row
    yield f"{_what(row)} {row.id}  {one.stage}, of {', '.join(row.parents) or 'nothing that is known'}"
    if isinstance(row, Pair):
        yield f"  margin {row.margin:g}"
        for side, said, score in (
            ("chosen", row.chosen, row.chosen_score),
            ("rejected", row.rejected, row.rejected_score),
        ):
            yield f"  {side}{'' if score is None else f' ({score:g})'}: {_cut(said[-1]['content'], SHOWN)}"
    elif isinstance(row, TrainRow):
        yield f"  scores: {', '.join(f'{name} {score:g}' for name, score in row.scores.items()) or 'none'}"
    places = list(_in_dataset(folder, row.id))
    yield from (f"  {place}" for place in places or ["not in the data set"])


def _what(row: Row) -> str:
    return "pair" if isinstance(row, Pair) else "training row"


def _verdict(verdict: Verdict) -> str:
    score = "" if verdict.score is None else f" score {verdict.score:g}"
    evidence = f" evidence {_cut(verdict.evidence, 200)}" if verdict.evidence else ""
    return f"{verdict.filter}: {verdict.reason or 'kept'}{score}{evidence}"


def _turns(messages: list[Message], indent: str = "  ") -> Iterator[str]:
    return (f"{indent}{message['role']}: {_cut(message['content'], SHOWN)}" for message in messages)


def _cut(text: str, most: int) -> str:
    """Text on one line, without what a terminal would act on."""
    plain = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return plain if len(plain) <= most else f"{plain[:most]} ... ({len(text)} characters)"


# -- where else a row stands ---------------------------------------------------------------------------------------------


def _in_dataset(folder: Path, id_: str) -> Iterator[str]:
    needle = f'"id":"{id_}"'.encode()
    for file in sorted((folder / "dataset").rglob("*.jsonl")):
        with file.open("rb") as lines:
            yield from (f"{file}, line {number}" for number, line in enumerate(lines, 1) if needle in line)


def _no_prompts(folder: Path) -> Iterator[Dropped]:
    """The rows of the lists that became no prompt."""
    file = folder / PROMPTS_DROPPED
    if file.is_file():
        with file.open("rb") as lines:
            yield from map(_dropped, lines)


def _in_lists(folder: Path, said: str, whole: bool = False) -> Iterator[Asked]:
    """Prompts of the run's lists by the beginning of their id (or by all of it); lists on a hub are not fetched."""
    for knobs in _lists(folder):
        try:
            if is_hub_id(knobs.path, find):
                continue
            as_prompt = prompt_reader(knobs.columns, knobs.title)
            for line, row in read(knobs.path, knobs.split, find):
                try:
                    prompt = as_prompt(row or {"prompt": ""}, f"{knobs.path}:{line}")
                except Unreadable:
                    continue
                if prompt.id == said if whole else prompt.id.startswith(said):
                    yield Asked(knobs.title, line, prompt)
        except RecipeError:
            continue  # the list is away or has changed: what the run folder holds is told all the same


def _lists(folder: Path) -> list[PromptSet]:
    try:
        data = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        return [PromptSet.model_validate(one) for one in data["prompts"]]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return []


def _read(path: Path) -> dict[str, Any]:
    try:
        return _dict(path.read_bytes())
    except (OSError, ValueError) as e:
        raise RecipeError(f"{path} cannot be read ({e}); run the recipe again to make it anew") from None


# -- rows by the reason of their end ---------------------------------------------------------------------------------------


def reasons(folder: Path) -> str:
    """Every reason with its stage and count."""
    lines = [f"{'reason':28} {'rows':>8}  stage"]
    lines += [f"{reason:28} {count:8}  {stage}" for stage, reason, count in _reasons(folder)]
    return "\n".join(
        [*lines, "", "--drops REASON lists the rows"] if len(lines) > 1 else ["no row was dropped or failed"]
    )


def drops(folder: Path, reason: str, limit: int) -> str:
    """The rows that ended for a reason, `limit` of them (0: all)."""
    counts: Counter[str] = Counter()
    for _, kind, count in _reasons(folder):
        counts[kind] += count
    if reason not in counts:
        raise RecipeError(f"--drops {reason}: no row ended so; {nearest(reason, counts)}")
    found = _ended(folder, reason)
    lines = list(islice(found, limit or None))
    more = sum(1 for _ in found)
    if more:
        lines.append(f"... and {more} more: --limit 0 shows all")
    if (bare := counts[reason] - len(lines) - more + bool(more)) > 0:
        lines.append(f"{bare} more are counted by a stage that keeps no rows of its own, a training for example")
    return "\n".join(lines)


def _reasons(folder: Path) -> Iterator[tuple[str, str, int]]:
    manifest = _read(folder / "manifest.json")
    for told in manifest.get("prompts", []):
        yield from ((f"prompts {told['name']}", reason, count) for reason, count in told["reasons"].items())
    for stage in manifest["stages"]:
        for reason, count in _read(folder / stage / "manifest.json")["reasons"].items():
            yield stage.rpartition("-")[0], reason, count


def _ended(folder: Path, reason: str) -> Iterator[str]:
    """A line for each row that ended for a reason."""
    for e in _no_prompts(folder):
        if kind_of(e.reason) == reason:
            evidence = f"  evidence {e.evidence}" if e.evidence else ""
            yield f"{e.list}, line {e.line}  {e.id or '-':16}  {e.reason}{evidence}"
    decode = msgspec.json.Decoder(Sample).decode
    for stage in _stages(folder):
        for shard in sorted(path for ending in ENDINGS[1:] for path in (folder / stage).glob(f"{ending}-*.jsonl")):
            with shard.open("rb") as lines:
                for row in map(decode, lines):
                    if kind_of(row.verdicts[-1].reason) == reason:
                        text = _cut(row.response or row.prompt.text, IN_LIST)
                        yield f"{stage.rpartition('-')[0]}  {row.id}  {_verdict(row.verdicts[-1])}  | {text}"
