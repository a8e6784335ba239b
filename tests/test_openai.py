"""The wire of OpenAI-compatible endpoints: what is sent, what a network does, who answered, what is honoured."""

import asyncio
import gzip
import json
import ssl
import subprocess
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from factory.errors import AuthError, RecipeError
from factory.generate import Generate
from factory.journal import answer_keys
from factory.rows import Beam, Failure, Reply, Request, Sampling
from factory.teachers.capabilities import FILE, Capabilities, of_host
from factory.teachers.openai import OpenAI, OpenAITeacher, same_model, wire_body
from factory.teachers.rate_limits import RateLimits, Window
from factory.teachers.wire import MAX_BODY_BYTES, inflated
from tests.server import chat, error, saying, serving

HI = [{"role": "user", "content": "hi"}]


def ask(n: int = 1, seed: int | None = None, **sampling: Any) -> Request:
    return Request(identity="i", messages=HI, sampling=Sampling(**sampling), n=n, seed=seed)  # type: ignore[arg-type]


def teacher(url: str, timeout_s: float = 5.0, key: str | None = None, **known: Any) -> OpenAITeacher:
    return OpenAITeacher("m", url, key, timeout_s, 4, capabilities=Capabilities(**known))


async def send(url: str, request: Request | None = None, **fields: Any) -> bytes | Failure:
    one = teacher(url, **fields)
    try:
        return await one.send(request or ask())
    finally:
        await one.close()


# -- what is sent --------------------------------------------------------------------------------------------------------


def test_a_request_holds_what_was_asked_and_no_defaults() -> None:
    assert wire_body("m", ask()) == {"model": "m", "messages": HI, "max_tokens": 1024, "temperature": 1.0}
    sent = wire_body("m", ask(n=3, seed=5, top_k=4, top_p=0.5, stop=["x"], max_tokens=9))
    assert sent["n"] == 3
    assert (sent["seed"], sent["top_k"], sent["top_p"], sent["stop"], sent["max_tokens"]) == (5, 4, 0.5, ["x"], 9)


def test_a_vllm_server_gets_every_sampling_value_pinned() -> None:
    sent = wire_body("m", ask(), vllm=True)
    assert {k: sent[k] for k in ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")} == {
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    }  # fmt: skip


def test_capabilities_decide_the_name_of_the_limit_and_whether_n_and_seed_are_sent() -> None:
    known = Capabilities(n=False, seed=False, limit="max_completion_tokens")
    sent = wire_body("m", ask(n=3, seed=5), capabilities=known)
    assert sent == {"model": "m", "messages": HI, "max_completion_tokens": 1024, "temperature": 1.0}


def test_beam_search_is_sent_as_vllm_knows_it() -> None:
    sent = wire_body("m", ask(beam=Beam(width=4, length_penalty=0.5)), vllm=True)
    assert (sent["use_beam_search"], sent["n"], sent["length_penalty"], sent["temperature"]) == (True, 4, 0.5, 0)


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("json_object", {"type": "json_object"}),
        ({"type": "json_object"}, {"type": "json_object"}),
        (SCHEMA, {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}),
        (
            {"type": "json_schema", "json_schema": {"name": "mine", "schema": SCHEMA}},
            {"type": "json_schema", "json_schema": {"name": "mine", "schema": SCHEMA}},
        ),
        (None, None),
    ],
)
def test_response_format_of_a_recipe_becomes_the_wires_own(written: Any, sent: Any) -> None:
    knobs = Generate.model_validate({"model": "m", "response_format": written})
    assert knobs.sampling().response_format == sent
    assert wire_body("m", ask(response_format=sent)).get("response_format") == sent


@pytest.mark.parametrize("written", ["xml", {"schema": SCHEMA}, {"type": "json_schema"}, 7])
def test_a_response_format_that_is_none_is_an_error_of_the_recipe(written: Any) -> None:
    with pytest.raises(ValidationError, match="response_format"):
        Generate.model_validate({"model": "m", "response_format": written})


