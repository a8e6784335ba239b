"""The recipe: one YAML file as a typed record. Every problem is reported at once, with file, line and nearest key."""

import difflib
import os
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pydantic
from pydantic import Field

from factory import yamlfile
from factory.budget import Budget
from factory.choose import Choose
from factory.curate import Curate
from factory.errors import RecipeError
from factory.evaluate import Evaluate
from factory.filters.rules import Tokens
from factory.generate import Generate
from factory.judge import Judge
from factory.knobs import Knobs, one_key
from factory.pair import PairUp
from factory.prompts import PromptSet
from factory.shape import Shape
from factory.teachers import ModelEntry
from factory.teachers.entry import Endpoint
from factory.teachers.replay import Replay
from factory.teachers.vllm import Vllm
from factory.train import Train, check_args
from factory.weights import Weights, is_path
from factory.yamlfile import Path_, Place

Stage: TypeAlias = Generate | Curate | Judge | Choose | Shape | PairUp | Train | Evaluate
StageKnob: Any = one_key(Stage, shorthand={"filter": "filters"})

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class Recipe(Knobs):
    """A whole run. `name` names its folder; prompts and stages flow from top to bottom."""

    name: str = Field(pattern=NAME)
    prompts: list[PromptSet] = Field(min_length=1)
    seed: int = 0
    budget: Budget = Budget()
    models: dict[str, ModelEntry] = {}
    stages: list[StageKnob] = []

    def trained(self) -> dict[str, Train]:
        """The students that this recipe makes, by name."""
        return {stage.as_: stage for stage in self.stages if isinstance(stage, Train)}

    def view(self) -> Shape:
        """How students see a prompt: by the last `shape`, or erased to the plain prompt."""
        shapes = [stage for stage in self.stages if isinstance(stage, Shape)]
        return shapes[-1] if shapes else Shape()

    def taught(self, teacher: str | None) -> Generate | None:
        """The first `generate` that names a teacher: it is measured as it was asked there."""
        asking = (stage for stage in self.stages if isinstance(stage, Generate))
        return next((stage for stage in asking if teacher in stage.models), None)


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe with its parents and `--set` overrides; RecipeError lists every problem found."""
    data, places = _with_parents(path)
    for override in overrides:
        _override(data, places, override)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: a recipe is a map with `name`, `prompts`, `stages`")
    try:
        recipe = Recipe.model_validate(data)
    except pydantic.ValidationError as e:
        problems = [_problem(error, data, places, path) for error in e.errors(include_url=False)]
        raise RecipeError("\n".join(problems)) from None
    if problems := [f"{_place(at, data, places, path)}: {text}" for at, text in _cross_check(recipe)]:
        raise RecipeError("\n".join(problems))
    return recipe


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


def warnings(recipe: Recipe) -> list[str]:
    """What would stop `run` here and now, but is no fault of the recipe: keys, weights, hub ids."""
    found = []
    for name, entry in recipe.models.items():
        if isinstance(entry, Endpoint) and entry.api_key_env and not os.environ.get(entry.api_key_env):
            found.append(f"models.{name}: the variable {entry.api_key_env} is not set")
        if isinstance(entry, Weights) and is_path(entry.model) and not Path(entry.model).expanduser().exists():
            found.append(f"models.{name}: there are no weights at {entry.model}")
        elif isinstance(entry, Weights) and not is_path(entry.model):
            found.append(f"models.{name}: {entry.model} is a hub id; it is looked up when the run needs it")
        if isinstance(entry, Replay) and not Path(entry.path).exists():
            found.append(f"models.{name}: there is no file {entry.path}")
    return found


# -- parents and overrides ------------------------------------------------------------------------------------------


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
        raise RecipeError(f"{_place(('extends',), data, places, path)}: extends: {e}") from None
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
    path: list[str | int] = []
    here = data
    *parents, last = keys.split(".")
    for key in parents:
        step = _step(here, key, override)
        if isinstance(here, dict) and here.get(step) is None:
            here[step] = {}
        elif isinstance(here, list) and step == len(here):
            here.append({})
        here = here[step]
        path.append(step)
    step = _step(here, last, override)
    if isinstance(here, dict) and isinstance(here.get(step), dict) and isinstance(value, dict) and path != ["models"]:
        here[step] = {**here[step], **value}
    elif isinstance(here, list) and step == len(here):
        here.append(value)
    else:
        here[step] = value
    for stale in [p for p in places if p[: len(path) + 1] == (*path, step)]:
        del places[stale]
    places[(*path, step)] = (f"--set {keys}", 0)


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


# -- errors with file, line and nearest key -------------------------------------------------------------------------


def _problem(error: Any, data: Any, places: dict[Path_, Place], path: Path) -> str:
    """One pydantic error as a sentence with its place."""
    at = _yaml_path(error["loc"], data)
    where = _place(at, data, places, path)
    key = ".".join(str(part) for part in at) or "the recipe"
    if error["type"] == "extra_forbidden":
        known = sorted(_known_keys(error["loc"][:-1]))
        unknown = str(error["loc"][-1])
        near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}"
    if error["type"] == "union_tag_invalid":
        tags = re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])
        near = difflib.get_close_matches(str(error["ctx"]["tag"]), tags, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(tags)}"
        return f"{where}: {key}: there is no {str(error['ctx']['tag'])!r}; {hint}"
    if error["type"] == "missing":
        return f"{where}: {key} is missing"
    got = "" if isinstance(error.get("input"), dict | list) else f" (got {error.get('input')!r})"
    return f"{where}: {key}: {error['msg'].removeprefix('Value error, ')}{got}"


def _yaml_path(loc: tuple[str | int, ...], data: Any) -> Path_:
    """The error's path through our records as a path through the file: tags of unions are not keys there."""
    path: list[str | int] = []
    here = data
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(here, dict) and (part in here or last):
            path.append(part)
            here = here.get(str(part))
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(part)
            here = here[part]
    return tuple(path)


