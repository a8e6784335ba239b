"""A text's words, read once for all filters that look at the same answer, and for all answers to the same prompt."""

from functools import lru_cache

from factory.similar import count_words


@lru_cache(maxsize=16)
def words(text: str) -> list[str]:
    """What stands between blanks; not to be changed."""
    return text.split()


def count(text: str) -> int:
    """Words; in scripts that are written without blanks each character is one."""
    return len(words(text)) if text.isascii() else count_words(text)


@lru_cache(maxsize=16)
def longest(text: str) -> int:
    """Characters of the longest word."""
    return max(map(len, words(text)), default=0)
