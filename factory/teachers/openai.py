"""Any endpoint that speaks OpenAI's chat completions: one POST per request, the body kept as it came.

`wire_body` writes a request, `read_chat` reads an answer: of this endpoint, and of every teacher whose bodies have that
shape. Reading is a pure function of the body, so that a stored one is read the same again at any time.
"""

import math
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from factory.rows import Choice, Failure, Outcome, Reply, Request, Sampling, Usage
from factory.teachers.capabilities import SAMPLING_KEYS, VLLM, Capabilities
from factory.teachers.entry import BaseUrl, Endpoint
from factory.teachers.failures import classify, for_good
from factory.teachers.rate_limits import RateLimits
from factory.teachers.reasoning import separate
from factory.teachers.strict import strict_json
from factory.teachers.wire import Wire


class OpenAI(Endpoint):
    """`{type: openai, model, base_url, api_key_env}`; a server on this machine needs no key."""

    type: Literal["openai"] = "openai"
    base_url: BaseUrl = "https://api.openai.com/v1"

    def identity(self, runs: Path) -> str:
        return f"openai:{self.base_url}:{self.model}"

    def open(self, runs: Path) -> "OpenAITeacher":
        limits = self.limits
        return OpenAITeacher(
            self.model, self.base_url, self.key(), limits.timeout_s, limits.max_concurrency,
            capabilities=self.abilities(runs),
        )  # fmt: skip


class OpenAITeacher:
    """Sends a request, returns the body. `vllm` pins every sampling value."""

    def __init__(
        self, model: str, base_url: str, key: str | None, timeout_s: float, concurrency: int, vllm: bool = False,
        capabilities: Capabilities | None = None,
    ) -> None:  # fmt: skip
        self.model, self.base_url, self.concurrency, self.vllm = model, base_url, concurrency, vllm
        self.capabilities = capabilities or (VLLM if vllm else Capabilities())
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._wire = Wire(base_url, headers, key, timeout_s, concurrency)

    @property
    def rate_limits(self) -> RateLimits | None:
        """The rate limits that the last response told, if it told any."""
        return self._wire.rate_limits

    async def send(self, request: Request) -> bytes | Failure:
        if why := self.capabilities.refusal(request.sampling):
            return Failure(reason="unsupported_parameter", detail=f"{self.model} at {self.base_url}: {why}")
        answer = await self.post(self.body(request))
        if isinstance(answer, Failure) and answer.reason == "unsupported_n" and request.n == 1:
            return msgspec.structs.replace(answer, reason="bad_request")  # it speaks of some other n
        return answer

    def body(self, request: Request) -> dict[str, Any]:
        return wire_body(self.model, request, self.vllm, self.capabilities)

    async def post(self, body: dict[str, Any]) -> bytes | Failure:
        return await self._wire.post("/chat/completions", msgspec.json.encode(body))

    def read(self, request: Request, body: bytes) -> Outcome:
        known = self.capabilities
        return read_chat(body, request.n, self.model, known.echoes, known.reasoning)

    async def close(self) -> None:
        await self._wire.close()


def wire_body(
    model: str, request: Request, vllm: bool = False, capabilities: Capabilities | None = None
) -> dict[str, Any]:
    """The JSON of a request. Values that are the protocol's own defaults stay out: some servers refuse the keys."""
    s, known = request.sampling, capabilities or Capabilities()
    body: dict[str, Any] = {"model": model, "messages": request.messages, known.limit or "max_tokens": s.max_tokens}
    if s.response_format is not None:
        body["response_format"] = s.response_format
    if s.beam is not None:
        # vLLM's extension: n is the beam width; its server default of temperature 1 would add sampled tokens
        return body | {
            "use_beam_search": True,
            "n": s.beam.width,
            "length_penalty": s.beam.length_penalty,
            "temperature": 0,
            "logprobs": True,
            "include_stop_str_in_output": True,  # in the log-probabilities, not in the text
        }
    body["temperature"] = s.temperature
    if request.n > 1 and known.n is not False:
        body["n"] = request.n
    if request.seed is not None and known.seed is not False:
        body["seed"] = request.seed
    if s.logprobs:
        body["logprobs"] = True
    neutral = Sampling()
    for name in SAMPLING_KEYS:
        # a vLLM server takes unset values from the model's generation_config: pin them all
        if getattr(s, name) != getattr(neutral, name) or (vllm and name != "stop"):
            body[name] = getattr(s, name)
    return body


# -- reading -----------------------------------------------------------------------------------------------------------

REASONING_FIELDS = ("reasoning", "reasoning_content")
ENDED = {
    "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop",
    "max_tokens": "length", "model_length": "length", "max_output_tokens": "length",
    "safety": "content_filter", "sensitive": "content_filter", "recitation": "content_filter", "blocklist": "content_filter",
    "prohibited_content": "content_filter", "network_error": "error",
}  # fmt: skip
"""Other providers' words for what OpenAI calls stop, length, content_filter, in lower case. All others stay as they are."""

