"""A real HTTP server on loopback that answers like an OpenAI-compatible endpoint and counts what reached it."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web

Script = Callable[[dict[str, Any], int], Awaitable[web.StreamResponse | dict[str, Any] | None]]
"""Given the body and how often it was seen before: a whole response, a JSON body, or None for the usual answer."""


class Server:
    """`seen` counts requests by the last user message; `bodies` and `headers` keep them as they came."""

    def __init__(self, script: Script | None = None, delay_s: float = 0.0) -> None:
        self.script, self.delay_s = script, delay_s
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

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
        return web.json_response(scripted if scripted is not None else chat(body))


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