def _place(at: Path_, data: Any, places: dict[Path_, Place], path: Path) -> str:
    """`file:line` of a path, or of the nearest thing around it."""
    while at and at not in places:
        at = at[:-1]
    file, line = places.get(at, (str(path), 1))
    return f"{file}:{line}" if line else file


def _known_keys(loc: tuple[str | int, ...]) -> set[str]:
    """The keys that the record at `loc` has: walk the types along the error's own path."""
    here: set[type[Knobs]] = {Recipe}
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


# -- what no single record can know ----------------------------------------------------------------------------------


def _cross_check(recipe: Recipe) -> Iterator[tuple[Path_, str]]:
    """Names that refer to nothing, in file order; each with its place."""
    sets = {prompt_set.title for prompt_set in recipe.prompts}
    if len(sets) < len(recipe.prompts):
        yield ("prompts",), "two prompt lists have the same name; give one of them `name:`"
    made: set[str] = set()
    students: set[str] = set()
    for i, stage in enumerate(recipe.stages):
        at: Path_ = ("stages", i, stage.kind)
        for field, name in _models_named(stage):
            if name not in recipe.models and name not in students:
                yield (*at, field), f"there is no model {name!r}; {_nearest(name, {*recipe.models, *students})}"
        sources = stage.from_ if isinstance(stage.from_, list) else [stage.from_] if stage.from_ else []
        for name in sources:
            if name not in sets | made:
                yield (*at, "from"), f"there is no prompt list or earlier stage {name!r}; {_nearest(name, sets | made)}"
        if isinstance(stage, Generate) and stage.until and not _next_is_filter(recipe, i):
            yield (*at, "until"), "until needs a filter right behind this stage: it says which answers are accepted"
        if isinstance(stage, Choose) and stage.by == "logprob" and (silent := _tells_no_logprob(recipe, i)):
            yield (
                (*at, "by"),
                f"models.{silent} tells no log-probability; set logprobs: true in the generate stage above",
            )
        if isinstance(stage, Train):
            for problem in check_args(stage.method, stage.args):
                yield (*at, "args"), problem
            if stage.as_ in recipe.models or stage.as_ in students:
                yield (*at, "as"), f"the name {stage.as_!r} is taken; give this student another one with `as:`"
            students.add(stage.as_)
        elif stage.as_:
            if stage.as_ in made | sets:
                yield (*at, "as"), f"the name {stage.as_!r} is taken"
            made.add(stage.as_)


def _next_is_filter(recipe: Recipe, i: int) -> bool:
    return i + 1 < len(recipe.stages) and isinstance(recipe.stages[i + 1], Curate)


def _tells_no_logprob(recipe: Recipe, i: int) -> str | None:
    """A server that the last `generate` before stage `i` does not ask for log-probabilities; local models tell them."""
    asked = next((stage for stage in reversed(recipe.stages[:i]) if isinstance(stage, Generate)), None)
    if asked is None or asked.logprobs or asked.beam:
        return None
    return next((name for name in asked.models if isinstance(recipe.models.get(name), Endpoint | Vllm)), None)


def _models_named(stage: Stage) -> Iterator[tuple[str, str]]:
    match stage:
        case Generate():
            yield from (("model", name) for name in stage.models)
            if stage.fallback:
                yield "fallback", stage.fallback
        case Curate():
            yield from (("filters", f.model) for f in stage.filters if isinstance(f, Tokens) and f.model)
        case Judge():
            yield "model", stage.model
        case Train():
            yield "student", stage.student
        case Evaluate():
            yield from (("students", name) for name in stage.students)
            if stage.teacher:
                yield "teacher", stage.teacher


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none yet'}"
