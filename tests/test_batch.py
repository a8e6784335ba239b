"""Batches against a real server: submitted once, collected later, nothing lost, nothing paid twice."""

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from factory import batch_journal, cli, pipeline
from factory.ask import Desk, Model
from factory.batch import Batches
from factory.budget import Budget, Wall
from factory.errors import BudgetError, TooManyFailures, Waiting
from factory.journal import Journal, Spent, answer_keys
from factory.recipe import load
from factory.rows import Choice, Failure, Prompt, Request, Sampling
from factory.teachers.openai import OpenAI, OpenAITeacher
from factory.teachers.openai_batch import OpenAIBatch
from tests.batch_server import BatchServer, Row, answered, batch_server, everything, unanswered
from tests.server import chat

DONE, LEFT = 0, 13
LIMITS = {"max_attempts": 2, "timeout_s": 5}


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with batch_server() as running:
        yield running


STAGES = "[{generate: {model: teacher, n: 2, temperature: 0.7, max_tokens: 16}}]"


def write(
    folder: Path, server: BatchServer, prompts: int = 5, stages: str = STAGES, budget: str = "{}", **entry: Any
) -> Path:
    """A recipe beside its prompts."""
    rows = [json.dumps({"prompt": f"question {i}"}) for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    model = {"type": "openai", "model": "m", "base_url": server.url, "batch": True, "limits": LIMITS} | entry
    (folder / "recipe.yaml").write_text(f"""\
name: tiny
seed: 3
budget: {budget}
models: {{teacher: {json.dumps(model)}, other: {json.dumps(model | {"model": "m2"})}}}
prompts: [{{path: {folder}/prompts.jsonl, name: questions}}]
stages: {stages}
""")
    return folder


def factory(folder: Path, *more: str, verb: str = "build") -> int:
    return cli.main([verb, str(folder / "recipe.yaml"), "--runs", str(folder / "runs"), *more])


def until_done(folder: Path, *more: str) -> int:
    """The same command until it no longer waits; how often it was given."""
    for times in range(1, 10):
        if (code := factory(folder, *more)) != LEFT:
            assert code == DONE
            return times
    raise AssertionError("it never ended")


def train(folder: Path) -> bytes:
    return (folder / "runs/tiny/dataset/train.jsonl").read_bytes()


def journal(folder: Path, sql: str) -> list[Any]:
    db = sqlite3.connect(folder / "runs/journal.sqlite")
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


def spent(folder: Path) -> Spent:
    with Journal(folder / "runs/journal.sqlite") as opened:
        return opened.spent("tiny")


def asked(lines: list[Row]) -> list[str]:
    return [line["body"]["messages"][-1]["content"] for line in lines]


def first_half(lines: list[Row], status: str, rest: list[Row]) -> tuple[str, list[Row], list[Row]]:
    return status, [answered(line) for line in lines[: len(lines) // 2]], rest


# -- the line ----------------------------------------------------------------------------------------------------------


def test_submit_leave_come_back_collect(
    tmp_path: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, server)
    server.polls = 1
    assert factory(tmp_path) == LEFT
    assert "batch_0 is not done: 0 of 5 requests answered, submitted 20" in capsys.readouterr().err
    assert cli.main(["show", "tiny", "--runs", str(tmp_path / "runs")]) == DONE
    told = capsys.readouterr().out
    assert "tiny: waiting" in told
    assert "open batch batch_0: submitted 20" in told
    assert f"5 requests, openai:{server.url}:m" in told
    assert factory(tmp_path) == LEFT
    assert "1 of 5 requests answered" in capsys.readouterr().err
    assert factory(tmp_path) == DONE
    assert "done already" not in capsys.readouterr().err
    assert factory(tmp_path) == DONE
    assert "done already" in capsys.readouterr().err
    assert server.calls == {"upload": 1, "submit": 1, "look": 2, "content": 1}
    rows = [json.loads(line) for line in train(tmp_path).splitlines()]
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        (f"question {i}", f"answer {k} to question {i} (seed None)") for i in range(5) for k in range(2)
    ]
    assert server.uploads[0][0]["body"] == {
        "model": "m", "messages": [{"role": "user", "content": "question 0"}], "max_tokens": 16, "temperature": 0.7, "n": 2,
    }  # fmt: skip
    cli.main(["show", "tiny", "--runs", str(tmp_path / "runs")])
    assert "open batch" not in capsys.readouterr().out
    assert not list((tmp_path / "runs").glob("*.batches"))


def test_the_wire_does_not_show_in_the_data_set(tmp_path: Path, server: BatchServer) -> None:
    for name, batch in (("one", True), ("other", False)):
        (tmp_path / name).mkdir()
        until_done(write(tmp_path / name, server, batch=batch))
    assert train(tmp_path / "one") == train(tmp_path / "other")


@pytest.mark.parametrize("first", [True, False])
def test_a_recipe_switched_to_batch_or_back_asks_nothing_again(
    tmp_path: Path, server: BatchServer, first: bool
) -> None:
    until_done(write(tmp_path, server, batch=first))
    before = train(tmp_path)
    shutil.rmtree(tmp_path / "runs/tiny")
    assert until_done(write(tmp_path, server, batch=not first)) == 1
    assert train(tmp_path) == before
    assert server.calls["submit"] == int(first)
    assert sum(server.direct.seen.values()) == (0 if first else 5)


def test_prompts_that_come_while_a_batch_is_open_go_into_one_of_their_own(tmp_path: Path, server: BatchServer) -> None:
    server.polls = 1
    assert factory(write(tmp_path, server, prompts=3)) == LEFT
    assert factory(write(tmp_path, server, prompts=5)) == LEFT
    assert [asked(lines) for lines in server.uploads] == [
        [f"question {i}" for i in (0, 1, 2)],
        ["question 3", "question 4"],
    ]
    until_done(tmp_path)
    assert len(train(tmp_path).splitlines()) == 10
    assert server.calls["submit"] == 2


def test_all_models_of_a_stage_have_submitted_before_the_factory_leaves(
    tmp_path: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, server, stages="[{generate: {model: [teacher, other], max_tokens: 16}}]")
    assert factory(tmp_path) == LEFT
    told = capsys.readouterr().err
    assert "models.teacher: batch batch_0" in told
    assert "models.other: batch batch_1" in told
    assert factory(tmp_path) == DONE
    assert {lines[0]["body"]["model"] for lines in server.uploads} == {"m", "m2"}


def test_a_judge_is_asked_in_a_batch_like_a_teacher(tmp_path: Path, server: BatchServer) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        judged = [line["body"]["model"] == "m2" for line in lines]
        bodies = [chat(line["body"], ["Score: 4"]) if j else None for line, j in zip(lines, judged, strict=True)]
        return "completed", [answered(line, body) for line, body in zip(lines, bodies, strict=True)], []

    server.outcome = outcome
    rubric = Path(__file__).parents[1] / "prompts/rubrics/helpfulness.md"
    stages = f"[{{generate: {{model: teacher}}}}, {{judge: {{model: other, rubric: {rubric}}}}}]"
    assert until_done(write(tmp_path, server, stages=stages)) == 3
    assert [len(lines) for lines in server.uploads] == [5, 5]


def test_draws_until_accepted_are_batches_of_rounds(tmp_path: Path, server: BatchServer) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        good = [len(server.batches) > 1 or i == 0 for i in range(len(lines))]
        texts = ["a fine long answer" if g else "no" for g in good]
        return "completed", [answered(line, chat(line["body"], [t])) for line, t in zip(lines, texts, strict=True)], []

    server.outcome = outcome
    stages = "[{generate: {model: teacher, until: {accepted: 1, at_most: 3}}}, {filter: [{words: {min: 3}}]}]"
    assert until_done(write(tmp_path, server, stages=stages)) == 3
    assert [len(lines) for lines in server.uploads] == [5, 4]


# -- a kill at any moment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "uploads"),
    [
        ("upload", 2),  # the file is there, the batch is not: submitted at the next start
        ("submit", 1),  # the provider has the batch, its handle is not written down: found by its tag
        ("content", 1),  # while the results come in
    ],
)
def test_a_kill_never_submits_twice(tmp_path: Path, server: BatchServer, moment: str, uploads: int) -> None:
    write(tmp_path, server, budget="{requests: 5}")  # and never reserves twice
    server.batches += [
        {"id": f"old_{i}", "object": "batch", "metadata": None if i % 2 else {"factory_batch": "x"}} for i in range(3)
    ]
    if moment == "content":
        assert factory(tmp_path) == LEFT
    server.stall = moment
    command = [sys.executable, "-m", "factory", "build", "recipe.yaml"]
    child = subprocess.Popen(command, cwd=tmp_path, env=os.environ, stderr=subprocess.DEVNULL)
    assert server.stalled.wait(60)
    child.kill()
    child.wait()
    server.stall = ""
    server.batches += [{"id": f"new_{i}", "object": "batch", "metadata": {}} for i in range(3)]
    until_done(tmp_path)
    assert server.calls["submit"] == 1
    assert len(server.uploads) == uploads
    assert len(train(tmp_path).splitlines()) == 10
    assert spent(tmp_path)[:3] == (5, 50, 50)


def test_what_was_stored_before_a_kill_in_mid_collection_is_not_asked_or_billed_again(tmp_path: Path) -> None:
    """The body is committed, its answers are not: whoever asks next files them, at the price of a batch."""
    price = {"input": 10, "output": 10, "batch": 0.5}
    with batch_server() as server, Journal(tmp_path / "journal.sqlite") as opened:
        (request,), model = requests_to(server, 1, batch=False, price=price)
        row = ("run", request.identity, "p", "a", " ".join(answer_keys(request)), 0, 9, 0.0, 10, 10, "1")
        asyncio.run(batch_journal.build(opened, "tag", "run", request.identity, [row]))
        asyncio.run(opened.store(1, json.dumps(chat({"model": "m", "messages": request.messages})).encode()))
        outcomes = desk_ask(opened, model, [request])
        assert isinstance(outcomes[0], Choice)
        assert not server.direct.seen
        assert Decimal(str(opened.spent("run").usd)) == Decimal("0.000075")


# -- batches that end badly ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["expired", "cancelled"])
@pytest.mark.parametrize("told", [True, False])
def test_what_a_batch_did_not_answer_is_asked_again(
    tmp_path: Path, server: BatchServer, status: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, server, prompts=6, budget="{tokens: 440}")  # six reserve 432, and all twice does not fit

    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        if len(server.batches) > 1:
            return everything(lines)
        rest = [unanswered(line, f"batch_{status}") for line in lines[3:]]
        return first_half(lines, status, rest if told else [])

    server.outcome = outcome
    assert factory(tmp_path) == LEFT
    reserved = spent(tmp_path)
    assert factory(tmp_path) == LEFT
    assert f"batch batch_0 {status}: " in capsys.readouterr().err
    assert [asked(lines) for lines in server.uploads][1:] == [["question 3", "question 4", "question 5"]]
    half = (reserved.prompt_tokens + reserved.completion_tokens) / 2
    now = spent(tmp_path)
    assert now.prompt_tokens + now.completion_tokens == 3 * 20 + half  # what never ran is free again
    assert now.unknown == 0
    assert factory(tmp_path) == DONE
    assert len(train(tmp_path).splitlines()) == 12


def bad(line: Row, kind: str) -> tuple[list[Row], list[Row]]:
    """A line's rows in the output file and in the error file."""
    error = {"error": {"message": "this model's maximum context length is 10 tokens"}}
    match kind:
        case "context_overflow":
            return [], [answered(line, error, 400)]
        case "server_error":
            return [], [answered(line, {"error": {"message": "oops"}}, 500)]
        case "bad_json":
            return [answered(line, {"choices": 3})], []
        case "filtered":
            return [answered(line, chat(line["body"], finish="content_filter"))], []
        case "thinking":
            message = {"content": "", "reasoning": "hm"}
            choices = [{"message": message, "finish_reason": "length"}] * line["body"]["n"]
            return [answered(line, {**chat(line["body"]), "choices": choices})], []
        case "odd_line":
            return [{"custom_id": line["custom_id"], "response": {"status_code": "what"}}], []
        case _:
            return [answered(line)], []


@pytest.mark.parametrize(
    ("kind", "batches", "reason"),
    [
        ("context_overflow", 1, "context_overflow"),
        ("server_error", 2, "server_error"),
        ("bad_json", 2, "missing_choice"),
        ("odd_line", 2, "bad_json"),
    ],
)
def test_a_failed_line_is_set_aside_or_tried_again_as_anywhere(
    tmp_path: Path, server: BatchServer, kind: str, batches: int, reason: str
) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        rows = [bad(line, kind if asked([line]) == ["question 1"] else "") for line in lines]
        return "completed", [o for output, _ in rows for o in output], [e for _, errors in rows for e in errors]

    server.outcome = outcome
    write(tmp_path, server)
    assert [factory(tmp_path) for _ in range(batches)] == [LEFT] * batches
    assert factory(tmp_path) == 3
    assert [len(lines) for lines in server.uploads] == [5] + [1] * (batches - 1)
    failed = (tmp_path / "runs/tiny/manifest.json").parent.glob("01-*/failed-*.jsonl")
    rows = [json.loads(line) for path in failed for line in path.read_text().splitlines()]
    assert [row["verdicts"][0]["reason"] for row in rows] == [reason] * 2
    assert factory(tmp_path) == 3
    assert server.calls["submit"] == batches  # it is not asked again unless that is wanted
    assert factory(tmp_path, "--retry-failed") == LEFT
    server.outcome = everything
    assert factory(tmp_path, "--retry-failed") == DONE
    assert server.calls["submit"] == batches + 1


def test_failed_draws_are_asked_again_once_each_time_it_is_wanted(tmp_path: Path, server: BatchServer) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        rows = [bad(line, "filtered" if asked([line]) == ["question 1"] else "") for line in lines]
        return "completed", [o for output, _ in rows for o in output], []

    server.outcome = outcome
    write(tmp_path, server)
    assert [factory(tmp_path), factory(tmp_path), factory(tmp_path)] == [LEFT, 3, 3]
    shutil.rmtree(tmp_path / "runs/tiny")
    assert factory(tmp_path) == 3  # it keeps its end, though its stage is made anew
    for last, count in ((3, 2), (3, 3), (DONE, 4)):
        if last == DONE:
            server.outcome = everything
        assert [factory(tmp_path, "--retry-failed"), factory(tmp_path, "--retry-failed")] == [LEFT, last]
        assert server.calls["submit"] == count
    assert len(train(tmp_path).splitlines()) == 10


@pytest.mark.parametrize("batch", [True, False])
def test_a_draw_that_came_and_is_no_answer_counts_as_failed_however_it_is_read(
    tmp_path: Path, server: BatchServer, batch: bool
) -> None:
    """It is stored with its end, and nothing asks for it: the stage is made from the journal alone."""

    def one_of_two(body: Row) -> Row:
        told = chat(body)
        told["choices"][0]["finish_reason"] = "content_filter"
        return told

    async def script(body: Row, before: int) -> Row:
        return one_of_two(body)

    server.direct.script = script
    server.outcome = lambda lines: ("completed", [answered(line, one_of_two(line["body"])) for line in lines], [])
    write(tmp_path, server, batch=batch)
    assert [factory(tmp_path) for _ in range(1 + batch)][-1] == 3
    shutil.rmtree(tmp_path / "runs/tiny")
    assert factory(tmp_path) == 3
    assert server.calls["submit"] == batch
    assert sum(server.direct.seen.values()) == (0 if batch else 5)


def test_a_refusal_that_was_paid_for_in_a_batch_is_not_asked_again_without_it(
    tmp_path: Path, server: BatchServer
) -> None:
    server.outcome = lambda lines: ("completed", [o for line in lines for o in bad(line, "filtered")[0]], [])
    write(tmp_path, server)
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, 3]
    shutil.rmtree(tmp_path / "runs/tiny")
    write(tmp_path, server, batch=False)
    assert factory(tmp_path) == 3
    assert not server.direct.seen
    assert cli.main(["journal", "verify", "--runs", str(tmp_path / "runs")]) == 0


