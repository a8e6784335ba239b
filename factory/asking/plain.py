"""Nothing but the prompt."""

from typing import Literal

from factory.knobs import Knobs
from factory.prompt_files import Find
from factory.rows import Message, Prompt


class Plain(Knobs):
    """`ask: plain`: the prompt's own messages, unchanged."""

    kind: Literal["plain"] = "plain"

    def open(self, find: Find) -> "Plain":
        return self

    def messages(self, prompt: Prompt, seed: int) -> list[Message]:
        return prompt.messages
