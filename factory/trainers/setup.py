"""What every trainer is given, and the proof that what TRL makes of it is what the preflight saw."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from factory.trainers.preflight import Refused, Tokens

LOOKED_AT = 50
"""Rows whose tokens are compared with TRL's; every row went through the preflight."""


class Setup(NamedTuple):
    """A training before its trainer: `rows` passed the preflight, `args` are TRL's, `teacher` a local model or None,
    `classes` the weights of tags, `kept` a folder for what other trainings can use."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]
    args: dict[str, Any]
    peft: Any
    callback: Any
    teacher: Any = None
    classes: dict[str, float] = {}
    kept: Path | None = None

    @property
    def first_rows(self) -> list[dict[str, Any]]:
        return self.rows[:LOOKED_AT]


def same(rows: Iterable[dict[str, Any]], ours: Iterable[Tokens], theirs: Iterable[Tokens]) -> None:
    """`Refused` where TRL's tokens, or which of them are in its loss, are not the preflight's."""
    for row, seen, made in zip(rows, ours, theirs, strict=True):
        if seen != made:
            raise Refused(
                f"row {row['id']}: TRL's tokens or loss mask differ from the preflight's; the row would train otherwise than shown"
            )
