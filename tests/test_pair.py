"""Stage `pair`: chosen is the best, rejected a random lower one; ties and equal texts never pair; the audit counts right."""

import random
from collections import Counter
from itertools import chain
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.audit import audit
from factory.data_findings import length_predicts
from factory.errors import RecipeError
from factory.pair import PairUp, pair, unpaired
from factory.rows import Message, Pair, Prompt, Sample, Unpaired, by_prompt
from tests.sample_rows import answer, prompt


def view(asked: Prompt) -> list[Message]:
    return asked.messages


def candidates(*scores: float | None, to: str = "q", texts: list[str] | None = None) -> list[Sample]:
    """One answer each of the models a, b, c ... to a prompt, with a score `s`, or without one."""
    asked = prompt(to)
    return [
        answer(
            texts[i] if texts else f"text {i}", asked, model="abcdef"[i], scores={} if score is None else {"s": score}
        )
        for i, score in enumerate(scores)
    ]


def paired(rows: list[Sample], seed: int = 7, **knobs: Any) -> list[Pair | Sample]:
    made = pair(PairUp(**knobs), by_prompt(rows), seed, view)
    return list(chain.from_iterable([each] if isinstance(each, Sample) else each for each in made))


def outcome(rows: list[Sample], **knobs: Any) -> str:
    """The models of the pair as "chosen>rejected", or the reason why there is none."""
    (row,) = paired(rows, **knobs)
    return f"{row.chosen_model}>{row.rejected_model}" if isinstance(row, Pair) else row.verdicts[-1].reason


RULES: list[tuple[list[float | None], dict[str, Any], set[str]]] = [
    # scores, knobs, what may come of them over seeds
    ([1, 5, 3, 2], {}, {"b>a", "b>c", "b>d"}),
    ([1, 5, 3, 2], {"rejected": "worst"}, {"b>a"}),
    ([1, 5, 3, 2], {"rejected": "next"}, {"b>c"}),
    ([5, 5, 3], {}, {"a>c"}),  # of equal best ones the first, and never the other
    ([5, 5, 3, 3], {"rejected": "worst"}, {"a>c"}),
    ([4, 5, 1, 3], {"min_margin": 2}, {"b>c", "b>d"}),
    ([4, 5], {"min_margin": 1}, {"b>a"}),
    ([3.1, 4.1], {"min_margin": 1}, {"b>a"}),  # 4.1 - 3.1 is 0.99...: rounding is no reason
    ([4, 5, 4.5], {"min_margin": 2}, {"margin=1<2"}),
    ([5, 5], {}, {"tie"}),
    ([5, 5, 5], {"min_margin": 1}, {"tie"}),
    ([None, 5, 3], {}, {"b>c"}),
    ([None, 5], {}, {"only_one"}),
    ([5], {}, {"only_one"}),
    ([None, None], {}, {"no_score:"}),
    ([4, 5], {"score": "other"}, {"no_score:other"}),
    ([0, -1], {}, {"a>b"}),
]


@pytest.mark.parametrize(("scores", "knobs", "expected"), RULES)
def test_zephyrs_rule(scores: list[float | None], knobs: dict[str, Any], expected: set[str]) -> None:
    assert {outcome(candidates(*scores, to=f"q{i}"), **knobs) for i in range(60)} == expected


def test_missing_scores_set_the_prompt_aside_and_ties_drop_it() -> None:
    rows = [*candidates(None, None, to="one"), *candidates(5, 5, to="two"), *candidates(5, 4, to="three")]
    ended = paired(rows)
    assert [row.ending if isinstance(row, Sample) else "pair" for row in ended] == ["failed", "dropped", "pair"]
    assert len(ended) == 3


