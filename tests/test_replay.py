"""Answers that exist already: a journal or a JSONL file stands in for the teacher, and nobody is asked."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.command import QUESTIONS, factory, folder, read_jsonl, recipe
from tests.server import chat, in_thread

STAGES = "  - generate: {model: teacher, n: 2, temperature: 0.7, max_tokens: 2000}\n"


async def long_answers(body: dict[str, Any], before: int) -> dict[str, Any]:
    """Long enough that the journal compresses them."""
    question = body["messages"][-1]["content"]
    return chat(body, [f"draw {i} of {question} " + "and so on " * 600 for i in range(body.get("n", 1))])


def test_a_journal_replays_every_draw_and_asks_nobody(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    with in_thread(long_answers) as server:
        folder(first, recipe(server.url, stages=STAGES))
        done = factory(first, "build", "recipe.yaml")
        assert done.returncode == 0, done.stderr
    folder(second, recipe(server.url, stages=STAGES))
    shutil.copy(first / "runs/journal.sqlite", second / "paid.sqlite")
    done = factory(second, "build", "recipe.yaml", "--set", "models.teacher={type: replay, path: paid.sqlite}")
    assert done.returncode == 0, done.stderr
    rows = [read_jsonl(where / "runs/tiny/dataset/train.jsonl") for where in (first, second)]
    texts = [[(row["prompt"], row["completion"]) for row in some] for some in rows]
    assert texts[0] == texts[1]
    assert len({text for _, text in texts[1]}) == 36  # two draws each of 18 questions, none of them twice


def test_a_jsonl_file_replays_and_what_it_lacks_has_failed(tmp_path: Path) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1", stages=STAGES))
    known = [{"prompt": q, "completion": f"{side} answer"} for q in QUESTIONS[:20] for side in ("first", "second")]
    (tmp_path / "known.jsonl").write_text("\n".join(map(json.dumps, known)))
    done = factory(tmp_path, "build", "recipe.yaml", "--set", "models.teacher={type: replay, path: known.jsonl}")
    assert done.returncode == 3, done.stderr
    assert "have no answer, more than --max-failed" in done.stderr
    (manifest,) = (json.loads(p.read_text()) for p in tmp_path.glob("runs/tiny/01-generate-*/manifest.json"))
    assert manifest["kept"] + manifest["failed"] == manifest["in"] == 36
    assert manifest["failed"] == manifest["reasons"]["no_stored_answer"] > 0


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1", stages=STAGES))
    (tmp_path / "known.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    done = factory(tmp_path, "build", "recipe.yaml", "--set", "models.teacher={type: replay, path: known.jsonl}")
    assert done.returncode == 2
    assert "known.jsonl:2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_journal_of_native_messages_replays(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    stages = "  - generate: {model: teacher, n: 2, temperature: 0.7}\n"
    with in_thread() as server:
        folder(first, recipe(server.url, stages=stages).replace("type: openai", "type: anthropic, api_key_env: null"))
        done = factory(first, "build", "recipe.yaml")
        assert done.returncode == 0, done.stderr
    assert {body.get("seed") for body in server.bodies} == {None}
    folder(second, recipe(server.url, stages=stages))
    shutil.copy(first / "runs/journal.sqlite", second / "paid.sqlite")
    done = factory(second, "build", "recipe.yaml", "--set", "models.teacher={type: replay, path: paid.sqlite}")
    assert done.returncode == 0, done.stderr
    rows = [read_jsonl(where / "runs/tiny/dataset/train.jsonl") for where in (first, second)]
    assert [(row["prompt"], row["completion"]) for row in rows[0]] == [
        (row["prompt"], row["completion"]) for row in rows[1]
    ]
