"""`show --row` and `--drops`: from a line of a list to its place in the data set, and every row that ended for a reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from factory.rows import Message, Prompt
from tests.command import factory, folder, read_jsonl, recipe, report, typed
from tests.prompt_lists import jsonl
from tests.server import chat, in_thread

LONG = "a good long answer of more than five words, number"
ROWS = [
    {"prompt": "first?", "completion": f"{LONG} one", "rating": 5},
    {"prompt": "second?", "completion": "too short", "rating": 4},
    {"prompt": "", "completion": "", "rating": None},
    {"prompt": "first?", "completion": f"another answer, quite unlike it, {LONG} two", "rating": 3},
    {"prompt": "third?", "completion": f"{LONG} \x1b[31mthree", "rating": None},
    {"prompt": "first?", "completion": f"{LONG} one", "rating": 5},
    {"prompt": "fourth?", "completion": f"{LONG} four", "rating": 2},
    *({"prompt": f"short {i}?", "completion": "no", "rating": 1} for i in range(30)),
]
RECIPE = """\
name: tiny
prompts: [{path: rows.jsonl, name: mine, columns: {prompt: prompt, completion: completion, score: rating}}]
stages:
  - filter: [words: {min: 5}]
"""
PAIRS = RECIPE + "  - pair: {min_margin: 1}\n"
CHOICE = RECIPE + "  - choose: {best: 1, by: score}\n"


def built(where: Path, text: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    folder(where, text)
    jsonl(where / "rows.jsonl", rows)
    done = typed(where, "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return where / "runs/tiny"


def prompt(text: str) -> str:
    return Prompt.of([Message(role="user", content=text)]).id


def shown(where: Path, *arguments: str) -> str:
    done = typed(where, "show", "tiny", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of(run: Path, stage: str, ending: str = "kept") -> list[dict[str, Any]]:
    return [row for shard in sorted(run.glob(f"*-{stage}-*/{ending}-*.jsonl")) for row in read_jsonl(shard)]


def test_a_prompts_life_is_that_of_all_its_answers(tmp_path: Path) -> None:
    run = built(tmp_path, CHOICE)
    told = shown(tmp_path, "--row", prompt("first?"))
    best, other = (row["id"] for row in of(run, "given")[:2])
    (row,) = (row["id"] for row in of(run, "shape") if row["parents"] == [best])
    assert told.startswith(f"prompt {prompt('first?')}  list mine, line 1\n  user: first?\n")
    assert re.search(r"line 6: left out, duplicate: of line 1  evidence " + prompt("first?"), told)
    first, second = (told[told.index(f"answer {id_}") :].split("\n\n")[0] for id_ in (best, other))
    assert "01-given               kept     score 5\n  02-filter              kept\n" in first
    assert f"became training row {row} in 04-shape" in first
    assert "03-choose              dropped  choose: not_chosen=3" in second
    assert "became" not in second
    assert f"training row {row}  04-shape, of {best}" in told
    assert "runs/tiny/dataset/train.jsonl, line 1" in told


def test_an_answers_life_is_not_that_of_its_neighbours(tmp_path: Path) -> None:
    run = built(tmp_path, CHOICE)
    best, other = (row["id"] for row in of(run, "given")[:2])
    (row,) = (row["id"] for row in of(run, "shape") if row["parents"] == [best])
    for id_ in (best, row, best[:8], row[:8]):
        told = shown(tmp_path, "--row", id_)
        assert f"answer {best}" in told
        assert f"training row {row}" in told
        assert other not in told
        assert "list mine, line 1" in told
    assert "words: words=2<5 score 2" in shown(tmp_path, "--row", of(run, "filter", "dropped")[0]["id"])
    assert "\x1b" not in shown(tmp_path, "--row", prompt("third?"))  # nothing that a terminal would act on
    assert "failed   choose: no_score" in shown(tmp_path, "--row", prompt("third?"))


def test_a_pairs_life_is_that_of_both_answers(tmp_path: Path) -> None:
    run = built(tmp_path, PAIRS)
    (pair,) = of(run, "pair")
    told = shown(tmp_path, "--row", pair["id"])
    assert told == shown(tmp_path, "--row", prompt("first?"))
    for parent in pair["parents"]:
        answer = told[told.index(f"answer {parent}") :].split("\n\n")[0]
        assert f"became pair {pair['id']} in 03-pair" in answer
    assert re.search(
        r"margin 2\n  chosen \(5\): .*one\n  rejected \(3\): .*two\n  runs/tiny/dataset/train.jsonl, line 1", told
    )
    alone = shown(tmp_path, "--row", prompt("fourth?"))
    assert "03-pair                dropped  pair: only_one" in alone


def test_a_failed_draw_and_a_held_out_prompt_have_lives_too(tmp_path: Path) -> None:
    async def reply(asked: dict[str, Any], _: int) -> dict[str, Any]:
        text = "" if "number 3?" in asked["messages"][-1]["content"] else "some good answer"
        return chat(asked, [text] * asked.get("n", 1))

    stages = "  - generate: {model: teacher, max_tokens: 16}\n"
    with in_thread(reply) as server:
        folder(tmp_path, recipe(server.url, stages=stages, limits="max_attempts: 1"))
        assert factory(tmp_path, "build", "recipe.yaml", "--max-failed", "50%").returncode in (0, 3)
    run = tmp_path / "runs/tiny"
    held_out = {json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()}
    held_out -= {row["prompt"]["messages"][-1]["content"] for e in ("kept", "failed") for row in of(run, "generate", e)}
    assert len(held_out) == 6
    assert len(of(run, "generate", "failed")) == 1
    told = shown(tmp_path, "--row", prompt(held_out.pop()))
    assert "list questions, line " in told
    assert "no stage has a row of it" in told
    (row,) = of(run, "generate", "failed")
    assert "01-generate            failed   generate: empty" in shown(tmp_path, "--row", row["id"])


def test_a_list_that_is_gone_hides_nothing_else(tmp_path: Path) -> None:
    built(tmp_path, CHOICE)
    (tmp_path / "rows.jsonl").unlink()
    told = shown(tmp_path, "--row", prompt("first?"))
    assert "list mine, its line is not known: the list is away, or has changed" in told
    assert "user: first?" in told
    assert "02-filter              kept" in told


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ffffffffffffffff", "no row of runs/tiny has an id that begins so"),
        ("", "an id is of the letters a to f and digits"),
        ("no id", "an id is of the letters a to f and digits"),
        ("[0-9a-f", "an id is of the letters a to f and digits"),
    ],
)
def test_ids_that_are_none_are_told(tmp_path: Path, said: str, words: str) -> None:
    built(tmp_path, RECIPE)
    done = typed(tmp_path, "show", "tiny", f"--row={said}")
    assert done.returncode == 2
    assert words in done.stderr


def test_a_beginning_of_several_ids_names_them(tmp_path: Path) -> None:
    run = built(tmp_path, RECIPE)
    ids = {row["id"]: "an answer" for e in ("kept", "dropped") for row in of(run, "filter", e)}
    ids |= {row["prompt"]["id"]: "a prompt" for e in ("kept", "dropped") for row in of(run, "filter", e)}
    ids |= {row["id"]: "a training row" for row in of(run, "shape")}
    first = max("0123456789abcdef", key=lambda c: sum(id_.startswith(c) for id_ in ids))
    same = [id_ for id_ in ids if id_.startswith(first)]
    done = typed(tmp_path, "show", "tiny", "--row", first)
    assert done.returncode == 2
    assert f"{len(same)} rows begin so: " in done.stderr
    named = re.findall(r"([0-9a-f]{16}) \((an? [a-z ]+)\)", done.stderr)
    assert len(named) == min(6, len(same))
    assert dict(named).items() <= ids.items()


def test_drops_alone_tells_every_reason_with_the_sums_of_the_report(tmp_path: Path) -> None:
    built(tmp_path, CHOICE)
    lines = shown(tmp_path, "--drops").splitlines()[1:-2]
    told = [(stage, reason, int(count)) for reason, count, stage in (re.split(r"  +", line) for line in lines)]
    sums = report(tmp_path)["funnel"]
    assert [(reason, count) for _, reason, count in told] == [one for row in sums for one in row["reasons"].items()]
    assert {stage for stage, *_ in told} == {"prompts mine", "02-filter", "03-choose"}


def test_drops_lists_the_rows_of_a_reason_and_says_how_many_more(tmp_path: Path) -> None:
    run = built(tmp_path, CHOICE)
    every = [row["id"] for row in of(run, "filter", "dropped")]
    assert len(every) == 31
    some = shown(tmp_path, "--drops", "words").splitlines()
    assert [line.split()[1] for line in some[:-1]] == every[:20]
    assert some[-1] == "... and 11 more: --limit 0 shows all"
    whole = shown(tmp_path, "--drops", "words", "--limit", "0").splitlines()
    assert [line.split()[1] for line in whole] == every
    assert whole[0].endswith(f"  {every[0]}  words: words=2<5 score 2  | too short")
    assert shown(tmp_path, "--drops", "duplicate").splitlines() == [
        f"mine, line 6  {prompt('first?')}  duplicate: of line 1  evidence {prompt('first?')}"
    ]
    assert shown(tmp_path, "--drops", "empty").splitlines() == ["mine, line 3  -                 empty"]


def test_an_unknown_reason_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    built(tmp_path, CHOICE)
    done = typed(tmp_path, "show", "tiny", "--drops", "wrods")
    assert (done.returncode, "did you mean 'words'?" in done.stderr) == (2, True)
    for wrong in (["--limit", "-1"], ["--row", "a", "--drops"]):
        assert typed(tmp_path, "show", "tiny", *wrong).returncode == 2


def test_a_run_that_lost_nothing_says_so(tmp_path: Path) -> None:
    built(tmp_path, RECIPE, ROWS[:1])
    assert shown(tmp_path, "--drops") == "no row was dropped or failed\n"
