"""A real server on loopback with OpenAI's /files and /batches: it counts what is uploaded and submitted."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from tests.server import Server, chat

Row = dict[str, Any]
PAGE = 2
"""Batches in one page of a listing, whatever limit was asked for."""


def answered(line: Row, body: Row | None = None, status: int = 200) -> Row:
    """A line of an output file."""
    response = {"status_code": status, "request_id": "r", "body": body if body is not None else chat(line["body"])}
    return {"id": "x", "custom_id": line["custom_id"], "response": response, "error": None}


def unanswered(line: Row, code: str) -> Row:
    """A line of an error file."""
    error = {"code": code, "message": "This request could not be executed before the completion window expired."}
    return {"id": "x", "custom_id": line["custom_id"], "response": None, "error": error}


class BatchServer:
    """`outcome` makes a batch's last status, output lines and error lines from its input; it is done after `polls` looks.

    `stall` names a call ("upload", "submit", "content") that takes effect but is never answered; `refuse` one that
    is answered with that response; the first `down` looks are answered with 503; `cut` breaks results off half-way, `short` leaves half of their lines out. `direct` answers requests that come one by one.
    """

    def __init__(self) -> None:
        self.url = ""
        self.direct = Server()
        self.files: dict[str, bytes] = {}
        self.uploads: list[list[Row]] = []
        self.batches: list[Row] = []
        self.keys: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.polls = self.down = 0
        self.looks_at: list[float] = []
        self.outcome: Callable[[list[Row]], tuple[str, list[Row], list[Row]]] = everything
        self.stall = ""
        self.cut = False
        self.short = False
        self.stalled = threading.Event()
        self.refuse: dict[str, tuple[int, Row]] = {}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/files", self.upload), web.post("/v1/batches", self.submit), web.get("/v1/batches", self.list),
            web.get("/v1/batches/{id}", self.look), web.get("/v1/files/{id}/content", self.content),
            web.post("/v1/chat/completions", self.direct.answer),
        ]  # fmt: skip

    async def _called(self, name: str, request: web.Request) -> web.Response | None:
        self.calls[name] += 1
        self.keys.add(request.headers.get("Authorization") or request.headers.get("x-api-key", ""))
        busy = name == "look" and self.calls["look"] <= self.down
        if busy or name in self.refuse:
            status, body = (503, {"error": {"message": "busy"}}) if busy else self.refuse[name]
            elsewhere = {"Location": f"{self.url}/elsewhere"} if 300 <= status < 400 else None
            return web.json_response(body, status=status, headers=elsewhere)
        return None

    async def elsewhere(self, request: web.Request) -> web.Response:
        """Where redirects lead."""
        await self._called("elsewhere", request)
        return web.json_response({"id": "x"})

    async def _stall(self, name: str) -> None:
        if self.stall == name:
            self.stalled.set()
            await asyncio.sleep(60)

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        if refused := await self._called("upload", request):
            return refused
        assert form["purpose"] == "batch"
        with form["file"].file as file:  # type: ignore[union-attr]
            content = file.read()
        name = f"file-{len(self.files)}"
        self.files[name] = content
        self.uploads.append([json.loads(line) for line in content.splitlines()])
        await self._stall("upload")
        return web.json_response({"id": name, "object": "file", "bytes": len(content), "purpose": "batch"})

    async def submit(self, request: web.Request) -> web.Response:
        told = await request.json()
        if refused := await self._called("submit", request):
            return refused
        assert told["endpoint"] == "/v1/chat/completions"
        batch = {
            "id": f"batch_{len(self.batches)}", "object": "batch", "status": "validating", "metadata": told["metadata"],
            "input_file_id": told["input_file_id"], "endpoint": told["endpoint"], "created_at": 1, "looks": 0,
            "completion_window": told["completion_window"], "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }  # fmt: skip
        self.batches.append(batch)
        await self._stall("submit")
        return web.json_response(batch)

    async def list(self, request: web.Request) -> web.Response:
        if refused := await self._called("list", request):
            return refused
        newest = self.batches[::-1]
        after = request.query.get("after")
        start = 1 + [b["id"] for b in newest].index(after) if after else 0
        page = newest[start : start + PAGE]
        return web.json_response({"object": "list", "data": page, "has_more": start + PAGE < len(newest)})

    async def look(self, request: web.Request) -> web.Response:
        self.looks_at.append(time.monotonic())
        if refused := await self._called("look", request):
            return refused
        found = [b for b in self.batches if b["id"] == request.match_info["id"]]
        if not found:
            return web.json_response({"error": {"message": "No batch found"}}, status=404)
        (batch,) = found
        batch["looks"] += 1
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        counts = {"total": len(lines), "completed": min(batch["looks"], len(lines)), "failed": 0}
        if batch["looks"] <= self.polls:
            return web.json_response(batch | {"status": "in_progress", "request_counts": counts})
        status, output, errors = self.outcome(lines)
        counts |= {"completed": len(output), "failed": len(errors)}
        batch |= {"status": status, "request_counts": counts}
        for field, rows in (("output_file_id", output), ("error_file_id", errors)):
            batch.pop(field, None)
            if rows:
                batch[field] = f"{batch['id']}-{field}"
                self.files[batch[field]] = "\n".join(json.dumps(row) for row in rows).encode()  # no newline at its end
        if status == "failed":
            batch["errors"] = {"object": "list", "data": errors}
        return web.json_response(batch)

    async def content(self, request: web.Request) -> web.StreamResponse:
        if refused := await self._called("content", request):
            return refused
        await self._stall("content")
        if self.short:  # whole lines, and nothing says that there are more
            lines = self.files[request.match_info["id"]].splitlines(keepends=True)
            return web.Response(body=b"".join(lines[: len(lines) // 2]))
        if self.cut:  # the whole length is announced, half of it comes
            whole = self.files[request.match_info["id"]]
            response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
            await response.prepare(request)
            await response.write(whole[: len(whole) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(body=self.files[request.match_info["id"]])


def everything(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
    """All answered, in another order than asked."""
    return "completed", [answered(line) for line in reversed(lines)], []


class MessageBatchServer(BatchServer):
    """The same with Anthropic's /messages/batches: an upload is a submission, and a batch has no metadata.

    `outcome` makes a batch's result lines; `polls` counts looks at it as above, and `listings` listings of all.
    The first `late` listings do not show the newest batch yet.
    """

    listings, late = 10**6, 0

    def routes(self) -> list[web.RouteDef]:
        batches = "/v1/messages/batches"
        return [
            web.post(batches, self.submit), web.get(batches, self.list), web.get(batches + "/{id}", self.look),
            web.get(batches + "/{id}/results", self.content),
        ]  # fmt: skip

    async def _called(self, name: str, request: web.Request) -> web.Response | None:
        assert request.headers["anthropic-version"]
        return await super()._called(name, request)

    async def submit(self, request: web.Request) -> web.Response:
        assert "Content-Length" in request.headers
        lines = (await request.json())["requests"]
        if refused := await self._called("submit", request):
            return refused
        self.add(f"msgbatch_{len(self.batches)}", lines)
        self.uploads.append(lines)
        await self._stall("submit")
        return web.json_response(self._shown(self.batches[-1]))

    def add(self, name: str, lines: list[Row], age_s: float = 0.0) -> None:
        created = datetime.fromtimestamp(time.time() - age_s, UTC).isoformat().replace("+00:00", "Z")
        self.batches.append({"id": name, "created_at": created, "lines": lines, "looks": 0})

    def _shown(self, batch: Row) -> Row:
        ended = batch["looks"] > self.polls
        results = self.outcome(batch["lines"])[1] if ended else []
        kinds = Counter(row["result"]["type"] for row in results)
        counts = {kind: kinds[kind] for kind in ("succeeded", "errored", "canceled", "expired")}
        told = {"id": batch["id"], "type": "message_batch", "created_at": batch["created_at"]}
        status = {"processing_status": "ended" if ended else "in_progress"}
        return told | status | {"request_counts": counts | {"processing": 0 if ended else len(batch["lines"])}}

    async def list(self, request: web.Request) -> web.Response:
        if refused := await self._called("list", request):
            return refused
        if self.calls["list"] > self.listings:
            self.batches[0]["looks"] = self.polls + 1
        newest = self.batches[::-1][self.calls["list"] <= self.late :]
        after = request.query.get("after_id")
        start = 1 + [b["id"] for b in newest].index(after) if after else 0
        page = [self._shown(batch) for batch in newest[start : start + PAGE]]
        return web.json_response({"data": page, "has_more": start + PAGE < len(newest)})

    async def look(self, request: web.Request) -> web.Response:
        if refused := await self._called("look", request):
            return refused
        found = [b for b in self.batches if b["id"] == request.match_info["id"]]
        if not found:
            return web.json_response({"type": "error", "error": {"type": "not_found_error"}}, status=404)
        found[0]["looks"] += 1
        return web.json_response(self._shown(found[0]))

    async def content(self, request: web.Request) -> web.StreamResponse:
        if refused := await self._called("content", request):
            return refused
        await self._stall("content")
        (batch,) = (b for b in self.batches if b["id"] == request.match_info["id"])
        return web.Response(text="\n".join(json.dumps(row) for row in self.outcome(batch["lines"])[1]))


def message_result(line: Row, kind: str = "succeeded", **more: Any) -> Row:
    """A line of Anthropic's results; the message has the body of whatever teacher reads it."""
    message = {"message": chat(line["params"])} if kind == "succeeded" else {}
    return {"custom_id": line["custom_id"], "result": {"type": kind} | message | more}


@contextmanager
def batch_server(server: BatchServer | None = None) -> Iterator[Any]:
    """The server on a free port of 127.0.0.1, on a thread of its own; `server.url` is its base_url."""
    server = server or BatchServer()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    app = web.Application(client_max_size=2**28)
    app.add_routes(server.routes())
    app.router.add_route("*", "/v1/elsewhere", server.elsewhere)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    async def stop() -> None:
        await runner.cleanup()
        for task in (left := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    try:
        server.url = f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(start(), loop).result(10)}/v1"
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
