"""The whole run on one screen: steps in order, each from folders to a folder, each done once.

A step's folder is named by a hash of all that makes it (`naming.py`); if that folder is complete, nothing runs. So the
same command again does nothing twice, and a changed filter re-runs from there and asks the teacher nothing.
"""

import asyncio
import platform
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import yaml

from factory import __version__, report
from factory.ask import Desk, Lost, Tally
from factory.batch_journal import forgive
from factory.budget import Wall
from factory.choose import Choose, choose, unmet
from factory.cohorts import Cohorts
from factory.curate import Curate, accepts, curate, row_filters
from factory.errors import NotReached, RecipeError, TooManyFailures, Waiting
from factory.evaluate import Evaluate, Examiner, evaluate
from factory.filters.contamination import Contamination
from factory.filters.refusal import NoRefusal
from factory.foresight import foresee
from factory.gates import Gate, gates, reached
from factory.generate import Asker, Generate, Given, Teaching, given
from factory.journal import Journal
from factory.judge import Judge, judge, lost
from factory.knobs import written_out
from factory.models import Models
from factory.naming import Naming
from factory.pair import PairUp, pair, unpaired
from factory.plan import Step, Until, plan
from factory.progress import bar, growing, say
from factory.prompt_spool import side_by_side, spooled
from factory.prompts import PromptLists, lint, load
from factory.publish import publish
from factory.recipe import Recipe
from factory.recipe_file import find
from factory.rounds import Measured, Rounds
from factory.rows import Prompt, Row, Sample, digest, union
from factory.rubric import load as load_rubric
from factory.run import PROMPTS_DROPPED, StageFolder, StageWriter, stopped_by, write_bytes, write_json, write_lines
from factory.score import Score, score
from factory.shape import Shape, lacking_truth, shape, student_view
from factory.teachers.vllm_server import stop_orphans
from factory.train import Train, train

UNITS = {"generate": "draws", "pair": "prompts", "train": "rows", "evaluate": "answers"}


def run(
    recipe: Recipe, runs: Path, until: Until = "run", max_failed: float = 0.02, retry_failed: bool = False,
    wait: float | None = None, prompts: PromptLists | None = None, allow_code: bool = False,
) -> Path:  # fmt: skip
    """Do what is still to be done of a recipe; returns the run's folder. Its report is rewritten at the end.

    `max_failed` is the share of draws of a stage that may stay without an answer, or without a verdict that can be read: a
    doomed stage stops early, and a run that ends above it raises TooManyFailures when everything else is done.
    `retry_failed` asks again for draws without an answer.
    `wait`: where a batch is submitted, stay until it is done, looking at it first after so many seconds; None raises Waiting.
    `prompts`: the recipe's own, where they are read already. `allow_code`: the filter `code` may run what models wrote.
    """
    steps = plan(recipe, until)
    with Journal(runs / "journal.sqlite") as journal:
        prompts = prompts or load(recipe.prompts, recipe.seed, find)
        work = Work(recipe, prompts, runs, journal, max_failed, retry_failed, wait, allow_code)
        try:
            work.begin(steps)
            rounds = Rounds(steps)
            for step in steps:
                if rounds.over(step):
                    work.stand_in(step, rounds.standing_for(step))
                else:
                    work.do(step)
                    if measured := rounds.heard(step, work.made[step.number]):
                        work.settle(step, measured)
            work.publish(steps)
        except BaseException as e:
            with suppress(OSError):  # on a full disk, what stopped us tells more
                work.note("waiting" if isinstance(e, Waiting) else "stopped", why=stopped_by(e))
            raise
        work.note("done")
        report.build(work.folder)
        try:
            work.check_failures()
            work.check_rows(steps)
            reached(work.gates, work.folder)
        except (TooManyFailures, NotReached) as e:
            work.note("done", why=stopped_by(e))
            raise
    return work.folder


