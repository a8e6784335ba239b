"""Filters by tables: rows that trip one, with the exact reason, and rows just inside; and faults planted among good rows."""

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pydantic
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from factory.filters.pattern import LIMIT_S, PATIENCE
from factory.filters.rules import Tokens
from factory.rows import Sample
from tests.command import factory, funnel
from tests.refusal_lists import ANSWERS, REFUSALS
from tests.sample_rows import answer, answers, ends, filtered, one_filter, prompt
from tests.tiny import tiny_model

BECAUSE = {"format": {"pattern": r"Because: .+\nAnswer: .+"}}
NINE = "one two three four five six seven eight nine "

TABLE: list[tuple[Any, list[tuple[str, str]], list[str]]] = [
    # filter, rows that trip it with the reason, rows just inside
    (
        {"words": {"min": 3, "max": 5}},
        [("", "words=0<3"), ("one two", "words=2<3"), ("a b c d e f", "words=6>5"), (" \n\t ", "words=0<3")],
        ["a b c", "a b c d e", "a\u00a0b\nc", "größe 東京 π"],
    ),
    ({"words": {"min": 1}}, [("", "words=0<1")], ["a", "word " * 100_000]),
    ({"words": {"max": 0}}, [("a", "words=1>0")], ["", "  "]),
    (
        {"words": {"min": 5, "max": 9}},
        [("水が要る", "words=4<5"), ("植物は水と光が要ります", "words=11>9")],
        ["植物は水が要る", "grüne blätter trinken viel licht"],
    ),
    ({"tokens": {"max": 2}}, [("a b c", "tokens=3>2")], ["a b", ""]),
    ({"tokens": {"min": 2}}, [("a", "tokens=1<2")], ["a b"]),
    (
        "repetition",
        [
            ("no " * 8, "looping_tail=8"),
            ("It began well and then it went very well " + "very well " * 4, "looping_tail=5"),
            (NINE * 4, "repeated_4grams=0.73>0.5"),
            ("so it goes on and on and that is it " * 3, "repeated_4grams=0.63>0.5"),
            ("It goes on, and so on, and so on, and so on, and so on.", "looping_tail=4"),
            ("東京 " * 9, "looping_tail=9"),
        ],
        [
            "no " * 7,
            "very well " * 3,
            "no " * 8 + "and then it ended in another way",
            NINE * 2 + "ten eleven",  # 17 4-grams, 6 of them for the second time: 0.35
            "",
            "a",
        ],
    ),
    ({"repetition": {"max_repeated": 0.3}}, [(NINE * 2 + "ten eleven", "repeated_4grams=0.35>0.3")], [NINE]),
    ({"repetition": {"min_words": 50}}, [], [NINE * 4]),
    (
        BECAUSE,
        [("", "format"), ("Answer: x", "format"), ("Because: a\nAnswer: b\nmore", "format")],
        ["Because: a\nAnswer: b", "Because: ß 東京\nAnswer: 😀"],
    ),
    (
        {"format": {"pattern": r"\bAnswer: \d+$", "full": False}},
        [("Answer: x", "format"), ("Answer: 4 or so", "format")],
        ["Answer: 4", "I think.\nAnswer: 12"],
    ),
]


@pytest.mark.parametrize(("spec", "trips", "inside"), TABLE, ids=[str(row[0])[:40] for row in TABLE])
def test_each_filter_drops_what_trips_it_and_nothing_just_inside(
    spec: Any, trips: list[tuple[str, str]], inside: list[str]
) -> None:
    dropped = filtered([spec], answers(*[text for text, _ in trips]))
    assert ends(dropped) == [reason for _, reason in trips]
    assert {sample.ending for sample in dropped} <= {"dropped"}
    assert ends(filtered([spec], answers(*inside))) == [""] * len(inside)


@pytest.mark.parametrize("finish", ["length", "content_filter", "tool_calls", "failed"])
def test_finished_drops_what_did_not_end_by_itself(finish: str) -> None:
    samples = [answer("good", draw=0), answer("goo", draw=1, finish=finish)]
    assert ends(filtered(["finished"], samples)) == ["", f"unfinished:{finish}"]


def test_a_verdict_carries_the_measured_value() -> None:
    (long,) = filtered([{"words": {"max": 2}}], answers("a b c"))
    assert (long.verdicts[0].filter, long.verdicts[0].score) == ("words", 3)
    (looping,) = filtered(["repetition"], answers(NINE * 4))
    assert looping.verdicts[0].score == pytest.approx(24 / 33)
    assert looping.verdicts[0].evidence in NINE * 4


