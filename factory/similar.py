"""Which texts say the same, or nearly: levelled texts, and MinHash signatures of their word bigrams; of prompts and answers.

Bands of four rows: at similarity s, 1 - (1 - s**4) ** 32 of the pairs are looked at (s=.7: 99.98 %), then the signatures
decide. The estimate's standard error is sqrt(s (1-s) / 128), about .04. What is kept in memory are signatures, not texts.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import add
from typing import Any, NamedTuple

from factory.rows import digest

ARTICLES = frozenset({"a", "an", "the"})
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")

_TYPED = {
    "\u2019": "'",
    "\u2018": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2013": "~",
    "\u2014": "~",
    "\u2026": "...",
    "\xa0": " ",
}
"""Printers' marks as marks that are levelled alike: with them alone, a text still goes the quick way."""
_PLAIN = bytes(c for c in range(128) if chr(c) not in string.digits + "+#")
"""ASCII text of these alone keeps none of its marks."""
_STAYING = re.compile(
    r"""(?:_|[^\w\s,;])(?<=\d.)(?=\d)   # 3.5
    | -(?<!\w-)(?=\d)                   # -5
    | [+#](?<=[A-Za-z].)                 # C#""",
    re.ASCII | re.VERBOSE,
)
_TABLE = bytes(
    32 if chr(c) in ",;" or (c < 128 and chr(c).isspace()) else ord(chr(c & 127).lower()) for c in range(256)
)
_BETWEEN_BLANKS = [f" {word} ".encode() for word in sorted(ARTICLES)]
_DELETED = (string.punctuation.replace(",", "").replace(";", "")).encode()

BANDS = 32
PERMUTATIONS = 128
SHORT = 3
"""Texts with fewer bigrams are compared exactly."""


def normalised(text: str) -> str:
    """Case, punctuation, articles, blanks and Unicode forms levelled; but 3.5 is not 35, nor -5 the same as 5.

    Where nothing would be left ("A", "+"), what stands there counts.
    """
    return " ".join(_levelled(text))


def words(text: str) -> list[str]:
    """The levelled words of a text; in scripts that are written without blanks, characters."""
    levelled = _levelled(text)
    return levelled if text.isascii() or (joined := " ".join(levelled)).isascii() else _words().findall(joined)


def count_words(text: str) -> int:
    """Words as they stand; in scripts that are written without blanks each character is one."""
    return len(text.split() if text.isascii() else _words().findall(text))


def _levelled(text: str) -> list[str]:
    if not text.isascii():
        for printed, typed in _TYPED.items():
            text = text.replace(printed, typed)
    if text.isascii() and (quick := _levelled_ascii(text)):
        return quick
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    spaced = _THOUSANDS.sub("", plain).replace(",", " ").replace(";", " ")
    found = _marks().sub("", spaced).split() or plain.split()
    return [word for word in found if word not in ARTICLES] or found


def _levelled_ascii(text: str) -> list[str]:
    """The same for ASCII, ten times faster: marks that stay are lifted out of it for a moment. Empty if nothing is left."""
    if text.encode().translate(None, _PLAIN):
        text = _STAYING.sub(lambda mark: chr(ord(mark[0]) | 0x80), _THOUSANDS.sub("", text))
    bare = b" %b " % text.encode("latin-1").translate(_TABLE, _DELETED)
    for article in _BETWEEN_BLANKS:
        while article in bare:
            bare = bare.replace(article, b" ")
    return bare.decode("ascii").split()


@cache
def _marks() -> Any:
    """Punctuation and invisible characters; not those inside a number, the minus before one, nor those of C++ and C#."""
    import regex  # for \p; see filters/pattern.py

    return regex.compile(r"(?!(?<=\d).\d)(?!(?<!\w)-\d)(?!(?<=[^\W\d_])[+#])[\p{P}\p{Cf}$`|~^<>=+]")


class Twin(NamedTuple):
    """An earlier row that says the same."""

    id: str
    similarity: float


class Index:
    """MinHash signatures in bands; a hit counts when the signatures agree enough."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._lsh: Any = _rensa().RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._signatures: list[Any] = []
        self._names: list[str] = []
        self._short: dict[str, str] = {}

    def near(self, signature: Any) -> list[Twin]:
        """All texts so far whose similarity reaches the threshold, in the order they came."""
        if isinstance(signature, str):
            return [Twin(self._short[signature], 1.0)] if signature in self._short else []
        met = self._lsh.query(signature)
        if not met:
            return []
        hits = (Twin(self._names[i], self._signatures[i].jaccard(signature)) for i in sorted(met))
        return [twin for twin in hits if twin.similarity >= self.threshold]

    def add(self, signature: Any, name: str) -> None:
        if isinstance(signature, str):
            self._short.setdefault(signature, name)
            return
        self._lsh.insert(len(self._names), signature)
        self._signatures.append(signature)
        self._names.append(name)


def sketch(text: str) -> Any:
    """A MinHash of the text's word bigrams; of a short text a hash of the whole."""
    told = words(text)
    # no blank between the two, which would cost a tenth of all: hardly any other pair of words runs together to the same
    grams = list(map(add, told, told[1:]))
    return _minhash(grams) if len(grams) >= SHORT else digest(told)


@cache
def _words() -> Any:
    """Words; in scripts that are written without blanks, characters."""
    import regex  # for \p; see pattern.py

    alone = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    return regex.compile(rf"[{alone}]\p{{M}}*|[^\s{alone}]+")


def _minhash(grams: list[str]) -> Any:
    signature = _rensa().RMinHash(PERMUTATIONS, 42)  # 42: the seed
    signature.update(grams)
    return signature


@cache
def _rensa() -> Any:
    """Loaded at the first use, and not looked up at each one."""
    import rensa

    return rensa


def similar_to(
    seeds: Mapping[str, str], others: Callable[[], Iterable[tuple[str, str]]], threshold: float
) -> dict[str, str]:
    """Names of the seeds, and of the other texts that a chain of near-duplicates joins to one; each with its first seed.

    `seeds` are name -> text; `others` gives (name, text) afresh at each call, and may give the seeds again. It is gone
    through until nothing joins, so that memory grows with what has joined, not with all that is compared.
    """
    first = {name: name for name in seeds}
    order = {name: i for i, name in enumerate(seeds)}

    def root(name: str) -> str:
        while first[name] != name:
            first[name] = first[first[name]]
            name = first[name]
        return name

    def join(a: str, b: str) -> None:
        a, b = sorted((root(a), root(b)), key=order.__getitem__)
        first[b] = a

    news = dict(seeds)
    while news:
        index = Index(threshold)
        for name, text in news.items():
            signature = sketch(text)
            for twin in index.near(signature):
                join(twin.id, name)
            index.add(signature, name)
        news = {}
        for name, text in others():
            if name not in first or name in news:
                for twin in index.near(sketch(text)):
                    if name not in first:
                        first[name], order[name], news[name] = name, len(order), text
                    join(twin.id, name)
    return {name: root(name) for name in first}
