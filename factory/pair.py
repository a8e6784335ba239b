"""Stage `pair`: scored samples of one prompt become a preference pair, or a reason why not.

Zephyr (arXiv 2310.16944, section 3): chosen is the best, rejected is drawn at random among the lower ones, not the worst.
Ties never pair, nor do equal texts; a truncated answer is on neither side.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import Field

from factory.knobs import Knobs
from factory.rows import Message, Pair, Prompt, Sample, Verdict, digest


class PairUp(Knobs):
    """`pair:`; `min_margin` is in the score's units, `score` names it where there are several."""

    kind: Literal["pair"] = "pair"
    chosen: Literal["best"] = "best"
    rejected: Literal["random", "worst", "next"] = "random"
    min_margin: float = Field(0.0, ge=0)
    score: str | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")


def pair(
    knobs: PairUp, groups: Iterable[list[Sample]], seed: int, view: Callable[[Prompt], list[Message]]
) -> Iterator[Pair | Sample]:
    """One pair per prompt; a prompt without one comes out as its first sample with the reason."""
    for group in groups:
        found = _pair(knobs, group, seed)
        if isinstance(found, str):
            yield group[0].judged(Verdict(filter="pair", keep=False, reason=found))
        else:
            yield _row(knobs, *found, view(group[0].prompt))


def _pair(knobs: PairUp, group: list[Sample], seed: int) -> tuple[Sample, Sample] | str:
    usable = [s for s in group if s.finish == "stop" and s.response.strip()]
    scored = [s for s in usable if _score(knobs, s) is not None]
    if not scored:
        return "no_scores" if usable else "no_finished_answers"
    if len(scored) == 1:
        return "only_one"
    best = max(scored, key=lambda s: _known(knobs, s))  # the first of equals: nothing random
    top = _known(knobs, best)
    lower = [s for s in scored if _known(knobs, s) < top and s.response.strip() != best.response.strip()]
    if not lower:
        return "tie"
    far = [s for s in lower if top - _known(knobs, s) >= knobs.min_margin]
    if not far:
        widest = max(top - _known(knobs, s) for s in lower)
        return f"margin={widest:g}<{knobs.min_margin:g}"
    if knobs.rejected == "random":
        return best, random.Random(f"{seed}:{best.prompt.id}").choice(far)
    edge = max if knobs.rejected == "next" else min
    return best, edge(far, key=lambda s: _known(knobs, s))


def _score(knobs: PairUp, sample: Sample) -> float | None:
    if knobs.score is not None:
        return sample.scores.get(knobs.score)
    if len(sample.scores) > 1:
        raise ValueError(
            f"samples have several scores ({', '.join(sample.scores)}): name one with pair: {{score: ...}}"
        )
    return next(iter(sample.scores.values()), None)


def _known(knobs: PairUp, sample: Sample) -> float:
    score = _score(knobs, sample)
    assert score is not None
    return score


def _row(knobs: PairUp, chosen: Sample, rejected: Sample, prompt: list[Message]) -> Pair:
    high, low = _known(knobs, chosen), _known(knobs, rejected)
    return Pair(
        id=digest(chosen.id, rejected.id, size=8),
        prompt=prompt,
        chosen=[Message(role="assistant", content=chosen.response.strip())],
        rejected=[Message(role="assistant", content=rejected.response.strip())],
        margin=high - low,
        chosen_model=chosen.model,
        rejected_model=rejected.model,
        chosen_score=high,
        rejected_score=low,
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
