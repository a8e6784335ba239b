"""One thread that commits for all: whatever has queued up becomes one transaction, and then those who wait are told.

A durable commit takes milliseconds and is the same for one row as for hundreds, so requests in flight share it.
"""

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from factory.errors import DiskError

MOST = 500
"""Acts in one transaction."""
TICK_S = 5.0
"""How often the time that a run is at work is written down: what a kill may lose of it."""

Act: TypeAlias = Callable[[sqlite3.Connection], Any]
Waiter: TypeAlias = "Future[Any] | asyncio.Future[Any] | None"
"""Who is told that an act is committed: a thread, a coroutine, or nobody."""


class Commits:
    """`tick` is an act that is repeated every few seconds and at the end; `failed` why something was not committed."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self.tick: Act | None = None
        self.failed: DiskError | None = None
        self._db, self._path = db, path
        self._queue: queue.SimpleQueue[tuple[Act, Waiter] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="journal", daemon=True)
        self._thread.start()

    def put(self, act: Act) -> Future[Any]:
        """For threads, and for whoever does not wait."""
        future: Future[Any] = Future()
        self._queue.put((act, future))
        return future

    async def done(self, act: Act) -> Any:
        """What an act gives, after it is committed."""
        future = asyncio.get_running_loop().create_future()
        self._queue.put((act, future))
        return await future

    def close(self) -> None:
        """Commit what is queued, and end."""
        if self._thread.is_alive():
            if self.tick is not None:
                self._queue.put((self.tick, None))
            self._queue.put(None)
            self._thread.join()

    def _loop(self) -> None:
        ticked = time.monotonic()
        while True:
            batch: list[tuple[Act, Waiter]] = []
            with suppress(queue.Empty):
                if (op := self._queue.get(timeout=TICK_S)) is None:
                    return
                batch.append(op)
            if self.tick is not None and time.monotonic() - ticked >= TICK_S:
                ticked = time.monotonic()
                batch.append((self.tick, None))
            while len(batch) < MOST and not self._queue.empty():
                if (more := self._queue.get()) is None:
                    self._queue.put(None)
                    break
                batch.append(more)
            if batch:
                self._commit(batch)

    def _commit(self, batch: list[tuple[Act, Waiter]]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            results = [act(self._db) for act, _ in batch]
            self._db.execute("COMMIT")
        except Exception as e:  # a full disk, most likely: every waiting request must hear of it
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self.failed = DiskError(f"cannot write the journal {self._path}: {e}; free some space and run again")
            _tell([(waiter, None) for _, waiter in batch], self.failed)
        else:
            _tell([(waiter, result) for (_, waiter), result in zip(batch, results, strict=True)])


def _tell(told: list[tuple[Waiter, Any]], error: Exception | None = None) -> None:
    """Wake those who wait for a commit: one call for all coroutines of a loop, since waking it costs a system call.

    Whoever has given up waiting is written for all the same, but not told.
    """
    coroutines: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for waiter, result in told:
        if isinstance(waiter, asyncio.Future):
            coroutines.setdefault(waiter.get_loop(), []).append((waiter, result))
        elif waiter is not None and waiter.set_running_or_notify_cancel():
            _settle(waiter, result, error)
    for loop, waiting in coroutines.items():
        with suppress(RuntimeError):  # the loop has ended, and with it all who waited
            loop.call_soon_threadsafe(_tell_coroutines, waiting, error)


def _tell_coroutines(told: list[tuple[asyncio.Future[Any], Any]], error: Exception | None) -> None:
    for future, result in told:
        if not future.done():
            _settle(future, result, error)


def _settle(future: "Future[Any] | asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
