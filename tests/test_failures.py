"""Every fault of the list has a reason from the closed vocabulary, and every reason has one action."""

import json
import typing
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from factory.errors import AuthError, BudgetError, IdentityError, OutageError, RecipeError
from factory.rows import Failure, Reason, Reply
from factory.teachers.failures import RULES, classify, ending
from factory.teachers.openai import read_chat
from factory.teachers.rate_limits import RateLimits, Window, read_rate_limits, retry_after

# What happens to each reason, written out once more: a changed table must be a decision
ACTIONS = {
    "stop": "auth tls quota budget model_not_found wrong_model unsupported_parameter",
    "wait": "rate_limited overloaded",
    "retry": "outage timeout gateway_timeout transport server_error engine_died not_answered conflict misread_request html_page "
    "bad_json missing_choice empty",
    "adapt": "unsupported_n",
    "set aside": "forbidden redirect bad_request context_overflow too_large refused_input no_stored_answer body_too_large "
    "unsafe_json bad_encoding filtered_output refused tool_calls reasoning_only reasoning_unclosed special_tokens",
}  # fmt: skip


def test_every_reason_has_exactly_one_action() -> None:
    assert set(RULES) == set(typing.get_args(Reason))
    assert {reason: rule.action for reason, rule in RULES.items()} == {
        reason: action for action, reasons in ACTIONS.items() for reason in reasons.split()
    }
    # limits.max_attempts holds for every one of them, but for an empty answer, paid for each time, and for a request at
    # which an engine died twice
    assert {r: rule.tries for r, rule in RULES.items() if rule.tries} == {"empty": 2, "engine_died": 2}


@pytest.mark.parametrize(
    ("reason", "never_answered", "answered"),
    [
        ("auth", AuthError, AuthError),
        ("tls", AuthError, AuthError),
        ("quota", BudgetError, BudgetError),
        ("wrong_model", IdentityError, IdentityError),
        ("model_not_found", IdentityError, IdentityError),
        ("unsupported_parameter", RecipeError, RecipeError),
        ("forbidden", AuthError, None),
        ("outage", OutageError, None),
        ("html_page", OutageError, None),
        ("redirect", RecipeError, None),
        ("server_error", None, None),
        ("bad_request", None, None),
    ],
)
def test_what_ends_the_run_and_what_ends_only_its_request(reason: Reason, never_answered: Any, answered: Any) -> None:
    failure = Failure(reason=reason)
    assert (ending(failure, answered=False), ending(failure, answered=True)) == (never_answered, answered)


def test_what_cannot_have_been_billed_gives_its_reservation_back() -> None:
    free = {reason for reason, rule in RULES.items() if not rule.billed}
    assert {"outage", "auth", "quota", "rate_limited", "overloaded", "too_large", "context_overflow", "tls"} <= free
    assert not free & {"timeout", "transport", "server_error", "gateway_timeout", "bad_json", "body_too_large"}


# -- 2.1: the status, the codes, the words -------------------------------------------------------------------------------


def err(message: str = "no", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


def gemini(quota_id: str, message: str = "You exceeded your current quota, please check your plan and billing") -> Any:
    violation = {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota_id}]}
    delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "45s"}
    return [err(message, code=429, status="RESOURCE_EXHAUSTED", details=[violation, delay])]


