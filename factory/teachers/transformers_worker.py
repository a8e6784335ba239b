"""The child process of the `transformers` teacher: one JSON line in and out per request, around one `Engine`."""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from factory.child import die_with_parent, loading, own_output, peak_memory
from factory.errors import FactoryError
from factory.rows import Request
from factory.weights import Weights, materialise

with loading():
    import torch
    from transformers.utils import logging

    from factory.teachers.transformers_engine import Engine, Line

FREE_SHARE = 0.125
"""Rows join when this share of the batch is free: a prefill of many rows costs little more than that of one."""

Inbox = queue.SimpleQueue[dict[str, Any]]


def serve(engine: Engine, inbox: Inbox) -> None:
    """Answer for ever: the process ends when the parent closes our input."""
    waiting: list[Line] = []
    while True:
        for message in _arrived(inbox, block=not (engine.rows or waiting)):
            if message["op"] == "force":
                engine.tell(message["number"], engine.forced(message["messages"], message["completion"]))
            elif message["op"] == "memory":
                engine.tell(message["number"], {"bytes": peak_memory()})
            elif line := engine.line(message["number"], msgspec.convert(message["request"], Request)):
                waiting.append(line)
        free = engine.batch_size - len(engine.rows)
        if waiting and (not engine.rows or free >= engine.batch_size * FREE_SHARE):
            count = engine.fitting(waiting)
            joining, waiting = waiting[:count], waiting[count:]
            engine.admit(joining)
        if engine.rows:
            engine.step()


def _arrived(inbox: Inbox, block: bool) -> Iterator[dict[str, Any]]:
    """What has come in. After a wait, a moment more: requests come in crowds, and a full batch is worth it."""
    if block:
        yield inbox.get()
        time.sleep(0.05)
    while not inbox.empty():
        yield inbox.get()


def _listen(inbox: Inbox) -> None:
    """Read the parent's lines; when they end, the parent has ended, and so must we, whatever we compute."""
    # not sys.stdin: its lock would still be held when Python ends
    with open(0, "rb", closefd=False) as lines:
        for raw in lines:
            inbox.put(json.loads(raw))
    os._exit(0)


def main() -> None:
    die_with_parent()
    settings = json.loads(sys.argv[1])
    out = own_output()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()

    def tell(number: int, body: dict[str, Any]) -> None:
        out.write(json.dumps({"number": number, "body": body}, allow_nan=False) + "\n")

    weights = Weights.model_validate(settings["weights"])
    try:
        folder = materialise(weights, Path(settings["cache"]))
        with torch.inference_mode():
            engine = Engine(folder, settings["name"], settings["batch_size"], settings["device"], weights.dtype, tell)
            tell(0, {"ready": True})
            serve(engine, inbox)
    except FactoryError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
