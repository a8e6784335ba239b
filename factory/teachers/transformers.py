"""A local model as a teacher, in a child process: no server, no key; on a CPU or a GPU.

The parent stays free of torch. The child starts at the first request without a stored answer, dies with its parent, and
its end gives all of its memory back.
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
from pydantic import Field

from factory.child import child_environment
from factory.errors import EngineError
from factory.rows import Failure, Message, Outcome, Request
from factory.teachers.capabilities import LOCAL, Capabilities
from factory.teachers.entry import Entry, Limits
from factory.teachers.openai import read_chat
from factory.weights import Weights, fingerprint, is_path, located

MAX_DEATHS = 3
MAX_LINE = 1 << 28


class Forced(msgspec.Struct, frozen=True):
    """A model that is led along an answer: its summed loss (nats), tokens, and how many of them it would have chosen."""

    loss: float
    tokens: int
    agreed: int


class Transformers(Weights, Entry):
    """`{type: transformers, model}`; `batch_size` rows are decoded together, `device` is chosen by itself."""

    type: Literal["transformers"] = "transformers"
    batch_size: int = Field(128, gt=0)
    device: str | None = None
    limits: Limits = Limits(max_concurrency=1 << 16)  # nobody else asks our child: the batch is the limit

    def identity(self, runs: Path) -> str:
        return f"weights:{fingerprint(self, runs / 'weights')}"

    def abilities(self, runs: Path) -> Capabilities:
        return LOCAL

    def open(self, runs: Path) -> "TransformersTeacher":
        if is_path(self.model):
            located(self)
        return TransformersTeacher(self, runs / "weights")


class TransformersTeacher:
    """Sends lines to the child and matches its answers by number."""

    def __init__(self, entry: Transformers, cache: Path) -> None:
        self.entry, self.cache = entry, cache
        # twice the batch, so that rows which end find others waiting
        self.concurrency = 2 * entry.batch_size
        self._child: asyncio.subprocess.Process | None = None
        self._errors: IO[bytes] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[bytes | Failure]] = {}
        self._number = 0
        self._deaths = 0
        self._broken: EngineError | None = None
        self._starting: asyncio.Lock | None = None

    async def send(self, request: Request) -> bytes | Failure:
        return await self._ask({"op": "generate", "request": msgspec.to_builtins(request)})

    def read(self, request: Request, body: bytes) -> Outcome:
        return read_chat(body, request.n)

    async def forced(self, messages: list[Message], completion: str) -> Forced:
        """Led along an answer and its end token after a prompt."""
        body = await self._ask({"op": "force", "messages": messages, "completion": completion})
        if isinstance(body, Failure):
            raise EngineError(f"{self.entry.model}: {body.detail}")
        return msgspec.json.decode(body, type=Forced)

    async def memory(self) -> int | None:
        """The most bytes that the child has taken; None where nothing was asked of it."""
        if self._child is None:
            return None
        body = await self._ask({"op": "memory"})
        return None if isinstance(body, Failure) else int(msgspec.json.decode(body)["bytes"])

    async def close(self) -> None:
        child, self._child = self._child, None
        if child is not None and child.stdin is not None:
            child.stdin.close()
            await child.wait()
        if self._reader is not None:
            await self._reader
            self._reader = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    async def _ask(self, message: dict[str, Any]) -> bytes | Failure:
        self._starting = self._starting or asyncio.Lock()
        async with self._starting:
            if self._child is None:
                await self._start()
        child = self._child
        if child is None or child.stdin is None:
            return Failure(reason="engine_died", detail="the local model's process has ended")
        self._number += 1
        future: asyncio.Future[bytes | Failure] = asyncio.get_running_loop().create_future()
        self._waiting[self._number] = future
        try:
            child.stdin.write(json.dumps({"number": self._number, **message}).encode() + b"\n")
            await child.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died: the reader answers all who wait, this request among them
        return await future

    async def _start(self) -> None:
        if self._broken is not None:
            raise self._broken  # whoever waited for the same start need not try again
        if self._deaths == MAX_DEATHS:
            raise EngineError(f"the local model {self.entry.model} died {MAX_DEATHS} times: {self._last_words()}")
        weights = self.entry.alone()
        settings = {
            "weights": weights, "cache": str(self.cache), "name": self.entry.model, "batch_size": self.entry.batch_size,
            "device": self.entry.device,
        }  # fmt: skip
        if self._errors is not None:
            self._errors.close()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "factory.teachers.transformers_worker", json.dumps(settings),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=self._errors, limit=MAX_LINE,
            env=child_environment(), start_new_session=True,  # a Ctrl-C is ours to handle, not the child's
        )  # fmt: skip
        ready: asyncio.Future[bytes | Failure] = asyncio.get_running_loop().create_future()
        self._waiting[0] = ready
        self._reader = asyncio.create_task(self._read_lines(self._child))
        told = await ready
        if isinstance(told, Failure):
            self._broken = EngineError(f"cannot load the model {self.entry.model}: {told.detail}")
            raise self._broken

    async def _read_lines(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        async for line in child.stdout:
            if not line.endswith(b"\n"):
                break  # it died in the middle of a line
            told = msgspec.json.decode(line, type=_Line)
            future = self._waiting.pop(told.number, None)
            if future is not None and not future.done():  # who waited may have been cancelled
                future.set_result(bytes(told.body))
        await child.wait()
        failure = Failure(reason="engine_died", detail=self._last_words())
        waiting, self._waiting = self._waiting, {}
        if self._child is child:  # not closed by us
            self._child = None
            self._deaths += 1
        for future in waiting.values():
            if not future.done():
                future.set_result(failure)

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return " | ".join(lines[-2:]) or "it printed nothing"


class _Line(msgspec.Struct):
    number: int
    body: msgspec.Raw
