"""The gate before a judge: answers that speak to the judge, or as it, are set aside before anybody is asked.

Cheap patterns, for what a text that only answers has no need of. A judge is asked about data between borders that the
data cannot know, and its verdict is read strictly; this comes before both, since a gullible judge obeys anyway.
"""

import re
import unicodedata

_TOKENS = re.compile(
    r"<\|[a-z_]{2,30}\|>|\[/?INST\]|<</?SYS>>|</?(?:start_of_turn|end_of_turn)>|^\s*#{2,4}\s*(?:system"
    r"|instruction|assistant)\s*:",
    re.IGNORECASE | re.MULTILINE,
)
_VERDICT = re.compile(
    r"^[^\w\n]{0,20}(?:(?:final|overall|your|my|the|total)\s+)*(?:score|rating|grade|verdict|mark|points|better"
    r"|answer\s*\d+)[^\w\n]{0,20}?(?:[:=]|is\b|->)[^\w\n]{0,20}"
    r"(?:\d+(?:\.\d+)?(?:\s*(?:/|out of)\s*\d+)?|tie|[a-f][+-]?|one|two|three|four|five|ten|perfect"
    r"|excellent|max\w*)[^\w\n]{0,20}$",
    re.IGNORECASE | re.MULTILINE,
)
_JSON_VERDICT = re.compile(
    r"[\"'](?:score|rating|grade|verdict|better|answer_\d+)[\"']\s*:\s*[\"']?(?:\d|tie)", re.IGNORECASE
)
_BORDER = re.compile(
    r"^[^\w\n]{0,20}(?:end|begin|start)\s+of\s+(?:the\s+)?(?:answer|response|question|data|material)\b",
    re.IGNORECASE | re.MULTILINE,
)

_GRADER = (
    r"(?:judges?|graders?|evaluators?|reviewers?|raters?|assessors?|examiners?"
    r"|whoever (?:grades|judges|rates|reads|marks|scores))"
)
_GRADE = r"(?:scores?|ratings?|grades?|marks?|points?|stars?|verdicts?)"
_GIVE = (
    r"(?:give|gives|giving|award|assign|output|write|return|print|respond|reply|answer|rate|grade|score"
    r"|mark|put|choose|pick|select|record|enter|report)"
)
_NUMBER = r"(?:\d+(?:\.\d+)?|one|two|three|four|five|ten|full|top|highest|maximum|max|best|perfect|excellent)"
_ORDERS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # forget what you were told
        r"\b(?:ignore|disregard|forget|override|bypass|skip|discard|drop|set aside|pay no attention to"
        r"|do not follow|stop following)\b[^.!?\n]{0,50}"
        r"\b(?:previous|prior|above|earlier|preceding|all|any|everything|your|other|given|former|rubric|original)\b[^.!?\n]{0,40}"
        r"\b(?:instruct\w*|rules?|rubric|prompts?|orders?|guidelines?|criteria|directions?|text|messages?"
        r"|context|told|said|task)\b",
        # give it this
        rf"\b{_GIVE}\b[^.!?\n]{{0,60}}\b{_GRADE}\b[^.!?\n]{{0,30}}\b{_NUMBER}\b",
        rf"\b{_GIVE}\b[^.!?\n]{{0,60}}\b{_NUMBER}\b[^.!?\n]{{0,30}}\b{_GRADE}\b",
        rf"\b{_GIVE}\b[^.!?\n]{{0,40}}\b(?:it|this|answer|response|me)\b"
        rf"[^.!?\n]{{0,30}}\b(?:a |an |as )?{_NUMBER}\s*(?:/|out of|of)\s*\d+",
        rf"\b(?:this|my|the|above) (?:answer|response|reply|text|one)\b"
        rf"[^.!?\n]{{0,40}}\b(?:deserves?|merits?|earns?|must|should|has to|is to|gets?|receives?|warrants?)\b"
        rf"[^.!?\n]{{0,50}}\b(?:{_GRADE}|{_NUMBER})\b",
        rf"\b{_GRADE}\b[^.!?\n]{{0,30}}\b(?:for|of) (?:this|my) (?:answer|response|reply)\b"
        rf"[^.!?\n]{{0,40}}\b{_NUMBER}\b",
        # spoken to the judge, or as somebody over it
        rf"\b(?:dear|hey|hello|attention|note (?:to|for)|message (?:to|for)|instructions? (?:to|for)"
        rf"|to) (?:the |all |any |our |this )?{_GRADER}\b",
        rf"\b(?:as|you are|you're|act as|now) (?:a |an |the |now )*(?:\w+ )?{_GRADER}\b"
        rf"[^.!?\n]{{0,80}}\b(?:{_GRADE}|must|should|will|always)\b",
        rf"\b(?:system|admin\w*|developer|operator)\b ?(?:message|note|notice|override|update"
        rf"|prompt)?:[^\n]{{0,160}}\b(?:{_GRADE}|{_GRADER}|grading)\b",
        r"\b(?:grading|evaluation|scoring|rating|judging|rubric) (?:is |has been |was )?(?:over|done"
        r"|complete\w*|finished|changed|updated|cancel\w*|suspended|replaced|void)\b",
    )
]  # fmt: skip


def hijack(text: str) -> tuple[str, str] | None:
    """What in an answer is meant for its judge: the kind, and the words; None for an answer that only answers."""
    plain = _plain(text)
    kinds = (
        ("template_token", [_TOKENS]),
        ("verdict_line", [_VERDICT, _JSON_VERDICT]),
        ("border", [_BORDER]),
        ("orders", _ORDERS),
    )
    for kind, patterns in kinds:
        for pattern in patterns:
            if found := pattern.search(plain):
                return kind, " ".join(found[0].split())[:160]
    return None


def _plain(text: str) -> str:
    """Wide and styled letters as plain ones, invisible characters gone: what a model reads all the same."""
    folded = unicodedata.normalize("NFKC", text)
    return "".join(c for c in folded if unicodedata.category(c) != "Cf").replace("\u2028", "\n").replace("\u2029", "\n")
