"""Stage `score`: what local models and verifiers make of answers; equal to the bare model, in whatever company."""

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pydantic
import pytest

from factory.errors import EngineError
from factory.models import Models
from factory.rows import Sample, by_prompt
from factory.score import Score, score
from factory.teachers.transformers import Transformers
from tests.command import folder, funnel, read_jsonl, started, typed, until
from tests.command import told as refused
from tests.sample_rows import answer, ends, prompt
from tests.tiny import reward_model, tiny_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `reward`, and some that are not what they should be."""
    home = tmp_path_factory.mktemp("weights")
    tiny_model(home / "base", context=128, spread=0.2)
    reward_model(home / "reward")
    reward_model(home / "no_pad", pad=False)
    reward_model(home / "both_ways", both_ways=True)
    reward_model(home / "two", labels=2)
    reward_model(home / "headless")
    tiny_model(home / "plain")
    shutil.copy(home / "plain/model.safetensors", home / "headless/model.safetensors")
    tiny_model(home / "silent")
    (home / "silent/chat_template.jinja").unlink()
    return home


def scored(home: Path, rows: list[Sample], by: str, model: str) -> list[float | str]:
    """Of each row the score, or why there is none: by the scorer itself, without the child process around it."""
    from factory.scorer import Scorer

    scorer = Scorer(home / model, model, by, "cpu", "auto")
    return scorer.scores([{"messages": row.prompt.messages, "answer": row.response} for row in rows])


def bare(home: Path, by: str, model: str, rows: list[Sample]) -> list[float]:
    """One row after the other in the bare model, by its own loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / model)
    kind = AutoModelForSequenceClassification if by == "reward" else AutoModelForCausalLM
    loaded = kind.from_pretrained(home / model)

    def loss(before: list[int], after: list[int]) -> float:
        labels = torch.tensor([[-100] * len(before) + after])
        return loaded(input_ids=torch.tensor([before + after]), labels=labels).loss.item()

    def value(row: Sample) -> float:
        if by == "reward":
            said = [*row.prompt.messages, {"role": "assistant", "content": row.response}]
            return loaded(torch.tensor([tokenizer.apply_chat_template(said, return_dict=False)])).logits[0, 0].item()
        head = tokenizer.apply_chat_template(row.prompt.messages, add_generation_prompt=True, return_dict=False)
        words = tokenizer.encode(row.response, add_special_tokens=False)
        if by == "likelihood":
            return -loss(head, [*words, tokenizer.eos_token_id])
        return loss(head, words) / loss([tokenizer.eos_token_id], words)

    with torch.inference_mode():
        return [value(row) for row in rows]


TEXTS = ["a", "blue", "The sky is blue.", "The grass is green and warm. " * 3, "x" * 40, "é ü 蓝", "12", "yes\nno"]
ROWS = [answer(text, prompt(f"What is {'it, and why, ' * (i % 4)}{i}?")) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    ("by", "model"),
    [("likelihood", "base"), ("ifd", "base"), ("reward", "reward"), ("reward", "no_pad"), ("reward", "both_ways")],
)
def test_a_row_gets_what_the_bare_model_gives_in_whatever_company(weights: Path, by: str, model: str) -> None:
    together = scored(weights, ROWS, by, model)
    assert together == pytest.approx(bare(weights, by, model, ROWS), rel=1e-4, abs=1e-6)
    assert len(set(together)) == len(ROWS)
    others = [answer(f"{i} " * (i % 30 + 1), prompt(f"other {i}")) for i in range(120)]
    mixed = [*others[:50], *reversed(ROWS), *others[50:]]
    within = scored(weights, mixed, by, model)[50 : 50 + len(ROWS)]
    assert within[::-1] == pytest.approx(together, rel=1e-5, abs=1e-6)


