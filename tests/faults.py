"""Every fault that a chat endpoint is known to have, by name, and a loopback server that plays them.

A fault is what goes over the socket instead of the usual answer: for the first `times` requests of a prompt, or always.
`end` is how each draw of such a prompt must end: as a row, or with this reason; `exit` is the code of a run that it ends.
The server remembers how many usable draws it has given to each question: more than were wanted were paid for twice.
"""

import asyncio
import gzip
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

ALWAYS = 1_000_000
CLOCK = "Wed, 21 Oct 2026 07:28:00 GMT"
CLOCK_EPOCH = 1_792_567_680
Usual = dict[str, Any]


class Wire(NamedTuple):
    """What goes over the socket, and what becomes of the connection."""

    pieces: Sequence[bytes]
    pause_s: float = 0.0
    after: Literal["keep", "close", "reset"] = "keep"


class Fault(NamedTuple):
    """`gives` is how many of its draws are good; `waits_s` is how long it makes everybody wait."""

    name: str
    play: Callable[[Usual], Wire]
    times: int = 1
    end: str = "row"
    exit: int = 0
    gives: int = 0
    waits_s: float = 0.0


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Wire:
    """A whole response, as a proper server sends it."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
    return Wire([_head(status, kind | (headers or {})) + raw])


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


# -- statuses -----------------------------------------------------------------------------------------------------------


def _status(
    name: str, status: int, message: str = "no", /, times: int = 1, end: str = "row", exit: int = 0,
    headers: dict[str, str] | None = None, waits_s: float = 0.0, **fields: Any,
) -> Fault:  # fmt: skip
    wire = reply({"error": {"message": message, **fields}}, status, headers)
    return Fault(name, lambda _: wire, times, end, exit, waits_s=waits_s)


SOON = {"retry-after-ms": "30"}
STATUSES = [
    _status("context_length", 400, "maximum context length is 10", ALWAYS, "context_overflow", code="context_length_exceeded"),
    _status("content_policy", 400, "filtered", ALWAYS, "refused_input", code="content_filter"),
    _status("unsupported_parameter", 400, "Unsupported parameter: 'top_p'", exit=2, code="unsupported_parameter"),
    _status("misread_request", 400, "We could not parse the JSON body of your request."),
    _status("spend_limit_400", 400, "You have reached your specified API usage limits.", exit=5),
    _status("bad_key", 401, "Incorrect API key provided", exit=4),
    _status("payment_required", 402, "Insufficient credits", exit=5),
    _status("forbidden", 403, "not in your region", ALWAYS, "forbidden"),
    _status("no_such_model", 404, "The model `m` does not exist", exit=6, code="model_not_found"),
    _status("proxy_login", 407, exit=4),
    _status("request_timeout", 408),
    _status("conflict", 409),
    _status("too_large", 413, "request too large", ALWAYS, "too_large"),
    _status("unsupported_media", 415, "no", ALWAYS, "bad_request"),
    _status("unprocessable", 422, "content must be a string", ALWAYS, "bad_request"),
    _status("teapot", 418, "no", ALWAYS, "bad_request"),
    _status("requests_a_minute", 429, "Rate limit reached for requests", headers=SOON, code="rate_limit_exceeded"),
    _status("tokens_a_minute", 429, "Rate limit reached on tokens per min (TPM)", headers=SOON, type="tokens"),
    _status("acceleration", 429, "Too fast, slow your acceleration", headers=SOON, type="rate_limit_error"),
    _status("daily_quota_soon", 429, "Rate limit reached on requests per day (RPD). Please try again in 50ms."),
    _status("daily_quota_tomorrow", 429, "Rate limit reached on requests per day. Please try again in 7h12m.", exit=5),
    _status("quota", 429, "You exceeded your current quota", exit=5, code="insufficient_quota"),
    _status("spend_cap", 429, "cap", exit=5, type="rate_limit_error", details={"error_code": "enforced_spend_limit_reached"}),
    _status("server_error", 500),
    _status("server_error_for_good", 500, "no", ALWAYS, "server_error"),
    _status("bad_gateway", 502),
    _status("unavailable", 503, headers=SOON),
    _status("overloaded", 529, headers=SOON, type="overloaded_error"),
    _status("gateway_timeout", 504),
    _status("redirect", 307, "moved", ALWAYS, "redirect", headers={"Location": "http://127.0.0.1:9/v1"}),
    _status("error_in_200", 200, "overloaded", code=500),
    Fault("html_page", lambda _: reply(b"<!doctype html><html>Log in to the hotel's network</html>")),
]  # fmt: skip

_DATED = {"Date": CLOCK}
_HEADERS: list[tuple[str, dict[str, str], float]] = [
    ("milliseconds", {"retry-after-ms": "40"}, 0),
    ("seconds", {"Retry-After": "1"}, 1),
    ("fraction", {"Retry-After": "0.05"}, 0),
    ("zero", {"Retry-After": "0"}, 0),
    ("negative", {"Retry-After": "-5"}, 0),
    ("nan", {"Retry-After": "nan"}, 0),
    ("nonsense", {"Retry-After": "later"}, 0),
    ("absent", {}, 0),
    ("date_by_the_servers_clock", _DATED | {"Retry-After": CLOCK}, 0),
    ("date_long_past", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ("reset_duration", {"x-ratelimit-reset-requests": "20ms"}, 0),
    ("reset_epoch", _DATED | {"x-ratelimit-reset": str(CLOCK_EPOCH)}, 0),
    ("reset_minutes", {"x-ratelimit-reset-requests": "6m0s"}, 360),
    ("infinite", {"Retry-After": "inf"}, 3600),
    ("thirty_years", {"Retry-After": "1000000000"}, 3600),
]
_INFO = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.05s"}]
RETRY_AFTER = [
    *(_status(f"retry_after_{name}", 429, "slow", headers=told, waits_s=waits) for name, told, waits in _HEADERS),
    _status("retry_after_in_the_body", 429, "slow", status="RESOURCE_EXHAUSTED", details=_INFO),
    _status("retry_after_in_words", 429, "Rate limit reached. Please try again in 0.05s."),
]


# -- the socket ---------------------------------------------------------------------------------------------------------

_JSON = {"Content-Type": "application/json"}
_CHUNKED = _head(200, _JSON | {"Transfer-Encoding": "chunked"})
SILENCE_S = 30.0


def _raw(usual: Usual) -> bytes:
    return json.dumps(usual).encode()


def _sized(usual: Usual, more: int) -> bytes:
    return _head(200, _JSON | {"Content-Length": str(len(_raw(usual)) + more)}) + _raw(usual)


def _packed(raw: bytes) -> Wire:
    return Wire([_head(200, _JSON | {"Content-Encoding": "gzip", "Content-Length": str(len(raw))}) + raw])


_BOMB = gzip.compress(bytes(64 * 2**20), 9)
SOCKETS = [
    Fault("reset_after_the_request", lambda _: Wire([], after="reset")),
    Fault("closed_as_if_idle", lambda _: Wire([], after="close")),
    Fault("reset_within_the_body", lambda u: Wire([_sized(u, 0)[:-50]], after="reset")),
    Fault("early_end", lambda u: Wire([_sized(u, 9)], after="close")),
    Fault("length_too_short", lambda u: Wire([_sized(u, -9)], after="close")),
    Fault("truncated_chunks", lambda u: Wire([_CHUNKED + b"%x\r\n" % len(_raw(u)) + _raw(u)[:40]], after="close")),
    Fault("broken_chunks", lambda _: Wire([_CHUNKED + b"xyz\r\n"], after="close")),
    Fault("silence", lambda _: Wire([b""], SILENCE_S, "close")),
    Fault("trickle", lambda _: Wire([_head(200, _JSON), *[b" "] * 300], 0.1, "close")),
    Fault("bomb", lambda _: _packed(_BOMB), ALWAYS, "body_too_large"),
    Fault("huge_body", lambda _: Wire([_head(200, _JSON), *[b" " * 2**20] * 33], after="close"), ALWAYS, "body_too_large"),
    Fault("broken_gzip", lambda u: _packed(gzip.compress(_raw(u))[:-12])),
    Fault("stream_without_end", lambda _: reply(b'data: {"choices": [{"delta": {"content": "cut')),
    Fault("not_http", lambda _: Wire([b"SSH-2.0-OpenSSH_9.0\r\n"], after="close")),
]  # fmt: skip


# -- bodies -------------------------------------------------------------------------------------------------------------


def _each(name: str, end: str = "row", times: int = ALWAYS, finish: str | None = "stop", **message: Any) -> Fault:
    """The usual answer with something else in each choice's message."""

    def play(usual: Usual) -> Wire:
        choices = [
            {**c, "message": {**c["message"], **_called(message, c)}, "finish_reason": finish} for c in usual["choices"]
        ]
        return reply({**usual, "choices": choices})

    return Fault(name, play, times, end, gives=ALWAYS if end == "row" and times == ALWAYS else 0)


