"""Tasks of the lm-evaluation-harness from a recipe: local tasks on tiny models, without the network."""

import json
import sys
from pathlib import Path

import pytest

from factory.findings import findings
from factory.harness import Harness, LmEval, run_tasks
from factory.models import Models
from factory.teachers.openai import OpenAI
from factory.teachers.transformers import Transformers
from tests.command import factory, folder, recipe, report, told, typed
from tests.server import in_thread
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
  - evaluate: {students: [teacher], max_tokens: 8, lm_eval: {tasks: [colours, say], include_path: tasks, limit: 10}}
"""


def test_tasks_are_run_on_local_models_and_compared_item_by_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    entries = {
        "base": Transformers(model=str(saying_model(tmp_path / "base", ["it is blue"]))),
        "other": Transformers(model=str(saying_model(tmp_path / "other", ["so zebra"]))),
        "far": OpenAI(model="m", base_url="http://127.0.0.1:9/v1"),
    }
    knobs = LmEval(tasks=["colours", "say"], include_path=str(tasks(tmp_path / "tasks")), limit=10)
    roles = {"base": "base", "other": "student", "far": "student"}
    found = run_tasks(Harness(knobs), roles, Models(entries, None, tmp_path / "runs"), seed=1)
    rows = {(row["role"], row["task"], row["metric"]): row for row in found["rows"]}
    assert {key: row["value"] for key, row in rows.items()} == {
        ("base", "colours", "acc,none"): 1, ("base", "say", "exact_match,none"): 1,
        ("student", "colours", "acc,none"): 0, ("student", "say", "exact_match,none"): 0,
    }  # fmt: skip
    assert {(row["n"], row["stderr"]) for row in rows.values()} == {(10, 0.0)}
    compared = {c["task"]: c for c in found["comparisons"]}
    say = compared["say"]
    assert (say["a"], say["b"], say["value"], say["n"]) == ("other", "base", -1, 10)
    assert say["p_holm"] == pytest.approx(2 * 2 / 2**10)  # two results were looked at


def test_a_recipe_names_tasks_and_one_that_does_not_exist_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    tasks(tmp_path / "tasks")
    with in_thread() as server:
        folder(tmp_path, recipe(server.url, None, STAGES))
        wrong = factory(tmp_path, "run", "recipe.yaml", "--set", "stages.0.evaluate.lm_eval.tasks=[nosuch]")
        assert "there is no task 'nosuch'" in wrong.stderr
        assert "Traceback" not in wrong.stderr
        assert (wrong.returncode != 0, server.bodies) == (True, [])
        done = factory(tmp_path, "run", "recipe.yaml")
        assert done.returncode == 0, done.stderr
    whole = report(tmp_path)
    (found,) = whole["lm_eval"]
    assert found["rows"] == found["comparisons"] == []
    assert "lm_eval: no task was run, since none of the models is local" in whole["warnings"]
    assert "Tasks of lm_eval 0.4." in (tmp_path / "runs/tiny/report.html").read_text()


def test_a_missing_package_or_folder_is_told_by_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1", tmp_path, STAGES))
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
