"""build, train, eval, run: how far each goes, what the next one finds done, and what a change makes again."""

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from factory.models import Models
from factory.naming import Naming
from factory.plan import plan
from factory.prompts import load as load_prompts
from factory.recipe import load
from factory.recipe_file import find
from factory.run import StageFolder, write_json
from tests.command import ASKED, QUESTIONS, STAGES, TRAINING, factory, folder, read_jsonl, recipe, report, told, typed
from tests.server import chat, in_thread
from tests.tiny import tiny_model


def did(stderr: str) -> tuple[list[str], list[str]]:
    """The steps that were done, and those that were done already."""
    lines = [line for line in stderr.splitlines() if line[:2].isdigit()]
    return (
        [line[3:] for line in lines if not line.endswith(": done already")],
        [line[3:].removesuffix(": done already") for line in lines if line.endswith(": done already")],
    )


def test_build_stops_before_the_first_train_and_run_asks_nothing_of_it_again(tmp_path: Path) -> None:
    """One student, trained once, by verbs one after the other; the last one finds everything done."""
    student = tiny_model(tmp_path / "student")
    with in_thread() as server:
        folder(tmp_path, recipe(server.url, student, STAGES + TRAINING))
        built = factory(tmp_path, "build", "recipe.yaml")
        assert did(built.stderr) == (["generate", "filter", "choose", "shape"], [])
        data = (tmp_path / "runs/tiny/dataset/train.jsonl").read_bytes()
        assert sum(server.seen.values()) == ASKED
        trained = factory(tmp_path, "train", "recipe.yaml")
        assert did(trained.stderr) == (["student"], ["generate", "filter", "choose", "shape"])
        assert sum(server.seen.values()) == ASKED
        measured = factory(tmp_path, "eval", "recipe.yaml")
        assert did(measured.stderr) == (["evaluate"], ["generate", "filter", "choose", "shape", "student"])
        assert sum(server.seen.values()) == len(QUESTIONS)
        again = factory(tmp_path, "run", "recipe.yaml")
        assert did(again.stderr) == ([], ["generate", "filter", "choose", "shape", "student", "evaluate"])
    assert {done.returncode for done in (built, trained, measured, again)} == {0}
    assert (tmp_path / "runs/tiny/dataset/train.jsonl").read_bytes() == data
    told_by_report(tmp_path)


def told_by_report(where: Path) -> None:
    """The shape of `report.json` that people may rely on, and a student that has learnt something."""
    whole = report(where)
    rows = {(row["role"], row["measure"]): row for row in whole["evaluation"]}
    assert all(set(row) == {"model", "role", "measure", "value", "low", "high", "n"} for row in whole["evaluation"])
    for role in ("base", "student", "teacher"):
        accepted = rows[role, "accepted"]
        assert accepted["n"] == 6
        assert 0 <= accepted["low"] <= accepted["value"] <= accepted["high"] <= 1
    assert rows["student", "teacher_loss"]["value"] < rows["base", "teacher_loss"]["value"]
    train = read_jsonl(where / "runs/tiny/dataset/train.jsonl")
    test = read_jsonl(where / "runs/tiny/dataset/test.jsonl")
    assert whole["training"][0]["rows_trained"] == len(train) == ASKED
    assert len(test) == 6
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


TWICE = """\
  - generate: {model: teacher, max_tokens: 16}
  - train: {method: sft, student: base, as: first}
  - evaluate: {students: [base, first]}
  - generate: {model: teacher, n: 2, max_tokens: 16, as: more}
  - train: {method: sft, student: first, as: second}
  - evaluate: {students: [base, second]}
  - generate: {model: second, max_tokens: 16, as: own}
"""


@pytest.mark.parametrize(
    ("verb", "last"), [("build", "shape"), ("train", "second"), ("eval", "evaluate"), ("run", "own")]
)
def test_a_verb_goes_as_far_as_the_last_stage_of_its_kind(tmp_path: Path, verb: Any, last: str) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1", Path("student"), TWICE))
    steps = plan(load(tmp_path / "recipe.yaml"), verb)
    assert steps[-1].title[3:] == last
    assert len(steps) == {"build": 2, "train": 7, "eval": 8, "run": 9}[verb]


@pytest.mark.parametrize("verb", ["build", "run"])
def test_without_a_train_build_and_run_mean_all_stages(tmp_path: Path, verb: Any) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1"))
    assert [step.knobs.kind for step in plan(load(tmp_path / "recipe.yaml"), verb)] == [
        "generate", "filter", "choose", "shape",
    ]  # fmt: skip


