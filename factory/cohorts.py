"""What answers tell of who gave them: the versions of a model behind one name, and whether its draws differ at all.

Nothing here drops a row. Providers change models under a name that stays, and some servers take `n` or `seed` and heed
neither: both spoil data in silence, so they are counted and said.
"""

from collections import Counter
from typing import Any

from factory.rows import Sample

MOST = 50
"""Versions of one model that are told apart: a server may name a new one with each answer."""
OTHERS = "others"
FEWEST = 5
"""Prompts with several answers below which equal draws are nothing to speak of."""
SAME = 0.9
"""Share of these prompts with nothing but equal draws from which it is said."""


class Cohorts:
    """Hears the samples of a stage in their order: by prompt, then by model."""

    def __init__(self) -> None:
        self._served: dict[str, Counter[str]] = {}
        self._several: Counter[str] = Counter()
        self._same: Counter[str] = Counter()
        self._group: tuple[str, str] = ("", "")
        self._texts: list[str] = []

    def hear(self, sample: Sample) -> None:
        if sample.ending == "failed":
            return
        served = self._served.setdefault(sample.model, Counter())
        served[sample.served if sample.served in served or len(served) < MOST else OTHERS] += 1
        group = sample.prompt.id, sample.model
        if group != self._group:
            self._end_group()
            self._group = group
        self._texts.append(sample.response)

    def _end_group(self) -> None:
        if len(self._texts) > 1:
            self._several[self._group[1]] += 1
            self._same[self._group[1]] += len(set(self._texts)) == 1
        self._texts = []

    def facts(self) -> dict[str, Any]:
        """For a stage's manifest: answers by version where a server names one, prompts whose draws are all the same, and
        what is to be said of it."""
        self._end_group()
        served = {model: dict(counts.most_common()) for model, counts in self._served.items() if set(counts) != {""}}
        draws = {model: {"prompts": n, "same": self._same[model]} for model, n in self._several.items()}
        return {"served": served, "draws_of_a_prompt": draws, "warnings": [*self._versions(), *self._no_diversity()]}

    def _versions(self) -> list[str]:
        told = []
        for model, counts in self._served.items():
            # several fingerprints at a time are normal: a provider runs more than one; two names are two models
            names = Counter[str]()
            for served, count in counts.items():
                names[served.partition(" ")[0]] += count
            del names[""], names[OTHERS]
            if len(names) > 1:
                versions = ", ".join(f"{name} {count:,}" for name, count in names.most_common(5))
                told.append(f"{model}: answers are from several versions of the model ({versions})")
        return told

    def _no_diversity(self) -> list[str]:
        return [
            f"{model}: for {self._same[model]:,} of {n:,} prompts all draws are the same text (no_diversity): "
            "does the server heed n, seed and temperature?"
            for model, n in self._several.items()
            if n >= FEWEST and self._same[model] >= SAME * n
        ]
