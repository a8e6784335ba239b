"""What the journal already answers: which draws of a request are lacking, and the stored ones read back."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from msgspec.structs import replace

from factory.journal import Journal, Stored, answer_keys
from factory.rows import Choice, Failure, Outcome, Request
from factory.teachers.failures import RULES

AT_ONCE = 256
"""Requests looked up in the journal at once."""

Skip = Callable[[Request, str], bool]
"""Whether a draw (its request, its key) is not to be asked for now, stored or not."""


class Reader(Protocol):
    """Reads bodies; a teacher."""

    def read(self, request: Request, body: bytes) -> Outcome: ...


def lookup(
    journal: Journal, requests: Iterable[Request], retry_failed: bool
) -> Iterator[tuple[Request, dict[int, str], dict[str, Failure]]]:
    """Each request with the draws it lacks (place -> key), and with those (by key) that came but are no answers.

    These were paid for and are not asked again, except with `retry_failed`.
    """
    for asked, stored in _in_chunks(journal, requests):
        for request, keys in asked:
            limit, lacking, failed = request.sampling.max_tokens, dict[int, str](), dict[str, Failure]()
            for place, key in enumerate(keys):
                answer = stored.get(key)
                if answer is None or not answer.valid(limit) or (retry_failed and answer.finish in RULES):
                    lacking[place] = key
                elif answer.finish in RULES:
                    failed[key] = Failure(reason=answer.finish)
            yield request, lacking, failed


def lacking_parts(request: Request, lacking: dict[int, str], skip: Skip | None = None) -> Iterator[Request]:
    """The requests that ask for the lacking draws of one: a beam is a joint answer, all ranks or none."""
    places = [i for i, key in lacking.items() if skip is None or not skip(request, key)]
    if places and request.sampling.beam is not None:
        yield request
    elif places:
        for first, last in runs(places):
            yield part(request, first, last - first + 1)


def read(
    journal: Journal, reader: Reader, requests: Iterable[Request], failures: dict[str, Failure]
) -> Iterator[tuple[Request, list[Choice | Failure]]]:
    """Each request with the outcome of each of its draws; `failures` are those (by key) that have no body."""
    for asked, stored in _in_chunks(journal, requests):
        bodies = journal.bodies({answer.attempt for answer in stored.values()})
        for request, keys in asked:
            limit, seen = request.sampling.max_tokens, dict[int, Outcome]()
            outcomes: list[Choice | Failure] = []
            for key in keys:
                if (answer := stored.get(key)) is None or not answer.valid(limit):
                    outcomes.append(failures.get(key) or Failure(reason="missing_choice"))
                    continue
                if answer.attempt not in seen:
                    body, n = bodies[answer.attempt]
                    # as it was asked, which may have been for more draws than are wanted now
                    seen[answer.attempt] = reader.read(whole(part(request, 0, n)), body)
                outcomes.append(pick(seen[answer.attempt], answer.choice, limit))
            yield request, outcomes


def part(request: Request, first: int, count: int) -> Request:
    """Some of a request's draws."""
    return replace(request, draw=request.draw + first, n=count)


def whole(request: Request) -> Request:
    """The request as its body must be read: all hypotheses of a beam, whatever part of them is kept."""
    beam = request.sampling.beam
    return replace(request, n=beam.width) if beam else request


def pick(outcome: Outcome, choice: int, max_tokens: int) -> Choice | Failure:
    """One draw of a stored reply, as it stands under today's limit: an answer longer than it counts as truncated."""
    if isinstance(outcome, Failure):
        return outcome
    if choice >= len(outcome.choices):
        failed = outcome.failed[choice - len(outcome.choices) :][:1]
        return failed[0] if failed else Failure(reason="missing_choice", detail="fewer answers than n")
    picked = outcome.choices[choice]
    if picked.tokens is not None and picked.tokens > max_tokens:
        return replace(picked, finish="length")
    return picked


def _in_chunks(
    journal: Journal, requests: Iterable[Request]
) -> Iterator[tuple[list[tuple[Request, list[str]]], dict[str, Stored]]]:
    """Some requests at a time, each with the keys of its draws, and what the journal holds of all of these."""
    iterator = iter(requests)
    while chunk := list(itertools.islice(iterator, AT_ONCE)):
        asked = [(request, answer_keys(request)) for request in chunk]
        yield asked, journal.answers(key for _, keys in asked for key in keys)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges without holes: [0, 1, 3] -> (0, 1), (3, 3)."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last
