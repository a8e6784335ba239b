"""Stage `generate`: plan the draws or beams of every prompt, ask what is not stored, collect samples.

Draws: sequence-level distillation from samples (n=1 greedy or nucleus; n>1 for best-of-N and rejection sampling).
Beam: Kim & Rush 2016 section 3.2, the mode of the teacher's sequence distribution; `keep` best hypotheses.
Until: rejection sampling with an early end. All prompts that still lack accepted answers are asked together, in rounds of
fixed size, and the lowest accepted draws are taken: whenever a run is killed, and whatever n was before, the same ones.
"""

import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from msgspec.structs import replace
from pydantic import ConfigDict, Field, model_validator

from factory.ask import Desk, Model
from factory.asking import AskKnob, Plain
from factory.errors import Waiting
from factory.knobs import Knobs
from factory.models import Models
from factory.prompt_spool import Part
from factory.rows import (
    GIVEN,
    LABEL,
    Beam,
    Choice,
    Failure,
    Message,
    Prompt,
    Reply,
    Request,
    Sample,
    Sampling,
    Verdict,
    digest,
)  # fmt: skip
from factory.stored import runs
from factory.tally import Tally
from factory.teachers.capabilities import ResponseFormat
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


class Until(Knobs):
    """Draw until `accepted` answers pass the row filters that follow the stage, but `at_most` times a prompt."""

    accepted: int = Field(1, gt=0)
    at_most: int = Field(gt=0)

    @model_validator(mode="after")
    def _within(self) -> "Until":
        if self.accepted > self.at_most:
            raise ValueError(f"accepted: {self.accepted} is more than at_most: {self.at_most}")
        return self


class Generate(Knobs):
    """`generate:`; `ask` is what is said, the rest is how the answer is decoded, in vLLM's names.

    A list of models: each answers every prompt. A map with weights: each prompt goes to one of them, chosen by hash.
    `fallback` answers where a model failed or refused. `want`: prompts are asked in order until that many rows pass the
    row filters that follow.
    """

    model_config = ConfigDict(allow_inf_nan=False)  # JSON has no words for them: a server would take its own values

    kind: Literal["generate"] = "generate"
    model: str | list[str] | dict[str, float] = Field(min_length=1)
    fallback: str | None = None
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
    max_tokens: int = Field(1024, gt=0, le=2**31 - 1)
    beam: BeamKnobs | None = None
    response_format: ResponseFormat = None
    until: Until | None = None
    want: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_way_to_decode(self) -> "Generate":
        drawn = {"n", "temperature", "top_p", "top_k", "min_p", "until"} & self.model_fields_set
        if self.beam and drawn:
            raise ValueError(f"beam search draws nothing at random: remove {', '.join(sorted(drawn))}, or beam")
        if self.until and "n" in self.model_fields_set:
            raise ValueError("until decides how often to draw: remove n, or until")
        if (self.n > 1 or self.until) and self.temperature == 0:
            raise ValueError("temperature: 0 is greedy, so all draws would be the same")
        if len(set(self.models)) < len(self.models):
            raise ValueError("a model is named twice; to ask it more often, raise n")
        if self.models == [self.fallback]:
            raise ValueError(
                f"fallback: {self.fallback} is the model itself, which has failed by then; name another one"
            )
        if isinstance(self.model, dict) and (min(self.model.values()) < 0 or sum(self.model.values()) <= 0):
            raise ValueError("weights of models must be 0 or more, and not all 0")
        return self

    @property
    def models(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) else list(self.model)

    @property
    def draws(self) -> int:
        """Samples planned per prompt and model; with `until`, the most that can be."""
        return self.beam.keep if self.beam else self.until.at_most if self.until else self.n

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


Draws = Callable[[Prompt], Sequence[int]]
"""Which draws of a prompt, ascending."""


Read = Callable[[], Iterator[list[Sample]]]
"""Reads the samples of each prompt in turn, from the journal, as often as it is called."""


def requests(
    prompts: Iterable[Prompt], model: Model, asker: Asker, sampling: Sampling, draws: Draws, seed: int
) -> Iterator[Request]:
    """The requests of one model, in prompt order.

    A seed is a function of run seed, prompt and draw, so order, subset and batch change nothing. Endpoints whose
    seeds cannot be trusted get one request with `n` (the prompt is billed once), and no seed is claimed; those that
    refuse `n` get a request for each draw.
    """
    seeded = model.capabilities.seed and sampling.temperature > 0
    together = sampling.beam is not None or (not seeded and model.capabilities.n is not False)
    for prompt in prompts:
        if not (wanted := draws(prompt)):
            continue
        base = Request(identity=model.identity, messages=asker(prompt), sampling=sampling, prompt=prompt.id)
        if together:
            for first, last in runs(wanted):
                yield replace(base, draw=first, n=last - first + 1)
        else:
            for draw in wanted:
                yield replace(base, draw=draw, seed=draw_seed(seed, prompt, draw) if seeded else None)