class Work:
    """One run in progress: what is made so far, and how each kind of step is done."""

    def __init__(
        self, recipe: Recipe, prompts: PromptLists, runs: Path, journal: Journal, max_failed: float, retry_failed: bool,
        wait: float | None, allow_code: bool = False,
    ) -> None:  # fmt: skip
        self.recipe, self.prompts, self.runs, self.journal = recipe, prompts, runs, journal
        self.max_failed, self.retry_failed = max_failed, retry_failed
        self.folder = runs / recipe.name
        self.made: dict[int, StageFolder] = {}
        self.rows: dict[str, dict[str, int]] = {}
        self.gates: list[Gate] = []
        self.models = Models(recipe.models, recipe.first_student(), runs, allow_code)
        self.naming = Naming(recipe, self.prompts, self.models, self.folder)
        journal.clock(recipe.name)
        if retry_failed:
            forgive(journal, recipe.name)
        wall = Wall(recipe.budget, journal.spent(recipe.name))
        self.desk = Desk(journal, wall, recipe.name, max_failed, retry_failed, wait)

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

    def check_failures(self) -> None:
        """TooManyFailures where a stage has lost more draws than the limit allows; all that can be done is done by then."""
        for folder in self.made.values():
            lost = Lost(**folder.manifest.get("draws", {}))
            if told := lost.beyond(self.max_failed):
                then = ". --retry-failed asks again for what has no answer" if lost.unanswered else ""
                raise TooManyFailures(f"{folder.path.name}: {told}. What is finished stands in {self.folder}{then}")

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
        if folder.complete and not (self.retry_failed and _unanswered(folder.manifest)):
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
                return self._make(step, StageWriter(folder))
            except Waiting:
                if self.desk.wait is None:
                    raise

    def _make(self, step: Step, out: StageWriter) -> StageFolder:
        started = time.monotonic()
        facts: dict[str, Any] = {
            "stage": step.knobs.kind,
            "as": step.knobs.as_,
            "unit": UNITS.get(step.knobs.kind, "samples"),
        }
        facts["knobs"] = step.knobs.model_dump(mode="json", by_alias=True, exclude_unset=True)
        match step.knobs:
            case Generate() as knobs:
                planned = self._generate(knobs, step, out, facts)
            case Judge() as knobs:
                planned = self._judge(knobs, step, out, facts)
            case Train() as knobs:
                planned = self._train(knobs, step, out, facts)
            case Evaluate() as knobs:
                planned = self._evaluate(knobs, step, out, facts)
            case Given():
                planned = _put_all(out, given(self._answered(step)), step.title)
            case PairUp() as knobs:
                planned = self._pair(knobs, step, out, facts)
            case Curate() as knobs:
                planned = self._rows_in(step)
                _put_all(
                    out, curate(knobs, partial(self._groups, step), self.models, self.recipe.seed), step.title, planned
                )
            case Score() as knobs:
                planned = self._rows_in(step)
                _put_all(out, score(knobs, self._groups(step), self.models), step.title, planned)
            case Choose() as knobs:
                planned = self._rows_in(step)
                _put_all(out, choose(knobs, partial(self._groups, step), self.recipe.seed), step.title, planned)
                if lacking := unmet(knobs, self._groups(step)):
                    facts["warnings"] = lacking
            case Shape() as knobs:
                planned = self._rows_in(step)
                _put_all(out, shape(knobs, self._groups(step)), step.title, planned)
                if lacking := lacking_truth(knobs, self._groups(step)):
                    facts["warnings"] = lacking
        if "requests" in facts and (servers := self.models.served(self.naming.asked(step))):
            facts["servers"] = servers
        facts["seconds"] = round(time.monotonic() - started, 3)
        return out.finish(facts, planned)

    # -- inputs ----------------------------------------------------------------------------------------------------------

    def _samples(self, step: Step) -> Iterator[Sample]:
        return chain.from_iterable(self._groups(step))

    def _groups(self, step: Step) -> Iterator[list[Sample]]:
        return union([self.made[number].groups for number in step.reads])

    def _rows_in(self, step: Step) -> int:
        """Rows that the steps read have kept: the sum that must end somewhere again."""
        return sum(_lines(self.made[number].shards()) for number in step.reads)

    def _prompts(self, step: Step) -> Iterator[Prompt]:
        """Prompts of the named lists, or the distinct prompts of the rows that the step reads."""
        seen: set[str] = set()
        named = chain.from_iterable(self.prompts.train(name) for name in step.sets)
        for prompt in chain(named, (sample.prompt for sample in self._samples(step))):
            if isinstance(step.knobs, Given) or prompt.id not in seen:
                seen.add(prompt.id)
                yield prompt

    def _answered(self, step: Step) -> Iterable[Prompt]:
        """Prompts with the answers that they bring; those of one prompt together, wherever they stand."""
        distinct = len(step.sets) == 1 and self.prompts.distinct(step.sets[0])
        return self._prompts(step) if distinct else side_by_side(spooled(self._prompts(step)))

    def asker(self, knobs: Generate) -> Asker:
        opened = knobs.ask.open(find)
        return lambda prompt: opened.messages(prompt, self.recipe.seed)

    # -- the steps that are more than a generator --------------------------------------------------------------------------

    def _generate(self, knobs: Generate, step: Step, out: StageWriter, facts: dict[str, Any]) -> int:
        looked_at = self.naming.accepting(step) if knobs.until or knobs.want else []
        filters = [f for stage in looked_at for f in row_filters(stage, self.models)]
        teaching = Teaching(
            knobs, self.models, self.desk, self.asker(knobs), self.recipe.seed,
            accept=partial(accepts, filters), refused=lambda sample: not NoRefusal().check(sample).keep,
        )  # fmt: skip

        if not step.reads and len(step.sets) == 1 and self.prompts.distinct(step.sets[0]):
            prompts = self.prompts.train(step.sets[0])
        else:
            prompts = spooled(self._prompts(step))

        cohorts = Cohorts()

        async def collect() -> None:
            async for sample in teaching.samples(prompts):
                cohorts.hear(sample)
                out.put(sample)

        asyncio.run(collect())
        facts |= _cost(teaching.tallies) | cohorts.facts()
        # what a fallback has mended is not lost
        facts["draws"] = {"planned": teaching.planned, "unanswered": out.counts["failed"]}
        if knobs.want and out.counts["kept"] < knobs.want:
            facts["warnings"].append(f"want: {knobs.want}, but all prompts together gave {out.counts['kept']} answers")
        for line in facts["warnings"]:
            say(f"  warning: {line}")
        return teaching.planned

    def _judge(self, knobs: Judge, step: Step, out: StageWriter, facts: dict[str, Any]) -> int:
        total, model = self._rows_in(step), self.models.open(knobs.model)
        rubric = load_rubric(find(knobs.rubric))
        reopen = partial(self._samples, step)
        judged = asyncio.run(judge(knobs, rubric, reopen, total, model, self.desk, self.recipe.seed))
        _put_all(out, judged.samples, step.title, total)
        facts |= {**_cost([judged.tally]), **judged.facts, "draws": lost(out.reasons, total, judged.tally)}
        for line in judged.facts.get("warnings", []):
            say(f"{step.title}: {line}")
        return total

    def _pair(self, knobs: PairUp, step: Step, out: StageWriter, facts: dict[str, Any]) -> int:
        """The unit is the prompt, and each gives pairs, or the reason why not; for KTO it is the sample."""
        view = partial(student_view, self.recipe.view())
        if knobs.form == "kto":
            facts["unit"] = "samples"
            return _put_all(out, unpaired(knobs, self._groups(step), view), step.title, self._rows_in(step))
        _put_all(out, pair(knobs, self._groups(step), self.recipe.seed, view), step.title)
        return sum(1 for _ in self._groups(step))

    def _train(self, knobs: Train, step: Step, out: StageWriter, facts: dict[str, Any]) -> int:
        rows = out.folder / "rows.jsonl"
        shards = chain.from_iterable(self.made[number].shards() for number in step.reads)
        with rows.open("wb") as whole:
            for shard in shards:
                whole.write(shard.read_bytes())
        total = _lines([rows])
        if total == 0:
            self.check_failures()  # which may be why
            raise RecipeError(
                f"{step.title}: there are no rows to train on; see the reasons in {self.folder}/*/dropped-*.jsonl"
            )
        entry, teacher = self.models.weights(knobs.student), knobs.teacher and self.models.weights(knobs.teacher)
        with growing(step.title) as reached:
            told = train(
                knobs, weights_entry=entry, teacher=teacher or None, rows=rows, out=out.folder, cache=self.runs / "weights",
                checkpoints=self.folder / "checkpoints" / out.final.name, seed=self.recipe.seed,
                on_progress=lambda told: reached(told["step"], told["steps"]),
            )  # fmt: skip
        if told["steps"] == 0:
            raise RecipeError(f"{step.title}: the trainer took no step; raise args.num_train_epochs or args.max_steps")
        facts |= {"student": knobs.as_, "method": knobs.method, "model": "model"}
        out.counts["kept"] += told["rows_trained"]
        for reason, count in told["rows_set_aside"].items():
            out.counts["dropped"] += count
            out.count_reason(reason, count)
        return total

    def _evaluate(self, knobs: Evaluate, step: Step, out: StageWriter, facts: dict[str, Any]) -> int:
        # a prompt that two lists hold out is one item
        prompts = list({prompt.id: prompt for name in step.sets for prompt in self.prompts.test(name)}.values())
        if not prompts:
            raise RecipeError(f"{step.title}: no prompts are held out; set `held_out:` on a prompt list")
        taught = self.recipe.taught(knobs.teacher)
        filters = [f for s in self.recipe.stages if isinstance(s, Curate) for f in row_filters(s, self.models)]
        examiner = Examiner(knobs, prompts, self.models, self.desk, self.recipe.seed, filters)
        view, asker = partial(student_view, self.recipe.view()), self.asker(taught) if taught else None
        data, answers = asyncio.run(evaluate(examiner, view, taught, asker))
        write_json(out.folder / "evaluation.json", data)
        facts |= _cost(examiner.tallies)
        return _put_all(out, answers, step.title)