def test_equal_texts_never_pair() -> None:
    assert outcome(candidates(5, 1, texts=["same", " same\n"])) == "equal_texts"
    for i in range(30):
        assert outcome(candidates(5, 1, 2, to=f"q{i}", texts=["same", "same", "other"])) == "a>c"


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_a_truncated_or_empty_answer_is_on_neither_side(finish: str) -> None:
    asked = prompt()
    cut = answer("best but cut", asked, model="a", finish=finish, scores={"s": 9.0})
    empty = answer("  ", asked, model="b", scores={"s": 1.0})
    good, fair = (answer(m, asked, model=m, scores={"s": s}) for m, s in (("c", 5.0), ("d", 4.0)))
    assert outcome([cut, empty, good, fair]) == "c>d"
    assert outcome([cut, good]) == "only_one"
    assert outcome([cut, empty]) == "no_finished_answers"


def test_a_pair_holds_what_training_and_lineage_need() -> None:
    rows = candidates(2, 5, texts=[" bad\n", "good "])
    (made,) = paired(rows)
    assert isinstance(made, Pair)
    assert made.prompt == [{"role": "user", "content": "q"}]
    assert (made.chosen, made.rejected) == (
        [{"role": "assistant", "content": "good"}],
        [{"role": "assistant", "content": "bad"}],
    )
    assert (made.margin, made.chosen_score, made.rejected_score) == (3, 5, 2)
    assert made.parents == [rows[1].id, rows[0].id]


def test_a_pair_shows_the_student_s_view() -> None:
    knobs, seen = PairUp(), [Message(role="user", content="as the student sees it")]
    ((made,),) = pair(knobs, by_prompt(candidates(1, 2)), 0, lambda asked: seen)  # type: ignore[misc]
    assert isinstance(made, Pair)
    assert made.prompt == seen


def test_by_logprob_where_the_recipe_says_so() -> None:
    asked = prompt()
    rows = [answer(m, asked, model=m, logprob=v, scores={"s": 1.0}) for m, v in (("a", -9.0), ("b", -1.0))]
    assert outcome(rows, score="logprob") == "b>a"


def test_several_scores_without_a_name_are_the_recipe_s_mistake() -> None:
    rows = [answer("x", scores={"s": 1.0}), answer("y", draw=1, scores={"t": 2.0})]
    with pytest.raises(RecipeError, match=r"several scores \(s, t\).*pair: \{score: \.\.\.\}"):
        paired(rows)


# -- chance ----------------------------------------------------------------------------------------------------------------

MANY = [row for i in range(3000) for row in candidates(1, 2, 3, 5, to=f"question {i}")]


def rejected(seed: int, rows: list[Sample] = MANY) -> dict[str, str]:
    return {r.prompt[0]["content"]: r.rejected_model for r in paired(rows, seed) if isinstance(r, Pair)}


def test_the_rejected_one_is_drawn_evenly_over_many_prompts() -> None:
    counts = Counter(rejected(7).values())
    assert set(counts) == {"a", "b", "c"}
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert chi_square < 13.8  # 0.1 % of fair draws are above it (2 degrees of freedom)


def test_seed_and_prompt_alone_decide_the_draw() -> None:
    groups = list(by_prompt(MANY))
    random.Random(0).shuffle(groups)
    shuffled = [row for group in groups[:1000] for row in group]
    everything = rejected(7)
    assert rejected(7, shuffled).items() <= everything.items()
    changed = sum(everything[asked] != model for asked, model in rejected(8).items())
    assert 0.6 < changed / 3000 < 0.73  # two of three draws differ by chance


# -- several pairs, length ---------------------------------------------------------------------------------------------------

SEVERAL: list[tuple[list[float], dict[str, Any], list[str]]] = [
    # scores, knobs, the pairs in order
    ([1, 5, 3, 2], {"rejected": "worst", "pairs_per_prompt": 2}, ["b>a", "b>d"]),
    ([1, 5, 3, 2], {"rejected": "next", "pairs_per_prompt": 2}, ["b>c", "b>d"]),
    ([1, 5, 3, 2], {"rejected": "worst", "pairs_per_prompt": 9}, ["b>a", "b>d", "b>c"]),
    ([1, 5, 3, 2], {"rejected": "worst", "pairs_per_prompt": 9, "min_margin": 3}, ["b>a", "b>d"]),
    ([1, 1, 0, 0], {"rejected": "worst", "pairs_per_prompt": 2}, ["a>c", "b>d"]),  # right and wrong: each used once
    ([1, 1, 0], {"rejected": "worst", "pairs_per_prompt": 2}, ["a>c", "b>c"]),
    ([1, 1, 0, 0], {"rejected": "worst", "pairs_per_prompt": 9}, ["a>c", "b>d", "a>d", "b>c"]),
]


