"""`repeat`: rounds of the same stages, each reading the student of the last one; and when another round is not worth it."""

import json
from pathlib import Path
from typing import Any

import pytest

from factory.plan import plan
from factory.recipe import load
from factory.stages import Repeat
from tests.command import QUESTIONS, factory, told
from tests.tiny import saying_model, tiny_model

HEAD = """\
name: loop
seed: 3
models:
  base: {{type: transformers, model: {base}}}
prompts:
  - {{path: prompts.jsonl, name: questions, held_out: 6}}
  - {{path: dev.jsonl, name: dev, held_out: all}}
stages:
"""
LOOP = """\
  - repeat:
      times: 3
      start: {student: base}
      stages:
        - generate: {from: questions, model: student, n: 2, temperature: 1.0, max_tokens: 8}
        - filter: {filters: [finished, {words: {min: 2}}], as: good}
        - train: {method: sft, student: base, args: {num_train_epochs: 1, learning_rate: 0.01}}
  - evaluate: {from: questions, students: [base, student], max_tokens: 8}
"""


def folder(path: Path, stages: str, base: Path | str = "none") -> Path:
    path.mkdir(exist_ok=True)
    for name, few in (
        ("prompts", QUESTIONS),
        ("dev", [f"Which way leads to place {i}, and how far is it?" for i in range(8)]),
    ):
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in few))
    (path / "recipe.yaml").write_text(HEAD.format(base=base) + stages)
    return path


def test_rounds_are_copies_that_read_the_last_rounds_student(tmp_path: Path) -> None:
    recipe = load(folder(tmp_path, LOOP) / "recipe.yaml")
    shown = [
        (stage.kind, stage.as_, getattr(stage, "model", getattr(stage, "student", None))) for stage in recipe.stages
    ]
    assert shown == [
        ("generate", None, "base"), ("filter", "good@1", None), ("train", "student@1", "base"),
        ("generate", None, "student@1"), ("filter", "good@2", None), ("train", "student@2", "base"),
        ("generate", None, "student@2"), ("filter", "good@3", None), ("train", "student@3", "base"),
        ("evaluate", None, None),
    ]  # fmt: skip
    assert recipe.stages[-1].students == ["base", "student@3"]  # type: ignore[union-attr]
    assert recipe.trained().keys() == {"student@1", "student@2", "student@3"}
    steps = plan(recipe)
    assert [step.title for step in steps if step.knobs.kind == "train"] == [
        "04-student@1",
        "08-student@2",
        "12-student@3",
    ]
    assert steps[4].reads == ()
    assert steps[5].reads == (5,)