def draw_seed(seed: int, prompt: Prompt, draw: int) -> int:
    """A 31-bit seed from run seed, prompt id and draw."""
    return int(digest(seed, prompt.id, draw, size=4), 16) >> 1


def samples(prompt: Prompt, request: Request, model: str, outcomes: Iterable[Choice | Failure]) -> Iterator[Sample]:
    """One sample per draw; a draw without an answer is a sample that failed, with its reason."""
    for draw, outcome in enumerate(outcomes, request.draw):
        key = Sample.key(prompt, request.messages, model, draw)
        common = {"id": key, "prompt": prompt, "asked": request.messages, "model": model, "draw": draw}
        if isinstance(outcome, Failure):
            evidence = outcome.detail[:500] or None
            verdict = Verdict(filter="generate", keep=None, reason=outcome.reason, evidence=evidence)
            yield Sample(response="", finish="failed", verdicts=[verdict], **common)  # type: ignore[arg-type]
        else:
            yield Sample(
                response=outcome.text, finish=outcome.finish, reasoning=outcome.reasoning, logprob=outcome.logprob,
                tokens=outcome.tokens, served=outcome.served, **common,  # type: ignore[arg-type]
            )  # fmt: skip


def from_reference(prompt: Prompt, entry: Reference, model: str) -> list[Sample]:
    """The prompt's own ground truth as a sample."""
    outcome = entry.answer(prompt)
    picked: Choice | Failure = outcome.choices[0] if isinstance(outcome, Reply) else outcome
    return list(samples(prompt, _plain(prompt), model, [picked]))


def _plain(prompt: Prompt, draw: int = 0) -> Request:
    """A prompt as it stands, for answers that nobody was asked for."""
    return Request(identity="", messages=prompt.messages, sampling=Sampling(), draw=draw)


def given(prompts: Iterable[Prompt]) -> Iterator[Sample]:
    """Answers that came with their rows, as samples with their scores: data from elsewhere needs no teacher.

    A row that came without one among them is a sample that is set aside.
    """
    drawn: dict[str, int] = {}
    for prompt in prompts:
        came = [(prompt.completion, prompt.scores), (prompt.rejected, {LABEL: 0.0})]
        for text, scores in [one for one in came if one[0] is not None] or [("", {})]:
            draw = drawn.get(prompt.id, 0)
            drawn[prompt.id] = draw + 1
            (sample,) = samples(prompt, _plain(prompt, draw), GIVEN, [Choice(text=text or "", finish="stop")])
            sample = sample if text else sample.judged(Verdict(filter=GIVEN, keep=None, reason="no_answer"))
            yield sample.scored(**scores) if scores else sample


