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

import re
import string
import unicodedata
from typing import Literal

from pydantic import field_validator

from factory.filters.shapes import RowFilter
from factory.rows import Sample, Verdict

TOLERANCE = 1e-6
_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»…–—")
_NUMBER = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?\s*%?"
)
_CHOICES = (
    re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*\**\(?([A-Za-z])\)?(?![A-Za-z])", re.IGNORECASE),
    re.compile(r"^\s*\**\(?([A-Za-z])\**[).:](?:\s|$|\*)", re.MULTILINE),
    re.compile(r"^\s*\**\(?([A-Za-z])\)?\**\s*$", re.MULTILINE),
    re.compile(r"\(([A-Za-z])\)"),
)


class MatchesReference(RowFilter):
    """Drops answers that differ from the reference; a prompt without one passes.

    `extract` is a pattern with one group that finds the answer proper (its last match counts).
    """

    kind: Literal["matches_reference"] = "matches_reference"
    how: Literal["exact", "normalised", "contains", "numeric", "choice"] = "normalised"
    extract: str | None = None

    @field_validator("extract")
    @classmethod
    def _has_one_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as e:
                raise ValueError(f"not a regular expression: {e}") from None
            if groups != 1:
                raise ValueError(f"extract needs exactly one group (...), it has {groups}")
        return pattern

    def check(self, sample: Sample) -> Verdict:
        reference, answer = sample.prompt.reference, sample.response
        if reference is None:
            return self.keep()
        if self.extract is not None:
            found = re.findall(self.extract, answer)
            if not found:
                return self.drop("no_answer", evidence=reference[:200])
            answer = found[-1]
        if agree(self.how, answer, reference):
            return self.keep()
        return self.drop(f"wrong:{answer.strip()[-60:]}", evidence=reference[:200])


def agree(how: str, answer: str, reference: str) -> bool:
    """Whether an answer says the same as the reference."""
    if how == "exact":
        return answer.strip() == reference.strip()
    if how == "numeric":
        got, known = number(answer), number(reference)
        return got is not None and known is not None and abs(got - known) <= TOLERANCE * max(1.0, abs(known))
    if how == "choice":
        got_letter, known_letter = letter(answer), letter(reference)
        return got_letter is not None and got_letter == known_letter
    a, r = normalised(answer), normalised(reference)
    return bool(r) and (f" {r} " in f" {a} " if how == "contains" else a == r)


def normalised(text: str) -> str:
    """Case, punctuation, articles, blanks and Unicode forms levelled."""
    words = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def number(text: str) -> float | None:
    """The last number of a text."""
    found = [m.group() for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]
    if not found:
        return None
    last = found[-1].replace(",", "").replace(" ", "")
    percent = last.endswith("%")
    above, _, below = last.rstrip("%").partition("/")
    if below and float(below) == 0:
        return None
    value = float(above) / (float(below) if below else 1.0)
    return value / 100 if percent else value


def letter(text: str) -> str | None:
    """The option that a multiple-choice answer names, in upper case."""
    for pattern in _CHOICES:
        if found := pattern.findall(text):
            return str(found[-1]).upper()
    return None
