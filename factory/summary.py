"""What an evaluation comes to, as `evaluation.json`: rates and means with intervals, models compared prompt by prompt.

Comparisons are of four kinds. `difference`: student - base. `beside_gold`: student - the one trained on ground truth.
`ratio` (retention): student / teacher. `gap`: (student - base) / (teacher - base). Differences of rates carry the exact
McNemar p-value, and `p_holm`, which is corrected for the number of students. Win rates carry those of the exact sign test
of wins against losses, and have their value at equal length beside them.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec

from factory import stats
from factory.measures import BINS, RATES, Scored, Values, calibration_error, definition, off_by_bin
from factory.rows import Prompt

MAX_SHOWN = 40
BY_LIST = ("accepted", "correct", "win_rate")
"""Measures that are told for each prompt list."""
HIGHER_IS_BETTER = ("accepted", "correct", "pass@", "accepted@", "bleu", "rouge_l")
"""Measures of which a share of the teacher's can be asked for."""

VALUES = "values.jsonl"
"""Beside `evaluation.json`: what its means and intervals are made of."""

Row = dict[str, Any]


def values_by_prompt(models: list[Scored]) -> Iterator[bytes]:
    """A line for each held-out prompt with every model's value in every measure, null where it cannot be told."""
    for i, sample in enumerate(models[0].samples):
        told = {
            model.name: {measure: values[i] for measure, values in model.values.items() if values} for model in models
        }
        yield msgspec.json.encode({"prompt": sample.prompt.id, "values": told}) + b"\n"


def summary(models: list[Scored], seed: int, outside: Collection[str] = ()) -> Row:
    """`evaluation.json`: rows, comparisons, samples side by side. `outside` are prompt lists that nothing is trained on."""
    rows = [row for model in models for row in _rows(model, seed)]
    _correct_for_many(rows)
    return {
        "rows": rows,
        "comparisons": list(_comparisons(models, seed)),
        "lists": list(_by_list(models, seed)),
        "list_comparisons": list(_list_comparisons(models, outside, seed)),
        "samples": [_side_by_side(models, i) for i in range(min(MAX_SHOWN, len(models[0].samples)))],
        "measures": {name: definition(name) for name in dict.fromkeys(row["measure"] for row in rows)},
        "notes": [note for model in models for note in _notes(model)],
    }


def beside_first(models: list[Scored], seed: int) -> Row:
    """Rows of each, and the difference of each from the first; p-values are corrected for the number of the others."""
    found = [
        row
        for model in models[1:]
        for measure in model.values
        for row in _paired("difference", measure, [model, models[0]], seed)
    ]
    _correct_for_many(found)
    return {
        "rows": [row for model in models for row in _rows(model, seed)],
        "comparisons": found,
        "notes": [note for model in models for note in _notes(model)],
    }


# -- one model ---------------------------------------------------------------------------------------------------------


def _rows(model: Scored, seed: int) -> Iterator[Row]:
    for measure, values in model.values.items():
        known = [v for v in values if v is not None]
        if not known:
            continue
        mean = math.fsum(known) / len(known)
        wins = model.longer.get(measure)
        low, high = _interval(measure, known, seed)
        row = _row(model, measure, (mean, low, high), len(known))
        yield row if wins is None else {**row, "p": stats.mcnemar(known, [1 - v for v in known])}
        if wins and not isinstance(level := _at_equal_length(model, measure), str):
            yield _row(model, f"lc_{measure}", level, len(known))
        if measure == "teacher_loss":  # exp keeps the order, so an interval's ends stay its ends
            yield _row(model, "teacher_perplexity", (_exp(mean), _exp(low), _exp(high)), len(known))
        if measure == "brier":
            off = [one for one in _off(model) if one is not None]
            low, high = stats.bootstrap([(*one, 1.0) for one in off], calibration_error, seed)
            whole = calibration_error(*map(math.fsum, zip(*off, strict=True)), len(off))
            yield _row(model, "ece", (whole, low, high), len(off))


