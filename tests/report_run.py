"""A run folder as the pipeline leaves it, small and made of plain facts, for the report's tests."""

import math
import random
from pathlib import Path
from typing import Any

from factory import stats
from factory.rows import Message, Pair, Prompt, Sample, Verdict
from factory.run import StageFolder, StageWriter, write_bytes, write_json

Measures = dict[str, dict[str, list[float]]]
WORDS = ["the", "answer", "is", "a", "number", "of", "things", "counted", "one", "by", "one", "and", "added"]


def stage(
    run: Path,
    title: str,
    kind: str,
    unit: str,
    rows: list[tuple[str, Any]],
    reasons: dict[str, int] | None = None,
    **facts: Any,
) -> StageFolder:
    """One stage folder; `rows` are (ending, row) or (ending, None) where only the count matters."""
    out = StageWriter(run / f"{title}-0123abcd")
    for ending, row in rows:
        if row is None:
            out.counts[ending] += 1
        else:
            out.put(row)
    for reason, count in (reasons or {}).items():
        out.count_reason(reason, count)
    return out.finish({"stage": kind, "as": None, "unit": unit, "seconds": 1.5, "knobs": {}, **facts}, None)


def sample(i: int, text: str, verdict: Verdict | None = None) -> Sample:
    prompt = Prompt.of([{"role": "user", "content": f"question {i}"}])
    made = Sample(id=f"s{i}", prompt=prompt, asked=prompt.messages, response=text, model="teacher")
    return made.judged(verdict) if verdict else made


def said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def evaluation(values: Measures, samples: list[dict[str, Any]] | None = None, seed: int = 1) -> dict[str, Any]:
    """`evaluation.json` from each model's values per prompt, by the same intervals that the stage uses."""
    rows, comparisons = [], []
    for model, measures in values.items():
        role = model if model in ("base", "teacher", "gold") else "student"
        for measure, known in measures.items():
            rate = measure in ("accepted", "correct", "finished")
            low, high = stats.wilson(round(sum(known)), len(known)) if rate else stats.bootstrap_mean(known, seed)
            told = {"value": math.fsum(known) / len(known), "low": low, "high": high, "n": len(known)}
            rows.append({"model": model, "role": role, "measure": measure, **told})
            if role == "student":
                comparisons += _compared(model, measure, values, seed)
    measured = {"accepted": "share of answers that the recipe's own row filters accept"}
    return {"rows": rows, "comparisons": comparisons, "samples": samples or [], "measures": measured, "notes": []}


def _compared(model: str, measure: str, values: Measures, seed: int) -> list[dict[str, Any]]:
    found, a = [], values[model][measure]
    clusters = [str(i) for i in range(len(a))]
    for kind, other in (("difference", "base"), ("ratio", "teacher")):
        b = values.get(other, {}).get(measure)
        if b is None or (kind == "ratio" and measure not in ("accepted", "correct")):
            continue
        paired = stats.paired_bootstrap_difference if kind == "difference" else stats.paired_bootstrap_ratio
        if result := paired(a, b, seed, clusters):
            value, low, high = result
            told = {"value": value, "low": low, "high": high, "n": len(a)}
            found.append({"measure": measure, "kind": kind, "a": model, "b": other, **told})
    return found


def hits(count: int, n: int) -> list[float]:
    return [1.0] * count + [0.0] * (n - count)


def finish(
    run: Path, stages: list[StageFolder], status: str = "done", prompts: list[dict[str, Any]] | None = None,
    recipe: str = "name: demo\n", name: str = "demo",
) -> Path:  # fmt: skip
    """The run's own manifest and recipe."""
    write_bytes(run / "recipe.yaml", recipe.encode("utf-8", "surrogatepass"))
    facts = {
        "name": name,
        "recipe_hash": "aa",
        "seed": 1,
        "status": status,
        "versions": {"factory": "0.1.0", "python": "3.11"},
    }
    write_json(run / "manifest.json", {**facts, "stages": [s.path.name for s in stages], "prompts": prompts or []})
    return run


def evaluated(run: Path, values: Measures, samples: list[dict[str, Any]] | None = None) -> StageFolder:
    folder = stage(run, "09-evaluate", "evaluate", "answers", [("kept", None)] * 3)
    write_json(folder.path / "evaluation.json", evaluation(values, samples))
    return folder


def trained(run: Path, title: str = "08-student", steps: int = 60, **facts: Any) -> StageFolder:
    draw = random.Random(title)
    log = [{"step": k, "loss": 0.7 + 2.4 * math.exp(-k / 14) + draw.uniform(-0.1, 0.1)} for k in range(1, steps + 1)]
    log[-1]["eval_loss"] = 0.8
    folder = stage(run, title, "train", "rows", [("kept", None)] * 18, student="student", method="sft", model="model")
    told = {"rows_trained": 18, "rows_set_aside": {"too_long": 2}, "steps": steps, "log": log, **facts}
    write_json(folder.path / "training.json", told)
    return folder


