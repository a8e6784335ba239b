"""`factory check`: everything that can be found wrong without a key, without weights and without the network.

With `--live`, and only then, each endpoint is asked a few tiny questions: who answers, and what it honours.
"""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from factory.cautions import cautions
from factory.curate import Curate
from factory.errors import FactoryError, OutageError, RecipeError
from factory.evaluate import Evaluate
from factory.filters.contamination import Contamination, items
from factory.foresight import foresee
from factory.generate import Generate
from factory.judge import Judge
from factory.mistakes import Problem
from factory.plan import draw
from factory.prompt_files import is_hub_id
from factory.prompts import PromptList, PromptLists, lint, load_one, together
from factory.recipe import Draft, Recipe
from factory.recipe_file import find
from factory.rubric import load as load_rubric
from factory.teachers import ModelEntry
from factory.teachers.anthropic import Anthropic
from factory.teachers.capabilities import LOCAL
from factory.teachers.entry import url_problem
from factory.teachers.failures import RULES
from factory.teachers.openai import OpenAI
from factory.teachers.probe import Probe, probe, record
from factory.win_rate import WinRate
from factory.yamlfile import Path_


class Checked(NamedTuple):
    """What `check` found to be odd, and the prompts that it read: all local ones, or all; and those of each arm."""

    warnings: list[str]
    prompts: PromptLists
    arms: dict[str, PromptLists]


def check(draft: Draft, runs: Path = Path("runs"), allow_http: bool = False, fetch: bool = False) -> Checked:
    """RecipeError with all problems, where the recipe cannot work anywhere; warnings about this machine.

    `fetch`: data sets on the hub are read, too.
    """
    if draft.recipe is None:
        draft.refuse()
    problems, found, prompts = _look(draft, runs, allow_http, fetch)
    of_arms: dict[str, list[Problem]] = {}
    lists: dict[str, PromptLists] = {}
    for name, arm in draft.arms.items():
        if arm.recipe is not None:
            same = _asks_the_same(arm, draft)
            of_arms[name], more, lists[name] = _look(arm, runs, allow_http, fetch, prompts if same else None)
            found += [f"arm {name}: {line}" for line in more if line not in found]
    draft.refuse(problems, of_arms)
    return Checked(found, prompts, lists)


def _asks_the_same(arm: Draft, draft: Draft) -> bool:
    """Whether an arm has the recipe's own prompts, split in the same way."""
    assert arm.recipe is not None
    assert draft.recipe is not None
    return (arm.recipe.prompts, arm.recipe.seed) == (draft.recipe.prompts, draft.recipe.seed)


def _look(
    draft: Draft, runs: Path, allow_http: bool, fetch: bool, read: PromptLists | None = None
) -> tuple[list[Problem], list[str], PromptLists]:
    """Problems with their paths in the file, oddities, and the prompts; `read` are those that are known already."""
    assert draft.recipe is not None, "looked at before"
    recipe, found = draft.recipe, cautions(draft.recipe)
    problems: list[Problem] = []
    if read is None:
        read, unread, odd = _prompts(draft, recipe, fetch)
        problems += unread
        found += odd
    problems += [*_refusals(recipe, runs, allow_http), *_unpriced(recipe, draft), *_files(recipe)]
    if not draft.lacks("stages") and not any("from" in at for at, _ in draft.problems):  # else the flow is not known
        steps, unfed = draw(recipe)
        problems += unfed
        findings = list(foresee(recipe, steps, read if not draft.lacks("prompts") else None))
        problems += [(one.at, one.text) for one in findings if one.fatal]
        found += [str(one) for one in findings if not one.fatal]
    return [(draft.at(at), text) for at, text in problems], found, read


