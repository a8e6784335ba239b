"""`factory journal export | import`: what was paid for on one machine is an answer on another, once and unharmed."""

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from factory.errors import AuthError
from factory.exchange import CHUNK, End
from factory.journal import Journal, Stored, pack
from factory.ledger import Answer
from factory.rows import encode
from tests.paid import Told, filled, journal, leave_unread, line, request, sql, stats, write
from tests.server import chat, error, serving
from tests.test_ask import ask, asks, model_at, questions, texts

ALL = "SELECT * FROM attempt ORDER BY id", "SELECT * FROM answer ORDER BY key"
CARRIED = (
    "SELECT identity, prompt, asked, keys, draw, max_tokens, sent, ended, status, reason, detail, body, prompt_tokens,"
    " completion_tokens, seconds, usd FROM attempt ORDER BY id"
)


@pytest.fixture
async def runs(tmp_path: Path) -> Path:
    (tmp_path / "journal.sqlite").write_bytes(await filled())
    return tmp_path


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Another machine's folder."""
    return tmp_path / "there"


def dump(runs: Path) -> list[list[Any]]:
    return [sql(runs, statement) for statement in ALL]


def export(runs: Path, to: Path, *arguments: str) -> Path:
    to.unlink(missing_ok=True)
    assert journal(runs, "export", str(to), *arguments) == 0
    return to


# -- there and back ------------------------------------------------------------------------------------------------------


async def test_everything_arrives_as_it_was_and_a_second_import_adds_nothing(
    runs: Path, there: Path, tmp_path: Path, capsys: Told
) -> None:
    await leave_unread(runs)
    with Journal(runs / "journal.sqlite") as opened:
        await opened.begin("run", request(8), "0.5", 7)  # outcome unknown
    odd = pack(b"\xff\xfe\0").hex()  # not UTF-8
    sql(runs, f"UPDATE attempt SET body = x'{odd}' WHERE status = 'failed'")
    file = export(runs, tmp_path / "paid.jsonl")
    assert file.stat().st_mode & 0o777 == 0o600
    assert journal(there, "import", str(file)) == 0
    assert capsys.readouterr().out == "8 answers are new, 0 were here already\n"
    assert sql(there, CARRIED) == sql(runs, CARRIED)
    assert sql(there, ALL[1]) == sql(runs, ALL[1])
    assert journal(there, "verify") == 0
    mine, theirs = stats(runs, capsys), stats(there, capsys)
    assert [{**group, "run": "imported:run"} for group in mine] == theirs
    before = dump(there)
    assert journal(there, "import", str(file)) == 0
    assert capsys.readouterr().out == "0 answers are new, 8 were here already\n"
    assert dump(there) == before


async def test_what_was_paid_for_elsewhere_is_not_asked_again_and_no_budget_counts_it(
    tmp_path: Path, there: Path
) -> None:
    async with serving() as server:
        model = model_at(server.url, price={"input": 1, "output": 1})
        _, answers = await ask(tmp_path, model, asks(model, questions(3), n=2))
        file = export(tmp_path, tmp_path / "paid.jsonl")
        assert journal(there, "import", str(file)) == 0
        tally, again = await ask(there, model, asks(model, questions(3), n=2))
    assert (tally.sent, tally.reused) == (0, 6)
    assert again == answers
    with Journal(there / "journal.sqlite") as opened:
        assert opened.spent("run").requests == 0
        assert opened.spent("run").usd == 0
        assert opened.spent("imported:run").requests == 3


async def test_a_journal_is_imported_directly_even_while_it_is_held(runs: Path, there: Path, capsys: Told) -> None:
    with Journal(runs / "journal.sqlite"):
        assert journal(there, "import", str(runs / "journal.sqlite")) == 0
    assert "8 answers are new" in capsys.readouterr().out
    assert sql(there, CARRIED) == sql(runs, CARRIED)
    before = dump(there)
    assert journal(there, "import", str(runs / "journal.sqlite")) == 0
    assert dump(there) == before


async def test_our_own_export_comes_back_to_nothing_new(runs: Path, there: Path, tmp_path: Path) -> None:
    """Also over another machine, whose name for the run is not ours."""
    await leave_unread(runs)
    before = dump(runs)
    assert journal(there, "import", str(export(runs, tmp_path / "out.jsonl"))) == 0
    for file in (tmp_path / "out.jsonl", export(there, tmp_path / "back.jsonl")):
        assert journal(runs, "import", str(file)) == 0
        assert dump(runs) == before
    third = tmp_path / "third"
    assert journal(third, "import", str(tmp_path / "back.jsonl")) == 0
    assert sql(third, "SELECT DISTINCT run FROM attempt") == [("imported:run",)]


