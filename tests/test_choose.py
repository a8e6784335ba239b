"""Stage `choose`: best of N, caps, ties, and the closest to the reference by a BLEU that was worked out by hand."""

import math
import time
from collections import Counter
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from factory.choose import Choose, choose, path, sentence_bleu
from factory.rows import Message, Prompt, Sample, by_prompt
from tests.sample_rows import answer, ends, prompt

steady = settings(deadline=None)


def draws(*scores: float | None, to: str = "q", **fields: Any) -> list[Sample]:
    """Draws of one prompt with a score `s`, or without one."""
    asked = prompt(to)
    return [
        answer(f"text {i}", asked, draw=i, scores={} if score is None else {"s": score}, **fields)
        for i, score in enumerate(scores)
    ]


def chosen(knobs: dict[str, Any], rows: list[Sample], seed: int = 7) -> list[str]:
    ended = list(choose(Choose(**knobs), lambda: by_prompt(rows), seed))
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
    ended = list(choose(Choose(best=1, by="s"), lambda: by_prompt(draws(1, 2, None)), 7))
    assert [row.ending for row in ended] == ["dropped", "kept", "failed"]
    assert [row.verdicts[-1].score for row in ended if row.verdicts] == [1, None]


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({}, "best:"),
        ({"best": 1}, "best: needs by:"),
        ({"best": 1, "by": "s", "cap": 1}, "either best: .* or cap:"),
        ({"cap": 0}, "greater than 0"),
        ({"by": "s"}, "say what to choose"),
        ({"by": "s", "quota": {"by": "tag", "most": 3}}, "by: ranks"),
        ({"control": "random", "quota": {"by": "tag", "most": 3}}, "at random already"),
        ({"quota": {"by": "tag", "most": {}}}, "at least 1"),
        ({"quota": {"by": "tag", "most": {"a": -1}}}, "greater than or equal to 0"),
    ],
)
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


# -- distinct traces -------------------------------------------------------------------------------------------------------

PATHS = [
    # kind, a trace, another one, whether they are the same
    ("equations", "48/2 = 24 clips, so 48+24 = 72.", "First 48 / 2 = 24. In all 48 + 24 = 72 clips", True),
    ("equations", "48/2 = <<48/2=24>>24", "half: 48/2=24", True),
    ("equations", "3 \u00d7 $4 = $12", "3 \\times 4 = 12.00, and 3x4 is x = 12", True),
    ("equations", "1,200 + 50 = 1,250", "1200+50 = 1250", True),
    ("equations", "48+24 = 72, 48/2 = 24", "48/2 = 24, 48+24 = 72", False),
    ("equations", "24+48 = 72", "48+24 = 72", False),
    ("equations", "2*3 = 6", "2*3 = 7", False),
    ("equations", "It costs 5. 3+4 = 7", "3+4=7", True),
    ("equations", "x = 5", "y = 5", False),  # no calculation: their texts differ
    ("equations", "It is five.", "it is FIVE", True),
    ("equations", "(1+2)*3 = 9", "1+2*3 = 9", False),
    ("numbers", "take 48, halve it: 24; both are 72", "48 then 24.0, then 72!", True),
    ("numbers", "48, 24, 72", "48, 72, 24", False),
    ("numbers", "1,000 and -5", "1000 and -5", True),
    ("numbers", "none here", "none HERE", True),
    ("numbers", "none here", "none there", False),
    ("text", "It is, five.", "it is FIVE", True),
    ("text", "3+4 = 7", "so 3+4 = 7", False),
]


@pytest.mark.parametrize(("kind", "one", "other", "same"), PATHS)
def test_what_makes_two_traces_the_same(kind: str, one: str, other: str, same: bool) -> None:
    rows = [answer(text, draw=i) for i, text in enumerate([one, other])]
    assert sorted(chosen({"distinct": kind}, rows)) == (["", "same_trace"] if same else ["", ""])
    hidden = [answer("7", draw=i, reasoning=text) for i, text in enumerate([one, other])]
    assert sorted(chosen({"distinct": kind}, hidden)) == (["", "same_trace"] if same else ["", ""])


