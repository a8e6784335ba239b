"""A threshold on a score that an earlier stage has given: `score: {name: ifd, max: 1}`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from factory.filters.shapes import RowFilter
from factory.rows import Sample, Verdict


class Threshold(RowFilter):
    """Drops rows whose score is below `min` or above `max`, both allowed; a row without the score is set aside."""

    kind: Literal["score"] = "score"
    name: str = Field(min_length=1)
    min: float | None = Field(None, allow_inf_nan=False)
    max: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min:g} is more than max: {self.max:g}")
        return self

    def check(self, sample: Sample) -> Verdict:
        value = sample.value(self.name)
        if value is None:
            return self.cannot_tell(f"no_score:{self.name}")
        if self.min is not None and value < self.min:
            return self.drop(f"{self.name}={value:.4g}<{self.min:g}", score=value)
        if self.max is not None and value > self.max:
            return self.drop(f"{self.name}={value:.4g}>{self.max:g}", score=value)
        return self.keep()
