"""Duplicates: the first of a kind stays, and every removal names its twin.

| filter | default | source |
|---|---|---|
| exact_duplicates | equal after case, punctuation and blanks are levelled | - |
| near_duplicates | estimated Jaccard of word bigrams >= 0.7, 128 permutations | FineWeb: 0.75 on 5-grams of pages; answers are short |

Bands of four rows: at similarity s, 1 - (1 - s**4) ** 32 of the pairs are looked at (s=.7: 99.98 %), then the signatures
decide. The estimate's standard error is sqrt(s (1-s) / 128), about .04.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from factory.filters.reference import normalised
from factory.filters.shapes import SetFilter
from factory.rows import Sample, Verdict

BANDS = 32
PERMUTATIONS = 128
SHORT = 3
"""Texts with fewer bigrams are compared exactly."""


class ExactDuplicates(SetFilter):
    """Drops answers that were given before, to whatever prompt; `of: prompts` looks at the questions instead."""

    kind: Literal["exact_duplicates"] = "exact_duplicates"
    of: Literal["completions", "prompts"] = "completions"

    def start(self) -> Callable[[list[Sample]], list[Verdict]]:
        seen: dict[str, Sample] = {}

        def judge(samples: list[Sample]) -> list[Verdict]:
            verdicts = []
            for sample in samples:
                text = normalised(sample.response if self.of == "completions" else sample.prompt.text)
                twin = seen.setdefault(text, sample)
                same = twin.id == sample.id or (self.of == "prompts" and twin.prompt.id == sample.prompt.id)
                verdicts.append(self.keep() if same else self.drop("duplicate", score=1.0, evidence=twin.id))
            return verdicts

        return judge


class NearDuplicates(SetFilter):
    """Drops answers that are almost the same as an earlier one."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(0.7, gt=0, le=1)

    def start(self) -> Callable[[list[Sample]], list[Verdict]]:
        index = _Index(self.threshold)

        def judge(samples: list[Sample]) -> list[Verdict]:
            verdicts = []
            for sample in samples:
                found = index.nearest(sample.response)
                if found is None:
                    index.add(sample.response, sample.id)
                    verdicts.append(self.keep())
                else:
                    twin, similarity = found
                    verdicts.append(self.drop(f"near_duplicate={similarity:.2f}", score=similarity, evidence=twin))
            return verdicts

        return judge


class _Index:
    """MinHash signatures in bands; a hit counts when the signatures agree enough."""

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHashLSH

        self.threshold = threshold
        self._lsh: Any = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._signatures: list[Any] = []
        self._names: list[str] = []
        self._short: dict[str, str] = {}
        self._last: tuple[str, Any] = ("", None)

    def nearest(self, text: str) -> tuple[str, float] | None:
        """Name and similarity of the most similar text so far, where it reaches the threshold."""
        near = self.near(text)
        return max(near, key=lambda found: found[1]) if near else None

    def near(self, text: str) -> list[tuple[str, float]]:
        """Names and similarities of all texts so far that reach the threshold."""
        signature = self._signature(text)
        if signature is None:
            twin = self._short.get(normalised(text))
            return [(twin, 1.0)] if twin is not None else []
        hits = ((self._names[i], self._signatures[i].jaccard(signature)) for i in sorted(self._lsh.query(signature)))
        return [(name, similarity) for name, similarity in hits if similarity >= self.threshold]

    def add(self, text: str, name: str) -> None:
        signature = self._signature(text)
        if signature is None:
            self._short[normalised(text)] = name
            return
        self._lsh.insert(len(self._names), signature)
        self._signatures.append(signature)
        self._names.append(name)

    def _signature(self, text: str) -> Any:
        if self._last[0] != text or not text:
            words = normalised(text).split()
            grams = [f"{a} {b}" for a, b in pairwise(words)]
            self._last = (text, _minhash(grams) if len(grams) >= SHORT else None)
        return self._last[1]


def _minhash(grams: list[str]) -> Any:
    from rensa import RMinHash

    signature = RMinHash(num_perm=PERMUTATIONS, seed=42)
    signature.update(grams)
    return signature


def similar_to(
    seeds: Mapping[str, str], others: Callable[[], Iterable[tuple[str, str]]], threshold: float
) -> dict[str, str]:
    """Names of the seeds, and of the other texts that a chain of near-duplicates joins to one; each with its first seed.

    `seeds` are name -> text; `others` gives (name, text) afresh at each call, and may give the seeds again. It is gone
    through until nothing joins, so that memory grows with what has joined, not with all that is compared.
    """
    first = {name: name for name in seeds}
    order = {name: i for i, name in enumerate(seeds)}

    def root(name: str) -> str:
        while first[name] != name:
            first[name] = first[first[name]]
            name = first[name]
        return name

    def join(a: str, b: str) -> None:
        a, b = sorted((root(a), root(b)), key=order.__getitem__)
        first[b] = a

    news = dict(seeds)
    while news:
        index = _Index(threshold)
        for name, text in news.items():
            for twin, _ in index.near(text):
                join(twin, name)
            index.add(text, name)
        news = {}
        for name, text in others():
            if name not in first or name in news:
                for twin, _ in index.near(text):
                    if name not in first:
                        first[name], order[name], news[name] = name, len(order), text
                    join(twin, name)
    return {name: root(name) for name in first}