@pytest.mark.parametrize(("kind", "limit"), [("thinking", 64), ("context_overflow", 8)])
def test_another_limit_asks_again_for_what_a_batch_failed_for_its_limit(
    tmp_path: Path, server: BatchServer, kind: str, limit: int
) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        rows = [bad(line, kind if line["body"]["max_tokens"] == 16 else "") for line in lines]
        return "completed", [o for output, _ in rows for o in output], [e for _, errors in rows for e in errors]

    server.outcome = outcome
    write(tmp_path, server)
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, 3]
    write(tmp_path, server, stages=STAGES.replace("16", str(limit)))
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, DONE]
    assert len(train(tmp_path).splitlines()) == 10


def test_a_line_that_failed_for_good_stays_so_while_others_are_tried_again(tmp_path: Path, server: BatchServer) -> None:
    kinds = {"question 0": "context_overflow", "question 1": "server_error"}

    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        rows = [bad(line, kinds.get(asked([line])[0], "")) for line in lines]
        return "completed", [o for output, _ in rows for o in output], [e for _, errors in rows for e in errors]

    server.outcome = outcome
    write(tmp_path, server)
    assert factory(tmp_path) == LEFT
    assert factory(tmp_path) == LEFT
    del kinds["question 1"]
    assert factory(tmp_path) == 3
    assert [asked(lines) for lines in server.uploads][1:] == [["question 1"]]


