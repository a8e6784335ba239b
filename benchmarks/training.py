"""Training through the factory beside a bare TRL script with the same settings, and what must be exact in it.

Exact: planted faults are refused, DPO starts at ln 2, reference log-probabilities computed before are those computed on the
way, packed rows give the loss of the same rows apart, a killed training comes to the weights of an undisturbed one. The
model is the first --layers of SmolLM2-135M (4 of 30: a full run ends in 15 minutes on one quiet core); with --small a random one of
0.2 M parameters, which says nothing of speed.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._figures import Figure, child, environment, judged, main
from benchmarks.local import WEIGHTS

SETTINGS = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-4, "max_length": 512, "num_train_epochs": 1, "logging_steps": 1,
}  # fmt: skip
CPU = {
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "dataloader_pin_memory": False, "seed": 1,
}  # fmt: skip
WORDS = "the sky is blue and the grass is green because it is warm answer yes no colour of thing number what"


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    folder, full = arguments.folder, not arguments.small
    model = _model(folder, arguments.layers)
    yield from _exact(folder, model)
    if full:
        for method in ("sft", "dpo"):
            yield from _beside_trl(folder / method, model, method, arguments)
        yield from _without_padding(folder / "padding", model, arguments)
        yield from _killed(folder / "killed")


def _model(folder: Path, layers: int) -> Path:
    from factory.weights import Weights, materialise_in_child
    from tests.tiny import tiny_model

    if not layers:
        return tiny_model(folder / "tiny")
    return materialise_in_child(Weights(model=str(WEIGHTS), layers={"first": layers}), folder / "weights")


def _rows(count: int, method: str, words: tuple[int, int]) -> list[dict[str, Any]]:
    draw = random.Random(count)

    def said(role: str, low: int, high: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(draw.choices(WORDS.split(), k=draw.randint(low, high)))}]

    rows = []
    for i in range(count):
        row: dict[str, Any] = {"id": str(i), "prompt": said("user", 5, 15)}
        sides = ("chosen", "rejected") if method == "dpo" else ("completion",)
        rows.append(row | {side: said("assistant", *words) for side in sides})
    return rows


# -- what is exact -----------------------------------------------------------------------------------------------------


def _exact(folder: Path, model: Path) -> Iterator[Figure]:
    told = _run(
        "exact", {"model": str(model), "rows": _rows(16, "dpo", (10, 60)), "out": str(folder / "exact")}, folder
    )
    yield Figure("training.planted_faults", told["planted"])
    yield judged("training.planted_faults_missed", told["planted"] - told["caught"], "== 0")
    yield judged("training.dpo_loss_at_step_0_beside_ln_2", abs(told["live"][0] - math.log(2)), "<= 0.0001")
    yield judged("training.dpo_margin_at_step_0", abs(told["margin"]), "== 0")
    apart = max(abs(a - b) for a, b in zip(told["live"], told["precomputed"], strict=True))
    yield judged("training.dpo_loss_precomputed_beside_live", apart, "<= 0.0001")
    yield judged("training.packed_loss_beside_unpacked", abs(told["packed"] - told["unpacked"]), "<= 0.0001")


def _killed(folder: Path) -> Iterator[Figure]:
    """Killed at its third checkpoint, then started again; the other one undisturbed."""
    from tests.tiny import tiny_model

    folder.mkdir()
    base = tiny_model(folder / "base")
    rows = _rows(12, "sft", (5, 20))
    command = [sys.executable, "-m", "benchmarks.training", "train"]
    job = {
        "model": str(base),
        "rows": rows,
        "args": SETTINGS | {"num_train_epochs": 10, "save_strategy": "steps", "save_steps": 7},
    }
    for name in ("cut", "whole"):
        (folder / f"{name}.json").write_text(json.dumps(job | {"out": str(folder / name)}))
    with subprocess.Popen([*command, str(folder / "cut.json"), str(folder / "cut.out")], env=environment(2)) as running:
        while running.poll() is None and not (folder / "cut/going/checkpoint-21").exists():
            time.sleep(0.01)
        running.kill()
    for name in ("cut", "whole"):
        assert (
            child("benchmarks.training", "train", folder / f"{name}.json", folder / f"{name}.out", threads=2).exit_code
            == 0
        )
    resumed = json.loads((folder / "cut.out").read_text())["resumed_at"]
    same = [(folder / name / "model/model.safetensors").read_bytes() for name in ("cut", "whole")]
    yield Figure("training.resumed_at_step", resumed)
    yield judged("training.weights_that_differ_after_a_kill", int(same[0] != same[1] or not resumed), "== 0")


# -- speed -------------------------------------------------------------------------------------------------------------


def _beside_trl(folder: Path, model: Path, method: str, a: argparse.Namespace) -> Iterator[Figure]:
    """The same tokens, so that tokens a second are to each other as the seconds are."""
    folder.mkdir()
    rows = _rows(a.rows, method, (20, 120))
    job = {"model": str(model), "rows": rows, "args": SETTINGS, "method": method}
    took: dict[str, list[dict[str, Any]]] = {"train": [], "bare": []}
    for pair in range(a.pairs):
        for name, results in took.items():
            results.append(_run(name, job | {"out": str(folder / f"{name}{pair}")}, folder))
    tokens = took["train"][0]["tokens"]
    for name, beside in (("train", ""), ("bare", "_of_bare_trl")):
        seconds = statistics.median(told["seconds"] for told in took[name])
        yield Figure(f"training.{method}_tokens_per_second{beside}", round(tokens / seconds, 1))
    for clock, unit in (("cpu_seconds", "processor_time"), ("seconds", "speed")):
        ratios = sorted(bare[clock] / ours[clock] for ours, bare in zip(took["train"], took["bare"], strict=True))
        yield Figure(f"training.{method}_{unit}_ratio_to_bare_trl", round(statistics.median(ratios), 4))
        yield Figure(f"training.{method}_{unit}_ratio_interval_low", round(ratios[0], 4))
    # of five pairs, the lowest and the highest are the median's 94 % interval (order statistics); its upper end decides:
    # the machine is noisy, and there is nothing that could make it faster than bare
    yield judged(f"training.{method}_speed_ratio_interval_high", ratios[-1], ">= 0.98")


SHORT: dict[str, dict[str, Any]] = {"padded": {}, "grouped": {"train_sampling_strategy": "group_by_length"}}


def _without_padding(folder: Path, model: Path, a: argparse.Namespace) -> Iterator[Figure]:
    """Rows of 60 to 200 tokens through the factory: batches of like length beside batches as they come, as many rows in each.

    Judged by processor time on one core: padding costs computing, and other work on the machine does not count.
    """
    folder.mkdir()
    rows, held_out = _rows(a.rows, "sft", (25, 160)), _rows(16, "sft", (26, 159))
    took: dict[str, list[dict[str, Any]]] = {name: [] for name in SHORT}
    for pair in range(a.pairs):
        for name, args in SHORT.items():
            job = {"model": str(model), "rows": rows, "args": SETTINGS | args, "out": str(folder / f"{name}{pair}")}
            took[name].append(_run("train", job, folder))
    job = {"model": str(model), "rows": rows, "held_out": held_out, "out": str(folder / "looked")}
    told = _run("looked", job | {"students": {name: str(folder / f"{name}0/model") for name in SHORT}}, folder)
    gains = {
        clock: statistics.median(p[clock] / g[clock] for p, g in zip(took["padded"], took["grouped"], strict=True))
        for clock in ("seconds", "cpu_seconds")
    }
    yield Figure("training.shortest_row_tokens", told["lengths"][0])
    yield Figure("training.longest_row_tokens", told["lengths"][-1])
    yield Figure("training.gain_if_no_padding_were_left", round(told["padding"], 4))
    yield Figure("training.gain_of_length_groups", round(gains["seconds"], 4))
    yield Figure("training.gain_of_length_groups_in_processor_time", round(gains["cpu_seconds"], 4))
    yield judged("training.share_of_the_possible_gain", gains["cpu_seconds"] / told["padding"], ">= 0.9")
    yield judged(
        "training.held_out_loss_ratio_off_1", abs(told["losses"]["grouped"] / told["losses"]["padded"] - 1), "<= 0.01"
    )


# -- in processes of their own -----------------------------------------------------------------------------------------


def _run(name: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    path, out = folder / "job.json", folder / "out.json"
    path.write_text(json.dumps(job))
    assert child("benchmarks.training", name, path, out).exit_code == 0, name
    told: dict[str, Any] = json.loads(out.read_text())
    return told


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """As a recipe's train stage does it."""
    from factory.train import Train, train
    from factory.weights import Weights

    out = Path(job["out"])
    out.mkdir(exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in job["rows"]))
    knobs = Train(method=job.get("method", "sft"), student="base", args=job["args"])
    return train(
        knobs, weights_entry=Weights(model=job["model"]), rows=out / "rows.jsonl", out=out, cache=out,
        checkpoints=out / "going", seed=1, on_progress=lambda _: None,
    )  # fmt: skip


