"""The only caller of teachers: requests in, outcomes out, through journal, budget, pacing and the one retry policy."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import tenacity

from factory.batch import Batches, say_left_open
from factory.budget import Hold, Wall
from factory.errors import BudgetError, FactoryError, TooManyFailures
from factory.journal import Journal, answer_keys
from factory.pace import Pace, Rates
from factory.progress import Advance, bar, say
from factory.retry import again, pause, tries
from factory.rows import FREE, Choice, Failure, Outcome, Reason, Reply, Request, Sampling, endings
from factory.signals import Interrupted, draining
from factory.stored import Skip, lacking_parts, lookup, part, pick, read, whole
from factory.tally import Lost, Tally
from factory.teachers import BatchEndpoint, Teacher, batch_endpoint
from factory.teachers.capabilities import Capabilities
from factory.teachers.entry import Entry
from factory.teachers.failures import ACTIONS, MAYBE_BILLED, RULES, ending, for_good

OUTAGE = ("outage", "transport", "timeout", "gateway_timeout", "server_error", "html_page")
"""What an outage looks like from here; each of them may also be one request's bad luck."""
MAYBE_OWN = ("timeout", "gateway_timeout", "server_error", "transport")
"""Of these, what a single request may bring about: one that makes the server fail, or think for too long."""
MAX_WAIT_S = 3600.0
"""How long one request may be put off by 429 and 503 before it counts as failed."""
DRAIN_S = 30.0
"""After a first signal, how long answers in flight are waited for."""
DOOMED_AFTER = 20
"""Lost draws before which a run is not given up early: in a handful of prompts one is a large share."""
BYTES_A_TOKEN = 4
"""Of English text, about; only for a first guess at what a request will use of `limits.tpm`."""
Flaw = Callable[[Request, Choice], str | None]
"""Why a verdict cannot be read, and what to do, for people; None where it can."""
WHAT_TO_DO: dict[Reason, str] = {
    "auth": "check the key in the variable that `api_key_env` names",
    "quota": "top it up or wait, then run again",
    "model_not_found": "check `model` and `base_url`",
    "outage": "check `base_url`, or run again when it is up",
}


@dataclass(slots=True)
class Model:
    """A model of the recipe, ready to be asked: its name there, its entry, what makes it itself, and who answers.

    `async with model:` gives back what answering takes (a server, a process, connections) at its end.
    """

    name: str
    entry: Entry
    identity: str
    teacher: Teacher
    capabilities: Capabilities = field(default_factory=Capabilities)

    async def __aenter__(self) -> "Model":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.teacher.close()


