"""Stage `pair`: scored samples of one prompt become a preference pair, or a reason why not.

Zephyr (arXiv 2310.16944, section 3): chosen is the best, rejected is drawn at random among the lower ones, not the worst.
Ties never pair, nor do equal texts; a truncated answer is on neither side.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from pydantic import Field

from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.rows import Message, Pair, Prompt, Sample, Verdict, digest

ROUNDING = 1e-9
"""4.1 - 3.1 is a little under 1, but a margin of 1 all the same."""


class PairUp(Knobs):
    """`pair:`; `min_margin` is in the score's units, `score` names it (or `logprob`) where there are several."""

    kind: Literal["pair"] = "pair"
    chosen: Literal["best"] = "best"
    rejected: Literal["random", "worst", "next"] = "random"
    min_margin: float = Field(0.0, ge=0)
    score: str | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")


class Scored(NamedTuple):
    """A sample and the score that pairs are made by."""

    score: float
    sample: Sample


def pair(
    knobs: PairUp, groups: Iterable[list[Sample]], seed: int, view: Callable[[Prompt], list[Message]]
) -> Iterator[Pair | Sample]:
    """One pair per prompt; a prompt without one comes out as its first sample with the reason."""
    for group in groups:
        found = _pair(knobs, group, seed)
        if isinstance(found, Verdict):
            yield group[0].judged(found)
        else:
            yield _row(*found, view(group[0].prompt))


def _pair(knobs: PairUp, group: list[Sample], seed: int) -> tuple[Scored, Scored] | Verdict:
    name = knobs.score or _only_score(group)
    usable = [s for s in group if s.finish == "stop" and s.response.strip()]
    scored = [Scored(value, s) for s in usable if (value := s.value(name)) is not None]
    if not usable:
        return _none("no_finished_answers")
    if not scored:
        return Verdict(filter="pair", keep=None, reason=f"no_score:{name}")
    if len(scored) == 1:
        return _none("only_one")
    best = max(scored, key=_score)  # the first of equals: nothing random
    lower = [one for one in scored if one.score < best.score]
    other = [one for one in lower if one.sample.response.strip() != best.sample.response.strip()]
    if not other:
        return _none("equal_texts" if lower else "tie")
    far = [one for one in other if best.score - one.score >= knobs.min_margin - ROUNDING]
    if not far:
        widest = best.score - min(map(_score, other))
        return _none(f"margin={widest:g}<{knobs.min_margin:g}")
    if knobs.rejected == "random":
        return best, random.Random(f"{seed}:{best.sample.prompt.id}").choice(far)
    edge = max if knobs.rejected == "next" else min
    return best, edge(far, key=_score)


def _score(one: Scored) -> float:
    return one.score


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
        chosen=[Message(role="assistant", content=chosen.response.strip())],
        rejected=[Message(role="assistant", content=rejected.response.strip())],
        margin=high.score - low.score,
        chosen_model=chosen.model,
        rejected_model=rejected.model,
        chosen_score=high.score,
        rejected_score=low.score,
        source=chosen.prompt.source,
        parents=[chosen.id, rejected.id],
    )


def audit(pairs: Iterable[Pair]) -> dict[str, Any]:
    """What pairs would teach besides quality: length, model families, thin margins. Lengths are in words."""
    count = longer = equal = 0
    words = {"chosen": 0, "rejected": 0}
    models: dict[str, Counter[str]] = {"chosen": Counter(), "rejected": Counter()}
    margins = []
    for row in pairs:
        chosen, rejected = row.chosen[-1]["content"], row.rejected[-1]["content"]
        lengths = len(chosen.split()), len(rejected.split())
        count, longer, equal = count + 1, longer + (lengths[0] > lengths[1]), equal + (chosen == rejected)
        words["chosen"] += lengths[0]
        words["rejected"] += lengths[1]
        models["chosen"][row.chosen_model] += 1
        models["rejected"][row.rejected_model] += 1
        margins.append(row.margin)
    if not count:
        return {"n": 0}
    return {
        "n": count,
        "chosen_longer": longer / count,
        "equal_texts": equal,
        "mean_words": {side: total / count for side, total in words.items()},
        "models": {side: {name: n / count for name, n in sorted(c.items())} for side, c in models.items()},
        "margins": _histogram(margins),
    }


def _histogram(values: list[float], bins: int = 10) -> list[dict[str, float]]:
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts = Counter(min(int((value - low) / width), bins - 1) for value in values)
    return [{"from": low + i * width, "to": low + (i + 1) * width, "count": counts[i]} for i in range(bins)]
