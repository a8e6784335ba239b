"""Message batches against a real server: what differs from OpenAI's, above all that a batch carries no metadata.

What is stored is the `message` as it came; here it has a body that the OpenAI teacher reads.
"""

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factory import batch, cli
from factory.ask import Model
from factory.batch import Batches
from factory.budget import Budget, Wall
from factory.errors import AuthError, FactoryError, IdentityError, OutageError, RecipeError, Waiting
from factory.journal import Journal, answer_keys
from factory.rows import Prompt, Request, Sampling
from factory.teachers.anthropic_batch import AnthropicBatch
from factory.teachers.openai import OpenAI
from tests.batch_server import MessageBatchServer, Row, batch_server, message_result


def everything(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
    return "", [message_result(line) for line in reversed(lines)], []


@pytest.fixture
def server() -> Iterator[MessageBatchServer]:
    with batch_server(MessageBatchServer()) as running:
        running.outcome = everything
        yield running


@pytest.fixture
def short_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of batches that is soon up to date: what comes of it is the same."""
    monkeypatch.setattr(batch, "LAG_S", 0.3)


def ask(
    folder: Path, server: MessageBatchServer, count: int = 4, key: str | None = None, wait: float | None = None
) -> int:
    """Collect, then submit what is missing; the number of answers stored when nothing is open any more."""
    entry = OpenAI(model="m", base_url=server.url)
    model = Model("teacher", entry, "anthropic:m", entry.open(Path()))
    prompts = [Prompt.of([{"role": "user", "content": f"question {i}"}]) for i in range(count)]
    requests = [Request(identity="anthropic:m", messages=p.messages, sampling=Sampling(), prompt=p.id) for p in prompts]

    async def go() -> int:
        endpoint = AnthropicBatch(server.url, key, model.teacher.body)  # type: ignore[attr-defined]
        async with Batches(opened, Wall(Budget(), opened.spent("run")), "run", model, endpoint, wait) as batches:
            await batches.collect()
            keys = [(r, answer_keys(r)[0]) for r in requests]
            stored = opened.answers(key for _, key in keys)
            missing = (r for r, key in keys if key not in stored and not batches.skip(r, key))
            await batches.submit(missing, check=lambda: None)
        return len(stored)

    with Journal(folder / "journal.sqlite") as opened:
        return asyncio.run(go())


def statuses(folder: Path) -> list[Any]:
    db = sqlite3.connect(folder / "journal.sqlite")
    try:
        return db.execute("SELECT status, reason FROM attempt ORDER BY id").fetchall()
    finally:
        db.close()


def test_submit_leave_come_back_collect(tmp_path: Path, server: MessageBatchServer) -> None:
    server.polls = 1
    for told in ("0 of 4", "0 of 4"):
        with pytest.raises(Waiting, match=f"batch msgbatch_0 is not done: {told}"):
            ask(tmp_path, server, key="canary-key-7")
    assert ask(tmp_path, server, key="canary-key-7") == 4
    assert server.calls == {"submit": 1, "look": 2, "content": 1}
    assert server.keys == {"canary-key-7"}
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "question 0"}],
        "max_tokens": 1024,
        "temperature": 1.0,
    }
    assert server.uploads[0][0]["params"] == body


def test_each_kind_of_result_has_its_end(tmp_path: Path, server: MessageBatchServer) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        if len(lines) < 5:
            return everything(lines)
        invalid = {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is odd"}}
        broken = {"type": "error", "error": {"type": "api_error", "message": "oops"}}
        rows = [message_result(lines[0]), message_result(lines[1], "errored", error=invalid)]
        rows += [message_result(lines[2], "errored", error=broken), message_result(lines[3], "expired")]
        return "", [*rows, message_result(lines[4], "canceled")], []

    server.outcome = outcome
    for _ in range(2):
        with pytest.raises(Waiting):
            ask(tmp_path, server, 5)
    asked = [line["params"]["messages"][0]["content"] for line in server.uploads[1]]
    assert asked == ["question 2", "question 3", "question 4"]
    assert statuses(tmp_path)[:5] == [
        ("read", None), ("failed", "bad_request"), ("failed", "server_error"), ("failed", "not_answered"), ("failed", "not_answered"),
    ]  # fmt: skip
    assert ask(tmp_path, server, 5) == 4


# -- a start that ended before it could write the handle down --------------------------------------------------------------


def crash(folder: Path, server: MessageBatchServer) -> None:
    """The batch is submitted, the journal only knows that it was built."""
    with pytest.raises(Waiting):
        ask(folder, server)
    with sqlite3.connect(folder / "journal.sqlite") as db:
        db.execute("UPDATE batch SET state='built', handle=NULL, submitted=NULL")
    db.close()


def test_a_batch_is_known_again_by_its_results(tmp_path: Path, server: MessageBatchServer) -> None:
    crash(tmp_path, server)
    for i in range(3):  # on the next page of the listing: ours
        server.add(f"other_{i}", [{"custom_id": f"x-{k}-y", "params": {}} for k in range(4)])
        server.batches[-1]["looks"] = 9
    server.outcome = lambda lines: everything(lines) if "messages" in lines[0]["params"] else foreign(lines)
    server.batches[0]["looks"] = 9
    assert ask(tmp_path, server) == 4
    assert server.calls["submit"] == 1


def foreign(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
    return "", [{"custom_id": line["custom_id"], "result": {"type": "canceled"}} for line in lines], []


def test_while_it_cannot_be_told_whose_a_batch_is_nothing_is_submitted(
    tmp_path: Path, server: MessageBatchServer
) -> None:
    crash(tmp_path, server)
    for _ in range(2):
        with pytest.raises(Waiting, match="msgbatch_0 may be it"):
            ask(tmp_path, server)
    server.batches[0]["looks"] = 9
    assert ask(tmp_path, server) == 4
    assert server.calls["submit"] == 1


def test_wait_waits_for_that_too(tmp_path: Path, server: MessageBatchServer) -> None:
    crash(tmp_path, server)
    server.listings = 3
    assert ask(tmp_path, server, wait=0.02) == 4
    assert server.calls["list"] == 4
    assert server.calls["submit"] == 1


def test_a_batch_that_the_list_does_not_show_yet_is_not_submitted_again(
    tmp_path: Path, server: MessageBatchServer
) -> None:
    crash(tmp_path, server)
    server.late = 1
    server.batches[0]["looks"] = 9
    assert ask(tmp_path, server) == 4
    assert (server.calls["list"], server.calls["submit"]) == (2, 1)


@pytest.mark.usefixtures("short_lag")
@pytest.mark.parametrize("other", ["none", "another size", "too old", "foreign", "known"])
def test_a_batch_that_never_arrived_is_submitted_again(tmp_path: Path, server: MessageBatchServer, other: str) -> None:
    crash(tmp_path, server)
    (lost,) = server.batches
    server.batches.clear()
    if other == "known":  # another batch of ours, of the same size, still running
        with sqlite3.connect(tmp_path / "journal.sqlite") as db:
            db.execute("INSERT INTO batch VALUES ('k', 'anthropic:m', 'run', 'forgiven', 'lost_one', 99, 4, 1, 1, 1)")
        db.close()
    rows = [{"custom_id": f"x-{k}-y", "params": {}} for k in range(3 if other == "another size" else 4)]
    if other != "none":
        server.add("lost_one", rows, age_s=3600 if other == "too old" else 0)
        server.batches[0]["looks"] = 9 if other == "foreign" else 0
        server.outcome = lambda lines: everything(lines) if "messages" in lines[0]["params"] else foreign(lines)
    with pytest.raises(Waiting, match="0 of 4 requests answered"):
        ask(tmp_path, server)
    assert ask(tmp_path, server) == 4
    assert lost["looks"] == 0
    assert len(server.uploads) == 2


# -- an endpoint that is not well --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_lag")
@pytest.mark.parametrize(
    ("status", "raised"),
    [(401, AuthError), (404, RecipeError), (400, RecipeError), (307, RecipeError), (529, OutageError)],
)
def test_an_endpoint_that_refuses_a_batch_is_named(
    tmp_path: Path, server: MessageBatchServer, status: int, raised: type[FactoryError]
) -> None:
    error = {"type": "error", "error": {"type": "x", "message": "the key canary-key-7 is odd"}}
    server.refuse["submit"] = (status, error)
    with pytest.raises(raised) as told:
        ask(tmp_path, server, key="canary-key-7")
    assert "canary-key-7" not in str(told.value)
    assert not server.calls["elsewhere"]
    server.refuse.clear()
    with pytest.raises(Waiting):
        ask(tmp_path, server)
    assert ask(tmp_path, server) == 4


def test_a_batch_that_the_provider_does_not_know_is_not_given_up(tmp_path: Path, server: MessageBatchServer) -> None:
    with pytest.raises(Waiting):
        ask(tmp_path, server)
    gone = server.batches.pop()
    with pytest.raises(IdentityError, match="does not know batch msgbatch_0"):
        ask(tmp_path, server)
    server.batches.append(gone)
    assert ask(tmp_path, server) == 4


def test_an_endpoint_that_is_not_there_is_an_outage(tmp_path: Path, server: MessageBatchServer) -> None:
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(OutageError, match=r"127\.0\.0\.1:9.*run the same command again"):
        ask(tmp_path, server)


# -- through the command line ------------------------------------------------------------------------------------------------


def native(line: Row) -> Row:
    """A native message, as the API answers."""
    said = f"answer to {line['params']['messages'][-1]['content']}"
    usage = {"input_tokens": 10, "output_tokens": 5}
    message = {
        "type": "message",
        "model": "claude-m",
        "content": [{"type": "text", "text": said}],
        "stop_reason": "end_turn",
    }
    return {"custom_id": line["custom_id"], "result": {"type": "succeeded", "message": message | {"usage": usage}}}


def recipe(folder: Path, server: MessageBatchServer) -> list[str]:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(3)))
    (folder / "recipe.yaml").write_text(f"""\
name: tiny
budget: {{requests: 6}}
models: {{teacher: {{type: anthropic, model: claude-m, base_url: "{server.url}", batch: true}}}}
prompts: [{{path: {folder}/prompts.jsonl, name: questions}}]
stages: [{{generate: {{model: teacher, n: 2, max_tokens: 16}}}}]
""")
    return ["build", str(folder / "recipe.yaml"), "--runs", str(folder / "runs")]


def test_an_anthropic_model_in_a_recipe_is_asked_in_batches(
    tmp_path: Path, server: MessageBatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "canary-key-7")
    server.outcome = lambda lines: ("", [native(line) for line in reversed(lines)], [])
    command = recipe(tmp_path, server)
    server.stall = "submit"
    child = subprocess.Popen([sys.executable, "-m", "factory", *command], stderr=subprocess.DEVNULL)
    assert server.stalled.wait(60)
    child.kill()
    child.wait()
    server.stall = ""
    assert cli.main(command) == Waiting.exit_code  # the batch may be ours
    server.batches[0]["looks"] = 9
    assert cli.main(command) == 0
    assert server.calls["submit"] == 1
    assert server.keys == {"canary-key-7"}
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/dataset/train.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == [f"answer to question {i}" for i in range(3) for _ in range(2)]
    assert b"canary-key-7" not in b"".join(p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file())
