"""Arms: shared answers are asked once, shared steps done once, and the table is what the stored answers say."""

import json
import signal
import threading
import time
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest

from factory import stats
from factory.journal import Journal
from factory.knobs import written_out
from factory.recipe import draft
from factory.run import StageWriter
from tests.command import asked_in_vain, attempts, folder, read_jsonl, recipe, report, started, told, typed, until
from tests.server import chat, error, held, in_thread
from tests.tiny import tiny_model

HELD_OUT = 12
STAGES = """\
  - generate: {model: teacher, n: 2, temperature: 0.7, max_tokens: 16}
  - filter: [finished, {words: {min: 3}}]
  - evaluate: {students: [good], teacher: teacher, max_tokens: 8, reference: {how: contains}}
"""
ARMS = """\
arms:
  no_filter: {stages.1: null}
  random: {stages.1.filter.control: random}
  poor: {stages.2.evaluate.students: [poor]}
"""
"""Nothing is trained here: the models that are measured answer at the same endpoint."""


async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
    """The teacher's second draw is too short. `good` is always right, `poor` is never, and says it in two words."""
    if body["model"] == "m":
        return chat(body, texts=["It is blue.", "Blue."][: body.get("n", 1)])
    return chat(body, texts=["It is blue." if body["model"] == "good" else "It's red"])


def written(url: str, arms: str = ARMS, stages: str = STAGES, name: str = "tiny") -> str:
    models = "".join(
        f'  {one}: {{type: openai, model: {one}, base_url: "{url}", limits: {{max_attempts: 2}}}}\n'
        for one in ("good", "poor")
    )
    text = (
        recipe(url, stages=stages).replace("prompts:\n", f"{models}prompts:\n").replace("name: tiny", f"name: {name}")
    )
    return text.replace("held_out: 6", f"held_out: {HELD_OUT}") + arms


def comparison(where: Path, run: str = "tiny") -> dict[str, Any]:
    """It stands in the first run's folder, and in its report."""
    made: dict[str, Any] = json.loads((where / f"runs/{run}/comparison.json").read_text())
    assert report(where, f"runs/{run}")["arms"] == made
    return made


def facts(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["arm"]: one for one in made["arms"]}


def values(made: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["model"], row["measure"]): row["value"] for row in made["rows"]}


def test_what_arms_share_is_asked_and_made_once_and_they_are_measured_alike(tmp_path: Path) -> None:
    with in_thread(script) as server:
        folder(tmp_path, written(server.url))
        done = typed(tmp_path, "run", "recipe.yaml")
        assert done.returncode == 0, done.stderr
        asked = len(server.bodies)
        assert asked == (24 - HELD_OUT) + 3 * HELD_OUT  # the teacher's draws; teacher, good and poor measured
        again = typed(tmp_path, "run", "recipe.yaml")
        assert (again.returncode, again.stdout) == (0, done.stdout)
        assert len(server.bodies) == asked
        assert typed(tmp_path, "check", "runs/tiny/recipe.yaml").returncode == 0  # the resolved recipe, arms included
    made = comparison(tmp_path)
    arms = facts(made)
    assert {name: one["asked"] for name, one in arms.items()} == {
        "tiny": 36, "no_filter": 0, "random": 0, "poor": HELD_OUT,
    }  # fmt: skip
    assert arms["no_filter"]["changes"] == {"stages.1": None}
    manifests = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "runs/tiny.poor").glob("0*/manifest.json"))
    ]
    assert [(one["stage"], one.get("made_in")) for one in manifests] == [
        ("generate", "tiny"), ("filter", "tiny"), ("evaluate", None), ("shape", "tiny"),
    ]  # fmt: skip
    assert manifests[0]["requests"] == {"sent": 0, "reused": 12}
    rows = {
        run: len(read_jsonl(tmp_path / f"runs/{run}/dataset/train.jsonl"))
        for run in ("tiny", "tiny.no_filter", "tiny.random")
    }
    assert rows == {"tiny": 12, "tiny.no_filter": 24, "tiny.random": 12}
    # without the filter any answer is accepted; measured as in the recipe, one of two words is not
    own = report(tmp_path, "runs/tiny.no_filter")["evaluation"]
    assert values(made)["no_filter", "accepted"] == 1 == values({"rows": own})["good", "accepted"]
    assert values(made)["poor", "accepted"] == 0
    assert "Arm poor against tiny: correct answers 0 %, interval 0-24 %, against 100 %" in done.stdout
    assert "poor has fewer." in done.stdout
    assert "taken out" in (tmp_path / "runs/tiny/report.html").read_text()