def test_likelihood_is_that_of_the_local_teacher(weights: Path) -> None:
    import torch

    from factory.teachers.transformers_engine import Engine

    with torch.inference_mode():
        engine = Engine(weights / "base", "base", 4, "cpu", "auto", lambda *_: None)
        forced = [engine.forced(row.prompt.messages, row.response) for row in ROWS]
    told = scored(weights, ROWS, "likelihood", "base")
    assert told == pytest.approx([-one["loss"] / one["tokens"] for one in forced], rel=1e-4)


UNSCORED = [
    ("ifd", "base", "", "empty"),
    ("likelihood", "base", "1 " * 300, "over_length"),
    ("reward", "reward", "1 " * 600, "over_length"),
]


@pytest.mark.parametrize(("by", "model", "text", "reason"), UNSCORED)
def test_what_cannot_be_scored_says_why_and_changes_no_other_row(
    weights: Path, by: str, model: str, text: str, reason: str
) -> None:
    before, told, behind = scored(weights, [ROWS[2], answer(text), ROWS[3]], by, model)
    assert str(told).partition("=")[0] == reason
    assert [before, behind] == pytest.approx(scored(weights, [ROWS[2], ROWS[3]], by, model), rel=1e-5)


def test_an_answer_that_just_fits_is_scored(weights: Path) -> None:
    """The end of `base` is at 128 tokens; one more is too long."""
    asked = prompt("q")
    lengths = [answer("a" * n, asked) for n in range(90, 130)]
    told = scored(weights, lengths, "likelihood", "base")
    first = next(i for i, one in enumerate(told) if isinstance(one, str))
    assert told[first] == "over_length=129>128"
    assert all(isinstance(one, float) for one in told[:first])


@pytest.mark.parametrize(
    ("by", "model", "told"),
    [
        ("reward", "base", "base is no reward model: it has"),
        ("reward", "headless", "headless is no reward model: it has no trained head"),
        ("reward", "two", "two is no reward model: it has 2 labels, not one"),
    ],
)
def test_a_model_that_is_none_is_told(weights: Path, by: str, model: str, told: str) -> None:
    with pytest.raises(EngineError, match=told):
        scored(weights, ROWS, by, model)


def in_child(home: Path, rows: list[Sample], model: str) -> list[Sample]:
    models = Models({model: Transformers(model=str(home / model))}, None, home)
    return list(score(Score(by="ifd", model=model), by_prompt(rows), models))


def test_no_rows_need_no_model_and_a_child_that_ends_tells_why(weights: Path) -> None:
    assert in_child(weights, [], "none") == []
    with pytest.raises(EngineError, match="score: silent: silent has no chat template"):
        in_child(weights, ROWS, "silent")


# -- by verifiers ----------------------------------------------------------------------------------------------------------

NUMERIC = {"matches_reference": {"how": "numeric"}}
WITHIN = {"matches_reference": {"how": "exact", "extract": "<(.*)>"}}
SAID = [
    # settings, the draws of one prompt, their scores
    (NUMERIC, ["It is 7", "7.0", "so 8", "14/2"], [0.75, 0.75, 0.25, 0.75]),
    (NUMERIC, ["7", "many", "8", "few"], [0.25, None, 0.25, None]),
    (NUMERIC, ["7"], [1.0]),
    ({"matches_reference": {"how": "choice"}}, ["(B)", "Answer: B", "C"], [2 / 3, 2 / 3, 1 / 3]),
    ({"matches_reference": {}}, ["The lid.", "lid", "", "a pot"], [0.5, 0.5, None, 0.25]),
    ({"matches_reference": {"how": "math"}}, ["$\\frac12$", "0.5", "1/3", "no"], [0.5, 0.5, 0.25, None]),
    (WITHIN, ["<a> b", "c <a>", "a"], [2 / 3, 2 / 3, None]),
]


@pytest.mark.parametrize(("of", "texts", "shares"), SAID)
def test_self_consistency_is_a_share_of_draws_and_drops_nothing(of: Any, texts: list[str], shares: list[Any]) -> None:
    group = [answer(text, prompt("q"), draw=i) for i, text in enumerate(texts)]
    alone = answer("7", prompt("another"))
    rows = list(score(Score(by="self_consistency", of=of), [group, [alone]], Models({}, None, Path())))
    assert [row.scores.get("self_consistency") for row in rows[:-1]] == shares
    assert {row.ending for row in rows} == {"kept"}


