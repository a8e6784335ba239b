"""Answers that say the same in other words, as a local encoder sees it that the recipe names.

The encoder reads all answers before the first verdict, in a child process (`encoder.py`), and each is compared with every
one that stays. A similarity is the cosine of two mean-pooled last hidden states; what it is worth depends on the model.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Literal, Self

from pydantic import Field, PrivateAttr

from factory.child import Child, ChildEnded
from factory.errors import EngineError
from factory.filters.duplicates import Duplicates, scored
from factory.filters.shapes import Judge, Kit, Look
from factory.rows import Sample, Verdict
from factory.similar import Twin

WINDOW = 256
"""Rows that the child gets at once, and puts into batches of similar length."""


class SemanticDuplicates(Duplicates):
    """Drops answers whose vectors are almost the same as another one's."""

    kind: Literal["semantic_duplicates"] = "semantic_duplicates"
    model: str
    threshold: float = Field(0.9, gt=0, le=1)
    _encoder: Callable[[], Child] | None = PrivateAttr(None)

    def open(self, kit: Kit) -> Self:
        opened = self.model_copy()
        opened._encoder = kit.encoder(self.model)
        return opened

    def start(self, look: Look) -> Judge:
        assert self._encoder is not None
        child = self._encoder()  # which ends when nobody asks it any longer
        if self.within == "prompt":
            return lambda samples: self._judge(child, [samples])(samples)
        try:
            return self._judge(child, look())
        except ChildEnded as e:
            raise EngineError(f"semantic_duplicates: {self.model}: {e}") from None

    def _judge(self, child: Child, groups: Iterable[list[Sample]]) -> Judge:
        """Read these rows, and know what to say of each when it comes again."""
        keys: list[tuple[str, int]] = []
        ranked: list[tuple[float, int]] = []
        told: dict[tuple[str, int], Verdict] = {}
        rows = scored(self.by, chain.from_iterable(groups), Counter())
        while window := list(islice(rows, WINDOW)):
            read = child.ask({"texts": [sample.response for sample, _, _ in window]})
            for (_, score, key), seen in zip(window, read, strict=True):
                if score is None:
                    told[key] = self.no_score()
                elif not seen:
                    told[key] = self.cannot_tell("no_vector")
                else:
                    ranked.append((-score, len(keys)))
                keys.append(key)
        order = [place for _, place in sorted(ranked)]
        for row, twin, similarity in child.ask({"order": order, "threshold": self.threshold}):
            told[keys[row]] = self.verdict(Twin(keys[twin][0], similarity))
        seen_again: Counter[str] = Counter()
        keep = self.keep()
        return lambda samples: [told.get(key, keep) for _, _, key in scored(self.by, samples, seen_again)]

    def reason(self, twin: Twin) -> str:
        return f"semantic_duplicate={twin.similarity:.2f}"
