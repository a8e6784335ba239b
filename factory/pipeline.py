"""The whole run on one screen: steps in order, each from folders to a folder, each done once.

A step's folder is named by a hash of all that makes it (`naming.py`); if that folder is complete, nothing runs. So the
same command again does nothing twice, and a changed filter re-runs from there and asks the teacher nothing.
"""

import platform
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import yaml

from factory import __version__, report
from factory.ask import Desk
from factory.batch_journal import forgive
from factory.budget import Wall
from factory.curate import Curate
from factory.errors import NotReached, RecipeError, TooManyFailures, Waiting
from factory.evaluate import Evaluate
from factory.filters.contamination import Contamination
from factory.foresight import foresee
from factory.gates import Gate, gates, reached
from factory.journal import Journal
from factory.judge import Judge
from factory.knobs import written_out
from factory.making import Making
from factory.models import Models
from factory.naming import Naming
from factory.plan import Step, Until, plan
from factory.progress import say
from factory.prompts import PromptLists, lint, load
from factory.publish import publish
from factory.recipe import Recipe
from factory.recipe_file import find
from factory.rounds import Measured, Rounds
from factory.rows import digest
from factory.rubric import load as load_rubric
from factory.run import PROMPTS_DROPPED, StageFolder, StageWriter, stopped_by, write_bytes, write_json, write_lines
from factory.teachers.vllm_server import stop_orphans
from factory.train import Train


def run(
    recipe: Recipe, runs: Path, until: Until = "run", max_failed: float = 0.02, retry_failed: bool = False,
    wait: float | None = None, prompts: PromptLists | None = None, allow_code: bool = False,
) -> Path:  # fmt: skip
    """Do what is still to be done of a recipe; returns the run's folder. Its report is rewritten at the end. Its arms are
    left to `factory.arms`.

    `max_failed` is the share of draws of a stage that may stay without an answer, or without a verdict that can be read: a
    doomed stage stops early, and a run that ends above it raises TooManyFailures when everything else is done.
    `retry_failed` asks again for draws without an answer.
    `wait`: where a batch is submitted, stay until it is done, looking at it first after so many seconds; None raises Waiting.
    `prompts`: the recipe's own, where they are read already. `allow_code`: the filter `code` may run what models wrote.
    """
    steps = plan(recipe, until)
    with Journal(runs / "journal.sqlite") as journal:
        wall = Wall(recipe.budget, journal.spent(recipe.name))
        prompts = prompts or load(recipe.prompts, recipe.seed, find)
        work = Work(recipe, prompts, runs, journal, wall, max_failed, retry_failed, wait, allow_code)
        work.run(steps)
    return work.folder


