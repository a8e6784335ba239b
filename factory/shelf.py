"""`factory ls` and `factory show`: what ships, what has run, and what a run did."""

import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from factory.batch_journal import OPEN, Batch
from factory.errors import DiskError, RecipeError
from factory.ledger import reading
from factory.prompts import Funnel
from factory.recipe_file import shipped
from factory.run import PROMPTS_DROPPED, comparison

T = TypeVar("T")


class _Run(msgspec.Struct):
    """Of a run's manifest, what is shown."""

    name: str
    status: str
    stages: list[str]
    prompts: list[Funnel] = []
    why: str | None = None


class _Stage(msgspec.Struct, rename={"in_": "in"}):
    """Of a stage's manifest, what is shown."""

    unit: str
    in_: int
    kept: int
    dropped: int
    failed: int
    reasons: dict[str, int]


def listing(runs: Path) -> str:
    """Shipped recipes with their first comment line, and local runs with their state."""
    lines = ["recipes"]
    for path in sorted((shipped() / "recipes").rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        name = path.relative_to(shipped() / "recipes").with_suffix("")
        lines.append(f"  {name!s:22} {first.lstrip('# ') if first.startswith('#') else ''}")
    lines.append("runs")
    manifests = sorted(runs.glob("*/manifest.json"))
    for path in manifests:
        try:
            state = f"{_read(path, _Run).status:10} {path.parent}"
        except RecipeError as e:
            state = f"unreadable {e}"
        lines.append(f"  {path.parent.name:22} {state}")
    return "\n".join(lines if manifests else [*lines, f"  none in {runs}/"])


def describe(folder: Path) -> str:
    """The funnel, the evaluation, and where things are."""
    run = _read(folder / "manifest.json", _Run)
    lines = [
        f"{run.name}: {run.status}",
        *([f"  {run.why}"] if run.why else []),
        "",
        f"{'stage':24} {'unit':8} {'in':>7} {'kept':>7} {'dropped':>8} {'failed':>7}  reasons",
    ]
    for told in run.prompts:
        split = f"kept: {told.train} to train on + {told.test} held out" if told.test else ""
        lines.append(_counts(f"prompts {told.name}", told, split))
    for name in run.stages:
        lines.append(_counts(name.rpartition("-")[0], _read(folder / name / "manifest.json", _Stage)))
    for path in sorted(folder.glob("*/evaluation.json")):
        if path.parent.name in run.stages:
            lines += ["", f"{'model':16} {'measure':18} {'value':>8}  95 % interval      n"]
            for row in _read(path, dict[str, Any])["rows"]:
                span = f"{row['low']:.3f} to {row['high']:.3f}"
                lines.append(f"{row['model']:16} {row['measure']:18} {row['value']:8.3f}  {span:18} {row['n']}")
    if (told_of_arms := comparison(folder, run.stages)) is not None:
        from factory.compare import as_text

        lines += ["", as_text(told_of_arms)]
    batches, unknown = _open_batches(folder.parent / "journal.sqlite", run.name)
    lines += unknown
    for batch in batches:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(batch.submitted or batch.built))
        state = f"{batch.state} {since}, {batch.requests} requests, {batch.identity}"
        lines += ["", f"open batch {batch.handle or batch.tag}: {state}"]
    left_out = [PROMPTS_DROPPED] if any(told.dropped or told.failed for told in run.prompts) else []
    results = [folder / name for name in ("dataset", "report.html", "report.json") if (folder / name).exists()]
    older = "" if run.status == "done" else "  (of an earlier start: this one is not done)"
    found = [*(str(folder / name) for name in left_out), *(f"{path}{older}" for path in results)]
    return "\n".join([*lines, "", *found])


def _counts(title: str, told: Funnel | _Stage, more: str = "") -> str:
    """A line of the funnel: in = kept + dropped + failed."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in told.reasons.items())
    counts = f"{told.in_:7} {told.kept:7} {told.dropped:8} {told.failed:7}"
    return f"{title:24} {told.unit:8} {counts}  {'; '.join(filter(None, (reasons, more)))}"


def _open_batches(journal: Path, run: str) -> tuple[list[Batch], list[str]]:
    """The batches of a run that are not collected yet, also while another process holds the journal; and a line where that
    cannot be told: a journal that cannot be opened (its log lies in a folder without write access, say) hides nothing else of a run."""
    if not journal.is_file():
        return [], []
    try:
        with reading(journal) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name='batch'").fetchone():
                return [], []  # a journal from before there were batches
            return [Batch(*row) for row in db.execute(f"{OPEN} AND run=? ORDER BY built", [run])], []
    except DiskError as e:
        return [], ["", f"open batches: not known ({e})"]


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError) as e:  # ValueError: no JSON, not UTF-8, or without what it must have
        raise RecipeError(f"{path} cannot be read ({e}); run the recipe again to make it anew") from None
