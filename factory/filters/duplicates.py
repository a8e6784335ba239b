"""Duplicates: of each kind one stays, the first or the best, and every removal names its twin.

| filter | default | source |
|---|---|---|
| exact_duplicates | equal after case, punctuation and blanks are levelled | - |
| near_duplicates | estimated Jaccard of word bigrams >= 0.7, 128 permutations | FineWeb: 0.75 on 5-grams of pages; answers are short |

Bands of four rows: at similarity s, 1 - (1 - s**4) ** 32 of the pairs are looked at (s=.7: 99.98 %), then the signatures
decide. The estimate's standard error is sqrt(s (1-s) / 128), about .04. What is kept in memory are signatures, not texts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import Field

from factory.filters.reference import normalised
from factory.filters.shapes import Judge, Look, SetFilter
from factory.rows import Sample, Verdict, digest

BANDS = 32
PERMUTATIONS = 128
SHORT = 3
"""Texts with fewer bigrams are compared exactly."""


class Twin(NamedTuple):
    """An earlier row that says the same."""

    id: str
    similarity: float


Claim: TypeAlias = Callable[[Any, str], Twin | None]
"""Given a row's signature and id: the twin that came before, else None, and from now on the row stands for its kind."""


class Duplicates(SetFilter):
    """What both kinds share: who stays. With `by`, the name of a score or `logprob`, it is the one with the highest."""

    by: str | None = None

    def signature(self, sample: Sample) -> Any:
        """What is remembered of a row."""
        raise NotImplementedError

    def claims(self) -> Claim:
        """An empty index."""
        raise NotImplementedError

    def start(self, look: Look) -> Judge:
        if self.by is not None:
            return self._start_best(self.by, look)
        claim = self.claims()
        return lambda samples: [self._verdict(claim(self.signature(s), s.id)) for s in samples]

    def _start_best(self, by: str, look: Look) -> Judge:
        """Read all rows once and let them claim in the order of their scores; the rest are dropped when they come."""
        scored = [
            (-score, place, key, self.signature(sample))
            for place, (sample, score, key) in enumerate(_scored(by, chain.from_iterable(look()), Counter()))
            if score is not None
        ]
        scored.sort(key=lambda row: row[:2])
        claim = self.claims()
        twins = {key: twin for _, _, key, signature in scored if (twin := claim(signature, key[0])) is not None}
        seen: Counter[str] = Counter()

        def judge(samples: list[Sample]) -> list[Verdict]:
            return [
                self.cannot_tell(f"no_score:{by}") if score is None else self._verdict(twins.get(key))
                for _, score, key in _scored(by, samples, seen)
            ]

        return judge

    def _verdict(self, twin: Twin | None) -> Verdict:
        return self.keep() if twin is None else self.drop(self.reason(twin), score=twin.similarity, evidence=twin.id)

    def reason(self, twin: Twin) -> str:
        raise NotImplementedError


def _scored(
    by: str, samples: Iterator[Sample] | list[Sample], seen: Counter[str]
) -> Iterator[tuple[Sample, float | None, tuple[str, int]]]:
    """Each sample with its score and a key of its own: its id, and how often that came (a union may bring it twice)."""
    for sample in samples:
        seen[sample.id] += 1
        yield sample, sample.value(by), (sample.id, seen[sample.id])


class ExactDuplicates(Duplicates):
    """Drops answers that were given before, to whatever prompt; `of: prompts` looks at the questions instead."""

    kind: Literal["exact_duplicates"] = "exact_duplicates"
    of: Literal["completions", "prompts"] = "completions"

    def signature(self, sample: Sample) -> tuple[str, str | None]:
        """A hash of the text; and for prompts, whose question it is: all answers to one prompt stay."""
        if self.of == "completions":
            return digest(normalised(sample.response)), None
        turns = [(m["role"], normalised(m["content"])) for m in sample.prompt.messages if m["role"] != "system"]
        return digest(turns), sample.prompt.id

    def claims(self) -> Claim:
        seen: dict[str, tuple[str, str | None]] = {}

        def claim(signature: tuple[str, str | None], name: str) -> Twin | None:
            text, prompt = signature
            if text not in seen:
                seen[text] = name, prompt
                return None
            twin, asked = seen[text]
            return None if prompt is not None and prompt == asked else Twin(twin, 1.0)

        return claim

    def reason(self, twin: Twin) -> str:
        return "duplicate"


class NearDuplicates(Duplicates):
    """Drops answers that are almost the same as another one."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(0.7, gt=0, le=1)

    def signature(self, sample: Sample) -> Any:
        return _signature(sample.response)

    def claims(self) -> Claim:
        index = _Index(self.threshold)

        def claim(signature: Any, name: str) -> Twin | None:
            near = index.near(signature)
            if near:
                return max(near, key=lambda twin: twin.similarity)
            index.add(signature, name)
            return None

        return claim

    def reason(self, twin: Twin) -> str:
        return f"near_duplicate={twin.similarity:.2f}"


class _Index:
    """MinHash signatures in bands; a hit counts when the signatures agree enough."""

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHashLSH

        self.threshold = threshold
        self._lsh: Any = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._signatures: list[Any] = []
        self._names: list[str] = []
        self._short: dict[str, str] = {}

    def near(self, signature: Any) -> list[Twin]:
        """All texts so far whose similarity reaches the threshold, in the order they came."""
        if isinstance(signature, str):
            return [Twin(self._short[signature], 1.0)] if signature in self._short else []
        hits = (
            Twin(self._names[i], self._signatures[i].jaccard(signature)) for i in sorted(self._lsh.query(signature))
        )
        return [twin for twin in hits if twin.similarity >= self.threshold]

    def add(self, signature: Any, name: str) -> None:
        if isinstance(signature, str):
            self._short.setdefault(signature, name)
            return
        self._lsh.insert(len(self._names), signature)
        self._signatures.append(signature)
        self._names.append(name)


def _signature(text: str) -> Any:
    """A MinHash of the text's word bigrams; of a short text a hash of the whole."""
    words = _words().findall(normalised(text))
    grams = [f"{a} {b}" for a, b in pairwise(words)]
    return _minhash(grams) if len(grams) >= SHORT else digest(words)


@cache
def _words() -> Any:
    """Words; in scripts that are written without blanks, characters."""
    import regex  # for \p; see pattern.py

    alone = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    return regex.compile(rf"[{alone}]\p{{M}}*|[^\s{alone}]+")


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
            signature = _signature(text)
            for twin in index.near(signature):
                join(twin.id, name)
            index.add(signature, name)
        news = {}
        for name, text in others():
            if name not in first or name in news:
                for twin in index.near(_signature(text)):
                    if name not in first:
                        first[name], order[name], news[name] = name, len(order), text
                    join(twin.id, name)
    return {name: root(name) for name in first}