def test_tokens_are_counted_by_a_real_tokenizer() -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "run": 1, "##ning": 2, "fast": 3}, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    asked: list[str | None] = []

    class Kit:
        def tokenizer(self, name: str | None) -> Any:
            asked.append(name)
            return lambda text: len(wordpiece.encode(text).ids)

    opened = Tokens(min=2, max=3, model="base").open(Kit())
    reasons = [opened.check(answer(text)).reason for text in ("fast", "running", "running fast", "running running")]
    assert reasons == ["tokens=1<2", "", "", "tokens=4>3"]
    assert asked == ["base"]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("words", "give min, max or both"),
        ({"words": {"min": 5, "max": 4}}, "min: 5 is more than max: 4"),
        ({"words": {"min": -1}}, "greater than or equal to 0"),
        ({"format": {"pattern": "(a"}}, "not a regular expression"),
        ({"format": {"pattern": "(" * 5000 + ")" * 5000}}, "not a regular expression"),
        ({"matches_reference": {"extract": "[a"}}, "not a regular expression"),
        ({"matches_reference": {"extract": "Answer: .*"}}, "exactly one group"),
        ({"near_duplicates": {"threshold": 0}}, "greater than 0"),
        ({"near_duplicates": {"treshold": 0.5}}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(spec: Any, told: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=told.replace("(", r"\(")):
        one_filter(spec)


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_are_dropped_in_four_languages(kind: str) -> None:
    texts = [*REFUSALS[kind], *[text.upper() for text in REFUSALS[kind]]]
    assert list(zip(texts, ends(filtered(["no_refusal"], answers(*texts))), strict=True)) == [
        (text, f"refusal:{kind}") for text in texts
    ]


def test_answers_that_only_look_like_a_refusal_stay() -> None:
    assert list(zip(ANSWERS, ends(filtered(["no_refusal"], answers(*ANSWERS))), strict=True)) == [
        (text, "") for text in ANSWERS
    ]


def test_a_refusal_far_behind_the_start_is_not_looked_for() -> None:
    behind = "The weather was fine all week and we walked along the river every day. " * 4
    assert ends(filtered(["no_refusal"], answers(behind + "As an AI, I cannot walk."))) == [""]
    (early,) = filtered(["no_refusal"], answers("Hm. As an AI, I cannot walk. " + behind))
    assert early.verdicts[0].evidence == "As an AI, I"


# -- patterns that do not end --------------------------------------------------------------------------------------------

ENDLESS = [
    ({"format": {"pattern": r"(a|aa)+b"}}, "a" * 80),
    ({"format": {"pattern": r"(.*?,){30}P", "full": False}}, "1," * 100),
    ({"format": {"pattern": r"(?:a{1,500}){1,500}b"}}, "a" * 50_000),
    ({"matches_reference": {"extract": r"((?:a|aa)+)b"}}, "a" * 80),
]


@pytest.mark.parametrize(("spec", "text"), ENDLESS, ids=[str(row[0])[:60] for row in ENDLESS])
def test_an_endless_pattern_sets_the_row_aside(spec: Any, text: str) -> None:
    (row,) = filtered([spec], [answer(text, prompt(reference="r"))])
    assert (row.ending, row.verdicts[0].reason) == ("failed", f"pattern_timeout={LIMIT_S}s")


def test_an_endless_pattern_is_given_up_and_the_run_goes_on() -> None:
    texts = ["a" * 80] * (PATIENCE + 3000)
    before = time.process_time()
    rows = filtered([{"format": {"pattern": r"(a|aa)+b"}}], answers("aab", *texts))
    assert time.process_time() - before < 4 * PATIENCE * LIMIT_S
    assert Counter(ends(rows)) == {
        "": 1, f"pattern_timeout={LIMIT_S}s": PATIENCE, "pattern_timeout:given_up": 3000
    }  # fmt: skip


def test_a_pattern_s_patience_is_its_own_filter_s() -> None:
    worn, fresh = one_filter(ENDLESS[0][0]), one_filter(ENDLESS[0][0])
    worn.check(answer("a" * 80))
    assert worn == fresh
    assert fresh.check(answer("aab")).keep is True


def test_a_sound_pattern_reads_a_huge_answer() -> None:
    huge = "Because: " + "x" * 3_000_000 + "\nAnswer: y"
    assert ends(filtered([BECAUSE], answers(huge))) == [""]


# -- planted faults ------------------------------------------------------------------------------------------------------

VOCABULARY = [
    "river", "stone", "garden", "winter", "lamp", "copper", "music", "paper", "morning", "window", "bridge", "forest", "sugar", "letter", "engine", "silver", "valley", "market",
    "thunder", "blanket", "harbor", "candle", "meadow", "pocket", "ladder", "orange", "pencil", "mirror", "island", "button",
]  # fmt: skip
ALL: list[Any] = [
    "finished", {"words": {"min": 8, "max": 60}}, "no_refusal", "repetition", {"format": {"pattern": r"(?s).*\."}},
    {"matches_reference": {"how": "contains"}}, "exact_duplicates", "near_duplicates",
]  # fmt: skip


def good(number: int) -> Sample:
    """An answer of 30 random words, its reference among them."""
    draw = random.Random(number)
    words = draw.choices(VOCABULARY, k=30)
    return answer(
        " ".join(words).capitalize() + ".", prompt(f"question {number}", reference=words[7]), id=f"good-{number}"
    )


def fault(kind: str, number: int) -> Sample:
    """A good answer with one thing wrong with it, to a question of its own."""
    base = good(1000 + number)
    text, end = base.response, "."
    broken = {
        "finished": (text, "length"),
        "words": (" ".join(text.split()[5:10]) + end, "stop"),
        "no_refusal": ("I'm sorry, but I cannot help with that. " + text, "stop"),
        "repetition": (text + " and so on" * 6 + end, "stop"),
        "format": (text.rstrip(end), "stop"),
        "matches_reference": (text, "stop"),
        "exact_duplicates": (good(number).response.upper().replace(" ", "  "), "stop"),
        "near_duplicates": (good(number).response.replace(".", " indeed."), "stop"),
    }[kind]
    references = {"matches_reference": "zebra", "exact_duplicates": good(number).prompt.reference}
    references["near_duplicates"] = references["exact_duplicates"]
    asked = prompt(f"{kind} {number}", reference=references.get(kind, base.prompt.reference))
    return answer(broken[0], asked, id=f"{kind}-{number}", finish=broken[1])


KINDS = [next(iter(one)) if isinstance(one, dict) else one for one in ALL]
PLANTED = [good(i) for i in range(60)] + [fault(kind, i) for i in range(5) for kind in KINDS]


def test_each_filter_finds_exactly_what_was_planted() -> None:
    rows = filtered(ALL, PLANTED)
    found = {(row.id, row.verdicts[-1].filter if row.ending != "kept" else "good") for row in rows}
    assert found == {(row.id, row.id.rpartition("-")[0]) for row in PLANTED}


@pytest.mark.parametrize(("spec", "kind"), list(zip(ALL, KINDS, strict=True)), ids=KINDS)
def test_alone_it_finds_them_too_and_no_good_row(spec: Any, kind: str) -> None:
    dropped = {row.id for row in filtered([spec], PLANTED) if row.ending != "kept"}
    assert dropped >= {row.id for row in PLANTED if row.id.startswith(kind)}
    assert not {id_ for id_ in dropped if id_.startswith("good")}


def test_a_huge_answer_ends_in_bounded_time(tmp_path: Path) -> None:
    draw = random.Random(0)
    huge = " ".join(draw.choices(VOCABULARY, k=150_000)) + "."
    before = time.process_time()
    rows = filtered(
        [one for one in ALL if not (isinstance(one, dict) and "words" in one)], answers(huge, huge, "." * 10**6)
    )
    assert time.process_time() - before < 20
    assert ends(rows) == ["", "duplicate", "looping_characters=1000000"]


# -- tokens of a model that a recipe names ---------------------------------------------------------------------------------

TOKENS = """\
name: tiny
models: {base: {type: transformers, model: ./model}}
prompts: [{path: rows.jsonl}]
stages:
  - filter: [tokens: {max: 14, model: base}]
"""


def test_tokens_are_those_of_the_named_model_where_nothing_is_trained(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", layers=1, hidden=16)
    texts = ["The sky is blue and the grass is green.", "xyzzy-17 qwrtz!?"]  # the tokenizer knows the first by heart
    rows = [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(TOKENS)
    done = factory(tmp_path, "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    long = [text for text in texts if len(tokenizer.encode(text).ids) > 14]
    assert funnel(tmp_path)["filter"] == (2, 2 - len(long), len(long), 0)
    assert len(long) == 1
    (tmp_path / "recipe.yaml").write_text(TOKENS.replace("model: base}", "model: bass}"))
    wrong = factory(tmp_path, "check", "recipe.yaml")
    assert wrong.returncode == 2
    assert "recipe.yaml:5: there is no model 'bass'; did you mean 'base'?" in wrong.stderr
