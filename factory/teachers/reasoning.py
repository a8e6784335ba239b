"""Reasoning and answer apart, where a model writes both into one text between tags.

Chat templates and servers lose tags: the opener is often part of the prompt, the closer is missing where the answer was
cut. What cannot be told apart for certain is no answer: a half of it would look like data.
"""

import re
from typing import NamedTuple

TAG = re.compile(r"</?(?:seed:)?(?:think|thinking|thought)(?:\s[^<>]{0,99})?>|\[/?THINK\]|◁/?think▷", re.IGNORECASE)
"""`<reasoning>` is not among them: prompts ask for it by name, as a part of the answer."""
_QUOTES = "`\"'"


class Parts(NamedTuple):
    """`answer` is None where it cannot be told from the reasoning: an unclosed block, or one in mid-answer."""

    answer: str | None
    reasoning: str | None


def separate(text: str) -> Parts:
    """Reasoning stands at the beginning, in one block or several; a tag in quotes is spoken of, not used.

    A text without tags is given back as it is. With tags, no character is lost but white space around the parts.
    """
    begun = "<" in text or "[" in text or "◁" in text  # most texts have none, and this costs next to nothing
    tags = [tag for tag in TAG.finditer(text) if not _quoted(text, tag)] if begun else []
    if not tags:
        return Parts(text, None)
    closers = sum("/" in tag[0] for tag in tags)
    depth = 1 if closers > len(tags) - closers else 0  # more closers than openers: the prompt held the first opener
    reasoning: list[str] = []
    at = 0
    for tag in tags:
        before = text[at : tag.start()]
        if depth == 0 and before.strip():
            return Parts(None, text.strip())  # an answer had begun already
        reasoning.append(before.strip())
        depth = max(depth + (-1 if "/" in tag[0] else 1), 0)
        at = tag.end()
    thought = "\n".join(filter(None, reasoning)) or None
    if depth > 0:
        return Parts(None, "\n".join(filter(None, [thought, text[at:].strip()])) or None)
    return Parts(text[at:].lstrip(), thought)


def _quoted(text: str, tag: re.Match[str]) -> bool:
    before, after = text[max(tag.start() - 1, 0) : tag.start()], text[tag.end() : tag.end() + 1]
    return bool(before and after) and before in _QUOTES and after in _QUOTES
