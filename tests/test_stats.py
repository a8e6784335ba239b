"""Intervals: against published values, and by whether they cover the truth as often as they say."""

import math
import random
import time

import pytest

from factory import stats

# Newcombe 1998, Statistics in Medicine 17, table I, method 3
WILSON = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize(("counts", "interval"), WILSON.items())
def test_wilson_is_the_published_one(counts: tuple[int, int], interval: tuple[float, float]) -> None:
    assert stats.wilson(*counts) == pytest.approx(interval, abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert stats.wilson(0, 0) == (0, 1)
    assert stats.wilson(0, 7)[0] == 0
    assert stats.wilson(7, 7)[1] == 1
    with pytest.raises(ValueError, match="8 successes in 7"):
        stats.wilson(8, 7)


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_intervals_of_a_mean_cover_it_as_often_as_they_say() -> None:
    hits = []
    for i in range(300):
        draw = random.Random(i)
        low, high = stats.bootstrap_mean([draw.gauss(5, 2) for _ in range(40)], seed=i)
        hits.append(low <= 5 <= high)
    assert 0.91 <= share(hits) <= 0.98


def clustered(draw: random.Random) -> tuple[list[float], list[float], list[str]]:
    """40 prompts, 3 answers each; the effect (true mean 1) differs by prompt, so that answers of one prompt agree."""
    a, b, clusters = [], [], []
    for prompt in range(40):
        effect, level = draw.gauss(1, 1), draw.gauss(4, 1)
        for _ in range(3):
            a.append(level + effect + draw.gauss(0, 0.3))
            b.append(level + draw.gauss(0, 0.3))
            clusters.append(str(prompt))
    return a, b, clusters


def test_paired_intervals_cover_the_truth_and_would_not_without_clusters() -> None:
    covers: dict[str, list[bool]] = {"difference": [], "ratio": [], "no clusters": []}
    for i in range(300):
        a, b, clusters = clustered(random.Random(i))
        alone = [str(k) for k in range(len(a))]
        _, low, high = stats.paired_bootstrap_difference(a, b, i, clusters)
        covers["difference"].append(low <= 1 <= high)
        ratio = stats.paired_bootstrap_ratio(a, b, i, clusters)
        assert ratio is not None
        covers["ratio"].append(ratio[1] <= 1.25 <= ratio[2])
        if i < 100:
            _, low, high = stats.paired_bootstrap_difference(a, b, i, alone)
            covers["no clusters"].append(low <= 1 <= high)
    assert 0.91 <= share(covers["difference"]) <= 0.98
    assert 0.91 <= share(covers["ratio"]) <= 0.98
    assert share(covers["no clusters"]) < 0.85


def test_paired_values_are_those_of_the_data() -> None:
    a, b, clusters = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], list("wxyz")
    value, low, high = stats.paired_bootstrap_difference(a, b, 1, clusters)
    assert (value, low <= value <= high) == (0.5, True)
    assert stats.paired_bootstrap_difference(a, b, 1, clusters) == (value, low, high)  # the seed alone decides
    assert stats.paired_bootstrap_difference(a, a, 1, clusters) == (
        0,
        0,
        0,
    )  # paired: the same answers differ by nothing
    ratio = stats.paired_bootstrap_ratio(a, b, 1, clusters)
    assert ratio is not None
    assert ratio[0] == 3
    assert ratio[2] == float("inf")  # many resamples hold no success of b: no upper bound
    assert stats.paired_bootstrap_ratio(a, [0.0] * 4, 1, clusters) is None


def test_two_thousand_values_take_less_than_three_seconds() -> None:
    draw = random.Random(0)
    a, b = ([draw.random() for _ in range(2000)] for _ in range(2))
    started = time.process_time()
    stats.paired_bootstrap_difference(a, b, 0, [str(i) for i in range(2000)])
    assert time.process_time() - started < 3


def test_mcnemar_is_exact() -> None:
    """8 of 10 pairs that differ go one way: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112 / 1024; ties count for nothing."""
    a, b = [1.0] * 8 + [0.0] * 2 + [1.0] * 5, [0.0] * 8 + [1.0] * 2 + [1.0] * 5
    assert stats.mcnemar(a, b) == stats.mcnemar(b, a) == 112 / 1024
    assert stats.mcnemar([1.0] * 5, [0.0] * 5) == 2 / 32
    assert stats.mcnemar([1.0, 0.0], [0.0, 1.0]) == 1  # as often one way as the other: twice the tail is more than all
    assert stats.mcnemar([1.0, 0.0], [1.0, 0.0]) == 1
    assert 0 < stats.mcnemar([1.0] * 1000, [0.0] * 1000) < 1e-300


