"""Decontamination: rows that hold an item of a benchmark, by which the student may be measured later.

| rule | default | source |
|---|---|---|
| same text | a turn that is a whole question of the benchmark, after levelling | - |
| `run` | 13 words of an item in a row | GPT-3, app. C: 13-grams |
| `share` | more than half of an item's words stand in shared 8-grams | Tulu 3, 3.2: 50 % of the tokens, 8-grams |
| `edit` | Indel similarity of the whole texts at least .75 | OpenThoughts, decontamination: 75 % |

Words that more than ten items share (`COMMON`; GPT-3, app. C, has ten for its 13-grams) are the benchmark's wording, such
as "answer with one letter", and point to no item. What is kept in memory is the benchmark, never the rows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, PrivateAttr

from factory.errors import RecipeError
from factory.filters.shapes import GroupFilter, Kit
from factory.knobs import Knobs
from factory.prompt_files import Find, is_hub_id, read
from factory.prompt_rows import Column, Unreadable, prompt_reader
from factory.recipe_file import find
from factory.rows import Sample, Verdict
from factory.similar import words

GRAM = 8
"""Words of the n-grams that count for `share`; texts with fewer are compared as a whole."""
ANSWER = 13
"""Words from which a benchmark's answer is looked for: shorter ones ("42", "in Paris") are everybody's."""
COMMON = 10
HINT = 3
"""Words of the n-grams that say which items are worth an edit distance."""
HINTS = 0.2
"""Share of an item's own hints that a text must have. At edit similarity .75 about .75 ** 3 = .4 of them are left."""

Gram = tuple[str, ...]


class Benchmark(Knobs):
    """A file of test items, read like a prompt list; `columns` as there."""

    path: str = Field(min_length=1)
    split: str | None = None
    columns: dict[Column, str] = {}


def _by_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Contamination(GroupFilter):
    """Drops rows whose prompt or answer holds a benchmark's item; `null` turns a rule off.

    It looks at the samples of a prompt together, since the prompt needs to be looked at but once; and it is no part of
    what "accepted" means when a student is measured, since it says nothing of how good an answer is.
    """

    kind: Literal["contamination"] = "contamination"
    against: list[Annotated[Benchmark, BeforeValidator(_by_path)]] = Field(min_length=1)
    run: int | None = Field(13, ge=GRAM)
    share: float | None = Field(0.5, ge=0, lt=1)
    edit: float | None = Field(0.75, gt=0, le=1)
    _items: "Items | None" = PrivateAttr(None)

    def files(self) -> list[str]:
        return [one.path for one in self.against]

    def open(self, kit: Kit) -> Self:
        opened = self.model_copy()
        opened._items = Items(self.texts())
        return opened

    def texts(self) -> Iterator["Text"]:
        """All questions and answers; RecipeError, with file and line, where they cannot be read."""
        for one in self.against:
            yield from items(one, find)

    def check_group(self, samples: list[Sample]) -> list[Verdict]:
        asked = [self._hit("prompt", m["content"]) for m in samples[0].prompt.messages] if samples else []
        of_prompt = next(filter(None, asked), None)
        return [of_prompt or self._of_answer(sample) or self.keep() for sample in samples]

    def _of_answer(self, sample: Sample) -> Verdict | None:
        return next(filter(None, (self._hit("answer", t) for t in (sample.response, sample.reasoning) if t)), None)

    def _hit(self, where: Literal["prompt", "answer"], text: str) -> Verdict | None:
        """A drop that names the item which the text holds most surely."""
        assert self._items is not None, "a filter is opened before it looks at rows"
        told = words(text)
        same = self._items.whole.get(" ".join(told)) if where == "prompt" else None
        if same is not None:
            return self.drop(f"contaminated_{where}:same_text", score=1.0, evidence=same)
        for item in self._items.near(told):
            if rule := self._rule(item, told):
                return self.drop(f"contaminated_{where}:{rule[0]}", score=rule[1], evidence=item.place)
        return None

    def _rule(self, item: "Text", told: list[str]) -> tuple[str, float] | None:
        """The first rule by which a text holds an item, with the value measured."""
        from rapidfuzz.distance import Indel

        assert self._items is not None
        run, share = self._items.shared(item, told)
        if self.run is not None and run >= self.run:
            return f"run={run}", run
        if self.share is not None and share > self.share:
            return f"share={share:.2f}", share
        if self.edit is not None:
            edit = Indel.normalized_similarity(" ".join(item.words), " ".join(told), score_cutoff=self.edit)
            if edit >= self.edit:
                return f"edit={edit:.2f}", edit
        return None