@steady
@given(st.text(alphabet="12.,$%()+-*/^x= ab\n\u00d7", max_size=200))
def test_any_text_has_a_path_and_it_is_its_own(text: str) -> None:
    for kind in ("equations", "numbers", "text"):
        assert path(kind, text) == path(kind, text)
        assert len(path(kind, text)) >= 1


def test_a_long_run_of_digits_takes_no_time() -> None:
    began = time.process_time()
    path("equations", "1 " * 50_000 + "1+" * 50_000)
    assert time.process_time() - began < 1


def test_of_equal_traces_the_one_most_unlike_the_others_stays_and_the_twin_is_named() -> None:
    texts = ["2+2 = 4", "2+2 = 4 says everybody who has ever counted", "so 4 it is: 3+1 = 4", "2+2 = 4 !"]
    rows = [answer(text, draw=i) for i, text in enumerate(texts)]
    # by hand: nothing else is kept when the second comes, so the first stays; the fourth is one letter closer to the third
    # or further from it than the first
    ended = list(choose(Choose(distinct="equations"), lambda: by_prompt(rows), 7))
    apart = [Levenshtein.distance(text, texts[2]) for text in texts]
    stays = 3 if apart[3] > apart[0] else 0
    assert [i for i, row in enumerate(ended) if row.ending == "kept"] == sorted({stays, 2})
    assert {row.verdicts[-1].evidence for row in ended if row.ending == "dropped"} == {rows[stays].id}
    late = [rows[i] for i in (0, 2, 1, 3)]  # when the long one comes, it is further away than the first
    assert chosen({"distinct": "equations"}, late) == ["same_trace", "", "", "same_trace"]


def test_with_a_score_the_best_of_a_trace_stays_and_the_cap_counts_traces() -> None:
    texts = ["1+1 = 2", "so 1+1 = 2", "2*1 = 2", "3-1 = 2", "4/2 = 2"]
    rows = [answer(text, draw=i, scores={"s": float(i)}) for i, text in enumerate(texts)]
    assert chosen({"distinct": "equations", "by": "s"}, rows) == ["same_trace", "", "", "", ""]
    assert chosen({"distinct": "equations", "by": "s", "best": 2}, rows) == [
        "same_trace", "not_chosen=1", "not_chosen=2", "", "",
    ]  # fmt: skip
    capped = ["", "same_trace", "", "over_cap=3>2", "over_cap=4>2"]
    assert sorted(chosen({"distinct": "equations", "cap": 2}, rows)) == sorted(capped)
    far = [
        answer(t, draw=i, scores={"s": -float(i)}) for i, t in enumerate(["1+1 = 2", "2*1 = 2", "and so on: 1+1 = 2"])
    ]
    assert chosen({"distinct": "equations", "by": "s"}, far) == ["", "", "same_trace"]
    assert chosen({"distinct": "equations"}, far) == ["same_trace", "", ""]
    unscored = [answer("1+1 = 2", draw=9), *rows]
    assert chosen({"distinct": "equations", "by": "s"}, unscored)[0] == "no_score:s"


def test_traces_of_two_prompts_and_with_per_of_two_models_are_never_the_same() -> None:
    rows = [answer("1+1 = 2", prompt(to), model=model) for to in ("one", "two") for model in ("a", "b")]
    assert chosen({"distinct": "equations"}, rows) == ["", "same_trace"] * 2
    assert chosen({"distinct": "equations", "per": "model"}, rows) == [""] * 4


# -- quotas ----------------------------------------------------------------------------------------------------------------


def tagged(*tags: list[str] | None, draws: int = 1, source: str = "list") -> list[Sample]:
    """Answers to one prompt for each list of tags."""
    asked = [
        Prompt.of([Message(role="user", content=f"{source} {i}")], source=source, tags=each or [])
        for i, each in enumerate(tags)
    ]
    return [answer(f"text {d}", one, draw=d) for one in asked for d in range(draws)]


