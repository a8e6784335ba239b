"""The asking layer against a real server: nothing paid twice, nothing lost, every failure classified."""

import asyncio
import json
import subprocess
import sys
import textwrap
import time
from decimal import Decimal
from pathlib import Path

import pytest
from aiohttp import web
from msgspec.structs import replace

from factory.ask import Desk, Model
from factory.budget import Budget, Wall
from factory.errors import AuthError, BudgetError, IdentityError, LockedError, OutageError, RecipeError
from factory.journal import Journal
from factory.rows import Beam, Choice, Failure, Prompt, Request, Sampling, Usage
from factory.tally import Tally
from factory.teachers.entry import Price
from factory.teachers.openai import OpenAI
from tests.server import Script, Server, chat, error, saying, serving


def questions(count: int) -> list[Prompt]:
    return [Prompt.of([{"role": "user", "content": f"question {i}"}]) for i in range(count)]


def model_at(url: str, **fields: object) -> Model:
    limits = {"max_attempts": 3, "timeout_s": 5, "max_concurrency": 8}
    entry = OpenAI(**({"model": "m", "base_url": url, "limits": limits} | fields))  # type: ignore[arg-type]
    return Model("teacher", entry, entry.identity(Path()), entry.open(Path()))


def asks(model: Model, prompts: list[Prompt], n: int = 1, **sampling: object) -> list[Request]:
    how = Sampling(**sampling)  # type: ignore[arg-type]
    return [Request(identity=model.identity, messages=p.messages, sampling=how, n=n, prompt=p.id) for p in prompts]


async def ask(
    folder: Path, model: Model, requests: list[Request], budget: Budget | None = None, retry_failed: bool = False
) -> tuple[Tally, list[list[Choice | Failure]]]:
    with Journal(folder / "journal.sqlite") as journal:
        desk = Desk(journal, Wall(budget or Budget(), journal.spent("run")), "run", retry_failed=retry_failed)
        journal.clock("run")
        async with model:
            tally = await desk.ask(model, requests, len(requests), "test")
        return tally, [outcomes for _, outcomes in desk.read(model, requests, tally)]


def texts(outcomes: list[list[Choice | Failure]]) -> list[list[str]]:
    return [[o.text if isinstance(o, Choice) else o.reason for o in draws] for draws in outcomes]


async def test_answers_come_back_in_order_and_are_never_asked_again(tmp_path: Path) -> None:
    async with serving() as server:
        model = model_at(server.url)
        first, answers = await ask(tmp_path, model, asks(model, questions(50)))
        second, again = await ask(tmp_path, model, asks(model, questions(50)))
    assert texts(answers) == [[f"answer 0 to question {i} (seed None)"] for i in range(50)]
    assert again == answers
    assert (first.sent, first.reused, second.sent, second.reused) == (50, 0, 0, 50)
    assert set(server.seen.values()) == {1}


async def test_raising_n_pays_for_the_new_draws_only(tmp_path: Path) -> None:
    async with serving() as server:
        model = model_at(server.url)
        await ask(tmp_path, model, asks(model, questions(3), n=2))
        tally, answers = await ask(tmp_path, model, asks(model, questions(3), n=5))
    assert [body.get("n", 1) for body in server.bodies] == [2, 2, 2, 3, 3, 3]
    assert tally.reused == 6
    assert all(len(draws) == 5 and all(isinstance(d, Choice) for d in draws) for draws in answers)


async def test_fewer_draws_and_later_ones_are_found_in_a_body_with_many(tmp_path: Path) -> None:
    async with serving() as server:
        model = model_at(server.url)
        (request,) = asks(model, questions(1), n=4, max_tokens=6)  # each answer has 5 tokens, all of them have 20
        _, (every,) = await ask(tmp_path, model, [request])
        for first, n in ((0, 1), (2, 1), (1, 3)):
            tally, (some,) = await ask(tmp_path, model, [replace(request, draw=first, n=n)])
            assert (tally.sent, tally.reused) == (0, n)
            assert texts([some]) == texts([every[first : first + n]])
            assert {choice.finish for choice in some if isinstance(choice, Choice)} == {"stop"}