def _put_all(out: StageWriter, rows: Iterable[Row | Sequence[Row]], label: str, total: int | None = None) -> int:
    """Write all rows, showing how far it is; returns how many. Rows in a list are one unit together."""
    count = 0
    with bar(label, total) as advance:
        for unit in rows:
            for i, row in enumerate([unit] if isinstance(unit, Row) else unit):
                out.put(row, units=int(i == 0))
            count += 1
            if count % 100 == 0:
                advance(100)
        advance(count % 100)
    return count


def _lines(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with file.open("rb") as lines:
            total += sum(1 for _ in lines)
    return total


def _unanswered(manifest: dict[str, Any]) -> int:
    """Draws of a stage that ended without an answer."""
    return int(manifest.get("draws", {}).get("unanswered", 0))


def _cost(tallies: list[Tally]) -> dict[str, Any]:
    """What asking cost, for the manifest."""
    return {
        "draws": {
            "planned": sum(t.planned for t in tallies),
            "unanswered": sum(len(t.failures) for t in tallies),
        },
        "requests": {"sent": sum(t.sent for t in tallies), "reused": sum(t.reused for t in tallies)},
        "tokens": {
            "prompt": sum(t.usage.prompt_tokens for t in tallies),
            "completion": sum(t.usage.completion_tokens for t in tallies),
        },
        "usd": str(sum((t.usd for t in tallies), Decimal(0))),
        "compute_seconds": round(sum(t.usage.seconds for t in tallies), 3),
    }
