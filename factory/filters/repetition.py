"""Degenerate loops: an answer that says the same again and again.

| what | default | source |
|---|---|---|
| a tail of 1 to 8 words loops 4 times (a single word 8 times), of up to 60 words 3 times | fixed | ours, set on `tests/labelled` |
| the same anywhere twice as often | fixed | the same |
| lines that are the same but for their number: 6, and half of all | fixed | Gopher (Rae et al. 2021, table A1): 0.3 |
| characters that loop without a blank | 120 | fixed; a ruled line has 80 |
| word 4-grams that repeat, in answers from `min_words` on | `max_repeated: 0.5` | Gopher, but looser: answers are shorter than pages |
"""

import re
from collections import Counter
from collections.abc import Iterable
from operator import eq
from typing import Literal

from pydantic import Field

from factory.filters.said import longest, words
from factory.filters.shapes import RowFilter
from factory.rows import Sample, Verdict

SHORT = 8
"""Words in the longest unit that may loop anywhere."""
LONGEST = 60
"""Words in the longest block that is looked for at the tail."""
LINES = 6
CHARACTERS = 120
_CHARACTERS = re.compile(r"(.{1,30}?)\1{3,}", re.DOTALL)
_MARKS = b".,;:!?"
_NUMBERED = re.compile(r"^\W*\d*[.):]?\s*", re.MULTILINE)


class Repetition(RowFilter):
    """Drops degenerate loops."""

    kind: Literal["repetition"] = "repetition"
    max_repeated: float = Field(0.5, gt=0, le=1)
    min_words: int = Field(20, gt=0)

    def check(self, sample: Sample) -> Verdict:
        text = sample.response
        if longest(text) >= CHARACTERS and (run := _run_of_characters(words(text))):
            return self.drop(f"looping_characters={run}", score=run)
        bare = text.encode(errors="surrogatepass").translate(None, _MARKS).decode(errors="surrogatepass")
        said = bare.split() or words(text)
        grams = max(len(said) - 3, 0)
        repeated = grams - len(set(_grams(said)))
        if repeated and (loops := _loop(said, range(1, SHORT + 1), repeated)):
            return self.drop(f"{loops[0]}={loops[1]}", score=loops[1])
        if repeated and len(said) >= self.min_words:
            if (share := repeated / grams) > self.max_repeated:
                most = " ".join(Counter(_grams(said)).most_common(1)[0][0])
                return self.drop(f"repeated_4grams={share:.2f}>{self.max_repeated}", score=share, evidence=most)
            if loops := _loop(said, range(SHORT + 1, LONGEST + 1), repeated):
                return self.drop(f"{loops[0]}={loops[1]}", score=loops[1])
        if text.count("\n") >= LINES - 1 and (same := _same_lines(text)):
            return self.drop(f"repeated_lines={same[1]}", score=same[1], evidence=same[0][:100])
        return self.keep()


def _grams(words: list[str]) -> Iterable[tuple[str, ...]]:
    return zip(words, words[1:], words[2:], words[3:], strict=False)


def _loop(words: list[str], sizes: range, repeated: int) -> tuple[str, int] | None:
    """A loop at the tail, whose last word may be cut off, or a longer one anywhere; with how often it goes round.

    `size` words that go round `times` repeat (times - 1) * size - 3 4-grams: so few repeated ones rule most sizes out.
    """
    for size in sizes:
        needed = 8 if size == 1 else 4 if size <= SHORT else 3
        if repeated + 4 < (needed - 1) * size or len(words) < size * needed:
            if size > 1:
                break
            continue
        for end in (len(words), len(words) - 1):
            if words[end - 1] == words[end - 1 - size] and (times := _times(words, size, end)) >= needed:
                return "looping_tail", times
        often = size <= SHORT and repeated + 4 >= (2 * needed - 1) * size
        if often and (times := _anywhere(words, size)) >= 2 * needed:
            return "loop", times
    return None


def _times(words: list[str], size: int, end: int) -> int:
    """How often the `size` words before `end` stand there one after another."""
    unit, times = words[end - size : end], 1
    while end - size * (times + 1) >= 0 and words[end - size * (times + 1) : end - size * times] == unit:
        times += 1
    return times


def _anywhere(words: list[str], size: int) -> int:
    """The most times that some `size` words stand one after another."""
    same = bytes(list(map(eq, words, words[size:])))
    return max(map(len, same.split(b"\0"))) // size + 1


def _run_of_characters(words: list[str]) -> int:
    """Length of the longest stretch without a blank in which up to 30 characters repeat; 0 where it is short."""
    runs = (m for word in words if len(word) >= CHARACTERS for m in _CHARACTERS.finditer(word))
    return max((len(m.group()) for m in runs if len(m.group()) >= CHARACTERS), default=0)


def _same_lines(text: str) -> tuple[str, int] | None:
    """The line that stands most often, its number aside, when it makes half of the lines."""
    lines = [line for line in _NUMBERED.sub("", text).split("\n") if " " in line.strip()]
    if len(lines) < LINES:
        return None
    line, times = Counter(lines).most_common(1)[0]
    return (line, times) if times >= LINES and times >= len(lines) / 2 else None
