"""What a run shows, in sentences: from counts and paired intervals alone, and no further than they go.

A difference is claimed only where its paired 95 % interval excludes zero and at least `FEWEST` prompts stand behind it;
with several students, only where the exact test, corrected for their number, agrees.
"""

from collections.abc import Iterator
from typing import Any

from factory.data_findings import of_cost, of_data, of_pairs, of_training

FEWEST = 10
"""With fewer prompts a bootstrap interval is too narrow to be believed: with one it has no width at all."""

MANY_UNREAD = 0.1
"""Share of answers without a readable result from which `correct` is said to measure the form as well."""

PLACE_TELLS = 0.5
"""Share of a judge's comparisons decided by place from which its win rate is not believed."""

LEVEL = 0.05
"""Of the tests: the chance of a claim where there is nothing."""

Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]
"""By model and measure, or by measure and kind of comparison."""

CLAIMS = {
    # measure: (what is said of it, if it rose, if it fell, if neither shows)
    "accepted": (
        "the form that the filters ask for",
        "the form that the filters ask for was learned",
        "the filters accept fewer answers than before training",
        "this run does not show that the form was learned",
    ),
    "correct": (
        "correct answers",
        "correctness improved",
        "correctness got worse",
        "this run does not show that correctness improved",
    ),
    "teacher_loss": (
        "loss on the teacher's answers",
        "the student moved away from the teacher",
        "the student moved towards the teacher",
        "this run does not show that the student moved towards the teacher",
    ),
}


def findings(report: Row) -> list[str]:
    """Sentences for a report as `factory.report.collect` makes it; the first one is the headline."""
    return [
        *_of_status(report),
        *(gate["told"] for gate in report.get("gates", []) if not gate["met"]),
        *_of_evaluation(report),
        *arms_compared(report.get("arms") or {}),
        *(gate["told"] for gate in report.get("gates", []) if gate["met"]),
        *of_training(report),
        *of_data(report),
        *of_cost(report.get("spent", {})),
        *of_pairs(report),
    ]


def _of_status(report: Row) -> Iterator[str]:
    if report["status"] != "done":
        yield f"The run is not complete (status: {report['status']}): only the stages below were finished."


# -- the student -------------------------------------------------------------------------------------------------------


def _of_evaluation(report: Row) -> Iterator[str]:
    rows = {(row["model"], row["measure"]): row for row in report["evaluation"]}
    students = list(dict.fromkeys(row["model"] for row in report["evaluation"] if row["role"] == "student"))
    if not report["evaluation"]:
        trained = "A student was trained but" if report["training"] else "No student was trained, and"
        yield f"{trained} nothing was evaluated: this run says nothing about how good a student is."
        return
    if not students:
        yield "Models were evaluated, but none of them was trained in this run: there is no before and after."
    for name in reversed(students):  # the last one trained is what the run was for
        who = "the student" if len(students) == 1 else f"the student {name}"
        paired = {(c["measure"], c["kind"]): c for c in report["comparisons"] if c["a"] == name}
        several = len(students) > 1
        for measure in CLAIMS:
            if (name, measure) in rows:
                yield _capital(_before_and_after(who, measure, rows, rows[name, measure], paired, several))
        yield from (_capital(text) for text in _of_draws(who, name, rows, paired))
        yield from (_capital(text) for text in _of_lists(who, name, report.get("list_comparisons", [])))
        yield from (_capital(text) for one in report.get("lm_eval", []) for text in _of_tasks(who, name, one))
        judged = (one for one in report.get("judged", []) if one["a"] == name)
        yield from (_capital(text) for one in judged if (text := _of_wins(who, one, rows, several)))
        for told in (_of_style, _beside_teacher, _of_gap, _beside_gold):
            yield from (_capital(text) for text in told(who, paired))
    if not any(row["measure"] == "correct" for row in report["evaluation"]):
        yield "Correctness was not measured: no held-out prompt has a reference."


def _before_and_after(who: str, measure: str, rows: Rows, after: Row, paired: Rows, several: bool) -> str:
    difference = paired.get((measure, "difference"))
    before = rows.get((difference["b"], measure)) if difference else None
    if difference is None or before is None:
        return f"{_measured(measure, who, after)}; there is no base model to compare with, so no gain is shown."
    told = f"{_measured(measure, who, after)}, {_also(measure, before)}"
    if measure != "accepted" or not _claimed(difference) or difference["n"] < FEWEST:
        told += f"; the difference of {_difference(measure, difference)}"
    if several and _claimed(difference) and not _stands(difference):
        told += f", but the exact test, corrected for the number of students, does not (p = {difference['p_holm']:.2g})"
    return f"{told}: {_verdict(measure, difference, several)}."


def _measured(measure: str, who: str, row: Row) -> str:
    k, n = round(row["value"] * row["n"]), row["n"]
    match measure:
        case "accepted":
            return f"{who}'s answers are accepted for {k} of {n} held-out prompts ({_rate(row)})"
        case "correct":
            return f"correct answers: {who} {k} of {n} ({_rate(row)})"
        case _:
            return f"loss per token on the teacher's answers: {who} {_number(row)}"


