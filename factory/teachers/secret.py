"""A server that repeats our key must not get it into our files."""

import re
from urllib.parse import quote

LEAST = ((r"\d", 8), (r"", 20))
"""Characters from which a key is one, with a digit and without any. Placeholders such as EMPTY and not-needed are words, and
must not be cut out of answers."""


class Secret:
    """A key, and how to take it out of what a server said, also where JSON or a URL has written it with escapes."""

    def __init__(self, key: str | None) -> None:
        long_enough = any(key and len(key) >= least and re.search(mark, key) for mark, least in LEAST)
        self._plain = key.encode() if key and long_enough else b""
        self._marks = [b"\\u00", b"\\/"] + ([b"%"] if quote(key or "", safe="") != key else [])
        each = (rf"(?:{re.escape(c)}|\\{re.escape(c)}|\\u{ord(c):04x}|%{ord(c):02x})" for c in key or "")
        self._escaped = re.compile("".join(each).encode(), re.IGNORECASE)

    def out_of(self, text: bytes) -> bytes:
        if not self._plain:
            return text
        text = text.replace(self._plain, b"[key]")
        return self._escaped.sub(b"[key]", text) if any(mark in text for mark in self._marks) else text
