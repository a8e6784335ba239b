"""What was paid for: one SQLite file, keyed by content, shared by all runs of a folder.

Order of events for one request: the intent is committed (`begin`), then the request is sent, then the raw body is
committed (`store`), and only then is it read and its answers are filed (`file`). A crash between the first two commits
leaves an attempt whose outcome is unknown: it is asked again and counted as possibly billed twice.

WAL with synchronous=FULL, and one writer thread that commits whatever has queued up in one transaction: commits are
durable through power loss and still thousands a second, because requests in flight share them.
"""

import asyncio
import fcntl
import os
import queue
import socket
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from factory.errors import DiskError, JournalError, LockedError, VersionError, disk_error
from factory.rows import Failure, Request, Usage, digest

VERSION = 1
COMPRESS_OVER_BYTES = 4096

SCHEMA = """
CREATE TABLE IF NOT EXISTS attempt (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, identity TEXT NOT NULL, prompt TEXT NOT NULL, asked TEXT NOT NULL,
    keys TEXT NOT NULL, draw INTEGER NOT NULL, max_tokens INTEGER NOT NULL, sent REAL NOT NULL, ended REAL,
    status TEXT NOT NULL, reason TEXT, detail TEXT, body BLOB,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, seconds REAL NOT NULL DEFAULT 0,
    usd TEXT NOT NULL DEFAULT '0'
) STRICT;
CREATE INDEX IF NOT EXISTS attempt_run ON attempt (run);
CREATE INDEX IF NOT EXISTS attempt_unread ON attempt (identity) WHERE status = 'stored';
CREATE TABLE IF NOT EXISTS answer (
    key TEXT PRIMARY KEY, identity TEXT NOT NULL, draw INTEGER NOT NULL, attempt INTEGER NOT NULL,
    choice INTEGER NOT NULL, finish TEXT NOT NULL, tokens INTEGER, max_tokens INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
# status of an attempt: sent -> stored -> read, or -> failed; `sent` in an old run means: outcome unknown


def answer_keys(request: Request) -> list[str]:
    """One key per draw: identity, messages, sampling, draw, seed; the limit and `n` are not part of it.

    Beams are one joint answer, so there width, penalty and the limit are in the key, and rank stands for the draw.
    """
    s = request.sampling
    neutral = [s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
    how: list[Any] = [neutral, s.stop]
    if s.beam is not None:
        how = ["beam", s.beam.width, s.beam.length_penalty, s.max_tokens, s.stop]
    asked = [[m["role"], m["content"]] for m in request.messages]
    return [
        digest(request.identity, asked, how, draw, request.seed)
        for draw in range(request.draw, request.draw + request.n)
    ]


def asked_key(request: Request) -> str:
    """Hash of the messages alone: the same as the id of a prompt that would be asked plainly."""
    return digest([[m["role"], m["content"]] for m in request.messages], size=8)


class Stored(NamedTuple):
    """An answer on file: the body it is in, and which of the body's choices it is."""

    body: bytes
    choice: int
    finish: str
    tokens: int | None
    max_tokens: int

    def valid(self, limit: int) -> bool:
        """An answer that ended by itself is always valid; a truncated one only if the limit did not grow."""
        return self.finish != "length" or limit <= self.max_tokens


