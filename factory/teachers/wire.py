"""One endpoint over HTTP: POST a JSON body, get the raw body of a 200, or a `Failure` already classified.

Own wire code on aiohttp: the SDKs' clients spend about ten times the CPU per request, retry on their own, and follow
redirects with the key in hand. Redirects are off here, and so are retries: `ask.py` has the one retry policy.
"""

import socket
import zlib
from typing import Any

import aiohttp
import msgspec
from aiohttp.abc import ResolveResult

from factory.rows import Failure
from factory.teachers.entry import is_metadata
from factory.teachers.failures import classify
from factory.teachers.rate_limits import RateLimits, read_rate_limits
from factory.teachers.secret import Secret

MAX_BODY_BYTES = 32 * 2**20
KEEP_IDLE_S = 4.0
"""A little less than the 5 s after which uvicorn (and so vLLM) closes an idle connection, so that it never races us."""

CONNECT_S = 5.0


class Wire:
    """Opened at the first `post`, asked from many tasks at once, closed once. `rate_limits` is what the last response told."""

    def __init__(
        self, base_url: str, headers: dict[str, str], key: str | None, timeout_s: float, concurrency: int
    ) -> None:
        self.base_url = base_url
        self.rate_limits: RateLimits | None = None
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip, deflate", **headers}
        self._secret = Secret(key)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_S, timeout_s))
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None

    async def post(self, path: str, body: bytes) -> bytes | Failure:
        """One request, without redirects and retries; what a server or a network does is never an exception."""
        answer = await self._post(path, body)
        if isinstance(answer, bytes):
            return answer
        # aiohttp hands on bytes of a header that are no text as half characters
        detail = answer.detail.encode("utf-8", "replace")
        return msgspec.structs.replace(answer, detail=self._secret.out_of(detail).decode())

    async def _post(self, path: str, body: bytes) -> bytes | Failure:
        try:
            async with self._open().post(
                self.base_url + path, data=body, headers=self._headers, allow_redirects=False
            ) as response:
                self.rate_limits = read_rate_limits(response.headers) or self.rate_limits
                raw = await _read(response.content)
                status, headers = response.status, response.headers
        except (aiohttp.ClientError, TimeoutError) as e:
            return self._transport(e)
        answer = raw if isinstance(raw, Failure) else inflated(raw, headers.get("Content-Encoding", ""))
        if isinstance(answer, bytes):  # before anything is cut: half a key is one still
            answer = self._secret.out_of(answer)
        return answer if isinstance(answer, Failure) or status == 200 else classify(status, headers, answer)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self._concurrency, keepalive_timeout=KEEP_IDLE_S, resolver=_Resolver()
            )
            # bodies are unpacked here and not by aiohttp, so that a small one cannot become a huge one
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, auto_decompress=False)
        return self._session

    def _transport(self, error: Exception) -> Failure:
        """What went wrong below HTTP. Only what never reached the server is surely not billed."""
        match error:
            case aiohttp.ClientSSLError():
                return Failure(reason="tls", detail=f"{self.base_url}: no trusted TLS connection: {error}"[:500])
            case aiohttp.ClientConnectorError():
                why = error.os_error.strerror or error.os_error
                return Failure(reason="outage", detail=f"cannot connect to {self.base_url}: {why}")
            case aiohttp.ConnectionTimeoutError():
                return Failure(
                    reason="outage", detail=f"cannot connect to {self.base_url}: no answer in {CONNECT_S:g} s"
                )
            case TimeoutError():
                return Failure(reason="timeout", detail=f"no whole answer in {self._timeout.total:g} s")
        return Failure(reason="transport", detail=f"{type(error).__name__}: {error}"[:500])


class _Resolver(aiohttp.ThreadedResolver):
    """DNS, but never to a cloud's metadata service: a name may point anywhere, and may change where it points."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if any(is_metadata(place["host"]) for place in found):
            raise OSError(None, f"{host} leads to a cloud's metadata service")
        return found


async def _read(content: aiohttp.StreamReader) -> bytes | Failure:
    """All of a body, up to the limit; a longer one is left on the wire."""
    raw = bytearray(await content.read(MAX_BODY_BYTES + 1))
    while len(raw) <= MAX_BODY_BYTES:
        if not (more := await content.read(MAX_BODY_BYTES)):
            return bytes(raw)
        raw += more
    return _too_large()


def inflated(raw: bytes, encoding: str) -> bytes | Failure:
    """The body under its `Content-Encoding`, never larger than the limit."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return raw
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return Failure(reason="bad_encoding", detail=f"the body is {encoding!r}, which was not asked for")
    try:
        plain, whole = _inflate(raw, zlib.MAX_WBITS | 32)  # 32: gzip or zlib, as its header says
    except zlib.error:
        try:
            plain, whole = _inflate(raw, -zlib.MAX_WBITS)  # some servers send `deflate` without any header
        except zlib.error as e:
            return Failure(reason="transport", detail=f"the body cannot be unpacked: {e}")
    if len(plain) > MAX_BODY_BYTES:
        return _too_large()
    return plain if whole else Failure(reason="transport", detail="the packed body ends too early")


def _inflate(raw: bytes, form: int) -> tuple[bytes, bool]:
    unpacker: Any = zlib.decompressobj(form)
    plain = unpacker.decompress(raw, MAX_BODY_BYTES + 1)
    return plain, unpacker.eof


def _too_large() -> Failure:
    return Failure(reason="body_too_large", detail=f"the body is over {MAX_BODY_BYTES} bytes")
