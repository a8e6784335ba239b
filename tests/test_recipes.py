"""The CPU-size recipes, as they ship, from end to end; only the weights are exchanged for tiny models that can answer."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from factory.prompts import load as load_prompts
from factory.recipe import Recipe, load
from factory.recipe_file import find
from factory.rows import Prompt, Sample
from factory.rubric import load as load_rubric
from factory.rubric import render
from tests.command import ROOT, factory, read_jsonl, report
from tests.test_dataset import load as load_data_set
from tests.tiny import saying_model, taught_model, tiny_model

NAMES = ["seqkd", "orca", "zephyr"]
EVALUATION = {"model", "role", "measure", "value", "low", "high", "n"}
FUNNEL = {"stage", "unit", "in", "kept", "dropped", "failed", "reasons"}
KNOWN = [
    "The dogs ran across a yard.",
    "She will win every match tomorrow.",
    "Is that train late, or not?",
    "Rivers froze because winter came early.",
    "Answer: 43, which you get by adding.",
]
UNSURE = "I cannot know what this means."


def recipe(name: str) -> Recipe:
    return load(ROOT / f"recipes/cpu/{name}.yaml")


def prompts(made: Recipe) -> list[Prompt]:
    return [prompt for one in load_prompts(made.prompts, made.seed, find) for _, prompt in one.kept]


class Tiny(NamedTuple):
    """Folders of models: one that knows, one that does not, a judge that can tell them apart, a beginner."""

    teacher: Path
    rival: Path
    judge: Path
    base: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    where = tmp_path_factory.mktemp("models")
    some = prompts(recipe("zephyr"))[:4]
    rubric = load_rubric(find("prompts/rubrics/by_example.md"))
    graded = [
        (render(rubric, sample(prompt, answer)), score)
        for prompt, known in zip(some, KNOWN, strict=False)
        for answer, score in ((known, "Score: 5"), (UNSURE, "Score: 2"))
    ]
    judge = taught_model(where / "judge", *map(list, zip(*graded, strict=True)), vocab=1000, context=1024)
    return Tiny(
        saying_model(where / "teacher", KNOWN),
        saying_model(where / "rival", [UNSURE]),
        judge,
        tiny_model(where / "base"),
    )


def sample(prompt: Prompt, answer: str) -> Sample:
    return Sample(id="s", prompt=prompt, asked=prompt.messages, response=answer, model="m")


def run(where: Path, name: str, tiny: Tiny) -> tuple[Path, dict[str, Any]]:
    """The recipe as it ships, with other weights; its folder and its report."""
    folders = tiny._asdict() | {"assistant": tiny.teacher}
    weights = [f"models.{model}={{type: transformers, model: {folders[model]}}}" for model in recipe(name).models]
    done = factory(where, "run", f"cpu/{name}", *(part for one in weights for part in ("--set", one)))
    assert done.returncode == 0, done.stderr
    folder = where / f"runs/{name}-cpu"
    whole = report(where, f"runs/{name}-cpu")
    assert whole["evaluation"]
    for row in whole["evaluation"]:
        assert set(row) == EVALUATION
        assert row["low"] <= row["value"] <= row["high"]
        assert row["role"] in ("base", "student", "teacher")
        assert row["n"] > 0
    assert all(row.keys() >= FUNNEL for row in whole["funnel"])
    assert all(told["rows_trained"] > 0 and told["log"] for told in whole["training"])
    cards = [card.read_text() for card in folder.glob("*/model/README.md")]
    assert len(cards) == len(whole["training"])
    assert all("vllm serve" in card for card in cards)
    return folder, whole


def kept(whole: dict[str, Any], stage: str) -> list[int]:
    return [row["kept"] for row in whole["funnel"] if row["stage"] == stage]


def of(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The kept rows of a stage, as they lie in its folder."""
    (there,) = folder.glob(f"{stage}-*")
    return [row for shard in sorted(there.glob("kept-*.jsonl")) for row in read_jsonl(shard)]


