"""`factory journal export | import`: carry what was paid for to another machine, and take it in there.

An export is JSON lines: a header with the format's version, one line per attempt with its answers and its body, an end
line with their number, so that a file cut off anywhere is noticed. It holds no key: requests are not in the journal,
and what servers said when they refused a key is left out.

Imported attempts stand under the run `imported:NAME`, which no recipe can be called: what another machine paid never
counts against the budget of a run here.
"""

import itertools
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from factory.errors import JournalError, RecipeError, VersionError
from factory.journal import Stored, pack
from factory.ledger import (
    COLUMNS,
    Answer,
    Attempt,
    Tell,
    attempts,
    faults,
    named,
    noting,
    reading,
    told,
    which,
    writing,
)
from factory.progress import bar
from factory.rows import CUT, Row, encode
from factory.run import fsync_folder
from factory.teachers.failures import RULES

FORMAT = 1
IMPORTED = "imported:"
CHUNK = 500
"""Attempts per transaction of an import."""


class Header(Row, frozen=True):
    """First line: the format's version, and how many attempts were chosen."""

    factory_journal: int
    attempts: int


class End(Row, frozen=True):
    """Last line: how many attempts were written."""

    end: int


# -- export ----------------------------------------------------------------------------------------------------------------


def export(path: Path, to: str, tell: Tell, prompt: str | None, run: str | None, model: str | None) -> str:
    """Write the chosen attempts to the file `to`, or to stdout for `-`; what was forgotten is not in it.

    Damaged attempts are told and left out, and JournalError is raised at the end.
    """
    damaged: list[str] = []
    broken = noting(damaged, tell)
    written = 0
    with reading(path) as db, _output(to) as out:
        where, values = which(db, prompt, run, model)
        where += " AND keys <> ''"
        chosen = db.execute(f"SELECT count(*) FROM attempt WHERE {where}", values).fetchone()[0]
        out.write(encode(Header(factory_journal=FORMAT, attempts=chosen)) + b"\n")
        with bar("export", chosen) as advance:
            for attempt in attempts(db, where, values, broken):
                out.write(encode(_without_key(attempt)) + b"\n")
                written += 1
                advance(1)
        out.write(encode(End(end=written)) + b"\n")
    if damaged:
        raise JournalError(f"{written} attempts are exported, the damaged ones are not; see `factory journal verify`")
    return f"{written} attempts are exported"


def _without_key(attempt: Attempt) -> Attempt:
    """Some servers repeat the key that they refuse."""
    return msgspec.structs.replace(attempt, detail=None) if attempt.reason == "auth" else attempt


@contextmanager
def _output(to: str) -> Iterator[IO[bytes]]:
    """A file that appears whole or not at all and is for its owner's eyes; or stdout."""
    if to == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(to)
    if path.exists():
        raise RecipeError(f"{to} exists already; move it away or give another name")
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch(0o600)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        fsync_folder(path.absolute().parent)
    except FileNotFoundError:
        raise RecipeError(f"there is no folder {path.parent}") from None
    finally:
        temporary.unlink(missing_ok=True)


# -- import ----------------------------------------------------------------------------------------------------------------


def merge(path: Path, source: Path, tell: Tell) -> str:
    """Take in an export, or another journal. What is here already is kept, so a second time adds nothing.

    A line that cannot be read ends the import with RecipeError, and everything before it is in. Damaged attempts are
    told and left out, and JournalError is raised at the end.
    """
    if not source.exists() or source.is_dir():
        raise RecipeError(f"there is no file {source}; give an export or a journal.sqlite")
    if path.exists() and source.samefile(path):
        raise RecipeError(f"{source} is this journal itself")
    ends: list[str] = []
    damaged: list[str] = []
    with _opened(source, ends.append, noting(damaged, tell)) as (incoming, total), writing(path) as db:
        merger = _Merger(db)
        merger.take(incoming, total)
    result = f"{merger.new} answers are new, {merger.kept} were here already"
    if ends:
        raise RecipeError(f"{ends[0]}; everything before it is in: {result}")
    if damaged:
        raise JournalError(f"{source}: {len(damaged)} damages found, those attempts are left out; {result}")
    return result


@contextmanager
def _opened(source: Path, ends: Tell, damaged: Tell) -> Iterator[tuple[Iterator[Attempt], int]]:
    """The sound attempts of a file, and about how many there are; why its reading ended early is told to `ends`."""
    with source.open("rb") as file:
        if file.peek(16).startswith(b"SQLite format 3\0"):
            with reading(source) as db:
                total = db.execute("SELECT count(*) FROM attempt").fetchone()[0]
                yield _of_journal(source, db, damaged), total
        else:
            total = _header(source, file)
            yield _sound(_lines(source, file, ends), damaged), total


def _of_journal(source: Path, db: sqlite3.Connection, damaged: Tell) -> Iterator[Attempt]:
    with told(source):  # here, because what fails where these are written is another file
        yield from attempts(db, "keys <> ''", [], damaged)


