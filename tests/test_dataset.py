"""The finished data set, read back by the library that people will read it with, in a process of its own."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from factory import dataset
from factory.dataset import Config
from factory.rows import Message, Pair, TrainRow, Unpaired
from tests.tiny import tiny_model

CARD = {
    "recipe": "demo",
    "funnel": [
        {"stage": "generate", "unit": "draws", "in": 9, "kept": 8, "dropped": 0, "failed": 1, "reasons": {"outage": 1}},
        {"stage": "filter", "unit": "samples", "in": 8, "kept": 3, "dropped": 5, "failed": 0, "reasons": {"wo|rds": 5}},
    ],
    "teachers": {
        "teacher": {"model": "some/teacher", "terms": "no rivals"},
        "local": {"model": "/home/somebody/weights/base", "terms": None},
    },
    "prompts": [{"name": "mine", "path": "/home/somebody/prompts.jsonl"}, {"name": "hub", "path": "some/hub-list"}],
}
READ = """
import json, sys
from datasets import get_dataset_config_names, get_dataset_default_config_name, load_dataset
for folder in sys.argv[1:]:
    names = get_dataset_config_names(folder)
    rows = {n: {split: list(part) for split, part in load_dataset(folder, n).items()} for n in names}
    print("READ", json.dumps({"names": names, "default": get_dataset_default_config_name(folder), "rows": rows}))
"""


AGAIN = """
import sys
from datasets import load_dataset
print([list(load_dataset(folder)["train"]["completion"]) for folder in sys.argv[1:]])
"""


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def row(i: int, **rest: Any) -> TrainRow:
    told = {"prompt": user(f"question {i}?"), "completion": said(f"ānswer {i}\n\u2028done"), "parents": [f"s{i}"]}
    return TrainRow(id=f"r{i}", source="mine", model="teacher", **{**told, **rest})


def pair(i: int, **rest: Any) -> Pair:
    told = {"prompt": user(f"q{i}"), "chosen": said("good"), "rejected": said("bad")}
    return Pair(id=f"p{i}", margin=1.5, chosen_model="teacher", rejected_model="base", **{**told, **rest})


def config(name: str, train: list[Any], test: list[TrainRow] | None = None) -> Config:
    return Config(name, lambda: iter(train), lambda: iter(test or []))


def write(folder: Path, *configs: Config) -> Path:
    dataset.write(folder / "dataset", name="demo", configs=list(configs), card=CARD)
    return folder / "dataset"


def load_all(folders: list[Path], tmp_path: Path) -> list[dict[str, Any]]:
    """What `datasets` makes of each folder, offline; in one process, as importing it takes seconds."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, folders)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("READ ")) for line in done.stdout.split("\n") if line.startswith("READ ")]


def load(folder: Path, tmp_path: Path) -> dict[str, Any]:
    (told,) = load_all([folder], tmp_path)
    return told


def lines(path: Path) -> list[dict[str, Any]]:
    # split at "\n" only: str.splitlines would also split inside answers
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def unpaired(i: int, **rest: Any) -> Unpaired:
    told = {"prompt": user(f"q{i}"), "completion": said("yes"), "label": i % 2 == 0}
    return Unpaired(id=f"u{i}", model="teacher", parents=[f"s{i}"], **{**told, **rest})


