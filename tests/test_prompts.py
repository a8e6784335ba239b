"""Prompt lists: file formats and their faults, the split into train and test, the shipped files."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from factory.errors import RecipeError
from factory.prompt_files import is_hub_id, read
from factory.prompts import PromptLists, PromptSet, lint, load
from factory.rows import Prompt
from tests.prompt_lists import ROOT, find, jsonl, lists, loaded

# -- files -----------------------------------------------------------------------------------------------------------

QUESTIONS = ['Say "hi", please', "Zwei Äpfel? 🍎", "line\u2028separator"]


def write_all(folder: Path) -> dict[str, Path]:
    """The same three prompts in every format."""
    rows = [{"prompt": question, "tags": "x"} for question in QUESTIONS]
    (folder / "bom.txt").write_bytes("\ufeff".encode() + "\r\n".join(QUESTIONS).encode() + b"\r\n")
    (folder / "a.txt").write_bytes("\n".join(QUESTIONS).encode())
    jsonl(folder / "a.jsonl", rows)
    quoted = "".join('"' + question.replace('"', '""') + '",x\n' for question in QUESTIONS)
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbfprompt, tags\n" + quoted.encode())
    (folder / "a.tsv").write_bytes(b"prompt\ttags\n" + quoted.replace(",x\n", "\tx\n").encode())
    (folder / "a.json").write_text(json.dumps(rows, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    (folder / "hub").mkdir()
    jsonl(folder / "hub" / "train.jsonl", rows)
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder / "splits")
    return {path.name: path for path in folder.iterdir()}


def test_every_format_gives_the_same_prompts(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    got = {name: [prompt.text for prompt in loaded(path).train] for name, path in files.items()}
    assert got == dict.fromkeys(files, QUESTIONS)
    tagged = {name for name, path in files.items() if loaded(path).train[0].tags == ["x"]}
    assert tagged == {"a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "hub", "saved", "splits"}


def test_blank_lines_are_counted_as_empty_and_lines_numbered_as_in_an_editor(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n \n{"prompt": "two"}')
    (tmp_path / "a.csv").write_text('prompt\n"one\nmore"\n\ntwo\n')
    got = {
        path.name: ([line for line, _ in one.kept], [(ending.row, ending.reason) for ending in one.endings])
        for path in tmp_path.iterdir()
        for one in [loaded(path)]
    }
    assert got == {
        "a.txt": ([1, 4], [(2, "empty"), (3, "empty")]),
        "a.jsonl": ([1, 4], [(2, "empty"), (3, "empty")]),
        "a.csv": ([2, 5], [(4, "empty")]),
    }


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("prompt,tags\na;b,x\n", [{"prompt": "a;b", "tags": "x"}]),
        ("prompt;tags\na, b;x\n", [{"prompt": "a, b", "tags": "x"}]),
        ("prompt\ttags\na, b;c\tx\n", [{"prompt": "a, b;c", "tags": "x"}]),
        ('\ufeff"prompt";"tags"\r\n"a; ""b""";"x"\r\n', [{"prompt": 'a; "b"', "tags": "x"}]),
        ('"what, or; who";tags\na;x\n', [{"what, or; who": "a", "tags": "x"}]),
        ('"a ""quoted, name""";tags\na;x\n', [{'a "quoted, name"': "a", "tags": "x"}]),
        ('"what; or\twho",tags;more\na,x\n', [{"what; or\twho": "a", "tags;more": "x"}]),
        ("prompt\na; b\tc\n", [{"prompt": "a; b\tc"}]),
        ('"prompt, or; question"\na\n', [{"prompt, or; question": "a"}]),
        ('"two\nlines",tags\na,x\n', [{"two\nlines": "a", "tags": "x"}]),
    ],
)
def test_the_header_of_a_csv_file_says_what_parts_its_columns(
    tmp_path: Path, content: str, rows: list[dict[str, str]]
) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8", newline="")
    assert [row for _, row in read(str(tmp_path / "a.csv"), None, find)] == rows


