"""A vLLM server that the factory starts, waits for, speaks to like any API, and stops; or one that runs already.

vLLM lives in an environment of its own (its pins fight TRL's): `python:` names that environment's interpreter. The server
starts at the first request that has no stored answer and is stopped after the stage, so its memory is surely free again.
"""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import httpx
from pydantic import Field

from factory.errors import EngineError
from factory.rows import Failure, Outcome, Request
from factory.teachers.capabilities import VLLM, Capabilities
from factory.teachers.entry import Entry
from factory.teachers.openai import OpenAITeacher, read_chat
from factory.weights import Weights, fingerprint

START_LIMIT_S = 900.0
SERVED_NAME = "teacher"

# `vllm serve` in a child that the kernel ends with its parent, however that ends (Linux); the new session lets us
# stop the server with all its engine processes at once.
LAUNCHER = """
import ctypes, os, runpy, signal, sys
os.setsid()
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
sys.argv = ["vllm", *sys.argv[1:]]
runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__")
"""


class Vllm(Weights, Entry):
    """`{type: vllm, model}`; with `base_url` it speaks to a running server, else it starts one with `args` as flags."""

    type: Literal["vllm"] = "vllm"
    python: str | None = None
    base_url: str | None = None
    args: dict[str, str | int | float | bool] = Field(default_factory=dict)

    def identity(self, runs: Path) -> str:
        return f"weights:{fingerprint(self, runs / 'weights')}"

    def abilities(self, runs: Path) -> Capabilities:
        return VLLM

    def urls(self) -> list[str]:
        return [self.base_url] if self.base_url else []

    def open(self, runs: Path) -> "VllmTeacher":
        return VllmTeacher(self)


class VllmTeacher:
    """A launcher around `OpenAITeacher`: the same wire, with every sampling field pinned and seeds honoured."""

    def __init__(self, entry: Vllm) -> None:
        self.entry = entry
        self.concurrency = entry.limits.max_concurrency
        self._client: OpenAITeacher | None = None
        self._server: asyncio.subprocess.Process | None = None
        self._log: IO[bytes] | None = None
        self._starting = asyncio.Lock()

    async def send(self, request: Request) -> bytes | Failure:
        async with self._starting:
            if self._client is None:
                self._client = await self._connect()
        return await self._client.send(request)

    def read(self, request: Request, body: bytes) -> Outcome:
        return read_chat(body, request.n)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None
        if self._server is not None and self._server.returncode is None:
            _signal_group(self._server.pid, signal.SIGTERM)
            try:
                await asyncio.wait_for(self._server.wait(), 30)
            except TimeoutError:
                _signal_group(self._server.pid, signal.SIGKILL)
                await self._server.wait()
        self._server = None
        if self._log is not None:
            self._log.close()
            self._log = None

    async def _connect(self) -> OpenAITeacher:
        limits = self.entry.limits
        if self.entry.base_url is not None:
            return OpenAITeacher(
                self.entry.model, self.entry.base_url, None, limits.timeout_s, self.concurrency, vllm=True
            )
        port = _free_port()
        await self._start(port)
        url = f"http://127.0.0.1:{port}"
        await self._until_healthy(url)
        return OpenAITeacher(SERVED_NAME, f"{url}/v1", None, limits.timeout_s, self.concurrency, vllm=True)

    async def _start(self, port: int) -> None:
        python = self.entry.python or sys.executable
        flags: list[str] = []
        for name, value in self.entry.args.items():
            flag = "--" + name.replace("_", "-")
            flags += [flag] if value is True else [] if value is False else [flag, str(value)]
        if self.entry.dtype != "auto":
            flags += ["--dtype", self.entry.dtype]
        if self.entry.revision:
            flags += ["--revision", self.entry.revision]
        command = [
            python, "-c", LAUNCHER, "serve", self.entry.model, "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", SERVED_NAME, *flags,
        ]  # fmt: skip
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        environment = {k: v for k, v in os.environ.items() if not k.upper().endswith(("_API_KEY", "_TOKEN", "_SECRET"))}
        try:
            self._server = await asyncio.create_subprocess_exec(
                *command, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=self._log, stderr=self._log
            )
        except OSError as e:
            raise EngineError(
                f"cannot start vLLM with {python}: {e.strerror}; set `python:` to the interpreter of its environment"
            ) from None

    async def _until_healthy(self, url: str) -> None:
        server = self._server
        assert server is not None
        async with httpx.AsyncClient(timeout=5) as client:
            for _ in range(int(START_LIMIT_S * 2)):
                if server.returncode is not None:
                    raise EngineError(f"vLLM ended while starting (exit {server.returncode}): {self._log_tail()}")
                try:
                    if (await client.get(f"{url}/health")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # not listening yet
                await asyncio.sleep(0.5)
        raise EngineError(f"vLLM did not become healthy in {START_LIMIT_S:.0f} s: {self._log_tail()}")

    def _log_tail(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = [line for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return " | ".join((errors or lines)[-3:]) or "it printed nothing"


def _signal_group(pid: int, which: int) -> None:
    with suppress(ProcessLookupError):  # it may have ended by itself meanwhile
        os.killpg(pid, which)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: Any = probe.getsockname()[1]
    return int(port)
