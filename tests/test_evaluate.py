"""The evaluation's arithmetic: the same prompts for every model, missing is not zero, form is not correctness."""

import math
from typing import Any

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
