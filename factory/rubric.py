"""Rubric files: what a judge is asked.

A rubric is Markdown with a YAML head (`name`, `scale: [low, high]`, `origin`, `licence`) and the blanks `{{ prompt }}`,
`{{ response }}`, `{{ reference }}` and `{{ fence }}`, a word for the borders of the answer that the answer cannot know.
Only the file is a template: what fills the blanks is data. `examples` in the head are graded turns before the real one: a
small judge follows examples where it ignores orders. `aspects` are scored one by one, and `overall` is one of them or
their mean. Where several answers are shown, `{{ response }}` is all of them, numbered and each within borders.
"""

import re
from pathlib import Path
from typing import Annotated, NamedTuple, Self

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
_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)


class Example(Knobs):
    """An answer with the score that it should get."""

    prompt: str
    response: str
    reference: str = ""
    score: float


Aspect = Annotated[str, Field(pattern=r"^[a-z][a-z_]*$")]


class Head(Knobs):
    """What a rubric says of itself; `scale` is inclusive on both ends."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    scale: tuple[float, float]
    origin: str
    licence: str
    examples: list[Example] = []
    aspects: list[Aspect] = []
    overall: str = "mean"

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
        if self.aspects and self.overall not in ("mean", *self.aspects):
            raise ValueError(f"overall: write mean, or one of the aspects ({', '.join(self.aspects)})")
        if self.aspects and self.examples:
            raise ValueError("examples have one score each; a rubric with aspects has none")
        return self


class Rubric(NamedTuple):
    """A loaded rubric."""

    head: Head
    template: jinja2.Template
    guided: bool = False
    """Whether it makes no sense without a reference."""


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
    head = _head("\n" + parts[1], path)
    body = "\n" * text[: parts.start(2)].count("\n") + parts[2]
    return Rubric(head, _template(body, path), _guided(body))


def _guided(text: str) -> bool:
    """Whether the reference is used, and not only `{% if reference %}`."""
    tree = _ENVIRONMENT.parse(text)
    named = [node.name for node in tree.find_all(nodes.Name)]
    tested = [name.name for node in tree.find_all(nodes.If) for name in node.test.find_all(nodes.Name)]
    tested += [node.test.name for node in tree.find_all(nodes.If) if isinstance(node.test, nodes.Name)]
    return "reference" in named and "reference" not in tested


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


def render(rubric: Rubric, *answers: Sample, numbered: bool = False) -> list[Message]:
    """What the judge is asked about answers to one prompt, after the examples with their scores."""
    turns: list[Message] = []
    for one in rubric.head.examples:
        turns.append(_asked(rubric, one.prompt, [one.response], one.reference, False))
        turns.append(Message(role="assistant", content=f"Score: {one.score:g}"))
    prompt = answers[0].prompt
    return [*turns, _asked(rubric, _said(prompt), [one.response for one in answers], prompt.reference or "", numbered)]


def fence(prompt: str, *responses: str) -> str:
    """A word that these answers cannot know: it is made of them."""
    return digest(prompt, *responses, size=8)


def _asked(rubric: Rubric, prompt: str, responses: list[str], reference: str, numbered: bool) -> Message:
    border = fence(prompt, *responses)
    each = (f"ANSWER {k} {border}\n{text}\nEND OF ANSWER {k} {border}" for k, text in enumerate(responses, 1))
    shown = "\n\n".join(each) if numbered else responses[0]
    text = rubric.template.render(prompt=prompt, response=shown, reference=reference, fence=border)
    return Message(role="user", content=text.strip())


def _said(prompt: Prompt) -> str:
    """A single question as it is; of a conversation every turn, since the last one alone may mean nothing."""
    if [message["role"] for message in prompt.messages] == ["user"]:
        return prompt.text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
