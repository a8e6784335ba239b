"""An answer's own words: what it quotes, or shows as code, is spoken of and not said."""

import re

from factory.rows import Sample

_SHOWN = re.compile(
    r"""```.*?(?:```|\Z) | `[^`\n]+` | "[^"\n]{1,300}" | [“„«][^“”„»\n]{1,300}[“”»] | (?<!\w)'[^'\n]{1,80}\n?'(?!\w) | ^>[^\n]*$""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def own_words(text: str) -> str:
    """The text with each quote and each piece of code replaced by a mark."""
    return _SHOWN.sub("`", text)


def asked_for(sample: Sample, piece: str) -> bool:
    """Whether what was sent holds this piece, so that an answer may hold it too; case aside."""
    sought = piece.strip().casefold()
    return any(sought in m["content"].casefold() for m in (*sample.prompt.messages, *sample.asked))