class Work:
    """One run in progress: what is made so far, and how each kind of step is done.

    `others` are the folders of runs whose steps are as good as its own: what is complete there is not made again.
    """

    def __init__(
        self, recipe: Recipe, prompts: PromptLists, runs: Path, journal: Journal, wall: Wall, max_failed: float = 0.02,
        retry_failed: bool = False, wait: float | None = None, allow_code: bool = False, others: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        self.recipe, self.prompts, self.runs, self.journal = recipe, prompts, runs, journal
        self.max_failed, self.retry_failed = max_failed, retry_failed
        self.folder = runs / recipe.name
        self.rows: dict[str, dict[str, int]] = {}
        self.gates: list[Gate] = []
        self.finished = False
        self.models = Models(recipe.models, recipe.first_student(), runs, allow_code)
        self.naming = Naming(recipe, self.prompts, self.models, [self.folder, *others])
        journal.clock(recipe.name)
        if retry_failed:
            forgive(journal, recipe.name)
        self.desk = Desk(journal, wall, recipe.name, max_failed, retry_failed, wait)
        self.making = Making(recipe, prompts, runs, self.models, self.naming, self.desk)

    @property
    def made(self) -> dict[int, StageFolder]:
        return self.making.made

    def run(self, steps: list[Step]) -> None:
        """Do the steps, and what follows from them; the failures that a run can end with are raised last."""
        try:
            self.begin(steps)
            rounds = Rounds(steps)
            for step in steps:
                if rounds.over(step):
                    self.stand_in(step, rounds.standing_for(step))
                else:
                    self.do(step)
                    if measured := rounds.heard(step, self.made[step.number]):
                        self.settle(step, measured)
            self.publish(steps)
        except BaseException as e:
            with suppress(OSError):  # on a full disk, what stopped us tells more
                self.note("waiting" if isinstance(e, Waiting) else "stopped", why=stopped_by(e))
            raise
        self.note("done")
        self.finished = True
        report.build(self.folder)
        try:
            self.making.check_failures()
            self.check_rows(steps)
            reached(self.gates, self.folder)
        except (TooManyFailures, NotReached) as e:
            self.note("done", why=stopped_by(e))
            raise

    def begin(self, steps: list[Step]) -> None:
        """Before anything is sent: prompts in, what is odd about them said, missing keys and weights found."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stop_orphans(self.runs / "servers")
        for line in lint(self.prompts):
            say(f"prompts: {line}")
        write_lines(self.folder / PROMPTS_DROPPED, self.prompts.dropped())
        for stage in self.recipe.stages:
            if isinstance(stage, Judge):
                load_rubric(find(stage.rubric))
            elif isinstance(stage, Curate):
                for one in stage.filters:
                    if isinstance(one, Contamination):
                        deque(one.texts(), maxlen=0)
        for verifier in self.recipe.verifiers():
            verifier.open(self.models)
        for finding in foresee(self.recipe, steps, self.prompts):
            if finding.fatal:
                raise RecipeError(str(finding))
            say(str(finding))
        resolved = yaml.safe_dump(written_out(self.recipe), sort_keys=False, allow_unicode=True)
        write_bytes(self.folder / "recipe.yaml", resolved.encode())
        self.note("unfinished")
        for name in self.naming.needed(steps):
            self.models.ready(name)

    def note(self, status: str, **why: str) -> None:
        """The run's own manifest: which stage folders belong to it now. One that is killed stays `unfinished`."""
        recipe, folders = self.recipe, [folder.path.name for folder in self.made.values()]
        versions = {"factory": __version__, "python": platform.python_version()}
        recipe_hash = digest(recipe.model_dump(mode="json", by_alias=True))
        facts = {"name": recipe.name, "recipe_hash": recipe_hash, "seed": recipe.seed, "status": status, **why}
        spent = self.journal.spent(recipe.name)._asdict()
        lists = [msgspec.to_builtins(row) for row in self.prompts.funnel]
        facts["gates"] = [gate._asdict() for gate in self.gates]
        whole = {**facts, "stages": folders, "versions": versions, "prompts": lists, "spent": spent, "rows": self.rows}
        write_json(self.folder / "manifest.json", whole)

    def publish(self, steps: list[Step]) -> None:
        """Write `dataset/` from what the steps have made."""
        self.rows = publish(self.recipe, self.prompts, self.models, steps, self.made, self.folder / "dataset")

    def check_rows(self, steps: list[Step]) -> None:
        """TooManyFailures for an empty data set, unless all may fail; a run that only measures makes none."""
        kept = any(splits["train"] for splits in self.rows.values())
        if not kept and self.max_failed < 1 and not any(isinstance(step.knobs, Evaluate) for step in steps):
            raise TooManyFailures(f"the data set has no rows; `factory show {self.folder}` tells where they went")

    # -- one step ------------------------------------------------------------------------------------------------------

    def do(self, step: Step) -> None:
        """Do one step, unless its folder is there already."""
        folder = self.naming.place(step, self.made)
        if folder.path.parent != self.folder:
            say(f"{step.title}: as in {folder.path.parent.name}")
            folder = folder.linked(self.folder)
        elif folder.complete and not (self.retry_failed and _unanswered(folder.manifest)):
            say(f"{step.title}: done already")
        else:
            say(f"{step.title}")
            folder = self._make_or_wait(step, folder.path)
            say("  {in} {unit}: {kept} kept, {dropped} dropped, {failed} failed".format_map(folder.manifest))
        self.made[step.number] = folder
        self.note("unfinished")
        if isinstance(step.knobs, Evaluate):
            self.gates += gates(step.knobs.require, folder.path)
        if isinstance(step.knobs, Train):
            self.models.add_student(step.knobs.as_, folder.path / "model")

    def stand_in(self, step: Step, before: Step) -> None:
        """A step of a round that is not wanted any more: what was made last stands for it."""
        self.made[step.number] = self.made[before.number]
        if isinstance(step.knobs, Train) and isinstance(before.knobs, Train):
            self.models.call(step.knobs.as_, before.knobs.as_)

    def settle(self, step: Step, measured: Measured) -> None:
        """Behind a round: its loop's student is the best so far."""
        assert step.round is not None
        say(f"  {measured}: {'better' if measured.best == measured.after else 'no better, the loop ends'}")
        self.models.call(step.round.repeat.student, measured.best)

    def _make_or_wait(self, step: Step, folder: Path) -> StageFolder:
        """Make a step. Where it submits a batch and waiting is wanted, make it again: its asking waits for the batch."""
        while True:
            try:
                return self.making.make(step, StageWriter(folder))
            except Waiting:
                if self.desk.wait is None:
                    raise


def _unanswered(manifest: dict[str, Any]) -> int:
    """Draws of a stage that ended without an answer."""
    return int(manifest.get("draws", {}).get("unanswered", 0))