def test_seqkd_trains_on_the_hypothesis_closest_to_the_reference(tmp_path: Path, tiny: Tiny) -> None:
    folder, whole = run(tmp_path, "seqkd", tiny)
    beams, chosen = of(folder, "01-generate"), of(folder, "03-choose")
    assert len(beams) == 3 * 8  # 3 hypotheses of each of 12 - 4 prompts
    beginnings = {
        sentence.split()[0] for sentence in KNOWN
    }  # words that two of them share may lead from one to another
    assert {row["response"].split()[0] for row in beams} <= beginnings
    assert all(row["logprob"] < 0 for row in beams)
    assert len(chosen) == 8
    data = load_data_set(folder / "dataset", tmp_path)
    assert data["names"] == ["default"]
    train = data["rows"]["default"]["train"]
    assert [row["completion"] for row in train] == [row["response"].strip() for row in chosen]
    assert len(data["rows"]["default"]["test"]) > 0
    losses = {row["role"]: row["value"] for row in whole["evaluation"] if row["measure"] == "teacher_loss"}
    assert losses["student"] < losses["base"]


def test_orca_erases_what_was_asked_and_keeps_it_in_the_lineage(tmp_path: Path, tiny: Tiny) -> None:
    folder, whole = run(tmp_path, "orca", tiny)
    data = load_data_set(folder / "dataset", tmp_path)
    assert data["names"] == ["assistant_student", "student"]
    assert data["default"] == "student"
    explained = 0
    for config, stage in (("assistant_student", "01-generate"), ("student", "05-generate")):
        lineage = {row["id"]: row for row in of(folder, stage)}
        rows = data["rows"][config]["train"]
        assert rows
        for row in rows:
            (parent,) = row["parents"]
            before = lineage[parent]
            assert row["prompt"] == before["prompt"]["messages"][-1]["content"]  # a string: the plain prompt alone
            assert row["completion"] == before["response"].strip()
            assert before["asked"][-1]["content"] == row["prompt"]
            explained += before["asked"][0]["role"] == "system"
    assert explained > 0
    assert [told["rows_trained"] for told in whole["training"]] == kept(whole, "shape")


def test_zephyr_prefers_the_better_scored_of_four_models(tmp_path: Path, tiny: Tiny) -> None:
    folder, whole = run(tmp_path, "zephyr", tiny)
    data = load_data_set(folder / "dataset", tmp_path)
    assert data["names"] == ["sft_student", "student"]
    assert data["default"] == "student"
    pairs = data["rows"]["student"]["train"]
    assert len(pairs) == kept(whole, "pair")[0] >= 4
    for pair in pairs:
        assert pair["chosen_score"] >= pair["rejected_score"] + 1
        assert pair["margin"] == pair["chosen_score"] - pair["rejected_score"]
        assert pair["chosen"] != pair["rejected"]
    assert {pair["chosen_model"] for pair in pairs} == {"teacher"}
    judged = next(row for row in whole["funnel"] if row["stage"] == "judge")
    assert judged["kept"] > judged["failed"]  # verdicts can be read
    preference = whole["training"][-1]
    assert preference["method"] == "dpo"
    assert any("rewards/margins" in entry for entry in preference["log"])
    roles = {row["model"]: row["role"] for row in whole["evaluation"]}
    assert roles == {"teacher": "teacher", "base": "base", "sft_student": "student", "student": "student"}


def test_curate_needs_no_model_and_keeps_the_best_rated_answers(tmp_path: Path) -> None:
    done = factory(tmp_path, "run", "curate")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/curate"
    reasons = report(tmp_path, "runs/curate")["funnel"][2]["reasons"]
    assert reasons == {"words": 2, "refusal": 2, "looping_tail": 1, "near_duplicate": 1, "no_score": 1}
    rows = read_jsonl(folder / "dataset/train.jsonl")
    assert len(rows) == len({row["prompt"] for row in rows}) == 12
    assert {row["score_score"] for row in rows} == {5.0}
    asked = [row["prompt"]["id"] for row in of(folder, "01-given")]
    assert sum(a != b for a, b in itertools.pairwise(asked)) == 11  # answers to one prompt stand together
