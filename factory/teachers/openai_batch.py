"""OpenAI's batch endpoint: a file of requests goes up, a batch is made of it, a file of answers and one of errors come down.

Through the `openai` client (extra `batch`), which is loaded when a batch is needed. Its retries and redirects are off.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from factory.errors import AuthError, FactoryError, IdentityError, OutageError, RecipeError
from factory.rows import Failure, Look, Request
from factory.teachers.failures import ACTIONS, STOPS, classify
from factory.teachers.secret import Secret

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TIMEOUT_S = 600.0
"""For one call: a file of 200 MB takes a while."""
TAG = "factory_batch"
"""Under this name a batch's metadata holds our tag."""
CLOCKS_S = 3600.0
"""How far apart our clock and the provider's may be."""
NO_BATCHES = "it has no batches (HTTP 404); correct base_url, or remove `batch: true`"
ENDED = ("completed", "expired", "cancelled")


class OpenAIBatch:
    """Speaks /files and /batches. Limits of a file are OpenAI's."""

    max_lines = 50_000
    max_bytes = 200 * 1000**2

    def __init__(self, base_url: str, key: str | None, body: Callable[[Request], dict[str, Any]]) -> None:
        self.base_url, self._key, self._body = base_url, key, body
        self._opened: AsyncOpenAI | None = None

    def line(self, custom_id: str, request: Request) -> bytes:
        whole = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": self._body(request)}
        return msgspec.json.encode(whole) + b"\n"

    async def submit(self, lines: Path, tag: str) -> str:
        async with self._client(RecipeError, NO_BATCHES) as client:
            with lines.open("rb") as file:
                uploaded = await client.files.create(file=(lines.name, file), purpose="batch")
            batch = await client.batches.create(
                input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={TAG: tag}
            )
        return batch.id

    async def find(self, tag: str, since: float, requests: int, others: set[str]) -> str | None:
        async with self._client(RecipeError, NO_BATCHES) as client:
            async for batch in client.batches.list(limit=100):
                named = batch.metadata or {}
                if named.get(TAG) == tag:
                    return batch.id
                new = batch.id not in others and (batch.created_at or since) >= since - CLOCKS_S
                if TAG not in named and new and await _is_of(client, batch, tag):
                    return batch.id
        return None

    async def collect(self, handle: str, into: Path) -> Look:
        unknown = (
            f"the provider does not know batch {handle} or its results: a batch is read with a key of the project that "
            "submitted it; with `batch: false` its requests are asked one by one, and paid again"
        )
        async with self._client(IdentityError, unknown) as client:
            batch = await client.batches.retrieve(handle)
            counts = batch.request_counts
            answered = counts.completed + counts.failed if counts else 0
            if batch.status == "failed":
                return Look(answered=answered, refused=_refusal(batch.errors))
            if batch.status not in ENDED:
                return Look(answered=answered)
            with into.open("wb") as file:
                for name in filter(None, (batch.output_file_id, batch.error_file_id)):
                    async with client.files.with_streaming_response.content(name) as response:
                        await write_lines(response.iter_bytes(), file, self._key)
        return Look(answered=answered, succeeded=counts.completed if counts else 0, ended=batch.status)

    def result(self, line: bytes) -> tuple[str, bytes | Failure]:
        try:
            found = msgspec.json.decode(line, type=_Result)
        except msgspec.ValidationError as e:
            name = msgspec.json.decode(line)["custom_id"]
            return name, Failure(reason="bad_json", detail=f"{e}: {line[:200].decode('utf-8', 'replace')}")
        if found.response is not None:
            status, body = found.response.status_code, bytes(found.response.body)
            return found.custom_id, body if status == 200 else classify(status, {}, body)
        code, message = (found.error.code, found.error.message) if found.error else (None, None)
        return found.custom_id, Failure(reason="not_answered", detail=f"{code}: {message}")

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    @asynccontextmanager
    async def _client(self, not_there: type[FactoryError], why_not: str) -> AsyncIterator["AsyncOpenAI"]:
        """The client, with its errors as ours; the first two say what a 404 means."""
        try:
            import httpx2
            import openai
        except ImportError:
            raise RecipeError(
                "batch: true needs the openai client: pip install 'distillation-factory[batch]'"
            ) from None
        if self._opened is None:
            self._opened = openai.AsyncOpenAI(
                api_key=self._key or "none", base_url=self.base_url, max_retries=0, timeout=TIMEOUT_S,
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=TIMEOUT_S),
            )  # fmt: skip
        try:
            yield self._opened
        except openai.APIStatusError as e:
            if e.status_code == 404:
                raise not_there(f"{self.base_url}: {why_not}") from None
            raise told(self.base_url, e.status_code, e.response.headers, e.response.content, self._key) from None
        except (openai.APIConnectionError, httpx2.HTTPError) as e:  # the latter while a body is being read
            raise unreachable(self.base_url, str(e.__cause__ or e)) from None


async def _is_of(client: "AsyncOpenAI", batch: Any, tag: str) -> bool:
    """Some endpoints forget a batch's metadata; then the name of its file tells whose it is."""
    import openai

    try:
        return bool(batch.input_file_id) and tag in ((await client.files.retrieve(batch.input_file_id)).filename or "")
    except openai.APIStatusError:
        return False


def told(where: str, status: int, headers: Any, raw: bytes, key: str | None) -> FactoryError:
    """What an endpoint answers to a call about batches as one of our errors."""
    failure = classify(status, headers, without_key(raw, key))
    detail = without_key(failure.detail.encode(), key).decode()
    if ACTIONS[failure.reason] in ("retry", "wait"):
        return OutageError(f"{where}: {detail}; nothing is lost, run the same command again")
    return STOPS.get(failure.reason, RecipeError)(f"{where}: the batch was not accepted: {detail}")


def unreachable(where: str, why: str) -> FactoryError:
    """A call that did not come to an answer; what it was to do may be done all the same."""
    kind = AuthError if "CERTIFICATE_VERIFY" in why else OutageError
    return kind(f"{where}: {why}; nothing is lost, run the same command again")


async def write_lines(pieces: AsyncIterator[bytes], into: IO[bytes], key: str | None) -> None:
    """A file of lines as it comes in; each of them ends with a newline."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        into.writelines(without_key(line, key) + b"\n" for line in lines if line.strip())
    if rest.strip():
        into.write(without_key(rest, key) + b"\n")


def without_key(text: bytes, key: str | None) -> bytes:
    """A server that repeats our key must not get it into our files."""
    return Secret(key).out_of(text)


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Result(msgspec.Struct):
    """A line of an output or error file; `body` stays as it came."""

    custom_id: str
    response: _Response | None = None
    error: _Error | None = None


def _refusal(errors: Any) -> Failure:
    """Why a whole batch was refused when its file was looked at."""
    each = [f"{e.code}: {e.message}" + f" (line {e.line})" * bool(e.line) for e in (errors and errors.data) or []]
    message = "; ".join(each[:3]) or "the provider does not say why"
    return classify(400, {}, msgspec.json.encode({"error": {"message": message}}))
