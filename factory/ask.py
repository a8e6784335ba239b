"""The only caller of teachers: requests in, outcomes out, through journal, budget, pacing and the one retry policy."""

import asyncio
import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

import msgspec
import tenacity

from factory.budget import Wall
from factory.errors import AuthError, BudgetError, FactoryError, IdentityError, OutageError
from factory.journal import Journal, answer_keys
from factory.progress import Advance, bar, say
from factory.rows import Choice, Failure, Outcome, Reply, Request, Sampling, Usage
from factory.signals import Interrupted, draining
from factory.teachers import Teacher
from factory.teachers.entry import Entry

LOOKUP = 256
"""Requests looked up in the journal at once."""

RETRIED = {"server_error", "timeout", "transport", "outage", "bad_json", "missing_choice", "empty", "engine_died"}
FEW_TRIES = {"bad_json": 3, "missing_choice": 3, "empty": 2}
STOPS: dict[str, type[FactoryError]] = {"auth": AuthError, "quota": BudgetError, "model_not_found": IdentityError}
MAYBE_BILLED = {"timeout", "transport", "server_error", "bad_json", "missing_choice", "empty", "filtered_output"}
MAX_PAUSE_S = 3600.0
GRACE_S = 30.0
"""How long requests in flight are waited for when a signal says stop."""
WHAT_TO_DO = {
    "auth": "check the key in the variable that `api_key_env` names",
    "quota": "top it up or wait, then run again",
    "model_not_found": "check `model` and `base_url`",
}


@dataclass(slots=True)
class Model:
    """A model of the recipe, ready to be asked: its name there, its entry, what makes it itself, and who answers."""

    name: str
    entry: Entry
    identity: str
    teacher: Teacher


@dataclass(slots=True)
class Tally:
    """What one round of asking did. `failures`: answer key -> why that draw has no answer."""

    sent: int = 0
    reused: int = 0
    usage: Usage = field(default_factory=Usage)
    usd: Decimal = Decimal(0)
    failures: dict[str, Failure] = field(default_factory=dict)


class Desk:
    """Asks what the journal does not hold yet, and reads answers back in the order of the requests."""

    def __init__(self, journal: Journal, wall: Wall, run: str) -> None:
        self.journal, self.wall, self.run = journal, wall, run

    async def ask(self, model: Model, requests: Iterable[Request], total: int, label: str, keep: bool = False) -> Tally:
        """Ask `model` everything among `requests` that has no stored answer; `total` draws are planned.

        The teacher is closed at the end, unless the caller wants to `keep` it.

        Raises the error that stopped the run, after the requests in flight have ended and are stored.
        """
        self._read_leftovers(model)
        with bar(label, total) as advance:
            counter = _Round(self, model, advance)
            missing = self._missing(requests, counter)
            limit = min(model.entry.limits.max_concurrency, model.teacher.concurrency)
            try:
                await counter.run(missing, limit)
            finally:
                if not keep:
                    await model.teacher.close()
                await self.journal.flush()
            if counter.error is not None:
                raise counter.error
        return counter.tally

    def read(
        self, model: Model, requests: Iterable[Request], tally: Tally
    ) -> Iterator[tuple[Request, list[Choice | Failure]]]:
        """Each request with the outcome of each of its draws, from the journal alone."""
        for chunk in _chunks(requests, LOOKUP):
            stored = self.journal.answers(key for request in chunk for key in answer_keys(request))
            for request in chunk:
                outcomes: list[Choice | Failure] = []
                for key in answer_keys(request):
                    if key in stored and stored[key].valid(request.sampling.max_tokens):
                        outcome = model.teacher.read(_whole(request), stored[key].body)
                        outcomes.append(_pick(outcome, stored[key].choice, request.sampling.max_tokens))
                    else:
                        outcomes.append(tally.failures.get(key) or Failure(reason="missing_choice"))
                yield request, outcomes

    def _missing(self, requests: Iterable[Request], counter: "_Round") -> Iterator[Request]:
        """The requests, or the parts of them, whose draws are not stored."""
        for chunk in _chunks(requests, LOOKUP):
            stored = self.journal.answers(key for request in chunk for key in answer_keys(request))
            for request in chunk:
                limit = request.sampling.max_tokens
                lacking = [
                    i for i, key in enumerate(answer_keys(request)) if key not in stored or not stored[key].valid(limit)
                ]
                counter.reuse(request.n - len(lacking))
                if lacking and request.sampling.beam is not None:
                    yield request  # one joint answer: all ranks or none
                elif lacking:
                    for first, last in _runs(lacking):
                        yield msgspec.structs.replace(request, draw=request.draw + first, n=last - first + 1)

    def _read_leftovers(self, model: Model) -> None:
        """File what an earlier process stored but did not live to read: it was paid for."""
        for attempt, body in self.journal.unread(model.identity):
            request = Request(identity=model.identity, messages=[], sampling=Sampling(), n=10_000)
            outcome = model.teacher.read(request, body)
            answers = [(c.finish, c.tokens) for c in outcome.choices] if isinstance(outcome, Reply) else []
            usage = outcome.usage if isinstance(outcome, Reply) else Usage()
            self.journal.file(attempt, answers, usage, _usd(model.entry, usage)).result()