class Spent(NamedTuple):
    """Totals of a run over all its attempts; unknown outcomes count at what was reserved for them."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    seconds: float
    unknown: int


class Journal:
    """Open once per process; a second process is refused and told who holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failed: DiskError | None = None
        self._ops: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._prepare()
        except OSError as e:
            raise disk_error(e, path) or DiskError(f"{path}: {e.strerror}; choose another folder") from None
        self._writer = threading.Thread(target=self._write_loop, name="journal", daemon=True)
        self._writer.start()

    def _prepare(self) -> None:
        created = not self.path.exists()
        try:
            self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            if created:
                self.path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise VersionError(
                    f"{self.path} has journal version {version}, this factory reads up to {VERSION}: update it"
                )
            if (found := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
            self._db.executescript(SCHEMA)
            self._db.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.OperationalError as e:
            raise DiskError(f"cannot write the journal {self.path}: {e}; check permissions and free space") from None
        except sqlite3.DatabaseError as e:
            raise JournalError(
                f"{self.path} is damaged ({e}); nothing was changed. Move it aside and try "
                f"`sqlite3 {self.path} .recover` to save its rows"
            ) from None

    # -- writing: everything goes through one thread, which commits in groups ------------------------------------

    def _write_loop(self) -> None:
        while (op := self._ops.get()) is not None:
            batch = [op]
            while len(batch) < 500 and not self._ops.empty():
                if (more := self._ops.get()) is None:
                    self._ops.put(None)
                    break
                batch.append(more)
            try:
                self._db.execute("BEGIN IMMEDIATE")
                results = [act(self._db) for act, _ in batch]
                self._db.execute("COMMIT")
            except Exception as e:  # a full disk, most likely: every waiting request must hear of it
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._failed = DiskError(f"cannot write the journal {self.path}: {e}; free some space and run again")
                for _, future in batch:
                    future.set_exception(self._failed)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    future.set_result(result)

    def _write(self, act: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._ops.put((act, future))
        return future

    async def begin(self, run: str, request: Request, reserved_usd: str, reserved_prompt_tokens: int) -> int:
        """Commit the intent to send, with the worst case it may cost; returns the attempt's number."""
        sampling = request.sampling
        row = (
            run, request.identity, request.prompt, asked_key(request), " ".join(answer_keys(request)), request.draw,
            sampling.max_tokens, time.time(), reserved_prompt_tokens, sampling.max_tokens * request.n, reserved_usd,
        )  # fmt: skip
        sql = (
            "INSERT INTO attempt (run, identity, prompt, asked, keys, draw, max_tokens, sent, status, prompt_tokens,"
            " completion_tokens, usd) VALUES (?,?,?,?,?,?,?,?,'sent',?,?,?)"
        )
        return int(await asyncio.wrap_future(self._write(lambda db: db.execute(sql, row).lastrowid)))

    async def store(self, attempt: int, body: bytes) -> None:
        """Commit the raw body, before anything reads it."""
        sql = "UPDATE attempt SET status='stored', ended=?, body=? WHERE id=?"
        row = (time.time(), _pack(body), attempt)
        await asyncio.wrap_future(self._write(lambda db: db.execute(sql, row)))

    def file(self, attempt: int, answers: list[tuple[str, int | None]], usage: Usage, usd: str) -> Future[Any]:
        """File a body's answers (finish, tokens) under the attempt's keys, and settle what the attempt cost."""

        def act(db: sqlite3.Connection) -> None:
            row = db.execute("SELECT keys, identity, draw, max_tokens FROM attempt WHERE id=?", [attempt]).fetchone()
            keys, identity, draw, max_tokens = row
            db.executemany(
                "INSERT OR REPLACE INTO answer VALUES (?,?,?,?,?,?,?,?)",
                [
                    (key, identity, draw + i, attempt, i, finish, tokens, max_tokens)
                    for i, (key, (finish, tokens)) in enumerate(zip(keys.split(), answers, strict=False))
                ],
            )
            db.execute(
                "UPDATE attempt SET status='read', prompt_tokens=?, completion_tokens=?, seconds=?, usd=? WHERE id=?",
                (usage.prompt_tokens, usage.completion_tokens, usage.seconds, usd, attempt),
            )

        return self._write(act)

    async def fail(self, attempt: int, failure: Failure, billed: bool) -> None:
        """Note why an attempt brought no answer; one that cannot have been billed releases its reservation."""
        sql = "UPDATE attempt SET status='failed', ended=?, reason=?, detail=?"
        if not billed:
            sql += ", prompt_tokens=0, completion_tokens=0, usd='0'"
        row = (time.time(), failure.reason, failure.detail, attempt)
        await asyncio.wrap_future(self._write(lambda db: db.execute(sql + " WHERE id=?", row)))

    async def flush(self) -> None:
        """Wait until everything written so far is committed; DiskError if some of it could not be."""
        await asyncio.wrap_future(self._write(lambda db: None))
        if self._failed is not None:
            raise self._failed

    # -- reading ---------------------------------------------------------------------------------------------------

    def answers(self, keys: Iterable[str]) -> dict[str, Stored]:
        """The stored answers among `keys`; ask for a few hundred at a time."""
        wanted = list(keys)
        marks = ",".join("?" * len(wanted))
        rows = self._read(
            "SELECT key, body, choice, finish, tokens, answer.max_tokens FROM answer "
            f"JOIN attempt ON attempt.id = answer.attempt WHERE key IN ({marks})",
            wanted,
        )
        return {row[0]: Stored(_unpack(row[1]), *row[2:]) for row in rows}

    def unread(self, identity: str) -> Iterator[tuple[int, bytes]]:
        """Bodies that were stored but not yet read when a process ended: they were paid for."""
        for attempt, body in self._read(
            "SELECT id, body FROM attempt WHERE identity=? AND status='stored'", [identity]
        ):
            yield attempt, _unpack(body)

    def spent(self, run: str) -> Spent:
        """What all attempts of a run cost so far."""
        row = self._read(
            "SELECT count(*), coalesce(sum(prompt_tokens),0), coalesce(sum(completion_tokens),0),"
            " coalesce(sum(CAST(usd AS REAL)),0), coalesce(sum(seconds),0), coalesce(sum(status='sent'),0)"
            " FROM attempt WHERE run=?",
            [run],
        )[0]
        return Spent(*row)

    def _read(self, sql: str, values: list[Any]) -> list[Any]:
        db = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=30)
        try:
            return db.execute(sql, values).fetchall()
        finally:
            db.close()

    def close(self) -> None:
        """Finish what is queued, fold the write-ahead log in, release the lock."""
        if self._writer.is_alive():
            self._ops.put(None)
            self._writer.join()
        self._db.close()
        self._lock.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pack(body: bytes) -> bytes:
    # a JSON body never starts with zlib's 0x78 ("x"), so the first byte tells which it is
    return zlib.compress(body, 1) if len(body) > COMPRESS_OVER_BYTES else body


def _unpack(body: bytes) -> bytes:
    return zlib.decompress(body) if body[:1] == b"\x78" else body


def _lock(path: Path) -> Any:
    """An advisory lock that the kernel releases however the process ends; its file names the holder."""
    file = path.with_suffix(".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise LockedError(f"{path} is in use by {holder}; wait for it, or run in another folder") from None
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file
