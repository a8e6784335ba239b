"""Intervals: Wilson's for rates, percentile bootstraps for means and paired differences, BCa bootstraps for their ratios,
whose distributions are skewed. All are 95 %. Exact tests.

Paired values are resampled by cluster (all values of one prompt together), because answers to one prompt are not
independent: Miller 2024, arXiv 2411.00640, sections 2.2 and 4.2.
"""

import math
import random
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from statistics import NormalDist

Z = 1.959963984540054
NORMAL = NormalDist()
RESAMPLES = 2_000
KEPT = 5_000
"""Clusters up to which resamples are kept in memory (20 MB) for the next measure of the same evaluation."""
STEEPEST = 30.0
"""Coefficient beyond which a logistic fit is one of separated data: it would grow for ever."""
MIN_GAP = 2.0
"""Standard errors that the teacher must lie above the base: with less, a share of their gap is a share of noise."""


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
    return bootstrap([(v, 1.0) for v in values], lambda total, n: total / n, seed)


def paired_bootstrap_difference(
    a: list[float], b: list[float], seed: int, clusters: list[str]
) -> tuple[float, float, float]:
    """mean(a) - mean(b) with its interval; `a[i]` and `b[i]` are two measurements of the same thing."""
    low, high = bootstrap(_by_cluster(clusters, a, b), lambda x, y, n: (x - y) / n, seed)
    return (math.fsum(a) - math.fsum(b)) / len(a), low, high


def paired_bootstrap_ratio(
    a: list[float], b: list[float], seed: int, clusters: list[str]
) -> tuple[float, float, float] | None:
    """mean(a) / mean(b) with its interval, or None where mean(b) is 0.

    A resample in which b is 0 counts as an infinite ratio, so `high` may be infinite: the data sets no upper bound.
    """
    if math.fsum(b) == 0:
        return None
    low, high = bootstrap(_by_cluster(clusters, a, b), lambda x, y, n: x / y if y else math.inf, seed, skewed=True)
    return math.fsum(a) / math.fsum(b), low, high


def gap_closed(
    student: list[float], base: list[float], teacher: list[float], seed: int, clusters: list[str]
) -> tuple[float, float, float] | None:
    """(student - base) / (teacher - base) of the means with its interval; None where it is undefined: the teacher does
    not lie `MIN_GAP` standard errors above the base.

    A resample without a gap counts as an infinite share, with the sign of student - base.
    """
    gap = math.fsum(teacher) - math.fsum(base)
    if gap <= 0 or gap < MIN_GAP * len(base) * standard_error(teacher, base, clusters):
        return None

    def share(of_student: float, of_base: float, of_teacher: float, _: float) -> float:
        gained, wanted = of_student - of_base, of_teacher - of_base
        return gained / wanted if wanted > 0 else math.copysign(math.inf, gained)

    low, high = bootstrap(_by_cluster(clusters, student, base, teacher), share, seed, skewed=True)
    return (math.fsum(student) - math.fsum(base)) / gap, low, high


def standard_error(a: list[float], b: list[float], clusters: list[str]) -> float:
    """Of mean(a) - mean(b), paired, clustered (Miller 2024, section 2.2): clusters' sums of deviations, squared."""
    n = len(a)
    mean = (math.fsum(a) - math.fsum(b)) / n
    sums = _by_cluster(clusters, a, b)
    return math.sqrt(math.fsum((x - y - mean * size) ** 2 for x, y, size in sums)) / n


def mcnemar(a: list[float], b: list[float]) -> float:
    """Exact two-sided p-value (McNemar 1947, binomial form) of paired outcomes 0 and 1: are the pairs that differ as
    often the one way as the other? 1 where none differs."""
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    differing = only_a + only_b
    tail = sum(math.comb(differing, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**differing))


def at_zero(outcomes: list[float], differences: list[float]) -> tuple[float, float, float] | str:
    """The rate of outcomes (0 to 1) where the difference is zero, by logistic regression on it, with its interval; in words
    why not, where nothing can be fitted.

    A simple form of AlpacaEval's control for length (Dubois et al. 2024, arXiv 2404.04475, section 3): the difference goes
    in as tanh(difference / standard deviation), so that one very long answer does not decide. The errors are those of the
    sandwich estimator (White 1982), as outcomes with ties are no binomial counts, with Student's t for their few.
    """
    n = len(outcomes)
    if n < 3 or min(outcomes) == max(outcomes):
        return "the outcomes are all alike"
    if min(differences) == max(differences):
        return "the differences are all alike"
    spread = math.sqrt(math.fsum(d * d for d in differences) / n)
    x = [math.tanh(d / spread) for d in differences]
    fitted = _logistic(outcomes, x)
    if fitted is None:
        return "the difference alone tells the outcome"
    a, b = fitted
    rates = [_sigmoid(a + b * one) for one in x]
    off = [y - p for y, p in zip(outcomes, rates, strict=True)]
    curves = [p * (1 - p) for p in rates]
    h0, h1, h2 = (math.fsum(c * one**k for c, one in zip(curves, x, strict=True)) for k in range(3))
    # of the inverse of that matrix only the row of `a` counts
    pulls = [(h2 - h1 * one) * e / (h0 * h2 - h1 * h1) for one, e in zip(x, off, strict=True)]
    half = _student(n - 2) * math.sqrt(math.fsum(u * u for u in pulls) * n / (n - 2))
    return _sigmoid(a), _sigmoid(a - half), _sigmoid(a + half)


