"""How fast a server lets us go: the rate limits in its headers, and how long it asks us to wait.

Providers agree on nothing here, so every form that is known to exist is read, and whatever cannot be read says nothing.
All times are seconds from now. A date is taken relative to the response's own `Date`: our clock may be wrong.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

MAX_WAIT_S = 3600.0
EPOCH_FROM = 1e9
"""A bare number from here on is a moment (seconds since 1970), not a duration of thirty years."""

EPOCH_MS_FROM = 1e12

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ONE = r"\d+(?:\.\d+)?\s*(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|h|days?|d)(?![a-z])"
_DURATION = re.compile(rf"(?:{_ONE}\s*)+", re.I)
_PARTS = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.I)
_IN_TEXT = re.compile(rf"(?:try again|retry)\s+(?:in|after)\s+({_DURATION.pattern})", re.I)


class Window(NamedTuple):
    """One limit: how much it allows, how much is left, and in how many seconds it is whole again."""

    limit: int | None = None
    remaining: int | None = None
    reset_s: float | None = None


class RateLimits(NamedTuple):
    """What the last response told of the limits; `tokens` is the tightest token limit."""

    requests: Window
    tokens: Window


def _headers(*names: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((name.format("limit"), name.format("remaining"), name.format("reset")) for name in names)


_REQUESTS = _headers(
    "x-ratelimit-{}-requests", "anthropic-ratelimit-requests-{}", "x-ratelimit-{}", "ratelimit-{}"
)  # fmt: skip
_TOKENS = _headers(
    "x-ratelimit-{}-tokens", "anthropic-ratelimit-tokens-{}", "anthropic-ratelimit-output-tokens-{}",
    "anthropic-ratelimit-input-tokens-{}",
)  # fmt: skip


def read_rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """The limits that a response tells, or None. Header names in any case: `headers` looks them up so."""
    told = RateLimits(_window(headers, _REQUESTS), _window(headers, _TOKENS))
    return told if told != (_UNTOLD, _UNTOLD) else None


_UNTOLD = Window()


def _window(headers: Mapping[str, str], names: tuple[tuple[str, str, str], ...]) -> Window:
    for of_limit, of_remaining, of_reset in names:
        limit, left, reset = headers.get(of_limit), headers.get(of_remaining), headers.get(of_reset)
        if limit is not None or left is not None or reset is not None:
            seconds = None if reset is None else _from_now(reset, headers)
            return Window(_count(limit), _count(left), None if seconds is None else max(seconds, 0.0))
    return _UNTOLD


def retry_after(headers: Mapping[str, str], error: Any = None, text: str = "") -> float | None:
    """Seconds to wait as the server says, in [0, 3600]; None where it says nothing that can be read."""
    told = told_wait(headers, error, text)
    return None if told is None else clamp(told)


def clamp(seconds: float) -> float:
    return min(max(seconds, 0.0), MAX_WAIT_S)


def told_wait(headers: Mapping[str, str], error: Any = None, text: str = "") -> float | None:
    """The same, as told: the most exact form first. `error` is the body's error object, `text` its message."""
    for seconds in _waits(headers, error, text):
        if seconds is not None and not math.isnan(seconds):
            return seconds
    return None


def _waits(headers: Mapping[str, str], error: Any, text: str) -> Iterator[float | None]:
    milliseconds = _number(headers.get("retry-after-ms"))
    yield None if milliseconds is None else milliseconds / 1000
    if (told := headers.get("retry-after")) is not None:
        number = _number(told)  # always a duration here, however large
        yield number if number is not None else _from_now(told, headers)
    yield _in_body(error)
    if found := _IN_TEXT.search(text):
        yield _duration(found[1])
    yield _reset(read_rate_limits(headers))


def _reset(rate_limits: RateLimits | None) -> float | None:
    """When the windows that are used up are whole again; where none is said to be, the first one that will be."""
    told = [w for w in rate_limits or () if w.reset_s is not None]
    spent = [w.reset_s or 0.0 for w in told if w.remaining is not None and w.remaining <= 0]
    return max(spent) if spent else min((w.reset_s or 0.0 for w in told), default=None)


def _in_body(error: Any, depth: int = 0) -> float | None:
    """Google's RetryInfo.retryDelay ("45s"), wherever it is in the error, and its like."""
    if depth > 4:
        return None
    if isinstance(error, dict):
        for name in ("retryDelay", "retry_delay", "retry_after"):
            value = error.get(name)
            if isinstance(value, dict):  # protobuf's own form: seconds and nanos
                value = value.get("seconds")
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
            if isinstance(value, str) and (seconds := _from_now(value, {})) is not None:
                return seconds
    inner = error.values() if isinstance(error, dict) else error if isinstance(error, list) else ()
    return next((found for value in inner if (found := _in_body(value, depth + 1)) is not None), None)


def _from_now(value: str, headers: Mapping[str, str]) -> float | None:
    """A duration ("6m0s"), a bare number (seconds, or a moment since 1970), or a date, as seconds from now."""
    number = _number(value)
    if number is not None:
        if math.isinf(number) or number < EPOCH_FROM:
            return number
        return (number / 1000 if number >= EPOCH_MS_FROM else number) - _now(headers)
    if (seconds := _duration(value)) is not None:
        return seconds
    moment = _moment(value)
    return None if moment is None else moment - _now(headers)


def _now(headers: Mapping[str, str]) -> float:
    """The server's clock, where it shows it."""
    moment = _moment(headers.get("date", ""))
    return time.time() if moment is None else moment


def _moment(value: str) -> float | None:
    """An HTTP or ISO date as seconds since 1970; a date without a zone is UTC."""
    for read in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            date = read(value)
            return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, OverflowError, IndexError):
            continue
    return None


def _duration(value: str) -> float | None:
    value = value.strip()
    if not _DURATION.fullmatch(value):
        return None
    return sum(float(number) * _UNITS[_unit(name.lower())] for number, name in _PARTS.findall(value))


def _unit(name: str) -> str:
    return "ms" if name.startswith(("ms", "mil")) else name[0]


def _number(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _count(value: str | None) -> int | None:
    number = _number(value)
    return int(number) if number is not None and math.isfinite(number) else None