def test_what_decides_about_a_stage_is_part_of_its_name_and_nothing_else(tmp_path: Path) -> None:
    """Otherwise an old evaluation would be taken for one under the new filters."""
    student = tiny_model(tmp_path / "student")
    stages = STAGES + "  - pair\n  - evaluate: {students: [base], teacher: teacher}\n"
    folder(tmp_path, recipe("http://127.0.0.1:9/v1", student, stages))

    def names(*overrides: str) -> dict[str, str]:
        with chdir(tmp_path):
            made = load(tmp_path / "recipe.yaml", overrides)
            models = Models(made.models, None, tmp_path / "runs")
            naming = Naming(made, load_prompts(made.prompts, made.seed, find), models, [tmp_path])
            known: dict[int, StageFolder] = {}
            for step in plan(made):
                known[step.number] = naming.place(step, known)
                # as if it had kept what its name promises
                known[step.number].path.mkdir(exist_ok=True)
                write_json(known[step.number].path / "manifest.json", {"content": known[step.number].path.name})
        return {folder.path.name.rpartition("-")[0][3:]: folder.path.name for folder in known.values()}

    plain = names()

    def changed(*overrides: str) -> set[str]:
        return {kind for kind, name in names(*overrides).items() if name != plain[kind]}

    assert changed("stages.1.filter.1.words.min=4") == {"filter", "choose", "pair", "evaluate"}
    assert changed("stages.2.choose.cap=2") == {"choose", "pair"}
    assert changed("stages.0.generate.temperature=0.8") == {"generate", "filter", "choose", "pair", "evaluate"}
    assert changed("stages.4.evaluate.max_tokens=9") == {"evaluate"}
    assert (
        changed("stages.4.evaluate={n: 2, temperature: 1.0}")
        == changed("stages.4.evaluate.gold=teacher")
        == {"evaluate"}
    )
    assert (
        changed("stages.4.evaluate.require={accepted: '>= 0.5'}") == set()
    )  # a limit changes nothing that is measured
    assert changed("models.base.layers={first: 1}") == {"evaluate"}
    assert changed("models.teacher.limits={max_attempts: 9}", "name=other", "budget={requests: 1}") == set()
    assert changed("seed=4") == changed("prompts.0.held_out=5") == {"generate", "filter", "choose", "pair", "evaluate"}


def test_the_same_command_twice_does_nothing_twice_and_a_change_is_done_from_where_it_is(tmp_path: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        i = int(body["messages"][-1]["content"].split()[-1].strip("?"))
        if i == 3:
            return chat(body, texts=["cut off in the", "cut off in the"], finish="length")
        return chat(body, texts=["short"] * 2 if i == 4 else [f"It is blue, like {k}." for k in range(2)])

    with in_thread(script) as server:
        done = factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml")
        assert done.returncode == 0, done.stderr
        whole = report(tmp_path)
        lost = {reason: count for stage in whole["funnel"] for reason, count in stage["reasons"].items()}
        rows = read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")
        assert len(rows) == ASKED - (lost.get("unfinished", 0) + lost.get("words", 0)) // 2
        assert all(row["prompt"] in QUESTIONS and row["completion"].startswith("It is blue") for row in rows)
        made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/tiny/0*/*")}

        again = factory(tmp_path, "build", "recipe.yaml")
        assert did(again.stderr) == ([], ["generate", "filter", "choose", "shape"])
        assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/tiny/0*/*")} == made
        assert read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl") == rows

        changed = factory(tmp_path, "build", "recipe.yaml", "--set", "stages.1.filter.1.words.min=99")
        assert did(changed.stderr) == (["filter", "choose", "shape"], ["generate"])
        assert changed.returncode == 3
        assert read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl") == []
        assert "has no rows" in (tmp_path / "runs/tiny/dataset/README.md").read_text()
        back = factory(tmp_path, "build", "recipe.yaml")
        assert did(back.stderr) == ([], ["generate", "filter", "choose", "shape"])
        assert read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl") == rows
        assert sum(server.seen.values()) == ASKED  # one request with n for each prompt, none for those held out


def test_raising_n_asks_for_the_new_draws_only_and_new_prompts_for_themselves(tmp_path: Path) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url).replace("held_out: 6", "held_out: 0"))
        assert factory(tmp_path, "build", "recipe.yaml", "--set", "prompts.0.take=10").returncode == 0
        assert factory(tmp_path, "build", "recipe.yaml", "--set", "prompts.0.take=12").returncode == 0
        more = ("--set", "prompts.0.take=12", "--set", "stages.0.generate.n=3")
        assert factory(tmp_path, "build", "recipe.yaml", *more).returncode == 0
        assert [body.get("n", 1) for body in server.bodies] == [2] * 12 + [1] * 12


