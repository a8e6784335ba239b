"""Do the intervals of an evaluation cover the truth as often as they say? Simulated evaluations whose truth is known.

Each has 100 prompts. Some are harder than others, for all models alike: an answer is right where the prompt's difficulty,
or with equal chance a draw of the model's own, lies below the model's rate. `rate` is the student's; the base has half
of it; the teacher of the share (retention) has 1.1 times it, at most 1, and that of the gap has 0.98. Wilson's intervals
need no simulation: their cover is a sum over the binomial distribution. `level`: a win rate at equal length, where answers are
longer than the others' by 20 words on average and length moves the odds, too. `mcnemar`: two models with the same rate, how
often the exact test claims a difference.
"""

import argparse
import math
import random
from collections.abc import Iterator

from benchmarks._figures import Figure, judged, main
from factory import stats

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
PROMPTS = 100
DRAWS = 4
SEED = 7
"""Of the resamples: one for all evaluations, as a recipe has one."""


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    count = arguments.evaluations
    judge = not arguments.small
    for rate in RATES:
        yield _between(f"wilson_{rate}", _wilson(rate), True)
    for rate in RATES:
        covered: dict[str, list[bool]] = {"difference": [], "draws": [], "share": [], "gap": []}
        for number in range(count):
            for kind, hit in _evaluation(rate, random.Random(f"{rate} {number}")):
                covered[kind].append(hit)
        for kind, hits in covered.items():
            if hits:  # the share of a gap that is noise is undefined
                yield _between(f"{kind}_{rate}", sum(hits) / len(hits), judge and len(hits) >= count / 2)
    for rate in RATES:
        told = [_level(rate, random.Random(f"level {rate} {number}")) for number in range(count)]
        held = [hit for hit in told if hit is not None]
        yield _between(f"level_{rate}", sum(held) / max(len(held), 1), judge)
    for rate in RATES:
        claims = [_claims(rate, random.Random(f"same {rate} {number}")) for number in range(count)]
        yield judged(f"intervals.mcnemar_false_claims_{rate}", sum(claims) / count, "<= 0.05", judge)


def _between(name: str, value: float, judge: bool) -> Figure:
    return Figure(f"intervals.{name}", round(value, 4), "0.93 to 0.97", 0.93 <= value <= 0.97 if judge else None)


def _wilson(rate: float) -> float:
    """The chance that the interval of a rate holds it."""
    chances = (math.comb(PROMPTS, k) * rate**k * (1 - rate) ** (PROMPTS - k) for k in range(PROMPTS + 1))
    spans = (stats.wilson(k, PROMPTS) for k in range(PROMPTS + 1))
    return math.fsum(chance for chance, (low, high) in zip(chances, spans, strict=True) if low <= rate <= high)


def _evaluation(rate: float, draw: random.Random) -> Iterator[tuple[str, bool]]:
    """Whether each kind of interval holds what is true."""
    names = [str(i) for i in range(PROMPTS)]
    hard = [draw.random() for _ in names]
    student, base = _answers(rate, hard, draw), _answers(rate / 2, hard, draw)
    yield "difference", _holds(stats.paired_bootstrap_difference(student, base, SEED, names), rate / 2)
    several = [_several(of, hard, draw) for of in (rate, rate / 2)]
    yield "draws", _holds(stats.paired_bootstrap_difference(*several, SEED, names), rate / 2)
    above = min(1.0, 1.1 * rate)
    share = stats.paired_bootstrap_ratio(student, _answers(above, hard, draw), SEED, names)
    if share is not None:
        yield "share", _holds(share, rate / above)
    gap = stats.gap_closed(student, base, _answers(0.98, hard, draw), SEED, names)
    if gap is not None:
        yield "gap", _holds(gap, (rate / 2) / (0.98 - rate / 2))


def _answers(rate: float, hard: list[float], draw: random.Random) -> list[float]:
    return [float((one if draw.random() < 0.5 else draw.random()) < rate) for one in hard]


def _several(rate: float, hard: list[float], draw: random.Random) -> list[float]:
    """pass@1 of each prompt from several draws, which are alike because the prompt is the same."""
    answers = [_answers(rate, hard, draw) for _ in range(DRAWS)]
    return [sum(of_it) / DRAWS for of_it in zip(*answers, strict=True)]


def _holds(told: tuple[float, float, float], truth: float) -> bool:
    return told[1] - 1e-9 <= truth <= told[2] + 1e-9


def _level(rate: float, draw: random.Random) -> bool | None:
    """Whether the interval at equal length holds the rate there; None where nothing could be fitted."""
    longer = [draw.gauss(20, 40) for _ in range(PROMPTS)]
    spread = math.hypot(20, 40)
    odds = [math.log(rate / (1 - rate)) + 1.5 * math.tanh(one / spread) for one in longer]
    told = stats.at_zero([float(draw.random() < 1 / (1 + math.exp(-one))) for one in odds], longer)
    return None if isinstance(told, str) else _holds(told, rate)


def _claims(rate: float, draw: random.Random) -> bool:
    hard = [draw.random() for _ in range(PROMPTS)]
    return stats.mcnemar(_answers(rate, hard, draw), _answers(rate, hard, draw)) < 0.05


if __name__ == "__main__":
    main(__doc__, measure, evaluations=(1_000, 20))