@pytest.mark.parametrize(("scores", "knobs", "expected"), SEVERAL)
def test_several_pairs_of_a_prompt_use_each_answer_in_turn(
    scores: list[float], knobs: dict[str, Any], expected: list[str]
) -> None:
    made = paired(candidates(*scores), **knobs)
    assert [f"{row.chosen_model}>{row.rejected_model}" for row in made if isinstance(row, Pair)] == expected
    assert len({row.id for row in made}) == len(made)


LENGTHS: list[tuple[list[str], dict[str, Any], str]] = [
    # texts of the answers with the scores 3, 2, 1; knobs; what comes of it
    (["12345678", "1234", "x"], {"max_length_ratio": 2, "rejected": "worst"}, "a>b"),
    (["12345678", "123", "x"], {"max_length_ratio": 2, "rejected": "worst"}, "length_ratio=2.67>2"),
    (["1234", "12345678", "x"], {"max_length_ratio": 2, "rejected": "worst"}, "a>b"),
    (["1234", "123456789", "x"], {"max_length_ratio": 2, "rejected": "worst"}, "length_ratio=2.25>2"),
    (["12", "34", "x"], {"max_length_ratio": 1, "rejected": "worst"}, "a>b"),
    (["12", "34", "x"], {"rejected": "worst"}, "a>c"),
    (["12", "34", "x"], {"max_length_ratio": 1, "min_margin": 2}, "length_ratio=2>1"),
    (["12", "12", "x"], {"max_length_ratio": 1}, "length_ratio=2>1"),
]


@pytest.mark.parametrize(("texts", "knobs", "expected"), LENGTHS)
def test_answers_too_unlike_in_length_do_not_pair(texts: list[str], knobs: dict[str, Any], expected: str) -> None:
    assert outcome(candidates(3, 2, 1, texts=texts), **knobs) == expected


def test_what_equals_another_best_answer_is_not_rejected() -> None:
    rows = candidates(5, 5, 1, 2, texts=["one", "two", "two", "three"])
    made = paired(rows, pairs_per_prompt=9)
    assert {row.rejected[0]["content"] for row in made if isinstance(row, Pair)} == {"three"}


ANSWERS = st.tuples(
    st.sampled_from(["", " ", "a", " a ", "b", "cc", "ddd"]),
    st.sampled_from(["stop", "stop", "length", "content_filter"]),
    st.sampled_from([None, 0.0, 1.0, 1.0, 2.5, 3.0]),
)
KNOBS = st.fixed_dictionaries(
    {
        "rejected": st.sampled_from(["random", "worst", "next"]),
        "min_margin": st.sampled_from([0.0, 1.0, 2.0]),
        "max_length_ratio": st.sampled_from([None, 1.0, 2.0]),
        "pairs_per_prompt": st.integers(1, 4),
    }
)


@settings(deadline=None, max_examples=300)
@given(st.lists(ANSWERS, min_size=1, max_size=7), KNOBS, st.integers(0, 3))
def test_pairs_never_hold_a_truncated_answer_a_tie_or_equal_texts(
    answers: list[tuple[str, str, float | None]], knobs: dict[str, Any], seed: int
) -> None:
    asked = prompt()
    rows = [
        answer(text, asked, draw=i, finish=finish, scores={} if score is None else {"s": score})
        for i, (text, finish, score) in enumerate(answers)
    ]
    by_id = {row.id: row for row in rows}
    made = paired(rows, seed, **knobs)
    pairs = [row for row in made if isinstance(row, Pair)]
    assert len(pairs) == len(made) or len(made) == 1
    assert len(pairs) <= knobs["pairs_per_prompt"]
    texts = [(row.chosen[0]["content"], row.rejected[0]["content"]) for row in pairs]
    assert len(set(texts)) == len(texts)
    for row, (chosen, rejected) in zip(pairs, texts, strict=True):
        high, low = (by_id[parent] for parent in row.parents)
        assert (high.finish, low.finish) == ("stop", "stop")
        assert chosen.strip()
        assert rejected.strip()
        assert chosen != rejected
        assert (chosen, rejected) == (high.response.strip(), low.response.strip())
        assert row.margin == high.scores["s"] - low.scores["s"] > 0
        assert row.margin >= knobs["min_margin"]
        if limit := knobs["max_length_ratio"]:
            assert max(map(len, (chosen, rejected))) <= limit * min(map(len, (chosen, rejected)))