@pytest.mark.parametrize(
    ("stored", "wanted", "asked_again", "finish"),
    [
        ("length", 8, True, "stop"),  # the limit grew: a truncated answer is asked again
        ("length", 4, False, "length"),
        ("length", 3, False, "length"),
        ("stop", 100, False, "stop"),
        ("stop", 2, False, "length"),  # five tokens do not fit two: truncated, and not asked again
    ],
)
async def test_a_changed_limit_asks_for_truncated_answers_only(
    tmp_path: Path, stored: str, wanted: int, asked_again: bool, finish: str
) -> None:
    async def script(body: dict, before: int) -> dict:
        return chat(body, finish=stored if before == 0 else "stop")

    async with serving(script) as server:
        model = model_at(server.url)
        limit = 4 if stored == "length" else 50
        await ask(tmp_path, model, asks(model, questions(1), max_tokens=limit))
        tally, answers = await ask(tmp_path, model, asks(model, questions(1), max_tokens=wanted))
    assert tally.sent == int(asked_again)
    assert answers[0][0].finish == finish  # type: ignore[union-attr]


async def test_a_larger_limit_asks_again_where_the_reasoning_took_all_of_the_smaller_one(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> dict:
        reply = chat(body) if body["max_tokens"] > 50 else chat(body, [""], finish="length")
        reply["choices"][0]["message"]["reasoning_content"] = "hm"
        return reply

    async with serving(script) as server:
        model = model_at(server.url)
        told = []
        for limit in (50, 50, 100, 50):
            tally, answers = await ask(tmp_path, model, asks(model, questions(1), max_tokens=limit))
            told.append((tally.sent, texts(answers)[0][0][:14]))
    assert told == [(1, "reasoning_only"), (0, "reasoning_only"), (1, "answer 0 to qu"), (0, "answer 0 to qu")]


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"top_p": 0.5}, {"stop": ["x"]}, {"beam": Beam(width=2)}])
async def test_another_way_of_sampling_never_reuses_an_answer(tmp_path: Path, change: dict) -> None:
    async with serving() as server:
        model = model_at(server.url)
        await ask(tmp_path, model, asks(model, questions(1)))
        tally, _ = await ask(tmp_path, model, asks(model, questions(1), **change))
    assert tally.sent == 1


async def test_another_endpoint_or_model_never_reuses_an_answer(tmp_path: Path) -> None:
    async with serving() as one, serving() as two:
        for model in (model_at(one.url), model_at(two.url), model_at(one.url, model="other")):
            tally, _ = await ask(tmp_path, model, asks(model, questions(1)))
            assert tally.sent == 1


def flaky(times: int, response: web.Response | dict) -> Script:
    async def script(body: dict, before: int) -> web.StreamResponse | dict | None:
        if before >= times:
            return None
        return (
            response
            if isinstance(response, dict)
            else web.Response(status=response.status, text=response.text, headers=response.headers)
        )

    return script


