"""`factory journal stats | verify | purge` on journals that a real server has filled, damaged where a test says so."""

import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factory.errors import JournalError
from factory.journal import Journal, pack
from factory.rows import encode
from tests.paid import IDS, Told, filled, journal, leave_unread, request, sql, stats
from tests.server import chat, serving
from tests.test_ask import ask, asks, model_at, questions, texts


@pytest.fixture
async def runs(tmp_path: Path) -> Path:
    (tmp_path / "journal.sqlite").write_bytes(await filled())
    return tmp_path


# -- stats -----------------------------------------------------------------------------------------------------------


async def test_stats_tell_where_requests_and_money_went(runs: Path, capsys: Told) -> None:
    with Journal(runs / "journal.sqlite") as opened:
        await opened.begin("run", request(), "0.5", 7)
    await leave_unread(runs, 8)
    one, other = stats(runs, capsys)
    assert (one["run"], one["requests"], one["answers"], one["failures"]) == ("run", 6, 8, {"bad_request": 1})
    worst = len(encode(questions(1)[0].messages)) + 2 * 50 * 2  # what was reserved for the request that failed
    assert one["usd"] == pytest.approx((5 * 30 + worst) / 1e6)
    assert {why: round(w["usd"] * 1e6) for why, w in one["wasted"].items()} == {
        "failed": worst,
        "truncated": 30,
        "superseded": 30,
    }
    assert (one["prompt_tokens"], one["completion_tokens"]) == (5 * 10 + worst - 200, 5 * 10 + 100)
    assert (other["model"], other["requests"], other["unknown"], other["unread"]) == ("other", 2, 1, 1)
    with Journal(runs / "journal.sqlite") as opened:
        spent = opened.spent("run")
    assert spent.usd == pytest.approx(one["usd"] + other["usd"])
    assert spent.requests == one["requests"] + other["requests"]


def test_stats_for_people_say_the_same(runs: Path, capsys: Told) -> None:
    assert journal(runs, "stats") == 0
    told = capsys.readouterr().out
    for words in (
        "run run, model openai:",
        "6 requests, 8 stored answers",
        "failed: bad_request 1",
        "truncated 0.000030",
    ):
        assert words in told


async def test_reading_works_while_the_journal_is_held_and_writing_is_refused(runs: Path, capsys: Told) -> None:
    with Journal(runs / "journal.sqlite") as opened:
        await opened.begin("late", request(), "0", 1)  # stands in the write-ahead log alone
        assert [group["run"] for group in stats(runs, capsys)] == ["run", "late"]
        assert journal(runs, "verify") == 0
        assert journal(runs, "export", str(runs / "export")) == 0
        for arguments in (["purge", "--run", "run", "--yes"], ["import", str(runs / "export")]):
            assert journal(runs, *arguments) == 10
            assert f"process {os.getpid()}" in capsys.readouterr().err


def test_a_journal_in_a_read_only_folder_is_read(runs: Path, tmp_path: Path, capsys: Told) -> None:
    still = tmp_path / "still"
    still.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(still)], check=True)
    try:
        (still / "journal.sqlite").write_bytes((runs / "journal.sqlite").read_bytes())
        subprocess.run(["mount", "-o", "remount,ro", str(still)], check=True)
        assert stats(still, capsys)[0]["requests"] == 6
        assert journal(still, "verify") == 0
        assert journal(still, "purge", "--failed", "--yes") == 9
    finally:
        subprocess.run(["umount", str(still)], check=True)


@pytest.mark.parametrize("verb", ["stats", "verify", "export -", "purge --failed"])
def test_a_folder_without_a_journal_is_named_and_left_alone(tmp_path: Path, verb: str, capsys: Told) -> None:
    assert journal(tmp_path, *verb.split()) == 2
    assert "there is no journal" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


async def test_a_folder_may_be_called_anything(tmp_path: Path, capsys: Told) -> None:
    odd = tmp_path / "a#b %41?x=1"
    async with serving() as server:
        model = model_at(server.url)
        _, answers = await ask(odd, model, asks(model, questions(1)))
    assert texts(answers) == [["answer 0 to question 0 (seed None)"]]
    assert stats(odd, capsys)[0]["answers"] == 1


# -- verify ----------------------------------------------------------------------------------------------------------


async def test_a_sound_journal_is_called_sound_and_what_is_unread_is_told(runs: Path, capsys: Told) -> None:
    assert journal(runs, "verify") == 0
    assert capsys.readouterr().out == f"{runs}/journal.sqlite: sound, 6 requests with 8 stored answers\n"
    await leave_unread(runs)
    assert journal(runs, "verify") == 0
    assert "attempt 7 (run run, other, prompt" in (told := capsys.readouterr().out)
    assert "stored, not read yet" in told


