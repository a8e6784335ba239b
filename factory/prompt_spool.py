"""Prompts on disk that are read like a list: memory holds a few bytes for each, however long they are."""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

from factory.rows import Prompt, decode_prompt, encode

BLOCK = 1 << 20


class Spool:
    """An anonymous file that prompts are added to; it ends with the process. Readers may go through it side by side."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the last reference to us)
        self._starts = array("Q", [0])

    def __del__(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, prompt: Prompt) -> None:
        self._starts.append(self._starts[-1] + self._file.write(encode(prompt) + b"\n"))

    def read(self, number: int) -> Prompt:
        """One prompt by its number, counted from 0."""
        start, end = self._starts[number], self._starts[number + 1]
        self._file.flush()
        return decode_prompt(os.pread(self._file.fileno(), end - start, start))

    def lines(self, numbers: Sequence[int]) -> Iterator[bytes]:
        """Prompts as JSON, by their numbers; equal prompts are equal bytes. Ascending numbers are read by blocks."""
        self._file.flush()
        block, begins, ends = b"", 0, 0
        for number in numbers:
            start, end = self._starts[number], self._starts[number + 1]
            if not begins <= start <= end <= ends:
                size = end - start if start < begins or start > ends + BLOCK else max(BLOCK, end - start)
                block = os.pread(self._file.fileno(), size, start)
                begins, ends = start, start + len(block)
            yield block[start - begins : end - begins]


class Part(Sequence[Prompt]):
    """Some of a spool's prompts, by their numbers. Slices are parts, too."""

    def __init__(self, spool: Spool, numbers: Sequence[int]) -> None:
        self.spool, self.numbers = spool, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Prompt]:
        return map(decode_prompt, self.spool.lines(self.numbers))

    @overload
    def __getitem__(self, at: int) -> Prompt: ...
    @overload
    def __getitem__(self, at: slice) -> "Part": ...
    def __getitem__(self, at: int | slice) -> "Prompt | Part":
        return Part(self.spool, self.numbers[at]) if isinstance(at, slice) else self.spool.read(self.numbers[at])

    def where(self, wanted: Callable[[Prompt], bool]) -> "Part":
        """Those that `wanted` says yes to."""
        return Part(self.spool, array("Q", (n for n, prompt in zip(self.numbers, self, strict=True) if wanted(prompt))))

    @property
    def digest(self) -> str:
        """Equal when the prompts are, with their references, answers and tags, in this order."""
        running = hashlib.blake2b(digest_size=16)
        for line in self.spool.lines(self.numbers):
            running.update(line)
        return running.hexdigest()


def side_by_side(part: Part) -> Part:
    """The same prompts, those with the same id together, in the order of their first appearance."""
    first: dict[int, int] = {}
    places = array("Q", (first.setdefault(int(prompt.id, 16), i) for i, prompt in enumerate(part)))
    order = sorted(range(len(places)), key=places.__getitem__)
    return Part(part.spool, array("Q", (part.numbers[i] for i in order)))


def spooled(prompts: Iterable[Prompt]) -> Part:
    """Prompts that come one by one, as a list that can be gone through again."""
    spool = Spool()
    for prompt in prompts:
        spool.append(prompt)
    return Part(spool, range(len(spool)))
