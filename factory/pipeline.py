"""The whole run on one screen: steps in order, each from folders to a folder, each done once.

A step's folder is named by a hash of all that makes it (`naming.py`); if that folder is complete, nothing runs. So the
same command again does nothing twice, and a changed filter re-runs from there and asks the teacher nothing.
"""

import asyncio
import platform
import time
from collections.abc import Iterable, Iterator
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
from factory.choose import Choose, choose
from factory.curate import Curate, accepts, curate, row_filters
from factory.errors import RecipeError, TooManyFailures, Waiting
from factory.evaluate import Evaluate, Examiner, evaluate
from factory.filters.refusal import NoRefusal
from factory.foresight import foresee
from factory.generate import Asker, Generate, Given, Teaching, given
from factory.journal import Journal
from factory.judge import Judge, judge, lost
from factory.knobs import written_out
from factory.models import Models
from factory.naming import Naming
from factory.pair import PairUp, pair
from factory.plan import Step, Until, plan
from factory.progress import bar, growing, say
from factory.prompt_spool import spooled
from factory.prompts import PromptLists, lint, load
from factory.publish import publish
from factory.recipe import Recipe
from factory.recipe_file import find
from factory.rows import Prompt, Row, Sample, digest, union
from factory.rubric import load as load_rubric
from factory.run import PROMPTS_DROPPED, StageFolder, StageWriter, stopped_by, write_bytes, write_json, write_lines
from factory.shape import Shape, shape, student_view
from factory.teachers.vllm_server import stop_orphans
from factory.train import Train, train
from factory.weights import Weights

UNITS = {"generate": "draws", "pair": "prompts", "train": "rows", "evaluate": "answers"}


def run(
    recipe: Recipe, runs: Path, until: Until = "run", max_failed: float = 0.02, retry_failed: bool = False,
    wait: float | None = None, prompts: PromptLists | None = None,
) -> Path:  # fmt: skip
    """Do what is still to be done of a recipe; returns the run's folder. Its report is rewritten at the end.

    `max_failed` is the share of draws of a stage that may stay without an answer, or without a verdict that can be read: a
    doomed stage stops early, and a run that ends above it raises TooManyFailures when everything else is done.
    `retry_failed` asks again for draws without an answer.
    `wait`: where a batch is submitted, stay until it is done, looking at it first after so many seconds; None raises Waiting.
    `prompts`: the recipe's own, where they are read already.
    """
    steps = plan(recipe, until)
    with Journal(runs / "journal.sqlite") as journal:
        work = Work(
            recipe, prompts or load(recipe.prompts, recipe.seed, find), runs, journal, max_failed, retry_failed, wait
        )
        try:
            work.begin(steps)
            for step in steps:
                work.do(step)
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
        except TooManyFailures as e:
            work.note("done", why=stopped_by(e))
            raise
    return work.folder


class Work:
    """One run in progress: what is made so far, and how each kind of step is done."""

    def __init__(
        self, recipe: Recipe, prompts: PromptLists, runs: Path, journal: Journal, max_failed: float, retry_failed: bool,
        wait: float | None,
    ) -> None:  # fmt: skip
        self.recipe, self.prompts, self.runs, self.journal = recipe, prompts, runs, journal
        self.max_failed, self.retry_failed = max_failed, retry_failed
        self.folder = runs / recipe.name
        self.made: dict[int, StageFolder] = {}
        self.rows: dict[str, dict[str, int]] = {}
        self.models = Models(recipe.models, recipe.first_student(), runs)
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
            counts = folder.manifest
            say(
                f"  {counts['in']} {counts['unit']}: {counts['kept']} kept, {counts['dropped']} dropped, {counts['failed']} failed"
            )
        self.made[step.number] = folder
        self.note("unfinished")
        if isinstance(step.knobs, Train):
            self.models.add_student(step.knobs.as_, folder.path / "model")

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
                planned = _put_all(out, given(self._prompts(step)), step.title)
            case PairUp() as knobs:
                planned = self._pair(knobs, step, out)
            case Curate() as knobs:
                planned = self._rows_in(step)
                _put_all(out, curate(knobs, partial(self._groups, step), self.models), step.title, planned)
            case Choose() as knobs:
                planned = self._rows_in(step)
                _put_all(out, choose(knobs, self._groups(step)), step.title, planned)
            case Shape() as knobs:
                planned = self._rows_in(step)
                _put_all(out, shape(knobs, self._groups(step)), step.title, planned)
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

        async def collect() -> None:
            async for sample in teaching.samples(prompts):
                out.put(sample)

        asyncio.run(collect())
        facts |= _cost(teaching.tallies)
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

    def _pair(self, knobs: PairUp, step: Step, out: StageWriter) -> int:
        """The unit is the prompt, and each gives one row: a pair, or the reason why not."""
        view = partial(student_view, self.recipe.view())
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
        entry = self.models.entry(knobs.student)
        if not isinstance(entry, Weights):
            raise RecipeError(
                f"{step.title}: models.{knobs.student} cannot be trained; a student is `type: transformers`"
            )
        with growing(step.title) as reached:
            told = train(
                knobs, weights_entry=entry, rows=rows, out=out.folder, cache=self.runs / "weights",
                seed=self.recipe.seed, on_progress=lambda told: reached(told["step"], told["steps"]),
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
        prompts = list(chain.from_iterable(self.prompts.test(name) for name in step.sets))
        if not prompts:
            raise RecipeError(f"{step.title}: no prompts are held out; set `held_out:` on a prompt list")
        taught = self.recipe.taught(knobs.teacher)
        filters = [f for s in self.recipe.stages if isinstance(s, Curate) for f in row_filters(s, self.models)]
        examiner = Examiner(knobs, prompts, self.models, self.desk, self.recipe.seed)
        asker = self.asker(taught) if taught else None
        data, answers = asyncio.run(
            evaluate(examiner, filters, partial(student_view, self.recipe.view()), taught, asker)
        )
        for answer in answers:
            out.put(answer)
        write_json(out.folder / "evaluation.json", data)
        facts |= _cost(examiner.tallies)
        return len(answers)


def _put_all(out: StageWriter, rows: Iterable[Row], label: str, total: int | None = None) -> int:
    """Write all rows, showing how far it is; returns how many."""
    count = 0
    with bar(label, total) as advance:
        for row in rows:
            out.put(row)
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
