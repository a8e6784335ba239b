"""System messages that ask for explanations, one per prompt (Orca, arXiv 2306.02707, section 3.1.1 and table 2).

Which one is decided by a hash of the run's seed and the prompt's id, by weight: neither order nor subset matter. Some
messages make sense for multiple-choice questions only (two of Orca's sixteen) and are never put to other prompts.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import pydantic
from pydantic import Field

from factory import yamlfile
from factory.asking.system import with_system
from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.mistakes import refusal
from factory.prompt_files import Find
from factory.rows import Message, Prompt, digest

MULTIPLE_CHOICE = "multiple_choice"

OPTION = re.compile(r"^\s*\(?([A-Za-z]|\d{1,2})[).:]\s+\S", re.MULTILINE)
"""A line with a labelled option: `A) ...`, `(b) ...`, `C. ...`, `1. ...`."""


class Explanation(Knobs):
    """One system message; blank text asks nothing. `weight` is relative to the others'."""

    id: str
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    only: Literal["multiple_choice"] | None = None
    text: str


class Explain(Knobs):
    """`ask: explain`: one of a weighted set of system messages, then the prompt."""

    kind: Literal["explain"] = "explain"
    path: str = "prompts/explanations.yaml"

    def open(self, find: Find) -> "ExplainAsker":
        """Read the set; RecipeError names every fault with file and line."""
        path = find(self.path)
        data, places = yamlfile.read(path)
        try:
            found = pydantic.TypeAdapter(list[Explanation]).validate_python(data)
        except pydantic.ValidationError as e:
            raise refusal(e, data, places, str(path), Explanation) from None
        ids = [explanation.id for explanation in found]
        for i, id_ in enumerate(ids):
            if id_ in ids[:i]:
                where = yamlfile.written(yamlfile.place(places, (i, "id"), str(path)))
                raise RecipeError(f"{where}: the id {id_!r} appears twice")
        if not any(explanation.weight for explanation in found if not explanation.only):
            raise RecipeError(f"{path}:1: no message with a weight above 0 is for every prompt")
        return ExplainAsker(found)


class ExplainAsker(NamedTuple):
    explanations: Sequence[Explanation]

    def messages(self, prompt: Prompt, seed: int) -> list[Message]:
        return with_system(self.pick(prompt, seed).text, prompt.messages)

    def pick(self, prompt: Prompt, seed: int) -> Explanation:
        """The message of a prompt: a point on the line of all weights, chosen by hash."""
        allowed = [e for e in self.explanations if e.weight and (not e.only or is_multiple_choice(prompt))]
        point = int(digest("explain", seed, prompt.id, size=8), 16) / 2**64 * sum(e.weight for e in allowed)
        for explanation in allowed:
            point -= explanation.weight
            if point < 0:
                return explanation
        return allowed[-1]  # only rounding leads here


def is_multiple_choice(prompt: Prompt) -> bool:
    """Tagged so, or with lines that offer the first two options of a list: A and B, or 1 and 2."""
    labels = [label.upper() for label in OPTION.findall(prompt.text)]
    return MULTIPLE_CHOICE in prompt.tags or labels[:2] in (["A", "B"], ["1", "2"])