def test_a_key_that_is_refused_inside_a_batch_stops_the_run_and_is_asked_again_later(
    tmp_path: Path, server: BatchServer
) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        error = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
        return "completed", [answered(line) for line in lines[1:]], [answered(lines[0], error, 429)]

    server.outcome = outcome
    write(tmp_path, server)
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, 5]
    server.outcome = everything
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, DONE]
    assert asked(server.uploads[1]) == ["question 0"]


def test_fewer_answers_than_n_are_kept_and_the_rest_is_asked(tmp_path: Path, server: BatchServer) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        return "completed", [answered(line, chat(line["body"], ["one answer"])) for line in lines], []

    server.outcome = outcome
    write(tmp_path, server)
    assert until_done(tmp_path) == 3
    assert [[line["body"].get("n", 1) for line in lines] for lines in server.uploads] == [[2] * 5, [1] * 5]
    assert len(journal(tmp_path, "SELECT key FROM answer")) == 10


@pytest.mark.parametrize("never", [False, True])
def test_where_n_is_refused_in_a_batch_each_draw_goes_by_itself(
    tmp_path: Path, server: BatchServer, never: bool
) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        no = {"error": {"message": "n must be 1", "param": "n", "code": "unsupported_value"}}
        refused = [never or line["body"].get("n", 1) > 1 for line in lines]
        return (
            "completed",
            [answered(line, no, 400) if r else answered(line) for line, r in zip(lines, refused, strict=True)],
            [],
        )

    server.outcome = outcome
    write(tmp_path, server)
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, LEFT]
    assert factory(tmp_path) == (3 if never else DONE)
    assert [[line["body"].get("n", 1) for line in lines] for lines in server.uploads] == [[2] * 5, [1] * 10]
    assert len(journal(tmp_path, "SELECT key FROM answer WHERE finish = 'stop'")) == (0 if never else 10)
    assert factory(tmp_path) == (3 if never else DONE)
    assert server.calls["submit"] == 2


