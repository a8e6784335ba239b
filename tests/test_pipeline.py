"""Whole runs through the command line: what a user types, with a real server, real files and a tiny real student."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.server import chat, in_thread
from tests.tiny import tiny_model

QUESTIONS = [f"What is the colour of thing number {i}?" for i in range(24)]


def recipe(url: str, student: Path | None = None, stages: str | None = None) -> str:
    base = f"  base: {{type: transformers, model: {student}}}\n" if student else ""
    return f"""\
name: tiny
seed: 3
models:
  teacher: {{type: openai, model: m, base_url: "{url}", limits: {{max_attempts: 2}}}}
{base}prompts:
  - {{path: prompts.jsonl, name: questions, held_out: 6}}
stages:
""" + (stages or STAGES)


STAGES = """\
  - generate: {model: teacher, n: 2, temperature: 0.7, max_tokens: 16}
  - filter: [finished, {words: {min: 3}}]
  - choose: {cap: 1}
"""
TRAINING = """\
  - train: {method: sft, student: base, args: {num_train_epochs: 1, per_device_train_batch_size: 8}}
  - evaluate: {students: [base, student], teacher: teacher, max_tokens: 8}
"""


def folder(tmp_path: Path, text: str) -> Path:
    rows = [json.dumps({"prompt": q, "reference": "blue"}) for q in QUESTIONS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


def factory(where: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "factory", *arguments]
    return subprocess.run(
        command,
        cwd=where,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def funnel(where: Path) -> dict[str, tuple[int, int, int, int]]:
    report = json.loads((where / "runs/tiny/report.json").read_text())
    return {row["stage"]: (row["in"], row["kept"], row["dropped"], row["failed"]) for row in report["funnel"]}


def test_build_makes_a_data_set_and_accounts_for_every_row(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> dict:
        i = int(body["messages"][-1]["content"].split()[-1].strip("?"))
        if i == 3:
            return chat(body, texts=["cut off in the", "cut off in the"], finish="length")
        return chat(body, texts=["short"] * 2 if i == 4 else [f"It is blue, like {k}." for k in range(2)])

    with in_thread(script) as server:
        done = factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml")
        assert done.returncode == 0, done.stderr
        again = factory(tmp_path, "build", "recipe.yaml")
        asked = sum(server.seen.values())
    assert again.returncode == 0
    assert "done already" in again.stderr
    assert asked == 18  # one request with n for each prompt of the training side, none for the held-out ones
    rows = read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")
    assert all(row["prompt"] in QUESTIONS and row["completion"].startswith("It is blue") for row in rows)
    told = json.loads((tmp_path / "runs/tiny/report.json").read_text())["funnel"]
    for stage in told:
        assert stage["in"] == stage["kept"] + stage["dropped"] + stage["failed"], stage
    reasons = {reason: count for stage in told for reason, count in stage["reasons"].items()}
    assert len(rows) == 18 - (reasons.get("unfinished", 0) + reasons.get("words", 0)) // 2
    assert (tmp_path / "runs/tiny/report.html").stat().st_size > 1000


def test_a_changed_filter_reruns_from_there_and_asks_the_teacher_nothing(tmp_path: Path) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url))
        assert factory(tmp_path, "build", "recipe.yaml").returncode == 0
        asked = sum(server.seen.values())
        changed = factory(tmp_path, "build", "recipe.yaml", "--set", "stages.1.filter.1.words.min=99")
        assert changed.returncode == 0, changed.stderr
        assert sum(server.seen.values()) == asked
    assert not (tmp_path / "runs/tiny/dataset/train.jsonl").exists() or not read_jsonl(
        tmp_path / "runs/tiny/dataset/train.jsonl"
    )


def test_raising_n_asks_for_the_new_draws_only(tmp_path: Path) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url))
        assert factory(tmp_path, "build", "recipe.yaml").returncode == 0
        assert factory(tmp_path, "build", "recipe.yaml", "--set", "stages.0.generate.n=3").returncode == 0
        assert [body.get("n", 1) for body in server.bodies] == [2] * 18 + [1] * 18


def test_the_whole_line_trains_a_student_and_measures_it(tmp_path: Path) -> None:
    student = tiny_model(tmp_path / "student")
    with in_thread() as server:
        done = factory(folder(tmp_path, recipe(server.url, student, STAGES + TRAINING)), "run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    measured = {(row["role"], row["measure"]): row for row in report["evaluation"]}
    for role in ("base", "student", "teacher"):
        assert measured[role, "accepted"]["n"] == 6
        assert (
            0
            <= measured[role, "accepted"]["low"]
            <= measured[role, "accepted"]["value"]
            <= measured[role, "accepted"]["high"]
            <= 1
        )
    assert measured["student", "teacher_loss"]["value"] < measured["base", "teacher_loss"]["value"]
    assert report["training"][0]["rows_trained"] == len(read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")) == 18
    test = read_jsonl(tmp_path / "runs/tiny/dataset/test.jsonl")
    assert len(test) == 6
    train_prompts = {row["prompt"] for row in read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")}
    assert not train_prompts & {row["prompt"] for row in test}


def test_kill_9_anywhere_gives_the_same_data_and_asks_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    (tmp_path / "stormy").mkdir()
    with in_thread(delay_s=0.05) as server:
        folder(tmp_path / "calm", recipe(server.url, stages=STAGES).replace("max_attempts: 2", "max_concurrency: 2"))
        assert factory(tmp_path / "calm", "build", "recipe.yaml").returncode == 0
        undisturbed = sum(server.seen.values())
        folder(tmp_path / "stormy", (tmp_path / "calm/recipe.yaml").read_text())
        kills = 0
        for wait in (0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 60):
            child = subprocess.Popen([sys.executable, "-m", "factory", "build", "recipe.yaml"], cwd=tmp_path / "stormy", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
            deadline = time.monotonic() + wait
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                kills += 1
            child.wait()
        assert child.returncode == 0
        assert sum(server.seen.values()) - 2 * undisturbed <= 2 * kills
    for name in ("dataset/train.jsonl",):
        assert (tmp_path / "calm/runs/tiny" / name).read_bytes() == (tmp_path / "stormy/runs/tiny" / name).read_bytes()


def test_answers_from_elsewhere_need_no_model(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"a{i} b c d"}]}
        for i, q in enumerate(QUESTIONS)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(
        "name: tiny\nprompts: [{path: rows.jsonl}]\nstages:\n  - filter: [{words: {min: 4}}, exact_duplicates]\n"
    )
    done = factory(tmp_path, "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert len(read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")) == len(QUESTIONS)


# -- what users get wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "arguments", "exit_code", "told"),
    [
        (("prompts.jsonl", "nowhere.jsonl"), (), 2, "nowhere.jsonl"),
        (("name: questions", "name: questions, columns: {prompt: question}"), (), 2, "question"),
        (("n: 2", "nn: 2"), (), 2, "did you mean 'n'"),
        (("127.0.0.1", "127.0.0.1"), ("--set", "models.teacher.base_url=http://127.0.0.1:9/v1"), 7, "127.0.0.1:9"),
        (("limits:", "api_key_env: NO_SUCH_KEY, limits:"), (), 4, "NO_SUCH_KEY"),
        (("type: openai", "type: transformers"), ("--set", "models.teacher={type: transformers, model: ./no/such/model}"), 2, "no/such/model"),
        (("n: 2", "n: 2"), ("--runs", "/proc/no"), 9, "/proc/no"),
        (("held_out: 6", "held_out: 60"), (), 2, "held_out"),
    ],
)  # fmt: skip
def test_a_mistake_ends_with_its_exit_code_and_no_traceback(
    tmp_path: Path, change: tuple[str, str], arguments: tuple[str, ...], exit_code: int, told: str
) -> None:
    with in_thread() as server:
        text = recipe(server.url)
        assert change[0] in text
        done = factory(folder(tmp_path, text.replace(*change)), "build", "recipe.yaml", *arguments)
    assert done.returncode == exit_code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "no prompts"),
        (b'{"prompt": "a\xff"}\n', "UTF-8"),
        (b'{"prompt": \n', "prompts.jsonl:1"),
        (b"\n\n", "empty"),
    ],
)
def test_a_bad_prompt_file_is_told_before_anything_is_sent(tmp_path: Path, raw: bytes, told: str) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url).replace("held_out: 6", "held_out: 0"))
        (tmp_path / "prompts.jsonl").write_bytes(raw)
        done = factory(tmp_path, "build", "recipe.yaml")
        assert not server.seen
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_process_on_the_same_journal_is_refused(tmp_path: Path) -> None:
    with in_thread(delay_s=1.0) as server:
        folder(tmp_path, recipe(server.url))
        first = subprocess.Popen([sys.executable, "-m", "factory", "build", "recipe.yaml"], cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
        while not server.seen and first.poll() is None:
            time.sleep(0.01)
        second = factory(tmp_path, "build", "recipe.yaml")
        assert first.wait(60) == 0
    assert second.returncode == 10
    assert f"process {first.pid}" in second.stderr


def test_a_full_disk_stops_cleanly_and_resumes(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:

        async def script(body: dict, before: int) -> dict:
            return chat(body, texts=["word " * 6000] * 2)

        with in_thread(script) as server:
            folder(tmp_path, recipe(server.url))
            full = factory(tmp_path, "build", "recipe.yaml", "--runs", "small/runs")
            assert full.returncode == 9, full.stderr
            assert "Traceback" not in full.stderr
            subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
            stored = sum(server.seen.values())
            done = factory(tmp_path, "build", "recipe.yaml", "--runs", "small/runs")
            assert done.returncode == 0, done.stderr
            assert sum(server.seen.values()) < stored + 18
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# -- the command itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["check", "quickstart"], ["ls"]])
def test_light_commands_load_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys, factory, factory.cli\n"
        "try: code = factory.cli.main(sys.argv[1:])\n"
        "except SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'vllm', 'openai'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ls_and_show_tell_what_there_is(tmp_path: Path) -> None:
    with in_thread() as server:
        assert factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml").returncode == 0
    listed = factory(tmp_path, "ls").stdout
    assert "quickstart" in listed
    assert "tiny" in listed
    shown = factory(tmp_path, "show", "tiny").stdout
    assert "01-generate" in shown
    assert "report.html" in shown
    missing = factory(tmp_path, "show", "nothing")
    assert missing.returncode == 2
