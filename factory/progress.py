"""Progress for everything that takes longer than a second: bars on a terminal, plain lines elsewhere; always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_EVERY_S = 10.0

Advance = Callable[[int], None]
Reached = Callable[[int, int | None], None]


@contextmanager
def bar(label: str, total: int | None) -> Iterator[Advance]:
    """A bar over `total` steps (None: nobody knows how many); the yielded function moves it by a number of steps."""
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        reached(done, total)

    with growing(label) as reached:
        reached(0, total)
        yield advance


@contextmanager
def growing(label: str) -> Iterator[Reached]:
    """A bar whose length is known only later; the yielded function tells the steps that are done, and all steps."""
    with (_rich_bar if sys.stderr.isatty() else _plain_lines)(label) as reached:
        yield reached


def say(line: str) -> None:
    """One line for people, apart from the results on stdout."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _rich_bar(label: str) -> Iterator[Reached]:
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
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _plain_lines(label: str) -> Iterator[Reached]:
    started = last = time.monotonic()
    count = "0"

    def reached(done: int, total: int | None) -> None:
        nonlocal last, count
        count = f"{done}" if total is None else f"{done}/{total}"
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            say(f"  {label}: {count}, {last - started:.0f} s")

    yield reached
    if time.monotonic() - started > 1.0:
        say(f"  {label}: {count} in {time.monotonic() - started:.0f} s")
