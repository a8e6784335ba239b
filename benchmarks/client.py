"""Client CPU per request: the asking layer with its durable journal, beside a bare `openai` loop on the same server.

A server in a process of its own answers ~150 tokens after 50 ms; 256 requests are in flight. Each client runs as a
process on one core, start-up included; a pair is one run of each, and pairs alternate.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks._figures import Cost, Figure, child, judged, main, prompts
from benchmarks._server import serving

CONCURRENCY = 256
CLIENT_CORE = 0

RECIPE = """\
name: first
models:
  teacher: {{type: openai, model: m, base_url: "{url}", limits: {{max_concurrency: 8}}}}
prompts: [{{path: prompts.jsonl}}]
stages:
  - generate: {{model: teacher, temperature: 0.7, max_tokens: 256}}
"""


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    full, count = not arguments.small, arguments.prompts
    ours: list[Cost] = []
    theirs: list[Cost] = []
    for i in range(arguments.pairs):
        for name, costs in (("factory", ours), ("openai", theirs)):
            with serving() as server:
                cost = child("benchmarks.client", name, server.url, count, arguments.folder / str(i), core=CLIENT_CORE)
                seen = server.stats()
            assert cost.exit_code == 0, name
            assert (seen.requests, seen.distinct) == (count, count), seen
            costs.append(cost)
    cpu, bare = ([1000 * cost.cpu_s / count for cost in costs] for costs in (ours, theirs))
    ratios = [mine / other for mine, other in zip(cpu, bare, strict=True)]
    yield judged("client.cpu_ms_per_request", statistics.median(cpu), "<= 1.0", full)
    yield Figure("client.openai_cpu_ms_per_request", round(statistics.median(bare), 4))
    yield judged("client.cpu_ratio_to_openai", statistics.median(ratios), "<= 0.25", full)
    yield judged(
        "client.requests_per_second", statistics.median([count / cost.wall_s for cost in ours]), ">= 800", full
    )
    yield Figure(
        "client.openai_requests_per_second", round(statistics.median([count / cost.wall_s for cost in theirs]), 1)
    )
    yield judged("client.first_request_s", statistics.median(_first(arguments)), "<= 1.0", full)


def _first(arguments: argparse.Namespace) -> Iterator[float]:
    """Seconds from the start of `factory build` to its first request."""
    for i in range(arguments.pairs):
        folder = arguments.folder / f"first-{i}"
        folder.mkdir()
        rows = (json.dumps({"prompt": text}) for text in prompts(100))
        (folder / "prompts.jsonl").write_text("\n".join(rows))
        with serving() as server:
            (folder / "recipe.yaml").write_text(RECIPE.format(url=server.url))
            cost = child("factory", "build", "recipe.yaml", cwd=folder)
            first = server.stats().first
        assert cost.exit_code == 0
        assert first is not None
        yield first - cost.started


# -- the two clients, each in a process of its own -------------------------------------------------------------------


async def _factory(url: str, count: int, folder: Path) -> None:
    from factory.ask import Desk, Model
    from factory.budget import Budget, Wall
    from factory.journal import Journal
    from factory.rows import Prompt, Request, Sampling
    from factory.teachers.entry import Limits
    from factory.teachers.openai import OpenAI

    entry = OpenAI(model="m", base_url=url, limits=Limits(max_concurrency=CONCURRENCY))
    model = Model("teacher", entry, entry.identity(Path()), entry.open(Path()))
    how = Sampling(temperature=0.7, max_tokens=256)
    asked = (Prompt.of([{"role": "user", "content": text}]) for text in prompts(count))
    requests = (Request(identity=model.identity, messages=p.messages, sampling=how, prompt=p.id) for p in asked)
    with Journal(folder / "journal.sqlite") as journal:
        desk = Desk(journal, Wall(Budget(), journal.spent("bench")), "bench")
        tally = await desk.ask(model, requests, count, "bench")
    assert (tally.sent, len(tally.failures)) == (count, 0), tally


async def _openai(url: str, count: int, folder: Path) -> None:
    """The loop that people write: a semaphore's worth of workers, retries off, answers into a JSONL file."""
    from openai import AsyncOpenAI

    waiting = prompts(count)
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with (folder / "answers.jsonl").open("w") as out:

            async def work() -> None:
                for text in waiting:
                    said = await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": text}], temperature=0.7, max_tokens=256
                    )
                    out.write(json.dumps({"prompt": text, "answer": said.choices[0].message.content}) + "\n")

            await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


CLIENTS = {"factory": _factory, "openai": _openai}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in CLIENTS:
        where = Path(sys.argv[4])
        where.mkdir(exist_ok=True)
        asyncio.run(CLIENTS[sys.argv[1]](sys.argv[2], int(sys.argv[3]), where))
    else:
        main(__doc__, measure, prompts=(10_000, 500), pairs=(5, 2))
