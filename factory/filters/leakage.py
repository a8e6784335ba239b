"""What belongs to the asking and stands in the answer: the prompt, the system message, the chat template, the next turn.

| filter | threshold | source |
|---|---|---|
| copied_prompt | more than half of the answer's word 5-grams stand in the prompt | ours: a quote is shorter than an answer |
| leakage | tokens, headings and role labels of chat templates; half of a system message's word 5-grams | ours, set on `tests/labelled` |

What the prompt itself holds may stand in the answer, and so may what is quoted or shown as code.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Literal

from pydantic import Field

from factory.filters.quotes import asked_for, own_words
from factory.filters.shapes import RowFilter
from factory.rows import Sample, Verdict

_MARKS = str.maketrans(dict.fromkeys("""!"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~“”„«»‘’–—…""", " "))
GRAM = 5
"""Words in a row that two texts do not share by chance."""


@lru_cache(maxsize=16)
def _words(text: str) -> list[str]:
    """Kept for the next filter, and for the next answer to the same prompt."""
    return text.casefold().translate(_MARKS).split()


def copied(part: str, whole: str, at_least: float) -> float:
    """Share of the part's word 5-grams that stand in the whole; 0 where it is surely less than `at_least`."""
    words, known = _words(part), _words(whole)
    count = len(words) - GRAM + 1
    if count < 1 or len(known) < GRAM:
        return 0.0
    shared = set(known).intersection(words)
    met = bytes(map(shared.__contains__, words))
    if met.count(1) < at_least * count or _windows(met) < at_least * count:
        return 0.0  # a gram that is known has known words alone
    grams = set(_grams(known))
    return sum(map(grams.__contains__, _grams(words))) / count


def _windows(met: bytes) -> int:
    """At how many places GRAM words in a row are met."""
    return sum(len(run) - GRAM + 1 for run in met.split(b"\0") if len(run) >= GRAM)


def _grams(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(islice(words, i, None) for i in range(GRAM)), strict=False)


class CopiedPrompt(RowFilter):
    """Drops answers that mostly repeat the prompt; `min_words` spares short ones, which may rightly name a choice."""

    kind: Literal["copied_prompt"] = "copied_prompt"
    max_share: float = Field(0.5, gt=0, le=1)
    min_words: int = Field(10, gt=0)

    def check(self, sample: Sample) -> Verdict:
        if len(_words(sample.response)) < self.min_words:
            return self.keep()
        share = copied(sample.response, sample.prompt.text, self.max_share)
        return self.drop(f"copied={share:.2f}>{self.max_share}", score=share) if share > self.max_share else self.keep()


TOKEN = re.compile(
    r"""<\|[A-Za-z][\w ]{0,40}\|> | <｜[^｜<>\n]{1,40}｜> | \[/?INST\] | <</?SYS>> | </?s> | <(?:start|end)_of_turn>
    | <(?:pad|unk|bos|eos|mask)> | <extra_id_\d+> | <unused\d+> | \[(?:CLS|SEP|PAD|UNK|BOS|EOS|MASK|gMASK)\]""",
    re.VERBOSE,
)
_STRUCK = re.compile(r"<s>[^<\n]{1,80}</s>")  # HTML
_OF_TEMPLATES = re.compile(
    r"\b(?:tokens?|tokeni[sz]er|templates?|markers?|tags?|delimiters?|separators?|sentinels?|html|prompts|in your outputs"
    r"|vocabulary|bert|gpt|llama|chatml)\b",
    re.IGNORECASE,
)
HEADING = re.compile(
    r"^#{2,4} ?(?:response|instruction|input|output|assistant|human|user|system|answer|question|end)(?::|\s*\Z)"
    r"|^below is an instruction that describes a task"
    r"|^\W{0,3}(?:instruction|prompt)\W{0,2}:[^\n]*\n+\W{0,3}(?:response|output|completion)\W{0,2}:",
    re.IGNORECASE | re.MULTILINE,
)
_THEM = r"(?:user|human|utilisateur|utilisatrice|benutzer|nutzer|usuario)"
_UPPER = r"(?-i:(?=[A-Z]))"  # "user:" in small letters is a parameter or a key
_US = r"(?:(?:ai )?assistant|assistent|asistente|ai|(?:chat)?bot|model)"
_LABELS = (
    "User", "USER", "Human", "HUMAN", "tilisat", "UTILISAT", "utzer", "UTZER", "suario", "USUARIO", "Assist", "ASSIST", "Asisten",
    "ASISTEN", "AI", "Ai", "Chatbot", "CHATBOT", "Bot", "BOT", "Model", "MODEL", "assistant\n", "model\n", "<assistant>",
)  # fmt: skip
"""One of them stands in every text that has a role's label."""
THEM = re.compile(rf"^[*\[_]{{0,3}}{_UPPER}{_THEM}[*\]_]{{0,3}} ?:", re.IGNORECASE | re.MULTILINE)
US = re.compile(rf"^[*\[_]{{0,3}}{_UPPER}{_US}[*\]_]{{0,3}} ?:", re.IGNORECASE | re.MULTILINE)
ALONE = re.compile(
    rf"^[*\[_]{{0,3}}{_UPPER}(?:assistant|assistent|asistente|chatbot)[*\]_]{{0,3}} ?:", re.IGNORECASE | re.MULTILINE
)
"""Labels that mean a turn where no question comes before; "model:" is mostly a parameter."""
BARE = [  # labels whose marks were lost: the first, and what must follow it
    (re.compile(r"\A(?:assistant|model)\n"), re.compile("")),
    (re.compile(r"\n(?:user|human)\n"), re.compile(r"\n(?:assistant|model)\n")),
    (re.compile(r"^<user>", re.MULTILINE), re.compile(r"^<assistant>", re.MULTILINE)),
]
_KEY = re.compile(r"[*_]{0,2}[^\W\d_][\w '’]{0,20}[*_]{0,2}: ")
_TALK = re.compile(
    r"\b(?:dialog\w*|conversation|chat|transcript|scripts?|scene|interview|play|role-?play|joke|skit|examples?|few-shot|log)\b",
    re.IGNORECASE,
)
SYSTEM = re.compile(
    r"\bmy system (?:prompt|message|instructions?)\b"
    r"|\b(?:according to|instructed (?:in|by)|following|follows|in line with|per) the system (?:prompt|message|instructions?)\b"
    r"|\bthe system (?:prompt|message) (?:tells|told|asks|asked|instructs|instructed|forbids|wants) me\b",
    re.IGNORECASE,
)


