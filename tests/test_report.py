"""The report: its numbers are those of the run's files, its sentences go no further, its page is inert."""

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from factory import report
from factory.rows import Verdict
from factory.run import StageFolder
from tests.report_run import PROMPTS, Measures, evaluated, finish, hits, sample, stage, trained, whole


def manifests(run: Path) -> list[dict[str, Any]]:
    names = json.loads((run / "manifest.json").read_text())["stages"]
    return [json.loads((run / name / "manifest.json").read_text()) for name in names]


def test_the_cost_of_a_row_counts_all_starts_of_the_run(tmp_path: Path) -> None:
    run = whole(tmp_path / "books")
    manifest = json.loads((run / "manifest.json").read_text())
    spent = {"usd": 0.5, "seconds": 90.0, "requests": 300, "unknown": 2, "hours": 0.1}
    rows = {"first": {"train": 7, "test": 0}, "last": {"train": 25, "test": 3}}
    (run / "manifest.json").write_text(json.dumps({**manifest, "spent": spent, "rows": rows}))
    told = report.build(run)
    assert (told["spent"]["usd_a_row"], told["spent"]["seconds_a_row"], told["spent"]["rows"]) == (0.02, 3.6, 25)
    assert "Cost: 0.5 USD for 25 rows, 0.02 USD a row." in told["findings"]
    assert "Compute of local models: 90 s for 25 rows, 3.6 s a row." in told["findings"]
    assert any(line.startswith("2 requests were in flight") for line in told["findings"])


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_manifests(tmp_path: Path) -> None:
    run = whole(tmp_path / "books")
    told = report.build(run)
    assert json.loads((run / "report.json").read_text()) == told
    keys = ("stage", "unit", "in", "kept", "dropped", "failed", "reasons")
    assert [{k: row[k] for k in keys} for row in told["funnel"]] == [
        {k: m[k] for k in keys} for m in [PROMPTS, *manifests(run)]
    ]
    for row in told["funnel"]:
        assert row["in"] == row["kept"] + row["dropped"] + row["failed"]
    costs = ("seconds", "requests", "tokens", "usd")
    asked = [m for m in manifests(run) if "requests" in m]
    assert [{k: s[k] for k in costs} for s in told["stages"] if s["requests"]["sent"]] == [
        {k: m[k] for k in costs} for m in asked
    ]
    evaluation = json.loads((run / "09-evaluate-0123abcd/evaluation.json").read_text())
    assert (told["evaluation"], told["comparisons"]) == (evaluation["rows"], evaluation["comparisons"])
    assert told["training"][0]["rows_trained"] == 18
    assert len(told["training"][0]["curve"]) == 60
    assert (told["pairs"]["n"], len(told["samples"])) == (189, 40)
    unread, length = told["warnings"]
    assert unread == "03-filter: 4 verdicts could not be read"
    assert length.startswith("pairs: length alone predicts the choice: in at least 97 % of 126 pairs")
    assert told["recipe"] == (run / "recipe.yaml").read_text()


def test_lengths_count_every_kept_and_dropped_answer_of_the_last_sample_stage(tmp_path: Path) -> None:
    told = report.build(whole(tmp_path / "books"))
    last = next(row for row in reversed(told["funnel"]) if row["stage"] == "filter")
    bins = told["lengths"]["bins"]
    assert told["lengths"]["stage"] == last["name"]
    assert sum(b["kept"] for b in bins) == last["kept"]
    assert sum(b["dropped"] for b in bins) == last["dropped"]
    assert all(a["to"] + 1 == b["from"] for a, b in pairwise(bins))


@pytest.mark.parametrize("length", [0, 1, 23, 24, 500])
def test_lengths_of_a_few_answers(length: int, tmp_path: Path) -> None:
    long = sample(2, "word " * 700).judged(Verdict(filter="words", keep=False, reason="words=700>600"))
    answers = [("", sample(0, "word " * length)), ("", sample(1, "a b")), ("", long)]
    bins = report.build(finish(tmp_path, [stage(tmp_path, "01-given", "given", "samples", answers)]))["lengths"]["bins"]
    assert sum(b["kept"] for b in bins) == 2
    assert next(b for b in bins if b["from"] <= length <= b["to"])["kept"]
    assert (bins[-1]["dropped"], bins[-1]["from"] <= 700 <= bins[-1]["to"]) == (1, True)


def test_what_the_trainer_notes_is_a_warning(tmp_path: Path) -> None:
    told = report.build(finish(tmp_path, [trained(tmp_path, notes=["all rows count alike"])]))
    assert told["warnings"] == ["08-student: all rows count alike"]


