"""What answers tell of who gave them: versions behind one name, and draws that are all the same."""

from pathlib import Path
from typing import Any

import pytest

from factory.cohorts import FEWEST, MOST, Cohorts
from factory.rows import Prompt, Sample, Verdict
from tests.command import factory, folder, read_jsonl, recipe, report
from tests.server import chat, in_thread


def sample(i: int, text: str, draw: int = 0, served: str = "", model: str = "teacher") -> Sample:
    prompt = Prompt.of([{"role": "user", "content": f"question {i}"}])
    return Sample(
        id=f"{i}.{draw}", prompt=prompt, asked=prompt.messages, response=text, model=model, draw=draw, served=served
    )


def facts(*samples: Sample) -> dict[str, Any]:
    cohorts = Cohorts()
    for one in samples:
        cohorts.hear(one)
    return cohorts.facts()


@pytest.mark.parametrize(
    ("same", "prompts", "told"),
    [(FEWEST, FEWEST, True), (FEWEST - 1, FEWEST - 1, False), (9, 10, True), (8, 10, False)],
)
def test_equal_draws_are_told_from_nine_tenths_of_enough_prompts(same: int, prompts: int, told: bool) -> None:
    heard = facts(*(sample(i, f"{i} {'' if i < same else draw}", draw) for i in range(prompts) for draw in range(3)))
    assert heard["draws_of_a_prompt"] == {"teacher": {"prompts": prompts, "same": same}}
    assert [line for line in heard["warnings"] if "no_diversity" in line] == heard["warnings"]
    assert bool(heard["warnings"]) == told


def test_a_draw_alone_and_one_without_an_answer_say_nothing_of_diversity() -> None:
    failed = [sample(i, "", 1).judged(Verdict(filter="generate", keep=None, reason="timeout")) for i in range(9)]
    heard = facts(*(one for i in range(9) for one in (sample(i, "a"), failed[i])))
    assert heard == {"served": {}, "draws_of_a_prompt": {}, "warnings": []}


def test_models_are_told_apart() -> None:
    rows = [sample(i, text, d, model=m) for i in range(5) for m, text in (("a", "x"), ("b", "y")) for d in range(2)]
    told = facts(*rows)
    assert told["draws_of_a_prompt"] == {m: {"prompts": 5, "same": 5} for m in ("a", "b")}
    assert len(told["warnings"]) == 2


def test_two_fingerprints_are_normal_and_two_versions_are_told() -> None:
    heard = facts(*(sample(i, "a", served=f"m-2026-01-01 fp_{i % 2}") for i in range(4)))
    assert heard["served"] == {"teacher": {"m-2026-01-01 fp_0": 2, "m-2026-01-01 fp_1": 2}}
    assert not heard["warnings"]
    heard = facts(*(sample(i, "a", served=f"m-2026-0{1 + i % 2}-01") for i in range(5)))
    assert "m-2026-01-01 3, m-2026-02-01 2" in heard["warnings"][0]


def test_a_server_with_a_new_fingerprint_for_each_answer_fills_no_memory() -> None:
    heard = facts(*(sample(i, "a", served=f"m fp_{i}") for i in range(10 * MOST)))
    assert len(heard["served"]["teacher"]) == MOST + 1
    assert sum(heard["served"]["teacher"].values()) == 10 * MOST
    assert not heard["warnings"]


def test_a_run_says_which_versions_answered_and_that_draws_do_not_differ(tmp_path: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        number = int(body["messages"][-1]["content"].rstrip("?").split()[-1])
        answer = chat(body, ["always the same long answer"] * body.get("n", 1))
        return {**answer, "model": f"m-2026-0{1 + number % 2}-01", "system_fingerprint": f"fp_{number % 3}"}

    with in_thread(script) as server:
        done = factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "several versions of the model" in done.stderr
    assert "no_diversity" in done.stderr
    told = report(tmp_path)
    assert sum(told["stages"][0]["served"]["teacher"].values()) == 36
    assert len([line for line in told["warnings"] if line.startswith("01-generate")]) == 2
    rows = read_jsonl(next(tmp_path.glob("runs/tiny/01-generate-*/kept-00000.jsonl")))
    assert {row["served"].split()[1] for row in rows} == {"fp_0", "fp_1", "fp_2"}
    assert "m-2026-02-01 fp_1" in (tmp_path / "runs/tiny/report.html").read_text()
    assert "served" not in read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")[0]
