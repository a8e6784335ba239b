"""The command line as a user types it: a folder with a small recipe and its prompts, and `python -m factory` in it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUESTIONS = [f"What is the colour of thing number {i}?" for i in range(24)]
ASKED = 18
"""Of the 24 questions, 6 are held out."""

STAGES = """\
  - generate: {model: teacher, n: 2, temperature: 0.7, max_tokens: 16}
  - filter: [finished, {words: {min: 3}}]
  - choose: {cap: 1}
"""
TRAINING = """\
  - train: {method: sft, student: base, args: {num_train_epochs: 1, per_device_train_batch_size: 8}}
  - evaluate: {students: [base, student], teacher: teacher, max_tokens: 8}
"""


def recipe(url: str, student: Path | None = None, stages: str = STAGES, limits: str = "max_attempts: 2") -> str:
    """A recipe called `tiny` over `prompts.jsonl`, with a teacher behind `url`."""
    base = f"  base: {{type: transformers, model: {student}}}\n" if student else ""
    return f"""\
name: tiny
seed: 3
models:
  teacher: {{type: openai, model: m, base_url: "{url}", limits: {{{limits}}}}}
{base}prompts:
  - {{path: prompts.jsonl, name: questions, held_out: 6}}
stages:
{stages}"""


def folder(path: Path, text: str) -> Path:
    """A working directory with `recipe.yaml` and the questions."""
    path.mkdir(exist_ok=True)
    rows = [json.dumps({"prompt": q, "reference": "blue"}) for q in QUESTIONS]
    (path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (path / "recipe.yaml").write_text(text)
    return path


def environment(**more: str) -> dict[str, str]:
    """Ours without keys, so that nothing of the machine it runs on decides a test."""
    plain = {name: value for name, value in os.environ.items() if not name.endswith("_KEY")}
    return {**plain, "PYTHONPATH": str(ROOT), **more}


def factory(where: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "factory", *arguments]
    return subprocess.run(
        command, cwd=where, capture_output=True, text=True, timeout=300, env=environment(**more), check=False
    )


def typed(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same inside this process, for what ends before anything is asked: it takes no second."""
    from factory.cli import main

    with chdir(where), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as errors:
        try:
            code = main(list(arguments))
        except SystemExit as e:  # argparse
            code = int(e.code or 0)
    return subprocess.CompletedProcess(["factory", *arguments], code, out.getvalue(), errors.getvalue())


def heeding_signals() -> None:
    """For a child: whoever starts the tests in the background, or by nohup, has these ignored."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def started(where: Path, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command while it runs, in a process group of its own; killed at the end if it still does."""
    command = [sys.executable, "-m", "factory", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    how: dict[str, Any] = {"preexec_fn": heeding_signals, **pipes, **options}
    with subprocess.Popen(command, cwd=where, text=True, env=environment(), process_group=0, **how) as child:
        try:
            yield child
        finally:
            child.kill()


def heard(child: subprocess.Popen[str], beginning: str, within_s: float = 120.0) -> str:
    """All that it says on stderr up to the line that begins so; it is killed where that line does not come."""
    assert child.stderr is not None
    said = ""
    patience = threading.Timer(within_s, child.kill)
    patience.start()
    try:
        for line in child.stderr:
            said += line
            if line.startswith(beginning):
                return said
    finally:
        patience.cancel()
    raise AssertionError(f"it never said {beginning!r}: {said}")


def until(true: Callable[[], Any], within_s: float = 60.0) -> None:
    """Wait for something to become true, looking as often as possible."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.0005)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(where: Path, run: str = "runs/tiny") -> dict[str, Any]:
    """`report.json`, whose sums must hold at every stage."""
    told: dict[str, Any] = json.loads((where / run / "report.json").read_text())
    for stage in told["funnel"]:
        assert stage["in"] == stage["kept"] + stage["dropped"] + stage["failed"], stage
        assert sum(stage["reasons"].values()) == stage["dropped"] + stage["failed"], stage
    return told


def attempts(where: Path, runs: str = "runs") -> list[tuple[list[str], str]]:
    """What the journal says was sent, in order: the answers' keys, and what became of it."""
    journal = where / runs / "journal.sqlite"
    if not journal.is_file():
        return []
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as db:
        if not db.execute("SELECT 1 FROM sqlite_schema WHERE name='attempt'").fetchone():
            return []
        rows = db.execute("SELECT keys, status FROM attempt ORDER BY id").fetchall()
    return [(keys.split(), status) for keys, status in rows]


def asked_in_vain(where: Path, runs: str = "runs") -> list[str]:
    """Keys that were asked again although their answer was stored: there must be none."""
    stored: set[str] = set()
    again: list[str] = []
    for keys, status in attempts(where, runs):
        again += [key for key in keys if key in stored]
        if status in ("stored", "read"):
            stored.update(keys)
    return again


def told(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It ended with this code and with an error for people, in these words; never with a traceback."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert any(line.startswith("factory") and ": " in line for line in lines), done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


def funnel(where: Path) -> dict[str, tuple[int, int, int, int]]:
    """What went into each stage, and how it ended."""
    report = json.loads((where / "runs/tiny/report.json").read_text())
    return {row["stage"]: (row["in"], row["kept"], row["dropped"], row["failed"]) for row in report["funnel"]}
