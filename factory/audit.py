"""What preference rows would teach besides quality: length, model families, thin margins, the same row again.

Rows are read once and not kept: of a margin, three digits are counted; of a row, eight bytes tell whether it came before.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Any

from factory.rows import Message, Pair, Unpaired, digest

PARTS = 256


def audit(rows: Iterable[Pair | Unpaired]) -> dict[str, Any]:
    """The figures of all rows, which are of one form. "Longer" and `length_auc` are of characters, which every script
    has; `mean_words` is for people."""
    found = _Seen()
    for row in rows:
        found.pair(row) if isinstance(row, Pair) else found.single(row)
    return found.told() if found.count else {"n": 0}


class _Seen:
    """Two sides, good and bad, and what was counted of each."""

    def __init__(self) -> None:
        self.count = self.longer = self.shorter = self.equal = 0
        self.sides: tuple[str, str] = ("chosen", "rejected")
        self.rows: dict[str, int] = {}
        self.words: Counter[str] = Counter()
        self.lengths: dict[str, Counter[int]] = {}
        self.models: dict[str, Counter[str]] = {}
        self.margins: Counter[float] = Counter()
        self.ids = [array("Q") for _ in range(PARTS)]

    def pair(self, row: Pair) -> None:
        chosen, rejected = self._side("chosen", row.chosen), self._side("rejected", row.rejected)
        self.models["chosen"][row.chosen_model] += 1
        self.models["rejected"][row.rejected_model] += 1
        self.count += 1
        self.longer += len(chosen) > len(rejected)
        self.shorter += len(chosen) < len(rejected)
        self.equal += chosen == rejected
        self.margins[float(f"{row.margin:.3g}")] += 1
        self._remember(row.prompt, chosen, rejected)

    def single(self, row: Unpaired) -> None:
        self.sides = ("desirable", "undesirable")
        side = self.sides[0] if row.label else self.sides[1]
        said = self._side(side, row.completion)
        self.models[side][row.model] += 1
        self.count += 1
        self._remember(row.prompt, said, "")

    def _side(self, side: str, messages: list[Message]) -> str:
        text = messages[-1]["content"]
        self.rows[side] = self.rows.get(side, 0) + 1
        self.words[side] += len(text.split())
        self.lengths.setdefault(side, Counter())[len(text)] += 1
        self.models.setdefault(side, Counter())
        return text

    def _remember(self, prompt: list[Message], *texts: str) -> None:
        number = int(digest([[m["role"], m["content"]] for m in prompt], *texts, size=8), 16)
        self.ids[number % PARTS].append(number)

    def told(self) -> dict[str, Any]:
        good, bad = (self.lengths.get(side, Counter()) for side in self.sides)
        told: dict[str, Any] = {
            "n": self.count,
            "sides": {side: self.rows.get(side, 0) for side in self.sides},
            "length_auc": _auc(good, bad),
            "equal_texts": self.equal,
            "duplicates": sum(len(part) - len(set(part)) for part in self.ids),
            "mean_words": {side: self.words[side] / max(self.rows.get(side, 0), 1) for side in self.sides},
            "models": {
                side: {name: n / self.rows[side] for name, n in sorted(self.models.get(side, Counter()).items())}
                for side in self.sides
            },
        }
        if self.margins:
            told |= {
                "chosen_longer": self.longer / self.count,
                "chosen_shorter": self.shorter / self.count,
                "margins": _histogram(self.margins),
            }
        return told


def _auc(good: Counter[int], bad: Counter[int]) -> float | None:
    """How often a good answer is longer than a bad one, over all such couples, equal lengths counting half: .5 says that
    length tells nothing. None where one side is empty."""
    couples = good.total() * bad.total()
    below, wins = 0, 0.0
    for length in sorted(good | bad):
        wins += good[length] * (below + bad[length] / 2)
        below += bad[length]
    return wins / couples if couples else None


def _histogram(values: Counter[float], bins: int = 10) -> list[dict[str, float]]:
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts: Counter[int] = Counter()
    for value, count in values.items():
        counts[min(int((value - low) / width), bins - 1)] += count
    return [{"from": low + i * width, "to": low + (i + 1) * width, "count": counts[i]} for i in range(bins)]