def _interval(measure: str, known: list[float], seed: int) -> tuple[float, float]:
    """Wilson's for rates, and where all prompts end alike: there a bootstrap interval has no width."""
    share = "@" in measure or measure.startswith("win_rate")
    if measure in RATES or (share and min(known) == max(known)):
        return stats.wilson(round(math.fsum(known)), len(known))
    return stats.bootstrap_mean(known, seed)


def _at_equal_length(model: Scored, measure: str) -> tuple[float, float, float] | str:
    both = zip(model.values[measure], model.longer[measure], strict=True)
    known = [(won, float(longer or 0)) for won, longer in both if won is not None]
    return stats.at_zero([won for won, _ in known], [longer for _, longer in known])


def _row(model: Scored, measure: str, told: tuple[float, float, float], n: int) -> Row:
    value, low, high = told
    return {
        "model": model.name, "role": model.role, "measure": measure, "value": value, "low": low, "high": high, "n": n,
    }  # fmt: skip


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _off(model: Scored) -> list[tuple[float, ...] | None]:
    return [off_by_bin(*both) for both in zip(model.confidence, model.values["correct"], strict=True)]


def _notes(model: Scored) -> Iterator[str]:
    """Answers that count against a model, but are no wrong answers: form that cannot be read, requests that failed."""
    if unread := round(sum(v or 0.0 for v in model.values["unread"])):
        told = sum(v is not None for v in model.values["unread"])
        yield f"correct: {unread} of {told} answers of {model.name} have no readable result, and count as not correct"
    answers = [*model.samples, *(s for drawn in model.drawn for s in drawn)]
    if failed := sum(s.finish == "failed" for s in answers):
        yield f"{failed} of {len(answers)} answers of {model.name} never came; they count as not accepted and not correct"

    for measure in model.longer:
        if any(v is not None for v in model.values[measure]) and isinstance(
            why := _at_equal_length(model, measure), str
        ):
            yield f"lc_{measure} of {model.name} cannot be told: {why}"


def _by_list(models: list[Scored], seed: int) -> Iterator[Row]:
    """Rates for each prompt list, where several hold prompts out: a held-out domain is a list of its own."""
    for source, here in _places(models[0]).items():
        for model in models:
            for measure in filter(model.values.__contains__, BY_LIST):
                known = [v for i in here if (v := model.values[measure][i]) is not None]
                if known:
                    told = (math.fsum(known) / len(known), *_interval(measure, known, seed))
                    yield {"list": source, **_row(model, measure, told, len(known))}


def _places(model: Scored) -> dict[str, list[int]]:
    """The places of each list's prompts; nothing where there is one list alone."""
    found: dict[str, list[int]] = {}
    for i, sample in enumerate(model.samples):
        found.setdefault(sample.prompt.source, []).append(i)
    return found if len(found) > 1 else {}


# -- models compared ---------------------------------------------------------------------------------------------------


def _comparisons(models: list[Scored], seed: int) -> Iterator[Row]:
    base, gold, teacher = (next((m for m in models if m.role == role), None) for role in ("base", "gold", "teacher"))
    students = [m for m in models if m.role == "student"]
    found: list[Row] = []
    for student in students:
        for measure in student.values:
            for kind, other in (("difference", base), ("beside_gold", gold)):
                if other is not None:
                    found += _paired(kind, measure, [student, other], seed)
            if teacher is not None and measure.startswith(HIGHER_IS_BETTER):
                found += _paired("ratio", measure, [student, teacher], seed)
                if base is not None:
                    found += _paired("gap", measure, [student, base, teacher], seed)
        if base is not None:
            found += _calibration(student, base, seed)
    _correct_for_many(found)
    yield from found


def _list_comparisons(models: list[Scored], outside: Collection[str], seed: int) -> Iterator[Row]:
    """Students against the base for each prompt list: what was trained may cost what lies elsewhere."""
    base = next((m for m in models if m.role == "base"), None)
    found: list[Row] = []
    for source, here in _places(models[0]).items() if base else ():
        for student in (m for m in models if m.role == "student"):
            assert base is not None
            for measure in ("accepted", "correct"):
                for row in _paired("difference", measure, [student, base], seed, here):
                    unread = round(sum(student.values["unread"][i] or 0.0 for i in here))
                    found.append({"list": source, "outside": source in outside, **row, "unread_a": unread})
    _correct_for_many(found)
    yield from found


