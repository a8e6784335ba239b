"""Stage `evaluate`: base, students and teacher on the same held-out prompts, with intervals.

Base and students see the student's view of a prompt; the teacher is asked as in the first `generate` that names it.
Rates are 0..1 with Wilson 95 % intervals; differences and ratios are paired over prompts, with bootstrap intervals
(facts behind the choice: Miller 2024, arXiv 2411.00640: paired differences, clustering by question).
"""

from typing import Any, Literal

from pydantic import Field, field_validator

from factory import stats
from factory.ask import Desk, Model, Tally
from factory.curate import accepts
from factory.filters import RowFilter
from factory.filters.reference import MatchesReference
from factory.generate import Asker, Generate, requests, samples
from factory.knobs import Knobs
from factory.models import Models
from factory.progress import bar
from factory.rows import Prompt, Sample, Sampling
from factory.teachers.transformers import TransformersTeacher

VERSION = 1
MAX_SHOWN = 40
MEASURES = {
    "accepted": "share of answers that the recipe's own row filters accept",
    "correct": "share of answers that match the prompt's reference",
    "finished": "share of answers that ended by themselves",
    "teacher_loss": "mean loss per token on the teacher's accepted answers (nats; lower is closer to the teacher)",
    "words": "mean length of an answer in words",
}
RATES = ("accepted", "correct", "finished")


class Evaluate(Knobs):
    """`evaluate:`; the first of `students` that is a model of the recipe is the base that others are compared with."""

    kind: Literal["evaluate"] = "evaluate"
    students: list[str] = Field(min_length=1)
    teacher: str | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")
    temperature: float = Field(0.0, ge=0)
    max_tokens: int | None = Field(None, gt=0)
    reference: MatchesReference = MatchesReference()

    @field_validator("students")
    @classmethod
    def _each_once(cls, students: list[str]) -> list[str]:
        if len(set(students)) < len(students):
            raise ValueError("a student is named twice")
        return students


class Examiner:
    """Asks every model the same held-out prompts, through the same journal, one model at a time."""

    def __init__(self, knobs: Evaluate, prompts: list[Prompt], models: Models, desk: Desk, seed: int) -> None:
        self.knobs, self.prompts, self.models, self.desk, self.seed = knobs, prompts, models, desk, seed
        self.tallies: list[Tally] = []

    async def answers(self, model: Model, asker: Asker, like: Generate | None) -> list[Sample]:
        """One answer per prompt, under the limits of the `generate` stage `like`."""
        sampling = Sampling(
            temperature=self.knobs.temperature,
            max_tokens=self.knobs.max_tokens or (like.max_tokens if like else 1024),
            stop=like.stop if like else [],
        )
        asked = list(requests(self.prompts, model, asker, sampling, lambda _: (0,), self.seed))
        tally = await self.desk.ask(model, asked, len(asked), f"evaluate {model.name}")
        self.tallies.append(tally)
        outcomes = self.desk.read(model, asked, tally)
        return [
            sample
            for prompt, (request, outcome) in zip(self.prompts, outcomes, strict=True)
            for sample in samples(prompt, request, model.name, outcome)
        ]

    async def losses(self, model: Model, view: Asker, answers: list[Sample]) -> list[tuple[float, int] | None]:
        """Summed loss (nats) and tokens of each accepted answer of the teacher, under a local model."""
        teacher = model.teacher
        if not isinstance(teacher, TransformersTeacher):
            return []
        found: list[tuple[float, int] | None] = []
        with bar(f"loss {model.name}", len(answers)) as advance:
            for sample in answers:
                known = sample.ending == "kept"
                found.append(await teacher.loss(view(sample.prompt), sample.response) if known else None)
                advance(1)
        return found


async def evaluate(
    examiner: Examiner, filters: list[RowFilter], view: Asker, taught: Generate | None, teacher_asker: Asker | None
) -> tuple[dict[str, Any], list[Sample]]:
    """`evaluation.json` and every answer with its verdict; `view` is how students see a prompt."""
    knobs = examiner.knobs
    scored: list[Scored] = []
    if knobs.teacher is not None:
        async with examiner.models.open(knobs.teacher) as model:
            answers = await examiner.answers(model, teacher_asker or view, taught)
        scored.append(Scored(knobs.teacher, "teacher", answers, filters, knobs.reference))
    for name in knobs.students:
        role = "student" if name in examiner.models.trained else "base"
        async with examiner.models.open(name) as model:  # one start for both: loading may take longer than either
            answers = await examiner.answers(model, view, taught)
            scored.append(Scored(name, role, answers, filters, knobs.reference))
            if knobs.teacher is not None:
                scored[-1].add_losses(await examiner.losses(model, view, scored[0].judged))
    return summary(scored, examiner.seed), [sample for model in scored for sample in model.judged]


