"""The text rules by tables: rows that trip each, with the reason, and rows just inside; and texts made to be slow."""

import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from factory.curate import Curate, curate
from factory.filters import refusal, trace
from factory.filters.language import KNOWN, NONE, _identifier
from factory.filters.personal_data import KEY, UNBROKEN, luhn, masked, mod97, personal_data
from factory.filters.said import longest
from factory.rows import Message, Sample, by_prompt
from tests.command import factory, funnel
from tests.sample_rows import answer, answers, ends, filtered, one_filter, prompt

ONCE = "Blood comes back from the body into the right atrium and leaves from the left ventricle."
SYSTEM = "You are a patient teacher. Answer in plain words and give one example from daily life."


def to(text: str, asked: str = "q", system: str | None = None, **fields: Any) -> Sample:
    turns = [Message(role="system", content=system)] if system else []
    return answer(text, prompt(turns=[*turns, Message(role="user", content=asked)]), **fields)


SCHEMA = {"json_schema": {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}}
TABLE: list[tuple[Any, list[tuple[Sample, str]], list[Sample]]] = [
    (
        {"ratio": {"min": 0.5, "max": 2}},
        [(to("a", "one two three"), "ratio=0.33<0.5"), (to("a b c", "one"), "ratio=3.0>2.0"), (to("a b c", ""), "ratio=3.0>2.0")],
        [to("a", "one two"), to("a b", "one"), to("a b", ""), to("a b c d", "one two")],
    ),
    (
        {"language": {"allowed": ["en"]}},
        [
            (to("Das Herz hat vier Kammern, und das Blut kommt aus dem Körper zurück."), "language:de"),
            (to("Le cœur a quatre cavités, et le sang revient du corps par la droite."), "language:fr"),
            (to("心脏有四个腔室，血液从身体流回右心房，再流向右心室，然后流向肺部。"), "language:zh"),
        ],
        [to(ONCE), to("Ja."), to("42"), to(""), to("```\nwenn das Herz schlägt dann geht das Blut\n```"), to("Hotel zur Post")],
    ),
    ({"language": {"allowed": ["de", "en"]}}, [], [to(ONCE), to("Das Herz hat vier Kammern und schlägt ein Leben lang.")]),
    (
        "copied_prompt",
        [
            (to(ONCE, ONCE), "copied=1.00>0.5"),
            (to(ONCE + " Why?", "Explain this: " + ONCE.upper()), "copied=0.92>0.5"),
            (to("Sure! " + ONCE, ONCE), "copied=0.92>0.5"),
        ],
        [to(ONCE, "How does the heart work?"), to("the right atrium and leaves", ONCE), to("", ONCE), to(ONCE, ""),
         to(ONCE + " That is the way of the blood, and it takes about a minute for one whole round.", ONCE.split(" and")[0])],
    ),
    (
        "leakage",
        [
            (to(ONCE + "<|im_end|>"), "leakage:special_token"),
            (to("[INST] " + ONCE), "leakage:special_token"),
            (to("### Response:\n" + ONCE), "leakage:heading"),
            (to(ONCE + "\n\nHuman: And then?"), "leakage:role"),
            (to("Assistant: " + ONCE), "leakage:role"),
            (to(SYSTEM + " " + ONCE, system=SYSTEM), "leakage:system_message=1.00"),
            (to("As my system prompt says: " + ONCE, system=SYSTEM), "leakage:system_mention"),
        ],
        [to("The token `<|im_end|>` ends a turn."), to("<|im_end|> ends a turn.", "What is <|im_end|>?"), to("a <| b"),
         to("### Response times\n\nFast."), to("User: demo\nPassword: demo"), to("Human: hi\nAssistant: ho", "Write a dialogue."),
         to("Answer in plain words, he said.", system=SYSTEM), to("<s>49</s> 39 euros"), to(ONCE, system=SYSTEM)],
    ),
    ({"leakage": {"max_share": 0.2}}, [(to("Answer in plain words and give one example, he said.", system=SYSTEM), "leakage:system_message=0.33")],
     [to(ONCE, system=SYSTEM)]),
    (
        "trace",
        [
            (to("<think>\nHm. The heart"), "trace:unclosed"),
            (to("Hm. The heart.\n</think>\n" + ONCE), "trace:unopened"),
            (to("<think>x</think>" + ONCE), "trace:block"),
            (to("[THINK]x[/THINK]" + ONCE), "trace:block"),
            (to("Okay, so the user wants the heart. I should keep it short.\n\n" + ONCE), "trace:deliberation"),
            (to("First the atrium, then the ventricle, then lungs. " + ONCE, reasoning="First the atrium, then the ventricle, then lungs. Write."), "trace:copied"),
            (to(ONCE, reasoning="<think> The heart."), "trace:tag_in_trace"),
        ],
        [to("R1 opens with `<think>`."), to("<reasoning>x</reasoning> 4", "Use <reasoning> tags."), to("Let's think step by step. 2 + 2 = 4."),
         to("The user clicks the button."), to(ONCE, reasoning="Let me draft. " + ONCE), to(ONCE, reasoning=""), to("a < b and [think] of it")],
    ),
    (
        "personal_data",
        [
            (to("Write to lena@posteo.de."), "personal_data:email"),
            (to("Call +49 151 23456789."), "personal_data:phone"),
            (to("Pay with 4539 1488 0343 6467."), "personal_data:card"),
            (to("To DE89 3704 0044 0532 0130 00, please."), "personal_data:iban"),
            (to("key = 'AKIA" + "J7QK2ZD4MWX5RBTL'"), "personal_data:key"),
            (to("-----BEGIN PRIVATE" + " KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0B" * 4), "personal_data:key"),
        ],
        [to("Write to lena@example.org."), to("Call +1 800 555 0199."), to("Pay with 4539 1488 0343 6468."), to("To DE89 3704 0044 0532 0130 01."),
         to("key = 'AKIAIOSFODNN7EXAMPLE'"), to("git@github.com:a/b.git"), to("ISBN 978-3-16-148410-0"), to("1 234 567 890"), to("")],
    ),
    (
        {"format": SCHEMA},
        [(to("{"), "not_json"), (to("n: 1"), "not_json"), (to('{"n": NaN}'), "not_json"), (to('{"n": -1}'), "schema:data.n:minimum"),
         (to("{}"), "schema:data:required"), (to("[]"), "schema:data:type"), (to('```json\n{"n": "1"}\n```'), "schema:data.n:type"),
         (to("[" * 100_000), "not_json")],
        [to('{"n": 0}'), to(' {"n": 1, "m": 2}\n'), to('```json\n{"n": 1}\n```')],
    ),
    (
        {"format": {"sections": ["Steps", "Answer:"]}},
        [(to("Answer: 4\n# Steps\n1"), "no_section:Answer:"), (to("no steps here"), "no_section:Steps"), (to(""), "no_section:Steps")],
        [to("## Steps\n1\n\n**Answer:** 4"), to("steps\nanswer: 4")],
    ),
    ({"format": {"sections": ["A"], "pattern": ".*4", "full": False}}, [(to("A 5"), "format"), (to("B 4"), "no_section:A")], [to("A 4")]),
    (
        "repetition",
        [
            (to("ha" * 60), "looping_characters=120"),
            (to("x" * 119 + " " + "是" * 130), "looping_characters=130"),
            (to("very good " * 8 + "soup"), "looping_tail=8"),  # the last word may be cut
            (to("very good " * 8 + "soup for us"), "loop=8"),
            (to(f"{ONCE} The end of the long and winding road is here at last. " + "One two three four five six seven eight nine ten. " * 3), "looping_tail=3"),
            (to("\n".join(f"{i}. Drink water." for i in range(1, 7))), "repeated_lines=6"),
        ],
        [to("ha" * 59), to("very good " * 7 + "soup for us"), to(f"{ONCE} " + "One two three four five six seven eight nine ten. " * 2),
         to("\n".join(f"{i}. Drink water." for i in range(1, 6))), to("-" * 100), to("7 x 1 = 7\n7 x 2 = 14\n7 x 3 = 21\n7 x 4 = 28\n7 x 5 = 35\n7 x 6 = 42")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "trips", "inside"), TABLE, ids=[str(row[0])[:40] for row in TABLE])
def test_each_rule_drops_what_trips_it_and_nothing_just_inside(
    spec: Any, trips: list[tuple[Sample, str]], inside: list[Sample]
) -> None:
    dropped = filtered([spec], [sample for sample, _ in trips])
    assert ends(dropped) == [reason for _, reason in trips]
    assert {sample.ending for sample in dropped} <= {"dropped"}
    assert list(zip([s.response for s in inside], ends(filtered([spec], inside)), strict=True)) == [
        (s.response, "") for s in inside
    ]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("language", "allowed"),
        ({"language": {"allowed": []}}, "at least 1"),
        ({"language": {"allowed": ["english"]}}, "no language that can be told"),
        ("ratio", "give min, max or both"),
        ("format", "give pattern, json_schema or sections"),
        ({"format": {"json_schema": {"type": "nonsense"}}}, "not a JSON schema"),
        ({"format": {"json_schema": {"$ref": "http://127.0.0.1:9/x.json"}}}, "may not fetch"),
        ({"format": {"json_schema": {"$ref": "file:///etc/hostname"}}}, "may not fetch"),
        ({"copied_prompt": {"max_share": 0}}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(spec: Any, told: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=told):
        one_filter(spec)


SLOW = [
    "a.b-" * 100_000 + "@", "1 2-3." * 50_000, "<" * 200_000, "[" * 200_000, "User: \n" * 20_000, "`" * 200_000, '"' * 200_000,
    "# response " * 20_000, "x" * 400_000, "-----BEGIN PRIVATE" + " KEY-----" + " \n" * 50_000, "DE89 " * 50_000, "call 0" * 30_000,
    "\nuser\n" * 20_000, "<user>\n" * 20_000, "<think>" * 20_000, "a at b dot " * 30_000, "I understand " * 20_000, "ab " * 50_000,
]  # fmt: skip


@pytest.mark.parametrize("text", SLOW, ids=[text[:12] for text in SLOW])
def test_no_text_makes_a_rule_slow(text: str) -> None:
    before = time.process_time()
    for rule in ("no_refusal", "repetition", "copied_prompt", "leakage", "trace", "personal_data"):
        one_filter(rule).check(to(text, "Explain. " * 10, SYSTEM, reasoning=text))
    assert time.process_time() - before < 10


# -- cheap looks before the patterns -------------------------------------------------------------------------------------

LETTERS = st.sampled_from(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéüß'’ .,!?:;-\n0123456789用户想问要的题我需应该好嗯"
)


@pytest.mark.parametrize("pattern", refusal._CANNOT, ids=range(len(refusal._CANNOT)))
def test_no_refusal_s_first_look_passes_over_nothing_that_its_patterns_match(pattern: str) -> None:
    @settings(max_examples=5, suppress_health_check=list(HealthCheck))
    @given(st.from_regex(re.compile(pattern, re.IGNORECASE), alphabet=LETTERS))
    def holds(text: str) -> None:
        assert refusal._OPENS.match(text.lower())

    holds()


@pytest.mark.parametrize("cue", trace._CUES)
def test_each_cue_of_a_trace_holds_one_of_its_hints(cue: str) -> None:
    _, hints, pattern = trace._CUES[cue]

    @settings(max_examples=50)
    @given(st.from_regex(re.compile(pattern, re.IGNORECASE), alphabet=LETTERS))
    def holds(text: str) -> None:
        assert any(hint in text.lower() for hint in hints)

    holds()


@settings(max_examples=50)
@given(st.from_regex(KEY))
def test_keys_stand_in_long_words(text: str) -> None:
    assert longest(text) >= UNBROKEN or "PRIVATE KEY" in text


# -- personal data -----------------------------------------------------------------------------------------------------

MASKED = [
    ("Write to lena@posteo.de or call +49 151 23456789.", "Write to [EMAIL] or call [PHONE]."),
    ("DE89 3704 0044 0532 0130 00 and 4539148803436467", "[IBAN] and [CARD]"),
    ("no data here, 1984", "no data here, 1984"),
    ("<a.b@c.de><d@e.fr>", "<[EMAIL]><[EMAIL]>"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), MASKED)
def test_masking_replaces_each_by_its_kind_and_nothing_else(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(expected) == expected


@given(st.text(alphabet="abcXYZ019 @.-+()\n:=_/", max_size=200))
def test_what_is_found_stands_apart_in_order_and_inside_the_text(text: str) -> None:
    spans = [(start, end) for _, start, end in personal_data(text)]
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert personal_data(masked(text)) == [] or len(spans) > 0


@given(st.text("0123456789", min_size=12, max_size=18), st.integers(0, 9))
def test_luhn_takes_one_of_ten_last_digits_and_sees_each_changed_digit(digits: str, place: int) -> None:
    (last,) = [d for d in "0123456789" if luhn(digits + d)]
    other = str((int(digits[place]) + 1) % 10)
    assert not luhn(digits[:place] + other + digits[place + 1 :] + last)


@given(st.text("0123456789", min_size=18, max_size=18), st.integers(0, 17))
def test_mod_97_sees_each_changed_digit(account: str, place: int) -> None:
    (check,) = [c for c in range(2, 99) if mod97(f"DE{c:02d}{account}")]
    other = str((int(account[place]) + 1) % 10)
    assert not mod97(f"DE{check:02d}{account[:place]}{other}{account[place + 1 :]}")


def test_the_evidence_of_personal_data_holds_none() -> None:
    (row,) = filtered(["personal_data"], answers("Ring Tom (t.byrne@posteo.net) on +353 86 123 4567."))
    assert row.verdicts[0].evidence == "Ring Tom ([EMAIL]"
    assert row.verdicts[0].score == 2


# -- in a run ----------------------------------------------------------------------------------------------------------

RECIPE = """\
name: tiny
prompts: [{path: rows.jsonl}]
stages:
  - filter: [ratio: {max: 30}, copied_prompt, leakage, trace, format: {sections: ["The"]}, language: {allowed: [en]}]
  - shape: {mask: personal_data}
"""


def test_the_rules_stand_in_the_funnel_with_their_reasons_and_the_data_is_masked(tmp_path: Path) -> None:
    good = [
        "The heart has four chambers, ask ann@posteo.de why.",
        "The lungs have two sides, and the left one is smaller.",
    ]
    bad = [
        "The end.<|im_end|>",
        "<think> The",
        "A heart.",
        "The " * 80,
        "The Herz hat vier Kammern und schlägt ein ganzes Leben.",
    ]
    rows = [{"prompt": f"question {i}", "completion": text} for i, text in enumerate([*good, *bad])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = factory(tmp_path, "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert funnel(tmp_path)["filter"] == (7, 2, 5, 0)
    (page,) = tmp_path.glob("runs/*/report.json")
    told = page.read_text()
    assert all(why in told for why in ("leakage", "trace", "no_section", "ratio", "language"))
    data = "".join(file.read_text() for file in tmp_path.glob("runs/*/dataset/*.jsonl"))
    assert "ask [EMAIL] why" in data
    assert "posteo" not in data


def test_the_known_languages_are_those_of_the_model() -> None:
    assert set(_identifier().labels) == KNOWN | {NONE}


def test_a_rule_that_breaks_on_a_row_sets_that_row_aside_and_goes_on() -> None:
    """A lone surrogate has no UTF-8: the tokenizer breaks on it, and the rows around it are judged all the same."""
    counting = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    counting.pre_tokenizer = pre_tokenizers.Whitespace()

    class Kit:
        def tokenizer(self, name: str | None) -> Any:
            return lambda text: len(counting.encode(text).ids)

    samples = answers("a a", "a \ud800", "a", "a a a a")
    rows = list(
        curate(
            Curate(filters=["personal_data", "leakage", "trace", {"tokens": {"max": 3}}]),
            lambda: by_prompt(samples),
            Kit(),
        )
    )
    assert ends(rows) == ["", "filter_error", "", "tokens=4>3"]
    assert (rows[1].ending, "Error" in (rows[1].verdicts[-1].evidence or "")) == ("failed", True)