def _called(message: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    text = choice["message"]["content"]
    return {key: value(text) if callable(value) else value for key, value in message.items()}


def _with(name: str, end: str = "row", exit: int = 0, **fields: Any) -> Fault:
    """The usual answer with other fields beside its choices."""
    gives = ALWAYS if end == "row" and not exit else 0
    times = 1 if exit else ALWAYS
    return Fault(name, lambda usual: reply({**usual, **fields}), times, end, exit, gives)


def _bytes(name: str, raw: bytes, times: int = 1, end: str = "row") -> Fault:
    return Fault(name, lambda _: reply(raw), times, end)


def _changed(old: bytes, new: bytes) -> Callable[[Usual], Wire]:
    return lambda usual: reply(_raw(usual).replace(old, new))


_THINK = "<think>\nLet me see.\n"
BODIES = [
    _bytes("malformed_json", b'{"choices": [{"message": {"content": "cut'),
    _bytes("malformed_json_for_good", b"{not json", ALWAYS, "bad_json"),
    Fault("nan", _changed(b'"index": 0', b'"index": NaN'), ALWAYS, "unsafe_json"),
    Fault("duplicate_keys", _changed(b'"content"', b'"content": "a", "content"'), ALWAYS, "unsafe_json"),
    _bytes("deep_nesting", b"[" * 100_000, ALWAYS, "unsafe_json"),
    Fault("invalid_utf8", _changed(b"swer", b"sw\xff"), ALWAYS, "bad_encoding"),
    Fault("lone_surrogate", _changed(b"swer", b"sw\\ud83d"), ALWAYS, "bad_encoding"),
    _bytes("no_choices", b'{"choices": []}'),
    _bytes("no_choices_for_good", b'{"model": "m"}', ALWAYS, "missing_choice"),
    _each("null_content", times=1, content=None),
    _each("empty_for_good", "empty", content=""),
    _each("blank", times=1, content=" \n "),
    _each("tool_calls", "tool_calls", finish="tool_calls", content=None, tool_calls=[{"id": "1"}]),
    _each("reasoning_only", "reasoning_only", content=None, reasoning="hm"),
    _each("filtered_output", "filtered_output", finish="content_filter"),
    _each("refusal_field", "refused", content=None, refusal="I cannot"),
    _each("truncated", finish="length"),
    _each("stopped_for_repetition", finish="repetition"),
    _each("unknown_finish", finish="eos?"),
    _each("no_finish", finish=None),
    Fault("fewer_than_n", lambda u: reply({**u, "choices": u["choices"][:1]}), gives=1),
    Fault("more_than_n", lambda u: reply({**u, "choices": u["choices"] * 2}), ALWAYS, gives=ALWAYS),
    _each("same_text_in_all_draws", content="The same answer."),
    _each("loop", content="again and " * 300),
    _each("thoughts_in_the_text", content=lambda text: f"{_THINK}</think>\n{text}"),
    _each("thoughts_without_beginning", content=lambda text: f"Let me see.\n</think>\n{text}"),
    _each("thoughts_without_end", "reasoning_unclosed", content=lambda text: f"{_THINK}{text}"),
    _each("special_tokens", "special_tokens", content=lambda text: f"{text}<|im_end|>"),
    _with("another_model", exit=6, model="somebody-else"),
    _with("a_snapshot_of_the_model", model="m-2026-10-21"),
    _with("another_fingerprint", system_fingerprint="fp_2"),
    _with("no_usage", usage=None),
    _with("impossible_usage", usage={"prompt_tokens": -4, "completion_tokens": 10**15}),
    _each("nul", content=lambda text: f"{text}\x00 and more"),
    _each("controls", content=lambda text: f"\x1b[31m{text}\u202e\u200b"),
    _each("refusal_in_words", content="I'm sorry, but I can't help with that."),
    _each("another_language", content="Das ist eine Antwort in einer anderen Sprache."),
    _each("the_same_for_all", content="Welcome to nginx."),
    _each("the_answer_to_another", content="Answer 0 to: Question 0"),
]  # fmt: skip

FAULTS = [*STATUSES, *RETRY_AFTER, *SOCKETS, *BODIES]
MIXED = [fault for fault in FAULTS if not fault.exit and fault.waits_s <= 1]
"""Those that a run lives through, and in less than an hour."""
STOPPING = [fault for fault in FAULTS if fault.exit]
ELSEWHERE = {"no_such_host": ("https://no-such-host.invalid/v1", 7), "connect_refused": ("http://127.0.0.1:9/v1", 7)}
"""Faults of an address, where there is no server to play them: base_url and exit code."""


# -- the server ---------------------------------------------------------------------------------------------------------


class FaultServer:
    """`seen` counts requests and `given` usable draws, both by question; `met` is which fault a question met."""

    def __init__(self, fault_of: Callable[[str], Fault | None]) -> None:
        self.fault_of = fault_of
        self.seen: Counter[str] = Counter()
        self.given: Counter[str] = Counter()
        self.met: dict[str, Fault] = {}
        self.url = ""
        self._connections: set[asyncio.Task[None]] = set()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._exchange(reader, writer):
                pass
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection lives on."""
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        wire = self._answer(json.loads(await reader.readexactly(int(length))))
        for piece in wire.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(wire.pause_s)
        if wire.after == "reset":
            writer.transport.abort()
        return wire.after == "keep"

    def _answer(self, body: dict[str, Any]) -> Wire:
        question, n = body["messages"][-1]["content"], body.get("n", 1)
        before = self.seen[question]
        self.seen[question] += 1
        usual = _completion(body["model"], question, self.given[question], n)
        fault = self.fault_of(question)
        if fault is None or before >= fault.times:
            self.given[question] += n
            return reply(usual)
        self.met[question] = fault
        self.given[question] += min(fault.gives, n)
        return fault.play(usual)

    async def close(self) -> None:
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


def _completion(model: str, question: str, first: int, n: int) -> Usual:
    texts = [f"Answer {first + i} to: {question} It is so because it was so before." for i in range(n)]
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for i, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 20, "completion_tokens": 20 * n}
    return {"id": "x", "object": "chat.completion", "model": model, "choices": choices, "usage": usage}


@contextmanager
def faulty(fault_of: Callable[[str], Fault | None]) -> Iterator[FaultServer]:
    """A fault server on a free port of 127.0.0.1, on a thread of its own; `fault_of` decides by the question."""
    server, loop = FaultServer(fault_of), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    starting = asyncio.start_server(server.connection, "127.0.0.1", 0, backlog=1024)
    listening = asyncio.run_coroutine_threadsafe(starting, loop).result(10)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(listening.close)
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
