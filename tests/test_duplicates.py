"""Duplicates: which are found, which one stays, and how well signatures estimate what they stand for."""

import os
import random
import subprocess
import sys
from itertools import combinations, pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.rows import Message, Sample
from factory.similar import ARTICLES, SHORT, Index, _minhash, normalised, similar_to, sketch
from tests.sample_rows import answer, answers, ends, filtered, prompt

steady = settings(deadline=None, derandomize=True)

LONG = "the quick brown fox jumps over the lazy dog and runs along the river to the old stone bridge"
CHINESE = "今天天气很好,我们去公园散步,看见许多花和树,还有孩子们在草地上玩耍。"

FOUND: list[tuple[Any, list[str], list[str]]] = [
    # filter, answers to as many prompts, how each ends
    (
        "exact_duplicates",
        ["The sky is blue.", "the sky,  is BLUE", "The sky is not blue.", "Sky is blue!", ""],
        ["", "duplicate", "", "duplicate", ""],
    ),
    ("exact_duplicates", ["3.5", "35", "-5", "5", "+", "-"], [""] * 6),
    ("exact_duplicates", ["", "", " "], ["", "duplicate", "duplicate"]),
    ("exact_duplicates", ["Straße 1", "STRASSE 1", "東京", "東京。"], ["", "duplicate", "", "duplicate"]),
    ("near_duplicates", [LONG, LONG.upper() + "!", LONG + " today"], ["", "near_duplicate=1.00", "near_duplicate=0.94"]),
    ("near_duplicates", [LONG, " ".join(reversed(LONG.split())), "another text of quite other words"], ["", "", ""]),
    ("near_duplicates", ["yes", "Yes.", "no", "yes indeed sir", "yes indeed, Sir", ""], ["", "near_duplicate=1.00", "", "", "near_duplicate=1.00", ""]),
    ("near_duplicates", [CHINESE, CHINESE.replace("很好", "真好"), CHINESE[:18]], ["", "near_duplicate=0.87", ""]),
    ({"near_duplicates": {"threshold": 0.99}}, [LONG, LONG + " today", LONG.title()], ["", "", "near_duplicate=1.00"]),
    ({"near_duplicates": {"threshold": 0.2}}, [LONG, LONG.replace("quick brown fox", "slow grey cat")], ["", "near_duplicate=0.72"]),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "texts", "expected"), FOUND)
def test_the_first_of_a_kind_stays(spec: Any, texts: list[str], expected: list[str]) -> None:
    assert ends(filtered([spec], answers(*texts))) == expected


@pytest.mark.parametrize("spec", ["exact_duplicates", "near_duplicates"])
def test_every_removal_names_a_twin_that_stays(spec: str) -> None:
    first, second, third = filtered([spec], answers(LONG, LONG, LONG))
    assert [second.verdicts[0].evidence, third.verdicts[0].evidence] == [first.id, first.id]
    assert second.verdicts[0].score == 1.0
    assert not first.verdicts


def test_the_nearest_of_several_twins_is_named() -> None:
    one, two = ([f"{letter}{i}" for i in range(60)] for letter in "wx")
    texts = [" ".join(words) for words in (one, one[:40] + two[40:], one[:46] + two[46:])]
    assert jaccard(texts[0], texts[1]) < 0.5 < jaccard(texts[0], texts[2]) < jaccard(texts[1], texts[2])
    for order in ([0, 1, 2], [1, 0, 2]):
        rows = filtered([{"near_duplicates": {"threshold": 0.55}}], answers(*[texts[i] for i in order]))
        assert [row.ending for row in rows] == ["kept", "kept", "dropped"]
        assert rows[2].verdicts[0].evidence == rows[order.index(1)].id


WITHIN = [
    # filter, (prompt, text, score) of each row, how each ends
    ("exact_duplicates", [("a", "Yes.", 1), ("a", "yes", 2), ("b", "yes", 1), ("b", "no", 1)], ["", "duplicate", "", ""]),
    ({"exact_duplicates": {"by": "q"}}, [("a", "Yes.", 1), ("a", "yes", 2), ("b", "yes", 1)], ["duplicate", "", ""]),
    ("near_duplicates", [("a", LONG, 1), ("b", LONG, 1), ("b", LONG.title(), 2)], ["", "", "near_duplicate=1.00"]),
    ({"near_duplicates": {"by": "q"}}, [("a", LONG, 1), ("b", LONG, 1), ("b", LONG.title(), 2)], ["", "near_duplicate=1.00", ""]),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "rows", "expected"), WITHIN)