STATUS_TABLE: list[tuple[int, Any, Reason]] = [
    (400, err("This model's maximum context length is 8192 tokens", code="context_length_exceeded"), "context_overflow"),
    (400, err("prompt is too long: 210000 tokens > 200000 maximum"), "context_overflow"),
    (500, err("the request exceeds the available context size"), "context_overflow"),
    (400, err("The response was filtered", code="content_filter"), "refused_input"),
    (400, err("Your request was rejected as a result of our safety system"), "refused_input"),
    (403, err("input was flagged", type="moderation"), "refused_input"),
    (400, err("Unsupported parameter: 'max_tokens'", code="unsupported_parameter", param="max_tokens"), "unsupported_parameter"),
    (400, err("'temperature' does not support 0.7", code="unsupported_value", param="temperature"), "unsupported_parameter"),
    (400, err("min_p: Extra inputs are not permitted", type="invalid_request_error"), "unsupported_parameter"),
    (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra"}]}, "unsupported_parameter"),
    (400, err("max_tokens is too large: 99999"), "unsupported_parameter"),
    (400, err("Invalid n value (currently only n = 1 is supported)"), "unsupported_n"),
    (400, err("'n' : number must be at most 1"), "unsupported_n"),
    (400, err("not allowed", param="n"), "unsupported_n"),
    (400, err("We could not parse the JSON body of your request."), "misread_request"),
    (400, err("Your credit balance is too low to access the API", type="invalid_request_error"), "quota"),
    (400, err("You have reached your specified API usage limits. You will regain access on 2026-12-01"), "quota"),
    (400, err("You have reached your specified workspace API usage limits."), "quota"),
    (400, err("API key not valid", details=[{"reason": "API_KEY_INVALID"}]), "auth"),
    (400, err("gpt-x is not a valid model ID"), "model_not_found"),
    (400, err("no such thing"), "bad_request"),
    # a prompt that a 400 quotes must not stop a run
    (400, err("bad message: 'why does my invalid api key say insufficient credits, spend limit'"), "bad_request"),
    (401, err("Incorrect API key provided"), "auth"),
    (402, err("Insufficient credits"), "quota"),
    (403, err("not in your region"), "forbidden"),
    (403, err("account balance is insufficient"), "quota"),
    (403, err("Key limit exceeded (monthly limit)"), "quota"),
    (400, err("Access denied", code="Arrearage"), "quota"),
    (412, err("You have reached your monthly spending limit"), "quota"),
    (429, err("Credit limit exceeded"), "quota"),
    (429, err("1000 API calls / month are used up"), "quota"),
    (403, err("Insufficient balance"), "quota"),
    (404, err("The model `x` does not exist", code="model_not_found"), "model_not_found"),
    (404, "<html>not here</html>", "model_not_found"),
    (410, err("retired"), "model_not_found"),
    (405, err(), "bad_request"),
    (407, "proxy", "auth"),
    (408, err(), "timeout"),
    (409, err(type="conflict_error"), "conflict"),
    (413, err(type="request_too_large"), "too_large"),
    (415, err(), "bad_request"),
    (422, err("content must not be empty"), "bad_request"),
    (418, "teapot", "bad_request"),
    (425, err(), "server_error"),
    (429, err("Rate limit reached for requests", code="rate_limit_exceeded"), "rate_limited"),
    (429, err("Rate limit reached: add a payment method on the billing page", code="rate_limit_exceeded"), "rate_limited"),
    (429, err("Rate limit reached on tokens per min (TPM). Please try again in 1.2s.", type="tokens"), "rate_limited"),
    (429, err("Request too large for m on tokens per min (TPM): Limit 10000, Requested 12000"), "too_large"),
    (429, err("This request would exceed your account's rate limit", type="rate_limit_error"), "rate_limited"),
    (429, err("Too fast, slow your acceleration", type="rate_limit_error"), "rate_limited"),
    (429, "slow down", "rate_limited"),
    (429, err("Rate limit reached on requests per day (RPD). Please try again in 7m12s."), "rate_limited"),
    (429, err("Rate limit reached on requests per day (RPD). Please try again in 7h12m."), "quota"),
    (429, err("Daily limit reached"), "quota"),
    (429, err("You exceeded your current quota, check your plan", code="insufficient_quota"), "quota"),
    (429, err("You exceeded your current quota, please check your plan and billing details."), "quota"),
    (429, err("cap", type="rate_limit_error", details={"error_code": "enforced_spend_limit_reached"}), "quota"),
    (429, err("This request would exceed your account's monthly spend limit.", type="rate_limit_error"), "quota"),
    (429, gemini("GenerateRequestsPerMinutePerProjectPerModel-FreeTier"), "rate_limited"),
    (429, gemini("GenerateRequestsPerDayPerProjectPerModel-FreeTier"), "quota"),
    (429, gemini("x", "Quota exceeded for metric: free_tier_requests, limit: 0, model: m"), "quota"),
    (429, err("Resource has been exhausted (e.g. check quota).", status="RESOURCE_EXHAUSTED"), "rate_limited"),
    (500, err(), "server_error"),
    (502, "<html>bad gateway</html>", "server_error"),
    (503, err(), "overloaded"),
    (529, err(type="overloaded_error"), "overloaded"),
    (504, err(), "gateway_timeout"),
    (524, "a timeout occurred", "gateway_timeout"),
    (301, "", "redirect"),
    (307, "", "redirect"),
    (204, "", "missing_choice"),
    # an error inside a 200
    (0, err("overloaded", code=503), "overloaded"),
    (0, err("Provider returned error", code=429), "rate_limited"),
    (0, err("out of credits", code=402), "quota"),
    (0, err("something broke"), "server_error"),
    (0, err("busy", type="overloaded_error"), "overloaded"),
    (0, err("flagged", code="content_filter"), "refused_input"),
    (0, {"error": "just words"}, "server_error"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "reason"), STATUS_TABLE)
def test_a_status_with_its_body_has_one_reason(status: int, body: Any, reason: Reason) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    failure = classify(status, CIMultiDict(), raw)
    assert failure.reason == reason, failure


def test_the_detail_names_status_and_message_and_a_redirect_only_its_place() -> None:
    told = classify(400, CIMultiDict(), json.dumps(err("no such thing")).encode())
    assert (told.detail, told.status) == ("HTTP 400: no such thing", 400)
    moved = classify(302, CIMultiDict({"Location": "https://other.example/login?token=hidden"}), b"")
    assert "https://other.example/login;" in moved.detail
    assert "hidden" not in moved.detail


@settings(deadline=None)
@given(status=st.integers(0, 700), raw=st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["error", "code", "type", "message", "details", "reason", "param", "detail"]) | st.text(max_size=5), inner, max_size=4), max_leaves=20,
).map(lambda data: json.dumps(data).encode()))  # fmt: skip
def test_whatever_a_server_says_is_classified(status: int, raw: bytes) -> None:
    assert classify(status, CIMultiDict(), raw).reason in RULES


