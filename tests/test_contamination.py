"""Decontamination: what each rule drops and just not, that drops name the item, and that a changed benchmark is read anew."""

import json
from pathlib import Path
from typing import Any

import pytest

import factory
from factory.errors import RecipeError
from factory.filters.contamination import COMMON, Benchmark, items
from factory.recipe_file import find
from factory.rows import Message
from tests.sample_rows import answer, ends, filtered, prompt

ITEM = (
    "Mira plants nine rows of beans and each row holds fourteen seeds of which every third never grows so count "
    "all seedlings that Mira can sell on Saturday"
)
WORDS = ITEM.split()
OTHER = [f"other{i}" for i in range(60)]
SHORT = "Who painted Guernica?"


def bench(path: Path, *rows: Any) -> str:
    """A file of items: a text, or a whole row."""
    lines = [json.dumps(row if isinstance(row, dict) else {"prompt": row}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def with_words(count: int, start: int = 0) -> str:
    return " ".join([*OTHER[:20], *WORDS[start : start + count], *OTHER[20:40]])


# A text, knobs, and the rule that drops it; "" is kept
RULES = [
    (ITEM, {}, "same_text"),
    (ITEM.upper().replace(" ", "\n") + "!", {}, "same_text"),
    (with_words(13), {}, "run=13"),
    (with_words(12), {}, ""),
    (with_words(12, 3), {"run": 12}, "run=12"),
    (with_words(8), {"run": 8}, "run=8"),
    (with_words(7), {"run": 8}, ""),
    (with_words(14), {"run": None}, ""),  # of 28 words
    (with_words(15), {"run": None}, "share=0.54"),
    (with_words(15), {"run": None, "share": 0.6}, ""),
    (with_words(27), {"run": None, "share": None}, ""),
    (" ".join("x" if i % 7 == 6 else word for i, word in enumerate(WORDS)), {}, "edit="),
    (" ".join("x" if i % 7 == 6 else word for i, word in enumerate(WORDS)), {"edit": None}, ""),
    (" ".join("somewhat" if i % 3 == 2 else word for i, word in enumerate(WORDS)), {}, ""),
    (SHORT.lower(), {}, "same_text"),
    (f"Tell me: {SHORT}", {}, ""),
    ("", {}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "knobs", "rule"), RULES)
def test_each_rule_drops_what_holds_an_item_and_names_it(
    tmp_path: Path, text: str, knobs: dict[str, Any], rule: str
) -> None:
    path = bench(tmp_path / "b.jsonl", "Something else that nobody will ever ask here at all", ITEM, SHORT)
    (row,) = filtered([{"contamination": {"against": [path], **knobs}}], [answer("fine", prompt(text))])
    if not rule:
        assert row.ending == "kept"
        return
    assert row.verdicts[0].reason.startswith(f"contaminated_prompt:{rule}")
    assert row.verdicts[0].evidence == f"{path}:{3 if text.lower() == SHORT.lower() else 2}"
    assert row.verdicts[0].score is not None


def test_answers_are_looked_at_and_so_is_the_reasoning(tmp_path: Path) -> None:
    solution = "First take " + " ".join(OTHER[:12])
    path = bench(
        tmp_path / "b.jsonl", {"prompt": ITEM, "completion": solution}, {"prompt": SHORT, "reference": "Picasso"}
    )
    rows = [
        answer(f"You asked: {ITEM}"), answer(f"So: {solution}", draw=1), answer("So", draw=2, reasoning=ITEM),
        answer("Picasso", draw=3), answer("Who painted Guernica?", draw=4), answer("clean", draw=5),
    ]  # fmt: skip
    ended = filtered([{"contamination": {"against": [path]}}], rows)
    assert [reason.partition(":")[0] for reason in ends(ended)] == ["contaminated_answer"] * 3 + [""] * 3
    assert [row.verdicts[0].evidence for row in ended[:3]] == [f"{path}:1"] * 3


def test_of_a_conversation_every_turn_is_looked_at_and_all_draws_end(tmp_path: Path) -> None:
    path = bench(tmp_path / "b.jsonl", ITEM)
    turns = [("system", "Be brief."), ("user", ITEM), ("assistant", "84"), ("user", "Why?")]
    asked = prompt(turns=[Message(role=role, content=text) for role, text in turns])
    ended = filtered([{"contamination": {"against": [path]}}], [answer("a", asked), answer("b", asked, draw=1)])
    assert ends(ended) == ["contaminated_prompt:same_text"] * 2


def test_wording_that_many_items_share_points_to_none(tmp_path: Path) -> None:
    frame = "Read the passage below with care and then answer with exactly one letter and nothing else at all"
    for count, kept in ((COMMON, False), (COMMON + 1, True)):
        path = bench(tmp_path / f"{count}.jsonl", *(f"{frame} {' '.join(OTHER[i : i + 20])}" for i in range(count)))
        (row,) = filtered([{"contamination": {"against": [path]}}], [answer("fine", prompt(f"{frame} my own text"))])
        assert (row.ending == "kept") is kept


def test_files_are_read_like_prompt_lists(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text(f"id,question\n1,{SHORT}\n2,{ITEM}\n")
    (tmp_path / "b.txt").write_text(f"\n{ITEM}\n")
    spec = {"path": str(tmp_path / "b.csv"), "columns": {"prompt": "question"}}
    for against, place in ((spec, "b.csv:3"), (str(tmp_path / "b.txt"), "b.txt:2")):
        (row,) = filtered([{"contamination": {"against": [against]}}], [answer("x", prompt(ITEM))])
        assert row.verdicts[0].evidence == f"{tmp_path}/{place}"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "Why?"}], "b.jsonl:1: none of the known forms"),
        ([{"messages": 7}], "b.jsonl:1: messages are not a list"),
        (
            [{"prompt": "Why?"}, {"messages": []}],
            "b.jsonl:2: no question: .*a benchmark's row that cannot be read would guard nothing",
        ),
    ],
)
def test_a_benchmark_that_cannot_be_read_guards_nothing(tmp_path: Path, rows: list[Any], told: str) -> None:
    path = bench(tmp_path / "b.jsonl", *rows)
    with pytest.raises(RecipeError, match=told):
        filtered([{"contamination": {"against": [path]}}], [answer("x")])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RecipeError, match="there are no items in it"):
        filtered([{"contamination": {"against": [str(tmp_path / "empty.jsonl")]}}], [answer("x")])


