"""The language of an answer, told by py3langid (a naive Bayes model over byte n-grams, bundled, offline).

Short texts cannot be told: "Hotel Paris" is at home everywhere. So a text of fewer than `min_letters` passes, code aside, and
a drop needs the model to be sure: `min_confidence`, its own probability, 0.5 by default. Set on sentences of four languages.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator

from factory.filters.shapes import Kit, RowFilter
from factory.rows import Sample, Verdict

ENOUGH = 500
"""Characters that are looked at: more tell nothing new, and cost."""
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)


class Language(RowFilter):
    """Drops answers in another language than those `allowed` (ISO 639-1 codes)."""

    kind: Literal["language"] = "language"
    allowed: list[str] = Field(min_length=1)
    min_confidence: float = Field(0.5, ge=0, le=1)
    min_letters: int = Field(20, ge=0)
    _tell: Callable[[str], tuple[str, float]] | None = PrivateAttr(None)

    @field_validator("allowed")
    @classmethod
    def _codes(cls, allowed: list[str]) -> list[str]:
        if wrong := [code for code in allowed if not re.fullmatch("[a-z]{2}", code)]:
            raise ValueError(f"{wrong[0]!r} is no language code of two letters, such as en or de")
        return allowed

    def open(self, kit: Kit) -> Self:
        opened = self.model_copy()
        identifier = _identifier()
        if unknown := set(self.allowed) - set(identifier.labels):
            raise ValueError(
                f"filter language: no model of {sorted(unknown)}; known: {' '.join(sorted(identifier.labels))}"
            )
        opened._tell = identifier.classify
        return opened

    def check(self, sample: Sample) -> Verdict:
        assert self._tell is not None
        text = sample.response[: 4 * ENOUGH]
        text = (_CODE.sub(" ", text) if "`" in text or "://" in text else text)[:ENOUGH]
        if sum(map(str.isalpha, text)) < self.min_letters:
            return self.keep()
        language, confidence = self._tell(text)
        if language in self.allowed or confidence < self.min_confidence:
            return self.keep()
        return self.drop(f"language:{language}", score=round(float(confidence), 4))


@cache
def _identifier() -> Any:
    """The model, loaded once, at its first use."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
