"""Stage `shape`: what the teacher was told is erased; only whole answers become data; the lineage stays."""

from typing import Any

import pytest

from factory.rows import Message, Sample, TrainRow, by_prompt
from factory.shape import Shape, shape, student_view
from tests.sample_rows import answer, prompt

SYSTEM = Message(role="system", content="Answer as a pirate.")
ASKED = [
    Message(role="system", content="Think step by step, then answer."),
    Message(role="user", content="example question"),
    Message(role="assistant", content="example answer"),
    Message(role="user", content="Why is it warm?"),
]
TALK = [
    Message(role="user", content="Hello"),
    Message(role="assistant", content="Hi, how are you?"),
    Message(role="user", content="Why is it warm?"),
]


def shaped(sample: Sample, **knobs: Any) -> TrainRow | Sample:
    (row,) = shape(Shape(**knobs), by_prompt([sample]))
    return row


def row(sample: Sample, **knobs: Any) -> TrainRow:
    made = shaped(sample, **knobs)
    assert isinstance(made, TrainRow)
    return made


def asked_elaborately(**fields: Any) -> Sample:
    plain = answer("Because of the sun.", prompt("Why is it warm?"), **fields)
    return Sample(**{**{f: getattr(plain, f) for f in plain.__struct_fields__}, "asked": ASKED})


def test_what_was_said_to_the_teacher_is_erased_and_the_lineage_leads_back() -> None:
    sample = asked_elaborately(scores={"helpfulness": 4.0})
    made = row(sample)
    assert made.prompt == [{"role": "user", "content": "Why is it warm?"}]
    assert made.completion == [{"role": "assistant", "content": "Because of the sun."}]
    assert (made.parents, made.scores, made.model) == ([sample.id], {"helpfulness": 4.0}, "m")
    assert "step by step" not in str(made)
    assert "example" not in str(made)


VIEWS = [
    # the prompt's turns, the generic message, the roles and the first content that the student sees
    (TALK, None, ["user", "assistant", "user"], "Hello"),
    ([SYSTEM, *TALK], None, ["system", "user", "assistant", "user"], "Answer as a pirate."),
    ([SYSTEM, *TALK], "Be kind.", ["system", "user", "assistant", "user"], "Be kind."),
    (TALK, "Be kind.", ["system", "user", "assistant", "user"], "Be kind."),
    (TALK, "", ["system", "user", "assistant", "user"], ""),
]


@pytest.mark.parametrize(("turns", "system", "roles", "first"), VIEWS)
def test_the_student_sees_the_plain_prompt_or_one_generic_message(
    turns: list[Message], system: str | None, roles: list[str], first: str
) -> None:
    made = row(answer("x", prompt(turns=turns)), system=system)
    assert [message["role"] for message in made.prompt] == roles
    assert made.prompt[0]["content"] == first
    assert made.prompt[-1] == TALK[-1]
    assert made.prompt == student_view(Shape(system=system), prompt(turns=turns))


def test_shaping_changes_no_prompt() -> None:
    asked = prompt(turns=[SYSTEM, *TALK])
    row(answer("x", asked), system="Be kind.")
    assert asked.messages == [SYSTEM, *TALK]


REASONING = [
    # knob, trace, the completion
    ("drop", "Warm is...", "Because."),
    ("keep", "Warm is...\n", "<think>\nWarm is...\n</think>\n\nBecause."),
    ("keep", None, "Because."),
    ("keep", "", "Because."),
    ("keep", " \n", "Because."),
]


@pytest.mark.parametrize(("knob", "trace", "completion"), REASONING)
def test_the_trace_is_dropped_or_put_first(knob: str, trace: str | None, completion: str) -> None:
    assert row(answer(" Because.\n", reasoning=trace), reasoning=knob).completion[0]["content"] == completion


NEVER = [
    (answer("cut off in the", finish="length"), "truncated:length"),
    (answer("", finish="length"), "truncated:length"),
    (answer("bad words", finish="content_filter"), "truncated:content_filter"),
    (answer(""), "empty"),
    (answer(" \n\t"), "empty"),
    (answer("", reasoning="only thoughts"), "empty"),
]


@pytest.mark.parametrize(("sample", "reason"), NEVER)
@pytest.mark.parametrize("reasoning", ["keep", "drop"])
def test_a_truncated_or_empty_answer_is_never_data(sample: Sample, reason: str, reasoning: str) -> None:
    made = shaped(sample, reasoning=reasoning)
    assert isinstance(made, Sample)
    assert (made.ending, made.verdicts[-1].reason) == ("dropped", reason)


def test_rows_come_in_order_and_equal_rows_have_equal_ids() -> None:
    asked = [prompt("one"), prompt("two")]
    samples = [answer(text, asked[i // 2], draw=i % 2) for i, text in enumerate(["a", "b ", "a", "b"])]
    rows = list(shape(Shape(), by_prompt(samples)))
    assert [r.completion[0]["content"] for r in rows if isinstance(r, TrainRow)] == ["a", "b", "a", "b"]
    assert len({r.id for r in rows}) == 4
    assert row(answer(" b", asked[0], draw=7)).id == rows[1].id


def test_personal_data_is_masked_in_prompt_and_completion_alike() -> None:
    asked = prompt(turns=[Message(role="user", content="I am lena@posteo.de. Greet me.")])
    sample = answer("Hello lena@posteo.de!", asked, reasoning="She is lena@posteo.de.")
    made = row(sample, mask="personal_data", reasoning="keep", system="Be kind.")
    assert [message["content"] for message in made.prompt] == ["Be kind.", "I am [EMAIL]. Greet me."]
    assert made.completion[0]["content"] == "<think>\nShe is [EMAIL].\n</think>\n\nHello [EMAIL]!"
    assert made.prompt == student_view(Shape(mask="personal_data", system="Be kind."), asked)
    assert "posteo" in str(row(sample))
