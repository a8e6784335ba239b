"""A journal of a million answers under a recipe of a million prompts: how long until the first new request, how much memory.

The journal is filled by its own schema; one more prompt than it knows is in the recipe. The first request that reaches
the server then says that the journal was opened and checked, the prompts read, the stages planned and all of it joined.
"""

import argparse
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._figures import Figure, child, judged, main, prompts
from benchmarks._server import answer, serving
from factory.journal import Journal, answer_keys
from factory.rows import Prompt, Request, Sampling
from factory.teachers.openai import OpenAI

RECIPE = """\
name: million
models:
  teacher: {{type: openai, model: m, base_url: "{url}"}}
prompts: [{{path: prompts.jsonl}}]
stages:
  - generate: {{model: teacher, temperature: 0.7, max_tokens: 256}}
"""


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    folder, count, full = arguments.folder, arguments.prompts, not arguments.small
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in prompts(count + 1))
    with serving() as server:
        (folder / "recipe.yaml").write_text(RECIPE.format(url=server.url))
        fill(folder / "runs" / "journal.sqlite", server.url, count)
        size = (folder / "runs" / "journal.sqlite").stat().st_size
        cost = child("factory", "build", "recipe.yaml", cwd=folder)
        seen = server.stats()
    assert cost.exit_code == 0
    assert seen.first is not None
    yield judged("scale.requests_for_what_is_stored", seen.requests - 1, "== 0")
    yield judged("scale.open_join_plan_s", seen.first - cost.started, "<= 20", full)
    yield judged("scale.peak_mb", cost.peak_mb, "<= 1000", full)
    yield Figure("scale.whole_build_s", round(cost.wall_s, 2))
    yield Figure("scale.journal_mb", round(size / 1e6, 1))


def fill(path: Path, url: str, count: int) -> None:
    """A journal as `count` finished requests leave it."""
    entry = OpenAI(model="m", base_url=url)
    identity, how = entry.identity(Path()), Sampling(temperature=0.7, max_tokens=256)
    Journal(path).close()
    db = sqlite3.connect(path)
    rows = list[tuple[Any, ...]]()
    for number, text in enumerate(prompts(count), 1):
        prompt = Prompt.of([{"role": "user", "content": text}])
        request = Request(identity=identity, messages=prompt.messages, sampling=how, prompt=prompt.id)
        rows.append((number, identity, prompt.id, answer_keys(request)[0], _body(text)))
        if len(rows) == 10_000 or number == count:
            _insert(db, rows)
            rows.clear()
    db.commit()
    db.close()


def _insert(db: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> None:
    now = time.time()
    db.executemany(
        "INSERT INTO attempt (id, run, identity, prompt, asked, keys, draw, max_tokens, sent, ended, status, body,"
        " prompt_tokens, completion_tokens) VALUES (?,'earlier',?,?,?,?,0,256,?,?,'read',?,20,150)",
        ((number, identity, prompt, prompt, key, now, now, body) for number, identity, prompt, key, body in rows),
    )
    db.executemany(
        "INSERT INTO answer VALUES (?,?,0,?,0,'stop',150,256)", ((key, identity, n) for n, identity, _, key, _ in rows)
    )


def _body(text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": answer(text, 0)}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 20, "completion_tokens": 150}
    return msgspec.json.encode({"id": "x", "model": "m", "choices": [choice], "usage": usage})


if __name__ == "__main__":
    main(__doc__, measure, prompts=(1_000_000, 10_000))
