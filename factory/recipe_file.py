"""The text of a recipe: files with the parents that they extend, overrides from the command line, and where each value
stands, for messages. What the values mean is `recipe.py`'s business."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from factory import yamlfile
from factory.errors import RecipeError
from factory.yamlfile import Path_, Place


class Source(NamedTuple):
    """A recipe as plain data, and the place of every value in it by its path of keys and indexes.

    `arms` are its named variants, each a whole recipe; `flaws` tells of overrides in them that cannot be done, by path.
    """

    file: Path
    data: dict[str, Any]
    places: dict[Path_, Place]
    arms: "dict[str, Source]"
    flaws: list[tuple[Path_, str]]

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
    flaws: list[tuple[Path_, str]] = []
    arms = {name: _arm(path, data, places, name, flaws) for name in _arms_of(data)}
    _take_out(data, places)
    return Source(path, data, places, arms, flaws)


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
    """A file merged over the one it `extends`: maps merge, lists, whole models and arms are replaced."""
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
    whole = len(path) == 2 and path[0] in ("models", "arms")
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
    """`--set stages.0.generate.n=4`: the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: write KEY=VALUE, for example --set stages.0.generate.n=4")
    value, _ = yamlfile.parse(text, f"--set {key}")
    _set(data, places, key, value, {(): (f"--set {key}", 0)}, f"--set {override}")


def _set(data: Any, places: dict[Path_, Place], key: str, value: Any, said: dict[Path_, Place], told: str) -> None:
    """Put a value where a dotted key leads: maps merge, lists, whole models and arms are replaced, null takes an item out
    of its list. `said`: the places of what is in the value; `told` begins the sentence about what cannot be done."""
    path: list[str | int] = []
    here = data
    *parents, last = key.split(".")
    for name in parents:
        here = _filters(here, name, path, data, places)
        step = _step(here, name, told)
        path.append(step)
        if isinstance(here, dict) and here.get(step) is None:
            here[step], places[tuple(path)] = {}, said[()]
        elif isinstance(here, list) and step == len(here):
            here.append({})
            places[tuple(path)] = said[()]
        here = here[step]
    here = _filters(here, last, path, data, places)
    step = _step(here, last, told)
    both_maps = isinstance(here, dict) and isinstance(here.get(step), dict) and isinstance(value, dict)
    if both_maps and path not in (["models"], ["arms"]):
        here[step] = {**here[step], **value}
    elif isinstance(here, list) and step == len(here):
        here.append(value)
    else:
        here[step] = _TAKEN if value is None and isinstance(here, list) else value
    for stale in [p for p in places if p[: len(path) + 1] == (*path, step)]:
        del places[stale]
    places.update({(*path, step, *below): place for below, place in said.items()})


def _filters(here: Any, key: str, path: list[str | int], data: Any, places: dict[Path_, Place]) -> Any:
    """What a key below `filter` is looked for in: the list of its filters may stand there itself, or under `filters`."""
    if path[-1:] != ["filter"]:
        return here
    if isinstance(here, dict) and key.isdecimal() and "filters" in here:
        path.append("filters")
        return here["filters"]
    if isinstance(here, list) and not key.isdecimal():
        whole, at = {"filters": here}, tuple(path)
        _at(data, at[:-1])["filter"] = whole
        moved = {p: place for p, place in places.items() if p[: len(at)] == at and len(p) > len(at)}
        for old, place in moved.items():
            del places[old]
            places[(*at, "filters", *old[len(at) :])] = place
        return whole
    return here


def _at(data: Any, path: Path_) -> Any:
    for key in path:
        data = data[key]
    return data


def _step(here: Any, key: str, told: str) -> Any:
    if isinstance(here, list):
        if not key.isdecimal() or int(key) > len(here):
            raise RecipeError(f"{told}: {key!r} is not one of the {len(here)} items of that list (they count from 0)")
        return int(key)
    if not isinstance(here, dict):
        what = "nothing" if here is None or here is _TAKEN else f"the plain value {here!r}"
        raise RecipeError(f"{told}: {key!r} cannot be set below {what}; set what holds it as a whole")
    return key


# -- arms --------------------------------------------------------------------------------------------------------------

_TAKEN = object()
"""Stands for an item of a list until all overrides are done, so that the others keep their numbers."""
WHOLE = ("name", "budget", "arms", "extends")
"""What the arms of a recipe have in common."""


def _arms_of(data: dict[str, Any]) -> list[str]:
    """The names of the arms that are written as they must be; null takes one out that a parent has."""
    arms = data.get("arms")
    return [name for name, overrides in arms.items() if isinstance(overrides, dict)] if isinstance(arms, dict) else []


def _arm(
    file: Path, data: dict[str, Any], places: dict[Path_, Place], name: str, flaws: list[tuple[Path_, str]]
) -> Source:
    """The recipe with the overrides of one arm: what they mean is what `--set` means."""
    own: dict[str, Any] = _copied({key: value for key, value in data.items() if key != "arms"})
    own["name"] = f"{own.get('name')}.{name}"
    its = dict(places)
    if not data["arms"][name]:
        flaws.append(
            (("arms", name), f"arms.{name}: it changes nothing; write overrides, or null for an arm to leave out")
        )
    for key, value in data["arms"][name].items():
        at: Path_ = ("arms", name, key)
        said = {p[3:]: place for p, place in places.items() if p[:3] == at}
        said.setdefault((), yamlfile.place(places, at, str(file)))
        try:
            if key.partition(".")[0] in WHOLE:
                raise RecipeError(f"{'.'.join(map(str, at))}: the arms of a recipe share its {key.partition('.')[0]}")
            _set(own, its, key, _copied(value), said, ".".join(map(str, at)))
        except RecipeError as e:
            flaws.append((at, str(e)))
    _take_out(own, its)
    return Source(file, own, its, {}, [])


def _copied(value: Any) -> Any:
    """Plain data again, which may be changed."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _take_out(value: Any, places: dict[Path_, Place], path: Path_ = ()) -> None:
    """Take the marked items out of their lists; the places of those behind them move up."""
    if isinstance(value, list):
        for i in [i for i in reversed(range(len(value))) if value[i] is _TAKEN]:
            del value[i]
            _move_up(places, path, i)
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _take_out(inner, places, (*path, key))


def _move_up(places: dict[Path_, Place], path: Path_, taken: int) -> None:
    """Forget the places of one item of a list, and number those behind it anew."""
    depth = len(path)
    for p in [p for p in places if p[:depth] == path and len(p) > depth and int(p[depth]) >= taken]:
        place = places.pop(p)
        if p[depth] != taken:
            places[(*path, int(p[depth]) - 1, *p[depth + 1 :])] = place
