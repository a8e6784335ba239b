"""Any endpoint that speaks OpenAI's chat completions: one POST per request, the body kept as it came.

Own wire code on aiohttp: the SDK's client spends about ten times the CPU per request, retries on its own, and follows
redirects with the key in hand. Redirects are off here, and so are retries: `ask.py` has the one retry policy.
"""

import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import aiohttp
import msgspec
from pydantic import Field, field_validator

from factory.errors import AuthError
from factory.rows import Choice, Failure, Outcome, Reason, Reply, Request, Sampling, Usage
from factory.teachers.entry import Entry

MAX_BODY_BYTES = 32 * 2**20


class OpenAI(Entry):
    """`{type: openai, model, base_url, api_key_env}`; a server on this machine needs no key.

    `batch: true` asks through the provider's batch endpoint; it is not part of what makes two answers the same.
    """

    billed: ClassVar[bool] = True

    type: Literal["openai"] = "openai"
    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    batch: bool = False

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must look like https://host/v1, not {url!r}")
        if parts.username or parts.password:
            raise ValueError("base_url must not hold credentials; name the key's variable in api_key_env")
        return url.rstrip("/")

    def identity(self, runs: Path) -> str:
        return f"openai:{self.base_url}:{self.model}"

    def key(self) -> str | None:
        """The key from the environment; the recipe can only name the variable."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise AuthError(
                f"the variable {self.api_key_env} is not set; export it, it holds the key for {self.base_url}"
            )
        return key

    def open(self, runs: Path) -> "OpenAITeacher":
        return OpenAITeacher(self.model, self.base_url, self.key(), self.limits.timeout_s, self.limits.max_concurrency)


class OpenAITeacher:
    """Sends a request, returns the body. `seeded` servers honour a seed and get one draw per request."""

    def __init__(
        self, model: str, base_url: str, key: str | None, timeout_s: float, concurrency: int, vllm: bool = False
    ) -> None:
        self.model, self.base_url, self.concurrency, self.vllm = model, base_url, concurrency, vllm
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=min(10.0, timeout_s))
        self._session: aiohttp.ClientSession | None = None

    async def send(self, request: Request) -> bytes | Failure:
        session = self._session
        if session is None:
            connector = aiohttp.TCPConnector(limit=self.concurrency)
            session = self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        body = msgspec.json.encode(self.body(request))
        url = f"{self.base_url}/chat/completions"
        try:
            async with session.post(url, data=body, headers=self._headers, allow_redirects=False) as response:
                raw = await response.content.read(MAX_BODY_BYTES + 1)
                while len(raw) <= MAX_BODY_BYTES and (more := await response.content.read(MAX_BODY_BYTES)):
                    raw += more
        except TimeoutError:
            return Failure(reason="timeout", detail=f"no answer in {self._timeout.total:g} s")
        except aiohttp.ClientConnectorCertificateError as e:
            raise AuthError(f"{self.base_url}: its TLS certificate is not trusted ({e.certificate_error})") from None
        except aiohttp.ClientConnectorError as e:
            return Failure(
                reason="outage", detail=f"cannot connect to {self.base_url}: {e.os_error.strerror or e.os_error}"
            )
        except aiohttp.ClientError as e:
            return Failure(reason="transport", detail=f"{type(e).__name__}: {e}")
        if len(raw) > MAX_BODY_BYTES:
            return Failure(reason="too_large", detail=f"the body is over {MAX_BODY_BYTES} bytes")
        if response.status == 200:
            return raw
        return classify(response.status, response.headers, raw)

    def body(self, request: Request) -> dict[str, Any]:
        return wire_body(self.model, request, self.vllm)

    def read(self, request: Request, body: bytes) -> Outcome:
        return read_chat(body, request.n)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def wire_body(model: str, request: Request, vllm: bool = False) -> dict[str, Any]:
    """The JSON of a request. Values that are the protocol's own defaults stay out: some servers refuse the keys."""
    s = request.sampling
    body: dict[str, Any] = {"model": model, "messages": request.messages, "max_tokens": s.max_tokens}
    if s.beam is not None:
        # vLLM's extension: n is the beam width; its server default of temperature 1 would add sampled tokens
        return body | {
            "use_beam_search": True,
            "n": s.beam.width,
            "length_penalty": s.beam.length_penalty,
            "temperature": 0,
        }
    body["temperature"] = s.temperature
    if request.n > 1:
        body["n"] = request.n
    if request.seed is not None:
        body["seed"] = request.seed
    if s.stop:
        body["stop"] = s.stop
    neutral = Sampling()
    for name in ("top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty"):
        # a vLLM server takes unset values from the model's generation_config: pin them all
        if vllm or getattr(s, name) != getattr(neutral, name):
            body[name] = getattr(s, name)
    return body


