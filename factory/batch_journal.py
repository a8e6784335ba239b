"""What the journal knows of batches: built -> submitted -> collected.

`built`: the attempts are written, with what they may cost; whether the provider has the batch is not known until its
handle is written, which makes it `submitted`. `collected`: each of its attempts has ended. A collected batch remembers
which requests failed in it, so that a later start does not pay for the same failure again; `forgiven` is one whose
failures may be asked once more (`--retry-failed`). A batch that never reached the provider is deleted with its attempts.
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from factory.budget import Hold
from factory.journal import INSERT_ATTEMPT, Journal
from factory.rows import Failure, digest


class Batch(NamedTuple):
    """A row of the table: `requests` attempts from number `first` on. Times are seconds since the epoch."""

    tag: str
    identity: str
    run: str
    state: str
    handle: str | None
    first: int
    requests: int
    built: float
    submitted: float | None


class Line(NamedTuple):
    """One attempt of a batch: the keys of its draws, how far it is, what is reserved for it."""

    attempt: int
    keys: str
    status: str
    hold: Hold


COLUMNS = ", ".join(Batch._fields)
OPEN = f"SELECT {COLUMNS} FROM batch WHERE state IN ('built', 'submitted')"


def custom_id(tag: str, number: int, keys: str) -> str:
    """The name of a batch's line: attempt `first + number`; the checksum ties it to the draws that it was sent for."""
    return f"{tag}-{number}-{digest(keys, size=4)}"


async def build(journal: Journal, tag: str, run: str, identity: str, attempts: Sequence[tuple[Any, ...]]) -> None:
    """Commit a batch and its attempts, which get consecutive numbers, in one transaction."""

    def act(db: sqlite3.Connection) -> None:
        first = db.execute("SELECT coalesce(max(id), 0) + 1 FROM attempt").fetchone()[0]
        db.executemany(INSERT_ATTEMPT, attempts)
        row = (tag, identity, run, "built", None, first, len(attempts), time.time(), None)
        db.execute(f"INSERT INTO batch ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)", row)

    await journal.commit(act)


async def submitted(journal: Journal, tag: str, handle: str) -> None:
    """Commit that the provider has the batch, and how it names it."""
    sql = "UPDATE batch SET state='submitted', handle=?, submitted=? WHERE tag=?"
    await journal.commit(lambda db: db.execute(sql, (handle, time.time(), tag)))


async def collected(journal: Journal, tag: str) -> None:
    """Commit that every attempt of the batch has ended."""
    sql = "UPDATE batch SET state='collected', ended=? WHERE tag=?"
    await journal.commit(lambda db: db.execute(sql, (time.time(), tag)))


async def withdraw(journal: Journal, batch: Batch) -> None:
    """Delete a batch that the provider does not have: nothing of it was sent."""

    def act(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM attempt WHERE id BETWEEN ? AND ?", (batch.first, batch.first + batch.requests - 1))
        db.execute("DELETE FROM batch WHERE tag=?", [batch.tag])

    await journal.commit(act)


def forgive(journal: Journal, run: str) -> None:
    """What failed in the batches of a run so far may be asked again."""
    sql = "UPDATE batch SET state='forgiven' WHERE run=? AND state='collected'"
    journal.write(lambda db: db.execute(sql, [run])).result()


def all_batches(journal: Journal, identity: str) -> list[Batch]:
    """The batches of a model that were ever submitted, collected ones included."""
    return [Batch(*row) for row in journal.read(f"SELECT {COLUMNS} FROM batch WHERE identity=?", [identity])]


def open_batches(journal: Journal, identity: str) -> list[Batch]:
    """The batches of a model that are not collected yet, of whatever run, oldest first."""
    return [Batch(*row) for row in journal.read(f"{OPEN} AND identity=? ORDER BY built", [identity])]


def lines(journal: Journal, batch: Batch) -> Iterator[Line]:
    """The attempts of a batch; a purged one is there without keys."""
    sql = "SELECT id, keys, status, prompt_tokens, completion_tokens, usd FROM attempt WHERE id BETWEEN ? AND ? ORDER BY id"
    for attempt, keys, status, *hold in journal.read(sql, [batch.first, batch.first + batch.requests - 1]):
        yield Line(attempt, keys, status, Hold(hold[0], hold[1], Decimal(hold[2])))


class Failed(NamedTuple):
    """Why the last request for a draw failed, its limit, and how many with that limit have failed."""

    failure: Failure
    max_tokens: int
    times: int = 1


def failures(journal: Journal, run: str, identity: str) -> dict[str, Failed]:
    """Answer key -> how it failed in the collected batches of this run."""
    found: dict[str, Failed] = {}
    sql = (
        "SELECT keys, max_tokens, reason, detail FROM batch JOIN attempt ON attempt.id BETWEEN first AND first + requests - 1 "
        "WHERE state='collected' AND batch.run=? AND batch.identity=? AND status='failed' ORDER BY attempt.id"
    )
    for keys, max_tokens, reason, detail in journal.read(sql, [run, identity]):
        for key in keys.split():
            before = found[key].times if key in found and found[key].max_tokens == max_tokens else 0
            found[key] = Failed(Failure(reason=reason, detail=detail or ""), max_tokens, before + 1)
    return found
