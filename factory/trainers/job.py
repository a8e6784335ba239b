"""The training child: `python -m factory.trainers.job JOB.json`. Progress as JSON lines on stdout, the rest on stderr."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from factory.child import die_with_parent, end_with_input
from factory.errors import FactoryError
from factory.train import REFUSED
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


def main() -> None:
    die_with_parent()
    end_with_input()
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not stand between our lines
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        _train(job, Path(job["out"]), told)
    except Refused as e:
        (Path(job["out"]) / REFUSED).write_text(str(e))
        sys.exit(str(e))
    except FactoryError as e:
        sys.exit(str(e))


def _train(job: dict[str, Any], out: Path, told: Any) -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    args = {"seed": job["seed"], "output_dir": str(out / "checkpoints")} | _defaults(on_gpu) | job["args"]
    tokenizer, model = _student(job, on_gpu, args)
    notes = mend_padding(tokenizer, model)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    kept, aside = preflight(rows, tokenizer, args.get("max_length", 1024))
    if any(row.get("weight", 1.0) != 1.0 for row in kept):
        notes.append("the rows have weights, which this trainer does not use: all rows count alike")
    log: list[dict[str, Any]] = []
    trainer = TRAINERS[job["method"]](model, tokenizer, kept, args, _peft(job["lora"]), _callback(told, log))
    if len(trainer.train_dataset) != len(kept) and not args.get("packing"):
        made = len(trainer.train_dataset)
        raise Refused(f"{len(kept)} rows were to train, but TRL made {made} of them; raise args.max_length")
    first = trainer.is_world_process_zero()  # under `accelerate launch`, one process writes
    if first:
        (out / "set_aside.jsonl").write_text("".join(json.dumps(row) + "\n" for row in aside))
        (out / "preview.json").write_text(json.dumps(preview(kept, tokenizer)))
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    if not first:
        return
    _save(trainer, tokenizer, out, lora=job["lora"] is not None)
    tokens = int(max((entry.get("num_tokens", 0) for entry in trainer.state.log_history), default=0))
    facts = {
        "method": job["method"], "rows_in": len(rows), "rows_trained": len(kept),
        "rows_set_aside": {"over_length": len(aside)} if aside else {}, "tokens": tokens,
        "steps": int(trainer.state.global_step), "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1), "log": log, "notes": notes,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "args": job["args"],
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(facts, indent=2))


def _student(job: dict[str, Any], on_gpu: bool, args: dict[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and model that training starts from.

    All weights are trained in float32 (TRL computes in bfloat16 on a GPU): an update of a bfloat16 weight is mostly
    rounded away. Under LoRA they are frozen, so half of the memory will do.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = Weights.model_validate(job["weights"])
    folder = materialise(weights, Path(job["cache"]))
    automatic = torch.bfloat16 if on_gpu and job["lora"] else torch.float32
    dtype = automatic if weights.dtype == "auto" else getattr(torch, weights.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # the preflight must see these as TRL will
    if token := args.get("eos_token"):
        tokenizer.eos_token = token
    if template := args.get("chat_template_path"):
        path = Path(template)
        tokenizer.chat_template = (
            path.read_text()
            if path.is_file()
            else AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
        )
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)


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
            if logs and "loss" in logs and state.is_world_process_zero:
                entry = {"step": state.global_step, **{name: float(logs[name]) for name in LOGGED if name in logs}}
                log.append(entry)
                told.write(json.dumps({"steps": state.max_steps, **entry}) + "\n")

    return Tell()


def _save(trainer: Any, tokenizer: Any, out: Path, lora: bool) -> None:
    """A plain folder that transformers and vLLM load, whose answers end by themselves; the adapter beside it."""
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
    main()
