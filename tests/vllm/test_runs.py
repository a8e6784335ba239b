"""Whole runs with a real vLLM server through the command line: deaths, kills, and another teacher in its place."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from factory.rows import Sample
from factory.run import StageFolder
from factory.teachers.transformers import Forced, Transformers
from tests.vllm.conftest import FLAGS, Running, ended, in_session

LIMIT_S = 300


def write(folder: Path, prompts: list[str], teacher: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    recipe = {"name": "real", "seed": 5, "models": {"teacher": teacher}, "prompts": [{"path": "prompts.jsonl", "name": "all"}], "stages": stages}  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML


def build(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "factory", "build", "recipe.yaml", *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def end(child: "subprocess.Popen[str]") -> str:
    told = child.communicate(timeout=LIMIT_S)[1]
    assert child.returncode == 0, told
    return told


def read_answers(runs: Path) -> int:
    """Answers in the journal so far, seen from outside."""
    path = runs / "journal.sqlite"
    if not path.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as journal:
            return int(journal.execute("SELECT count(*) FROM attempt WHERE status = 'read'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # not made yet


def until_answered(child: "subprocess.Popen[str]", runs: Path, count: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while read_answers(runs) < count:
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def session_of(runs: Path) -> int:
    (record,) = (runs / "servers").glob("*.running")
    return int(record.stem)


def asked_twice(runs: Path) -> list[Any]:
    """Draws that have more than one answer on file."""
    with sqlite3.connect(runs / "journal.sqlite") as journal:
        return journal.execute(
            "SELECT keys, count(*) FROM attempt WHERE status IN ('read', 'stored') GROUP BY keys HAVING count(*) > 1"
        ).fetchall()


def attempts(runs: Path) -> int:
    with sqlite3.connect(runs / "journal.sqlite") as journal:
        return int(journal.execute("SELECT count(*) FROM attempt").fetchone()[0])


def stage(runs: Path, number: int = 1) -> StageFolder:
    (path,) = (runs / "real").glob(f"{number:02}-*/manifest.json")
    return StageFolder(path.parent)


def draws(runs: Path, number: int = 1) -> list[Sample]:
    return list(stage(runs, number).rows(Sample))


def test_an_engine_that_is_killed_in_mid_run_loses_nothing(tmp_path: Path, smollm: Path, vllm_python: str) -> None:
    """Real weights from a GGUF file; then beams, wider than a server allows that was not told of them."""
    teacher = {"type": "vllm", "model": str(smollm), "dtype": "float32", "python": vllm_python, "args": FLAGS | {"max_model_len": 512}, "limits": {"max_concurrency": 8}}  # fmt: skip
    asking = "Rewrite this sentence in the past tense: "
    prompts = [f"{asking}The {who} {does} in the yard." for who in ("dog", "cat", "boy", "girl") for does in ("runs", "plays", "sleeps")]  # fmt: skip
    stages = [
        {"generate": {"from": "all", "model": "teacher", "n": 2, "temperature": 0.7, "top_p": 0.95, "max_tokens": 24, "as": "drawn"}},
        {"choose": {"cap": 1}},
        {"generate": {"from": "few", "model": "teacher", "max_tokens": 12, "beam": {"width": 11, "keep": 2}}},
    ]  # fmt: skip
    write(tmp_path, prompts, teacher, stages)
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["prompts"].append({"path": "prompts.jsonl", "name": "few", "take": 2})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    runs = tmp_path / "runs"
    run = build(tmp_path)
    until_answered(run, runs, 4)
    first = session_of(runs)
    (engine,) = (pid for pid, name in in_session(first).items() if name.startswith("VLLM::EngineCor"))
    os.kill(engine, signal.SIGKILL)
    told = end(run)
    assert "vLLM died" in told
    assert ended(first, 1)
    assert not list((runs / "servers").glob("*.running"))

    drawn = draws(runs)
    assert (stage(runs).manifest["kept"], stage(runs).manifest["failed"]) == (24, 0)
    assert asked_twice(runs) == []
    assert attempts(runs) - 24 - 2 <= 8  # the beams are two; and what was in flight at the death was sent again
    assert sum("yard" in sample.response for sample in drawn) > 12  # the folder made of the GGUF file is the model
    (server,) = stage(runs).manifest["servers"]["teacher"]
    assert server["vllm"].startswith("0.")
    assert {"--enable-prefix-caching", "--enforce-eager", "--max-model-len"} <= set(server["flags"])
    _check_beams(draws(runs, 3), stage(runs, 3), smollm, runs)


def _check_beams(beams: list[Sample], folder: StageFolder, smollm: Path, runs: Path) -> None:
    """Each hypothesis has the probability that the local teacher gives its text and its end."""
    import asyncio

    assert [sample.draw for sample in beams] == [0, 1, 0, 1]
    assert any(server["flags"][-4:] and "22" in server["flags"] for server in folder.manifest["servers"]["teacher"])

    async def losses() -> list[Forced]:
        local = Transformers(model=str(smollm), dtype="float32").open(runs)
        try:
            return [await local.forced(sample.asked, sample.response) for sample in beams if sample.finish == "stop"]
        finally:
            await local.close()

    ends = [sample for sample in beams if sample.finish == "stop"]
    assert ends
    for sample, told in zip(ends, asyncio.run(losses()), strict=True):
        assert sample.tokens == told.tokens
        assert sample.logprob == pytest.approx(-told.loss, abs=0.01)
    for best, second in (beams[:2], beams[2:]):
        assert _score(best) >= _score(second)


def _score(sample: Sample) -> float:
    assert sample.logprob is not None
    assert sample.tokens
    return sample.logprob / sample.tokens


def test_a_killed_factory_leaves_no_server_and_other_teachers_take_its_place(
    tmp_path: Path, tiny: Path, vllm_python: str, running: Running
) -> None:
    prompts = [f"What is the colour of thing number {i}?" for i in range(40)]
    teacher = {"type": "vllm", "model": str(tiny), "layers": {"first": 1}, "dtype": "float32", "python": vllm_python, "args": FLAGS, "limits": {"max_concurrency": 2}}  # fmt: skip
    generate = {"model": "teacher", "n": 2, "temperature": 1.0, "max_tokens": 400}
    write(tmp_path, prompts, teacher, [{"generate": generate}])
    runs = tmp_path / "runs"
    run = build(tmp_path)
    until_answered(run, runs, 10)
    first = session_of(runs)
    run.kill()
    run.communicate(timeout=10)
    assert ended(first, 15), in_session(first)
    stored = read_answers(runs)
    assert 10 <= stored < 80

    end(build(tmp_path))
    manifest = stage(runs).manifest
    assert manifest["kept"] + manifest["failed"] == 80
    assert asked_twice(runs) == []
    assert manifest["requests"]["reused"] >= stored
    assert attempts(runs) - 80 <= 2 + manifest["failed"]  # two were in flight at the kill; an empty answer is no draw
    assert not list((runs / "servers").glob("*.running"))

    small = ("--set", "stages.0.generate.n=1", "--set", "stages.0.generate.max_tokens=8", "--max-failed", "1")
    for name, entry in {
        "transformers": {"type": "transformers", "model": str(tiny)},
        "openai": {"type": "openai", "model": running.model, "base_url": running.url},
    }.items():
        other = tmp_path / name
        end(build(tmp_path, "--runs", name, "--set", f"models.teacher={json.dumps(entry)}", *small))
        manifest = stage(other).manifest
        assert manifest["kept"] + manifest["failed"] == 40
        assert manifest["kept"] >= 30
        assert "servers" not in manifest
