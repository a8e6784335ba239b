"""`factory journal verify | purge`: the journal seen from outside, checked, and made to forget.

Reading takes a read-only snapshot, so it works while a run holds the journal. A forgotten attempt keeps its row, its
run, its model and what it cost, because the money was spent all the same; its keys, prompt, body and the server's
words are gone.
"""

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from factory.errors import DiskError, JournalError, LockedError, RecipeError, VersionError
from factory.journal import VERSION, Journal, unpack
from factory.progress import bar
from factory.rows import Failure, Prompt, Reply, Row, endings
from factory.teachers.anthropic import read_any

Tell = Callable[[str], None]
"""Takes one line for people."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]

ALL_CHOICES = 10_000
OF_A_FIELD = ("reasoning_only", "special_tokens")
"""Endings that may hang on a reasoning field with an unusual name: the recipe has the name, the journal has not."""


class Answer(Row, frozen=True):
    """A stored answer: which of the body's choices it is, and under which key it is found."""

    key: str
    draw: Count
    choice: Count
    finish: str
    max_tokens: Count
    tokens: Count | None = None


class Attempt(Row, frozen=True):
    """A request that was sent, with the answers that it is still the source of; a line of an export.

    `id` is its number in the journal it comes from; `text` is the body, `base64` is one that is not UTF-8.
    """

    id: Count
    run: str
    model: str
    prompt: str
    asked: str
    keys: list[str]
    draw: Count
    max_tokens: Count
    sent: float
    status: Literal["sent", "stored", "read", "failed"]
    prompt_tokens: Count
    completion_tokens: Count
    seconds: float
    usd: str
    ended: float | None = None
    reason: str | None = None
    detail: str | None = None
    text: str | None = None
    base64: bytes | None = None
    answers: list[Answer] = []

    @property
    def body(self) -> bytes | None:
        return self.base64 if self.text is None else self.text.encode()


def noting(kept: list[str], tell: Tell) -> Tell:
    """A `Tell` that also keeps what it is told."""

    def both(line: str) -> None:
        kept.append(line)
        tell(line)

    return both