async def test_an_unread_body_is_read_where_it_arrives(there: Path, tmp_path: Path) -> None:
    async with serving() as server:
        model = model_at(server.url)
        (asked,) = asks(model, questions(1))
        with Journal(tmp_path / "journal.sqlite") as opened:
            await opened.store(
                await opened.begin("run", asked, "0", 1), encode(chat({"model": "m", "messages": asked.messages}))
            )
        file = export(tmp_path, tmp_path / "paid.jsonl")
        for _ in range(2):  # the second time it has been read
            assert journal(there, "import", str(file)) == 0
            tally, answers = await ask(there, model, [asked])
            assert tally.sent == 0
            assert texts(answers) == [["answer 0 to question 0 (seed None)"]]
    assert sql(there, "SELECT status FROM attempt") == [("read",)]


def test_an_unread_body_is_of_no_use_where_its_answer_is_stored(there: Path, tmp_path: Path) -> None:
    assert journal(there, "import", str(write(tmp_path / "a", line(1)))) == 0
    unread = line(1, sent=5.0, status="stored", answers=[])
    assert journal(there, "import", str(write(tmp_path / "b", unread))) == 0
    assert sql(there, "SELECT status FROM attempt") == [("read",)]


def test_what_became_of_a_request_is_learned_later(there: Path, tmp_path: Path) -> None:
    """Its sender exported in the middle; the run that it counts for here stays what it was."""
    early = line(1, status="sent", text=None, answers=[], ended=None)
    assert journal(there, "import", str(write(tmp_path / "a", early))) == 0
    sql(there, "UPDATE attempt SET run = 'local'")
    assert journal(there, "import", str(write(tmp_path / "b", line(1)))) == 0
    assert sql(there, "SELECT run, status FROM attempt") == [("local", "read")]
    before = dump(there)
    assert journal(there, "import", str(write(tmp_path / "c", early))) == 0
    assert dump(there) == before


def test_a_part_is_exported_by_run_model_and_prompt(
    tmp_path: Path, there: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "all", line(1), line(2, run="two"), line(3, model="n"))
    assert journal(there, "import", str(file)) == 0
    for arguments, wanted in (
        (["--run", "imported:two"], {2}),
        (["--model", "n"], {3}),
        (["--prompt", f"{1:016x}"], {1}),
        (["--run", "imported:away", "--model", "m"], {1}),
        ([], {1, 2, 3}),
    ):
        capfd.readouterr()
        assert journal(there, "export", "-", *arguments) == 0
        head, *rows, end = map(json.loads, capfd.readouterr().out.splitlines())
        assert {int(row["prompt"], 16) for row in rows} == wanted
        assert (head, end) == ({"factory_journal": 1, "attempts": len(wanted)}, {"end": len(wanted)})


def test_what_is_forgotten_is_not_carried_anywhere(runs: Path, there: Path, tmp_path: Path) -> None:
    assert journal(runs, "purge", "--prompt", "question 3", "--yes") == 0
    rows = export(runs, tmp_path / "paid.jsonl").read_text().splitlines()[1:-1]
    assert len(rows) == 5
    assert not any("question 3" in row for row in rows)
    assert journal(there, "import", str(runs / "journal.sqlite")) == 0
    assert sql(there, "SELECT count(*) FROM attempt") == [(5,)]


async def test_no_key_is_exported_though_the_server_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-canary-0123456789"
    monkeypatch.setenv("CANARY_KEY", key)

    async def refuse(body: dict[str, Any], before: int) -> web.Response:
        return error(401, f"the key {key} is not known")

    async with serving(refuse) as server:
        model = model_at(server.url, api_key_env="CANARY_KEY")
        with pytest.raises(AuthError):
            await ask(tmp_path, model, asks(model, questions(1)))
    (row,) = export(tmp_path, tmp_path / "paid.jsonl").read_text().splitlines()[1:-1]
    assert json.loads(row)["reason"] == "auth"
    assert key not in row


def test_an_export_replaces_no_file_and_leaves_none_behind(runs: Path, tmp_path: Path, capsys: Told) -> None:
    before = sorted(tmp_path.iterdir())
    for to in (str(runs / "journal.sqlite"), str(tmp_path / "no/such/folder")):
        assert journal(runs, "export", to) == 2
    assert journal(runs, "export", str(tmp_path / "new"), "--run", "unknown") == 2
    assert [path for path in sorted(tmp_path.iterdir()) if path.suffix not in (".sqlite-wal", ".sqlite-shm")] == before


