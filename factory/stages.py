"""The stages that a recipe may list, and `repeat`: some of them round after round, unrolled before anything is planned.

On-policy, self- and progressive distillation and rejection-sampling fine-tuning are loops around the usual stages. A round
is no engine of its own: its stages are copies whose names carry the round (`student@2`), read like any others.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self, TypeAlias

from pydantic import Field, model_validator

from factory.choose import Choose
from factory.curate import Curate
from factory.evaluate import Evaluate
from factory.generate import Generate
from factory.judge import Judge
from factory.knobs import Knobs, one_key
from factory.pair import PairUp
from factory.score import Score
from factory.shape import Shape
from factory.train import Train
from factory.yamlfile import Path_

Stage: TypeAlias = Generate | Curate | Judge | Score | Choose | Shape | PairUp | Train | Evaluate
SHORT = {"filter": "filters"}


class Until(Knobs):
    """Stop when a measure of `evaluate` on the held-out prompts of the list `split` no longer rises; the best student stays.

    It is measured as the recipe's last `evaluate` says (its reference, limits, draws), without teacher, judge, tasks and requirements.
    """

    measure: str = "accepted"
    split: str = "dev"


class Repeat(Knobs):
    """`repeat:`; inside, the name of a student that the stages train is the last round's, in the first one what `start` says.

    Rounds are kept as `student@1`, `student@2`; behind the loop the bare name is the last one, or the best with `until`.
    """

    kind: Literal["repeat"] = "repeat"
    times: int = Field(gt=0, le=100)
    start: dict[str, str] = {}
    until: Until | None = None
    stages: list[one_key(Stage, shorthand=SHORT)] = Field(min_length=1)  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _trains_what_it_starts_with(self) -> Self:
        trained = {stage.as_ for stage in self.stages if isinstance(stage, Train)}
        if strange := sorted(set(self.start) - trained):
            raise ValueError(
                f"start: no train stage inside makes {strange[0]!r}; it makes {', '.join(sorted(trained)) or 'none'}"
            )
        if self.until is not None and len(trained) != 1:
            raise ValueError("until needs exactly one train stage inside: its student is the one that is measured")
        return self

    @property
    def student(self) -> str:
        """The bare name of the (first) student that a round trains."""
        return next(stage.as_ for stage in self.stages if isinstance(stage, Train))


StageKnob: Any = one_key(Stage | Repeat, shorthand=SHORT)


class Round(NamedTuple):
    """Where an unrolled stage comes from: the loop's place among the written stages, the loop, and the round from 1."""

    loop: int
    repeat: Repeat
    number: int

    @property
    def look(self) -> str:
        """The name of the stage that `until` adds at the round's end."""
        return f"{self.repeat.student}-dev@{self.number}"


class Placed(NamedTuple):
    """A stage as it runs, where it stands in the file, and its round if it is in a loop."""

    stage: Stage
    at: Path_
    round: Round | None = None


def unrolled(written: list[Any]) -> list[Placed]:
    """The stages of a recipe in the order that they run."""
    placed: list[Placed] = []
    last: dict[str, str] = {}
    """What a bare name means behind the loops so far."""
    measuring = (stage for stage in reversed(written) if isinstance(stage, Evaluate))
    like = next(measuring, Evaluate.model_validate({"students": ["student"]}))
    for i, stage in enumerate(written):
        if isinstance(stage, Repeat):
            placed += _rounds(i, stage, last, like)
        else:
            placed.append(Placed(_renamed(stage, last, stage.as_), ("stages", i, stage.kind)))
    return placed


def _rounds(i: int, loop: Repeat, last: dict[str, str], like: Evaluate) -> Iterator[Placed]:
    last |= loop.start
    for number in range(1, loop.times + 1):
        of = Round(i, loop, number)
        before = dict(last)
        for j, stage in enumerate(loop.stages):
            name = f"{stage.as_}@{number}" if stage.as_ else None
            yield Placed(_renamed(stage, last, name), ("stages", i, "repeat", "stages", j, stage.kind), of)
            if stage.as_ and name:
                last[stage.as_] = name
        if loop.until is not None:
            made = loop.student
            students = list(dict.fromkeys([before[made], last[made]])) if made in before else [last[made]]
            yours = {"students": students, "from_": [loop.until.split], "as_": of.look}
            measured = like.model_copy(
                update=yours | {"teacher": None, "gold": None, "judge": None, "lm_eval": None, "require": {}}
            )
            yield Placed(measured, ("stages", i, "repeat", "until"), of)
    if loop.until is not None:
        last[loop.student] = loop.student  # the best one: known when the run has come so far


def _renamed(stage: Any, last: dict[str, str], as_: str | None) -> Any:
    """A copy that refers to what the names mean where it stands; the same object where nothing changes."""

    def now(name: Any) -> Any:
        if isinstance(name, str):
            return last.get(name, name)
        if isinstance(name, list):
            return [now(one) for one in name]
        return {now(key): value for key, value in name.items()} if isinstance(name, dict) else name

    fields = [f for f in ("model", "fallback", "from_", "student", "teacher", "gold", "students") if hasattr(stage, f)]
    changed = {field: now(getattr(stage, field)) for field in fields}
    changed = {field: value for field, value in changed.items() if value != getattr(stage, field)}
    if as_ != stage.as_:
        changed["as_"] = as_
    return stage.model_copy(update=changed) if changed else stage
