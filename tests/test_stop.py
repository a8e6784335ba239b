"""Ctrl-C, SIGTERM, a closed terminal: requests in flight are answered and stored, the exit code says what it was."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.command import ASKED, attempts, factory, folder, heard, read_jsonl, recipe, started, typed, until
from tests.server import error, held, in_thread
from tests.tiny import tiny_model

STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def goes_on(where: Path) -> None:
    again = factory(where, "build", "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert len(read_jsonl(where / "runs/tiny/dataset/train.jsonl")) == ASKED


def ended(child: subprocess.Popen[str], code: int, within_s: float = 30) -> str:
    """What it said before it ended."""
    said = child.communicate(timeout=within_s)[1]
    assert child.returncode == code, said
    assert "Traceback" not in said, said
    return said


@pytest.mark.parametrize(("number", "code"), STOPPED.items())
def test_what_is_in_flight_is_still_answered_and_nothing_else_is_sent(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    gate = threading.Event()
    with in_thread(held(gate)) as server:
        folder(tmp_path, recipe(server.url, limits="max_concurrency: 4"))
        with started(tmp_path, "build", "recipe.yaml") as child:
            until(lambda: sum(server.seen.values()) == 4)
            child.send_signal(number)
            said = heard(child, "stopping")
            gate.set()
            said += ended(child, code)
        assert "4 requests are in flight" in said
        assert f"stopped by {number.name}; stored answers are kept, the same command goes on" in said
        assert [status for _, status in attempts(tmp_path)] == ["read"] * 4
        assert typed(tmp_path, "show", "tiny").stdout.startswith(f"tiny: stopped\n  Interrupted: {number.name}\n")
        goes_on(tmp_path)
        assert sum(server.seen.values()) == ASKED


def test_a_second_ctrl_c_leaves_at_once_and_only_what_was_in_flight_is_asked_again(tmp_path: Path) -> None:
    gate = threading.Event()
    with in_thread(held(gate)) as server:
        folder(tmp_path, recipe(server.url, limits="max_concurrency: 4"))
        with started(tmp_path, "build", "recipe.yaml") as child:
            until(lambda: sum(server.seen.values()) == 4)
            child.send_signal(signal.SIGINT)
            heard(child, "stopping")
            child.send_signal(signal.SIGINT)
            ended(child, 130)
        assert [status for _, status in attempts(tmp_path)] == ["sent"] * 4
        gate.set()
        goes_on(tmp_path)
        assert sum(server.seen.values()) == ASKED + 4


def test_ctrl_c_does_not_wait_for_a_busy_server(tmp_path: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> web.Response:
        return error(429, "slow down", **{"Retry-After": "600"})

    with in_thread(script) as server:
        folder(tmp_path, recipe(server.url, limits="max_concurrency: 2"))
        with started(tmp_path, "build", "recipe.yaml") as child:
            until(lambda: [status for _, status in attempts(tmp_path)] == ["failed"] * 2)
            child.send_signal(signal.SIGINT)
            ended(child, 130)
        assert sum(server.seen.values()) == 2  # nothing was sent after the server had said to hold still


def test_a_hangup_that_nohup_ignores_stops_nothing(tmp_path: Path) -> None:
    gate = threading.Event()
    with in_thread(held(gate)) as server:
        folder(tmp_path, recipe(server.url))
        ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
        with started(tmp_path, "build", "recipe.yaml", **ignoring) as child:
            until(lambda: server.seen)
            child.send_signal(signal.SIGHUP)
            time.sleep(0.1)
            gate.set()
            ended(child, 0)
        assert sum(server.seen.values()) == ASKED


def test_ctrl_c_in_a_terminal_reaches_us_and_not_the_local_model(tmp_path: Path) -> None:
    """A terminal sends it to the whole process group; the model must live to finish what it was asked."""
    folder(tmp_path, recipe("http://127.0.0.1:9/v1"))
    tiny_model(tmp_path / "model")
    local = "models.teacher={type: transformers, model: ./model, batch_size: 2}"
    command = ("build", "recipe.yaml", "--set", local, "--set", "stages.0.generate.max_tokens=200")
    with started(tmp_path, *command) as child:
        until(lambda: any(status == "read" for _, status in attempts(tmp_path)))
        os.killpg(child.pid, signal.SIGINT)
        ended(child, 130, within_s=60)
    assert {status for _, status in attempts(tmp_path)} == {"read"}
    assert len(attempts(tmp_path)) < 2 * ASKED
