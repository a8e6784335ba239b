"""`factory preview`: what each training of a recipe would learn of its rows, token by token, before it starts.

The rows are those of the last run, as far as it came; without any, prompts with their references or with words that
stand for an answer: whether template and student fit can be told before anything is asked.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from factory.child import child_environment
from factory.errors import RecipeError
from factory.plan import Step, plan
from factory.prompts import PromptLists
from factory.recipe import Recipe
from factory.rows import Pair, Prompt, TrainRow, encode
from factory.run import StageFolder
from factory.shape import student_view
from factory.train import METHODS, Train
from factory.weights import Weights

LOOKED_AT = 200
SHOWN = 3
STANDS_FOR = "Words that stand for an answer."


def preview(recipe: Recipe, runs: Path, prompts: PromptLists) -> Iterator[str]:
    """Lines for people; RecipeError where a training would refuse its rows."""
    steps = plan(recipe)
    trainings = [step for step in steps if isinstance(step.knobs, Train)]
    if not trainings:
        raise RecipeError(f"{recipe.name} has no train stage; a preview shows what a training would learn")
    for step in trainings:
        rows = list(islice(_made(runs / recipe.name, step), LOOKED_AT))
        whose = "of the last run" if rows else "made up of the prompts: nothing is asked yet"
        rows = rows or list(islice(_made_up(recipe, step, prompts), LOOKED_AT))
        yield from _told(recipe, step, runs, rows, whose)


def _made(run: Path, step: Step) -> Iterator[dict[str, Any]]:
    """Rows that the last run has made for a training."""
    manifest = run / "manifest.json"
    stages = json.loads(manifest.read_bytes())["stages"] if manifest.is_file() else []
    for number in step.reads:
        for name in stages:
            if name.startswith(f"{number:02}-"):
                yield from (json.loads(line) for shard in StageFolder(run / name).shards() for line in shard.open("rb"))


def _made_up(recipe: Recipe, step: Step, prompts: PromptLists) -> Iterator[dict[str, Any]]:
    def said(text: str) -> list[Any]:
        return [{"role": "assistant", "content": text}]

    def row(prompt: Prompt) -> TrainRow | Pair:
        view, answer = student_view(recipe.view(), prompt), prompt.reference or prompt.completion or STANDS_FOR
        if "pairs" in METHODS[step.knobs.method].reads:  # type: ignore[union-attr]
            return Pair(id=prompt.id, prompt=view, chosen=said(answer), rejected=said(f"Not: {answer}"))
        return TrainRow(id=prompt.id, prompt=view, completion=said(answer))

    every = chain.from_iterable(prompts.train(one.name) for one in prompts)
    yield from (json.loads(encode(row(prompt))) for prompt in every)


def _told(recipe: Recipe, step: Step, runs: Path, rows: list[dict[str, Any]], whose: str) -> Iterator[str]:
    knobs = step.knobs
    assert isinstance(knobs, Train)
    found = _look(knobs, _start(recipe, knobs), runs, rows)
    if "refused" in found:
        raise RecipeError(f"{step.title}: {found['refused']}")
    gigabytes = f"{found['bytes'] / 2**30:.1f} GiB for weights, gradients and optimizer"
    yield f"{step.title} ({knobs.method}, {len(rows)} rows looked at, {whose}): {len(found['aside'])} set aside, {gigabytes}"
    yield from (f"  set aside: {one['id']} {one['reason']}" for one in found["aside"][:SHOWN])
    for tokens in found["rows"][:SHOWN]:
        yield ""
        for what, which in (("seen   ", 0), ("learned", 1)):
            yield f"  {what} {'│'.join(_visible(text) for text, in_loss in tokens if in_loss == which)}"


def _visible(token: str) -> str:
    """A token as its tokenizer writes it, byte-level blanks and line ends as people know them."""
    return token.replace("Ġ", "·").replace("Ċ", "⏎").replace("▁", "·")


def _start(recipe: Recipe, knobs: Train) -> Weights:
    """The model of the recipe that a student descends from: all that it shares with it is looked at."""
    trained, name = recipe.trained(), knobs.student
    while name in trained:
        name = trained[name].student
    entry = recipe.models[name]
    assert isinstance(entry, Weights), "a recipe that trains something else is refused"
    return entry


def _look(knobs: Train, start: Weights, runs: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the child finds; it loads a tokenizer and a model's shape, no weights."""
    job = {
        "weights": start.alone(), "cache": str((runs / "weights").resolve()), "args": knobs.args, "rows": rows,
        "lora": knobs.lora.model_dump() if knobs.lora else None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="factory-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-m", "factory.trainers.preview", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    if done.returncode != 0:
        raise RecipeError(f"the rows cannot be looked at: {' | '.join(done.stderr.splitlines()[-3:])}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