BAD_FILES = [
    ("a.txt", b"good\nbad \xe9\n", r"a\.txt:2: not UTF-8: byte 5 of the line is 0xe9; save the file as UTF-8"),
    ("a.txt", "x\n".encode("utf-16"), r"a\.txt:1: not UTF-8"),
    ("a.txt", b"", r"a\.txt: there are no prompts in it"),
    ("a.txt", b"\n \n", r"a\.txt: there are no prompts in it; line 1: empty"),
    ("a.txt", b"x" * (1 << 24) + b"x\n", r"a\.txt:1: a line of more than"),
    ("a.jsonl", b'{"prompt": "q"}\n{"prompt": "q",}\n', r"a\.jsonl:2:16: not JSON"),
    ("a.jsonl", '{"é": x}\n'.encode(), r"a\.jsonl:1:7: not JSON"),
    ("a.jsonl", b'{"prompt": \n', r"a\.jsonl:1:10: not JSON"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1:1: not JSON: nested too deeply"),
    ("a.jsonl", b'["q"]\n', r"a\.jsonl:1:1: a row is an object with columns"),
    (
        "a.jsonl",
        b'{"quest": "q"}\n',
        r"a\.jsonl:1: none of the known forms.*the row has 'quest'.*columns: {prompt: NAME}",
    ),
    ("a.jsonl", b'{"prompt": []}\n', r"no prompts in it; line 1: unreadable: no question"),
    ("a.jsonl", b'{"prompt": "caf\xe9"}\n', r"a\.jsonl:1: not UTF-8: byte 16 "),
    ("a.csv", b"prompt,tags\na,b\nc,d,e\n", r"a\.csv:3: 3 fields, but the header has 2"),
    ("a.csv", b'prompt\n"open\n', r"a\.csv:2: not CSV"),
    ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: two columns have the same name"),
    ("a.csv", b"q;r\n1;2\n", r"a\.csv:2: none of the known forms.*'q', 'r'"),
    (
        "a.csv",
        b"prompt;tags\na;b\nc;d;e\n",
        r"a\.csv:3: 3 fields, but the header has 2; quote text that holds semicolons",
    ),
    ("a.csv", b"prompt;tags,x\na;b\n", r"a\.csv:2: 1 fields, but the header has 2; quote text that holds commas"),
    ("a.csv", b"prompt\nna\xefve\n", r"a\.csv:2: not UTF-8"),
    ("a.csv", b"", r"a\.csv: there are no prompts in it"),
    ("a.parquet", b"not parquet", r"a\.parquet: cannot be read as a data set: Arrow"),
    ("a.tsv", b"prompt\ttags\na\tb\nc\td\te\n", r"a\.tsv:3: 3 fields.*quote text that holds tabs"),
    ("a.json", b"{}", r"a\.json: it holds one dict, not an array of objects"),
    ("a.json", b'["q"]', r"a\.json: item 1: a row is an object with columns, not 'q'"),
    (
        "a.json",
        b'{"prompt": "q"}\n{"prompt": "r"}',
        r"a\.json: not JSON:.*for one object per line call the file \.jsonl",
    ),
    ("a.json", b'[{"prompt": "caf\xe9"}]', r"a\.json: not JSON"),
    ("a.json", b"[" * 100_000, r"a\.json: not JSON"),
    ("a.json", b"[]", r"a\.json: there are no prompts in it"),
    (
        "a.xml",
        b"<a/>",
        r"a\.xml: cannot read '\.xml' files; give \.txt, \.jsonl, \.json, \.csv, \.tsv, \.parquet, a folder",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=lambda value: str(value)[:40])
def test_bad_files_are_errors_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        loaded(tmp_path / name)


def test_missing_files_and_wrong_splits_are_errors(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}])
    rows = datasets.Dataset.from_list([{"prompt": "q"}])
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"left": rows, "right": rows}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    table = [
        ("gone.jsonl", None, "there is no file"),
        ("prompts/gone", None, "there is no file"),
        ("a.jsonl", "train", "a file has none"),
        ("saved", "train", "this data set has no splits"),
        ("splits", None, "say which split to read; `split:` can be left, right"),
        ("splits", "wrong", "there is no split 'wrong'; `split:` can be left, right"),
        ("folder", None, "cannot be read as a data set"),
    ]
    for name, split, message in table:
        path = name if name.startswith(("gone", "prompts")) else tmp_path / name
        with pytest.raises(RecipeError, match=message):
            loaded(Path(path), split=split)
    assert len(loaded(tmp_path / "splits", split="right").train) == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [("owner/name", True), ("owner/name.v1", True), ("owner/name.jsonl", False), ("prompts/chat", False),
     ("name", False), ("a/b/c", False), ("/a/b", False), ("../b", False),
     ("owner/na me", False), ("owner/name\n", False)],
)  # fmt: skip
def test_hub_ids_are_told_from_paths(path: str, expected: bool) -> None:
    assert is_hub_id(path, find) is expected


