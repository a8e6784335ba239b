"""The three shapes of filters; the shape tells the cost."""

from collections.abc import Callable, Iterable
from typing import Protocol, Self, TypeAlias

from factory.child import Child
from factory.knobs import Knobs
from factory.rows import Sample, Verdict

Look: TypeAlias = Callable[[], Iterable[list[Sample]]]
"""Samples by prompt, read afresh from the first at each call."""

Judge: TypeAlias = Callable[[list[Sample]], list[Verdict]]
"""A verdict for each of some samples of one prompt."""


class Kit(Protocol):
    """What a filter may need from the run."""

    allow_code: bool
    """Whether programs that models wrote may be run here (`--allow-code`)."""

    def tokenizer(self, name: str | None) -> Callable[[str], int]:
        """Counts a text's tokens as a local model does; None is the recipe's first student."""
        ...

    def encoder(self, name: str) -> Callable[[], Child]:
        """Starts a process in which a local model reads texts (`encoder.py`)."""
        ...


class Shape(Knobs):
    """A filter: thresholds, and verdicts in its own name."""

    kind: str

    def open(self, kit: Kit) -> Self:
        """The same filter, ready to look at rows; most need nothing."""
        return self

    def files(self) -> list[str]:
        """Files whose content is part of what it does, as the recipe names them."""
        return []

    def keep(self, score: float | None = None) -> Verdict:
        return Verdict(filter=self.kind, keep=True, score=score)

    def drop(self, reason: str, score: float | None = None, evidence: str | None = None) -> Verdict:
        return Verdict(filter=self.kind, keep=False, reason=reason, score=score, evidence=evidence)

    def cannot_tell(self, reason: str, evidence: str | None = None) -> Verdict:
        """Sets a row aside: broken is not bad."""
        return Verdict(filter=self.kind, keep=None, reason=reason, evidence=evidence)


class RowFilter(Shape):
    """Looks at one sample at a time."""

    @property
    def apart(self) -> bool:
        """Whether a check waits for a process of its own: then several go on at once."""
        return False

    def check(self, sample: Sample) -> Verdict:
        raise NotImplementedError


class GroupFilter(Shape):
    """Looks at all samples of one prompt."""

    def check_group(self, samples: list[Sample]) -> list[Verdict]:
        raise NotImplementedError


class SetFilter(Shape):
    """Looks at all rows: `start` makes an index, and returns what judges the groups one after another.

    `look()` reads all groups that will reach this filter, for those that must know the last row to judge the first.
    """

    def start(self, look: Look) -> Judge:
        raise NotImplementedError