def _also(measure: str, row: Row) -> str:
    k = round(row["value"] * row["n"])
    match measure:
        case "accepted":
            return f"the base model's for {k} ({_rate(row)})"
        case "correct":
            return f"base model {k} ({_rate(row)})"
        case _:
            return f"base model {_number(row)}"


def _difference(measure: str, c: Row) -> str:
    """Value, interval and where zero lies, ready for "the difference of"."""
    if measure == "teacher_loss":
        told = f"{c['value']:+.2f} nats ({c['low']:+.2f} to {c['high']:+.2f})"
    else:
        told = f"{_points(c['value'])} points ({_points(c['low'])} to {_points(c['high'])})"
    return f"{told} {'excludes' if _claimed(c) else 'includes'} zero"


def _verdict(measure: str, c: Row, several: bool) -> str:
    _, rose, fell, neither = CLAIMS[measure]
    if c["n"] < FEWEST:
        return f"{c['n']} prompts are too few to conclude anything"
    if c.get("unread", 0) > MANY_UNREAD * c["n"]:
        return f"{c['unread']} answers of {c['b']} cannot be read in the form asked for, so this measures form as well"
    if not _claimed(c) or (several and not _stands(c)):
        return neither
    return rose if c["low"] > 0 else fell


def _claimed(c: Row) -> bool:
    """Whether the paired interval excludes zero."""
    return bool(c["low"] > 0 or c["high"] < 0)


def _stands(c: Row) -> bool:
    """Whether the exact test, corrected for the number of students, sees a difference too; for rates alone there is one."""
    return bool(c.get("p_holm", 0.0) < LEVEL)


def _of_draws(who: str, name: str, rows: Rows, paired: Rows) -> Iterator[str]:
    """Of sampled answers: does the student reach more, or does it only say more surely what the base model could say?"""
    for measure in sorted(m for model, m in rows if model == name and m.startswith("pass@") and m != "pass@1"):
        c, one = paired.get((measure, "difference")), paired.get(("pass@1", "difference"))
        told = f"sampled answers: {who}'s pass@1 is {_rate(rows[name, 'pass@1'])}, its {measure} {_rate(rows[name, measure])}"
        if c is None or one is None or c["n"] < FEWEST:
            yield f"{told}."
            continue
        told += f"; the base model's are {_rate(rows[c['b'], 'pass@1'])} and {_rate(rows[c['b'], measure])}"
        if one["low"] > 0 and not c["low"] > 0:
            told += f": it is right more often at once, but not shown to be so in {measure[5:]} tries, which may be sharpening alone"
        yield f"{told}."


def _of_lists(who: str, name: str, compared: list[Row]) -> Iterator[str]:
    """What training has cost or brought elsewhere: on prompt lists none of whose prompts were trained on."""
    for c in compared:
        if c["a"] != name or not c["outside"] or c["measure"] != "correct" or c["n"] < FEWEST:
            continue
        told = f"on {c['list']}, no prompt of which was trained on ({c['n']} prompts), {who}'s correct answers less the base model's"
        told += f" are {_points(c['value'])} points ({_points(c['low'])} to {_points(c['high'])})"
        if not _claimed(c) or not _stands(c):
            lost = f", a loss of {_points(-c['low'])[1:]} points is not excluded" if c["low"] < 0 else ""
            yield f"{told}: no forgetting is shown{lost}."
        elif c["low"] > 0:
            yield f"{told}: nothing was forgotten, and what was learned carries over."
        elif c["unread_a"] > MANY_UNREAD * c["n"]:
            yield f"{told}: forgotten, or only no longer in the form asked for: {c['unread_a']} answers cannot be read."
        else:
            yield f"{told}: some of what the base model could do there is forgotten."


def _of_tasks(who: str, name: str, told: Row) -> Iterator[str]:
    """Tasks of the harness: where a difference is shown, and how many show none."""
    mine = [c for c in told["comparisons"] if c["a"] == name and c["n"] >= FEWEST]
    shown = [c for c in mine if _claimed(c) and _stands(c)]
    for c in shown:
        how = "higher" if c["low"] > 0 else "lower"
        yield (
            f"tasks, {c['task']} ({c['n']} items): {who} has a {how} {c['metric'].partition(',')[0]} than {c['b']}, by "
            f"{c['value']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})."
        )
    if len(mine) > len(shown):
        yield f"tasks: no difference of {who} from {mine[0]['b']} is shown by {len(mine) - len(shown)} of {len(mine)} results."


