"""Stage `shape`: what the teacher was told is erased; only whole answers become data; the lineage stays."""

from itertools import chain
from typing import Any

import pydantic
import pytest

from factory.rows import Message, Sample, TrainRow, by_prompt
from factory.shape import Shape, lacking_truth, shape, student_view
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
    ((row,),) = shape(Shape(**knobs), by_prompt([sample]))
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
    rows = list(chain.from_iterable(shape(Shape(), by_prompt(samples))))
    assert [r.completion[0]["content"] for r in rows if isinstance(r, TrainRow)] == ["a", "b", "a", "b"]
    assert len({r.id for r in rows}) == 4
    assert row(answer(" b", asked[0], draw=7)).id == rows[1].id


# -- the trace outside the loss, and the mark where the answer begins ------------------------------------------------------

MASKS = [
    # trace, the completion, the part of it that is masked
    ("Warm is...\n", "<think>\nWarm is...\n</think>\n\nBecause.", "<think>\nWarm is...\n</think>\n\n"),
    (None, "Because.", ""),
    (" ", "Because.", ""),
]


@pytest.mark.parametrize(("trace", "completion", "masked"), MASKS)
def test_a_masked_trace_stands_first_and_ends_where_the_answer_begins(
    trace: str | None, completion: str, masked: str
) -> None:
    made = row(answer(" Because.\n", reasoning=trace), reasoning="mask")
    assert made.completion[0]["content"] == completion
    assert completion[: made.masked] == masked
    assert row(answer("Because.", reasoning=trace), reasoning="keep").masked == 0


MARKS = [
    # the answer, its reasoning, the completion with the trace kept, or the reason why there is none
    ("Heat rises. Answer: because", None, "<think>\nHeat rises.\n</think>\n\nbecause"),
    ("Answer: because", None, "because"),
    ("Answer: no. Answer: because", None, "<think>\nAnswer: no.\n</think>\n\nbecause"),  # the last one counts
    ("Answer: because", "Heat rises.", "<think>\nHeat rises.\n</think>\n\nbecause"),
    ("Heat rises.", None, "no_mark:Answer:"),
    ("Heat rises. Answer: ", None, "no_mark:Answer:"),
    ("answer: because", None, "no_mark:Answer:"),
]


@pytest.mark.parametrize("text", ["<think>\nSun.\n</think>\n\nWarm.", "Sun.\n</think>Warm."])
@pytest.mark.parametrize(("reasoning", "said"), [("keep", "<think>\nSun.\n</think>\n\nWarm."), ("drop", "Warm.")])
def test_a_trace_that_stood_in_the_text_has_its_tags_once(text: str, reasoning: str, said: str) -> None:
    made = row(answer(text), answer_after="</think>", reasoning=reasoning)
    assert made.completion[0]["content"] == said


@pytest.mark.parametrize(("text", "reasoning", "expected"), MARKS)
def test_the_answer_begins_behind_its_mark(text: str, reasoning: str | None, expected: str) -> None:
    made = shaped(answer(text, reasoning=reasoning), answer_after="Answer:", reasoning="keep")
    if isinstance(made, Sample):
        assert (made.ending, made.verdicts[-1].reason) == ("failed", expected)
    else:
        assert made.completion[0]["content"] == expected
        assert row(answer(text), answer_after="Answer:").completion[0]["content"] == "because"


# -- tasks -------------------------------------------------------------------------------------------------------------------


def told(rows: list[TrainRow | Sample]) -> list[tuple[str, str, str, float] | str]:
    """Of each row its task, its question, its answer and its weight; of a sample the reason."""
    return [
        made.verdicts[-1].reason
        if isinstance(made, Sample)
        else (made.task, made.prompt[-1]["content"], made.completion[0]["content"], made.weight)
        for made in rows
    ]


def of_tasks(samples: list[Sample], tasks: Any, **knobs: Any) -> list[Any]:
    return told(list(chain.from_iterable(shape(Shape(tasks=tasks, **knobs), by_prompt(samples)))))


