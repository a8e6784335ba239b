"""A key goes to its endpoint and nowhere else: no byte written, no redirect, no open line, no metadata service."""

import gzip
import json
import os
import sqlite3
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web

from factory.rows import Failure, Request, Sampling
from factory.teachers.anthropic import Anthropic
from factory.teachers.entry import is_metadata, url_problem
from factory.teachers.openai import OpenAI
from factory.teachers.wire import Wire
from tests.server import chat, error, in_thread, serving

CANARY = "sk-canary-7f3a9c1e5b2d8f6047a1"
HI = Request(identity="i", messages=[{"role": "user", "content": "hi"}], sampling=Sampling())


# -- the canary ------------------------------------------------------------------------------------------------------------


def repeat(body: dict[str, Any], fault: str, heard: str) -> Any:
    """An answer or an error that repeats the key in some way, as a debugging or a hostile server would."""
    match fault:
        case "answer":
            return chat(body, texts=[f"your header was {heard}"])
        case "long answer":  # long enough to be packed in the journal
            return chat(body, texts=[f"your header was {heard} " + "and so on " * 2000])
        case "model":
            return {**chat(body), "system_fingerprint": heard}
        case "finish":
            return chat(body, finish=heard)
        case "error 400" | "error 500" | "error 403":
            return error(int(fault[-3:]), f"bad header {heard}")
        case "error inside":
            return {"error": {"message": f"bad header {heard}", "code": 400}}
        case "html":
            return web.Response(text=f"<html>{heard}</html>", content_type="text/html")
        case "not json":
            return web.Response(text=f"{{{heard}")
        case "packed":
            packed = gzip.compress(json.dumps(chat(body, texts=[f"packed {heard}"])).encode())
            return web.Response(body=packed, headers={"Content-Encoding": "gzip"})
        case "redirect":
            return web.Response(status=307, headers={"Location": f"http://127.0.0.1:9/{heard.split()[-1]}?key={heard}"})
        case "header":
            return web.json_response(chat(body), headers={"x-ratelimit-limit-requests": heard, "x-echo": heard})
        case "stop":
            return error(401, f"wrong key {heard}")
    raise AssertionError(fault)


FAULTS = [
    "answer", "long answer", "model", "finish", "error 400", "error 500", "error 403", "error inside", "html", "not json",
    "packed", "redirect", "header",
]  # fmt: skip


def run(folder: Path, url: str, faults: list[str]) -> tuple[str, str, int]:
    """A whole run in a process of its own: its output, the command lines of all processes meanwhile, its exit code."""
    rows = [json.dumps({"prompt": fault}) for fault in faults]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "recipe.yaml").write_text(f"""\
name: canary
models:
  teacher: {{type: openai, model: m, base_url: "{url}", api_key_env: CANARY_KEY, limits: {{max_attempts: 2, max_concurrency: 1}}}}
prompts: [{{path: prompts.jsonl, name: all}}]
stages:
  - generate: {{model: teacher, max_tokens: 16}}
  - filter: [finished]
""")
    command = [sys.executable, "-m", "factory", "run", "recipe.yaml", "--max-failed", "1"]
    environment = {**os.environ, "CANARY_KEY": CANARY}
    with (folder / "output.txt").open("wb") as out:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
    seen = ""
    while child.poll() is None:
        seen += Path(f"/proc/{child.pid}/cmdline").read_text()
    return (folder / "output.txt").read_text(), seen, child.returncode


