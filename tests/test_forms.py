"""`factory export`: each form holds all of a data set, or says what it cannot hold; and is read back as the same."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory import dataset
from factory.dataset import Config
from factory.errors import RecipeError
from factory.forms import FORMS, export
from factory.prompt_files import read
from factory.prompt_rows import prompt_reader
from factory.rows import Message, Pair, Prompt, TrainRow
from tests.command import folder, typed
from tests.prompt_lists import find

CARD: dict[str, Any] = {"recipe": "r", "funnel": [], "teachers": {}, "prompts": []}
ANSWERS = ["alpaca", "sharegpt", "messages", "prompt_completion"]
PAIRS = ["preference", "kto"]


def message(role: str, text: str) -> Message:
    return Message(role=role, content=text)


def row(i: int, turns: list[Message], answer: str, **rest: Any) -> TrainRow:
    return TrainRow(id=f"{i:016x}", prompt=turns, completion=[message("assistant", answer)], parents=[f"s{i}"], **rest)


def pair(i: int, turns: list[Message], chosen: str, rejected: str, **rest: Any) -> Pair:
    sides = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
    return Pair(id=f"{i:016x}", prompt=turns, chosen_model="a", rejected_model="b", parents=["x", "y"], **sides, **rest)


def written(where: Path, *configs: tuple[str, list[Any], list[TrainRow]]) -> Path:
    made = [
        Config(name, lambda train=train: iter(train), lambda test=test: iter(test)) for name, train, test in configs
    ]
    dataset.write(where / "dataset", name="r", configs=made, card=CARD)
    return where


def back(file: Path) -> list[Prompt]:
    as_prompt = prompt_reader({}, "list")
    return [as_prompt(line, f"{file}:{number}") for number, line in read(str(file), None, find) if line is not None]


# what a data set holds: text that is not blank; a system turn says something; the last turn is the user's
SAID = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda text: bool(text.strip()))
SYSTEM = st.lists(SAID.map(lambda text: message("system", text)), max_size=1)
ONE_TURN = st.tuples(SYSTEM, SAID).map(lambda said: [*said[0], message("user", said[1])])
EARLIER = st.lists(st.tuples(SAID, SAID), max_size=2).map(
    lambda turns: [m for q, a in turns for m in (message("user", q), message("assistant", a))]
)
TURNS = st.tuples(SYSTEM, EARLIER, SAID).map(lambda said: [*said[0], *said[1], message("user", said[2])])
SCORES = st.dictionaries(st.sampled_from(["helpful", "brief"]), st.floats(0, 5), max_size=2)


def rows_of(
    turns: st.SearchStrategy[list[Message]],
) -> st.SearchStrategy[list[tuple[list[Message], str, dict[str, float]]]]:
    return st.lists(st.tuples(turns, SAID, SCORES), min_size=1, max_size=4)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", ANSWERS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_answers_come_back_as_they_were(form: str, suffix: str, data: st.DataObject) -> None:
    said = data.draw(rows_of(ONE_TURN if form == "alpaca" else TURNS))
    rows = [row(i, turns, answer, scores=scores) for i, (turns, answer, scores) in enumerate(said)]
    with tempfile.TemporaryDirectory() as where:
        run, file = written(Path(where), ("default", rows, [])), Path(where) / f"out{suffix}"
        assert f"{len(rows)} rows" in export(run, form, file)
        assert [(prompt.messages, prompt.completion) for prompt in back(file)] == [(t, a) for t, a, _ in said]
        for (_, line), one in zip(read(str(file), None, find), rows, strict=True):
            assert line is not None
            assert (line["id"], line["parents"]) == (one.id, one.parents)
            assert {name: line.get(f"score_{name}") for name in one.scores} == one.scores


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", PAIRS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_pairs_come_back_as_they_were(form: str, suffix: str, data: st.DataObject) -> None:
    said = data.draw(st.lists(st.tuples(TURNS, SAID, SAID).filter(lambda s: s[1].strip() != s[2].strip()), min_size=1))
    pairs = [pair(i, turns, chosen, rejected) for i, (turns, chosen, rejected) in enumerate(said)]
    with tempfile.TemporaryDirectory() as where:
        run, file = written(Path(where), ("default", pairs, [])), Path(where) / f"out{suffix}"
        export(run, form, file)
        prompts = back(file)
    if form == "preference":
        assert [(p.messages, p.completion, p.rejected, p.scores) for p in prompts] == [
            (turns, chosen, rejected, {"label": 1.0}) for turns, chosen, rejected in said
        ]
    else:
        assert [(p.messages, p.completion, p.scores["label"]) for p in prompts] == [
            one for turns, chosen, rejected in said for one in ((turns, chosen, 1.0), (turns, rejected, 0.0))
        ]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


USER = [message("user", "q")]
SPOKEN = [message("system", "s"), *USER]
SHAPES = {
    "alpaca": {"instruction": "q", "input": "", "output": "a", "system": "s"},
    "sharegpt": {
        "conversations": [{"from": w, "value": t} for w, t in (("system", "s"), ("human", "q"), ("gpt", "a"))]
    },
    "messages": {"messages": [*SPOKEN, message("assistant", "a")]},
    "prompt_completion": {"prompt": SPOKEN, "completion": [message("assistant", "a")]},
}


@pytest.mark.parametrize(("form", "shape"), SHAPES.items())
def test_a_form_has_the_columns_that_its_readers_want(tmp_path: Path, form: str, shape: dict[str, Any]) -> None:
    export(written(tmp_path, ("default", [row(1, SPOKEN, "a", model="m")], [])), form, tmp_path / "out.jsonl")
    (line,) = lines(tmp_path / "out.jsonl")
    assert {**line, **shape} == line
    assert set(line) == {*shape, "id", "source", "model", "task", "parents"}


def test_a_pair_is_two_rows_of_kto_with_their_own_models_and_scores(tmp_path: Path) -> None:
    one = pair(1, USER, "good", "bad", chosen_score=4.0, rejected_score=2.5)
    export(written(tmp_path, ("default", [one], [])), "kto", tmp_path / "out.jsonl")
    told = [(r["prompt"], r["completion"], r["label"], r["model"], r["score"]) for r in lines(tmp_path / "out.jsonl")]
    assert told == [("q", "good", True, "a", 4.0), ("q", "bad", False, "b", 2.5)]
    assert len({r["id"] for r in lines(tmp_path / "out.jsonl")}) == 2


TALK = [message("user", "q"), message("assistant", "a"), message("user", "r")]
CANNOT = [
    ("alpaca", [row(1, USER, "a"), row(2, TALK, "b"), row(3, TALK, "c")], "2 rows: the prompt has several turns"),
    ("preference", [row(1, USER, "a")], "1 rows: they are answers, not pairs; forms for these: alpaca, sharegpt"),
    ("kto", [row(1, USER, "a")], "1 rows: they are answers"),
    ("messages", [pair(1, USER, "a", "b")], "1 rows: they are pairs; forms for these: preference, kto"),
    ("alpaca", [pair(1, USER, "a", "b")] * 3, "3 rows: they are pairs"),
    ("sharegpt", [TrainRow(id="1", prompt=USER, completion=[message("assistant", "a")] * 2)], "several messages"),
]


@pytest.mark.parametrize(("form", "rows", "words"), CANNOT, ids=lambda value: str(value)[:30])
def test_what_a_form_cannot_hold_is_counted_and_nothing_is_written(
    tmp_path: Path, form: str, rows: list[Any], words: str
) -> None:
    run = written(tmp_path, ("default", rows, []))
    with pytest.raises(RecipeError, match=rf"the form {form} cannot hold all of it.*{words}.*Nothing was written"):
        export(run, form, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_rows_with_a_label_go_into_kto_alone(tmp_path: Path) -> None:
    run = written(tmp_path, ("default", [row(1, USER, "a")], []))
    train = run / "dataset/train.jsonl"
    train.write_text(json.dumps({"prompt": "q", "completion": "a", "label": False, "id": "1"}) + "\n")
    export(run, "kto", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == lines(train)
    for form in ANSWERS:
        with pytest.raises(RecipeError, match="they have a label"):
            export(run, form, tmp_path / f"{form}.jsonl")


def test_the_default_config_is_the_last_and_others_are_named(tmp_path: Path) -> None:
    run = written(
        tmp_path, ("first", [row(1, USER, "a")], [row(2, USER, "t")]), ("last", [pair(1, USER, "a", "b")], [])
    )
    export(run, "preference", tmp_path / "pairs.jsonl")
    export(run, "messages", tmp_path / "test.jsonl", "first", "test")
    assert [prompt.completion for prompt in back(tmp_path / "test.jsonl")] == ["t"]
    with pytest.raises(RecipeError, match="there is no config 'frist'; did you mean 'first'"):
        export(run, "messages", tmp_path / "x.jsonl", "frist")
    with pytest.raises(RecipeError, match="config 'last' has no split 'test'; known: train"):
        export(run, "preference", tmp_path / "x.jsonl", "last", "test")


def test_scores_and_models_that_come_late_have_their_type_in_parquet(tmp_path: Path) -> None:
    pairs = [pair(i, USER, "a", f"b{i}", chosen_score=1.5 if i == 2999 else None) for i in range(3000)]
    export(written(tmp_path, ("default", pairs, [])), "preference", tmp_path / "out.parquet")
    got = [line["chosen_score"] for _, line in read(str(tmp_path / "out.parquet"), None, find) if line]
    assert (len(got), got[-1], set(got[:-1])) == (3000, 1.5, {None})


def test_the_verb_tells_mistakes_and_writes_over_nothing(tmp_path: Path) -> None:
    folder(tmp_path, "name: tiny\nprompts: [{path: rows.jsonl}]\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    assert typed(tmp_path, "build", "recipe.yaml").returncode == 0
    verb = ["export", "tiny", "--to", "out.jsonl", "--form"]
    done = typed(tmp_path, *verb, "alpaca")
    assert (done.returncode, done.stdout) == (
        0,
        "1 rows of runs/tiny/dataset/train.jsonl in the form alpaca: out.jsonl\n",
    )
    table = [
        ([*verb, "alpaca"], "it exists already; name a new file"),
        ([*verb, "alpacca"], "did you mean 'alpaca'?"),
        (["export", "tiny", "--form", "kto", "--to", "out.txt"], "a file is .jsonl or .parquet"),
        (["export", "tiny", "--form", "kto", "--to", "no/out.jsonl"], "there is no folder no"),
        (["export", "other", "--form", "kto", "--to", "x.jsonl"], "there is no run 'other'"),
    ]
    for arguments, words in table:
        done = typed(tmp_path, *arguments)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    (tmp_path / "runs/tiny/dataset/README.md").unlink()
    done = typed(tmp_path, "export", "tiny", "--form", "kto", "--to", "x.jsonl")
    assert done.returncode == 2
    assert "holds no data set" in done.stderr
    assert set(FORMS) == {*ANSWERS, *PAIRS}
