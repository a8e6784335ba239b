"""`factory check --live` against real servers with different manners: what it finds, prints, records, and sends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from factory.cli import main
from factory.errors import FactoryError
from factory.recipe import load
from factory.teachers.capabilities import FILE, Capabilities
from factory.teachers.openai import OpenAI
from tests.server import Server, chat, error, in_thread, message

Answer = Callable[[dict[str, Any]], Any]


def recipe(folder: Path, url: str, kind: str = "openai", extra: str = "") -> Path:
    (folder / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    path = folder / "recipe.yaml"
    path.write_text(f"""\
name: asked
models:
  teacher: {{type: {kind}, model: m, base_url: "{url}", api_key_env: TEST_KEY{extra}}}
  gold: {{type: reference}}
prompts: [{{path: {folder / "prompts.jsonl"}}}]
stages: [generate: {{model: teacher}}]
""")
    return path


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "a-key-of-more-than-twenty-characters")


def live(folder: Path, answer: Answer, kind: str = "openai", extra: str = "") -> tuple[int, Server, dict[str, Any]]:
    """Run the command against a server with these manners: exit code, server, what was recorded."""

    async def script(body: dict, before: int) -> Any:
        return answer(body)

    with in_thread(script) as server:
        path = recipe(folder, server.url, kind, extra)
        code = main(["check", str(path), "--live", "--runs", str(folder / "runs")])
    file = folder / "runs" / FILE
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return code, server, next(iter(found.values()), {})


def honest(body: dict[str, Any]) -> Any:
    """A server that honours everything."""
    n = body.get("n", 1)
    texts = [f"cat {body.get('seed', len(str(body)))} {i}" for i in range(n)]
    if "response_format" in body:
        texts = [json.dumps({"animal": "cat"})] * n
    made = chat(body, texts=texts) | {"model": "m-2026-01-01"}
    if body.get("logprobs"):
        made["choices"][0]["logprobs"] = {"content": [{"token": "cat", "logprob": -0.5}]}
    return made


def deaf(body: dict[str, Any]) -> Any:
    """A server that ignores in silence whatever it does not know."""
    return chat(body, texts=["always the same"])


def strict(body: dict[str, Any]) -> Any:
    """A server that refuses what it does not know, and `max_tokens` too."""
    for name in ("max_tokens", "n", "seed", "logprobs", "response_format"):
        if name in body:
            hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
            return error(400, f"Unsupported parameter: '{name}'.{hint}", "unsupported_parameter")
    return chat(body, texts=["cat 7"])


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (
            honest,
            {"n": True, "seed": True, "logprobs": True, "structured": ["json_object", "json_schema"], "limit": "max_tokens"},
        ),
        (deaf, {"n": False, "seed": False, "logprobs": False, "structured": [], "limit": "max_tokens"}),
        (
            strict,
            {"n": False, "seed": False, "logprobs": False, "structured": [], "limit": "max_completion_tokens"},
        ),
    ],
)  # fmt: skip
def test_what_is_honoured_is_found_out_and_recorded(tmp_path: Path, answer: Answer, found: dict[str, Any]) -> None:
    code, _, recorded = live(tmp_path, answer)
    assert code == 0
    assert recorded["capabilities"] == found


def test_a_format_that_is_only_partly_honoured_is_told_apart(tmp_path: Path) -> None:
    def any_object(body: dict[str, Any]) -> Any:
        return chat(body, texts=['{"kind": "cat"}'] if "response_format" in body else ["cat"])

    _, _, recorded = live(tmp_path, any_object)
    assert recorded["capabilities"]["structured"] == ["json_object"]


def test_what_a_busy_server_leaves_open_stays_unknown(tmp_path: Path) -> None:
    def busy(body: dict[str, Any]) -> Any:
        extra = {"n", "seed", "logprobs", "response_format"} & body.keys()
        return error(429, "slow down") if extra else chat(body, texts=["cat"])

    code, _, recorded = live(tmp_path, busy)
    assert (code, recorded["capabilities"]) == (0, {"limit": "max_tokens"})


@pytest.mark.parametrize("choices", [[], [None], [{"message": 5}, "x"]])
def test_what_cannot_be_read_stays_unknown(tmp_path: Path, choices: list[Any]) -> None:
    def odd(body: dict[str, Any]) -> Any:
        plain = not {"n", "seed", "logprobs", "response_format"} & body.keys()
        return chat(body, texts=["cat"]) if plain else {**chat(body), "choices": choices}

    code, _, recorded = live(tmp_path, odd)
    assert (code, recorded["capabilities"]) == (0, {"limit": "max_tokens"})


def test_an_answer_in_a_list_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, recorded = live(tmp_path, lambda body: web.json_response([{**chat(body), "error": None}]))
    assert (code, recorded) == (7, {})
    assert "the body is no object" in capsys.readouterr().err


def test_a_reasoning_model_that_uses_its_tokens_up_has_answered(tmp_path: Path) -> None:
    def thinks(body: dict[str, Any]) -> Any:
        made = chat(body, texts=[""] * body.get("n", 1), finish="length")
        made["choices"][0]["message"]["reasoning_content"] = "hm"
        return made

    code, _, recorded = live(tmp_path, thinks)
    assert code == 0
    assert recorded["capabilities"]["reasoning"] == "reasoning_content"


def test_a_page_for_people_names_model_latency_limits_and_what_is_honoured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def limited(body: dict[str, Any]) -> Any:
        from aiohttp import web

        return web.json_response(
            honest(body), headers={"x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499"}
        )

    live(tmp_path, limited)
    told = capsys.readouterr().out
    assert "models.teacher: m answers as m-2026-01-01 in 0." in told
    assert "requests: limit 500, left 499" in told
    assert "n: honoured" in told
    assert "response_format: json_object, json_schema" in told
    assert "models.gold: reference is no endpoint with a key; nothing was sent" in told


def test_it_asks_tiny_questions_and_few_of_them(tmp_path: Path) -> None:
    _, server, _ = live(tmp_path, honest)
    assert len(server.bodies) == 8
    assert all(body["max_tokens"] <= 64 and len(body["messages"]) == 1 for body in server.bodies)


def test_without_live_nothing_is_sent_and_nothing_recorded(tmp_path: Path) -> None:
    with in_thread() as server:
        assert main(["check", str(recipe(tmp_path, server.url)), "--runs", str(tmp_path / "runs")]) == 0
    assert not server.bodies
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        (lambda body: error(401, "wrong key"), 4, "auth"),
        (lambda body: error(403, "not here"), 4, "forbidden"),
        (lambda body: error(404, "no such model"), 6, "model_not_found"),
        (lambda body: chat(body) | {"model": "another"}, 6, "another answered"),
        (lambda body: error(429, "pay", "insufficient_quota"), 5, "quota"),
        (lambda body: error(500, "oops"), 7, "server_error"),
        (lambda body: error(400, "bad"), 7, "bad_request"),
    ],
)
def test_an_endpoint_that_does_not_answer_ends_with_its_code_and_is_not_recorded(
    answer: Answer, code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, server, recorded = live(tmp_path, answer)
    assert (ended, recorded, len(server.bodies)) == (code, {}, 1)
    assert told in capsys.readouterr().err


def test_later_runs_plan_by_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(body: dict, before: int) -> Any:
        return strict(body)

    with in_thread(script) as server:
        path, runs = recipe(tmp_path, server.url), ["--runs", str(tmp_path / "runs")]
        assert main(["run", str(path), *runs]) == 2  # the server refuses max_tokens
        assert main(["check", str(path), "--live", *runs]) == 0
        assert main(["run", str(path), *runs]) == 0
        assert main(["run", str(path), *runs, "--set", "stages.0.generate.response_format=json_object"]) == 2
    assert "max_completion_tokens" in server.bodies[-1]
    assert "models.teacher: it has no response_format json_object" in capsys.readouterr().err


def test_two_models_are_recorded_side_by_side_and_asked_again(tmp_path: Path) -> None:
    live(tmp_path, honest)
    live(tmp_path, deaf)  # another port is another endpoint
    whole = json.loads((tmp_path / "runs" / FILE).read_text())
    assert [found["capabilities"]["n"] for found in whole.values()] == [True, False]


def test_anthropic_is_asked_in_its_own_words(tmp_path: Path) -> None:
    def native(body: dict[str, Any]) -> Any:
        text = '{"animal": "cat"}' if "output_config" in body else "cat 7"
        return message(body, {"type": "text", "text": text})

    code, server, recorded = live(tmp_path, native, "anthropic")
    assert (code, recorded["capabilities"]) == (0, {"structured": ["json_schema"]})
    assert len(server.bodies) == 2
    assert all(header["x-api-key"] for header in server.headers)


def test_the_recipe_may_know_better_than_the_record(tmp_path: Path) -> None:
    live(tmp_path, deaf, extra=", capabilities: {n: true, seed: true}")
    entry = load(tmp_path / "recipe.yaml").models["teacher"]
    assert isinstance(entry, OpenAI)
    assert entry.abilities(tmp_path / "runs") == Capabilities(
        n=True, seed=True, logprobs=False, structured=[], limit="max_tokens"
    )


def test_every_error_of_a_live_check_is_one_of_ours(tmp_path: Path) -> None:
    from factory.check import live as ask_live

    with pytest.raises(FactoryError, match="cannot connect"):
        list(ask_live(load(recipe(tmp_path, "http://127.0.0.1:9/v1")), tmp_path / "runs"))
