"""Anthropic's native messages API. Its body is stored as it came, and turned into a chat completion when it is read.

There is no `n` and no seed: several draws are several requests, and no seed is claimed. The system's messages become
the `system` field, for the API's turns know only two roles.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from factory.rows import Failure, Outcome, Request
from factory.teachers.capabilities import ANTHROPIC, Capabilities
from factory.teachers.entry import BaseUrl, Endpoint, KeyVariable
from factory.teachers.openai import read_chat, read_completion, told_usage
from factory.teachers.rate_limits import RateLimits
from factory.teachers.strict import strict_json
from factory.teachers.wire import Wire

VERSION = "2023-06-01"
EVERY = 10_000
FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}
"""Its `stop_reason` in the words of chat completions; what is not here is kept as it is, so it never counts as ended."""


class Anthropic(Endpoint):
    """`{type: anthropic, model, api_key_env}`; the key is read from ANTHROPIC_API_KEY where nothing else is said."""

    type: Literal["anthropic"] = "anthropic"
    base_url: BaseUrl = "https://api.anthropic.com/v1"
    api_key_env: KeyVariable = "ANTHROPIC_API_KEY"

    def identity(self, runs: Path) -> str:
        return f"anthropic:{self.base_url}:{self.model}"

    def known(self) -> Capabilities:
        return ANTHROPIC

    def open(self, runs: Path) -> "AnthropicTeacher":
        return AnthropicTeacher(self, self.abilities(runs))


class AnthropicTeacher:
    """Sends a request, returns the native body."""

    def __init__(self, entry: Anthropic, capabilities: Capabilities) -> None:
        self.model, self.base_url, self.capabilities = entry.model, entry.base_url, capabilities
        self.concurrency = entry.limits.max_concurrency
        key = entry.key()
        headers = {"anthropic-version": VERSION} | ({"x-api-key": key} if key else {})
        self._wire = Wire(entry.base_url, headers, key, entry.limits.timeout_s, self.concurrency)

    @property
    def rate_limits(self) -> RateLimits | None:
        """The rate limits that the last response told, if it told any."""
        return self._wire.rate_limits

    async def send(self, request: Request) -> bytes | Failure:
        if why := self.capabilities.refusal(request.sampling):
            return Failure(reason="unsupported_parameter", detail=f"{self.model} at {self.base_url}: {why}")
        return await self.post(self.body(request))

    def body(self, request: Request) -> dict[str, Any]:
        return message_body(self.model, request)

    async def post(self, body: dict[str, Any]) -> bytes | Failure:
        return await self._wire.post("/messages", msgspec.json.encode(body))

    def read(self, request: Request, body: bytes) -> Outcome:
        return read_message(body, self.model, self.capabilities.echoes)

    async def close(self) -> None:
        await self._wire.close()


def message_body(model: str, request: Request) -> dict[str, Any]:
    """The JSON of a request; values that are the API's own defaults stay out: newer models refuse some in company."""
    s = request.sampling
    system = "\n\n".join(m["content"] for m in request.messages if m["role"] == "system")
    turns = [m for m in request.messages if m["role"] != "system"]
    body: dict[str, Any] = {"model": model, "messages": turns, "max_tokens": s.max_tokens}
    if system:
        body["system"] = system
    if s.temperature != 1.0:
        body["temperature"] = s.temperature
    if s.top_p != 1.0:
        body["top_p"] = s.top_p
    if s.top_k:
        body["top_k"] = s.top_k
    if s.stop:
        body["stop_sequences"] = s.stop
    if s.response_format is not None:
        schema = (
            s.response_format["json_schema"]["schema"] if "json_schema" in s.response_format else {"type": "object"}
        )
        body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return body


def read_message(body: bytes, model: str | None = None, echoes: list[str] | None = None) -> Outcome:
    """A native body as a `Reply`, or the `Failure` that it really is."""
    data = strict_json(body)
    if isinstance(data, Failure) or not isinstance(data, dict) or data.get("type") != "message":
        return data if isinstance(data, Failure) else read_chat(body, 1, model, echoes)
    if data.get("stop_reason") == "refusal":
        detail = f"the model declined: {data.get('stop_details')}"[:500]
        return Failure(reason="refused", detail=detail, usage=told_usage(as_completion(data)))
    return read_completion(as_completion(data), 1, model, echoes)


def read_any(body: bytes) -> Outcome:
    """A stored body of any teacher, native or not, with all of its choices."""
    data = strict_json(body)
    native = isinstance(data, dict) and data.get("type") == "message"
    return read_message(body) if native else read_chat(body, EVERY)


def as_completion(data: dict[str, Any]) -> dict[str, Any]:
    """A native message in the shape of a chat completion; prompt tokens include those read from and put in the cache."""
    told = data.get("usage")
    told = told if isinstance(told, dict) else {}
    cached = told.get("cache_read_input_tokens")
    parts = [told.get("input_tokens"), told.get("cache_creation_input_tokens"), cached]
    stop = data.get("stop_reason")
    content = data.get("content")
    tools = (
        [b for b in content if isinstance(b, dict) and b.get("type") == "tool_use"] if isinstance(content, list) else []
    )
    choice = {
        "message": {"content": content, "tool_calls": tools},
        "finish_reason": FINISH.get(stop, stop) if isinstance(stop, str) else None,
    }
    counts = [p for p in parts if isinstance(p, int)]
    usage = {
        "prompt_tokens": sum(counts) if parts[0] is not None and min(counts, default=-1) >= 0 else None,
        "completion_tokens": told.get("output_tokens"),
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return {"model": data.get("model"), "choices": [choice] if isinstance(content, list) else [], "usage": usage}
