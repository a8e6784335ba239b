"""The row's own ground truth as a teacher: what "training on gold" means, and the control every distillation needs."""

from typing import Literal

from factory.rows import LABEL, Choice, Failure, Outcome, Prompt, Reply
from factory.teachers.entry import Entry


class Reference(Entry):
    """`{type: reference}`: answers a prompt with the answer that came with its row, if it is not one that nobody wants,
    else with its reference.

    It costs nothing and cannot fail, so `generate` calls it directly: no journal, no budget.
    """

    type: Literal["reference"] = "reference"

    def answer(self, prompt: Prompt) -> Outcome:
        unwanted = prompt.scores.get(LABEL) == 0
        text = prompt.reference if prompt.completion is None or unwanted else prompt.completion
        if text is None or not text.strip():
            return Failure(reason="no_stored_answer", detail="the prompt has no reference")
        return Reply(choices=[Choice(text=text, finish="stop")], model="reference")
