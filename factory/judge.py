"""Stage `judge`: a model scores samples with a rubric file. A verdict that cannot be read is missing, never a number."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pydantic import Field

from factory.ask import Desk, Model, Tally
from factory.generate import draw_seed
from factory.knobs import Knobs
from factory.rows import Choice, Failure, Request, Sample, Sampling, Verdict
from factory.rubric import Rubric, read_score, render

VERSION = 1


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

    def requests() -> Iterator[Request]:
        for sample in open_samples():
            drawn = None if sampling.temperature == 0 else draw_seed(seed, sample.prompt, sample.draw)
            yield Request(
                identity=model.identity,
                messages=render(rubric, sample),
                sampling=sampling,
                seed=drawn,
                prompt=sample.prompt.id,
            )

    async with model:
        tally = await desk.ask(model, requests(), total, f"judge {model.name}")
    outcomes = desk.read(model, requests(), tally)
    name = knobs.as_ or rubric.name
    scored = (
        _scored(sample, name, rubric, outcome[0]) for sample, (_, outcome) in zip(open_samples(), outcomes, strict=True)
    )
    return tally, scored


def _scored(sample: Sample, name: str, rubric: Rubric, outcome: Choice | Failure) -> Sample:
    if isinstance(outcome, Failure):
        return sample.judged(
            Verdict(filter="judge", keep=None, reason=f"judge_{outcome.reason}", evidence=outcome.detail[:500])
        )
    if outcome.finish != "stop":
        return sample.judged(Verdict(filter="judge", keep=None, reason="judge_truncated", evidence=outcome.text[-500:]))
    score = read_score(rubric, outcome.text)
    if score is None:
        return sample.judged(Verdict(filter="judge", keep=None, reason="judge_unreadable", evidence=outcome.text[:500]))
    return sample.scored(**{name: score})
