"""A row as a prompt: known forms, what is left out and why, columns and templates."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.errors import RecipeError
from factory.generate import given as samples_of
from factory.prompt_spool import side_by_side
from factory.prompts import MAX_CHARACTERS, PromptLists, PromptSet, lint
from tests.prompt_lists import jsonl, loaded, short

# -- rows ------------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

FORMS = [
    ({"prompt": "q"}, "u:q"),
    ({"prompt": "q", "completion": "a"}, "u:q =a"),
    ({"prompt": "q", "completion": CHAT[1:]}, "u:q =a"),
    ({"prompt": "q", "completion": "  "}, "u:q"),
    ({"prompt": "q", "completion": None, "extra": {"x": 1}}, "u:q"),
    ({"prompt": CHAT[:1]}, "u:q"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "u:q =a"),
    ({"prompt": "q", "system": "s"}, "s:s u:q"),
    ({"prompt": "q", "system": " "}, "u:q"),
    ({"prompt": 7, "reference": 8.5}, "u:7"),
    ({"messages": CHAT}, "u:q =a"),
    ({"messages": CHAT + CHAT[:1]}, "u:q a:a u:q"),
    ({"messages": [{"role": "system", "content": "s"}, *CHAT]}, "s:s u:q =a"),
    ({"messages": [{"role": "system", "content": ""}, *CHAT]}, "u:q =a"),
    ({"messages": CHAT, "system": "s"}, "s:s u:q =a"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "u:q =a"),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"}]}, "s:s u:q"),
    ({"instruction": "q", "input": "", "output": "a"}, "u:q =a"),
    ({"instruction": "q", "input": "text", "output": ""}, "u:q\n\ntext"),
    ({"instruction": "q", "input": "text", "output": "a", "system": "s"}, "s:s u:q\n\ntext =a"),
    ({"id": "flan.1", "system_prompt": "s", "question": "q", "response": "a"}, "s:s u:q =a"),
    ({"id": "flan.2", "system_prompt": "", "question": "q"}, "u:q"),
]


@pytest.mark.parametrize(("row", "expected"), FORMS, ids=lambda value: str(value)[:60])
def test_rows_of_known_forms_are_recognised(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    assert short(loaded(jsonl(tmp_path / "a.jsonl", [row])).train[0]) == expected


@pytest.mark.parametrize(
    ("tags", "expected"),
    [(["a", "b"], ["a", "b"]), ("a, b,", ["a", "b"]), (None, []), ("", [])],
)
def test_reference_and_tags_stand_beside_any_form(tmp_path: Path, tags: Any, expected: list[str]) -> None:
    row = {"messages": CHAT, "reference": 42, "tags": tags}
    (prompt,) = loaded(jsonl(tmp_path / "set.jsonl", [row])).train
    assert (prompt.reference, prompt.tags, prompt.source) == ("42", expected, "set")


LEFT_OUT = [
    ({"prompt": ""}, "empty"),
    ({"prompt": None}, "empty"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "empty"),
    ({"prompt": "x" * (MAX_CHARACTERS + 1)}, f"over_long={MAX_CHARACTERS + 1}>{MAX_CHARACTERS}"),
    ({"prompt": "good", "reference": "r"}, "duplicate: of line 1"),
    ({"prompt": ["good"]}, "unreadable: messages are not a list of turns"),
    ({"prompt": {"text": "q"}}, "unreadable: prompt is not text but dict"),
    ({"prompt": "q", "reference": ["x"]}, "unreadable: reference is not text but list"),
    ({"prompt": "q", "completion": CHAT}, "unreadable: the completion is not one assistant message"),
    ({"messages": []}, "unreadable: no question"),
    ({"messages": "q"}, "unreadable: messages are not"),
    ({"messages": CHAT[1:]}, "unreadable: no question"),
    ({"messages": [*CHAT, CHAT[1]]}, "unreadable: no question"),
    ({"messages": CHAT, "completion": "b"}, "unreadable: two answers"),
    ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "t"}, "unreadable: two system messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unreadable: turn 0 has the role 'tool'"),
    ({"messages": [{"role": "\x1b[2J", "content": "x"}]}, "unreadable: turn 0 has the role '\\x1b[2J'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unreadable: turn 0 has the role"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "unreadable: turn 0 holds no text"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, "unreadable: turn 0 has the role"),
    ({"instruction": "q", "history": [["a", "b"]]}, "unreadable: Alpaca's history"),
]


@pytest.mark.parametrize(("row", "reason"), LEFT_OUT, ids=lambda value: str(value)[:60])
def test_rows_that_are_no_prompt_end_with_a_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    one = loaded(jsonl(tmp_path / "a.jsonl", [{"prompt": "good", "reference": "r"}, row]))
    (ending,) = one.endings
    assert ending.row == 2
    assert ending.reason.startswith(reason)
    funnel = one.funnel
    failed = int(reason.startswith("unreadable"))
    assert (funnel.in_, funnel.kept, funnel.dropped, funnel.failed) == (2, 1, 1 - failed, failed)
    assert funnel.reasons == {ending.kind: 1}
    assert lint(PromptLists([one])) == [f"a: 1 of 2 rows left out: {ending.kind} (first: line 2, {ending.reason})"]


def test_the_same_question_with_another_answer_is_data_and_with_another_reference_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": answer} for answer in ("a", "b", "a")]
    one = loaded(jsonl(tmp_path / "a.jsonl", rows))
    assert [prompt.completion for prompt in one.train] == ["a", "b"]
    assert len({prompt.id for prompt in one.train}) == 1
    (ending,) = one.endings
    assert (ending.row, ending.reason, ending.evidence) == (3, "duplicate: of line 1", one.train[0].id)

    jsonl(tmp_path / "b.jsonl", [{"prompt": "q", "reference": "1"}, {"prompt": "p"}, {"prompt": "q", "reference": "2"}])
    with pytest.raises(RecipeError, match=r"b\.jsonl: lines 1 and 3 ask the same.*differ: '1' and '2'"):
        loaded(tmp_path / "b.jsonl")


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": SCALARS}))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({"prompt": SCALARS | TURNS}, optional={"completion": SCALARS}), max_size=12))
def test_every_row_ends_somewhere(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one = loaded(jsonl(Path(folder) / "a.jsonl", [{"prompt": "the first one is good"}, *rows]))
    lines = [line for line, _ in one.kept] + [ending.row for ending in one.endings]
    assert sorted(lines) == list(range(1, len(rows) + 2))
    funnel = one.funnel
    assert funnel.in_ == funnel.kept + funnel.dropped + funnel.failed == len(rows) + 1
    assert sum(funnel.reasons.values()) == funnel.dropped + funnel.failed


WORDS = st.text(min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.none() | WORDS, st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.booleans())
def test_sharegpt_comes_back_as_it_went_in(system: str | None, pairs: list[tuple[str, str]], answered: bool) -> None:
    turns = [
        ("user", "human", q) if i % 2 == 0 else ("assistant", "gpt", q) for pair in pairs for i, q in enumerate(pair)
    ]
    turns = [("system", "system", system), *turns] if system else turns
    turns = turns if answered else turns[:-1]
    with tempfile.TemporaryDirectory() as folder:
        row = {"conversations": [{"from": sender, "value": text} for _, sender, text in turns]}
        (prompt,) = loaded(jsonl(Path(folder) / "a.jsonl", [row])).train
    answer = [] if prompt.completion is None else [("assistant", prompt.completion)]
    assert [(m["role"], m["content"]) for m in prompt.messages] + answer == [(role, text) for role, _, text in turns]
    assert (prompt.completion is not None) == answered


@settings(max_examples=60, deadline=None)
@given(WORDS, st.just("") | WORDS, WORDS, st.just("") | WORDS)
def test_alpaca_comes_back_as_it_went_in(instruction: str, text: str, output: str, system: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        row = {"instruction": instruction, "input": text, "output": output, "system": system}
        (prompt,) = loaded(jsonl(Path(folder) / "a.jsonl", [row])).train
    assert prompt.text == (f"{instruction}\n\n{text}" if text else instruction)
    assert prompt.completion == output
    assert [m["content"] for m in prompt.messages if m["role"] == "system"] == ([system] if system else [])


# -- columns and templates -------------------------------------------------------------------------------------------

ROW = {
    "question": "Why?",
    "hint": None,
    "choices": ["red", "blue"],
    "meta": {"items": "five", "level": 2},
    "my col": "x",
}

COLUMNS = [
    ({"prompt": "question"}, "u:Why?"),
    ({"prompt": "my col", "system": "question"}, "s:Why? u:x"),
    ({"prompt": "question", "completion": "my col"}, "u:Why? =x"),
    ({"prompt": "{{ question }} ({{ my_col|default('none') }})"}, "u:Why? (none)"),
    ({"prompt": "{{ question }}{{ hint }}"}, "u:Why?"),
    ({"prompt": "{{ meta.items }} {{ meta['level'] }} {{ choices[0] }} {{ choices[-1]|upper }}"}, "u:five 2 red BLUE"),
    ({"prompt": "{{ choices|join(' or ') }}?"}, "u:red or blue?"),
    ({"prompt": "{% for c in choices %}{{ loop.index }}) {{ c|trim }}{% if not loop.last %}\n{% endif %}{% endfor %}"},
     "u:1) red\n2) blue"),
    ({"prompt": "{{ question[:2] if meta.level > 1 else 'no' }}\n"}, "u:Wh\n"),
    ({"prompt": "{% if hint is none and 'red' in choices %}{{ question }}{% endif %}"}, "u:Why?"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "expected"), COLUMNS, ids=lambda value: str(value)[:60])
def test_columns_are_names_or_templates(tmp_path: Path, columns: dict[str, str], expected: str) -> None:
    assert short(loaded(jsonl(tmp_path / "a.jsonl", [ROW]), columns=columns).train[0]) == expected


def test_columns_beside_a_recognised_form_replace_only_what_they_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "gold": "g", "topic": "maths, hard"}])
    (prompt,) = loaded(path, columns={"reference": "gold", "tags": "topic"}).train
    assert (short(prompt), prompt.reference, prompt.tags) == ("u:q =a", "g", ["maths", "hard"])


def test_what_rows_hold_is_never_compiled(tmp_path: Path) -> None:
    payload = "{{ 7 * 7 }}{% for i in range(9) %}{{ ''.__class__ }}{% endfor %}"
    path = jsonl(tmp_path / "a.jsonl", [{"q": payload}])
    for columns in ({"prompt": "q"}, {"prompt": "{{ q }}"}, {"prompt": "{{ q|trim }}"}):
        assert loaded(path, columns=columns).train[0].text == payload


REFUSED = [
    ("{{ question.__class__ }}", "is undefined|no attribute"),
    ("{{ ''.__class__.__mro__ }}", "is undefined|no attribute"),
    ("{{ question['__class__'] }}", "is undefined|no attribute"),
    ("{{ meta.keys }}", "is undefined|no attribute"),
    ("{% for c in choices %}{{ loop.__init__ }}{% endfor %}", "unsafe|undefined"),
    ("{% for c in choices %}{{ loop.cycle }}{% endfor %}", "unsafe|undefined"),
    ("{{ self }}", "'self' is the template"),
    ("{{ range }}", "is undefined"),
    ("{{ qestion }}", "'qestion' is undefined; the row has 'question', 'hint'"),
    ("{{ meta.nothing }}", "has no attribute 'nothing'"),
    ("{{ hint.x }}", "has no attribute"),
    ("{{ question|attr('__class__') }}", "No filter named 'attr'"),
    ("{{ question|center(1000000000) }}", "No filter named 'center'"),
    ("{{ question|replace('', question) }}", "No filter named 'replace'"),
    ("{{ choices|join('x' * 1000000000) }}", "Mul is not allowed"),
    ("{{ question.upper() }}", "Call is not allowed"),
    ("{{ range(1000000000)|join }}", "Call is not allowed"),
    ("{% for i in range(1000000000) %}{% endfor %}", "Call is not allowed"),
    ("{{ lipsum(n=100000) }}", "Call is not allowed"),
    ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "Call is not allowed"),
    ("{{ 'a' * 1000000000 }}", "Mul is not allowed"),
    ("{{ 10 ** 10 ** 10 }}", "Pow is not allowed"),
    ("{{ '%0999999999d' % 1 }}", "Mod is not allowed"),
    ("{{ question ~ question }}", "Concat is not allowed"),
    ("{{ question + question }}", "Add is not allowed"),
    ("{% set x = question %}{{ x }}", "Assign is not allowed"),
    ("{% macro m() %}{% endmacro %}", "Macro is not allowed"),
    ("{% include 'a.txt' %}", "Include is not allowed"),
    ("{% import 'os' as os %}", "Import is not allowed"),
    ("{% extends 'a.txt' %}", "Extends is not allowed"),
    ("{% for a in choices %}{% for b in choices %}{% endfor %}{% endfor %}", "a loop inside a loop is not allowed"),
    ("{% for a in choices recursive %}{{ loop(a) }}{% endfor %}", "not allowed"),
    ("{{ question", "not a template"),
    ("{% if %}", "not a template"),
    ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "not a template"),
    ("{{ question }}" * 800, "longer than 10000 characters"),
    ("{{question}}" * 700, "parts are more than 600"),
    ("{{ question > 3 }}", "the template fails: TypeError"),
]


@pytest.mark.parametrize(("template", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_templates_that_reach_out_or_blow_up_are_refused(tmp_path: Path, template: str, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(RecipeError, match=rf"(?s)columns\.prompt.*({message})"):
        loaded(path, columns={"prompt": template})


def test_a_template_that_renders_too_much_ends_the_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"xs": ["y" * 50_000] * 30}, {"xs": ["ok"]}])
    for template in (
        "{% for x in xs %}{{ x }}{% endfor %}",
        "{{ xs|join }}",
        "{{ xs|join(', ')|first }}",
        "{{ xs|tojson|first }}",
    ):
        one = loaded(path, columns={"prompt": template})
        assert [(ending.row, ending.reason) for ending in one.endings] == [
            (1, "unreadable: columns.prompt renders to too much text")
        ]
        assert one.train[0].text in ("ok", "o", "[")


def test_a_value_as_json_cannot_grow_by_being_escaped_again(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"x": '"' * 1000}])
    with pytest.raises(RecipeError, match="renders to too much text"):
        loaded(path, columns={"prompt": "{{ x" + "|tojson" * 100 + " }}"})
    one = loaded(jsonl(tmp_path / "b.jsonl", [{"x": {"<b>": [None, "é"]}}]), columns={"prompt": "{{ x|tojson }}"})
    assert json.loads(one.train[0].text) == {"<b>": [None, "é"]}


WRONG_COLUMNS = [
    ({"prompt": "questoin"}, r"a\.jsonl:1: columns\.prompt: there is no column 'questoin'; did you mean 'question'\?"),
    ({"reference": "gold"}, r"none of the known forms"),
    ({"prompt": "question", "tags": "zzz"}, r"columns\.tags: there is no column 'zzz'; the row has 'question', 'hint'"),
    ({"messages": "{{ question }}"}, r"columns\.messages: a template makes text"),
]


@pytest.mark.parametrize(("columns", "message"), WRONG_COLUMNS)
def test_wrong_columns_are_errors_that_name_the_right_ones(tmp_path: Path, columns: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loaded(jsonl(tmp_path / "a.jsonl", [ROW]), columns=columns)


@pytest.mark.parametrize(
    "knobs",
    [
        {"columns": {"prompt": "a", "messages": "b"}},
        {"columns": {"question": "a"}},
        {"take": 0},
        {"held_out": -1},
        {"x": 1},
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        PromptSet(path="a.txt", **knobs)


@pytest.mark.parametrize(
    ("knobs", "title"),
    [
        ({"path": "a/chat.v2.jsonl"}, "chat.v2"),
        ({"path": "owner/list.v1"}, "list.v1"),
        ({"path": "a.txt", "name": "n"}, "n"),
    ],
)
def test_a_list_is_called_by_its_name_or_its_file(knobs: dict[str, Any], title: str) -> None:
    assert PromptSet(**knobs).title == title


# -- scores and preferences --------------------------------------------------------------------------------------------

WORSE = [CHAT[0], {"role": "assistant", "content": "b"}]
LONG = [CHAT[0], CHAT[1], {"role": "user", "content": "r"}]
PREFERENCES = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "u:q =a"),
    ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": WORSE[1:]}, "u:q =a"),
    ({"chosen": CHAT, "rejected": WORSE}, "u:q =a"),
    ({"prompt": "q", "chosen": CHAT, "rejected": WORSE, "completion": None}, "u:q =a"),
    ({"prompt": "r", "chosen": [*LONG, CHAT[1]], "rejected": [*LONG, WORSE[1]]}, "u:q a:a u:r =a"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, "s:s u:q =a"),
    ({"instruction": "q", "chosen": "a", "rejected": "b"}, "u:q =a"),
]


@pytest.mark.parametrize(("row", "expected"), PREFERENCES, ids=lambda value: str(value)[:60])
def test_a_preference_is_one_row_with_two_answers(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    (prompt,) = loaded(jsonl(tmp_path / "a.jsonl", [row])).train
    assert (short(prompt), prompt.rejected, prompt.scores) == (expected, "b", {"label": 1.0})
    better, worse = samples_of([prompt])
    assert [(s.response, s.scores, s.draw) for s in (better, worse)] == [
        ("a", {"label": 1.0}, 0),
        ("b", {"label": 0.0}, 1),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected does not end with an answer"),
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, "chosen and rejected are the same"),
        ({"prompt": "p", "chosen": CHAT, "rejected": WORSE}, "chosen holds another prompt than the row"),
        ({"chosen": CHAT, "rejected": [LONG[2], WORSE[1]]}, "chosen and rejected answer different prompts"),
        ({"chosen": CHAT[:1], "rejected": WORSE}, "chosen does not end with an answer"),
        ({"chosen": CHAT[1:], "rejected": WORSE[1:]}, "no question"),
        ({"prompt": "q", "chosen": 3.5, "rejected": {"x": 1}}, "rejected is not text but dict"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_preferences_that_contradict_themselves_are_unreadable(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    one = loaded(jsonl(tmp_path / "a.jsonl", [{"prompt": "good"}, row]))
    assert [ending.reason.removeprefix("unreadable: ")[: len(reason)] for ending in one.endings] == [reason]


SCORES = [
    (4, {"score": 4.0}),
    ("4.5", {"score": 4.5}),
    (0, {"score": 0.0}),
    (None, {}),
    ("", {}),
    ("N/A", {}),
    ("nan", {}),
    ("1e999", {}),
]


@pytest.mark.parametrize(("value", "scores"), SCORES)
def test_a_score_that_nobody_gave_is_missing(tmp_path: Path, value: Any, scores: dict[str, float]) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "rating": value}])
    one = loaded(path, columns={"prompt": "prompt", "completion": "completion", "score": "rating"})
    assert one.train[0].scores == scores
    assert [sample.scores for sample in samples_of(one.train)] == [scores]
    assert one.scores == set(scores)


@pytest.mark.parametrize("value", ["good", True, [1], "1/10"])
def test_a_score_that_is_no_number_is_unreadable(tmp_path: Path, value: Any) -> None:
    rows = [{"prompt": "p", "rating": 1}, {"prompt": "q", "completion": "a", "rating": value}]
    one = loaded(jsonl(tmp_path / "a.jsonl", rows), columns={"prompt": "prompt", "score": "rating"})
    assert [ending.reason for ending in one.endings] == [f"unreadable: score is not a number but {str(value)!r}"]


@pytest.mark.parametrize(
    ("label", "scores"), [(1, {"label": 1.0}), ("0", {"label": 0.0}), (False, {"label": 0.0}), (None, {})]
)
def test_a_column_that_is_named_as_the_label_may_hold_one_and_nought(
    tmp_path: Path, label: Any, scores: dict[str, float]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": "q", "a": "a", "good": label}, {"q": "r", "a": "a", "good": "maybe"}])
    one = loaded(path, columns={"prompt": "q", "completion": "a", "label": "good"})
    assert [prompt.scores for prompt in one.train] == [scores]
    assert [ending.reason for ending in one.endings] == ["unreadable: label is not true or false but 'maybe'"]


def test_a_label_counts_where_only_the_other_columns_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": "q", "a": "a", "label": False}])
    one = loaded(path, columns={"prompt": "q", "completion": "a"})
    assert [prompt.scores for prompt in one.train] == [{"label": 0.0}]


@pytest.mark.parametrize(
    ("label", "scores"),
    [
        (True, {"label": 1.0}),
        (False, {"label": 0.0}),
        ("FALSE", {"label": 0.0}),
        (1, {}),
        ("x", {}),
        (None, {}),
        ("", {}),
    ],
)
def test_only_a_label_that_is_true_or_false_is_one_of_ktos(
    tmp_path: Path, label: Any, scores: dict[str, float]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "label": label}])
    assert loaded(path).train[0].scores == scores


def test_nan_in_a_table_is_nothing(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["p", "q"], "completion": ["a", "b"], "reference": [5.0, float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [prompt.reference for prompt in loaded(tmp_path / "a.parquet").train] == ["5.0", None]


def test_columns_name_a_preference(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": "q", "win": "a", "lose": "b"}, {"q": "r", "win": CHAT, "lose": WORSE}])
    columns = {"prompt": "q", "chosen": "win", "rejected": "lose"}
    one = loaded(path, columns=columns)
    assert [short(prompt) for prompt in one.train] == ["u:q =a"]  # the second answers `q`, not `r`
    del columns["prompt"]
    assert [short(prompt) for prompt in loaded(path, columns=columns).train] == ["u:q =a"]


def test_answers_to_one_prompt_come_together_wherever_they_stand(tmp_path: Path) -> None:
    rows = [{"prompt": q, "completion": a} for q, a in [("p", "1"), ("q", "2"), ("r", "3"), ("p", "4"), ("q", "5")]]
    one = loaded(jsonl(tmp_path / "a.jsonl", rows))
    assert [(s.prompt.text, s.response, s.draw) for s in samples_of(side_by_side(one.train))] == [
        ("p", "1", 0), ("p", "4", 1), ("q", "2", 0), ("q", "5", 1), ("r", "3", 0),
    ]  # fmt: skip


def test_another_rejected_answer_is_another_row_and_the_same_one_a_duplicate(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": worse} for worse in ("b", "c", "b")]
    one = loaded(jsonl(tmp_path / "a.jsonl", rows))
    assert [prompt.rejected for prompt in one.train] == ["b", "c"]
    assert [(ending.row, ending.kind) for ending in one.endings] == [(3, "duplicate")]


def test_one_answer_with_two_scores_is_told_and_the_first_stands(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False, True)]
    one = loaded(jsonl(tmp_path / "a.jsonl", rows))
    assert [prompt.scores for prompt in one.train] == [{"label": 1.0}]
    assert [ending.reason for ending in one.endings] == ["scored_twice: of line 1", "duplicate: of line 1"]
