"""Stage `choose`: best of N, caps, ties, and the closest to the reference by a BLEU that was worked out by hand."""

import math
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.choose import Choose, choose, sentence_bleu
from factory.rows import Sample, by_prompt
from tests.sample_rows import answer, ends, prompt

steady = settings(deadline=None)


def draws(*scores: float | None, to: str = "q", **fields: Any) -> list[Sample]:
    """Draws of one prompt with a score `s`, or without one."""
    asked = prompt(to)
    return [
        answer(f"text {i}", asked, draw=i, scores={} if score is None else {"s": score}, **fields)
        for i, score in enumerate(scores)
    ]


def chosen(knobs: dict[str, Any], rows: list[Sample]) -> list[str]:
    ended = list(choose(Choose(**knobs), by_prompt(rows)))
    assert [row.id for row in ended] == [row.id for row in rows]
    return ends(ended)


CHOICES = [
    # knobs, scores of one prompt's draws, how each ends
    ({"best": 1, "by": "s"}, [1, 3, 2], ["not_chosen=1", "", "not_chosen=2"]),
    ({"best": 2, "by": "s"}, [1, 3, 2], ["not_chosen=1", "", ""]),
    ({"best": 9, "by": "s"}, [1, 3, 2], ["", "", ""]),
    ({"best": 1, "by": "s"}, [2, 2, 2], ["", "not_chosen=2", "not_chosen=2"]),
    ({"best": 1, "by": "s"}, [-1.5, -0.25, 0], ["not_chosen=-1.5", "not_chosen=-0.25", ""]),
    ({"best": 1, "by": "s"}, [None, 0, None], ["no_score:s", "", "no_score:s"]),
    ({"best": 1, "by": "t"}, [1], ["no_score:t"]),
    ({"cap": 2}, [1, 9, 5], ["", "", "over_cap=3>2"]),
    ({"cap": 2}, [None, None], ["", ""]),
    ({"cap": 2, "by": "s"}, [1, 9, 5, 7], ["over_cap=4>2", "", "over_cap=3>2", ""]),
    ({"cap": 1, "by": "s"}, [None, 1], ["no_score:s", ""]),
]  # fmt: skip


@pytest.mark.parametrize(("knobs", "scores", "expected"), CHOICES)
def test_the_best_stay_and_the_others_say_why_not(
    knobs: dict[str, Any], scores: list[float | None], expected: list[str]
) -> None:
    assert chosen(knobs, draws(*scores)) == expected


def test_each_prompt_is_a_contest_of_its_own() -> None:
    rows = [*draws(1, 2, to="one"), *draws(9, 8, to="two"), *draws(0, to="three")]
    assert chosen({"best": 1, "by": "s"}, rows) == ["not_chosen=1", "", "", "not_chosen=8", ""]


def test_per_model_each_model_keeps_its_own_wherever_its_rows_stand() -> None:
    asked = prompt()
    rows = [
        answer(str(i), asked, draw=i, model=model, scores={"s": float(score)})
        for i, (model, score) in enumerate([("a", 1), ("b", 9), ("a", 2), ("b", 8)])
    ]
    knobs = {"best": 1, "by": "s", "per": "model"}
    assert chosen(knobs, rows) == ["not_chosen=1", "", "", "not_chosen=8"]
    assert chosen({**knobs, "per": "prompt"}, rows) == ["not_chosen=1", "", "not_chosen=2", "not_chosen=8"]
    assert chosen({"cap": 1, "per": "model"}, rows) == ["", "", "over_cap=2>1", "over_cap=2>1"]


def test_ties_go_to_the_likelier_answer_and_then_to_the_earlier_draw() -> None:
    asked = prompt()
    likely = [None, -2.0, 0.0, 0.0]  # a log-probability of 0 is certainty, not a missing value
    rows = [answer(str(i), asked, draw=i, scores={"s": 1.0}, logprob=value) for i, value in enumerate(likely)]
    assert chosen({"best": 1, "by": "s"}, rows) == ["not_chosen=1", "not_chosen=1", "", "not_chosen=1"]
    assert chosen({"best": 3, "by": "s"}, rows) == ["not_chosen=1", "", "", ""]
    assert chosen({"cap": 1}, rows) == ["", "over_cap=2>1", "over_cap=3>1", "over_cap=4>1"]  # a cap alone: the first


