"""Stage `choose`: best of N by a score, the one closest to the reference, the k best, or a cap per prompt."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from factory.knobs import Knobs
from factory.rows import Sample, Verdict
from factory.similar import normalised


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
        among: dict[str, list[int]] = {}
        for i, sample in enumerate(group):
            among.setdefault(sample.model if knobs.per == "model" else "", []).append(i)
        verdicts: dict[int, Verdict] = {}
        for places in among.values():
            verdicts |= _not_chosen(knobs, {i: group[i] for i in places})
        yield from (sample.judged(verdicts[i]) if i in verdicts else sample for i, sample in enumerate(group))


def _not_chosen(knobs: Choose, samples: dict[int, Sample]) -> dict[int, Verdict]:
    """The verdicts of those samples, by place, that are not among the best (or the first) ones."""
    count = knobs.best or knobs.cap or 0
    values = {i: _value(knobs.by, sample) for i, sample in samples.items()}
    # ties: the teacher's own preference, then the order of draws; nothing random
    ranked = sorted(
        (-value, -_likely(samples[i]) if knobs.by else 0.0, i) for i, value in values.items() if value is not None
    )
    verdicts = {
        i: Verdict(filter="choose", keep=None, reason=f"no_score:{knobs.by}") for i in values if values[i] is None
    }
    for rank, (negated, _, i) in enumerate(ranked, 1):
        if rank > count:
            reason = f"over_cap={rank}>{count}" if knobs.cap else f"not_chosen={-negated:.4g}"
            verdicts[i] = Verdict(filter="choose", keep=False, reason=reason, score=-negated if knobs.by else None)
    return verdicts


def _likely(sample: Sample) -> float:
    return -math.inf if sample.logprob is None else sample.logprob


def _value(by: str | None, sample: Sample) -> float | None:
    if by is None:
        return 0.0
    if by == "closest_to_reference":
        reference = sample.prompt.reference
        return None if reference is None else sentence_bleu(sample.response, reference)
    return sample.value(by)


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