# -- which answer stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "stays"),
    [
        (("stop", 10), ("stop", 99), "ours"),
        (("stop", 10), ("length", 99), "ours"),  # never a truncated one for one that ended by itself
        (("length", 10), ("length", 10), "ours"),
        (("length", 10), ("length", 9), "ours"),
        (("length", 10), ("length", 11), "theirs"),
        (("length", 10), ("stop", 9), "theirs"),
        (("reasoning_only", 10), ("length", 9), "theirs"),  # what is no answer gives way to one
        (("reasoning_only", 10), ("reasoning_only", 11), "theirs"),
        (("length", 10), ("reasoning_only", 11), "ours"),
        (("filtered_output", 10), ("stop", 9), "theirs"),
        (("stop", 10), ("filtered_output", 99), "ours"),
        (("length", 10), ("filtered_output", 99), "ours"),
    ],
)
def test_an_answer_is_kept_unless_it_is_truncated_and_theirs_is_better(
    there: Path, tmp_path: Path, ours: tuple[str, int], theirs: tuple[str, int], stays: str
) -> None:
    for name, (finish, limit) in (("ours", ours), ("theirs", theirs)):
        sent = {"ours": 1.0, "theirs": 2.0}[name]
        assert journal(there, "import", str(write(tmp_path / name, line(1, finish, limit, sent=sent, run=name)))) == 0
    with Journal(there / "journal.sqlite") as opened:
        stored: Stored = opened.answers([f"{1:032x}"])[f"{1:032x}"]
    assert (stored.finish, stored.max_tokens) == (ours if stays == "ours" else theirs)
    kept = sql(there, "SELECT run FROM attempt JOIN answer ON attempt.id = answer.attempt")
    assert kept == [(f"imported:{stays}",)]
    assert journal(there, "verify") == 0
    before = dump(there)
    assert journal(there, "import", str(tmp_path / "theirs")) == 0
    assert dump(there) == before


def test_of_two_draws_only_the_lacking_one_is_taken(there: Path, tmp_path: Path) -> None:
    assert journal(there, "import", str(write(tmp_path / "ours", line(1)))) == 0
    body = chat({"model": "m", "messages": [{"content": "x"}], "n": 2})
    both = [Answer(key=f"{i:032x}", draw=i - 1, choice=i - 1, finish="stop", max_tokens=10) for i in (1, 2)]
    two = line(1, sent=5.0, keys=[answer.key for answer in both], answers=both, text=json.dumps(body))
    assert journal(there, "import", str(write(tmp_path / "theirs", two))) == 0
    assert sql(there, "SELECT key, attempt, choice FROM answer ORDER BY key") == [
        (f"{1:032x}", 1, 0),
        (f"{2:032x}", 2, 1),
    ]


# -- files that are not whole ----------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_named_and_everything_before_is_in(tmp_path: Path, capsys: Told) -> None:
    whole = write(tmp_path / "whole", *map(line, range(4))).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({ends[0], *ends[1:-1], *(e - 1 for e in ends[1:-1]), *(e + 20 for e in ends[:-2]), ends[-2] + 3}):
        there, torn = tmp_path / str(cut), tmp_path / "torn"
        torn.write_bytes(whole[:cut])
        capsys.readouterr()
        assert journal(there, "import", str(torn)) == 2
        told = capsys.readouterr().err
        complete = sum(end <= cut + 1 for end in ends[1:-1])  # a last line may lack its newline
        assert f"torn:{complete + 2}: " in told
        assert "cut off" in told
        assert sql(there, "SELECT count(*) FROM answer") == [(complete,)]
        assert journal(there, "import", str(tmp_path / "whole")) == 0
        assert sql(there, "SELECT count(*) FROM answer") == [(4,)]


