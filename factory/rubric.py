"""Rubric files: what a judge is asked, and how its score is read, strictly.

A rubric is Markdown with a YAML head (`name`, `scale: [low, high]`, `origin`, `licence`) and the blanks
`{{ prompt }}`, `{{ response }}`, `{{ reference }}`. Only the file is a template: what fills the blanks is data.
`examples` in the head are graded turns before the real one: a small judge follows examples where it ignores orders.
A score that cannot be read is missing. The best-known preference set read "1" as 10 in thousands of rows.
"""

import re
from pathlib import Path

import jinja2
import jinja2.sandbox
from pydantic import Field, ValidationError, model_validator

from factory import yamlfile
from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.rows import Message, Sample

_HEAD = re.compile(r"---\n(.*?)\n---\n(.*)", re.DOTALL)
_MARKER = re.compile(r"^[\s>*_#-]*score[*_\s]*:[*_\s]*(.*)$", re.IGNORECASE | re.MULTILINE)
_PLAIN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*([0-9]+))?[\s.*_]*")


class Example(Knobs):
    """An answer with the score that it should get."""

    prompt: str
    response: str
    reference: str = ""
    score: float


class Rubric(Knobs):
    """A loaded rubric; `scale` is inclusive on both ends."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    scale: tuple[float, float]
    origin: str
    licence: str
    template: jinja2.Template
    examples: list[Example] = []

    @model_validator(mode="after")
    def _on_the_scale(self) -> "Rubric":
        low, high = self.scale
        if not low < high:
            raise ValueError("scale must be [low, high] with low < high")
        if wrong := [one.score for one in self.examples if not low <= one.score <= high]:
            raise ValueError(f"an example has the score {wrong[0]:g}, which is not on the scale")
        return self


def load(path: Path) -> Rubric:
    """Read a rubric file; RecipeError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({e}); save the file as UTF-8") from None
    parts = _HEAD.fullmatch(text)
    if parts is None:
        raise RecipeError(
            f"{path}:1: a rubric starts with a head between two lines of ---: name, scale, origin, licence"
        )
    head, _ = yamlfile.parse(parts[1], str(path))
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        template = environment.from_string(parts[2].strip())
        template.render(prompt="", response="", reference="")
        return Rubric(**{str(key): value for key, value in (head or {}).items()}, template=template)
    except jinja2.TemplateError as e:
        line = parts[1].count("\n") + 3 + (getattr(e, "lineno", 1) or 1) - 1
        raise RecipeError(f"{path}:{line}: {e}; a rubric knows prompt, response and reference") from None
    except ValidationError as e:
        told = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
        raise RecipeError(f"{path}:1: {told}") from None


def render(rubric: Rubric, sample: Sample) -> list[Message]:
    """What the judge is asked about a sample, after the examples with their scores."""
    turns: list[Message] = []
    for one in rubric.examples:
        turns += [_asked(rubric, one.prompt, one.response, one.reference), _scored(one.score)]
    return [*turns, _asked(rubric, sample.prompt.text, sample.response, sample.prompt.reference or "")]


def _asked(rubric: Rubric, prompt: str, response: str, reference: str) -> Message:
    text = rubric.template.render(prompt=prompt, response=response, reference=reference)
    return Message(role="user", content=text)


def _scored(score: float) -> Message:
    return Message(role="assistant", content=f"Score: {score:g}")


def read_score(rubric: Rubric, text: str) -> float | None:
    """The number after the last `Score:` that starts a line; None unless it is one plain number within the scale."""
    markers = _MARKER.findall(text)
    found = _PLAIN.fullmatch(markers[-1].strip()) if markers else None
    if found is None:
        return None
    low, high = rubric.scale
    if found[2] is not None and float(found[2]) != high:
        return None  # "1/10" on a scale to 5 is another scale, not a 1
    value = float(found[1])
    return value if low <= value <= high else None
