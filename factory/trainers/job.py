"""The training child: `python -m factory.trainers.job JOB.json`. Progress as JSON lines on stdout, the rest on stderr."""

import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from factory.child import die_with_parent, end_with_input, loading, own_output
from factory.errors import FactoryError
from factory.rows import kind_of
from factory.train import REFUSED
from factory.trainers.distill import gkd, gold
from factory.trainers.lineup import counted, in_order
from factory.trainers.preference import dpo, kto, orpo, simpo
from factory.trainers.preflight import Refused, fits, mend_padding, preflight, preview, refuse_what_cannot_fit
from factory.trainers.setup import Setup
from factory.trainers.sft import sft
from factory.weights import Weights, materialise, number_format

TRAINERS = {"sft": sft, "dpo": dpo, "kto": kto, "orpo": orpo, "simpo": simpo, "gkd": gkd, "gold": gold}


def main() -> None:
    die_with_parent()
    end_with_input()
    told = own_output()
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        _train(job, Path(job["out"]), told)
    except Refused as e:
        (Path(job["out"]) / REFUSED).write_text(str(e))
        sys.exit(str(e))
    except FactoryError as e:
        sys.exit(str(e))


def _train(job: dict[str, Any], out: Path, told: Any) -> None:
    with loading():
        import torch
        import trl.trainer.sft_trainer  # noqa: F401  (brings what all trainers share)

        from factory.trainers.watch import Watch, entry, last_checkpoint

    on_gpu = torch.cuda.is_available()
    args = {"seed": job["seed"], "output_dir": job["checkpoints"]} | _defaults(on_gpu) | job["args"]
    tokenizer, model = _student(job, on_gpu, args)
    peft = peft_of(job["lora"])
    refuse_what_cannot_fit(model, peft)
    notes = mend_padding(tokenizer, model)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    kept, aside = preflight(rows, tokenizer, fits(model, tokenizer, args))
    kept, unweighed = counted(kept, job["weights_of_tags"])
    aside += unweighed
    if job["order"]:
        kept, told_of_order = in_order(kept, job["order"], tokenizer)
        args["train_sampling_strategy"], notes = "sequential", notes + told_of_order
    if job["method"] != "sft" and any(row.get("weight", 1.0) != 1.0 for row in kept):
        notes.append("the rows have weights, which sft alone uses: all rows count alike")
    setup = Setup(
        model, tokenizer, kept, args, peft, Watch(told), _teacher(job, on_gpu), job["weights_of_tags"], Path(job["cache"])
    )  # fmt: skip
    trainer = TRAINERS[job["method"]](setup)
    wanted = sum(2 if job["method"] == "kto" and "chosen" in row else 1 for row in kept)
    if len(trainer.train_dataset) != wanted and not args.get("packing"):
        made = len(trainer.train_dataset)
        raise Refused(f"{wanted} rows were to train, but TRL made {made} of them; raise args.max_length")
    first = trainer.is_world_process_zero()  # under `accelerate launch`, one process writes
    if first:
        (out / "set_aside.jsonl").write_text("".join(json.dumps(row) + "\n" for row in aside))
        (out / "preview.json").write_text(json.dumps(preview(kept, tokenizer)))
    started, computed = time.monotonic(), time.process_time()
    checkpoint = last_checkpoint(Path(job["checkpoints"]))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - computed
    shared = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # then all processes give their part
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if shared else None
    if not first:
        return
    _save(trainer, tokenizer, out, weights, job)
    history = trainer.state.log_history
    tokens = next((int(logs["num_tokens"]) for logs in reversed(history) if "num_tokens" in logs), 0)
    facts = {
        "method": job["method"], "rows_in": len(rows), "rows_trained": len(kept),
        "rows_set_aside": Counter(kind_of(row["reason"]) for row in aside), "tokens": tokens,
        "steps": int(trainer.state.global_step), "resumed_at": int(checkpoint.name.split("-")[1]) if checkpoint else None,
        "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "tokens_per_second": round(tokens / seconds, 1),
        "log": [entry(logs, logs["step"]) for logs in history if "loss" in logs], "notes": notes,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "args": job["args"],
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(facts, indent=2))


def _student(job: dict[str, Any], on_gpu: bool, args: dict[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and model that training starts from.

    All weights are trained in float32 (TRL computes in bfloat16 on a GPU): an update of a bfloat16 weight is mostly
    rounded away. Under LoRA they are frozen, so half of the memory will do.
    """
    import torch
    from transformers import AutoModelForCausalLM

    weights = Weights.model_validate(job["weights"])
    folder = materialise(weights, Path(job["cache"]))
    dtype = getattr(torch, number_format(weights.dtype, on_gpu and job["lora"] is not None))
    bits = _in_4_bits(dtype) if job["lora"] and job["lora"]["load_in_4bit"] else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **bits)
    return tokenizer_of(folder, args), model


def _in_4_bits(dtype: Any) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": quantised}


def tokenizer_of(folder: Path, args: dict[str, Any]) -> Any:
    """The student's tokenizer with what `args` make of it: the preflight must see it as TRL will."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if token := args.get("eos_token"):
        tokenizer.eos_token = token
    if template := args.get("chat_template_path"):
        path = Path(template)
        tokenizer.chat_template = (
            path.read_text()
            if path.is_file()
            else AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
        )
    return tokenizer


def _teacher(job: dict[str, Any], on_gpu: bool) -> Any:
    """The local model whose distributions are learned; None for methods that need none. It is only read."""
    if job["teacher"] is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    weights = Weights.model_validate(job["teacher"])
    folder = materialise(weights, Path(job["cache"]))
    dtype = getattr(torch, number_format(weights.dtype, on_gpu))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)


def _defaults(on_gpu: bool) -> dict[str, Any]:
    """Settings under the recipe's: nothing leaves the machine, and what a CPU needs to train at all."""
    common = {
        "report_to": "none",
        "save_strategy": "no",
        "save_total_limit": 1,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    common["logging_nan_inf_filter"] = False  # it would show the last sound loss where there is none
    cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    return common if on_gpu else common | cpu


def peft_of(lora: dict[str, Any] | None) -> Any:
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


def _save(trainer: Any, tokenizer: Any, out: Path, weights: Any, job: dict[str, Any]) -> None:
    """A plain folder that transformers and vLLM load, whose answers end by themselves; the adapter beside it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if lora := job["lora"]:
        model.save_pretrained(out / "adapter")
        model = _on_whole_weights(job, out / "adapter") if lora["load_in_4bit"] else model
        model = model.merge_and_unload()
    ends = model.generation_config.eos_token_id
    all_ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config.eos_token_id = sorted(all_ends) if len(all_ends) > 1 else tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out / "model", state_dict=weights)
    tokenizer.save_pretrained(out / "model")


def _on_whole_weights(job: dict[str, Any], adapter: Path) -> Any:
    """The student as it was loaded for other trainings, with the adapter: merging into 4 bits would round it away."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = materialise(Weights.model_validate(job["weights"]), Path(job["cache"]))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    return PeftModel.from_pretrained(whole, adapter)


if __name__ == "__main__":
    main()
