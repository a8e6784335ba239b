"""Tasks of the lm-evaluation-harness from a recipe: local tasks on tiny models, without the network."""

import json
import sys
from pathlib import Path

import pytest

from factory.findings import findings
from tests.command import factory, folder, recipe, report, told, typed
from tests.tiny import saying_model

ITEMS = 12


def tasks(where: Path) -> Path:
    """One task of options, and one that reads what is said; the rows stand beside them."""
    rows = [json.dumps({"q": f"Which colour has {i}?", "options": ["it is blue", "zebra"]}) for i in range(ITEMS)]
    where.mkdir()
    (where / "rows.jsonl").write_text("\n".join(rows) + "\n")
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {where}/rows.jsonl}}}}\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
    options = "output_type: multiple_choice\ndoc_to_choice: options\ndoc_to_target: 0\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    says = "output_type: generate_until\ndoc_to_target: it is blue\ngeneration_kwargs: {max_gen_toks: 8}\nmetric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    (where / "colours.yaml").write_text(f"task: colours\n{head}{options}")
    (where / "say.yaml").write_text(f"task: say\n{head}{says}")
    return where


STAGES = """\
  - evaluate: {students: [base], gold: other, max_tokens: 8, lm_eval: {tasks: [colours, say], include_path: tasks, limit: 10}}
"""


def two_models(where: Path) -> None:
    base, other = saying_model(where / "base", ["it is blue"]), saying_model(where / "other", ["so zebra"])
    text = recipe("http://127.0.0.1:9/v1", base, STAGES)
    folder(where, text.replace("  base:", f"  other: {{type: transformers, model: {other}}}\n  base:", 1))


def test_tasks_are_run_on_local_models_and_compared_item_by_item(tmp_path: Path) -> None:
    two_models(tmp_path)
    tasks(tmp_path / "tasks")
    done = factory(tmp_path, "run", "recipe.yaml", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    (found,) = report(tmp_path)["lm_eval"]
    rows = {(row["role"], row["task"], row["metric"]): row for row in found["rows"]}
    assert [
        rows["base", task, metric]["value"] for task, metric in (("colours", "acc,none"), ("say", "exact_match,none"))
    ] == [1, 1]
    assert (rows["gold", "say", "exact_match,none"]["value"], rows["gold", "colours", "acc,none"]["value"]) == (0, 0)
    assert {(row["n"], row["stderr"]) for row in rows.values()} == {(10, 0.0)}
    compared = {c["task"]: c for c in found["comparisons"]}
    assert (compared["say"]["a"], compared["say"]["b"], compared["say"]["value"], compared["say"]["n"]) == (
        "other",
        "base",
        -1,
        10,
    )
    assert compared["say"]["p_holm"] == pytest.approx(2 * 2 / 2**10)  # two results were looked at
    assert "Tasks of lm_eval 0.4." in (tmp_path / "runs/tiny/report.html").read_text()


def test_a_task_that_there_is_none_of_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    two_models(tmp_path)
    (tasks(tmp_path / "tasks") / "say.yaml").unlink()
    done = factory(tmp_path, "run", "recipe.yaml", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode != 0
    assert "there is no task 'say'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_package_or_folder_is_told_by_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1", tmp_path, STAGES.replace("gold: other, ", "")))
    told(typed(tmp_path, "check", "recipe.yaml"), 2, "lm_eval", "there is no folder tasks")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told(typed(tmp_path, "check", "recipe.yaml"), 2, "pip install 'distillation-factory[lm-eval]'")


def test_what_a_task_shows_is_told_and_what_it_does_not_show_counted() -> None:
    rows = [
        {"model": m, "role": r, "measure": "words", "value": 1.0, "low": 1.0, "high": 1.0, "n": 20}
        for m, r in (("base", "base"), ("s", "student"))
    ]
    lower = {
        "task": "facts",
        "metric": "acc,none",
        "a": "s",
        "b": "base",
        "value": -0.2,
        "low": -0.3,
        "high": -0.1,
        "n": 100,
        "p_holm": 0.001,
    }
    same, unsure = {**lower, "task": "sums", "low": -0.3, "high": 0.1}, {**lower, "task": "words", "p_holm": 0.2}
    report = {"status": "done", "evaluation": rows, "comparisons": [], "training": [], "funnel": [], "pairs": None}
    lines = findings({**report, "lm_eval": [{"comparisons": [lower, same, unsure]}]})
    assert "Tasks, facts (100 items): the student has a lower acc than base, by -0.200 (-0.300 to -0.100)." in lines
    assert "Tasks: no difference of the student from base is shown by 2 of 3 results." in lines
