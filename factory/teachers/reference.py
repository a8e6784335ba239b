"""The row's own ground truth as a teacher: what "training on gold" means, and the control every distillation needs."""

from typing import Literal

from factory.rows import Choice, Failure, Outcome, Prompt, Reply
from factory.teachers.entry import Entry


class Reference(Entry):
    """`{type: reference}`: answers a prompt with the answer that came with its row, else with its reference.

    It costs nothing and cannot fail, so `generate` calls it directly: no journal, no budget.
    """

    type: Literal["reference"] = "reference"

    def answer(self, prompt: Prompt) -> Outcome:
        text = prompt.completion if prompt.completion is not None else prompt.reference
        if text is None or not text.strip():
            return Failure(reason="no_stored_answer", detail="the prompt has no reference")
        return Reply(choices=[Choice(text=text, finish="stop")], model="reference")