def test_within_a_prompt_only_its_draws_are_compared(
    spec: Any, rows: list[tuple[str, str, float]], expected: list[str]
) -> None:
    ((kind, knobs),) = spec.items() if isinstance(spec, dict) else [(spec, {})]
    samples = [answer(text, prompt(asked), i, scores={"q": score}) for i, (asked, text, score) in enumerate(rows)]
    ended = filtered([{kind: {**knobs, "within": "prompt"}}], samples)
    assert ends(ended) == expected
    for row in ended:
        if row.ending == "dropped":
            assert row.verdicts[0].evidence in {
                one.id for one in ended if one.ending == "kept" and one.prompt == row.prompt
            }
            assert row.verdicts[0].score == 1.0


def test_prompts_are_not_compared_within_a_prompt() -> None:
    with pytest.raises(ValueError, match="write one of the two"):
        filtered([{"exact_duplicates": {"of": "prompts", "within": "prompt"}}], [])


MARKS = st.text(alphabet="aAthe 1290,;.-+#_$5%\n\t\x1f\x7f", max_size=30) | st.text(
    alphabet=st.characters(max_codepoint=127)
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(MARKS)
def test_ascii_is_levelled_as_all_other_text(text: str) -> None:
    """Ten times faster, by another way: a letter that is not ASCII sends the same text along the slow one."""
    slow = normalised(f"{text} \u00e9").removesuffix("\u00e9").rstrip()
    assert normalised(text) == slow or set(slow.split()) <= {*ARTICLES} or not slow


def test_printers_marks_are_levelled_like_typed_ones() -> None:
    printed = "\u201cIt\u2019s 3\u20135 \u2014 or \u20185\u2019\u2026\xa0so\u201d"
    assert normalised(printed) == "its 3~5 or 5 so" == normalised(f"{printed} \u00e9").removesuffix(" \u00e9")


# -- prompts ---------------------------------------------------------------------------------------------------------------


def turn(*contents: str) -> list[Message]:
    roles = ["user", "assistant"] * len(contents)
    return [Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)]


def test_of_prompts_drops_rows_of_a_question_asked_before_and_keeps_all_draws() -> None:
    one, same, other = prompt("What is it?"), prompt("what is  it"), prompt("Who is it?")
    rows = [
        answer("a", one),
        answer("b", one, draw=1),
        answer("c", same),
        answer("d", same, draw=1),
        answer("e", other),
    ]
    ended = filtered([{"exact_duplicates": {"of": "prompts"}}], rows)
    assert ends(ended) == ["", "", "duplicate", "duplicate", ""]
    assert ended[2].verdicts[0].evidence == rows[0].id


def test_near_prompts_share_their_end_and_the_best_answer_says_which_stays() -> None:
    one, near, other = prompt(LONG), prompt(LONG + " today"), prompt("another text of quite other words")
    rows = [
        answer(f"{i}", to, draw, scores={"q": i}) for i, (to, draw) in enumerate(product([one, near, other], (0, 1)))
    ]
    ended = filtered([{"near_duplicates": {"of": "prompts"}}], rows)
    assert ends(ended) == ["", "", "near_duplicate=0.94", "near_duplicate=0.94", "", ""]
    assert {row.verdicts[0].evidence for row in ended[2:4]} == {rows[0].id}
    ended = filtered([{"near_duplicates": {"of": "prompts", "by": "q"}}], rows)
    assert ends(ended) == ["near_duplicate=0.94", "near_duplicate=0.94", "", "", "", ""]
    assert {row.verdicts[0].evidence for row in ended[:2]} == {rows[3].id}


def test_conversations_are_told_apart_by_all_their_turns() -> None:
    texts = [turn("Tell me of Rome", "An old city.", "More, please"), turn("Tell me of Oslo", "Cold.", "More, please")]
    system = Message(role="system", content="Be brief.")
    rows = [answer(str(i), prompt(turns=t)) for i, t in enumerate([*texts, [system, *texts[0]]])]
    assert ends(filtered([{"exact_duplicates": {"of": "prompts"}}], rows)) == ["", "", "duplicate"]


# -- which one stays -------------------------------------------------------------------------------------------------------

BY = [
    # filter, (text, score) of each row, how each ends, whose twin the dropped are
    ("exact_duplicates", [("a", 1), ("A", 3), ("a.", 2)], ["duplicate", "", "duplicate"], 1),
    ("exact_duplicates", [("a", 2), ("a", 2), ("a", 1)], ["", "duplicate", "duplicate"], 0),
    ("exact_duplicates", [("a", None), ("a", 1), ("a", 2)], ["no_score:quality", "duplicate", ""], 2),
    ("near_duplicates", [(LONG, 1), (LONG + " today", 5), ("other", 0)], ["near_duplicate=0.94", "", ""], 1),
    ("near_duplicates", [(LONG, 0), (LONG, -1), (LONG, None)], ["", "near_duplicate=1.00", "no_score:quality"], 0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "expected", "twin"), BY)