class _Round:
    """The state that the workers of one round of asking share."""

    def __init__(self, desk: Desk, model: Model, advance: Advance) -> None:
        self.desk, self.model, self.advance = desk, model, advance
        self.tally = Tally()
        self.error: BaseException | None = None
        self._answered = 0
        self._resume_at = 0.0  # one pause for the whole teacher: N workers backing off alone would stampede
        self._in_flight = 0
        self._stopped = asyncio.Event()

    def reuse(self, draws: int) -> None:
        self.tally.reused += draws
        self.advance(draws)

    async def run(self, missing: Iterator[Request], workers: int) -> None:
        """Work through the requests; a first signal lets those in flight end, for `GRACE_S` at most."""
        loop = asyncio.get_running_loop()
        working = [loop.create_task(self._work(missing)) for _ in range(workers)]

        def interrupt(why: Interrupted) -> None:
            say(f"stopping: {self._in_flight} requests are in flight, they get {GRACE_S:.0f} s; again to leave at once")
            self._stop(why)
            for task in working:
                loop.call_later(GRACE_S, task.cancel)

        with draining(interrupt):
            await asyncio.gather(*working)

    def _stop(self, why: BaseException) -> None:
        """Send nothing more, and wait for nothing but answers on their way."""
        self.error = self.error or why
        self._stopped.set()

    async def _work(self, missing: Iterator[Request]) -> None:
        """Take requests until there are none, or until something stops the round."""
        while self.error is None and (request := next(missing, None)) is not None:
            try:
                outcome = await self._settle(request)
            except (FactoryError, asyncio.CancelledError) as e:
                self._stop(e)
                return
            got = len(outcome.choices) if isinstance(outcome, Reply) else 0
            failure = (
                outcome
                if isinstance(outcome, Failure)
                else Failure(reason="missing_choice", detail="fewer answers than n")
            )
            for key in answer_keys(request)[got:]:
                self.tally.failures[key] = failure
            self.advance(request.n)

    async def _settle(self, request: Request) -> Outcome:
        """One request to its end: an answer, or the failure that is left after the retries."""
        limits = self.model.entry.limits
        retrying = tenacity.AsyncRetrying(
            stop=partial(_enough, limits.max_attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
            sleep=self._sleep,
            retry=tenacity.retry_if_result(partial(_again, request)),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        outcome: Outcome = await retrying(self._attempt, request)
        if isinstance(outcome, Failure) and (error := STOPS.get(outcome.reason)):
            raise error(f"models.{self.model.name}: {outcome.detail}; {WHAT_TO_DO[outcome.reason]}")
        if isinstance(outcome, Failure) and outcome.reason == "outage" and not self._answered:
            raise OutageError(
                f"models.{self.model.name}: {outcome.detail}; stored answers are kept, run again when it is up"
            )
        return outcome

    async def _attempt(self, request: Request) -> Outcome:
        """Send once; waiting for a busy server (429, 503) does not use the attempt up."""
        waited = 0.0
        while True:
            await self._pause()
            outcome = await self._send(request)
            if not isinstance(outcome, Failure) or (outcome.reason != "rate_limited" and outcome.status != 503):
                return outcome
            pause = outcome.retry_after if outcome.retry_after is not None else min(1.0 + waited, 60.0)
            waited += pause
            if waited > MAX_PAUSE_S or self._stopped.is_set():
                return outcome
            loop_time = asyncio.get_running_loop().time()
            self._resume_at = max(self._resume_at, loop_time + pause)

    async def _pause(self) -> None:
        while (left := self._resume_at - asyncio.get_running_loop().time()) > 0:  # it may move on meanwhile
            await self._sleep(left + random.uniform(0, 0.1 * left))  # jitter upwards only

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but give the request up as soon as the round is stopped."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
            raise asyncio.CancelledError

    async def _send(self, request: Request) -> Outcome:
        """Reserve, commit the intent, send, commit the body, read it, file it: in this order."""
        desk, model, entry = self.desk, self.model, self.model.entry
        hold = desk.wall.reserve(request, entry, model.name)
        attempt = await desk.journal.begin(desk.run, request, str(hold.usd), hold.prompt_tokens)
        self.tally.sent += 1
        self._in_flight += 1
        try:
            answer = await model.teacher.send(request)
        finally:
            self._in_flight -= 1
        if isinstance(answer, Failure):
            billed = answer.reason in MAYBE_BILLED
            if not billed:
                desk.wall.settle(hold, Usage(), Decimal(0))
            await desk.journal.fail(attempt, answer, billed)
            return answer
        await desk.journal.store(attempt, answer)
        outcome = model.teacher.read(_whole(request), answer)
        if isinstance(outcome, Failure):
            await desk.journal.fail(attempt, outcome, billed=True)
            return outcome
        usd = entry.price.usd(outcome.usage) if entry.price else Decimal(0)
        desk.journal.file(attempt, [(c.finish, c.tokens) for c in outcome.choices], outcome.usage, str(usd))
        desk.wall.settle(hold, outcome.usage, usd)
        self._answered += 1
        self.tally.usage = _sum(self.tally.usage, outcome.usage)
        self.tally.usd += usd
        return outcome


def _again(request: Request, outcome: Any) -> bool:
    """Whether to send once more. The same seed, or greedy decoding, would give the same empty answer again."""
    if not isinstance(outcome, Failure) or outcome.reason not in RETRIED:
        return False
    repeatable = request.seed is not None or request.sampling.temperature == 0 or request.sampling.beam is not None
    return not (outcome.reason == "empty" and repeatable)


def _enough(limit: int, state: tenacity.RetryCallState) -> bool:
    outcome = state.outcome.result() if state.outcome else None
    few = FEW_TRIES.get(outcome.reason, limit) if isinstance(outcome, Failure) else limit
    return state.attempt_number >= min(limit, few)


def _whole(request: Request) -> Request:
    """The request as its body must be read: all hypotheses of a beam, whatever part of them is kept."""
    beam = request.sampling.beam
    return msgspec.structs.replace(request, n=beam.width) if beam else request


def _pick(outcome: Outcome, choice: int, max_tokens: int) -> Choice | Failure:
    """One draw of a stored reply, as it stands under today's limit: an answer longer than it counts as truncated."""
    if isinstance(outcome, Failure):
        return outcome
    if choice >= len(outcome.choices):
        return Failure(reason="missing_choice", detail="fewer answers than n")
    picked = outcome.choices[choice]
    if picked.tokens is not None and picked.tokens > max_tokens:
        return msgspec.structs.replace(picked, finish="length")
    return picked


def _usd(entry: Entry, usage: Usage) -> str:
    return str(entry.price.usd(usage) if entry.price else 0)


def _sum(a: Usage, b: Usage) -> Usage:
    return Usage(**{f: getattr(a, f) + getattr(b, f) for f in Usage.__struct_fields__})


def _chunks(items: Iterable[Request], size: int) -> Iterator[list[Request]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges without holes: [0, 1, 3] -> (0, 1), (3, 3)."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last
