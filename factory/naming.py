"""The name of a step's folder: a hash of everything that decides what will be in it.

Same name, same content: a folder that is there is not made again, and a changed knob, input, file or model makes
another one, from that step on.
"""

from collections.abc import Iterator
from pathlib import Path

from factory.canaries import FILE as CANARIES
from factory.curate import Curate
from factory.evaluate import Evaluate
from factory.filters.rules import Tokens
from factory.filters.semantic import SemanticDuplicates
from factory.generate import Generate
from factory.judge import Judge
from factory.models import Models
from factory.pair import PairUp
from factory.plan import Step
from factory.prompt_files import content, is_hub_id
from factory.prompts import PromptLists
from factory.recipe import Recipe
from factory.recipe_file import find
from factory.rows import digest
from factory.run import StageFolder
from factory.score import Score
from factory.stages import Stage
from factory.train import Train

VERSIONS = {
    "prompts": 1, "generate": 1, "given": 3, "filter": 4, "judge": 3, "score": 1, "choose": 2, "shape": 3,
    "pair": 3, "train": 2, "evaluate": 2,
}  # fmt: skip
"""Raised when a stage's code changes what it makes, so that an old folder is not taken for a new one."""

Made = dict[int, StageFolder]
"""The folders of earlier steps, by the steps' numbers."""


class Naming:
    """Names the step folders of one run: the first of `runs`; a step that is complete in another of them is found there."""

    def __init__(self, recipe: Recipe, prompts: PromptLists, models: Models, runs: list[Path]) -> None:
        self.recipe, self.prompts, self.models, self.runs = recipe, prompts, models, runs

    def place(self, step: Step, made: Made) -> StageFolder:
        """Where a step's result is, or will be. It is named by what the steps it reads have kept, not by how."""
        kind = step.knobs.kind
        names = {"from_"} if isinstance(step.knobs, Judge | Score) else {"from_", "as_"}  # the name of a score
        if isinstance(step.knobs, Train) and isinstance(step.knobs.from_, dict):
            names.remove("from_")  # it has weights
        names |= {"require"} if isinstance(step.knobs, Evaluate) else set()  # limits change nothing that is measured
        named = digest(
            kind, VERSIONS[kind], step.knobs.model_dump(mode="json", exclude=names),
            [made[number].manifest["content"] for number in step.reads],
            [self.prompts.digest(name) for name in step.sets],
            [self.models.identity(name) for name in self.asked(step)],
            [digest(content(find(path))) for path in _files(step) if not is_hub_id(path, find)],
            [stage.model_dump(mode="json") for stage in self._also_read(step)],
            self.recipe.seed, size=4,
        )  # fmt: skip
        places = [StageFolder(run / f"{step.title}-{named}") for run in self.runs]
        return next((place for place in places if place.complete), places[0])

    def needed(self, steps: list[Step]) -> list[str]:
        """The recipe's models that steps still to do will ask. Behind a student that is not trained, no place is known."""
        students = self.recipe.trained()
        done: Made = {}
        needed: list[str] = []
        for step in steps:
            names = self.asked(step)
            if done.keys() >= set(step.reads) and not set(names) & students.keys() - self.models.trained:
                folder = self.place(step, done)
                if folder.complete:
                    done[step.number] = folder
            if step.number not in done:
                needed += [name for name in names if name not in students]
            elif isinstance(step.knobs, Train):
                self.models.add_student(step.knobs.as_, done[step.number].path / "model")
        return list(dict.fromkeys(needed))

    def asked(self, step: Step) -> list[str]:
        """The models that a step asks, trains, or takes a tokenizer from."""
        match step.knobs:
            case Generate() as knobs:
                return [*knobs.models, *([knobs.fallback] if knobs.fallback else [])]
            case Judge() as knobs:
                return [knobs.model]
            case Score(model=str(name)):
                return [name]
            case Train() as knobs:
                return [knobs.student, *([knobs.teacher] if knobs.teacher else [])]
            case Evaluate() as knobs:
                judge = knobs.judge.model if knobs.judge else None
                return [*knobs.students, *filter(None, (knobs.teacher, knobs.gold, judge))]
            case Curate() as knobs:
                counting = [f.model or self.models.default_student for f in knobs.filters if isinstance(f, Tokens)]
                return [*counting, *(f.model for f in knobs.filters if isinstance(f, SemanticDuplicates))]
            case _:
                return []

    def accepting(self, step: Step) -> list[Curate]:
        """The `filter` stages right behind a `generate`: what an accepted answer is."""
        at = self.recipe.place_of(step.knobs)
        assert at is not None, "a generate stage is always written"
        return self.recipe.filters_behind(at)

    def _also_read(self, step: Step) -> Iterator[Stage]:
        """Other stages whose knobs decide what a step makes: how answers are asked for, accepted, and seen."""
        if isinstance(step.knobs, Generate) and (step.knobs.until or step.knobs.want):
            yield from self.accepting(step)
        if isinstance(step.knobs, Evaluate | PairUp):
            yield self.recipe.view()
        if isinstance(step.knobs, Evaluate):
            yield from (stage for stage in self.recipe.stages if isinstance(stage, Curate))
            if taught := self.recipe.taught(step.knobs.teacher):
                yield taught


def _files(step: Step) -> list[str]:
    """Files whose content is part of what a step does: asking messages, rubrics, benchmarks."""
    match step.knobs:
        case Curate() as knobs:
            return [path for one in knobs.filters for path in one.files()]
        case Judge() as knobs:
            labels = [knobs.gold.path] if knobs.gold and knobs.gold.path else []
            return [knobs.rubric, *labels, *([CANARIES] if knobs.canaries else [])]
        case Evaluate(judge=judge, lm_eval=tasks):
            return [*([judge.rubric] if judge else []), *(tasks.files() if tasks else [])]
        case Generate() as knobs if path := getattr(knobs.ask, "path", None):
            return [path]
        case _:
            return []
