"""Stage folders: rows go to shards of a bounded size, and those of one prompt stay together."""

from pathlib import Path

from factory.rows import Prompt, Sample, TrainRow
from factory.run import ROWS_PER_SHARD, StageFolder, StageWriter


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