@pytest.mark.parametrize(
    ("times", "response", "requests", "reason"),
    [
        (1, error(500, "oops"), 2, None),
        (1, error(429, "slow down", **{"retry-after": "0.05"}), 2, None),
        (5, error(429, "slow down", **{"retry-after-ms": "10"}), 6, None),  # waiting is not an attempt
        (5, error(503, "busy", **{"retry-after": "0.01"}), 6, None),
        (1, web.Response(text="{not json"), 2, None),
        (9, web.Response(text="{not json"), 3, "bad_json"),
        (9, {"choices": []}, 3, "missing_choice"),
        (9, {"error": {"message": "overloaded", "code": 500}}, 3, "server_error"),
        (9, error(400, "this model's maximum context length is 10 tokens"), 1, "context_overflow"),
        (9, error(400, "blocked by content_filter"), 1, "refused_input"),
        (9, error(400, "no such parameter"), 1, "bad_request"),
        (9, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, 2, "empty"),
        (
            9,
            {"choices": [{"message": {"content": None, "reasoning": "hm"}, "finish_reason": "stop"}]},
            1,
            "reasoning_only",
        ),
        (9, {"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}, 1, "filtered_output"),
    ],
)
async def test_every_fault_is_retried_or_set_aside_with_its_reason(
    tmp_path: Path, times: int, response: web.Response | dict, requests: int, reason: str | None
) -> None:
    async with serving(flaky(times, response)) as server:
        model = model_at(server.url)
        _, answers = await ask(tmp_path, model, asks(model, questions(1)))
    outcome = answers[0][0]
    assert sum(server.seen.values()) == requests
    assert (outcome.reason if isinstance(outcome, Failure) else None) == reason


async def test_a_broken_server_that_says_when_to_come_back_is_not_asked_before(tmp_path: Path) -> None:
    asked_at: list[float] = []

    async def script(body: dict, before: int) -> web.Response | None:
        asked_at.append(time.monotonic())
        return error(500, "restarting", **{"Retry-After": "2"}) if before == 0 else None

    async with serving(script) as server:
        model = model_at(server.url)
        _, answers = await ask(tmp_path, model, asks(model, questions(1)))
    assert isinstance(answers[0][0], Choice)
    assert asked_at[1] - asked_at[0] >= 2


@pytest.mark.parametrize(
    ("response", "raised"),
    [
        (error(401, "bad key"), AuthError),
        (error(404, "no such model"), IdentityError),
        (error(402, "pay"), BudgetError),
        (error(429, "you exceeded your quota", "insufficient_quota"), BudgetError),
    ],
)
async def test_what_will_not_get_better_stops_the_run(
    tmp_path: Path, response: web.Response, raised: type[Exception]
) -> None:
    async with serving(flaky(99, response)) as server:
        model = model_at(server.url, limits={"max_concurrency": 1})
        with pytest.raises(raised):
            await ask(tmp_path, model, asks(model, questions(30)))
    assert sum(server.seen.values()) == 1


async def test_an_endpoint_that_is_not_there_is_an_outage(tmp_path: Path) -> None:
    model = model_at("http://127.0.0.1:9", limits={"max_attempts": 2})
    with pytest.raises(OutageError, match=r"127\.0\.0\.1:9"):
        await ask(tmp_path, model, asks(model, questions(2)))


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 307 X\r\nLocation: http://\xff\xfe/v1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 \xff\xfe\r\n\r\n",
        b"HTTP/1.1 200 X\r\nContent-Encoding: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
async def test_bytes_that_are_no_text_in_a_header_are_told_like_any_failure(tmp_path: Path, response: bytes) -> None:
    async with saying(response) as url:
        model = model_at(url, limits={"max_attempts": 1})
        outcome = await model.teacher.send(asks(model, questions(1))[0])
        await model.teacher.close()
    assert isinstance(outcome, Failure)
    assert outcome.detail.encode()


async def test_a_redirect_is_not_followed_and_the_key_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "canary-key-7")
    async with serving() as other:

        async def script(body: dict, before: int) -> web.Response:
            return web.Response(status=307, headers={"Location": f"{other.url}/chat/completions"})

        async with serving(script) as server:
            model = model_at(server.url, api_key_env="TEST_KEY")
            with pytest.raises(RecipeError, match="redirects are not followed"):
                await ask(tmp_path, model, asks(model, questions(1)))
    assert server.headers[0]["Authorization"] == "Bearer canary-key-7"
    assert not other.headers
    assert b"canary-key-7" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())


def test_a_missing_key_variable_is_named() -> None:
    with pytest.raises(AuthError, match="NO_SUCH_KEY"):
        model_at("http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY")