def test_a_recipe_without_stages_publishes_the_answers_that_came_with_its_rows(tmp_path: Path) -> None:
    rows = [{"prompt": q, "completion": f"It is {i}."} for i, q in enumerate(QUESTIONS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text("name: tiny\nprompts: [{path: rows.jsonl, held_out: 4}]\n")
    done = factory(tmp_path, "run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert did(done.stderr) == (["given", "shape"], [])
    assert len(read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")) == 20
    assert len(read_jsonl(tmp_path / "runs/tiny/dataset/test.jsonl")) == 4
    assert report(tmp_path)["evaluation"] == []


def test_answers_from_elsewhere_are_curated_without_any_model(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"a{i % 20} b c d"}]}
        for i, q in enumerate(QUESTIONS)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages = "stages:\n  - filter: [{words: {min: 4}}, exact_duplicates]\n"
    (tmp_path / "recipe.yaml").write_text("name: tiny\nprompts: [{path: rows.jsonl}]\n" + stages)
    done = factory(tmp_path, "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert len(read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")) == 20
    assert report(tmp_path)["funnel"][2]["reasons"] == {"duplicate": 4}


@pytest.mark.parametrize(("verb", "stage"), [("train", "a train stage"), ("eval", "an evaluate stage")])
def test_a_verb_without_its_stage_is_refused(tmp_path: Path, verb: str, stage: str) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url))
        told(typed(tmp_path, verb, "recipe.yaml"), 2, stage, "factory build")
        assert not server.seen


def test_a_recipe_without_stages_over_prompts_without_answers_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, "name: tiny\nprompts: [{path: prompts.jsonl}]\n")
    told(typed(tmp_path, "build", "recipe.yaml"), 2, "recipe.yaml:2", "no row of prompts brings an answer")


def test_a_data_set_without_a_row_is_no_success(tmp_path: Path) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url, stages=STAGES.replace("min: 3", "min: 300")))
        told(typed(tmp_path, "build", "recipe.yaml"), 3, "no rows", "factory show runs/tiny")
        assert "no rows" in typed(tmp_path, "show", "runs/tiny").stdout
        assert (tmp_path / "runs/tiny/report.html").exists()
        asked = len(server.seen)
        told(typed(tmp_path, "build", "recipe.yaml"), 3, "no rows")
        assert len(server.seen) == asked
        assert typed(tmp_path, "build", "recipe.yaml", "--set", "stages.1.filter.1.words.min=1").returncode == 0


# -- what a recipe can be made of ----------------------------------------------------------------------------------------


def test_set_takes_values_maps_lists_and_whole_models(tmp_path: Path) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1"))

    def changed(*overrides: str) -> Any:
        return load(tmp_path / "recipe.yaml", overrides)

    assert changed("seed=9").seed == 9
    assert changed("stages.0.generate.n=4").stages[0].n == 4
    assert changed("stages.0.generate.stop=[a, 'b: c']").stages[0].stop == ["a", "b: c"]
    assert changed("stages.0.generate={temperature: 1.0e-1}").stages[0].temperature == 0.1
    assert changed("stages.0.generate={temperature: 1.0e-1}").stages[0].n == 2  # maps merge
    assert len(changed("stages=[{filter: [finished]}]").stages) == 1  # lists are replaced
    assert changed("stages.3={choose: {cap: 3}}").stages[3].cap == 3  # one behind the last is a new item
    assert changed("stages.3.choose.cap=3").stages[3].cap == 3
    assert changed("budget.usd=2.5").budget.usd is not None
    local = changed("models.teacher={type: transformers, model: ./m}").models["teacher"]
    assert (local.type, local.model) == ("transformers", "./m")  # whole models are replaced
    assert changed("models.teacher.model=other").models["teacher"].base_url == "http://127.0.0.1:9/v1"
    assert changed("stages.0.generate.max_tokens=8", "stages.0.generate.max_tokens=9").stages[0].max_tokens == 9


def test_extends_merges_maps_and_replaces_lists_and_models(tmp_path: Path) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1"))
    (tmp_path / "child").mkdir()
    (tmp_path / "child/recipe.yaml").write_text(
        "extends: ../recipe.yaml\nname: child\nbudget: {requests: 5}\nmodels:\n  judge: {type: replay, path: a.jsonl}\n"
    )
    (tmp_path / "grandchild.yaml").write_text(
        "extends: child/recipe.yaml\nbudget: {usd: 1}\nmodels:\n  teacher: {type: replay, path: b.jsonl}\nstages: []\n"
    )
    made = load(tmp_path / "grandchild.yaml", ["budget.hours=2"])
    assert (made.name, made.seed, made.stages) == ("child", 3, [])
    assert (made.budget.requests, made.budget.usd, made.budget.hours) == (5, 1, 2)
    assert {name: entry.type for name, entry in made.models.items()} == {"teacher": "replay", "judge": "replay"}
    told(typed(tmp_path, "check", "grandchild.yaml", "--set", "stages=[{generate: {model: x}}]"), 2, "no model 'x'")


def test_a_shipped_recipe_can_be_extended_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: recipes/cpu/zephyr.yaml\nname: mine\nseed: 8\n")
    done = typed(tmp_path, "check", "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert "mine: the recipe is valid" in done.stdout
