"""Stage `filter`: filters in recipe order; every sample comes out once, kept, dropped with a reason, or set aside."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import Field

from factory.filters import FilterKnob, GroupFilter, Kit, RowFilter, SetFilter
from factory.knobs import Knobs
from factory.rows import Sample, Verdict

Judge = Callable[[list[Sample]], list[Verdict]]


class Curate(Knobs):
    """`filter:` with a list; a sample dropped by one filter is not shown to the next, so cheap ones stand first."""

    kind: Literal["filter"] = "filter"
    filters: list[FilterKnob] = Field(min_length=1)
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")


def curate(knobs: Curate, groups: Iterable[list[Sample]], kit: Kit) -> Iterator[Sample]:
    """Each sample with the verdict that ended it, or with the scores that filters had to tell; order is kept."""
    judges = [_judge(one.open(kit)) for one in knobs.filters]
    for group in groups:
        samples = list(group)
        alive = list(range(len(samples)))
        for judge in judges:
            for i, verdict in zip(alive, judge([samples[i] for i in alive]), strict=True):
                if not verdict.keep or verdict.score is not None:
                    samples[i] = samples[i].judged(verdict)
            alive = [i for i in alive if samples[i].ending == "kept"]
        yield from samples


def row_filters(knobs: Curate, kit: Kit) -> list[RowFilter]:
    """The filters that look at one answer alone: what "accepted" means when a student is measured."""
    return [one.open(kit) for one in knobs.filters if isinstance(one, RowFilter)]


def accepts(filters: list[RowFilter], sample: Sample) -> Verdict | None:
    """The first verdict that does not keep the sample; None when all filters accept it."""
    verdicts = (_careful(one.check, sample, one.kind) for one in filters)
    return next((verdict for verdict in verdicts if not verdict.keep), None)


def _judge(one: Any) -> Judge:
    """Any filter as a function over the samples of one prompt."""
    if isinstance(one, RowFilter):
        return lambda samples: [_careful(one.check, sample, one.kind) for sample in samples]
    judge = one.start() if isinstance(one, SetFilter) else one.check_group if isinstance(one, GroupFilter) else None
    assert judge is not None, f"{one!r} has none of the three shapes"
    return lambda samples: _careful_group(judge, samples, one.kind)


def _careful(check: Callable[[Sample], Verdict], sample: Sample, kind: str) -> Verdict:
    """A filter that breaks on a row sets that row aside, with the error: broken is not bad."""
    try:
        return check(sample)
    except Exception as e:
        return Verdict(filter=kind, keep=None, reason="filter_error", evidence=repr(e)[:200])


def _careful_group(judge: Judge, samples: list[Sample], kind: str) -> list[Verdict]:
    try:
        return judge(samples)
    except Exception as e:
        return [Verdict(filter=kind, keep=None, reason="filter_error", evidence=repr(e)[:200]) for _ in samples]