def test_each_task_of_a_training_has_its_line(tmp_path: Path) -> None:
    log = [{"step": i, "loss": 3.0 - i, "loss/rows.v1/label": 2.0 - i, "grad_norm": 9.0} for i in (1, 2)]
    folder = trained(tmp_path)
    (folder.path / "training.json").write_text(json.dumps({"rows_trained": 18, "log": log}))
    told = report.build(finish(tmp_path, [folder]))["training"][0]
    assert told["tasks"] == ["loss/rows.v1/label"]
    assert told["curve"] == [{key: value for key, value in point.items() if key != "grad_norm"} for point in log]
    page = (tmp_path / "report.html").read_text()
    assert '<polyline class="task" points="0.0,150.0 1000.0,300.0 "><title>loss/rows.v1/label</title>' in page
    assert "training loss, thin: rows.v1/label" in page
    assert Page(tmp_path / "report.html").faults() == []


def test_a_training_that_diverged_still_has_its_report(tmp_path: Path) -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": float("nan")}]
    folder = trained(tmp_path)
    (folder.path / "training.json").write_text(json.dumps({"rows_trained": 18, "log": log}))
    told = report.build(finish(tmp_path, [folder]))
    assert told["training"][0]["curve"] == log[:2]
    assert Page(tmp_path / "report.html").faults() == []


# -- findings ----------------------------------------------------------------------------------------------------------

FINDINGS: list[tuple[str, Measures, str]] = [
    (
        "the form, learned",
        {"base": {"accepted": hits(0, 40)}, "student": {"accepted": hits(38, 40)}},
        "The student's answers are accepted for 38 of 40 held-out prompts (95 %, interval 83-99 %), the base model's "
        "for 0 (0 %, interval 0-9 %): the form that the filters ask for was learned.",
    ),
    (
        "the form, unclear",
        {"base": {"accepted": hits(10, 40)}, "student": {"accepted": [0.0] * 29 + hits(11, 11)}},
        "includes zero: this run does not show that the form was learned.",
    ),
    (
        "the form, lost",
        {"base": {"accepted": hits(30, 40)}, "student": {"accepted": hits(5, 40)}},
        "the filters accept fewer answers than before training.",
    ),
    (
        "correctness, unclear",
        {"base": {"correct": hits(11, 40)}, "student": {"correct": [0.0] * 28 + hits(12, 12)}},
        "Correct answers: the student 12 of 40 (30 %, interval 18-45 %), base model 11 (28 %, interval 16-43 %); the "
        "difference of +2 points (-20 to +28) includes zero: this run does not show that correctness improved.",
    ),
    (
        "correctness, better",
        {"base": {"correct": hits(5, 40)}, "student": {"correct": hits(30, 40)}},
        "excludes zero: correctness improved.",
    ),
    (
        "correctness, worse",
        {"base": {"correct": hits(30, 40)}, "student": {"correct": hits(5, 40)}},
        "excludes zero: correctness got worse.",
    ),
    (
        "no difference at all",
        {"base": {"correct": hits(0, 40)}, "student": {"correct": hits(0, 40)}},
        "+0 points (+0 to +0) includes zero: this run does not show that correctness improved.",
    ),
    (
        "a gap that looks huge, from three prompts",
        {"base": {"accepted": hits(0, 3)}, "student": {"accepted": hits(3, 3)}},
        "3 prompts are too few to conclude anything.",
    ),
    (
        "loss, lower",
        {"base": {"teacher_loss": [2.0, 2.5] * 10}, "student": {"teacher_loss": [1.0, 1.5] * 10}},
        "-1.00 nats (-1.00 to -1.00) excludes zero: the student moved towards the teacher.",
    ),
    (
        "loss, higher",
        {"base": {"teacher_loss": [1.0] * 20}, "student": {"teacher_loss": [2.0] * 20}},
        "the student moved away from the teacher.",
    ),
    (
        "no base",
        {"student": {"accepted": hits(20, 40)}},
        "(50 %, interval 35-65 %); there is no base model to compare with, so no gain is shown.",
    ),
    (
        "two students: the last one leads, each by name",
        {"base": {"accepted": hits(0, 40)}, "first": {"accepted": hits(20, 40)}, "second": {"accepted": hits(40, 40)}},
        "The student second's answers are accepted for 40 of 40",
    ),
    ("no student", {"base": {"accepted": hits(0, 40)}}, "there is no before and after."),
]


@pytest.mark.parametrize(("values", "told"), [f[1:] for f in FINDINGS], ids=[f[0] for f in FINDINGS])
def test_the_headline_says_what_the_paired_interval_shows(values: Measures, told: str, tmp_path: Path) -> None:
    headline = report.build(finish(tmp_path, [trained(tmp_path), evaluated(tmp_path, values)]))["findings"][0]
    assert told in headline


