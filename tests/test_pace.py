"""Pacing, outages and lost causes, against a real server that keeps its own count."""

import asyncio
import re
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web

from factory import pace
from factory.ask import Desk, Model
from factory.budget import Budget, Wall
from factory.errors import OutageError, TooManyFailures
from factory.journal import Journal
from factory.rows import Choice, Failure
from factory.teachers.entry import Limits
from factory.teachers.vllm import Vllm
from tests.server import Script, chat, error, serving
from tests.test_ask import ask, asks, model_at, questions


def limits(**fields: object) -> dict[str, object]:
    return {"max_attempts": 3, "timeout_s": 5, "max_concurrency": 32} | fields


async def test_requests_a_minute_are_spread_evenly(tmp_path: Path) -> None:
    arrived: list[float] = []

    async def script(body: dict, before: int) -> None:
        arrived.append(time.monotonic())

    async with serving(script) as server:
        model = model_at(server.url, limits=limits(rpm=1200))  # one every 50 ms
        started = time.monotonic()
        await ask(tmp_path, model, asks(model, questions(20)))
    arrived.sort()
    for place, arrival in enumerate(arrived):  # a slow machine may delay a request, nothing makes one early
        assert arrival - started > 0.05 * place - 0.005


async def test_the_rates_hold_over_many_short_rounds(tmp_path: Path) -> None:
    async with serving() as server:
        model = model_at(server.url, limits=limits(rpm=300))  # one every 200 ms
        started = time.monotonic()
        with Journal(tmp_path / "journal.sqlite") as journal:
            desk = Desk(journal, Wall(Budget(), journal.spent("run")), "run")
            async with model:
                for prompt in questions(6):
                    await desk.ask(model, asks(model, [prompt]), 1, "test")
    assert time.monotonic() - started > 0.95


async def test_turns_that_fell_into_a_pause_are_not_made_up_for_at_once(tmp_path: Path) -> None:
    arrived: list[float] = []

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        arrived.append(time.monotonic())
        return error(429, "slow down", **{"retry-after": "1"}) if len(arrived) == 2 else None

    async with serving(script) as server:
        model = model_at(server.url, limits=limits(rpm=1200))  # one every 50 ms
        await ask(tmp_path, model, asks(model, questions(15)))
    after = sorted(arrived)[2:]
    assert after[0] - arrived[1] >= 0.95
    assert after[-1] - after[0] > 0.05 * (len(after) - 2)


async def test_tokens_a_minute_hold_back_by_what_answers_used(tmp_path: Path) -> None:
    async with serving() as server:  # 15 tokens a request: 6000 a minute are 6.7 requests a second
        model = model_at(server.url, limits=limits(tpm=6000, max_concurrency=2))
        started = time.monotonic()
        await ask(tmp_path, model, asks(model, questions(12)))
    assert time.monotonic() - started > 1.0


async def test_a_first_guess_at_tokens_holds_nobody_back_once_an_answer_has_told(tmp_path: Path) -> None:
    async with serving() as server:  # 15 tokens a request, not the 10,000 that each might use: 100 s of this rate
        model = model_at(server.url, limits=limits(tpm=6000))
        started = time.monotonic()
        await ask(tmp_path, model, asks(model, questions(4), max_tokens=10_000))
    assert time.monotonic() - started < 20


