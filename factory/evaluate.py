"""Stage `evaluate`: base, students and teacher on the same held-out prompts, with intervals.

Base and students see the student's view of a prompt; the teacher is asked as in the first `generate` that names it.
Rates are 0..1 with Wilson 95 % intervals; differences and ratios are paired over prompts, with bootstrap intervals
(facts behind the choice: Miller 2024, arXiv 2411.00640: paired differences, clustering by question).
"""

import time
from collections.abc import Collection
from functools import partial
from itertools import chain, islice
from typing import Any, Literal, Self

from msgspec.structs import replace
from pydantic import Field, field_validator, model_validator

from factory.ask import Desk, Model
from factory.filters import RowFilter
from factory.filters.reference import MatchesReference
from factory.footprint import FACTS, speed_and_price, weights_size
from factory.gates import mistake
from factory.generate import Asker, Generate, requests, samples
from factory.harness import Harness, LmEval, run_tasks
from factory.knobs import Knobs
from factory.measures import Scored
from factory.models import Models
from factory.progress import bar
from factory.rows import Prompt, Sample, Sampling
from factory.summary import summary
from factory.tally import Tally
from factory.teachers.entry import Endpoint
from factory.teachers.transformers import Forced, Transformers, TransformersTeacher
from factory.weights import materialise_in_child
from factory.win_rate import Compared, WinRate, compare


class Evaluate(Knobs):
    """`evaluate:`; the first of `students` that is a model of the recipe is the base that others are compared with.

    Each model answers once at `temperature`. With `n`, it answers greedily, and n times at `temperature` beside that:
    pass@1 and pass@`k` (default n). `gold` is a student that was trained on ground truth. `judge` compares answers of two
    models, `lm_eval` runs tasks of that harness on local ones. `require` holds measures of the
    last student against limits: `{retention: ">= 0.8"}`.
    """

    kind: Literal["evaluate"] = "evaluate"
    students: list[str] = Field(min_length=1)
    teacher: str | None = None
    gold: str | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")
    n: int | None = Field(None, gt=0)
    k: int | None = Field(None, gt=0)
    temperature: float = Field(0.0, ge=0)
    max_tokens: int | None = Field(None, gt=0)
    reference: MatchesReference = MatchesReference()
    judge: WinRate | None = None
    lm_eval: LmEval | None = None
    require: dict[str, str] = {}

    @field_validator("students")
    @classmethod
    def _each_once(cls, students: list[str]) -> list[str]:
        if len(set(students)) < len(students):
            raise ValueError("a student is named twice")
        return students

    @field_validator("require")
    @classmethod
    def _can_be_held(cls, require: dict[str, str]) -> dict[str, str]:
        if wrong := [told for measure, wanted in require.items() if (told := mistake(measure, wanted))]:
            raise ValueError("; ".join(wrong))
        return require

    @model_validator(mode="after")
    def _sampled_as_written(self) -> Self:
        if self.n is not None and self.temperature == 0:
            raise ValueError(
                "n: sampled answers need a temperature above 0; the greedy answer is asked for beside them"
            )
        if self.k is not None and self.k > (self.n or 0):
            raise ValueError(f"k: pass@{self.k} needs as many sampled answers; set n to {self.k} or more")
        if self.gold is not None and self.gold in self.students:
            raise ValueError(f"gold: {self.gold} is one of the students; name it once")
        if self.judge is not None and "teacher" in self.judge.against and self.teacher is None:
            raise ValueError("judge: against the teacher, but there is none; name one with `teacher:`")
        return self


