"""Verifiers: mathematics and reasoning tasks by libraries in a child process, programs by their tests in a sandbox.

A wrong answer is dropped; a verifier that hangs, dies or is refused something sets the row aside.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.curate import Curate, row_filters
from factory.filters.code import program, walls
from factory.filters.isolated import CORES, Broken, Isolated, isolated
from factory.filters.reference import compare
from tests.command import funnel, report, typed
from tests.command import told as refused
from tests.sample_rows import Words, answer, ends, filtered, one_filter, prompt

# -- mathematics -----------------------------------------------------------------------------------------------------------

MATH = [
    # answer, reference, reason
    ("So it is $\\boxed{\\frac12}$.", "0.5", ""),
    ("The answer is 1/2", "\\frac{1}{2}", ""),
    ("50%", "1/2", ""),
    ("x^2+2x+1", "(x+1)^2", ""),
    ("We get $x^2+2x+1$.", "(x+1)^2", ""),
    ("$3\\sqrt{2}$", "\\sqrt{18}", ""),
    ("first 7, then 8", "8", ""),
    ("I think 8", "8", ""),
    ("1,000", "1000", ""),
    ("x = 5", "5", ""),
    ("\\boxed{x \\in [1,2)}", "[1,2)", ""),
    ("$\\{2, 1\\}$", "\\{1,2\\}", ""),
    ("$x^2+2x$", "(x+1)^2", "wrong:x^2+2x"),
    ("I think 7", "8", "wrong:7"),
    ("\\boxed{[1,2]}", "[1,2)", "wrong:[1,2]"),
    ("It is about five.", "5", "unread:It is about five."),
    ("", "5", "unread:"),
    ("5", "banana", "reference_unread"),
    ("anything", None, ""),
]


@pytest.mark.parametrize(("text", "reference", "reason"), MATH)
def test_mathematics_is_compared_as_such(text: str, reference: str | None, reason: str) -> None:
    (row,) = filtered([{"matches_reference": {"how": "math"}}], [answer(text, prompt(reference=reference))])
    assert ends([row]) == [reason]
    assert row.ending == ("failed" if reason == "reference_unread" else "dropped" if reason else "kept")


@settings(max_examples=30, deadline=None)
@given(st.integers(-999, 999), st.integers(1, 99))
def test_a_fraction_is_the_same_in_every_spelling(above: int, below: int) -> None:
    for spelling in (f"\\boxed{{\\frac{{{above}}}{{{below}}}}}", f"The answer is {above}/{below}"):
        assert compare("math", spelling, f"{above}/{below}").same
        assert not compare("math", spelling, f"{above + 1}/{below}").same


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="0123456789xy+-*/^(){}\\$ .,=%", max_size=30))
def test_whatever_is_written_gets_a_verdict_or_is_missing(text: str) -> None:
    (row,) = filtered([{"matches_reference": {"how": "math"}}], [answer(text, prompt(reference="-77.25"))])
    assert row.ending != "kept" or "77" in text or "309" in text


def test_a_child_that_hangs_is_ended_and_one_that_dies_is_replaced() -> None:
    verifier = Isolated("math", limit_s=0)
    with pytest.raises(Broken, match="verifier_timeout=0s"):
        verifier.ask(answer="1", reference="1")
    verifier.limit_s = 15
    assert verifier.ask(answer="1", reference="1")["same"]
    (idle,) = verifier.idle
    child = idle.process
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(Broken, match="verifier_crashed"):
        verifier.ask(answer="1", reference="1")
    assert child.poll() == -signal.SIGKILL
    assert verifier.ask(answer="2", reference="1") == {"known": True, "read": "2", "same": False}


def test_several_are_asked_at_once_in_order_and_a_killed_child_costs_one_row() -> None:
    rows = [answer(f"${i}$", prompt(f"question {i}", reference=str(i // 2 * 2))) for i in range(60)]
    done = filtered([{"matches_reference": {"how": "math"}}], rows)
    assert [row.prompt.text for row in done] == [row.prompt.text for row in rows]
    assert ends(done) == ["", *(f"wrong:{i}" if i % 2 else "" for i in range(1, 60))]
    idle = isolated("math").idle
    assert min(2, CORES) <= len(idle) <= CORES
    os.kill(idle[-1].process.pid, signal.SIGKILL)
    idle[-1].process.wait()
    reasons = ends(filtered([{"matches_reference": {"how": "math"}}], rows[::2]))
    assert len([reason for reason in reasons if reason.startswith("verifier_crashed")]) == 1
    assert reasons.count("") == 29


def test_children_of_a_pool_outlive_the_stage_that_started_them() -> None:
    """Linux ends a child with the thread that started it."""
    for _ in range(3):
        rows = [answer("1", prompt(f"question {i}", reference="1")) for i in range(20)]
        assert ends(filtered([{"matches_reference": {"how": "math"}}], rows)) == [""] * 20


# -- reasoning tasks -------------------------------------------------------------------------------------------------------


def entry(name: str) -> dict[str, Any]:
    task: dict[str, Any] = reasoning_gym.create_dataset(name, size=1, seed=3)[0]
    return task


COUNTDOWN = entry("countdown")  # 119 of 67, 50, 20, 82
GYM = [
    # settings, answer, reference, how it ends, reason
    ({}, "82 + 20 + 67 - 50", COUNTDOWN, "kept", ""),
    ({}, " 67 - 50 + 20 + 82\n", COUNTDOWN, "kept", ""),  # another right one
    ({}, "82 + 20", COUNTDOWN, "dropped", "wrong:82 + 20"),
    ({"min": 0.05}, "82 + 20", COUNTDOWN, "kept", ""),  # what the library gives to an expression that is wrong
    ({"min": 0.06}, "82 + 20", COUNTDOWN, "dropped", "wrong:82 + 20"),
    ({}, "It is 82 + 20 + 67 - 50", COUNTDOWN, "dropped", "wrong:It is 82 + 20 + 67 - 50"),
    ({"extract": "It is (.*)"}, "It is 82 + 20 + 67 - 50", COUNTDOWN, "kept", ""),
    ({"extract": "It is (.*)"}, "82 + 20 + 67 - 50", COUNTDOWN, "dropped", "no_answer"),
    ({}, "-61", entry("basic_arithmetic"), "kept", ""),
    ({}, "-62", entry("basic_arithmetic"), "dropped", "wrong:-62"),
    ({}, "5", {"answer": "5"}, "failed", "reference_unread"),
    ({}, "5", "not JSON", "failed", "reference_unread"),
    ({}, "5", {"answer": "5", "metadata": {"source_dataset": "none_such"}}, "failed", "verifier_error:ValueError"),
    ({}, "5", None, "kept", ""),
]


@pytest.mark.parametrize(("knobs", "text", "task", "ending", "reason"), GYM)
def test_a_task_is_scored_by_its_own_data_set(knobs: Any, text: str, task: Any, ending: str, reason: str) -> None:
    reference = task if isinstance(task, str | None) else json.dumps(task)
    (row,) = filtered([{"reasoning_gym": knobs}], [answer(text, prompt(reference=reference))])
    assert (row.ending, *ends([row])) == (ending, reason)


def test_tasks_come_from_the_librarys_own_rows(tmp_path: Path) -> None:
    tasks = [{**COUNTDOWN, "said": COUNTDOWN["answer"]}, {**entry("basic_arithmetic"), "said": "<'9'>"}]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    (tmp_path / "recipe.yaml").write_text("""\
