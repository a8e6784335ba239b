"""A loopback server in a process of its own that answers chat completions after a fixed delay, and counts them.

Raw asyncio, because it has to be cheaper than the clients that are measured against it. `GET /v1/stats` and
`GET /v1/seen` tell what came in.
"""

import argparse
import asyncio
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

WORDS = 110
"""About 150 tokens, as `answer` makes them."""


class Stats(msgspec.Struct):
    """What reached the server. `first` is on the clock of `time.monotonic`, which all processes share on Linux."""

    requests: int = 0
    distinct: int = 0
    draws: int = 0
    most: int = 0
    first: float | None = None


class _Ask(msgspec.Struct):
    model: str
    messages: list[dict[str, str]]
    n: int = 1
    max_tokens: int = 0


_decode = msgspec.json.Decoder(_Ask).decode
_encode = msgspec.json.Encoder().encode


def answer(question: str, draw: int) -> str:
    """The same text for the same question and draw, different for others."""
    filler = " ".join(f"word{(len(question) + 7 * i + draw) % 97}" for i in range(WORDS - 40))
    return f"Answer {draw} to: {question} {filler}"


class _Counts:
    """The server's memory of its requests."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.draws = 0
        self.first: float | None = None

    def stats(self) -> Stats:
        return Stats(self.seen.total(), len(self.seen), self.draws, max(self.seen.values(), default=0), self.first)


class _Connection(asyncio.Protocol):
    """One keep-alive connection; a client sends its next request after the answer, so none is pipelined."""

    def __init__(self, counts: _Counts, delay_s: float) -> None:
        self.counts, self.delay_s = counts, delay_s
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, mark, body = self.buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        if head.startswith(b"GET "):
            everything = head.startswith(b"GET /v1/seen ")
            self._send(_encode(self.counts.seen if everything else self.counts.stats()))
        elif len(body) >= (size := _content_length(head)):
            self._count(_decode(body[:size]))

    def _count(self, ask: _Ask) -> None:
        if self.counts.first is None:
            self.counts.first = time.monotonic()
        question = ask.messages[-1]["content"]
        self.counts.seen[question] += 1
        self.counts.draws += ask.n
        self.loop.call_later(self.delay_s, self._answer, ask, question)

    def _answer(self, ask: _Ask, question: str) -> None:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": answer(question, i)}, "finish_reason": "stop"}
            for i in range(ask.n)
        ]
        usage = {"prompt_tokens": 20, "completion_tokens": 150 * ask.n, "total_tokens": 20 + 150 * ask.n}
        told = {"id": "x", "object": "chat.completion", "created": 0, "model": ask.model, "choices": choices}
        self._send(_encode({**told, "usage": usage}))

    def _send(self, body: bytes) -> None:
        self.buffer = b""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError("the request has no Content-Length")


async def _serve(delay_s: float) -> None:
    """Serve until stdin closes, which it does when the parent ends."""
    loop = asyncio.get_running_loop()
    counts = _Counts()
    server = await loop.create_server(lambda: _Connection(counts, delay_s), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


class Server:
    """A running server as its user sees it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"

    def stats(self) -> Stats:
        return msgspec.json.decode(self._get("stats"), type=Stats)

    def seen(self) -> dict[str, int]:
        """How often each question was asked."""
        return msgspec.json.decode(self._get("seen"), type=dict[str, int])

    def _get(self, what: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/{what}", timeout=30) as response:
            return bytes(response.read())


@contextmanager
def serving(delay_ms: float = 50.0) -> Iterator[Server]:
    """A server in its own process, on a free port of 127.0.0.1."""
    command = [sys.executable, "-m", "benchmarks._server", str(delay_ms)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield Server(int(child.stdout.readline()))
    finally:
        child.stdin.close()
        child.wait(30)
        child.stdout.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("delay_ms", type=float)
    asyncio.run(_serve(parser.parse_args().delay_ms / 1000))
