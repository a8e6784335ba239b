"""A journal that a real server has filled, and the command line to look at it."""

import json
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from factory.cli import main
from factory.exchange import End, Header
from factory.journal import Journal
from factory.ledger import Answer, Attempt
from factory.rows import Request, Sampling, encode
from factory.teachers.failures import RULES
from tests.server import chat, serving
from tests.test_ask import ask, asks, model_at, questions

PRICE = {"input": 1, "output": 2}
IDS = [prompt.id for prompt in questions(5)]
Told = pytest.CaptureFixture[str]


def journal(runs: Path, *arguments: str) -> int:
    return main(["journal", *arguments, "--runs", str(runs)])


def stats(runs: Path, capsys: Told) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert journal(runs, "stats", "--json") == 0
    groups: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["groups"]
    return groups


def sql(runs: Path, *statements: str) -> list[Any]:
    """Run statements on the journal as it lies there; the rows of the last."""
    db = sqlite3.connect(runs / "journal.sqlite", isolation_level=None)
    rows = [db.execute(statement).fetchall() for statement in statements][-1]
    db.close()
    return rows


async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
    """Question 0 has no answer, 1 is cut off at its first limit and 4 at every one, 2 is long."""
    question = body["messages"][-1]["content"]
    if question == "question 0":
        return {"error": {"message": "canary-error", "code": 400}}
    said = [f"canary-{i} for {question}" for i in range(body.get("n", 1))]
    if question == "question 2":
        said = [text + " and so on" * 600 for text in said]
    cut = question == "question 4" or (question == "question 1" and body["max_tokens"] < 100)
    return chat(body, said, finish="length" if cut else "stop")


FILLED: list[bytes] = []


async def filled() -> bytes:
    """A journal: five questions, two draws each; question 1 was asked once more with a larger limit. Made once."""
    if not FILLED:
        with TemporaryDirectory() as name:
            folder = Path(name)
            async with serving(script) as server:
                model = model_at(server.url, price=PRICE)
                await ask(folder, model, asks(model, questions(5), n=2, max_tokens=50))
                await ask(folder, model, asks(model, questions(2)[1:], n=2, max_tokens=500))
            FILLED.append((folder / "journal.sqlite").read_bytes())
    return FILLED[0]


def request(number: int = 9) -> Request:
    """A request of another model than the one that the server has answered as."""
    (prompt,) = questions(number + 1)[number:]
    return Request(identity="other", messages=prompt.messages, sampling=Sampling(max_tokens=50), prompt=prompt.id)


async def leave_unread(runs: Path, number: int = 9) -> None:
    """What a process leaves that ends between a body's arrival and its reading."""
    with Journal(runs / "journal.sqlite") as opened:
        attempt = await opened.begin("run", request(number), "0.5", 7)
        await opened.store(attempt, encode(chat({"model": "m", "messages": request(number).messages})))


def line(number: int, finish: str = "stop", limit: int = 10, **fields: Any) -> Attempt:
    """An attempt with one answer, as an export holds it."""
    body = chat({"model": "m", "messages": [{"content": f"question {number}"}]}, finish=finish)
    if failed := finish in RULES:  # paid for, and no answer
        body["choices"][0] |= {"finish_reason": {"filtered_output": "content_filter"}.get(finish, "length")}
        body["choices"][0]["message"] |= {"content": "", "reasoning": "hm"}
    answer = Answer(key=f"{number:032x}", draw=0, choice=0, finish=finish, max_tokens=limit, tokens=5)
    how: dict[str, Any] = {
        "id": number + 1, "run": "away", "model": "m", "prompt": f"{number:016x}", "asked": f"{number:016x}",
        "keys": [answer.key], "draw": 0, "max_tokens": limit, "sent": 1e9 + number, "ended": 2e9, "status": "failed" if failed else "read",
        "prompt_tokens": 10, "completion_tokens": 5, "seconds": 0.5, "usd": "0.25", "text": json.dumps(body), "answers": [answer],
    }  # fmt: skip
    return Attempt(**how | fields)


def write(path: Path, *attempts: Attempt) -> Path:
    rows = [Header(factory_journal=1, attempts=len(attempts)), *attempts, End(end=len(attempts))]
    path.write_bytes(b"".join(encode(row) + b"\n" for row in rows))
    return path