class Leakage(RowFilter):
    """Drops answers that hold pieces of the chat template, a further turn, or the system message."""

    kind: Literal["leakage"] = "leakage"
    max_share: float = Field(0.5, gt=0, le=1)

    def check(self, sample: Sample) -> Verdict:
        for reason, found in _leaks(sample):
            if not asked_for(sample, found.strip("*[]_: ") if reason == "role" else found):
                return self.drop(f"leakage:{reason}", evidence=found.strip()[:100])
        for message in dict.fromkeys(
            m["content"] for m in (*sample.prompt.messages, *sample.asked) if m["role"] == "system"
        ):
            if (share := copied(message, sample.response, self.max_share)) >= self.max_share:
                return self.drop(f"leakage:system_message={share:.2f}", score=share, evidence=message[:100])
        return self.keep()


def _leaks(sample: Sample) -> Iterator[tuple[str, str]]:
    """Pieces that look leaked, each as (what it is, the text found). Most answers end at a cheap test."""
    text = sample.response
    if ("<" in text or "[" in text) and TOKEN.search(text):
        yield from (("special_token", token) for token in _tokens(text))
    if ("#" in text or "nstruction" in text or "rompt" in text) and (found := HEADING.search(own_words(text))):
        yield "heading", found.group()
    if "system " in text and (found := SYSTEM.search(own_words(text))):
        yield "system_mention", found.group()
    labelled = ("\n" in text or ":" in text[:40]) and any(map(text.__contains__, _LABELS))
    if labelled and (label := _role(text)) and not _TALK.search(sample.prompt.text):
        yield "role", label


def _tokens(text: str) -> Iterator[str]:
    """Tokens of chat templates that are used: outside quotes and code, and not in a sentence about templates."""
    own = _STRUCK.sub("", own_words(text)).strip()
    for token in TOKEN.finditer(own):
        inside = token.start() > 0 and token.end() < len(own)
        if not (inside and _OF_TEMPLATES.search(own[max(token.start() - 120, 0) : token.end() + 120])):
            yield token.group()


def _role(text: str) -> str | None:
    """The label of a turn that nobody asked for; not a key in a list of keys and values."""
    own = own_words(text).strip()
    for bare, follower in BARE:
        if (found := bare.search(own)) and follower.search(own, found.end()):
            return found.group()
    if (first := US.match(own)) and not _among_keys(own, first):
        return first.group()
    for them in THEM.finditer(own):
        answered = US.search(own, them.end())
        if (answered or them.start() > 0) and not _among_keys(own, them):
            return them.group()
    late = ALONE.search(own, 1)
    return late.group() if late and not _among_keys(own, late) else None


def _among_keys(text: str, label: re.Match[str]) -> bool:
    """Whether the line before or after is a key with a value, other than a role's."""
    before = text[: label.start()].removesuffix("\n").rpartition("\n")[2]
    after = text[label.end() :].partition("\n")[2].partition("\n")[0]
    return any(
        len(line) < 80 and _KEY.match(line) and not (US.match(line) or THEM.match(line)) for line in (before, after)
    )
