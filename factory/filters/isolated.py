"""Checks by libraries that may hang or crash, in child processes, one for each core, each check under a time limit.

sympy can compute for ever, and a deep recursion takes its process along. Such a child is ended and another one started
for the next answer: the row is missing, not wrong. Memory is limited, too.
"""

import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import IO, Any, TypeVar

from factory.child import Child, ChildEnded, die_with_parent, own_output
from factory.errors import EngineError, RecipeError

LIMIT_S = 15.0
"""For one answer. math-verify's own limits (5 s for a parse, 5 s for a comparison) come first."""
START_S = 120.0
MEMORY = 4 << 30
"""Bytes of address space: most of it is libraries."""
PACKAGES = {"math": ("math_verify", "verify"), "reasoning_gym": ("reasoning_gym", "gym")}
"""What each job needs, and the extra that brings it."""


Item = TypeVar("Item")
Done = TypeVar("Done")


class Broken(Exception):
    """No answer came; the message is a verdict's reason."""


def lacking(job: str, by: str) -> None:
    """RecipeError where the library is not installed."""
    package, extra = PACKAGES[job]
    if find_spec(package) is None:
        raise RecipeError(f"{by} needs {package}: pip install 'distillation-factory[{extra}]'")


@cache
def isolated(job: str) -> "Isolated":
    """The children of this process for a job."""
    return Isolated(job)


class Isolated:
    """Children that answer one question after another; each thread that asks has one to itself."""

    def __init__(self, job: str, limit_s: float = LIMIT_S) -> None:
        self.job, self.limit_s = job, limit_s
        self.idle: list[Child] = []
        self._useless: EngineError | None = None

    def ask(self, **question: Any) -> dict[str, Any]:
        """What the job says; Broken where it takes too long or its child dies, which costs this question alone."""
        try:
            child = self.idle.pop()  # one step, whichever threads ask
        except IndexError:
            child = self._started()
        try:
            told: dict[str, Any] = child.ask(question, self.limit_s)
        except BaseException as e:
            child.close()
            if not isinstance(e, TimeoutError | ChildEnded):
                raise
            late = isinstance(e, TimeoutError)
            raise Broken(f"verifier_timeout={self.limit_s:g}s" if late else f"verifier_crashed:{e}"[:200]) from None
        self.idle.append(child)
        if "error" in told:
            raise Broken(f"verifier_error:{told['error']}")
        return told

    def _started(self) -> Child:
        if self._useless is not None:
            raise self._useless
        lacking(self.job, self.job)
        child = Child("factory.filters.isolated", self.job)
        try:
            child.hear(START_S)
        except (TimeoutError, ChildEnded) as e:
            child.close()
            self._useless = EngineError(f"{self.job}: the verifier does not start: {e}")
            raise self._useless from None
        return child


CORES = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
AHEAD = 4
"""Items for each core that are read before the first of them is done."""


@cache
def _crew() -> ThreadPoolExecutor:
    """Threads that wait for children. They stay: Linux ends a child with the thread that started it."""
    return ThreadPoolExecutor(CORES, thread_name_prefix="verifier")


def together(do: Callable[[Item], Done], items: Iterable[Item]) -> Iterator[Done]:
    """`do` of each item, in their order; as many at once as there are cores."""
    waiting: deque[Future[Done]] = deque()
    try:
        for item in items:
            waiting.append(_crew().submit(do, item))
            if len(waiting) >= AHEAD * CORES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:
            one.cancel()


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
    out = own_output()
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
