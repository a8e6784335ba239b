"""Does the answer agree with the prompt's reference? Sloppy reading of answers loses good data (a parser's false
negatives once cost two thirds of a corpus), so each way of comparing is small, named, and tested on forms people write.

| how | equal when |
|---|---|
| exact | the same text, outer blanks aside |
| normalised | the same after case, punctuation, articles, blanks and Unicode forms are levelled |
| contains | the normalised reference stands in the normalised answer as whole words |
| numeric | the last number (of the last box, if one holds any) differs by at most 1e-6, relatively; 1,000 = 1000; \\
1/2 = 0.5; 50% = 0.5, and 50 where only one of the two has the sign |
| choice | the same option letter |
| math | the same expression, by the library math-verify: 1/2 = 0.5 = \\boxed{\\frac12}, (x+1)^2 = x^2+2x+1 |
"""

import math
import re
import unicodedata
from typing import Literal, NamedTuple, Self

from factory.filters.isolated import Broken, isolated, lacking
from factory.filters.pattern import Undecided
from factory.filters.shapes import Kit
from factory.filters.verifier import Extracting
from factory.rows import Sample, Verdict
from factory.similar import normalised

TOLERANCE = 1e-6

_NUMBER = re.compile(
    r"""(?<![^\W_])(?<!\^)            # not the 2 of CO2 nor of cm^2
    (?:(?<!\))[-+][$€£]?)?            # the sign; in 2-3 the dash is none
    (?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:e[-+]?\d+)?
    (?:\s*/\s*\d+(?:\.\d+)?)?\s*%?""",
    re.IGNORECASE | re.VERBOSE,
)
_BOX = re.compile(r"\\boxed\s?\{((?:[^{}]|\{[^{}]*\})*)\}")
_TYPED = str.maketrans({"−": "-", "⁄": "/"})
_PRINTED = re.compile("[¼-¾⅐-⅞]")
_FRACTION = re.compile(r"(\d?)\s?\\[dtc]?frac\s?\{?(\d+(?=\})|\d)\}?\s?\{?(\d+(?=\})|\d)\}?")
_GROUPED = re.compile(r"(?<=\d)(?:[\u00a0\u2009\u202f]|\\,|\\!)(?=\d{3}(?!\d))")
_MIXED = re.compile(r"(?<![\d/.,])(\d{1,4}) (\d{1,3})/(\d{1,3})(?![\d/.])")
_LETTER = r"""(?:\s{0,3}[:=–-])?(?:\\\w{1,10}\{|[\s*_"'(\[{$]){0,12}([A-Za-z])(?!'?\w)(?!(?<=[aI])\s+[a-z])"""  # not of "a dog", "I think"
_CHOICES = [
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\\boxed\{(?:\\\w{1,10}\{)?\(?([A-Za-z])\)?\}",
        rf"(?i:\banswer\b)(?:[^.\n:]{{0,40}}?\b(?i:is|be))?{_LETTER}",
        rf"(?i:\b(?:option|choice|choose|pick)(?: is)?){_LETTER}",
        r"\b([A-Z])\)?\*{0,2} is (?:the )?(?:correct|right|best)\b",
        r"^[ \t*]{0,9}\(?([A-Za-z])[).]?[ \t*]{0,9}$",
        r"^[ \t*]{0,9}\(?([A-Za-z])\*{0,2}[).:](?:\s|\*)",
        r"(?<!\w)\(([A-Za-z])\)",
    )
]


class MatchesReference(Extracting):
    """Drops answers that differ from the reference; a prompt without one passes."""

    kind: Literal["matches_reference"] = "matches_reference"
    how: Literal["exact", "normalised", "contains", "numeric", "choice", "math"] = "normalised"

    @property
    def apart(self) -> bool:
        return self.how == "math"

    def open(self, kit: Kit) -> Self:
        if self.how == "math":
            lacking("math", "matches_reference: {how: math}")
            isolated("math")  # before threads ask for it
        return self

    def check(self, sample: Sample) -> Verdict:
        reference = sample.prompt.reference
        if reference is None:
            return self.unknown()
        try:
            answer = self.found(sample.response)
            if answer is None:
                return self.drop("no_answer", evidence=reference[:200])
            same, read = compare(self.how, answer, reference)
        except (Broken, Undecided) as e:
            return self.cannot_tell(str(e), evidence=reference[:200])
        if same:
            return self.keep()
        return self.drop(f"wrong:{read}" if read is not None else f"unread:{_tail(answer)}", evidence=reference[:200])


