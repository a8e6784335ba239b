"""From a recipe's stages to steps: which earlier result each one reads, and the steps that go without saying.

Without `from`, a stage reads the nearest earlier stage that makes what it needs. Two steps need not be written: the
answers that came with the prompts (`given`), where nothing generates any, and `shape`, between samples and training.
"""

from typing import Literal, NamedTuple

from factory.choose import Choose
from factory.curate import Curate
from factory.errors import RecipeError
from factory.evaluate import Evaluate
from factory.generate import Generate, Given
from factory.judge import Judge
from factory.mistakes import Problem
from factory.pair import PairUp
from factory.recipe import Recipe
from factory.score import Score
from factory.shape import Shape
from factory.stages import Repeat, Round, Stage
from factory.train import METHODS, Train
from factory.yamlfile import Path_

Until = Literal["build", "train", "eval", "run"]
Made = Literal["samples", "rows", "pairs", "unpaired rows"]

MAKES: dict[type, Made] = {
    Generate: "samples", Given: "samples", Curate: "samples", Judge: "samples", Score: "samples", Choose: "samples",
    Shape: "rows", PairUp: "pairs",
}  # fmt: skip


class Step(NamedTuple):
    """One stage to do. `reads` are numbers of earlier steps; `sets` are names of prompt lists; `round` of its loop, if any."""

    number: int
    knobs: Stage | Given
    reads: tuple[int, ...]
    sets: tuple[str, ...]
    round: Round | None = None

    @property
    def title(self) -> str:
        return f"{self.number:02}-{self.knobs.as_ or self.knobs.kind}"


def plan(recipe: Recipe, until: Until = "run") -> list[Step]:
    """The steps of a run in order; RecipeError where a stage finds nothing to read."""
    steps, problems = draw(recipe, until)
    if problems:
        raise RecipeError("\n".join(f"{'.'.join(map(str, at))}: {text}" for at, text in problems))
    return steps


def draw(recipe: Recipe, until: Until = "run") -> tuple[list[Step], list[Problem]]:
    """The same, as far as it goes, with the stages that find nothing to read."""
    drawing = _Drawing(recipe)
    for stage, at, of_round in recipe.placed[: _wanted(recipe, until)]:
        drawing.round = of_round
        drawing.add(stage, at)
    drawing.round = None
    coming = recipe.stages[len(drawing.done) :] if until == "build" else []
    if not drawing.trained and not (coming and isinstance(coming[0], Train) and coming[0].from_):
        drawing.finish()
    return drawing.steps, drawing.problems


def _wanted(recipe: Recipe, until: Until) -> int:
    """How many stages: `build` ends before the first train, `train` after the last, `eval` after the last evaluate."""
    stages: list[Stage] = recipe.stages
    last: type[Stage] = Evaluate if until == "eval" else Train
    ends = [i for i, stage in enumerate(stages) if isinstance(stage, last)]
    if until in ("train", "eval") and not ends:
        article, kind = ("an", "evaluate") if until == "eval" else ("a", "train")
        raise RecipeError(
            f"{recipe.name} has no {kind} stage; put {article} {kind} stage into it, or use `factory build`"
        )
    if until == "run" or not ends:
        return len(stages)
    return ends[0] if until == "build" else ends[-1] + 1


class _Drawing:
    def __init__(self, recipe: Recipe) -> None:
        self.steps: list[Step] = []
        self.done: list[Stage] = []
        self.problems: list[Problem] = []
        self.round: Round | None = None
        self.trained = False
        self._all_sets = tuple(prompt_set.title for prompt_set in recipe.prompts)
        dev = {one.until.split for one in recipe.written if isinstance(one, Repeat) and one.until}
        self._test_sets = tuple(name for name in self._all_sets if name not in dev)  # what decided is no test any more
        self._named: dict[str, int] = {}
        self._made: dict[int, Made] = {}

    def add(self, stage: Stage, at: Path_) -> None:
        named = [stage.from_] if isinstance(stage.from_, str) else stage.from_ or []
        sets = tuple(name for name in named if name in self._all_sets)
        reads = tuple(self._named[name] for name in named if name in self._named)
        match stage:
            case Generate():
                self._put(stage, reads, sets or (() if reads else self._all_sets))
            case Evaluate():
                self._put(stage, (), sets or self._test_sets)
            case Train():
                self._add_train(stage, reads, at)
            case _:
                if sets or not (reads or self._latest("samples")):
                    reads = (*reads, self._put(Given(), (), sets or self._all_sets))
                self._put(stage, reads or self._latest("samples"), ())
        self.done.append(stage)

    def _add_train(self, stage: Train, reads: tuple[int, ...], at: Path_) -> None:
        wanted: tuple[Made, ...] = METHODS[stage.method].reads
        of_rows = "rows" in wanted
        if not reads:
            reads = self._latest("samples", "rows") if of_rows else self._latest(*wanted)
        if isinstance(stage.from_, dict) and len(reads) < len(stage.from_):
            self.problems.append(((*at, "from"), "weights are for the rows of earlier stages, not for prompt lists"))
            return
        if not reads and of_rows:
            reads = (self._put(Given(), (), self._all_sets),)
        if not reads:
            self.problems.append((at, f"nothing before it makes {wanted[0]}; put a `pair` stage there"))
        elif of_rows and all(self._made[number] == "samples" for number in reads):
            apart = [(number,) for number in reads] if isinstance(stage.from_, dict) else [reads]
            reads = tuple(self._put(Shape(), one, ()) for one in apart)
        if wrong := [n for n in reads if self._made[n] not in wanted]:
            self.problems.append((at, f"{stage.method} trains on {wanted[0]}, but reads {self._made[wrong[0]]}"))
        self._put(stage, reads, ())
        self.trained = True

    def finish(self) -> None:
        """A data set wants training rows: shape the last samples, unless pairs or rows came last."""
        last = self._latest("samples", "rows", "pairs", "unpaired rows") or (self._put(Given(), (), self._all_sets),)
        if self._made[last[-1]] == "samples":
            self._put(Shape(), last, ())

    def _latest(self, *wanted: Made) -> tuple[int, ...]:
        numbers = [step.number for step in self.steps if self._made.get(step.number) in wanted]
        return (numbers[-1],) if numbers else ()

    def _put(self, knobs: Stage | Given, reads: tuple[int, ...], sets: tuple[str, ...]) -> int:
        number = len(self.steps) + 1
        self.steps.append(Step(number, knobs, reads, sets, self.round))
        if type(knobs) in MAKES:
            kto = isinstance(knobs, PairUp) and knobs.form == "kto"
            self._made[number] = "unpaired rows" if kto else MAKES[type(knobs)]
        if knobs.as_ and not isinstance(knobs, Train):
            self._named[knobs.as_] = number
        return number
