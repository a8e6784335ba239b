"""Checks by libraries that may hang or crash, in a child process, each under a time limit.

sympy can compute for ever, and a deep recursion takes its process along. Such a child is ended and another one started
for the next answer: the row is missing, not wrong. Memory is limited, too.
"""

import json
import os
import re
import select
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from typing import IO, Any

from factory.child import child_environment, die_with_parent
from factory.errors import RecipeError

LIMIT_S = 15.0
"""For one answer. math-verify's own limits (5 s for a parse, 5 s for a comparison) come first."""
START_S = 120.0
MEMORY = 4 << 30
"""Bytes of address space: most of it is libraries."""
PACKAGES = {"math": ("math_verify", "verify"), "reasoning_gym": ("reasoning_gym", "gym")}
"""What each job needs, and the extra that brings it."""


class Broken(Exception):
    """No answer came; the message is a verdict's reason."""


def lacking(job: str, by: str) -> None:
    """RecipeError where the library is not installed."""
    package, extra = PACKAGES[job]
    if find_spec(package) is None:
        raise RecipeError(f"{by} needs {package}: pip install 'distillation-factory[{extra}]'")


@lru_cache
def isolated(job: str) -> "Isolated":
    """The one child of this process for a job."""
    return Isolated(job)


class Isolated:
    """A child that answers one question after another."""

    def __init__(self, job: str, limit_s: float = LIMIT_S) -> None:
        self.job, self.limit_s = job, limit_s
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, **question: Any) -> dict[str, Any]:
        """What the job says; Broken where it takes too long or dies."""
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass  # the reading tells
        told = self._read(child, self.limit_s)
        if "error" in told:
            raise Broken(f"verifier_error:{told['error']}")
        return told

    def _start(self) -> subprocess.Popen[bytes]:
        lacking(self.job, self.job)
        child = subprocess.Popen(
            [sys.executable, "-m", "factory.filters.isolated", self.job], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=child_environment(), start_new_session=True,
        )  # fmt: skip
        self._child, self._end = child, weakref.finalize(self, _end, child)
        self._read(child, START_S)
        return child

    def _read(self, child: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any]:
        assert child.stdout is not None
        line, until = b"", time.monotonic() + limit_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, until - time.monotonic()))
            more = os.read(child.stdout.fileno(), 1 << 16) if ready else b""
            if not more:
                self._child = None
                self._end()
                raise Broken("verifier_crashed" if ready else f"verifier_timeout={limit_s:g}s")
            line += more
        told: dict[str, Any] = json.loads(line)
        return told


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        with suppress(OSError):  # what was not yet written is of no use
            pipe.close()
    child.wait()


# -- in the child ------------------------------------------------------------------------------------------------------


def same_math(answer: str, reference: str) -> dict[str, Any]:
    """Whether two texts hold the same expression; `read` is what of the answer was compared, None where nothing
    was; `known` is whether the reference could be read."""
    from math_verify import verify

    known, got = _expressions(reference, short=True), _expressions(answer, short=len(answer) <= 100)
    if not known:
        return {"known": False}
    read = next((one for one in reversed(got) if isinstance(one, str)), None)
    return {"known": True, "read": read, "same": bool(got) and bool(verify(known, got, raise_on_error=True))}


_WORDS = re.compile(r"(?<![\\a-zA-Z])(?!(?:sqrt|sin|cos|tan|log|exp)\b)[a-zA-Z]{2,}")


def _expressions(text: str, short: bool) -> list[Any]:
    """A bare formula without a mark of LaTeX around it is read as one, where the whole text may be one."""
    from math_verify import parse

    marked = "\n" in text or any(mark in text for mark in ("$", "\\(", "\\[", "boxed"))
    formula = short and not marked and not _WORDS.search(text) and any(c.isdigit() or c in "=+^*/\\" for c in text)
    return (parse(f"${text}$", raise_on_error=True) if formula else []) or list(parse(text, raise_on_error=True))


def score_reasoning(answer: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The score, 0 to 1, that the data set of an entry gives to an answer."""
    from reasoning_gym import get_score_answer_fn

    return {"score": float(get_score_answer_fn(entry["metadata"]["source_dataset"])(answer, entry))}


def main() -> None:
    import resource

    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    questions = os.fdopen(os.dup(0), "rb")
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not stand between our lines
    job = {"math": same_math, "reasoning_gym": score_reasoning}[sys.argv[1]]
    __import__(PACKAGES[sys.argv[1]][0])
    out.write('{"ready": true}\n')
    _serve(job, questions, out)


def _serve(job: Any, questions: IO[bytes], out: IO[str]) -> None:
    for line in questions:
        try:
            told = job(**json.loads(line))
        except BaseException as e:  # the libraries' own time limits are no Exception
            told = {"error": type(e).__name__}
        out.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