def test_response_format_is_part_of_what_makes_two_answers_the_same_and_keeps_old_keys() -> None:
    assert answer_keys(ask()) == ["a834662e1f2357cb9ff69a56ddc37803"]
    kinds = [
        None,
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
    ]
    assert len({answer_keys(ask(response_format=kind))[0] for kind in kinds}) == 3
    beams = [answer_keys(ask(beam=Beam(width=2), response_format=kind))[0] for kind in kinds]
    assert len(set(beams)) == 3


# -- what a network does -------------------------------------------------------------------------------------------------

OK = json.dumps(chat({"model": "m", "messages": HI})).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def whole(body: bytes, extra: bytes = b"") -> bytes:
    return HEAD + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("pieces", "options", "reason"),
    [
        ([whole(OK)], {}, None),
        ([HEAD + b"\r\n" + OK], {}, None),  # no length: until the connection closes
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n" % len(OK) + OK + b"\r\n0\r\n\r\n"], {}, None),
        ([b"\r\n".join([HEAD[:-2], b"Content-Length: %d" % (len(OK) + 9), b"", OK])], {}, "transport"),  # too short
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % len(OK) + OK[:40]], {}, "transport"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"], {}, "transport"),
        ([b""], {}, "transport"),  # hangs up at once
        ([b""], {"reset": True}, "transport"),
        ([HEAD + b"Content-Length: 100\r\n\r\n{"], {"reset": True}, "transport"),
        ([b"SSH-2.0-OpenSSH_9.0\r\n"], {}, "transport"),
        ([whole(gzip.compress(OK), b"Content-Encoding: gzip\r\n")], {}, None),
        ([whole(zlib.compress(OK), b"Content-Encoding: deflate\r\n")], {}, None),
        ([whole(zlib.compress(OK)[2:-4], b"Content-Encoding: deflate\r\n")], {}, None),
        ([whole(gzip.compress(OK)[:-12], b"Content-Encoding: gzip\r\n")], {}, "transport"),
        ([whole(OK, b"Content-Encoding: gzip\r\n")], {}, "transport"),
        ([whole(OK, b"Content-Encoding: br\r\n")], {}, "bad_encoding"),
        ([whole(gzip.compress(bytes(MAX_BODY_BYTES + 1), 1), b"Content-Encoding: gzip\r\n")], {}, "body_too_large"),
        ([HEAD + b"\r\n", *[b" " * 2**20] * 33], {}, "body_too_large"),
    ],
)  # fmt: skip
async def test_what_a_socket_does_has_one_reason(pieces: list[bytes], options: Any, reason: str | None) -> None:
    async with saying(*pieces, **options) as url:
        answer = await send(url)
    assert (answer.reason if isinstance(answer, Failure) else None) == reason, answer
    assert reason or answer == OK


async def test_a_body_that_trickles_ends_at_the_deadline_of_the_whole_request() -> None:
    async with saying(HEAD + b"\r\n", *[b" "] * 100, pause_s=0.05) as url:
        started = time.monotonic()
        answer = await send(url, timeout_s=0.4)
    assert isinstance(answer, Failure)
    assert answer.reason == "timeout"
    assert time.monotonic() - started < 5  # it would trickle for as long


async def test_a_server_that_says_nothing_is_a_timeout() -> None:
    async with saying(b"", pause_s=2) as url:
        answer = await send(url, timeout_s=0.2)
    assert isinstance(answer, Failure)
    assert (answer.reason, answer.detail) == ("timeout", "no whole answer in 0.2 s")


@pytest.mark.parametrize(
    ("url", "told"),
    [("http://127.0.0.1:9/v1", "127.0.0.1:9"), ("http://no-such-host.invalid/v1", "no-such-host.invalid")],
)
async def test_what_was_never_reached_is_an_outage(url: str, told: str) -> None:
    answer = await send(url)
    assert isinstance(answer, Failure)
    assert answer.reason == "outage"
    assert told in answer.detail


def self_signed(folder: Path) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run(
        [*made, "-keyout", str(folder / "key"), "-out", str(folder / "cert")], check=True, capture_output=True
    )


