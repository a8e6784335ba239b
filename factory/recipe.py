"""The recipe: one YAML file as a typed record. Every problem is reported at once, with file, line and nearest key."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from factory.budget import Budget
from factory.choose import Choose
from factory.curate import Curate
from factory.errors import RecipeError
from factory.evaluate import Evaluate
from factory.filters.duplicates import Duplicates
from factory.filters.rules import Tokens
from factory.filters.semantic import SemanticDuplicates
from factory.filters.threshold import Threshold
from factory.filters.verifier import Verifier
from factory.generate import Generate
from factory.judge import Judge
from factory.knobs import Knobs
from factory.mistakes import Problem, nearest, salvage
from factory.pair import PairUp
from factory.prompts import PromptSet
from factory.recipe_file import Source, read
from factory.score import Score
from factory.shape import Shape
from factory.stages import Placed, Repeat, Stage, StageKnob, unrolled
from factory.teachers import ModelEntry
from factory.teachers.entry import Endpoint
from factory.teachers.vllm import Vllm
from factory.train import Train, check_args
from factory.weights import Weights
from factory.yamlfile import Path_, Place, written

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A stage's or student's name is part of folder names."""
NUMBERS = re.compile(r"\d+")
"""In a sentence: without them a mistake is the same where an arm has other stages before it."""
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class Recipe(Knobs):
    """A whole run. `name` names its folder; prompts and stages flow from top to bottom.

    `stages` are what runs, in order: those `written`, with the rounds of each `repeat` one after another. `arms` are
    variants by name: overrides as `--set` has them.
    """

    name: str = Field(pattern=NAME)
    prompts: list[PromptSet] = Field(min_length=1)
    seed: int = 0
    budget: Budget = Budget()
    models: dict[str, ModelEntry] = {}
    written: list[StageKnob] = Field([], alias="stages")
    arms: dict[Annotated[str, Field(pattern=NAME)], dict[str, Any] | None] = {}

    @cached_property
    def placed(self) -> list[Placed]:
        return unrolled(self.written)

    @cached_property
    def stages(self) -> list[Stage]:
        return [one.stage for one in self.placed]

    def trained(self) -> dict[str, Train]:
        """The students that this recipe makes, by name; a loop with `until` makes its best one known by the bare name."""
        made = {stage.as_: stage for stage in self.stages if isinstance(stage, Train)}
        loops = [stage for stage in self.written if isinstance(stage, Repeat) and stage.until]
        return made | {loop.student: made[f"{loop.student}@{loop.times}"] for loop in loops}

    def view(self) -> Shape:
        """How students see a prompt: by the last `shape`, or erased to the plain prompt."""
        shapes = [stage for stage in self.stages if isinstance(stage, Shape)]
        return shapes[-1] if shapes else Shape()

    def first_student(self) -> str | None:
        """The model that the first student starts from: its tokenizer is the one whose tokens count."""
        return next((stage.student for stage in self.stages if isinstance(stage, Train)), None)

    def place_of(self, knobs: Knobs) -> int | None:
        """Which of `stages` a stage is; None for one that goes without saying."""
        return next((i for i, stage in enumerate(self.stages) if stage is knobs), None)

    def verifiers(self) -> Iterator[Verifier]:
        """Those of all stages: what they need is looked for before anything is sent."""
        for stage in self.stages:
            filters = [*stage.filters] if isinstance(stage, Curate) else [getattr(stage, "of", None)]
            yield from (one for one in filters if isinstance(one, Verifier))
            if isinstance(stage, Evaluate):
                yield stage.reference

    def filters_behind(self, i: int) -> list[Curate]:
        """The `filter` stages right behind one of `stages`: behind a `generate`, what an accepted answer is."""
        behind = takewhile(lambda stage: isinstance(stage, Curate), self.stages[i + 1 :])
        return [stage for stage in behind if isinstance(stage, Curate)]

    def taught(self, teacher: str | None) -> Generate | None:
        """The first `generate` that names a teacher: it is measured as it was asked there."""
        asking = (stage for stage in self.stages if isinstance(stage, Generate))
        return next((stage for stage in asking if teacher in stage.models), None)


