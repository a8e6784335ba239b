"""Agreement with a reference, on the forms that people and models write; and the properties of what it is made of."""

import math
import time
import unicodedata
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from factory.filters.reference import agree, letter, number
from factory.similar import normalised
from tests.sample_rows import answer, filtered, prompt

steady = settings(deadline=None)

AGREE: dict[str, list[tuple[str, str]]] = {
    "exact": [("blue", " blue\n"), ("A b.", "A b."), ("東京", "東京")],
    "normalised": [
        ("The sky is blue.", "sky is  BLUE"),
        ("“Hello”, he said!", "hello he said"),
        ("don’t", "don't"),
        ("ﬁne", "fine"),
        ("２", "2"),
        ("$1,000", "1000"),
        ("−5", "-5"),
        ("(-5)", "-5"),
        ("3.5.", "3.5"),
        ("1,2,3", "1, 2, 3"),
        ("¿Qué?", "qué"),
        ("日本。", "日本"),
        ("\u200bParis", "Paris"),
        ("Straße", "STRASSE"),
        ("A", "a"),
        ("C++", "c++"),
        ("+", "+"),
        ("- 5 apples", "5 apples"),
    ],
    "contains": [
        ("It is a lid, of course.", "a lid"),
        ("About 3.5 km", "3.5"),
        ("Lid", "lid"),
        ("Answer: **Paris**", "Paris"),
    ],
    "numeric": [
        ("1,000", "1000"),
        ("It costs $1,000.50.", "1000.5"),
        ("50%", "0.5"),
        ("50 %", "50%"),
        ("1/2", "0.5"),
        ("1 / 2", "50%"),
        ("3/4 of a cup", "0.75"),
        ("-5", "-5.0"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("x = -3", "-3"),
        (".5", "0.5"),
        ("5.", "5"),
        ("1e3", "1000"),
        ("2 + 2 = 4", "4"),
        ("It takes 2-3 days, so 3.", "3"),
        ("in 2-3 days", "3"),
        ("10-4 = 6", "6"),
        ("Step 1: 3 apples.\nStep 2: 7 apples.", "7"),
        ("The area is 25 cm^2", "25"),
        ("The area is 25 m2.", "25"),
        ("44 g of CO2", "44"),
        ("**42**", "42"),
        ("\\boxed{42}", "42"),
        ("$x=7$", "7"),
        ("0.3333333", "1/3"),
        ("0", "0.0"),
        ("6.62607e-34", "6.62607e-34"),
        ("٣", "3"),
    ],
    "choice": [
        (text, "B")
        for text in (
            "B", "b", "(B)", "(b)", "B.", "B)", "**B**", "B) Paris", "B. Paris", "**B) Paris**", "(B) Paris", " B \n",
            "The answer is (B)", "The answer is B.", "the answer is b", "The correct answer is: B", "Answer: B",
            "Answer: **(B)**", "answer B", "Answer:\nB", "Answer - B", "The answer to the question is B.", "I think it is 'B'.\nAnswer: 'B'",
            "Option B is correct.", "The correct option is B because A is too small.", "I choose (B)", "I pick option B",
            "B is correct.", "B is the right answer.", "\\boxed{B}", "The final answer is $\\boxed{\\text{(B)}}$", "Answer: $B$",
            "The answer is B, since option A is wrong.", "A) Rome\nB) Paris\nC) Oslo\n\nAnswer: B", "A) Rome\nB) Paris\n\nB",
            "First (A), but no: the answer is (B).", "The function f(x) grows, so (B).",
        )
    ],
}  # fmt: skip

DIFFER: dict[str, list[tuple[str, str]]] = {
    "exact": [("Blue", "blue"), ("a  b", "a b"), ("", "a")],
    "normalised": [
        ("3.5", "35"),
        ("-5", "5"),
        ("1/2", "12"),
        ("2-3", "23"),
        ("C++", "C"),
        ("C#", "C"),
        ("+", "-"),
        ("", "a"),
        ("!!!", ""),
        ("blue sky", "blue"),
    ],
    "contains": [("solid", "lid"), ("3.55", "3.5"), ("-5", "5"), ("", "lid"), ("lid", "")],
    "numeric": [
        ("no idea", "5"),
        ("5", "no number"),
        ("5", "-5"),
        ("1000", "1,001"),
        ("1.00001", "1"),
        ("0", "6.6e-34"),
        ("5/0", "5"),
        ("1e999", "5"),
        ("5", "1e999"),
        ("H2O", "2"),
        ("²", "2"),
        ("", "0"),
    ],
    "choice": [
        (text, "B")
        for text in (
            "A", "", "none", "The answer is a dog", "I'm sure", "It is a good answer", "The answer is I think fine", "(A)", "Be quick",
            "f(b) is fine", "The answer is A, since option B is wrong.", "BB", "a priori",
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("how", AGREE)
def test_forms_that_people_write_agree(how: str) -> None:
    assert [pair for pair in AGREE[how] if not agree(how, *pair)] == []


@pytest.mark.parametrize("how", DIFFER)
def test_other_answers_do_not(how: str) -> None:
    assert [pair for pair in DIFFER[how] if agree(how, *pair)] == []


CHECKED = [
    # settings, answer, reference, reason
    ({}, "The lid.", "lid", ""),
    ({}, "The pot.", "lid", "wrong:The pot."),
    ({}, "x" * 200, "lid", "wrong:" + "x" * 60),
    ({}, "", "lid", "wrong:"),
    ({}, "anything", None, ""),
    ({"how": "exact"}, "Lid", "lid", "wrong:Lid"),
    ({"how": "numeric"}, "It is 7 or 8", "7", "wrong:8"),
    ({"how": "numeric"}, "It is many", "7", "unread:It is many"),
    ({"how": "choice"}, "Answer: C", "B", "wrong:C"),
    ({"how": "choice"}, "I do not know", "B", "unread:I do not know"),
    ({"how": "contains", "extract": "Answer:(.*)"}, "Because: lid\nAnswer: a pot", "lid", "wrong:a pot"),
    ({"how": "contains", "extract": "Answer:(.*)"}, "Answer: pot\nAnswer: a lid", "lid", ""),
    ({"extract": "Answer:(.*)"}, "a lid", "lid", "no_answer"),
    ({"extract": "(?:Answer:(.*))?"}, "", "lid", "wrong:"),
]


@pytest.mark.parametrize(("knobs", "text", "reference", "reason"), CHECKED)
def test_a_row_ends_with_what_was_said_instead(
    knobs: dict[str, Any], text: str, reference: str | None, reason: str
) -> None:
    (row,) = filtered([{"matches_reference": knobs}], [answer(text, prompt(reference=reference))])
    assert (row.verdicts[-1].reason if row.verdicts else "") == reason
    assert not reason or row.verdicts[-1].evidence == reference


# -- properties ----------------------------------------------------------------------------------------------------------

FRAMES = [
    "{}",
    "The answer is {}.",
    "**{}**",
    "x = {}",
    "({})",
    "Step 1: add 3.\nSo {}",
    "\\boxed{{{}}}",
    "about {} km",
    "{}%",
]


@steady
@given(st.integers(-(10**15), 10**15), st.sampled_from(FRAMES))
def test_a_whole_number_is_read_however_it_stands(n: int, frame: str) -> None:
    for written in (str(n), f"{n:,}", str(n).replace("-", "−"), f"{n}.0", f"{n:+,}"):
        assert number(frame.format(written)) == pytest.approx(n / 100 if "%" in frame else n, rel=1e-12)


@steady
@given(st.floats(-1e12, 1e12, allow_nan=False), st.sampled_from(FRAMES[:-1]))
def test_a_decimal_number_is_read_in_every_notation(value: float, frame: str) -> None:
    for written in (f"{value:.6f}", f"{value:,.6f}", f"{value:.10e}"):
        assert number(frame.format(written)) == pytest.approx(float(written.replace(",", "")), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\frac{3}{4}", 0.75), (r"-\dfrac{1}{2}", -0.5), (r"\frac12", 0.5), (r"2\frac{1}{2}", 2.5), ("-2 1/2 cups", -2.5),
        ("2½", 2.5), ("½", 0.5), ("open 24 hours, 7/7", 1.0), ("it took 2 24/7", 24 / 7), ("12\u202f000 m", 12000),
        (r"1{,}000", 1000), (r"1\,000", 1000), (r"50\%", 0.5), (r"\$5", 5), (r"\boxed{5} (3 more than 2)", 5),
        (r"\boxed{4}, no, \boxed{\text{all } 5}: 1 more", 5), (r"\boxed{none} but 7", 7), ("1e999", None), ("9" * 400, None),
    ],
)  # fmt: skip
def test_numbers_as_people_and_latex_write_them(text: str, value: float | None) -> None:
    assert number(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("20%", "20", True), ("20", "20%", True), ("20%", "0.2", True), ("0.2", "20%", True), ("20%", "20%", True),
        ("20%", "2000%", False), ("2000", "20%", False), ("20%", "0.002", False), (r"\frac{3}{4}", "4", False),
    ],
)  # fmt: skip
def test_a_per_cent_sign_on_one_side_alone_is_read_either_way(answer: str, reference: str, same: bool) -> None:
    assert agree("numeric", answer, reference) is same


@steady
@given(st.integers(-9999, 9999), st.integers(1, 9999))
def test_a_fraction_is_its_quotient(above: int, below: int) -> None:
    assert number(f"It is {above}/{below}") == pytest.approx(above / below)
    assert agree("numeric", f"{above} / {below}", f"{above / below!r}")


@steady
@given(st.text() | st.text(alphabet="0123456789.,-+/%eE^()$ ", max_size=40))
@example("9" * 5000)
@example("1/" * 5000)
@example("," * 5000)
@example("1" + " " * 5000 + "/")
def test_any_text_has_a_number_or_none(text: str) -> None:
    read = number(text)
    assert read is None or isinstance(read, float)
    assert not (read is not None and math.isnan(read))
    if not any(unicodedata.category(c) == "Nd" or c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞" for c in text):
        assert read is None


@steady
@given(
    st.sampled_from("ABCDEFGHJ"),
    st.sampled_from(
        [text for text, _ in AGREE["choice"] if text.count("B") == 1 and "A" not in text and "C" not in text]
    ),
)
def test_any_letter_is_read_where_b_is(option: str, form: str) -> None:
    assert letter(form.replace("B", option)) == option


@pytest.mark.parametrize(
    "unit", ["\n", " ", "answer ", "answer is ", "(", "A ", "\\boxed{", "* ", "1 ", "1/", "1,", "-", "'", "\u0301"]
)
@pytest.mark.parametrize("how", AGREE)
def test_a_huge_text_of_one_kind_is_compared_in_time(how: str, unit: str) -> None:
    before = time.process_time()
    agree(how, unit * (300_000 // len(unit)) + "!", "B")
    assert time.process_time() - before < 3


@steady
@given(st.text())
def test_any_text_names_one_letter_or_none(text: str) -> None:
    assert letter(text) is None or letter(text) in set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


WORDS = st.text(alphabet="abcxyzäßéñ", min_size=1, max_size=6)


@steady
@given(
    st.lists(WORDS, min_size=1),
    st.sampled_from([" ", "\n", "  \t", "\u00a0", ", ", "; ", " - ", "... "]),
    st.booleans(),
)
def test_blanks_case_and_marks_between_words_change_nothing(words: list[str], between: str, capital: bool) -> None:
    written = between.join(words)
    assert normalised(written.title() if capital and "ß" not in written else written) == normalised(" ".join(words))


@steady
@given(st.text())
def test_what_is_levelled_is_plain(text: str) -> None:
    level = normalised(text)
    assert level == " ".join(level.split())
    assert (level == "") == (unicodedata.normalize("NFKC", text).strip() == "")
    assert normalised(f"  {text}\n") == level
    assert agree("normalised", text, text) == agree("contains", text, text) == (level != "")


@steady
@given(
    st.text(alphabet="0123456789.-/", min_size=1, max_size=8), st.text(alphabet="0123456789.-/", min_size=1, max_size=8)
)
def test_levelling_never_makes_two_numbers_equal(a: str, b: str) -> None:
    try:
        one, two = float(a), float(b)
    except ValueError:
        assume(False)
    if normalised(a) == normalised(b):
        assert one == two


@settings(steady, max_examples=30)
@given(st.text(max_size=50), st.sampled_from(["exact", "normalised", "contains", "numeric", "choice"]))
def test_comparing_never_breaks(text: str, how: str) -> None:
    assert agree(how, text * 200, text) in (True, False)
