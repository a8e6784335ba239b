"""Stage `pair`: scored samples of one prompt become preference pairs, or rows for KTO, or a reason why not.

Zephyr (arXiv 2310.16944, section 3): chosen is the best, rejected is drawn at random among the lower ones, not the worst.
Scores may be a judge's, a verifier's (right 1, wrong 0) or people's that came with the rows.
Ties never pair, nor do equal texts; a truncated answer is on neither side.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Self, TypeAlias

from pydantic import Field, model_validator

from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.rows import Message, Pair, Prompt, Sample, Unpaired, Verdict, digest

ROUNDING = 1e-9
"""4.1 - 3.1 is a little under 1, but a margin of 1 all the same."""

View: TypeAlias = Callable[[Prompt], list[Message]]
"""The prompt as the student sees it."""


class PairUp(Knobs):
    """`pair:`; `min_margin` is in the score's units, `score` names it (or `logprob`) where there are several.

    `max_length_ratio`: the longer of the two has at most so many times the characters of the other. `pairs_per_prompt`
    makes more of what a prompt has: another rejected answer each time, and of equally good chosen ones another, too.
    `form: kto`: an answer with at least `threshold` is desirable, any other is not; `min_margin` leaves out those nearer
    to it (Ethayarajh et al. 2024, arXiv 2402.01306: unpaired labels are enough).
    """

    kind: Literal["pair"] = "pair"
    form: Literal["pairs", "kto"] = "pairs"
    chosen: Literal["best"] = "best"
    rejected: Literal["random", "worst", "next"] = "random"
    min_margin: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_length_ratio: float | None = Field(None, ge=1)
    pairs_per_prompt: int = Field(1, gt=0)
    threshold: float | None = Field(None, allow_inf_nan=False)
    score: str | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.form == "kto") != (self.threshold is not None):
            raise ValueError("form: kto and threshold: go together; the score from which an answer is desirable")
        two_sided = {"chosen", "rejected", "max_length_ratio", "pairs_per_prompt"} & self.model_fields_set
        if self.form == "kto" and two_sided:
            raise ValueError(f"form: kto has no pairs; remove {', '.join(sorted(two_sided))}")
        return self


class Scored(NamedTuple):
    """A sample and the score that pairs are made by."""

    score: float
    sample: Sample

    @property
    def text(self) -> str:
        return self.sample.response.strip()


def pair(knobs: PairUp, groups: Iterable[list[Sample]], seed: int, view: View) -> Iterator[list[Pair] | Sample]:
    """The pairs of each prompt; a prompt without one comes out as its first sample with the reason."""
    for group in groups:
        found = _pairs(knobs, group, seed)
        if isinstance(found, Verdict):
            yield group[0].judged(found)
        else:
            yield [_row(high, low, view(group[0].prompt)) for high, low in found]


def _pairs(knobs: PairUp, group: list[Sample], seed: int) -> list[tuple[Scored, Scored]] | Verdict:
    name = knobs.score or _only_score(group)
    usable = [s for s in group if s.finish == "stop" and s.response.strip()]
    scored = [Scored(value, s) for s in usable if (value := s.value(name)) is not None]
    if not usable:
        return _none("no_finished_answers")
    if not scored:
        return Verdict(filter="pair", keep=None, reason=f"no_score:{name}")
    if len(scored) == 1:
        return _none("only_one")
    best = max(one.score for one in scored)
    tops = _distinct(one for one in scored if one.score == best)
    lower = [one for one in scored if one.score < best]
    other = _distinct(one for one in lower if one.text not in {top.text for top in tops})
    if not other:
        return _none("equal_texts" if lower else "tie")
    far = [one for one in other if best - one.score >= knobs.min_margin - ROUNDING]
    if not far:
        return _none(f"margin={best - min(map(_score, other)):g}<{knobs.min_margin:g}")
    limit = knobs.max_length_ratio
    against = [(top, [one for one in far if limit is None or _ratio(top, one) <= limit]) for top in tops]
    found = _drawn(knobs, against, random.Random(f"{seed}:{group[0].prompt.id}"))
    if not found:
        least = min(_ratio(top, one) for top in tops for one in far)
        return _none(f"length_ratio={least:.3g}>{limit:g}")
    return found


def _drawn(
    knobs: PairUp, against: list[tuple[Scored, list[Scored]]], chance: random.Random
) -> list[tuple[Scored, Scored]]:
    """Pairs in rounds over the chosen ones; no pair twice, and no rejected one again before all others were."""
    made: list[tuple[Scored, Scored]] = []
    used: Counter[str] = Counter()
    while any(left for _, left in against):
        for top, left in against:
            if not left:
                continue
            fewest = min(used[one.text] for one in left)
            fresh = [one for one in left if used[one.text] == fewest]
            match knobs.rejected:
                case "random":
                    low = chance.choice(fresh)
                case "next":
                    low = max(fresh, key=_score)
                case "worst":
                    low = min(fresh, key=_score)
            left.remove(low)
            used[low.text] += 1
            made.append((top, low))
            if len(made) == knobs.pairs_per_prompt:
                return made
    return made


def _score(one: Scored) -> float:
    return one.score


def _distinct(scored: Iterable[Scored]) -> list[Scored]:
    """The first of each text."""
    first: dict[str, Scored] = {}
    for one in scored:
        first.setdefault(one.text, one)
    return list(first.values())


def _ratio(one: Scored, other: Scored) -> float:
    """Longer over shorter in characters, which every script has."""
    short, long = sorted((len(one.text), len(other.text)))
    return long / short


def _none(reason: str) -> Verdict:
    return Verdict(filter="pair", keep=False, reason=reason)


def _only_score(group: list[Sample]) -> str:
    """The name of the score that the samples have, where the recipe does not say which."""
    names = sorted({name for sample in group for name in sample.scores if "." not in name})  # else an aspect's
    if len(names) > 1:
        raise RecipeError(f"pair: the samples have several scores ({', '.join(names)}); name one: pair: {{score: ...}}")
    return names[0] if names else ""


def _row(high: Scored, low: Scored, prompt: list[Message]) -> Pair:
    chosen, rejected = high.sample, low.sample
    return Pair(
        id=digest(chosen.id, rejected.id, size=8),
        prompt=prompt,
        chosen=[Message(role="assistant", content=high.text)],
        rejected=[Message(role="assistant", content=low.text)],
        margin=high.score - low.score,
        chosen_model=chosen.model,
        rejected_model=rejected.model,
        chosen_score=high.score,
        rejected_score=low.score,
        source=chosen.prompt.source,
        parents=[chosen.id, rejected.id],
    )


# -- rows without a partner --------------------------------------------------------------------------------------------


def unpaired(knobs: PairUp, groups: Iterable[list[Sample]], view: View) -> Iterator[Unpaired | Sample]:
    """A row for each sample, or the sample with the reason why not."""
    assert knobs.threshold is not None
    for group in groups:
        name = knobs.score or _only_score(group)
        labels: dict[str, set[bool]] = {}
        for sample in group:
            if (score := sample.value(name)) is not None and sample.finish == "stop":
                labels.setdefault(sample.response.strip(), set()).add(score >= knobs.threshold - ROUNDING)
        seen: set[str] = set()
        for sample in group:
            text = sample.response.strip()
            verdict = _no_label(knobs, sample, name)
            if verdict is None and len(labels[text]) > 1:
                verdict = _none("both_labels")
            elif verdict is None and text in seen:
                verdict = _none("equal_texts")
            if verdict is not None:
                yield sample.judged(verdict)
                continue
            seen.add(text)
            score = sample.value(name)
            assert score is not None
            yield Unpaired(
                id=digest(sample.id, size=8), prompt=view(sample.prompt),
                completion=[Message(role="assistant", content=text)], label=True in labels[text], score=score,
                model=sample.model, source=sample.prompt.source, parents=[sample.id],
            )  # fmt: skip


def _no_label(knobs: PairUp, sample: Sample, name: str) -> Verdict | None:
    """Why a sample by itself is neither desirable nor not."""
    assert knobs.threshold is not None
    if sample.finish != "stop":
        return _none(f"truncated:{sample.finish}")
    if not sample.response.strip():
        return _none("empty")
    score = sample.value(name)
    if score is None:
        return Verdict(filter="pair", keep=None, reason=f"no_score:{name}")
    margin = abs(score - knobs.threshold)
    if margin < knobs.min_margin - ROUNDING:
        return _none(f"margin={margin:g}<{knobs.min_margin:g}")
    return None