# -- rows for KTO ------------------------------------------------------------------------------------------------------------

LABELS: list[tuple[list[tuple[str, float | None]], dict[str, Any], list[str]]] = [
    # answers with their scores, knobs, the label of each or why there is none
    ([("a", 5), ("b", 3), ("c", 1)], {"threshold": 3}, ["True", "True", "False"]),
    ([("a", 2.99), ("b", None)], {"threshold": 3}, ["False", "no_score:s"]),
    ([("a", 4), ("b", 3.5), ("c", 3)], {"threshold": 3.5, "min_margin": 0.5}, ["True", "margin=0<0.5", "False"]),
    ([("a", 4), ("b", 3.1)], {"threshold": 3, "min_margin": 0.1}, ["True", "True"]),
    ([("a", 1), ("b", 0)], {"threshold": 1}, ["True", "False"]),  # a verifier: right and wrong
    ([("a", 1), (" a", 1), ("b", 0)], {"threshold": 1}, ["True", "equal_texts", "False"]),
    ([("a", 1), ("a ", 0), ("b", 0)], {"threshold": 1}, ["both_labels", "both_labels", "False"]),
    ([(" ", 1)], {"threshold": 1}, ["empty"]),
]


def labelled(rows: list[Sample], **knobs: Any) -> list[str]:
    made = unpaired(PairUp(form="kto", score="s", **knobs), by_prompt(rows), view)
    return [str(row.label) if isinstance(row, Unpaired) else row.verdicts[-1].reason for row in made]


@pytest.mark.parametrize(("answers", "knobs", "expected"), LABELS)
def test_an_answer_is_desirable_from_the_threshold_on(
    answers: list[tuple[str, float | None]], knobs: dict[str, Any], expected: list[str]
) -> None:
    asked = prompt()
    rows = [answer(t, asked, draw=i, scores={} if s is None else {"s": s}) for i, (t, s) in enumerate(answers)]
    assert labelled(rows, **knobs) == expected


def test_a_truncated_answer_is_neither_desirable_nor_not() -> None:
    rows = [answer("cut", finish="length", scores={"s": 5.0}), answer("cut", draw=1, scores={"s": 1.0})]
    assert labelled(rows, threshold=3) == ["truncated:length", "False"]


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"form": "kto"}, "go together"),
        ({"threshold": 3}, "go together"),
        ({"form": "kto", "threshold": 3, "pairs_per_prompt": 2}, "remove pairs_per_prompt"),
        ({"form": "kto", "threshold": 3, "rejected": "worst"}, "remove rejected"),
        ({"max_length_ratio": 0.5}, "greater than or equal to 1"),
        ({"form": "kto", "threshold": float("nan")}, "finite number"),
        ({"form": "kto", "threshold": float("inf")}, "finite number"),
        ({"min_margin": float("inf")}, "finite number"),
        ({"pairs_per_prompt": 0}, "greater than 0"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=told):
        PairUp(**knobs)


# -- the audit -------------------------------------------------------------------------------------------------------------


def a_pair(chosen: str, rejected: str, margin: float, models: str = "ab") -> Pair:
    return Pair(
        id="x", prompt=[], chosen=[Message(role="assistant", content=chosen)],
        rejected=[Message(role="assistant", content=rejected)], margin=margin, chosen_model=models[0], rejected_model=models[1],
    )  # fmt: skip