class Examiner:
    """Asks every model the same held-out prompts, through the same journal, one model at a time."""

    def __init__(
        self, knobs: Evaluate, prompts: list[Prompt], models: Models, desk: Desk, seed: int, filters: list[RowFilter],
        outside: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.knobs, self.prompts, self.models, self.desk, self.seed = knobs, prompts, models, desk, seed
        self.outside = outside
        self.filters, self.reference = filters, knobs.reference.open(models)
        self.measured: list[Scored] = []
        self.tallies: list[Tally] = []
        self.footprints: list[dict[str, Any]] = []
        self.compared: Compared | None = None

    async def scored(
        self, name: str, role: str, asker: Asker, like: Generate | None, view: Asker, teacher: Scored | None = None
    ) -> Scored:
        """One model measured; it is started once for all that it is asked: loading may take longer than any of it."""
        knobs, started = self.knobs, time.monotonic()
        async with self.models.open(name) as model:
            answers, tally = await self._answers(model, asker, like)
            clock_s = time.monotonic() - started
            memory = await model.teacher.memory() if isinstance(model.teacher, TransformersTeacher) else None
            first, draws = [drawn[0] for drawn in answers], [drawn[1:] for drawn in answers] if knobs.n else None
            scored = Scored(name, role, first, self.filters, self.reference, draws, knobs.k or knobs.n or 1)
            if teacher is not None:
                scored.add_forced(teacher, await self._forced(model, view, teacher.judged))
        self.measured.append(scored)
        self.tallies.append(tally)
        self.footprints.append({"model": name, "role": role, **self._footprint(name, tally, clock_s, memory)})
        return scored

    async def _answers(self, model: Model, asker: Asker, like: Generate | None) -> tuple[list[list[Sample]], Tally]:
        """The answers to each prompt, under the limits of the `generate` stage `like`: draw 0, and with `n` draws 1 to n
        at `temperature`. All are asked for together: one batch, one wait."""
        knobs = self.knobs
        sampling = Sampling(
            temperature=0.0 if knobs.n else knobs.temperature,
            max_tokens=knobs.max_tokens or (like.max_tokens if like else 1024),
            stop=like.stop if like else [],
        )
        plans = [(sampling, range(1))]
        if knobs.n:
            plans.append((replace(sampling, temperature=knobs.temperature), range(1, knobs.n + 1)))
        asked = [
            [r for how, draws in plans for r in requests([p], model, asker, how, partial(_these, draws), self.seed)]
            for p in self.prompts
        ]
        flat, total = list(chain.from_iterable(asked)), len(asked) * (1 + (knobs.n or 0))
        tally = await self.desk.ask(model, flat, total, f"evaluate {model.name}")
        outcomes = self.desk.read(model, flat, tally)
        return [
            [s for request, told in islice(outcomes, len(of_it)) for s in samples(prompt, request, model.name, told)]
            for prompt, of_it in zip(self.prompts, asked, strict=True)
        ], tally

    async def _forced(self, model: Model, view: Asker, answers: list[Sample]) -> list[Forced | None]:
        """What a local model makes of each accepted answer of the teacher; nothing of models that cannot be led along."""
        teacher = model.teacher
        if not isinstance(teacher, TransformersTeacher):
            return []
        found: list[Forced | None] = []
        with bar(f"loss {model.name}", len(answers)) as advance:
            for sample in answers:
                known = sample.ending == "kept"
                found.append(await teacher.forced(view(sample.prompt), sample.response) if known else None)
                advance(1)
        return found

    def _footprint(self, name: str, tally: Tally, clock_s: float, memory: int | None) -> dict[str, Any]:
        entry = self.models.entry(name)
        found = speed_and_price(tally, clock_s if isinstance(entry, Endpoint) and not entry.batch else 0.0, entry.price)
        if memory is not None:
            found["peak_memory"] = memory
        if isinstance(entry, Transformers):  # those of a server may be on another machine
            found |= weights_size(materialise_in_child(entry, self.models.runs / "weights"))
        return found


def _these(draws: range, _: Prompt) -> range:
    return draws


async def evaluate(
    examiner: Examiner, view: Asker, taught: Generate | None, teacher_asker: Asker | None
) -> tuple[dict[str, Any], list[Sample]]:
    """`evaluation.json` and every answer with its verdict; `view` is how students see a prompt."""
    knobs = examiner.knobs
    # before anything is asked: there may be no such tasks
    harness = Harness(knobs.lm_eval) if knobs.lm_eval else None
    scored, teacher = examiner.measured, None
    if knobs.teacher is not None:
        teacher = await examiner.scored(knobs.teacher, "teacher", teacher_asker or view, taught, view)
    for name in [*knobs.students, *([knobs.gold] if knobs.gold else [])]:
        role = "gold" if name == knobs.gold else "student" if name in examiner.models.trained else "base"
        await examiner.scored(name, role, view, taught, view, teacher)
    if knobs.judge is not None:
        examiner.compared = await compare(knobs.judge, scored, examiner.models, examiner.desk, examiner.seed)
    answers = [sample for model in scored for sample in model.answers()]
    judged = examiner.compared.told if examiner.compared else []
    found = {
        **summary(scored, examiner.seed, examiner.outside),
        "judged": judged,
        "models": examiner.footprints,
        "footprint": FACTS,
    }
    if examiner.compared:
        found["notes"] += examiner.compared.notes()
    if harness is not None:
        local = {model.name: model.role for model in scored if model.role != "teacher"}
        found["lm_eval"] = run_tasks(harness, local, examiner.models, examiner.seed)
        if not found["lm_eval"]["rows"]:
            found["notes"].append("lm_eval: no task was run, since none of the models is local")
    return found, answers
