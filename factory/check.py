"""`factory check`: everything that can be found wrong without a key, without weights and without the network."""

from factory.errors import RecipeError
from factory.generate import Generate
from factory.judge import Judge
from factory.plan import plan
from factory.prompt_files import is_hub_id
from factory.prompts import lint, load
from factory.recipe import Recipe, find, warnings
from factory.rubric import load as load_rubric


def check(recipe: Recipe) -> list[str]:
    """Warnings about this machine; RecipeError with all problems where the recipe cannot work anywhere."""
    problems: list[str] = []
    found = warnings(recipe)
    try:
        plan(recipe)
    except RecipeError as e:
        problems.append(str(e))
    for stage in recipe.stages:
        try:
            if isinstance(stage, Generate):
                stage.ask.open(find)
            elif isinstance(stage, Judge):
                load_rubric(find(stage.rubric))
        except RecipeError as e:
            problems.append(f"{stage.kind}: {e}")
    local = [prompt_set for prompt_set in recipe.prompts if not is_hub_id(prompt_set.path, find)]
    found += [
        f"prompts {s.title}: {s.path} is a hub id; it is read when the run needs it"
        for s in recipe.prompts
        if s not in local
    ]
    if local:
        try:
            found += [f"prompts: {line}" for line in lint(load(local, recipe.seed, find))]
        except RecipeError as e:
            problems.append(str(e))
    if recipe.budget.usd is not None:
        problems += [
            f"budget.usd is set, but models.{name} has no price; give price: {{input: 0, output: 0}} if it is free"
            for name, entry in recipe.models.items()
            if entry.billed and entry.price is None
        ]
    if problems:
        raise RecipeError("\n".join(problems))
    return found