def test_by_a_score_the_best_stays_and_ties_go_by_order(
    kind: str, rows: list[tuple[str, float | None]], expected: list[str], twin: int
) -> None:
    samples = [
        answer(text, prompt(f"q{i}"), scores={} if score is None else {"quality": score})
        for i, (text, score) in enumerate(rows)
    ]
    ended = filtered([{kind: {"by": "quality"}}], samples)
    assert ends(ended) == expected
    assert [row.id for row in ended] == [row.id for row in samples]
    assert {row.verdicts[-1].evidence for row in ended if row.ending == "dropped"} == {samples[twin].id}
    assert {row.ending for row in ended if row.verdicts and "no_score" in row.verdicts[-1].reason} <= {"failed"}


def test_by_logprob_the_likeliest_stays() -> None:
    rows = [answer("a", logprob=-3.0), answer("a", draw=1, logprob=0.0), answer("a", draw=2)]
    assert ends(filtered([{"exact_duplicates": {"by": "logprob"}}], rows)) == ["duplicate", "", "no_score:logprob"]


def test_of_prompts_by_a_score_the_question_with_the_best_answer_stays() -> None:
    one, same = prompt("What is it?"), prompt("what is it")
    rows = [
        answer("a", one, scores={"q": 2.0}),
        answer("b", one, draw=1, scores={"q": 1.0}),
        answer("c", same, scores={"q": 3.0}),
    ]
    ended = filtered([{"exact_duplicates": {"of": "prompts", "by": "q"}}], rows)
    assert ends(ended) == ["duplicate", "duplicate", ""]


def test_only_rows_that_reach_the_filter_compete() -> None:
    rows = answers("a a a", "a a a", "a a a", quality=[1, 2, 9])
    rows[2] = answer("a a a", rows[2].prompt, finish="length", scores={"quality": 9.0})
    filters = ["finished", {"exact_duplicates": {"by": "quality"}}]
    assert ends(filtered(filters, rows)) == ["duplicate", "", "unfinished:length"]


def test_an_earlier_filter_that_remembers_rows_is_not_confused_by_the_second_reading() -> None:
    rows = answers("a b", "A b", LONG, LONG + " today", LONG + " now", quality=[1, 2, 1, 3, 2])
    filters: list[Any] = ["exact_duplicates", {"near_duplicates": {"by": "quality"}}]
    assert ends(filtered(filters, rows)) == ["", "duplicate", "near_duplicate=0.94", "", "near_duplicate=0.88"]
    twice: list[Any] = [{"exact_duplicates": {"by": "quality"}}, {"near_duplicates": {"by": "quality"}}]
    assert ends(filtered(twice, rows)) == ["duplicate", "", "near_duplicate=0.94", "", "near_duplicate=0.88"]


@pytest.mark.parametrize("by", [None, "quality"])
def test_the_same_row_twice_is_a_twin_of_itself(by: str | None) -> None:
    row = answer(LONG, scores={"quality": 1.0})
    ended = filtered([{"near_duplicates": {"by": by}}], [row, row])
    assert ends(ended) == ["", "near_duplicate=1.00"]
    assert ended[1].verdicts[0].evidence == row.id


ROWS = st.lists(st.tuples(st.sampled_from("abcde"), st.none() | st.integers(0, 3)), max_size=30)


@steady
@given(ROWS)
def test_by_a_score_agrees_with_looking_at_all_pairs(rows: list[tuple[str, int | None]]) -> None:
    samples = [
        answer(text, prompt(f"q{i // 3}"), draw=i, scores={} if score is None else {"q": float(score)})
        for i, (text, score) in enumerate(rows)
    ]
    for i, row in enumerate(filtered([{"exact_duplicates": {"by": "q"}}], samples)):
        text, score = rows[i]
        twins = [(-s, j) for j, (t, s) in enumerate(rows) if t == text and s is not None]
        if score is None:
            assert row.ending == "failed"
        elif min(twins)[1] == i:
            assert row.ending == "kept"
        else:
            assert (row.ending, row.verdicts[-1].evidence) == ("dropped", samples[min(twins)[1]].id)


