"""`factory ls` and `factory show`: what ships, what has run, and what a run did."""

import time
from pathlib import Path
from typing import Any

import msgspec

from factory.batch_journal import listed
from factory.errors import RecipeError
from factory.recipe_file import shipped


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
            status = _json(path).get("status", "")
        except RecipeError:
            status = "unreadable"
        lines.append(f"  {path.parent.name:22} {status:10} {path.parent}")
    return "\n".join(lines if manifests else [*lines, f"  none in {runs}/"])


def describe(folder: Path) -> str:
    """The funnel, the evaluation, and where things are."""
    manifest = _json(folder / "manifest.json")
    lines = [
        f"{manifest['name']}: {manifest['status']}",
        "",
        f"{'stage':24} {'unit':8} {'in':>7} {'kept':>7} {'dropped':>8} {'failed':>7}  reasons",
    ]
    for name in manifest["stages"]:
        stage = _json(folder / name / "manifest.json")
        reasons = ", ".join(f"{reason} {count}" for reason, count in stage["reasons"].items())
        title = name.rpartition("-")[0]
        lines.append(
            f"{title:24} {stage['unit']:8} {stage['in']:7} {stage['kept']:7} {stage['dropped']:8} {stage['failed']:7}  {reasons}"
        )
    for path in sorted(folder.glob("*/evaluation.json")):
        if path.parent.name in manifest["stages"]:
            lines += ["", f"{'model':16} {'measure':14} {'value':>8}  95 % interval      n"]
            for row in _json(path)["rows"]:
                span = f"{row['low']:.3f} to {row['high']:.3f}"
                lines.append(f"{row['model']:16} {row['measure']:14} {row['value']:8.3f}  {span:18} {row['n']}")
    for batch in listed(folder.parent / "journal.sqlite", manifest["name"]):
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(batch.submitted or batch.built))
        state = f"{batch.state} {since}, {batch.requests} requests, {batch.identity}"
        lines += ["", f"open batch {batch.handle or batch.tag}: {state}"]
    found = [folder / name for name in ("dataset", "report.html", "report.json") if (folder / name).exists()]
    return "\n".join([*lines, "", *(str(path) for path in found)])


def _json(path: Path) -> dict[str, Any]:
    try:
        data = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as e:
        raise RecipeError(f"{path} cannot be read ({e}); run the recipe again to make it anew") from None
    return data
