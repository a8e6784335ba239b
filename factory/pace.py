"""How fast one teacher is asked: requests at once, requests and tokens a minute, and when to hold still.

At once: a window that doubles with every round trip until the server says 429 or 503, then halves, and from there grows by
one a round trip (slow start and congestion avoidance, Jacobson 1988). A vLLM server says how many requests wait in its
queue: the window shrinks to what it works on and a few more. A pause holds for the whole teacher: workers that
each back off on their own would come back as a crowd.

Outage: where nothing succeeds any more, requests do not use up their attempts. One at a time is sent, with growing gaps,
until an answer comes. A high rate of errors among answers is not an outage.
"""

import asyncio
import random
import time
from collections import deque
from typing import Any, NamedTuple

from factory.errors import OutageError
from factory.progress import say
from factory.teachers.entry import Limits
from factory.teachers.rate_limits import RateLimits
from factory.teachers.vllm_queue import Queue

FIRST_WINDOW = 32
OPEN_AFTER = 10
"""Failures in a row, of at least two requests, that look like an outage."""
GAPS_S = (1.0, 60.0)
"""Between two probes of a silent server: the first gap doubles up to the last one."""
PATIENCE_S = 3600.0
FIRST_PATIENCE_S = 15.0
"""How long an outage is waited out; the second one where the teacher has never answered: a wrong address, most likely."""
MAX_PAUSE_S = 3600.0
SAID = 200
"""Characters of an error that a line quotes."""
LEAST_WAITING = 4
"""So many waiting requests are always welcome, or a quarter of those that a server works on, if that is more."""
SILENT_S = 60.0
"""After how long without any answer a teacher is named; half its time-out where that is less."""
BUSY_S = 5.0
LONG_PAUSE_S = 10.0
"""A teacher that is too busy to answer is named after so long, or at once where it asks for a pause of so long."""
LOOK_S = 0.25
"""How often who waits for the rates looks again: an answer that used less than was thought brings a turn forward."""
QUIET_S = (10.0, 300.0)
"""Between two lines that call it busy: the first gap doubles up to the last one."""


