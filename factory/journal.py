"""What was paid for: one SQLite file, keyed by content, shared by all runs of a folder.

Order of events for one request: the intent is committed (`begin`), then the request is sent, then the raw body is
committed (`store`), and only then is it read and its answers are filed (`file`). A crash between the first two commits
leaves an attempt whose outcome is unknown: it is asked again and counted as possibly billed twice.

WAL with synchronous=FULL, and one thread that commits for all (`commits.py`): durable through power loss, and still
thousands a second.
"""

import fcntl
import os
import socket
import sqlite3
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, get_args

from factory.commits import Act, Commits
from factory.errors import DiskError, JournalError, LockedError, VersionError, disk_error
from factory.rows import CUT, Cost, Failure, Reason, Request, digest

VERSION = 1
COMPRESS_OVER_BYTES = 4096
NO_ANSWER = ",".join(f"'{reason}'" for reason in get_args(Reason))
"""How answers end that are none, see `rows.endings`."""

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
CREATE TABLE IF NOT EXISTS batch (
    tag TEXT PRIMARY KEY, identity TEXT NOT NULL, run TEXT NOT NULL, state TEXT NOT NULL, handle TEXT,
    first INTEGER NOT NULL, requests INTEGER NOT NULL, built REAL NOT NULL, submitted REAL, ended REAL
) STRICT;
CREATE TABLE IF NOT EXISTS session (id INTEGER PRIMARY KEY, run TEXT NOT NULL, seconds REAL NOT NULL) STRICT;
"""
# status of an attempt: sent -> stored -> read, or -> failed; `sent` in an old run means: outcome unknown
# a batch is the attempts `first` to `first + requests - 1`; its states are those of `batch_journal.py`
IN_BATCH = "EXISTS (SELECT 1 FROM batch WHERE attempt.id BETWEEN first AND first + requests - 1)"

INSERT_ATTEMPT = (
    "INSERT INTO attempt (run, identity, prompt, asked, keys, draw, max_tokens, sent, status, prompt_tokens,"
    " completion_tokens, usd) VALUES (?,?,?,?,?,?,?,?,'sent',?,?,?)"
)


def attempt_row(run: str, request: Request, reserved_usd: str, reserved_prompt_tokens: int) -> tuple[Any, ...]:
    """An intent to send, as `INSERT_ATTEMPT` takes it: with the worst case that it may cost."""
    sampling = request.sampling
    draws = sampling.beam.width if sampling.beam else request.n
    return (
        run, request.identity, request.prompt, asked_key(request), " ".join(answer_keys(request)), request.draw,
        sampling.max_tokens, time.time(), reserved_prompt_tokens, sampling.max_tokens * draws, reserved_usd,
    )  # fmt: skip


def answer_keys(request: Request) -> list[str]:
    """One key per draw: identity, messages, sampling, draw, seed; the limit and `n` are not part of it.

    Beams are one joint answer, so there width, penalty and the limit are in the key, and rank stands for the draw.
    """
    s = request.sampling
    neutral = [s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
    how: list[Any] = [neutral, s.stop, "logprobs"] if s.logprobs else [neutral, s.stop]
    if s.beam is not None:
        how = ["beam", s.beam.width, s.beam.length_penalty, s.max_tokens, s.stop]
    if s.response_format is not None:
        how = [*how, s.response_format]
    asked = [[m["role"], m["content"]] for m in request.messages]
    return [
        digest(request.identity, asked, how, draw, request.seed)
        for draw in range(request.draw, request.draw + request.n)
    ]


def asked_key(request: Request) -> str:
    """Hash of the messages alone: the same as the id of a prompt that would be asked plainly."""
    return digest([[m["role"], m["content"]] for m in request.messages], size=8)


def _file(db: sqlite3.Connection, attempt: int, ends: Sequence[tuple[str, int | None]]) -> None:
    """An answer that is there already gives way to one with a larger limit only: what a data set was made of stays.

    Only where what is there is no answer, any new ending takes its place.
    """
    row = db.execute("SELECT keys, identity, draw, max_tokens FROM attempt WHERE id=?", [attempt]).fetchone()
    keys, identity, draw, max_tokens = row
    db.executemany(
        "INSERT INTO answer VALUES (?,?,?,?,?,?,?,?) ON CONFLICT (key) DO UPDATE SET attempt=excluded.attempt,"
        " choice=excluded.choice, finish=excluded.finish, tokens=excluded.tokens, max_tokens=excluded.max_tokens"
        f" WHERE excluded.max_tokens > answer.max_tokens OR answer.finish IN ({NO_ANSWER})",
        [
            (key, identity, draw + i, attempt, i, finish, tokens, max_tokens)
            for i, (key, (finish, tokens)) in enumerate(zip(keys.split(), ends, strict=False))
        ],
    )


def _end(db: sqlite3.Connection, attempt: int, cost: Cost | None, **columns: Any) -> None:
    """How an attempt ended, and what it cost in the place of what was reserved for it; where nobody knows (None) that stands."""
    if cost is not None:
        used = cost.usage
        columns |= {
            "prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens, "seconds": used.seconds,
            "usd": str(cost.usd),
        }  # fmt: skip
    told = ", ".join(f"{name}=?" for name in columns)
    db.execute(f"UPDATE attempt SET {told} WHERE id=?", [*columns.values(), attempt])


class Stored(NamedTuple):
    """An answer on file: the attempt whose body it is in, and which of the body's choices it is."""

    attempt: int
    choice: int
    finish: str
    tokens: int | None
    max_tokens: int

    def valid(self, limit: int) -> bool:
        """An answer that ended by itself is always valid; a truncated one only if the limit did not grow."""
        return self.finish not in CUT or limit <= self.max_tokens


