"""How far a judge agrees with labels of known worth: kappa, and what each of its scores stands for."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.recipe_file import find
from factory.rows import Sample


class Gold(Knobs):
    """`gold:`; labels in a JSONL file (`prompt`, `response`, and the label in `column`), or another `score` of the rows."""

    path: str | None = None
    column: str = "label"
    score: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.path is None) == (self.score is None):
            raise ValueError("write path: (a file with labels), or score: (the name of a score that the rows have)")
        return self


class Agreement:
    """Collects what the judge said beside the label."""

    def __init__(self, gold: Gold) -> None:
        self.gold = gold
        self.seen: Counter[tuple[float, float]] = Counter()
        self.labels = _labels(find(gold.path), gold.column) if gold.path else {}

    def note(self, sample: Sample, score: float) -> None:
        """An answer with its score; one without a label tells nothing."""
        asked = (sample.prompt.text.strip(), sample.response.strip())
        label = sample.value(self.gold.score) if self.gold.score else self.labels.get(asked)
        if label is not None:
            self.seen[score, label] += 1

    def facts(self) -> dict[str, Any]:
        """For the manifest: `calibration` has a line for each score (halves rounded to even), with the mean of its labels."""
        lines: dict[int, list[float]] = defaultdict(list)
        for (score, label), count in self.seen.items():
            lines[round(score)] += [label] * count
        table = [{"score": s, "n": len(v), "mean_label": sum(v) / len(v)} for s, v in sorted(lines.items())]
        return {"n": self.seen.total(), "kappa": kappa(self.seen), "calibration": table}


def kappa(seen: Counter[tuple[float, float]]) -> float | None:
    """Quadratically weighted kappa (Cohen 1968): 1 - observed / expected squared difference; None where nothing differs."""
    n = seen.total()
    if not n:
        return None
    means = [sum(pair[side] * count for pair, count in seen.items()) / n for side in (0, 1)]
    spread = sum(((a - means[0]) ** 2 + (b - means[1]) ** 2) * count for (a, b), count in seen.items()) / n
    expected = spread + (means[0] - means[1]) ** 2
    observed = sum((a - b) ** 2 * count for (a, b), count in seen.items()) / n
    return 1 - observed / expected if expected else None


def _labels(path: Path, column: str) -> dict[tuple[str, str], float]:
    labels = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: the labels cannot be read: {e}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                labels[row["prompt"].strip(), row["response"].strip()] = float(row[column])
            except (ValueError, KeyError, TypeError, AttributeError):
                wanted = f'{{"prompt": text, "response": text, "{column}": number}}'
                raise RecipeError(f"{path}:{number}: a label is a line {wanted}") from None
    return labels