RIGHT = [
    # answer, reference, score, reason
    ("so 7", "7", 1.0, ""),
    ("so 8", "7", 0.0, ""),
    ("many", "7", 0.0, ""),
    ("so 7", None, None, "nothing_to_compare"),
]


@pytest.mark.parametrize(("text", "reference", "value", "reason"), RIGHT)
def test_a_verdict_is_a_score(text: str, reference: str | None, value: float | None, reason: str) -> None:
    knobs = Score(by="verdict", of=NUMERIC, **{"as": "correct"})
    (row,) = score(knobs, [[answer(text, prompt(reference=reference))]], Models({}, None, Path()))
    assert (row.scores.get("correct"), *ends([row])) == (value, reason)
    assert row.ending == ("failed" if reason else "kept")


def test_a_verifier_that_cannot_tell_gives_no_score_and_the_next_row_gets_one() -> None:
    of = {"matches_reference": {"how": "math"}}
    rows = [answer("7", prompt(str(i), reference=known)) for i, known in enumerate(["7", "banana", "8"])]
    told = list(score(Score(by="verdict", of=of), by_prompt(rows), Models({}, None, Path())))
    assert [row.scores.get("verdict") for row in told] == [1.0, None, 0.0]
    assert ends(told) == ["", "reference_unread", ""]


# -- in a recipe -----------------------------------------------------------------------------------------------------------

RIGHT_AND_WRONG = """\
name: tiny
prompts: [{path: rows.jsonl}]
stages:
  - score: {by: verdict, of: {matches_reference: {how: numeric}}, as: correct}
  - pair: {score: correct}
"""


