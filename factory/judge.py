"""Stage `judge`: a model scores samples with a rubric file. A verdict that cannot be read is missing, never a number."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Literal

from pydantic import Field

from factory.ask import Desk, Model, Tally
from factory.generate import draw_seed
from factory.knobs import Knobs
from factory.rows import Choice, Failure, Request, Sample, Sampling, Verdict
from factory.rubric import Rubric, read_score, render

VERSION = 1
UNREADABLE, TRUNCATED = "judge_unreadable", "judge_truncated"
"""Reasons of a verdict that came and has no score: a truncated one may go on after what looks like its score."""
QUOTED = 160
"""Characters of a verdict that an error quotes."""


class Judge(Knobs):
    """`judge:`; the score is filed under `as`, or else under the rubric's own name."""

    kind: Literal["judge"] = "judge"
    model: str
    rubric: str
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(512, gt=0)

    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)


async def judge(
    knobs: Judge,
    rubric: Rubric,
    open_samples: Callable[[], Iterable[Sample]],
    total: int,
    model: Model,
    desk: Desk,
    seed: int,
) -> tuple[Tally, Iterator[Sample]]:
    """Ask for all scores, then give the samples back in order, scored or set aside with the reason."""
    sampling = knobs.sampling()
    unseeded = sampling.temperature == 0 or not model.capabilities.seed

    def requests() -> Iterator[Request]:
        for sample in open_samples():
            drawn = None if unseeded else draw_seed(seed, sample.prompt, sample.draw)
            yield Request(
                identity=model.identity,
                messages=render(rubric, sample),
                sampling=sampling,
                seed=drawn,
                prompt=sample.prompt.id,
            )

    async with model:
        flaw = partial(_flaw, knobs, rubric)
        tally = await desk.ask(model, _distinct(requests()), total, f"judge {model.name}", flaw)
    outcomes = desk.read(model, requests(), tally)
    name = knobs.as_ or rubric.head.name
    scored = (
        _scored(sample, name, rubric, outcome[0]) for sample, (_, outcome) in zip(open_samples(), outcomes, strict=True)
    )
    return tally, scored


def _distinct(requests: Iterable[Request]) -> Iterator[Request]:
    """Equal answers to a prompt are asked about once."""
    for _, of_prompt in groupby(requests, key=lambda request: request.prompt):
        yield from {(request.messages[-1]["content"], request.seed): request for request in of_prompt}.values()


def _score(rubric: Rubric, verdict: Choice) -> float | None:
    """The score that a verdict gives; one that was cut off gives none."""
    return read_score(rubric, verdict.text) if verdict.finish == "stop" else None


def _flaw(knobs: Judge, rubric: Rubric, verdict: Choice) -> str | None:
    """Why a verdict has no score and what to do, for people; asking again is no help, the same would come from the journal."""
    if _score(rubric, verdict) is not None:
        return None
    said = " ".join(verdict.text.split())
    if len(said) > QUOTED:  # how it ends tells more often what is wrong
        said = f"{said[: QUOTED // 2]} ... {said[-QUOTED // 2 :]}"
    low, high = rubric.head.scale
    wants = f"{knobs.rubric} wants a line `Score: N` with N from {low:g} to {high:g}"
    if verdict.finish != "stop":
        return f"{said!r}, which was cut off; {wants}: raise max_tokens ({knobs.max_tokens}), or change the rubric or the judge"
    return f"{said!r}; {wants}: change the rubric or the judge"


def _scored(sample: Sample, name: str, rubric: Rubric, outcome: Choice | Failure) -> Sample:
    if isinstance(outcome, Failure):
        reason, evidence = f"judge_{outcome.reason}", outcome.detail
    elif (score := _score(rubric, outcome)) is not None:
        return sample.scored(**{name: score})
    elif outcome.finish != "stop":
        reason, evidence = TRUNCATED, outcome.text[-500:]
    else:
        reason, evidence = UNREADABLE, outcome.text
    return sample.judged(Verdict(filter="judge", keep=None, reason=reason, evidence=evidence[:500]))
