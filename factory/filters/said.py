"""A text's words, read once for all filters that look at the same answer, and for all answers to the same prompt."""

from functools import lru_cache


@lru_cache(maxsize=16)
def words(text: str) -> list[str]:
    """What stands between blanks; not to be changed."""
    return text.split()


@lru_cache(maxsize=16)
def longest(text: str) -> int:
    """Characters of the longest word."""
    return max(map(len, words(text)), default=0)