SYSTEM = [{"role": "system", "content": "Be brief."}, *user("q")]
CASES = {
    "texts": [config("student", [row(1), row(2)])],
    "texts with a test split": [config("student", [row(1), row(2)], [row(3)])],
    "a system turn makes all of it messages": [config("student", [row(1), row(2, prompt=SYSTEM)], [row(3)])],
    "a system turn in the test split does too": [config("student", [row(1)], [row(3, prompt=SYSTEM)])],
    "pairs": [config("student", [pair(1, chosen_score=2.0, rejected_score=0.5), pair(2, parents=["a", "b"])])],
    "pairs of messages": [config("student", [pair(1, prompt=SYSTEM)])],
    "rows for KTO": [config("student", [unpaired(1), unpaired(2, score=3.5)])],
    "rows for KTO as messages": [config("student", [unpaired(1, prompt=SYSTEM)])],
    "tasks with weights, and masks": [
        config("student", [row(1), row(2, task="truth", weight=0.5), row(3, masked=4)], [row(4)])
    ],
    "two configs": [config("first", [row(1)], [row(2)]), config("student", [pair(1)])],
    "three configs, one name with a sign": [config(n, [row(1)]) for n in ("a", "student@1", "student@2")],
}


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every case: its folder, and what was read of it."""
    where = tmp_path_factory.mktemp("cases")
    folders = [write(where / str(number), *configs) for number, configs in enumerate(CASES.values())]
    return dict(zip(CASES, zip(folders, load_all(folders, where), strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_datasets_reads_back_what_was_written(case: str, read_back: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    configs, (folder, read) = CASES[case], read_back[case]
    names = [c.name for c in configs] if len(configs) > 1 else ["default"]
    assert read["names"] == names
    assert read["default"] == names[-1]
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    for place in header["configs"]:
        on_disk = {file["split"]: lines(folder / file["path"]) for file in place["data_files"]}
        assert read["rows"][place["config_name"]] == on_disk
    for one, name in zip(configs, names, strict=True):
        assert [r["id"] for r in read["rows"][name]["train"]] == [r.id for r in one.train()]
        assert [r["id"] for r in read["rows"][name].get("test", [])] == [r.id for r in one.test()]


def test_texts_where_nothing_is_lost_by_it_else_messages(tmp_path: Path) -> None:
    plain = lines(write(tmp_path / "a", config("s", [row(1)])) / "train.jsonl")[0]
    assert (plain["prompt"], plain["completion"]) == ("question 1?", "ānswer 1\n\u2028done")
    turns = lines(write(tmp_path / "b", config("s", [row(1), row(2, prompt=SYSTEM)])) / "train.jsonl")
    assert [r["prompt"] for r in turns] == [user("question 1?"), SYSTEM]
    assert turns[0]["completion"] == said("ānswer 1\n\u2028done")


SCORES = ["score_clear", "score_helpful", "score_sound"]
PAIR_COLUMNS = [
    "prompt", "chosen", "rejected", "id", "margin", "chosen_model", "rejected_model", "chosen_score", "rejected_score",
    "source", "parents",
]  # fmt: skip


def test_every_row_has_the_same_columns(tmp_path: Path) -> None:
    rows = [row(1, scores={"helpful": 4.0}), row(2, scores={"clear": 2.0}), row(3)]
    told = lines(write(tmp_path, config("s", rows, [row(4, scores={"sound": 1.0})])) / "train.jsonl")
    columns = ["prompt", "completion", "id", "source", "model", "task", *SCORES, "parents"]
    assert [list(r) for r in told] == [columns] * 3
    assert [r["score_helpful"] for r in told] == [4.0, None, None]
    of_pair = lines(write(tmp_path, config("s", [pair(1)])) / "train.jsonl")[0]
    assert list(of_pair) == PAIR_COLUMNS


def test_weights_and_masks_are_columns_only_where_there_are_any(tmp_path: Path) -> None:
    rows = [row(1, weight=0.25, task="label"), row(2, masked=3)]
    folder = write(tmp_path, config("s", rows))
    told = lines(folder / "train.jsonl")
    assert [(r["task"], r["weight"], r["masked"]) for r in told] == [("label", 0.25, 0), ("answer", 1.0, 3)]
    assert "the first `masked` characters" in (folder / "README.md").read_text()
    assert {"weight", "masked"}.isdisjoint(lines(write(tmp_path / "b", config("s", [row(1)])) / "train.jsonl")[0])


KTO = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer
data, model = load_dataset(sys.argv[1], split="train"), sys.argv[2]
args = KTOConfig(
    output_dir=sys.argv[3], report_to="none", use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=4,
    gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", logging_steps=1,
)
trainer = KTOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model), args=args, train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(model),
)
trainer.train()
print(json.dumps([len(trainer.train_dataset), trainer.state.log_history[0]["loss"]]))
"""


def test_trl_trains_on_the_rows_for_kto(tmp_path: Path) -> None:
    rows = [unpaired(i, completion=said(f"answer {i}"), prompt=SYSTEM) for i in range(8)]
    folder, model = write(tmp_path, config("student", rows)), tiny_model(tmp_path / "tiny")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KTO, str(folder), str(model), str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, loss = json.loads(done.stdout.splitlines()[-1])
    assert count == 8
    assert loss == pytest.approx(0.5, abs=0.01)  # before the first step the student is its own reference


def test_types_do_not_hang_on_the_first_rows(tmp_path: Path) -> None:
    """Readers guess types from the first megabytes: a score and a parent that come late, texts like dates."""
    early = [row(i, completion=said("2024-01-01"), parents=[]) for i in range(40)]
    padding = [row(i, completion=said("x" * 1_000_000)) for i in range(12)]
    late = [row(99, scores={"helpful": 4.0}, parents=["s"])]
    read = load(write(tmp_path, config("s", early + padding + late)), tmp_path)["rows"]["default"]["train"]
    assert (read[0]["completion"], read[0]["score_helpful"], read[0]["parents"]) == ("2024-01-01", None, [])
    assert (read[-1]["score_helpful"], read[-1]["parents"]) == (4.0, ["s"])


