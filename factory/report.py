"""One page that says what a run did and what it shows: `report.json` for programs, `report.html` for people.

Both are made from the run's own files, so they can be made again at any time. The page is a single file without
scripts; a strict policy in its head lets it load nothing, whatever the models have written into it.
"""

import json
import math
import unicodedata
from collections import Counter
from decimal import Decimal
from itertools import chain, product
from pathlib import Path
from typing import Any

from factory.audit import audit
from factory.data_findings import length_predicts
from factory.findings import findings
from factory.measures import RATES
from factory.rejects import rejects
from factory.rows import Pair, Row, Unpaired
from factory.run import StageFolder, comparison, write_bytes, write_json

SAMPLE_STAGES = ("given", "generate", "filter", "judge", "score", "choose")
ROLES = ("base", "student", "gold", "teacher")
"""In the order that they are shown: before, after, what to reach."""
CHARTED = ("accepted", "correct", "finished", "pass@", "win_rate", "lc_win_rate", "teacher_loss", "words")
"""Measures with a chart of their own; the table has all of them."""
MAX_SAMPLES = 40
MAX_CHARACTERS = 600_000
"""Of samples on the page: with every character at its longest in HTML it stays under 5 MB."""
MAX_TEXT = 20_000
MAX_POINTS = 400
LENGTH_BINS = 24


class Answer(Row, frozen=True):
    """Of a sample, what its length needs."""

    response: str


def build(run: Path) -> dict[str, Any]:
    """Read the run folder, write `report.json` and `report.html` into it, return what the JSON holds."""
    report = collect(run)
    write_json(run / "report.json", report)
    write_bytes(run / "report.html", page(report).encode())
    return report


def collect(run: Path) -> dict[str, Any]:
    """All facts of the page; the keys are those of `report.json`."""
    manifest = _json(run / "manifest.json")
    folders = [StageFolder(run / name) for name in manifest["stages"]]
    stages = [(folder, folder.manifest) for folder in folders]
    evaluations = [_json(folder.path / "evaluation.json") for folder, told in stages if told["stage"] == "evaluate"]
    recipe = run / "recipe.yaml"
    report: dict[str, Any] = {
        "name": manifest["name"],
        "status": manifest["status"],
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        "versions": manifest["versions"],
        "funnel": [*map(_prompts_row, manifest.get("prompts", [])), *(_funnel_row(told) for _, told in stages)],
        "evaluation": list(chain.from_iterable(e["rows"] for e in evaluations)),
        "comparisons": list(chain.from_iterable(e["comparisons"] for e in evaluations)),
        "measures": {k: v for e in evaluations for k, v in e.get("measures", {}).items()},
        "lists": list(chain.from_iterable(e.get("lists", []) for e in evaluations)),
        "list_comparisons": list(chain.from_iterable(e.get("list_comparisons", []) for e in evaluations)),
        "models": list(chain.from_iterable(e.get("models", []) for e in evaluations)),
        "footprint": {k: v for e in evaluations for k, v in e.get("footprint", {}).items()},
        "lm_eval": [e["lm_eval"] for e in evaluations if "lm_eval" in e],
        "judged": list(chain.from_iterable(e.get("judged", []) for e in evaluations)),
        "arms": comparison(run, manifest["stages"]),
        "gates": manifest.get("gates", []),
        "stages": [_cost(told) for _, told in stages],
        "spent": _spent(manifest),
        "training": [_training(folder, told) for folder, told in stages if told["stage"] == "train"],
        "pairs": _pairs(stages),
        "rejects": rejects(stages, manifest["seed"]),
        "judging": [
            {"stage": _title(told), **{key: told.get(key) for key in ("canaries", "gold")}}
            for _, told in stages
            if "canaries" in told or "gold" in told
        ],
        "samples": list(chain.from_iterable(e["samples"] for e in evaluations))[:MAX_SAMPLES],
        "lengths": _lengths(stages),
        "warnings": _warnings(stages, evaluations),
    }
    if hint := length_predicts(report["pairs"]):
        report["warnings"].append(f"pairs: {hint}")
    return {**report, "findings": findings(report)}


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())  # unlike msgspec it reads NaN, which a trainer may have logged


