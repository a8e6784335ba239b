"""Stage `generate`: plan the draws or beams of every prompt, ask what is not stored, collect samples.

Draws: sequence-level distillation from samples (n=1 greedy or nucleus; n>1 for best-of-N and rejection sampling).
Beam: Kim & Rush 2016 section 3.2, the mode of the teacher's sequence distribution; `keep` best hypotheses.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pydantic import Field, model_validator

from factory.ask import Model
from factory.asking import AskKnob, Plain
from factory.knobs import Knobs
from factory.rows import Beam, Choice, Failure, Message, Prompt, Reply, Request, Sample, Sampling, Verdict, digest
from factory.teachers.openai import OpenAI
from factory.teachers.reference import Reference

VERSION = 1


class BeamKnobs(Knobs):
    """Beam search: `width` hypotheses, the `keep` best become samples, numbered by rank."""

    width: int = Field(gt=1)
    length_penalty: float = 1.0
    keep: int = Field(1, gt=0)

    @model_validator(mode="after")
    def _keep_within_width(self) -> "BeamKnobs":
        if self.keep > self.width:
            raise ValueError(f"keep: {self.keep} is more than width: {self.width}")
        return self


class Generate(Knobs):
    """`generate:`; `ask` is what is said, the rest is how the answer is decoded, in vLLM's names."""

    kind: Literal["generate"] = "generate"
    model: str | list[str]
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")
    ask: AskKnob = Plain()
    n: int = Field(1, gt=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = []
    logprobs: bool = False
    max_tokens: int = Field(1024, gt=0)
    beam: BeamKnobs | None = None

    @model_validator(mode="after")
    def _one_way_to_decode(self) -> "Generate":
        drawn = {"n", "temperature", "top_p", "top_k", "min_p"} & self.model_fields_set
        if self.beam and drawn:
            raise ValueError(f"beam search draws nothing at random: remove {', '.join(sorted(drawn))}, or beam")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"temperature: 0 is greedy, so all n: {self.n} draws would be the same")
        return self

    @property
    def models(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) else self.model

    @property
    def draws(self) -> int:
        """Samples planned per prompt and model."""
        return self.beam.keep if self.beam else self.n

    def sampling(self) -> Sampling:
        names = set(Sampling.__struct_fields__) - {"beam"}
        beam = Beam(width=self.beam.width, length_penalty=self.beam.length_penalty) if self.beam else None
        return Sampling(**{name: getattr(self, name) for name in names}, beam=beam)


class Given(Knobs):
    """Not written in recipes: the answers that came with the prompt rows, where no `generate` stands before their use."""

    kind: Literal["given"] = "given"
    as_: str | None = None


Asker = Callable[[Prompt], list[Message]]
"""What is said to a model for a prompt: an opened `ask` with the run's seed."""


def requests(
    prompts: Iterable[Prompt], model: Model, asker: Asker, sampling: Sampling, draws: int, seed: int
) -> Iterator[Request]:
    """The requests of one model, in prompt order.

    A seed is a function of run seed, prompt and draw, so order, subset and batch change nothing. Endpoints whose
    seeds cannot be trusted get one request with `n` (the prompt is billed once), and no seed is claimed.
    """
    for prompt in prompts:
        common = {"identity": model.identity, "messages": asker(prompt), "sampling": sampling, "prompt": prompt.id}
        if sampling.beam is not None or isinstance(model.entry, OpenAI) or sampling.temperature == 0:
            yield Request(n=draws, **common)  # type: ignore[arg-type]
        else:
            for draw in range(draws):
                yield Request(draw=draw, seed=draw_seed(seed, prompt, draw), **common)  # type: ignore[arg-type]


def draw_seed(seed: int, prompt: Prompt, draw: int) -> int:
    """A 31-bit seed from run seed, prompt id and draw."""
    return int(digest(seed, prompt.id, draw, size=4), 16) >> 1


def samples(
    prompt: Prompt, asked: list[Message], model: str, outcomes: Iterable[Choice | Failure], first_draw: int = 0
) -> Iterator[Sample]:
    """One sample per draw; a draw without an answer is a sample that failed, with its reason."""
    for draw, outcome in enumerate(outcomes, first_draw):
        key = Sample.key(prompt, asked, model, draw)
        if isinstance(outcome, Failure):
            verdict = Verdict(
                filter="generate", keep=None, reason=outcome.reason, evidence=outcome.detail[:500] or None
            )
            yield Sample(
                id=key,
                prompt=prompt,
                asked=asked,
                response="",
                model=model,
                draw=draw,
                finish="failed",
                verdicts=[verdict],
            )
        else:
            yield Sample(
                id=key, prompt=prompt, asked=asked, response=outcome.text, model=model, draw=draw, finish=outcome.finish,
                reasoning=outcome.reasoning, logprob=outcome.logprob, tokens=outcome.tokens,
            )  # fmt: skip


def from_reference(prompt: Prompt, entry: Reference, model: str) -> Sample:
    """The prompt's own ground truth as a sample."""
    outcome = entry.answer(prompt)
    picked: Choice | Failure = outcome.choices[0] if isinstance(outcome, Reply) else outcome
    return next(samples(prompt, prompt.messages, model, [picked]))


def given(prompts: Iterable[Prompt]) -> Iterator[Sample]:
    """Answers that came with their rows, as samples: data from elsewhere needs no teacher."""
    drawn: dict[str, int] = {}
    for prompt in prompts:
        if prompt.completion is not None:
            draw = drawn.get(prompt.id, 0)
            drawn[prompt.id] = draw + 1
            yield from samples(prompt, prompt.messages, "given", [Choice(text=prompt.completion, finish="stop")], draw)
