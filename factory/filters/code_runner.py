"""Runs one program and its tests: `python -I code_runner.py`, a job as one line of JSON on stdin, the verdict in `result`.

Loads nothing of ours: what runs here is not to be trusted. The walls are a net for programs that go wrong, not against
ones that mean harm: see the docs of the filter.
"""

import json
import os
import resource
import sys
import threading
import types
from pathlib import Path
from typing import Any

PROCESSES = 64
OPEN_FILES = 64
FILE_BYTES = 16 << 20

REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.kill", "pty.")
CHANGES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "shutil.",
)  # fmt: skip
"""Audit events (PEP 578) that are refused: anywhere, and on files outside of the working folder."""


class Refused(PermissionError):
    """The sandbox does not allow it."""


def guard(inside: str, refused: list[str]) -> None:
    """From now on, refuse network, other processes, and changes of files outside of `inside`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED) or (_changes(event, arguments) and not _within(inside, arguments)):
            refused.append(event)
            raise Refused(event)

    sys.addaudithook(hook)


def _changes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    return event.startswith(CHANGES)


def _within(inside: str, arguments: tuple[Any, ...]) -> bool:
    """A mode such as `w` is taken for a path, too: inside."""
    paths = [os.path.realpath(os.fsdecode(one)) + os.sep for one in arguments if isinstance(one, str | bytes)]
    return all(path.startswith((inside + os.sep, "/dev/null")) for path in paths)


def limit(cpu_s: int, memory: int) -> None:
    """Soft and hard, so that nothing can raise them, and the end of the processor time cannot be caught."""
    for what, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def end_with(stdin: int) -> None:
    """End when the factory has ended: it holds our input open."""

    def listen() -> None:
        while os.read(stdin, 1024):
            pass
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()


def judged(answer: str, tests: str, refused: list[str]) -> list[str]:
    """`passed`, `failed` or `cannot_tell`, and why."""
    try:
        checks = compile(tests, "<tests>", "exec")
    except (SyntaxError, ValueError) as e:
        return ["cannot_tell", "tests_unread", str(e)]
    module = types.ModuleType("answer")  # not __main__: what stands under that is no part of the answer
    sys.modules["answer"] = module
    step = "code_error"
    try:
        exec(compile(answer, "<answer>", "exec"), module.__dict__)
        step = "tests_failed"
        exec(checks, module.__dict__)
    except BaseException as e:
        if refused:
            return ["cannot_tell", f"sandbox_refused:{refused[0]}", ""]
        return ["failed", f"{step}:{type(e).__name__}", str(e)[:200]]
    return ["passed", "", ""]


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    out, lifeline, nowhere = os.open("result", os.O_WRONLY | os.O_CREAT), os.dup(0), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    sys.stdin = os.fdopen(0)
    end_with(lifeline)
    limit(job["cpu_s"], job["memory"])
    token = job.pop("token")
    refused: list[str] = []
    guard(os.path.realpath(Path.cwd()), refused)
    told = judged(job["answer"], job["tests"], refused)
    os.write(out, json.dumps([token, *told]).encode())
    os._exit(0)  # nothing that the answer has left behind runs


if __name__ == "__main__":
    main()
