"""Intervals: Wilson's for rates, percentile bootstraps for means and for paired comparisons. All are 95 %.

Paired values are resampled by cluster (all values of one prompt together), because answers to one prompt are not
independent: Miller 2024, arXiv 2411.00640, sections 2.2 and 4.2.
"""

import math
import random
from collections.abc import Callable, Sequence

Z = 1.959963984540054
RESAMPLES = 2_000


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927); stays honest at 0 % and 100 %. With n = 0 it is (0, 1)."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    scale = 1 + Z * Z / n
    centre = (rate + Z * Z / (2 * n)) / scale
    half = Z * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n)) / scale
    # at the ends the formula gives exactly 0 and 1, rounding does not
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def bootstrap_mean(values: list[float], seed: int) -> tuple[float, float]:
    """Interval of the mean of independent values."""
    sums = [(v, 0.0, 1) for v in values]
    return _interval(sums, lambda a, b, n: a / n, seed)


def paired_bootstrap_difference(
    a: list[float], b: list[float], seed: int, clusters: list[str]
) -> tuple[float, float, float]:
    """mean(a) - mean(b) with its interval; `a[i]` and `b[i]` are two measurements of the same thing."""
    low, high = _interval(_by_cluster(a, b, clusters), lambda x, y, n: (x - y) / n, seed)
    return (math.fsum(a) - math.fsum(b)) / len(a), low, high


def paired_bootstrap_ratio(
    a: list[float], b: list[float], seed: int, clusters: list[str]
) -> tuple[float, float, float] | None:
    """mean(a) / mean(b) with its interval, or None where mean(b) is 0.

    A resample in which b is 0 counts as an infinite ratio, so `high` may be infinite: the data sets no upper bound.
    """
    if math.fsum(b) == 0:
        return None
    low, high = _interval(_by_cluster(a, b, clusters), lambda x, y, n: x / y if y else math.inf, seed)
    return math.fsum(a) / math.fsum(b), low, high


def _by_cluster(a: list[float], b: list[float], clusters: list[str]) -> list[tuple[float, float, int]]:
    """Each cluster's sum of a, sum of b and size: all that a resample needs of it."""
    sums: dict[str, tuple[float, float, int]] = {}
    for x, y, cluster in zip(a, b, clusters, strict=True):
        of_a, of_b, size = sums.get(cluster, (0.0, 0.0, 0))
        sums[cluster] = (of_a + x, of_b + y, size + 1)
    return list(sums.values())


def _interval(
    sums: Sequence[tuple[float, float, int]], statistic: Callable[[float, float, int], float], seed: int
) -> tuple[float, float]:
    """2.5 % and 97.5 % of the statistic over resampled clusters; the seed alone decides the resamples."""
    if not sums:
        raise ValueError("no values to resample")
    draw = random.Random(seed)
    of_a, of_b, sizes = (list(column) for column in zip(*sums, strict=True))
    found = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(range(len(sums)), k=len(sums))
        a = sum(map(of_a.__getitem__, chosen))
        b = sum(map(of_b.__getitem__, chosen))
        found.append(statistic(a, b, sum(map(sizes.__getitem__, chosen))))
    found.sort()
    return found[math.floor(RESAMPLES * 0.025)], found[math.ceil(RESAMPLES * 0.975) - 1]
