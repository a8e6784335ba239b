"""A stand-in for an interpreter with vLLM: started with the same command, it is a server with an engine process.

Speaks real HTTP and dies by real signals; standard library alone. What it does is steered by flags and by the question:
`--die-saying TEXT`, `--never-healthy`, `--stubborn` (the engine ignores SIGTERM), `--think SECONDS`, `--notes FILE`;
"poison" in a question kills the engine each time, "fragile" kills that of the first server only, "cut" breaks the first
answer off. Notes are JSON lines: each start with its processes and environment, and each question with its body.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENGINE = "import signal, sys, time\nif sys.argv[1:]: signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"


def interpreter(folder: Path) -> Path:
    """An executable to put under `python:`."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport runpy\nrunpy.run_path({str(Path(__file__))!r}, run_name='__main__')\n")
    path.chmod(0o755)
    return path


def read_notes(path: Path, what: str) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [note[what] for note in map(json.loads, lines) if what in note]


class Fake:
    def __init__(self, flags: dict[str, str]) -> None:
        self.flags, self.notes = flags, Path(flags["--notes"])
        self.number = len(read_notes(self.notes, "start"))
        stubborn = ["stubborn"] if "--stubborn" in flags else []
        self.engine = subprocess.Popen([sys.executable, "-S", "-c", ENGINE, *stubborn])
        self.note("start", {"pids": [os.getpid(), self.engine.pid], "argv": sys.argv, "environment": dict(os.environ)})

    def note(self, what: str, facts: Any) -> None:
        with self.notes.open("a") as file:
            file.write(json.dumps({what: facts}) + "\n")

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        question = body["messages"][-1]["content"]
        seen = sum(asked["messages"][-1]["content"] == question for asked in read_notes(self.notes, "asked"))
        self.note("asked", body)
        if "poison" in question or ("fragile" in question and self.number == 0):
            self.engine.kill()
            self.engine.wait()
        deadline = time.monotonic() + float(self.flags.get("--think", 0))
        while self.engine.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.engine.poll() is not None:
            threading.Timer(0.3, os._exit, [1]).start()  # like vLLM: answers first, ends a little later
            print("(EngineCore pid=7) ERROR 11-27 06:33:55 [core.py:1] RuntimeError: the engine choked", flush=True)
            return 500, {"error": {"message": "EngineCore encountered an issue", "code": 500}}
        if body.get("use_beam_search"):
            return 200, self.beams(body)
        text, finish = f"answer to {question} (seed {body.get('seed')})", "stop"
        if "cut" in question and not seen:
            text, finish = "half an ans", "abort"
        logprobs = {"content": [{"token": t, "logprob": -0.5} for t in text.split()]} if body.get("logprobs") else None
        return 200, self.reply(body, [(text, finish, logprobs)])

    def beams(self, body: dict[str, Any]) -> dict[str, Any]:
        """A long hypothesis before a short one, as vLLM ranks them: over the prompt's length as well."""
        if 2 * body["n"] > int(self.flags.get("--max-logprobs", 20)):
            raise ValueError(f"Requested sample logprobs of {2 * body['n']}, which is greater than max allowed: 20")
        long = {"content": [{"token": "t", "logprob": -1.0}] * 4}
        short = {"content": [{"token": "t", "logprob": -3.0}]}
        return self.reply(body, [("short one", "stop", short), ("a long one here", "length", long)])

    def reply(self, body: dict[str, Any], answers: list[tuple[str, str, Any]]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text},
                "logprobs": logprobs,
                "finish_reason": finish,
            }
            for i, (text, finish, logprobs) in enumerate(answers)
        ]
        usage = {"prompt_tokens": 10, "completion_tokens": 5 * len(choices)}
        return {"model": body["model"], "choices": choices, "usage": usage, "system_fingerprint": "vllm-9.9.9-fake"}

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/health":
            return (503 if self.engine.poll() is not None or "--never-healthy" in self.flags else 200), {}
        if path == "/version":
            return 200, {"version": "9.9.9"}
        if path == "/tokenize":
            return 200, {"count": 24}
        return 200, {"data": [{"id": "teacher", "root": sys.argv[4], "max_model_len": 512}]}


def serve(fake: Fake, port: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def tell(self, status: int, body: dict[str, Any]) -> None:
            raw = json.dumps(body, separators=(",", ":")).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            self.tell(*fake.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.tell(*(fake.get(self.path) if self.path == "/tokenize" else fake.answer(body)))
            except ValueError as e:
                self.tell(400, {"error": {"message": str(e), "code": 400}})

        def log_message(self, *_: Any) -> None:
            pass

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def main() -> None:
    arguments = sys.argv[5:]  # -c LAUNCHER serve MODEL ...
    flags = {
        flag: following if not following.startswith("--") else ""
        for flag, following in zip(arguments, [*arguments[1:], "--"], strict=True)
        if flag.startswith("--")
    }
    if "--die-saying" in flags:
        print("(APIServer pid=1) INFO 11-27 06:33:55 [api.py:1] starting", flush=True)
        sys.exit(f"(APIServer pid=1) ERROR 11-27 06:33:55 [core.py:1510] {flags['--die-saying']}")
    serve(Fake(flags), int(flags["--port"]))


if __name__ == "__main__":
    main()