def test_a_doomed_batch_run_stops_before_it_submits_more(tmp_path: Path, server: BatchServer) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        kinds = ["context_overflow"] * 20 + ["server_error"] * 5
        return "completed", [], [bad(line, kind)[1][0] for line, kind in zip(lines, kinds, strict=True)]

    server.outcome = outcome
    write(tmp_path, server, prompts=25)
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, TooManyFailures.exit_code]
    assert server.calls["submit"] == 1
    assert spent(tmp_path).requests == 25


# -- results that are not ours ---------------------------------------------------------------------------------------------


def renamed(line: Row, name: str) -> Row:
    return answered({**line, "custom_id": name})


@pytest.mark.parametrize("odd", ["doubled", "in both files", "unknown", "other keys", "no name", "no json"])
def test_results_that_were_never_asked_for_file_nothing(
    tmp_path: Path, server: BatchServer, odd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        good = [answered(line) for line in lines]
        tag, number, _ = lines[0]["custom_id"].split("-")
        more: dict[str, tuple[list[Any], list[Any]]] = {
            "doubled": ([answered(lines[0], chat(lines[0]["body"], ["a", "b"]))], []),
            "in both files": ([], [unanswered(lines[0], "batch_expired")]),
            "unknown": ([renamed(lines[0], f"{tag}-99-00000000")], []),
            "other keys": ([renamed(lines[0], f"{tag}-{number}-00000000")], []),
            "no name": ([{"response": None}], []),
            "no json": (["what"], []),
        }
        return "completed", good[1:] + [good[0]] * (odd != "other keys") + more[odd][0], more[odd][1]

    server.outcome = outcome
    write(tmp_path, server)
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, 6]
    assert "the results of batch batch_0 hold" in capsys.readouterr().err
    assert journal(tmp_path, "SELECT count(*) FROM answer") == [(0,)]
    assert journal(tmp_path, "SELECT DISTINCT status FROM attempt") == [("sent",)]
    server.outcome = everything
    assert factory(tmp_path) == DONE
    assert server.calls["submit"] == 1


