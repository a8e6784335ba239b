"""Seam 1, what is said: system messages merged, worked examples, explanation messages by weight and gate."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pydantic
import pytest

from factory.asking import AskKnob, Examples, Explain, Plain
from factory.asking.explain import ExplainAsker, is_multiple_choice
from factory.errors import RecipeError
from factory.rows import Message, Prompt
from tests.prompt_lists import ROOT, find, jsonl, lists, short


def prompt(text: str = "q", system: str | None = None, tags: list[str] | None = None) -> Prompt:
    own = [Message(role="system", content=system)] if system is not None else []
    return Prompt.of([*own, Message(role="user", content=text)], tags=tags or [])


def said(messages: list[Message]) -> str:
    return short(Prompt.of(messages))


# -- spelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "knobs"),
    [
        ("plain", Plain()),
        ({"plain": None}, Plain()),
        ("explain", Explain()),
        ({"explain": {"path": "x.yaml"}}, Explain(path="x.yaml")),
        ({"explain": "x.yaml"}, Explain(path="x.yaml")),
        ({"examples": "x.yaml"}, Examples(path="x.yaml")),
        ({"examples": {"path": "x.jsonl", "system": "s"}}, Examples(path="x.jsonl", system="s")),
    ],
)
def test_recipes_write_a_name_or_a_one_key_map(written: Any, knobs: Any) -> None:
    assert pydantic.TypeAdapter(AskKnob).validate_python(written) == knobs


@pytest.mark.parametrize("written", ["plane", "examples", {"plain": {"x": 1}}, {"examples": {"path": "x", "n": 3}}, 5])
def test_other_spellings_are_refused(written: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        pydantic.TypeAdapter(AskKnob).validate_python(written)


# -- plain and examples ----------------------------------------------------------------------------------------------

ROWS = [{"prompt": "e1", "completion": "a1"}, {"prompt": "e2", "completion": "a2"}]

SAID = [
    # the file's system, the recipe's, the prompt's -> what is said
    ("file", None, None, "s:file u:e1 a:a1 u:e2 a:a2 u:q"),
    ("file", "recipe", None, "s:recipe u:e1 a:a1 u:e2 a:a2 u:q"),
    ("file", "", None, "u:e1 a:a1 u:e2 a:a2 u:q"),
    ("file", None, "own", "s:file\n\nown u:e1 a:a1 u:e2 a:a2 u:q"),
    (None, None, "own", "s:own u:e1 a:a1 u:e2 a:a2 u:q"),
    (None, None, None, "u:e1 a:a1 u:e2 a:a2 u:q"),
]


@pytest.mark.parametrize(("file", "recipe", "own", "expected"), SAID)
def test_examples_come_between_the_system_message_and_the_prompt(
    tmp_path: Path, file: str | None, recipe: str | None, own: str | None, expected: str
) -> None:
    head = f"system: {file}\n" if file else ""
    body = "examples:\n" + "".join(
        f"  - {{prompt: {row['prompt']}, completion: {row['completion']}}}\n" for row in ROWS
    )
    (tmp_path / "e.yaml").write_text(head + body)
    asker = Examples(path=str(tmp_path / "e.yaml"), system=recipe).open(find)
    asked = prompt(system=own)
    assert said(asker.messages(asked, 0)) == expected
    assert said(Plain().open(find).messages(asked, 0)) == said(asked.messages)  # the prompt itself is unchanged


def test_examples_are_read_from_json_lines_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "e.jsonl", ROWS)
    asker = Examples(path=str(path), system="s").open(find)
    assert said(asker.messages(prompt(), 0)) == "s:s u:e1 a:a1 u:e2 a:a2 u:q"


def test_examples_keep_conversations_whole(tmp_path: Path) -> None:
    turns = [Message(role="user", content="e"), Message(role="assistant", content="a")]
    path = jsonl(tmp_path / "e.jsonl", [{"messages": turns * 2}])
    talk = Prompt.of([*turns, Message(role="user", content="q")])
    assert said(Examples(path=str(path)).open(find).messages(talk, 0)) == "u:e a:a u:e a:a u:e a:a u:q"


BAD_EXAMPLES = [
    ("e.yaml", "- prompt: x\n", r"e\.yaml:1: write a map with `examples:`"),
    ("e.yaml", "", r"e\.yaml:1: write a map with `examples:`"),
    ("e.yaml", "examples: []\n", r"there are no examples in it"),
    ("e.yaml", "sytem: x\nexamples: []\n", r"e\.yaml:1: unknown key 'sytem'; known here: system, examples"),
    ("e.yaml", "system: [x]\nexamples: []\n", r"e\.yaml:1: system must be a text"),
    ("e.yaml", "examples:\n  - {prompt: x, completion: y}\n  - {prompt: x}\n", r"e\.yaml:3: a worked example needs"),
    ("e.yaml", "examples:\n  - {question: x}\n", r"e\.yaml:2: none of the known forms"),
    ("e.yaml", "examples:\n  - {prompt: [x], completion: y}\n", r"e\.yaml:2: not a worked example: messages are not"),
    ("e.yaml", "examples:\n  - just text\n", r"e\.yaml:2: not a worked example: it is not a map"),
    ("e.yaml", "examples:\n  - {prompt: x, completion: y, system: z}\n", r"e\.yaml:2: a worked example has no system"),
    ("e.yaml", "examples: [\n", r"e\.yaml:\d: not YAML"),
    ("e.yaml", "examples: []\nexamples: []\n", r"e\.yaml:2: the key 'examples' appears twice"),
    ("e.jsonl", '{"prompt": "x", "completion": "y"}\n\n{"prompt": "x"}\n', r"e\.jsonl:3: a worked example needs"),
    ("e.jsonl", '{"prompt": "x", \n', r"e\.jsonl:1:\d+: not JSON"),
    ("e.jsonl", "", r"there are no examples in it"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_EXAMPLES, ids=lambda value: str(value)[:50])
def test_bad_examples_are_errors_with_their_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        Examples(path=str(tmp_path / name)).open(find)


@pytest.mark.parametrize("ask", [Examples(path="gone.yaml"), Explain(path="gone.yaml")])
def test_missing_files_are_errors(ask: Any) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml"):
        ask.open(find)


# -- explanations ----------------------------------------------------------------------------------------------------

WEIGHTED = """
- {id: blank, text: ""}
- {id: rare, weight: 0.5, text: rare}
- {id: often, weight: 3, text: often}
- {id: never, weight: 0, text: never}
- {id: options, only: multiple_choice, text: options}
"""

IDS = [prompt(f"question {i}") for i in range(4000)]
CHOICES = [prompt(f"question {i}\nA) one\nB) two") for i in range(4000)]


def explaining(path: Path, content: str = WEIGHTED) -> ExplainAsker:
    path.write_text(content)
    return Explain(path=str(path)).open(find)


def chi_square(counts: Counter[str], weights: dict[str, float]) -> float:
    total, weight = counts.total(), sum(weights.values())
    return sum((counts[id_] - total * w / weight) ** 2 / (total * w / weight) for id_, w in weights.items())


def test_messages_are_chosen_by_weight(tmp_path: Path) -> None:
    asker = explaining(tmp_path / "e.yaml")
    for_all = {"blank": 1.0, "rare": 0.5, "often": 3.0}
    for seed in range(3):
        free = Counter(asker.pick(one, seed).id for one in IDS)
        choice = Counter(asker.pick(one, seed).id for one in CHOICES)
        assert free.keys() == for_all.keys()
        assert chi_square(free, for_all) < 13.8  # 2 degrees of freedom, p = 0.001
        assert chi_square(choice, for_all | {"options": 1.0}) < 16.3  # 3 degrees


def test_the_shipped_messages_are_even_and_keep_the_gate() -> None:
    asker = Explain().open(find)
    for prompts, expected, limit in ((IDS, 14, 34.5), (CHOICES, 16, 37.7)):  # 13 and 15 degrees, p = 0.001
        picked = [asker.pick(one, 7) for one in prompts]
        counts = Counter(explanation.id for explanation in picked)
        assert len(counts) == expected
        assert chi_square(counts, dict.fromkeys(counts, 1.0)) < limit
        assert any(explanation.only for explanation in picked) == (prompts is CHOICES)


def test_what_is_said_to_a_prompt_depends_on_it_and_the_seed_alone() -> None:
    before = {one.id: Explain().open(find).messages(one, 7) for one in IDS[:200]}
    others = IDS[50:150]
    random.Random(0).shuffle(others)
    asker = Explain().open(find)
    assert {one.id: asker.messages(one, 7) for one in others} == {one.id: before[one.id] for one in others}
    assert sum(asker.messages(one, 8) != before[one.id] for one in IDS[:200]) > 150


def test_the_prompts_own_system_message_follows_ours(tmp_path: Path) -> None:
    asker = explaining(tmp_path / "e.yaml")
    for i in range(100):
        one = prompt(f"question {i}", system="own")
        ours = asker.pick(one, 0).text
        assert said(asker.messages(one, 0)) == (f"s:{ours}\n\nown u:" if ours else "s:own u:") + f"question {i}"


@pytest.mark.parametrize(
    ("text", "tags", "expected"),
    [
        ("Which?\nA) x\nB) y", [], True), ("Which?\n(a) x\n(b) y", [], True), ("Which?\n A. x\n B. y\n C. z", [], True),
        ("Which?\n1. x\n2. y", [], True), ("Which?\n1) x\n2) y", [], True), ("Which?\nA: x\nB: y", [], True),
        ("Which of these?", ["multiple_choice"], True), ("Which of these?", ["logic"], False),
        ("Which?\nA) x", [], False), ("Which?\nB) x\nC) y", [], False), ("A) x B) y", [], False),
        ("2. March\n3. April", [], False), ("I. went\nto town", [], False), ("A.I. is\nB.C. was", [], False),
    ],
)  # fmt: skip
def test_multiple_choice_is_told_by_tag_or_by_option_lines(text: str, tags: list[str], expected: bool) -> None:
    assert is_multiple_choice(prompt(text, tags=tags)) is expected


BAD_EXPLANATIONS = [
    ("", r"e\.yaml:1: "),
    ("messages: []\n", r"e\.yaml:1: .*valid list"),
    (
        "- {id: a, text: x}\n- {id: b, txt: y}\n",
        r"(?s)e\.yaml:2: 1\.text is missing.*e\.yaml:2: unknown key '1\.txt'; did you mean 'text'\?",
    ),
    ("- {id: a, text: x}\n- {id: a, text: y}\n", r"e\.yaml:2: the id 'a' appears twice"),
    ("- {id: a, text: x, weight: -1}\n", r"e\.yaml:1: 0\.weight: .*greater than or equal to 0"),
    ("- {id: a, text: x, weight: .inf}\n", r"e\.yaml:1: 0\.weight: .*finite"),
    ("- {id: a, text: x, only: essay}\n", r"e\.yaml:1: 0\.only: .*multiple_choice"),
    ("- {id: a, text: x, weight: 0}\n", r"no message with a weight above 0 is for every prompt"),
    ("- {id: a, text: x, only: multiple_choice}\n", r"no message with a weight above 0 is for every prompt"),
]


@pytest.mark.parametrize(("content", "message"), BAD_EXPLANATIONS)
def test_bad_explanations_are_errors_with_their_place(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        explaining(tmp_path / "e.yaml", content)


# -- what ships ------------------------------------------------------------------------------------------------------


def test_sixteen_explanations_ship() -> None:
    explanations = Explain().open(find).explanations
    assert len(explanations) == len({explanation.text for explanation in explanations}) == 16
    assert explanations[0].text == ""
    assert [i for i, explanation in enumerate(explanations, 1) if explanation.only] == [8, 10]  # Orca, table 2


def test_the_shipped_examples_show_the_form_and_are_not_in_the_list_they_are_for() -> None:
    asker = Examples(path="prompts/because_examples.yaml").open(find)
    answers = [turn["content"] for turn in asker.turns if turn["role"] == "assistant"]
    asked = {turn["content"] for turn in asker.turns if turn["role"] == "user"}
    assert len(answers) == len(asked) == 3
    assert all(re.fullmatch(r"Because: [^\n]+\.\nAnswer: [^\n.]+", answer) for answer in answers)
    assert "Because: " in asker.system
    assert "Answer: " in asker.system
    assert not asked & {one.text for one in lists(everyday={"path": "prompts/everyday.jsonl"}).train("everyday")}


def test_every_shipped_text_names_origin_and_licence() -> None:
    for path in (ROOT / "prompts").glob("*.yaml"):
        head = path.read_text(encoding="utf-8").partition("\n\n")[0]
        assert "ritten for this project" in head
        assert "Apache-2.0" in head


def test_multiple_choice_tasks_are_tagged_and_detected_alike() -> None:
    prompts = lists(tasks={"path": "prompts/tasks.jsonl"}).train("tasks")
    tagged = [one for one in prompts if "multiple_choice" in one.tags]
    untagged = [prompt(one.text) for one in tagged]
    assert len(tagged) == 20
    assert all(is_multiple_choice(one) for one in untagged)
    assert sum(map(is_multiple_choice, prompts)) == 20