RECIPE = """\
name: guarded
prompts: [{path: rows.jsonl}]
stages:
  - filter: [{contamination: {against: [bench.jsonl]}}]
  - shape
"""


def test_a_changed_benchmark_is_another_step_and_the_funnel_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    rows = [
        {"prompt": ITEM, "completion": "84"},
        {"prompt": SHORT, "completion": "Picasso"},
        {"prompt": "Hi", "completion": "Hello"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reasons, folders = [], set[str]()
    for told in ([ITEM], [ITEM], [ITEM, SHORT], ["Who else?"]):
        bench(tmp_path / "bench.jsonl", *told)
        run = factory.run_recipe(factory.load(tmp_path / "r.yaml"), tmp_path / "runs")
        folders |= {path.name for path in run.glob("*-filter-*")}
        report = json.loads((run / "report.json").read_text())
        (stage,) = [one for one in report["funnel"] if one["stage"].endswith("filter")]
        reasons.append(stage["reasons"])
    assert [sum(one.values()) for one in reasons] == [1, 1, 2, 0]
    assert all("contaminated_prompt" in key for one in reasons for key in one)
    assert len(folders) == 3


def test_a_benchmark_is_read_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    """A run wants it when it is checked, when it begins, and in each filter."""
    path = bench(tmp_path / "bench.jsonl", ITEM)
    once = items(Benchmark(path=path), find)
    assert items(Benchmark(path=path), find) is once
    assert items(Benchmark(path=path, columns={"prompt": "prompt"}), find) is not once
    bench(tmp_path / "bench.jsonl", ITEM, SHORT)
    assert [item.place for item in items(Benchmark(path=path), find)] == [f"{path}:1", f"{path}:2"]


def test_a_benchmark_that_is_missing_stops_a_run_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": ITEM, "completion": "84"}) + "\n")
    with pytest.raises(RecipeError, match=r"there is no file 'bench\.jsonl'"):
        factory.run_recipe(factory.load(tmp_path / "r.yaml"), tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*-given-*"))