def test_a_batch_that_the_provider_does_not_know_is_not_given_up(
    tmp_path: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, server)
    assert factory(tmp_path) == LEFT
    gone = server.batches.pop()
    assert factory(tmp_path) == 6
    assert "does not know batch batch_0" in capsys.readouterr().err
    server.batches.append(gone)
    assert factory(tmp_path) == DONE
    assert server.calls["submit"] == 1


def test_a_late_batch_does_not_change_answers_that_were_used(
    tmp_path: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert factory(write(tmp_path, server)) == LEFT
    assert factory(write(tmp_path, server, batch=False)) == DONE
    assert "batch batch_0 with 5 requests is still open" in capsys.readouterr().err
    before, answers = train(tmp_path), journal(tmp_path, "SELECT key, attempt FROM answer")
    server.outcome = lambda lines: (
        "completed",
        [answered(ln, chat(ln["body"], ["late", "later"])) for ln in lines],
        [],
    )
    shutil.rmtree(tmp_path / "runs/tiny")
    assert factory(write(tmp_path, server)) == DONE
    assert train(tmp_path) == before
    assert journal(tmp_path, "SELECT key, attempt FROM answer") == answers
    assert spent(tmp_path)[:3] == (10, 100, 100)  # it was paid for all the same


def test_a_prompt_that_was_purged_meanwhile_is_not_stored(tmp_path: Path, server: BatchServer) -> None:
    assert factory(write(tmp_path, server)) == LEFT
    with sqlite3.connect(tmp_path / "runs/journal.sqlite") as db:
        db.execute("UPDATE attempt SET keys='', prompt='', asked='' WHERE id=2")
    db.close()
    write(tmp_path, server, prompts=1)
    assert factory(tmp_path) == DONE
    assert journal(tmp_path, "SELECT id FROM attempt WHERE body IS NULL") == [(2,)]
    assert journal(tmp_path, "SELECT status, detail FROM attempt WHERE id=2") == [("failed", "forgotten")]


# -- money ---------------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_not_submitted_in_part(
    tmp_path: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, server, budget="{requests: 4}")
    assert factory(tmp_path) == BudgetError.exit_code
    assert "nothing was submitted" in capsys.readouterr().err
    assert not server.calls
    assert spent(tmp_path).requests == 0
    assert until_done(write(tmp_path, server, budget="{requests: 5}")) == 2


