"""Told to stop: Ctrl-C, SIGTERM, or a terminal that went away.

Everywhere a signal is an exception that ends the run at once, with exit code 128 + its number. While requests are in
flight the first one is only a wish: nothing more is sent, and answers on their way, which are paid for, are stored.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], object]


class Interrupted(KeyboardInterrupt):
    """A signal said stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def interrupting() -> Iterator[None]:
    """For the command line: each of the signals raises `Interrupted`, if the caller has not set it to be ignored."""
    with _handled(_raise, [one for one in STOPS if signal.getsignal(one) is not signal.SIG_IGN]):
        yield


@contextmanager
def draining(stop: Callable[[Interrupted], None]) -> Iterator[None]:
    """In a running event loop: the first signal calls `stop` in the loop, the second one does what it did before.

    Signals that have their default action, or are ignored, stay as they are.
    """
    loop = asyncio.get_running_loop()

    def told(number: int, frame: FrameType | None) -> None:
        for one, handler in before.items():
            signal.signal(one, handler)
        loop.call_soon_threadsafe(stop, Interrupted(number))

    with _handled(told, [one for one in STOPS if callable(signal.getsignal(one))]) as before:
        yield


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


@contextmanager
def _handled(handler: Handler, which: list[signal.Signals]) -> Iterator[dict[signal.Signals, Handler]]:
    """Handlers for the time of a block; gives those from before. Python allows them in the main thread alone."""
    before: dict[signal.Signals, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        before.update({one: signal.signal(one, handler) for one in which})  # type: ignore[misc]
    try:
        yield before
    finally:
        for one, old in before.items():
            signal.signal(one, old)
