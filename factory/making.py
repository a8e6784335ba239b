"""Each kind of step: from the folders that it reads to a folder of its own, with the facts of its manifest."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import msgspec

from factory.ask import Desk
from factory.choose import Choose, choose, unmet
from factory.cohorts import Cohorts
from factory.curate import Curate, accepts, curate, row_filters
from factory.errors import RecipeError, TooManyFailures
from factory.evaluate import Evaluate, Examiner, evaluate
from factory.filters.refusal import NoRefusal
from factory.generate import Asker, Generate, Given, Teaching, given
from factory.judge import Judge, judge, lost
from factory.model_card import model_card
from factory.models import Models
from factory.naming import Naming
from factory.pair import PairUp, pair, unpaired
from factory.plan import Step
from factory.progress import bar, growing, say
from factory.prompt_spool import side_by_side, spooled
from factory.prompts import PromptLists
from factory.recipe import Recipe
from factory.recipe_file import find
from factory.rows import Prompt, Row, Sample, union
from factory.rubric import load as load_rubric
from factory.run import StageFolder, StageWriter, write_json, write_lines
from factory.score import Score, score
from factory.shape import Shape, lacking_truth, shape, student_view
from factory.summary import VALUES, values_by_prompt
from factory.tally import Lost, Tally
from factory.train import Train, train

UNITS = {"generate": "draws", "pair": "prompts", "train": "rows", "evaluate": "answers"}


class Making:
    """How the steps of one run are done; `made` are the folders of those that are done, by number."""

    def __init__(
        self, recipe: Recipe, prompts: PromptLists, runs: Path, models: Models, naming: Naming, desk: Desk
    ) -> None:
        self.recipe, self.prompts, self.runs = recipe, prompts, runs
        self.models, self.naming, self.desk = models, naming, desk
        self.folder = runs / recipe.name
        self.made: dict[int, StageFolder] = {}

    def make(self, step: Step, out: StageWriter) -> StageFolder:
        """Do a step and complete its folder."""
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
        filters = row_filters(looked_at, self.models)
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
        weights = knobs.from_ if isinstance(knobs.from_, dict) else dict.fromkeys(map(str, step.reads))
        with rows.open("wb") as whole:
            for (name, weight), number in zip(weights.items(), step.reads, strict=True):
                for shard in self.made[number].shards():
                    whole.write(shard.read_bytes() if weight is None else _weighted(shard, name, weight))
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
        card = model_card(self.recipe.name, knobs, entry, told)
        (out.folder / "model" / "README.md").write_text(card, encoding="utf-8")
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
        filters = row_filters(self.recipe.stages, self.models)
        outside = [one.title for one in self.recipe.prompts if one.held_out == "all"]
        examiner = Examiner(knobs, prompts, self.models, self.desk, self.recipe.seed, filters, outside)
        view, asker = partial(student_view, self.recipe.view()), self.asker(taught) if taught else None
        data, answers = asyncio.run(evaluate(examiner, view, taught, asker))
        write_json(out.folder / "evaluation.json", data)
        write_lines(out.folder / VALUES, values_by_prompt(examiner.measured))
        facts |= _cost(examiner.tallies)
        if compared := examiner.compared:
            facts |= {
                **_cost([*examiner.tallies, compared.tally]),
                "draws": facts["draws"],
                "verdicts": compared.verdicts,
            }
        return _put_all(out, answers, step.title)

    def check_failures(self) -> None:
        """TooManyFailures where a stage has lost more draws than the limit allows; all that can be done is done by then."""
        for folder, asked in product(self.made.values(), ("draws", "verdicts")):
            lost = Lost(**folder.manifest.get(asked, {}))
            if told := lost.beyond(self.desk.max_failed):
                then = ". --retry-failed asks again for what has no answer" if lost.unanswered else ""
                raise TooManyFailures(f"{folder.path.name}: {told}. What is finished stands in {self.folder}{then}")


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


def _weighted(shard: Path, name: str, weight: float) -> bytes:
    """Training rows as a part of a union: by which name, and what their mean loss counts."""
    rows = (msgspec.json.decode(line) for line in shard.read_bytes().splitlines())
    return b"".join(
        msgspec.json.encode(row | {"input": name, "weight": weight * row.get("weight", 1.0)}) + b"\n" for row in rows
    )


def _lines(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with file.open("rb") as lines:
            total += sum(1 for _ in lines)
    return total


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
