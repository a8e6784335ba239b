"""Duplicates: of each kind one stays, the first or the best, and every removal names its twin.

| filter | default | source |
|---|---|---|
| exact_duplicates | equal after case, punctuation and blanks are levelled | - |
| semantic_duplicates | `semantic.py` | - |
| near_duplicates | estimated Jaccard of word bigrams >= 0.7, 128 permutations | FineWeb: 0.75 on 5-grams of pages; answers are short |

How alike two answers are is told by `similar.py`. What is kept in memory are signatures, not texts.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from factory.filters.shapes import Judge, Look, SetFilter
from factory.rows import Sample, Verdict, digest
from factory.similar import Index, Twin, normalised, sketch

Claim: TypeAlias = Callable[[Any, str], Twin | None]
"""Given a row's signature and id: the twin that came before, else None, and from now on the row stands for its kind."""


class Duplicates(SetFilter):
    """What all kinds share: who stays. With `by`, the name of a score or `logprob`, it is the one with the highest.

    `of: prompts` compares the questions, and all answers to one of them stay or go. `within: prompt` compares only the draws
    of one prompt with each other, which makes them diverse.
    """

    by: str | None = None
    of: Literal["completions", "prompts"] = "completions"
    within: Literal["all", "prompt"] = "all"

    @model_validator(mode="after")
    def _draws_of_a_prompt_share_it(self) -> Self:
        if self.of == "prompts" and self.within == "prompt":
            raise ValueError("of: prompts compares prompts, within: prompt the answers to one; write one of the two")
        return self

    def text(self, sample: Sample) -> str:
        """What is compared; of a conversation every turn but the system message."""
        if self.of == "completions":
            return sample.response
        turns = [m for m in sample.prompt.messages if m["role"] != "system"]
        return turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)

    def signature(self, sample: Sample) -> Any:
        """What is remembered of a row."""
        raise NotImplementedError

    def claims(self) -> Claim:
        """An empty index."""
        raise NotImplementedError

    def start(self, look: Look) -> Judge:
        if self.within == "prompt":
            return lambda samples: self._start(lambda: [samples])(samples)
        return self._start(look)

    def _start(self, look: Look) -> Judge:
        if self.by is not None:
            return self._start_best(self.by, look)
        claim = _once_a_prompt(self.claims())
        return lambda samples: [self.verdict(claim(self.signature(s), s.id, self._question(s))) for s in samples]

    def _question(self, sample: Sample) -> str | None:
        return sample.prompt.id if self.of == "prompts" else None

    def _start_best(self, by: str, look: Look) -> Judge:
        """Read all rows once and let them claim in the order of their scores; the rest are dropped when they come."""
        ranked = [
            (-score, place, key, self.signature(sample), self._question(sample))
            for place, (sample, score, key) in enumerate(scored(by, chain.from_iterable(look()), Counter()))
            if score is not None
        ]
        ranked.sort(key=lambda row: row[:2])
        claim = _once_a_prompt(self.claims())
        twins = {
            key: twin
            for _, _, key, signature, question in ranked
            if (twin := claim(signature, key[0], question)) is not None
        }
        seen: Counter[str] = Counter()

        def judge(samples: list[Sample]) -> list[Verdict]:
            return [
                self.no_score() if score is None else self.verdict(twins.get(key))
                for _, score, key in scored(by, samples, seen)
            ]

        return judge

    def no_score(self) -> Verdict:
        return self.cannot_tell(f"no_score:{self.by}")

    def verdict(self, twin: Twin | None) -> Verdict:
        return self.keep() if twin is None else self.drop(self.reason(twin), score=twin.similarity, evidence=twin.id)

    def reason(self, twin: Twin) -> str:
        raise NotImplementedError


def _once_a_prompt(claim: Claim) -> Callable[[Any, str, str | None], Twin | None]:
    """A claim that all rows of a prompt share, where its id is told."""
    known: dict[str, Twin | None] = {}

    def shared(signature: Any, name: str, prompt: str | None) -> Twin | None:
        if prompt is None:
            return claim(signature, name)
        if prompt not in known:
            known[prompt] = claim(signature, name)
        return known[prompt]

    return shared


def scored(
    by: str | None, samples: Iterator[Sample] | list[Sample], seen: Counter[str]
) -> Iterator[tuple[Sample, float | None, tuple[str, int]]]:
    """Each sample with its score (0 where nothing ranks them) and a key of its own: its id, and how often that came: a
    union may bring it twice."""
    for sample in samples:
        seen[sample.id] += 1
        yield sample, 0.0 if by is None else sample.value(by), (sample.id, seen[sample.id])


class ExactDuplicates(Duplicates):
    """Drops answers that were given before, to whatever prompt; `of: prompts` looks at the questions instead."""

    kind: Literal["exact_duplicates"] = "exact_duplicates"

    def signature(self, sample: Sample) -> str:
        if self.of == "completions":
            return digest(normalised(sample.response))
        return digest([(m["role"], normalised(m["content"])) for m in sample.prompt.messages if m["role"] != "system"])

    def claims(self) -> Claim:
        seen: dict[str, str] = {}

        def claim(signature: str, name: str) -> Twin | None:
            if signature in seen:
                return Twin(seen[signature], 1.0)
            seen[signature] = name
            return None

        return claim

    def reason(self, twin: Twin) -> str:
        return "duplicate"


class NearDuplicates(Duplicates):
    """Drops answers that are almost the same as another one."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(0.7, gt=0, le=1)

    def signature(self, sample: Sample) -> Any:
        return sketch(self.text(sample))

    def claims(self) -> Claim:
        index = Index(self.threshold)

        def claim(signature: Any, name: str) -> Twin | None:
            near = index.near(signature)
            if near:
                return max(near, key=lambda twin: twin.similarity)
            index.add(signature, name)
            return None

        return claim

    def reason(self, twin: Twin) -> str:
        return f"near_duplicate={twin.similarity:.2f}"