class Spent(NamedTuple):
    """Totals of a run over all its attempts; unknown outcomes and open batches count at what was reserved for them.

    `seconds` is compute time of local models, `hours` is time that the run was at work, all its starts together.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    seconds: float
    unknown: int
    hours: float = 0.0


class Journal:
    """Open once per process; a second process is refused and told who holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._prepare()
        except OSError as e:
            raise disk_error(e, path) or DiskError(
                f"{path.parent}: this folder cannot be made or written ({e.strerror}); choose another one with --runs"
            ) from None
        self._reader: sqlite3.Connection | None = None
        self._commits = Commits(self._db, path)

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

    def clock(self, run: str) -> None:
        """Count the time from now on as time at work of a run; it is written down every few seconds."""
        if self._commits.tick is not None:  # the last seconds of the run before
            self.write(self._commits.tick)
        sql = "INSERT INTO session (run, seconds) VALUES (?, 0)"
        session: int = self.write(lambda db: db.execute(sql, [run]).lastrowid).result()
        started = time.monotonic()
        self._commits.tick = lambda db: db.execute(
            "UPDATE session SET seconds=? WHERE id=?", [time.monotonic() - started, session]
        )

    def write(self, act: Act) -> Future[Any]:
        return self._commits.put(act)

    async def commit(self, act: Act) -> Any:
        """What `act` gives, after it is committed."""
        return await self._commits.done(act)

    async def begin(self, run: str, request: Request, reserved_usd: str, reserved_prompt_tokens: int) -> int:
        """Commit the intent to send, with the worst case it may cost; returns the attempt's number."""
        row = attempt_row(run, request, reserved_usd, reserved_prompt_tokens)
        return int(await self.commit(lambda db: db.execute(INSERT_ATTEMPT, row).lastrowid))

    async def store(self, attempt: int, body: bytes) -> None:
        """Commit the raw body, before anything reads it."""
        sql = "UPDATE attempt SET status='stored', ended=?, body=? WHERE id=?"
        row = (time.time(), pack(body), attempt)
        await self.commit(lambda db: db.execute(sql, row))

    def file(self, attempt: int, ends: list[tuple[str, int | None]], cost: Cost | None) -> Future[Any]:
        """File how a body's draws ended (see `rows.endings`) under the attempt's keys, and settle what it cost."""

        def act(db: sqlite3.Connection) -> None:
            _file(db, attempt, ends)
            _end(db, attempt, cost, status="read")

        return self.write(act)

    async def fail(
        self, attempt: int, failure: Failure, cost: Cost | None, ends: Sequence[tuple[str, int | None]] = ()
    ) -> None:
        """Note why an attempt brought no answer, and what it cost (None: nobody knows).

        `ends` of a body that is paid for and will not get better: its draws are not asked again.
        """
        ended = time.time()

        def act(db: sqlite3.Connection) -> None:
            _file(db, attempt, ends)
            _end(db, attempt, cost, status="failed", ended=ended, reason=failure.reason, detail=failure.detail)

        await self.commit(act)

    async def flush(self) -> None:
        """Wait until everything written so far is committed; DiskError if some of it could not be."""
        await self.commit(lambda db: None)
        if self._commits.failed is not None:
            raise self._commits.failed

    # -- reading ---------------------------------------------------------------------------------------------------

    def answers(self, keys: Iterable[str]) -> dict[str, Stored]:
        """The stored answers among `keys`; ask for a few hundred at a time."""
        wanted = list(keys)
        marks = ",".join("?" * len(wanted))
        sql = f"SELECT key, attempt, choice, finish, tokens, max_tokens FROM answer WHERE key IN ({marks})"
        return {row[0]: Stored._make(row[1:]) for row in self.read(sql, wanted)}

    def knows(self, identity: str) -> bool:
        """Whether a model has ever answered."""
        sql = f"SELECT EXISTS (SELECT 1 FROM answer WHERE identity=? AND finish NOT IN ({NO_ANSWER}))"
        return bool(self.read(sql, [identity])[0][0])

    def bodies(self, attempts: Iterable[int]) -> dict[int, tuple[bytes, int]]:
        """The bodies of some attempts, and for how many answers each was asked; a few hundred at a time."""
        wanted = list(attempts)
        marks = ",".join("?" * len(wanted))
        rows = self.read(f"SELECT id, body, keys FROM attempt WHERE id IN ({marks})", wanted)
        return {attempt: (unpack(body), len(keys.split())) for attempt, body, keys in rows}

    def unread(self, identity: str) -> Iterator[tuple[int, bytes, bool]]:
        """Bodies that were stored but not yet read when a process ended (they were paid for); whether from a batch."""
        sql = f"SELECT id, body, {IN_BATCH} FROM attempt WHERE identity=? AND status='stored'"
        for attempt, body, batched in self.read(sql, [identity]):
            yield attempt, unpack(body), bool(batched)

    def spent(self, run: str) -> Spent:
        """What all attempts of a run cost so far."""
        row = self.read(
            "SELECT count(*), coalesce(sum(prompt_tokens),0), coalesce(sum(completion_tokens),0),"
            " coalesce(sum(CAST(usd AS REAL)),0), coalesce(sum(seconds),0),"
            f" coalesce(sum(status='sent' AND NOT {IN_BATCH}),0) FROM attempt WHERE run=?",
            [run],
        )[0]
        hours = self.read("SELECT coalesce(sum(seconds),0) / 3600 FROM session WHERE run=?", [run])[0][0]
        return Spent(*row)._replace(hours=hours)

    def read(self, sql: str, values: list[Any]) -> list[Any]:
        # another connection than the writer's sees only what is committed; it stays open, because opening one takes as
        # long as a hundred look-ups
        if self._reader is None:
            self._reader = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)
        return self._reader.execute(sql, values).fetchall()

    def close(self) -> None:
        """Finish what is queued, fold the write-ahead log in, release the lock."""
        self._commits.close()
        if self._reader is not None:
            self._reader.close()
        self._db.close()  # the last one to close folds the log in
        self._lock.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pack(body: bytes) -> bytes:
    """A body as it is stored: a zlib stream, whose checksum tells if a byte of it has changed since.

    A small one stays as it is inside the stream. The frame (RFC 1950, RFC 1951 section 3.2.4) is written here because
    zlib takes 70 us to set itself up for it.
    """
    if len(body) > COMPRESS_OVER_BYTES:
        return zlib.compress(body, 1)
    size = struct.pack("<HH", len(body), len(body) ^ 0xFFFF)
    return b"\x78\x01\x01" + size + body + zlib.adler32(body).to_bytes(4, "big")


def unpack(body: bytes) -> bytes:
    """A stored body as it came; one that does not start with zlib's 0x78 ("x") was stored without a checksum."""
    try:
        return zlib.decompress(body) if body[:1] == b"\x78" else body
    except zlib.error as e:
        raise JournalError(f"a stored body is damaged ({e}); `factory journal verify` names it") from None


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
