"""What training, data and cost of a run show, in sentences; and what pairs would teach besides quality."""

import math
from collections.abc import Iterator
from typing import Any

from factory import stats

LENGTH_TELLS = 0.6
"""Share of pairs from which length is said to predict the choice; ours, below the 68 % that judges of arena talks show."""

Row = dict[str, Any]


def of_training(report: Row) -> Iterator[str]:
    for one in report["training"]:
        points = [p for p in one["curve"] if "loss" in p]
        name, told = one["student"], f"{one['method']} on {one.get('rows_trained', 'an unknown number of')} rows"
        if len(points) > 1:
            first, last = points[0], points[-1]
            told += f"; training loss {first['loss']:.3g} at step {first['step']}, {last['loss']:.3g} at {last['step']}"
        yield f"Training of {name}: {told}."


def of_data(report: Row) -> Iterator[str]:
    stages = [row for row in report["funnel"] if row["stage"] not in ("prompts", "train", "evaluate")]
    if not stages:
        return
    first, last = stages[0], stages[-1]
    told = f"Data: {first['in']:,} {first['unit']} went into {first['name']}, {last['kept']:,} rows came out of "
    told += last["name"]
    lost = [(count, reason, row["name"]) for row in stages for reason, count in row["reasons"].items()]
    if lost:
        count, reason, where = max(lost, key=lambda item: item[0])
        told += f"; the most frequent reason for a loss is '{reason}' ({count:,} in {where})"
    yield told + "."
    failed = sum(row["failed"] for row in stages)
    if failed:
        yield f"{failed:,} rows could not be told good or bad (failed): they are missing from the data, not judged bad."


def of_cost(spent: Row) -> Iterator[str]:
    if spent.get("usd_a_row"):
        yield f"Cost: {spent['usd']:.4g} USD for {spent['rows']:,} rows, {spent['usd_a_row']:.3g} USD a row."
    if spent.get("seconds_a_row"):
        told = f"Compute of local models: {spent['seconds']:,.0f} s for {spent['rows']:,} rows"
        yield f"{told}, {spent['seconds_a_row']:.2g} s a row."
    if spent.get("unknown"):
        yield f"{spent['unknown']:,} requests were in flight when the run was cut off: they may have been billed twice."


def of_pairs(report: Row) -> Iterator[str]:
    pairs = report["pairs"]
    if not pairs or not pairs["n"]:
        return
    (good, bad), words = pairs["sides"], pairs["mean_words"]
    means = f"(mean {words[good]:.0f} against {words[bad]:.0f} words"
    if "chosen_longer" in pairs:
        n, longer = pairs["n"], pairs["chosen_longer"]
        low, high = stats.wilson(round(longer * n), n)
        told = (
            f"In {100 * longer:.0f} % of {n:,} pairs ({100 * low:.0f}-{100 * high:.0f} %) the chosen answer is longer"
        )
    else:
        low, told = 0.0, f"{pairs['sides'][good]:,} of {pairs['n']:,} answers are desirable"
    told += f" {means}" + (")" if pairs["length_auc"] is None else f", AUC of length {pairs['length_auc']:.2f})")
    hint = length_predicts(pairs)
    yield told + (f": {hint}." if hint else ": part of what is learned may be length." if low > 0.5 else ".")
    if pairs["duplicates"]:
        yield f"{pairs['duplicates']:,} of {pairs['n']:,} preference rows were there before, with the same texts."


def length_predicts(pairs: Row | None) -> str | None:
    """Where length alone tells which answer is the better one: what the student then learns may be no more than that.

    Pairs: by the share of those whose lengths differ; rows without a partner: by the AUC of length, with Hanley and
    McNeil's standard error (1982). Both at the end of the 95 % interval that is nearer to one half.
    """
    if not pairs or not pairs["n"] or pairs["length_auc"] is None:
        return None
    if "chosen_longer" in pairs:
        longer, shorter = (round(pairs[f"chosen_{how}"] * pairs["n"]) for how in ("longer", "shorter"))
        low, high = stats.wilson(longer, longer + shorter)
        good, what = "the chosen", f"of {longer + shorter:,} pairs whose answers differ in length"
    else:
        low, high = _auc_interval(pairs["length_auc"], *pairs["sides"].values())
        good, what = "the desirable", "of all couples of a desirable and another answer"
    if low <= LENGTH_TELLS and high >= 1 - LENGTH_TELLS:
        return None
    share, how = (low, "longer") if low > LENGTH_TELLS else (1 - high, "shorter")
    return f"length alone predicts the choice: in at least {100 * share:.0f} % {what}, {good} one is {how}"


def _auc_interval(auc: float, n: int, m: int) -> tuple[float, float]:
    both, either = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    square = auc * (1 - auc) + (n - 1) * (both - auc * auc) + (m - 1) * (either - auc * auc)
    half = stats.Z * math.sqrt(max(square, 0.0) / (n * m))
    return auc - half, auc + half