def test_the_tables_numbers_are_recomputed_from_the_answers(tmp_path: Path) -> None:
    """`half` is right on half of the prompts, `most` on three quarters, each with some of their own."""

    async def graded(body: dict[str, Any], before: int) -> dict[str, Any]:
        number = int(body["messages"][-1]["content"].rstrip("?").rpartition(" ")[2])
        right = {"m": True, "good": number % 4 > 0, "poor": number % 2 == 0}[body["model"]]
        return chat(body, texts=["It is blue." if right else "It is red."] * body.get("n", 1))

    arms = "arms:\n  poor: {stages.2.evaluate.students: [poor]}\n  asked_again: {stages.0.generate.n: 3}\n"
    with in_thread(graded) as server:
        folder(tmp_path, written(server.url, arms))
        done = typed(tmp_path, "run", "recipe.yaml")
        assert done.returncode == 0, done.stderr
    made = comparison(tmp_path)
    answers = {
        run: {
            row["prompt"]["id"]: float("blue" in row["response"])
            for path in (tmp_path / f"runs/{run}").glob("*-evaluate-*/*-*.jsonl")
            for row in read_jsonl(path)
            if row["model"] == model
        }
        for run, model in (("tiny", "good"), ("tiny.poor", "poor"))
    }
    order = list(answers["tiny"])
    ours, theirs = ([answers[run][prompt] for prompt in order] for run in ("tiny.poor", "tiny"))
    (c,) = [c for c in made["comparisons"] if (c["a"], c["measure"]) == ("poor", "correct")]
    assert (c["b"], c["n"]) == ("tiny", HELD_OUT)
    assert [c[key] for key in ("value", "low", "high")] == pytest.approx(
        stats.paired_bootstrap_difference(ours, theirs, 3, order)
    )
    p = stats.mcnemar(ours, theirs)
    assert c["p"] == pytest.approx(p)
    assert c["p_holm"] == pytest.approx(stats.holm([p, 1.0])[0])
    assert values(made)["poor", "correct"] == pytest.approx(sum(ours) / HELD_OUT)
    assert (
        values(made)["asked_again", "correct"]
        == values(made)["tiny", "correct"]
        == pytest.approx(sum(theirs) / HELD_OUT)
    )


