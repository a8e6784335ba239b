"""Stage `shape`: from sample to training rows. What was said to the teacher is erased; the lineage keeps it.

Prompt erasing (Orca 2, arXiv 2311.11045, section 4): the student sees the plain prompt, or one generic message, and has
to find the teacher's way of answering by itself.

Tasks: rationale and label as two rows with a prefix each (Distilling step-by-step, arXiv 2305.02301, section 3), and the
ground truth beside the teacher's answer (Kim & Rush 2016, section 3.2: a mixture of both losses by weight).
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from factory.filters.personal_data import masked
from factory.knobs import Knobs
from factory.rows import GIVEN, LABEL, Message, Prompt, Sample, TrainRow, Verdict, digest

Task = Literal["answer", "label", "rationale", "truth"]

PREFIXES: dict[str, str] = {"label": "[label] ", "rationale": "[rationale] "}
"""Before the last user turn: what tells the student which task it is."""


class Shape(Knobs):
    """`shape:`; `system` is the one message that the student sees instead.

    `reasoning: keep` puts the trace first, `mask` does so outside the loss. `answer_after` says where the answer begins
    in texts that reason first: behind the last such mark; what stands before it is the trace, as what a teacher gives
    apart is. `tasks` makes several rows of a sample: the `answer`, or the `label` and the `rationale` by themselves; and
    once per prompt the `truth`, its reference. In training each counts by the mean loss of its own rows, times its weight;
    with 0 it is not trained. `mask: personal_data` writes [EMAIL], [PHONE] ... for what `filters/personal_data.py` finds, in
    prompt and completion.
    """

    kind: Literal["shape"] = "shape"
    system: str | None = None
    reasoning: Literal["drop", "keep", "mask"] = "drop"
    answer_after: str | None = Field(None, min_length=1)
    tasks: list[Task] | dict[Task, Annotated[float, Field(ge=0)]] = ["answer"]
    mask: Literal["personal_data"] | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")

    @model_validator(mode="after")
    def _tasks_that_fit(self) -> Self:
        names = set(self.tasks)
        if len(names) < len(self.tasks):
            raise ValueError("tasks: each can be named once; give weights as a map, {label: 1, rationale: 0.5}")
        if not names - {"truth"}:
            raise ValueError("tasks: nothing of the teacher's; for the truth alone, ask a model of `type: reference`")
        if not any(self.weights.values()):
            raise ValueError("tasks: every weight is 0, so nothing would be learned")
        if "answer" in names and names & PREFIXES.keys():
            raise ValueError("tasks: answer has the label in it; name either answer, or label and rationale")
        if "answer" not in names and self.reasoning != "drop":
            raise ValueError(
                f"reasoning: {self.reasoning} puts the trace into an answer; with label and rationale drop it"
            )
        return self

    @property
    def weights(self) -> dict[Task, float]:
        """The weight of each task; a list gives them all the same."""
        return self.tasks if isinstance(self.tasks, dict) else dict.fromkeys(self.tasks, 1.0)

    @property
    def measured(self) -> "Shape":
        """The one task that a student is measured by: the rationale is for training only."""
        asked: list[Task] = ["answer" if "answer" in self.tasks else "label"]
        return self.model_copy(update={"tasks": asked})


class _Said(NamedTuple):
    """A sample's text in its two parts."""

    trace: str
    answer: str


def shape(knobs: Shape, groups: Iterable[list[Sample]]) -> Iterator[list[TrainRow | Sample]]:
    """The training rows of each sample; a truncated or empty answer, or one that came as rejected, is never data
    and comes back with the reason.

    The truth is added to a prompt's first sample, whatever became of that.
    """
    for group in groups:
        truth = _truth(knobs, group[0])
        for sample in group:
            said = _said(knobs, sample)
            rows = [sample.judged(said)] if isinstance(said, Verdict) else _rows(knobs, sample, said)
            yield [*rows, *truth]
            truth = []


