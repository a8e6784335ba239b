"""How draws are planned: rounds until enough is accepted, as many prompts as are wanted, several models, a fallback."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from factory.errors import BudgetError
from factory.pipeline import run
from factory.recipe import load
from factory.rows import Sample
from factory.run import StageFolder
from tests.server import Script, Server, chat, error, in_thread


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"question {i}"}) for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return tmp_path


def recipe(generate: str, *servers: Server, more: str = "") -> str:
    models = "".join(
        f"  {name}: {{type: openai, model: m, base_url: '{server.url}', limits: {{max_attempts: 2, max_concurrency: 4}}}}\n"
        for name, server in zip(("teacher", "other"), servers, strict=False)
    )
    stages = f"stages:\n  - generate: {generate}\n  - filter: [{{format: {{pattern: 'good.*'}}}}]\n"
    return f"name: r\nmodels:\n{models}prompts: [prompts.jsonl]\n{more}{stages}".replace(
        "[prompts.jsonl]", "[{path: prompts.jsonl}]"
    )


def done(text: str) -> dict[str, list[Sample]]:
    """Run a recipe; the rows of its generate stage by ending."""
    Path("r.yaml").write_text(text)
    run(load(Path("r.yaml")), Path("runs"), max_failed=1)
    (name,) = [n for n in json.loads(Path("runs/r/manifest.json").read_text())["stages"] if n.startswith("01-generate")]
    stage = StageFolder(Path("runs/r") / name)
    rows = {ending: list(stage.rows(Sample, ending)) for ending in ("kept", "dropped", "failed")}
    assert sum(map(len, rows.values())) == stage.manifest["in"]
    return rows


def good_from(draw_of: dict[int, int]) -> Script:
    """Question i is answered well from draw `draw_of[i]` on; draws are counted by what was asked before."""
    seen: Counter[int] = Counter()

    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        number = int(body["messages"][-1]["content"].split()[-1])
        texts = []
        for _ in range(body.get("n", 1)):
            texts.append(f"{'good' if seen[number] >= draw_of.get(number, 0) else 'bad'} {number}/{seen[number]}")
            seen[number] += 1
        return chat(body, texts)

    return script


def test_until_asks_again_only_where_nothing_is_accepted_and_takes_the_lowest_draw(here: Path) -> None:
    with in_thread(good_from({1: 2, 2: 9})) as server:
        text = recipe("{model: teacher, until: {accepted: 1, at_most: 4}}", server)
        rows = done(text)
        asked = dict(server.seen)
        again = done(text.replace("at_most: 4", "at_most: 5"))
    assert asked == {f"question {i}": {1: 3, 2: 4}.get(i, 1) for i in range(20)}
    assert [(s.prompt.text, s.draw) for s in rows["kept"]] == [
        (f"question {i}", 2 if i == 1 else 0) for i in range(20) if i != 2
    ]
    assert Counter(s.verdicts[-1].reason for s in rows["dropped"]) == {"format": 6}
    assert server.seen["question 2"] == 5  # raising at_most pays for the new draw only
    assert sum(server.seen.values()) == sum(asked.values()) + 1
    assert again["kept"] == rows["kept"]


def test_until_takes_as_many_as_are_wanted(here: Path) -> None:
    with in_thread(good_from({1: 1})) as server:
        rows = done(recipe("{model: teacher, until: {accepted: 2, at_most: 5}}", server))
    drawn = [(s.prompt.text, s.draw) for s in rows["kept"] if s.prompt.text == "question 1"]
    assert drawn == [("question 1", 1), ("question 1", 2)]
    assert [s.verdicts[-1].reason for s in rows["dropped"]] == ["format", "surplus"]  # draws 0 and 3
    assert len(rows["kept"]) == 40


def test_until_needs_a_filter(here: Path) -> None:
    Path("r.yaml").write_text(
        "name: r\nprompts: [{path: prompts.jsonl}]\nmodels: {t: {type: reference}}\n"
        "stages:\n  - generate: {model: t, until: {at_most: 3}}\n"
    )
    with pytest.raises(Exception, match=r"r.yaml:5: until needs a filter"):
        load(Path("r.yaml"))


def test_want_stops_asking_when_enough_is_accepted(here: Path) -> None:
    with in_thread(good_from(dict.fromkeys(range(0, 20, 2), 9))) as server:  # every other prompt is answered badly
        rows = done(recipe("{model: teacher, want: 5}", server))
    accepted = [s.prompt.text for s in rows["kept"] if s.response.startswith("good")]
    assert accepted == [f"question {i}" for i in (1, 3, 5, 7, 9)]
    assert len(server.seen) < 14  # not all twenty
    assert all(s.verdicts[-1].reason == "over_want" for s in rows["dropped"])


def test_want_goes_on_after_the_budget_was_raised(here: Path) -> None:
    with in_thread() as server:
        text = recipe("{model: teacher, want: 10}", server, more="budget: {requests: 6}\n").replace("good", "answer")
        with pytest.raises(BudgetError):
            done(text)
        assert sum(server.seen.values()) == 6
        rows = done(text.replace("requests: 6", "requests: 60"))
        assert sum(server.seen.values()) == 10
    assert len(rows["kept"]) == 10


def test_weights_give_each_prompt_to_one_model_and_order_does_not_matter(here: Path) -> None:
    with in_thread() as one, in_thread() as two:
        rows = done(recipe("{model: {teacher: 3, other: 1}}", one, two))
        by_model = {s.prompt.text: s.model for s in rows["kept"]}
        assert not set(one.seen) & set(two.seen)
    assert len(by_model) == 20
    share = sum(model == "teacher" for model in by_model.values())
    assert 10 <= share <= 19  # 15 are expected
    reversed_rows = Path("prompts.jsonl").read_text().split("\n")[::-1]
    Path("prompts.jsonl").write_text("\n".join(reversed_rows[:11]))
    with in_thread() as one, in_thread() as two:
        Path("runs").rename("before")
        again = {s.prompt.text: s.model for s in done(recipe("{model: {teacher: 3, other: 1}}", one, two))["kept"]}
    assert again == {text: by_model[text] for text in again}


def test_all_models_answer_every_prompt_in_the_order_of_the_recipe(here: Path) -> None:
    with in_thread() as one, in_thread() as two:
        rows = done(recipe("{model: [other, teacher]}", one, two))
    assert [s.model for s in rows["kept"]] == ["other", "teacher"] * 20
    assert len(one.seen) == len(two.seen) == 20


def test_a_fallback_answers_what_failed_or_was_refused(here: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> web.StreamResponse | dict[str, Any] | None:
        question = body["messages"][-1]["content"]
        if question == "question 3":
            return error(400, "blocked by content_filter")
        return chat(body, ["I'm sorry, but I can't help with that."]) if question == "question 4" else None

    with in_thread(script) as one, in_thread() as two:
        rows = done(recipe("{model: teacher, fallback: other}", one, two))
        assert set(two.seen) == {"question 3", "question 4"}
    assert {s.prompt.text for s in rows["kept"] if s.model == "other"} == {"question 3", "question 4"}
    assert [s.prompt.text for s in rows["kept"]] == [f"question {i}" for i in range(20)]
    assert all(s.parents for s in rows["kept"] if s.model == "other")
    assert not rows["failed"]


def test_what_a_fallback_mends_is_not_lost(here: Path) -> None:
    (here / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"question {i}"}) for i in range(80)))

    async def script(body: dict[str, Any], before: int) -> web.StreamResponse:
        return error(400, "blocked by content_filter")

    with in_thread(script) as one, in_thread(good_from({})) as two:
        Path("r.yaml").write_text(recipe("{model: [other, teacher], fallback: other}", one, two))
        run(load(Path("r.yaml")), Path("runs"), "build")  # at the usual 2 %
        assert set(two.seen.values()) == {1}
    (manifest,) = [json.loads(p.read_text()) for p in Path("runs/r").glob("01-generate-*/manifest.json")]
    assert manifest["draws"] == {"planned": 160, "unanswered": 0}


def test_a_want_that_the_prompts_cannot_meet_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(good_from({})) as server:
        done(recipe("{model: teacher, want: 50}", server))
    assert "want: 50, but all prompts together gave 20 answers" in capsys.readouterr().err


def test_a_server_that_takes_n_and_heeds_it_not_is_asked_draw_by_draw(here: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        return chat(body, [f"good {body['messages'][-1]['content']} {before}"])

    with in_thread(script) as server:
        rows = done(recipe("{model: teacher, n: 8}", server))
    assert len(rows["kept"]) == 8 * 20
    assert not rows["failed"]


def test_a_truncated_answer_alone_is_asked_again_under_a_larger_limit(here: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        short = body["messages"][-1]["content"] == "question 7" and body["max_tokens"] < 100
        return chat(body, ["half an"] if short else ["good whole"], "length" if short else "stop")

    with in_thread(script) as server:
        done(recipe("{model: teacher, max_tokens: 50}", server))
        rows = done(recipe("{model: teacher, max_tokens: 200}", server))
    assert server.seen["question 7"] == 2
    assert sum(server.seen.values()) == 21
    assert {s.finish for s in rows["kept"]} == {"stop"}
