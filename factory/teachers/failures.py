"""Why a request brought no answer, and what then: the one classifier of failures, and the one table of actions.

The reason of a failure decides everything that follows; `ask.py` reads it off `RULES`. Codes that a provider gives come
before its words, and both come before the status: a spend cap may be a 429, a wrong key a 400, an overload a 200.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from factory.errors import AuthError, BudgetError, FactoryError, IdentityError, OutageError, RecipeError
from factory.rows import Failure, Reason
from factory.teachers.rate_limits import MAX_WAIT_S, clamp, told_wait

Action = Literal["retry", "wait", "adapt", "set aside", "stop"]
"""What follows a failure.

| action | what is done |
|---|---|
| retry | the same is sent again after a growing pause, `limits.max_attempts` times at most, then set aside |
| wait | the whole teacher pauses and then has fewer requests in flight; this was no attempt |
| adapt | the same is asked in another way: each draw by a request of its own |
| set aside | this request ends here, with its reason; the others go on |
| stop | the run ends with `error`, and can be resumed |
"""


class Rule(NamedTuple):
    """`tries`: sends at most, where that is less than `max_attempts`. `billed`: it may have cost money.

    `error` of an action that does not stop ends the run all the same while the model has never answered anything:
    then it is not this row that is wrong.
    """

    action: Action
    tries: int | None = None
    error: type[FactoryError] | None = None
    billed: bool = False


RULES: dict[Reason, Rule] = {
    # nothing will get better by itself
    "auth": Rule("stop", error=AuthError),
    "tls": Rule("stop", error=AuthError),
    "quota": Rule("stop", error=BudgetError),
    "budget": Rule("stop", error=BudgetError),
    "model_not_found": Rule("stop", error=IdentityError),
    "wrong_model": Rule("stop", error=IdentityError, billed=True),
    "unsupported_parameter": Rule("stop", error=RecipeError),
    # the server is busy, or counts our requests
    "rate_limited": Rule("wait"),
    "overloaded": Rule("wait"),
    # it may work the next time
    "outage": Rule("retry", error=OutageError),
    "timeout": Rule("retry", billed=True),
    "gateway_timeout": Rule("retry", billed=True),
    "transport": Rule("retry", billed=True),
    "server_error": Rule("retry", billed=True),
    "engine_died": Rule("retry", tries=2),
    "not_answered": Rule("retry"),
    "conflict": Rule("retry"),
    "misread_request": Rule("retry"),
    "html_page": Rule("retry", error=OutageError),
    "bad_json": Rule("retry", billed=True),
    "missing_choice": Rule("retry", billed=True),
    "empty": Rule("retry", tries=2, billed=True),
    # the same request in another way
    "unsupported_n": Rule("adapt"),
    # this request has no answer; it is never data
    "forbidden": Rule("set aside", error=AuthError),
    "redirect": Rule("set aside", error=RecipeError),
    "bad_request": Rule("set aside"),
    "context_overflow": Rule("set aside"),
    "too_large": Rule("set aside"),
    "refused_input": Rule("set aside"),
    "no_stored_answer": Rule("set aside"),
    "body_too_large": Rule("set aside", billed=True),
    "unsafe_json": Rule("set aside", billed=True),
    "bad_encoding": Rule("set aside", billed=True),
    "filtered_output": Rule("set aside", billed=True),
    "refused": Rule("set aside", billed=True),
    "tool_calls": Rule("set aside", billed=True),
    "reasoning_only": Rule("set aside", billed=True),
    "reasoning_unclosed": Rule("set aside", billed=True),
    "special_tokens": Rule("set aside", billed=True),
}


ACTIONS: dict[Reason, Action] = {reason: rule.action for reason, rule in RULES.items()}
STOPS = {reason: rule.error for reason, rule in RULES.items() if rule.action == "stop" and rule.error}
MAYBE_BILLED = {reason for reason, rule in RULES.items() if rule.billed}


def for_good(failure: Failure) -> bool:
    """Whether a body that says so was paid for, and would be no answer the next time either."""
    rule = RULES[failure.reason]
    return rule.billed and rule.action == "set aside"


def ending(failure: Failure, answered: bool) -> type[FactoryError] | None:
    """The error that ends the run for a failure that is left after its tries; None: only its request ends.

    `answered` is whether the model has ever answered anything.
    """
    rule = RULES[failure.reason]
    return rule.error if rule.action == "stop" or not answered else None


# -- the classifier ----------------------------------------------------------------------------------------------------


class _Sign(NamedTuple):
    """`reason`, if the status is one of these and one of the codes or the words match. Status 0: inside a 200."""

    reason: Reason
    statuses: frozenset[int]
    codes: re.Pattern[str]
    words: re.Pattern[str]


_NEVER = r"(?!)"


def _sign(reason: Reason, statuses: tuple[int, ...], codes: str = _NEVER, words: str = _NEVER) -> _Sign:
    return _Sign(reason, frozenset({0, *statuses}), re.compile(codes, re.M), re.compile(words))


_REFUSALS = (400, 403, 413, 422)
_SIGNS = (
    # Gemini says "exceeded your current quota" for every limit: only its quotaId tells a day from a minute
    _sign("quota", (429,), r"perday", r"\blimit: 0\b"),
    _sign("rate_limited", (429,), r"^resource_exhausted$"),
    _sign(
        "quota", (400, 401, 402, 403, 429),
        r"insufficient_(quota|credits?|balance|funds)|billing_(hard_limit|not_active|error)|enforced_spend_limit"
        r"|exceeded_current_quota|credit_balance|payment_required|^arrearage$|^1113$",
    ),
    _sign(
        "quota", (402, 403, 412, 429), words=r"spend(ing)?.?(limit|cap)|exceeded your current quota|credit balance"
        r"|usage credits|(insufficient|out of|not enough|no( more)?) (credits?|balance|funds|quota)"
        r"|balance is (insufficient|too low)|(key|credit) limit exceeded|monthly limit|(calls|requests) ?(/|per|a) ?month",
    ),
    # a 400 may quote the prompt: there the words count only where they begin the message
    _sign("quota", (400,), words=r"^(your credit balance|you have reached your specified)"),
    _sign("too_large", (429,), words=r"^request too large"),
    _sign("rate_limited", (429,), r"^(rate_limit|too_many_requests)"),
    _sign("overloaded", (500,), r"overloaded|^unavailable$"),
    _sign("auth", (400, 403), r"^(invalid_api_key|api_key_invalid|authentication_error|invalid_authentication)"),
    _sign(
        "model_not_found", (400,), r"model_not_(found|exist|active)|^invalid_model|^not_found_error",
        r"^[^.]{0,120}(not a valid model|model.{0,80}does not exist)",
    ),
    _sign(
        "context_overflow", (*_REFUSALS, 500), r"context_(length|window)|string_above_max_length",
        r"context.?(length|window|size)|maximum context|prompt is too long|too many (input )?tokens"
        r"|input is too long|reduce the length",
    ),
    _sign(
        "refused_input", _REFUSALS, r"content_(filter|policy)|responsibleaipolicy|moderation|inspection_failed|^safety",
        r"content.?(filter|policy|management)|moderation|safety (system|policy|reasons)|usage polic|was flagged",
    ),
    _sign(
        "unsupported_n", _REFUSALS, r"^param:n$",
        r"['\"`]n['\"`]|\binvalid n\b|\bn (must|should|value|=|>)|parameter:? n\b",
    ),
    _sign(
        "unsupported_parameter", _REFUSALS,
        r"unsupported_(parameter|value)|unknown_parameter|extra_forbidden|unrecognized_request_argument",
        r"unsupported (parameter|value)|unrecognized (request )?argument|unknown (name|field|parameter)"
        r"|extra inputs are not permitted|max_(completion_)?tokens.{0,60}(too large|at most)",
    ),
    _sign("misread_request", _REFUSALS, words=r"parse the json|(malformed|invalid) json|json parse error|not valid json"),
    _sign("too_large", _REFUSALS, r"request_too_large"),
)  # fmt: skip
_BY_STATUS: dict[int, Reason] = {
    0: "server_error", 401: "auth", 402: "quota", 403: "forbidden", 404: "model_not_found", 407: "auth", 408: "timeout",
    409: "conflict", 410: "model_not_found", 413: "too_large", 425: "server_error", 429: "rate_limited",
    503: "overloaded", 504: "gateway_timeout", 524: "gateway_timeout", 529: "overloaded",
}  # fmt: skip
_BY_CLASS: dict[int, Reason] = {2: "missing_choice", 3: "redirect", 4: "bad_request"}
_A_DAY = re.compile(r"per.?day|\b[rt]pd\b|daily")
_CODE_KEYS = ("code", "type", "status", "reason", "error_code", "quotaId")


def classify(status: int, headers: Mapping[str, str], raw: bytes) -> Failure:
    """An answer that is none as a `Failure`; `status` 0 stands for an error inside a 200."""
    error, text = _told(raw)
    codes = list(_codes(error))
    if status == 0:
        status = next((int(code) for code in codes if code.isdecimal() and 400 <= int(code) < 600), 0)
    wait = told_wait(headers, error, text)
    reason = _reason(status, "\n".join(codes).lower(), text.lower())
    if reason == "rate_limited" and _A_DAY.search(text.lower()) and (wait is None or wait > MAX_WAIT_S):
        reason = "quota"  # nobody waits until tomorrow in silence
    where = f"HTTP {status}" if status else "an error in the body"
    if 300 <= status < 400:
        text = (
            f"redirects to {headers.get('location', '?').split('?')[0]}; redirects are not followed: correct base_url"
        )
    return Failure(
        reason=reason,
        detail=f"{where}: {text[:500]}",
        status=status or None,
        retry_after=None if wait is None else clamp(wait),
    )


def _reason(status: int, codes: str, words: str) -> Reason:
    for sign in _SIGNS:
        if status in sign.statuses and (sign.codes.search(codes) or sign.words.search(words)):
            return sign.reason
    return _BY_STATUS.get(status) or _BY_CLASS.get(status // 100, "server_error")


def _told(raw: bytes) -> tuple[Any, str]:
    """The error object of a body and its message; of a body that is no JSON, its beginning."""
    beginning = raw[:2000].decode("utf-8", "replace")
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, beginning
    if isinstance(data, list) and data:  # Gemini wraps its error in a list
        data = data[0]
    if not isinstance(data, dict):
        return None, beginning
    error = next((data[name] for name in ("error", "detail", "errors") if data.get(name)), data)
    message = error.get("message") if isinstance(error, dict) else error
    return error, message if isinstance(message, str) else beginning


def _codes(error: Any, depth: int = 0) -> Iterator[str]:
    """Every code in an error object: providers nest them at different depths."""
    if isinstance(error, list) and depth < 6:
        for item in error[:20]:
            yield from _codes(item, depth + 1)
    elif isinstance(error, dict) and depth < 6:
        for name, value in error.items():
            if name in _CODE_KEYS and isinstance(value, str | int):
                yield str(value)
            elif name == "param" and isinstance(value, str):
                yield f"param:{value}"
            elif isinstance(value, dict | list):
                yield from _codes(value, depth + 1)
