"""What an evaluation must reach: `require: {retention: ">= 0.8"}`. Told by the value for the last student; its interval is
shown beside it, and does not decide."""

import json
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from factory.errors import NotReached
from factory.measures import known

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
SHARES = {"retention": "ratio", "gap_closed": "gap"}
"""Of the teacher's result in `correct`, or in `accepted` where no held-out prompt has a reference."""
WANTED = re.compile(r"\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d*)?|-?\.\d+)\s*(%?)\s*")


class Gate(NamedTuple):
    """One requirement, as it turned out; `met` is False also where there is no value: nothing passes unseen."""

    measure: str
    wanted: str
    met: bool
    told: str


def mistake(measure: str, wanted: str) -> str | None:
    """What is wrong with a requirement as it is written."""
    if not (measure in SHARES or known(measure)):
        return f"there is no measure {measure!r}; name one of the report's, retention, or gap_closed"
    if not WANTED.fullmatch(wanted):
        return f"{measure}: write a limit like '>= 0.8' or '<= 2.5', not {wanted!r}"
    return None


def gates(require: dict[str, str], folder: Path) -> list[Gate]:
    """Each requirement held against the `evaluation.json` of a finished stage."""
    return list(held(require, json.loads((folder / "evaluation.json").read_bytes()))) if require else []


def reached(found: list[Gate], run: Path) -> None:
    """NotReached where a requirement is not met; everything else of the run is done by then."""
    if missed := [gate.told for gate in found if not gate.met]:
        raise NotReached("\n".join([*missed, f"the run is complete; its report is in {run}"]))


def held(require: dict[str, str], evaluation: dict[str, Any]) -> Iterator[Gate]:
    rows = evaluation["rows"]
    of = {row["role"]: row["model"] for row in rows}  # the last of each role
    student = of.get("student") or of["base"]
    for measure, wanted in require.items():
        yield _gate(measure, wanted, student, evaluation)


def _gate(measure: str, wanted: str, student: str, evaluation: dict[str, Any]) -> Gate:
    name, row = _found(measure, student, evaluation)
    asked = f"{name} of {student} {wanted.strip()}"
    if row is None or row["value"] is None:
        why = "was not measured" if row is None else f"is undefined, since {row['undefined']}"
        return Gate(measure, wanted, False, f"Required: {asked}. Not met: it {why}.")
    sign, limit = _limit(wanted)
    met = bool(COMPARE[sign](row["value"], limit))
    low, high = (("no bound" if end is None else f"{end:.3g}") for end in (row["low"], row["high"]))
    told = f"Required: {asked}. {'Met' if met else 'Not met'}: it is {row['value']:.3g} (interval {low} to {high}"
    if _ends(COMPARE[sign], limit, row) == {True, False}:
        told += "; the limit lies inside it, so other prompts could have decided otherwise"
    return Gate(measure, wanted, met, f"{told}).")


def _limit(wanted: str) -> tuple[str, float]:
    match = WANTED.fullmatch(wanted)
    assert match is not None, "checked when the recipe was read"
    return match[1], float(match[2]) / (100 if match[3] else 1)


def _ends(compare: Any, limit: float, row: dict[str, Any]) -> set[bool]:
    """What the ends of the interval would say; an end that is missing is infinitely far out."""
    low = float("-inf") if row["low"] is None else row["low"]
    high = float("inf") if row["high"] is None else row["high"]
    return {bool(compare(low, limit)), bool(compare(high, limit))}


def _found(measure: str, student: str, evaluation: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """A measure's name in full, and the row or comparison that tells it."""
    rows = {(row["model"], row["measure"]): row for row in evaluation["rows"]}
    if measure not in SHARES:
        return measure, rows.get((student, measure))
    main = "correct" if (student, "correct") in rows else "accepted"
    told = (
        c for c in evaluation["comparisons"] if (c["a"], c["measure"], c["kind"]) == (student, main, SHARES[measure])
    )
    return f"{measure} ({main})", next(told, None)
