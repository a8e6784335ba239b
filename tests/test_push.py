"""`factory push` against a hub on loopback: what is refused, what is sent, and that it is private."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.command import factory, folder, told, typed

KEY = "hf_" + "x" * 20
TERMS = "for research"


class Hub:
    """As much of a hub as a small data set needs; `calls` are the requests, `files` what was committed."""

    def __init__(self, private: bool = True, status: int = 200) -> None:
        self.private, self.status = private, status
        self.calls: list[tuple[str, str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> Any:
        path = path.partition("?")[0]
        lines = [json.loads(line) for line in body.splitlines() if line.strip()] if body else []
        self.calls.append((method, path, lines))
        if path.endswith("/preupload/main"):
            asked = lines[0]["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        if path.endswith("/commit/main"):
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            return {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{self.url}/datasets/me/data/commit/{'1' * 40}",
            }
        if path == "/api/repos/create":
            return {"url": f"{self.url}/datasets/me/data", "id": "me/data"}
        if path.startswith("/api/datasets/"):
            return {"id": "me/data", "private": self.private, "sha": "0" * 40, "tags": [], "siblings": []}
        return {"warnings": [], "errors": []}  # the card's header is looked at


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = json.dumps(hub.answer(self.command, self.path, self.body())).encode()
            self.send_response(hub.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def built(where: Path, terms: str | None = TERMS, more: str = "") -> Path:
    """A finished run of answers that a stored export gives: no server is needed."""
    stated = f", terms: {terms}" if terms is not None else ""
    text = f"""\
name: tiny
models:
  gold: {{type: reference}}
  teacher: {{type: openai, model: m, base_url: "http://127.0.0.1:9"{stated}}}
prompts: [{{path: prompts.jsonl, name: questions}}]
stages:
  - generate: {{model: gold}}
{more}"""
    assert typed(folder(where, text), "build", "recipe.yaml").returncode == 0
    return where / "runs/tiny"


def asked_too(run: Path) -> None:
    """As if the teacher had answered too: the recipe in the run folder is what counts."""
    recipe = run / "recipe.yaml"
    assert "model: gold" in recipe.read_text()
    recipe.write_text(recipe.read_text().replace("model: gold", "model: [gold, teacher]"))


def pushed(where: Path, hub: Hub, *more: str) -> CompletedProcess[str]:
    home = str(where / "hf")
    return factory(
        where, "push", "tiny", "--to", "me/data", *more, HF_ENDPOINT=hub.url, HF_TOKEN=KEY, HF_HOME=home,
        HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1",
    )  # fmt: skip


def test_the_folder_is_sent_as_it_is_and_private(tmp_path: Path) -> None:
    run = built(tmp_path)
    asked_too(run)
    with serving(Hub()) as hub:
        done = pushed(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    (created,) = [body for _, path, (body,) in [c for c in hub.calls if c[1] == "/api/repos/create"]]
    assert (created["type"], created["name"], created["organization"]) == ("dataset", "data", "me")
    assert created.get("private") is True or created.get("visibility") == "private"
    data = run / "dataset"
    assert hub.files == {str(p.relative_to(data)): p.read_bytes() for p in data.rglob("*") if p.is_file()}
    assert set(hub.files) == {"README.md", "train.jsonl"}
    assert f"teacher | m | {TERMS} |" in hub.files["README.md"].decode()
    assert "data set me/data, private\n" in done.stdout
    assert "warning: prompts questions: the licence is not stated" in done.stdout
    assert KEY not in done.stdout + done.stderr
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_terms_that_say_nothing_are_none(tmp_path: Path) -> None:
    asked_too(built(tmp_path, '" "'))
    done = typed(tmp_path, "push", "tiny", "--to", "me/data", "--dry-run")
    told(done, 2, "the terms of models.teacher are not stated")


def test_without_the_teachers_terms_nothing_is_sent(tmp_path: Path) -> None:
    run = built(tmp_path, None)
    verb = ["push", "tiny", "--to", "me/data"]
    assert typed(tmp_path, *verb, "--dry-run").returncode == 0  # it has answered nothing
    asked_too(run)
    with serving(Hub()) as hub:
        for done in (pushed(tmp_path, hub), typed(tmp_path, *verb, "--public"), typed(tmp_path, *verb, "--dry-run")):
            told(done, 2, "the terms of models.teacher are not stated", "models.teacher.terms", "nothing was sent")
            assert "me/data" not in done.stdout
    assert hub.calls == []


def test_a_dry_run_tells_every_file_and_asks_nobody(tmp_path: Path) -> None:
    run = built(tmp_path)
    sizes = {path.name: path.stat().st_size for path in (run / "dataset").iterdir()}
    done = typed(tmp_path, "push", "tiny", "--to", "me/data", "--dry-run")
    assert done.stdout.splitlines() == [
        "data set me/data, private",
        f"  README.md  {sizes['README.md']} bytes",
        f"  train.jsonl  {sizes['train.jsonl']} bytes",
        "warning: prompts questions: the licence is not stated; `licence:` on the list puts it into the card",
        "nothing was sent: --dry-run",
    ]


def test_a_public_data_set_that_is_there_already_gets_nothing_unless_it_is_said(tmp_path: Path) -> None:
    built(tmp_path)
    with serving(Hub(private=False)) as hub:
        told(pushed(tmp_path, hub), 2, "me/data is public; say --public")
        assert hub.files == {}
        assert pushed(tmp_path, hub, "--public").returncode == 0
    assert set(hub.files) == {"README.md", "train.jsonl"}


@pytest.mark.parametrize(("status", "code"), [(403, 4), (404, 2)])
def test_what_the_hub_refuses_is_told(tmp_path: Path, status: int, code: int) -> None:
    built(tmp_path)
    with serving(Hub(status=status)) as hub:
        done = pushed(tmp_path, hub)
    told(done, code, "me/data", str(status))
    assert KEY not in done.stdout + done.stderr
    assert hub.files == {}


def test_a_hub_that_is_not_there_is_an_outage(tmp_path: Path) -> None:
    built(tmp_path)
    with serving(Hub()) as hub:
        pass
    told(pushed(tmp_path, hub), 7, "the hub cannot be reached")


def test_runs_that_are_not_done_and_wrong_names_are_refused(tmp_path: Path) -> None:
    run = built(tmp_path)
    for to in ("data", "me/", "me/da ta", "a/b/c", "../x"):
        told(typed(tmp_path, "push", "tiny", "--to", to, "--dry-run"), 2, "write USER/NAME")
    manifest = json.loads((run / "manifest.json").read_text())
    for change, words in (({"status": "stopped"}, "is stopped"), ({"rows": {"default": {"train": 0}}}, "has no rows")):
        (run / "manifest.json").write_text(json.dumps({**manifest, **change}))
        told(typed(tmp_path, "push", "tiny", "--to", "me/data", "--dry-run"), 2, words)
