"""What all model entries of a recipe have in common: limits, prices, terms."""

from decimal import Decimal
from typing import ClassVar

from pydantic import Field

from factory.knobs import Knobs
from factory.rows import Usage

MILLION = 1_000_000


class Limits(Knobs):
    """How hard a teacher may be driven. `timeout_s` is for the whole request; a 429 or 503 is not an attempt."""

    rpm: int | None = Field(None, gt=0)
    tpm: int | None = Field(None, gt=0)
    max_concurrency: int = Field(64, gt=0)
    timeout_s: float = Field(120.0, gt=0)
    max_attempts: int = Field(6, gt=0)


class Price(Knobs):
    """US dollars per million tokens; `batch` is the factor on all of them in a batch, for example 0.5."""

    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    batch: Decimal = Field(Decimal(1), ge=0)

    def usd(self, usage: Usage) -> Decimal:
        """What a request cost; cached prompt tokens are billed at `cached` where it is given."""
        cached = usage.cached_tokens if self.cached is not None else 0
        fresh = usage.prompt_tokens - cached
        return (self.input * fresh + (self.cached or 0) * cached + self.output * usage.completion_tokens) / MILLION

    def in_batch(self) -> "Price":
        """What the same tokens cost in a batch."""
        prices = {name: price * self.batch for name, price in self if price is not None}
        return self.model_copy(update=prices | {"batch": Decimal(1)})


class Entry(Knobs):
    """A model that can answer: base of the records under `models:`. `terms` says what its answers may be used for."""

    billed: ClassVar[bool] = False
    """Whether somebody sends a bill: then a money budget needs a price."""

    limits: Limits = Limits()
    price: Price | None = None
    terms: str | None = None
