"""Reasoning is its own field whatever its form, and what cannot be told apart is no answer."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.rows import Choice, Failure, Reply
from factory.teachers.openai import read_chat
from factory.teachers.reasoning import TAG, Parts, separate


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("plain", "plain", None),
        ("  plain \n", "  plain \n", None),
        ("<think>why</think>so", "so", "why"),
        ("\n<think>\nwhy\n</think>\n\nso\n", "so\n", "why"),
        ("<think>\n\n</think>\n\nso", "so", None),
        ("why</think>so", "so", "why"),  # the prompt held the opener
        ("why\n</think>\n\nso", "so", "why"),
        ("</think>so", "so", None),
        ("<think>a<think>b</think>c</think>so", "so", "a\nb\nc"),
        ("a<think>b</think>c</think>so", "so", "a\nb\nc"),
        ("<think>a</think><think>b</think>so", "so", "a\nb"),
        ("why</think></think>so", "so", "why"),
        ("[THINK]why[/THINK]so", "so", "why"),
        ("<seed:think>why</seed:think>so", "so", "why"),
        ('<think time="3">why</think>so', "so", "why"),
        # unclosed, or in mid-answer: no answer
        ('<think time="3">why', None, "why"),
        ("<think>why", None, "why"),
        ("<think>a</think><think>b", None, "a\nb"),
        ("<think>a<think>b</think>so", None, "a\nb\nso"),
        ("so <think>why</think> more", None, "so <think>why</think> more"),
        ("<think>a</think>so<think>b</think>more", None, "<think>a</think>so<think>b</think>more"),
        # spoken of, not used
        ("write `<think>` first", "write `<think>` first", None),
        ('split("</think>")', 'split("</think>")', None),
        ("<think>is it `</think>`?</think>yes", "yes", "is it `</think>`?"),
        ('it is "4"</think>4', "4", 'it is "4"'),
    ],
)
def test_the_forms_of_tags(text: str, answer: str | None, reasoning: str | None) -> None:
    assert separate(text) == (answer, reasoning)


PIECE = st.text(st.characters(exclude_characters="`\"'<>[]/", codec="utf-8"), max_size=20)
SOUP = st.lists(
    st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "`", "'", "\n", "so", "why ", "<", "think>"]) | PIECE
)


@settings(deadline=None)
@given(soup=SOUP)
def test_nothing_is_lost_and_no_tag_is_left_in_an_answer(soup: list[str]) -> None:
    text = "".join(soup)
    answer, reasoning = separate(text)
    if answer is None:
        assert TAG.search(text)
        return
    assert separate(answer) == (answer, None)
    if reasoning is None and answer == text:
        return
    kept = "".join(TAG.sub("", part) for part in (reasoning or "", answer))  # together they might make a tag
    assert sorted("".join(kept.split())) == sorted("".join(TAG.sub("", text).split()))


@settings(deadline=None)
@given(thought=PIECE, answer=PIECE, opener=st.sampled_from(["<think>", ""]), space=st.sampled_from(["", "\n", "\n\n"]))
def test_a_block_and_an_answer_come_apart_as_they_were_put_together(
    thought: str, answer: str, opener: str, space: str
) -> None:
    assert separate(f"{opener}{space}{thought}{space}</think>{space}{answer}") == (
        answer.lstrip(),
        thought.strip() or None,
    )


def read(finish: str = "stop", **message: Any) -> Choice | Failure:
    outcome = read_chat(json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode())
    return outcome.choices[0] if isinstance(outcome, Reply) else outcome


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": "so"}, "so", None),
        ({"content": "so", "reasoning": "why"}, "so", "why"),
        ({"content": "so", "reasoning_content": "why"}, "so", "why"),
        ({"content": "so", "reasoning": None, "reasoning_content": "why"}, "so", "why"),
        ({"content": "so", "reasoning": "why", "reasoning_content": "why"}, "so", "why"),
        ({"content": "so", "reasoning": ""}, "so", None),
        ({"content": "<think>more</think>so", "reasoning": "why"}, "so", "why\nmore"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}, {"type": "text", "text": "so"}]}, "so", "why"),
        ({"content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "so"}]}, "so", "why"),
    ],
)  # fmt: skip
def test_the_fields_of_reasoning(message: dict[str, Any], text: str, reasoning: str | None) -> None:
    choice = read(**message)
    assert isinstance(choice, Choice)
    assert (choice.text, choice.reasoning) == (text, reasoning)


@pytest.mark.parametrize(
    ("finish", "message", "reason"),
    [
        ("length", {"content": "<think>why"}, "reasoning_only"),
        ("stop", {"content": "<think>why"}, "reasoning_unclosed"),
        ("stop", {"content": "so <think>why</think> more"}, "reasoning_unclosed"),
        ("stop", {"content": "<think>why</think>"}, "reasoning_only"),
        ("length", {"content": None, "reasoning": "why"}, "reasoning_only"),
        ("stop", {"content": "", "reasoning_content": "why"}, "reasoning_only"),
        ("stop", {"content": "<think></think>"}, "empty"),
    ],
)
def test_reasoning_alone_is_no_answer(finish: str, message: dict[str, Any], reason: str) -> None:
    outcome = read(finish, **message)
    assert isinstance(outcome, Failure)
    assert outcome.reason == reason


def test_a_field_of_another_name_is_read_where_the_recipe_names_it() -> None:
    body = {"choices": [{"message": {"content": "so", "thoughts": "why"}, "finish_reason": "stop"}]}
    outcome = read_chat(json.dumps(body).encode(), reasoning="thoughts")
    assert isinstance(outcome, Reply)
    assert outcome.choices[0].reasoning == "why"


@pytest.mark.parametrize("tag", ["think", "thinking", "thought", "THINK"])
def test_reasoning_is_told_by_any_of_its_names(tag: str) -> None:
    assert separate(f"<{tag}>\nhm\n</{tag}>\n\nBlue.") == Parts("Blue.", "hm")
    assert separate("◁think▷hm◁/think▷Blue.") == Parts("Blue.", "hm")
    assert separate("<reasoning>hm</reasoning>") == Parts("<reasoning>hm</reasoning>", None)  # a prompt asked for it
