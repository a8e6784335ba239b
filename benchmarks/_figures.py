"""What all benchmarks share: the command line, the figures as JSON lines, and children whose cost is measured."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

COMPARE = {"<=": float.__le__, ">=": float.__ge__, "==": float.__eq__}


class Figure(NamedTuple):
    """One number with what it should be: `target` is "<= 1.0"; `ok` is None where only the full run can judge."""

    name: str
    value: float | None
    target: str | None = None
    ok: bool | None = None


def judged(name: str, value: float, target: str, judge: bool = True) -> Figure:
    """A figure held against its target, unless the run is too small to `judge`."""
    sign, _, limit = target.partition(" ")
    return Figure(name, round(value, 4), target, COMPARE[sign](float(value), float(limit)) if judge else None)


def main(doc: str | None, measure: Callable[[argparse.Namespace], Iterator[Figure]], **small: tuple[int, int]) -> None:
    """Run a benchmark from the command line. `small`: option -> (value of a full run, value with --small)."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", action="store_true", help="one JSON line per figure")
    parser.add_argument("--small", action="store_true", help="ends in 45 s; figures that need the full run are null")
    for name, (full, little) in small.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {full}, with --small {little}")
    arguments = parser.parse_args()
    for name, (full, little) in small.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, little if arguments.small else full)
    wrong = False
    load = Figure(f"{Path(sys.argv[0]).stem}.load_average_before", round(os.getloadavg()[0], 1))
    with tempfile.TemporaryDirectory(prefix="factory-bench-") as folder:
        arguments.folder = Path(folder)
        for figure in chain([load], measure(arguments)):
            wrong = wrong or figure.ok is False
            print(json.dumps(figure._asdict()) if arguments.json else _line(figure), flush=True)
    sys.exit(1 if wrong else 0)


def _line(figure: Figure) -> str:
    verdict = {True: "ok", False: "MISSED", None: ""}[figure.ok]
    return f"{figure.name:<48} {figure.value!s:>12}  {figure.target or '':<12} {verdict}"


class Cost(NamedTuple):
    """What a child process used: CPU (user + system) and wall in seconds, peak memory in MB, how it ended."""

    cpu_s: float
    wall_s: float
    peak_mb: float
    exit_code: int
    started: float


def child(module: str, *arguments: object, cwd: Path | None = None, core: int | None = None, threads: int = 1) -> Cost:
    """Run `python -m module` to its end, start-up included; on one core if asked."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        running = subprocess.Popen([*pinned, *command], cwd=cwd, stdout=log, stderr=log, env=environment(threads))
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode != 0:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
    wall = time.monotonic() - started
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024, running.returncode, started)


def factory(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line, to its end."""
    command = [sys.executable, "-m", "factory", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment())


def environment(threads: int = 1) -> dict[str, str]:
    """Ours, with this copy of the code first."""
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


WORDS = ["colour", "weight", "origin", "purpose", "price", "history", "shape"]


def prompts(count: int) -> Iterator[str]:
    """Questions that no near-duplicate filter would join."""
    for i in range(count):
        yield f"Question {i}: what is the {WORDS[i % 7]} of {WORDS[i // 7 % 7]} number {i * 7919 % 100_003}, and why?"
