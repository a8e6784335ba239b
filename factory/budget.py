"""The wall: money, requests, tokens and hours of a run, reserved before each send so that it is never overshot."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from pydantic import Field

from factory.errors import BudgetError, RecipeError
from factory.journal import Spent
from factory.knobs import Knobs
from factory.rows import FREE, Cost, Request, encode
from factory.teachers.entry import Entry, Price

LONGEST_TIMER_S = 86_400.0 * 300
"""Longer than any run; event loops refuse what is endless."""


class Budget(Knobs):
    """`budget:` of a recipe; it holds for all attempts of a run, those of earlier starts included."""

    usd: Decimal | None = Field(None, ge=0)
    requests: int | None = Field(None, ge=0)
    tokens: int | None = Field(None, ge=0)
    hours: float | None = Field(None, gt=0)


@dataclass(frozen=True, slots=True)
class Hold:
    """The worst case of one request, held back until what it really cost is known."""

    prompt_tokens: int
    completion_tokens: int
    usd: Decimal

    @classmethod
    def worst(cls, request: Request, price: Price | None) -> "Hold":
        # a token is at least one byte, so the request's bytes bound its prompt tokens whatever the tokenizer; a schema is
        # put before the model, too
        prompt_tokens = len(encode(request.messages))
        if request.sampling.response_format is not None:
            prompt_tokens += len(encode(request.sampling.response_format))
        draws = request.sampling.beam.width if request.sampling.beam else request.n
        completion_tokens = request.sampling.max_tokens * draws
        usd = price.worst(prompt_tokens, completion_tokens) if price else Decimal(0)
        return cls(prompt_tokens, completion_tokens, usd)


class Wall:
    """What is left of a budget. `reserve` before a send, then `settle` once, with what it cost or with nothing."""

    def __init__(self, budget: Budget, spent: Spent) -> None:
        self.budget = budget
        self.requests = spent.requests
        self.tokens = spent.prompt_tokens + spent.completion_tokens
        self.usd = Decimal(str(spent.usd))
        self._hours, self._started = spent.hours, time.monotonic()

    def reserve(self, request: Request, entry: Entry, model: str) -> Hold:
        """Hold the worst case of `request`; BudgetError when it does not fit under the wall."""
        if self.budget.usd is not None and entry.billed and entry.price is None:
            raise RecipeError(
                f"budget.usd is set, but models.{model} has no price; give price: {{input, output}} (0 is one)"
            )
        hold = Hold.worst(request, entry.price)
        b = self.budget
        hours = self._hours_used()
        for name, would_be, limit in (
            ("usd", self.usd + hold.usd, b.usd),
            ("requests", self.requests + 1, b.requests),
            ("tokens", self.tokens + hold.prompt_tokens + hold.completion_tokens, b.tokens),
            ("hours", hours, b.hours),
        ):
            if limit is not None and would_be > limit:
                raise BudgetError(
                    f"the next request could pass budget.{name}: {limit} (now at {self._now(name, hours)}, counting the "
                    "worst case of requests in flight); raise it and run again, stored answers are kept"
                )
        self.requests += 1
        self.tokens += hold.prompt_tokens + hold.completion_tokens
        self.usd += hold.usd
        return hold

    def when_hours_end(self, stop: Callable[[BudgetError], None]) -> asyncio.TimerHandle:
        """Call `stop` when the hours are used up, also while nothing is sent; at once is left to the next `reserve`."""
        left = math.inf if self.budget.hours is None else (self.budget.hours - self._hours_used()) * 3600
        error = BudgetError(
            f"budget.hours: {self.budget.hours} are used up; raise it and run again, stored answers are kept"
        )
        return asyncio.get_running_loop().call_later(min(max(left, 0.1), LONGEST_TIMER_S), stop, error)

    def _hours_used(self) -> float:
        return self._hours + (time.monotonic() - self._started) / 3600

    def settle(self, hold: Hold, cost: Cost | None) -> None:
        """Replace the worst case by what it cost; where nobody knows (None) it stays."""
        if cost is not None:
            used = cost.usage.prompt_tokens + cost.usage.completion_tokens
            self.tokens += used - hold.prompt_tokens - hold.completion_tokens
            self.usd += cost.usd - hold.usd

    def withdraw(self, hold: Hold) -> None:
        """Forget a request that was never sent."""
        self.settle(hold, FREE)
        self.requests -= 1

    def _now(self, name: str, hours: float) -> str:
        return {
            "usd": f"{self.usd:.4f}",
            "requests": str(self.requests),
            "tokens": str(self.tokens),
            "hours": f"{hours:.2f}",
        }[name]
