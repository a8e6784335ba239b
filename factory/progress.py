"""Progress for everything that takes longer than a second: bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_EVERY_S = 10.0

Advance = Callable[[int], None]


@contextmanager
def bar(label: str, total: int) -> Iterator[Advance]:
    """A bar over `total` steps; the yielded function moves it by a number of steps. Writes to stderr."""
    if sys.stderr.isatty():
        with _rich_bar(label, total) as advance:
            yield advance
    else:
        with _plain_lines(label, total) as advance:
            yield advance


def say(line: str) -> None:
    """One line for people, apart from the results on stdout."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _rich_bar(label: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda steps: progress.advance(task, steps)


@contextmanager
def _plain_lines(label: str, total: int) -> Iterator[Advance]:
    done, last, started = 0, time.monotonic(), time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            say(f"  {label}: {done}/{total}, {last - started:.0f} s")

    yield advance
    if time.monotonic() - started > 1.0:
        say(f"  {label}: {done}/{total} in {time.monotonic() - started:.0f} s")
