"""How a trainer is started: in one process, or in several through `accelerate launch`."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from factory.errors import RecipeError
from factory.knobs import Knobs

JOB = ["-m", "factory.trainers.job"]
CONFIG = "accelerate.yaml"


class Parallel(Knobs):
    """`parallel:` several processes, one per visible GPU, or `processes` of them; without a GPU they compute on processors.

    `by: ddp` has the whole model in each, `fsdp` and `deepspeed` (ZeRO 3) share weights, gradients and optimizer out.
    """

    by: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    processes: int | None = Field(None, ge=2)


def command(parallel: Parallel | None, out: Path) -> list[str]:
    """What starts the trainer, to be followed by its job; the configuration that it names is written to `out`.

    Without `parallel`, several visible GPUs are used as your own `accelerate config` says.
    """
    gpus = _gpus()
    processes = gpus if parallel is None else parallel.processes or gpus
    if processes < 2:
        return [sys.executable, *JOB]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if parallel is None:
        return [*launch, "--num_processes", str(processes), *JOB]
    if gpus and processes > gpus:
        raise RecipeError(f"parallel: {processes} processes, but {gpus} GPUs are visible; lower parallel.processes")
    if not gpus and parallel.by != "ddp":
        raise RecipeError(f"parallel: {parallel.by} shares a model out over GPUs, and none is visible; use by: ddp")
    if parallel.by == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError("parallel: deepspeed is not installed; `pip install deepspeed`, or use by: fsdp")
    config = out / CONFIG
    config.write_text(yaml.safe_dump(configuration(parallel.by, processes, on_gpu=gpus > 0), sort_keys=False))
    return [*launch, "--config_file", str(config.resolve()), *JOB]


def configuration(by: str, processes: int, on_gpu: bool) -> dict[str, Any]:
    """A configuration of accelerate for one machine."""
    # with use_cpu, MULTI_GPU is several processors
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
    common = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": kinds[by], "num_machines": 1, "machine_rank": 0,
        "num_processes": processes, "mixed_precision": "bf16" if on_gpu else "no", "use_cpu": not on_gpu,
        "main_process_port": 0,
    }  # fmt: skip
    if by == "fsdp":
        common["fsdp_config"] = {
            "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_offload_params": False, "fsdp_cpu_ram_efficient_loading": False,
        }  # fmt: skip
    if by == "deepspeed":
        common["deepspeed_config"] = {
            "zero_stage": 3, "zero3_init_flag": False, "zero3_save_16bit_model": True, "offload_optimizer_device": "none",
            "offload_param_device": "none",
        }  # fmt: skip
    return common


def _gpus() -> int:
    """GPUs that a child would see, without loading torch here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
