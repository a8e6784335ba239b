"""Verdicts that cannot be read count against `--max-failed`: told with their cause, never paid for over and over."""

import json
from pathlib import Path
from typing import Any

import pytest

from factory.ask import DOOMED_AFTER
from factory.judge import TRIAL
from tests.batch_server import Row, answered, batch_server
from tests.command import factory, read_jsonl, report, told
from tests.server import Server, chat, error, in_thread
from tests.tiny import tiny_model

RUBRIC = "---\nname: brevity\nscale: [1, 5]\norigin: made for tests\nlicence: Apache-2.0\n---\nJudge {{ response }}"


def write(where: Path, url: str, rows: int, stages: str = "", judge: str = "", models: str = "") -> None:
    """A recipe whose judge is asked about `rows` given answers, each of which is named by its number."""
    answers = [{"prompt": f"question {i}", "completion": f"answer {i}."} for i in range(rows)]
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, answers)))
    (where / "rubric.md").write_text(RUBRIC)
    (where / "recipe.yaml").write_text(f"""\
name: tiny
models:
  judge: {{type: openai, model: j, base_url: "{url}", limits: {{max_attempts: 2, max_concurrency: 8}}{judge}}}
{models}prompts:
  - {{path: rows.jsonl, name: rows}}
stages:
  - judge: {{model: judge, rubric: rubric.md}}
{stages}""")


def says(special: dict[int, Any], usual: str = "Fine.\nScore: 4") -> Any:
    """A judge that says the usual, except of some answers: a text, or a whole reply."""

    async def script(body: dict[str, Any], before: int) -> Any:
        number = int(body["messages"][-1]["content"].split()[-1].strip("."))
        said = special.get(number, usual)
        return chat(body, texts=[said]) if isinstance(said, str) else said(body)

    return script


def sent(server: Server) -> int:
    return sum(server.seen.values())


def manifest(where: Path) -> dict[str, Any]:
    (path,) = where.glob("runs/tiny/*-judge-*/manifest.json")
    return json.loads(path.read_text())


