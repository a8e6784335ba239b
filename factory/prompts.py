"""Prompt lists in: rows become prompts with content ids, are linted, and split once into train and test.

Every row of a file ends somewhere: it is a prompt, or an `Ending` with a reason. Rows are read once; the prompts that
are kept go to a file of their own, and memory holds a few numbers for each, however long they are.

The split. `held_out: N` takes the N prompts with the smallest hash of (seed, id): neither order nor other rows decide
about a prompt, and rows added later leave a held-out prompt where it is, except that each new one with a smaller hash
takes the place of the one with the largest. Near-duplicates go to one side together: groups of them are taken in the
order of their smallest hash, if they still fit into N.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.prompt_files import READERS, Find, read
from factory.prompt_rows import Column, Reader, Unreadable, prompt_reader
from factory.prompt_spool import Part, Spool
from factory.rows import Prompt, Row, digest, encode, kind_of
from factory.similar import similar_to

MAX_CHARACTERS = 100_000
NEAR = 0.8
"""Similarity from which two prompts must not stand on both sides of the split."""


class PromptSet(Knobs):
    """One list of prompts. `columns` maps a field of ours to a column's name, or to a Jinja template over columns.

    `held_out: all` is for a list that is only measured on; `licence` is told in the data set's card.
    """

    path: str = Field(min_length=1)
    name: str | None = None
    split: str | None = None
    columns: dict[Column, str] = {}
    licence: str | None = Field(None, min_length=1)
    take: int | None = Field(None, gt=0)
    held_out: Annotated[int, Field(ge=0)] | Literal["all"] = 0

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> "PromptSet":
        if {"prompt", "messages"} <= self.columns.keys():
            raise ValueError("columns: map `prompt` or `messages`, not both")
        return self

    @property
    def title(self) -> str:
        """The name that `from:` uses: `name`, or the file's or data set's own."""
        path = Path(self.path)
        return self.name or (path.stem if path.suffix in READERS else path.name)


class Ending(Row, frozen=True):
    """A row that did not become a prompt. `row` is its line in the file; `evidence` is the twin's id."""

    row: int
    id: str | None
    reason: str
    evidence: str | None = None

    @property
    def kind(self) -> str:
        """What the funnel counts."""
        return kind_of(self.reason)


class Dropped(Row, frozen=True):
    """An ending as the run folder tells it: of which list, and where in its file."""

    list: str
    line: int
    id: str | None
    reason: str
    evidence: str | None = None


class Funnel(Row, frozen=True, rename={"in_": "in"}):
    """in = kept + dropped + failed, in rows read; kept = train + test."""

    stage: Literal["prompts"]
    name: str
    unit: Literal["rows"]
    in_: int
    kept: int
    dropped: int
    failed: int
    reasons: dict[str, int]
    train: int
    test: int


@dataclass
class PromptList:
    """One list, read and split. `lines` and `ids` (as numbers) are those of all `prompts`, kept or not; the sets hold ids
    of prompts that do not go into `train`. `wanted` is how many were to be held out, or "all"; `references` and `answers`,
    how many prompts have one; `scores`, the names of the answers' scores; `again`, how many bring another answer to a prompt
    that stands before them."""

    name: str
    wanted: int | Literal["all"] = 0
    prompts: Spool = field(default_factory=Spool)
    lines: "array[int]" = field(default_factory=lambda: array("Q"))
    ids: "array[int]" = field(default_factory=lambda: array("Q"))
    endings: list[Ending] = field(default_factory=list)
    held_out: set[str] = field(default_factory=set)
    held_out_elsewhere: set[str] = field(default_factory=set)
    straddling: int = 0
    references: int = 0
    answers: int = 0
    scores: set[str] = field(default_factory=set)
    again: int = 0

    def add(self, line: int, prompt: Prompt) -> None:
        self.prompts.append(prompt)
        self.lines.append(line)
        self.ids.append(int(prompt.id, 16))
        self.references += prompt.reference is not None
        self.answers += prompt.completion is not None
        self.scores.update(prompt.scores)

    @property
    def kept(self) -> Iterator[tuple[int, Prompt]]:
        """Line in the file, and prompt, in file order."""
        both = zip(self.lines, Part(self.prompts, range(len(self.prompts))), strict=True)
        return ((line, prompt) for line, prompt in both if prompt.id not in self.held_out_elsewhere)

    @property
    def train(self) -> Part:
        elsewhere = {int(id_, 16) for id_ in self.held_out | self.held_out_elsewhere}
        return Part(self.prompts, array("Q", (i for i, number in enumerate(self.ids) if number not in elsewhere)))

    @property
    def test(self) -> Part:
        held_out = {int(id_, 16) for id_ in self.held_out}
        return Part(self.prompts, array("Q", (i for i, number in enumerate(self.ids) if number in held_out)))

    @property
    def funnel(self) -> Funnel:
        reasons = Counter(ending.kind for ending in self.endings)
        failed, train, test = reasons["unreadable"], len(self.train), len(self.test)
        return Funnel(
            stage="prompts", name=self.name, unit="rows", in_=train + test + len(self.endings),
            kept=train + test, dropped=reasons.total() - failed, failed=failed, reasons=dict(+reasons),
            train=train, test=test,
        )  # fmt: skip