def test_a_batch_is_reserved_and_settled_at_the_price_of_batches(tmp_path: Path, server: BatchServer) -> None:
    write(tmp_path, server, budget="{usd: 1}", price={"input": 1, "output": 2, "batch": 0.5})
    assert factory(tmp_path) == LEFT
    held = spent(tmp_path)
    assert held.completion_tokens == 5 * 2 * 16
    assert held.usd == pytest.approx((held.prompt_tokens + 2 * held.completion_tokens) / 2e6)
    assert factory(tmp_path) == DONE
    assert spent(tmp_path).usd == pytest.approx(5 * (10 + 2 * 10) / 2e6)
    manifest = json.loads(next((tmp_path / "runs/tiny").glob("01-*/manifest.json")).read_text())
    assert (manifest["requests"], Decimal(manifest["usd"])) == ({"sent": 5, "reused": 0}, Decimal("0.000075"))


@pytest.mark.parametrize(("lines", "size", "files"), [(2, 10**6, [2, 2, 1]), (99, 500, [2, 2, 1])])
def test_more_than_fits_a_file_is_several_batches_or_none(
    tmp_path: Path, server: BatchServer, lines: int, size: int, files: list[int]
) -> None:
    requests, model = requests_to(server, 5)
    for budget, raised in ((Budget(requests=4), BudgetError), (Budget(), Waiting)):
        with Journal(tmp_path / "journal.sqlite") as opened:
            wall = Wall(budget, opened.spent("run"))
            with pytest.raises(raised):
                asyncio.run(submit(opened, wall, model, requests, lines, size))
            assert opened.spent("run").requests == wall.requests == (5 if raised is Waiting else 0)
    assert [len(uploaded) for uploaded in server.uploads] == files
    assert [name for uploaded in server.uploads for name in asked(uploaded)] == [f"question {i}" for i in range(5)]
    with Journal(tmp_path / "journal.sqlite") as opened:
        outcomes = desk_ask(opened, model, requests)
    assert [o.text for o in outcomes if isinstance(o, Choice)] == [
        f"answer 0 to question {i} (seed None)" for i in range(5)
    ]