async def test_a_pause_holds_for_the_whole_teacher(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arrived: list[float] = []
    told: list[float] = []

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        arrived.append(time.monotonic())
        if len(arrived) == 40:
            told.append(time.monotonic())
            return error(429, "slow down", **{"retry-after": "0.6"})
        return None

    async with serving(script, delay_s=0.02) as server:
        model = model_at(server.url)
        _, answers = await ask(tmp_path, model, asks(model, questions(100)))
    # all eight workers held still, not only the one that was told
    assert not [at for at in arrived if told[0] + 0.3 < at < told[0] + 0.6]
    assert all(isinstance(draws[0], Choice) for draws in answers)
    assert "busy" not in capfd.readouterr().err  # so short a pause is nothing to tell


async def test_headers_that_say_nothing_is_left_are_heeded(tmp_path: Path) -> None:
    """A server that allows 10 requests in each second, tells so, and answers the eleventh with 429."""
    window, used, refused = 0.0, 0, 0

    async def script(body: dict, before: int) -> web.StreamResponse:
        nonlocal window, used, refused
        if time.monotonic() - window > 1.0:
            window, used = time.monotonic(), 0
        used += 1
        refused += used > 10
        left = {"x-ratelimit-limit-requests": "10", "x-ratelimit-remaining-requests": str(max(10 - used, 0))}
        left["x-ratelimit-reset-requests"] = f"{window + 1.05 - time.monotonic():.3f}s"
        return error(429, "slow down") if used > 10 else web.json_response(chat(body), headers=left)

    async with serving(script) as server:
        model = model_at(server.url, limits=limits(max_concurrency=1))
        _, answers = await ask(tmp_path, model, asks(model, questions(25)))
    assert all(isinstance(draws[0], Choice) for draws in answers)
    assert refused == 0


async def test_a_server_that_refuses_n_is_asked_for_one_draw_at_a_time(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> web.StreamResponse | None:
        return error(400, "Unsupported value: 'n' must be 1", "unsupported_value") if body.get("n", 1) > 1 else None

    async with serving(script) as server:
        model = model_at(server.url, limits=limits(max_concurrency=1))
        _, answers = await ask(tmp_path, model, asks(model, questions(4), n=3))
    assert [len(draws) for draws in answers] == [3] * 4
    assert all(isinstance(draw, Choice) for draws in answers for draw in draws)
    assert [body.get("n", 1) for body in server.bodies] == [3] + [1] * 12  # it is told once


async def test_concurrency_finds_what_a_server_can_take(tmp_path: Path) -> None:
    """A server that takes 6 at once: the window settles near it, most requests are not refused, none is lost."""
    now, most, refused = 0, 0, 0

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        nonlocal now, most, refused
        if now >= 6:
            refused += 1
            return error(429, "too many at once", **{"retry-after": "0.02"})
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return None

    async with serving(script) as server:
        model = model_at(server.url)
        _, answers = await ask(tmp_path, model, asks(model, questions(600)))
    assert all(isinstance(draws[0], Choice) for draws in answers)
    assert most == 6
    assert refused < 120


async def test_an_outage_is_waited_out_and_uses_up_no_attempt(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    began = 0.0

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        nonlocal began
        if not began and sum(server.seen.values()) >= 60:
            began = time.monotonic()
        return error(500, "down") if began and time.monotonic() - began < 2.5 else None

    async with serving(script, delay_s=0.01) as server:
        model = model_at(server.url, limits=limits(max_attempts=2))
        tally, answers = await ask(tmp_path, model, asks(model, questions(120)))
    assert all(isinstance(draws[0], Choice) for draws in answers)
    assert tally.sent < 120 + 2 * 32 + 10  # a try each for those in flight, then a probe now and then
    told = capfd.readouterr().err
    assert "models.teacher: nothing succeeds any more (HTTP 500: down)" in told
    assert "answers again" in told


async def test_a_bad_error_rate_is_no_outage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every question fails at its first try: half of all that is sent fails, and nothing is paused."""

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        return error(500, "flaky") if before == 0 else None

    async with serving(script, delay_s=0.01) as server:
        model = model_at(server.url, limits=limits(max_concurrency=4))
        tally, answers = await ask(tmp_path, model, asks(model, questions(40)))
    assert all(isinstance(draws[0], Choice) for draws in answers)
    assert tally.sent == 80
    assert "nothing succeeds" not in capfd.readouterr().err


async def test_a_teacher_that_never_answered_is_not_waited_for_long(tmp_path: Path) -> None:
    model = model_at("http://127.0.0.1:9/v1")
    with pytest.raises(OutageError, match="cannot connect"):
        await ask(tmp_path, model, asks(model, questions(1)))


async def test_the_end_of_an_outage_comes_with_its_patience_and_says_how_long_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "FIRST_PATIENCE_S", 4.0)  # tries after 1 and 3 s, and a last one
    model = model_at("http://127.0.0.1:9/v1", limits=limits())
    with pytest.raises(OutageError, match=r"no answer for [4-6] s \(cannot connect"):
        await ask(tmp_path, model, asks(model, questions(40)))


def failing_at(questions: list[str]) -> Script:
    """A server that fails at these questions, whenever they are asked."""

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        return error(500, "oops") if body["messages"][-1]["content"] in questions else None

    return script


@pytest.mark.parametrize("count", [20, 2])
async def test_a_few_requests_that_the_server_cannot_answer_are_no_outage(tmp_path: Path, count: int) -> None:
    """Not after all others are answered, nor in a process that has only those left to ask."""
    poison = [prompt.text for prompt in questions(count)[-2:]]

    async with serving(failing_at(poison)) as server:
        model = model_at(server.url, limits=limits(max_attempts=6))
        _, answers = await asyncio.wait_for(ask(tmp_path, model, asks(model, questions(count))), 60)
    failed = [draws[0].reason for draws in answers if isinstance(draws[0], Failure)]
    assert failed == ["server_error", "server_error"]


async def test_an_outage_behind_two_workers_is_seen_after_a_few_requests(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that fails at everything cannot be told from two bad prompts, but from ten it can."""
    began = 0.0

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        nonlocal began
        began = began or time.monotonic()
        return error(500, "oops") if time.monotonic() - began < 8 else None

    async with serving(script) as server:
        model = model_at(server.url, limits=limits(max_attempts=2, max_concurrency=2))
        _, answers = await ask(tmp_path, model, asks(model, questions(60)))
    assert "nothing succeeds any more (HTTP 500: oops)" in capfd.readouterr().err
    assert sum(isinstance(draws[0], Failure) for draws in answers) <= 10


async def test_requests_that_fail_among_answers_are_no_outage_however_many(tmp_path: Path) -> None:
    """A tenth of them, so at the end many in a row: each has failed while others were answered."""
    poison = [prompt.text for prompt in questions(190)[::10]]

    async with serving(failing_at(poison)) as server:
        model = model_at(server.url, limits=limits(max_attempts=4))
        _, answers = await asyncio.wait_for(ask(tmp_path, model, asks(model, questions(190))), 60)
    assert sum(isinstance(draws[0], Failure) for draws in answers) == 19


@pytest.mark.parametrize("answered", [True, False])
async def test_the_last_try_of_an_outage_is_waited_for(monkeypatch: pytest.MonkeyPatch, answered: bool) -> None:
    monkeypatch.setattr(pace, "FIRST_PATIENCE_S", 1.5)
    teacher = pace.Pace("teacher", Limits(), 8)
    while not teacher.down:
        for request in range(2):
            teacher.fails(request, "it is down")
    for _ in range(2):
        await teacher.line_up()
    await teacher.enter()
    next_in_line = asyncio.create_task(teacher.line_up())
    await asyncio.sleep(0.3)
    assert not next_in_line.done()
    teacher.leave()
    if answered:
        teacher.works(time.monotonic())
        await next_in_line
    else:
        with pytest.raises(OutageError, match=r"no answer for [2-9] s \(it is down"):
            await next_in_line


# -- a busy server -----------------------------------------------------------------------------------------------------


async def test_a_long_pause_is_told_at_once_and_so_is_its_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four requests are told to wait; the answer to the first one, on its way by then, is not the end of it."""
    monkeypatch.setattr(pace, "LONG_PAUSE_S", 1.0)

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        if body["messages"][-1]["content"].endswith("0"):
            await asyncio.sleep(0.3)
            return None
        return None if before else error(429, "slow\ndown", **{"retry-after": "1"})

    async with serving(script) as server:
        model = model_at(server.url)
        await ask(tmp_path, model, asks(model, questions(4)))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("models.")]
    assert lines[0] == "models.teacher: busy (HTTP 429: slow down); waiting, its answer asks for 1 s"
    assert re.fullmatch(r"models.teacher: answers again after [1-9] s", lines[1])
    assert len(lines) == 2


@pytest.mark.parametrize(("told", "said"), [("0.1", "its answer asks for 0.1 s"), (None, "trying again in 2 s")])
async def test_a_server_that_never_answered_and_is_busy_is_named_in_growing_gaps(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, told: str | None, said: str
) -> None:
    monkeypatch.setattr(pace, "BUSY_S", 0.9)
    monkeypatch.setattr(pace, "QUIET_S", (0.5, 300.0))
    began = 0.0

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        nonlocal began
        began = began or time.monotonic()
        busy = time.monotonic() - began < 2.8
        return error(503, "loading", **({"retry-after": told} if told else {})) if busy else None

    async with serving(script) as server:
        model = model_at(server.url)
        _, answers = await ask(tmp_path, model, asks(model, questions(4)))
    assert all(isinstance(draws[0], Choice) for draws in answers)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("models.")]
    assert lines[0] == f"models.teacher: busy (HTTP 503: loading); waiting, {said}"
    assert sum("busy" in line for line in lines) <= 3  # after 0.9 s, 1.4 s, 2.4 s
    assert sum("answers again" in line for line in lines) == 1


@pytest.mark.parametrize("told", [{}, {"retry-after": "0"}])
async def test_a_busy_server_that_asks_for_no_pause_is_asked_in_growing_gaps(
    tmp_path: Path, told: dict[str, str]
) -> None:
    arrived: list[float] = []

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        arrived.append(time.monotonic())
        return error(503, "loading", **told) if arrived[-1] - arrived[0] < 2.5 else None

    async with serving(script) as server:
        model = model_at(server.url)
        await ask(tmp_path, model, asks(model, questions(4)))
    assert max(later - earlier for earlier, later in pairwise(arrived)) > 1.9  # one second, then two
    assert len(arrived) < 20


async def test_a_server_that_is_busy_again_and_again_is_not_named_each_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LONG_PAUSE_S", 0.02)

    async def script(body: dict, before: int) -> web.StreamResponse | None:
        return None if before else error(429, "slow down", **{"retry-after": "0.02"})

    async with serving(script) as server:
        model = model_at(server.url, limits=limits(max_concurrency=1))
        await ask(tmp_path, model, asks(model, questions(30)))
    told = capfd.readouterr().err
    assert (told.count("busy"), told.count("answers again")) == (1, 1)


async def test_fewer_answers_than_n_are_topped_up(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> dict:
        return chat(body, [f"text {before}"])  # one, whatever n is

    async with serving(script) as server:
        model = model_at(server.url)
        tally, answers = await ask(tmp_path, model, asks(model, questions(1), n=3))
        again, same = await ask(tmp_path, model, asks(model, questions(1), n=3))
    assert [body.get("n", 1) for body in server.bodies] == [3, 1, 1]
    assert [choice.text for choice in answers[0] if isinstance(choice, Choice)] == ["text 0", "text 1", "text 2"]
    assert (tally.sent, again.sent) == (3, 0)
    assert same == answers


async def test_a_doomed_run_stops_early(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> web.StreamResponse | None:
        number = int(body["messages"][-1]["content"].split()[-1])
        return error(400, "no such parameter") if number % 2 else None

    async with serving(script) as server:
        model = model_at(server.url)
        with pytest.raises(TooManyFailures, match=r"20 of 400 draws have no answer.*bad_request"):
            await ask(tmp_path, model, asks(model, questions(400)))
    assert sum(server.seen.values()) < 200


async def test_a_broken_server_that_asks_for_a_long_wait_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def script(body: dict, before: int) -> web.StreamResponse:
        return error(500, "down for maintenance", **{"retry-after": "900"})

    async with serving(script) as server:
        model = model_at(server.url)
        with suppress(TimeoutError):
            await asyncio.wait_for(ask(tmp_path, model, asks(model, questions(5))), 1)
    told = re.findall(r"models\.teacher: HTTP 500: (.*) for 90\d s before", capfd.readouterr().err)
    assert told == ["down for maintenance; its answer asks"]


async def test_a_few_failures_do_not_stop_a_run(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> web.StreamResponse | None:
        return error(400, "no such parameter") if body["messages"][-1]["content"].endswith("7") else None

    async with serving(script) as server:
        model = model_at(server.url)
        tally, answers = await ask(tmp_path, model, asks(model, questions(30)))
    assert [i for i, draws in enumerate(answers) if isinstance(draws[0], Failure)] == [7, 17, 27]
    assert len(tally.failures) == 3


async def test_the_first_requests_are_held_to_the_tokens_a_minute_too(tmp_path: Path) -> None:
    """Nobody has told yet what a request uses: its prompt and limit are the guess."""
    async with serving(delay_s=0.05) as server:
        model = model_at(server.url, limits=limits(tpm=6000, max_concurrency=32))
        task = asyncio.create_task(ask(tmp_path, model, asks(model, questions(64), max_tokens=500)))
        while not server.seen:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        sent = sum(server.seen.values())
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert 1 <= sent <= 8  # 15 tokens each, 100 a second; and not 32 at once


async def test_waiting_for_a_rate_of_ones_own_is_no_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with serving() as server:
        model = model_at(server.url, limits=limits(rpm=40, timeout_s=1))
        await ask(tmp_path, model, asks(model, questions(3)))
    assert "silent" not in capfd.readouterr().err


async def test_a_long_pause_that_headers_bring_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def script(body: dict, before: int) -> web.StreamResponse:
        left = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h"}
        return web.json_response(chat(body), headers=left)

    async with serving(script) as server:
        model = model_at(server.url, limits=limits(max_concurrency=1))
        task = asyncio.create_task(ask(tmp_path, model, asks(model, questions(3))))
        said = ""
        async with asyncio.timeout(30):
            while "its headers say that nothing is left for 3600 s; waiting" not in said:
                await asyncio.sleep(0.05)
                said += capfd.readouterr().err
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_silent_teacher_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def script(body: dict, before: int) -> None:
        if before == 0:
            await asyncio.sleep(1.5)

    async with serving(script) as server:
        model = model_at(server.url, limits=limits(timeout_s=2))
        await ask(tmp_path, model, asks(model, questions(3)))
    assert "models.teacher: silent for 1 s with 3 requests in flight" in capfd.readouterr().err


@pytest.mark.parametrize("has_metrics", [True, False])
async def test_requests_do_not_pile_up_in_a_vllm_servers_queue(tmp_path: Path, has_metrics: bool) -> None:
    """Room for four at once; whatever else is sent waits at the server, which tells how many do in its metrics."""
    room, taken = asyncio.Semaphore(4), {"running": 0, "waiting": 0}
    seen: list[dict[str, int]] = []

    async def script(body: dict, before: int) -> None:
        taken["waiting"] += 1
        async with room:
            taken["waiting"] -= 1
            taken["running"] += 1
            seen.append(dict(taken))
            await asyncio.sleep(0.1)
            taken["running"] -= 1

    def metrics() -> str:
        lines = [f'vllm:num_requests_{kind}{{engine="0",model_name="m"}} {n}.0' for kind, n in taken.items()]
        return "\n".join([*lines, 'vllm:num_requests_waiting_by_reason{reason="x"} 9.0', ""])

    weights = tmp_path / "m"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"")
    async with serving(script) as server:
        server.metrics = metrics if has_metrics else None
        entry = Vllm(model=str(weights), base_url=server.url, limits={"max_concurrency": 64, "timeout_s": 60})
        model = Model("teacher", entry, entry.identity(tmp_path), entry.open(tmp_path))
        tally, _ = await ask(tmp_path, model, asks(model, questions(320)))
    assert not tally.failures
    later = seen[180:280]  # the looks of more than four seconds have had their effect
    assert sum(moment["waiting"] for moment in later) > len(later)  # there is always something left to do
    if has_metrics:
        assert max(moment["waiting"] for moment in later) <= 20
    else:
        assert max(moment["waiting"] for moment in later) > 30