# -- the wall --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(requests=7), Budget(tokens=300), Budget(usd=Decimal("0.0001"))])
async def test_the_budget_is_never_passed(tmp_path: Path, budget: Budget) -> None:
    async with serving() as server:
        model = model_at(server.url, price={"input": 1, "output": 1})
        requests = asks(model, questions(40), max_tokens=5)
        for _ in range(3):  # a resumed run continues the same wall
            with pytest.raises(BudgetError):
                await ask(tmp_path, model, requests, budget)
    spent = sum(server.seen.values())
    assert spent > 0
    assert budget.requests is None or spent <= budget.requests
    assert budget.tokens is None or spent * 15 <= budget.tokens
    assert budget.usd is None or spent * Decimal(15) / 1_000_000 <= budget.usd


async def test_a_budget_that_fits_the_work_is_enough(tmp_path: Path) -> None:
    """Eight requests in flight reserve more than there is; what they give back is used all the same."""
    async with serving(delay_s=0.02) as server:
        model = model_at(server.url, price={"input": 1, "output": 1})
        requests = asks(model, questions(40), max_tokens=100)  # held: about 150 tokens a request; used: 15
        tally, _ = await ask(tmp_path, model, requests, Budget(tokens=40 * 15 + 150))
    assert tally.sent == 40


@pytest.mark.parametrize("counted", [True, False])
async def test_an_answer_that_is_none_costs_what_the_server_counted_or_else_the_worst_case(
    tmp_path: Path, counted: bool
) -> None:
    async def script(body: dict, before: int) -> dict:
        filtered = chat(body, finish="content_filter")
        return filtered if counted else {**filtered, "usage": None}

    async with serving(script) as server:
        model = model_at(server.url, price={"input": 1, "output": 1})
        requests = asks(model, questions(10), max_tokens=100)
        worst = len(json.dumps(requests[0].messages, separators=(",", ":"))) + 100
        each = 15 if counted else worst
        tally, _ = await ask(tmp_path, model, requests, Budget(tokens=9 * each + worst))
    assert {failure.reason for failure in tally.failures.values()} == {"filtered_output"}
    with Journal(tmp_path / "journal.sqlite") as journal:
        spent = journal.spent("run")
    assert spent.prompt_tokens + spent.completion_tokens == 10 * each
    assert spent.usd == pytest.approx(10 * each / 1_000_000)


async def test_a_refusal_that_nobody_lived_to_read_is_not_asked_again(tmp_path: Path) -> None:
    async with serving() as server:
        model = model_at(server.url)
        (request,) = asks(model, questions(1), n=2)
        with Journal(tmp_path / "journal.sqlite") as journal:
            attempt = await journal.begin("run", request, "0", 0)
            filtered = chat({"model": "m", "messages": request.messages, "n": 2}, finish="content_filter")
            await journal.store(attempt, json.dumps(filtered).encode())
        _, answers = await ask(tmp_path, model, [request])
    assert texts(answers) == [["filtered_output"] * 2]
    assert not server.seen


async def test_one_draw_of_several_that_the_server_broke_off_is_asked_again(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> dict:
        reply = chat(body)
        if before == 0:
            reply["choices"][1]["finish_reason"] = "error"
        return reply

    async with serving(script) as server:
        model = model_at(server.url)
        _, answers = await ask(tmp_path, model, asks(model, questions(1), n=3))
    assert [isinstance(draw, Choice) for draw in answers[0]] == [True] * 3
    assert [body.get("n", 1) for body in server.bodies] == [3, 1]


async def test_usage_of_nothing_is_not_taken_for_a_free_answer(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> dict:
        return {**chat(body), "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}

    async with serving(script) as server:
        model = model_at(server.url, price={"input": 1, "output": 1})
        with pytest.raises(BudgetError):
            await ask(tmp_path, model, asks(model, questions(10), max_tokens=100), Budget(usd=Decimal("0.0005")))
    assert 0 < sum(server.seen.values()) < 5


async def test_a_schema_is_reserved_with_the_prompt(tmp_path: Path) -> None:
    """A server counts it as part of the prompt; here one token a byte."""
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "title": "t" * 3000}}}

    async def script(body: dict, before: int) -> dict:
        size = len(json.dumps(body["messages"])) + len(json.dumps(body["response_format"], separators=(",", ":")))
        return {**chat(body), "usage": {"prompt_tokens": size - 4, "completion_tokens": 5}}

    async with serving(script) as server:
        model = model_at(server.url)
        with pytest.raises(BudgetError):
            await ask(
                tmp_path,
                model,
                asks(model, questions(20), max_tokens=10, response_format=wanted),
                Budget(tokens=10_000),
            )
    assert 0 < sum(server.seen.values()) <= 3


