"""Labelled answers of `tests/labelled/`, and how well a rule does on them."""

import json
from pathlib import Path
from typing import NamedTuple

from factory.rows import Message, Sample
from tests.sample_rows import answer, prompt

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
