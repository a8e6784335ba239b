"""Checks by libraries that may hang or crash, in a child process, each under a time limit.

sympy can compute for ever, and a deep recursion takes its process along. Such a child is ended and another one started
for the next answer: the row is missing, not wrong. Memory is limited, too.
"""

import json
import os
import re
import sys
from functools import lru_cache
from importlib.util import find_spec
from typing import IO, Any

from factory.child import Child, ChildEnded, die_with_parent
from factory.errors import EngineError, RecipeError

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
        self.child: Child | None = None
        self._useless: EngineError | None = None

    def ask(self, **question: Any) -> dict[str, Any]:
        """What the job says; Broken where it takes too long or dies."""
        child = self.child = self.child or self._started()
        try:
            told: dict[str, Any] = child.ask(question, self.limit_s)
        except (TimeoutError, ChildEnded) as e:
            self.child = None
            child.close()
            late = isinstance(e, TimeoutError)
            raise Broken(f"verifier_timeout={self.limit_s:g}s" if late else f"verifier_crashed:{e}"[:200]) from None
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
