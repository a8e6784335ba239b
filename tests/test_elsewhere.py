"""Data sets from elsewhere through the whole run, no model anywhere: what comes in, and what stands in the data set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.command import folder, read_jsonl, report, told, typed
from tests.prompt_lists import jsonl

Write = Callable[[Path, list[dict[str, Any]]], Path]

QA = [(f"question {i}?", f"answer {i}, long enough") for i in range(4)]
ALPACA = [{"instruction": q, "input": "", "output": a} for q, a in QA]
SHAREGPT = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in QA]
MESSAGES = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in QA]
PLAIN = [{"prompt": q, "completion": a} for q, a in QA]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def array(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.with_suffix(".json").write_text(json.dumps(rows))
    return path.with_suffix(".json")


def table(mark: str, suffix: str) -> Write:
    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        lines = [mark.join(rows[0]), *(mark.join(f'"{value}"' for value in row.values()) for row in rows)]
        path.with_suffix(suffix).write_text("\n".join(lines) + "\n")
        return path.with_suffix(suffix)

    return write


FILES: dict[str, Write] = {
    "jsonl": jsonl, "json": array, "parquet": parquet, "csv": table(",", ".csv"), "tsv": table("\t", ".tsv"),
}  # fmt: skip
NESTED = ("jsonl", "json", "parquet")
WAYS = [
    *(("alpaca", ALPACA, file) for file in FILES),
    *(("prompt and completion", PLAIN, file) for file in FILES),
    *(("sharegpt", SHAREGPT, file) for file in NESTED),
    *(("messages", MESSAGES, file) for file in NESTED),
]


def built(where: Path, path: Path, stages: str = "", more: str = "", code: int = 0) -> list[dict[str, Any]]:
    """The training rows that the recipe makes of a file."""
    after = f"stages:\n{stages}" if stages else ""
    folder(where, f"name: tiny\nprompts: [{{path: {path.name}, name: list{more}}}]\n{after}")
    done = typed(where, "build", "recipe.yaml")
    assert done.returncode == code, done.stderr
    return read_jsonl(where / "runs/tiny/dataset/train.jsonl") if code == 0 else []


@pytest.mark.parametrize(("form", "rows", "file"), WAYS, ids=[f"{form} as {file}" for form, _, file in WAYS])
def test_every_form_in_every_file_becomes_the_same_training_rows(
    tmp_path: Path, form: str, rows: list[dict[str, Any]], file: str
) -> None:
    made = built(tmp_path, FILES[file](tmp_path / "list.jsonl", rows))
    assert [(row["prompt"], row["completion"], row["model"]) for row in made] == [(q, a, "given") for q, a in QA]
    report(tmp_path)  # whose sums must hold


PREFERENCES = [{"prompt": q, "chosen": a, "rejected": f"a worse answer to {q}"} for q, a in QA]


def test_preference_rows_become_pairs(tmp_path: Path) -> None:
    made = built(tmp_path, jsonl(tmp_path / "list.jsonl", PREFERENCES), "  - pair: {rejected: worst}\n")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in made] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in PREFERENCES
    ]
    assert {(row["margin"], row["chosen_score"], row["rejected_score"]) for row in made} == {(1.0, 1.0, 0.0)}
    assert report(tmp_path)["funnel"][0]["in"] == len(QA)  # a row of the list is one row, though it has two answers


def test_an_answer_that_came_as_rejected_is_no_training_row(tmp_path: Path) -> None:
    made = built(tmp_path, jsonl(tmp_path / "list.jsonl", PREFERENCES), more=", held_out: 1")
    test = read_jsonl(tmp_path / "runs/tiny/dataset/test.jsonl")
    assert len(made) == 3
    assert sorted(row["completion"] for row in [*made, *test]) == [a for _, a in QA]
    shape = report(tmp_path)["funnel"][-1]
    assert (shape["in"], shape["kept"], shape["reasons"]) == (6, 3, {"not_wanted": 3})


def test_ktos_rows_keep_their_label(tmp_path: Path) -> None:
    rows = [{"prompt": q, "completion": a, "label": i % 2 == 0} for i, (q, a) in enumerate(QA)]
    made = built(tmp_path, jsonl(tmp_path / "list.jsonl", rows))
    assert [row["completion"] for row in made] == [QA[0][1], QA[2][1]]
    gold = "models: {gold: {type: reference}}\n"
    folder(tmp_path, f"name: tiny\n{gold}prompts: [{{path: list.jsonl}}]\nstages: [generate: {{model: gold}}]\n")
    assert typed(tmp_path, "build", "recipe.yaml", "--max-failed", "1").returncode == 0
    made = read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")
    assert [row["completion"] for row in made] == [QA[0][1], QA[2][1]]  # nor is one that is not wanted ground truth


@pytest.mark.parametrize("answer", ["", " \n", None])
def test_a_row_that_came_without_an_answer_ends_somewhere(tmp_path: Path, answer: str | None) -> None:
    made = built(tmp_path, jsonl(tmp_path / "list.jsonl", [*PLAIN, {"prompt": "unanswered?", "completion": answer}]))
    assert [row["completion"] for row in made] == [a for _, a in QA]
    given = report(tmp_path)["funnel"][1]
    assert (given["in"], given["kept"], given["failed"], given["reasons"]) == (5, 4, 1, {"no_answer": 1})


def test_ktos_label_is_text_in_csv(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("prompt,completion,label\none?,a good answer,True\ntwo?,a bad answer,false\n")
    assert [row["completion"] for row in built(tmp_path, tmp_path / "list.csv")] == ["a good answer"]


SCORED = [{"q": q, "a": f"{a} ({score})", "stars": score} for q, a in QA for score in (1, 4.5)]
COLUMNS = ", columns: {prompt: q, completion: a, score: stars}"


@pytest.mark.parametrize("file", FILES)
def test_scores_that_come_with_the_rows_choose(tmp_path: Path, file: str) -> None:
    rows = [*SCORED[::2], *SCORED[1::2]]  # answers to one prompt stand apart in the file
    path = FILES[file](tmp_path / "list.jsonl", rows)
    made = built(tmp_path, path, "  - choose: {best: 1, by: score}\n", COLUMNS)
    assert [(row["prompt"], row["score_score"]) for row in made] == [(q, 4.5) for q, _ in QA]


def test_scores_that_come_with_the_rows_make_pairs(tmp_path: Path) -> None:
    made = built(tmp_path, jsonl(tmp_path / "list.jsonl", SCORED[::-1]), "  - pair: {min_margin: 3}\n", COLUMNS)
    assert [(row["margin"], row["chosen_score"]) for row in made] == [(3.5, 4.5)] * 4


def test_a_score_that_no_row_brings_is_told_before_anything_is_done(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "list.jsonl", PLAIN)
    built(tmp_path, path, "  - choose: {best: 1, by: score}\n", code=2)
    told(typed(tmp_path, "build", "recipe.yaml"), 2, "nothing before it gives the score 'score'")
    built(tmp_path, path, "  - pair\n", code=2)
    told(typed(tmp_path, "check", "recipe.yaml"), 2, "nothing before it scores the answers")


def test_answers_in_two_lists_are_answers_to_one_prompt(tmp_path: Path) -> None:
    jsonl(tmp_path / "one.jsonl", [{**row, "score": 1} for row in PLAIN])
    jsonl(tmp_path / "two.jsonl", [{"prompt": q, "completion": f"{a}, too", "score": 2} for q, a in QA[::-1]])
    columns = "columns: {prompt: prompt, completion: completion, score: score}"
    lists = ", ".join(f"{{path: {name}.jsonl, {columns}}}" for name in ("one", "two"))
    folder(tmp_path, f"name: tiny\nprompts: [{lists}]\nstages: [pair]\n")
    assert typed(tmp_path, "build", "recipe.yaml").returncode == 0
    made = read_jsonl(tmp_path / "runs/tiny/dataset/train.jsonl")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in made] == [(q, f"{a}, too", a) for q, a in QA]


def test_the_card_tells_lists_with_licences_and_that_no_benchmark_was_looked_at(tmp_path: Path) -> None:
    built(tmp_path, jsonl(tmp_path / "list.jsonl", [*PLAIN, PLAIN[0]]), more=", licence: CC-BY-4.0")
    card = (tmp_path / "runs/tiny/dataset/README.md").read_text()
    assert "| list | list.jsonl | CC-BY-4.0 |" in card
    assert "| prompts list | rows | 5 | 4 | 1 | 0 | duplicate 1 |" in card
    assert "The rows were not compared with any benchmark." in card
