"""The language of an answer, told by py3langid (a naive Bayes model over byte n-grams, bundled, offline).

Short texts cannot be told: "Hotel Paris" is at home everywhere. So a text of fewer than `min_letters` passes, code aside, and
a drop needs the model to be sure: `min_confidence`, its own probability, 0.5 by default. Set on sentences of four languages.
"""

import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator

from factory.filters.shapes import Kit, RowFilter
from factory.rows import Sample, Verdict

ENOUGH = 500
"""Characters that are looked at: more tell nothing new, and cost."""
_CODES = """
ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy ga gcf gcr
gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb lg lij ln lo lt ltg lv
mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg
th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu
"""
NONE = "zxx"
"""What the model says of numbers and signs."""
KNOWN = frozenset(_CODES.split())
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)


class Language(RowFilter):
    """Drops answers in another language than those `allowed` (ISO 639 codes)."""

    kind: Literal["language"] = "language"
    allowed: list[str] = Field(min_length=1)
    min_confidence: float = Field(0.5, ge=0, le=1)
    min_letters: int = Field(20, ge=0)
    _tell: Callable[[str], tuple[str, float]] | None = PrivateAttr(None)

    @field_validator("allowed")
    @classmethod
    def _can_be_told(cls, allowed: list[str]) -> list[str]:
        """Known before anything is sent, and without loading the model."""
        if wrong := [code for code in allowed if code not in KNOWN]:
            raise ValueError(
                f"{wrong[0]!r} is no language that can be told, such as en or de; known: {' '.join(sorted(KNOWN))}"
            )
        if find_spec("py3langid") is None:
            raise ValueError("a language needs a model: pip install 'distillation-factory[language]'")
        return allowed

    def open(self, kit: Kit) -> Self:
        opened = self.model_copy()
        opened._tell = _identifier().classify
        return opened

    def check(self, sample: Sample) -> Verdict:
        assert self._tell is not None
        text = sample.response[: 4 * ENOUGH]
        text = (_CODE.sub(" ", text) if "`" in text or "://" in text else text)[:ENOUGH]
        if sum(map(str.isalpha, text)) < self.min_letters:
            return self.keep()
        language, confidence = self._tell(text)
        if language in self.allowed or language == NONE or confidence < self.min_confidence:
            return self.keep()
        return self.drop(f"language:{language}", score=round(float(confidence), 4))


@cache
def _identifier() -> Any:
    """The model, loaded once, at its first use."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
