"""Finished runs compared with the first of them: the last student of each, on the same held-out prompts, by one ruler.

The arms of a recipe differ in their filters, and with them in what "accepted" means. So the answers that each run stored
are measured again here: by the row filters and the reference of the first run. Nobody is asked for anything.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from factory import report
from factory.curate import row_filters
from factory.errors import RecipeError
from factory.evaluate import Evaluate
from factory.findings import arms_compared
from factory.measures import Scored, definition
from factory.models import Models
from factory.recipe import Recipe, load
from factory.rows import Sample
from factory.run import COMPARISON, StageFolder, write_json
from factory.summary import VALUES, beside_first

ENDINGS = ("kept", "dropped", "failed")
ASKED = ("temperature", "n", "max_tokens", "reference")
"""What an evaluation must have in common with another, so that their answers can be compared in every respect."""
OF_TEACHER = ("teacher_loss", "token_agreement")
"""Measured on the teacher's answer; another answer is another measure."""

Row = dict[str, Any]
ById = dict[str, list[Sample]]
"""The answers to each prompt by its id, in the order of their draws."""


class Run(NamedTuple):
    """A run as far as it is compared; `evaluation` is its last one, where it has come so far."""

    name: str
    folder: Path
    manifest: Row
    stages: list[StageFolder]
    evaluation: StageFolder | None


def compare(folders: Sequence[Path], allow_code: bool = False) -> Row:
    """The comparison of run folders with the first of them, as `comparison.json`: written there, and into its report."""
    runs = [_run(folder, folders[0].name) for folder in folders]
    told = compared(runs, allow_code)
    write_json(folders[0] / COMPARISON, told)
    report.build(folders[0])
    return told


def compared(runs: list[Run], allow_code: bool = False) -> Row:
    """The same from what the runs have stored."""
    recipe = load(runs[0].folder / "recipe.yaml")
    told: Row = {"first": runs[0].name, "arms": [_facts(run, recipe.arms.get(run.name)) for run in runs]}
    scored, notes = _by_one_ruler(runs, recipe, allow_code)
    told |= beside_first(scored, recipe.seed)
    told["measures"] = {name: definition(name) for name in dict.fromkeys(row["measure"] for row in told["rows"])}
    told["prompts"] = len(scored[0].samples) if scored else 0
    told["notes"] += notes
    return told


def as_text(told: Row) -> str:
    """The table and the sentences, for a terminal; `report.json` and `report.html` of the first run have all measures."""
    measures = sorted(m for m in told["measures"] if m.startswith(report.CHARTED))
    width = max(map(len, [*(one["arm"] for one in told["arms"]), *measures]))
    lines = [f"{'arm':{width}}  {'rows trained':>14} {'asked':>8} {'USD':>9}  state"]
    for one in told["arms"]:
        rows = " + ".join(str(each["rows"]) for each in one["trained"]) or "none"
        state = f"{one['status']}: {one['why']}" if one["why"] else one["status"]
        lines.append(f"{one['arm']:{width}}  {rows:>14} {one['asked']:8} {one['usd']:9.4g}  {state}")
    paired = {(c["measure"], c["a"]): c for c in told["comparisons"]}
    for measure in measures:
        lines += [
            "",
            f"{measure:{width}}  {'value':>7}  {'95 % interval':17} {'difference':>10}  95 % interval        p",
        ]
        for row in (row for row in told["rows"] if row["measure"] == measure):
            line = f"{row['model']:{width}}  {row['value']:7.3f}  {row['low']:.3f} to {row['high']:.3f}    "
            if c := paired.get((measure, row["model"])):
                line += f"{c['value']:+10.3f}  {c['low']:+.3f} to {c['high']:+.3f}"
                line += f"  {c['p_holm']:.2g}" if "p_holm" in c else ""
            lines.append(line.rstrip())
    return "\n".join([*lines, "", *arms_compared(told), *told["notes"]])


# -- one run -----------------------------------------------------------------------------------------------------------


