"""Answers that say the same in other words, as a local encoder sees it that the recipe names.

The encoder reads all answers before the first verdict, in a child process (`encoder.py`), and each is compared with every
one that stays. A similarity is the cosine of two mean-pooled last hidden states; what it is worth depends on the model.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Literal, Self, TypeAlias

from pydantic import Field, PrivateAttr

from factory.child import Child, ChildEnded
from factory.errors import EngineError
from factory.filters.duplicates import Duplicates, scored
from factory.filters.shapes import Judge, Kit, Look
from factory.rows import Sample, Verdict
from factory.similar import Twin

Unit: TypeAlias = tuple[str, int]
"""What is compared: a row by its id, and how often that came; or a question by its own."""
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
        """Read what is compared, each row or each question, and know what to say of it when its rows come again."""
        names: list[str] = []  # of each the id of its first row ...
        best: list[float] = []  # ... and the highest score
        units = self._units(chain.from_iterable(groups), names, best)
        keys: list[Unit] = []
        told: dict[Unit, Verdict] = {}
        while window := list(islice(units, WINDOW)):
            read = child.ask({"texts": [text for _, text in window]})
            told |= {
                unit: self.cannot_tell("no_vector") for (unit, _), seen in zip(window, read, strict=True) if not seen
            }
            keys += [unit for unit, _ in window]
        order = sorted((i for i, unit in enumerate(keys) if unit not in told), key=lambda i: -best[i])
        for one, twin, similarity in child.ask({"order": order, "threshold": self.threshold}):
            told[keys[one]] = self.verdict(Twin(names[twin], similarity))
        again: Counter[str] = Counter()
        keep = self.keep()
        return lambda samples: [
            self.no_score() if score is None else told.get(self._unit(sample, key), keep)
            for sample, score, key in scored(self.by, samples, again)
        ]

    def _unit(self, sample: Sample, key: Unit) -> Unit:
        return (sample.prompt.id, 0) if self.of == "prompts" else key

    def _units(self, samples: Iterator[Sample], names: list[str], best: list[float]) -> Iterator[tuple[Unit, str]]:
        """What is compared, each once, with its text."""
        places: dict[Unit, int] = {}
        for sample, score, key in scored(self.by, samples, Counter()):
            if score is None:
                continue
            unit = self._unit(sample, key)
            if (place := places.setdefault(unit, len(names))) < len(names):
                best[place] = max(best[place], score)
                continue
            names.append(sample.id)
            best.append(score)
            yield unit, self.text(sample)

    def reason(self, twin: Twin) -> str:
        return f"semantic_duplicate={twin.similarity:.2f}"