async def test_reasoning_that_only_the_total_counts_is_paid_for(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> dict:
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115}
        return {**chat(body), "usage": usage}

    async with serving(script) as server:
        model = model_at(server.url, price={"input": 1, "output": 10})
        tally, _ = await ask(tmp_path, model, asks(model, questions(1)))
    assert (tally.usage.completion_tokens, tally.usd) == (105, Decimal(10 + 1050) / 1_000_000)


async def test_hours_end_also_while_a_teacher_asks_for_patience(tmp_path: Path) -> None:
    async def script(body: dict, before: int) -> web.Response:
        return error(429, "slow down", **{"Retry-After": "60"})

    async with serving(script) as server:
        model = model_at(server.url)
        started = time.monotonic()
        with pytest.raises(BudgetError, match=r"budget\.hours: 0\.0003 are used up"):
            await ask(tmp_path, model, asks(model, questions(9)), Budget(hours=0.0003))
    assert time.monotonic() - started < 60  # the patience that is asked for


async def test_a_prompt_that_alone_is_forbidden_is_set_aside(tmp_path: Path) -> None:
    """First among others: what is on its way decides; then alone, at a later start."""

    async def script(body: dict, before: int) -> web.Response | None:
        if body["messages"][-1]["content"] == "question 0":
            return error(403, "this prompt is not for you")
        await asyncio.sleep(0.2)
        return None

    async with serving(script) as server:
        model = model_at(server.url)
        for count in (9, 9, 1):
            tally, _ = await ask(tmp_path, model, asks(model, questions(count)))
            assert [failure.reason for failure in tally.failures.values()] == ["forbidden"]
        with pytest.raises(AuthError):  # a model that has never answered
            await ask(tmp_path / "new", model, asks(model, questions(1)))


async def test_hours_count_all_starts_together(tmp_path: Path) -> None:
    async with serving(delay_s=0.1) as server:
        model = model_at(server.url, limits={"max_concurrency": 1})
        requests = asks(model, questions(100))
        for _ in range(2):
            with pytest.raises(BudgetError, match="hours"):
                await ask(tmp_path, model, requests, Budget(hours=0.6 / 3600))
    assert 2 <= sum(server.seen.values()) <= 8


def test_each_kind_of_token_has_its_price_and_the_worst_case_is_the_dearest() -> None:
    price = Price(
        input=Decimal(2), output=Decimal(8), cached=Decimal("0.5"), reasoning=Decimal(10), batch=Decimal("0.5")
    )
    used = Usage(prompt_tokens=1000, cached_tokens=400, completion_tokens=500, reasoning_tokens=300)
    assert price.usd(used) == (Decimal(600) * 2 + Decimal(200) + Decimal(200) * 8 + Decimal(300) * 10) / 1_000_000
    assert price.worst(1000, 500) == (Decimal(2000) + Decimal(5000)) / 1_000_000
    assert price.in_batch().usd(used) == price.usd(used) / 2
    plain = Price(input=Decimal(2), output=Decimal(8))
    assert plain.usd(used) == (Decimal(2000) + Decimal(4000)) / 1_000_000  # unpriced kinds cost what the others do


