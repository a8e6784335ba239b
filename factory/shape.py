"""Stage `shape`: from sample to training row. What was said to the teacher is erased; the lineage keeps it.

Prompt erasing (Orca 2, arXiv 2311.11045, section 4): the student sees the plain prompt, or one generic message, and has
to find the teacher's way of answering by itself.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import Field

from factory.filters.personal_data import masked
from factory.knobs import Knobs
from factory.rows import Message, Prompt, Sample, TrainRow, Verdict, digest


class Shape(Knobs):
    """`shape:`; `system` is the one message that the student sees instead; `reasoning: keep` puts the trace first.

    `mask: personal_data` writes [EMAIL], [PHONE] ... for what `filters/personal_data.py` finds, in prompt and completion.
    """

    kind: Literal["shape"] = "shape"
    system: str | None = None
    reasoning: Literal["drop", "keep"] = "drop"
    mask: Literal["personal_data"] | None = None
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")


def shape(knobs: Shape, groups: Iterable[list[Sample]]) -> Iterator[TrainRow | Sample]:
    """A training row per sample; a truncated or empty answer is never data and comes back with the reason."""
    for sample in (sample for group in groups for sample in group):
        text = sample.response.strip()
        if sample.finish != "stop" or not text:
            reason = "empty" if sample.finish == "stop" else f"truncated:{sample.finish}"
            yield sample.judged(Verdict(filter="shape", keep=False, reason=reason))
            continue
        if knobs.reasoning == "keep" and (trace := (sample.reasoning or "").strip()):
            text = f"<think>\n{trace}\n</think>\n\n{text}"
        text = masked(text) if knobs.mask else text
        yield TrainRow(
            id=digest(sample.prompt.id, text, size=8),
            prompt=student_view(knobs, sample.prompt),
            completion=[Message(role="assistant", content=text)],
            source=sample.prompt.source,
            model=sample.model,
            scores=sample.scores,
            parents=[sample.id],
        )


def student_view(knobs: Shape, prompt: Prompt) -> list[Message]:
    """The prompt as the student sees it, in training and when it is measured."""
    messages = prompt.messages
    if knobs.mask:
        messages = [Message(role=message["role"], content=masked(message["content"])) for message in messages]
    if knobs.system is None:
        return messages
    plain = [message for message in messages if message["role"] != "system"]
    return [Message(role="system", content=knobs.system), *plain]
