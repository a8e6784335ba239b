"""Each measure against examples worked out by hand, and those with a slower plain way against that."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.filters.reference import MatchesReference
from factory.filters.rules import Words
from factory.filters.shapes import RowFilter
from factory.measures import (
    BINS,
    MEASURES,
    Scored,
    calibration_error,
    definition,
    distinct,
    known,
    longest_common,
    off_by_bin,
    pass_at,
    rouge_l,
)  # fmt: skip
from factory.rows import Sample, Verdict
from factory.teachers.transformers import Forced
from tests.sample_rows import answer, prompt


def scored(texts: list[str], reference: str | None = "7", draws: list[list[str]] | None = None, **knobs: str) -> Scored:
    prompts = [prompt(f"question {i}", reference) for i in range(len(texts))]
    drawn = [
        [answer(t, p, draw) for draw, t in enumerate(of_it, 1)] for p, of_it in zip(prompts, draws or [], strict=False)
    ]
    first = [answer(t, p) for p, t in zip(prompts, texts, strict=True)]
    k = 2 if draws else 1
    return Scored("m", "base", first, [Words(min=2)], MatchesReference.model_validate(knobs), drawn or None, k)


# -- right, wrong, unread ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "texts"),
    [
        ({"how": "numeric"}, ["It is 7", "It is 8", "I do not know"]),
        ({"how": "numeric", "extract": "A: (.*)"}, ["A: 7", "A: 8", "It is 7"]),
        ({"how": "contains", "extract": "A: (.*)"}, ["A: 7", "A: seven", "7"]),
    ],
)
def test_an_answer_is_right_wrong_or_unread(knobs: dict[str, str], texts: list[str]) -> None:
    values = scored(texts, **knobs).values
    assert (values["correct"], values["wrong"], values["unread"]) == ([1, 0, 0], [0, 1, 0], [0, 0, 1])


def test_an_option_that_is_not_named_is_unread() -> None:
    values = scored(["Answer: B", "Answer: C", "Hard to say"], "B", how="choice").values
    assert (values["correct"], values["wrong"], values["unread"]) == ([1, 0, 0], [0, 1, 0], [0, 0, 1])


def test_what_never_came_is_unread_and_without_a_reference_nothing_is_known() -> None:
    p = prompt("q", "7")
    lost = Verdict(filter="generate", keep=None, reason="timeout")
    failed = Sample(id="f", prompt=p, asked=p.messages, response="", model="m", finish="failed", verdicts=[lost])
    values = Scored("m", "base", [failed, answer("7", prompt("other"))], [], MatchesReference()).values
    assert (values["correct"], values["wrong"], values["unread"]) == ([0, None], [0, None], [1, None])
    assert (values["accepted"], values["finished"]) == ([0, 1], [0, 1])
    assert values["distinct_1"] == [None, 1]


class Broken(RowFilter):
    kind: str = "broken"

    def check(self, sample: Sample) -> Verdict:
        raise RuntimeError("out of order")


def test_what_a_filter_cannot_tell_is_missing_and_not_refused() -> None:
    values = Scored("m", "base", [answer("7", prompt("q", "7"))], [Broken()], MatchesReference()).values
    assert (values["accepted"], values["correct"]) == ([None], [1])


# -- several answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "right", "chance"),
    [
        (1, 5, 2, 0.4),
        (2, 5, 2, 0.7),
        (5, 5, 1, 1.0),
        (3, 5, 0, 0.0),
        (3, 4, 2, 1.0),
        (10, 200, 3, 1 - 190 * 189 * 188 / (200 * 199 * 198)),
    ],
)
def test_pass_at_k_is_the_estimate_without_bias(k: int, n: int, right: int, chance: float) -> None:
    """2 of 5: a pair holds a right one unless both are of the 3 wrong ones: 1 - 3 / 10."""
    assert pass_at(k, n, right) == pytest.approx(chance)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n), st.integers(0, n))))
def test_pass_at_k_is_the_mean_over_all_choices_of_k(kn: tuple[int, int, int]) -> None:
    k, n, right = kn
    chosen = list(combinations([1] * right + [0] * (n - right), k))
    assert pass_at(k, n, right) == pytest.approx(sum(map(max, chosen)) / len(chosen))


def test_draws_are_measured_beside_the_first_answer() -> None:
    made = scored(
        ["It is 7", "It is 8"], draws=[["is 7", "is 7", "is 8", "9"], ["is 1", "is 2", "3", "4"]], how="numeric"
    )
    assert made.values["correct"] == [1, 0]
    assert made.values["pass@1"] == [0.5, 0]
    assert made.values["pass@2"] == [pytest.approx(1 - 1 / 6), 0]  # of 6 pairs one has both wrong ones
    assert made.values["accepted@1"] == [0.75, 0.5]  # the filter wants two words
    assert made.values["accepted@2"] == [1, pytest.approx(1 - 1 / 6)]
    assert made.values["distinct_1"][0] == pytest.approx(4 / 7)  # is 7 8 9 of seven words
    assert [s.draw for s in made.answers()] == [0, 1, 2, 3, 4] * 2


def test_a_prompt_with_fewer_draws_that_can_be_told_than_k_is_missing() -> None:
    made = scored(["is 7"], None, draws=[["is 7", "is 8"]])
    assert made.values["pass@1"] == made.values["pass@2"] == [None]
    assert made.values["accepted@2"] == [1]
    p, broken = prompt("q", "7"), Verdict(filter="generate", keep=None, reason="timeout")
    draws = [answer("is 7", p, 1), answer("is 7", p, 2).judged(Verdict(filter="odd", keep=None, reason="filter_error"))]
    half = Scored("m", "base", [answer("7", p)], [], MatchesReference(), [draws], 2)
    assert (half.values["accepted@1"], half.values["accepted@2"]) == ([1], [None])
    lost = Scored(
        "m", "base", [answer("7", p)], [], MatchesReference(), [[answer("7", p, 1), answer("", p, 2).judged(broken)]], 2
    )
    assert (lost.values["accepted@1"], lost.values["pass@1"]) == ([0.5], [0.5])


def test_distinct_counts_pairs_within_an_answer_only() -> None:
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)  # ab ba ab
    assert distinct(["a b", "B c"], 2) == 1  # not "b b", and case does not count
    assert distinct(["a b", "a B"], 2) == 0.5
    assert distinct(["a"], 2) is distinct([], 1) is None


# -- likeness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "reference", "f1"),
    [
        # the examples of Lin 2004, section 3.1
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("Police KILLED, the gunman!", "police killed the gunman", 1.0),
        ("a b c d e", "b d", 4 / 7),  # recall 1, precision .4
        ("nothing", "else", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l(candidate: str, reference: str, f1: float) -> None:
    assert rouge_l(candidate, reference) == pytest.approx(f1)


@given(st.lists(st.sampled_from("abc"), max_size=70), st.lists(st.sampled_from("abcd"), max_size=70))
def test_the_longest_common_subsequence_is_that_of_the_table(a: list[str], b: list[str]) -> None:
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b, 1):
            row[j] = before[j - 1] + 1 if x == y else max(before[j], row[j - 1])
    assert longest_common(a, b) == longest_common(b, a) == row[-1]


def test_likeness_to_the_reference_is_for_references_that_are_texts() -> None:
    text = scored(["the cat sat on the mat"], "the cat sat on the mat").values
    assert (text["bleu"], text["rouge_l"]) == ([pytest.approx(1)], [1])
    for knobs in ({"how": "numeric"}, {"how": "choice"}, {"extract": "A: (.*)"}):
        assert not {"bleu", "rouge_l"} & scored(["it is 7"], **knobs).values.keys()
    assert scored(["a b"], None).values["rouge_l"] == [None]


def test_what_a_model_makes_of_the_accepted_answers_of_the_teacher() -> None:
    teacher, student = (
        scored(["police killed the gunman", "short", "so it is"]),
        scored(["police kill the gunman", "short", "it was"]),
    )
    student.add_forced(teacher, [Forced(loss=6.0, tokens=4, agreed=3), None, Forced(loss=1.0, tokens=2, agreed=2)])
    assert student.values["teacher_loss"] == [1.5, None, 0.5]
    assert student.values["token_agreement"] == [0.75, None, 1]
    assert student.values["teacher_overlap"] == [0.75, None, pytest.approx(2 / 5)]
    served = scored(["a b", "c d", "e f"])
    served.add_forced(teacher, [])  # a model behind an API cannot be led along
    assert "teacher_loss" not in served.values


# -- calibration -------------------------------------------------------------------------------------------------------


def test_confidence_is_the_geometric_mean_of_the_probabilities() -> None:
    p = prompt("q", "7")
    sure = answer("7", p, logprob=math.log(0.5 * 0.8), tokens=2)
    made = Scored("m", "base", [sure, answer("7", p), answer("8", p, logprob=0.0, tokens=1)], [], MatchesReference())
    assert made.confidence == [pytest.approx(math.sqrt(0.4)), None, 1]
    assert made.values["brier"] == [pytest.approx((1 - math.sqrt(0.4)) ** 2), None, 1]


def test_the_calibration_error_weighs_bins_by_what_they_hold() -> None:
    """Near .95 and at 1.0, which is in the last bin too: one of three right. At .25 one of two: too sure there, not sure enough
    here, and the one does not make up for the other."""
    told = [(0.94, 1.0), (0.96, 0.0), (0.25, 0.0), (0.25, 1.0), (1.0, 0.0)]
    off = [off_by_bin(*one) for one in told]
    assert all(one is not None and len(one) == BINS for one in off)
    sums = [sum(column) for column in zip(*(one for one in off if one), strict=True)]
    last = (0.94 + 0.96 + 1.0) - 1
    assert calibration_error(*sums, 5) == pytest.approx((last + 0.5) / 5)
    assert off_by_bin(None, 1.0) is off_by_bin(0.5, None) is None


# -- names -------------------------------------------------------------------------------------------------------------


def test_every_measure_has_a_definition() -> None:
    made = scored(["a b c"], draws=[["a b", "c d"]])
    made.add_forced(made, [Forced(1.0, 2, 1)])
    for name in [*made.values, *MEASURES]:
        assert known(name)
        assert len(definition(name)) > 15
    assert "at least one of 2" in definition("pass@2")
    for wrong in ("pass@", "pass@0", "pass@k", "words@2", "precision"):
        assert not known(wrong)
