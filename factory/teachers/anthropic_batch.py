"""Anthropic's message batches: one call takes all requests, one file brings the results.

A batch here carries no metadata, so one that was submitted just before a crash is known by the custom_ids in its results;
until it has ended, nobody can tell whose it is.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec

from factory.errors import FactoryError, IdentityError, OutageError, RecipeError, Waiting
from factory.rows import Failure, Look, Request
from factory.teachers.failures import classify
from factory.teachers.openai_batch import NO_BATCHES, TIMEOUT_S, told, unreachable, write_lines

VERSION = "2023-06-01"
CLOCKS_S = 600.0
"""How far our clock and the provider's may differ."""
STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""The HTTP status that stands for an error inside a batch, as documented; 500 for all others."""


class AnthropicBatch:
    """Speaks /messages/batches. `body` makes the JSON of a request. Limits of a batch are Anthropic's."""

    max_lines = 100_000
    max_bytes = 250 * 1000**2

    def __init__(self, base_url: str, key: str | None, body: Callable[[Request], dict[str, Any]]) -> None:
        self.base_url, self._key, self._body = base_url, key, body
        headers = {"anthropic-version": VERSION} | ({"x-api-key": key} if key else {})
        self._client = httpx.AsyncClient(headers=headers, timeout=TIMEOUT_S, follow_redirects=False)

    def line(self, custom_id: str, request: Request) -> bytes:
        return msgspec.json.encode({"custom_id": custom_id, "params": self._body(request)}) + b"\n"

    async def submit(self, lines: Path, tag: str) -> str:
        async def content() -> AsyncIterator[bytes]:
            for piece in _envelope(lines):
                yield piece

        headers = {"Content-Type": "application/json", "Content-Length": str(sum(map(len, _envelope(lines))))}
        async with self._call("POST", "", RecipeError, NO_BATCHES, content=content(), headers=headers) as response:
            return str(_decoded(await response.aread(), _Batch).id)

    async def find(self, tag: str, since: float, requests: int, others: set[str]) -> str | None:
        after: dict[str, str] = {}
        while True:
            async with self._call("GET", "", RecipeError, NO_BATCHES, params={"limit": "100"} | after) as response:
                page = _decoded(await response.aread(), _Page)
            for batch in page.data:
                if batch.created < since - CLOCKS_S:
                    return None  # the newest come first
                if batch.id not in others and batch.total == requests and await self._is(batch, tag):
                    return str(batch.id)
            if not page.has_more or not page.data:
                return None
            after = {"after_id": page.data[-1].id}

    async def _is(self, batch: "_Batch", tag: str) -> bool:
        """Whether a batch is the one with our tag."""
        if batch.processing_status != "ended":
            raise Waiting(
                f"{self.base_url}: an earlier start ended while it submitted a batch, and batch {batch.id} may be it; that "
                "is known when it has ended: run the same command again then, or add --wait"
            )
        async with self._call("GET", f"/{batch.id}/results", IdentityError, "its results are gone") as response:
            first = b""
            async for piece in response.aiter_bytes():
                first += piece
                if b"\n" in first:
                    break
        return bool(_decoded(first.split(b"\n")[0], _Line).custom_id.startswith(f"{tag}-"))

    async def collect(self, handle: str, into: Path) -> Look:
        unknown = (
            f"the provider does not know batch {handle} or its results: a batch is read with a key of the workspace that "
            "submitted it; with `batch: false` its requests are asked one by one, and paid again"
        )
        async with self._call("GET", f"/{handle}", IdentityError, unknown) as response:
            batch = _decoded(await response.aread(), _Batch)
        counts = batch.request_counts
        answered = counts.get("succeeded", 0) + counts.get("errored", 0)
        if batch.processing_status != "ended":
            return Look(answered=answered)
        # not from `results_url`: the key goes to no address but the recipe's
        async with self._call("GET", f"/{handle}/results", IdentityError, unknown) as response:
            with into.open("wb") as file:
                await write_lines(response.aiter_bytes(), file, self._key)
        cut_off = [word for word in ("expired", "canceled") if counts.get(word)]
        return Look(answered=answered, succeeded=counts.get("succeeded", 0), ended=" and ".join(cut_off) or "ended")

    def result(self, line: bytes) -> tuple[str, bytes | Failure]:
        try:
            found = msgspec.json.decode(line, type=_Line)
        except msgspec.ValidationError as e:
            name = msgspec.json.decode(line)["custom_id"]
            return name, Failure(reason="bad_json", detail=f"{e}: {line[:200].decode('utf-8', 'replace')}")
        if found.result.type == "succeeded":
            return found.custom_id, bytes(found.result.message)
        if found.result.type != "errored":
            return found.custom_id, Failure(reason="not_answered", detail=f"the request was {found.result.type}")
        error = found.result.error.get("error", found.result.error)
        return found.custom_id, classify(STATUS.get(error.get("type"), 500), {}, msgspec.json.encode({"error": error}))

    async def close(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, not_there: type[FactoryError], why_not: str, **how: Any
    ) -> AsyncIterator[httpx.Response]:
        """One call whose body is still to be read, with its errors as ours; `not_there` is what a 404 means."""
        try:
            async with self._client.stream(method, f"{self.base_url}/messages/batches{path}", **how) as response:
                if response.status_code == 404:
                    raise not_there(f"{self.base_url}: {why_not}")
                if response.status_code != 200:
                    raw = await response.aread()
                    raise told(self.base_url, response.status_code, response.headers, raw, self._key)
                yield response
        except httpx.HTTPError as e:
            raise unreachable(self.base_url, f"{type(e).__name__} {e}") from None


def _envelope(lines: Path) -> Iterator[bytes]:
    """The lines as the one JSON body that the API takes."""
    yield b'{"requests":['
    with lines.open("rb") as file:
        for number, line in enumerate(file):
            yield b"," + line if number else line
    yield b"]}"


class _Batch(msgspec.Struct):
    id: str
    processing_status: str
    created_at: str
    request_counts: dict[str, int]

    @property
    def created(self) -> float:
        return datetime.fromisoformat(self.created_at).timestamp()

    @property
    def total(self) -> int:
        return sum(self.request_counts.values())


class _Page(msgspec.Struct):
    data: list[_Batch]
    has_more: bool = False


class _Outcome(msgspec.Struct):
    type: str
    message: msgspec.Raw = msgspec.Raw(b"null")
    error: dict[str, Any] = {}


class _Line(msgspec.Struct):
    """A line of the results; `message` stays as it came."""

    custom_id: str
    result: _Outcome


def _decoded(raw: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as e:
        raise OutageError(
            f"an answer about batches cannot be read ({e}): {raw[:200]!r}; run the command again"
        ) from None
