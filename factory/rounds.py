"""`repeat` with `until`: whether another round is worth it, told by the rounds so far on prompts that are not the test's."""

import json
from typing import NamedTuple

from factory.errors import RecipeError
from factory.evaluate import Evaluate
from factory.plan import Step
from factory.run import StageFolder
from factory.stages import Until


class Measured(NamedTuple):
    """A round's students, before and after it, by a measure; None for a first round that starts from nothing known."""

    before: str | None
    after: str
    values: dict[str, float]

    @property
    def best(self) -> str:
        rose = self.before is None or self.values[self.after] > self.values[self.before]
        return self.after if rose else str(self.before)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self.values.items())


class Rounds:
    """What is known of each loop while a run goes on; `loop` is its place among the stages."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._ended: dict[int, int] = {}

    def over(self, step: Step) -> bool:
        """Whether a step is in a round that is not wanted any more."""
        return step.round is not None and step.round.number > self._ended.get(step.round.loop, step.round.repeat.times)

    def standing_for(self, step: Step) -> Step:
        """The step of the last round that was done, in the place of one that is over."""
        assert step.round is not None
        loop, ended = step.round.loop, self._ended[step.round.loop]

        def of(number: int) -> list[Step]:
            return [s for s in self._steps if s.round and (s.round.loop, s.round.number) == (loop, number)]

        # the first round may have a step more at its beginning: answers that came with the prompts
        from_end = len(of(step.round.number)) - of(step.round.number).index(step)
        return of(ended)[-from_end]

    def heard(self, step: Step, folder: StageFolder) -> Measured | None:
        """What a look at the dev prompts says; a loop ends where its measure has not risen. None for other steps."""
        knobs, of = step.knobs, step.round
        if of is None or of.repeat.until is None or not isinstance(knobs, Evaluate) or knobs.as_ != of.look:
            return None
        measured = _measured(of.repeat.until, knobs, json.loads((folder.path / "evaluation.json").read_bytes()))
        if measured.best != measured.after:
            self._ended[of.loop] = of.number
        return measured


def _measured(until: Until, knobs: Evaluate, told: dict[str, list[dict[str, object]]]) -> Measured:
    values = {str(row["model"]): float(str(row["value"])) for row in told["rows"] if row["measure"] == until.measure}
    if missing := [name for name in knobs.students if name not in values]:
        measures = sorted({str(row["measure"]) for row in told["rows"]})
        raise RecipeError(
            f"repeat.until: {missing[0]} has no measure {until.measure!r} on {until.split}; there are {', '.join(measures)}"
        )
    before, after = [None, *knobs.students][-2:]
    return Measured(before, str(after), {name: values[name] for name in knobs.students})
