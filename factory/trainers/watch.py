"""What looks after a training while it runs: it is told of, saved by the clock, and ended where it diverges.

A checkpoint is of use when it is whole: TRL writes `trainer_state.json` last. Going on from one gives the weights that an
undisturbed training gives: optimizer, schedule, random numbers and the place in the data are all in it.
"""

import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from factory.trainers.preflight import Refused

SAVE_EVERY_S = 300.0
"""What a kill can cost at most; a training that is shorter writes no checkpoint at all."""
WINDOW = 10
"""Logged losses that are looked at together: single ones jump."""
RISEN = 2.0
"""A loss that is so many times what it was at first, and half a nat more, will not come back."""
LOGGED = (
    "loss", "learning_rate", "grad_norm", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected",
)  # fmt: skip


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; halves that a kill has left are removed."""
    newest = None
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_bytes())
            newest = path
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return newest


def entry(logs: dict[str, Any], step: int) -> dict[str, Any]:
    """Of what TRL logs, what is kept for the report."""
    names = [*LOGGED, *(name for name in logs if name.startswith("loss/"))]  # those of tasks
    return {"step": step, **{name: float(logs[name]) for name in names if name in logs}}


class Watch(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Passes each loss on to the parent (JSON lines), asks for checkpoints, and stops what goes wrong (`Refused`)."""

    def __init__(self, told: Any) -> None:
        self.told = told
        self.losses: list[float] = []
        self._saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.losses = [logs["loss"] for logs in state.log_history if "loss" in logs]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if _together(args, time.monotonic() - self._saved >= SAVE_EVERY_S) and state.global_step < state.max_steps:
            control.should_save = True
            self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if state.is_world_process_zero:
            self.told.write(json.dumps({"steps": state.max_steps, **entry(logs, state.global_step)}) + "\n")
        self.losses.append(float(logs["loss"]))
        # rows may get harder: the last are no measure of the first
        in_order = args.train_sampling_strategy == "sequential"
        if why := diverges(self.losses[-1:] if in_order else self.losses):
            shutil.rmtree(args.output_dir, ignore_errors=True)  # to go on from there would end the same way
            raise Refused(
                f"it diverges: {why} at step {state.global_step}; lower args.learning_rate (now {args.learning_rate:g}), "
                "raise args.warmup_steps, or look for odd rows in the data"
            )


def diverges(losses: list[float]) -> str | None:
    """What is wrong with a curve, as far as it goes."""
    if not math.isfinite(losses[-1]):
        return "the loss is no number"
    if len(losses) < 2 * WINDOW:
        return None
    first, last = statistics.median(losses[:WINDOW]), statistics.median(losses[-WINDOW:])
    return f"the loss rises ({first:.3g} at first, {last:.3g} now)" if last > max(RISEN * first, first + 0.5) else None


def _together(args: Any, mine: bool) -> bool:
    """The first process decides for all of them: they save together, and clocks differ."""
    if args.world_size == 1:
        return mine
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([mine])[0])
