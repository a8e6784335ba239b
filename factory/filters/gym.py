"""Answers to reasoning-gym's tasks, scored by the library itself: many tasks have more than one right answer.

The prompt's reference is the task's entry as JSON: `answer` and `metadata`, whose `source_dataset` names the data set.
"""

import json
from typing import Any, Literal, Self

from pydantic import Field

from factory.filters.isolated import Broken, isolated, lacking
from factory.filters.pattern import Undecided
from factory.filters.shapes import Kit
from factory.filters.verifier import Extracting
from factory.rows import Sample, Verdict


class ReasoningGym(Extracting):
    """Drops answers that the task's data set gives less than `min`; 1 is right, and many tasks give a part for a part."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    min: float = Field(1.0, gt=0, le=1)

    @property
    def apart(self) -> bool:
        return True

    def open(self, kit: Kit) -> Self:
        lacking("reasoning_gym", "the filter reasoning_gym")
        isolated("reasoning_gym")  # before threads ask for it
        return self

    def check(self, sample: Sample) -> Verdict:
        if sample.prompt.reference is None:
            return self.unknown()
        entry = _entry(sample.prompt.reference)
        if entry is None:
            return self.cannot_tell("reference_unread", evidence=sample.prompt.reference[:200])
        known = str(entry.get("answer"))[:200]
        try:
            answer = self.found(sample.response)
            if answer is None:
                return self.drop("no_answer", evidence=known)
            score = isolated("reasoning_gym").ask(answer=answer.strip(), entry=entry)["score"]
        except (Broken, Undecided) as e:
            return self.cannot_tell(str(e), evidence=known)
        if score >= self.min:
            return self.keep()
        return self.drop(f"wrong:{answer.strip()[-60:]}", score=score, evidence=known)


def _entry(text: str) -> dict[str, Any] | None:
    """A task's entry; None where the text is none."""
    try:
        entry = json.loads(text)
        named = isinstance(entry["metadata"]["source_dataset"], str)
    except (ValueError, TypeError, KeyError):
        return None
    return entry if named else None