class Desk:
    """Asks what the journal does not hold yet, and reads answers back in the order of the requests.

    `max_failed` is the share of draws that may be lost. `retry_failed`: bodies that were stored but hold no answer are asked
    for again. `wait`: stay until open batches are done; the first time in seconds between two looks at them.
    """

    def __init__(
        self, journal: Journal, wall: Wall, run: str, max_failed: float = 0.02, retry_failed: bool = False,
        wait: float | None = None,
    ) -> None:  # fmt: skip
        self.journal, self.wall, self.run = journal, wall, run
        self.max_failed, self.retry_failed, self.wait = max_failed, retry_failed, wait
        self.rates: dict[str, Rates] = {}  # by the name of a model, for as long as this lives

    async def ask(
        self, model: Model, requests: Iterable[Request], total: int, label: str, flaw: Flaw | None = None,
        stand_in: bool = False,
    ) -> Tally:  # fmt: skip
        """Ask `model` everything among `requests` that has no stored answer; `total` draws are planned.

        With `flaw`, stored and new answers are verdicts, and those that cannot be read count against `max_failed`.
        `stand_in`: another model answers what is lost here, so no number of lost draws stops this.
        Raises the error that stopped the run, after the requests in flight have ended and are stored.
        """
        await self._read_leftovers(model)
        with bar(label, total) as advance:
            asking = _Round(self, model, advance, total, flaw, stand_in)
            if endpoint := batch_endpoint(model.entry, model.teacher):
                return await self._ask_in_batches(asking, requests, endpoint)
            say_left_open(self.journal, model.identity, model.name)
            missing = self._missing(requests, asking)
            watch = asyncio.create_task(asking.pace.watch())
            over = self.wall.when_hours_end(asking.stop)
            try:
                with draining(asking.interrupted):
                    asking.workers = [asyncio.create_task(asking.work(missing)) for _ in range(asking.pace.most)]
                    await asyncio.gather(*asking.workers, return_exceptions=True)
            finally:
                watch.cancel()
                over.cancel()
                await self.journal.flush()
            asking.finish()
        return asking.tally

    def read(
        self, model: Model, requests: Iterable[Request], tally: Tally
    ) -> Iterator[tuple[Request, list[Choice | Failure]]]:
        """Each request with the outcome of each of its draws, from the journal alone."""
        return read(self.journal, model.teacher, requests, tally.failures)

    async def _ask_in_batches(self, asking: "_Round", requests: Iterable[Request], endpoint: BatchEndpoint) -> Tally:
        """Collect what open batches have answered, and submit what is missing; Waiting while one is open."""
        model, tally = asking.model, asking.tally
        async with Batches(self.journal, self.wall, self.run, model, endpoint, self.wait) as batches:
            await batches.collect()
            tally.failures = batches.failures
            await batches.submit(self._missing(requests, asking, batches.skip), check=asking.check_failures)
        tally.sent, tally.usage, tally.usd = batches.sent, batches.usage, batches.usd
        tally.reused = max(tally.reused - batches.draws, 0)
        return tally

    def _missing(self, requests: Iterable[Request], counter: "_Round", skip: Skip | None = None) -> Iterator[Request]:
        """The parts of the requests whose draws are not stored and not to be skipped; the others are counted.

        Before one is given away, those count that are lost already: a second start of a doomed stage pays for nothing.
        """
        for request, lacking, failed in lookup(self.journal, requests, self.retry_failed):
            counter.tally.failures.update(failed)
            counter.reuse(request.n - len(lacking))
            if counter.flaw and len(lacking) < request.n:
                for _, stored in read(self.journal, counter.model.teacher, [request], {}):
                    counter.examine(request, stored)
            for wanted in lacking_parts(request, lacking, skip):
                counter.check_failures()
                yield wanted

    async def _read_leftovers(self, model: Model) -> None:
        """File what an earlier process stored but did not live to read: it was paid for."""
        for attempt, body, batched in self.journal.unread(model.identity):
            request = Request(identity=model.identity, messages=[], sampling=Sampling(), n=10_000)
            outcome = model.teacher.read(request, body)
            entry = model.entry.in_batch() if batched else model.entry
            if isinstance(outcome, Reply):
                ends = endings(outcome, len(outcome.choices) + len(outcome.failed))
                self.journal.file(attempt, ends, entry.cost(outcome)).result()
            else:
                ends = endings(outcome, request.n) if for_good(outcome) else []
                await self.journal.fail(attempt, outcome, entry.cost(outcome), ends)


