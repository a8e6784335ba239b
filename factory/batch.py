"""Between the desk and a provider's batch endpoint: submit, leave, come back, collect.

Order of events: every request of a batch is reserved under the wall; the batch and its attempts are committed; the lines
are uploaded and submitted; the provider's handle is committed. After a crash in between, the provider is asked for a batch
with our tag before anything is submitted again. Replies are stored and filed like any other answer, so whoever reads them
cannot tell that they came in a batch.
"""

import asyncio
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec

from factory import batch_journal as book
from factory.batch_journal import Batch, Line, custom_id
from factory.budget import Hold, Wall
from factory.errors import BudgetError, FactoryError, IdentityError, OutageError, RecipeError, Waiting
from factory.journal import Journal, answer_keys, attempt_row
from factory.progress import say
from factory.retry import in_another_batch
from factory.rows import FREE, Cost, Failure, Request, Sampling, Usage, endings
from factory.stored import part
from factory.teachers import BatchEndpoint, Teacher
from factory.teachers.entry import Entry
from factory.teachers.failures import ACTIONS, MAYBE_BILLED, STOPS, for_good

LOOK_AGAIN_S = 60.0
"""The longest time between two looks at a batch that is waited for."""
PATIENCE_S = 3600.0
"""How long an endpoint that does not answer is put up with while a batch of it is waited for."""
LAG_S = 5.0
"""How long a provider's list of batches may not show the newest one yet."""
AT_ONCE = 500
"""Results that are stored in one go."""


class Asked(Protocol):
    """A model of the recipe: its name there, its entry, what makes it itself, and who reads its answers."""

    name: str
    entry: Entry
    identity: str
    teacher: Teacher


