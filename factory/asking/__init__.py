"""SEAM 1: what is said.

Asking wraps a prompt's messages into what a model is sent: alone, with a message that asks for an explanation, after
worked examples ... What is added here never reaches the student: stage `shape` erases it, the lineage keeps it.

To add a way: one file with a `Knobs` record (its `kind` literal is the name in recipes) whose `open(find)` reads its
files once and returns an `Asker`, and its name in the union `Ask` below.
"""

from typing import Any, Protocol

from factory.asking.examples import Examples
from factory.asking.explain import Explain
from factory.asking.plain import Plain
from factory.knobs import one_key
from factory.rows import Message, Prompt


class Asker(Protocol):
    """Says the same to the same prompt under the same seed, whatever else is asked before or after."""

    def messages(self, prompt: Prompt, seed: int) -> list[Message]: ...


Ask = Plain | Examples | Explain
AskKnob: Any = one_key(Ask, shorthand={"examples": "path", "explain": "path"})

__all__ = ["Ask", "AskKnob", "Asker", "Examples", "Explain", "Plain"]
