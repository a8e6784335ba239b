"""The text of a recipe: files with the parents that they extend, overrides from the command line, and where each value
stands, for messages. What the values mean is `recipe.py`'s business."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from factory import yamlfile
from factory.errors import RecipeError
from factory.yamlfile import Path_, Place


class Source(NamedTuple):
    """A recipe as plain data, and the place of every value in it by its path of keys and indexes."""

    file: Path
    data: dict[str, Any]
    places: dict[Path_, Place]

    def place(self, at: Path_) -> Place:
        """File and line of a path, or of the nearest thing around it; line 0 is a value of `--set`."""
        return yamlfile.place(self.places, at, str(self.file))


def read(path: Path, overrides: Iterable[str] = ()) -> Source:
    """A recipe's file over its parents, with `--set` overrides; RecipeError for what cannot be read at all."""
    data, places = _with_parents(path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: a recipe is a map with `name`, `prompts`, `stages`")
    problems = []
    for override in overrides:
        try:
            _override(data, places, override)
        except RecipeError as e:
            problems.append(str(e))
    if problems:
        raise RecipeError("\n".join(problems))
    return Source(path, data, places)


def find(path: str) -> Path:
    """A file of the user's, from the working directory; else one that ships with the factory."""
    own = Path(path).expanduser()
    if own.exists():
        return own
    if (there := shipped() / path).exists() and not own.is_absolute():
        return there
    raise RecipeError(
        f"there is no file {path!r}, neither in {Path.cwd().name}/ nor among the shipped prompts and recipes"
    )


def shipped() -> Path:
    """Where the shipped `prompts/` and `recipes/` are: inside the wheel, or beside the package in a clone."""
    inside = Path(__file__).parent / "shipped"
    return inside if inside.is_dir() else Path(__file__).parent.parent


def _with_parents(path: Path, seen: tuple[Path, ...] = ()) -> tuple[Any, dict[Path_, Place]]:
    """A file merged over the one it `extends`: maps merge, lists and whole models are replaced."""
    if path.resolve() in seen:
        raise RecipeError(f"{path}: `extends` goes in a circle")
    data, places = yamlfile.read(path)
    if not isinstance(data, dict) or "extends" not in data:
        return data, places
    parent_name = str(data.pop("extends"))
    beside = path.parent / parent_name
    try:
        there = beside if beside.exists() else find(parent_name)
    except RecipeError as e:
        raise RecipeError(f"{yamlfile.written(places['extends',])}: extends: {e}") from None
    parent, parent_places = _with_parents(there, (*seen, path.resolve()))
    return _merge(parent, data, (), parent_places, places), parent_places


def _merge(old: Any, new: Any, path: Path_, old_places: dict[Path_, Place], new_places: dict[Path_, Place]) -> Any:
    whole = len(path) == 2 and path[0] == "models"
    if isinstance(old, dict) and isinstance(new, dict) and not whole:
        merged = dict(old)
        for key, value in new.items():
            merged[key] = _merge(old.get(key), value, (*path, key), old_places, new_places)
        return merged
    for stale in [p for p in old_places if p[: len(path)] == path]:
        del old_places[stale]
    old_places.update({p: place for p, place in new_places.items() if p[: len(path)] == path})
    return new


def _override(data: Any, places: dict[Path_, Place], override: str) -> None:
    """`--set stages.0.generate.n=4`: the value is YAML; maps merge, lists and whole models are replaced."""
    keys, equals, text = override.partition("=")
    if not equals or not keys:
        raise RecipeError(f"--set {override}: write KEY=VALUE, for example --set stages.0.generate.n=4")
    value, _ = yamlfile.parse(text, f"--set {keys}")
    said_by: Place = (f"--set {keys}", 0)
    path: list[str | int] = []
    here = data
    *parents, last = keys.split(".")
    for key in parents:
        step = _step(here, key, override)
        path.append(step)
        if isinstance(here, dict) and here.get(step) is None:
            here[step], places[tuple(path)] = {}, said_by
        elif isinstance(here, list) and step == len(here):
            here.append({})
            places[tuple(path)] = said_by
        here = here[step]
    step = _step(here, last, override)
    if isinstance(here, dict) and isinstance(here.get(step), dict) and isinstance(value, dict) and path != ["models"]:
        here[step] = {**here[step], **value}
    elif isinstance(here, list) and step == len(here):
        here.append(value)
    else:
        here[step] = value
    for stale in [p for p in places if p[: len(path) + 1] == (*path, step)]:
        del places[stale]
    places[(*path, step)] = said_by


def _step(here: Any, key: str, override: str) -> Any:
    if isinstance(here, list):
        if not key.isdecimal() or int(key) > len(here):
            raise RecipeError(
                f"--set {override}: {key!r} is not one of the {len(here)} items of that list (they count from 0)"
            )
        return int(key)
    if not isinstance(here, dict):
        told = "nothing" if here is None else f"the plain value {here!r}"
        raise RecipeError(f"--set {override}: {key!r} cannot be set below {told}; set what holds it as a whole")
    return key