def _of_wins(who: str, judged: Row, rows: Rows, several: bool) -> str | None:
    """What a judge prefers, and what is left of it at equal length."""
    won, level = (rows.get((judged["a"], prefix + judged["measure"])) for prefix in ("", "lc_"))
    if won is None:
        return None
    told = (
        f"the judge prefers {who}'s answers to those of {judged['b']} in {_rate(won)} of {won['n']} prompts (ties half)"
    )
    told += f"; at equal length {_rate(level)}" if level else "; at equal length it cannot be told"
    compared = judged["wins"] + judged["ties"] + judged["losses"]
    if won["n"] < FEWEST:
        return f"{told}: {won['n']} prompts are too few to conclude anything."
    if judged["place_decided"] > PLACE_TELLS * compared:
        return f"{told}: the place decided {judged['place_decided']} of {compared} comparisons, so this judge tells little."
    how = _side(won)
    if not how or (several and won["p_holm"] >= LEVEL):
        return f"{told}: this run does not show a preference."
    if level is None or _side(level) == how:
        return f"{told}: its judge finds them {how}."
    return f"{told}: it finds them {how}, but no preference is shown at equal length, so length may be what it goes by."


def _side(rate: Row) -> str | None:
    """On which side of one half a rate's interval lies."""
    return "better" if rate["low"] > 0.5 else "worse" if rate["high"] < 0.5 else None


def _of_style(who: str, paired: Rows) -> Iterator[str]:
    """The false promise of imitation (Gudibande et al. 2023): the teacher's wording without what it can do."""
    wording, correct = paired.get(("teacher_overlap", "difference")), paired.get(("correct", "difference"))
    if (
        wording
        and correct
        and min(wording["n"], correct["n"]) >= FEWEST
        and wording["low"] > 0
        and not correct["low"] > 0
    ):
        yield (
            f"{who}'s wording came closer to the teacher's (ROUGE-L {wording['value']:+.2f}, {wording['low']:+.2f} to "
            f"{wording['high']:+.2f}), its correctness was not shown to rise: style may be what was learned."
        )


SHARES = {"accepted": "accepted answers", "correct": "correct answers"}


def _of_gap(who: str, paired: Rows) -> Iterator[str]:
    """The share of what lies between base and teacher."""
    for measure, what in SHARES.items():
        c = paired.get((measure, "gap"))
        if not c or c["n"] < FEWEST:
            continue
        if c["value"] is None:
            yield f"how much of the gap in {what} {who} closes is undefined: {c['undefined']}."
        else:
            yield f"{who} closes {100 * c['value']:.0f} % of the gap in {what} between base and teacher ({_bounds(c)}, {c['n']} prompts)."


def _beside_gold(who: str, paired: Rows) -> Iterator[str]:
    """Distilled against trained on ground truth."""
    for measure, what in SHARES.items():
        c = paired.get((measure, "beside_gold"))
        if not c or c["n"] < FEWEST:
            continue
        then = "no difference is shown" if not _claimed(c) else f"{who} has {'more' if c['low'] > 0 else 'fewer'}"
        yield f"{what} of {who} against the one trained on ground truth: {_difference(measure, c)}: {then}."


def _beside_teacher(who: str, paired: Rows) -> Iterator[str]:
    for measure, what in SHARES.items():
        c = paired.get((measure, "ratio"))
        if c and c["n"] >= FEWEST and c["value"] is not None:
            yield f"{who}'s share of {what} is {100 * c['value']:.0f} % of the teacher's ({_bounds(c)}, {c['n']} prompts)."


def _bounds(c: Row) -> str:
    """An interval of shares; an end without bound is null in JSON."""
    low = "no lower bound" if c["low"] is None else f"{100 * c['low']:.0f} %"
    high = "no upper bound" if c["high"] is None else f"{100 * c['high']:.0f} %"
    return f"interval {low} to {high}"


# -- arms ----------------------------------------------------------------------------------------------------------------


def arms_compared(comparison: Row) -> Iterator[str]:
    """What the arms of a comparison (`factory.compare`) show beside the first one."""
    rows = {(row["model"], row["measure"]): row for row in comparison.get("rows", [])}
    for c in comparison.get("comparisons", []):
        if c["measure"] not in SHARES:
            continue
        told = f"arm {c['a']} against {c['b']}: {SHARES[c['measure']]} {_rate(rows[c['a'], c['measure']])}, against "
        told += f"{_rate(rows[c['b'], c['measure']])}; the difference of {_difference(c['measure'], c)}"
        if _claimed(c) and not _stands(c):
            told += f", but the exact test, corrected for the number of arms, does not (p = {c['p_holm']:.2g})"
        yield _capital(f"{told}: {_beside(c)}.")


def _beside(c: Row) -> str:
    if c["n"] < FEWEST:
        return f"{c['n']} prompts are too few to conclude anything"
    if not (_claimed(c) and _stands(c)):
        return "no difference is shown"
    return f"{c['a']} has {'more' if c['low'] > 0 else 'fewer'}"


# -- numbers -----------------------------------------------------------------------------------------------------------


def _rate(row: Row) -> str:
    return f"{100 * row['value']:.0f} %, interval {100 * row['low']:.0f}-{100 * row['high']:.0f} %"


def _number(row: Row) -> str:
    return f"{row['value']:.2f} ({row['low']:.2f}-{row['high']:.2f})"


def _points(share: float) -> str:
    """Percentage points; small ones with a decimal, so that what excludes zero does not read as zero."""
    return f"{100 * share:+.1f}" if 0 < abs(share) < 0.01 else f"{100 * share:+.0f}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
