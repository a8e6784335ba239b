"""Semantic duplicates: the vectors are the bare model's, the comparison misses nothing, and a recipe names its encoder."""

import random
from pathlib import Path
from typing import Any

import pytest

from factory.curate import Curate, curate
from factory.errors import EngineError
from factory.models import Models
from factory.rows import Message, Sample, by_prompt, kind_of
from factory.teachers.transformers import Transformers
from tests.command import folder, funnel, read_jsonl, told, typed
from tests.sample_rows import answer, answers, ends, prompt
from tests.tiny import reward_model, tiny_model

WORDS = [
    "river",
    "stone",
    "garden",
    "winter",
    "lamp",
    "copper",
    "music",
    "paper",
    "morning",
    "window",
    "bridge",
    "forest",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("weights")
    tiny_model(home / "chat", context=64, spread=0.5)
    reward_model(home / "bert", both_ways=True)
    tiny_model(home / "cut", layers=1)
    (home / "cut/config.json").write_text(
        (home / "cut/config.json").read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )
    return home


def texts(count: int) -> list[str]:
    """Some of them in kinds of a few words' difference."""
    draw = random.Random(4)
    made = [" ".join(draw.choices(WORDS, k=draw.randint(1, 15))) for _ in range(count // 3)]
    return made + [text.replace(draw.choice(WORDS), draw.choice(WORDS)) for text in made for _ in range(2)]


def vectors(home: Path, said: list[str]) -> Any:
    """One text after the other through the bare model, in pieces where it is longer than the context."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(home), AutoModel.from_pretrained(home)
    context = model.config.max_position_embeddings
    found = []
    with torch.inference_mode():
        for text in said:
            ids = torch.tensor(tokenizer(text)["input_ids"])
            states = [model(piece[None]).last_hidden_state[0] for piece in ids.split(context)]
            found.append(torch.nn.functional.normalize(torch.cat(states).mean(0), dim=0))
    return torch.stack(found)


def through(home: Path, name: str, rows: list[Sample], **knobs: Any) -> list[Sample]:
    models = Models({"encoder": Transformers(model=str(home / name))}, None, home / "runs")
    one = Curate.model_validate({"filters": [{"semantic_duplicates": {"model": "encoder", **knobs}}]})
    return list(curate(one, lambda: by_prompt(rows), models))


@pytest.mark.parametrize(("name", "threshold"), [("chat", 0.97), ("bert", 0.96)])
def test_it_drops_what_a_plain_comparison_with_all_that_stay_drops(weights: Path, name: str, threshold: float) -> None:
    """More rows than the child compares at once (512) or gets at once (256)."""
    said = [*texts(540), " ".join(WORDS * 20)]
    known = vectors(weights / name, said)
    similar = (known @ known.T).tolist()
    stays: list[int] = []
    expected = []
    for i in range(len(said)):
        nearest = max(stays, key=lambda j: similar[i][j], default=None)
        if nearest is None or round(similar[i][nearest], 4) < threshold:
            stays.append(i)
            expected.append(None)
        else:
            expected.append((f"question {nearest}", round(similar[i][nearest], 4)))
    rows = answers(*said)
    asked = {row.id: row.prompt.text for row in rows}
    done = through(weights, name, rows, threshold=threshold)
    got = [(asked[row.verdicts[0].evidence], row.verdicts[0].score) if row.verdicts else None for row in done]
    assert 100 < len(stays) < 500
    unlike = [i for i, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other]
    # a sum in another order may differ in the last digit that counts
    assert all(
        got[i] and expected[i] and got[i][0] == expected[i][0] and abs(got[i][1] - expected[i][1]) < 2e-4
        for i in unlike
    )
    assert len(unlike) < 10


def test_the_best_of_a_kind_stays_and_a_row_without_score_or_text_is_set_aside(weights: Path) -> None:
    rows = [*answers("one river", "One river", "two rivers", "", good=[1, 3, 2, 3]), answer("a", prompt("unscored"))]
    done = through(weights, "bert", rows, threshold=0.2, by="good")
    reasons = [kind_of(reason) for reason in ends(done)]
    assert reasons == ["semantic_duplicate", "", "semantic_duplicate", "no_vector", "no_score"]
    assert [done[0].verdicts[0].evidence, done[2].verdicts[0].evidence] == [rows[1].id] * 2


def test_draws_of_one_prompt_are_compared_with_each_other_alone(weights: Path) -> None:
    asked = [prompt("one"), prompt("two")]
    rows = [answer(text, to, draw) for to in asked for draw, text in enumerate(["lamp", "copper river", "lamp"])]
    done = through(weights, "bert", rows, threshold=0.99999, within="prompt")
    assert ends(done) == ["", "", "semantic_duplicate=1.00"] * 2
    assert [done[i].verdicts[0].evidence for i in (2, 5)] == [rows[0].id, rows[3].id]


def test_of_prompts_keeps_all_draws_of_the_question_with_the_best_answer(weights: Path) -> None:
    asked = Message(role="user", content="lamp copper")
    one, same = prompt(turns=[asked]), prompt(turns=[Message(role="system", content="Be brief."), asked])
    other = prompt("winter river stone music")
    rows = [
        answer(text, to, draw, scores={"good": score})
        for to, scores in ((one, [1, 2]), (same, [0, 3]), (other, [0, 0]))
        for draw, (text, score) in enumerate(zip(["a", "b"], scores, strict=True))
    ]
    knobs: dict[str, Any] = {"of": "prompts", "threshold": 0.999}
    kinds = [kind_of(reason) for reason in ends(through(weights, "bert", rows, by="good", **knobs))]
    assert kinds == ["semantic_duplicate", "semantic_duplicate", "", "", "", ""]


def test_weights_that_are_no_encoder_stop_the_stage(weights: Path) -> None:
    with pytest.raises(EngineError, match=r"encoder has no trained encoder: layers\.1\."):
        through(weights, "cut", answers("a", "b"))


RECIPE = """
name: tiny
prompts: [{path: rows.jsonl, name: rows, columns: {prompt: q, completion: a}}]
models: {encoder: {type: transformers, model: ./encoder}, chat: {type: openai, model: m, base_url: "http://127.0.0.1:9/v1"}}
stages:
  - filter: [{semantic_duplicates: {model: encoder, threshold: 0.999}}]
"""


def test_a_recipe_names_its_encoder_and_other_weights_make_the_step_run_again(weights: Path, tmp_path: Path) -> None:
    where = folder(tmp_path, RECIPE)
    (where / "rows.jsonl").write_text(
        '{"q": "1", "a": "A lamp."}\n{"q": "2", "a": "A lamp."}\n{"q": "3", "a": "Rain"}\n'
    )
    (where / "encoder").symlink_to(weights / "bert")
    assert typed(where, "run", "recipe.yaml").returncode == 0
    assert funnel(where)["filter"][:3] == (3, 2, 1)
    (dropped,) = read_jsonl(next((where / "runs/tiny").glob("*filter*/dropped*")))
    assert dropped["verdicts"][0]["reason"] == "semantic_duplicate=1.00"
    (where / "encoder").unlink()
    (where / "encoder").symlink_to(weights / "chat")
    assert typed(where, "run", "recipe.yaml").returncode == 0
    assert len(list((where / "runs/tiny").glob("*filter*"))) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("chat", "models.chat is `type: openai`; an encoder's weights are local"), ("encodr", "no model 'encodr'")],
)
def test_check_refuses_an_encoder_that_is_none(weights: Path, tmp_path: Path, wrong: str, words: str) -> None:
    where = folder(tmp_path, RECIPE.replace("model: encoder,", f"model: {wrong},"))
    (where / "rows.jsonl").write_text('{"q": "1", "a": "A lamp."}\n')
    told(typed(where, "check", "recipe.yaml"), 2, words)
