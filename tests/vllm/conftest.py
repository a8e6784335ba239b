"""A real vLLM on this machine's processor: one running server for all tests, and what it takes to start others."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from factory.teachers.vllm_server import LAUNCHER, server_environment
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent.parent
FLAGS = {"enforce_eager": True}
START_S = 300


@pytest.fixture(scope="session", autouse=True)
def _cpu() -> Iterator[None]:
    """Both cores, little memory, no hub; local students in the same processes leave the cores to vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        patch.setenv("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # one for all other tests
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter of vLLM's own environment."""
    python = Path(os.environ.get("FACTORY_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python")).absolute()
    assert python.is_file(), f"there is no {python}: `make test-vllm` makes it, or FACTORY_VLLM_PYTHON names another"
    return str(python)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with preferences of its own, that likes to end its answers."""
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path_factory.mktemp("weights") / "tiny", hidden=128, sharpness=12)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][2] *= -1.8  # the end token: its logits are often strongly negative in this model
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def smollm() -> Path:
    path = ROOT / "weights/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.is_file(), "run `make weights`"
    return path


class Running(NamedTuple):
    """A vLLM server that somebody else started: its address, and the model under the name it is served by."""

    url: str
    model: str


@pytest.fixture(scope="session")
def running(vllm_python: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("running") / "vllm.log"
    with served(vllm_python, tiny, log, "--dtype", "float32", "--enforce-eager") as server:
        yield server


@contextmanager
def served(python: str, model: Path, log: Path, *flags: str) -> Iterator[Running]:
    """`vllm serve` on a free port, until it is healthy; ended with all that it has started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-c", LAUNCHER, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, env=server_environment(), stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not healthy(port):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield Running(f"http://127.0.0.1:{port}/v1", str(model))
    finally:
        for which in (signal.SIGTERM, signal.SIGKILL):
            if in_session(server.pid):
                os.killpg(server.pid, which)
                ended(server.pid, 10)
        server.wait(10)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def in_session(number: int) -> dict[int, str]:
    """Processes of a session that run: number -> name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text(errors="replace").rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        if fields[3] == str(number) and fields[0] != "Z":
            found[int(stat.parent.name)] = name.partition("(")[2]
    return found


def ended(session: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while in_session(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not in_session(session)