QUOTAS = [
    # quota, the tags of each prompt, how many of each first tag stay
    (2, [["a"]] * 5 + [["b"]], {"a": 2, "b": 1}),
    (5, [["a"]] * 5, {"a": 5}),
    (4, [["a"]] * 5, {"a": 4}),
    (1, [["a"], [], [], ["b", "a"]], {"a": 1, "": 1, "b": 1}),
    ({"a": 2}, [["a"]] * 3 + [["b"]] * 3 + [[]] * 2, {"a": 2, "b": 3, "": 2}),
    ({"a": 0}, [["a"]] * 3 + [["b"]], {"b": 1}),
    ({"a": 2, "b": 1}, [["b", "a"]] * 3 + [["a", "b"]] * 3, {"b": 1, "a": 2}),  # each counts for its first tag
    ({"a": 1}, [["b", "a"]] * 3, {"b": 1}),  # of the tags, only the limited one counts
]


@pytest.mark.parametrize(("most", "tags", "left"), QUOTAS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_quota_is_filled_exactly(most: Any, tags: list[list[str]], left: dict[str, int], seed: int) -> None:
    rows = tagged(*tags)
    ended = chosen({"quota": {"by": "tag", "most": most}}, rows, seed)
    kept = [row for row, end in zip(rows, ended, strict=True) if not end]
    assert Counter(row.prompt.tags[0] if row.prompt.tags else "" for row in kept) == left
    assert all(end.startswith("over_quota=") for end in ended if end)


def test_a_quota_of_lists_draws_by_seed_whole_prompts_first() -> None:
    rows = [*tagged(*[None] * 30, draws=4, source="x"), *tagged(*[None] * 3, source="y")]
    knobs = {"quota": {"by": "source", "most": {"x": 10}}}
    ended = chosen(knobs, rows)
    assert ended == chosen(knobs, rows)
    assert ended != chosen(knobs, rows, seed=8)
    kept = Counter(row.prompt.id for row, end in zip(rows, ended, strict=True) if not end and row.prompt.source == "x")
    assert sorted(kept.values()) == [2, 4, 4]
    assert ended[-3:] == ["", "", ""]
    (one,) = {len({*chosen(knobs, tagged(None, draws=12, source="x"))})}  # a single prompt fills a quota, too
    assert one == 2


def test_every_prompt_is_drawn_equally_often() -> None:
    rows = tagged(*[["a"]] * 10)
    counts = Counter(
        i
        for seed in range(1000)
        for i, end in enumerate(chosen({"quota": {"by": "tag", "most": 3}}, rows, seed))
        if not end
    )
    assert sum((count - 300) ** 2 / 300 for count in counts.values()) * 10 / 7 < 29.6  # 0.05 % of fair draws are above


def test_the_quota_counts_what_is_chosen_of_each_prompt() -> None:
    rows = tagged(*[["a"]] * 4, draws=3)
    ended = chosen({"cap": 1, "quota": {"by": "tag", "most": 3}}, rows)
    assert Counter(end.partition("=")[0] for end in ended) == {"": 3, "over_cap": 8, "over_quota": 1}


# -- the control -----------------------------------------------------------------------------------------------------------


def test_a_control_keeps_as_many_of_each_prompt_at_random() -> None:
    rows = [row for i in range(200) for row in draws(1, 5, 3, None, to=f"q{i}")]
    real, ended = (chosen({"best": 2, "by": "s", **more}, rows) for more in ({}, {"control": "random"}))
    for i in range(0, len(rows), 4):
        assert ended[i : i + 4].count("") == real[i : i + 4].count("") == 2
    places = Counter(i % 4 for i, end in enumerate(ended) if not end)
    assert all(60 < places[place] < 140 for place in range(4))  # also those that the score would never choose
    assert set(ended) == {"", "not_drawn"}
    by_model = {"cap": 1, "per": "model", "control": "random"}
    two = [answer(str(i), draw=i, model=model) for i, model in enumerate("aab")]
    assert chosen(by_model, two)[2] == ""
    assert chosen(by_model, two)[:2].count("") == 1