class Batches:
    """The batches of one model.

    `wait` is None to leave while a batch is not done, or the first time in seconds between two looks at it. What has come
    in: requests `sent`, draws, usage, usd. `failures`: answer key -> why it has no answer.
    """

    def __init__(
        self, journal: Journal, wall: Wall, run: str, model: Asked, endpoint: BatchEndpoint, wait: float | None
    ) -> None:
        self.journal, self.wall, self.run, self.endpoint, self.wait = journal, wall, run, endpoint, wait
        self.model, self.identity, self.where = model, model.identity, f"models.{model.name}"
        self.entry = model.entry.in_batch()
        self.folder = journal.path.with_suffix(".batches")
        self.sent, self.draws, self.usage, self.usd = 0, 0, Usage(), Decimal(0)
        self.failures: dict[str, Failure] = {}
        self._answered: dict[str, int] = {}
        self._owed: set[str] = set()
        self._failed: dict[str, book.Failed] = {}

    async def __aenter__(self) -> "Batches":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.endpoint.close()
        with suppress(OSError):  # it stays where something is left in it
            self.folder.rmdir()

    # -- collecting ----------------------------------------------------------------------------------------------------

    async def collect(self) -> None:
        """File what the open batches have answered; with `wait`, stay until all of them are done."""
        shutil.rmtree(self.folder, ignore_errors=True)  # files of an earlier start: nothing reads them again
        pending = book.open_batches(self.journal, self.identity)
        pause, heard = self.wait or 0.0, time.monotonic()
        while pending:
            try:
                looked = [await self._look(batch) for batch in pending]
                pending = [batch for batch in looked if batch is not None]
                heard = time.monotonic()
            except OutageError as e:
                if self.wait is None or time.monotonic() - heard > PATIENCE_S:
                    raise
                say(str(e))
            if self.wait is None or not pending:
                break
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, LOOK_AGAIN_S)
        self._owed = {key for batch in pending for line in book.lines(self.journal, batch) for key in line.keys.split()}
        self._failed = book.failures(self.journal, self.run, self.identity)

    async def _locate(self, batch: Batch) -> Batch | None:
        """The batch with its handle, which an earlier start may have had no time to write down; None: it never arrived."""
        others = {known.handle for known in book.all_batches(self.journal, self.identity) if known.handle}
        handle = await self.endpoint.find(batch.tag, batch.built, batch.requests, others)
        if handle is None and (fresh := batch.built + LAG_S - time.time()) > 0:
            await asyncio.sleep(min(fresh, LAG_S))
            handle = await self.endpoint.find(batch.tag, batch.built, batch.requests, others)
        if handle is None:
            await self._withdraw(batch)
            return None
        say(f"{self.where}: batch {handle} was submitted by an earlier start; it is not submitted again")
        await book.submitted(self.journal, batch.tag, handle)
        return batch._replace(state="submitted", handle=handle, submitted=time.time())

    async def _withdraw(self, batch: Batch) -> None:
        """Give back what was reserved for a batch that never ran."""
        holds = [line.hold for line in book.lines(self.journal, batch)]
        await book.withdraw(self.journal, batch)
        for hold in holds if batch.run == self.run else ():
            self.wall.withdraw(hold)

    async def _look(self, batch: Batch) -> Batch | None:
        """File a batch if it is done; else the batch comes back, for another look."""
        found: Batch | None = batch
        if batch.state == "built":
            try:
                found = await self._locate(batch)
            except Waiting:
                if self.wait is None:
                    raise
                return batch
        return await self._collect(found) if found else None

    async def _collect(self, batch: Batch) -> Batch | None:
        assert batch.handle is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        results = self.folder / f"{batch.tag}.results.jsonl"
        look = await self.endpoint.collect(batch.handle, results)
        if look.refused is not None:
            await self._withdraw(batch)
            error = STOPS.get(look.refused.reason, RecipeError)
            told = f"the provider refused batch {batch.handle}, nothing of it ran: {look.refused.detail}"
            raise error(f"{self.where}: {told}")
        if look.ended is None:
            if self.wait is not None and look.answered != self._answered.get(batch.tag):
                say(f"{self.where}: batch {batch.handle}: {look.answered} of {batch.requests} requests answered")
            self._answered[batch.tag] = look.answered
            return batch
        came = self._check(batch, results)
        if came < look.succeeded:  # to ask again for what is merely not here would pay twice
            raise OutageError(
                f"{self.where}: the results of batch {batch.handle} came short, {came} of {look.succeeded}; nothing of "
                "them was filed, run the same command again"
            )
        await self._file(batch, results, look.ended)
        results.unlink()
        return None

    async def _file(self, batch: Batch, results: Path, ended: str) -> None:
        """Every line ends somewhere: with its answer, with its failure, or as not answered."""
        owed = list(book.lines(self.journal, batch))
        failed: list[Failure] = []
        answered: set[int] = set()
        with results.open("rb") as file:
            while chunk := list(islice(file, AT_ONCE)):
                told = [(_named(batch, owed, name), answer) for name, answer in map(self.endpoint.result, chunk)]
                found = [(line, answer) for line, answer in told if line is not None]
                answered.update(line.attempt for line, _ in found)
                failed += await self._settle_all(batch, found)
        rest = Failure(reason="not_answered", detail=f"the batch ended ({ended}) without an answer to this request")
        left: list[tuple[Line, bytes | Failure]] = [(line, rest) for line in owed if line.attempt not in answered]
        for first in range(0, len(left), AT_ONCE):
            await self._settle_all(batch, left[first : first + AT_ONCE])
        await book.collected(self.journal, batch.tag)
        say(f"{self.where}: batch {batch.handle} {ended}: {len(answered)} of {batch.requests} requests came back")
        for failure in failed:
            if error := STOPS.get(failure.reason):
                raise error(f"{self.where}: {failure.detail}")

    def _check(self, batch: Batch, results: Path) -> int:
        """How many lines there are. IdentityError before anything is filed, where they are not to what was asked."""
        owed = list(book.lines(self.journal, batch))
        seen: set[int] = set()
        with results.open("rb") as file:
            for text in file:
                try:
                    name = msgspec.json.decode(text, type=_Named).custom_id
                except (msgspec.DecodeError, UnicodeDecodeError):
                    self._refuse(batch, results, f"a line that cannot be read ({text[:80]!r})")
                line = _named(batch, owed, name)
                if line is None:
                    self._refuse(batch, results, f"the custom_id {name!r}, which was never sent,")
                if line.attempt in seen:
                    self._refuse(batch, results, f"the custom_id {name!r} twice")
                seen.add(line.attempt)
        return len(seen)

    def _refuse(self, batch: Batch, results: Path, what: str) -> NoReturn:
        raise IdentityError(
            f"{self.where}: the results of batch {batch.handle} hold {what}; nothing of them was filed, they are in "
            f"{results}. Ask the provider; with `batch: false` its requests are asked one by one, and paid again"
        )

    async def _settle_all(self, batch: Batch, found: list[tuple[Line, bytes | Failure]]) -> list[Failure]:
        """Settle what no earlier start has settled, at once, so that the journal commits it together."""
        tasks = [self._settle(batch, line, answer) for line, answer in found if line.status == "sent"]
        return [failure for failure in await asyncio.gather(*tasks) if failure is not None]

    async def _settle(self, batch: Batch, line: Line, answer: bytes | Failure) -> Failure | None:
        """Store, read and file one answer, as the desk does with one that it has sent for; returns why it is none."""
        self.sent += 1
        if not line.keys:  # purged meanwhile: what it cost is all that may be kept
            answer = Failure(reason="not_answered", detail="forgotten")
            await self.journal.fail(line.attempt, answer, None)
            return None
        if isinstance(answer, Failure):
            cost = None if answer.reason in MAYBE_BILLED else FREE
            self._release(batch, line.hold, cost)
            await self.journal.fail(line.attempt, answer, cost)
            return answer
        await self.journal.store(line.attempt, answer)
        whole = Request(identity=batch.identity, messages=[], sampling=Sampling(), n=10_000)
        outcome = self.model.teacher.read(whole, answer)
        cost = self.entry.cost(outcome)
        self._release(batch, line.hold, cost)
        if isinstance(outcome, Failure):
            ends = endings(outcome, len(line.keys.split())) if for_good(outcome) else []
            await self.journal.fail(line.attempt, outcome, cost, ends)
            return outcome
        ends = endings(outcome, len(outcome.choices) + len(outcome.failed))
        await asyncio.wrap_future(self.journal.file(line.attempt, ends, cost))
        self.draws += min(len(ends), len(line.keys.split()))
        return None

    def _release(self, batch: Batch, hold: Hold, cost: Cost | None) -> None:
        if batch.run == self.run:  # the batch of another run is under another wall
            self.wall.settle(hold, cost)
        if cost is not None:
            self.usage, self.usd = self.usage.plus(cost.usage), self.usd + cost.usd

    # -- submitting ----------------------------------------------------------------------------------------------------

    def skip(self, request: Request, key: str) -> bool:
        """Whether a draw is not to be submitted: an open batch owes it, or it has failed for good."""
        if key in self._owed:
            return True
        failed = self._failed.get(key)
        if failed is None or failed.max_tokens != request.sampling.max_tokens:  # another limit may be all it takes
            return False
        if in_another_batch(self.entry.limits.max_attempts, request, failed.failure, failed.times):
            return False
        self.failures[key] = failed.failure
        return True

    async def submit(self, missing: Iterator[Request], check: Callable[[], None]) -> None:
        """Submit everything among `missing`, or nothing where it does not fit under the wall, or where `check` raises.

        Raises Waiting while there are open batches.
        """
        try:
            rest: Iterator[Request] | None = self._adapted(missing)
            while rest is not None:
                rest = await self._build(rest)
            if self._built():  # what is paid for already is worth finishing
                check()
        except FactoryError as e:
            await self._withdraw_built()
            if isinstance(e, BudgetError):
                raise BudgetError(f"{self.where}: nothing was submitted, for all of it must fit: {e}") from None
            raise
        for batch in self._built():
            await self._submit(batch)
        if waiting := book.open_batches(self.journal, self.identity):
            raise Waiting("\n".join(self._told(batch) for batch in waiting))

    def _adapted(self, missing: Iterator[Request]) -> Iterator[Request]:
        """Each draw by a request of its own, where the endpoint has refused several in one."""
        if not any(ACTIONS[failure.reason] == "adapt" for failure, *_ in self._failed.values()):
            return missing
        return (part(request, i, 1) for request in missing for i in range(request.n))

    def _built(self) -> list[Batch]:
        return [batch for batch in book.open_batches(self.journal, self.identity) if batch.state == "built"]

    async def _withdraw_built(self) -> None:
        for batch in self._built():
            await self._withdraw(batch)

    async def _build(self, missing: Iterator[Request]) -> Iterator[Request] | None:
        """Reserve, write down and commit one batch; returns what did not fit into it."""
        tag, size = secrets.token_hex(8), 0
        attempts: list[tuple[Any, ...]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        rest, path = None, self.folder / f"{tag}.jsonl"
        with path.open("wb") as file:
            for request in missing:
                name = custom_id(tag, len(attempts), " ".join(answer_keys(request)))
                line = self.endpoint.line(name, request)
                size += len(line)
                if len(attempts) == self.endpoint.max_lines or (attempts and size > self.endpoint.max_bytes):
                    rest = chain([request], missing)
                    break
                hold = self.wall.reserve(request, self.entry, self.model.name)
                attempts.append(attempt_row(self.run, request, str(hold.usd), hold.prompt_tokens))
                file.write(line)
        if attempts:
            await book.build(self.journal, tag, self.run, self.identity, attempts)
        else:
            path.unlink()
        return rest

    async def _submit(self, batch: Batch) -> None:
        path = self.folder / f"{batch.tag}.jsonl"
        try:
            handle = await self.endpoint.submit(path, batch.tag)
        except OutageError:
            raise  # it may have arrived: the next start asks the provider
        except FactoryError:
            await self._withdraw_built()
            raise
        await book.submitted(self.journal, batch.tag, handle)
        path.unlink()
        say(f"{self.where}: {batch.requests} requests submitted as batch {handle}")

    def _told(self, batch: Batch) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(batch.submitted))
        return (
            f"{self.where}: batch {batch.handle} is not done: {self._answered.get(batch.tag, 0)} of {batch.requests} requests "
            f"answered, submitted {at}; run the same command again to collect it, or add --wait"
        )


def say_left_open(journal: Journal, identity: str, name: str) -> None:
    """Name the batches of a model that is asked directly now: nobody collects them meanwhile."""
    for batch in book.open_batches(journal, identity):
        say(
            f"models.{name}: batch {batch.handle or batch.tag} with {batch.requests} requests is still open; "
            "with `batch: true` it is collected, without it what it owes is asked, and paid, again"
        )


class _Named(msgspec.Struct):
    """The part of a result's line that names what it answers."""

    custom_id: str


def _named(batch: Batch, owed: list[Line], name: str) -> Line | None:
    """The line that a custom_id means; None where it is none of ours. A purged line has no keys left to tell it by."""
    found = re.fullmatch(rf"{batch.tag}-([0-9]{{1,9}})-[0-9a-f]+", name)
    if found is None or int(found[1]) >= len(owed):
        return None
    line = owed[int(found[1])]
    return line if not line.keys or name == custom_id(batch.tag, int(found[1]), line.keys) else None