def test_right_and_wrong_answers_make_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i}+1?", "reference": str(i + 1), "completion": text}
        for i in range(4)
        for text in (f"It is {i + 1 + (i == 3)}.", f"It is {i}.")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(RIGHT_AND_WRONG)
    done = typed(tmp_path, "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert (funnel(tmp_path)["score"], funnel(tmp_path)["pair"]) == ((8, 8, 0, 0), (4, 3, 1, 0))
    (kept,) = (tmp_path / "runs/tiny").glob("*-pair-*/kept-*.jsonl")
    assert [pair["chosen"][0]["content"] for pair in read_jsonl(kept)] == ["It is 1.", "It is 2.", "It is 3."]


MODELS = """\
name: tiny
models: {base: {type: transformers, model: ./base}}
prompts: [{path: rows.jsonl}]
stages:
  - score: {by: ifd, model: base, as: hard}
  - filter: [score: {name: hard, max: 1}]
  - choose: {best: 1, by: hard}
"""


def scoring(where: Path, weights: Path, rows: int = 12) -> Path:
    where.mkdir(exist_ok=True)
    shutil.copytree(weights / "base", where / "base")
    lines = [{"prompt": f"Why {i // 2}?", "completion": "It is warm. " * (1 + i % 3) + str(i)} for i in range(rows - 1)]
    lines.append({"prompt": "Too long?", "completion": "1 " * 300})
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (where / "recipe.yaml").write_text(MODELS)
    return where


def steps(where: Path) -> dict[str, str]:
    """The folders of the run's steps by their titles."""
    names = json.loads((where / "runs/tiny/manifest.json").read_text())["stages"]
    return {name.rpartition("-")[0]: name for name in names}


def test_scores_are_named_by_the_weights_and_made_once(tmp_path: Path, weights: Path) -> None:
    here = scoring(tmp_path / "here", weights)
    done = typed(here, "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    first = steps(here)
    (hard,) = (here / "runs/tiny").glob("*-hard-*/kept-*.jsonl")
    values = [row["scores"]["hard"] for row in read_jsonl(hard)]
    (aside,) = (here / "runs/tiny").glob("*-hard-*/failed-*.jsonl")
    assert [row["verdicts"][-1]["reason"][:12] for row in read_jsonl(aside)] == ["over_length="]
    kept = sum(value <= 1 for value in values)
    assert funnel(here)["score"] == (12, 11, 0, 1)
    assert funnel(here)["filter"] == (11, kept, 11 - kept, 0)
    assert 0 < kept < 11
    there = tmp_path / "there"  # the same weights in another place are the same model
    shutil.copytree(here, there)
    (there / "base").rename(there / "basis")
    (there / "recipe.yaml").write_text(MODELS.replace("./base", "./basis"))
    assert typed(there, "build", "recipe.yaml").stderr.count("done already") == len(first) == 5
    tiny_model(there / "basis", context=128, spread=0.2, seed=1)
    assert typed(there, "build", "recipe.yaml").stderr.count("done already") == 1
    assert steps(there)["02-hard"] != first["02-hard"]


def test_the_child_dies_with_its_parent(tmp_path: Path, weights: Path) -> None:
    where = scoring(tmp_path / "run", weights, rows=20_000)
    with started(where, "build", "recipe.yaml") as parent:
        watched = psutil.Process(parent.pid)
        until(lambda: [one for one in watched.children() if "factory.scorer" in one.cmdline()])
        (child,) = watched.children()
        parent.kill()
        parent.wait()
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert not list((where / "runs/tiny").glob("02-*/manifest.json"))


MISTAKES = [
    # a stage, what is told
    ("{by: ifd}", "by: ifd needs model:"),
    ("{by: ifd, model: bass}", "there is no model 'bass'; did you mean 'base'?"),
    ("{by: ifd, model: teacher}", "a scorer's weights are local"),
    ("{by: ifd, model: base, of: {matches_reference: {}}}", "by: ifd has no of:"),
    ("{by: verdict}", "by: verdict needs of:"),
    ("{by: verdict, of: finished}", "there is no 'finished'"),
    ("{by: verdict, model: base, of: {matches_reference: {}}}", "by: verdict has no model:"),
    ("{by: self_consistency, of: {matches_reference: {how: contains}}}", "with a how: other than contains"),
    ("{by: self_consistency, of: code}", "needs of: {matches_reference: ...}"),
    ("{by: reward, model: cut}", "a reward model is a whole folder"),
    ("{by: rewrad, model: base}", "did you mean 'reward'?"),
]


@pytest.mark.parametrize(("stage", "told"), MISTAKES)
def test_mistakes_are_told_before_anything_is_done(tmp_path: Path, stage: str, told: str) -> None:
    text = (
        "name: tiny\nmodels:\n  base: {type: transformers, model: ./base}\n"
        "  cut: {type: transformers, model: ./base, layers: {first: 1}}\n"
        '  teacher: {type: openai, model: m, base_url: "http://127.0.0.1:9"}\n'
        f"prompts: [{{path: prompts.jsonl}}]\nstages:\n  - score: {stage}\n"
    )
    refused(typed(folder(tmp_path, text), "check", "recipe.yaml"), 2, told)


FLOWS = [
    # stages, what is told
    (
        "score: {by: ifd, model: base, as: hard}\n  - choose: {best: 1, by: ifd}",
        "nothing before it gives the score 'ifd'",
    ),
    ("score: {by: ifd, model: base}\n  - filter: [score: {name: idf, max: 1}]", "did you mean 'ifd'?"),
    ("score: {by: verdict, of: {matches_reference: {}}}", "has a `reference`, so no answer gets a verdict"),
]


@pytest.mark.parametrize(("stages", "told"), FLOWS)
def test_what_can_come_to_nothing_is_told(tmp_path: Path, stages: str, told: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}))
    head = "name: tiny\nmodels: {base: {type: transformers, model: ./base}}\nprompts: [{path: rows.jsonl}]\n"
    (tmp_path / "recipe.yaml").write_text(f"{head}stages:\n  - {stages}\n")
    refused(typed(tmp_path, "check", "recipe.yaml"), 2, told)


def test_a_score_needs_its_kind() -> None:
    with pytest.raises(pydantic.ValidationError):
        Score()
