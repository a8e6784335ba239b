"""Does the program in an answer pass its tests? It runs, so this is off until `--allow-code` is said.

The prompt's reference is the tests: Python that raises where the answer is wrong (`assert add(1, 2) == 3`), run in the
answer's own module. Each answer gets a process of its own in an empty folder, without network, under limits.
"""

import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from factory.errors import RecipeError
from factory.filters.shapes import Kit
from factory.filters.verifier import Verifier
from factory.progress import say
from factory.rows import Sample, Verdict

RUNNER = Path(__file__).with_name("code_runner.py")
WALL = (4, 4)
"""Seconds by the clock for each of processor time, and beyond: a busy machine must not make an answer wrong."""
KILLED = (-signal.SIGKILL, 1)
"""How a killed program ends: by itself, and under unshare."""
MAX_RESULT = 10_000

_BLOCK = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)


class Code(Verifier):
    """Drops answers whose program fails its tests; a prompt without a reference passes.

    `cpu_s` is processor time for program and tests together, `memory_mb` address space.
    """

    kind: Literal["code"] = "code"
    cpu_s: int = Field(10, gt=0, le=600)
    memory_mb: int = Field(1024, ge=64)

    def open(self, kit: Kit) -> Self:
        if not kit.allow_code:
            raise RecipeError("the filter code runs programs that models wrote; say --allow-code if that is meant")
        if sys.platform != "linux":
            raise RecipeError("the filter code needs Linux for its limits")
        return self

    def check(self, sample: Sample) -> Verdict:
        tests = sample.prompt.reference
        if tests is None:
            return self.unknown()
        answer = program(sample.response)
        ending, reason, detail = self._run(answer, tests)
        evidence = f"{detail} | {tests}"[:300] if detail else tests[:300]
        if ending == "passed":
            return self.keep()
        return self.drop(reason, evidence=evidence) if ending == "failed" else self.cannot_tell(reason, evidence)

    def _run(self, answer: str, tests: str) -> tuple[str, str, str]:
        token = secrets.token_hex()
        wall_s = WALL[0] * self.cpu_s + WALL[1]
        job = {"answer": answer, "tests": tests, "token": token, "cpu_s": self.cpu_s, "memory": self.memory_mb << 20}
        with tempfile.TemporaryDirectory(prefix="factory-code-", ignore_cleanup_errors=True) as folder:
            before = _processor_s()
            code = _ran(json.dumps(job).encode() + b"\n", Path(folder), wall_s)
            used = _processor_s() - before
            told = _result(Path(folder) / "result", token)
        if told is not None:
            return told
        if code in KILLED and used > self.cpu_s / 2:  # by the kernel, whose count runs up to a fifth ahead of this one
            return "failed", f"too_slow={self.cpu_s}s", ""
        if code is None:
            return "cannot_tell", f"code_timeout={wall_s}s", ""
        return "cannot_tell", f"code_crashed:{code}", ""


def _processor_s() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def program(text: str) -> str:
    """The Python in an answer: all blocks marked as such, else the unmarked ones that compile, else the whole text."""
    blocks = [(language.lower(), body) for _, language, body in _BLOCK.findall(text)]
    python = [body for language, body in blocks if language in ("python", "py", "python3")]
    plain = [body for language, body in blocks if not language and _compiles(body)]
    return "\n".join(python or plain) or text


def _compiles(text: str) -> bool:
    try:
        compile(text, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


@lru_cache
def walls() -> tuple[str, ...]:
    """The command that takes the network away and ends all that a program leaves behind; empty where it is not allowed."""
    command = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    with suppress(OSError):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    say("filter code: no namespaces here (unshare); sockets are refused in Python only")
    return ()


def _ran(job: bytes, folder: Path, wall_s: float) -> int | None:
    """The exit code of the runner; None where it was ended for taking too long."""
    child = subprocess.Popen(
        [*walls(), sys.executable, "-I", str(RUNNER)], cwd=folder, env=_environment(folder), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdin is not None
    try:
        with suppress(BrokenPipeError):
            child.stdin.write(job)
            child.stdin.flush()
        return child.wait(wall_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        with suppress(BrokenPipeError):
            child.stdin.close()


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of ours but the way to programs: no key, no home."""
    return {
        "PATH": os.defpath,
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def _result(file: Path, token: str) -> tuple[str, str, str] | None:
    """What the runner wrote; None where it did not come to it, or where another wrote in its name."""
    try:
        with file.open("rb") as written:
            told: Any = json.loads(written.read(MAX_RESULT))
        sign, ending, reason, detail = told
    except (OSError, ValueError, TypeError):
        return None
    return (ending, reason, detail) if sign == token else None
