"""Rules that look at one answer: cheap, so they stand first in a recipe.

| filter | threshold | source |
|---|---|---|
| finished | the model ended by itself | truncated rows teach never to stop |
| words, tokens | given in the recipe | - |
| no_refusal | a refusal in the first 250 characters | where refusals stand; answers about refusing come later or quote |
| repetition | half of a long answer's word 4-grams repeat, or a tail loops 4 times | Gopher (Rae et al. 2021, table A1), but looser |
| format | given in the recipe | - |
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from factory.filters.shapes import Kit, RowFilter
from factory.rows import Sample, Verdict

REFUSAL_WITHIN = 250
"""Characters from the start in which a refusal stands."""
FORMAT_LIMIT = 100_000
"""Characters that a user's pattern is tried on."""


class Finished(RowFilter):
    """Drops answers that did not end by themselves."""

    kind: Literal["finished"] = "finished"

    def check(self, sample: Sample) -> Verdict:
        return self.keep() if sample.finish == "stop" else self.drop(f"unfinished:{sample.finish}")


class Bounds(RowFilter):
    """A count between `min` and `max`, both allowed."""

    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max: {self.max}")
        return self

    def within(self, count: int) -> Verdict:
        if self.min is not None and count < self.min:
            return self.drop(f"{self.kind}={count}<{self.min}", score=count)
        if self.max is not None and count > self.max:
            return self.drop(f"{self.kind}={count}>{self.max}", score=count)
        return self.keep()


class Words(Bounds):
    """Length in words."""

    kind: Literal["words"] = "words"

    def check(self, sample: Sample) -> Verdict:
        return self.within(len(sample.response.split()))


class Tokens(Bounds):
    """Length in tokens of a local model's tokenizer; the recipe's first student's unless `model` names another."""

    kind: Literal["tokens"] = "tokens"
    model: str | None = None
    _count: Callable[[str], int] | None = PrivateAttr(None)

    def open(self, kit: Kit) -> Self:
        opened = self.model_copy()
        opened._count = kit.tokenizer(self.model)
        return opened

    def check(self, sample: Sample) -> Verdict:
        assert self._count is not None
        return self.within(self._count(sample.response))


# A refusal speaks of oneself ("I", "as an AI") or apologises first; "you cannot", "he said: I can't" are not refusals.
_SORRY = r"(?:(?:i'?m|i am) (?:very |really |so )?(?:sorry|afraid)|sorry|unfortunately|regrettably|i apologi[sz]e|my apologies)"
_MACHINE = r"an? (?:ai|artificial intelligence|(?:large )?language model)"
_AM_NOT = r"(?:unable|not able|not allowed)"
_DECLINE = (
    rf"(?:can(?:not|'t| not)|am {_AM_NOT}|'?m {_AM_NOT}|won'?t|will not|shouldn'?t|refuse|(?:must|have to) decline"
    r"|do(?: not|n'?t) feel comfortable)"
)
_PRAISE = r"(?! (?:stress|wait|emphasi[sz]e|imagine|agree more|recommend (?:it|this|them|her|him) enough|think of (?:a|any) better))"
_REFUSALS: dict[str, list[str]] = {
    "cannot": [
        rf"^\W*{_SORRY}?[\s,.;:!—–-]*(?:but |however,? )?(?:that )?(?:as {_MACHINE}[^.,]{{0,40}},? )?i {_DECLINE}\b{_PRAISE}",
        rf"^\W*i'?m (?:{_AM_NOT}|not comfortable)\b",
    ],
    "as_an_ai": [
        rf"\bas {_MACHINE}\b[^.]{{0,80}}\b(?:i (?:can(?:not|'t)|do not|don'?t|am (?:not|unable)|have no)|can(?:not|'t))\b",
        rf"\bi(?:'?m| am) (?:just |only )?{_MACHINE}\b",
    ],
    "sorry_but": [
        rf"^\W*{_SORRY}[,.]? (?:but )?(?:that'?s|this is|it'?s|that is) (?:not something|against|beyond|outside)",
    ],
    "german": [
        r"^\W*(?:(?:es )?tut mir leid|entschuldigung|leider)[^.!]{0,60}\b(?:kann|darf|werde|möchte) ich\b[^.!]{0,60}\bnicht\b",
        r"^\W*(?:es )?tut mir leid[^.!]{0,40}\bich (?:kann|darf|werde)\b[^.!]{0,80}\b(?:nicht|keine?n?)\b",
        r"\bals (?:ki|sprachmodell|künstliche intelligenz)[- ,]",
    ],
    "french": [
        r"^\W*(?:(?:je suis )?désolée?|je regrette|malheureusement)[^.!]{0,40}\bje ne (?:peux|puis|suis)\b",
        r"^\W*je ne (?:peux|puis) pas (?:vous |t'|répondre|aider|fournir)",
        r"\ben tant qu(?:e |')(?:ia|intelligence artificielle|modèle de langage)\b",
    ],
    "spanish": [
        r"^\W*(?:lo siento|lo lamento|disculpa|perdón|lamentablemente)[^.!]{0,40}\bno (?:puedo|me es posible|estoy)\b",
        r"\bcomo (?:ia|inteligencia artificial|modelo de lenguaje)\b",
    ],
}
_REFUSAL = {name: re.compile("|".join(patterns), re.IGNORECASE) for name, patterns in _REFUSALS.items()}


class NoRefusal(RowFilter):
    """Drops refusals and disclaimers of being a machine, in English, German, French and Spanish."""

    kind: Literal["no_refusal"] = "no_refusal"

    def check(self, sample: Sample) -> Verdict:
        start = sample.response[:REFUSAL_WITHIN].replace("’", "'")
        for name, pattern in _REFUSAL.items():
            if found := pattern.search(start):
                return self.drop(f"refusal:{name}", evidence=found.group()[:100])
        return self.keep()


class Repetition(RowFilter):
    """Drops degenerate loops."""

    kind: Literal["repetition"] = "repetition"
    max_repeated: float = Field(0.5, gt=0, le=1)
    min_words: int = Field(20, gt=0)

    def check(self, sample: Sample) -> Verdict:
        words = sample.response.split()
        if loops := _looping_tail(words):
            return self.drop(f"looping_tail={loops}", score=loops)
        if len(words) >= self.min_words:
            grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
            share = 1 - len(grams) / max(grams.total(), 1)
            if share > self.max_repeated:
                most = " ".join(grams.most_common(1)[0][0])
                return self.drop(f"repeated_4grams={share:.2f}>{self.max_repeated}", score=share, evidence=most)
        return self.keep()


def _looping_tail(words: list[str]) -> int:
    """How often the last words repeat, where 1 to 8 words stand at least 4 times (8 for a single word); else 0."""
    for size in range(1, 9):
        needed = 8 if size == 1 else 4
        if len(words) < size * needed:
            break
        unit, times = words[-size:], 1
        while words[-size * (times + 1) : -size * times] == unit:
            times += 1
        if times >= needed:
            return times
    return 0


class Format(RowFilter):
    """The answer matches a regular expression: as a whole, or with `full: false` anywhere."""

    kind: Literal["format"] = "format"
    pattern: str
    full: bool = True

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"not a regular expression: {e}") from None
        return pattern

    def check(self, sample: Sample) -> Verdict:
        if len(sample.response) > FORMAT_LIMIT:
            return Verdict(filter=self.kind, keep=None, reason=f"too_long_for_format={len(sample.response)}")
        match = re.fullmatch if self.full else re.search
        return (
            self.keep() if match(self.pattern, sample.response) else self.drop("format", evidence=sample.response[:100])
        )
