"""What users get wrong, and what goes wrong around them: an exit code, what, where and what to do; and nothing is lost."""

import json
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.command import (
    ASKED,
    STAGES,
    TRAINING,
    asked_in_vain,
    environment,
    factory,
    folder,
    read_jsonl,
    recipe,
    report,
    started,
    told,
    typed,
    until,
)
from tests.server import error, held, in_thread

TEACHER = "{type: openai, model: m, base_url: http://127.0.0.1:9/v1, limits: {max_attempts: 2}}"


@pytest.mark.parametrize(
    ("old", "new", "arguments", "words"),
    [
        ("prompts.jsonl", "nowhere.jsonl", (), ("no file 'nowhere.jsonl'",)),
        ("name: questions", "columns: {prompt: question}", (), ("prompts.jsonl:1", "'question'", "'prompt', 'reference'")),
        ("n: 2", "nn: 2", (), ("recipe.yaml:8", "stages.0.generate.nn", "did you mean 'n'")),
        ("n: 2", "n: two", (), ("recipe.yaml:8", "stages.0.generate.n", "'two'")),
        ("model: teacher,", "model: techer,", (), ("recipe.yaml:8", "no model 'techer'", "did you mean 'teacher'")),
        ("filter:", "fliter:", (), ("recipe.yaml:9", "'fliter'", "did you mean 'filter'")),
        ("seed: 3", "seed: 3\nseed: 4", (), ("recipe.yaml:3", "'seed' appears twice")),
        ("seed: 3", "seed: [", (), ("recipe.yaml", "not YAML")),
        ("name: tiny", "", (), ("name is missing",)),
        ("held_out: 6", "held_out: 60", (), ("held_out: 60 of 24",)),
        ("name: questions", "columns: {promt: prompt}", (), ("recipe.yaml:6", "'prompts.0.columns.promt'", "did you mean 'prompt'")),
        ("n: 2", "n: 2", ("--set", "models.teacher={type: transformers, model: ./no/such/model}"), ("./no/such/model", "make weights")),
        ("n: 2", "n: 2", ("--set", "models.teacher={type: transformers, model: ./}"), ("no config.json",)),
        ("n: 2", "n: 2", ("--set", "models.teacher={type: replay, path: answers.jsonl}"), ("answers.jsonl",)),
    ],
)  # fmt: skip
def test_a_mistake_in_the_recipe_is_told_with_its_place_before_anything_is_sent(
    tmp_path: Path, old: str, new: str, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with in_thread() as server:
        text = recipe(server.url)
        assert old in text
        done = typed(folder(tmp_path, text.replace(old, new)), "build", "recipe.yaml", *arguments)
        told(done, 2, *words)
        assert not server.seen
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nowhere.yaml"], ("no recipe 'nowhere.yaml'", "factory ls")),
        (["run", "nowhere"], ("no recipe 'nowhere'", "factory ls")),
        (["show", "nowhere"], ("no run 'nowhere'", "factory ls")),
        (["check", "recipe.yaml", "--set", "seed"], ("--set seed", "KEY=VALUE")),
        (["check", "recipe.yaml", "--set", "stages.9.generate.n=4"], ("'9' is not one of the 3 items",)),
        (["check", "recipe.yaml", "--set", "stages.²=4"], ("'²' is not one of the 3 items",)),
        (["check", "recipe.yaml", "--set", "seed.x=4"], ("plain value 3",)),
        (["check", "recipe.yaml", "--set", "seed={"], ("--set seed", "not YAML")),
        (["check", "recipe.yaml", "--set", "stages.0.generate.m=4"], ("--set stages.0.generate.m", "unknown key")),
        (["check", "circle.yaml"], ("circle.yaml", "goes in a circle")),
        (["check", "orphan.yaml"], ("orphan.yaml:2", "nowhere.yaml")),
        (["check", "latin.yaml"], ("latin.yaml:1", "not UTF-8")),
        (["check", "list.yaml"], ("list.yaml:1", "a recipe is a map")),
        (["build"], ("required: recipe",)),
        (["build", "."], ("is a folder", "recipe.yaml")),
        (["build", "recipe.yaml", "--max-failed", "foo"], ("--max-failed: write a share", "'foo'")),
        (["build", "recipe.yaml", "--max-failed", "500%"], ("--max-failed: write a share", "'500%'")),
        (["bild", "recipe.yaml"], ("invalid choice: 'bild'",)),
    ],
)
def test_a_mistake_on_the_command_line_is_told(tmp_path: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    folder(tmp_path, recipe("http://127.0.0.1:9/v1"))
    (tmp_path / "circle.yaml").write_text("extends: circle.yaml\n")
    (tmp_path / "orphan.yaml").write_text("name: orphan\nextends: nowhere.yaml\n")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9\n".encode("latin-1"))
    (tmp_path / "list.yaml").write_text("- name\n")
    told(typed(tmp_path, *arguments), 2, *words)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", ("no prompts",)),
        (b"\n\n", ("no prompts", "line 1: empty")),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', ("prompts.jsonl:2", "not UTF-8", "0xe9", "save the file as UTF-8")),
        (b'{"prompt": "a"}\n{"prompt": \n', ("prompts.jsonl:2", "not JSON")),
        (b'["a"]\n', ("prompts.jsonl:1", "object with columns")),
        (b'{"prompt": "a", "reference": "x"}\n{"prompt": "a", "reference": "y"}\n', ("lines 1 and 2", "references differ")),
    ],
)  # fmt: skip
def test_a_bad_prompt_file_is_told_before_anything_is_sent(tmp_path: Path, raw: bytes, words: tuple[str, ...]) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url).replace("held_out: 6", "held_out: 0"))
        (tmp_path / "prompts.jsonl").write_bytes(raw)
        told(typed(tmp_path, "build", "recipe.yaml"), 2, "prompts.jsonl", *words)
        assert not server.seen


