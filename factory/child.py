"""Child processes that load torch: what they may know of our environment, and that they end when we do."""

import ctypes
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from factory.errors import FactoryError

PASSED_ON = {
    "PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
}  # fmt: skip
PASSED_ON_PREFIXES = ("HF_", "CUDA_", "OMP_", "MKL_", "TORCH", "PYTORCH_", "NCCL_", "TRANSFORMERS_", "LC_")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")

PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """What a child may know of our environment: where things are and how to compute, never a key."""
    return {
        name: value
        for name, value in os.environ.items()
        if (name.upper() in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)) and not name.endswith(SECRET)
    }


def die_with_parent() -> None:
    """For the child: Linux ends it as soon as its parent has ended, whatever is being computed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_input() -> None:
    """For the child, on any system: end when our input is closed. Our parent holds it open as long as it lives."""

    def listen() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would still be held when Python ends
            pass
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()


def peak_memory() -> int:
    """The most bytes that this process has held in memory so far, and the device's beside them: what a machine must have."""
    try:
        # of our own image: getrusage still knows what our parent held when it made us
        lines = Path("/proc/self/status").read_text().splitlines()
        resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")
    return resident + (torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0)


def own_output() -> IO[str]:
    """Where this process writes its lines; whatever libraries print goes among the errors, and does not stand between them."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def answer_lines(opened: Callable[[Any], Callable[[Any], Any]]) -> None:
    """The life of a child that answers: what its argument asks for is opened, a first line says so, and then each line gets
    one. What a user can mend ends it with those words."""
    die_with_parent()
    lines, out = os.fdopen(os.dup(0), "rb"), own_output()
    try:
        answer = opened(json.loads(sys.argv[1]))
        out.write('{"ready": true}\n')
        for line in lines:
            out.write(json.dumps(answer(json.loads(line)), allow_nan=False) + "\n")
    except FactoryError as e:
        sys.exit(str(e))


@contextmanager
def loading() -> Iterator[None]:
    """For what a child imports: the garbage collector would go through all of it again and again, a sixth of the start-up."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class ChildEnded(Exception):
    """A child ended instead of answering; the message is the last that it said."""


class Child:
    """`python -m MODULE ...`, which answers a line of JSON with a line of JSON, one at a time, until `close()`."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, env=child_environment(), start_new_session=True,
        )  # fmt: skip
        self.close = weakref.finalize(self, _end, self.process, self._errors)

    def ask(self, question: Any, limit_s: float | None = None) -> Any:
        """The answer; ChildEnded where none comes, TimeoutError where it takes too long."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the reading tells
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        return self.hear(limit_s)

    def hear(self, limit_s: float | None = None) -> Any:
        """The next line."""
        assert self.process.stdout is not None
        line, until = b"", None if limit_s is None else time.monotonic() + limit_s
        while not line.endswith(b"\n"):
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise ChildEnded(self._last_words())
            line += more
        return json.loads(line)

    def _last_words(self) -> str:
        code = self.process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return " | ".join(lines[-2:]) or f"its process ended with {code}"


def _end(process: "subprocess.Popen[bytes]", errors: IO[bytes]) -> None:
    process.kill()
    for file in (process.stdin, process.stdout, errors):
        assert file is not None
        with suppress(BrokenPipeError):  # what was not yet written is of no use
            file.close()
    process.wait()