@steady
@given(st.lists(st.sampled_from([LONG, LONG + " now", LONG + " today", "yes", "yes indeed", ""]), max_size=12))
def test_with_equal_scores_the_first_stays(texts: list[str]) -> None:
    rows = answers(*texts, q=[1.0] * len(texts))
    for kind in ("exact_duplicates", "near_duplicates"):
        assert filtered([{kind: {"by": "q"}}], rows) == filtered([kind], rows)


# -- estimates -------------------------------------------------------------------------------------------------------------


def jaccard(one: str, two: str) -> float:
    a, b = (set(pairwise(normalised(text).split())) for text in (one, two))
    return len(a & b) / len(a | b)


def two_texts(similarity: float, number: int) -> tuple[str, str]:
    """Two texts of 60 words that share a beginning, so that their bigrams have about this similarity."""
    words = [f"w{number}x{i}" for i in range(120)]
    shared = round(60 * 2 * similarity / (1 + similarity))
    return " ".join(words[:60]), " ".join([*words[:shared], *words[60 : 120 - shared]])


@steady
@given(
    st.lists(st.integers(0, 40), min_size=SHORT + 2, max_size=80),
    st.lists(st.integers(0, 40), min_size=SHORT + 2, max_size=80),
)
def test_an_estimate_is_within_five_standard_errors_of_jaccard(a: list[int], b: list[int]) -> None:
    one, two = (" ".join(f"w{i}" for i in numbers) for numbers in (a, b))
    true = jaccard(one, two)
    estimated = sketch(one).jaccard(sketch(two))
    assert abs(estimated - true) <= 5 * (max(true * (1 - true), 0.01) / 128) ** 0.5
    assert sketch(one).jaccard(sketch(one)) == 1.0


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_estimates_are_not_biased(similarity: float) -> None:
    pairs = [two_texts(similarity, i) for i in range(400)]
    errors = [sketch(a).jaccard(sketch(b)) - jaccard(a, b) for a, b in pairs]
    spread = (similarity * (1 - similarity) / 128) ** 0.5
    assert abs(sum(errors) / len(errors)) < 0.01
    assert (sum(e * e for e in errors) / len(errors)) ** 0.5 == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize(
    ("similarity", "low", "high"), [(0.95, 0.999, 1.0), (0.8, 0.97, 1.0), (0.6, 0.0, 0.06), (0.3, 0.0, 0.0)]
)
def test_at_the_default_threshold_twins_are_found_and_others_are_not(
    similarity: float, low: float, high: float
) -> None:
    found = 0
    for i in range(300):
        index, (one, two) = Index(0.7), two_texts(similarity, i)
        index.add(sketch(one), "one")
        found += bool(index.near(sketch(two)))
    assert low <= found / 300 <= high


def test_signatures_are_the_same_everywhere() -> None:
    assert _minhash(["a b", "b c", "c d"]).digest() == _minhash(["c d", "a b", "b c", "a b"]).digest()
    code = f"from factory.similar import sketch; print(sketch({LONG!r}).digest())"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "77"}
    )
    assert elsewhere.stdout.strip() == str(sketch(LONG).digest())


def test_what_is_kept_of_a_row_is_small_whatever_its_length() -> None:
    huge = " ".join(f"word{i}" for i in range(50_000))
    assert len(sketch(huge).digest()) == len(sketch(LONG).digest()) == 128
    assert len(sketch("x" * 100_000)) == 32  # one word: a hash of it


def test_planted_near_duplicates_are_all_found_in_a_large_set() -> None:
    draw = random.Random(5)
    texts = [" ".join(draw.choices([f"w{i}" for i in range(2000)], k=80)) for _ in range(1500)]
    planted = [text + " indeed" for text in texts[:300]]
    rows = filtered(["near_duplicates"], answers(*texts, *planted))
    assert [row.ending for row in rows] == ["kept"] * 1500 + ["dropped"] * 300
    twins = [row.verdicts[0].evidence for row in rows[1500:]]
    assert twins == [row.id for row in rows[:300]]


def test_groups_of_similar_texts_need_a_chain_only() -> None:
    chain = [LONG, LONG + " today", LONG + " today again"]
    texts = [(str(i), text) for i, text in enumerate([*chain, "quite another text than that"])]
    assert similar_to({"0": chain[0]}, lambda: texts, 0.9) == {"0": "0", "1": "0", "2": "0"}
    assert any(jaccard(a, b) < 0.9 for a, b in combinations(chain, 2))


def test_a_sample_says_its_own_value() -> None:
    row: Sample = answer("a", logprob=-1.0, scores={"q": 2.0, "logprob": 7.0})
    assert (row.value("q"), row.value("logprob"), row.value("other")) == (2.0, -1.0, None)
