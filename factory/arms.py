"""Several runs in one process over one journal: a recipe and its arms, or recipes to be compared.

Answers that they share are asked for once, since the journal holds them; steps that are the same (by the hash in their
folders' names) are done once and linked into the other runs. After each run the comparison is written anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from factory.budget import Wall
from factory.compare import as_text, compare
from factory.errors import EngineError, FactoryError, NotReached, RecipeError, TooManyFailures
from factory.journal import Journal, Spent
from factory.pipeline import Work
from factory.plan import Until, plan
from factory.progress import say
from factory.prompts import PromptLists
from factory.recipe import Recipe

OWN = (RecipeError, TooManyFailures, EngineError)
"""What ends one arm; whatever else stops a run would stop the others too."""


class Arm(NamedTuple):
    """A recipe to run, with its prompts."""

    recipe: Recipe
    prompts: PromptLists


class Ended(NamedTuple):
    """The comparison for people, and what the command has to end with."""

    text: str
    error: FactoryError | None


def run(
    arms: Sequence[Arm], runs: Path, until: Until = "run", max_failed: float = 0.02, retry_failed: bool = False,
    wait: float | None = None, allow_code: bool = False, one_wall: bool = True,
) -> Ended:  # fmt: skip
    """Do what is still to be done of each, and compare them with the first, which must be finished.

    `one_wall`: they are a recipe and its arms, so the budget of the first holds for all together, and what it requires is
    required of the first alone. An arm that cannot be finished does not keep the others from being run.
    """
    plans = [plan(arm.recipe, until) for arm in arms]
    names = [arm.recipe.name for arm in arms]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise RecipeError(
            f"two recipes are called {twice[0]!r}, and would share one run folder; give one another `name`"
        )
    folders = [runs / name for name in names]
    errors: list[FactoryError] = []
    with Journal(runs / "journal.sqlite") as journal:
        wall = Wall(arms[0].recipe.budget, _together([journal.spent(name) for name in names]))
        for i, (arm, steps) in enumerate(zip(arms, plans, strict=True)):
            say(f"== {names[i]}")
            own = wall if one_wall else Wall(arm.recipe.budget, journal.spent(names[i]))
            work = Work(
                arm.recipe, arm.prompts, runs, journal, own, max_failed, retry_failed, wait, allow_code, folders[:i]
            )
            try:
                work.run(steps)
            except NotReached as e:
                if i == 0 or not one_wall:  # an arm is there to be compared, not to pass
                    errors.append(e)
            except OWN as e:
                if i == 0 and not work.finished:
                    raise
                say(f"{names[i]}: {e}")
                errors.append(e)
            told = compare(folders[: i + 1], allow_code)
    errors.sort(key=lambda e: isinstance(e, NotReached))
    return Ended(as_text(told), errors[0] if errors else None)


def _together(spent: list[Spent]) -> Spent:
    return Spent(*(sum(column) for column in zip(*spent, strict=True)))