class Text(NamedTuple):
    """A question or an answer of a benchmark. `place` is `file:line`."""

    place: str
    words: list[str]
    is_question: bool


def items(one: Benchmark, find: Find) -> list[Text]:
    """The questions and answers of a benchmark's file; RecipeError, with file and line, where it cannot be read.

    `check`, a run's beginning and the filter want them: a file is read once, and again when it has changed.
    """
    stamp = None
    if not is_hub_id(one.path, find):
        with suppress(OSError):
            found = find(one.path).stat()
            stamp = f"{found.st_mtime_ns} {found.st_size} {found.st_ino}"
    return _items(one.path, one.split, tuple(one.columns.items()), find, stamp)


@lru_cache(maxsize=32)
def _items(
    path: str, split: str | None, columns: tuple[tuple[Column, str], ...], find: Find, stamp: str | None
) -> list[Text]:
    return list(_read(path, split, dict(columns), find))


def _read(path: str, split: str | None, columns: dict[Column, str], find: Find) -> Iterator[Text]:
    as_prompt = prompt_reader(columns, path)
    none = True
    for line, row in read(path, split, find):
        if row is None:
            continue
        place = f"{path}:{line}"
        try:
            prompt = as_prompt(row, place)
        except Unreadable as e:
            raise RecipeError(f"{place}: {e}; a benchmark's row that cannot be read would guard nothing") from None
        none = False
        yield Text(place, words(prompt.text), True)
        for answer in (prompt.reference, prompt.completion):
            if answer and len(told := words(answer)) >= ANSWER:
                yield Text(place, told, False)
    if none:
        raise RecipeError(f"{path}: there are no items in it")


class Items:
    """Where the n-grams of a benchmark stand."""

    def __init__(self, texts: Iterable[Text]) -> None:
        distinct = {tuple(text.words): text for text in reversed(list(texts)) if text.words}
        self.texts = list(reversed(distinct.values()))
        self.whole = {" ".join(text.words): text.place for text in self.texts if text.is_question}
        self._grams = _places(self.texts, GRAM)
        self._hints = _places(self.texts, HINT)
        self._own = [sum(gram in self._hints for gram in _grams(t.words, HINT)) for t in self.texts]

    def near(self, told: list[str]) -> list[Text]:
        """Items that may stand in a text: they share an 8-gram, or a good part of their own 3-grams; the likeliest first."""
        hints = _count(self._hints, _grams(told, HINT))
        if not hints:
            return []
        grams = _count(self._grams, _grams(told, GRAM))
        close = {i for i, n in hints.items() if n >= HINTS * self._own[i] and len(self.texts[i].words) >= GRAM}
        order = sorted(close | grams.keys(), key=lambda i: (-grams[i], -hints[i], i))
        return [self.texts[i] for i in order]

    def shared(self, item: Text, told: list[str]) -> tuple[int, float]:
        """Of an item's own words: the longest run, and the share, in 8-grams that the text has, too."""
        theirs = _grams(told, GRAM)
        own, covered = set[int](), set[int]()
        longest = start = 0
        for i, gram in enumerate(zip(*(item.words[k:] for k in range(GRAM)), strict=False)):
            if gram not in self._grams or gram not in theirs:
                start = i + 1
            else:
                covered.update(range(i, i + GRAM))
                longest = max(longest, i + GRAM - start)
            if gram in self._grams:
                own.update(range(i, i + GRAM))
        return longest, len(covered) / max(len(own), 1)


def _grams(told: list[str], size: int) -> set[Gram]:
    return set(zip(*(told[k:] for k in range(size)), strict=False))


def _places(texts: list[Text], size: int) -> dict[Gram, list[int]]:
    """The texts that have an n-gram; without those that too many have."""
    places: dict[Gram, list[int]] = {}
    for i, text in enumerate(texts):
        for gram in _grams(text.words, size):
            places.setdefault(gram, []).append(i)
    return {gram: found for gram, found in places.items() if len(found) <= COMMON}


def _count(places: dict[Gram, list[int]], grams: set[Gram]) -> Counter[int]:
    return Counter(i for gram in places.keys() & grams for i in places[gram])
