"""Requirements on a student: written in a recipe, held against the evaluation, told by report and exit code."""

import json
from pathlib import Path
from typing import Any

import pytest

from factory.evaluate import Evaluate
from factory.gates import held
from tests.command import ROOT, attempts, factory, folder, recipe, report, told, typed
from tests.server import chat, in_thread
from tests.test_evaluate import scored, summary, texts
from tests.tiny import saying_model

MEASURED = summary([scored("teacher", texts(18)), scored("base", texts(2)), scored("student", texts(14))], seed=1)
"""Of 20: teacher 18, base 2, student 14 correct, so retention .778, gap closed .75; all accepted."""

GATES = [
    ({"correct": ">= 0.7"}, True),  # at the limit
    ({"correct": "> 0.7"}, False),
    ({"correct": ">=70%"}, True),
    ({"correct": ">= 71 %"}, False),
    ({"wrong": "<= .3"}, True),
    ({"wrong": "< .3"}, False),
    ({"retention": ">= 0.77"}, True),
    ({"retention": ">= 0.78"}, False),
    ({"gap_closed": ">= 0.75"}, True),
    ({"gap_closed": "> 0.75"}, False),
    ({"words": "<= 2"}, True),
    ({"pass@1": ">= 0"}, False),  # nothing was sampled: what is not known does not pass
]


@pytest.mark.parametrize(("require", "met"), GATES)
def test_a_limit_is_held_against_the_value(require: dict[str, str], met: bool) -> None:
    assert [gate.met for gate in held(require, MEASURED)] == [met]


def test_what_is_told_names_value_and_interval() -> None:
    correct, retention, sampled, accepted = (
        gate.told
        for gate in held({"correct": ">= 0.8", "retention": ">= 0.5", "pass@1": "> 0.1", "accepted": "> 0"}, MEASURED)
    )
    assert correct == (
        "Required: correct of student >= 0.8. Not met: it is 0.7 (interval 0.481 to 0.855; the limit lies inside it, so other "
        "prompts could have decided otherwise)."
    )
    assert retention.startswith("Required: retention (correct) of student >= 0.5. Met: it is 0.778 (interval 0.")
    assert sampled == "Required: pass@1 of student > 0.1. Not met: it was not measured."
    assert "the limit lies inside" not in accepted


def test_an_undefined_share_does_not_pass() -> None:
    noise = summary([scored("teacher", texts(5)), scored("base", texts(4)), scored("student", texts(14))], seed=1)
    (gate,) = held({"gap_closed": ">= 0.1"}, noise)
    assert not gate.met
    assert gate.told.endswith("Not met: it is undefined, since the teacher is not 2 standard errors above the base.")


def test_the_last_student_is_held_to_it_and_without_references_what_is_accepted_counts() -> None:
    both = summary([scored("base", texts(20)), scored("student", texts(14))], seed=1)
    assert [gate.met for gate in held({"correct": "> 0.9"}, both)] == [False]
    form = {**MEASURED, "rows": [row for row in MEASURED["rows"] if row["measure"] == "accepted"]}
    (gate,) = held({"retention": ">= 1"}, form)
    assert gate.told.startswith("Required: retention (accepted) of student >= 1. Met: it is 1 ")


