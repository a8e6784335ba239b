"""What a model takes: parameters and bytes of a local one, speed, and the price of an answer."""

import json
import math
from pathlib import Path
from typing import Any

from factory.tally import Tally
from factory.teachers.entry import Price

FACTS = {
    "parameters": "numbers in its weights files; tied ones count once",
    "bytes": "size of its weights files",
    "peak_memory": "most bytes that the process of a local model has held while it answered, with torch and all (and the "
    "device's, where there is one), at the recipe's batch_size; not known of endpoints",
    "tokens_per_second": "tokens of the answers that were asked for now / time: computing time of a local model in batches, else "
    "time on the clock at the recipe's concurrency",
    "usd_per_answer": "cost of the answers that were asked for now / their number",
}


def weights_size(folder: Path) -> dict[str, Any]:
    """Parameters and bytes of the .safetensors files of a model, from their headers: the shapes stand there as JSON
    behind eight bytes of length."""
    parameters = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        size += path.stat().st_size
        parameters += sum(math.prod(told["shape"]) for name, told in header.items() if name != "__metadata__")
    return {"parameters": parameters, "bytes": size}


def speed_and_price(tally: Tally, clock_s: float, price: Price | None) -> dict[str, Any]:
    """From what was asked for now: answers that were stored before tell neither. `clock_s` counts where no computing time
    is told; 0 where it would mean nothing."""
    answers = tally.planned - tally.reused - len(tally.failures)
    seconds = tally.usage.seconds or clock_s
    found: dict[str, Any] = {}
    if not tally.sent or answers <= 0:
        return found
    if tally.usage.completion_tokens and seconds:
        found["tokens_per_second"] = tally.usage.completion_tokens / seconds
    if price is not None:
        found["usd_per_answer"] = float(tally.usd) / answers
    return found