def test_killed_in_an_arm_and_started_again_nothing_is_asked_twice(tmp_path: Path) -> None:
    gate = threading.Event()
    wait = held(gate)

    async def holding(body: dict[str, Any], before: int) -> dict[str, Any]:
        if body["model"] == "poor" and int(body["messages"][-1]["content"].rstrip("?").rpartition(" ")[2]) > 8:
            await wait(body, before)
        return await script(body, before)

    with in_thread(holding) as server:
        folder(tmp_path, written(server.url))
        with started(tmp_path, "run", "recipe.yaml", stdout=DEVNULL, stderr=DEVNULL) as child:
            until(
                lambda: (
                    any(body["model"] == "poor" for body in server.bodies) and (tmp_path / "runs/tiny.poor").exists()
                )
            )
            until(lambda: [status for _, status in attempts(tmp_path)].count("sent") > 0)
            child.send_signal(signal.SIGKILL)
            child.wait()
        gate.set()
        before = {name: len([b for b in server.bodies if b["model"] == name]) for name in ("m", "good")}
        done = typed(tmp_path, "run", "recipe.yaml")
        assert done.returncode == 0, done.stderr
        assert {name: len([b for b in server.bodies if b["model"] == name]) for name in ("m", "good")} == before
    assert not asked_in_vain(tmp_path)
    assert set(facts(comparison(tmp_path))) == {"tiny", "no_filter", "random", "poor"}


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ("  a: {stages.0.generate.nn: 4}", ("recipe.yaml:14: arm a: ", "stages.0.generate.nn", "did you mean 'n'")),
        ("  a:\n    stages.1: null\n    stages.9.filter: [finished]", ("recipe.yaml:16: arms.a.stages.9.filter: '9' is not one of the 3 items",)),
        ("  a: {seed: 4}\n  b: {stages.1.filter.1.words.minn: 3}", ("recipe.yaml:15: arm b: ", "did you mean 'min'")),
        ("  a: {stages.1.filter.contrl: random}", ("recipe.yaml:14: arm a: ", "did you mean 'control'")),
        ("  a: {stages.2: null}", ("recipe.yaml:14: arms.a: it has no evaluate stage",)),
        ("  a: {name: b}", ("recipe.yaml:14: arms.a.name: the arms of a recipe share its name",)),
        ("  a: {budget.usd: 3}", ("recipe.yaml:14: arms.a.budget.usd: the arms of a recipe share its budget",)),
        ("  a: {}", ("recipe.yaml:14: arms.a: it changes nothing",)),
        ("  a: [finished]", ("recipe.yaml:14: arms.a: ",)),
        ("  A b: {seed: 4}", ("recipe.yaml:14: ", "A b")),
        ("  a: {models.poor.modle: x}\n  b: {stages.2.evaluate.students: [poor, goood]}", ("recipe.yaml:14: arm a: ", "recipe.yaml:15: arm b: ", "did you mean 'good'")),
    ],
)  # fmt: skip
def test_a_mistake_in_an_arm_is_told_with_its_place(tmp_path: Path, arms: str, words: tuple[str, ...]) -> None:
    folder(tmp_path, written("http://127.0.0.1:9/v1", f"arms:\n{arms}\n"))
    told(typed(tmp_path, "check", "recipe.yaml"), 2, *words)


# -- overrides ---------------------------------------------------------------------------------------------------------


def stages(where: Path, arm: str, *overrides: str) -> list[Any]:
    """The stages of an arm as they are written out."""
    made = draft(where / "recipe.yaml", overrides)
    made.refuse()
    recipe_ = made.arms[arm].recipe
    assert recipe_ is not None
    return list(written_out(recipe_)["stages"])


def test_overrides_mean_what_they_mean_behind_set(tmp_path: Path) -> None:
    arms = """\
arms:
  one_filter: {stages.1.filter.1: null}
  both: {stages.0: null, stages.1.filter.0: null, stages.1.filter.control: random}
  more: {stages.3: {evaluate: {students: [poor]}}, stages.1.filter: [finished]}
  teacher: {models.teacher: {type: replay, path: answers.jsonl}}
"""
    folder(tmp_path, written("http://127.0.0.1:9/v1", arms))
    assert stages(tmp_path, "one_filter")[1] == {"filter": {"filters": [{"finished": {}}]}}
    first, second = stages(tmp_path, "both")
    assert first == {"filter": {"filters": [{"words": {"min": 3}}], "control": "random"}}
    assert list(second) == ["evaluate"]
    assert [next(iter(stage)) for stage in stages(tmp_path, "more")] == ["generate", "filter", "evaluate", "evaluate"]
    assert draft(tmp_path / "recipe.yaml").arms["teacher"].recipe.models["teacher"].type == "replay"  # type: ignore[union-attr]
    # `--set` comes first, and items count as in the file
    assert [list(stage) for stage in stages(tmp_path, "one_filter", "stages.0=null")] == [["filter"], ["evaluate"]]
    assert stages(tmp_path, "one_filter", "stages.1.filter.1.words.min=9", "arms.one_filter={seed: 9}")[1] == {
        "filter": {"filters": [{"finished": {}}, {"words": {"min": 9}}]}
    }
    assert not draft(tmp_path / "recipe.yaml", ["arms=null"]).arms


