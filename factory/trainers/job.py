"""The training child: `python -m factory.trainers.job JOB.json`. Progress as JSON lines on stdout, the rest on stderr."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from factory.train import REFUSED, die_with_parent
from factory.trainers.preference import dpo
from factory.trainers.preflight import Refused, mend_padding, preflight, preview
from factory.trainers.sft import sft
from factory.weights import Weights, materialise

TRAINERS = {"sft": sft, "dpo": dpo}
LOGGED = (
    "loss",
    "learning_rate",
    "grad_norm",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
)


def main() -> int:
    die_with_parent()
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not stand between our lines
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    try:
        _train(job, out, told)
    except Refused as e:
        (out / "refused.txt").write_text(str(e))
        return REFUSED
    return 0


def _train(job: dict[str, Any], out: Path, told: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = materialise(Weights.model_validate(job["weights"]), Path(job["cache"]))
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    notes = mend_padding(tokenizer, model)
    args = _defaults(on_gpu) | job["args"]
    args = {"seed": job["seed"], "output_dir": str(out / "checkpoints")} | args
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    kept, aside = preflight(rows, tokenizer, args.get("max_length", 1024))
    (out / "set_aside.jsonl").write_text("".join(json.dumps(row) + "\n" for row in aside))
    (out / "preview.json").write_text(json.dumps(preview(kept, tokenizer)))
    log: list[dict[str, Any]] = []
    trainer = TRAINERS[job["method"]](model, tokenizer, kept, args, _peft(job["lora"]), _callback(told, log))
    if len(trainer.train_dataset) != len(kept) and not args.get("packing"):
        raise Refused(
            f"{len(kept)} rows were to train, but TRL kept {len(trainer.train_dataset)}; raise args.max_length"
        )
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    _save(trainer, tokenizer, out, lora=job["lora"] is not None)
    tokens = int(trainer.state.num_input_tokens_seen) or sum(
        entry.get("num_tokens", 0) for entry in trainer.state.log_history[-2:-1]
    )
    facts = {
        "method": job["method"], "rows_in": len(rows), "rows_trained": len(kept),
        "rows_set_aside": {"over_length": len(aside)} if aside else {}, "tokens": int(tokens),
        "steps": int(trainer.state.global_step), "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1), "log": log, "notes": notes,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "args": job["args"],
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(facts, indent=2))


def _defaults(on_gpu: bool) -> dict[str, Any]:
    """Settings under the recipe's: nothing leaves the machine, and what a CPU needs to train at all."""
    common = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    return common if on_gpu else common | cpu


def _peft(lora: dict[str, Any] | None) -> Any:
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        task_type="CAUSAL_LM",
    )


def _callback(told: Any, log: list[dict[str, Any]]) -> Any:
    from transformers import TrainerCallback

    class Tell(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Passes each log entry on to the parent, and keeps it for the report."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                entry = {"step": state.global_step, **{name: float(logs[name]) for name in LOGGED if name in logs}}
                log.append(entry)
                told.write(json.dumps({"steps": state.max_steps, **entry}) + "\n")

    return Tell()


def _save(trainer: Any, tokenizer: Any, out: Path, lora: bool) -> None:
    """A plain folder that transformers and vLLM load, whose answers end by themselves; the adapter beside it."""
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if lora:
        model.save_pretrained(out / "adapter")
        model = model.merge_and_unload()
    ends = model.generation_config.eos_token_id
    all_ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config.eos_token_id = sorted(all_ends) if len(all_ends) > 1 else tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


if __name__ == "__main__":
    sys.exit(main())