@pytest.mark.parametrize(
    ("ps", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # .005*4, .01*3, .03*2, then .04*1 not below .06
        ([0.2], [0.2]),
        ([0.9, 0.6], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm_multiplies_the_smallest_by_the_number_of_tests(ps: list[float], adjusted: list[float]) -> None:
    assert stats.holm(ps) == pytest.approx(adjusted)


def test_standard_errors_are_paired_and_clustered() -> None:
    a, b = [3.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]  # differences 2 0 1 1, mean 1, squares of deviations 1 1 0 0
    assert stats.standard_error(a, b, list("wxyz")) == pytest.approx(math.sqrt(2) / 4)
    assert stats.standard_error(a, b, list("wwyz")) == 0  # +1 and -1 of one prompt cancel
    assert stats.standard_error(a, b, list("wxwz")) == pytest.approx(math.sqrt(1 + 1) / 4)
    c = [
        2.0,
        2.0,
        0.0,
        0.0,
    ]  # against zeros, the two answers of a prompt agree: twice the error of independent ones by sqrt 2
    independent, together = (stats.standard_error(c, [0.0] * 4, list(names)) for names in ("wxyz", "wwyy"))
    assert together == pytest.approx(independent * math.sqrt(2))


def test_the_share_of_the_gap_is_undefined_where_the_gap_may_be_noise() -> None:
    names = [str(i) for i in range(20)]
    base, student, teacher = ([1.0] * k + [0.0] * (20 - k) for k in (5, 11, 17))
    told = stats.gap_closed(student, base, teacher, 1, names)
    assert told is not None
    assert told[0] == 0.5  # (11 - 5) / (17 - 5)
    assert 0 < told[1] < 0.5 < told[2] < 1
    assert stats.gap_closed(student, teacher, base, 1, names) is None  # the teacher is worse
    assert stats.gap_closed(student, base, base, 1, names) is None
    # 3 of 20 prompts: gap .15, s.e. sqrt(20 * .15 * .85) / 20 = .0798, so 1.88 of them; with 4: .2 / .0894 = 2.24
    assert stats.gap_closed(student, base, [1.0] * 8 + [0.0] * 12, 1, names) is None
    assert stats.gap_closed(student, base, [1.0] * 9 + [0.0] * 11, 1, names) is not None


def test_resamples_without_a_gap_set_no_bound() -> None:
    """2 of 4: the gap is exactly 2 standard errors, and a sixteenth of the resamples holds none of the two."""
    told = stats.gap_closed([1.0] * 3 + [0.0], [0.0] * 4, [1.0] * 2 + [0.0] * 2, 1, list("wxyz"))
    assert told is not None
    assert (told[0], told[2]) == (1.5, math.inf)


def test_corrected_intervals_of_ratios_hold_at_their_edges() -> None:
    a, b = [1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0]
    assert stats.paired_bootstrap_ratio(b, b, 1, list("vwxyz")) == (1, 1, 1)
    assert stats.paired_bootstrap_ratio(a, b, 1, list("vvvvv")) == (
        0.75,
        0.75,
        0.75,
    )  # one prompt tells nothing of others
    none = stats.paired_bootstrap_ratio([0.0] * 5, b, 1, list("vwxyz"))
    assert none == (0, 0, 0)


def test_the_correction_moves_the_interval_towards_the_long_tail() -> None:
    """For a mean the acceleration is the skewness / 6 sqrt(n); with positive skewness both ends lie higher."""
    values = [0.1 * 1.1**k for k in range(60)]
    sums = [(v, 1.0) for v in values]
    plain = stats.bootstrap(sums, lambda total, n: total / n, 1)
    moved = stats.bootstrap(sums, lambda total, n: total / n, 1, skewed=True)
    mirrored = stats.bootstrap([(-v, 1.0) for v in values], lambda total, n: total / n, 1, skewed=True)
    assert plain[0] < moved[0] < moved[1]
    assert plain[1] < moved[1]
    assert mirrored == pytest.approx((-moved[1], -moved[0]), rel=0.01)
    level = [(float(k), 1.0) for k in range(60)]
    even = [stats.bootstrap(level, lambda total, n: total / n, 1, skewed=skewed) for skewed in (False, True)]
    assert even[0] == pytest.approx(even[1], rel=0.02)  # nothing to correct
