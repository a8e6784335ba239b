"""Stage `choose`: best of N by a score, the one closest to the reference, distinct traces, caps per prompt, quotas.

Answers of one prompt compete with each other (`per: model`: those of one model), never with those of another prompt.
"""

import heapq
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from factory.curate import drawn, not_drawn
from factory.filters import Look
from factory.knobs import Knobs
from factory.rows import Sample, Verdict, digest
from factory.similar import normalised


class Quota(Knobs):
    """`quota: {by: source, most: 300}` or `{by: tag, most: {math: 300, chat: 100}}`; names not in the map have no limit.

    A row counts for its prompt list, or for one tag: the first that has a limit. Prompts are drawn by seed and keep their
    order; the last one drawn may be cut. Orca takes at most 300 queries of a task (arXiv 2306.02707, table 3).
    """

    by: Literal["tag", "source"]
    most: Annotated[int, Field(gt=0)] | Annotated[dict[str, Annotated[int, Field(ge=0)]], Field(min_length=1)]

    def share(self, sample: Sample) -> tuple[str, int] | None:
        """What a row counts for, and how many may be kept of it; None where nothing limits the row."""
        names = [sample.prompt.source] if self.by == "source" else sample.prompt.tags
        if isinstance(self.most, int):
            return (names[0] if names else ""), self.most
        return next(((name, self.most[name]) for name in names if name in self.most), None)


class Choose(Knobs):
    """`choose: {best: 1, by: helpfulness}`, `choose: {distinct: equations, cap: 10}`, `choose: {quota: {...}}`.

    `by` is a score's name, `logprob`, or `closest_to_reference` (Seq-Inter, Kim & Rush 2016, section 3.3: the hypothesis
    with the highest smoothed sentence BLEU to the reference). A cap keeps the first ones, or the best by `by`. `distinct`
    keeps one answer of each trace, before best and cap count; the quota comes last. `control: random` chooses as many of
    each prompt's answers, at random.
    """

    kind: Literal["choose"] = "choose"
    best: int | None = Field(None, gt=0)
    cap: int | None = Field(None, gt=0)
    distinct: Literal["equations", "numbers", "text"] | None = None
    quota: Quota | None = None
    by: str | None = None
    per: Literal["prompt", "model"] = "prompt"
    control: Literal["random"] | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.best is not None and self.cap is not None:
            raise ValueError("give either best: (with by:) or cap:")
        ranks = (self.best, self.cap, self.distinct) != (None, None, None)
        if not ranks and self.quota is None:
            raise ValueError("say what to choose: best: (with by:), cap:, distinct: or quota:")
        if self.best is not None and self.by is None:
            raise ValueError("best: needs by:, the name of a score, logprob or closest_to_reference")
        if self.by is not None and not ranks:
            raise ValueError("by: ranks what best:, cap: or distinct: choose from; a quota is drawn by seed")
        if self.control is not None and not ranks:
            raise ValueError("control: a quota is drawn at random already")
        return self


def choose(knobs: Choose, read: Look, seed: int) -> Iterator[Sample]:
    """Every sample once, in order; those not chosen carry the reason. `read()` gives the samples by prompt, afresh."""
    drawing = _Drawing(knobs.quota, seed) if knobs.quota is not None else None
    if drawing is not None:
        for group in read():
            drawing.look(_of_prompt(knobs, group, seed))
    for group in read():
        chosen = _of_prompt(knobs, group, seed)
        yield from chosen if drawing is None else drawing.judge(chosen)


def unmet(knobs: Choose, groups: Iterable[list[Sample]]) -> list[str]:
    """For people: names that a quota limits and no row counts for; most often they are misspelt."""
    if knobs.quota is None or isinstance(knobs.quota.most, int):
        return []
    lacking = dict.fromkeys(knobs.quota.most)
    for sample in chain.from_iterable(groups):
        if (share := knobs.quota.share(sample)) is not None:
            lacking.pop(share[0], None)
    return [f"quota: no row counts for the {knobs.quota.by} {name!r}" for name in lacking]


class _Drawing:
    """A quota at work: first all rows are looked at, then each is told its end. Kept are the `most` lowest numbers."""

    def __init__(self, quota: Quota, seed: int) -> None:
        self.quota, self.seed = quota, seed
        self.lowest: dict[str, list[int]] = {}
        self.taken: Counter[str] = Counter()

    def look(self, group: list[Sample]) -> None:
        for _, number, name, most in self._limited(group):
            lowest = self.lowest.setdefault(name, [])
            heapq.heappush(lowest, -number)  # the highest of the lowest stands first
            if len(lowest) > most:
                heapq.heappop(lowest)

    def judge(self, group: list[Sample]) -> list[Sample]:
        samples = list(group)
        for i, number, name, most in self._limited(group):
            if self.taken[name] >= most or number > -self.lowest[name][0]:
                reason = f"over_quota={most}"
                samples[i] = samples[i].judged(Verdict(filter="choose", keep=False, reason=reason, evidence=name))
            else:
                self.taken[name] += 1
        return samples

    def _limited(self, group: list[Sample]) -> Iterator[tuple[int, int, str, int]]:
        """Of each row that a limit counts: its place, its number, what it counts for, and the limit.

        Rows are drawn by their numbers: chance decides between prompts, their order between the rows of one.
        """
        first = int(digest(self.seed, group[0].prompt.id, size=7), 16) << 20
        for i, sample in enumerate(group):
            if sample.ending == "kept" and (share := self.quota.share(sample)) is not None:
                yield i, first + i, *share