# -- Retry-After in all its forms ----------------------------------------------------------------------------------------

DATE = {"Date": "Wed, 21 Oct 2026 07:28:00 GMT"}
RETRY_INFO = {"details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "45.5s"}]}
WAITS: list[tuple[dict[str, str], Any, str, float | None]] = [
    ({}, None, "", None),
    ({"retry-after-ms": "1500"}, None, "", 1.5),
    ({"retry-after-ms": "1500", "retry-after": "9"}, None, "", 1.5),
    ({"retry-after-ms": "soon", "retry-after": "9"}, None, "", 9),
    ({"Retry-After": "7"}, None, "", 7),
    ({"Retry-After": "0.25"}, None, "", 0.25),
    ({"Retry-After": "0"}, None, "", 0),
    ({"Retry-After": "-5"}, None, "", 0),
    ({"Retry-After": "nan"}, None, "", None),
    ({"Retry-After": "inf"}, None, "", 3600),
    ({"Retry-After": "-inf"}, None, "", 0),
    ({"Retry-After": "1000000000"}, None, "", 3600),
    ({"Retry-After": "1e400"}, None, "", 3600),
    ({"Retry-After": "later"}, None, "", None),
    ({"Retry-After": ""}, None, "", None),
    # a date is relative to the server's own clock, however wrong that is
    ({**DATE, "Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT"}, None, "", 30),
    ({**DATE, "Retry-After": "Wed, 21 Oct 2026 07:27:30 GMT"}, None, "", 0),
    ({**DATE, "Retry-After": "Thu, 22 Oct 2026 07:28:00 GMT"}, None, "", 3600),
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, None, "", 0),
    ({"Retry-After": "nan", "x-ratelimit-reset-requests": "2s"}, None, "", 2),
    ({"x-ratelimit-reset-requests": "6m0s"}, None, "", 360),
    ({"x-ratelimit-reset-requests": "20ms"}, None, "", 0.02),
    ({"x-ratelimit-reset-tokens": "1h2m3.5s"}, None, "", 3600),
    ({"x-ratelimit-reset-tokens": "12"}, None, "", 12),
    ({**DATE, "x-ratelimit-reset-requests": "1792567740"}, None, "", 60),
    ({**DATE, "x-ratelimit-reset": "1792567740000"}, None, "", 60),
    ({**DATE, "anthropic-ratelimit-requests-reset": "2026-10-21T07:28:20Z"}, None, "", 20),
    # the window that is used up counts, not the one that is whole again first
    (
        {"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-tokens": "40s", "x-ratelimit-remaining-tokens": "0"},
        None, "", 40,
    ),
    (
        {"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-tokens": "40s", "x-ratelimit-remaining-tokens": "0"},
        None, "", 40,
    ),
    ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "40s"}, None, "", 1),
    ({}, RETRY_INFO, "", 45.5),
    ({}, {"details": [{"retryDelay": {"seconds": 3}}]}, "", 3),
    ({}, {"retry_after": 4}, "", 4),
    ({}, None, "Please try again in 1.2s. Visit ...", 1.2),
    ({}, None, "Please try again in 6m0s.", 360),
    ({}, None, "Please retry after 26 seconds.", 26),
    ({}, None, "Please retry in 45.578569677s.", 45.578569677),
    ({}, None, "try again in 350ms", 0.35),
    ({}, None, "try again in a moment", None),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "error", "text", "seconds"), WAITS)
