"""Stage `score`: numbers for answers that no judge is asked for. What has no score says why.

| by | the score | source |
|---|---|---|
| reward | what a sequence classifier gives the whole conversation | - |
| likelihood | mean log-probability (nats) of the answer's tokens and its end, by a local model; at most 0 | - |
| ifd | mean loss of the answer's tokens after the prompt / without it; keep the highest below 1 | Li et al. 2023, 2308.12032 |
| self_consistency | share of the prompt's draws that say the same, itself included: a label | Wang et al. 2022, 2203.11171 |
| verdict | 1 where a verifier finds the answer right, 0 where wrong | - |

All models see the prompt as it stands in the list, so that answers that were asked for differently can be compared. They
run in a child process (`scorer.py`).
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Literal, Self

import msgspec
from pydantic import Field, model_validator

from factory.child import Child, ChildEnded
from factory.curate import checked
from factory.errors import EngineError
from factory.filters import VerifierKnob
from factory.filters.isolated import Broken, Done, Item, together
from factory.filters.pattern import Undecided
from factory.filters.reference import MatchesReference, Unread, compare
from factory.filters.verifier import UNKNOWN, Verifier
from factory.knobs import Knobs
from factory.models import Models
from factory.rows import Sample, Verdict

WINDOW = 256
"""Rows that the child gets at once, and puts into batches of similar length."""


class Score(Knobs):
    """`score: {by: ifd, model: base}` or `score: {by: verdict, of: {matches_reference: {how: math}}, as: correct}`.

    The score is filed under `as`, or else under the name that stands in `by`.
    """

    kind: Literal["score"] = "score"
    by: Literal["reward", "likelihood", "ifd", "self_consistency", "verdict"]
    model: str | None = None
    of: VerifierKnob | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")

    @property
    def name(self) -> str:
        return self.as_ or self.by

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        asks = self.by in ("reward", "likelihood", "ifd")
        if asks != (self.model is not None):
            raise ValueError(f"by: {self.by} needs model:" if asks else f"by: {self.by} has no model:; remove it")
        if asks != (self.of is None):
            told = "has no of:; remove it" if asks else "needs of:, e.g. {matches_reference: {how: numeric}}"
            raise ValueError(f"by: {self.by} {told}")
        if self.by == "self_consistency" and (not isinstance(self.of, MatchesReference) or self.of.how == "contains"):
            raise ValueError("by: self_consistency needs of: {matches_reference: ...}, with a how: other than contains")
        return self


def score(knobs: Score, groups: Iterable[list[Sample]], models: Models) -> Iterator[Sample]:
    """Every sample once, in order, scored or set aside."""
    if knobs.by in ("verdict", "self_consistency"):
        assert knobs.of is not None
        verifier = knobs.of.open(models)
    if knobs.by == "verdict":
        return _each(
            verifier, lambda sample: _told(knobs.name, sample, checked(verifier, sample)), chain.from_iterable(groups)
        )
    if knobs.by == "self_consistency":
        shares = _each(verifier, lambda group: list(_agreement(knobs.name, verifier, group)), groups)
        return chain.from_iterable(shares)
    return _by_model(knobs, chain.from_iterable(groups), models)


# -- by verifiers --------------------------------------------------------------------------------------------------------


def _each(verifier: Verifier, do: Callable[[Item], Done], items: Iterable[Item]) -> Iterator[Done]:
    return together(do, items) if verifier.apart else map(do, items)


def _told(name: str, sample: Sample, verdict: Verdict) -> Sample:
    """A verdict as a score; what was wrong stays with the row."""
    if verdict.keep is None or verdict.reason == UNKNOWN:
        return sample.judged(msgspec.structs.replace(verdict, keep=None))
    if verdict.keep:
        return sample.scored(**{name: 1.0})
    return sample.judged(msgspec.structs.replace(verdict, keep=True)).scored(**{name: 0.0})


def _agreement(name: str, reader: MatchesReference, group: list[Sample]) -> Iterator[Sample]:
    """An answer in which nothing can be read agrees with none: it counts as a draw, and has no score."""
    said: list[tuple[str, list[int]]] = []  # an answer, and the places of all that say the same
    broken: dict[int, str] = {}
    for i, sample in enumerate(group):
        try:
            if (found := reader.found(sample.response)) is None or not _same(reader, found, found):
                continue
            same = next((places for other, places in said if _same(reader, found, other)), None)
        except (Broken, Undecided) as e:
            broken[i] = str(e)
            continue
        if same is None:
            said.append((found, same := []))
        same.append(i)
    shares = {i: len(places) / len(group) for _, places in said for i in places}
    for i, sample in enumerate(group):
        if i in broken:
            yield sample.judged(Verdict(filter="score", keep=None, reason=broken[i]))
        else:
            yield sample.scored(**{name: shares[i]}) if i in shares else sample


def _same(reader: MatchesReference, answer: str, other: str) -> bool:
    try:
        return compare(reader.how, answer, other).same
    except Unread:
        return False


# -- by models -----------------------------------------------------------------------------------------------------------


def _by_model(knobs: Score, samples: Iterator[Sample], models: Models) -> Iterator[Sample]:
    """The child starts at the first row, and ends with the last."""
    child: Child | None = None
    try:
        while window := list(islice(samples, WINDOW)):
            child = child or models.child("factory.scorer", str(knobs.model), by=knobs.by)
            rows = [{"messages": sample.prompt.messages, "answer": sample.response} for sample in window]
            for sample, told in zip(window, child.ask(rows), strict=True):
                if isinstance(told, str):
                    yield sample.judged(Verdict(filter="score", keep=None, reason=told))
                else:
                    yield sample.scored(**{knobs.name: told})
    except ChildEnded as e:
        raise EngineError(f"score: {knobs.model}: {e}") from None
    finally:
        if child:
            child.close()