SPECIAL_TOKEN = re.compile(
    r"<\|[A-Za-z][A-Za-z0-9_]{0,40}\|>|<\uff5c[^\uff5c<>\n]{1,40}\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<unused\d{1,4}>|</s>\s*\Z"
)


def read_chat(
    body: bytes, n: int = 1, model: str | None = None, echoes: list[str] | None = None, reasoning: str | None = None
) -> Outcome:
    """The body of a chat completion as a `Reply` of at most `n` choices, or the `Failure` that it really is.

    `model` is who was asked: a server that names another one is not who we wanted, unless its name is in `echoes`.
    """
    data = strict_json(body)
    if isinstance(data, Failure):
        return data
    if isinstance(data, list) and data and isinstance(data[0], dict) and data[0].get("error"):
        data = data[0]  # Gemini wraps its errors in a list
    if not isinstance(data, dict):
        return Failure(reason="bad_json", detail=f"the body is no object: {body[:200].decode('utf-8', 'replace')}")
    return read_completion(data, n, model, echoes, reasoning)


def read_completion(
    data: dict[str, Any],
    n: int = 1,
    model: str | None = None,
    echoes: list[str] | None = None,
    reasoning: str | None = None,
) -> Outcome:
    """The same for a body that is parsed already."""
    if error := data.get("error"):  # some gateways answer 200 with an error inside
        return classify(0, {}, msgspec.json.encode({"error": error}))
    echoed = data.get("model")
    echoed = echoed if isinstance(echoed, str) else ""
    if model and echoed and not same_model(model, echoed) and echoed not in (echoes or ()):
        detail = (
            f"{model} was asked, but {echoed} answered; if that is right, set capabilities: {{echoes: [{echoed}]}}, and what "
            "was answered so far is asked again"
        )
        return Failure(reason="wrong_model", detail=detail)
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
        begins = msgspec.json.encode(data)[:200].decode("utf-8", "replace")
        return Failure(reason="missing_choice", detail=f"the body has no choices; it begins: {begins}")
    read = [_choice(c, reasoning) for c in choices]
    failed = [c for c in read if isinstance(c, Failure)]
    # of all that came: whoever reads for a larger n finds the same
    good = [c for c in read if isinstance(c, Choice)][:n]
    usage, counted = _usage(data.get("usage"))
    if not good:
        return msgspec.structs.replace(failed[0], usage=usage if counted else None)
    if len(choices) == 1 and good[0].tokens is None:
        good = [msgspec.structs.replace(good[0], tokens=usage.completion_tokens or None)]
    # what may come out well the next time counts as never come: it is asked for again
    failed = [failure for failure in failed if for_good(failure) or failure.reason == "empty"]
    if served := _served(data, model, echoed):
        good = [msgspec.structs.replace(choice, served=served) for choice in good]
    return Reply(choices=good, usage=usage, model=echoed, failed=failed, counted=counted)


def _choice(choice: dict[str, Any], field: str | None) -> Choice | Failure:
    if error := choice.get("error"):
        return classify(0, {}, msgspec.json.encode({"error": error}))
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    finish = choice.get("finish_reason")
    finish = ENDED.get(finish.lower(), finish) if isinstance(finish, str) and finish else "unknown"
    finish = finish.lower() if finish.lower() in ("stop", "length", "content_filter") else finish
    if finish == "content_filter":
        return Failure(reason="filtered_output", detail="the provider filtered the answer")
    if finish in ("abort", "error"):  # vLLM's words when it is stopped or fails in mid-answer, with a status of 200
        return Failure(reason="server_error", detail="the server broke the answer off")
    if message.get("tool_calls") or message.get("function_call") or finish in ("tool_calls", "function_call"):
        return Failure(reason="tool_calls", detail="the model called a tool")
    text, thought = _content(message.get("content"))
    if not text.strip() and isinstance(refusal := message.get("refusal"), str) and refusal:
        return Failure(reason="refused", detail=refusal[:500])
    parts = separate(text)
    names = (field, *REASONING_FIELDS) if field else REASONING_FIELDS
    fields = [message[name] for name in dict.fromkeys(names) if isinstance(message.get(name), str)][:1]
    reasoning = "\n".join(part for part in (*fields, thought, parts.reasoning) if part and part.strip()) or None
    return _judged(parts.answer, reasoning, finish, choice)


