"""Rubric files: what a judge is asked, and how its score is read, strictly.

A rubric is Markdown with a YAML head (`name`, `scale: [low, high]`, `origin`, `licence`) and the blanks
`{{ prompt }}`, `{{ response }}`, `{{ reference }}`. Only the file is a template: what fills the blanks is data.
A score that cannot be read is missing. The best-known preference set read "1" as 10 in thousands of rows.
"""

import re
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from pydantic import Field, ValidationError, field_validator

from factory import yamlfile
from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.rows import Message, Sample

_HEAD = re.compile(r"---\n(.*?)\n---\n(.*)", re.DOTALL)
_MARKER = re.compile(r"^[\s>*_#-]*score[*_\s]*:[*_\s]*(.*)$", re.IGNORECASE | re.MULTILINE)
_PLAIN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*([0-9]+))?[\s.*_]*")


class Rubric(Knobs):
    """A loaded rubric; `scale` is inclusive on both ends."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    scale: tuple[float, float]
    origin: str
    licence: str
    template: jinja2.Template

    @field_validator("scale")
    @classmethod
    def _ascends(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not scale[0] < scale[1]:
            raise ValueError("scale must be [low, high] with low < high")
        return scale


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
    """What the judge is asked about a sample."""
    values: dict[str, Any] = {
        "prompt": sample.prompt.text, "response": sample.response, "reference": sample.prompt.reference or "",
    }  # fmt: skip
    return [Message(role="user", content=rubric.template.render(**values))]


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