PROMPTS = {
    "stage": "prompts", "name": "questions", "unit": "rows", "in": 300, "kept": 280, "dropped": 17, "failed": 3,
    "reasons": {"duplicate": 17, "empty": 3}, "train": 240, "test": 40,
}  # fmt: skip


def _pair(answer: Sample, draw: random.Random) -> Pair:
    shorter = " ".join(answer.response.split()[: draw.randint(3, 30)])
    return Pair(
        id=answer.id,
        prompt=answer.prompt.messages,
        chosen=said(answer.response),
        rejected=said(shorter),
        margin=round(draw.gauss(3, 1.2), 2),
        chosen_model=draw.choice(["teacher", "teacher", "rival"]),
        rejected_model=draw.choice(["base", "rival"]),
    )


def _side_by_side(i: int, values: Measures) -> dict[str, Any]:
    rows, books = i + 3, i + 4
    wrong = values["student"]["correct"][i] == 0
    texts = {
        "teacher": f"Step 1: there are {rows} rows.\nStep 2: each has {books} books.\nAnswer: {rows * books}",
        "base": "The shelf the shelf is a shelf of books that are on the shelf and the books " * 4,
        "student": f"Step 1: there are {rows} rows.\nAnswer: {rows * books + wrong}",
    }
    answers = {
        model: {
            "text": text,
            "finish": "length" if model == "base" else "stop",
            "accepted": bool(values[model]["accepted"][i]),
            "correct": bool(values[model]["correct"][i]),
        }
        for model, text in texts.items()
    }
    prompt = f"A shelf holds {rows} rows of {books} books. How many books are there? Answer in one line."
    return {"prompt": prompt, "reference": str(rows * books), "answers": answers}


def whole(run: Path) -> Path:
    """A run with everything in it: what a person would look at."""
    run.mkdir(parents=True)
    draw = random.Random(4)
    texts = [" ".join(draw.choices(WORDS, k=max(1, round(draw.lognormvariate(3, 0.6))))) for _ in range(231)]
    answers = [sample(i, text) for i, text in enumerate(texts)]
    short = Verdict(filter="words", keep=False, reason="words=3<8")
    made = [a if len(a.response.split()) >= 8 else a.judged(short) for a in answers]
    good = [a for a in made if a.ending == "kept"]
    again = Verdict(filter="near_duplicates", keep=False, reason="near_duplicate", evidence="s1")
    broken = Verdict(filter="judge", keep=None, reason="unreadable_verdict")
    kept = [a.judged(again) if i % 9 == 0 else a.judged(broken) if i % 40 == 1 else a for i, a in enumerate(good)]
    pairs = [_pair(a, draw) for a in kept if a.ending == "kept"]
    cost = {"requests": {"sent": 231, "reused": 9}, "tokens": {"prompt": 9312, "completion": 18480}, "usd": "0.0134"}
    drawn = [("kept", a) for a in answers] + [("failed", None)] * 9
    judged, paired = [("", a) for a in kept], [("", p) for p in pairs] + [("dropped", None)] * 7
    stages = [
        stage(run, "01-generate", "generate", "draws", drawn, {"timeout": 6, "empty": 3}, **cost, seconds=57.1),
        stage(run, "02-filter", "filter", "samples", [("", a) for a in made]),
        stage(run, "03-filter", "filter", "samples", judged, warnings=["4 verdicts could not be read"]),
        stage(run, "04-pair", "pair", "prompts", paired, {"tie": 7}),
        trained(run),
    ]
    n = 40

    def spread(low: float, high: float) -> list[float]:
        return [draw.uniform(low, high) for _ in range(n)]

    values: Measures = {
        "teacher": {"accepted": hits(37, n), "correct": hits(31, n), "finished": hits(40, n), "words": spread(12, 60)},
        "base": {"accepted": hits(0, n), "correct": [0.0] * 6 + hits(11, n - 6), "finished": hits(9, n)},
        "student": {"accepted": hits(38, n), "correct": [0.0] * 4 + hits(12, n - 4), "finished": hits(39, n)},
    }
    values["base"] |= {"words": spread(30, 90), "teacher_loss": spread(2, 3)}
    values["student"] |= {"words": spread(10, 60), "teacher_loss": spread(0.8, 1.4)}
    shown = [_side_by_side(i, values) for i in range(n)]
    stages.append(evaluated(run, values, shown))
    return finish(run, stages, prompts=[PROMPTS], recipe=RECIPE, name="books")


RECIPE = """\
name: books
seed: 7
models:
  teacher: {type: openai, model: some-teacher, base_url: "https://127.0.0.1/v1", api_key_env: TEACHER_API_KEY}
  base: {type: transformers, model: ./weights/base}
prompts:
  - {path: prompts/questions.jsonl, name: questions, held_out: 40}
stages:
  - generate: {from: questions, model: teacher, temperature: 0.7}
  - filter: [finished, {words: {min: 8}}]
  - train: {method: sft, student: base, as: student}
  - evaluate: {students: [base, student], teacher: teacher}
"""