@pytest.mark.parametrize("file", ["prompts/rubrics/helpfulness.md", "prompts/explanations.yaml"])
def test_what_is_said_must_be_utf_8_too(tmp_path: Path, file: str) -> None:
    asking = "ask: {explain: {path: said.txt}}, " if "explanations" in file else ""
    judging = "" if asking else "  - judge: {model: teacher, rubric: said.txt}\n"
    stages = f"  - generate: {{model: teacher, {asking}max_tokens: 4}}\n{judging}"
    folder(tmp_path, recipe("http://127.0.0.1:9/v1", stages=stages))
    (tmp_path / "said.txt").write_bytes("caf\xe9".encode("latin-1"))
    told(typed(tmp_path, "check", "recipe.yaml"), 2, "said.txt", "UTF-8")


# -- the teacher -----------------------------------------------------------------------------------------------------


def test_an_endpoint_that_cannot_be_reached_is_named_and_the_same_command_goes_on_later(tmp_path: Path) -> None:
    with in_thread() as server:
        url = server.url
    told(factory(folder(tmp_path, recipe(url)), "build", "recipe.yaml"), 7, "models.teacher", url, "run again")
    with in_thread() as server:
        again = factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml")
        assert again.returncode == 0, again.stderr
    assert report(tmp_path)["funnel"][1]["kept"] == 2 * ASKED