class _Round:
    """The state that the workers of one round of asking share."""

    def __init__(
        self, desk: Desk, model: Model, advance: Advance, total: int, flaw: Flaw | None, stand_in: bool
    ) -> None:
        self.desk, self.model, self.advance, self.flaw, self.stand_in = desk, model, advance, flaw, stand_in
        self.tally = Tally(planned=total)
        rates = desk.rates.setdefault(model.name, Rates.of(model.entry.limits))
        self.pace = Pace(model.name, model.entry.limits, model.teacher.concurrency, rates)
        self._known = desk.journal.knows(model.identity)  # it has answered before: a refusal now is about one request
        self.error: BaseException | None = None
        self.workers: list[asyncio.Task[None]] = []
        self._sending: set[asyncio.Task[Any] | None] = set()
        self._one_by_one = False  # the server refused n
        self._holding = 0
        self._settled = asyncio.Event()
        self._numbers = count()

    def reuse(self, draws: int) -> None:
        self.tally.reused += draws
        self.advance(draws)

    def stop(self, error: BaseException) -> None:
        """Send nothing more, and wait for nothing but answers on their way: these are paid for."""
        self.error = self.error or error
        for worker in self.workers:
            if worker not in self._sending and worker is not asyncio.current_task():
                worker.cancel()

    def interrupted(self, why: Interrupted) -> None:
        """A first signal: what is in flight has a while to come in. The second one ends the run at once."""
        say(f"stopping: {len(self._sending)} requests are in flight, they get {DRAIN_S:.0f} s; again to leave at once")
        self.stop(why)
        for worker in self.workers:
            asyncio.get_running_loop().call_later(DRAIN_S, worker.cancel)

    def finish(self) -> None:
        """Raise what stopped the round, or what went wrong in a worker."""
        crashes = [w.exception() for w in self.workers if w.done() and not w.cancelled()]
        if error := self.error or next((e for e in crashes if e is not None), None):
            raise error

    async def work(self, missing: Iterator[Request]) -> None:
        """Take requests until there are none, or until something stops the round."""
        while self.error is None:
            try:
                if (request := next(missing, None)) is None:
                    return
                await self._answer(request)
            except FactoryError as e:
                self.stop(e)

    async def _answer(self, request: Request) -> None:
        """Every draw of a request to its end; what a reply lacks is asked for again, as often as a failure is."""
        todo, replies = [request], 0
        while todo:
            request = todo.pop(0)
            if request.n > 1 and self._one_by_one and request.sampling.beam is None:
                todo = [part(request, i, 1) for i in range(request.n)] + todo
                continue
            outcome = await self._settle(request)
            if isinstance(outcome, Failure):
                if ACTIONS[outcome.reason] == "adapt" and request.n > 1:
                    self._one_by_one = True
                    todo.insert(0, request)
                else:
                    self._fail(request, outcome)
                continue
            replies += request.n > 1 or not self._one_by_one
            got = min(len(outcome.choices), request.n)
            self.advance(got)
            self.examine(request, (pick(outcome, i, request.sampling.max_tokens) for i in range(got)))
            for failure in outcome.failed[: request.n - got]:
                self._fail(part(request, got, 1), failure)
                got += 1
            if got == 1 < request.n and request.sampling.beam is None:  # it takes n and heeds it not
                self._one_by_one = True
            if got < request.n and replies < self.model.entry.limits.max_attempts and request.sampling.beam is None:
                todo.insert(0, part(request, got, request.n - got))
            elif got < request.n:
                missing = Failure(reason="missing_choice", detail=f"{got} of {request.n} answers came")
                self._fail(part(request, got, request.n - got), missing)

    def _fail(self, request: Request, failure: Failure) -> None:
        """These draws have no answer."""
        self.tally.failures.update(dict.fromkeys(answer_keys(request), failure))
        self.advance(request.n)
        self.check_failures()

    def examine(self, request: Request, answers: Iterable[Choice | Failure]) -> None:
        """Count the verdicts that cannot be read."""
        for answer in answers:
            if self.flaw and isinstance(answer, Choice) and (told := self.flaw(request, answer)):
                self.tally.unreadable += 1
                self.tally.flaw = self.tally.flaw or told

    def check_failures(self) -> None:
        """TooManyFailures where so many draws are lost that the run is not worth going on."""
        if self.stand_in:
            return
        tally, failures = self.tally, self.tally.failures
        lost = Lost(tally.planned, len(failures), tally.unreadable, tally.flaw)
        if lost.unanswered + lost.unreadable >= DOOMED_AFTER and (told := lost.beyond(self.desk.max_failed)):
            last = next(reversed(failures.values()), None)
            why = f"; the last failure: {last.reason}: {last.detail}" if last else ""
            raise TooManyFailures(f"models.{self.model.name}: {told}{why}")

    async def _settle(self, request: Request) -> Outcome:
        """One request to its end: an answer, or the failure that is left after the retries."""
        number = next(self._numbers)
        outcome = await self._attempt(request, number)
        # most are not sent again, and setting the retries up costs as much as reading an answer
        if again(request, outcome):
            outcome = await self._retry(request, number, outcome)
        self.pace.forget(number)
        error = None
        if isinstance(outcome, Failure):
            while (error := ending(outcome, self._known or self.pace.answered)) and self._undecided(outcome):
                self._settled.clear()
                await self._settled.wait()
        if isinstance(outcome, Failure) and error is not None:
            advice = WHAT_TO_DO.get(outcome.reason, "mend that, then run again")
            raise error(f"models.{self.model.name}: {outcome.detail}; {advice}; stored answers are kept")
        return outcome

    async def _retry(self, request: Request, number: int, first: Outcome) -> Outcome:
        """Send again what has failed once, until it is answered or has been sent often enough."""
        sent = [first]

        async def attempt() -> Outcome:
            return sent.pop() if sent else await self._attempt(request, number)

        retrying = tenacity.AsyncRetrying(
            stop=partial(_enough, self.model.entry.limits.max_attempts, Counter()),
            wait=pause,
            before_sleep=lambda state: self.pace.put_off(state.upcoming_sleep, state.outcome),
            retry=tenacity.retry_if_result(partial(again, request)),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        outcome: Outcome = await retrying(attempt)
        return outcome

    def _undecided(self, failure: Failure) -> bool:
        """Whether an answer that is on its way may still show that the refusal is of one request, not of all."""
        return ACTIONS[failure.reason] != "stop" and bool(self._sending)

    async def _attempt(self, request: Request, number: int) -> Outcome:
        """Send once. What is not the request's own fault, a busy server or an outage, uses no attempt up."""
        waiting_since = time.monotonic()
        guess = 0.0
        if self.model.entry.limits.tpm:
            worst = Hold.worst(request, None)
            guess = worst.prompt_tokens / BYTES_A_TOKEN + worst.completion_tokens
        while True:
            if self.pace.down:
                await self.pace.line_up()
            await self.pace.enter(guess)
            sent_at = time.monotonic()  # not before: the pause that it has waited for is over
            try:
                outcome = await self._send(request)
            finally:
                self.pace.leave()
            self.pace.heed(getattr(self.model.teacher, "rate_limits", None))
            self.pace.make_room(getattr(self.model.teacher, "queue", None))
            if isinstance(outcome, Reply):
                self.pace.works(sent_at, outcome.usage.prompt_tokens + outcome.usage.completion_tokens)
                return outcome
            if ACTIONS[outcome.reason] == "wait":
                self.pace.busy(sent_at, outcome.retry_after, outcome.detail)
                if time.monotonic() - waiting_since > MAX_WAIT_S:
                    return outcome
            elif outcome.reason in OUTAGE:
                if not self.pace.fails(number, outcome.detail, outcome.reason in MAYBE_OWN):
                    return outcome
            else:
                self.pace.works(sent_at)
                return outcome

    async def _send(self, request: Request) -> Outcome:
        """Reserve, commit the intent, send, commit the body, read it, file it: in this order."""
        hold = await self._reserve(request)
        self._sending.add(asyncio.current_task())
        try:
            return await self._exchange(request, hold)
        finally:
            self._sending.discard(asyncio.current_task())
            self._holding -= 1
            self._settled.set()

    async def _reserve(self, request: Request) -> Hold:
        """Hold the worst case. Where it does not fit, what is in flight may turn out cheaper: wait for that first."""
        while True:
            try:
                hold = self.desk.wall.reserve(request, self.model.entry, self.model.name)
            except BudgetError:
                if not self._holding:
                    raise
                self._settled.clear()
                await self._settled.wait()
            else:
                self._holding += 1
                return hold

    async def _exchange(self, request: Request, hold: Hold) -> Outcome:
        desk, model, entry = self.desk, self.model, self.model.entry
        attempt = await desk.journal.begin(desk.run, request, str(hold.usd), hold.prompt_tokens)
        self.tally.sent += 1
        answer = await model.teacher.send(request)
        if isinstance(answer, Failure):
            cost = None if answer.reason in MAYBE_BILLED else FREE
            desk.wall.settle(hold, cost)
            await desk.journal.fail(attempt, answer, cost)
            return answer
        await desk.journal.store(attempt, answer)
        outcome = model.teacher.read(whole(request), answer)
        cost = entry.cost(outcome)
        desk.wall.settle(hold, cost)
        self.tally.spend(cost)
        if isinstance(outcome, Failure):
            ended = RULES[outcome.reason].billed and ACTIONS[outcome.reason] != "stop" and not again(request, outcome)
            await desk.journal.fail(attempt, outcome, cost, endings(outcome, request.n) if ended else ())
        else:
            desk.journal.file(attempt, endings(outcome, len(outcome.choices) + len(outcome.failed)), cost)
        return outcome


def _enough(limit: int, failed: Counter[str], state: tenacity.RetryCallState) -> bool:
    """Whether a request has been sent often enough; `failed` counts its failures by reason."""
    outcome = state.outcome.result() if state.outcome else None
    if isinstance(outcome, Failure):
        failed[outcome.reason] += 1
        if failed[outcome.reason] >= tries(limit, outcome):
            return True
    return state.attempt_number >= limit