class Unread(Broken):
    """Nothing could be read in the reference."""


class Compared(NamedTuple):
    """`read` is what of the answer was compared; None where nothing could be read."""

    same: bool
    read: str | None


def compare(how: str, answer: str, reference: str) -> Compared:
    """Whether an answer says the same as the reference, and what it was read as. Broken where a library fails."""
    if how == "math":
        told = isolated("math").ask(answer=answer, reference=reference)
        if not told["known"]:
            raise Unread("reference_unread")
        return Compared(told["same"], told["read"])
    same = agree(how, answer, reference)
    if how == "numeric":
        value = number(answer)
        return Compared(same, None if value is None else f"{value:.12g}")
    return Compared(same, letter(answer) if how == "choice" else _tail(answer))


def _tail(answer: str) -> str:
    return answer.strip()[-60:]


def agree(how: str, answer: str, reference: str) -> bool:
    """The same without what was read; of `math` only `compare` knows."""
    if how == "exact":
        return answer.strip() == reference.strip()
    if how == "numeric":
        got, known = _last(answer), _last(reference)
        if got is None or known is None:
            return False
        # "what per cent?" is answered by 20 as well as by 20%
        times = (1, 100) if got.percent != known.percent else (1,)
        with_sign, other = (got.value, known.value) if got.percent else (known.value, got.value)
        return any(math.isclose(with_sign * n, other, rel_tol=TOLERANCE) for n in times)
    if how == "choice":
        got_letter, known_letter = letter(answer), letter(reference)
        return got_letter is not None and got_letter == known_letter
    a, r = normalised(answer), normalised(reference)
    return bool(r) and (f" {r} " in f" {a} " if how == "contains" else a == r)


class Number(NamedTuple):
    """A number that was read: 50% is 0.5."""

    value: float
    percent: bool


def number(text: str) -> float | None:
    """The last number of a text, or of its last box; None where there is none."""
    return None if (last := _last(text)) is None else last.value


def _last(text: str) -> Number | None:
    plain = _typed(text)
    for part in [*_BOX.findall(plain)[-1:], plain]:
        if found := [m.group() for m in _NUMBER.finditer(part) if m.group()]:
            return _value(re.sub(r"[,\s$€£]", "", found[-1]))
    return None


def _value(written: str) -> Number | None:
    above, _, below = written.rstrip("%").partition("/")
    if below and float(below) == 0:
        return None
    value = float(above) / (float(below) if below else 1.0)
    percent = written.endswith("%")
    return Number(value / 100 if percent else value, percent) if math.isfinite(value) else None


def _typed(text: str) -> str:
    """LaTeX, printed fractions, mixed numbers and blanks within numbers as they are typed: 2 1/2 is 5/2."""
    if not text.isascii():
        text = _PRINTED.sub(lambda one: " " + unicodedata.normalize("NFKC", one[0]), text).translate(_TYPED)
    if "\\" in text or "{" in text:
        text = _FRACTION.sub(_typed_fraction, text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$"))
    text = _GROUPED.sub("", text)
    return _MIXED.sub(_one_fraction, text)


def _typed_fraction(found: re.Match[str]) -> str:
    whole, above, below = found.groups()
    return f"{whole} {above}/{below}" if whole else f"{above}/{below}"


def _one_fraction(found: re.Match[str]) -> str:
    whole, above, below = map(int, found.groups())
    return f"{whole * below + above}/{below}" if above < below else found[0]


def letter(text: str) -> str | None:
    """The option that a multiple-choice answer names, in upper case: by the clearest cue, its last mention."""
    for pattern in _CHOICES:
        if found := pattern.findall(text.replace("’", "'")):
            return str(found[-1]).upper()
    return None