class PromptLists:
    """All lists of a recipe, by name."""

    def __init__(self, lists: Iterable[PromptList]) -> None:
        self.by_name = {one.name: one for one in lists}
        self._digests: dict[str, str] = {}

    def __iter__(self) -> Iterator[PromptList]:
        return iter(self.by_name.values())

    def train(self, name: str) -> Part:
        return self.by_name[name].train

    def test(self, name: str) -> Part:
        return self.by_name[name].test

    def distinct(self, name: str) -> bool:
        """Whether each prompt of a list stands there once."""
        return not self.by_name[name].again

    def digest(self, name: str) -> str:
        """Equal when the same prompts, with the same references and answers, stand on the same sides."""
        if name not in self._digests:
            one = self.by_name[name]
            self._digests[name] = digest(name, one.train.digest, one.test.digest)
        return self._digests[name]

    @property
    def funnel(self) -> list[Funnel]:
        return [one.funnel for one in self]

    def dropped(self) -> Iterator[bytes]:
        """A line of JSON for each row that is no prompt, one at a time."""
        for one in self:
            for e in one.endings:
                row = Dropped(list=one.name, line=e.row, id=e.id, reason=e.reason, evidence=e.evidence)
                yield encode(row) + b"\n"


def load(sets: list[PromptSet], seed: int, find: Find) -> PromptLists:
    """Read and split every list. RecipeError, with file and line, for what cannot be read or makes no sense."""
    lists: list[PromptList] = []
    for knobs in sets:
        if any(knobs.title == other.name for other in lists):
            raise RecipeError(f"prompts: two lists are called {knobs.title!r}; give one of them `name:`")
        lists.append(load_one(knobs, seed, find))
    return together(lists)


def load_one(knobs: PromptSet, seed: int, find: Find) -> PromptList:
    """Read and split one list."""
    one = _read(knobs, find)
    _split(one, seed)
    return one


def together(lists: list[PromptList]) -> PromptLists:
    """Lists of one recipe: what one of them holds out is not in another's train part."""
    for one in lists:
        _keep_apart(one, [other for other in lists if other is not one])
    return PromptLists(lists)


def lint(lists: PromptLists) -> list[str]:
    """What is odd about the lists, in lines for people; empty when all is well."""
    return [f"{one.name}: {line}" for one in lists for line in _oddities(one)]


def _oddities(one: PromptList) -> Iterator[str]:
    firsts = {ending.kind: ending for ending in reversed(one.endings)}
    for kind, number in sorted(Counter(ending.kind for ending in one.endings).items()):
        first = f"first: line {firsts[kind].row}, {firsts[kind].reason}"
        yield f"{number} of {one.funnel.in_} rows left out: {kind} ({first})"
    if one.straddling:
        yield f"{one.straddling} groups of near-duplicates would stand in both train and test; each is kept on one side"
    if one.wanted != "all" and one.wanted > len(one.held_out):
        yield f"{len(one.held_out)} prompts are held out, not {one.wanted}: more would divide near-duplicates"
    if not one.train and one.wanted != "all":
        yield "no prompt is left to train on"


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(knobs: PromptSet, find: Find) -> PromptList:
    """The rows of one list up to `take` good ones; each is kept or has an ending."""
    as_prompt = prompt_reader(knobs.columns, knobs.title)
    one = PromptList(knobs.title, knobs.held_out)
    seen = _Seen(one, knobs.path)
    for line, row in read(knobs.path, knobs.split, find):
        got = _made(row, line, as_prompt, knobs.path)
        if isinstance(got, Prompt) and (first := seen.first(got)) is not None:
            got = seen.duplicate(got, line, first) or got
            one.again += isinstance(got, Prompt)
        if isinstance(got, Ending):
            one.endings.append(got)
        else:
            one.add(line, got)
            if len(one.lines) == knobs.take:
                break
    if not one.prompts:
        why = f"; line {one.endings[0].row}: {one.endings[0].reason}" if one.endings else ""
        raise RecipeError(f"{knobs.path}: there are no prompts in it{why}")
    return one


def _made(row: dict[str, Any] | None, line: int, as_prompt: Reader, path: str) -> Prompt | Ending:
    if row is None:
        return Ending(row=line, id=None, reason="empty")
    try:
        prompt = as_prompt(row, f"{path}:{line}")
    except Unreadable as e:
        return Ending(row=line, id=None, reason=f"unreadable: {e}")
    if not prompt.text.strip():
        return Ending(row=line, id=None, reason="empty")
    size = sum([len(message["content"]) for message in prompt.messages])
    if size > MAX_CHARACTERS:
        return Ending(row=line, id=prompt.id, reason=f"over_long={size}>{MAX_CHARACTERS}")
    return prompt


