"""A full disk, a read-only one, a folder that cannot be written: exit 9, and after it the same command goes on."""

import json
import random
import string
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from factory.errors import DiskError
from factory.journal import Journal
from factory.rows import FREE, Request, Sampling
from tests.command import ASKED, QUESTIONS, asked_in_vain, attempts, factory, folder, read_jsonl, recipe, told
from tests.server import chat, in_thread
from tests.tiny import tiny_model

TRAIN = "  - train: {method: sft, student: base, args: {num_train_epochs: 1, per_device_train_batch_size: 24}}\n"


@contextmanager
def small_disk(where: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own, in memory; for the time of a block."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def remount(where: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(where)], check=True)


def noise(kilobytes: int) -> str:
    """Text that the journal cannot make smaller by much."""
    return "".join(random.Random(7).choices(string.printable.strip() + " ", k=1024 * kilobytes))


def test_a_disk_that_is_full_while_answers_come_in_loses_none_of_them(tmp_path: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        return chat(body, texts=[noise(32)] * 2)

    with small_disk(tmp_path / "small", 1024) as small, in_thread(script) as server:
        folder(tmp_path, recipe(server.url, limits="max_concurrency: 2"))
        told(
            factory(tmp_path, "build", "recipe.yaml", "--runs", "small/runs"),
            9,
            "journal.sqlite",
            "full",
            "free some space",
        )
        stored = sum(status in ("stored", "read") for _, status in attempts(tmp_path, "small/runs"))
        assert 0 < stored < ASKED
        remount(small, "size=64m")
        done = factory(tmp_path, "build", "recipe.yaml", "--runs", "small/runs")
        assert done.returncode == 0, done.stderr
        assert not asked_in_vain(tmp_path, "small/runs")
        assert sum(server.seen.values()) <= ASKED + 2  # what was in flight could not be stored
        assert len(read_jsonl(small / "runs/tiny/dataset/train.jsonl")) == ASKED


def test_a_disk_that_is_full_while_a_stage_is_written_shows_no_half_stage_and_asks_nothing_again(
    tmp_path: Path,
) -> None:
    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        return chat(body, texts=["the word is blue " * 2000] * 2)  # small in the journal, which packs it

    with small_disk(tmp_path / "small", 1024) as small, in_thread(script) as server:
        folder(tmp_path, recipe(server.url))
        done = factory(tmp_path, "build", "recipe.yaml", "--runs", "small/runs")
        told(done, 9, "small/runs", "No space left on device", "free some space")
        assert sum(server.seen.values()) == ASKED
        assert not list(small.glob("runs/tiny/01-generate-*/manifest.json"))
        remount(small, "size=64m")
        again = factory(tmp_path, "build", "recipe.yaml", "--runs", "small/runs")
        assert again.returncode == 0, again.stderr
        assert sum(server.seen.values()) == ASKED
        assert len(read_jsonl(small / "runs/tiny/dataset/train.jsonl")) == ASKED


def test_a_disk_that_turns_read_only_stops_the_run_and_what_is_there_can_still_be_read(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 8192) as small, in_thread() as server:
        folder(tmp_path, recipe(server.url))
        assert factory(tmp_path, "build", "recipe.yaml", "--runs", "small/runs").returncode == 0
        remount(small, "ro")
        more = ("build", "recipe.yaml", "--runs", "small/runs", "--set", "stages.0.generate.n=3")
        told(factory(tmp_path, *more), 9, "small/runs", "Read-only", "mount it writable")
        assert "done" in factory(tmp_path, "ls", "--runs", "small/runs").stdout
        assert "01-generate" in factory(tmp_path, "show", "tiny", "--runs", "small/runs").stdout
        remount(small, "rw")
        done = factory(tmp_path, *more)
        assert done.returncode == 0, done.stderr
        assert [body.get("n", 1) for body in server.bodies] == [2] * ASKED + [1] * ASKED


@pytest.mark.parametrize("what", ["runs", "runs/tiny", "runs/journal.sqlite"])
def test_a_folder_or_file_that_cannot_be_written_is_named(tmp_path: Path, what: str) -> None:
    """Root may write anywhere, but not what is marked immutable."""
    with in_thread() as server:
        folder(tmp_path, recipe(server.url))
        assert factory(tmp_path, "build", "recipe.yaml").returncode == 0
        more = ("build", "recipe.yaml", "--set", "stages.0.generate.n=3")
        subprocess.run(["chattr", "+i", str(tmp_path / what)], check=True)
        try:
            done = factory(tmp_path, *more)
        finally:
            subprocess.run(["chattr", "-i", str(tmp_path / what)], check=True)
        told(done, 9, what)
        assert sum(server.seen.values()) == ASKED
        again = factory(tmp_path, *more)
        assert again.returncode == 0, again.stderr
    assert not asked_in_vain(tmp_path)


@pytest.mark.parametrize("place", ["runs", "runs/tiny", "runs/journal.lock", "runs/journal.sqlite"])
def test_something_else_in_the_place_of_a_folder_or_a_file_is_named(tmp_path: Path, place: str) -> None:
    with in_thread() as server:
        folder(tmp_path, recipe(server.url))
        there = tmp_path / place
        there.parent.mkdir(exist_ok=True)
        there.mkdir() if "journal" in place else there.write_text("a file")
        done = factory(tmp_path, "build", "recipe.yaml")
        told(done, 9, place)
        assert not server.seen


def test_a_disk_that_is_full_when_the_student_is_saved_is_no_fault_of_the_trainer(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": question, "completion": "It is blue."}) for question in QUESTIONS]
    folder(tmp_path, recipe("http://127.0.0.1:9/v1", tiny_model(tmp_path / "student", hidden=128, layers=4), TRAIN))
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    with small_disk(tmp_path / "small", 1024):
        told(
            factory(tmp_path, "train", "recipe.yaml", "--runs", "small/runs"),
            9,
            "No space left on device",
            "free some space",
        )


async def test_a_flush_tells_what_the_writes_before_it_could_not_do(tmp_path: Path) -> None:
    """An answer is filed without waiting: that it could not be must still be heard, or its row would end as failed."""
    request = Request(identity="m", messages=[{"role": "user", "content": "q"}], sampling=Sampling(), n=500)
    with small_disk(tmp_path / "small", 1024) as small, Journal(small / "journal.sqlite") as journal:
        attempt = await journal.begin("run", request, "0", 1)
        await journal.store(attempt, b"{}")
        with pytest.raises(OSError, match="No space"):
            (small / "filler").write_bytes(bytes(2 << 20))
        filed = journal.file(attempt, [("stop", 1)] * 500, FREE)
        assert filed.exception(timeout=10) is not None
        with pytest.raises(DiskError, match="full"):
            await journal.flush()
        (small / "filler").unlink()