@pytest.mark.parametrize("configs", [[], [config("student", [])], [config("a", []), config("b", [row(1)])]])
def test_no_rows_is_said_and_not_an_error(configs: list[Config], tmp_path: Path) -> None:
    folder = write(tmp_path, *configs)
    empty = folder / ("a" if len(configs) == 2 else "") / "train.jsonl"
    assert empty.read_bytes() == b""
    assert ("has no rows" in (folder / "README.md").read_text()) == (len(configs) < 2)


def test_the_card_tells_counts_reasons_sources_and_terms_but_no_paths(tmp_path: Path) -> None:
    card = (write(tmp_path, config("s", [row(1), row(2)], [row(3)])) / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "other"
    assert header["tags"] == ["synthetic", "distillation"]
    assert header["size_categories"] == ["n<1K"]
    for told in (
        "| default | 2 | 1 |",
        "| generate | draws | 9 | 8 | 0 | 1 | outage 1 |",
        r"| filter | samples | 8 | 3 | 5 | 0 | wo\|rds 5 |",
        "| mine | prompts.jsonl |",
        "| hub | some/hub-list |",
        "| teacher | some/teacher | no rivals |",
        "| local | base | not stated |",
        "output of language models",
    ):
        assert told in card
    assert "/home" not in card


def test_the_same_rows_give_the_same_bytes_and_stale_files_go(tmp_path: Path) -> None:
    configs = [config("a", [row(1)], [row(2)]), config("b", [pair(1)])]
    first = files(write(tmp_path, *configs))
    assert files(write(tmp_path, *configs)) == first
    assert set(first) == {"README.md", "a/train.jsonl", "a/test.jsonl", "b/train.jsonl"}
    assert set(files(write(tmp_path, config("a", [row(1)])))) == {"README.md", "train.jsonl"}
    assert [p.name for p in tmp_path.iterdir()] == ["dataset"]


def test_a_failure_half_way_leaves_the_old_data_set_whole(tmp_path: Path) -> None:
    before = files(write(tmp_path, config("a", [row(1)])))
    passes = iter([[row(2), row(3)], [row(2), None]])  # the second reading breaks after a row

    def broken() -> Iterator[Any]:
        for r in next(passes):
            assert r is not None, "the disk went away"
            yield r

    with pytest.raises(AssertionError, match="the disk went away"):
        write(tmp_path, Config("a", broken, lambda: iter(())))
    assert files(tmp_path / "dataset") == before
    write(tmp_path, config("a", [row(1)]))
    assert [p.name for p in tmp_path.iterdir()] == ["dataset"]


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        rows = Config("s", lambda: (row(i) for i in range(n)), lambda: (row(i) for i in range(n)))
        tracemalloc.start()
        write(tmp_path / str(n), rows)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(8_000) - peak(100) < 200_000  # bytes; 8,000 rows held at once take millions


def test_datasets_takes_no_folder_for_another(tmp_path: Path) -> None:
    """It keeps what it has read under the folder's last name and the card's header: same columns, same size, other rows."""
    first = write(tmp_path / "a", config("default", [row(1, completion=said("one"))]))
    other = write(tmp_path / "b", config("default", [row(1, completion=said("two"))]))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, str(first), str(other)],
        capture_output=True, text=True, env=environment, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[['one'], ['two']]"


def test_the_card_tells_what_the_rows_were_compared_with(tmp_path: Path) -> None:
    knobs = {"kind": "contamination", "against": ["bench/gsm8k.jsonl", "/home/somebody/mmlu.jsonl"], "ngram": 13}
    check = {"stage": "02-filter", "knobs": {**knobs, "how": None}, "reasons": {"contaminated": 7}}
    dataset.write(
        tmp_path / "dataset", name="demo", configs=[config("a", [row(1)])], card={**CARD, "decontamination": [check]}
    )
    card = (tmp_path / "dataset/README.md").read_text()
    assert "| 02-filter | bench/gsm8k.jsonl, mmlu.jsonl | ngram 13 | contaminated 7 |" in card
    assert "not compared" not in card
    assert "somebody" not in card
    assert "| mine | prompts.jsonl | not stated |" in card