def test_an_arm_below_repeat_loses_a_stage_and_keeps_the_lines(tmp_path: Path) -> None:
    loop = """\
  - repeat:
      times: 2
      stages:
        - generate: {model: teacher, max_tokens: 16}
        - filter: [finished]
        - filter: [{words: {minn: 3}}]
        - train: {method: sft, student: good}
  - evaluate: {students: [good]}
"""
    folder(tmp_path, written("http://127.0.0.1:9/v1", "arms:\n  a: {stages.0.repeat.stages.1: null}\n", loop))
    done = typed(tmp_path, "check", "recipe.yaml")
    told(done, 2, "recipe.yaml:15: unknown key 'stages.0.repeat.stages.2.filter", "did you mean 'min'")
    assert "arm a" not in done.stderr  # it is the same mistake, on the same line
    fixed = (tmp_path / "recipe.yaml").read_text().replace("minn", "min").replace("[finished]", "[finishd]")
    (tmp_path / "recipe.yaml").write_text(fixed)
    done = typed(tmp_path, "check", "recipe.yaml")
    told(done, 2, "recipe.yaml:14: ", "did you mean 'finished'")
    assert not [
        line for line in done.stderr.splitlines() if "arm a" in line and "finish" in line
    ]  # it has no such stage


def test_arms_are_inherited_replaced_and_left_out(tmp_path: Path) -> None:
    folder(tmp_path, written("http://127.0.0.1:9/v1"))
    child = "extends: recipe.yaml\nname: child\narms:\n  random: null\n  poor: {seed: 4}\n  new: {seed: 5}\n"
    (tmp_path / "child.yaml").write_text(child)
    made = draft(tmp_path / "child.yaml")
    assert {name: one.recipe and one.recipe.name for name, one in made.arms.items()} == {
        "no_filter": "child.no_filter", "poor": "child.poor", "new": "child.new",
    }  # fmt: skip
    assert made.recipe is not None
    assert made.recipe.arms["poor"] == {"seed": 4}


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_what_is_required_is_required_of_the_recipe_alone(tmp_path: Path) -> None:
    gated = STAGES.replace("evaluate: {", "evaluate: {require: {correct: '>= 50 %'}, ")
    with in_thread(script) as server:
        folder(tmp_path, written(server.url, stages=gated))
        assert typed(tmp_path, "run", "recipe.yaml").returncode == 0
        assert "Not met" in facts(comparison(tmp_path))["poor"]["why"]
        told(typed(tmp_path, "run", "recipe.yaml", "--set", "stages.2.evaluate.students=[poor]"), 14, "Not met")
        assert set(facts(comparison(tmp_path))) == {"tiny", "no_filter", "random", "poor"}


def test_an_arm_that_fails_ends_the_command_when_the_others_are_done(tmp_path: Path) -> None:
    async def failing(body: dict[str, Any], before: int) -> Any:
        return error(400, "no such thing") if body["model"] == "poor" else await script(body, before)

    arms = "arms:\n  poor: {stages.0.generate.model: poor}\n  again: {stages.0.generate.n: 1}\n"
    with in_thread(failing) as server:
        folder(tmp_path, written(server.url, arms))
        done = typed(tmp_path, "run", "recipe.yaml")
    told(done, 3, "tiny.poor")
    made = comparison(tmp_path)
    assert (facts(made)["poor"]["status"], facts(made)["again"]["status"]) == ("stopped", "done")
    assert made["notes"][-1:] == ["poor has come to no evaluation, and is not compared."]
    assert values(made)["again", "correct"] == 1
    assert "again" in done.stdout


def test_the_budget_is_one_wall_for_all_arms(tmp_path: Path) -> None:
    with in_thread(script) as server:
        folder(tmp_path, "budget: {requests: 40}\n" + written(server.url))
        for _ in range(2):  # what was spent in an arm counts at the next start, too
            told(typed(tmp_path, "run", "recipe.yaml"), 5, "budget.requests: 40")
            assert len(server.bodies) == 40
        made = comparison(tmp_path)
        assert set(facts(made)) == {"tiny", "no_filter", "random"}