class _Seen:
    """Which prompts a list has so far, and which answers came with those that it has more than once."""

    def __init__(self, one: PromptList, path: str) -> None:
        self.one, self.path = one, path
        self._first: dict[int, int] = {}  # id -> position in the list
        self._answers: dict[int, int] = {}  # prompt and answer, of prompts that stand there again -> position

    def first(self, prompt: Prompt) -> int | None:
        """Where in the list the same messages stand already; a new prompt is remembered."""
        here = len(self.one.lines)
        position = self._first.setdefault(int(prompt.id, 16), here)
        return None if position == here else position

    def duplicate(self, prompt: Prompt, line: int, position: int) -> Ending | None:
        """The same messages again. Another answer to them is data; another reference is a contradiction."""
        first, first_line = self.one.prompts.read(position), self.one.lines[position]
        if first.reference != prompt.reference:
            raise RecipeError(
                f"{self.path}: lines {first_line} and {line} ask the same, but their references differ: "
                f"{_shown(first.reference)} and {_shown(prompt.reference)}"
            )
        self._answers.setdefault(_answer(first), position)
        here = len(self.one.lines)
        if (same := self._answers.setdefault(_answer(prompt), here)) != here:
            scores = self.one.prompts.read(same).scores  # which stand, whatever the row says
            again = "duplicate" if scores == prompt.scores else "scored_twice"
            reason = f"{again}: of line {self.one.lines[same]}"
            return Ending(row=line, id=prompt.id, reason=reason, evidence=prompt.id)
        return None


def _answer(prompt: Prompt) -> int:
    return int(digest(prompt.id, prompt.completion, prompt.rejected, size=8), 16)


def _shown(reference: str | None) -> str:
    return repr(reference[:60]) if reference else "none"


# -- the split -------------------------------------------------------------------------------------------------------


def _split(one: PromptList, seed: int) -> None:
    """Choose the held-out ids: whole groups of near-duplicates, smallest hash first, while they fit."""
    if one.wanted == "all":
        one.held_out = set(_ids(one))
        return
    if not one.wanted:
        return
    total = len(set(one.ids))
    if one.wanted >= total:
        raise RecipeError(
            f"prompts {one.name}: held_out: {one.wanted} of {total} prompts leaves none to train on; say held_out: all for a "
            "list that is only measured on"
        )
    looked_at = one.wanted
    while len(one.held_out) < one.wanted and looked_at < total:
        looked_at = min(2 * looked_at, total)  # those with larger hashes matter only where groups do not fit
        one.held_out.clear()
        by_hash = heapq.nsmallest(looked_at, _ids(one), key=lambda id_: digest("held out", seed, id_))
        groups = _groups(one.train, by_hash)
        for group in groups:  # in the order of their smallest hash
            if len(one.held_out) + len(group) <= one.wanted:
                one.held_out.update(group)
    blindly = set(by_hash[: one.wanted])
    one.straddling = sum(1 for group in groups if 0 < len(blindly.intersection(group)) < len(group))
    if not one.held_out:
        raise RecipeError(f"prompts {one.name}: held_out: {one.wanted} is less than any group of near-duplicates")


def _ids(one: PromptList) -> Iterator[str]:
    """Each id once."""
    return (f"{number:016x}" for number in set(one.ids))


def _groups(prompts: Part, ids: list[str]) -> list[set[str]]:
    """The groups of near-duplicates that the `ids` are in, in their order."""
    wanted = dict.fromkeys(ids, "")
    wanted.update((prompt.id, _said(prompt)) for prompt in prompts if prompt.id in wanted)
    groups: dict[str, set[str]] = {}
    for id_, first in _similar(wanted, prompts).items():
        groups.setdefault(first, set()).add(id_)
    return [groups[id_] for id_ in ids if id_ in groups]


def _keep_apart(one: PromptList, others: list[PromptList]) -> None:
    """Take out of a list's train part what is held out elsewhere, or nearly the same as that."""
    tests = {prompt.id: _said(prompt) for other in others for prompt in other.test}
    train = one.train
    if not tests or not train:
        return
    near = _similar(tests, train)
    out = near.keys() - one.held_out
    for line, prompt in one.kept:
        if prompt.id in out:
            evidence = prompt.id if prompt.id in tests else near[prompt.id]
            one.endings.append(Ending(row=line, id=prompt.id, reason="held_out_elsewhere", evidence=evidence))
    one.held_out_elsewhere = out


def _similar(seeds: Mapping[str, str], prompts: Part) -> dict[str, str]:
    return similar_to(seeds, lambda: ((prompt.id, _said(prompt)) for prompt in prompts), NEAR)


def _said(prompt: Prompt) -> str:
    """What a prompt is compared by: all of it but the system message, which many prompts share."""
    return "\n".join(message["content"] for message in prompt.messages if message["role"] != "system")