def test_rationale_and_label_are_two_rows_with_a_prefix_each() -> None:
    sample = answer("4", prompt("2+2?"), reasoning="Two and two.", scores={"s": 1.0})
    both = [("label", "[label] 2+2?", "4", 1.0), ("rationale", "[rationale] 2+2?", "Two and two.", 1.0)]
    assert of_tasks([sample], ["label", "rationale"]) == both
    weighted = of_tasks([sample], {"rationale": 0.25, "label": 0.75})
    assert weighted == [("rationale", "[rationale] 2+2?", "Two and two.", 0.25), ("label", "[label] 2+2?", "4", 0.75)]
    ((first, second),) = shape(Shape(tasks=["label", "rationale"]), by_prompt([sample]))
    assert isinstance(first, TrainRow)
    assert isinstance(second, TrainRow)
    assert first.id != second.id
    assert first.parents == second.parents == [sample.id]
    marked = answer("Two and two. So: 4", prompt("2+2?"))
    assert of_tasks([marked], ["label", "rationale"], answer_after="So:") == both
    assert of_tasks([answer("4", prompt("2+2?"))], ["label", "rationale"]) == ["no_trace"]
    assert of_tasks([answer("4", prompt("2+2?"))], ["label"]) == both[:1]


def test_a_student_is_measured_by_the_label_task_alone() -> None:
    knobs = Shape(tasks=["rationale", "label"], system="Be kind.")
    seen = student_view(knobs, prompt(turns=[SYSTEM, *TALK]))
    assert [m["content"] for m in seen] == ["Be kind.", "Hello", "Hi, how are you?", "[label] Why is it warm?"]
    ((only,),) = shape(knobs.measured, by_prompt([answer("x", reasoning="y")]))
    assert isinstance(only, TrainRow)
    assert only.task == "label"
    assert student_view(Shape(tasks=["answer", "truth"]), prompt("q")) == prompt("q").messages


def test_the_truth_stands_once_beside_the_answers_of_a_prompt() -> None:
    asked, without = prompt("2+2?", reference=" 4\n"), prompt("3+3?")
    samples = [answer("four", asked), answer("it is 4", asked, draw=1), answer("six", without)]
    assert of_tasks(samples, {"answer": 0.7, "truth": 0.3}) == [
        ("answer", "2+2?", "four", 0.7), ("truth", "2+2?", "4", 0.3), ("answer", "2+2?", "it is 4", 0.7),
        ("answer", "3+3?", "six", 0.7),
    ]  # fmt: skip
    cut = [answer("fo", asked, finish="length"), answer("four", asked, draw=1)]
    assert of_tasks(cut, ["answer", "truth"]) == [
        "truncated:length",
        ("truth", "2+2?", "4", 1.0),
        ("answer", "2+2?", "four", 1.0),
    ]
    assert of_tasks(samples[:1], ["label", "truth"])[1] == ("truth", "[label] 2+2?", "4", 1.0)
    ((_, truth), *_) = shape(Shape(tasks=["answer", "truth"]), by_prompt(samples))
    assert isinstance(truth, TrainRow)
    assert (truth.model, truth.parents) == ("", [])
    assert lacking_truth(Shape(tasks=["answer", "truth"]), by_prompt(samples)) == [
        "tasks.truth: 1 of 2 prompts have no reference"
    ]
    assert lacking_truth(Shape(tasks=["answer", "truth"]), by_prompt(samples[:2])) == []
    assert lacking_truth(Shape(), by_prompt(samples)) == []


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"tasks": ["label", "label"]}, "named once"),
        ({"tasks": ["truth"]}, "nothing of the teacher's"),
        ({"tasks": []}, "nothing of the teacher's"),
        ({"tasks": ["answer", "label"]}, "either answer"),
        ({"tasks": ["label"], "reasoning": "keep"}, "reasoning: keep"),
        ({"tasks": {"answer": 0}}, "every weight is 0"),
        ({"answer_after": ""}, "at least 1"),
    ],
)
def test_tasks_that_contradict_each_other_are_refused(knobs: dict[str, Any], text: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=text):
        Shape(**knobs)


def test_personal_data_is_masked_in_prompt_and_completion_alike() -> None:
    asked = prompt(turns=[Message(role="user", content="I am lena@posteo.de. Greet me.")])
    sample = answer("Hello lena@posteo.de!", asked, reasoning="She is lena@posteo.de.")
    made = row(sample, mask="personal_data", reasoning="keep", system="Be kind.")
    assert [message["content"] for message in made.prompt] == ["Be kind.", "I am [EMAIL]. Greet me."]
    assert made.completion[0]["content"] == "<think>\nShe is [EMAIL].\n</think>\n\nHello [EMAIL]!"
    assert made.prompt == student_view(Shape(mask="personal_data", system="Be kind."), asked)
    assert "posteo" in str(row(sample))