def _bare(job: dict[str, Any]) -> dict[str, Any]:
    """As a script of a few lines does it."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    config, trainer_class = (DPOConfig, DPOTrainer) if job["method"] == "dpo" else (SFTConfig, SFTTrainer)
    columns = ("prompt", "chosen", "rejected") if job["method"] == "dpo" else ("prompt", "completion")
    data = Dataset.from_list([{column: row[column] for column in columns} for row in job["rows"]])
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"), train_dataset=data,
        args=config(output_dir=job["out"], **CPU, **job["args"]), processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )  # fmt: skip
    started, computed = time.monotonic(), time.process_time()
    trainer.train()
    return {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - computed}


def _looked(job: dict[str, Any]) -> dict[str, Any]:
    """What padding the batches have as they come, and the held-out loss of each student."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from factory.trainers.preflight import tokenise

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lengths = [len(tokenise(row["prompt"], row["completion"], tokenizer).ids) for row in job["rows"]]
    draw, size, shown = random.Random(0), SETTINGS["per_device_train_batch_size"], 0
    for _ in range(200):  # the mean over orders
        draw.shuffle(lengths)
        shown += sum(max(lengths[i : i + size]) * len(lengths[i : i + size]) for i in range(0, len(lengths), size))
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype="float32") for name, path in job["students"].items()
    }
    losses = {
        name: _evaluated(job["model"], job["held_out"], model, job["out"], packed=False)
        for name, model in models.items()
    }
    return {"padding": shown / 200 / sum(lengths), "lengths": sorted(lengths), "losses": losses}


