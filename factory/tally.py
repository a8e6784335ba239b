"""What asking came to: a round's requests, tokens and money, and the draws that it lost."""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple

from factory.rows import Cost, Failure, Usage


class Lost(NamedTuple):
    """Draws of a stage that ended without an answer, or with a verdict that cannot be read; the first one's `flaw`."""

    planned: int = 0
    unanswered: int = 0
    unreadable: int = 0
    flaw: str = ""

    def beyond(self, limit: float) -> str | None:
        """What is to be said where this is more than the share that `--max-failed` allows."""
        if self.unanswered + self.unreadable <= limit * self.planned:
            return None
        unanswered = f"{self.unanswered} of {self.planned} draws have no answer"
        unreadable = f"{self.unreadable} of {self.planned} verdicts could not be read"
        what = " and ".join([unanswered] * bool(self.unanswered) + [unreadable] * bool(self.unreadable))
        told = f"{what}, more than --max-failed {limit:g}"
        return f"{told}; the first verdict: {self.flaw}" if self.unreadable else told


@dataclass(slots=True)
class Tally:
    """What one round of asking did, in requests `sent` and draws. `failures`: answer key -> why it has no answer.

    `unreadable` verdicts are answers, but useless to the judge that asked for them; `flaw` is that of the first one.
    """

    sent: int = 0
    reused: int = 0
    planned: int = 0
    usage: Usage = field(default_factory=Usage)
    usd: Decimal = Decimal(0)
    failures: dict[str, Failure] = field(default_factory=dict)
    unreadable: int = 0
    flaw: str = ""

    def add(self, other: "Tally") -> None:
        """Another round of the same asking; what is `planned` stays."""
        self.sent, self.reused = self.sent + other.sent, self.reused + other.reused
        self.usage, self.usd = self.usage.plus(other.usage), self.usd + other.usd
        self.unreadable, self.flaw = self.unreadable + other.unreadable, self.flaw or other.flaw
        self.failures |= other.failures

    def spend(self, cost: Cost | None) -> None:
        if cost is not None:
            self.usage, self.usd = self.usage.plus(cost.usage), self.usd + cost.usd
