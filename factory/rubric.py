"""Rubric files: what a judge is asked, and how its score is read, strictly.

A rubric is Markdown with a YAML head (`name`, `scale: [low, high]`, `origin`, `licence`) and the blanks `{{ prompt }}`,
`{{ response }}`, `{{ reference }}` and `{{ fence }}`, a word for the borders of the answer that the answer cannot know.
Only the file is a template: what fills the blanks is data. `examples` in the head are graded turns before the real one: a
small judge follows examples where it ignores orders. A score that cannot be read is missing: the best-known
preference set read "1" as 10 in thousands of rows.
"""

import re
from pathlib import Path
from typing import NamedTuple, Self

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from pydantic import Field, ValidationError, field_validator, model_validator

from factory import yamlfile
from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.mistakes import refusal
from factory.rows import Message, Prompt, Sample, digest

BLANKS = ("prompt", "response", "reference", "fence")

_HEAD = re.compile(r"---\n(.*?\n)---\n(.*)", re.DOTALL)
_MARKER = re.compile(r"^[ \t>*_#-]*score[*_ \t]*:[*_ \t]*(.*)$", re.IGNORECASE | re.MULTILINE)
_PLAIN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*([0-9]+))?[\s.*_]*")
_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)


class Example(Knobs):
    """An answer with the score that it should get."""

    prompt: str
    response: str
    reference: str = ""
    score: float


class Head(Knobs):
    """What a rubric says of itself; `scale` is inclusive on both ends."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    scale: tuple[float, float]
    origin: str
    licence: str
    examples: list[Example] = []

    @field_validator("scale")
    @classmethod
    def _ascends(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not scale[0] < scale[1]:
            raise ValueError("write [low, high] with low < high")
        return scale

    @model_validator(mode="after")
    def _examples_on_the_scale(self) -> Self:
        if wrong := [one.score for one in self.examples if not self.scale[0] <= one.score <= self.scale[1]]:
            raise ValueError(f"an example has the score {wrong[0]:g}, which is not on the scale")
        return self


class Rubric(NamedTuple):
    """A loaded rubric."""

    head: Head
    template: jinja2.Template


def load(path: Path) -> Rubric:
    """Read a rubric file; RecipeError with file and line."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    parts = _HEAD.fullmatch(text)
    if parts is None:
        raise RecipeError(
            f"{path}:1: a rubric starts with a head between two lines of ---: name, scale, origin, licence"
        )
    # blank lines before each part: so it counts lines as the file does
    return Rubric(_head("\n" + parts[1], path), _template("\n" * text[: parts.start(2)].count("\n") + parts[2], path))


def _head(text: str, path: Path) -> Head:
    data, places = yamlfile.parse(text, str(path))
    try:
        return Head.model_validate(data)
    except ValidationError as e:
        raise refusal(e, data, places, str(path), Head) from None


def _template(text: str, path: Path) -> jinja2.Template:
    try:
        for name in _ENVIRONMENT.parse(text).find_all(nodes.Name):
            if name.ctx == "load" and name.name not in BLANKS:
                raise RecipeError(f"{path}:{name.lineno}: {name.name!r} is unknown; a rubric has {', '.join(BLANKS)}")
        template = _ENVIRONMENT.from_string(text)
        asked = template.render({name: f"<{name}>" for name in BLANKS})
    except jinja2.TemplateSyntaxError as e:
        raise RecipeError(f"{path}:{e.lineno}: {e.message}") from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as e:
        raise RecipeError(f"{path}: the blanks cannot be filled: {e}") from None
    if "<response>" not in asked:
        raise RecipeError(f"{path}: the judge would not see the answer; put {{{{ response }}}} into the text")
    return template


def render(rubric: Rubric, sample: Sample) -> list[Message]:
    """What the judge is asked about a sample, after the examples with their scores."""
    turns: list[Message] = []
    for one in rubric.head.examples:
        turns.append(_asked(rubric, one.prompt, one.response, one.reference))
        turns.append(Message(role="assistant", content=f"Score: {one.score:g}"))
    return [*turns, _asked(rubric, _said(sample.prompt), sample.response, sample.prompt.reference or "")]


def _asked(rubric: Rubric, prompt: str, response: str, reference: str) -> Message:
    fence = digest(prompt, response, size=8)
    text = rubric.template.render(prompt=prompt, response=response, reference=reference, fence=fence)
    return Message(role="user", content=text.strip())


def _said(prompt: Prompt) -> str:
    """A single question as it is; of a conversation every turn, since the last one alone may mean nothing."""
    if [message["role"] for message in prompt.messages] == ["user"]:
        return prompt.text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)


def read_score(rubric: Rubric, text: str) -> float | None:
    """The number after `Score:` at the start of a line.

    None unless it is one plain number within the scale, and the same wherever the text has such a line.
    """
    scores = {_plain_number(rubric.head.scale, told) for told in _MARKER.findall(text)}
    return scores.pop() if len(scores) == 1 else None


def _plain_number(scale: tuple[float, float], told: str) -> float | None:
    low, high = scale
    found = _PLAIN.fullmatch(told.strip())
    if found is None or (found[2] is not None and float(found[2]) != high):
        return None  # "1/10" on a scale to 5 is another scale, not a 1
    value = float(found[1])
    return value if low <= value <= high else None