def test_names_of_a_round_are_its_own_and_behind_the_loop_they_are_the_last_rounds(tmp_path: Path) -> None:
    stages = LOOP.replace("student: base, args", "from: good, student: student, args").replace(
        "  - evaluate", "  - train: {method: sft, from: good, student: student, as: last}\n  - evaluate"
    )
    recipe = load(folder(tmp_path, stages) / "recipe.yaml")
    assert [(s.from_, s.student) for s in recipe.stages if s.kind == "train"] == [
        ("good@1", "base"), ("good@2", "student@1"), ("good@3", "student@2"), ("good@3", "student@3"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("times: 3", "times: 0", "recipe.yaml:10: stages.0.repeat.times"),
        ("times: 3", "tims: 3", "unknown key 'stages.0.repeat.tims'; did you mean 'times'?"),
        ("start: {student: base}", "start: {studnt: base}", "start: no train stage inside makes 'studnt'; it makes student"),
        ("start: {student: base}", "start: {}", "recipe.yaml:13: there is no model 'student'"),
        ("start: {student: base}", "start: {student: bse}", "recipe.yaml:13: there is no model 'bse'; did you mean 'base'?"),
        ("n: 2", "nn: 2", "recipe.yaml:13: unknown key 'stages.0.repeat.stages.0.generate.nn'; did you mean 'n'?"),
        ("as: good", "as: a/b", "recipe.yaml:14: the name 'a/b' must be 1 to 64 letters"),
        ("learning_rate", "learning_rat", "recipe.yaml:15: args.learning_rat is not an argument"),
        ("times: 3", "times: 3\n      until: {split: nowhere}", "there is no prompt list or earlier stage 'nowhere'"),
        ("times: 3", "times: 3\n      until: {measur: accepted}", "did you mean 'measure'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_inside_a_loop_is_told_with_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in LOOP
    told(factory(folder(tmp_path, LOOP.replace(old, new, 1), "there/is/none"), "check", "recipe.yaml"), 2, said)


def test_until_measures_as_the_last_evaluate_says(tmp_path: Path) -> None:
    stages = LOOP.replace("times: 3", "times: 2\n      until: {measure: correct, split: dev}").replace(
        "student], max_tokens: 8}\n",
        "student], max_tokens: 8, reference: {how: contains}, require: {correct: '>= 0.1'}}\n",
    )
    first, second, last = [s for s in load(folder(tmp_path, stages) / "recipe.yaml").stages if s.kind == "evaluate"]
    assert (first.students, second.students) == (["base", "student@1"], ["student@1", "student@2"])
    for dev in (first, second):
        assert (dev.from_, dev.max_tokens, dev.reference.how, dev.require) == (["dev"], 8, "contains", {})
    assert (last.students, last.require) == (["base", "student"], {"correct": ">= 0.1"})


def test_until_measures_one_student() -> None:
    two = [{"train": {"method": "sft", "student": "b", "as": name}} for name in ("x", "y")]
    with pytest.raises(ValueError, match="until needs exactly one train stage"):
        Repeat.model_validate({"times": 2, "stages": two, "until": {}})


# -- whole loops -------------------------------------------------------------------------------------------------------


def stages_of(where: Path) -> dict[str, dict[str, Any]]:
    run = where / "runs/loop"
    names = json.loads((run / "manifest.json").read_text())["stages"]
    return {name.rpartition("-")[0]: json.loads((run / name / "manifest.json").read_text()) for name in names}


def test_a_student_teaches_itself_in_rounds_and_a_second_start_does_nothing(tmp_path: Path) -> None:
    base = saying_model(tmp_path / "base", ["It is blue.", "It is as green as grass.", "No"])
    where = folder(tmp_path / "work", LOOP.replace("times: 3", "times: 2"), base)
    done = factory(where, "run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    made = stages_of(where)
    asked = [manifest["requests"]["sent"] for name, manifest in made.items() if name.endswith("generate")]
    assert asked == [36, 36]  # another student, other answers
    assert {"04-student@1", "08-student@2"} <= made.keys()
    evaluation = json.loads(next(where.glob("runs/loop/09-evaluate-*/evaluation.json")).read_text())
    assert {row["model"] for row in evaluation["rows"]} == {"base", "student@2"}
    again = factory(where, "run", "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done already") == 9


UNTIL = LOOP.replace("times: 3", "times: 4\n      until: {measure: accepted, split: dev}").replace(
    "learning_rate: 0.01", "learning_rate: 0.0"
)


def test_a_loop_ends_where_its_measure_no_longer_rises_and_the_best_student_stays(tmp_path: Path) -> None:
    """Nothing is learned at a rate of 0: the first round is no better than the start, which stays."""
    base = saying_model(tmp_path / "base", ["It is blue."])
    where = folder(tmp_path / "work", UNTIL, base)
    done = factory(where, "run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "no better, the loop ends" in done.stderr
    made = stages_of(where)
    assert [name for name in made if "student@" in name] == ["04-student@1"]
    (dev,) = [json.loads(path.read_text()) for path in where.glob("runs/loop/*student-dev@1*/evaluation.json")]
    assert {row["n"] for row in dev["rows"]} == {8}  # the dev prompts, none of the test
    evaluation = json.loads(next(where.glob("runs/loop/*-evaluate-*/evaluation.json")).read_text())
    rows = {(row["model"], row["measure"]): (row["value"], row["n"]) for row in evaluation["rows"]}
    assert rows["student", "accepted"] == rows["base", "accepted"] == (1.0, 6)
    again = factory(where, "run", "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert "04-student@1: done already" in again.stderr


def test_a_measure_that_is_not_there_is_told(tmp_path: Path) -> None:
    where = folder(
        tmp_path / "work", UNTIL.replace("measure: accepted", "measure: correct"), tiny_model(tmp_path / "base")
    )
    told(
        factory(where, "run", "recipe.yaml"),
        2,
        "repeat.until: base has no measure 'correct' on dev; there are accepted",
    )
