"""What `check` says of a recipe that is right as it is: what would stop it on this machine, and what may mislead."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from factory.evaluate import Evaluate
from factory.filters.code import Code
from factory.generate import Generate
from factory.judge import Judge
from factory.recipe import Recipe
from factory.teachers import ModelEntry
from factory.teachers.entry import Endpoint
from factory.teachers.replay import Replay
from factory.teachers.transformers import Transformers
from factory.weights import Weights, is_path, lacking_packages


def cautions(recipe: Recipe) -> list[str]:
    """What would stop `run` here and now, but is no fault of the recipe: keys, weights, hub ids."""
    found = []
    for name, entry in recipe.models.items():
        if isinstance(entry, Endpoint) and entry.api_key_env and not os.environ.get(entry.api_key_env):
            found.append(f"models.{name}: the variable {entry.api_key_env} is not set")
        if isinstance(entry, Weights) and is_path(entry.model) and not Path(entry.model).expanduser().exists():
            found.append(f"models.{name}: there are no weights at {entry.model}")
        elif isinstance(entry, Weights) and not is_path(entry.model):
            found.append(f"models.{name}: {entry.model} is a hub id; it is looked up when the run needs it")
        if isinstance(entry, Transformers) and (missing := lacking_packages()):
            found.append(f"models.{name}: {missing}")
        if isinstance(entry, Replay) and not Path(entry.path).exists():
            found.append(f"models.{name}: there is no file {entry.path}")
    if any(isinstance(one, Code) for one in recipe.verifiers()):
        found.append(
            "the filter code runs programs that models wrote on this machine: `factory run` needs --allow-code"
        )
    return [*found, *_asked_twice(recipe), *_own_judges(recipe)]


def _asked_twice(recipe: Recipe) -> Iterator[str]:
    """Two names of one model that both answer: equal requests have one answer."""
    for stage in recipe.stages:
        names = stage.models if isinstance(stage, Generate) else []
        for name, other in itertools.combinations([n for n in names if n in recipe.models], 2):
            if _alike(recipe.models[other], recipe.models[name]):
                yield f"models.{other} is models.{name} under another name: every answer comes twice"


def _own_judges(recipe: Recipe) -> Iterator[str]:
    """Judges that may grade answers of their own: models favour these (Panickssery et al., arXiv 2404.13076)."""
    asked = dict.fromkeys(name for stage in recipe.stages if isinstance(stage, Generate) for name in stage.models)
    for stage, at, _ in recipe.placed:
        judge = stage if isinstance(stage, Judge) else stage.judge if isinstance(stage, Evaluate) else None
        if judge:
            mine = recipe.models.get(judge.model)
            others = stage.students if isinstance(stage, Evaluate) else []
            same = [
                name
                for name in dict.fromkeys([*asked, *others])
                if name == judge.model or (mine is not None and _alike(recipe.models.get(name), mine))
            ]
            if same:
                told = f"{judge.model!r} is the same model as {', '.join(map(repr, same))}, whose answers the recipe asks for"
                yield f"{'.'.join(map(str, at))}: {told}: judges favour their own answers; take another one"


def _alike(one: ModelEntry | None, other: ModelEntry) -> bool:
    """The same model under two names."""
    keys = ("type", "model", "base_url", "layers", "config_overrides")
    return one is not None and all(getattr(one, key, None) == getattr(other, key, None) for key in keys)
