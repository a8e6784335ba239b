"""How long a vLLM server's queue is, from its own metrics: what paces the requests to it.

A server takes any number of requests and lets those wait for which it has no room. They count against their time-outs
there, and a server that is shared keeps others waiting; so the factory sends a little more than is being worked on.
"""

import asyncio
import re
from collections.abc import Callable
from typing import NamedTuple

import httpx

EVERY_S = 1.0
GAUGE = re.compile(r"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


class Queue(NamedTuple):
    """Requests that are worked on and that wait, in all engines of all servers."""

    running: int
    waiting: int


def read_queue(metrics: str) -> Queue | None:
    """The queue in a page of Prometheus metrics, summed over engines; None where it is not there."""
    sums = {"running": 0.0, "waiting": 0.0}
    found = GAUGE.findall(metrics)
    for kind, value in found:
        sums[kind] += float(value)
    return Queue(int(sums["running"]), int(sums["waiting"])) if found else None


async def watch(urls: list[str], tell: Callable[[Queue], None]) -> None:
    """Look at the servers' metrics every second until cancelled; a server that has none is not asked again."""
    async with httpx.AsyncClient(timeout=5) as client:
        while urls:
            looks = {url: await _look(client, url) for url in urls}
            urls = [url for url, look in looks.items() if look is not None]
            if seen := [look for look in looks.values() if isinstance(look, Queue)]:
                tell(Queue(*map(sum, zip(*seen, strict=True))))
            await asyncio.sleep(EVERY_S)


async def _look(client: httpx.AsyncClient, url: str) -> Queue | httpx.HTTPError | None:
    try:
        told = await client.get(f"{url.removesuffix('/v1')}/metrics")
    except httpx.HTTPError as e:  # busy or gone: what becomes of its requests will tell
        return e
    return read_queue(told.text)
