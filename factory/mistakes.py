"""What is wrong in a recipe's data, in sentences with paths; and the recipe that is left without those parts.

A recipe with one mistake is still looked at as a whole: names, files and columns can only be checked on typed records,
and people want to hear of all mistakes at once. So a wrong value is taken out (its default stands in), or the whole
model, prompt list or stage where that is not enough, and what is left goes on to the next look.
"""

import copy
import difflib
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import pydantic

from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.yamlfile import Path_, Place, place, written

Record = TypeVar("Record", bound=Knobs)

Problem = tuple[Path_, str]
"""Where in the data, and what."""

PARTS = ("models", "prompts", "stages")
SECRET = (("api_key_env",), ("base_url",))
"""Where people paste a key or a password by mistake: what stands there is not shown."""
STAND_INS: dict[str, Any] = {"name": "nameless", "prompts": [{"path": "none"}]}
"""For what no recipe can be without."""


class Salvaged(NamedTuple, Generic[Record]):
    """`positions`: where the parts that are left in each list stood. `lost`: the paths of parts that are left out."""

    recipe: Record | None
    problems: list[Problem]
    positions: dict[str, list[int]]
    lost: set[Path_]


def salvage(record: type[Record], data: dict[str, Any]) -> Salvaged[Record]:
    """The data as a `record`, as far as it makes sense, and what is wrong with the rest."""
    rest = _Rest(data)
    while True:
        try:
            recipe = record.model_validate(rest.data)
        except pydantic.ValidationError as e:
            if not rest.cut(explained(e, rest.data, record)):
                return Salvaged(None, rest.problems, rest.positions, rest.lost)
        else:
            return Salvaged(recipe, rest.problems, rest.positions, rest.lost)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none yet'}"