def _header(source: Path, file: IO[bytes]) -> int:
    try:
        header = msgspec.json.decode(file.readline(10_000), type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise RecipeError(f"{source}:1: this is no export of a journal, and no journal.sqlite") from None
    if header.factory_journal > FORMAT:
        raise VersionError(
            f"{source} has export version {header.factory_journal}, this factory reads up to {FORMAT}: update it"
        )
    return header.attempts


def _lines(source: Path, file: IO[bytes], ends: Tell) -> Iterator[tuple[str, Attempt]]:
    """Each attempt with the place of its line; a file that ends too early, or badly, is told."""
    as_attempt, as_end = msgspec.json.Decoder(Attempt), msgspec.json.Decoder(End)
    read = 0
    for number, line in enumerate(file, 2):
        place = f"{source}:{number}"
        try:
            row = (as_end if line.startswith(b'{"end":') else as_attempt).decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            why = "is not an attempt" if line.endswith(b"\n") else "is cut off"
            ends(f"{place}: the line {why} ({e})")
            return
        if isinstance(row, End):
            if row.end != read:
                ends(f"{place}: {row.end} attempts should stand before this line, {read} do")
            return
        read += 1
        yield place, row
    ends(f"{source}:{read + 2}: the file is cut off here")


def _sound(lines: Iterator[tuple[str, Attempt]], damaged: Tell) -> Iterator[Attempt]:
    for place, attempt in lines:
        problems = list(faults(attempt))
        if not problems:
            yield attempt
        for problem in problems:
            damaged(f"{place}: {named(attempt)}: {problem}")


class _Merger:
    """Adds attempts to a journal, some hundreds in one transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.new = self.kept = 0
        # an attempt is the same on every machine by its model, its keys and the moment when it was sent
        db.execute("CREATE TEMP TABLE known AS SELECT sent, id FROM attempt")
        db.execute("CREATE INDEX temp.known_sent ON known (sent)")

    def take(self, incoming: Iterator[Attempt], total: int) -> None:
        with bar("import", total) as advance:
            while chunk := list(itertools.islice(incoming, CHUNK)):
                self.db.execute("BEGIN IMMEDIATE")
                for attempt in chunk:
                    self._add(attempt)
                self.db.execute("COMMIT")
                advance(len(chunk))

    def _add(self, attempt: Attempt) -> None:
        """Add an attempt if it is not here yet, unless we have all of its answers from elsewhere."""
        number, status, run = self._ours(attempt)
        if status in ("read", "failed") or (status and attempt.status in ("sent", status)):
            self.kept += len(attempt.answers)
            return
        wanted = [answer for answer in attempt.answers if self._wanted(answer)]
        self.kept += len(attempt.answers) - len(wanted)
        superfluous = attempt.status == "stored" and any(self._stored(key) for key in attempt.keys)
        if superfluous or (attempt.answers and not wanted):
            return
        if status:  # ours has not got as far as theirs, which knows what became of it
            self.db.execute("DELETE FROM attempt WHERE id = ?", [number])
            self.db.execute("DELETE FROM temp.known WHERE id = ?", [number])
        else:
            run = attempt.run if attempt.run.startswith(IMPORTED) else IMPORTED + attempt.run
        self._insert(attempt, run, wanted)

    def _ours(self, attempt: Attempt) -> tuple[int, str, str]:
        """Number, status and run of the same attempt in our journal; the status is empty if there is none."""
        row = self.db.execute(
            "SELECT id, status, run FROM temp.known JOIN attempt USING (id)"
            " WHERE known.sent = ? AND identity = ? AND keys = ?",
            [attempt.sent, attempt.model, " ".join(attempt.keys)],
        ).fetchone()
        return row or (0, "", "")

    def _stored(self, key: str) -> Stored | None:
        row = self.db.execute(
            "SELECT attempt, choice, finish, tokens, max_tokens FROM answer WHERE key = ?", [key]
        ).fetchone()
        return Stored(*row) if row else None

    def _wanted(self, theirs: Answer) -> bool:
        """Ours stays if it ended by itself; a truncated one gives way to one that did, or that had more room; and what is
        no answer gives way to one."""
        ours = self._stored(theirs.key)
        if ours is None:
            return True
        if (ours.finish in RULES) != (theirs.finish in RULES):
            return ours.finish in RULES
        return ours.finish in CUT and (theirs.finish not in CUT or not ours.valid(theirs.max_tokens))

    def _insert(self, a: Attempt, run: str, answers: list[Answer]) -> None:
        body = None if a.body is None else pack(a.body)
        row = (
            run, a.model, a.prompt, a.asked, " ".join(a.keys), a.draw, a.max_tokens, a.sent, a.status, a.prompt_tokens,
            a.completion_tokens, a.seconds, a.usd, a.ended, a.reason, a.detail, body,
        )  # fmt: skip
        columns = COLUMNS.removeprefix("id, ")
        number = self.db.execute(f"INSERT INTO attempt ({columns}) VALUES ({','.join('?' * len(row))})", row).lastrowid
        self.db.execute("INSERT INTO temp.known VALUES (?, ?)", [a.sent, number])
        self.db.executemany(
            "INSERT OR REPLACE INTO answer (key, identity, draw, attempt, choice, finish, tokens, max_tokens)"
            " VALUES (?,?,?,?,?,?,?,?)",
            [(x.key, a.model, x.draw, number, x.choice, x.finish, x.tokens, x.max_tokens) for x in answers],
        )
        self.new += len(answers)