async def test_an_untrusted_certificate_is_never_accepted(tmp_path: Path) -> None:
    await asyncio.to_thread(self_signed, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    app = web.Application()
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        answer = await send(f"https://127.0.0.1:{runner.addresses[0][1]}/v1", key="k" * 40)
    finally:
        await runner.cleanup()
    assert isinstance(answer, Failure)
    assert answer.reason == "tls"


async def test_a_plain_server_behind_https_is_a_tls_failure() -> None:
    async with serving() as server:
        answer = await send(server.url.replace("http:", "https:"))
    assert isinstance(answer, Failure)
    assert answer.reason == "tls"
    assert not server.seen


def test_a_bomb_is_never_unpacked_whole() -> None:
    bomb = gzip.compress(bytes(300 * 2**20), 9)
    assert len(bomb) < 2**20
    tracemalloc.start()
    answer = inflated(bomb, "gzip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(answer, Failure)
    assert answer.reason == "body_too_large"
    assert peak < 3 * MAX_BODY_BYTES


async def test_the_limits_of_the_last_response_are_at_hand() -> None:
    async def script(body: dict, before: int) -> web.Response | None:
        headers = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": str(59 - before)}
        return web.Response(body=OK, headers=headers) if before < 2 else error(429, "slow", **{"retry-after": "3"})

    async with serving(script) as server:
        one = teacher(server.url)
        assert one.rate_limits is None
        await one.send(ask())
        assert one.rate_limits == RateLimits(Window(60, 59, None), Window())
        await one.send(ask())
        busy = await one.send(ask())
        await one.close()
    assert one.rate_limits == RateLimits(Window(60, 58, None), Window())  # a response without limits tells nothing new
    assert isinstance(busy, Failure)
    assert (busy.reason, busy.status, busy.retry_after) == ("rate_limited", 429, 3.0)


async def test_an_n_that_is_refused_is_told_apart_from_other_bad_requests() -> None:
    async def script(body: dict, before: int) -> web.Response:
        return error(400, "Invalid n value (currently only n = 1 is supported)")

    async with serving(script) as server:
        several, one = await send(server.url, ask(n=4)), await send(server.url, ask())
    assert [a.reason for a in (several, one) if isinstance(a, Failure)] == ["unsupported_n", "bad_request"]


# -- who answered --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "echoed", "same"),
    [
        ("gpt-4o", "gpt-4o", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "GPT-4o-2024-08-06", True),
        ("claude-sonnet-4-0", "claude-sonnet-4-20250514", True),
        ("claude-3-5-sonnet-latest", "claude-3-5-sonnet-20241022", True),
        ("mistral-small-latest", "mistral-small-2409", True),
        ("command-r", "command-r-08-2024", True),
        ("gemini-2.5-pro", "models/gemini-2.5-pro-preview-05-06", True),
        ("llama3.2", "llama3.2:latest", True),
        ("openai/gpt-4o", "gpt-4o-2024-08-06", True),
        ("org/model", "org/model", True),
        ("gpt-4o-2024-08-06", "gpt-4o", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o-mini", "gpt-4o", False),
        ("gpt-4", "gpt-4-turbo-2024-04-09", False),
        ("gpt-4o-2024-08-06", "gpt-4o-2024-05-13", False),
        ("gpt-4-1106-preview", "gpt-4-0613", False),
        ("org/model", "other/model", False),
        ("llama-3.1-70b", "llama-3.1-8b", False),
        ("claude-opus-4-1", "claude-opus-4-20250514", False),
    ],
)
def test_an_alias_may_become_a_snapshot_but_never_another_model(asked: str, echoed: str, same: bool) -> None:
    assert same_model(asked, echoed) is same


@pytest.mark.parametrize(
    ("known", "reason"), [({}, "wrong_model"), ({"echoes": ["other"]}, None), ({"echoes": ["third"]}, "wrong_model")]
)
def test_another_name_is_accepted_only_where_the_recipe_says_so(known: Any, reason: str | None) -> None:
    body = json.dumps(chat({"model": "other", "messages": HI})).encode()
    outcome = teacher("http://127.0.0.1:9/v1", **known).read(ask(), body)
    assert (outcome.reason if isinstance(outcome, Failure) else None) == reason
    if isinstance(outcome, Failure):
        assert "capabilities: {echoes: [other]}" in outcome.detail


# -- what is honoured ----------------------------------------------------------------------------------------------------


def test_the_table_knows_hosts_and_their_domains_and_claims_nothing_of_others() -> None:
    assert of_host("api.openai.com").limit == "max_completion_tokens"
    assert of_host("mine.openai.azure.com") == of_host("openai.azure.com")
    assert of_host("api.deepseek.com").n is False
    assert of_host("api.openai.com.evil.example") == of_host("127.0.0.1") == Capabilities()


def test_the_recipe_has_the_last_word_and_a_seed_that_was_only_found_is_not_used(tmp_path: Path) -> None:
    entry = OpenAI(model="m", base_url="http://127.0.0.1:9/v1")
    found = {"n": False, "seed": True, "limit": "max_completion_tokens", "structured": ["json_object"]}
    (tmp_path / FILE).write_text(json.dumps({entry.identity(tmp_path): {"capabilities": found}}))
    assert entry.abilities(tmp_path) == Capabilities(n=False, limit="max_completion_tokens", structured=["json_object"])
    mine = entry.model_copy(update={"capabilities": Capabilities(n=True, seed=True)})
    assert mine.abilities(tmp_path) == Capabilities(
        n=True, seed=True, limit="max_completion_tokens", structured=["json_object"]
    )
    (tmp_path / FILE).write_text("{")
    with pytest.raises(RecipeError, match="delete it"):
        entry.abilities(tmp_path)


def test_an_unknown_capability_is_an_error() -> None:
    with pytest.raises(ValidationError, match="steam"):
        OpenAI(model="m", capabilities={"steam": True})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sampling", "known", "why"),
    [
        ({"beam": Beam(width=2)}, {"beam": False}, "beam search"),
        ({"response_format": {"type": "json_object"}}, {"structured": []}, "json_object"),
        ({"response_format": {"type": "json_schema"}}, {"structured": ["json_object"]}, "json_schema"),
        ({"top_k": 5}, {"keys": ["top_p"]}, "top_k"),
        ({"beam": Beam(width=2), "top_k": 5, "response_format": {"type": "json_object"}}, {}, None),
        ({"top_p": 0.5}, {"keys": ["top_p"]}, None),
    ],
)
async def test_what_an_endpoint_surely_does_not_do_is_never_sent(sampling: Any, known: Any, why: str | None) -> None:
    async with serving() as server:
        answer = await send(server.url, ask(**sampling), **known)
    if why is None:
        assert isinstance(answer, bytes)
    else:
        assert isinstance(answer, Failure)
        assert (answer.reason, why in answer.detail, not server.seen) == ("unsupported_parameter", True, True)


@pytest.mark.parametrize("key", ["", "  ", "two words", "line\nbreak", "k\u00e9y"])
def test_a_key_that_cannot_be_one_is_named_by_its_variable_only(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(AuthError, match="TEST_KEY") as raised:
        OpenAI(model="m", api_key_env="TEST_KEY").key()
    assert not key.strip() or key not in str(raised.value)


def test_a_reply_of_a_seeded_local_model_still_reads() -> None:
    body = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop", "logprob": -1.5, "tokens": 3}]}
    outcome = teacher("http://127.0.0.1:9/v1").read(ask(), json.dumps(body).encode())
    assert isinstance(outcome, Reply)
    assert (outcome.choices[0].logprob, outcome.choices[0].tokens) == (-1.5, 3)


async def test_many_requests_at_once_share_one_session() -> None:
    async with serving() as server:
        one = teacher(server.url)
        answers = await asyncio.gather(*(one.send(ask()) for _ in range(50)))
        await one.close()
    assert all(isinstance(answer, bytes) for answer in answers)