# -- compare -----------------------------------------------------------------------------------------------------------


def test_recipes_and_finished_runs_are_compared_as_arms_are(tmp_path: Path) -> None:
    other = STAGES.replace("[good]", "[poor]").replace("n: 2", "n: 1")
    with in_thread(script) as server:
        folder(tmp_path, written(server.url, arms=""))
        (tmp_path / "other.yaml").write_text(written(server.url, "", other, "other"))
        assert typed(tmp_path, "run", "recipe.yaml").returncode == 0
        asked = len(server.bodies)
        done = typed(tmp_path, "compare", "recipe.yaml", "other.yaml")
        assert done.returncode == 0, done.stderr
        assert len(server.bodies) == asked + HELD_OUT
        made = comparison(tmp_path)
        assert {name: one["asked"] for name, one in facts(made).items()} == {"tiny": asked, "other": HELD_OUT}
        assert values(made)["other", "correct"] == 0
        again = typed(tmp_path, "compare", "tiny", "runs/other")
        assert (again.returncode, again.stdout) == (0, done.stdout)
        assert comparison(tmp_path) == made
        assert typed(tmp_path, "show", "tiny").stdout.count("Arm other against tiny") == 2
        # what is not about the run as it is now is not shown
        assert typed(tmp_path, "run", "recipe.yaml", "--set", "stages.1.filter.1=null").returncode == 0
        assert "Arm other" not in typed(tmp_path, "show", "tiny").stdout
        assert report(tmp_path)["arms"] is None
        assert typed(tmp_path, "run", "recipe.yaml").returncode == 0
        assert comparison(tmp_path) == made
        assert len(server.bodies) == asked + HELD_OUT
    told(typed(tmp_path, "compare", "tiny"), 2, "two recipes or more")
    told(typed(tmp_path, "compare", "tiny", "other.yaml"), 2, "recipes, or finished runs")
    told(typed(tmp_path, "compare", "recipe.yaml", "recipe.yaml"), 2, "called 'tiny'")
    told(typed(tmp_path, "compare", "recipe.yaml", "nothing"), 2, "no recipe 'nothing'")


def test_only_prompts_that_all_have_answered_are_compared(tmp_path: Path) -> None:
    arms = "arms:\n  other_split: {seed: 11}\n  elsewhere: {prompts.0.path: more.jsonl}\n"
    with in_thread(script) as server:
        folder(tmp_path, written(server.url, arms))
        more = [json.dumps({"prompt": f"How warm is thing number {i}?", "reference": "blue"}) for i in range(24)]
        (tmp_path / "more.jsonl").write_text("\n".join(more) + "\n")
        done = typed(tmp_path, "run", "recipe.yaml")
        assert done.returncode == 0, done.stderr
    made = comparison(tmp_path)
    sides = [
        {
            row["prompt"]["id"]
            for path in (tmp_path / f"runs/{run}").glob("*-evaluate-*/kept-*")
            for row in read_jsonl(path)
        }
        for run in ("tiny", "tiny.other_split")
    ]
    common = sides[0] & sides[1]
    assert 0 < len(common) < HELD_OUT
    assert made["prompts"] == len(common)
    assert {row["n"] for row in made["rows"] if row["measure"] == "correct"} == {len(common)}
    assert f"tiny was measured on 12 prompts; compared are the {len(common)} that all have." in made["notes"]
    assert "elsewhere was measured on other prompts, and is not compared." in made["notes"]
    assert {row["model"] for row in made["rows"]} == {"tiny", "other_split"}
    if len(common) < 10:
        assert f"{len(common)} prompts are too few to conclude anything" in done.stdout


