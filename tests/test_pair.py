"""Stage `pair`: chosen is the best, rejected a random lower one; ties and equal texts never pair; the audit counts right."""

import random
from collections import Counter
from typing import Any

import pytest

from factory.errors import RecipeError
from factory.pair import PairUp, audit, pair
from factory.rows import Message, Pair, Prompt, Sample, by_prompt
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
    return list(pair(PairUp(**knobs), by_prompt(rows), seed, view))


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
    (made,) = pair(knobs, by_prompt(candidates(1, 2)), 0, lambda asked: seen)
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