def flip(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Bytes of the file itself, not of a row: as a disk would do it."""

    def act(runs: Path) -> None:
        path = runs / "journal.sqlite"
        whole = path.read_bytes()
        assert whole.count(old) >= 1
        path.write_bytes(whole.replace(old, new, 1))

    return act


def flip_in_compressed_body(runs: Path) -> None:
    ((body,),) = sql(runs, f"SELECT body FROM attempt WHERE prompt = '{IDS[2]}'")
    assert len(body) < 2000
    middle = body[40:60]
    flip(middle, middle[:10] + bytes([middle[10] ^ 1]) + middle[11:])(runs)


def run_sql(*statements: str) -> Callable[[Path], None]:
    return lambda runs: (sql(runs, *statements), None)[1]


def put_body(body: bytes) -> Callable[[Path], None]:
    return run_sql(f"UPDATE attempt SET body = x'{pack(body).hex()}' WHERE prompt = '{IDS[3]}'")


OF_3 = f"(SELECT id FROM attempt WHERE prompt = '{IDS[3]}')"
DAMAGES = {
    "a letter of an answer": (flip(b"canary-0 for question 3", b"canary-0 fos question 3"), IDS[3], "checksum"),
    "a compressed body": (flip_in_compressed_body, IDS[2], "checksum"),
    "not UTF-8": (flip(IDS[3].encode(), b"\xff" * 16), "attempt", "UTF-8"),
    "no attempt": (run_sql(f"DELETE FROM attempt WHERE prompt = '{IDS[3]}'"), "answer ", "its attempt"),
    "no body": (run_sql(f"UPDATE attempt SET body = NULL WHERE prompt = '{IDS[3]}'"), IDS[3], "body is missing"),
    "no JSON": (put_body(b"{"), IDS[3], "bad_json"),
    "no choices": (put_body(b"{}"), IDS[3], "missing_choice"),
    "one choice": (put_body(encode(chat({"model": "", "messages": [{"content": ""}]}))), IDS[3], "is choice 1, its body has 1"),
    "another end": (run_sql(f"UPDATE answer SET finish = 'length' WHERE attempt = {OF_3}"), IDS[3], "'length', its body says 'stop'"),
    "another key": (run_sql(f"UPDATE answer SET key = 'ff' WHERE attempt = {OF_3} AND draw = 0"), IDS[3], "ff is not draw 0"),
    "another model": (run_sql(f"UPDATE answer SET identity = 'x' WHERE attempt = {OF_3}"), IDS[3], "names another model"),
    "one key twice": (run_sql("UPDATE attempt SET keys = 'aa aa' WHERE status = 'failed'"), IDS[0], "twice"),
    "a key with a dash": (run_sql("UPDATE attempt SET keys = 'a-a' WHERE status = 'failed'"), IDS[0], "hashes"),
    "no such status": (run_sql(f"UPDATE attempt SET status = 'reed' WHERE prompt = '{IDS[3]}'"), IDS[3], "'reed'"),
    "an answer that failed": (run_sql(f"UPDATE attempt SET status = 'failed' WHERE prompt = '{IDS[3]}'"), IDS[3], "'failed'"),
    "no money": (run_sql(f"UPDATE attempt SET usd = '1..2' WHERE prompt = '{IDS[3]}'"), IDS[3], "'1..2'"),
}  # fmt: skip


async def test_what_only_the_recipe_knows_is_no_damage(tmp_path: Path, capsys: Told) -> None:
    """A reasoning field with an unusual name; and more choices than were asked for."""

    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        question = body["messages"][-1]["content"]
        reply = chat(body, ["one", "two", "three"] if question == "question 0" else [""], finish="stop")
        reply["choices"][0] |= {"finish_reason": "content_filter"} if question == "question 0" else {}
        reply["choices"][0]["message"]["thoughts"] = "hm <|im_end|>" if question == "question 1" else "hm"
        return reply

    async with serving(script) as server:
        model = model_at(server.url, capabilities={"reasoning": "thoughts"})
        _, one = await ask(tmp_path, model, asks(model, questions(1), n=2))
        _, others = await ask(tmp_path, model, asks(model, questions(3)[1:]))
    assert texts([*one, *others]) == [["two", "three"], ["reasoning_only"], ["reasoning_only"]]
    assert journal(tmp_path, "verify") == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_row_is_named(runs: Path, damage: str, capsys: Told) -> None:
    act, row, what = DAMAGES[damage]
    act(runs)
    assert journal(runs, "verify") == 11
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines
    assert all(row in line and what in line for line in lines), lines
    assert f"{len(lines)} damages found" in told.err


def cut(share: float) -> Callable[[Path], None]:
    def act(runs: Path) -> None:
        path = runs / "journal.sqlite"
        os.truncate(path, int(path.stat().st_size * share))

    return act


def overwrite(page: int, offset: int) -> Callable[[Path], None]:
    def act(runs: Path) -> None:
        with (runs / "journal.sqlite").open("r+b") as file:
            file.seek(page * 4096 + offset)
            file.write(b"\xa5" * 64)

    return act


def misspell_in_index(runs: Path) -> None:
    """Only SQLite's own check compares an index with its table."""
    ((page,),) = sql(runs, "SELECT rootpage FROM sqlite_master WHERE name = 'attempt_run'")
    path = runs / "journal.sqlite"
    whole, start = path.read_bytes(), (page - 1) * 4096
    path.write_bytes(whole[:start] + whole[start : start + 4096].replace(b"run", b"rum", 1) + whole[start + 4096 :])


TORN = [cut(0), cut(0.01), cut(0.5), cut(0.95), *(overwrite(page, 0) for page in range(5)), misspell_in_index]


@pytest.mark.parametrize("act", TORN)
def test_a_damaged_file_is_told(runs: Path, act: Callable[[Path], None], capsys: Told) -> None:
    act(runs)
    assert journal(runs, "verify") == 11
    told = capsys.readouterr()
    assert "journal.sqlite" in told.err
    assert "Traceback" not in told.err


def test_a_journal_of_a_newer_factory_is_not_judged(runs: Path, capsys: Told) -> None:
    sql(runs, "PRAGMA user_version = 99")
    for verb in ("stats", "verify", "export -"):
        assert journal(runs, *verb.split()) == 12


async def test_a_damaged_answer_stops_a_run_and_is_asked_again_once_it_is_forgotten(
    tmp_path: Path, capsys: Told
) -> None:
    async with serving() as server:
        model = model_at(server.url)
        requests = asks(model, questions(3))
        _, before = await ask(tmp_path, model, requests)
        flip(b"answer 0 to question 1", b"answer 0 to question 7")(tmp_path)
        with pytest.raises(JournalError, match="verify"):
            await ask(tmp_path, model, requests)
        assert journal(tmp_path, "verify") == 11
        assert "purge --prompt" in capsys.readouterr().err
        assert journal(tmp_path, "purge", "--prompt", IDS[1], "--yes") == 0
        assert journal(tmp_path, "verify") == 0
        _, after = await ask(tmp_path, model, requests)
    assert after == before
    assert [server.seen[f"question {i}"] for i in range(3)] == [1, 2, 1]


def test_a_body_stored_before_there_were_checksums_is_read(runs: Path) -> None:
    raw = encode(chat({"model": "m", "messages": questions(4)[3].messages, "n": 2}))
    sql(runs, f"UPDATE attempt SET body = x'{raw.hex()}' WHERE prompt = '{IDS[3]}'")
    assert journal(runs, "verify") == 0


# -- purge -----------------------------------------------------------------------------------------------------------


def bytes_of(runs: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(runs.glob("journal*")))


def totals(runs: Path) -> list[Any]:
    with Journal(runs / "journal.sqlite") as opened:
        return [opened.spent(run) for run in ("run", "late")]


CHOSEN = {
    "its id": (["--prompt", IDS[3]], [3]),
    "the beginning of its id": (["--prompt", IDS[3][:6]], [3]),
    "its text": (["--prompt", "question 3"], [3]),
    "its run": (["--run", "run"], [0, 1, 2, 3, 4]),
    "failed": (["--failed"], [0]),
}


@pytest.mark.parametrize("named", CHOSEN)
async def test_what_is_forgotten_is_gone_from_the_file_and_stays_paid(runs: Path, named: str, capsys: Told) -> None:
    arguments, gone = CHOSEN[named]
    canaries = [b"canary-error", *(f"canary-1 for question {i}".encode() for i in (1, 3, 4))]
    of = {0: canaries[0], 1: canaries[1], 3: canaries[2], 4: canaries[3]}
    compressed = sql(runs, f"SELECT body FROM attempt WHERE prompt = '{IDS[2]}'")[0][0]
    spent = totals(runs)
    assert all(canary in bytes_of(runs) for canary in canaries)
    assert journal(runs, "purge", *arguments, "--yes") == 0
    whole = bytes_of(runs)
    for i in range(5):
        if i != 2:
            assert (of[i] in whole) == (i not in gone)
        assert (IDS[i].encode() in whole) == (i not in gone)
    assert (compressed in whole) == (2 not in gone)
    assert totals(runs) == spent
    assert stats(runs, capsys)[0]["failures"] == {"bad_request": 1}
    assert journal(runs, "verify") == 0


def test_copies_that_rows_have_left_in_free_space_are_gone_too(runs: Path) -> None:
    """An SQLite that does not erase what it frees leaves them wherever a row has moved or shrunk."""
    stale = "UPDATE attempt SET detail = 'canary-stale' WHERE id = 4", "UPDATE attempt SET detail = NULL WHERE id = 4"
    sql(runs, "PRAGMA secure_delete = OFF", *stale)
    assert b"canary-stale" in bytes_of(runs)
    assert journal(runs, "purge", "--prompt", IDS[3], "--yes") == 0
    assert b"canary-stale" not in bytes_of(runs)


def test_on_a_full_disk_the_answers_are_forgotten_and_what_is_left_to_do_is_told(
    runs: Path, tmp_path: Path, capsys: Told
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], check=True)
    try:
        sql(runs, f"UPDATE attempt SET detail = '{'x' * 300_000}' WHERE prompt = '{IDS[1]}' AND max_tokens = 50")
        (small / "journal.sqlite").write_bytes((runs / "journal.sqlite").read_bytes())
        assert journal(small, "purge", "--prompt", IDS[3], "--yes") == 9
        assert "VACUUM" in capsys.readouterr().err
        assert b"canary-0 for question 3" not in bytes_of(small)
        assert journal(small, "verify") == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_traces_that_a_reader_holds_on_to_are_told_and_go_with_it(runs: Path, capsys: Told) -> None:
    reader = sqlite3.connect(runs / "journal.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM attempt").fetchone()
    assert journal(runs, "purge", "--prompt", IDS[3], "--yes") == 10
    assert "write-ahead log" in capsys.readouterr().err
    assert b"canary-0 for question 3" in bytes_of(runs)
    reader.close()
    Journal(runs / "journal.sqlite").close()
    assert b"canary-0 for question 3" not in bytes_of(runs)