def requests_to(server: BatchServer, count: int, **entry: Any) -> tuple[list[Request], Model]:
    made = OpenAI(**({"model": "m", "base_url": server.url, "batch": True} | entry))
    model = Model("teacher", made, made.identity(Path()), made.open(Path()))
    prompts = [Prompt.of([{"role": "user", "content": f"question {i}"}]) for i in range(count)]
    return [
        Request(identity=model.identity, messages=p.messages, sampling=Sampling(), prompt=p.id) for p in prompts
    ], model


async def submit(opened: Journal, wall: Wall, model: Model, requests: list[Request], lines: int, size: int) -> None:
    assert isinstance(model.entry, OpenAI)
    assert isinstance(model.teacher, OpenAITeacher)
    endpoint = OpenAIBatch(model.entry.base_url, None, model.teacher.body)
    endpoint.max_lines, endpoint.max_bytes = lines, size
    async with Batches(opened, wall, "run", model, endpoint, None) as batches:
        await batches.collect()
        await batches.submit(iter(requests), check=lambda: None)


def desk_ask(opened: Journal, model: Model, requests: list[Request]) -> list[Choice | Failure]:
    async def ask() -> list[Choice | Failure]:
        desk = Desk(opened, Wall(Budget(), opened.spent("run")), "run")
        async with model:
            tally = await desk.ask(model, requests, len(requests), "test")
        return [outcome for _, draws in desk.read(model, requests, tally) for outcome in draws]

    return asyncio.run(ask())


# -- staying, and an endpoint that is not well -----------------------------------------------------------------------------