def written(folder: Path) -> dict[str, bytes]:
    """Every byte that a run left: its files, and the bodies in its journal unpacked."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    db = sqlite3.connect(folder / "runs/journal.sqlite")
    for number, body in db.execute("SELECT id, body FROM attempt WHERE body IS NOT NULL"):
        found[f"body {number}"] = zlib.decompress(body) if body[:1] == b"x" else body
    db.close()
    return found


@pytest.mark.parametrize("faults", [FAULTS, ["stop"]])
def test_no_byte_that_a_run_writes_holds_the_key(tmp_path: Path, faults: list[str]) -> None:
    async def script(body: dict, before: int) -> Any:
        return repeat(body, body["messages"][-1]["content"], server.headers[-1]["Authorization"])

    with in_thread(script) as server:
        output, command_lines, code = run(tmp_path, server.url, faults)
    assert {h["Authorization"] for h in server.headers} == {f"Bearer {CANARY}"}  # it was sent, and repeated
    assert set(server.seen) == set(faults)
    assert code in ((4,) if faults == ["stop"] else (0, 3)), output  # 3: finished, but many draws have no answer
    assert CANARY not in output
    assert CANARY not in command_lines
    files = written(tmp_path)
    assert "runs/canary/recipe.yaml" in files or faults == ["stop"]
    assert [name for name, content in files.items() if CANARY.encode() in content] == []
    why = json.loads(files["runs/canary/manifest.json"]).get("why", "")
    assert ("wrong key Bearer [key]" in why) is (faults == ["stop"])  # what stopped a run is quoted there
    assert any(b"your header was Bearer [key]" in content for content in files.values()) or faults == ["stop"]


async def test_a_traceback_from_the_wire_does_not_hold_the_key() -> None:
    wire = Wire("http://127.0.0.1:9/v1", {"Authorization": f"Bearer {CANARY}"}, CANARY, 5, 1)
    try:
        await wire.post("/chat/completions", "not bytes\ud800")  # type: ignore[arg-type]
    except UnicodeEncodeError as e:
        told = "".join(traceback.format_exception(e))
    await wire.close()
    assert "post" in told
    assert CANARY not in told + repr(wire)


def test_no_entry_can_hold_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", CANARY)
    for entry in (OpenAI(model="m", api_key_env="CANARY_KEY"), Anthropic(model="m", api_key_env="CANARY_KEY")):
        entry.open(Path())
        assert CANARY not in entry.model_dump_json() + repr(entry) + entry.identity(Path())
    for kind in (OpenAI, Anthropic):
        with pytest.raises(ValueError, match="credentials"):
            kind(model="m", base_url=f"https://user:{CANARY}@host/v1")
        with pytest.raises(ValueError, match="api_key_env"):
            kind(model="m", api_key_env=CANARY)


@pytest.mark.parametrize("key", ["EMPTY", "not-needed", "lm-studio"])
async def test_a_placeholder_for_a_key_is_not_cut_out_of_answers(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", key)

    async def script(body: dict, before: int) -> Any:
        return chat(body, texts=[f"the word {key}"])

    async with serving(script) as server:
        teacher = OpenAI(model="m", base_url=server.url, api_key_env="CANARY_KEY").open(Path())
        body = await teacher.send(HI)
        await teacher.close()
    assert isinstance(body, bytes)
    assert f"the word {key}".encode() in body


@pytest.mark.parametrize("written", [CANARY, CANARY.replace("-", "\\u002d"), "\\/".join(CANARY.partition("/"))])
@pytest.mark.parametrize("key", [CANARY, "token-abc123"])
async def test_a_key_is_cut_out_however_it_is_written(key: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escaped by JSON, and across the place where a long message is cut."""
    monkeypatch.setenv("CANARY_KEY", key)
    written = written.replace(CANARY, key) if CANARY in written else key.replace("-", "\\u002d")

    async def script(body: dict, before: int) -> Any:
        text = json.dumps(chat(body, texts=["KEY"])).replace("KEY", written)
        bad = json.dumps({"error": {"message": "x" * 485 + "KEY"}}).replace("KEY", written)
        return web.Response(
            text=text if before == 0 else bad, status=200 if before == 0 else 400, content_type="application/json"
        )

    async with serving(script) as server:
        teacher = OpenAI(model="m", base_url=server.url, api_key_env="CANARY_KEY").open(Path())
        told = [await teacher.send(HI) for _ in range(2)]
        await teacher.close()
    assert isinstance(told[0], bytes)
    assert b"[key]" in told[0]
    assert isinstance(told[1], Failure)
    for said in (json.loads(told[0])["choices"][0]["message"]["content"], told[1].detail):
        assert not any(key[i : i + 6] in said for i in range(len(key) - 6))


