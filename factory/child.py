"""Child processes that load torch: what they may know of our environment, and that they end when we do."""

import ctypes
import os
import signal
import sys
import threading

PASSED_ON = {
    "PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
}  # fmt: skip
PASSED_ON_PREFIXES = ("HF_", "CUDA_", "OMP_", "MKL_", "TORCH", "PYTORCH_", "NCCL_", "TRANSFORMERS_", "LC_")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")

PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """What a child may know of our environment: where things are and how to compute, never a key."""
    return {
        name: value
        for name, value in os.environ.items()
        if (name.upper() in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)) and not name.endswith(SECRET)
    }


def die_with_parent() -> None:
    """For the child: Linux ends it as soon as its parent has ended, whatever is being computed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_input() -> None:
    """For the child, on any system: end when our input is closed. Our parent holds it open as long as it lives."""

    def listen() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would still be held when Python ends
            pass
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
