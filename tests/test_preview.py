"""`factory preview`: what a training would learn, before anything is asked, and of a run's own rows."""

import shutil
from pathlib import Path

import pytest

from tests.command import factory, folder, recipe, told
from tests.server import in_thread
from tests.tiny import tiny_model

STAGES = """\
  - generate: {model: teacher, n: 2, temperature: 0.7, max_tokens: 16}
  - train: {method: sft, student: base, as: first}
  - train: {method: sft, student: first, lora: {r: 4}}
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def test_what_would_be_learned_is_shown_before_anything_is_asked(tmp_path: Path, student: Path) -> None:
    with in_thread() as server:
        done = factory(folder(tmp_path, recipe(server.url, student, STAGES)), "preview", "recipe.yaml")
        assert not server.seen
    assert done.returncode == 0, done.stderr
    assert "03-first (sft, 18 rows looked at, made up of the prompts: nothing is asked yet): 0 set aside" in done.stdout
    learned = [line for line in done.stdout.splitlines() if line.startswith("  learned ")]
    assert learned == ["  learned bl│ue│<|im_end|>│⏎"] * 6  # three rows of each training; `blue` is the reference


def test_a_runs_own_rows_are_shown_where_there_are_some(tmp_path: Path, student: Path) -> None:
    with in_thread() as server:
        where = folder(tmp_path, recipe(server.url, student, STAGES.rpartition("  - train")[0]))
        assert factory(where, "build", "recipe.yaml").returncode == 0
        asked = sum(server.seen.values())
        done = factory(where, "preview", "recipe.yaml")
        assert sum(server.seen.values()) == asked
    assert "36 rows looked at, of the last run" in done.stdout
    assert "an│sw│er" in done.stdout


def test_a_student_that_would_learn_wrongly_is_refused(tmp_path: Path, student: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(student, bare)
    (bare / "chat_template.jinja").unlink()
    where = folder(tmp_path / "work", recipe("http://127.0.0.1:9/v1", bare, STAGES))
    told(factory(where, "preview", "recipe.yaml"), 2, "03-first: the student has no chat template")
    (where / "recipe.yaml").write_text(recipe("http://127.0.0.1:9/v1"))
    told(factory(where, "preview", "recipe.yaml"), 2, "tiny has no train stage")