def test_a_ratio_to_the_teacher_with_and_without_an_upper_bound(tmp_path: Path) -> None:
    few = {"teacher": {"correct": hits(2, 20)}, "base": {"correct": hits(1, 20)}, "student": {"correct": hits(1, 20)}}
    many = {"teacher": {"correct": hits(16, 20)}, "base": {"correct": hits(1, 20)}, "student": {"correct": hits(8, 20)}}
    for folder, values, told in (("few", few, "no upper bound"), ("many", many, "is 50 % of the teacher's (interval")):
        (tmp_path / folder).mkdir()
        run = finish(tmp_path / folder, [evaluated(tmp_path / folder, values)])
        assert any(told in line for line in report.build(run)["findings"])
        assert "inf" not in (run / "report.json").read_text()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    def first(name: str, *stages: StageFolder, status: str = "done") -> str:
        return str(report.build(finish(tmp_path / name, list(stages), status))["findings"][0])

    for name in ("nothing", "trained", "stopped", "unreferenced"):
        (tmp_path / name).mkdir()
    assert first("nothing").startswith("No student was trained, and nothing was evaluated")
    assert first("trained", trained(tmp_path / "trained")).startswith("A student was trained but nothing was evaluated")
    assert "not complete (status: stopped)" in first("stopped", status="stopped")
    values: Measures = {"base": {"accepted": hits(1, 20)}, "student": {"accepted": hits(19, 20)}}
    run = finish(tmp_path / "unreferenced", [evaluated(tmp_path / "unreferenced", values)])
    assert "Correctness was not measured: no held-out prompt has a reference." in report.build(run)["findings"]


# -- the page ----------------------------------------------------------------------------------------------------------


PLAIN = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "h1", "h2", "h3", "p", "b", "small",
    "span", "div", "ul", "li", "figure", "figcaption", "details", "summary", "pre", "table", "thead", "tbody", "tfoot",
    "tr", "th", "td", "svg", "line", "circle", "rect", "g", "polyline",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would act on: elements, handlers, addresses; and the text that it would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def faults(self) -> list[str]:
        """Everything on the page that could run or load something."""
        found = [tag for tag, _ in self.elements if tag not in PLAIN]
        for tag, attributes in self.elements:
            for name, value in attributes.items():
                loads = name in ("src", "href", "srcset", "action") or (name == "style" and "url" in str(value))
                if loads or name.startswith("on"):
                    found.append(f"{tag} {name}={value}")
        return found


PAYLOADS = [
    "<script>alert(1)</script>",
    "</details></main><script src=https://evil.test/x.js></script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<iframe srcdoc='<script>1</script>'>",
    "</style><style>@import url(https://evil.test/x.css)</style>",
    "</title><script>1</script>",
    "--><script>1</script><!--",
    "]]><script>1</script>",
    "{{ 7 * 7 }}{% raw %}{{ config }}",
    "<a href='javascript:alert(1)'>x</a>",
    "<meta http-equiv=refresh content='0;url=https://evil.test'>",
    "<base href=https://evil.test>",
    "&lt;script&gt;1&lt;/script&gt;",
    "<link rel=stylesheet href=//evil.test>",
    "items",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_whatever_models_and_people_write_the_page_is_inert(payload: str, tmp_path: Path) -> None:
    answer = {"text": payload, "finish": payload, "accepted": True, "correct": None}
    shown = [{"prompt": payload, "reference": payload, "answers": {"base": answer, payload: answer}}]
    values: Measures = {"base": {"accepted": hits(1, 20)}, payload: {"accepted": hits(20, 20), payload: hits(3, 20)}}
    filtered = stage(tmp_path, "01-filter", "filter", payload, [("dropped", None)], {payload: 1}, warnings=[payload])
    training = trained(tmp_path, **{payload: payload, "method": payload, "facts": {payload: payload}})
    stages = [filtered, training, evaluated(tmp_path, values, shown)]
    lists = [{**PROMPTS, "name": payload, "reasons": {payload: 17}}]
    run = finish(tmp_path, stages, status=payload, prompts=lists, recipe=payload, name=payload)
    report.build(run)
    page = Page(run / "report.html")
    assert page.faults() == []
    assert page.text.count(payload) >= 12  # nothing is swallowed either: it is all there to be read


def test_the_policy_lets_the_page_load_nothing(tmp_path: Path) -> None:
    report.build(whole(tmp_path / "books"))
    page = Page(tmp_path / "books/report.html")
    policies = [a["content"] for tag, a in page.elements if (a.get("http-equiv") or "") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'; style-src 'unsafe-inline'" in str(policies[0])
    assert page.faults() == []
    assert not any(tag == "script" for tag, _ in page.elements)


HIDDEN = {
    "a\u202eb": "a\\u202eb", "a\u2066b": "a\\u2066b", "a\x00b": "a\\u0000b", "a\x1b[31mb": "a\\u001b[31mb",
    "a\u200bb": "a\\u200bb", "a\U000e0041b": "a\\U000e0041b", "a\u2028b": "a\\u2028b", "a\rb": "a\\u000db",
    "a\x85b": "a\\u0085b", "two\nlines\tand a tab": "two\nlines\tand a tab",
    "\U0001f469\u200d\U0001f4bb": "\U0001f469\u200d\U0001f4bb", "नमस्ते": "नमस्ते",
}  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), HIDDEN.items())
def test_characters_that_hide_or_reorder_are_shown_as_codes(text: str, shown: str, tmp_path: Path) -> None:
    answer = {"text": text, "finish": "stop", "accepted": True, "correct": None}
    samples = [{"prompt": "p", "reference": None, "answers": {"student": answer}}]
    run = finish(tmp_path, [evaluated(tmp_path, {"student": {"accepted": hits(1, 20)}}, samples)])
    report.build(run)
    page = Page(run / "report.html")
    assert shown in page.text
    assert shown == text or text not in page.text
    assert json.loads((run / "report.json").read_text())["samples"] == samples  # the JSON has them as they are


