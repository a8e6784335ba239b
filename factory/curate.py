"""Stage `filter`: filters in recipe order; every sample comes out once, kept, dropped with a reason, or set aside."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from factory.filters import FilterKnob, GroupFilter, Judge, Kit, Look, RowFilter, SetFilter
from factory.filters.threshold import Threshold
from factory.knobs import Knobs
from factory.rows import Sample, Verdict


class Curate(Knobs):
    """`filter:` with a list; a sample dropped by one filter is not shown to the next, so cheap ones stand first."""

    kind: Literal["filter"] = "filter"
    filters: list[FilterKnob] = Field(min_length=1)
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")


def curate(knobs: Curate, read: Look, kit: Kit) -> Iterator[Sample]:
    """Each sample with the verdict that ended it, or with the scores that filters had to tell; order is kept.

    `read()` gives the samples by prompt, afresh at each call: some filters look at all rows before they judge the first.
    """
    for group in _judged([one.open(kit) for one in knobs.filters], read):
        yield from group


def row_filters(knobs: Curate, kit: Kit) -> list[RowFilter]:
    """The filters that look at one answer alone: what "accepted" means when a student is measured. Scores come later."""
    alone = (one for one in knobs.filters if isinstance(one, RowFilter) and not isinstance(one, Threshold))
    return [one.open(kit) for one in alone]


def accepts(filters: list[RowFilter], sample: Sample) -> Verdict | None:
    """The first verdict that does not keep the sample; None when all filters accept it."""
    verdicts = (checked(one, sample) for one in filters)
    return next((verdict for verdict in verdicts if not verdict.keep), None)


def _judged(filters: Sequence[Any], read: Look) -> Iterator[list[Sample]]:
    judges = [_judge(one, partial(_survivors, filters[:i], read)) for i, one in enumerate(filters)]
    for group in read():
        samples, alive = list(group), list(range(len(group)))
        for judge in judges:
            for i, verdict in zip(alive, judge([samples[i] for i in alive]), strict=True):
                if not verdict.keep or verdict.score is not None:
                    samples[i] = samples[i].judged(verdict)
            if not (alive := [i for i in alive if samples[i].ending == "kept"]):
                break
        yield samples


def _survivors(filters: Sequence[Any], read: Look) -> Iterator[list[Sample]]:
    """What reaches the filter after these: they start afresh, since some remember the rows they saw."""
    for group in _judged(filters, read):
        if alive := [sample for sample in group if sample.ending == "kept"]:
            yield alive


def _judge(one: Any, look: Look) -> Judge:
    """Any filter as a function over the samples of one prompt. One that breaks sets rows aside: broken is not bad."""
    if isinstance(one, RowFilter):
        return lambda samples: [checked(one, sample) for sample in samples]
    if isinstance(one, GroupFilter):
        return lambda samples: _all_checked(one.kind, one.check_group, samples)
    assert isinstance(one, SetFilter), f"{one!r} has none of the three shapes"
    try:
        judge = one.start(look)
    except Exception as e:
        broken = _broken(one.kind, e)
        return lambda samples: [broken for _ in samples]
    return lambda samples: _all_checked(one.kind, judge, samples)


def checked(one: RowFilter, sample: Sample) -> Verdict:
    """Its verdict, or the error that set the sample aside."""
    return _all_checked(one.kind, lambda samples: [one.check(samples[0])], [sample])[0]


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
