"""Does the answer agree with the prompt's reference? Sloppy reading of answers loses good data (a parser's false
negatives once cost two thirds of a corpus), so each way of comparing is small, named, and tested on forms people write.

| how | equal when |
|---|---|
| exact | the same text, outer blanks aside |
| normalised | the same after case, punctuation, articles, blanks and Unicode forms are levelled |
| contains | the normalised reference stands in the normalised answer as whole words |
| numeric | the last number differs by at most 1e-6, relatively; 1,000 = 1000; 50% = 0.5; 1/2 = 0.5 |
| choice | the same option letter |
"""

import math
import re
from typing import Any, Literal

from pydantic import PrivateAttr, field_validator

from factory.filters.pattern import Pattern, Undecided
from factory.filters.shapes import RowFilter
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


class MatchesReference(RowFilter):
    """Drops answers that differ from the reference; a prompt without one passes.

    `extract` is a pattern with one group that finds the answer proper (its last match counts).
    """

    kind: Literal["matches_reference"] = "matches_reference"
    how: Literal["exact", "normalised", "contains", "numeric", "choice"] = "normalised"
    extract: str | None = None
    _extract: Pattern | None = PrivateAttr(None)

    @field_validator("extract")
    @classmethod
    def _has_one_group(cls, pattern: str | None) -> str | None:
        if pattern is not None and (groups := Pattern(pattern).groups) != 1:
            raise ValueError(f"extract needs exactly one group (...), it has {groups}")
        return pattern

    def model_post_init(self, context: Any) -> None:
        self._extract = Pattern(self.extract) if self.extract is not None else None

    def check(self, sample: Sample) -> Verdict:
        reference, answer = sample.prompt.reference, sample.response
        if reference is None:
            return self.keep()
        if self._extract is not None:
            try:
                found = self._extract.try_on(answer, "findall")
            except Undecided as e:
                return self.cannot_tell(str(e))
            if not found:
                return self.drop("no_answer", evidence=reference[:200])
            answer = found[-1]
        if agree(self.how, answer, reference):
            return self.keep()
        if self.how in ("numeric", "choice") and (number if self.how == "numeric" else letter)(answer) is None:
            return self.drop(f"unread:{answer.strip()[-60:]}", evidence=reference[:200])
        return self.drop(f"wrong:{answer.strip()[-60:]}", evidence=reference[:200])


def agree(how: str, answer: str, reference: str) -> bool:
    """Whether an answer says the same as the reference."""
    if how == "exact":
        return answer.strip() == reference.strip()
    if how == "numeric":
        got, known = number(answer), number(reference)
        return got is not None and known is not None and math.isclose(got, known, rel_tol=TOLERANCE)
    if how == "choice":
        got_letter, known_letter = letter(answer), letter(reference)
        return got_letter is not None and got_letter == known_letter
    a, r = normalised(answer), normalised(reference)
    return bool(r) and (f" {r} " in f" {a} " if how == "contains" else a == r)


def number(text: str) -> float | None:
    """The last number of a text; None where there is none."""
    found = [m.group() for m in _NUMBER.finditer(text.replace("−", "-")) if m.group()]
    if not found:
        return None
    last = re.sub(r"[,\s$€£]", "", found[-1])
    above, _, below = last.rstrip("%").partition("/")
    if below and float(below) == 0:
        return None
    value = float(above) / (float(below) if below else 1.0)
    return value / 100 if last.endswith("%") else value


def letter(text: str) -> str | None:
    """The option that a multiple-choice answer names, in upper case: by the clearest cue, its last mention."""
    for pattern in _CHOICES:
        if found := pattern.findall(text.replace("’", "'")):
            return str(found[-1]).upper()
    return None
