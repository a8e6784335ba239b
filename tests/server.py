"""A real HTTP server on loopback that answers like an OpenAI-compatible endpoint and counts what reached it.

It speaks Anthropic's messages too, at `/v1/messages`; `saying` is a socket that sends bytes as they are, HTTP or not.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from aiohttp import web

Script = Callable[[dict[str, Any], int], Awaitable[web.StreamResponse | dict[str, Any] | None]]
"""Given the body and how often it was seen before: a whole response, a JSON body, or None for the usual answer."""


class Server:
    """`seen` counts requests by the last user message; `bodies` and `headers` keep them as they came.

    `metrics` makes the page that vLLM has at `/metrics`; there is none without it.
    """

    def __init__(self, script: Script | None = None, delay_s: float = 0.0) -> None:
        self.script, self.delay_s = script, delay_s
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.metrics: Callable[[], str] | None = None

    async def tell_metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.metrics()) if self.metrics else web.Response(status=404)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        question = body["messages"][-1]["content"]
        before = self.seen[question]
        self.seen[question] += 1
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        scripted = await self.script(body, before) if self.script else None
        if isinstance(scripted, web.StreamResponse):
            return scripted
        usual = message if request.path.endswith("/messages") else chat
        return web.json_response(scripted if scripted is not None else usual(body))


def chat(body: dict[str, Any], texts: list[str] | None = None, finish: str = "stop") -> dict[str, Any]:
    """A chat completion: as many choices as asked, each text naming question, draw and seed."""
    question = body["messages"][-1]["content"]
    said = texts or [f"answer {i} to {question} (seed {body.get('seed')})" for i in range(body.get("n", 1))]
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        for i, text in enumerate(said)
    ]
    usage = {"prompt_tokens": 10, "completion_tokens": 5 * len(said)}
    return {"model": body["model"], "choices": choices, "usage": usage}


def message(
    body: dict[str, Any], *content: dict[str, Any], stop: str | None = "end_turn", **fields: Any
) -> dict[str, Any]:
    """A native message of Anthropic's API; without content blocks, a text that names the question."""
    question = body["messages"][-1]["content"]
    blocks = list(content) or [{"type": "text", "text": f"answer to {question}"}]
    usage = {"input_tokens": 7, "cache_creation_input_tokens": 1, "cache_read_input_tokens": 2, "output_tokens": 5}
    whole = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": blocks}
    return {**whole, "stop_reason": stop, "stop_sequence": None, "usage": usage, **fields}


def error(status: int, message: str, code: str = "", **headers: str) -> web.Response:
    body = json.dumps({"error": {"message": message, "code": code}})
    return web.Response(status=status, text=body, content_type="application/json", headers=headers)


def held(gate: threading.Event) -> Script:
    """Answers that wait until the gate is set: requests stay in flight for as long as a test wants."""

    async def script(body: dict[str, Any], before: int) -> None:
        while not gate.is_set():
            await asyncio.sleep(0.01)

    return script


@asynccontextmanager
async def serving(script: Script | None = None, delay_s: float = 0.0) -> AsyncIterator[Server]:
    """A server on a free port of 127.0.0.1; `server.url` is its base_url."""
    server = Server(script, delay_s)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    app.router.add_post("/v1/messages", server.answer)
    app.router.add_get("/metrics", server.tell_metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    server.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()


@contextmanager
def in_thread(script: Script | None = None, delay_s: float = 0.0) -> Iterator[Server]:
    """The same server on a thread of its own, for tests that run the command line and wait for it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    manager = serving(script, delay_s)
    server = asyncio.run_coroutine_threadsafe(manager.__aenter__(), loop).result(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(manager.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@asynccontextmanager
async def saying(*pieces: bytes, pause_s: float = 0.0, reset: bool = False) -> AsyncIterator[str]:
    """A socket on loopback that answers each request with these bytes and hangs up; yields its base_url."""

    tasks: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        with suppress(ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)
        if reset:
            writer.transport.abort()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