def test_loss_on_the_teachers_answers_is_compared_where_the_teacher_said_the_same(tmp_path: Path) -> None:
    async def saying(body: dict[str, Any], before: int) -> dict[str, Any]:
        """`good` says what the teacher says; `poor` does so for odd numbers."""
        number = int(body["messages"][-1]["content"].rstrip("?").rpartition(" ")[2])
        same = body["model"] != "poor" or number % 2
        return chat(body, texts=["It is blue." if same else "It is red."] * body.get("n", 1))

    models = [tiny_model(tmp_path / name, seed=i) for i, name in enumerate(("base", "other"))]
    arm = f"arms:\n  other: {{models.base.model: {models[1]}, stages.2.evaluate.teacher: poor}}\n"
    with in_thread(saying) as server:
        text = written(server.url, arm, STAGES.replace("[good]", "[base]"))
        folder(tmp_path, text.replace("prompts:\n", f"  base: {{type: transformers, model: {models[0]}}}\nprompts:\n"))
        done = typed(tmp_path, "run", "recipe.yaml")
        assert done.returncode == 0, done.stderr
    made = comparison(tmp_path)
    rows = {(row["model"], row["measure"]): row for row in made["rows"]}
    own = {
        run: {
            row["prompt"]: row["values"]["base"]
            for row in read_jsonl(next((tmp_path / "runs" / run).glob("*-evaluate-*/values.jsonl")))
        }
        for run in ("tiny", "tiny.other")
    }
    odd = {
        row["prompt"]["id"]
        for path in (tmp_path / "runs/tiny").glob("*-evaluate-*/*-*.jsonl")
        for row in read_jsonl(path)
        if int(row["prompt"]["messages"][0]["content"].rstrip("?").rpartition(" ")[2]) % 2
    }
    assert 0 < len(odd) < HELD_OUT
    for measure in ("teacher_loss", "token_agreement"):
        first, other = ({prompt: told[measure] for prompt, told in own[run].items()} for run in own)
        assert rows["tiny", measure]["value"] == pytest.approx(sum(first.values()) / HELD_OUT)
        assert rows["other", measure]["value"] == pytest.approx(sum(other[prompt] for prompt in odd) / len(odd))
        (c,) = [c for c in made["comparisons"] if c["measure"] == measure]
        assert (c["a"], c["n"]) == ("other", len(odd))
        assert c["value"] == pytest.approx(sum(other[prompt] - first[prompt] for prompt in odd) / len(odd))


def test_a_live_check_asks_the_models_of_arms_too(tmp_path: Path) -> None:
    with in_thread(script) as server:
        other = f'arms:\n  other: {{models.teacher: {{type: openai, model: good, base_url: "{server.url}"}}}}\n'
        folder(tmp_path, written(server.url, other))
        done = typed(tmp_path, "check", "recipe.yaml", "--live")
        assert done.returncode == 0, done.stderr
    assert {"models.teacher", "models.good", "models.poor", "models.teacher (arm other)"} == {
        line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith("models.")
    }


# -- what runs share ---------------------------------------------------------------------------------------------------


def test_a_step_of_another_run_is_linked_and_was_asked_for_there(tmp_path: Path) -> None:
    out = StageWriter(tmp_path / "first/03-student-0123abcd")
    (out.folder / "model").mkdir()
    (out.folder / "model/weights").write_bytes(b"heavy")
    facts_ = {"stage": "train", "unit": "rows", "seconds": 9.5, "usd": "0.5", "requests": {"sent": 4, "reused": 3}}
    made = out.finish(facts_, 0)
    before = made.manifest
    (tmp_path / "second").mkdir()
    linked = made.linked(tmp_path / "second")
    assert linked.path == tmp_path / "second/03-student-0123abcd"
    assert (linked.path / "model/weights").samefile(made.path / "model/weights")
    told_ = linked.manifest
    assert (told_["requests"], told_["usd"], told_["seconds"]) == ({"sent": 0, "reused": 7}, "0", 0)
    assert (told_["made_in"], told_["content"]) == ("first", before["content"])
    assert made.manifest == before


def test_time_at_work_is_that_of_the_arm_that_was_at_work(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        for run, seconds in (("a", 0.2), ("b", 0.1)):
            journal.clock(run)
            time.sleep(seconds)
        journal.clock("c")
        assert journal.spent("a").hours * 3600 >= 0.2
        assert journal.spent("b").hours * 3600 >= 0.1