def _prompts(draft: Draft, recipe: Recipe, fetch: bool) -> tuple[PromptLists, list[Problem], list[str]]:
    """The lists that can be read, the mistakes in the others, and what is odd about them."""
    problems: list[Problem] = []
    lists: list[PromptList] = []
    odd: list[str] = []
    for i, knobs in enumerate(() if ("prompts",) in draft.lost else recipe.prompts):
        if not fetch and is_hub_id(knobs.path, find):
            odd.append(f"prompts {knobs.title}: {knobs.path} is a hub id; it is read when the run needs it")
            continue
        try:
            lists.append(load_one(knobs, recipe.seed, find))
        except RecipeError as e:
            problems.append((("prompts", i, "path"), str(e)))
    prompts = together(lists)
    return prompts, problems, [*odd, *(f"prompts: {line}" for line in lint(prompts))]


def _files(recipe: Recipe) -> Iterator[Problem]:
    """Files that say what is asked and judged, and what must not be in the data."""
    for stage, at, _ in recipe.placed:
        if isinstance(stage, Curate):
            yield from ((((*at, *below), text)) for below, text in _benchmarks(stage))
        below: Path_ = ()
        try:
            match stage:
                case Generate():
                    below = ("ask",)
                    stage.ask.open(find)
                case Judge():
                    below = ("rubric",)
                    load_rubric(find(stage.rubric))
                case Evaluate(judge=WinRate() as judge):
                    below = ("judge", "rubric")
                    load_rubric(find(judge.rubric))
        except RecipeError as e:
            yield (*at, *below), str(e)


def _benchmarks(stage: Curate) -> Iterator[Problem]:
    """Benchmark files that cannot be read; those on the hub are read when the run needs them."""
    for k, one in enumerate(stage.filters):
        for j, benchmark in enumerate(one.against if isinstance(one, Contamination) else ()):
            try:
                if not is_hub_id(benchmark.path, find):
                    items(benchmark, find)
            except RecipeError as e:
                yield (k, one.kind, "against", j), str(e)


def _unpriced(recipe: Recipe, draft: Draft) -> Iterator[Problem]:
    """Models that a budget of money cannot be kept with; of one that is told of already, the price may be meant."""
    told = {at[:2] for at, _ in draft.problems}
    for name, entry in recipe.models.items():
        if recipe.budget.usd is not None and entry.billed and entry.price is None and ("models", name) not in told:
            yield (
                ("models", name),
                f"budget.usd is set, but models.{name} has no price; give price: {{input: 0, output: 0}} if it is free",
            )


def _refusals(recipe: Recipe, runs: Path, allow_http: bool) -> Iterator[Problem]:
    """Keys and prompts sent in the open, and decoding that a model surely does not do."""
    for name, entry in recipe.models.items():
        for url in entry.urls():
            if problem := url_problem(url, allow_http):
                yield ("models", name, "base_url"), f"models.{name}: {problem}"
    for stage, at, _ in recipe.placed:
        if isinstance(stage, Generate):
            for name in stage.models:
                asked = recipe.models.get(name)  # a name that is no model there is a student, which answers here
                if why := (asked.abilities(runs) if asked else LOCAL).refusal(stage.sampling()):
                    hint = "" if asked is None else "; if it does by now, say so in its `capabilities:`"
                    yield at, f"models.{name}: {why}{hint}"


def live(recipe: Recipe, runs: Path, arms: Mapping[str, Draft] = MappingProxyType({})) -> Iterator[str]:
    """Ask each endpoint of the recipe and its arms; lines for people, as they come. Raises at the end if one of them failed."""
    error: FactoryError | None = None
    for name, entry in _everybody(recipe, arms).items():
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


def _everybody(recipe: Recipe, arms: Mapping[str, Draft]) -> dict[str, ModelEntry]:
    """The models of the recipe, and those that are other ones in an arm."""
    found = dict(recipe.models)
    for name, arm in arms.items():
        its = arm.recipe.models if arm.recipe else {}
        found |= {f"{model} (arm {name})": entry for model, entry in its.items() if entry != found.get(model)}
    return found


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