def _judged(answer: str | None, reasoning: str | None, finish: str, choice: dict[str, Any]) -> Choice | Failure:
    """An answer and its reasoning as a `Choice`, if they can be data."""
    if answer is None and finish == "stop":
        return Failure(
            reason="reasoning_unclosed", detail=f"no answer can be told from the reasoning: {reasoning}"[:500]
        )
    if reasoning and not (answer or "").strip():
        return Failure(reason="reasoning_only", detail=f"there is reasoning, but no answer (finish: {finish})")
    if not (answer or "").strip() and finish != "length":
        return Failure(reason="empty", detail=f"the answer has no text (finish: {finish})")
    if found := _special(answer or "") or _special(reasoning or ""):
        return Failure(
            reason="special_tokens", detail=f"the text holds {found[0]!r}, which would break a chat template"
        )
    return Choice(
        text=answer if answer and answer.strip() else "",
        finish=finish,
        reasoning=reasoning,
        logprob=_logprob(choice),
        tokens=_count(choice, "tokens"),
    )


def _special(text: str) -> re.Match[str] | None:
    # most texts have neither bracket, and finding that out costs a fiftieth of the search
    return SPECIAL_TOKEN.search(text) if "<" in text or "[" in text else None


def _content(content: Any) -> tuple[str, str | None]:
    """The text of a message, and the reasoning where content comes in typed parts."""
    if isinstance(content, str):
        return content, None
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    text = "".join(p["text"] for p in parts if p.get("type") == "text" and isinstance(p.get("text"), str))
    thoughts = [_content(p["thinking"])[0] for p in parts if p.get("type") == "thinking" and "thinking" in p]
    return text, "\n".join(thoughts) or None


def _logprob(choice: dict[str, Any]) -> float | None:
    """Log-probability of the whole answer in nats, where the server tells it."""
    total = choice.get("logprob")
    if total is None:
        told = choice.get("logprobs")
        tokens = told.get("content") if isinstance(told, dict) else None
        if not isinstance(tokens, list) or not tokens:
            return None
        parts = [t["logprob"] for t in tokens if isinstance(t, dict) and isinstance(t.get("logprob"), int | float)]
        total = sum(parts) if len(parts) == len(tokens) else None
    return float(total) if isinstance(total, int | float) and math.isfinite(total) else None


def told_usage(data: dict[str, Any]) -> Usage | None:
    """The usage of a body, where it tells one that can be believed."""
    usage, counted = _usage(data.get("usage"))
    return usage if counted else None


def _usage(told: Any) -> tuple[Usage, bool]:
    """Usage as the server counts it, and whether it can be believed: given, and of a prompt, which is never nothing."""
    told = told if isinstance(told, dict) else {}
    prompt, completion = _count(told, "prompt_tokens"), _count(told, "completion_tokens")
    if prompt is not None and completion is not None:  # some count reasoning in the total alone, and bill it
        completion = max(completion, (_count(told, "total_tokens") or 0) - prompt)
    seconds = told.get("seconds")
    usage = Usage(
        prompt_tokens=prompt or 0,
        completion_tokens=completion or 0,
        cached_tokens=_count(told, "prompt_tokens_details", "cached_tokens")
        or _count(told, "prompt_cache_hit_tokens")
        or 0,
        reasoning_tokens=_count(told, "completion_tokens_details", "reasoning_tokens") or 0,
        seconds=float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else 0.0,
    )
    return usage, bool(prompt) and completion is not None


def _count(told: dict[str, Any], *path: str) -> int | None:
    value: Any = told
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return int(value) if isinstance(value, int | float) and 0 <= value < 1e12 else None


# -- who answered ------------------------------------------------------------------------------------------------------

_SNAPSHOT = re.compile(r"(?:[-:@](?:latest|preview|0|\d{4}-?\d{2}-?\d{2}|\d{2}-\d{2}|\d{2}-\d{4}|\d{3,8}))+$")


def _served(data: dict[str, Any], asked: str | None, echoed: str) -> str:
    """Which version of a model answered, "name fingerprint"; empty where the server only repeats what was asked."""
    fingerprint = data.get("system_fingerprint")
    if isinstance(fingerprint, str) and fingerprint:
        return f"{echoed[:80]} {fingerprint[:80]}".strip()
    return "" if asked is None or echoed == asked else echoed[:80]


def same_model(asked: str, echoed: str) -> bool:
    """Whether a server's name for a model means the one that was asked.

    An alias may resolve to a dated snapshot (`gpt-4o` to `gpt-4o-2024-08-06`, `m-latest` to `m-2409`), and a gateway may
    leave a vendor's prefix out. A snapshot that was asked for by its date must be that one.
    """
    asked, echoed = asked.lower(), echoed.lower()
    if ("/" in asked) != ("/" in echoed):
        asked, echoed = asked.rpartition("/")[2], echoed.rpartition("/")[2]
    if asked == echoed:
        return True
    base, echoed_base = _SNAPSHOT.sub("", asked), _SNAPSHOT.sub("", echoed)
    dated = re.search(r"\d{2}", asked[len(base) :]) is not None
    return base == echoed_base and (not dated or echoed == echoed_base)