def _evaluated(folder: str, rows: list[dict[str, Any]], model: Any, out: str, packed: bool) -> float:
    """The mean loss per token of all rows, in one batch."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    side = "completion" if "completion" in rows[0] else "chosen"
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row[side]} for row in rows])
    args = SFTConfig(output_dir=out, **CPU, max_length=512, packing=packed, per_device_eval_batch_size=len(rows))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    assert (len(trainer.eval_dataset) < len(rows)) == packed
    return float(trainer.evaluate()["eval_loss"])


def _exactly(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    told: dict[str, Any] = {}
    for name, args in (("live", {}), ("precomputed", {"precompute_ref_log_probs": True})):
        done = _train(job | {"method": "dpo", "args": SETTINGS | args, "out": f"{job['out']}-{name}"})
        told[name] = [entry["loss"] for entry in done["log"]]
        told["margin"] = done["log"][0]["rewards/margins"]
    for packed in (True, False):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
        told["packed" if packed else "unpacked"] = _evaluated(job["model"], job["rows"], model, job["out"], packed)
    return told | _caught(Path(job["out"]))


def _caught(folder: Path) -> dict[str, Any]:
    import re

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from factory.trainers.preflight import Refused, fits, preflight
    from tests.planted import FAULTS
    from tests.tiny import tiny_model

    caught = 0
    tiny_model(folder)
    for fault in FAULTS:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        for name, value in fault.tokenizer.items():
            setattr(tokenizer, name, value)
        if fault.embeddings:
            model.resize_token_embeddings(fault.embeddings)
        try:
            preflight([fault.row], tokenizer, fits(model, tokenizer, fault.args))
        except Refused as e:
            caught += re.search(fault.told, str(e)) is not None
    return {"planted": len(FAULTS), "caught": caught}


PROGRAMS = {"train": _train, "bare": _bare, "exact": _exactly, "looked": _looked}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in PROGRAMS:
        Path(sys.argv[3]).write_text(json.dumps(PROGRAMS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
    else:
        main(__doc__, measure, rows=(16, 8), pairs=(5, 1), layers=(4, 0))
