"""Progress: a bar on a terminal, plain lines elsewhere, and never a byte of it on stdout."""

import asyncio
import os
import pty
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

import pytest

from factory import progress
from tests.command import ASKED, factory, folder, recipe, started
from tests.server import in_thread

RESULTS = "data    runs/tiny/dataset\nreport  runs/tiny/report.html\n"


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal of 100 columns: the end that we read, the end that a program writes to."""
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def shown(ours: int) -> str:
    """All that is written to a terminal until every writer has closed it."""
    whole = b""
    try:
        while piece := os.read(ours, 4096):
            whole += piece
    except OSError:  # Linux: the other end is closed
        pass
    return whole.decode()


async def slow_first(body: dict[str, Any], before: int) -> None:
    """One request takes long enough for progress to be worth a line."""
    await asyncio.sleep(1.5 if "number 2?" in body["messages"][-1]["content"] else 0)


def test_a_terminal_gets_a_bar_and_stdout_gets_the_results_alone(tmp_path: Path) -> None:
    with in_thread(slow_first) as server, terminal() as (ours, theirs):
        folder(tmp_path, recipe(server.url))
        with started(tmp_path, "build", "recipe.yaml", stderr=theirs) as child:
            os.close(theirs)
            screen = shown(ours)
            assert child.stdout is not None
            results = child.stdout.read()
            assert child.wait(60) == 0, screen
    assert results == RESULTS
    assert "\x1b[" in screen
    bars = re.findall(r"generate teacher [╸━╺]+ (\d+)/36 0:00:0", re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", screen))
    assert bars[-1] == "36", screen
    assert "34" in bars, screen  # it moved meanwhile


def test_what_is_not_a_terminal_gets_plain_lines(tmp_path: Path) -> None:
    with in_thread(slow_first) as server:
        done = factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml")
    assert done.returncode == 0
    assert done.stdout == RESULTS
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("prompts:")]
    assert lines[0] == "01-generate"
    assert re.fullmatch(rf"  generate teacher: {2 * ASKED}/{2 * ASKED} in \d+ s", lines[1])
    assert lines[2] == f"  {2 * ASKED} draws: {2 * ASKED} kept, 0 dropped, 0 failed"


def test_a_long_wait_is_told_in_between_and_the_last_count_is_the_right_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    with progress.bar("filter", 250) as advance:
        for steps in (100, 100, 50):
            advance(steps)
    with progress.growing("train") as reached:
        reached(3, 8)
    with progress.bar("rows", None) as advance:
        advance(7)
    told = [re.sub(r", \d+ s", "", line) for line in capsys.readouterr().err.splitlines()]
    assert told == [
        "  filter: 0/250", "  filter: 100/250", "  filter: 200/250", "  filter: 250/250", "  train: 3/8", "  rows: 0", "  rows: 7",
    ]  # fmt: skip
