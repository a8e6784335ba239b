"""What verifiers have rejected, to be looked at: a verifier that reads answers wrongly loses good data in silence.

Of each stage a seeded sample, so that the same run shows the same rows, and no one picks them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from factory.filters import VERIFIERS
from factory.rows import Sample, digest
from factory.run import StageFolder

SHOWN = 20
MAX_ANSWER = 1_000
"""Characters of an answer, from its end: there stands what was read."""


def rejects(stages: Iterable[tuple[StageFolder, dict[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """Of each stage that a verifier stands in: how many it rejected, and some of them, in the order of a seeded draw."""
    found = []
    for folder, manifest in stages:
        count, drawn = 0, list[tuple[str, Sample]]()
        for sample in _rejected(folder, manifest):
            count += 1
            drawn.append((digest(seed, sample.id), sample))
            if len(drawn) > 10 * SHOWN:
                drawn = _first(drawn)
        if count:
            name = str(manifest["folder"]).rpartition("-")[0]
            found.append({"stage": name, "count": count, "shown": [_told(sample) for _, sample in _first(drawn)]})
    return found


def _first(drawn: list[tuple[str, Sample]]) -> list[tuple[str, Sample]]:
    return sorted(drawn, key=lambda one: one[0])[:SHOWN]


def _rejected(folder: StageFolder, manifest: dict[str, Any]) -> Iterator[Sample]:
    knobs = manifest.get("knobs", {})
    if manifest["stage"] == "filter" and any(one["kind"] in VERIFIERS for one in knobs.get("filters", [])):
        yield from (s for s in folder.rows(Sample, "dropped") if s.verdicts[-1].filter in VERIFIERS)
    elif manifest["stage"] == "score" and knobs.get("by") == "verdict":
        name = knobs.get("as", "verdict")
        yield from (s for s in folder.rows(Sample) if s.scores[name] == 0)


def _told(sample: Sample) -> dict[str, Any]:
    """The prompt, the answer, what was read from it, and what it was compared with."""
    verdict = sample.verdicts[-1]
    reason, _, read = verdict.reason.partition(":")
    told = {"verifier": verdict.filter, "reason": reason, "read": read, "known": verdict.evidence or ""}
    return {"id": sample.id, "prompt": sample.prompt.text[:MAX_ANSWER], "answer": sample.response[-MAX_ANSWER:], **told}