def _title(manifest: dict[str, Any]) -> str:
    """`01-generate`: the folder's name without its hash."""
    return str(manifest["folder"]).rpartition("-")[0]


COUNTS = ("unit", "in", "kept", "dropped", "failed", "reasons")


def _prompts_row(told: dict[str, Any]) -> dict[str, Any]:
    counts = {key: told[key] for key in COUNTS}
    return {"stage": told["stage"], "name": told["name"], **counts, "train": told["train"], "test": told["test"]}


def _funnel_row(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"stage": manifest["stage"], "name": _title(manifest), **{key: manifest[key] for key in COUNTS}}


def _cost(manifest: dict[str, Any]) -> dict[str, Any]:
    """Time and money of a stage; a stage that asks nobody has no requests."""
    return {
        "stage": _title(manifest),
        "kind": manifest["stage"],
        "seconds": manifest.get("seconds", 0.0),
        "requests": manifest.get("requests", {"sent": 0, "reused": 0}),
        "tokens": manifest.get("tokens", {"prompt": 0, "completion": 0}),
        "usd": manifest.get("usd", "0"),
        "served": manifest.get("served", {}),
    }


def _spent(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the run has spent over all its starts, and what a row of the data set's last config has cost by that."""
    spent = manifest.get("spent", {})
    rows = next((splits["train"] for splits in reversed(manifest.get("rows", {}).values())), 0)
    a_row = {f"{unit}_a_row": spent[unit] / rows for unit in ("usd", "seconds") if rows and unit in spent}
    return {**spent, "rows": rows, **a_row}


def _training(folder: StageFolder, manifest: dict[str, Any]) -> dict[str, Any]:
    """`training.json` as the trainer wrote it, and the curve found in it."""
    path = folder.path / "training.json"
    told = _json(path) if path.is_file() else {}
    curve = _curve(told)
    return {
        "student": manifest.get("student"),
        "method": manifest.get("method"),
        **told,
        "curve": curve,
        "tasks": sorted({name for point in curve for name in point if name.startswith("loss/")}),
        "stage": _title(manifest),
    }


def _curve(told: dict[str, Any]) -> list[dict[str, float]]:
    """Points of step, loss, the tasks' losses and evaluation loss from the trainer's log, thinned evenly; a loss that is no
    number is left out of the curve."""
    known = ("step", "loss", "eval_loss")
    points = [
        {key: value for key, value in p.items() if (key in known or key.startswith("loss/")) and math.isfinite(value)}
        for p in told.get("log", [])
    ]
    points = [p for p in points if "step" in p and len(p) > 1]
    thin = -(-len(points) // MAX_POINTS) or 1
    return [p for i, p in enumerate(points) if i % thin == 0 or i == len(points) - 1]


def _pairs(stages: list[tuple[StageFolder, dict[str, Any]]]) -> dict[str, Any] | None:
    """What the last pairs would teach besides quality."""
    found = [folder for folder, told in stages if told["stage"] == "pair"]
    if not found:
        return None
    kto = found[-1].manifest.get("knobs", {}).get("form") == "kto"
    return audit(found[-1].rows(Unpaired if kto else Pair))


def _lengths(stages: list[tuple[StageFolder, dict[str, Any]]]) -> dict[str, Any]:
    """How long kept and dropped answers of the last stage that handles samples are, in words; the last bin is open."""
    found = [(folder, told) for folder, told in stages if told["stage"] in SAMPLE_STAGES]
    if not found:
        return {}
    folder, told = found[-1]
    words = {end: Counter(len(a.response.split()) for a in folder.rows(Answer, end)) for end in ("kept", "dropped")}
    both = words["kept"] + words["dropped"]
    if not both:
        return {}
    reach = sum(both.values()) * 0.99
    longest, seen = 0, 0
    for longest in sorted(both):
        seen += both[longest]
        if seen >= reach:
            break
    width = max(1, -(-(longest + 1) // LENGTH_BINS))
    last = longest // width
    bins = [
        {"from": i * width, "to": (i + 1) * width - 1 if i < last else max(both), "kept": 0, "dropped": 0}
        for i in range(last + 1)
    ]
    for end, counts in words.items():
        for length, count in counts.items():
            bins[min(length // width, last)][end] += count
    return {"stage": _title(told), "unit": "words", "bins": bins}


def _warnings(stages: list[tuple[StageFolder, dict[str, Any]]], evaluations: list[dict[str, Any]]) -> list[str]:
    told = [f"{_title(manifest)}: {line}" for _, manifest in stages for line in manifest.get("warnings", [])]
    for (_, m), asked in product(stages, ("draws", "verdicts")):
        if (draws := m.get(asked, {})).get("unreadable"):
            count = f"{draws['unreadable']:,} of {draws['planned']:,}"
            told.append(f"{_title(m)}: {count} verdicts could not be read; the first verdict: {draws['flaw']}")
    told += [f"{_title(m)}: nothing was kept" for _, m in stages if m["in"] and not m["kept"]]
    told += [f"{_title(m)}: {note}" for folder, m in stages for note in _training_notes(folder, m)]
    return told + [note for evaluation in evaluations for note in evaluation.get("notes", [])]


def _training_notes(folder: StageFolder, manifest: dict[str, Any]) -> list[str]:
    """What the trainer changed of the student's tokens, or does not do with the rows."""
    path = folder.path / "training.json"
    notes: list[str] = _json(path).get("notes", []) if manifest["stage"] == "train" and path.is_file() else []
    return notes


# -- the page ----------------------------------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> str:
    """The HTML of a report. The template escapes every text; characters that hide or reorder are shown as codes."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("factory", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = sum(2 + len(sample["answers"]) for sample in report["samples"])
    limit = MAX_CHARACTERS // max(texts, 1)
    # once before codes make them longer (and this slow), once after
    clipped = {**report, "samples": _clipped(_visible(_clipped(report["samples"], limit)), limit)}
    usd = sum((Decimal(stage["usd"]) for stage in report["stages"]), Decimal(0))
    return environment.get_template("report.html.jinja").render(
        r=_clipped(_visible(clipped), MAX_TEXT),
        usd=usd,
        panels=_visible(_panels(report["evaluation"])),
        roles=_visible(_roles(report["evaluation"])),
    )


def _panels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The before/after charts: one per chief measure, on a scale that starts at 0; rates end at 1."""
    rows = sorted(rows, key=lambda row: ROLES.index(row["role"]))
    found = []
    for measure in dict.fromkeys(row["measure"] for row in rows if row["measure"].startswith(CHARTED)):
        of_it = [row for row in rows if row["measure"] == measure]
        rate = measure in RATES or "@" in measure or "win_rate" in measure
        top = 1.0 if rate else max([row["high"] for row in of_it] + [1e-9]) * 1.05
        found.append({"measure": measure, "rate": rate, "top": top, "rows": of_it})
    return found


def _roles(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Each model's role, in the order of the columns."""
    return {row["model"]: row["role"] for row in sorted(rows, key=lambda row: ROLES.index(row["role"]))}


def _visible(data: Any) -> Any:
    """The same data with control, invisible and direction-changing characters written as codes."""
    if isinstance(data, str):
        plain = data.replace("\n", "").isprintable()  # most texts are, and this is fast
        return data if plain else "".join(_code(c) if _hides(c) else c for c in data)
    if isinstance(data, dict):
        return {_visible(key): _visible(value) for key, value in data.items()}
    return [_visible(item) for item in data] if isinstance(data, list) else data


def _hides(c: str) -> bool:
    """Controls, formats, lone surrogates and line separators; joiners stay, scripts and emoji need them."""
    return c not in "\n\t\u200c\u200d" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _code(c: str) -> str:
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"


def _clipped(data: Any, limit: int) -> Any:
    """The same data with long texts cut, and told so; the JSON has them whole."""
    if isinstance(data, str):
        return data if len(data) <= limit else f"{data[:limit]}… ({len(data) - limit:,} more characters)"
    if isinstance(data, dict):
        return {_clipped(key, limit): _clipped(value, limit) for key, value in data.items()}
    return [_clipped(item, limit) for item in data] if isinstance(data, list) else data