async def test_money_without_a_price_is_refused(tmp_path: Path) -> None:
    async with serving() as server:
        model = model_at(server.url)
        with pytest.raises(RecipeError, match="price"):
            await ask(tmp_path, model, asks(model, questions(1)), Budget(usd=Decimal(1)))
    assert not server.seen


# -- durability --------------------------------------------------------------------------------------------------------

CHILD = """
import asyncio, sys
from pathlib import Path
from tests.test_ask import ask, asks, model_at, questions
model = model_at(sys.argv[2])
asyncio.run(ask(Path(sys.argv[1]), model, asks(model, questions(int(sys.argv[3])))))
"""


def start(folder: Path, server: Server, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), server.url, str(count)]
    with (folder / "stderr").open("wb") as stderr:
        return subprocess.Popen(command, stderr=stderr)


async def test_kill_9_loses_no_stored_answer_and_pays_at_most_for_what_was_in_flight(tmp_path: Path) -> None:
    count, kills = 120, 0
    async with serving(delay_s=0.02) as server:
        for _ in range(30):
            child = start(tmp_path, server, count)
            seen = sum(server.seen.values())
            while child.poll() is None and sum(server.seen.values()) < seen + 25:
                await asyncio.sleep(0.005)
            if child.poll() is not None:
                break
            child.kill()
            child.wait()
            kills += 1
        assert child.returncode == 0, (tmp_path / "stderr").read_text()
    assert kills >= 3
    assert len(server.seen) == count
    assert sum(server.seen.values()) - count <= 8 * kills
    with Journal(tmp_path / "journal.sqlite") as journal:
        # an intent may be committed and never sent: counted as possibly billed all the same
        assert journal.spent("run").unknown >= sum(server.seen.values()) - count


async def test_a_body_stored_but_not_read_is_filed_at_the_next_start(tmp_path: Path) -> None:
    async with serving() as server:
        model = model_at(server.url)
        (request,) = asks(model, questions(1))
        with Journal(tmp_path / "journal.sqlite") as journal:
            attempt = await journal.begin("run", request, "0", 10)
            await journal.store(attempt, json.dumps(chat({"model": "m", "messages": request.messages})).encode())
        tally, answers = await ask(tmp_path, model, [request])
    assert (tally.sent, tally.reused) == (0, 1)
    assert texts(answers) == [["answer 0 to question 0 (seed None)"]]


async def test_a_second_process_is_refused_and_told_who_holds_the_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite"):
        async with serving() as server:
            child = start(tmp_path, server, 1)
            assert await asyncio.to_thread(child.wait, 60) != 0
    told = (tmp_path / "stderr").read_text()
    assert LockedError.__name__ in told
    assert "process " in told


# -- what came but is no answer --------------------------------------------------------------------------------------


async def filtered(body: dict, before: int) -> dict:
    """Question 1 is filtered as a whole, of question 2's three draws the second is."""
    answer = chat(body)
    for i, choice in enumerate(answer["choices"]):
        question = body["messages"][-1]["content"]
        if question == "question 1" or (question == "question 2" and i == 1):
            choice["finish_reason"] = "content_filter"
    return answer


async def test_a_stored_body_without_an_answer_is_paid_for_once_and_keeps_its_reason(tmp_path: Path) -> None:
    async with serving(filtered) as server:
        model = model_at(server.url)
        first, answers = await ask(tmp_path, model, asks(model, questions(3), n=3))
        second, again = await ask(tmp_path, model, asks(model, questions(3), n=3))
        third, _ = await ask(tmp_path, model, asks(model, questions(3), n=3), retry_failed=True)
    said = [[d.reason if isinstance(d, Failure) else "answer" for d in draws] for draws in answers]
    assert said == [["answer"] * 3, ["filtered_output"] * 3, ["answer", "answer", "filtered_output"]]
    assert again == answers
    assert (first.sent, second.sent, third.sent) == (3, 0, 2)
    assert server.bodies[-1].get("n", 1) in (1, 3)  # of question 2 the one draw alone
