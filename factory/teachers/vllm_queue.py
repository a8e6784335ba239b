"""How long a vLLM server's queue is, from its own metrics: what paces the requests to it.

A server takes any number of requests and lets those wait for which it has no room. They count against their time-outs
there, and a server that is shared keeps others waiting; so the factory sends a little more than is being worked on.
"""

import asyncio
import re
from collections.abc import AsyncIterator
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


async def queues(roots: list[str]) -> AsyncIterator[Queue]:
    """The queue of these servers, every second; a server without such metrics is not asked again, and none is the end."""
    async with httpx.AsyncClient(timeout=5) as client:
        while roots:
            looks = {root: await _look(client, root) for root in roots}
            roots = [root for root, look in looks.items() if look is not None]
            if seen := [look for look in looks.values() if isinstance(look, Queue)]:
                yield Queue(*map(sum, zip(*seen, strict=True)))
            await asyncio.sleep(EVERY_S)


async def _look(client: httpx.AsyncClient, root: str) -> Queue | httpx.HTTPError | None:
    try:
        told = await client.get(f"{root}/metrics")
    except httpx.HTTPError as e:  # busy or gone: what becomes of its requests will tell
        return e
    return read_queue(told.text)