def test_every_form_of_retry_after(headers: dict[str, str], error: Any, text: str, seconds: float | None) -> None:
    told = retry_after(CIMultiDict(headers), error, text)
    assert told == (None if seconds is None else pytest.approx(seconds))


def test_a_wait_in_the_body_or_its_words_reaches_the_failure() -> None:
    assert classify(429, CIMultiDict(), json.dumps(gemini("PerMinute")).encode()).retry_after == 45
    assert classify(429, CIMultiDict(), json.dumps(err("Please try again in 1.2s")).encode()).retry_after == 1.2


@settings(deadline=None)
@given(value=st.text(max_size=30) | st.floats().map(str) | st.integers().map(str), name=st.sampled_from(
    ["retry-after", "retry-after-ms", "x-ratelimit-reset-requests", "x-ratelimit-reset", "date", "x-ratelimit-remaining-tokens"]
))  # fmt: skip
def test_no_header_can_make_a_wait_that_is_none(value: str, name: str) -> None:
    headers = CIMultiDict({"retry-after": "1 ", name: value})
    told = retry_after(headers, {"retry_after": value}, f"try again in {value}")
    assert told is None or 0 <= told <= 3600


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({}, None),
        (
            {"x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499", "x-ratelimit-reset-requests": "120ms",
             "x-ratelimit-limit-tokens": "30000", "x-ratelimit-remaining-tokens": "29000", "x-ratelimit-reset-tokens": "2s"},
            RateLimits(Window(500, 499, 0.12), Window(30000, 29000, 2.0)),
        ),
        (
            {**DATE, "anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "0",
             "anthropic-ratelimit-requests-reset": "2026-10-21T07:28:30Z", "anthropic-ratelimit-tokens-limit": "40000"},
            RateLimits(Window(50, 0, 30.0), Window(40000, None, None)),
        ),
        ({"X-RateLimit-Limit": "10", "X-RateLimit-Remaining": "x"}, RateLimits(Window(10, None, None), Window())),
    ],
)  # fmt: skip
def test_the_limits_in_the_headers(headers: Mapping[str, str], told: RateLimits | None) -> None:
    assert read_rate_limits(CIMultiDict(headers)) == told


