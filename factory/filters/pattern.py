"""A user's regular expression, which must not hang a run.

Python's own `re` cannot be stopped in the middle of a match; the `regex` package reads the same patterns and can.
A pattern that is too slow for some texts leaves those undecided; one that is too slow again and again is given up.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

LIMIT_S = 0.25
"""Processor seconds for one text; ordinary patterns need microseconds."""
PATIENCE = 10
"""Texts over the limit after which no further one is tried, so that a pattern costs seconds, not days."""


class Undecided(Exception):
    """The pattern took too long; the message is a verdict's reason."""


@dataclass
class Pattern:
    """A pattern and how often it was too slow. ValueError for what is not a pattern."""

    text: str
    _slow: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        self.groups = int(self._compiled.groups)

    def try_on(self, text: str, how: Literal["fullmatch", "search", "findall"]) -> Any:
        """What the method of that name gives; Undecided when it takes too long."""
        if self._slow >= PATIENCE:
            raise Undecided("pattern_timeout:given_up")
        try:
            return getattr(self._compiled, how)(text, timeout=LIMIT_S)
        except TimeoutError:
            self._slow += 1
            raise Undecided(f"pattern_timeout={LIMIT_S}s") from None

    @cached_property
    def _compiled(self) -> Any:
        import regex  # a tenth of the command's start-up: only recipes that bring patterns pay for it

        try:
            return regex.compile(self.text)
        except (regex.error, RecursionError, OverflowError) as e:
            raise ValueError(f"not a regular expression: {e}") from None
