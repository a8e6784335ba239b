"""Rules that look at one answer: cheap, so they stand first in a recipe.

| filter | threshold | source |
|---|---|---|
| finished | the model ended by itself | truncated rows teach never to stop |
| words, tokens | given in the recipe | - |
| repetition | half of a long answer's word 4-grams repeat, or a tail loops 4 times | Gopher (Rae et al. 2021, table A1), but looser |
| format | given in the recipe | - |
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from factory.filters.pattern import Pattern, Undecided
from factory.filters.shapes import Kit, RowFilter
from factory.rows import Sample, Verdict


class Finished(RowFilter):
    """Drops answers that did not end by themselves."""

    kind: Literal["finished"] = "finished"

    def check(self, sample: Sample) -> Verdict:
        return self.keep() if sample.finish == "stop" else self.drop(f"unfinished:{sample.finish}")


class Bounds(RowFilter):
    """A count between `min` and `max`, both allowed."""

    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max: {self.max}")
        return self

    def within(self, count: int) -> Verdict:
        if self.min is not None and count < self.min:
            return self.drop(f"{self.kind}={count}<{self.min}", score=count)
        if self.max is not None and count > self.max:
            return self.drop(f"{self.kind}={count}>{self.max}", score=count)
        return self.keep()


class Words(Bounds):
    """Length in words."""

    kind: Literal["words"] = "words"

    def check(self, sample: Sample) -> Verdict:
        return self.within(len(sample.response.split()))


class Tokens(Bounds):
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


class Repetition(RowFilter):
    """Drops degenerate loops."""

    kind: Literal["repetition"] = "repetition"
    max_repeated: float = Field(0.5, gt=0, le=1)
    min_words: int = Field(20, gt=0)

    def check(self, sample: Sample) -> Verdict:
        words = sample.response.split()
        if loops := _looping_tail([word.rstrip(".,;:!?") for word in words]):
            return self.drop(f"looping_tail={loops}", score=loops)
        if len(words) >= self.min_words:
            grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
            share = 1 - len(grams) / max(grams.total(), 1)
            if share > self.max_repeated:
                most = " ".join(grams.most_common(1)[0][0])
                return self.drop(f"repeated_4grams={share:.2f}>{self.max_repeated}", score=share, evidence=most)
        return self.keep()


def _looping_tail(words: list[str]) -> int:
    """How often the last words repeat, where 1 to 8 words stand at least 4 times (8 for a single word); else 0."""
    for size in range(1, 9):
        needed = 8 if size == 1 else 4
        if len(words) < size * needed:
            break
        unit, times = words[-size:], 1
        while words[-size * (times + 1) : -size * times] == unit:
            times += 1
        if times >= needed:
            return times
    return 0


class Format(RowFilter):
    """The answer matches a regular expression: as a whole, or with `full: false` anywhere."""

    kind: Literal["format"] = "format"
    pattern: str
    full: bool = True
    _pattern: Pattern = PrivateAttr()

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return Pattern(pattern).text

    def model_post_init(self, context: Any) -> None:
        self._pattern = Pattern(self.pattern)

    def check(self, sample: Sample) -> Verdict:
        try:
            found = self._pattern.try_on(sample.response, "fullmatch" if self.full else "search")
        except Undecided as e:
            return self.cannot_tell(str(e))
        return self.keep() if found else self.drop("format", evidence=sample.response[:100])