name: tiny
prompts:
  - path: tasks.jsonl
    columns: {prompt: question, completion: said, reference: '{"answer": {{ answer | tojson }}, "metadata": {{ metadata | tojson }}}'}
stages: [filter: [reasoning_gym]]
""")
    assert typed(tmp_path, "build", "recipe.yaml").returncode == 0
    assert funnel(tmp_path)["filter"] == (2, 1, 1, 0)
    (told,) = report(tmp_path)["rejects"]
    assert told["shown"][0] | {"id": "", "prompt": ""} == {
        "id": "", "prompt": "", "answer": "<'9'>", "verifier": "reasoning_gym", "reason": "wrong", "read": "<'9'>",
        "known": tasks[1]["answer"],
    }  # fmt: skip


# -- programs --------------------------------------------------------------------------------------------------------------

ADD = "def add(a, b):\n    return a + b\n"
TEST = "assert add(1, 2) == 3"
FORGED = 'open(\'result\', \'w\').write(\'["0", "passed", "", ""]\')\nimport os\nos._exit(0)'
PROGRAMS = [
    # answer, tests, how it ends, what its reason begins with
    (ADD, TEST, "kept", ""),
    (f"Here it is:\n```python\n{ADD}```\nUse it so:\n```\nadd(1, 2)\n```\n", TEST, "kept", ""),
    (f"```\n{ADD}```", TEST, "kept", ""),
    ("import numpy\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: 'int' = 1\n" + ADD, TEST, "kept", ""),
    (ADD + "if __name__ == '__main__':\n    print(add(int(input()), 2))", TEST, "kept", ""),
    (ADD + "print('x' * 10**6)\nopen('note', 'w').write('mine')", TEST, "kept", ""),
    (ADD, "raise SystemError", "dropped", "tests_failed:SystemError"),
    (ADD.replace("+", "-"), TEST, "dropped", "tests_failed:AssertionError"),
    ("def sub(a, b): return a - b", TEST, "dropped", "tests_failed:NameError"),
    ("def add(a, b", TEST, "dropped", "code_error:SyntaxError"),
    ("It cannot be done.", TEST, "dropped", "code_error:SyntaxError"),
    ("import sys\nsys.exit(0)", TEST, "dropped", "code_error:SystemExit"),
    ("def add(a, b):\n    raise SystemExit(0)", TEST, "dropped", "tests_failed:SystemExit"),
    ("x = 'a' * (2 << 30)\n" + ADD, TEST, "dropped", "code_error:MemoryError"),
    ("while True: pass", TEST, "dropped", "too_slow=1s"),
    ("sum(range(10**13))", TEST, "dropped", "too_slow=1s"),  # one operation, which nothing inside can interrupt
    ("open('big', 'w').write('x' * (17 << 20))\n" + ADD, TEST, "dropped", "code_error:OSError"),
    ("import time\ntime.sleep(1000)", TEST, "failed", "code_timeout=8s"),
    ("import os\nos._exit(0)", TEST, "failed", "code_crashed"),
    (FORGED, TEST, "failed", "code_crashed"),
    ("import ctypes\nctypes.string_at(0)", TEST, "failed", "code_crashed"),
    ("import socket\nsocket.socket()", TEST, "failed", "sandbox_refused:socket.__new__"),
    ("import subprocess\nsubprocess.run(['true'])", TEST, "failed", "sandbox_refused:subprocess.Popen"),
    ("import os\nos.fork()", TEST, "failed", "sandbox_refused:os.fork"),
    ("open('/tmp/of-the-sandbox', 'w')", TEST, "failed", "sandbox_refused:open"),
    ("import os\nos.remove('/tmp/of-the-sandbox')", TEST, "failed", "sandbox_refused:os.remove"),
    ("import shutil\nshutil.rmtree('/tmp/of-the-sandbox')", TEST, "failed", "sandbox_refused:shutil.rmtree"),
    ("import os\nos.symlink('/etc', 'e')\nopen('e/x', 'a')", TEST, "failed", "sandbox_refused:"),
    (ADD, "assert (", "failed", "tests_unread"),
    (ADD, None, "kept", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "tests", "ending", "reason"), PROGRAMS)
def test_a_program_passes_fails_or_cannot_be_told(text: str, tests: str | None, ending: str, reason: str) -> None:
    (row,) = filtered([{"code": {"cpu_s": 1}}], [answer(text, prompt(reference=tests))])
    assert row.ending == ending, row.verdicts
    assert ends([row])[0].startswith(reason)
    assert ending == "kept" or str(tests)[:10] in str(row.verdicts[-1].evidence)


def test_a_program_knows_no_key_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "secret")
    text = "import os\nassert set(os.environ) <= {'PATH', 'HOME', 'LANG', 'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'LC_CTYPE'}, os.environ\n"
    rows = filtered(["code"], [answer(text + ADD, prompt(reference=TEST))])
    assert ends(rows) == [""]


@pytest.mark.skipif(not walls(), reason="no namespaces here")
def test_the_network_is_gone_below_python_too() -> None:
    """A library that opens sockets by itself finds no interface to send through."""
    seen = subprocess.run([*walls(), "cat", "/proc/net/dev"], capture_output=True, text=True, check=True).stdout
    assert [line.split(":")[0].strip() for line in seen.splitlines()[2:]] == ["lo"]


def test_a_program_that_is_ended_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests leave and take theirs meanwhile
    before = time.monotonic()
    mark = f"factory-left-{os.getpid()}"
    text = f"import threading, time\nthreading.Thread(target=time.sleep, args=(999,), name='{mark}').start()\n" + ADD
    rows = filtered([{"code": {"cpu_s": 1}}], [answer(text, prompt(reference=TEST))])
    assert ends(rows) == [""]
    assert time.monotonic() - before < 60  # it does not wait for the thread
    assert not list(tmp_path.iterdir())


@settings(deadline=None)
@given(st.text() | st.text(alphabet="`~\n apy", max_size=60))
def test_any_answer_has_a_program(text: str) -> None:
    assert isinstance(program(text), str)
    body = text.replace("`", "").replace("~", "").replace("\r", "")
    assert program(f"So:\n```python\n{body}\n```\nthat is all") == f"{body}\n"


CODE = """\
name: tiny
prompts: [{path: rows.jsonl}]
stages: [filter: [code]]
"""


def test_programs_run_only_where_it_is_allowed(tmp_path: Path) -> None:
    rows = [{"prompt": f"add {i}", "completion": text, "reference": TEST} for i, text in enumerate([ADD, "x"])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(CODE)
    refused(typed(tmp_path, "build", "recipe.yaml"), 2, "runs programs that models wrote; say --allow-code")
    assert not list((tmp_path / "runs/tiny").glob("0*"))
    checked = typed(tmp_path, "check", "recipe.yaml")
    assert checked.returncode == 0
    assert "needs --allow-code" in checked.stdout
    assert typed(tmp_path, "build", "recipe.yaml", "--allow-code").returncode == 0
    assert funnel(tmp_path)["filter"] == (2, 1, 1, 0)


# -- a threshold on a score ------------------------------------------------------------------------------------------------

LIMITS = [
    # settings, score, reason
    ({"min": 2}, 2.0, ""),
    ({"min": 2}, 1.999, "s=1.999<2"),
    ({"max": 1}, 1.0, ""),
    ({"max": 1}, 1.25, "s=1.25>1"),
    ({"min": -1, "max": 1}, -1.0, ""),
    ({"min": -1, "max": 1}, -1.5, "s=-1.5<-1"),
    ({"min": 0}, None, "no_score:s"),
]


@pytest.mark.parametrize(("knobs", "score", "reason"), LIMITS)
def test_a_score_within_the_limits_stays(knobs: dict[str, float], score: float | None, reason: str) -> None:
    (row,) = filtered([{"score": {"name": "s", **knobs}}], [answer("a", scores={} if score is None else {"s": score})])
    assert ends([row]) == [reason]
    assert row.ending == ("failed" if score is None else "dropped" if reason else "kept")


def test_answers_under_test_have_no_scores_so_a_threshold_is_no_part_of_accepting_them() -> None:
    knobs = Curate(filters=["finished", {"score": {"name": "s", "min": 1}}, "code"])
    assert [one.kind for one in row_filters([knobs], Words())] == ["finished", "code"]


def test_the_teachers_own_log_probability_is_a_score() -> None:
    rows = [answer("a", prompt(str(i)), logprob=-float(i)) for i in range(3)]
    assert ends(filtered([{"score": {"name": "logprob", "min": -1}}], rows)) == ["", "", "logprob=-2<-1"]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"score": {"name": "s"}}, "give min, max or both"),
        ({"score": {"name": "s", "min": 2, "max": 1}}, "min: 2 is more than max: 1"),
        ({"score": {"name": "s", "min": float("nan")}}, "finite number"),
        ({"score": {"min": 1}}, "Field required"),
        ({"code": {"cpu_s": 0}}, "greater than 0"),
        ({"reasoning_gym": {"min": 1.5}}, "less than or equal to 1"),
        ({"reasoning_gym": {"extract": "a"}}, "exactly one group"),
    ],
)
def test_wrong_settings_are_told(spec: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        one_filter(spec)


# -- what was rejected, for people -----------------------------------------------------------------------------------------


def rejecting(folder: Path, seed: int, rows: int = 60) -> dict[str, Any]:
    """A run over numbers, all of them wrong, and some too long to get so far."""
    folder.mkdir(exist_ok=True)
    lines = [
        {"prompt": f"{i}?", "reference": str(i), "completion": f"So it is {i + 1}" + " so" * (i % 4)}
        for i in range(rows)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "recipe.yaml").write_text(
        f"name: tiny\nseed: {seed}\nprompts: [{{path: rows.jsonl}}]\n"
        "stages: [filter: [words: {max: 6}, matches_reference: {how: numeric}]]\n"
    )
    assert typed(folder, "build", "recipe.yaml", "--max-failed", "1").returncode == 0
    told: dict[str, Any] = report(folder)
    return told


def test_a_seeded_draw_of_the_rejects_is_in_the_report(tmp_path: Path) -> None:
    (told,) = rejecting(tmp_path / "a", seed=1)["rejects"]
    assert (told["stage"], told["count"], len(told["shown"])) == ("02-filter", 45, 20)  # the long ones are not its own
    for row in told["shown"]:
        assert row["answer"].startswith(f"So it is {row['read']}")
        assert int(row["read"]) == int(row["known"]) + 1
        assert row["prompt"] == f"{row['known']}?"
    again, other = rejecting(tmp_path / "b", seed=1)["rejects"][0], rejecting(tmp_path / "c", seed=2)["rejects"][0]
    ids = [[row["id"] for row in one["shown"]] for one in (told, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert "Rejected by verifiers" in (tmp_path / "a/runs/tiny/report.html").read_text()
    assert rejecting(tmp_path / "d", seed=1, rows=4)["rejects"][0]["count"] == 3
