"""Keeps one vLLM server: a small process between the factory and the server, so that no part of it outlives its use.

Its arguments are the server's command. It ends the server with all engine processes as soon as its own input closes:
when the factory is done with it, and also when the factory is killed, however that happens. It does the same when the
server's first process ends by itself, for vLLM's engine outlives that one when it is killed (measured with 0.32).

Run as a script, with the standard library alone: it must start at once and need nothing.
"""

import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 5.0
"""How long the server may take to end when it is asked to; some ways of dying make vLLM hang instead."""


def main() -> int:
    # a handler, as a child would inherit an ignored signal
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0)
    while server.poll() is None and not select.select([sys.stdin], [], [], 0.2)[0]:
        pass
    end(server)
    code = server.wait()
    return code if code >= 0 else 128 - code


def end(server: "subprocess.Popen[bytes]") -> None:
    """Ask the server's whole process group to end, then make it."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        try:
            os.killpg(server.pid, which)
            while time.monotonic() < deadline:
                server.poll()  # a child that is not waited for counts as a member for ever
                os.killpg(server.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return  # nobody is left


if __name__ == "__main__":
    sys.exit(main())
