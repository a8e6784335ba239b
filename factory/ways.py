"""The three ways of judging: what is asked about the answers to one prompt, and which scores the verdicts give.

pointwise: each answer by itself. listwise: all in one question, in an order shuffled by seed (UltraFeedback, arXiv
2310.01377, section 2.3). pairwise: each two in both orders; where the order decides it is a tie (Zheng et al.,
arXiv 2306.05685, section 3.4), and a score is the share of wins.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

from factory.rows import Message, Prompt, Sample, Verdict
from factory.rubric import Rubric, render
from factory.verdicts import BETTER, Form

Scores = dict[str, float]
"""Aspect -> score; the overall one is ""."""
Told = dict[str, float] | Verdict
"""What a verdict says by label, or why it says nothing."""


class Question(NamedTuple):
    """What is asked at once, about the answers with the places `about`, in this order."""

    prompt: Prompt
    draw: int
    messages: list[Message]
    form: Form
    about: tuple[int, ...]


class Way(NamedTuple):
    """Answers with different texts to one prompt -> questions; these with their verdicts -> each answer's scores."""

    ask: Callable[[Rubric, Sequence[Sample], int], Iterator[Question]]
    score: Callable[[Rubric, int, list[tuple[Question, Told]]], list[Scores | Verdict]]


def missing(reason: str, evidence: str | None = None) -> Verdict:
    """An answer that cannot be scored is set aside."""
    return Verdict(filter="judge", keep=None, reason=reason, evidence=evidence)


def _asked(rubric: Rubric, answers: Sequence[Sample], labels: Sequence[str], about: Sequence[int]) -> Question:
    first = answers[about[0]]
    form = Form(tuple(labels), rubric.head.scale if labels[0] != BETTER else None)
    asked = render(rubric, *(answers[i] for i in about), numbered=labels[0] not in (*rubric.head.aspects, "Score"))
    return Question(first.prompt, first.draw, asked, form, tuple(about))


def _pointwise(rubric: Rubric, answers: Sequence[Sample], seed: int) -> Iterator[Question]:
    labels = rubric.head.aspects or ["Score"]
    yield from (_asked(rubric, answers, labels, [i]) for i in range(len(answers)))


def _listwise(rubric: Rubric, answers: Sequence[Sample], seed: int) -> Iterator[Question]:
    order = list(range(len(answers)))
    random.Random(f"{seed}:{answers[0].prompt.id}").shuffle(order)
    names = rubric.head.aspects or ["Answer"]
    yield _asked(rubric, answers, [f"{name} {k}" for k in range(1, len(order) + 1) for name in names], order)


def _pairwise(rubric: Rubric, answers: Sequence[Sample], seed: int) -> Iterator[Question]:
    for both in permutations(range(len(answers)), 2):
        yield _asked(rubric, answers, [BETTER], both)


def _by_label(rubric: Rubric, count: int, told: list[tuple[Question, Told]]) -> list[Scores | Verdict]:
    """Of one answer or of many: each has its labels, one after another."""
    scores: list[Scores | Verdict] = [missing("judge_not_asked")] * count
    for question, said in told:
        width = len(question.form.labels) // len(question.about)
        for k, place in enumerate(question.about):
            labels = question.form.labels[k * width : (k + 1) * width]
            scores[place] = (
                said if isinstance(said, Verdict) else _overall(rubric, [said.get(label) for label in labels])
            )
    return scores


def _overall(rubric: Rubric, values: list[float | None]) -> Scores | Verdict:
    """The score, and those of the aspects; an aspect that does not apply has none, and is in no mean."""
    aspects = rubric.head.aspects
    known = {name: value for name, value in zip(aspects or [""], values, strict=True) if value is not None}
    if aspects and rubric.head.overall == "mean":
        return {"": sum(known.values()) / len(known), **known} if known else missing("judge_not_applicable")
    if (overall := known.get(rubric.head.overall if aspects else "")) is None:
        return missing("judge_not_applicable")
    return {"": overall, **known}


def _by_wins(rubric: Rubric, count: int, told: list[tuple[Question, Told]]) -> list[Scores | Verdict]:
    """The share of wins over those comparisons that both orders have a verdict for; a tie is half a win."""
    said = {question.about: one for question, one in told}
    scores: list[Scores | Verdict] = []
    for i in range(count):
        wins = [_wins(said[i, j], said[j, i]) for j in range(count) if j != i]
        known = [won for won in wins if not isinstance(won, Verdict)]
        none = next((won for won in wins if isinstance(won, Verdict)), missing("judge_only_one"))
        scores.append({"": sum(known) / len(known)} if known else none)
    return scores


def _wins(first: Told, second: Told) -> float | Verdict:
    """What an answer gets that is shown first, and then second."""
    if isinstance(first, Verdict):
        return first
    if isinstance(second, Verdict):
        return second
    won = first[BETTER], 1 - second[BETTER]
    return won[0] if won[0] == won[1] else 0.5


WAYS = {
    "pointwise": Way(_pointwise, _by_label),
    "listwise": Way(_listwise, _by_label),
    "pairwise": Way(_pairwise, _by_wins),
}


def unfit(rubric: Rubric, how: str) -> str | None:
    """Why a rubric cannot be judged by in this way; None where nothing speaks against it.

    A verdict's lines are known by their labels: a rubric that asks for those of another way alone gets no verdict read.
    """
    if rubric.head.examples and how != "pointwise":
        return f"its examples show how one answer is graded; with how: {how} there are several, so leave them out"
    aspects = "|".join(rubric.head.aspects)
    lines = {
        "pointwise": rf"\b(?:{aspects or 'Score'})\s*:",
        "listwise": rf"\b(?:{aspects or 'Answer'})\s+\d+\s*:",
        "pairwise": rf"\b{BETTER}\s*:",
    }
    asked = rubric.template.render(prompt="", response="", reference="", fence="")
    found = [way for way, line in lines.items() if re.search(line, asked, re.IGNORECASE)]
    if found and how not in found:
        return f"it asks for verdicts of how: {found[-1]}, and this stage reads those of how: {how}"
    return None