def _of_prompt(knobs: Choose, group: list[Sample], seed: int) -> list[Sample]:
    """The answers of one prompt, those not chosen with the reason."""
    if (knobs.best, knobs.cap, knobs.distinct) == (None, None, None):
        return group
    among: dict[str, list[int]] = {}
    for i, sample in enumerate(group):
        among.setdefault(sample.model if knobs.per == "model" else "", []).append(i)
    verdicts: dict[int, Verdict] = {}
    for model, places in among.items():
        found = _not_chosen(knobs, {i: group[i] for i in places})
        if knobs.control is not None:
            chance = random.Random(f"{seed}:control:{group[0].prompt.id}:{model}")
            kept = drawn(len(places) - len(found), len(places), chance)
            found = {i: not_drawn() for i, keep in zip(places, kept, strict=True) if not keep}
        verdicts |= found
    return [sample.judged(verdicts[i]) if i in verdicts else sample for i, sample in enumerate(group)]


def _not_chosen(knobs: Choose, samples: dict[int, Sample]) -> dict[int, Verdict]:
    """The verdicts of those samples, by place, that are not among the best (or the first) ones."""
    values = {i: _value(knobs.by, sample) for i, sample in samples.items()}
    # ties: the teacher's own preference, then the order of draws; nothing random
    ranked = sorted(
        (-value, -_likely(samples[i]) if knobs.by else 0.0, i) for i, value in values.items() if value is not None
    )
    verdicts = {
        i: Verdict(filter="choose", keep=None, reason=f"no_score:{knobs.by}") for i in values if values[i] is None
    }
    if knobs.distinct is not None:
        for i, twin in _twins(knobs, {i: samples[i] for _, _, i in ranked}).items():
            verdicts[i] = Verdict(filter="choose", keep=False, reason="same_trace", evidence=samples[twin].id)
        ranked = [one for one in ranked if one[2] not in verdicts]
    count = knobs.best or knobs.cap or len(ranked)
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


# -- distinct traces ---------------------------------------------------------------------------------------------------

_SIDE = r"[\d.,$%()+\-*/^\s]"
_EQUATION = re.compile(rf"(?<!{_SIDE})({_SIDE}+)=(?=\s*(-?\s?\$?\d[\d,]*(?:\.\d+)?))")
_EARLIER = re.compile(r"[.,]\s+|(?<=[\d)])\s+(?=[\d($])")
"""Where the left side of an equation begins anew: behind a sentence, or between two numbers."""
_OPERATION = re.compile(r"\d[)]*[+\-*/^]")
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")
_SIGNS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-"}
_TIMES = re.compile(r"(?<=[\d)\s])x(?=\s*[\d($])")


def trace(sample: Sample) -> str:
    """How the answer was come to: the reasoning where the teacher gives it apart, else the answer itself."""
    return sample.reasoning or sample.response


def path(kind: str, text: str) -> tuple[str, ...]:
    """What makes two traces the same: their equations (or numbers) in order; where there are none, their levelled text."""
    if kind == "text":
        return (normalised(text),)
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    text = _TIMES.sub("*", text)
    found = [_plain_number(n) for n in _NUMBER.findall(text)] if kind == "numbers" else list(_equations(text))
    return tuple(found) or ("", normalised(text))


def _equations(text: str) -> Iterator[str]:
    """In-line calculations such as `48/2 = 24`, blanks and currency signs left out; `x = 5` is none."""
    for said, right in _EQUATION.findall(text):
        left = re.sub(r"[\s$%]|(?<=\d),(?=\d{3})", "", _EARLIER.split(said)[-1])
        if _OPERATION.search(left):
            yield f"{left}={_plain_number(right)}"


def _plain_number(text: str) -> str:
    plain = re.sub(r"[\s$,]", "", text)
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _twins(knobs: Choose, ranked: dict[int, Sample]) -> dict[int, int]:
    """Of each sample whose trace another one stands for, that one's place; `ranked` is best first.

    With `by` the best of a trace stays. Without, it is the one whose text differs most from the other traces kept so far:
    RFT (arXiv 2308.01825, section 3.3: equal equation lists, the largest sum of edit distances).
    """
    assert knobs.distinct is not None
    texts = {i: trace(sample) for i, sample in ranked.items()}
    paths = {i: path(knobs.distinct, text) for i, text in texts.items()}
    stays: dict[tuple[str, ...], int] = {}
    for i in ranked:
        kept = stays.setdefault(paths[i], i)
        if kept != i and knobs.by is None and knobs.distinct != "text":
            others = [texts[other] for other in stays.values() if other != kept]
            if _distance(texts[i], others) > _distance(texts[kept], others):
                stays[paths[i]] = i
    return {i: stays[paths[i]] for i in ranked if stays[paths[i]] != i}


def _distance(text: str, others: list[str]) -> int:
    from rapidfuzz.distance import Levenshtein  # its import takes as long as ours

    return sum(Levenshtein.distance(text, other) for other in others)


# -- closest to the reference ------------------------------------------------------------------------------------------


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