async def test_a_model_is_forgotten_whole_and_asked_again(tmp_path: Path, capsys: Told) -> None:
    async with serving() as server:
        one, two = model_at(server.url), model_at(server.url, model="two")
        for model in (one, two):
            await ask(tmp_path, model, asks(model, questions(3)))
        assert journal(tmp_path, "purge", "--model", two.identity, "--yes") == 0
        assert [(await ask(tmp_path, model, asks(model, questions(3))))[0].sent for model in (one, two)] == [0, 3]
    assert [group["forgotten"] for group in stats(tmp_path, capsys)] == [0, 3]


async def test_an_unread_body_and_an_unknown_outcome_are_forgotten_too(runs: Path) -> None:
    with Journal(runs / "journal.sqlite") as opened:
        await opened.begin("late", request(), "0.25", 7)
    await leave_unread(runs)
    spent = totals(runs)
    assert journal(runs, "purge", "--model", "other", "--yes") == 0
    assert b"answer 0 to question 9" not in bytes_of(runs)
    assert totals(runs) == spent
    assert journal(runs, "verify") == 0
    with Journal(runs / "journal.sqlite") as opened:
        assert list(opened.unread("other")) == []


def test_nothing_is_forgotten_without_yes(runs: Path, capsys: Told) -> None:
    before = sql(runs, "SELECT * FROM attempt")
    assert journal(runs, "purge", "--run", "run") == 2
    assert "8 stored answers and what is kept of 6 requests" in (told := capsys.readouterr().err)
    assert "--yes" in told
    assert sql(runs, "SELECT * FROM attempt") == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", "question 77"], "no prompt 'question 77'"),
        (["--prompt", IDS[3][:3]], "no prompt"),  # too short to mean an id
        (["--prompt", ""], "no prompt"),
        (["--run", "rum"], "no run 'rum'; it has run"),
        (["--model", "m"], "no model 'm'; it has openai:"),
    ],
)
def test_what_the_journal_has_never_seen_is_an_error(runs: Path, arguments: list[str], told: str, capsys: Told) -> None:
    assert journal(runs, "purge", *arguments, "--yes") == 2
    assert told in capsys.readouterr().err


def test_the_beginning_of_two_ids_is_an_error(runs: Path, capsys: Told) -> None:
    sql(runs, f"UPDATE attempt SET prompt = 'abcd{IDS[3][4:]}' WHERE prompt = '{IDS[3]}'")
    sql(runs, f"UPDATE attempt SET prompt = 'abcd{IDS[1][4:]}' WHERE prompt = '{IDS[1]}'")
    assert journal(runs, "purge", "--prompt", "abcd", "--yes") == 2
    assert "several prompts" in capsys.readouterr().err
