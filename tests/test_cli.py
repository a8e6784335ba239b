"""The command itself: light, quick, complete in a bare clone and in the wheel; what `ls` and `show` tell."""

import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.command import (
    ASKED,
    ROOT,
    STAGES,
    environment,
    factory,
    folder,
    read_jsonl,
    recipe,
    started,
    told,
    typed,
    until,
)  # fmt: skip
from tests.server import chat, held, in_thread

RECIPES = sorted(path.relative_to(ROOT / "recipes").with_suffix("") for path in (ROOT / "recipes").rglob("*.yaml"))
HEAVY = ("torch", "transformers", "trl", "datasets", "vllm", "openai", "pyarrow", "peft", "accelerate")


# -- light and quick -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "",
        "--help",
        "check quickstart",
        "check cpu/orca",
        "check zephyr",
        "ls",
        "show tiny",
        "show tiny --drops",
        "export tiny --form messages --to out.jsonl",
        "run nowhere",
        "build recipe.yaml",
    ],
)
def test_light_commands_load_nothing_heavy(tmp_path: Path, command: str) -> None:
    """What is loaded is printed by the process itself, at its end. No command at all is `import factory` alone."""
    code = (
        "import atexit, sys, factory\n"
        f"atexit.register(lambda: print('loaded', *sorted({set(HEAVY)} & sys.modules.keys()), file=sys.stderr))\n"
        "if len(sys.argv) > 1: from factory.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with in_thread() as server:
        folder(tmp_path, recipe(server.url))
        if command.startswith(("show", "export")):
            assert factory(tmp_path, "build", "recipe.yaml").returncode == 0
        done = subprocess.run(
            [sys.executable, "-c", code, *command.split()], cwd=tmp_path, capture_output=True, text=True,
            env=environment(), check=False,
        )  # fmt: skip
    assert done.returncode == (2 if "nowhere" in command else 0), done.stderr
    assert done.stderr.splitlines()[-1] == "loaded"


def test_help_takes_little_more_than_python_itself() -> None:
    """In turns, the best of several: a ratio, because machines and their load differ."""

    def seconds(*arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    both = [(seconds("-c", "pass"), seconds("-m", "factory", "--help")) for _ in range(7)]
    python, ours = (min(column) for column in zip(*both, strict=True))
    print(f"factory --help: {ours * 1000:.0f} ms; python -c pass: {python * 1000:.0f} ms")
    assert ours < 6 * python  # it is 3; the 0.3 s that are promised would be 15


# -- in a bare clone, and in the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What somebody gets who clones: no weights, no `.venv`."""
    where = tmp_path_factory.mktemp("clone") / "distillation-factory"
    subprocess.run(["git", "-c", "safe.directory=*", "clone", "--quiet", str(ROOT), str(where)], check=True)
    return where


@pytest.fixture(scope="module")
def installed(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `factory` command of a fresh environment that the wheel of the clone is installed into."""
    where = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", str(where), str(clone)], check=True)
    venv.create(where / "venv", with_pip=False)
    python = str(where / "venv/bin/python")
    subprocess.run([*pip, "--python", python, "install", *offline, *map(str, where.glob("*.whl"))], check=True)
    return where / "venv/bin/factory"


CHECK_ALL = """
import sys, factory
from pathlib import Path
from factory.cli import main
print("FROM", Path(factory.__file__).parent)
for recipe in sys.argv[1:]:
    print("CODE", recipe, main(["check", recipe]))
"""


def libraries() -> str:
    """Where the dependencies are; the package itself is not there, it comes from elsewhere."""
    return os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))


def check_all(python: str, where: Path, path: str) -> tuple[str, dict[str, int]]:
    """`factory check` of every shipped recipe, by name: where the package came from, and the exit codes."""
    names = [str(name) for name in RECIPES]
    done = subprocess.run(
        [python, "-W", "error", "-c", CHECK_ALL, *names], cwd=where, capture_output=True, text=True,
        env=environment(PYTHONPATH=path), check=True,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    origin = next(line[1] for line in lines if line[0] == "FROM")
    return origin, {line[1]: int(line[2]) for line in lines if line[0] == "CODE"}


def test_every_shipped_recipe_passes_check_in_a_bare_clone(clone: Path) -> None:
    assert not (clone / "weights").exists()
    origin, codes = check_all(sys.executable, clone, str(clone))
    assert origin == str(clone / "factory")
    assert len(codes) >= 7
    assert set(codes.values()) == {0}, codes


def test_every_shipped_recipe_passes_check_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    origin, codes = check_all(str(installed.with_name("python")), tmp_path, libraries())
    assert origin.startswith(str(installed.parent.parent))
    assert len(codes) >= 7
    assert set(codes.values()) == {0}, codes


def test_the_wheel_lists_its_recipes_and_builds_from_its_own_prompts(installed: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environ = environment(PYTHONPATH=libraries())
        command = [str(installed), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environ, check=False)

    listed = run("ls").stdout
    assert all(str(name) in listed for name in RECIPES)
    answer = "Because: it is so in every book.\nAnswer: yes, number {}"
    count = iter(range(1000))

    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        return chat(body, texts=[answer.format(next(count)) for _ in range(body.get("n", 1))])

    with in_thread(script) as server:
        teacher = f"models.teacher={{type: openai, model: m, base_url: '{server.url}'}}"
        done = run("build", "quickstart", "--set", teacher)
    assert done.returncode == 0, done.stderr
    assert read_jsonl(tmp_path / "runs/quickstart/dataset/train.jsonl")
    asked = server.bodies[0]["messages"]
    assert len(asked) > 2  # the worked examples, too, are found in the wheel


# -- what it tells -------------------------------------------------------------------------------------------------------


def test_ls_and_show_tell_what_there_is(tmp_path: Path) -> None:
    with in_thread() as server:
        assert factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml").returncode == 0
    listed = typed(tmp_path, "ls").stdout
    assert all(f"  {name} " in listed for name in RECIPES)
    assert re.search(r"^  tiny +done +runs/tiny$", listed, re.MULTILINE)
    shown = typed(tmp_path, "show", "tiny").stdout
    assert re.search(rf"^01-generate +draws +{2 * ASKED} +{2 * ASKED} +0 +0", shown, re.MULTILINE)
    assert re.search(rf"^03-choose +samples +{2 * ASKED} +{ASKED} +{ASKED} +0 +over_cap {ASKED}$", shown, re.MULTILINE)
    assert "runs/tiny/dataset" in shown
    assert "runs/tiny/report.html" in shown
    assert typed(tmp_path, "show", "runs/tiny").stdout == shown
    assert typed(tmp_path, "show", "tiny", "--runs", str(tmp_path / "runs")).stdout == shown.replace(
        "runs/", f"{tmp_path}/runs/"
    )


def test_show_says_which_results_an_earlier_start_has_made(tmp_path: Path) -> None:
    with in_thread() as server:
        assert factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml").returncode == 0
    assert "earlier start" not in typed(tmp_path, "show", "tiny").stdout
    changed = ("--set", "stages.0.generate.temperature=0.2", "--set", "budget.requests=1")
    assert typed(tmp_path, "build", "recipe.yaml", *changed).returncode == 5
    shown = typed(tmp_path, "show", "tiny").stdout
    assert "runs/tiny/dataset  (of an earlier start: this one is not done)" in shown
    assert "runs/tiny/report.html  (of an earlier start" in shown


def test_show_follows_every_row_of_the_prompt_lists_and_says_where_those_left_out_are(tmp_path: Path) -> None:
    with in_thread() as server:
        text = recipe(server.url).replace("stages:", "  - {path: more.txt}\nstages:")
        folder(tmp_path, text.replace("model: teacher", "model: teacher, from: questions"))
        whole = (tmp_path / "prompts.jsonl").read_text()
        again = '{"prompt": "What is the colour of thing number 0?", "reference": "blue"}\n'
        (tmp_path / "prompts.jsonl").write_text(f'{whole}\n{again}{{"prompt": []}}\n')
        (tmp_path / "more.txt").write_text("Why is it so?\n\n")
        assert factory(tmp_path, "build", "recipe.yaml").returncode == 0
        shown = typed(tmp_path, "show", "tiny").stdout
        assert re.search(
            r"^prompts questions +rows +27 +24 +2 +1  empty 1, duplicate 1, unreadable 1; kept: 18 to train on \+ 6 held out"
            r"\nprompts more +rows +2 +1 +1 +0  empty 1\n01-generate +draws +36 ",
            shown, re.MULTILINE,
        ), shown  # fmt: skip
        left_out = tmp_path / "runs/tiny/prompts-dropped.jsonl"
        assert "\nruns/tiny/prompts-dropped.jsonl\n" in shown
        empty, duplicate, unreadable, other = read_jsonl(left_out)
        assert empty == {"list": "questions", "line": 25, "id": None, "reason": "empty"}
        assert duplicate["evidence"] == duplicate["id"]
        assert (duplicate["line"], duplicate["reason"]) == (26, "duplicate: of line 1")
        assert (unreadable["line"], unreadable["reason"].partition(":")[0]) == (27, "unreadable")
        assert other == {"list": "more", "line": 2, "id": None, "reason": "empty"}
        (tmp_path / "prompts.jsonl").write_text(whole)
        (tmp_path / "more.txt").write_text("Why is it so?\n")
        assert factory(tmp_path, "build", "recipe.yaml").returncode == 0
    assert left_out.read_bytes() == b""
    assert "prompts-dropped" not in typed(tmp_path, "show", "tiny").stdout


def overwritten(journal: Path) -> None:
    journal.write_bytes(b"no database at all" * 500)


def of_a_newer_factory(journal: Path) -> None:
    with closing(sqlite3.connect(journal)) as db:
        db.execute("PRAGMA user_version=99")


def without_its_log(journal: Path) -> None:
    """SQLite cannot open it: a folder stands where its write-ahead log belongs."""
    log = journal.with_name(journal.name + "-wal")
    log.unlink(missing_ok=True)
    log.mkdir()


@pytest.mark.parametrize(
    ("harm", "code", "words"),
    [
        (overwritten, 11, ("damaged", ".recover")),
        (of_a_newer_factory, 12, ("version 99", "update")),
    ],
)
def test_show_says_what_is_wrong_with_the_journal(
    tmp_path: Path, harm: Callable[[Path], None], code: int, words: tuple[str, ...]
) -> None:
    with in_thread() as server:
        assert factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml").returncode == 0
    harm(tmp_path / "runs/journal.sqlite")
    told(typed(tmp_path, "show", "tiny"), code, "runs/journal.sqlite", *words)


def test_show_needs_no_right_to_write(tmp_path: Path) -> None:
    """Where SQLite cannot open the journal, which it does for reading only where it may write, all else is told."""
    with in_thread() as server:
        assert factory(folder(tmp_path, recipe(server.url)), "build", "recipe.yaml").returncode == 0
    shown = typed(tmp_path, "show", "tiny")
    without_its_log(tmp_path / "runs/journal.sqlite")
    done = typed(tmp_path, "show", "tiny")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    (told_so,) = (line for line in lines if "open batches: not known (runs/journal.sqlite: unable to open" in line)
    assert set(lines) - {told_so} == set(shown.stdout.splitlines())
    for more in (["--drops"], ["--row", next(iter(read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")))["id"]]):
        assert typed(tmp_path, "show", "tiny", *more).returncode == 0


def test_a_run_that_was_killed_is_listed_with_what_it_has_done(tmp_path: Path) -> None:
    gate = threading.Event()
    stages = STAGES + "  - judge: {model: judge, rubric: prompts/rubrics/helpfulness.md}\n"
    with in_thread() as server, in_thread(held(gate)) as silent:
        judge = f'  judge: {{type: openai, model: j, base_url: "{silent.url}"}}\n'
        text = recipe(server.url, stages=stages).replace("models:\n", "models:\n" + judge)
        with started(folder(tmp_path, text), "build", "recipe.yaml") as child:
            until(lambda: silent.seen)
            child.kill()
        gate.set()
    assert re.search(r"^  tiny +unfinished", typed(tmp_path, "ls").stdout, re.MULTILINE)
    shown = typed(tmp_path, "show", "tiny").stdout
    assert "03-choose" in shown
    assert "04-" not in shown


@pytest.mark.parametrize("broken", [b"", b"{", b"{}", b"[]", b'{"name": "caf\xe9"}', b"[" * 100_000])
def test_ls_without_runs_says_so_and_a_broken_manifest_hides_no_other_run(tmp_path: Path, broken: bytes) -> None:
    assert "none in runs/" in typed(tmp_path, "ls").stdout
    (tmp_path / "runs/broken").mkdir(parents=True)
    (tmp_path / "runs/broken/manifest.json").write_bytes(broken)
    (tmp_path / "runs/whole").mkdir()
    (tmp_path / "runs/whole/manifest.json").write_text('{"name": "whole", "status": "done", "stages": []}')
    listed = typed(tmp_path, "ls")
    assert listed.returncode == 0
    why = r"runs/broken/manifest\.json cannot be read \(.+\); run the recipe again"
    assert re.search(rf"^  broken +unreadable {why}", listed.stdout, re.MULTILINE)
    assert re.search(r"^  whole +done", listed.stdout, re.MULTILINE)
    told(typed(tmp_path, "show", "broken"), 2, "runs/broken/manifest.json")


def test_whoever_has_read_enough_of_the_output_stops_it_quietly(tmp_path: Path) -> None:
    """`factory ls | head -1`: the pipe is closed before the list is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "factory", "ls"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141
