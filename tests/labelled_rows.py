"""Labelled answers of `tests/labelled/`, and how well a rule does on them."""

import json
from pathlib import Path
from typing import NamedTuple

from factory.rows import Message, Sample
from tests.sample_rows import answer, one_filter, prompt

FOLDER = Path(__file__).parent / "labelled"
RULES = ["no_refusal", "repetition", "leakage", "trace", "personal_data"]


class Labelled(NamedTuple):
    """An answer, whether it is bad, and in which half it stands."""

    bad: bool
    held_out: bool
    kind: str
    sample: Sample


def labelled(rule: str) -> list[Labelled]:
    """All rows of a rule's file."""
    lines = (FOLDER / f"{rule}.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Labelled(row["bad"], row["held_out"], row["kind"], _sample(row, number))
        for number, row in enumerate(map(json.loads, lines))
    ]


def _sample(row: dict[str, str], number: int) -> Sample:
    system = [Message(role="system", content=row["system"])] if "system" in row else []
    turns = [*system, Message(role="user", content=row.get("prompt", f"question {number}"))]
    return answer(row["text"].replace("¦", ""), prompt(turns=turns), reasoning=row.get("reasoning"))


class Score(NamedTuple):
    """How a rule did: bad rows that it dropped, good rows that it dropped, out of how many."""

    caught: int
    bad: int
    alarms: int
    good: int

    @property
    def recall(self) -> float:
        return self.caught / self.bad

    @property
    def precision(self) -> float:
        return self.caught / (self.caught + self.alarms)


def scored(rule: str, held_out: bool | None = None) -> Score:
    """A rule, with its defaults, over its labelled rows: all, or one half."""
    one = one_filter(rule)
    rows = [(row, not one.check(row.sample).keep) for row in labelled(rule) if held_out in (None, row.held_out)]
    bad, good = ([dropped for row, dropped in rows if row.bad is kind] for kind in (True, False))
    return Score(sum(bad), len(bad), sum(good), len(good))