READ_ONE = """
import sys
from pathlib import Path
from factory.errors import RecipeError
from factory.prompts import PromptSet, load

def find(path):
    if Path(path).exists():
        return Path(path)
    raise RecipeError("not here")

try:
    load([PromptSet(path=sys.argv[1])], 0, find)
except RecipeError as e:
    print("RecipeError:", e)
"""


def child(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh Python prints; its own process, because imports and their settings last as long as a process."""
    command = [sys.executable, "-c", code, *arguments]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reading_text_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'pyarrow', 'rensa', 'jinja2', 'numpy'}"
    code = f"import sys, factory.prompts, factory.asking; print(sorted({heavy} & sys.modules.keys()))"
    assert child(code) == "[]"


@pytest.mark.parametrize(
    ("library", "path"), [("pyarrow", "a.parquet"), ("datasets", "hub"), ("datasets", "owner/name")]
)
def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, library: str, path: str) -> None:
    write_all(tmp_path)
    hidden = f"import sys; sys.modules[{library!r}] = None  # as if it were not installed\n"
    told = child(hidden + READ_ONE, path if "/" in path else str(tmp_path / path))
    assert f"it needs {library}: pip install 'distillation-factory[parquet]'" in told


def test_a_hub_that_cannot_be_reached_is_an_error(tmp_path: Path) -> None:
    told = child(READ_ONE, "owner/no-such-list", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert told.startswith("RecipeError: owner/no-such-list: cannot be read as a data set")


def test_take_stops_reading_after_that_many_good_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "b"}\nthis line is never read\n')
    one = loaded(tmp_path / "a.jsonl", take=2)
    assert [prompt.text for prompt in one.train] == ["a", "b"]
    assert [(ending.row, ending.kind) for ending in one.endings] == [(1, "empty"), (3, "duplicate")]


# -- the split -------------------------------------------------------------------------------------------------------

THINGS = ["river", "candle", "violin", "planet", "bridge", "garden", "engine", "window", "forest", "island"]
VERBS = ["repairs", "paints", "counts", "hides", "sells", "moves", "draws", "opens", "weighs", "names"]


def question(i: int) -> str:
    """Questions that share no two words in a row."""
    return f"{THINGS[i % 10]}{i} {VERBS[i // 10 % 10]}{i} {THINGS[i * 3 % 10]}{i * 7} {VERBS[i * 7 % 10]}{i}"


def write_questions(path: Path, numbers: Iterable[int], extra: Iterable[str] = ()) -> Path:
    path.write_text("".join(text + "\n" for text in [*map(question, numbers), *extra]))
    return path


def ids(prompts: Iterable[Prompt]) -> set[str]:
    return {prompt.id for prompt in prompts}


def test_the_split_depends_on_content_and_seed_alone(tmp_path: Path) -> None:
    numbers = list(range(100))
    one = loaded(write_questions(tmp_path / "a.txt", numbers), held_out=20)
    random.Random(1).shuffle(numbers)
    shuffled = loaded(write_questions(tmp_path / "other name.txt", numbers), held_out=20)
    reseeded = loaded(tmp_path / "a.txt", held_out=20, seed=1)
    assert (len(one.test), len(one.train)) == (20, 80)
    assert ids(one.test) == ids(shuffled.test)
    assert not ids(one.test) & ids(one.train)
    assert [prompt.text for prompt in shuffled.test] == [
        question(i) for i in numbers if Prompt.of([{"role": "user", "content": question(i)}]).id in ids(shuffled.test)
    ]
    assert ids(one.test) != ids(reseeded.test)
    assert lint(PromptLists([one])) == []


@pytest.mark.parametrize("added", [1, 5, 40])
def test_added_rows_push_at_most_as_many_held_out_prompts_as_they_take(tmp_path: Path, added: int) -> None:
    before = loaded(write_questions(tmp_path / "a.txt", range(100)), held_out=20)
    after = loaded(write_questions(tmp_path / "b.txt", range(100 + added)), held_out=20)
    old, new = ids(before.test), ids(after.test)
    assert len(new) == 20
    assert not new & ids(before.train)  # what was trained on is never tested on
    assert len(old - new) == len(new - old) <= added


def test_near_duplicates_never_stand_on_both_sides(tmp_path: Path) -> None:
    long = [" ".join(f"{word}{i}" for word in THINGS + VERBS) for i in range(40)]
    path = write_questions(tmp_path / "a.txt", range(20), [*long, *(text + " please" for text in long)])
    straddled = 0
    for seed in range(5):
        one = loaded(path, held_out=31, seed=seed)
        train, test = ({prompt.text.removesuffix(" please") for prompt in side} for side in (one.train, one.test))
        assert not train & test
        assert 29 <= len(one.test) <= 31
        assert f"a: {one.straddling} groups of near-duplicates would stand in both" in lint(PromptLists([one]))[0]
        straddled += one.straddling
    assert straddled > 20


def test_a_shared_system_message_makes_no_near_duplicates(tmp_path: Path) -> None:
    shared = " ".join(f"{word}{i}" for i in range(20) for word in THINGS)
    one = loaded(
        jsonl(tmp_path / "a.jsonl", [{"prompt": question(i), "system": shared} for i in range(30)]), held_out=10
    )
    assert (len(one.test), one.straddling) == (10, 0)


def test_answers_to_one_question_stay_together_and_count_once(tmp_path: Path) -> None:
    rows = [{"prompt": question(i), "completion": str(draw)} for i in range(30) for draw in range(3)]
    one = loaded(jsonl(tmp_path / "a.jsonl", rows), held_out=10)
    assert (len(one.held_out), len(one.test), len(one.train)) == (10, 30, 60)
    assert not ids(one.test) & ids(one.train)


@pytest.mark.parametrize("held_out", [10, 11, 1000])
def test_holding_out_everything_is_an_error(tmp_path: Path, held_out: int) -> None:
    path = write_questions(tmp_path / "a.txt", range(10))
    with pytest.raises(RecipeError, match=f"held_out: {held_out} of 10 prompts leaves none to train on"):
        loaded(path, held_out=held_out)


def test_a_list_may_be_for_measuring_alone(tmp_path: Path) -> None:
    """All of it is held out, near-duplicates and all, and other lists lose what it asks."""
    probe = write_questions(tmp_path / "probe.txt", range(10))
    more = write_questions(tmp_path / "more.txt", range(8, 20))
    both = lists(probe={"path": str(probe), "held_out": "all"}, more={"path": str(more)})
    one, other = both
    assert (len(one.train), len(one.test), len(other.train)) == (0, 10, 10)
    assert not ids(one.test) & ids(other.train)
    assert not [line for line in lint(both) if line.startswith("probe")]


def test_holding_out_less_than_any_group_is_an_error(tmp_path: Path) -> None:
    text = " ".join(THINGS + VERBS)
    path = write_questions(tmp_path / "a.txt", [], [text, text + " please", text + " now"])
    with pytest.raises(RecipeError, match="less than any group of near-duplicates"):
        loaded(path, held_out=2)


def test_what_one_list_holds_out_is_in_no_other_lists_train_part(tmp_path: Path) -> None:
    text = " ".join(THINGS + VERBS)
    first = write_questions(tmp_path / "first.txt", range(20), [text])
    second = write_questions(tmp_path / "second.txt", range(10, 40), [text + " please"])
    removed = {"the same": 0, "nearly the same": 0}
    for seed in range(10):
        both = lists(seed, first={"path": str(first), "held_out": 10}, second={"path": str(second), "held_out": 5})
        tests = [*both.test("first"), *both.test("second")]
        trains = [*both.train("first"), *both.train("second")]
        assert not ids(tests) & ids(trains)
        assert not {p.text.removesuffix(" please") for p in tests} & {p.text.removesuffix(" please") for p in trains}
        for one in both:
            funnel = one.funnel
            assert funnel.in_ == funnel.kept + funnel.dropped == (21 if one.name == "first" else 31)
            assert funnel.kept == funnel.train + funnel.test
            assert {ending.kind for ending in one.endings} <= {"held_out_elsewhere"}
            assert any("held_out_elsewhere" in line for line in lint(both)) == any(one.endings for one in both)
            assert {ending.evidence for ending in one.endings} <= ids(tests)
            for ending in one.endings:
                removed["the same" if ending.evidence == ending.id else "nearly the same"] += 1
    assert removed["the same"] > 10
    assert removed["nearly the same"] > 0


def test_every_answer_to_a_question_that_is_held_out_elsewhere_is_counted(tmp_path: Path) -> None:
    first = write_questions(tmp_path / "first.txt", range(30))
    rows = [{"prompt": question(i), "completion": str(draw)} for i in range(60) for draw in range(2)]
    both = lists(first={"path": str(first), "held_out": 10}, second={"path": str(jsonl(tmp_path / "b.jsonl", rows))})
    funnel = both.by_name["second"].funnel
    assert (funnel.in_, funnel.train, funnel.dropped) == (120, 100, 20)
    assert not ids(both.test("first")) & ids(both.train("second"))


def test_two_lists_of_one_name_are_refused(tmp_path: Path) -> None:
    path = str(write_questions(tmp_path / "a.txt", range(3)))
    with pytest.raises(RecipeError, match="two lists are called 'a'"):
        load([PromptSet(path=path), PromptSet(path=path)], 0, find)


def test_the_digest_changes_with_what_a_stage_would_see(tmp_path: Path) -> None:
    def digest_of(rows: list[dict[str, Any]], **knobs: Any) -> str:
        path = jsonl(tmp_path / "a.jsonl", rows)
        return load([PromptSet(path=str(path), **knobs)], 0, find).digest("a")

    rows = [{"prompt": question(i), "reference": "r"} for i in range(6)]
    same = [{"unused": 1, **row} for row in rows]
    others = [
        digest_of(rows[::-1]), digest_of(rows[:5]), digest_of(rows, held_out=2),
        digest_of(rows, columns={"tags": "reference"}),
        digest_of([*rows[:5], {**rows[5], "reference": "s"}]), digest_of([*rows[:5], {**rows[5], "completion": "c"}]),
    ]  # fmt: skip
    assert digest_of(rows) == digest_of(same)
    assert len({digest_of(rows), *others}) == 7


# -- what ships ------------------------------------------------------------------------------------------------------

SHIPPED = [("everyday", 110, True), ("chat", 60, False), ("tasks", 60, True), ("simple_sentences", 60, True)]


@pytest.mark.parametrize(("name", "count", "references"), SHIPPED)
def test_shipped_lists_load_without_a_finding(name: str, count: int, references: bool) -> None:
    both = lists(**{name: {"path": f"prompts/{name}.jsonl", "held_out": count // 3}})
    prompts = [*both.train(name), *both.test(name)]
    assert lint(both) == []
    assert len(ids(prompts)) == count
    assert all(bool(prompt.reference) == references for prompt in prompts)
    assert all(prompt.text == prompt.text.strip() for prompt in prompts)
    if name == "everyday":
        assert all(len(str(prompt.reference).split()) <= 4 for prompt in prompts)


def test_no_question_ships_twice() -> None:
    files = sorted(path.stem for path in (ROOT / "prompts").glob("*.jsonl") if path.stem != "canaries")  # for judges
    assert files == sorted(["answers", *(name for name, *_ in SHIPPED)])
    every = lists(**{name: {"path": f"prompts/{name}.jsonl"} for name in files})
    assert len({prompt.id for one in every for prompt in one.train}) == 12 + sum(count for _, count, _ in SHIPPED)


def test_the_shipped_answers_come_with_ratings() -> None:
    columns = {"prompt": "prompt", "completion": "completion", "score": "rating"}
    one = lists(answers={"path": "prompts/answers.jsonl", "columns": columns}).by_name["answers"]
    assert (one.answers, one.again, one.scores, one.endings) == (24, 12, {"score"}, [])
    assert sum(not prompt.scores for prompt in one.train) == 1  # "N/A" is missing, not zero
    assert "| `answers.jsonl` | 24 |" in (ROOT / "prompts" / "README.md").read_text(encoding="utf-8")


def test_the_readme_tells_the_rows_of_every_shipped_file() -> None:
    text = (ROOT / "prompts" / "README.md").read_text(encoding="utf-8")
    for name, count, _ in SHIPPED:
        assert f"| `{name}.jsonl` | {count} |" in text
    for path in (ROOT / "prompts").glob("*.*"):
        assert path.name == "README.md" or f"`{path.name}`" in text
