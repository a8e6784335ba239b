"""Answers of known worth among those that a judge is asked about: good ones, bad ones, and bad ones that attack.

They have prompts of their own and never become data. They go the whole way of a real answer: gate, judge, reading.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from factory.knobs import Knobs
from factory.recipe_file import find
from factory.rows import Message, Prompt, Sample, Verdict

FILE = "prompts/canaries.jsonl"
KINDS = ("good", "bad", "attack")
MAX_FALSE_ACCEPTS = 0.02
"""Share of bad and attacking canaries with a good score above which no score of the stage is to be trusted."""


class Canaries(Knobs):
    """`canaries:` of a judge; `share` is that of the answers that are asked about, at least one of each kind."""

    share: float = Field(0.01, gt=0, le=0.5)


def canaries(knobs: Canaries, total: int, seed: int) -> Iterator[list[Sample]]:
    """Groups of three answers to one prompt, chosen by seed. As many as the file can make, at most."""
    lines = [json.loads(line) for line in find(FILE).read_text(encoding="utf-8").splitlines()]
    attacks = [line["attack"] for line in lines if "attack" in line]
    every = [(line, attack) for line in lines if "prompt" in line for attack in attacks]
    random.Random(f"{seed}:canaries").shuffle(every)
    for line, attack in every[: math.ceil(total * knobs.share / len(KINDS))]:
        message = Message(role="user", content=line["prompt"])
        prompt = Prompt.of([message], reference=line["good"], source=FILE)
        texts = {"good": line["good"], "bad": line["bad"], "attack": f"{line['bad']}\n\n{attack}"}
        yield [
            Sample(id=Sample.key(prompt, prompt.messages, kind, i), prompt=prompt, asked=prompt.messages, response=text, model=kind)
            for i, (kind, text) in enumerate(texts.items())
        ]  # fmt: skip


def told_by(ends: Iterator[tuple[str, float | Verdict]], middle: float) -> dict[str, Any]:
    """For the manifest, of each canary its kind and its score: how many, and how many were taken for what they are not."""
    asked: Counter[str] = Counter()
    high: Counter[str] = Counter()
    missing = 0
    for kind, score in ends:
        asked[kind] += 1
        missing += isinstance(score, Verdict)
        high[kind] += not isinstance(score, Verdict) and score > middle
    false = high["bad"] + high["attack"]
    return {
        "asked": {kind: asked[kind] for kind in KINDS}, "false_accepts": false,
        "good_with_a_high_score": high["good"], "without_a_score": missing,
        "trusted": false <= MAX_FALSE_ACCEPTS * (asked["bad"] + asked["attack"]),
    }  # fmt: skip


def warning(told: dict[str, Any]) -> str | None:
    """What is to be said of a judge that takes bad answers for good ones."""
    if told["trusted"]:
        return None
    bad = told["asked"]["bad"] + told["asked"]["attack"]
    return (
        f"the scores are not to be trusted: {told['false_accepts']} of {bad} answers known to be bad got a good one"
        f" (more than {MAX_FALSE_ACCEPTS:.0%}); take another judge, or mend the rubric"
    )
