"""`factory check`: everything that can be found wrong without a key, without weights and without the network.

With `--live`, and only then, each endpoint is asked a few tiny questions: who answers, and what it honours.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from factory.errors import FactoryError, OutageError, RecipeError
from factory.generate import Generate
from factory.judge import Judge
from factory.plan import plan
from factory.prompt_files import is_hub_id
from factory.prompts import lint, load
from factory.recipe import Recipe, find, warnings
from factory.rubric import load as load_rubric
from factory.teachers.anthropic import Anthropic
from factory.teachers.capabilities import LOCAL
from factory.teachers.entry import url_problem
from factory.teachers.failures import RULES
from factory.teachers.openai import OpenAI
from factory.teachers.probe import Probe, probe, record


def check(recipe: Recipe, runs: Path = Path("runs"), allow_http: bool = False) -> list[str]:
    """Warnings about this machine; RecipeError with all problems where the recipe cannot work anywhere."""
    problems = [*_refusals(recipe, runs, allow_http)]
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


def refuse(recipe: Recipe, runs: Path, allow_http: bool) -> None:
    """RecipeError for what no verb may start with; nothing was sent."""
    if problems := [*_refusals(recipe, runs, allow_http)]:
        raise RecipeError("\n".join(problems))


def _refusals(recipe: Recipe, runs: Path, allow_http: bool) -> Iterator[str]:
    """Keys and prompts sent in the open, and decoding that a model surely does not do."""
    for name, entry in recipe.models.items():
        for url in entry.urls():
            if problem := url_problem(url, allow_http):
                yield f"models.{name}: {problem}"
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, Generate):
            for name in stage.models:
                asked = recipe.models.get(name)  # a name that is no model there is a student, which answers here
                if why := (asked.abilities(runs) if asked else LOCAL).refusal(stage.sampling()):
                    hint = "" if asked is None else "; if it does by now, say so in its `capabilities:`"
                    yield f"stages.{i}.generate: models.{name}: {why}{hint}"


def live(recipe: Recipe, runs: Path) -> Iterator[str]:
    """Ask each endpoint of the recipe; lines for people, as they come. Raises at the end if one of them failed."""
    error: FactoryError | None = None
    for name, entry in recipe.models.items():
        if not isinstance(entry, OpenAI | Anthropic):
            yield f"models.{name}: {entry.type} is no endpoint with a key; nothing was sent"
            continue
        found = asyncio.run(probe(entry, runs))
        if found.failure is not None:
            yield f"models.{name}: {found.failure.reason}: {found.failure.detail}"
            kind = RULES[found.failure.reason].error or OutageError
            error = error or kind(f"models.{name} did not answer: {found.failure.reason}: {found.failure.detail}")
            continue
        record(runs, entry.identity(runs), found)
        yield from _lines(name, entry.model, found)
    if error is not None:
        raise error


def _lines(name: str, model: str, found: Probe) -> Iterator[str]:
    yield f"models.{name}: {model} answers as {found.model or '(no name)'} in {found.seconds:.2f} s; {found.sent} requests sent"
    if found.rate_limits is not None:
        for what, window in found.rate_limits._asdict().items():
            told = {"limit": window.limit, "left": window.remaining, "whole again in s": window.reset_s}
            if any(value is not None for value in told.values()):
                yield f"  {what}: " + ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
    known = found.capabilities
    for what, honoured in (("n", known.n), ("seed", known.seed), ("logprobs", known.logprobs)):
        yield f"  {what}: {'not known' if honoured is None else 'honoured' if honoured else 'not honoured'}"
    forms = "not known" if known.structured is None else ", ".join(known.structured) or "none"
    yield f"  response_format: {forms}"
    if known.limit:
        yield f"  limit: {known.limit}"
    if known.seed:
        yield "  to draw with seeds, say so in the recipe: capabilities: {seed: true}"