# -- 2.3: the body ---------------------------------------------------------------------------------------------------------


def body(content: Any = "fine", finish: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"model": "m", "choices": [{"message": {"content": content, **message}, "finish_reason": finish}]}


BODY_TABLE: list[tuple[Any, Reason]] = [
    ("", "bad_json"),
    ("{not json", "bad_json"),
    ('{"choices": [{"message": {"content": "cut', "bad_json"),
    ("data: {}\n\n", "bad_json"),
    ("[1, 2]", "bad_json"),
    ('"text"', "bad_json"),
    ("9" * 5000, "bad_json"),
    ("<!doctype html><html>Log in to the hotel's network</html>", "html_page"),
    ('{"choices": NaN}', "unsafe_json"),
    ('{"choices": [], "x": -Infinity}', "unsafe_json"),
    ('{"choices": [{"message": {"content": "a", "content": "b"}, "finish_reason": "stop"}]}', "unsafe_json"),
    ("[" * 100_000, "unsafe_json"),
    ('{"a":' * 50_000, "unsafe_json"),
    (b'{"choices": [{"message": {"content": "\xff"}}]}', "bad_encoding"),
    (b'{"choices": [{"message": {"content": "\xed\xa0\x80"}}]}', "bad_encoding"),
    ('{"choices": [{"message": {"content": "\\ud83d"}, "finish_reason": "stop"}]}', "bad_encoding"),
    ("{}", "missing_choice"),
    ({"choices": []}, "missing_choice"),
    ({"choices": None}, "missing_choice"),
    ({"choices": ["text"]}, "missing_choice"),
    (err("overloaded", code=503), "overloaded"),
    ([err("quota", status="RESOURCE_EXHAUSTED")], "rate_limited"),
    ({"choices": [{"error": {"code": 502, "message": "upstream"}, "message": {"content": ""}}]}, "server_error"),
    (body(None), "empty"),
    (body(""), "empty"),
    (body("  \n "), "empty"),
    (body(None, tool_calls=[{"id": "1"}]), "tool_calls"),
    (body("text", "tool_calls"), "tool_calls"),
    (body(None, function_call={"name": "f"}), "tool_calls"),
    (body("x", "content_filter"), "filtered_output"),
    (body(None, refusal="I cannot"), "refused"),
    (body(None, reasoning="hm"), "reasoning_only"),
    (body("", "length", reasoning_content="hm"), "reasoning_only"),
    (body("<think>hm", "length"), "reasoning_only"),
    (body("<think>hm", "stop"), "reasoning_unclosed"),
    (body("the end<|im_end|>"), "special_tokens"),
    (body("<|start_header_id|>user"), "special_tokens"),
    (body("[INST] next question"), "special_tokens"),
    (body("done</s>"), "special_tokens"),
    (body("<unused94>thought why<unused95>so"), "special_tokens"),
    (body("<\uff5cend\u2581of\u2581sentence\uff5c>"), "special_tokens"),
    ({"choices": [{"message": "no object", "finish_reason": "stop"}]}, "empty"),
    ({"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}, "empty"),
    ({**body(), "model": "another"}, "wrong_model"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "reason"), BODY_TABLE)
def test_a_200_that_is_no_answer_has_one_reason(sent: Any, reason: Reason) -> None:
    raw = sent if isinstance(sent, bytes) else sent.encode() if isinstance(sent, str) else json.dumps(sent).encode()
    outcome = read_chat(raw, 1, "m")
    assert isinstance(outcome, Failure), outcome
    assert outcome.reason == reason, outcome


@pytest.mark.parametrize(
    "text",
    ["a\x00b", "an emoji \U0001f600", "x <| y |> z", "<s>old</s> price", "array[INSTANCE]", "\u202eabc", "<|>", "use `</think>` here"],
)  # fmt: skip
def test_odd_texts_that_are_answers_stay_as_they_are(text: str) -> None:
    outcome = read_chat(json.dumps(body(text)).encode(), 1, "m")
    assert isinstance(outcome, Reply), outcome
    assert outcome.choices[0].text == text


@pytest.mark.parametrize(
    ("finish", "kept"),
    [("stop", "stop"), ("eos", "stop"), ("length", "length"), (None, "unknown"), ("", "unknown"), (7, "unknown"),
     ("repetition", "repetition"), ("insufficient_system_resource", "insufficient_system_resource"), ("STOP", "stop"),
     ("MAX_TOKENS", "length"), ("model_length", "length"), ("end_turn", "stop")],
)  # fmt: skip
def test_only_a_known_word_counts_as_an_answer_that_ended_by_itself(finish: Any, kept: str) -> None:
    outcome = read_chat(json.dumps(body("x", finish)).encode())
    assert isinstance(outcome, Reply)
    assert outcome.choices[0].finish == kept


def test_a_truncated_answer_without_text_is_kept_as_truncated() -> None:
    outcome = read_chat(json.dumps(body("", "length")).encode())
    assert isinstance(outcome, Reply)
    assert (outcome.choices[0].text, outcome.choices[0].finish) == ("", "length")


def choices(*texts: str | None) -> bytes:
    made = [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]
    return json.dumps({"choices": made, "usage": {"prompt_tokens": 3, "completion_tokens": 9}}).encode()


def test_of_more_than_n_choices_the_first_n_count_and_of_fewer_all() -> None:
    many, few, bad = (
        read_chat(choices("a", "b", "c"), 2),
        read_chat(choices("a", "b"), 4),
        read_chat(choices("a", "", "c"), 3),
    )
    assert isinstance(many, Reply)
    assert isinstance(few, Reply)
    assert isinstance(bad, Reply)
    assert [[c.text for c in reply.choices] for reply in (many, few, bad)] == [["a", "b"], ["a", "b"], ["a", "c"]]
    assert [f.reason for f in bad.failed] == ["empty"]
    assert not few.failed
    one = read_chat(choices("a", ""), 2)
    assert isinstance(one, Reply)
    assert one.choices[0].tokens is None  # nine tokens of two choices tell nothing about one of them


@pytest.mark.parametrize(
    ("usage", "counted", "tokens"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 9}, True, 9),
        ({}, False, 0),
        (None, False, 0),
        ("many", False, 0),
        ({"prompt_tokens": 3}, False, 0),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, False, 0),
        ({"prompt_tokens": 3, "completion_tokens": -9}, False, 0),
        ({"prompt_tokens": 3, "completion_tokens": 1e300}, False, 0),
    ],
)
def test_usage_that_was_not_told_is_not_taken_for_nothing(usage: Any, counted: bool, tokens: int) -> None:
    outcome = read_chat(json.dumps({**body("x"), "usage": usage}).encode())
    assert isinstance(outcome, Reply)
    assert (outcome.counted, outcome.usage.completion_tokens) == (counted, tokens)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "message",
                    "content",
                    "finish_reason",
                    "usage",
                    "logprobs",
                    "logprob",
                    "tokens",
                    "reasoning",
                    "error",
                    "model",
                    "text",
                    "type",
                    "thinking",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=30,
)


@settings(deadline=None)
@given(data=JSON | st.fixed_dictionaries({"choices": st.lists(JSON, max_size=3)}), n=st.integers(1, 3))
def test_no_body_breaks_the_reader(data: Any, n: int) -> None:
    outcome = read_chat(json.dumps(data).encode(), n, "m")
    assert isinstance(outcome, Failure) or 1 <= len(outcome.choices) <= n


@settings(deadline=None)
@given(raw=st.binary(max_size=200))
def test_no_bytes_break_the_reader(raw: bytes) -> None:
    assert isinstance(read_chat(raw), Failure)
