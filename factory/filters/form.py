"""The form of an answer, as the recipe gives it: a regular expression, a JSON schema, sections."""

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from factory.filters.pattern import Pattern, Undecided
from factory.filters.shapes import RowFilter
from factory.rows import Sample, Verdict


class Format(RowFilter):
    """The answer matches each that is given.

    `pattern`: as a whole, or with `full: false` anywhere. `json_schema`: the answer is JSON, with or without a code fence
    around it, of that schema (drafts 4, 6 and 7; a `$ref` stays inside). `sections`: lines that begin so, in this order.
    """

    kind: Literal["format"] = "format"
    pattern: str | None = None
    full: bool = True
    json_schema: dict[str, Any] | None = None
    sections: list[str] = Field([], max_length=50)

    @cached_property
    def _pattern(self) -> Pattern | None:
        return None if self.pattern is None else Pattern(self.pattern)

    @cached_property
    def _validate(self) -> Callable[[Any], Any] | None:
        return None if self.json_schema is None else _validator(self.json_schema)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        return pattern and Pattern(pattern).text

    @model_validator(mode="after")
    def _ready(self) -> Self:
        if self.pattern is None and self.json_schema is None and not self.sections:
            raise ValueError("give pattern, json_schema or sections")
        _ = self._validate  # a wrong schema is found before anything is sent
        return self

    def check(self, sample: Sample) -> Verdict:
        text = sample.response
        if self._pattern is not None:
            try:
                found = self._pattern.try_on(text, "fullmatch" if self.full else "search")
            except Undecided as e:
                return self.cannot_tell(str(e))
            if not found:
                return self.drop("format", evidence=text[:100])
        if self._validate is not None and (wrong := _wrong_json(text, self._validate)):
            return self.drop(*wrong)
        if missing := _missing(text, self.sections):
            return self.drop(f"no_section:{missing[:60]}", evidence=text[:100])
        return self.keep()


def _validator(schema: dict[str, Any]) -> Callable[[Any], Any]:
    import fastjsonschema  # a twentieth of the command's start-up

    def refuse(uri: str) -> Any:
        raise ValueError(f"a schema may not fetch {uri}; put it under definitions")

    try:
        compiled: Callable[[Any], Any] = fastjsonschema.compile(
            schema, handlers=dict.fromkeys(("http", "https", "file", "ftp"), refuse), use_default=False
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, fastjsonschema.JsonSchemaException) as e:
        raise ValueError(f"not a JSON schema: {e}") from None
    return compiled


def _wrong_json(text: str, validate: Callable[[Any], Any]) -> tuple[str, None, str] | None:
    """Reason, no score, and evidence, where a text is no JSON of the schema."""
    import fastjsonschema

    bare = text.strip()
    if bare.startswith("```") and bare.endswith("```") and "\n" in bare:
        bare = bare[bare.index("\n") : -3]
    try:
        value = json.loads(bare, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        return "not_json", None, f"{e}"[:200]
    try:
        validate(value)
    except fastjsonschema.JsonSchemaValueException as e:
        return f"schema:{e.name or 'data'}:{e.rule}", None, e.message[:200]
    return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _missing(text: str, sections: list[str]) -> str | None:
    """The first section that no line begins with, after the one before it; marks of headings and case aside."""
    lines = iter([_bare(line) for line in text.splitlines()])
    return next((one for one in sections if not any(line.startswith(_bare(one)) for line in lines)), None)


def _bare(line: str) -> str:
    return line.strip().lstrip("#*_ ").casefold()