@pytest.mark.parametrize("change", [str, str.lower])
async def test_a_key_in_an_address_is_cut_out_too(
    change: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk+7f3a/9c1e=5b2d8f60"
    monkeypatch.setenv("CANARY_KEY", key)

    async def script(body: dict, before: int) -> web.Response:
        where = f"https://h.example/{change(quote(key, safe=''))}/login"
        return error(400, f"log in at {where}") if before else web.Response(status=307, headers={"Location": where})

    async with serving(script) as server:
        teacher = OpenAI(model="m", base_url=server.url, api_key_env="CANARY_KEY").open(Path())
        told = [await teacher.send(HI) for _ in range(2)]
        await teacher.close()
    assert all(isinstance(one, Failure) and "[key]" in one.detail and "7f3a" not in one.detail for one in told)


def test_a_key_is_not_taken_for_the_name_of_its_variable_nor_for_a_part_of_the_address() -> None:
    for wrong in ({"api_key_env": "gsk_4f8a9Bc2D7e6F5a4B3"}, {"base_url": "https://h.example/v1?key=AIzaSyA1b2C3"}):
        with pytest.raises(ValueError, match=r"api_key_env|query"):
            OpenAI(**({"model": "m", "base_url": "https://h.example/v1"} | wrong))


# -- where a key may go ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("kind", [OpenAI, Anthropic])
async def test_a_redirect_is_not_followed_to_another_port(
    kind: Any, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_KEY", CANARY)
    async with serving() as other:

        async def script(body: dict, before: int) -> web.Response:
            return web.Response(status=status, headers={"Location": f"{other.url}/chat/completions?k={CANARY}"})

        async with serving(script) as server:
            teacher = kind(model="m", base_url=server.url, api_key_env="CANARY_KEY").open(Path())
            answer = await teacher.send(HI)
            await teacher.close()
    assert isinstance(answer, Failure)
    assert answer.reason == "redirect"
    assert other.url in answer.detail
    assert CANARY not in answer.detail
    assert not other.headers


REMOTE = "http://models.example/v1"


def recipe(folder: Path, url: str, kind: str = "openai") -> Path:
    (folder / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    path = folder / "recipe.yaml"
    key = "api_key_env: CANARY_KEY" if kind == "anthropic" else "limits: {}"
    path.write_text(f"""\
name: open
models: {{teacher: {{type: {kind}, model: m, base_url: "{url}", {key}}}}}
prompts: [{{path: {folder / "prompts.jsonl"}}}]
stages: [generate: {{model: teacher}}]
""")
    return path


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("verb", ["run", "build", "train", "eval", "check"])
def test_plain_http_to_another_machine_is_refused_by_every_verb(
    verb: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from factory.cli import main

    monkeypatch.setenv("CANARY_KEY", CANARY)
    path = recipe(tmp_path, REMOTE, kind)
    assert main([verb, str(path), "--runs", str(tmp_path / "runs")]) == 2
    assert f"models.teacher: {REMOTE} would send key and prompts unencrypted" in (told := capsys.readouterr().err)
    assert "--allow-http" in told
    assert not (tmp_path / "runs").exists()


def test_the_flag_allows_it_and_metadata_services_stay_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from factory.cli import main

    assert main(["check", str(recipe(tmp_path, REMOTE)), "--allow-http"]) == 0
    assert main(["check", str(recipe(tmp_path, "http://169.254.169.254/v1")), "--allow-http"]) == 2
    assert "metadata service" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "allow_http", "fine"),
    [
        ("https://api.example/v1", False, True),
        ("http://127.0.0.1:8000/v1", False, True),
        ("http://127.9.9.9/v1", False, True),
        ("http://localhost:8000/v1", False, True),
        ("http://[::1]:8000/v1", False, True),
        ("http://10.0.0.5/v1", False, False),
        ("http://10.0.0.5/v1", True, True),
        ("http://localhost.evil.example/v1", False, False),
        ("http://127.0.0.1.evil.example/v1", False, False),
        ("http://0.0.0.0/v1", False, False),
        ("https://169.254.169.254/v1", True, False),
        ("https://169.254.170.2/v1", True, False),
        ("https://metadata.google.internal/v1", True, False),
        ("https://METADATA.google.internal./v1", True, False),
        ("https://[fd00:ec2::254]/v1", True, False),
        ("https://[::ffff:169.254.169.254]/v1", True, False),
        ("https://[fe80::1]/v1", True, False),
        ("https://100.100.100.200/v1", True, False),
    ],
)
def test_where_requests_may_go(url: str, allow_http: bool, fine: bool) -> None:
    assert (url_problem(url, allow_http) is None) is fine


@pytest.mark.parametrize("host", ["2852039166", "0251.0376.0251.0376", "169.254.43518"])
def test_an_address_in_disguise_is_no_url(host: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        OpenAI(model="m", base_url=f"https://{host}/v1")


@pytest.mark.parametrize("host", ["0xA9FEA9FE", "0xa9.0xfe.0xa9.0xfe"])
async def test_a_name_that_leads_to_a_metadata_service_is_never_connected(host: str) -> None:
    assert not is_metadata(host)  # by its spelling nobody could tell
    wire = Wire(f"http://{host}/v1", {}, None, 5, 1)
    answer = await wire.post("/chat/completions", b"{}")
    await wire.close()
    assert isinstance(answer, Failure)
    assert (answer.reason, "metadata service" in answer.detail) == ("outage", True), answer