def _paired(
    kind: str, measure: str, models: list[Scored], seed: int, here: Sequence[int] | None = None
) -> Iterator[Row]:
    """The comparison over the prompts for which all the models have a value; nothing where there is none. `here` are the
    places of the prompts that it is about, or all."""
    if any(measure not in m.values for m in models):
        return
    here = range(len(models[0].samples)) if here is None else here
    values = [[m.values[measure][i] for i in here] for m in models]
    columns, clusters = _together(values, [models[0].samples[i].prompt for i in here])
    if not clusters:
        return
    row: Row = {"measure": measure, "kind": kind, "a": models[0].name, "b": models[1].name}
    told: tuple[float, float, float] | None
    why = ""
    match kind:
        case "ratio":
            told = stats.paired_bootstrap_ratio(columns[0], columns[1], seed, clusters)
            why = "the teacher's is 0"
        case "gap":
            told = stats.gap_closed(columns[0], columns[1], columns[2], seed, clusters)
            row["teacher"] = models[2].name
            why = "the teacher is not 2 standard errors above the base"
        case _:
            told = stats.paired_bootstrap_difference(columns[0], columns[1], seed, clusters)
            if measure in RATES:
                row["p"] = stats.mcnemar(columns[0], columns[1])
    value, low, high = told or (None, None, None)
    row |= {"value": value, "low": low, "high": high, "n": len(clusters)}
    if told is None:
        row["undefined"] = why
    if measure == "correct":
        row["unread"] = round(sum(models[1].values["unread"][i] or 0.0 for i in here))
    yield row


def _together(values: list[Values], prompts: list[Prompt]) -> tuple[list[list[float]], list[str]]:
    """One column for each model, of the prompts for which all are known, and the prompts' ids."""
    rows: list[list[float]] = []
    clusters = []
    for *row, prompt in zip(*values, prompts, strict=True):
        known = [v for v in row if v is not None]
        if len(known) == len(values):
            rows.append(known)
            clusters.append(prompt.id)
    return [list(column) for column in zip(*rows, strict=True)], clusters


def _calibration(student: Scored, base: Scored, seed: int) -> Iterator[Row]:
    """Difference of the calibration errors."""
    both = [(*a, *b, 1.0) for a, b in zip(_off(student), _off(base), strict=True) if a is not None and b is not None]
    if not both:
        return

    def difference(*sums: float) -> float:
        return calibration_error(*sums[:BINS], sums[-1]) - calibration_error(*sums[BINS:])

    low, high = stats.bootstrap(both, difference, seed)
    value = difference(*map(math.fsum, zip(*both, strict=True)))
    told = {"value": value, "low": low, "high": high, "n": len(both)}
    yield {"measure": "ece", "kind": "difference", "a": student.name, "b": base.name, **told}


def _correct_for_many(found: list[Row]) -> None:
    """Holm's correction over the students, for each measure and kind of comparison."""

    def family(row: Row) -> tuple[str, str]:
        return row["measure"], row.get("kind", "")

    for _, rows in groupby(sorted((r for r in found if "p" in r), key=family), key=family):
        together = list(rows)
        for row, p in zip(together, stats.holm([r["p"] for r in together]), strict=True):
            row["p_holm"] = p


# -- the answers -------------------------------------------------------------------------------------------------------


def _side_by_side(models: list[Scored], i: int) -> Row:
    prompt = models[0].samples[i].prompt
    answers = {}
    for model in models:
        sample, correct = model.samples[i], model.values["correct"][i]
        answers[model.name] = {
            "text": sample.response,
            "finish": sample.finish,
            "accepted": bool(model.values["accepted"][i]),
            "correct": None if correct is None else bool(correct),
            "unread": bool(model.values["unread"][i]),
        }
    return {"prompt": prompt.text, "reference": prompt.reference, "answers": answers}
