"""The three shapes of filters; the shape tells the cost."""

from collections.abc import Callable
from typing import Protocol, Self

from factory.knobs import Knobs
from factory.rows import Sample, Verdict


class Kit(Protocol):
    """What a filter may need from the run."""

    def tokenizer(self, name: str | None) -> Callable[[str], int]:
        """Counts a text's tokens as a local model does; None is the recipe's first student."""
        ...


class Shape(Knobs):
    """A filter: thresholds, and verdicts in its own name."""

    kind: str

    def open(self, kit: Kit) -> Self:
        """The same filter, ready to look at rows; most need nothing."""
        return self

    def keep(self, score: float | None = None) -> Verdict:
        return Verdict(filter=self.kind, keep=True, score=score)

    def drop(self, reason: str, score: float | None = None, evidence: str | None = None) -> Verdict:
        return Verdict(filter=self.kind, keep=False, reason=reason, score=score, evidence=evidence)


class RowFilter(Shape):
    """Looks at one sample at a time."""

    def check(self, sample: Sample) -> Verdict:
        raise NotImplementedError


class GroupFilter(Shape):
    """Looks at all samples of one prompt."""

    def check_group(self, samples: list[Sample]) -> list[Verdict]:
        raise NotImplementedError


class SetFilter(Shape):
    """Looks at all rows: `start` makes an index, and returns what judges the groups one after another."""

    def start(self) -> Callable[[list[Sample]], list[Verdict]]:
        raise NotImplementedError