class Draft(NamedTuple):
    """A recipe as far as it makes sense, and what is wrong with the rest of the file.

    `recipe` is None where nothing could be made of it. Parts that are wrong as a whole are left out: `positions` tells
    where the others stood, `lost` which are missing. `arms` are the recipe's variants.
    """

    source: Source
    recipe: Recipe | None
    problems: list[Problem]
    positions: dict[str, list[int]]
    lost: set[Path_]
    arms: "dict[str, Draft]"

    def at(self, path: Path_) -> Path_:
        """A path in `recipe` as one in the file."""
        if len(path) > 1 and path[0] in self.positions:
            return (path[0], self.positions[str(path[0])][int(path[1])], *path[2:])
        return path

    def lacks(self, part: str) -> bool:
        """Whether something of `models`, `prompts` or `stages` is left out."""
        return any(path[0] == part for path in self.lost)

    def told(self, problems: Iterable[Problem] = ()) -> list[tuple[Place, str]]:
        """All problems, these included, with their places; paths are those of the file."""
        found = [(at, line) for at, text in [*self.problems, *problems] for line in text.splitlines()]
        return [(self.source.place(at), line) for at, line in found]

    def refuse(
        self, problems: Iterable[Problem] = (), of_arms: Mapping[str, Iterable[Problem]] = MappingProxyType({})
    ) -> None:
        """RecipeError with all problems, these included, in the order of the file; of an arm those that are its own."""
        placed = self.told(problems)
        known = {(place, NUMBERS.sub("", text)) for place, text in placed}
        for name, arm in self.arms.items():
            own = (one for one in arm.told(of_arms.get(name, ())) if (one[0], NUMBERS.sub("", one[1])) not in known)
            placed += [(place, f"arm {name}: {text}") for place, text in own]
        lines = [f"{written(place)}: {text}" for place, text in sorted(placed, key=lambda one: one[0])]
        if lines:
            raise RecipeError("\n".join(dict.fromkeys(lines)))


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe with its parents and `--set` overrides; RecipeError lists every problem found in its text."""
    drafted = draft(path, overrides)
    drafted.refuse()
    assert drafted.recipe is not None, "a recipe without problems"
    return drafted.recipe


def draft(path: Path, overrides: Iterable[str] = ()) -> Draft:
    """The same, with the problems for later: what is left of the recipe can be looked at further."""
    return _drafted(read(path, overrides))


def _drafted(source: Source) -> Draft:
    left = salvage(Recipe, source.data)
    made = Draft(source, *left, {name: _drafted(arm) for name, arm in source.arms.items()})
    made.problems.extend(source.flaws)
    made.problems.extend(_unmeasured(made.arms))
    if left.recipe is not None:
        made.problems.extend((made.at(at), text) for at, text in _cross_check(left.recipe, made))
    return made


def _unmeasured(arms: dict[str, Draft]) -> Iterator[Problem]:
    """Arms that nothing can be told of."""
    for name, arm in arms.items():
        stages = [] if arm.recipe is None or arm.lacks("stages") else arm.recipe.stages
        if stages and not any(isinstance(stage, Evaluate) for stage in stages):
            yield ("arms", name), f"arms.{name}: it has no evaluate stage, and arms are compared by their last one"


# -- what no single record can know ----------------------------------------------------------------------------------


def _cross_check(recipe: Recipe, made: Draft) -> Iterator[Problem]:
    """Names that refer to nothing, and models that cannot do what they are named for; paths are those of `recipe`."""
    lost = _names_lost(made)
    sets = {prompt_set.title for prompt_set in recipe.prompts}
    if len(sets) < len(recipe.prompts):
        yield ("prompts",), "two prompt lists have the same name; give one of them `name:`"
    stages: set[str] = set()
    students: set[str] = set()
    for i, (stage, at, of_round) in enumerate(recipe.placed):
        models = {*recipe.models, *students}
        for field, name in _models_named(stage):
            if name not in models | lost:
                yield (*at, field), f"there is no model {name!r}; {nearest(name, models | lost)}"
        sources = [stage.from_] if isinstance(stage.from_, str) else stage.from_ or []
        for name in sources:
            if name not in sets | stages | lost and ("prompts",) not in made.lost:
                yield (
                    (*at, "from"),
                    f"there is no prompt list or earlier stage {name!r}; {nearest(name, sets | stages | lost)}",
                )
        plain = stage.as_ if of_round is None else (stage.as_ or "").rpartition("@")[0] or None
        if plain is not None and not STAGE_NAME.fullmatch(plain):
            yield (
                (*at, "as"),
                f"the name {plain[:80]!r} must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
            )
        yield from (((*at, *below), text) for below, text in _own_problems(recipe, i, stage, made))
        if isinstance(stage, Train):
            if stage.as_ in models:
                yield (*at, "as"), f"the name {stage.as_!r} is taken; give this student another one with `as:`"
            students.add(stage.as_)
            if of_round and of_round.repeat.until and of_round.number == of_round.repeat.times:
                students.add(of_round.repeat.student)
        elif stage.as_:
            if stage.as_ in stages | sets:
                yield (*at, "as"), f"the name {stage.as_!r} is taken"
            stages.add(stage.as_)


def _own_problems(recipe: Recipe, i: int, stage: Stage, made: Draft) -> Iterator[Problem]:
    """What stage `i` cannot do in this recipe; paths start below the stage."""
    for at, score in scores_named(stage):
        if score == "logprob" and (silent := _tells_no_logprob(recipe, i)):
            yield at, f"models.{silent} tells no log-probability; set logprobs: true in the generate stage above"
    match stage:
        case Generate(until=until) if until and not (made.lacks("stages") or recipe.filters_behind(i)):
            yield ("until",), "until needs a filter right behind this stage: it says which answers are accepted"
        case Generate(until=until) if until and any(one.control for one in recipe.filters_behind(i)):
            yield (
                ("until",),
                "until asks for what the filter accepts, so a random control behind it would be none; use n",
            )
        case Curate():
            tokens = ((k, one) for k, one in enumerate(stage.filters) if isinstance(one, Tokens))
            yield from (((k,), why) for k, one in tokens if (why := _no_tokenizer(recipe, one)))
            encoding = ((k, one.model) for k, one in enumerate(stage.filters) if isinstance(one, SemanticDuplicates))
            for k, name in encoding:
                if name in recipe.models and not isinstance(recipe.models[name], Weights):
                    yield (
                        (k, "semantic_duplicates", "model"),
                        f"models.{name} is `type: {recipe.models[name].type}`; an encoder's weights are local: "
                        "`type: transformers`",
                    )
        case Score(model=str(name)) if (entry := recipe.models.get(name)) is not None:
            if not isinstance(entry, Weights):
                yield (
                    ("model",),
                    f"models.{name} is `type: {entry.type}`; a scorer's weights are local: `type: transformers`",
                )
            elif stage.by == "reward" and (not entry.as_they_are or entry.model.endswith(".gguf")):
                yield ("model",), f"models.{name}: a reward model is a whole folder, without `layers` and no .gguf"
        case Train():
            yield from ((("args",), problem) for problem in check_args(stage.method, stage.args))
            if (start := recipe.models.get(stage.student)) and not isinstance(start, Weights):
                yield (
                    ("student",),
                    f"models.{stage.student} is `type: {start.type}`, which cannot be trained; a student is `type: transformers`",
                )
            if (teacher := recipe.models.get(stage.teacher or "")) and not isinstance(teacher, Weights):
                yield (
                    ("teacher",),
                    f"models.{stage.teacher} is `type: {teacher.type}`, whose distributions cannot be read; {stage.method} "
                    "needs a `type: transformers` teacher",
                )
        case Evaluate():
            named = [stage.from_] if isinstance(stage.from_, str) else stage.from_
            if not made.lacks("prompts") and not any(
                s.held_out for s in recipe.prompts if not named or s.title in named
            ):
                yield (), "no prompts are held out to be asked; set `held_out:` on a prompt list"
            bases = {*recipe.models, *_names_lost(made)} & {*stage.students}
            if stage.judge and "base" in stage.judge.against and not bases:
                told = "none of the students is a model of the recipe, so there is no base to compare with"
                yield ("judge", "against"), f"{told}; name it among the students, or take `against: teacher`"


def scores_named(stage: Knobs) -> Iterator[tuple[Path_, str]]:
    """The scores that a stage goes by, with the places (below the stage) where it names them."""
    match stage:
        case Choose(by=str(by)) if by != "closest_to_reference":
            yield ("by",), by
        case PairUp(score=str(score)):
            yield ("score",), score
        case Train(method="sft" | "gkd", order=str(order)) if (name := order.removeprefix("-")) not in (
            "given",
            "length",
        ):
            yield ("order",), name
        case Curate():
            ranking = ((k, one) for k, one in enumerate(stage.filters) if isinstance(one, Duplicates))
            yield from (((k, one.kind, "by"), one.by) for k, one in ranking if one.by is not None)
            limited = ((k, one) for k, one in enumerate(stage.filters) if isinstance(one, Threshold))
            yield from (((k, one.kind, "name"), one.name) for k, one in limited)


def _names_lost(made: Draft) -> set[str]:
    """The names that the parts left out would give: whoever uses them makes no mistake."""
    names: set[str] = set()
    for kind, *rest in made.lost:
        part: Any = made.source.data.get(str(kind))
        for key in rest:
            part = part[key]
        if kind == "models":
            names.update(map(str, rest))
        elif kind == "prompts" and isinstance(part, dict):
            names.update({str(part.get("name")), Path(str(part.get("path"))).stem, Path(str(part.get("path"))).name})
        elif kind == "stages" and isinstance(part, dict):
            bodies = [body for body in part.values() if isinstance(body, dict)]
            names.update(str(body.get("as", "student")) for body in bodies)
    return names


def _no_tokenizer(recipe: Recipe, counting: Tokens) -> str | None:
    """Why a `tokens` filter has nothing to count with."""
    name = counting.model or recipe.first_student()
    if name is None:
        return "tokens: the recipe trains no student; name a local model with `model:`"
    if name in recipe.models and not isinstance(recipe.models[name], Weights):
        return f"tokens: models.{name} has no local tokenizer; name a local model with `model:`"
    return None


def _tells_no_logprob(recipe: Recipe, i: int) -> str | None:
    """A server that the last `generate` before stage `i` does not ask for log-probabilities; local models tell them."""
    asked = next((stage for stage in reversed(recipe.stages[:i]) if isinstance(stage, Generate)), None)
    if asked is None or asked.logprobs or asked.beam:
        return None
    return next((name for name in asked.models if isinstance(recipe.models.get(name), Endpoint | Vllm)), None)


def _models_named(stage: Stage) -> Iterator[tuple[str, str]]:
    match stage:
        case Generate():
            yield from (("model", name) for name in stage.models)
            if stage.fallback:
                yield "fallback", stage.fallback
        case Curate():
            named = (f.model for f in stage.filters if isinstance(f, Tokens | SemanticDuplicates))
            yield from (("filters", name) for name in named if name)
        case Judge() | Score(model=str()):
            yield "model", str(stage.model)
        case Train():
            yield "student", stage.student
            if stage.teacher:
                yield "teacher", stage.teacher
        case Evaluate():
            yield from (("students", name) for name in stage.students)
            yield from ((field, name) for field in ("teacher", "gold") if (name := getattr(stage, field)))
            if stage.judge:
                yield "judge", stage.judge.model
