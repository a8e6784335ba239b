"""JSON from a server we do not trust: what two readers could read in two ways is not read at all."""

import json
import re
from typing import Any

from factory.rows import Failure

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # those in pairs have become one character


class _Unsafe(ValueError):
    """JSON's own grammar or good sense forbids it, but common parsers let it through."""


def strict_json(body: bytes) -> Any | Failure:
    """The data of a body; a `Failure` for what is no JSON in UTF-8, and for NaN, equal keys, half characters, depth.

    The standard library's parser is the only one here that shows equal keys; 10 microseconds for a usual answer.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as e:
        return Failure(reason="bad_encoding", detail=f"not UTF-8 at byte {e.start}: {_shown(body)}")
    try:
        data = _decode(text.removeprefix("\ufeff"))
    except _Unsafe as e:
        return Failure(reason="unsafe_json", detail=f"{e}: {_shown(body)}")
    except RecursionError:
        return Failure(reason="unsafe_json", detail=f"nested too deep: {_shown(body)}")
    except ValueError as e:  # JSONDecodeError, or a number of thousands of digits
        if text.lstrip("\ufeff \t\r\n")[:1] == "<":
            page = " ".join(_shown(body).split())
            return Failure(
                reason="html_page", detail=f"the answer is a web page, not JSON; check base_url; it begins: {page}"
            )
        return Failure(reason="bad_json", detail=f"{e}: {_shown(body)}")
    if "\\u" in text and _ESCAPED_SURROGATE.search(text) and _LONE_SURROGATE.search(_all_text(data)):
        return Failure(reason="bad_encoding", detail=f"half a surrogate pair: {_shown(body)}")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Unsafe("an object has the same key twice")
    return made


def _constant(name: str) -> Any:
    raise _Unsafe(f"{name} is no JSON")


_decode = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant).decode


def _all_text(data: Any) -> str:
    """All strings in it, one after another."""
    return json.dumps(data, ensure_ascii=False)


def _shown(body: bytes) -> str:
    return body[:200].decode("utf-8", "replace")