def test_wait_stays_until_the_batch_is_done(tmp_path: Path, server: BatchServer) -> None:
    assert factory(write(tmp_path, server), "--wait") == DONE
    assert server.calls["submit"] == 1


def test_wait_looks_again_and_puts_up_with_an_outage(
    tmp_path: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, server)
    server.down, server.polls = 2, 3
    pipeline.run(load(tmp_path / "recipe.yaml", []), tmp_path / "runs", "build", wait=0.05)
    assert "busy" in (told := capsys.readouterr().err)
    assert "batch batch_0: 2 of 5 requests answered" in told
    assert len(server.looks_at) == 6
    assert server.looks_at[5] - server.looks_at[4] >= 0.05 * 1.5**4  # each time half as long again
    assert len(train(tmp_path).splitlines()) == 10


@pytest.mark.parametrize(
    ("call", "status", "code", "told"),
    [
        ("upload", 401, 4, "bad key"),
        ("submit", 404, 2, "has no batches"),
        ("submit", 400, 2, "was not accepted"),
        ("submit", 307, 2, "was not accepted"),
        ("upload", 429, 7, "run the same command again"),
        ("submit", 503, 7, "run the same command again"),
    ],
)
def test_an_endpoint_that_refuses_a_batch_is_named_and_holds_nothing(
    tmp_path: Path,
    server: BatchServer,
    call: str,
    status: int,
    code: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.refuse[call] = (status, {"error": {"message": "bad key"}})
    assert factory(write(tmp_path, server, budget="{requests: 5}")) == code
    assert told in capsys.readouterr().err
    assert spent(tmp_path).requests == (5 if code == 7 else 0)  # after a 503 nobody knows whether it arrived
    assert not server.calls["elsewhere"]
    server.refuse.clear()
    assert until_done(tmp_path) == 2
    assert len(server.batches) == 1


def test_a_batch_that_is_refused_when_it_is_looked_at_never_ran(
    tmp_path: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"code": "model_not_batchable", "message": "the model cannot be used in batches", "line": 1, "param": None}
    server.outcome = lambda lines: ("failed", [], [error])
    write(tmp_path, server, budget="{requests: 5}")
    assert [factory(tmp_path), factory(tmp_path)] == [LEFT, 2]
    assert "cannot be used in batches (line 1)" in capsys.readouterr().err
    assert spent(tmp_path).requests == 0
    server.outcome = everything
    until_done(tmp_path)
    assert server.calls["submit"] == 2


@pytest.mark.parametrize("how", ["cut", "short"])
def test_results_that_break_off_are_fetched_again(tmp_path: Path, server: BatchServer, how: str) -> None:
    write(tmp_path, server)
    assert factory(tmp_path) == LEFT
    setattr(server, how, True)
    assert factory(tmp_path) == 7
    assert journal(tmp_path, "SELECT count(*) FROM answer") == [(0,)]
    setattr(server, how, False)
    assert factory(tmp_path) == DONE
    assert server.calls["submit"] == 1


def test_the_key_goes_to_the_endpoint_and_into_no_file(
    tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_KEY", "canary-key-7")
    write(tmp_path, server, api_key_env="TEST_KEY")
    server.refuse["upload"] = (400, {"error": {"message": "the key canary-key-7 is odd"}})
    assert factory(tmp_path) == 2
    server.refuse.clear()
    server.outcome = lambda lines: (
        "completed",
        [answered(ln, chat(ln["body"], ["canary-key-7", "b"])) for ln in lines],
        [],
    )
    until_done(tmp_path)
    assert server.keys == {"Bearer canary-key-7"}
    assert "canary-key-7" not in "".join(capsys.readouterr())
    assert b"canary-key-7" not in b"".join(p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file())


def test_without_the_openai_client_its_extra_is_named(tmp_path: Path, server: BatchServer) -> None:
    write(tmp_path, server)
    code = "import sys; sys.modules['openai'] = None; from factory.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "build", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'distillation-factory[batch]'" in done.stderr
    assert "Traceback" not in done.stderr