MODELS = ["base", "one", "two", "three", "four", "five", "six", "teacher"]


def test_the_page_stays_small_whatever_comes(tmp_path: Path) -> None:
    worst = '"\u202e\U000e0041' * 30_000
    answers = {m: {"text": worst, "finish": "stop", "accepted": True, "correct": True} for m in MODELS}
    shown = [{"prompt": worst, "reference": worst, "answers": answers}] * 40
    values: Measures = {m: {"accepted": hits(1, 20)} for m in answers}
    reasons = {f"r{i}-{'x' * 90}": 1 for i in range(5_000)}
    stages = [
        stage(tmp_path, "01-filter", "filter", "samples", [("dropped", None)] * 5_000, reasons),
        trained(tmp_path, steps=50_000),
        evaluated(tmp_path, values, shown),
    ]  # fmt: skip
    run = finish(tmp_path, stages, recipe=worst)
    report.build(run)
    assert (run / "report.html").stat().st_size < 5_000_000


@pytest.mark.parametrize("status", ["running", "stopped", "done"])
def test_a_run_without_stages_still_has_a_page(status: str, tmp_path: Path) -> None:
    told = report.build(finish(tmp_path, [], status))
    assert (told["funnel"], told["pairs"], told["lengths"], told["training"]) == ([], None, {}, [])
    assert Page(tmp_path / "report.html").faults() == []


def test_what_an_evaluation_tells_beyond_the_charts_stands_on_the_page(tmp_path: Path) -> None:
    """Requirements, shares of a gap that are undefined, prompt lists, and what an answer takes."""
    values = {name: {"correct": hits(k, 20)} for name, k in (("base", 4), ("student", 14), ("teacher", 5))}
    folder = evaluated(tmp_path, values)
    told = json.loads((folder.path / "evaluation.json").read_text())
    row = {"model": "student", "role": "student", "measure": "correct", "value": 0.7, "low": 0.5, "high": 0.9, "n": 20}
    told["lists"] = [{"list": "law", **row}]
    told["models"] = [{"model": "student", "role": "student", "parameters": 134515008, "bytes": 269000000}]
    told["footprint"] = {"parameters": "numbers in its weights files"}
    gap = {"measure": "correct", "kind": "gap", "a": "student", "b": "base", "teacher": "teacher", "n": 20}
    told["comparisons"].append({**gap, "value": None, "low": None, "high": None, "undefined": "the gap is noise"})
    told["comparisons"].append({**gap, "value": 0.5, "low": None, "high": None, "measure": "accepted"})
    (folder.path / "evaluation.json").write_text(json.dumps(told))
    run = finish(tmp_path, [folder])
    manifest = json.loads((run / "manifest.json").read_text())
    missed = {"measure": "correct", "wanted": ">= 0.8", "met": False, "told": "Required: correct >= 0.8. Not met."}
    (run / "manifest.json").write_text(
        json.dumps({**manifest, "gates": [missed, {**missed, "met": True, "told": "Met."}]})
    )
    made = report.build(run)
    assert made["findings"][0] == "Required: correct >= 0.8. Not met."
    assert "Met." in made["findings"][1:]
    assert any("closes is undefined: the gap is noise" in line for line in made["findings"])
    page = (run / "report.html").read_text()
    for shown in (
        "undefined: the gap is noise",
        "no bound to no bound",
        "<td>law</td>",
        "134,515,008",
        "269.0",
        "not measured",
    ):
        assert shown in page, shown
    assert Page(run / "report.html").faults() == []