@pytest.mark.parametrize(
    ("require", "why"),
    [
        ({"precision": ">= 0.5"}, "there is no measure 'precision'"),
        ({"correct": "0.5"}, "correct: write a limit like '>= 0.8' or '<= 2.5', not '0.5'"),
        ({"correct": "= 0.5"}, "write a limit like"),
        ({"correct": ">= much"}, "write a limit like"),
    ],
)
def test_what_cannot_be_held_is_told(require: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Evaluate(students=["base"], require=require)


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"n": 4}, "need a temperature above 0"),
        ({"n": 4, "k": 8, "temperature": 1.0}, "set n to 8 or more"),
        ({"k": 2, "temperature": 1.0}, "set n to 2 or more"),
        ({"gold": "base"}, "gold: base is one of the students"),
    ],
)
def test_what_cannot_be_sampled_is_told(knobs: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Evaluate.model_validate({"students": ["base"], **knobs})


STAGES = """\
  - generate: {model: teacher, max_tokens: 16}
  - filter: [finished]
  - evaluate: {students: [base], gold: truth, teacher: teacher, n: 4, k: 2, temperature: 1.0, max_tokens: 16, REST}
"""
REST = "reference: {how: contains}, require: {correct: '>= 0.1', 'pass@2': '> 0.99', accepted: '>= 0.9'}"


async def blue(body: dict[str, Any], before: int) -> dict[str, Any]:
    """Right when it is asked greedily; of several draws every other one."""
    greedy = body["temperature"] == 0
    return chat(body, ["It is blue."] if greedy else ["It is blue.", "It is red."] * (body.get("n", 1) // 2))


def test_a_run_that_misses_what_is_required_is_complete_and_ends_with_its_own_code(tmp_path: Path) -> None:
    """Greedy and sampled answers come from the same start of each model; another limit asks nobody again."""
    base = saying_model(tmp_path / "base", ["it is blue", "perhaps green"])
    with in_thread(blue) as server:
        text = recipe(server.url, base, STAGES.replace("REST", REST))
        text = text.replace("limits:", "price: {input: 1, output: 2}, limits:")
        folder(tmp_path, text.replace("  base:", f"  truth: {{type: transformers, model: {base}}}\n  base:"))
        missed = factory(tmp_path, "run", "recipe.yaml")
        told(missed, 14, "Required: pass@2 of base > 0.99. Not met: it is 0.", "the run is complete")
        evaluated = [(b["temperature"], b.get("n", 1)) for b in server.bodies[-12:]]
        assert sorted(evaluated) == [(0, 1)] * 6 + [(1, 4)] * 6
        asked = len(attempts(tmp_path))
        met = factory(
            tmp_path, "run", "recipe.yaml", "--set", "stages.2.evaluate.require={correct: '>= 0', 'pass@2': '> 0.1'}"
        )
        assert (met.returncode, len(attempts(tmp_path))) == (0, asked), met.stderr
        assert "evaluate: done already" in met.stderr
    whole = report(tmp_path)
    assert whole["status"] == "done"
    assert [gate["met"] for gate in whole["gates"]] == [True] * 3
    rows = {(row["role"], row["measure"]): row for row in whole["evaluation"]}
    assert rows["teacher", "correct"]["value"] == 1
    assert (rows["teacher", "pass@1"]["value"], rows["teacher", "pass@2"]["value"]) == (0.5, pytest.approx(5 / 6))
    assert 0 < rows["base", "pass@1"]["value"] < 1
    assert {
        rows["base", name]["n"] for name in ("teacher_loss", "token_agreement", "brier", "ece", "bleu", "rouge_l")
    } == {6}
    assert rows["gold", "correct"]["value"] == rows["base", "correct"]["value"]  # the same weights under another name
    teacher, local, gold = whole["models"]
    assert (gold["role"], gold["bytes"], "tokens_per_second" in gold) == (
        "gold",
        local["bytes"],
        False,
    )  # all was stored
    # six greedy requests (10 tokens in, 5 out) and six of four draws (10 in, 20 out) gave 30 answers
    assert teacher["usd_per_answer"] == pytest.approx(6 * (10 + 2 * 5 + 10 + 2 * 20) / 1e6 / 30)
    weights = base / "model.safetensors"
    assert (local["bytes"], local["parameters"] * 4 < weights.stat().st_size) == (weights.stat().st_size, True)
    assert local["tokens_per_second"] > 0
    assert local["bytes"] < local["peak_memory"] < 4e9
    assert "peak_memory" not in teacher | gold  # an endpoint's is not known; nothing was asked of the other
    shown = json.loads((tmp_path / "runs/tiny/report.json").read_text())["samples"][0]
    assert shown["answers"]["teacher"]["correct"] is True


def test_the_example_of_the_docs_is_a_recipe(tmp_path: Path) -> None:
    snippet = (ROOT / "docs/evaluation.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    models = (
        f"  teacher: {{type: transformers, model: {tmp_path}}}\n  base: {{type: transformers, model: {tmp_path}}}\n"
    )
    (tmp_path / "prompts").mkdir()
    for name, count in (("maths", 600), ("law", 5)):
        rows = [json.dumps({"prompt": f"What is {i} plus {i * i}?", "reference": f"{i + i * i}"}) for i in range(count)]
        (tmp_path / f"prompts/{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "recipe.yaml").write_text(f"name: doc\n{snippet.replace('  ...', models)}")
    done = typed(tmp_path, "check", "recipe.yaml")
    assert (done.returncode, "the recipe is valid" in done.stdout) == (0, True), done.stderr


def test_a_wrong_limit_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    folder(
        tmp_path, recipe("http://127.0.0.1:9/v1", tmp_path / "base", STAGES.replace("REST", "require: {speed: '> 1'}"))
    )
    told(typed(tmp_path, "check", "recipe.yaml"), 2, "there is no measure 'speed'")
