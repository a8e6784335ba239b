"""What verifiers share: row filters that know the right answer, or a test of it."""

from typing import Any

from pydantic import PrivateAttr, field_validator

from factory.filters.pattern import Pattern
from factory.filters.shapes import RowFilter
from factory.rows import Verdict

UNKNOWN = "nothing_to_compare"
"""Reason of a verdict that keeps a row since nothing is known about its prompt. As a score it is missing."""


class Verifier(RowFilter):
    """Drops what is wrong. As a score (`score: {by: verdict}`), right is 1 and wrong 0."""

    def unknown(self) -> Verdict:
        return Verdict(filter=self.kind, keep=True, reason=UNKNOWN)


class Extracting(Verifier):
    """One that looks at a part of the answer: `extract` is a pattern with one group that finds it; the last match counts."""

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

    def found(self, text: str) -> str | None:
        """The answer proper; None where `extract` finds none. Undecided where it takes too long."""
        if self._extract is None:
            return text
        found = self._extract.try_on(text, "findall")
        return str(found[-1]) if found else None
