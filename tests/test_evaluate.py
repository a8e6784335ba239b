"""The evaluation's arithmetic: the same prompts for every model, missing is not zero, form is not correctness."""

import math
from typing import Any

import msgspec
import pytest

from factory.filters import RowFilter
from factory.filters.reference import MatchesReference
from factory.filters.rules import Finished, Words
from factory.findings import findings
from factory.measures import Scored
from factory.rows import Prompt, Sample, Verdict
from factory.summary import summary
from factory.teachers.transformers import Forced

ANSWER = MatchesReference(how="contains", extract="Answer:(.*)")


def sample(i: int, text: str, finish: str = "stop", reference: str | None = "blue") -> Sample:
    prompt = Prompt.of([{"role": "user", "content": f"Which colour has thing {i}?"}], reference=reference)
    verdicts = [] if finish != "failed" else [Verdict(filter="generate", keep=None, reason="outage")]
    return Sample(
        id=f"{i}", prompt=prompt, asked=prompt.messages, response=text, model="m", finish=finish, verdicts=verdicts
    )


def scored(
    role: str, texts: list[str], filters: list[RowFilter] | None = None, check: MatchesReference = ANSWER
) -> Scored:
    return Scored(role, role, [sample(i, text) for i, text in enumerate(texts)], filters or [Words(min=1)], check)


def measured(told: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["model"], row["measure"]): row for row in told["rows"]}


def test_rates_are_shares_with_wilson_intervals() -> None:
    told = summary([scored("base", ["Answer: blue"] * 3 + ["Answer: red"])], seed=1)
    row = measured(told)["base", "correct"]
    assert (row["value"], row["n"], row["role"]) == (0.75, 4, "base")
    assert row["low"] == pytest.approx(0.3006, abs=1e-4)  # Wilson 1927 for 3 of 4
    assert row["high"] == pytest.approx(0.9544, abs=1e-4)


