"""Anthropic's native messages API against a real server that speaks it: the request, the answer, the whole line."""

import json
from pathlib import Path
from typing import Any

import pytest

from factory.ask import Desk, Model
from factory.budget import Budget, Wall
from factory.errors import AuthError, BudgetError
from factory.generate import Generate
from factory.journal import Journal
from factory.rows import Beam, Choice, Failure, Outcome, Reply, Request, Sampling, Usage
from factory.teachers.anthropic import Anthropic, message_body, read_message
from factory.teachers.rate_limits import Window
from tests.server import Script, Server, error, message, serving

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
KEY = "sk-ant-canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


def ask(messages: Any = SYSTEM, **sampling: Any) -> Request:
    return Request(identity="i", messages=messages, sampling=Sampling(**sampling))


def entry(url: str, **fields: Any) -> Anthropic:
    return Anthropic.model_validate({"model": "claude-sonnet-4-5", "base_url": url, **fields})


async def answered(script: Script | None = None, **sampling: Any) -> tuple[Server, Outcome]:
    """One request to a server with this script, sent and read."""
    async with serving(script) as server:
        teacher = entry(server.url).open(Path())
        body = await teacher.send(ask(**sampling))
        await teacher.close()
        return server, body if isinstance(body, Failure) else teacher.read(ask(), body)


def test_a_request_has_the_native_shape_and_no_defaults() -> None:
    assert message_body("m", ask()) == {
        "model": "m", "system": "Be brief.", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1024,
    }  # fmt: skip
    sent = message_body("m", ask(temperature=0.0, top_p=0.5, top_k=4, stop=["x"], max_tokens=9))
    assert sent["temperature"] == 0.0
    assert (sent["top_p"], sent["top_k"], sent["stop_sequences"], sent["max_tokens"]) == (0.5, 4, ["x"], 9)


def test_several_system_messages_become_one_field_and_turns_keep_their_order() -> None:
    turns = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "3"},
    ]
    sent = message_body("m", ask(turns))
    assert sent["system"] == "a\n\nb"
    assert [m["content"] for m in sent["messages"]] == ["1", "2", "3"]
    assert "system" not in message_body("m", ask([{"role": "user", "content": "hi"}]))


def test_a_json_schema_is_sent_as_the_api_knows_it() -> None:
    knobs = Generate.model_validate({"model": "m", "response_format": {"type": "object", "properties": {}}})
    sent = message_body("m", ask(response_format=knobs.sampling().response_format))
    assert sent["output_config"] == {"format": {"type": "json_schema", "schema": {"type": "object", "properties": {}}}}


async def test_the_key_goes_in_its_own_header_and_the_answer_comes_back() -> None:
    server, reply = await answered()
    assert isinstance(reply, Reply)
    assert (server.headers[0]["x-api-key"], server.headers[0]["anthropic-version"]) == (KEY, "2023-06-01")
    assert "Authorization" not in server.headers[0]
    assert reply.choices == [Choice(text="answer to hi", finish="stop", tokens=5)]
    # tokens read from the cache and put into it are prompt tokens too
    assert reply.usage == Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=2)
    assert reply.model == "claude-sonnet-4-5"
    assert reply.counted


TEXT = {"type": "text", "text": "so"}
THOUGHT = {"type": "thinking", "thinking": "why", "signature": "x"}


@pytest.mark.parametrize(
    ("content", "stop", "text", "reasoning", "finish"),
    [
        ([TEXT], "end_turn", "so", None, "stop"),
        ([TEXT], "stop_sequence", "so", None, "stop"),
        ([TEXT], "max_tokens", "so", None, "length"),
        ([TEXT], "model_context_window_exceeded", "so", None, "length"),
        ([TEXT], "pause_turn", "so", None, "pause_turn"),
        ([TEXT], None, "so", None, "unknown"),
        ([TEXT, TEXT], "end_turn", "soso", None, "stop"),
        ([THOUGHT, TEXT], "end_turn", "so", "why", "stop"),
        ([{"type": "redacted_thinking", "data": "x"}, TEXT], "end_turn", "so", None, "stop"),
        ([THOUGHT, THOUGHT, TEXT], "end_turn", "so", "why\nwhy", "stop"),
    ],
)  # fmt: skip
def test_content_blocks_and_stop_reasons(content: Any, stop: Any, text: str, reasoning: Any, finish: str) -> None:
    body = {"model": "m", "messages": [{"content": "hi"}]}
    outcome = read_message(json.dumps(message(body, *content, stop=stop)).encode(), "m")
    assert isinstance(outcome, Reply), outcome
    choice = outcome.choices[0]
    assert (choice.text, choice.reasoning, choice.finish) == (text, reasoning, finish)