def test_by_logprob() -> None:
    rows = [answer(str(i), draw=i, logprob=value) for i, value in enumerate([-5.0, -0.5, None])]
    assert chosen({"best": 1, "by": "logprob"}, rows) == ["not_chosen=-5", "", "no_score:logprob"]


def test_what_is_not_chosen_is_dropped_and_what_has_no_score_is_set_aside() -> None:
    ended = list(choose(Choose(best=1, by="s"), by_prompt(draws(1, 2, None))))
    assert [row.ending for row in ended] == ["dropped", "kept", "failed"]
    assert [row.verdicts[-1].score for row in ended if row.verdicts] == [1, None]


@pytest.mark.parametrize(
    ("knobs", "told"),
    [({}, "best:"), ({"best": 1}, "best: needs by:"), ({"best": 1, "by": "s", "cap": 1}, "either best: .* or cap:"), ({"cap": 0}, "greater than 0")],
)  # fmt: skip
def test_knobs_that_say_nothing_or_too_much_are_refused(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=told):
        Choose(**knobs)


# -- closest to the reference ----------------------------------------------------------------------------------------------

BLEU = [
    # candidate, reference, precisions of 1- to 4-grams (one is added above and below from bigrams on), length ratio r/c
    ("cat sat on mat", "cat sat on red mat", [4 / 4, 3 / 4, 2 / 3, 1 / 2], 5 / 4),
    ("cat sat on red mat", "cat sat on mat", [4 / 5, 3 / 5, 2 / 4, 1 / 3], 0),
    (
        "blue blue blue",
        "blue sky is",
        [1 / 3, 1 / 3, 1 / 2, 1 / 1],
        0,
    ),  # a word counts as often as the reference has it
    ("blue", "blue", [1, 1, 1, 1], 0),
    ("blue", "blue sky", [1, 1, 1, 1], 2),
    ("The Sky, is BLUE!", "the sky is blue", [1, 1, 1, 1], 0),
    ("mat red on sat cat", "cat sat on red mat", [5 / 5, 1 / 5, 1 / 4, 1 / 3], 0),
]


@pytest.mark.parametrize(("candidate", "reference", "precisions", "ratio"), BLEU)
def test_smoothed_sentence_bleu_by_hand(candidate: str, reference: str, precisions: list[float], ratio: float) -> None:
    by_hand = math.prod(precisions) ** 0.25 * math.exp(min(0.0, 1 - ratio))
    assert sentence_bleu(candidate, reference) == pytest.approx(by_hand)


def test_bleu_of_nothing() -> None:
    assert sentence_bleu("red", "blue") == sentence_bleu("", "blue") == sentence_bleu("blue", "") == 0
    assert sentence_bleu("", "") == 1


TEXTS = st.lists(st.sampled_from("abcxyz"), max_size=12).map(" ".join)


@steady
@given(TEXTS, TEXTS)
def test_bleu_is_between_none_and_all_and_highest_for_the_reference_itself(candidate: str, reference: str) -> None:
    value = sentence_bleu(candidate, reference)
    assert 0 <= value <= sentence_bleu(reference, reference) == 1
    assert sentence_bleu(candidate.upper(), f" {reference}\n") == pytest.approx(value)


@steady
@given(st.text(), st.text())
def test_bleu_reads_any_text(candidate: str, reference: str) -> None:
    assert 0 <= sentence_bleu(candidate, reference) <= 1 + 1e-12


def test_the_closest_to_the_reference_is_chosen() -> None:
    asked = prompt("Where?", reference="The cat sat on the red mat.")
    texts = ["A dog ran in the park.", "The cat sat on a mat.", "A mat sat on the cat."]
    rows = [answer(text, asked, draw=i) for i, text in enumerate(texts)]
    knobs = {"best": 1, "by": "closest_to_reference"}
    values = [sentence_bleu(text, "cat sat on red mat") for text in texts]
    assert chosen(knobs, rows) == [f"not_chosen={values[0]:.4g}", "", f"not_chosen={values[2]:.4g}"]
    gold = [*rows, answer("the cat sat on the red mat", asked, draw=3)]
    assert chosen(knobs, gold)[3] == ""
    assert chosen(knobs, rows[:1]) == [""]  # of one hypothesis the closest is that one
    assert chosen(knobs, draws(1, 2)) == ["no_score:closest_to_reference"] * 2