def _run(folder: Path, first: str) -> Run:
    """A run folder, read; an arm of the first one goes by its own name."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        stages = [StageFolder(folder / name) for name in dict.fromkeys(manifest["stages"])]
        measured = [stage for stage in stages if stage.manifest["stage"] == "evaluate"]
    except (OSError, ValueError, KeyError) as e:
        raise RecipeError(f"{folder}: this run cannot be read ({e}); run its recipe again") from None
    done = manifest["status"] == "done"
    return Run(
        folder.name.removeprefix(f"{first}."), folder, manifest, stages, measured[-1] if measured and done else None
    )


def _facts(run: Run, changes: Row | None) -> Row:
    """What an arm is, and what it took: answers that were asked for in it, not those that were there already."""
    spent = run.manifest["spent"]
    trained = [stage.manifest for stage in run.stages if stage.manifest["stage"] == "train"]
    return {
        "arm": run.name,
        "run": run.folder.name,
        "changes": changes or {},
        "stages": run.manifest["stages"],
        "status": run.manifest["status"],
        "why": run.manifest.get("why"),
        "trained": [{"student": one["student"], "rows": one["kept"]} for one in trained],
        "asked": spent["requests"],
        "usd": spent["usd"],
        "compute_seconds": spent["seconds"],
    }


def _asked(evaluation: StageFolder) -> tuple[str, str | None]:
    """The last student that was measured, or the base where none was trained; and the teacher, if there was one."""
    rows = json.loads((evaluation.path / "evaluation.json").read_bytes())["rows"]
    of = {row["role"]: row["model"] for row in rows}
    return of.get("student") or of["base"], of.get("teacher")


def _answers(evaluation: StageFolder, model: str | None) -> ById:
    """What a model has answered, as if nothing had judged it yet."""
    found: dict[str, dict[int, Sample]] = {}
    for ending in ENDINGS:
        for sample in evaluation.rows(Sample, ending):
            if sample.model == model:
                plain = replace(sample, verdicts=[one for one in sample.verdicts if one.filter == "generate"])
                found.setdefault(sample.prompt.id, {})[sample.draw] = plain
    return {prompt: [drawn[i] for i in sorted(drawn)] for prompt, drawn in found.items()}


def _known(evaluation: StageFolder, student: str) -> dict[str, dict[str, float | None]]:
    """What the evaluation itself has measured of a student, by prompt; a run of an older factory does not tell."""
    path = evaluation.path / VALUES
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return {row["prompt"]: row["values"][student] for row in map(json.loads, lines)}


# -- by one ruler ------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What a run's last student has answered, its teacher beside it, and what only the evaluation could measure."""

    name: str
    student: ById
    teacher: ById
    known: dict[str, dict[str, float | None]]


def _measured(runs: list[Run]) -> tuple[list[Measured], list[str]]:
    """The runs that can be compared with the first; and what is to be known beside."""
    found: list[Measured] = []
    notes: list[str] = []
    for run in runs:
        if run.evaluation is None:
            notes.append(f"{run.name} has come to no evaluation, and is not compared.")
            if not found:
                break
            continue
        student, teacher = _asked(run.evaluation)
        one = Measured(
            run.name,
            _answers(run.evaluation, student),
            _answers(run.evaluation, teacher),
            _known(run.evaluation, student),
        )
        if found and not one.student.keys() & found[0].student.keys():
            notes.append(f"{run.name} was measured on other prompts, and is not compared.")
            continue
        own, firsts = _knobs(run.evaluation), _knobs(runs[0].evaluation or run.evaluation)
        if other := [key for key in ASKED if getattr(own, key) != getattr(firsts, key)]:
            notes.append(
                f"{run.name} was evaluated with another {', '.join(other)} than {runs[0].name}: a difference may be that."
            )
        found.append(one)
    return found, notes


def _knobs(evaluation: StageFolder) -> Evaluate:
    return Evaluate.model_validate(evaluation.manifest["knobs"])


def _by_one_ruler(runs: list[Run], recipe: Recipe, allow_code: bool) -> tuple[list[Scored], list[str]]:
    """The runs' last students on the prompts that all of them have answered."""
    measured, notes = _measured(runs)
    if not measured:
        return [], notes
    assert runs[0].evaluation is not None, "the first is measured, or none"
    knobs = _knobs(runs[0].evaluation)
    models = Models(recipe.models, recipe.first_student(), runs[0].folder.parent, allow_code)
    filters, reference = row_filters(recipe.stages, models), knobs.reference.open(models)
    first, k = measured[0], knobs.k or knobs.n or 1
    common = [prompt for prompt in first.student if all(prompt in one.student for one in measured)]
    notes += [
        f"{one.name} was measured on {len(one.student)} prompts; compared are the {len(common)} that all have."
        for one in measured
        if len(one.student) > len(common)
    ]

    def scored(name: str, answers: ById) -> Scored:
        draws = [answers[prompt][1:] for prompt in common]
        greedy = [answers[prompt][0] for prompt in common]
        return Scored(name, "arm", greedy, filters, reference, draws if any(draws) else None, k)

    found = [scored(one.name, one.student) for one in measured]
    if first.teacher:
        teacher = scored("teacher", first.teacher)
        for one, its in zip(measured, found, strict=True):
            its.add_forced(teacher, [])
            its.values |= {
                measure: [_of_teacher(measure, one, first, prompt) for prompt in common] for measure in OF_TEACHER
            }
    return found, notes


def _of_teacher(measure: str, one: Measured, first: Measured, prompt: str) -> float | None:
    """A measure on the teacher's answer, where that answer is the one that the first run's student was measured on."""
    said, there = one.teacher.get(prompt), first.teacher.get(prompt)
    same = said and there and said[0].response == there[0].response
    return one.known.get(prompt, {}).get(measure) if same else None