class _Rest:
    """What is left of the data, while parts are taken out of it."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = copy.deepcopy(data)
        self.problems: list[Problem] = []
        self.lost: set[Path_] = set()
        lists = {name: data[name] for name in ("prompts", "stages") if isinstance(data.get(name), list)}
        self.positions = {name: list(range(len(items))) for name, items in lists.items()}
        self._touched: set[Path_] = set()

    def cut(self, found: list[Problem]) -> bool:
        """Note these problems and take out what they are about; False where nothing helps.

        A part that is still wrong without its wrong values goes as a whole, and what is said of it then is not told:
        it might be true of our cut alone.
        """
        before = set(self._touched), set(self.lost)
        parts = [(self._original(at), at, text) for at, text in found]
        fresh = [one for one in parts if self._part(one[0]) not in self._touched]
        self.problems += [(original, text) for original, _, text in fresh]
        whole = {at[: len(self._part(original))] for original, at, _ in parts if not self._can_lose(original, at)}
        for original, at, _ in sorted(parts, key=lambda one: [str(key).zfill(9) for key in one[1]], reverse=True):
            self._touched.add(self._part(original))
            if at[: len(self._part(original))] not in whole:
                _take_out(self.data, at)
        for at in sorted(whole, key=lambda at: str(at[-1]).zfill(9), reverse=True):
            self._drop(at)
        return (self._touched, self.lost) != before

    def _original(self, at: Path_) -> Path_:
        if len(at) > 1 and at[0] in self.positions and isinstance(at[1], int):
            return (at[0], self.positions[str(at[0])][at[1]], *at[2:])
        return at

    def _part(self, at: Path_) -> Path_:
        return at[:2] if at and at[0] in PARTS else at[:1]

    def _can_lose(self, original: Path_, at: Path_) -> bool:
        """Whether only the value is taken out: it lies inside a part that was whole until now."""
        return len(at) > len(self._part(at)) and self._part(original) not in self._touched and _is_there(self.data, at)

    def _drop(self, at: Path_) -> None:
        self.lost.add(self._original(at))
        if len(at) == 1 and at[0] in STAND_INS:
            self.data[str(at[0])] = copy.deepcopy(STAND_INS[str(at[0])])
            self.positions[str(at[0])] = [0]
            return
        _take_out(self.data, at)
        if len(at) == 2 and at[0] in self.positions:
            del self.positions[str(at[0])][int(at[1])]
            if at[0] in STAND_INS and not self.data[str(at[0])]:
                self._drop(at[:1])


def _is_there(data: Any, at: Path_) -> bool:
    for key in at:
        if not (key in data if isinstance(data, dict) else isinstance(data, list) and int(key) < len(data)):
            return False
        data = data[key]
    return True


def _take_out(data: Any, at: Path_) -> None:
    if _is_there(data, at):
        for key in at[:-1]:
            data = data[key]
        del data[at[-1]]


# -- sentences -------------------------------------------------------------------------------------------------------


def explained(error: pydantic.ValidationError, data: Any, record: type[Knobs]) -> list[Problem]:
    """What pydantic found wrong in `data`, read as a `record` or a list of them."""
    return [(_path(one["loc"], data), _told(one, data, record)) for one in error.errors(include_url=False)]


def refusal(
    error: pydantic.ValidationError, data: Any, places: dict[Path_, Place], name: str, record: type[Knobs]
) -> RecipeError:
    """The same as an error, with file and line, for a smaller file that is read as a whole or not at all."""
    problems = explained(error, data, record)
    return RecipeError("\n".join(f"{written(place(places, at, name))}: {text}" for at, text in problems))


def _told(error: Any, data: Any, record: type[Knobs]) -> str:
    """One pydantic error as a sentence."""
    at = _path(error["loc"], data)
    key = ".".join(str(part) for part in at) or "the whole"
    if error["type"] == "extra_forbidden":
        known = sorted(
            _known_keys(error["loc"][:-1], record)
            | ({"extends"} if "prompts" in record.model_fields and len(error["loc"]) == 1 else set())
        )
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")
    if error["type"] == "union_tag_invalid":
        named = re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])
        return f"{key}: there is no {str(error['ctx']['tag'])!r}; {nearest(str(error['ctx']['tag']), named)}"
    if error["type"] == "literal_error":
        named = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        if error["loc"][-1] == "[key]":
            return f"unknown key {key!r}; {nearest(str(error['input']), named)}"
        return f"{key}: there is no {error['input']!r}; {nearest(str(error['input']), named)}"
    if error["type"] == "union_tag_not_found":
        told = error["ctx"]["discriminator"].strip("'")
        records = _records(record.model_fields[str(error["loc"][0])].annotation)
        return f"{key}.{told} is missing; known: {', '.join(sorted({tag for one in records for tag in _tags(one)}))}"
    if error["type"] == "missing":
        return f"{key} is missing"
    shown = not isinstance(error.get("input"), dict | list) and at[-1:] not in SECRET
    got = f" (got {error.get('input')!r})" if shown else ""
    return f"{key}: {error['msg'].removeprefix('Value error, ')}{got}"


def _path(loc: tuple[str | int, ...], data: Any) -> Path_:
    """The error's path through our records as a path through the file: tags of unions are not keys there."""
    path: list[str | int] = []
    here = data
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(here, dict) and (part in here or last):
            path.append(part)
            here = here.get(str(part))
        elif isinstance(here, list) and isinstance(part, int) and (part < len(here) or last):
            path.append(part)
            here = here[part] if part < len(here) else None
    return tuple(path)


def _known_keys(loc: tuple[str | int, ...], record: type[Knobs]) -> set[str]:
    """The keys that the record at `loc` has: walk the types along the error's own path."""
    here: set[type[Knobs]] = {record}
    for part in loc:
        if isinstance(part, int):
            continue
        tagged = {c for c in here if part in _tags(c)}
        inner = {
            r
            for c in here
            for f, info in c.model_fields.items()
            if part in (f, info.alias)
            for r in _records(info.annotation)
        }
        here = tagged or inner or here
    return {info.alias or name for c in here for name, info in c.model_fields.items() if name != "kind"}


def _tags(record: type[Knobs]) -> set[str]:
    fields = [record.model_fields[name] for name in ("kind", "type") if name in record.model_fields]
    return {str(field.default) for field in fields}


def _records(annotation: Any) -> Iterator[type[Knobs]]:
    if isinstance(annotation, type) and issubclass(annotation, Knobs):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _records(inner)