class Scored:
    """One model's answers to the held-out prompts, measured; lists run parallel to the prompts."""

    def __init__(
        self, name: str, role: str, samples: list[Sample], filters: list[RowFilter], check: MatchesReference
    ) -> None:
        self.name, self.role, self.samples = name, role, samples
        refused = [accepts(filters, s) if s.ending == "kept" else None for s in samples]
        self.judged = [s if verdict is None else s.judged(verdict) for s, verdict in zip(samples, refused, strict=True)]
        self.values: dict[str, list[float | None]] = {
            "accepted": [float(s.ending == "kept") for s in self.judged],
            "correct": [_correct(s, check) for s in samples],
            "finished": [float(s.finish == "stop") for s in samples],
            "words": [float(len(s.response.split())) for s in samples],
        }
        self.unread = [check.check(s).reason == "no_answer" for s in samples]

    def add_losses(self, losses: list[tuple[float, int] | None]) -> None:
        """Summed loss in nats and number of tokens for each prompt that has an accepted teacher answer."""
        if losses:
            self.values["teacher_loss"] = [loss[0] / loss[1] if loss and loss[1] else None for loss in losses]


def _correct(sample: Sample, check: MatchesReference) -> float | None:
    """1 or 0; None where there is no reference, or where it cannot be told."""
    if sample.prompt.reference is None:
        return None
    if sample.ending != "kept":
        return 0.0
    keep = check.check(sample).keep
    return None if keep is None else float(keep)


def summary(models: list[Scored], seed: int) -> dict[str, Any]:
    """`evaluation.json`: rows, comparisons, samples side by side."""
    base = next((m for m in models if m.role == "base"), None)
    teacher = next((m for m in models if m.role == "teacher"), None)
    rows = [row for model in models for row in _rows(model, seed)]
    comparisons = []
    for student in (m for m in models if m.role == "student"):
        for measure in student.values:
            if base is not None:
                comparisons += _compare("difference", measure, student, base, seed)
            if teacher is not None and measure in ("accepted", "correct"):
                comparisons += _compare("ratio", measure, student, teacher, seed)
    return {
        "rows": rows,
        "comparisons": comparisons,
        "samples": [_side_by_side(models, i) for i in range(min(MAX_SHOWN, len(models[0].samples)))],
        "measures": MEASURES,
        "notes": [note for model in models for note in _notes(model)],
    }


def _notes(model: Scored) -> list[str]:
    """Where `extract` finds nothing, an answer counts as wrong: then `correct` measures the form as well."""
    if not (unread := sum(model.unread)):
        return []
    return [f"correct: {unread} of {len(model.unread)} answers of {model.name} have no text where `extract` looks"]


def _rows(model: Scored, seed: int) -> list[dict[str, Any]]:
    rows = []
    for measure, values in model.values.items():
        known = [v for v in values if v is not None]
        if not known:
            continue
        mean = sum(known) / len(known)
        low, high = (
            stats.wilson(round(sum(known)), len(known)) if measure in RATES else stats.bootstrap_mean(known, seed)
        )
        rows.append(
            {
                "model": model.name,
                "role": model.role,
                "measure": measure,
                "value": mean,
                "low": low,
                "high": high,
                "n": len(known),
            }
        )
    return rows


def _compare(kind: str, measure: str, a: Scored, b: Scored, seed: int) -> list[dict[str, Any]]:
    if measure not in a.values or measure not in b.values:
        return []
    both = [
        (x, y, s.prompt.id)
        for x, y, s in zip(a.values[measure], b.values[measure], a.samples, strict=True)
        if x is not None and y is not None
    ]
    if not both:
        return []
    xs, ys, clusters = (list(column) for column in zip(*both, strict=True))
    paired = stats.paired_bootstrap_difference if kind == "difference" else stats.paired_bootstrap_ratio
    result = paired(xs, ys, seed, clusters)
    if result is None:
        return []
    value, low, high = result
    return [
        {
            "measure": measure,
            "kind": kind,
            "a": a.name,
            "b": b.name,
            "value": value,
            "low": low,
            "high": high,
            "n": len(both),
            "unread": sum(b.unread) if measure == "correct" else 0,
        }
    ]


def _side_by_side(models: list[Scored], i: int) -> dict[str, Any]:
    prompt = models[0].samples[i].prompt
    answers = {}
    for model in models:
        sample, correct = model.samples[i], model.values["correct"][i]
        answers[model.name] = {
            "text": sample.response,
            "finish": sample.finish,
            "accepted": bool(model.values["accepted"][i]),
            "correct": None if correct is None else bool(correct),
        }
    return {"prompt": prompt.text, "reference": prompt.reference, "answers": answers}