# -- the stage -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Teaching:
    """A stage at work. `accept` says what the following row filters have against a sample, `refused` whether it refuses.

    `planned` counts the draws that were asked for so far, `tallies` what that took.
    """

    knobs: Generate
    models: Models
    desk: Desk
    asker: Asker
    seed: int
    accept: Callable[[Sample], Verdict | None]
    refused: Callable[[Sample], bool]
    planned: int = 0
    accepted: int = 0
    tallies: list[Tally] = field(default_factory=list)

    async def samples(self, prompts: Part) -> AsyncIterator[Sample]:
        """All samples in prompt order. Each model answers its prompts before the next one starts: one fits in memory."""
        done = accepted = 0
        while done < len(prompts) and (self.knobs.want is None or accepted < self.knobs.want):
            chunk = prompts[done : done + self._chunk(done, accepted, len(prompts))]
            done += len(chunk)
            shares = {name: self._share(chunk, name) for name in self.knobs.models}
            answers = await self._all_answers({name: share for name, share in shares.items() if share})
            for prompt in chunk:
                for sample in (sample for name in self._answering(prompt) for sample in next(answers[name])):
                    kept = self._within(sample, accepted)
                    accepted += self.knobs.want is not None and kept.ending == "kept" and self.accept(kept) is None
                    yield kept

    def _chunk(self, done: int, accepted: int, total: int) -> int:
        """How many prompts to ask next: what can be expected to give at most what is still wanted."""
        if self.knobs.want is None:
            return total
        missing = self.knobs.want - accepted
        return missing if done == 0 else max(missing, math.ceil(missing * done / max(accepted, 1) / 2))

    def _within(self, sample: Sample, accepted: int) -> Sample:
        if sample.ending != "kept" or self.knobs.want is None or accepted < self.knobs.want:
            return sample
        return sample.judged(Verdict(filter="generate", keep=False, reason="over_want"))

    def _answering(self, prompt: Prompt) -> list[str]:
        """The models that answer a prompt: all of them, or the one that it falls to by weight."""
        if not isinstance(self.knobs.model, dict):
            return self.knobs.models
        point = int(digest("model", self.seed, prompt.id, size=8), 16) / 2**64 * sum(self.knobs.model.values())
        for name, weight in self.knobs.model.items():
            point -= weight
            if point < 0:
                return [name]
        return [name]  # only rounding leads here

    def _share(self, prompts: Part, name: str) -> Part:
        """The prompts that a model answers."""
        if not isinstance(self.knobs.model, dict):
            return prompts
        return prompts.where(lambda prompt: name in self._answering(prompt))

    async def _all_answers(self, shares: dict[str, Part]) -> dict[str, Iterator[list[Sample]]]:
        """Ask each model its share. One that waits for a batch keeps the others from nothing: theirs is submitted too."""
        answers, waiting = {}, []
        for name, share in shares.items():
            try:
                answers[name] = await self._answers(name, share)
            except Waiting as e:
                waiting.append(str(e))
        if waiting:
            raise Waiting("\n".join(waiting))
        return answers

    async def _answers(self, name: str, prompts: Part) -> Iterator[list[Sample]]:
        """Ask one model; the samples of each prompt in turn."""
        entry = self.models.entry(name)
        if isinstance(entry, Reference):
            self.planned += len(prompts)
            return (from_reference(prompt, entry, name) for prompt in prompts)
        async with self.models.open(name) as model:
            if self.knobs.until is not None:
                return await self._until(self.knobs.until, model, prompts)
            return (await self._draw(model, prompts, lambda _: range(self.knobs.draws)))()

    async def _until(self, until: Until, model: Model, prompts: Part) -> Iterator[list[Sample]]:
        """Rounds of `accepted` draws, for the prompts that still lack accepted answers."""
        rounds: list[tuple[set[str], Iterator[list[Sample]]]] = []
        good: Counter[str] = Counter()
        pending = prompts
        for first in range(0, until.at_most, until.accepted):
            drawn = range(first, min(first + until.accepted, until.at_most))
            read = await self._draw(model, pending, lambda _, drawn=drawn: drawn)  # type: ignore[misc]
            rounds.append(({prompt.id for prompt in pending}, read()))
            for prompt, found in zip(pending, read(), strict=True):
                good[prompt.id] += sum(s.ending == "kept" and self.accept(s) is None for s in found)
            pending = pending.where(lambda prompt: good[prompt.id] < until.accepted)
            if not pending:
                break
        tried = ([s for ids, found in rounds if prompt.id in ids for s in next(found)] for prompt in prompts)
        return (self._lowest(found, until.accepted) for found in tried)

    def _lowest(self, tried: list[Sample], wanted: int) -> list[Sample]:
        """The lowest accepted draws stay; the others are dropped with what the filter says of them."""
        kept, out = 0, []
        for sample in tried:
            verdict = self.accept(sample) if sample.ending == "kept" else None
            if verdict is None and sample.ending == "kept":
                kept += 1
                verdict = Verdict(filter="generate", keep=False, reason="surplus") if kept > wanted else None
            out.append(sample.judged(verdict) if verdict else sample)
        return out

    async def _draw(self, model: Model, prompts: Part, draws: Draws) -> Read:
        """Ask for some draws of each prompt, and the fallback for those that failed or were refused."""
        read = await self._ask(model, prompts, draws, stand_in=self.knobs.fallback is not None)
        self.planned += self.tallies[-1].planned
        if self.knobs.fallback is None:
            return read
        lacking: dict[str, list[int]] = {}
        for prompt, found in zip(prompts, read(), strict=True):
            if draws_left := [s.draw for s in found if s.ending != "kept" or self.refused(s)]:
                lacking[prompt.id] = draws_left
        await model.teacher.close()  # two local models at once may not fit; it opens again at its next request
        async with self.models.open(self.knobs.fallback) as other:
            read_other = await self._ask(other, prompts, lambda prompt: lacking.get(prompt.id, ()))
        return lambda: (_mended(found, others) for found, others in zip(read(), read_other(), strict=True))

    async def _ask(self, model: Model, prompts: Part, draws: Draws, stand_in: bool = False) -> Read:
        """Ask what is not stored."""
        sampling = self.knobs.sampling()
        asked = partial(requests, prompts, model, self.asker, sampling, draws, self.seed)
        total = sum(len(draws(prompt)) for prompt in prompts)
        tally = await self.desk.ask(model, asked(), total, f"generate {model.name}", stand_in=stand_in)
        self.tallies.append(tally)
        return lambda: _by_prompt(prompts, self.desk.read(model, asked(), tally), model.name)


def _mended(found: list[Sample], others: list[Sample]) -> list[Sample]:
    """A prompt's samples with those of the fallback in the place of what they stand in for."""
    better = {other.draw: other for other in others if other.ending == "kept"}
    return [replace(better[s.draw], parents=[s.id]) if s.draw in better else s for s in found]


def _by_prompt(prompts: Part, read: Iterator[Any], model: str) -> Iterator[list[Sample]]:
    """Outcomes as they come (one or several requests a prompt) as one list of samples per prompt."""
    waiting = next(read, None)
    for prompt in prompts:
        collected: list[Sample] = []
        while waiting is not None and waiting[0].prompt == prompt.id:
            request, outcomes = waiting
            collected += samples(prompt, request, model, outcomes)
            waiting = next(read, None)
        yield collected