def test_the_audit_counts_length_models_equal_texts_and_margins() -> None:
    pairs = [
        a_pair("one two three", "one", 1),
        a_pair("one", "one two", 4, "ba"),
        a_pair("same", "same", 3),
        a_pair("a b", "c", 2),
    ]
    told = audit(iter(pairs))
    assert (told["n"], told["chosen_longer"], told["equal_texts"]) == (4, 0.5, 1)
    assert told["mean_words"] == {"chosen": 7 / 4, "rejected": 5 / 4}
    assert told["models"] == {"chosen": {"a": 0.75, "b": 0.25}, "rejected": {"a": 0.25, "b": 0.75}}
    assert [bin_["count"] for bin_ in told["margins"]] == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert (told["margins"][0]["from"], told["margins"][-1]["to"]) == (1, pytest.approx(4))


def test_the_audit_of_equal_margins_and_of_nothing() -> None:
    told = audit([a_pair("a", "b", 2.0), a_pair("a", "c", 2.0)])
    assert sum(bin_["count"] for bin_ in told["margins"]) == 2
    assert audit([]) == {"n": 0}


def test_the_audit_counts_rows_that_came_before() -> None:
    same = [a_pair("a", "b", 1.0), a_pair("a", "b", 2.0), a_pair("b", "a", 1.0), a_pair("ab", "", 1.0)]
    assert audit(same)["duplicates"] == 1


AUC = [
    # lengths of the chosen and of the rejected; the AUC counted over all couples
    ([3, 3], [1, 1], 1.0),
    ([1, 1], [3, 3], 0.0),
    ([2, 2], [2, 2], 0.5),
    ([1, 4], [2, 3], 0.5),
    ([2, 4], [2, 3], (0.5 + 0 + 1 + 1) / 4),
]


@pytest.mark.parametrize(("chosen", "rejected", "expected"), AUC)
def test_the_auc_of_length(chosen: list[int], rejected: list[int], expected: float) -> None:
    pairs = [a_pair("x" * c, "y" * r, 1.0) for c, r in zip(chosen, rejected, strict=True)]
    assert audit(pairs)["length_auc"] == expected


def test_the_audit_of_rows_for_kto() -> None:
    rows = [
        Unpaired(id="x", prompt=[], completion=[Message(role="assistant", content=text)], label=label, model=model)
        for text, label, model in [("one two", True, "a"), ("one two three", True, "b"), ("no", False, "b")]
    ]
    told = audit([*rows, rows[0]])
    assert (told["n"], told["sides"], told["duplicates"]) == (4, {"desirable": 3, "undesirable": 1}, 1)
    assert told["length_auc"] == 1
    assert told["models"] == {"desirable": {"a": 2 / 3, "b": 1 / 3}, "undesirable": {"b": 1}}
    assert "margins" not in told
    one_sided = audit(rows[:2])
    assert (one_sided["length_auc"], one_sided["sides"]["undesirable"]) == (None, 0)
    assert length_predicts(one_sided) is None


PREDICTS = [
    # pairs in which the chosen one is longer, shorter, equal; what is said of it
    (80, 20, 0, "longer"),
    (69, 31, 0, None),  # the interval reaches down to 59 %
    (70, 30, 0, "longer"),
    (20, 80, 0, "shorter"),
    (31, 69, 0, None),
    (5, 0, 0, None),
    (6, 0, 0, "longer"),
    (80, 20, 900, "longer"),
    (0, 0, 50, None),
]


@pytest.mark.parametrize(("longer", "shorter", "equal", "said"), PREDICTS)
def test_it_is_told_where_length_alone_predicts_the_choice(
    longer: int, shorter: int, equal: int, said: str | None
) -> None:
    kinds = [("xx", "y")] * longer + [("x", "yy")] * shorter + [("x", "y")] * equal
    told = length_predicts(audit(a_pair(*texts, 1.0) for texts in kinds))
    assert (told is None) if said is None else (told is not None and f"one is {said}" in told)