# -- opening ---------------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only snapshot of a journal, whoever else writes to it."""
    if not path.is_file():
        raise RecipeError(f"there is no journal {path}; name the folder of runs with --runs")
    with told(path):
        db = _snapshot(path)
        try:
            db.text_factory = _text
            found = db.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('attempt', 'answer')").fetchone()[0]
            if found != 2:
                raise JournalError(f"{path} holds no journal: it is cut off, or another kind of database")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise VersionError(f"{path} has journal version {version}, this factory reads up to {VERSION}: update")
            yield db
        finally:
            db.close()


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that alone may write: LockedError while another process holds the journal."""
    with Journal(path), told(path):
        db = sqlite3.connect(path, timeout=5, isolation_level=None)
        db.text_factory = _text
        try:
            db.execute("PRAGMA synchronous=FULL")
            yield db
        finally:
            db.close()


def _text(raw: bytes) -> str:
    """A flipped byte must not stop the reading: it is found by what it breaks."""
    return raw.decode("utf-8", "replace")


def _snapshot(path: Path) -> sqlite3.Connection:
    address = path.absolute().as_uri()
    db = sqlite3.connect(f"{address}?mode=ro", uri=True, timeout=30, isolation_level=None)
    try:
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        db.close()
        log = path.with_name(path.name + "-wal")
        if log.exists() and not (log.is_file() and log.stat().st_size == 0):
            raise
        # a folder where nothing can be written, so no other process writes there either
        db = sqlite3.connect(f"{address}?immutable=1", uri=True, isolation_level=None)
        db.execute("BEGIN")
    return db


@contextmanager
def told(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.Error as e:
        name = getattr(e, "sqlite_errorname", "")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise JournalError(f"{path} is damaged ({e}); {RECOVER.format(path=path)}") from None
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise LockedError(f"{path} is in use by another process ({e}); wait for it") from None
        if isinstance(e, sqlite3.OperationalError):
            raise DiskError(f"{path}: {e}; check permissions and free space") from None
        raise


RECOVER = "move it aside and try `sqlite3 {path} .recover` to save its rows"


# -- attempts with their answers -------------------------------------------------------------------------------------------

COLUMNS = (
    "id, run, identity, prompt, asked, keys, draw, max_tokens, sent, status, prompt_tokens, completion_tokens, seconds,"
    " usd, ended, reason, detail, body"
)


def which(db: sqlite3.Connection, prompt: str | None, run: str | None, model: str | None) -> tuple[str, list[str]]:
    """A condition on attempts with its values; RecipeError for what the journal has never seen."""
    wanted: dict[str, str] = {}
    if prompt is not None:
        wanted["prompt"] = _prompt_id(db, prompt)
    for column, word, value in (("run", "run", run), ("identity", "model", model)):
        if value is None:
            continue
        known = [name for (name,) in db.execute(f"SELECT DISTINCT {column} FROM attempt ORDER BY 1")]
        if value not in known:
            raise RecipeError(f"the journal has no {word} {value!r}; it has {', '.join(known) or 'none'}")
        wanted[column] = value
    return " AND ".join(f"{column} = ?" for column in wanted) or "1", list(wanted.values())


def _prompt_id(db: sqlite3.Connection, said: str) -> str:
    """The id of a prompt given as its id, as its text, or as the beginning of its id."""
    for exact in (said, Prompt.of([{"role": "user", "content": said}]).id):
        if said and db.execute("SELECT 1 FROM attempt WHERE prompt = ? LIMIT 1", [exact]).fetchone():
            return exact
    found: list[str] = []
    if re.fullmatch("[0-9a-f]{4,}", said):
        sql = "SELECT DISTINCT prompt FROM attempt WHERE prompt LIKE ? || '%' LIMIT 5"
        found = [name for (name,) in db.execute(sql, [said])]
    if len(found) > 1:
        raise RecipeError(f"several prompts begin with {said!r}: {', '.join(found)} ...; give more of the id")
    if not found:
        raise RecipeError(
            f"the journal has no prompt {said[:80]!r}; give the id that the stage folders show, or the whole text of a "
            "prompt of one user turn"
        )
    return found[0]


def attempts(db: sqlite3.Connection, where: str, values: list[str], damaged: Tell) -> Iterator[Attempt]:
    """The sound attempts in order, one at a time; of each that is damaged, what is wrong is told instead."""
    chosen = f"SELECT id FROM attempt WHERE {where}"
    answers = db.execute(
        "SELECT attempt, identity, key, draw, choice, finish, max_tokens, tokens FROM answer "
        f"WHERE attempt IN ({chosen}) ORDER BY attempt, choice",
        values,
    )
    groups = groupby(answers, key=lambda row: row[0])
    number, of_number = next(groups, (None, iter(())))
    for row in db.execute(f"SELECT {COLUMNS} FROM attempt WHERE {where} ORDER BY id", values):
        mine: list[Any] = []
        if number == row[0]:
            mine = list(of_number)
            number, of_number = next(groups, (None, iter(())))
        attempt, problems = _attempt(row, mine)
        if not problems:
            yield attempt
        for problem in problems:
            damaged(f"{named(attempt)}: {problem}")


def named(attempt: Attempt) -> str:
    return f"attempt {attempt.id} (run {attempt.run}, {attempt.model}, prompt {attempt.prompt or 'forgotten'})"


def _attempt(row: Any, answers: list[Any]) -> tuple[Attempt, list[str]]:
    """A row with its answers as an `Attempt`, and what is wrong with it."""
    problems: list[str] = []
    text, base64 = None, None
    try:
        base64 = None if row[-1] is None else unpack(row[-1])
        text = None if base64 is None else base64.decode()
    except JournalError:
        problems.append("its body does not match its checksum")
    except UnicodeDecodeError:
        pass  # kept as bytes
    attempt = Attempt(
        **dict(zip(FIELDS, (*row[:5], row[5].split(), *row[6:-1]), strict=True)),
        text=text,
        base64=base64 if text is None else None,
        answers=[Answer(**dict(zip(Answer.__struct_fields__, answer[2:], strict=True))) for answer in answers],
    )
    if any(answer[1] != attempt.model for answer in answers):
        problems.append("an answer names another model")
    return attempt, problems or list(faults(attempt))


FIELDS = [name for name in Attempt.__struct_fields__ if name not in ("text", "base64", "answers")]


def faults(attempt: Attempt) -> Iterator[str]:
    """What is wrong with an attempt, as far as it can be told from itself."""
    if any("\ufffd" in part for part in (attempt.run, attempt.model, attempt.prompt, attempt.asked, *attempt.keys)):
        yield "its names are not UTF-8"
    if not all(key.isalnum() for key in attempt.keys):
        yield "its keys are not hashes"
    if attempt.status not in ("sent", "stored", "read", "failed"):
        yield f"its status is {attempt.status!r}"
    if not _is_money(attempt.usd):
        yield f"its cost is {attempt.usd!r}"
    if len(set(attempt.keys)) < len(attempt.keys):
        yield "one of its keys stands there twice"
    if attempt.status in ("stored", "read") and attempt.keys and attempt.body is None:
        yield "its body is missing"
    elif any(answer.finish not in OF_A_FIELD for answer in attempt.answers):
        yield from _answer_faults(attempt)


def _answer_faults(attempt: Attempt) -> Iterator[str]:
    """Where what is filed differs from what its body says."""
    places = {key: draw for draw, key in enumerate(attempt.keys, attempt.draw)}
    outcome = read_any(attempt.body or b"")
    if isinstance(outcome, Reply) and attempt.status != "read":
        yield f"it has answers, but its status is {attempt.status!r}"
    if isinstance(outcome, Failure) and attempt.status != "failed":
        yield f"its body cannot be read ({outcome.reason}: {outcome.detail[:100]})"
        return
    known = endings(outcome, ALL_CHOICES if isinstance(outcome, Reply) else len(attempt.keys))
    for answer in attempt.answers:
        if places.get(answer.key) != answer.draw:
            yield f"the answer {answer.key} is not draw {answer.draw} of it"
        if not 0 <= answer.choice < len(known):
            yield f"the answer {answer.key} is choice {answer.choice}, its body has {len(known)}"
            continue
        finish, tokens = known[answer.choice]
        if answer.finish != finish and answer.finish not in OF_A_FIELD:
            yield f"the answer {answer.key} ended with {answer.finish!r}, its body says {finish!r}"
        if answer.tokens is not None and tokens is not None and answer.tokens != tokens:
            yield f"the answer {answer.key} has {answer.tokens} tokens, its body says {tokens}"


def _is_money(usd: str) -> bool:
    try:
        return Decimal(usd).is_finite()
    except InvalidOperation:
        return False


# -- verify ----------------------------------------------------------------------------------------------------------------


def verify(path: Path, tell: Tell) -> str:
    """Check file, rows, bodies and answers against each other; tells every damaged row, then raises JournalError."""
    damaged: list[str] = []
    broken = noting(damaged, tell)
    requests = answers = 0
    with reading(path) as db:
        for (line,) in db.execute("PRAGMA integrity_check"):
            if line != "ok":
                broken(f"file: {line}")
        for key, number in db.execute("SELECT key, attempt FROM answer WHERE attempt NOT IN (SELECT id FROM attempt)"):
            broken(f"answer {key}: its attempt {number} is missing")
        with bar("verify", db.execute("SELECT count(*) FROM attempt").fetchone()[0]) as advance:
            for attempt in attempts(db, "1", [], broken):
                requests += 1
                answers += len(attempt.answers)
                advance(1)
                if attempt.status == "stored":
                    tell(f"{named(attempt)}: stored, not read yet; the next run that asks this model reads it")
    if damaged:
        file = any(line.startswith("file:") for line in damaged)
        rows = "forget the rows with `factory journal purge --prompt ID`: they are asked again"
        raise JournalError(f"{path}: {len(damaged)} damages found; {RECOVER.format(path=path) if file else rows}")
    return f"{path}: sound, {requests} requests with {answers} stored answers"


# -- purge -----------------------------------------------------------------------------------------------------------------


def purge(path: Path, *, prompt: str | None, run: str | None, model: str | None, failed: bool, sure: bool) -> str:
    """Forget answers, bodies, keys and prompts of the chosen attempts, so that no byte of them is left in the file."""
    if not path.is_file():
        raise RecipeError(f"there is no journal {path}; name the folder of runs with --runs")
    with writing(path) as db:
        where, values = which(db, prompt, run, model)
        where += " AND keys <> ''" + (" AND status = 'failed'" if failed else "")
        chosen = f"SELECT id FROM attempt WHERE {where}"
        requests = db.execute(f"SELECT count(*) FROM ({chosen})", values).fetchone()[0]
        answers = db.execute(f"SELECT count(*) FROM answer WHERE attempt IN ({chosen})", values).fetchone()[0]
        what = f"{answers} stored answers and what is kept of {requests} requests"
        if not requests:
            return f"{path}: there is nothing to forget"
        if not sure:
            raise RecipeError(f"this forgets {what}, for good; add --yes to do it")
        db.execute("PRAGMA secure_delete=ON")
        db.execute("BEGIN IMMEDIATE")
        db.execute(f"DELETE FROM answer WHERE attempt IN ({chosen})", values)
        # a body that nobody has read cannot be read any more; other attempts stay what they were, as do all sums
        db.execute(
            "UPDATE attempt SET body = NULL, detail = NULL, prompt = '', asked = '', keys = '',"
            f" status = CASE status WHEN 'stored' THEN 'read' ELSE status END WHERE {where}",
            values,
        )
        db.execute("COMMIT")
        _erase(path, db)
    return f"forgotten: {what}; their cost stays counted. Stage folders and data sets in {path.parent}/ may still hold the text"


def _erase(path: Path, db: sqlite3.Connection) -> None:
    """Write the file anew: rows that had moved before left copies of themselves in pages that are free now."""
    try:
        db.execute("VACUUM")
        busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    except sqlite3.OperationalError as e:
        raise DiskError(
            f"{path}: the answers are forgotten, but the file could not be written anew ({e}), so traces of them may be "
            f"left in it; free space and run `sqlite3 {path} VACUUM`"
        ) from None
    if busy:
        raise LockedError(
            f"{path}: the answers are forgotten, but another process reads, so traces of them are left in its "
            "write-ahead log; they go when a next run, or purge, closes the journal"
        )
