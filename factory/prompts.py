"""Prompt lists in: rows of several well-known forms become `Prompt`s with content ids, split once into train and test.

Every row of a file ends somewhere: it is a prompt, or an `Ending` with a reason. Rows are streamed, but the prompts that
are kept stay in memory: a million of 500 characters are about 1 GB.

The split. `held_out: N` takes the N prompts with the smallest hash of (seed, id), so neither order nor the rest of the
file decides about a prompt. Two exceptions keep it honest. Near-duplicates go to one side together: groups of them are
taken, smallest hash first, as long as they fit into N. And when rows are added, a new prompt with a smaller hash can
push the *last* of the held-out ones back into train; it never swaps any other.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from factory import rows
from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.prompt_files import read
from factory.prompt_rows import Column, Unreadable, prompt_reader
from factory.rows import Prompt, Row

MAX_CHARACTERS = 100_000
NEAR = 0.8
"""Similarity from which two prompts must not stand on both sides of the split."""

Find = Callable[[str], Path]
"""From a path in a recipe to a file: in the working directory, else among what ships; RecipeError if in neither."""


class PromptSet(Knobs):
    """One list of prompts. `columns` maps a field of ours to a column's name, or to a Jinja template over columns."""

    path: str
    name: str | None = None
    split: str | None = None
    columns: dict[Column, str] = {}
    take: int | None = Field(None, gt=0)
    held_out: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> "PromptSet":
        if {"prompt", "messages"} <= self.columns.keys():
            raise ValueError("columns: map `prompt` or `messages`, not both")
        return self

    @property
    def title(self) -> str:
        """The name that `from:` uses: `name`, or the file's or data set's own."""
        return self.name or Path(self.path).stem


class Ending(Row, frozen=True):
    """A row that did not become a prompt. `row` is its line in the file; `evidence` is the twin's id."""

    row: int
    id: str | None
    reason: str
    evidence: str | None = None

    @property
    def kind(self) -> str:
        """What the funnel counts."""
        return self.reason.partition("=")[0].partition(":")[0]


class Funnel(rows.Row, frozen=True, rename={"in_": "in"}, omit_defaults=False):
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
    """One list, read and split. `kept` are (line, prompt) in file order; `held_out` are ids."""

    name: str
    kept: list[tuple[int, Prompt]]
    endings: list[Ending]
    wanted: int = 0
    held_out: set[str] = field(default_factory=set)
    straddling: int = 0

    @property
    def train(self) -> list[Prompt]:
        return [prompt for _, prompt in self.kept if prompt.id not in self.held_out]

    @property
    def test(self) -> list[Prompt]:
        return [prompt for _, prompt in self.kept if prompt.id in self.held_out]

    @property
    def funnel(self) -> Funnel:
        reasons = Counter(ending.kind for ending in self.endings)
        failed, test = reasons["unreadable"], len(self.test)
        return Funnel(
            stage="prompts", name=self.name, unit="rows", in_=len(self.kept) + len(self.endings), kept=len(self.kept),
            dropped=reasons.total() - failed, failed=failed, reasons=dict(reasons), train=len(self.kept) - test, test=test,
        )  # fmt: skip


class PromptLists:
    """All lists of a recipe, by name."""

    def __init__(self, lists: list[PromptList]) -> None:
        self.by_name = {one.name: one for one in lists}

    def __iter__(self) -> Any:
        return iter(self.by_name.values())

    def train(self, name: str) -> list[Prompt]:
        return self.by_name[name].train

    def test(self, name: str) -> list[Prompt]:
        return self.by_name[name].test

    def digest(self, name: str) -> str:
        """Equal when the same prompts, with the same references and answers, stand on the same sides."""
        return rows.digest(self.train(name), self.test(name))

    @cached_property
    def funnel(self) -> list[Funnel]:
        return [one.funnel for one in self]
