"""What every part of a recipe is made of: a closed, typed record, and a choice of one among several.

Two spellings of a choice appear in recipes. A *one-key map* names it by its only key (`{words: {min: 5}}`; a bare
name is the same with no settings): stages, filters and asking. A *tagged* record names it by `type:` (models).
Both become a pydantic union discriminated by a literal field, so go-to-definition works and unknown keys are errors.
"""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Knobs(BaseModel):
    """A closed record: an unknown key is an error, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


def one_key(union: Any, shorthand: dict[str, str] | None = None) -> Any:
    """`union`, a union of `Knobs` with a literal `kind`, written as a bare name or a one-key map.

    `shorthand` names, for some kinds, the field that takes a value which is not a map
    (`filter: [finished]` means `filter: {filters: [finished]}`).
    """
    short = shorthand or {}
    kinds = {record.model_fields["kind"].default for record in get_args(union)}

    def untag(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        if isinstance(value, dict) and len(value) == 1:
            (kind, body), *_ = value.items()
            if body is None or kind not in kinds:  # of an unknown name only the name is of interest
                return {"kind": kind}
            if isinstance(body, dict):
                return {"kind": kind, **body}
            if kind in short:
                return {"kind": kind, short[kind]: body}
            raise PydanticCustomError("one_key", "the settings of '{kind}' must be a map", {"kind": str(kind)})
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, dict) and value:
            several = ", ".join(map(str, value))
            raise PydanticCustomError(
                "one_key", "a map with one key is wanted here, not {several}", {"several": several}
            )
        raise PydanticCustomError("one_key", "write a name, or a map with one key: the name, and its settings below it")

    return Annotated[Annotated[union, Field(discriminator="kind")], BeforeValidator(untag)]


def written_out(record: Knobs) -> Any:
    """A record as it stands in a recipe, one-key maps included: what reads as the same record again."""
    return _as_written(record.model_dump(mode="json", by_alias=True, exclude_unset=True))


def _as_written(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    if not isinstance(value, dict):
        return value
    inner = {key: _as_written(item) for key, item in value.items()}
    return {inner.pop("kind"): inner} if isinstance(value.get("kind"), str) else inner