def classify(status: int, headers: Any, raw: bytes) -> Failure:
    """A non-200 answer as a `Failure`: by status, then by the provider's code, then by its words."""
    text = raw[:2000].decode("utf-8", "replace")
    code = ""
    try:
        error = msgspec.json.decode(raw).get("error") or {}
        code = str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""
        text = str(error.get("message") or text) if isinstance(error, dict) else str(error)
    except (msgspec.DecodeError, AttributeError):
        pass  # not JSON, or JSON of another shape: its text is the detail
    told = f"{code} {text}".lower()
    reason: Reason = "bad_request"
    if status in (401, 403, 407):
        reason = "auth"
    elif status == 402 or (
        status in (400, 429) and re.search(r"insufficient_quota|credit|billing|spend.?limit|spend.?cap", told)
    ):
        reason = "quota"
    elif status == 429:
        reason = "rate_limited"
    elif status == 404:
        reason = "model_not_found"
    elif status == 413:
        reason = "too_large"
    elif status in (408, 504):
        reason = "timeout"
    elif status in (409, 425) or status >= 500:
        reason = "server_error"
    elif re.search(r"context.?length|maximum context|context_window|too many tokens", told):
        reason = "context_overflow"
    elif re.search(r"content.?filter|content.?policy|content management policy|safety", told):
        reason = "refused_input"
    return Failure(
        reason=reason, detail=f"HTTP {status}: {text[:500]}", status=status, retry_after=retry_after(headers)
    )


def retry_after(headers: Any) -> float | None:
    """Seconds to wait as the server says: `retry-after-ms`, seconds, or an HTTP date; None where it says nothing."""
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / per_second
        except ValueError:
            try:
                seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
            except (ValueError, TypeError):
                continue
        if seconds == seconds:  # NaN is not a wait
            return min(max(seconds, 0.0), 3600.0)
    return None


def read_chat(body: bytes, n: int = 1) -> Outcome:
    """The body of a chat completion as a `Reply` of at most `n` choices, or the `Failure` that it really is."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        return Failure(reason="bad_json", detail=f"{e}: {body[:200].decode('utf-8', 'replace')}")
    if not isinstance(data, dict):
        return Failure(reason="bad_json", detail="the body is not an object")
    if error := data.get("error"):  # some gateways answer 200 with an error inside
        inner = error if isinstance(error, dict) else {"message": str(error)}
        code = inner.get("code")
        return classify(code if isinstance(code, int) else 400, {}, msgspec.json.encode({"error": inner}))
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
        return Failure(reason="missing_choice", detail="the body has no choices")
    usage = data.get("usage") or {}
    read = [_choice(c) for c in choices[:n]]
    failed = next((c for c in read if isinstance(c, Failure)), None)
    good = [c for c in read if isinstance(c, Choice)]
    if failed is not None and not good:
        return failed
    if len(good) == 1 and good[0].tokens is None:
        good = [msgspec.structs.replace(good[0], tokens=_count(usage, "completion_tokens") or None)]
    return Reply(choices=good, usage=_usage(usage), model=str(data.get("model") or ""))


def _choice(choice: dict[str, Any]) -> Choice | Failure:
    message = choice.get("message") or {}
    finish = choice.get("finish_reason")
    text = message.get("content")
    reasoning = message.get("reasoning") or message.get("reasoning_content") or None
    if finish == "content_filter":
        return Failure(reason="filtered_output", detail="the provider filtered the answer")
    if message.get("tool_calls"):
        return Failure(reason="tool_calls", detail="the model called a tool")
    if not isinstance(text, str) or not text.strip():
        if finish == "length" and not reasoning:
            return Choice(text="", finish="length")
        return Failure(reason="reasoning_only" if reasoning else "empty", detail="the answer has no text")
    return Choice(
        text=text,
        finish=finish or "unknown",
        reasoning=reasoning,
        logprob=_logprob(choice),
        tokens=choice.get("tokens"),
    )


def _logprob(choice: dict[str, Any]) -> float | None:
    """Log-probability of the whole answer in nats, where the server tells it."""
    if isinstance(total := choice.get("logprob"), int | float):
        return float(total)
    tokens = (choice.get("logprobs") or {}).get("content")
    return sum(t["logprob"] for t in tokens) if tokens else None


def _count(usage: dict[str, Any], *path: str) -> int:
    value: Any = usage
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return max(int(value), 0) if isinstance(value, int | float) else 0


def _usage(usage: dict[str, Any]) -> Usage:
    seconds = usage.get("seconds")
    return Usage(
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=_count(usage, "prompt_tokens_details", "cached_tokens"),
        reasoning_tokens=_count(usage, "completion_tokens_details", "reasoning_tokens"),
        seconds=float(seconds) if isinstance(seconds, int | float) else 0.0,
    )