def test_a_missing_key_is_told_before_the_first_request_even_if_a_later_stage_needs_it(tmp_path: Path) -> None:
    judge = '{type: openai, model: j, base_url: "https://judge.example/v1", api_key_env: JUDGES_KEY}'
    with in_thread() as server:
        text = recipe(server.url).replace("models:\n", f"models:\n  judge: {judge}\n")
        folder(tmp_path, text + "  - judge: {model: judge, rubric: prompts/rubrics/helpfulness.md}\n")
        told(factory(tmp_path, "build", "recipe.yaml"), 4, "JUDGES_KEY", "https://judge.example/v1", "export it")
        assert re.match(r"tiny: stopped\n  AuthError: .*JUDGES_KEY", typed(tmp_path, "show", "tiny").stdout)
        assert not server.seen
        done = factory(folder(tmp_path, text), "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr  # what no stage asks needs no key


def test_what_is_done_already_needs_no_key(tmp_path: Path) -> None:
    with in_thread() as server:
        text = recipe(server.url, limits="max_attempts: 2}, api_key_env: TEACHERS_KEY, price: {input: 0, output: 0")
        assert factory(folder(tmp_path, text), "build", "recipe.yaml", TEACHERS_KEY="sk-right").returncode == 0
        changed = factory(tmp_path, "build", "recipe.yaml", "--set", "stages.2.choose.cap=2")
    assert changed.returncode == 0, changed.stderr


def test_a_refused_key_stops_at_once_and_the_right_one_goes_on(tmp_path: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> web.Response | None:
        right = server.headers[-1].get("Authorization") == "Bearer sk-right"
        return None if right else error(401, "Incorrect API key provided", "invalid_api_key")

    with in_thread(script) as server:
        text = recipe(server.url, limits="max_concurrency: 1}, api_key_env: TEACHERS_KEY, price: {input: 0, output: 0")
        done = factory(folder(tmp_path, text), "build", "recipe.yaml", TEACHERS_KEY="sk-wrong")
        told(done, 4, "models.teacher", "Incorrect API key", "api_key_env")
        assert sum(server.seen.values()) == 1
        assert "sk-wrong" not in done.stderr
        shown = typed(tmp_path, "show", "tiny").stdout
        assert re.match(r"tiny: stopped\n  AuthError: models\.teacher: .*Incorrect API key", shown)
        again = factory(tmp_path, "build", "recipe.yaml", TEACHERS_KEY="sk-right")
        assert again.returncode == 0, again.stderr
    assert typed(tmp_path, "show", "tiny").stdout.startswith("tiny: done\n\n")
    assert len(read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")) == ASKED


def test_a_web_page_as_an_answer_is_called_one(tmp_path: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> web.Response:
        return web.Response(text="<!doctype html>\n<title>Welcome</title>", content_type="text/html")

    with in_thread(script) as server:
        text = recipe(server.url, limits="max_attempts: 1, max_concurrency: 1")
        done = factory(folder(tmp_path, text), "build", "recipe.yaml")
    told(done, 7, "models.teacher", "a web page, not JSON; check base_url; it begins: <!doctype html> <title>Welcome")


@pytest.mark.parametrize(
    ("status", "message", "code", "exit_code"),
    [
        (402, "add credit", "billing", 5),
        (429, "You exceeded your quota", "insufficient_quota", 5),
        (404, "no model m", "", 6),
    ],
)
def test_quota_and_a_wrong_model_stop_the_run_with_what_to_do(
    tmp_path: Path, status: int, message: str, code: str, exit_code: int
) -> None:
    async def script(body: dict[str, Any], before: int) -> web.Response:
        return error(status, message, code)

    with in_thread(script) as server:
        done = factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml")
    told(done, exit_code, "models.teacher", message, {5: "top it up", 6: "base_url"}[exit_code])


def test_a_budget_is_a_wall_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url))
        told(
            factory(tmp_path, "build", "recipe.yaml", "--set", "budget.requests=5"), 5, "budget.requests: 5", "raise it"
        )
        assert sum(server.seen.values()) == 5
        again = factory(tmp_path, "build", "recipe.yaml", "--set", "budget.requests=18")
        assert again.returncode == 0, again.stderr
        assert sum(server.seen.values()) == ASKED


def test_weights_that_are_none_are_found_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama"}))
    folder(tmp_path, recipe("http://127.0.0.1:9/v1"))
    done = factory(tmp_path, "build", "recipe.yaml", "--set", "models.teacher={type: transformers, model: ./model}")
    told(done, 2, "./model", "it holds no weights")


# -- the journal -----------------------------------------------------------------------------------------------------


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from factory.cli import main; sys.exit(main(sys.argv[1:]))"


def test_what_training_needs_is_missed_before_anything_is_asked(tmp_path: Path) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=60, check=False
        )

    with in_thread() as server:
        folder(tmp_path, recipe(server.url, Path("student"), STAGES + TRAINING))
        checked = run("check", "recipe.yaml")
        assert checked.returncode == 0, checked.stderr
        assert "warning: models.base: local models and training need torch: pip install" in checked.stdout
        told(run("run", "recipe.yaml"), 2, "models.base", "pip install 'distillation-factory[train]'")
        assert not server.seen
        assert run("build", "recipe.yaml").returncode == 0  # the data set alone needs no torch


def test_a_second_process_on_the_same_journal_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    gate = threading.Event()
    with in_thread(held(gate)) as server:
        folder(tmp_path, recipe(server.url))
        with started(tmp_path, "build", "recipe.yaml") as first:
            until(lambda: server.seen)
            told(
                factory(tmp_path, "build", "recipe.yaml"),
                10,
                f"process {first.pid}",
                "runs/journal.sqlite",
                "wait for it",
            )
            gate.set()
            assert first.wait(60) == 0
        assert sum(server.seen.values()) == ASKED


def journal_of_a_run(tmp_path: Path, url: str) -> Path:
    done = factory(folder(tmp_path, recipe(url)), "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs/journal.sqlite"


@pytest.mark.parametrize("damage", ["no database", "a page in the middle", "cut short"])
def test_a_damaged_journal_is_told_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    with in_thread() as server:
        journal = journal_of_a_run(tmp_path, server.url)
        raw = bytearray(journal.read_bytes())
        if damage == "no database":
            raw[:100] = b"this is not a database".ljust(100)
        elif damage == "cut short":
            del raw[len(raw) // 2 :]
        else:
            raw[4096:8192] = bytes(range(256)) * 16
        journal.write_bytes(raw)
        sent = sum(server.seen.values())
        done = factory(tmp_path, "build", "recipe.yaml", "--set", "stages.0.generate.n=3")
        told(done, 11, "runs/journal.sqlite", "damaged", "Move it aside", ".recover")
        assert sum(server.seen.values()) == sent
    assert journal.read_bytes() == raw


def test_a_journal_of_a_newer_factory_is_left_alone(tmp_path: Path) -> None:
    with in_thread() as server:
        journal = journal_of_a_run(tmp_path, server.url)
        with sqlite3.connect(journal) as db:
            db.execute("PRAGMA user_version=99")
        db.close()
        raw = journal.read_bytes()
        told(factory(tmp_path, "build", "recipe.yaml"), 12, "runs/journal.sqlite", "version 99", "update")
    assert journal.read_bytes() == raw
    assert not asked_in_vain(tmp_path)