def _logistic(outcomes: list[float], x: list[float]) -> tuple[float, float] | None:
    """Intercept and slope by Newton's steps, none longer than 1; None where they run away, since the data are separated."""
    a = b = 0.0
    for _ in range(100):
        rates = [_sigmoid(a + b * one) for one in x]
        off = [y - p for y, p in zip(outcomes, rates, strict=True)]
        g0, g1 = math.fsum(off), math.fsum(e * one for e, one in zip(off, x, strict=True))
        h0, h1, h2 = (math.fsum(p * (1 - p) * one**k for p, one in zip(rates, x, strict=True)) for k in range(3))
        determinant = h0 * h2 - h1 * h1
        if determinant <= 1e-12 * h0 * h2 or max(abs(a), abs(b)) > STEEPEST:
            return None
        da, db = (h2 * g0 - h1 * g1) / determinant, (h0 * g1 - h1 * g0) / determinant
        scale = min(1.0, 1 / max(abs(da), abs(db), 1e-300))
        a, b = a + scale * da, b + scale * db
        if max(abs(da), abs(db)) < 1e-9:
            return a, b
    return None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


def _student(freedom: int) -> float:
    """97.5 % of Student's t, by the expansion of Cornish and Fisher; within 1 % from 4 degrees of freedom on."""
    return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted so that the chance of any false claim stays at the level (Holm 1979)."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = worst
    return adjusted


def _by_cluster(clusters: list[str], *columns: list[float]) -> list[tuple[float, ...]]:
    """Each cluster's sum of every column, and its size: all that a resample needs of it."""
    sums: dict[str, tuple[float, ...]] = {}
    for cluster, *values in zip(clusters, *columns, strict=True):
        known = sums.get(cluster, (0.0,) * (len(columns) + 1))
        sums[cluster] = tuple(total + value for total, value in zip(known, (*values, 1.0), strict=True))
    return list(sums.values())


def bootstrap(
    sums: Sequence[tuple[float, ...]], statistic: Callable[..., float], seed: int, skewed: bool = False
) -> tuple[float, float]:
    """2.5 % and 97.5 % of a statistic over resampled clusters; it is called with the sum of each column.

    The seed alone decides the resamples. `skewed`: other quantiles, corrected for bias and skewness.
    """
    if not sums:
        raise ValueError("no values to resample")
    totals = [_total(column) for column in zip(*sums, strict=True)]
    found = sorted(statistic(*(total(chosen) for total in totals)) for chosen in _resamples(len(sums), seed))
    low, high = _corrected(found, sums, statistic) if skewed else (0.025, 0.975)
    last = RESAMPLES - 1
    return found[min(math.floor(RESAMPLES * low), last)], found[min(max(math.ceil(RESAMPLES * high) - 1, 0), last)]


def _corrected(
    found: list[float], sums: Sequence[tuple[float, ...]], statistic: Callable[..., float]
) -> tuple[float, float]:
    """The quantiles that BCa takes for 2.5 % and 97.5 % (Efron 1987; DiCiccio & Efron 1996, section 2): the bias from where
    the data's own value stands among the resamples, the skewness from leaving out one cluster at a time."""
    whole = [math.fsum(column) for column in zip(*sums, strict=True)]
    value = statistic(*whole)
    below = (bisect_left(found, value) + bisect_right(found, value)) / 2 / RESAMPLES
    bias = NORMAL.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    rest = [statistic(*map(float.__sub__, whole, row)) for row in sums] if len(sums) > 1 else [value]
    mean = sum(rest) / len(rest)
    spread = sum((mean - one) ** 2 for one in rest)
    skew = sum((mean - one) ** 3 for one in rest) / (6 * spread**1.5) if 0 < spread < math.inf else 0.0

    def quantile(z: float) -> float:
        return NORMAL.cdf(bias + (bias + z) / max(1 - skew * (bias + z), 0.1))

    return quantile(-Z), quantile(Z)


def _total(column: tuple[float, ...]) -> Callable[[Sequence[int]], float]:
    """The sum of a column over a resample; known beforehand where all clusters are alike, as most sizes are."""
    if min(column) == max(column):
        whole = column[0] * len(column)
        return lambda _: whole
    get = column.__getitem__
    return lambda chosen: sum(map(get, chosen))


def _resamples(count: int, seed: int) -> Iterable[Sequence[int]]:
    return _kept(count, seed) if count <= KEPT else _drawn(count, seed)


@lru_cache(maxsize=2)
def _kept(count: int, seed: int) -> list[Sequence[int]]:
    return list(_drawn(count, seed))


def _drawn(count: int, seed: int) -> Iterable[Sequence[int]]:
    """Which clusters each resample holds."""
    draw = random.Random(seed)
    return (array("H" if count <= 1 << 16 else "L", draw.choices(range(count), k=count)) for _ in range(RESAMPLES))
