"""Stage `filter`: filters in recipe order; every sample comes out once, kept, dropped with a reason, or set aside.

With `control: random` as many rows are kept as the filters would keep, drawn by seed: what a filter bought is the
difference between two runs.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, TypeAlias

from pydantic import Field

from factory.errors import FactoryError
from factory.filters import FilterKnob, GroupFilter, Judge, Kit, Look, RowFilter, SetFilter
from factory.filters.isolated import together
from factory.filters.threshold import Threshold
from factory.knobs import Knobs
from factory.rows import Sample, Verdict


class Curate(Knobs):
    """`filter:` with a list; a sample dropped by one filter is not shown to the next, so cheap ones stand first.

    `control: random` keeps a random sample of the same size instead: of each prompt list and model, or, where all filters
    compare the answers of one prompt, of each prompt.
    """

    kind: Literal["filter"] = "filter"
    filters: list[FilterKnob] = Field(min_length=1)
    control: Literal["random"] | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")


def curate(knobs: Curate, read: Look, kit: Kit, seed: int = 0) -> Iterator[Sample]:
    """Each sample with the verdict that ended it, or with the scores that filters had to tell; order is kept.

    `read()` gives the samples by prompt, afresh at each call: some filters look at all rows before they judge the first.
    """
    filters = [one.open(kit) for one in knobs.filters]
    if knobs.control is None:
        groups = _judged(filters, read)
    elif all(isinstance(one, GroupFilter) for one in filters):
        groups = _drawn_by_prompt(_judged(filters, read), read(), seed)
    else:
        groups = _drawn(_judged(filters, read), read, seed)
    for group in groups:
        yield from group


def _drawn(judged: Iterator[list[Sample]], read: Look, seed: int) -> Iterator[list[Sample]]:
    """The samples afresh, as many of each prompt list and model kept as were judged so, whichever they are."""
    kept, total = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for group in judged:
        for sample in group:
            total[_stratum(sample)] += 1
            kept[_stratum(sample)] += sample.ending == "kept"
    draws = {one: drawn(kept[one], total[one], random.Random(f"{seed}:control:{one}")) for one in total}
    for group in read():
        yield [sample if next(draws[_stratum(sample)]) else sample.judged(not_drawn()) for sample in group]


def _stratum(sample: Sample) -> tuple[str, str]:
    return sample.prompt.source, sample.model


def _drawn_by_prompt(
    judged: Iterator[list[Sample]], afresh: Iterable[list[Sample]], seed: int
) -> Iterator[list[Sample]]:
    for group, samples in zip(judged, afresh, strict=True):
        count = sum(sample.ending == "kept" for sample in group)
        draws = drawn(count, len(group), random.Random(f"{seed}:control:{group[0].prompt.id}"))
        yield [sample if keep else sample.judged(not_drawn()) for sample, keep in zip(samples, draws, strict=True)]


def drawn(take: int, total: int, chance: random.Random) -> Iterator[bool]:
    """For each of `total` rows whether it is taken: `take` of them in all, every such choice equally likely.

    Selection sampling (Knuth, The Art of Computer Programming 2, section 3.4.2, algorithm S): nothing is remembered.
    """
    for left in range(total, 0, -1):
        taken = chance.random() * left < take
        take -= taken
        yield taken


def not_drawn() -> Verdict:
    """Of a row that a random control leaves out."""
    return Verdict(filter="control", keep=False, reason="not_drawn")


def row_filters(stages: Iterable[object], kit: Kit) -> list[RowFilter]:
    """The filters of all `filter` stages among these that look at one answer alone: what "accepted" means when a student is
    measured. Scores come later."""
    filters = chain.from_iterable(stage.filters for stage in stages if isinstance(stage, Curate))
    return [one.open(kit) for one in filters if isinstance(one, RowFilter) and not isinstance(one, Threshold)]


def accepts(filters: list[RowFilter], sample: Sample) -> Verdict | None:
    """The first verdict that does not keep the sample; None when all filters accept it."""
    verdicts = (checked(one, sample) for one in filters)
    return next((verdict for verdict in verdicts if not verdict.keep), None)


Group: TypeAlias = tuple[list[Sample], list[int]]
"""The samples of one prompt, with what was said of them, and the places of those that all filters so far have kept."""


def _judged(filters: Sequence[Any], read: Look) -> Iterator[list[Sample]]:
    groups: Iterator[Group] = ((list(group), list(range(len(group)))) for group in read())
    for step in _steps(filters, read):
        groups = step(groups)
    return (samples for samples, _ in groups)


def _steps(filters: Sequence[Any], read: Look) -> list[Callable[[Iterator[Group]], Iterator[Group]]]:
    """The filters as steps that groups go through one after another; neighbouring row filters are one step."""
    steps: list[Callable[[Iterator[Group]], Iterator[Group]]] = []
    rows: list[RowFilter] = []
    for i, one in enumerate(filters):
        if isinstance(one, RowFilter) and not one.apart:
            rows.append(one)
            continue
        if rows:
            steps.append(partial(map, partial(_passed, rows)))
            rows = []
        if isinstance(one, RowFilter):
            steps.append(partial(together, partial(_passed, [one])))
        else:
            steps.append(partial(map, partial(_heard, _judge(one, partial(_survivors, filters[:i], read)))))
    return [*steps, partial(map, partial(_passed, rows))]


def _passed(filters: list[RowFilter], group: Group) -> Group:
    """The group after row filters; what they have to tell of a sample is put down with it."""
    samples, alive = group
    return samples, [i for i in alive if _passes(filters, samples, i)]


def _passes(filters: list[RowFilter], samples: list[Sample], i: int) -> bool:
    for one in filters:
        verdict = checked(one, samples[i])
        if not verdict.keep or verdict.score is not None:
            samples[i] = samples[i].judged(verdict)
        if not verdict.keep:
            return False
    return True


def _heard(judge: Judge, group: Group) -> Group:
    """The group after a filter that compares samples."""
    samples, alive = group
    if not alive:
        return group
    verdicts = judge([samples[i] for i in alive])
    for i, verdict in zip(alive, verdicts, strict=True):
        if not verdict.keep or verdict.score is not None:
            samples[i] = samples[i].judged(verdict)
    return samples, [i for i, verdict in zip(alive, verdicts, strict=True) if verdict.keep]


def _survivors(filters: Sequence[Any], read: Look) -> Iterator[list[Sample]]:
    """What reaches the filter after these: they start afresh, since some remember the rows they saw."""
    for group in _judged(filters, read):
        if alive := [sample for sample in group if sample.ending == "kept"]:
            yield alive


def _judge(one: Any, look: Look) -> Judge:
    """A filter as a function over the samples of one prompt. One that breaks sets rows aside: broken is not bad."""
    if isinstance(one, GroupFilter):
        return lambda samples: _all_checked(one.kind, one.check_group, samples)
    assert isinstance(one, SetFilter), f"{one!r} has none of the three shapes"
    try:
        judge = one.start(look)
    except FactoryError:  # says what to do, and no row is to blame
        raise
    except Exception as e:
        broken = _broken(one.kind, e)
        return lambda samples: [broken for _ in samples]
    return lambda samples: _all_checked(one.kind, judge, samples)


def checked(one: RowFilter, sample: Sample) -> Verdict:
    """Its verdict, or the error that set the sample aside."""
    try:
        verdict = one.check(sample)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"no verdict, but {verdict!r}")
        return verdict
    except Exception as e:
        return _broken(one.kind, e)


def _all_checked(kind: str, judge: Callable[[list[Sample]], Any], samples: list[Sample]) -> list[Verdict]:
    """One verdict per sample, or the error for all of them."""
    try:
        verdicts = list(judge(samples))
        if len(verdicts) != len(samples) or not all(isinstance(verdict, Verdict) for verdict in verdicts):
            raise TypeError(f"{len(samples)} samples, but the filter said {verdicts!r}")
        return verdicts
    except Exception as e:
        return [_broken(kind, e) for _ in samples]


def _broken(kind: str, error: Exception) -> Verdict:
    return Verdict(filter=kind, keep=None, reason="filter_error", evidence=repr(error)[:200])