@pytest.mark.parametrize(
    ("content", "fields", "reason"),
    [
        ([TEXT], {"stop": "refusal", "stop_details": {"category": "bio"}}, "refused"),
        ([{"type": "tool_use", "name": "f", "input": {}}], {"stop": "tool_use"}, "tool_calls"),
        ([TEXT, {"type": "tool_use", "name": "f", "input": {}}], {}, "tool_calls"),
        ([THOUGHT], {"stop": "max_tokens"}, "reasoning_only"),
        ([{"type": "text", "text": " "}], {}, "empty"),
        ([TEXT], {"content": []}, "empty"),
        ([TEXT], {"content": None}, "missing_choice"),
        ([TEXT], {"model": "claude-opus-4-5"}, "wrong_model"),
        ([TEXT], {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, "overloaded"),
        ([{"type": "text", "text": "x<|im_end|>"}], {}, "special_tokens"),
    ],
)  # fmt: skip
def test_what_is_no_answer_has_its_reason(content: Any, fields: Any, reason: str) -> None:
    body = {"model": "claude-sonnet-4-5", "messages": [{"content": "hi"}]}
    outcome = read_message(json.dumps(message(body, *content, **fields)).encode(), "claude-sonnet-4-5")
    assert isinstance(outcome, Failure), outcome
    assert outcome.reason == reason


def test_an_alias_may_answer_as_its_snapshot() -> None:
    body = message({"model": "claude-sonnet-4-5-20250929", "messages": [{"content": "hi"}]})
    assert isinstance(read_message(json.dumps(body).encode(), "claude-sonnet-4-5"), Reply)


@pytest.mark.parametrize(
    ("status", "kind", "text", "reason"),
    [
        (400, "invalid_request_error", "prompt is too long: 2 tokens > 1 maximum", "context_overflow"),
        (401, "authentication_error", "invalid x-api-key", "auth"),
        (402, "billing_error", "pay", "quota"),
        (403, "permission_error", "no", "forbidden"),
        (404, "not_found_error", "model: x", "model_not_found"),
        (413, "request_too_large", "big", "too_large"),
        (429, "rate_limit_error", "Number of requests has exceeded your rate limit", "rate_limited"),
        (500, "api_error", "oops", "server_error"),
        (504, "timeout_error", "slow", "gateway_timeout"),
        (529, "overloaded_error", "Overloaded", "overloaded"),
    ],
)
async def test_the_errors_of_the_api(status: int, kind: str, text: str, reason: str) -> None:
    async def script(body: dict, before: int) -> Any:
        response = error(status, text)
        response.text = json.dumps({"type": "error", "error": {"type": kind, "message": text}, "request_id": "r"})
        return response

    _, outcome = await answered(script)
    assert isinstance(outcome, Failure)
    assert outcome.reason == reason


async def test_the_rate_limits_are_at_hand() -> None:
    async def script(body: dict, before: int) -> Any:
        return error(429, "slow", **{"retry-after": "2", "anthropic-ratelimit-requests-remaining": "0"})

    async with serving(script) as server:
        teacher = entry(server.url).open(Path())
        outcome = await teacher.send(ask())
        await teacher.close()
    assert isinstance(outcome, Failure)
    assert outcome.retry_after == 2
    assert teacher.rate_limits is not None
    assert teacher.rate_limits.requests == Window(None, 0, None)


@pytest.mark.parametrize(
    "sampling",
    [{"min_p": 0.1}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.5}, {"beam": Beam(width=2)}, {"response_format": {"type": "json_object"}}],
)  # fmt: skip
async def test_decoding_that_the_api_does_not_have_is_refused_and_not_ignored(sampling: Any) -> None:
    server, outcome = await answered(**sampling)
    assert isinstance(outcome, Failure)
    assert outcome.reason == "unsupported_parameter"
    assert not server.seen


def test_draws_are_separate_requests_and_no_seed_is_claimed() -> None:
    known = entry("http://127.0.0.1:9/v1").abilities(Path())
    assert (known.n, known.seed) == (False, False)


def test_identity_is_the_endpoint_and_the_model() -> None:
    one, two = entry("http://a.example/v1/"), entry("http://b.example/v1")
    assert one.identity(Path()) == "anthropic:http://a.example/v1:claude-sonnet-4-5"
    assert one.identity(Path()) != two.identity(Path())


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(AuthError, match="ANTHROPIC_API_KEY"):
        entry("http://127.0.0.1:9/v1").open(Path())


async def run(folder: Path, url: str) -> list[Any]:
    made = entry(url, price={"input": 3, "output": 15})
    model = Model("teacher", made, made.identity(folder), made.open(folder))
    asked = [Request(identity=model.identity, messages=[{"role": "user", "content": f"q{i}"}], sampling=Sampling()) for i in range(5)]  # fmt: skip
    with Journal(folder / "journal.sqlite") as journal:
        desk = Desk(journal, Wall(Budget(), journal.spent("run")), "run")
        try:
            tally = await desk.ask(model, asked, len(asked), "test")
        finally:
            await model.teacher.close()
        return [tally.sent, *(outcome[0] for _, outcome in desk.read(model, asked, tally))]


async def test_through_the_journal_answers_are_paid_for_once_and_read_back(tmp_path: Path) -> None:
    async with serving() as server:
        first, again = await run(tmp_path, server.url), await run(tmp_path, server.url)
    assert (first[0], again[0]) == (5, 0)
    assert first[1:] == again[1:]
    assert [choice.text for choice in first[1:]] == [f"answer to q{i}" for i in range(5)]


async def test_a_spend_cap_stops_the_run(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> Any:
        response = error(429, "")
        told = {"type": "rate_limit_error", "message": "cap", "details": {"error_code": "enforced_spend_limit_reached"}}
        response.text = json.dumps({"type": "error", "error": told})
        return response

    async with serving(script) as server:
        with pytest.raises(BudgetError, match="cap"):
            await run(tmp_path, server.url)