class Pace:
    """Shared by all requests to one teacher: `enter` before each send, `leave` after it, then one of the verdicts.

    `rates` are those of an earlier round: in a short one of many, all would be sent at once.
    """

    def __init__(self, name: str, limits: Limits, useful: int, rates: "Rates | None" = None) -> None:
        self.name, self.timeout_s = name, limits.timeout_s
        self.most = min(limits.max_concurrency, useful)
        self.answered = False
        self.in_flight = 0
        self._sent = 0
        self.last_heard = time.monotonic()
        self._window = float(min(FIRST_WINDOW, self.most))
        self._threshold = float("inf")
        self._slower_at = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._requests, self._tokens = rates or Rates.of(limits)
        self._line = asyncio.Lock()
        self._tokens_a_request = 0.0
        self._resume_at = 0.0
        self._unsaid = GAPS_S[0] / 2
        self._busy_since: float | None = None
        self._busy_told = False
        self._quiet_until, self._quiet = 0.0, QUIET_S[0]
        self._heeded: RateLimits | None = None
        self._seen: Queue | None = None
        self._failed_in_a_row = 0
        self._failing: set[int] = set()
        self._answers = 0
        self._fine_until: dict[int, int] = {}
        self._why = ""
        self._down_since: float | None = None
        self._gap = GAPS_S[0]
        self._probe = asyncio.Lock()

    # -- one request -----------------------------------------------------------------------------------------------

    async def enter(self, guess: float = 0.0) -> None:
        """Wait for a free place in the window, for the rates, and for the end of a pause. `guess`: tokens of a request, used
        until an answer has told."""
        self._tokens_a_request = self._tokens_a_request or guess
        while self.in_flight >= int(self._window):
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            await place
        self.in_flight += 1
        while not await self._turn():
            pass
        if not self._sent:  # nobody was waiting for it until now
            self.last_heard = time.monotonic()
        self._sent += 1

    async def _turn(self) -> bool:
        """Wait for the end of a pause and then for the rates; False where another pause has begun meanwhile.

        A turn is taken when it has come and not ahead of a pause: all those that came in it would be used at its end, at once.
        """
        while (left := self._resume_at - time.monotonic()) > 0:  # noqa: ASYNC110  (it may be moved on meanwhile)
            await asyncio.sleep(left + random.uniform(0, 0.1 * left))  # jitter upwards only
        async with self._line:
            since = time.monotonic()
            while (delay := max(self._requests.delay(), self._tokens.delay())) > 0:  # noqa: ASYNC110  (the same)
                await asyncio.sleep(min(delay, LOOK_S))
            if self._resume_at > time.monotonic():
                return False
            self._requests.book(1, since)
            self._tokens.book(self._tokens_a_request, since)
        return True

    def leave(self) -> None:
        self.in_flight -= 1
        self._sent -= 1
        self.last_heard = time.monotonic()
        free = int(self._window) - self.in_flight
        while free > 0 and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1

    # -- what came back --------------------------------------------------------------------------------------------

    @property
    def down(self) -> bool:
        return self._down_since is not None

    def works(self, sent_at: float, tokens: int | None = None) -> None:
        """The server answered, be it with a refusal: it is up. `tokens` is what a real answer used."""
        self._answers += 1
        self._failed_in_a_row = 0
        self._failing.clear()
        if self._down_since is not None:
            say(f"models.{self.name}: answers again after {time.monotonic() - self._down_since:.0f} s")
            self._down_since, self._gap = None, GAPS_S[0]
            self._fine_until.clear()
        self._no_longer_busy(sent_at)
        if tokens is not None:
            self.answered, self._unsaid = True, GAPS_S[0] / 2
            self._tokens.correct(tokens - self._tokens_a_request)
            self._tokens_a_request += (tokens - self._tokens_a_request) / 8  # smoothed as TCP smooths round trips
            grow = 1.0 if self._window < self._threshold else 1.0 / self._window
            self._window = min(self._window + grow, float(self.most))

    def busy(self, sent_at: float, pause_s: float | None, why: str) -> None:
        """The server said 429 or 503: hold still for as long as it says, and ask less at once from then on."""
        pause_s = pause_s or None  # 0 s is no pause: heeded, it would have us ask as fast as it can refuse
        if pause_s is None and sent_at >= self._resume_at:  # it does not say: longer each time, until an answer comes
            self._unsaid = min(2 * self._unsaid, GAPS_S[1])
        self.hold(self._unsaid if pause_s is None else pause_s)
        self.shrink(sent_at)
        now = time.monotonic()
        self._busy_since = self._busy_since or now
        long = now - self._busy_since >= BUSY_S or (pause_s or 0.0) >= LONG_PAUSE_S
        if long and now >= self._quiet_until:
            asks = (
                f"trying again in {self._unsaid:.0f} s"
                if pause_s is None
                else f"its answer asks for {round(pause_s, 1):g} s"
            )
            say(f"models.{self.name}: busy ({' '.join(why.split())[:SAID]}); waiting, {asks}")
            self._busy_told = True
            self._quiet_until, self._quiet = now + self._quiet, min(2 * self._quiet, QUIET_S[1])

    def _no_longer_busy(self, sent_at: float) -> None:
        """An answer: the end of a busy time, unless it was on its way when that began."""
        now = time.monotonic()
        if self._busy_since is not None and sent_at >= self._busy_since:
            if self._busy_told:
                say(f"models.{self.name}: answers again after {now - self._busy_since:.0f} s")
            self._busy_since, self._busy_told = None, False
        if now > self._quiet_until + self._quiet:  # long ago: a server that is busy every minute is not named each time
            self._quiet = QUIET_S[0]

    def shrink(self, sent_at: float) -> None:
        """Half the window, once for all requests that were in flight together."""
        if sent_at >= self._slower_at:
            self._slower_at = time.monotonic()
            self._threshold = self._window = max(self._window / 2, 1.0)

    def make_room(self, queue: Queue | None) -> None:
        """Ask less at once where many requests wait at the server, look after look; freely again when none does."""
        if queue is None or queue is self._seen:
            return
        before, self._seen = self._seen, queue
        if before is None:  # a moment's queue is how a burst begins
            return
        too_many = min(queue.waiting, before.waiting) - max(queue.running // 4, LEAST_WAITING)
        if too_many > 0:
            self._threshold = self._window = float(max(self.in_flight - too_many, 1))
        elif queue.waiting == 0:
            self._threshold = float("inf")

    def put_off(self, seconds: float, failed: Any) -> None:
        """One request waits before it is sent again: told now and then where the server asks for long."""
        now = time.monotonic()
        if seconds >= SILENT_S and now >= self._quiet_until:
            why = " ".join(failed.result().detail.split())[:SAID]
            say(f"models.{self.name}: {why}; its answer asks for {seconds:.0f} s before this request is sent again")
            self._quiet_until, self._quiet = now + self._quiet, min(2 * self._quiet, QUIET_S[1])

    def heed(self, told: RateLimits | None) -> None:
        """Hold still where the headers of a response say that no request, or not enough tokens, are left."""
        if told is None or told is self._heeded:
            return
        self._heeded = told
        before = self._resume_at
        if told.requests.remaining == 0 and told.requests.reset_s:
            self.hold(told.requests.reset_s)
        left, limit = told.tokens.remaining, told.tokens.limit
        if left is not None and left < self._tokens_a_request:
            missing = self._tokens_a_request - left
            self.hold(60 * missing / limit if limit else told.tokens.reset_s or 0.0)
        if (left_s := self._resume_at - time.monotonic()) >= LONG_PAUSE_S and self._resume_at > before:
            say(f"models.{self.name}: its headers say that nothing is left for {left_s:.0f} s; waiting")

    def hold(self, seconds: float) -> None:
        """Nobody sends anything for so long."""
        self._resume_at = max(self._resume_at, time.monotonic() + min(seconds, MAX_PAUSE_S))

    # -- outages ---------------------------------------------------------------------------------------------------

    def fails(self, request: int, why: str, own: bool = False) -> bool:
        """A failure of the kind that outages bring; True where it is taken for one and uses up no attempt.

        `own`: it may be the fault of this request alone. It is, where more have been answered since it failed first than
        were on their way then; and a few that fail like this, with nothing else left to ask, are no outage either.
        """
        fine_until = self._fine_until.setdefault(request, self._answers + self.in_flight)
        if own and not self.down and self._answers > fine_until:
            return False
        self._failed_in_a_row += 1
        self._failing.add(request)
        self._why = why
        enough = OPEN_AFTER if own else 2
        if self._down_since is None and self._failed_in_a_row >= OPEN_AFTER and len(self._failing) >= enough:
            self._down_since = time.monotonic()
            say(f"models.{self.name}: nothing succeeds any more ({why}); waiting, trying again now and then")
        return self.down

    def forget(self, request: int) -> None:
        """This request is at its end."""
        self._fine_until.pop(request, None)

    async def line_up(self) -> None:
        """During an outage: wait in line for the turn to try. OutageError when it lasts too long."""
        async with self._probe:
            while self._down_since is not None:
                past = time.monotonic() - self._down_since
                left = (PATIENCE_S if self.answered else FIRST_PATIENCE_S) - past
                if left > 0:
                    await asyncio.sleep(min(self._gap, left))
                    self._gap = min(2 * self._gap, GAPS_S[1])
                    return
                if not self.in_flight:
                    raise OutageError(
                        f"models.{self.name}: no answer for {past:.0f} s ({self._why}); "
                        "stored answers are kept, run again when it is up"
                    )
                await asyncio.sleep(GAPS_S[0] / 10)  # the last try may still bring an answer

    async def watch(self) -> None:
        """Name a teacher from which nothing comes back; runs beside the requests until it is cancelled."""
        told, first = 0.0, min(SILENT_S, self.timeout_s / 2)
        while True:
            await asyncio.sleep(first / 4)
            silent = time.monotonic() - max(self.last_heard, self._resume_at)
            told = told if silent > told else 0.0
            if self._sent and silent > max(first, 2 * told):
                told = silent
                say(
                    f"models.{self.name}: silent for {silent:.0f} s with {self._sent} requests in flight "
                    f"(each may take {self.timeout_s:g} s)"
                )


class Rate:
    """So many units a minute, evenly spaced: a burst at the start of each minute would be answered with 429."""

    def __init__(self, per_minute: int | None) -> None:
        self._seconds_a_unit = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def delay(self) -> float:
        """Seconds until the next units may be used."""
        return max(self._free_at - time.monotonic(), 0.0) if self._seconds_a_unit else 0.0

    def book(self, units: float, since: float) -> None:
        """Use `units`, waited for since then; that the waiter woke up late puts nobody else off."""
        self._free_at = max(self._free_at, since) + units * self._seconds_a_unit

    def correct(self, units: float) -> None:
        """Book what a request has used beyond (or below) what was booked for it."""
        self._free_at += units * self._seconds_a_unit


class Rates(NamedTuple):
    """Both rates of a model."""

    requests: Rate
    tokens: Rate

    @classmethod
    def of(cls, limits: Limits) -> "Rates":
        return cls(Rate(limits.rpm), Rate(limits.tpm))
