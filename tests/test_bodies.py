"""A body: stored so that no byte of it changes unseen, and read whatever its shape."""

import copy
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from factory.errors import JournalError
from factory.journal import COMPRESS_OVER_BYTES, pack, unpack
from factory.rows import Failure, Reply, encode
from factory.teachers.openai import read_chat
from tests.server import chat


@pytest.mark.parametrize("size", [0, 1, 300, COMPRESS_OVER_BYTES, COMPRESS_OVER_BYTES + 1])
def test_a_stored_body_is_a_zlib_stream_in_which_no_byte_can_change_unseen(size: int) -> None:
    body = (b'{"choices": [' + bytes(range(256)) * 20)[:size]
    packed = pack(body)
    assert unpack(packed) == zlib.decompress(packed) == body
    for place in range(1, len(packed)):
        changed = packed[:place] + bytes([packed[place] ^ 1 << place % 8]) + packed[place + 1 :]
        with suppress(JournalError):
            assert unpack(changed) == body, place  # some bits of a compressed stream mean nothing


def parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from parts(inner, (*path, key))


def test_a_body_of_any_shape_is_an_answer_that_can_be_filed_or_a_failure() -> None:
    whole = chat({"model": "m", "messages": [{"content": "x"}]})
    whole["choices"][0] |= {"tokens": 3, "logprob": -1.0, "logprobs": {"content": [{"logprob": -1.0}]}}
    whole["choices"][0]["message"]["reasoning"] = "so"
    whole["usage"]["prompt_tokens_details"] = {"cached_tokens": 1}
    odd = [None, 1, -5, 1e308, 10**30, True, "x", [], [1], [None], {}, {"a": 1}]
    for place in list(parts(whole)):
        for value in odd:
            body = copy.deepcopy(whole)
            inner = body
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            outcome = read_chat(json.dumps(body).encode())
            assert isinstance(outcome, Reply | Failure)
            if isinstance(outcome, Reply):
                (choice,) = outcome.choices
                assert json.loads(encode(outcome))["choices"][0]["finish"] == choice.finish
                assert isinstance(choice.finish, str)
                assert choice.tokens is None or 0 <= choice.tokens < 2**63
                assert 0 <= outcome.usage.prompt_tokens < 2**63