def test_a_failed_answer_is_not_accepted_and_one_without_reference_is_missing() -> None:
    samples = [sample(0, "", "failed"), sample(1, "Answer: blue"), sample(2, "Answer: x", reference=None)]
    rows = measured(summary([Scored("base", "base", samples, [Finished()], ANSWER)], seed=1))
    assert (rows["base", "accepted"]["value"], rows["base", "accepted"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (rows["base", "correct"]["value"], rows["base", "correct"]["n"]) == (0.5, 2)


def test_losses_are_means_per_token_of_known_answers_only() -> None:
    base = scored("base", ["a", "b", "c"])
    base.add_forced(base, [Forced(4.0, 2, 1), None, Forced(9.0, 3, 3)])
    row = measured(summary([base], seed=1))["base", "teacher_loss"]
    assert (row["value"], row["n"]) == (2.5, 2)


def test_differences_and_retention_are_paired() -> None:
    teacher = scored("teacher", ["Answer: blue"] * 20)
    base = scored("base", ["Answer: red"] * 20)
    student = scored("student", ["Answer: blue"] * 15 + ["Answer: red"] * 5)
    told = summary([teacher, base, student], seed=1)
    found = {(c["measure"], c["kind"]): c for c in told["comparisons"]}
    difference, ratio = found["correct", "difference"], found["correct", "ratio"]
    assert (difference["a"], difference["b"], difference["value"], difference["n"]) == ("student", "base", 0.75, 20)
    assert (ratio["b"], ratio["value"]) == ("teacher", 0.75)
    assert 0.5 < difference["low"] < 0.75 < difference["high"] < 1
    assert math.isfinite(ratio["high"])


def report(told: dict[str, Any]) -> list[str]:
    whole = {"status": "done", "evaluation": told["rows"], "comparisons": told["comparisons"]}
    whole["list_comparisons"] = told["list_comparisons"]
    return findings({**whole, "training": [], "funnel": [], "pairs": None})


def test_answers_that_cannot_be_read_are_told_and_no_gain_in_correctness_is_claimed() -> None:
    """A base model that never writes "Answer:" is wrong by form; that must not pass for learned correctness."""
    student = scored("student", ["Answer: blue"] * 15 + ["Answer: red"] * 5)
    told = summary([scored("base", ["It is blue."] * 20), student], seed=1)
    assert told["notes"] == ["correct: 20 of 20 answers of base have no readable result, and count as not correct"]
    (line,) = [line for line in report(told) if line.startswith("Correct answers")]
    assert "correctness improved" not in line
    assert "20 answers of base cannot be read in the form asked for, so this measures form as well" in line


def test_a_gain_in_correctness_is_claimed_where_answers_can_be_read() -> None:
    student = scored("student", ["Answer: blue"] * 15 + ["Answer: red"] * 5)
    told = summary([scored("base", ["Answer: red"] * 20), student], seed=1)
    assert told["notes"] == []
    assert any("correctness improved" in line for line in report(told))


def test_samples_stand_side_by_side_in_prompt_order() -> None:
    told = summary([scored("base", ["Answer: red"]), scored("student", ["Answer: blue"])], seed=1)
    (first,) = told["samples"]
    assert (first["prompt"], first["reference"]) == ("Which colour has thing 0?", "blue")
    assert first["answers"]["student"] == {
        "text": "Answer: blue", "finish": "stop", "accepted": True, "correct": True, "unread": False,
    }  # fmt: skip
    assert first["answers"]["base"]["correct"] is False


# -- models compared ---------------------------------------------------------------------------------------------------


def texts(right: int, of: int = 20) -> list[str]:
    return ["Answer: blue"] * right + ["Answer: red"] * (of - right)


def compared(told: dict[str, Any], a: str = "student") -> dict[tuple[str, str], dict[str, Any]]:
    return {(c["measure"], c["kind"]): c for c in told["comparisons"] if c["a"] == a}


def named(name: str, role: str, answers: list[str]) -> Scored:
    made = scored(name, answers)
    made.role = role
    return made


def test_retention_and_the_share_of_the_gap_stand_side_by_side() -> None:
    models = [scored("teacher", texts(18)), scored("base", texts(2)), scored("student", texts(14))]
    found = compared(summary(models, seed=1))
    assert found["correct", "ratio"]["value"] == pytest.approx(14 / 18)
    gap = found["correct", "gap"]
    assert (gap["value"], gap["b"], gap["teacher"]) == (0.75, "base", "teacher")  # (14 - 2) / (18 - 2)
    assert 0.4 < gap["low"] < 0.75 < gap["high"] < 1


def test_a_share_of_a_gap_that_may_be_noise_is_undefined_and_said_so() -> None:
    models = [scored("teacher", texts(5)), scored("base", texts(4)), scored("student", texts(14))]
    told = summary(models, seed=1)
    gap = compared(told)["correct", "gap"]
    assert (gap["value"], gap["undefined"]) == (None, "the teacher is not 2 standard errors above the base")
    assert (
        "How much of the gap in correct answers the student closes is undefined: the teacher is not 2 standard errors "
        "above the base." in report(told)
    )
    nothing = compared(summary([scored("teacher", texts(0)), scored("student", texts(14))], seed=1))
    assert (nothing["correct", "ratio"]["value"], nothing["correct", "ratio"]["undefined"]) == (
        None,
        "the teacher's is 0",
    )


def test_rates_are_tested_exactly_and_several_students_corrected() -> None:
    """6 of 20 better and none worse: p = 2 / 2^6 = .031, which does not stand when three students are looked at."""
    base = scored("base", texts(4))
    one = summary([base, scored("student", texts(10))], seed=1)
    assert compared(one)["correct", "difference"]["p_holm"] == compared(one)["correct", "difference"]["p"] == 2 / 64
    assert "p" not in compared(one)["words", "difference"]
    assert any("correctness improved" in line for line in report(one))
    students = [named("first", "student", texts(4)), named("second", "student", texts(4)), scored("student", texts(10))]
    three = summary([base, *students], seed=1)
    found = compared(three)["correct", "difference"]
    assert (found["p"], found["p_holm"]) == (2 / 64, 6 / 64)
    (line,) = [line for line in report(three) if line.startswith("Correct answers: the student student")]
    assert "the exact test, corrected for the number of students, does not (p = 0.094)" in line
    assert line.endswith("this run does not show that correctness improved.")


def test_a_student_stands_beside_the_one_trained_on_ground_truth() -> None:
    models = [scored("base", texts(2)), scored("student", texts(14)), scored("gold", texts(8))]
    told = summary(models, seed=1)
    found = compared(told)
    assert (found["correct", "beside_gold"]["value"], found["correct", "beside_gold"]["b"]) == (
        pytest.approx(0.3),
        "gold",
    )
    assert not compared(told, "gold")
    assert any("against the one trained on ground truth: +30 points (" in line for line in report(told))


def test_sharpening_is_told_from_reach() -> None:
    """The base is right in one of two draws of every prompt, the student in both: pass@2 is 1 for both."""

    def drawn(name: str, right: int) -> Scored:
        first = [sample(i, "Answer: red") for i in range(20)]
        draws = [[sample(i, "Answer: blue")] * right + [sample(i, "Answer: red")] * (2 - right) for i in range(20)]
        return Scored(name, name, first, [Words(min=1)], ANSWER, draws, 2)

    told = summary([drawn("base", 1), drawn("student", 2)], seed=1)
    values = {(m, name): row["value"] for (m, name), row in measured(told).items()}
    assert [values[m, name] for m in ("base", "student") for name in ("pass@1", "pass@2")] == [0.5, 1, 1, 1]
    assert measured(told)["student", "pass@2"]["low"] == pytest.approx(0.8389, abs=1e-4)  # Wilson for 20 of 20
    (line,) = [line for line in report(told) if line.startswith("Sampled answers")]
    assert line.endswith("not shown to be so in 2 tries, which may be sharpening alone.")


def test_perplexity_is_the_exponential_and_calibration_is_compared() -> None:
    def sure(name: str, logprob: float) -> Scored:
        given = [msgspec.structs.replace(sample(i, t), logprob=logprob, tokens=1) for i, t in enumerate(texts(10))]
        made = Scored(name, name, given, [Words(min=1)], ANSWER)
        made.add_forced(made, [Forced(2.0, 1, 1), Forced(4.0, 1, 0)] + [None] * 18)
        return made

    told = summary([sure("base", math.log(0.5)), sure("student", math.log(0.95))], seed=1)
    rows = measured(told)
    loss, perplexity = rows["student", "teacher_loss"], rows["student", "teacher_perplexity"]
    assert [perplexity[key] for key in ("value", "low", "high")] == [
        math.exp(loss[key]) for key in ("value", "low", "high")
    ]
    assert perplexity["value"] == math.exp(3)
    assert rows["base", "ece"]["value"] == pytest.approx(0)  # sure to a half, and right in half
    assert rows["student", "ece"]["value"] == pytest.approx(0.45)
    ece = compared(told)["ece", "difference"]
    assert ece["value"] == pytest.approx(0.45)
    assert 0 < ece["low"] < 0.45 <= ece["high"] < 0.8
    assert set(told["measures"]) == {row["measure"] for row in told["rows"]}


def test_prompt_lists_are_told_apart_where_there_are_several() -> None:
    def of(source: str, i: int, text: str) -> Sample:
        made = sample(i, text)
        return msgspec.structs.replace(made, prompt=msgspec.structs.replace(made.prompt, source=source))

    given = [of("near" if i < 5 else "far", i, t) for i, t in enumerate(texts(6, 10))]
    lists = summary([Scored("base", "base", given, [Words(min=1)], ANSWER)], seed=1)["lists"]
    told = {(row["list"], row["measure"]): (row["value"], row["n"]) for row in lists}
    assert told["near", "correct"] == (1, 5)
    assert told["far", "correct"] == (0.2, 5)
    assert summary([scored("base", texts(6))], seed=1)["lists"] == []


def on_lists(role: str, near: list[str], far: list[str]) -> Scored:
    both = [("near", text) for text in near] + [("far", text) for text in far]
    samples = [sample(i, text) for i, (_, text) in enumerate(both)]
    placed = [
        msgspec.structs.replace(s, prompt=msgspec.structs.replace(s.prompt, source=source))
        for s, (source, _) in zip(samples, both, strict=True)
    ]
    return Scored(role, role, placed, [Words(min=1)], ANSWER)


FORGETTING = [
    (texts(5), "some of what the base model could do there is forgotten."),
    (texts(13), "no forgetting is shown, a loss of 15 points is not excluded."),
    (
        ["It is blue."] * 20,
        "forgotten, or only no longer in the form asked for: 20 answers cannot be read.",
    ),
    (texts(20), "nothing was forgotten, and what was learned carries over."),
]


@pytest.mark.parametrize(("far", "verdict"), FORGETTING)
def test_what_is_forgotten_elsewhere_is_told_where_the_interval_says_so(far: list[str], verdict: str) -> None:
    """Of 20 prompts far from those trained on the base has 14 right; near them the student gains in any case."""
    models = [on_lists("base", texts(2), texts(14)), on_lists("student", texts(18), far)]
    told = summary(models, 1, outside=["far"])
    (line,) = [
        line for line in report(told) if line.startswith("On far, no prompt of which was trained on (20 prompts)")
    ]
    assert line.endswith(f": {verdict}")
    difference = {(c["list"], c["measure"]): c for c in told["list_comparisons"]}["far", "correct"]
    assert (difference["n"], difference["a"], difference["outside"]) == (20, "student", True)
    assert not [line for line in report(summary(models, 1)) if line.startswith("On ")]  # both lists trained on
    alone = [scored("base", texts(14)), scored("student", texts(5))]
    assert summary(alone, 1, outside=["far"])["list_comparisons"] == []


def test_style_without_capability_is_told() -> None:
    """The student says it in the teacher's words, and is right as often as before."""
    teacher, base = scored("teacher", ["So it is. Answer: blue"] * 20), scored("base", texts(10))
    for right, told in ((10, True), (20, False)):
        student = scored("student", ["So it is. Answer: blue"] * right + ["So it is. Answer: red"] * (20 - right))
        for model in (base, student):
            model.add_forced(teacher, [])
        lines = report(summary([teacher, base, student], seed=1))
        assert any(line.endswith("not shown to rise: style may be what was learned.") for line in lines) is told