def _said(knobs: Shape, sample: Sample) -> _Said | Verdict:
    """What the sample says, or why it is no data."""
    text, trace = sample.response.strip(), (sample.reasoning or "").strip()
    if sample.model == GIVEN and sample.scores.get(LABEL) == 0:
        return _not("not_wanted")
    if sample.finish != "stop" or not text:
        return _not("empty" if sample.finish == "stop" else f"truncated:{sample.finish}")
    if knobs.answer_after is not None:
        before, found, text = text.rpartition(knobs.answer_after)
        trace, text = trace or _untagged(before), text.strip()
        if not found or not text:
            return Verdict(filter="shape", keep=None, reason=f"no_mark:{knobs.answer_after}")
    if "rationale" in knobs.tasks and not trace:
        return _not("no_trace")
    return _Said(masked(trace), masked(text)) if knobs.mask else _Said(trace, text)


def _untagged(before: str) -> str:
    """A trace that stood in the text, without the tags that `reasoning: keep` writes around it."""
    return before.strip().removeprefix("<think>").removesuffix("</think>").strip()


def _rows(knobs: Shape, sample: Sample, said: _Said) -> list[TrainRow | Sample]:
    rows: list[TrainRow | Sample] = []
    for task, weight in knobs.weights.items():
        text, unlearned = (said.trace if task == "rationale" else said.answer), 0
        if task == "answer" and knobs.reasoning != "drop" and said.trace:
            opening = f"<think>\n{said.trace}\n</think>\n\n"
            text, unlearned = opening + text, len(opening) if knobs.reasoning == "mask" else 0
        if task != "truth":
            rows.append(_row(knobs, sample, task, weight, text, unlearned))
    return rows


def _row(knobs: Shape, sample: Sample, task: Task, weight: float, text: str, unlearned: int = 0) -> TrainRow:
    told = (sample.prompt.id, text) if task == "answer" else (sample.prompt.id, text, task)
    return TrainRow(
        id=digest(*told, size=8),
        prompt=student_view(knobs, sample.prompt, task),
        completion=[Message(role="assistant", content=text)],
        masked=unlearned,
        task=task,
        weight=weight,
        source=sample.prompt.source,
        tags=sample.prompt.tags,
        model=sample.model if task != "truth" else "",
        scores=sample.scores if task != "truth" else {},
        parents=[sample.id] if task != "truth" else [],
    )


def _truth(knobs: Shape, sample: Sample) -> list[TrainRow]:
    """The reference as an answer, where the recipe wants it and the prompt has one."""
    weight, reference = knobs.weights.get("truth"), (sample.prompt.reference or "").strip()
    reference = masked(reference) if knobs.mask else reference
    return [_row(knobs, sample, "truth", weight, reference)] if weight is not None and reference else []


def lacking_truth(knobs: Shape, groups: Iterable[list[Sample]]) -> list[str]:
    """What a mixture lacks, for people: prompts without a reference."""
    if "truth" not in knobs.tasks:
        return []
    count = total = 0
    for group in groups:
        total += 1
        count += not (group[0].prompt.reference or "").strip()
    return [f"tasks.truth: {count:,} of {total:,} prompts have no reference"] if count else []


def student_view(knobs: Shape, prompt: Prompt, task: Task | None = None) -> list[Message]:
    """The prompt as the student sees it, in training and, without a task, when it is measured."""
    messages = prompt.messages
    if knobs.mask:
        messages = [Message(role=message["role"], content=masked(message["content"])) for message in messages]
    if knobs.system is not None:
        plain = [message for message in messages if message["role"] != "system"]
        messages = [Message(role="system", content=knobs.system), *plain]
    if task is None or task == "truth":
        task = "answer" if "answer" in knobs.tasks else "label"
    if prefix := PREFIXES.get(task):
        *before, last = messages
        messages = [*before, Message(role=last["role"], content=prefix + last["content"])]
    return messages


def _not(reason: str) -> Verdict:
    return Verdict(filter="shape", keep=False, reason=reason)
