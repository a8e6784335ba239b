"""The run folder: shards of a bounded size, files that are written whole or not at all, what stopped a run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from factory.errors import AuthError, DiskError
from factory.rows import Prompt, Sample, TrainRow
from factory.run import ROWS_PER_SHARD, StageFolder, StageWriter, stopped_by, write_lines
from factory.signals import Interrupted


def shards_of(out: StageWriter) -> list[int]:
    folder = out.finish({"unit": "rows"}, None)
    return [len(shard.read_bytes().splitlines()) for shard in folder.shards()]


def test_training_rows_go_to_shards_of_a_bounded_size(tmp_path: Path) -> None:
    out = StageWriter(tmp_path / "01-shape-0")
    for i in range(ROWS_PER_SHARD + 3):
        out.put(TrainRow(id=str(i), prompt=[], completion=[]))
    assert shards_of(out) == [ROWS_PER_SHARD, 3]
    assert [row.id for row in StageFolder(out.final).rows(TrainRow)] == [str(i) for i in range(ROWS_PER_SHARD + 3)]


def test_samples_of_one_prompt_stay_in_one_shard(tmp_path: Path) -> None:
    out = StageWriter(tmp_path / "01-generate-0")
    prompts = [Prompt.of([{"role": "user", "content": text}]) for text in "ab"]
    for i in range(ROWS_PER_SHARD + 5):
        prompt = prompts[i >= ROWS_PER_SHARD + 2]  # the first prompt goes two rows past the limit
        out.put(Sample(id=str(i), prompt=prompt, asked=[], response="x", model="m", draw=i))
    assert shards_of(out) == [ROWS_PER_SHARD + 2, 3]


def test_lines_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, [b"old\n"])

    def broken() -> Iterator[bytes]:
        yield b"new\n" * 100_000
        assert path.read_bytes() == b"old\n"
        raise RuntimeError("the rows end here")

    with pytest.raises(RuntimeError, match="the rows end here"):
        write_lines(path, broken())
    assert path.read_bytes() == b"old\n"
    write_lines(path, [])
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (AuthError("no key in TEACHER_KEY\nmore"), "AuthError: no key in TEACHER_KEY"),
        (DiskError(), "DiskError"),
        (OSError(28, "No space left on device", "runs/x"), "OSError: [Errno 28] No space left on device: 'runs/x'"),
        (Interrupted(2), "Interrupted: SIGINT"),
        (ValueError("Illegal header value b'Bearer sk-secret'"), "ValueError"),
    ],
)
def test_what_stopped_a_run_is_quoted_where_it_was_made_for_people(error: BaseException, why: str) -> None:
    assert stopped_by(error) == why
