"""Which of the rows that passed the preflight train, and in what order."""

from collections.abc import Callable, Mapping
from typing import Any

from factory.trainers.preflight import Refused, tokenise

Rows = list[dict[str, Any]]


def counted(rows: Rows, classes: Mapping[str, float]) -> tuple[Rows, list[dict[str, str]]]:
    """Rows that count at all, and those of weight 0 as {id, reason}; raises `Refused` for weights of tags that no row has."""
    tags = {tag for row in rows for tag in row.get("tags", [])}
    if unknown := sorted(classes.keys() - tags):
        raise Refused(f"weights: no row has the tag {unknown[0]!r}; they have {', '.join(sorted(tags)) or 'none'}")
    none = {tag for tag, weight in classes.items() if weight == 0}
    counts = [row.get("weight", 1.0) != 0 and none.isdisjoint(row.get("tags", [])) for row in rows]
    kept = [row for row, one in zip(rows, counts, strict=True) if one]
    if not kept:
        raise Refused("weights: every row has a weight of 0, so nothing would be learned")
    return kept, [{"id": row["id"], "reason": "no_weight"} for row, one in zip(rows, counts, strict=True) if not one]


def in_order(rows: Rows, order: str, tokenizer: Any) -> tuple[Rows, list[str]]:
    """Rows by `order`, the lowest first, with `-` before it the highest; rows without a value come last, and a note tells of
    them. Equal ones stay as they came.

    It is `given` (as they came), `length` (tokens, of a pair's longer side), or a score.
    """
    name, highest_first = order.removeprefix("-"), order.startswith("-")
    if name == "given":
        return (rows[::-1] if highest_first else rows), []
    value = _value(name, tokenizer)
    told = [(row, value(row)) for row in rows]
    known = [(row, number) for row, number in told if number is not None]
    if not known:
        names = sorted({score for row in rows for score in row.get("scores", {})})
        raise Refused(f"order: no row has the score {name!r}; they have {', '.join(names) or 'none'}")
    lacking = [row for row, number in told if number is None]
    known.sort(key=lambda one: one[1], reverse=highest_first)
    notes = [f"order: {len(lacking):,} of {len(rows):,} rows have no {name!r}; they come last"] if lacking else []
    return [row for row, _ in known] + lacking, notes


def _value(name: str, tokenizer: Any) -> Callable[[dict[str, Any]], float | None]:
    """What a row is ordered by: its length, one of its scores, or a number of a pair (`margin`, `chosen_score`)."""

    def length(row: dict[str, Any]) -> float:
        answers = [row[side] for side in ("completion", "chosen", "rejected") if side in row]
        return max(len(tokenise(row["prompt"], answer, tokenizer).ids) for answer in answers)

    def score(row: dict[str, Any]) -> float | None:
        value = row.get("scores", {}).get(name, row.get(name))
        return float(value) if isinstance(value, int | float) else None

    return length if name == "length" else score
