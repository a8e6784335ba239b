"""Reasoning that is not where it belongs: tags in the answer, deliberation about "the user", the trace said again.

A reader of answers parts trace and answer where tags are sound (`teachers/reasoning.py`); what comes with a data set, or from
a template that lost its tags, has only this. Thinking aloud about the subject is no leak: "Let's think step by step" stays.
Thresholds are ours, set on `tests/labelled`.
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from factory.filters.quotes import asked_for, own_words
from factory.filters.shapes import RowFilter
from factory.rows import Sample, Verdict

WITHIN = 400
"""Characters from the start in which a trace without tags shows itself."""
SAME = 8
"""So many first words of the trace in the answer are a copy; an answer that the trace drafted stands further in."""
ENOUGH = 3
"""Sum of cues from which an untagged text deliberates."""

_NAME = r"(?:seed:)?(?:think(?:ing)?|thought|reasoning|scratch_?pad|reflection|analysis|inner_monologue)"
TAG = re.compile(
    rf"<(?P<close>/)?{_NAME}>|(?-i:\[(?P<close2>/)?THINK\])|◁(?P<close3>/)?think▷|<\|(?:begin|(?P<close4>end))_of_(?:thought|thinking)\|>"
    r"|<\|channel\|>(?:analysis|commentary)|\bassistantfinal",
    re.IGNORECASE,
)
_USER = r"(?:the|this) (?:user|person)|l['’]utilisateur|el usuario|der nutzer|die nutzerin"
_DOES = (
    r"(?:wants?|asks?|asked|is asking|seems?|is (?:likely|probably|new|upset|looking|trying)|might|may"
    r"|mentioned|wrote|said|says|needs?|provided|gave"
    r"|(?:did|does)(?:n['’]t| not)|veut|demande|pregunta|quiere|fragt|möchte|will|meint)"
)
# what it adds up to; each cue counts once: its weight, pieces of which one stands in each text that has it, and its pattern
_CUES = {
    "user": (2, ("user", "person", "utilisat", "usuario", "nutzer", "用户"), rf"\b(?:{_USER}) (?:\w+ )?{_DOES}\b|用户(?:想|问|要|的问题)"),
    "asked": (
        2,
        ("we are", "we're", "we need", "we have"),
        r"\A\W*we(?: are|'re) asked (?:for|to)\b|\A\W*we (?:need|have) to (?:answer|produce|respond|output|reply)\b",
    ),
    "opener": (1, ("",), r"\A\W*(?:okay|ok|alright|hmm+|got it|wait|well|so|right|bien|d['’]accord|好的|嗯)\b,?"),
    "label": (
        1,
        ("thinking", "internal monologue", "thought", "reasoning"),
        r"\A\W*(?:thinking|internal monologue|thought(?: process)?|my thought process|reasoning)\b[^\n]{0,12}:",
    ),
    "plan": (1, ("i should",), r"\bi should (?:say|mention|explain|keep|ask|avoid|note|start|give|write)\b"),
    "duty": (
        1,
        ("should", "need to", "have to", "must", "better", "je dois", "debo", "muss", "我"),
        r"\b(?:i|we)(?:['’]d| had)? (?:should|need to|have to|must|better)\b|\b(?:je dois|debo|muss ich|ich muss)\b|我(?:需要|应该)",
    ),
    "self": (
        1,
        ("let me", "i recall", "let's", "let’s", "i'll", "i’ll", "i need"),
        r"\blet me (?:recall|check|double-check|think|see|read|go with|write|compute|break|figure|re-?read)\b|\bi recall\b"
        r"|\blet['’]s (?:see|think)\b|\bi['’]ll (?:assume|go with)\b|\bi need to (?:figure|make sure|come up)\b",
    ),
    "second": (
        1,
        ("wait,", "wait.", "double-check"),
        r"\bwait[,.] (?:check|let|no|that|actually|is|but|if|maybe)\b|\blet me double-check\b",
    ),
    "doubt": (
        1,
        (" wait", " hmm", " actually", "wait,", "maybe", ", skip", "keep it"),
        r"[.?] (?:wait|hmm|maybe|actually)\b|\bwait,|\bmaybe (?:a|too|not)\b|, skip (?:them|it)\b|\bkeep it (?:short|general)\b",
    ),
}  # fmt: skip


class Cue(NamedTuple):
    weight: int
    hints: tuple[str, ...]
    find: Callable[[str], re.Match[str] | None]


def _cue(weight: int, hints: tuple[str, ...], pattern: str) -> Cue:
    """What stands at the start is sought there alone: a search would try it at each character."""
    compiled = re.compile(pattern, re.IGNORECASE)
    return Cue(weight, hints, compiled.match if pattern.startswith(r"\A") else compiled.search)


_CUE = {name: _cue(*cue) for name, cue in _CUES.items()}
_HINTS = (
    "user", "person", "utilisat", "usuario", "nutzer", "let me", "let's", "let’s", "hmm", "wait", "i should", "i need", "we need",
    "we have", "asked", "thought", "thinking", "用户",
)  # fmt: skip
"""One of them stands in every start that reaches ENOUGH."""


class Trace(RowFilter):
    """Drops answers in which reasoning leaked, and traces that hold tags of their own."""

    kind: Literal["trace"] = "trace"

    def check(self, sample: Sample) -> Verdict:
        if found := _tag(sample, sample.response):
            return self.drop(f"trace:{_where(sample.response, found)}", evidence=found.group())
        if sample.reasoning:
            if found := _tag(sample, sample.reasoning):
                return self.drop("trace:tag_in_trace", evidence=found.group())
            start = " ".join(sample.reasoning.split(None, SAME)[:SAME])
            if start.count(" ") == SAME - 1 and start in " ".join(sample.response.split()):
                return self.drop("trace:copied", evidence=start)
        if cues := _deliberates(sample):
            return self.drop("trace:deliberation", evidence=cues)
        return self.keep()


def _tag(sample: Sample, text: str) -> re.Match[str] | None:
    """The first tag that is used, not quoted and not asked for."""
    if not (("<" in text or "[" in text or "◁" in text or "assistantfinal" in text) and TAG.search(text)):
        return None
    return next(
        (tag for tag in TAG.finditer(own_words(text)) if not asked_for(sample, tag.group().replace("/", ""))), None
    )


def _where(text: str, first: re.Match[str]) -> str:
    """How the tags stand: opened and not closed, closed and not opened, or a whole block."""
    closers = [any(tag.groupdict().values()) for tag in TAG.finditer(text)]
    if any(first.groupdict().values()):
        return "unopened"
    return "block" if any(closers) else "unclosed"


def _deliberates(sample: Sample) -> str | None:
    """The cues of an untagged trace, where there are enough of them."""
    start = sample.response[:WITHIN]
    lowered = start.lower()
    if not any(map(lowered.__contains__, _HINTS)):
        return None
    likely = {name: cue for name, cue in _CUE.items() if any(map(lowered.__contains__, cue.hints))}
    if sum(cue.weight for cue in likely.values()) < ENOUGH:
        return None
    own = own_words(start).lstrip()
    found = {name: match for name, cue in likely.items() if (match := cue.find(own))}
    if "user" in found and re.search(r"\buser|customer|ticket\b|monologue", sample.prompt.text, re.IGNORECASE):
        return None
    if sum(_CUE[name].weight for name in found) < ENOUGH:
        return None
    return ", ".join(match.group().strip() for match in found.values())[:100]
