"""Stage `choose`: best of N by a score, the one closest to the reference, the k best, or a cap per prompt."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Literal, Self

from pydantic import Field, model_validator

from factory.filters.reference import normalised
from factory.knobs import Knobs
from factory.rows import Sample, Verdict


class Choose(Knobs):
    """`choose: {best: 1, by: helpfulness}` or `choose: {cap: 2}`.

    `by` is a score's name, `logprob`, or `closest_to_reference` (Seq-Inter, Kim & Rush 2016, section 3.3: the hypothesis
    with the highest smoothed sentence BLEU to the reference). A cap keeps the first ones, or the best by `by`.
    """

    kind: Literal["choose"] = "choose"
    best: int | None = Field(None, gt=0)
    cap: int | None = Field(None, gt=0)
    by: str | None = None
    per: Literal["prompt", "model"] = "prompt"
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.best is None) == (self.cap is None):
            raise ValueError("give either best: (with by:) or cap:")
        if self.best is not None and self.by is None:
            raise ValueError("best: needs by:, the name of a score, logprob or closest_to_reference")
        return self


def choose(knobs: Choose, groups: Iterable[list[Sample]]) -> Iterator[Sample]:
    """Every sample once, in order; those not chosen carry the reason."""
    for group in groups:
        if knobs.per == "prompt":
            yield from _among(knobs, group)
        else:
            for _, of_model in groupby(group, key=lambda sample: sample.model):
                yield from _among(knobs, list(of_model))


def _among(knobs: Choose, samples: list[Sample]) -> Iterator[Sample]:
    count = knobs.best or knobs.cap or 0
    values = [_value(knobs.by, sample) for sample in samples]
    known = [i for i, value in enumerate(values) if value is not None]
    # ties: the teacher's own preference, then the order of draws; nothing random
    ranked = (
        sorted(known, key=lambda i: (-(values[i] or 0.0), -(samples[i].logprob or -math.inf), i)) if knobs.by else known
    )
    chosen = set(ranked[:count])
    for i, (sample, value) in enumerate(zip(samples, values, strict=True)):
        if value is None:
            yield sample.judged(Verdict(filter="choose", keep=None, reason=f"no_score:{knobs.by}"))
        elif i in chosen:
            yield sample
        else:
            reason = "over_cap" if knobs.cap else f"not_chosen={value:.4g}"
            yield sample.judged(Verdict(filter="choose", keep=False, reason=reason, score=value if knobs.by else None))


def _value(by: str | None, sample: Sample) -> float | None:
    if by is None:
        return 0.0
    if by == "logprob":
        return sample.logprob
    if by == "closest_to_reference":
        reference = sample.prompt.reference
        return None if reference is None else sentence_bleu(sample.response, reference)
    return sample.scores.get(by)


def sentence_bleu(candidate: str, reference: str, order: int = 4) -> float:
    """Smoothed sentence BLEU, 0..1: one is added to counts and totals of n-grams above unigrams (Lin & Och 2004), so that
    short sentences do not all score zero; with the usual brevity penalty."""
    said, known = normalised(candidate).split(), normalised(reference).split()
    if not said or not known:
        return float(said == known)
    logs = 0.0
    for n in range(1, order + 1):
        ours = Counter(tuple(said[i : i + n]) for i in range(len(said) - n + 1))
        theirs = Counter(tuple(known[i : i + n]) for i in range(len(known) - n + 1))
        matched, total = (ours & theirs).total(), ours.total()
        plus = int(n > 1)
        if matched + plus == 0:
            return 0.0
        logs += math.log((matched + plus) / (total + plus))
    brevity = min(0.0, 1 - len(known) / len(said))
    return math.exp(brevity + logs / order)
