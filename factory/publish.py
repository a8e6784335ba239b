"""The end of a run: from its steps' folders to `dataset/`, which loads as it is.

Training steps say what is published, a config for each; where nothing trains, it is the last rows or pairs.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from factory import dataset
from factory.curate import Curate, accepts, row_filters
from factory.evaluate import Evaluate
from factory.generate import given
from factory.models import Models
from factory.pair import PairUp
from factory.plan import Step
from factory.prompts import PromptLists
from factory.recipe import Recipe
from factory.rows import Pair, Sample, TrainRow, Unpaired, by_prompt
from factory.run import StageFolder
from factory.shape import Shape, shape
from factory.train import Train

Made = dict[int, StageFolder]
"""The folders of the steps, by the steps' numbers."""


def publish(
    recipe: Recipe, prompts: PromptLists, models: Models, steps: list[Step], made: Made, folder: Path
) -> dict[str, dict[str, int]]:
    """Write the data set to `folder`; returns the number of rows of each config's splits."""
    sources = [(str(step.knobs.as_), step.reads) for step in steps if isinstance(step.knobs, Train)]
    last = [step for step in steps if isinstance(step.knobs, Shape | PairUp)]
    if last and not any(last[-1].number in reads for _, reads in sources):
        sources.append((last[-1].knobs.as_ or "default", (last[-1].number,)))
    configs = []
    for name, reads in sources:
        kind = _kind(steps[reads[0] - 1])
        has_test = kind is TrainRow
        test = partial(_test_rows, recipe, prompts, models, steps, made) if has_test else lambda: iter(())
        train = partial(_rows, [made[number] for number in reads], kind)
        configs.append(dataset.Config(name=name, train=train, test=test))
    return dataset.write(folder, name=recipe.name, configs=configs, card=_card(recipe, prompts, steps, made))


def _kind(step: Step) -> type[TrainRow] | type[Pair] | type[Unpaired]:
    """The rows that a step has made."""
    if not isinstance(step.knobs, PairUp):
        return TrainRow
    return Unpaired if step.knobs.form == "kto" else Pair


def _rows(folders: list[StageFolder], kind: Any) -> Iterator[Any]:
    return chain.from_iterable(folder.rows(kind) for folder in folders)


def _test_rows(
    recipe: Recipe, prompts: PromptLists, models: Models, steps: list[Step], made: Made
) -> Iterator[TrainRow]:
    """Held-out prompts with the teacher's accepted answers, or with those that came with their rows."""
    evaluated = [(s.number, s.knobs.teacher) for s in steps if isinstance(s.knobs, Evaluate) and s.knobs.teacher]
    if evaluated:
        number, teacher = evaluated[0]
        answers = (sample for sample in made[number].rows(Sample) if sample.model == teacher)
    else:
        filters = row_filters(recipe.stages, models)
        held_out = chain.from_iterable(prompts.test(one.title) for one in recipe.prompts)
        answers = (sample for sample in given(held_out) if accepts(filters, sample) is None)
    shaped = chain.from_iterable(shape(recipe.view().measured, by_prompt(answers)))
    yield from (row for row in shaped if isinstance(row, TrainRow))


def _card(recipe: Recipe, prompts: PromptLists, steps: list[Step], made: Made) -> dict[str, Any]:
    """The facts that the data set's card is made of; nothing that changes from run to run: what it cost is in the report."""
    terms = {name: {"model": getattr(e, "model", name), "terms": e.terms} for name, e in recipe.models.items()}
    checks = [(step, one) for step in steps if isinstance(step.knobs, Curate) for one in step.knobs.filters]
    return {
        "recipe": recipe.name,
        "lists": [to_builtins(told) for told in prompts.funnel],
        "funnel": [made[step.number].manifest for step in steps],
        "teachers": terms,
        "prompts": [{"name": one.title, "path": one.path, "licence": one.licence} for one in recipe.prompts],
        "decontamination": [
            {
                "stage": step.title,
                "knobs": one.model_dump(mode="json"),
                "reasons": made[step.number].manifest["reasons"],
            }
            for step, one in checks
            if one.kind == "contamination"
        ],
    }
