"""What a plan cannot come to, told before anything is sent: stages that give no row, whatever is answered.

Followed step by step are the scores that rows carry, the prompt lists that they come from, and how many answers a prompt
can have at most. Only what is certain is told.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from factory.choose import Choose, Quota
from factory.curate import Curate
from factory.errors import RecipeError
from factory.evaluate import Evaluate
from factory.filters.verifier import Verifier
from factory.generate import Generate, Given
from factory.judge import Judge
from factory.mistakes import nearest
from factory.pair import PairUp
from factory.plan import Step
from factory.prompts import PromptLists
from factory.recipe import Recipe, scores_named
from factory.recipe_file import find
from factory.rubric import Rubric
from factory.rubric import load as load_rubric
from factory.score import Score
from factory.shape import Shape
from factory.teachers.reference import Reference
from factory.train import Train
from factory.ways import unfit
from factory.yamlfile import Path_


class Finding(NamedTuple):
    """`fatal`: no row can come of it; else it only does nothing. The path is one in the recipe."""

    at: Path_
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.at))}: {self.text}"


class _Flow(NamedTuple):
    """What is known of the rows behind a step. `scores` is None where a rubric cannot be read; `most` is per prompt."""

    scores: frozenset[str] | None
    sets: frozenset[str]
    most: float


def foresee(recipe: Recipe, steps: list[Step], prompts: PromptLists | None) -> Iterator[Finding]:
    """Findings in the order of the steps; what rows bring with them is not looked at where `prompts` is None."""
    flows: dict[int, _Flow] = {}
    for step in steps:
        before = _join([flows[number] for number in step.reads])
        for finding in _of_step(recipe, step, before, steps, prompts):
            yield finding._replace(at=(*_path(recipe, step), *finding.at))
        flows[step.number] = _behind(step, before, prompts)


def _path(recipe: Recipe, step: Step) -> Path_:
    at = recipe.place_of(step.knobs)
    return () if at is None else recipe.placed[at].at


def _join(flows: list[_Flow]) -> _Flow:
    known = [flow.scores for flow in flows if flow.scores is not None]
    scores = frozenset().union(*known) if len(known) == len(flows) else None
    return _Flow(scores, frozenset().union(*(flow.sets for flow in flows)), sum(flow.most for flow in flows))


def _behind(step: Step, before: _Flow, prompts: PromptLists | None) -> _Flow:
    match step.knobs:
        case Given():
            lists = [prompts.by_name.get(name) if prompts else None for name in step.sets]
            brought = None if None in lists else frozenset().union(*(one.scores for one in lists if one))
            return _Flow(brought, frozenset(step.sets), math.inf)
        case Generate() as knobs:
            askers = 1 if isinstance(knobs.model, dict) else len(knobs.models)
            return _Flow(frozenset({"logprob"}), before.sets.union(step.sets), askers * knobs.draws)
        case Judge() as knobs:
            if before.scores is None or (names := _score_names(knobs)) is None:
                return before._replace(scores=None)
            return before._replace(scores=before.scores | names)
        case Score() as knobs if before.scores is not None:
            return before._replace(scores=before.scores | {knobs.name})
        case Choose(per="prompt") as knobs:
            return before._replace(most=min(before.most, knobs.best or knobs.cap or math.inf))
        case _:
            return before


def _score_names(knobs: Judge) -> frozenset[str] | None:
    """The score, and those of its aspects."""
    if (rubric := _rubric(knobs)) is None:
        return None
    name, aspects = knobs.as_ or rubric.head.name, rubric.head.aspects
    return frozenset([name, *(f"{name}.{aspect}" for aspect in aspects if knobs.how != "pairwise")])


def _rubric(knobs: Judge) -> Rubric | None:
    """None where it cannot be read, which is another problem."""
    try:
        return load_rubric(find(knobs.rubric))
    except RecipeError:
        return None


def _of_step(
    recipe: Recipe, step: Step, before: _Flow, steps: list[Step], prompts: PromptLists | None
) -> Iterator[Finding]:
    for at, name in scores_named(step.knobs):
        if before.scores is not None and name not in before.scores:
            yield Finding(at, f"nothing before it gives the score {name!r}; {nearest(name, before.scores)}")
    match step.knobs:
        case Generate() as knobs:
            sets = before.sets.union(step.sets)
            known = all(isinstance(recipe.models.get(name), Reference) for name in knobs.models)
            if known and not any(_any_brings(what, sets, prompts) for what in ("references", "answers")):
                yield Finding(("model",), f"no prompt of {_of(sets)} has a `reference` that could be the answer")
        case Judge() as knobs if (rubric := _rubric(knobs)) and (why := unfit(rubric, knobs.how)):
            yield Finding(("rubric",), f"{knobs.rubric}: {why}")
        case Given() if not _any_brings("answers", step.sets, prompts):
            if not any(isinstance(other.knobs, Evaluate) for other in steps):  # measuring alone needs none
                text = f"no row of {_of(step.sets)} brings an answer, and no `generate` asks for one before it is used"
                yield Finding(("prompts",), text)
        case Choose(quota=Quota(by="source", most=dict(most))) if unknown := [n for n in most if n not in before.sets]:
            text = f"no rows of a prompt list {unknown[0]!r} get here; {nearest(unknown[0], before.sets)}"
            yield Finding(("quota", "most"), text)
        case Choose(by="closest_to_reference") if not _any_brings("references", before.sets, prompts):
            yield Finding(("by",), f"closest_to_reference: no prompt of {_of(before.sets)} has a `reference`")
        case Score(by="verdict") if not _any_brings("references", before.sets, prompts):
            yield Finding(("of",), f"no prompt of {_of(before.sets)} has a `reference`, so no answer gets a verdict")
        case Curate() as knobs:
            for i, one in enumerate(knobs.filters):
                if isinstance(one, Verifier) and not _any_brings("references", before.sets, prompts):
                    text = f"{one.kind} keeps everything: no prompt of {_of(before.sets)} has a `reference`"
                    yield Finding((i,), text, fatal=False)
        case Shape() as knobs if "truth" in knobs.tasks and not _any_brings("references", before.sets, prompts):
            yield Finding(("tasks",), f"truth: no prompt of {_of(before.sets)} has a `reference`")
        case PairUp() as knobs:
            yield from _paired(knobs, before)
        case Train() as knobs if knobs.method != "sft":
            shapes = [steps[number - 1].knobs for number in step.reads]
            if any(isinstance(one, Shape) and set(one.weights.values()) != {1.0} for one in shapes):
                text = f"{knobs.method} counts all rows alike; the weights of `shape` are for sft"
                yield Finding((), text, fatal=False)


def _paired(knobs: PairUp, before: _Flow) -> Iterator[Finding]:
    if before.most < 2 and knobs.form == "pairs":
        yield Finding(
            (), "a pair needs two answers to a prompt, and at most one gets here; ask several models, or raise n"
        )
    if knobs.score is not None or before.scores is None:
        return
    judged = sorted(name for name in before.scores - {"logprob"} if "." not in name)  # else an aspect's
    if not judged:
        yield Finding((), "nothing before it scores the answers; put a `judge` stage there, or say `score: logprob`")
    elif len(judged) > 1:
        yield Finding((), f"the answers have several scores ({', '.join(judged)}); name one: pair: {{score: ...}}")


def _any_brings(what: str, sets: Iterable[str], prompts: PromptLists | None) -> bool:
    """Whether a prompt of these lists has `references` or `answers`; of a list that was not read it may be so."""
    lists = prompts.by_name if prompts is not None else {}
    return any(name not in lists or getattr(lists[name], what) for name in sets)


def _of(sets: frozenset[str] | tuple[str, ...]) -> str:
    return ", ".join(sorted(sets))