BAD = {
    "not JSON": (b"nothing\n", 2, "not an attempt"),
    "a field is missing": (b'{"id": 1}\n', 2, "`run`"),
    "a negative count": (encode(line(2)).replace(b'"draw":0', b'"draw":-1') + b"\n", 2, "$.draw"),
    "a number too large": (encode(line(2)).replace(b'"id":3', b'"id":9223372036854775808') + b"\n", 2, "$.id"),
    "a second header": (b'{"factory_journal":1,"attempts":0}\n', 2, "`id`"),
    "an end too early": (b'{"end":7}\n', 2, "7 attempts should stand before this line, 1 do"),
    "another end than the body's": (encode(line(2)).replace(b'"finish":"stop"', b'"finish":"length"') + b"\n", 11, "its body says"),
    "a body without answers": (encode(line(2, text="{}")) + b"\n", 11, "missing_choice"),
    "an answer of another attempt": (encode(line(2, keys=["aa"])) + b"\n", 11, "is not draw 0"),
    "keys that would split": (encode(line(2, keys=["a a"], answers=[])) + b"\n", 11, "hashes"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named_and_never_gets_in(there: Path, tmp_path: Path, bad: str, capsys: Told) -> None:
    row, code, what = BAD[bad]
    head, first, last, _ = write(tmp_path / "file", line(0), line(5)).read_bytes().splitlines(keepends=True)
    (tmp_path / "file").write_bytes(head + first + row + last + encode(End(end=3)) + b"\n")
    assert journal(there, "import", str(tmp_path / "file")) == code
    told = capsys.readouterr().err
    assert "file:3: " in told
    assert what in told
    assert sql(there, "SELECT count(*) FROM answer") == [(1 if code == 2 else 2,)]
    assert journal(there, "verify") == 0


def test_damaged_attempts_are_left_out_and_named_on_both_ways(
    runs: Path, there: Path, tmp_path: Path, capsys: Told
) -> None:
    sql(runs, "UPDATE answer SET finish = 'other' WHERE attempt = (SELECT max(attempt) FROM answer)")
    for arguments in ((runs, "export", str(tmp_path / "file")), (there, "import", str(runs / "journal.sqlite"))):
        assert journal(*arguments) == 11
        assert "its body says" in capsys.readouterr().err
    assert len((tmp_path / "file").read_text().splitlines()) == 1 + 5 + 1
    assert sql(there, "SELECT count(*) FROM attempt") == [(5,)]


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (b"", 2, ":1: this is no export"),
        (b"\xff\xfe", 2, ":1: this is no export"),
        (b'{"prompt": "a", "completion": "b"}\n', 2, ":1: this is no export"),
        (b'{"factory_journal":99,"attempts":0}\n', 12, "version 99"),
        (b"SQLite format 3\0" + b"x" * 99, 11, "file"),
    ],
)
def test_a_file_of_another_kind_is_named_and_makes_no_journal(
    there: Path, tmp_path: Path, content: bytes, code: int, told: str, capsys: Told
) -> None:
    (tmp_path / "file").write_bytes(content)
    assert journal(there, "import", str(tmp_path / "file")) == code
    assert told in capsys.readouterr().err
    assert not there.exists()


def test_there_must_be_another_file_to_import(runs: Path, capsys: Told) -> None:
    for source in (runs / "nothing", runs, runs / "journal.sqlite"):
        assert journal(runs, "import", str(source)) == 2
    other = sqlite3.connect(runs / "other.sqlite")
    other.execute("CREATE TABLE t (a)")
    other.close()
    assert journal(runs, "import", str(runs / "other.sqlite")) == 11
    assert "no journal" in capsys.readouterr().err


# -- many --------------------------------------------------------------------------------------------------------------


def test_a_killed_import_leaves_whole_chunks_and_goes_on(there: Path, tmp_path: Path) -> None:
    count = 3 * CHUNK + 7
    file = write(tmp_path / "many", *map(line, range(count)))
    command = [sys.executable, "-m", "factory", "journal", "import", str(file), "--runs", str(there)]
    found = 0
    for _ in range(2):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while child.poll() is None and _answers(there) <= found:
            time.sleep(0.001)
        child.kill()
        child.communicate()
        now = _answers(there)
        assert now % CHUNK == 0 or now == count
        assert now > found or now == count
        found = now
    subprocess.run(command, check=True, capture_output=True)
    assert _answers(there) == count
    assert journal(there, "verify") == 0


def _answers(runs: Path) -> int:
    path = runs / "journal.sqlite"
    if not path.exists():
        return 0
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
    try:
        return int(db.execute("SELECT count(*) FROM answer").fetchone()[0])
    except sqlite3.OperationalError:  # its tables are not made yet
        return 0
    finally:
        db.close()


def test_memory_does_not_grow_with_the_journal(there: Path, tmp_path: Path) -> None:
    """60 MB of bodies go out and in within a few."""
    large = json.loads(line(0).text or "")
    attempts = []
    for i in range(600):
        large["choices"][0]["message"]["content"] = f"{i} " + "a long answer " * 7000
        attempts.append(line(i, text=json.dumps(large)))
    file = write(tmp_path / "large", *attempts)
    assert file.stat().st_size > 50e6
    code = "import sys, resource; from factory.cli import main; import factory.exchange\n"
    code += "small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "assert main(sys.argv[1:]) == 0\n"
    code += "print('grown', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - small)"
    for verb, where in (("import", file), ("export", tmp_path / "out")):
        command = [sys.executable, "-c", code, "journal", verb, str(where), "--runs", str(there)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout.split("grown")[1]) < 30_000, done.stdout  # kB