def test_everything_else_is_done_and_the_end_says_what_was_not_read_and_why(tmp_path: Path) -> None:
    long = "It is short.\n" + "Very good indeed. " * 40 + "\nRating: 4"
    with in_thread(says({7: long, 3: long, 11: long})) as server:
        write(tmp_path, server.url, 15, "  - shape\n")
        done = factory(tmp_path, "build", "recipe.yaml")
        told(
            done, 3, "3 of 15 verdicts could not be read, more than --max-failed 0.02; the first verdict: 'It is short."
        )
        told(
            done, 3, "good indeed. Rating: 4'; rubric.md wants a line `Score: N` with N from 1 to 5: change the rubric"
        )
        assert "--retry-failed" not in done.stderr
        assert len(done.stderr) < 1500
        assert len(read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")) == 12
        assert manifest(tmp_path)["draws"].items() >= {"planned": 15, "unanswered": 0, "unreadable": 3}.items()
        (warning,) = report(tmp_path)["warnings"]
        assert warning.startswith("02-judge: 3 of 15 verdicts could not be read; the first verdict: 'It is short.")
        for options in ([], ["--retry-failed"], ["--max-failed", "19%"]):
            again = factory(tmp_path, "build", "recipe.yaml", *options)
            told(again, 3, "3 of 15 verdicts could not be read", "02-judge: done already")
        assert factory(tmp_path, "build", "recipe.yaml", "--max-failed", "20%").returncode == 0
    assert sent(server) == 15 + 2 * 3  # two more draws of each that could not be read


def test_a_doomed_judge_stops_early_and_a_second_start_pays_for_nothing(tmp_path: Path) -> None:
    with in_thread(says({}, "Rating: 4"), delay_s=0.01) as server:
        write(tmp_path, server.url, 300)
        told(
            factory(tmp_path, "build", "recipe.yaml"), 3, f"models.judge: {DOOMED_AFTER} of 300 verdicts", "'Rating: 4'"
        )
        paid = sent(server)
        assert DOOMED_AFTER <= paid - 2 * TRIAL < DOOMED_AFTER + 2 * 8
        for options in ([], ["--retry-failed"]):
            told(factory(tmp_path, "build", "recipe.yaml", *options), 3, "verdicts could not be read", "'Rating: 4'")
        assert sent(server) == paid
        done = factory(tmp_path, "build", "recipe.yaml", "--max-failed", "1")
        assert done.returncode == 0, done.stderr
    assert sent(server) == 3 * 300
    assert manifest(tmp_path)["draws"]["unreadable"] == 300


def test_a_few_unreadable_verdicts_are_told_and_stop_nothing(tmp_path: Path) -> None:
    with in_thread(says({5: "Rating: 4"})) as server:
        write(tmp_path, server.url, 50)
        assert factory(tmp_path, "build", "recipe.yaml").returncode == 0
    assert "1 of 50 verdicts could not be read" in report(tmp_path)["warnings"][0]


def test_verdicts_that_never_came_and_those_that_cannot_be_read_count_together(tmp_path: Path) -> None:
    with in_thread(says({2: "Rating: 4", 4: lambda body: error(400, "no such parameter")})) as server:
        write(tmp_path, server.url, 20)
        done = factory(tmp_path, "build", "recipe.yaml", "--max-failed", "5%")
        told(
            done,
            3,
            "1 of 20 draws have no answer and 1 of 20 verdicts could not be read",
            "'Rating: 4'",
            "--retry-failed",
        )
        assert factory(tmp_path, "build", "recipe.yaml", "--max-failed", "10%").returncode == 0


def test_a_verdict_that_was_cut_off_asks_for_more_tokens(tmp_path: Path) -> None:
    cut = dict.fromkeys(
        range(10), lambda body: chat(body, ["Let me think"], "length" if body["max_tokens"] < 99 else "stop")
    )
    with in_thread(says(cut)) as server:
        write(tmp_path, server.url, 10)
        limit = ["--set", "stages.0.judge.max_tokens=8"]
        told(
            factory(tmp_path, "build", "recipe.yaml", *limit),
            3,
            "'Let me think', which was cut off",
            "raise max_tokens (8)",
        )
        assert sent(server) == 10
        told(factory(tmp_path, "build", "recipe.yaml", *limit, "--retry-failed"), 3, "which was cut off")
        assert sent(server) == 10
        told(factory(tmp_path, "build", "recipe.yaml"), 3, "'Let me think'; rubric.md wants")
    assert sent(server) == 10 + 3 * 10


@pytest.mark.parametrize("rows", [5, 30])
def test_verdicts_of_a_batch_are_counted_at_its_end_and_before_another_one(tmp_path: Path, rows: int) -> None:
    def outcome(lines: list[Row]) -> tuple[str, list[Row], list[Row]]:
        return "completed", [answered(line, chat(line["body"], ["Rating: 4"])) for line in lines], []

    with batch_server() as server:
        server.outcome = outcome
        write(tmp_path, server.url, rows, judge=", batch: true")
        assert factory(tmp_path, "build", "recipe.yaml").returncode == 13
        for _ in range(2):  # it is paid for, so all else is done
            told(
                factory(tmp_path, "build", "recipe.yaml"),
                3,
                f"{rows} of {rows} verdicts could not be read",
                "'Rating: 4'",
            )
            assert report(tmp_path)["status"] == "done"
        write(tmp_path, server.url, rows + 5, judge=", batch: true")
        doomed = rows >= DOOMED_AFTER
        assert factory(tmp_path, "build", "recipe.yaml").returncode == (3 if doomed else 13)
        assert server.calls["submit"] == (1 if doomed else 2)


def test_where_nothing_is_left_to_train_on_the_judge_is_named_as_the_cause(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    with in_thread(says({}, "Rating: 4")) as server:
        train = "  - train: {method: sft, student: base, as: student}\n"
        write(tmp_path, server.url, 5, train, models=f"  base: {{type: transformers, model: {base}}}\n")
        told(factory(tmp_path, "train", "recipe.yaml"), 3, "5 of 5 verdicts could not be read", "'Rating: 4'")
