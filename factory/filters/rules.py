"""Rules that look at one answer: cheap, so they stand first in a recipe.

| filter | threshold | source |
|---|---|---|
| finished | the model ended by itself | truncated rows teach never to stop |
| words, tokens, ratio | given in the recipe | - |
"""

from collections.abc import Callable
from typing import Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from factory.filters.said import count
from factory.filters.shapes import Kit, RowFilter
from factory.rows import Sample, Verdict


class Finished(RowFilter):
    """Drops answers that did not end by themselves."""

    kind: Literal["finished"] = "finished"

    def check(self, sample: Sample) -> Verdict:
        return self.keep() if sample.finish == "stop" else self.drop(f"unfinished:{sample.finish}")


class Bounds(RowFilter):
    """A measure between `min` and `max`, both allowed."""

    min: float | None = Field(None, ge=0)
    max: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max: {self.max}")
        return self

    def within(self, count: float) -> Verdict:
        if self.min is not None and count < self.min:
            return self.drop(f"{self.kind}={count}<{self.min}", score=count)
        if self.max is not None and count > self.max:
            return self.drop(f"{self.kind}={count}>{self.max}", score=count)
        return self.keep()


class Count(Bounds):
    """Bounds that are whole numbers."""

    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)


class Words(Count):
    """Length in words; in scripts that are written without blanks, such as Chinese, in characters."""

    kind: Literal["words"] = "words"

    def check(self, sample: Sample) -> Verdict:
        return self.within(count(sample.response))


class Tokens(Count):
    """Length in tokens of a local model's tokenizer; the recipe's first student's unless `model` names another."""

    kind: Literal["tokens"] = "tokens"
    model: str | None = None
    _count: Callable[[str], int] | None = PrivateAttr(None)

    def open(self, kit: Kit) -> Self:
        opened = self.model_copy()
        opened._count = kit.tokenizer(self.model)
        return opened

    def check(self, sample: Sample) -> Verdict:
        assert self._count is not None
        return self.within(self._count(sample.response))


class Ratio(Bounds):
    """Words of the answer for each word of the prompt; an empty prompt counts as one word."""

    kind: Literal["ratio"] = "ratio"

    def check(self, sample: Sample) -> Verdict:
        asked = max(count(sample.prompt.text), 1)
        return self.within(round(count(sample.response) / asked, 2))
