"""Stage `train`: a trainer in a process of its own, so that memory is surely free before it and given back after it.

What a recipe says under `args` are TRL's names, unchanged, checked against the TRL that is installed by reading its
source: importing it would cost ten seconds and a gigabyte before the first mistake is told.
"""

import ast
import difflib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from factory.child import child_environment
from factory.errors import DiskError, EngineError, RecipeError
from factory.knobs import Knobs
from factory.launch import JOB, Parallel, command
from factory.progress import say
from factory.weights import Weights

OURS = {"output_dir"}
"""Arguments that the factory sets itself."""

RENAMED = {
    "max_seq_length": "max_length",
    "max_prompt_length": "max_length (it covers prompt and completion)",
    "max_completion_length": "max_length (it covers prompt and completion)",
    "warmup_ratio": "warmup_steps (a value below 1 is a ratio)",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "no_cuda": "use_cpu",
    "tokenizer": "nothing: the student brings its own",
    "overwrite_output_dir": "nothing: it is gone",
    "save_safetensors": "nothing: weights are always saved so",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}


class Method(NamedTuple):
    """A way to learn: TRL's config class and its file, what kinds of rows it reads, whether it needs a local teacher."""

    config: str
    file: str
    reads: tuple[Literal["rows", "pairs", "unpaired rows"], ...]
    teacher: bool = False


METHODS = {
    "sft": Method("SFTConfig", "trainer/sft_config.py", ("rows",)),
    "gkd": Method("GKDConfig", "experimental/gkd/gkd_config.py", ("rows",), teacher=True),
    "gold": Method("GOLDConfig", "experimental/gold/gold_config.py", ("rows",), teacher=True),
    "dpo": Method("DPOConfig", "trainer/dpo_config.py", ("pairs",)),
    "kto": Method("KTOConfig", "trainer/kto_config.py", ("pairs", "unpaired rows")),
    "orpo": Method("ORPOConfig", "experimental/orpo/orpo_config.py", ("pairs",)),
    "simpo": Method("CPOConfig", "experimental/cpo/cpo_config.py", ("pairs",)),
}

REFUSED = "refused.txt"
"""Where the child says why, when the preflight refuses the rows: `accelerate launch` keeps exit codes to itself."""


class Lora(Knobs):
    """LoRA on all linear layers; the trained adapter is merged into the student.

    `load_in_4bit`: the frozen weights in 4 bits while it trains (QLoRA, Dettmers et al. 2023: NF4, double quantisation); the
    adapter is merged into the weights as they were.
    """

    r: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    load_in_4bit: bool = False

    @field_validator("load_in_4bit")
    @classmethod
    def _can_be_loaded(cls, wanted: bool) -> bool:
        """Known before anything is sent."""
        if wanted and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("weights in 4 bits need bitsandbytes: pip install 'distillation-factory[quantised]'")
        return wanted


NUMBERS = {
    "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_length", "warmup_steps", "weight_decay", "beta",
}  # fmt: skip
"""Arguments that people set by hand most: what is wrong with them is told before anything is asked."""


Weight: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Train(Knobs):
    """`train:`; `student` is a model or an earlier student, `as` names the new one, `args` are TRL's.

    `teacher`, for gkd and gold, is a local model whose distributions are learned. `weights`, for sft, are those of tags:
    a row counts as if it stood there so many times. `order` trains the rows in the order of a score, of their `length`, or
    as `given`, instead of shuffling them; the lowest first, or with `-` before it the highest. Weights in `from` are those of
    the inputs' own mean losses.
    """

    kind: Literal["train"] = "train"
    method: Literal["sft", "gkd", "gold", "dpo", "kto", "orpo", "simpo"]
    student: str
    teacher: str | None = None
    as_: str = Field("student", alias="as")
    from_: str | list[str] | dict[str, Weight] | None = Field(None, alias="from")
    weights: dict[str, Weight] = {}
    order: str | None = Field(None, min_length=1)
    args: dict[str, Any] = {}
    lora: Lora | None = None
    parallel: Parallel | None = None

    @model_validator(mode="after")
    def _whole_weights_under_adapters(self) -> Self:
        if self.lora is not None and self.parallel is not None and self.parallel.by != "ddp":
            raise ValueError(
                f"parallel: adapters are merged into whole weights, {self.parallel.by} shares them; use by: ddp"
            )
        return self

    @model_validator(mode="after")
    def _weights_where_they_count(self) -> Self:
        for key, there in (("weights", self.weights), ("from", isinstance(self.from_, dict))):
            if there and self.method != "sft":
                raise ValueError(f"{key}: {self.method} counts all rows alike; weights are for sft")
        return self

    @model_validator(mode="after")
    def _order_that_is_kept(self) -> Self:
        if self.order is None:
            return self
        if self.method == "gold":
            raise ValueError("order: gold draws its batches by itself; remove order:")
        for name in ("packing", "shuffle_dataset", "train_sampling_strategy"):
            if self.args.get(name):
                raise ValueError(f"order: args.{name} puts rows into an order of its own; remove one of the two")
        return self

    @model_validator(mode="after")
    def _teacher_where_one_teaches(self) -> Self:
        if METHODS[self.method].teacher and self.teacher is None:
            raise ValueError(f"{self.method} learns a local teacher's distributions: name a model with teacher:")
        if self.teacher is not None and not METHODS[self.method].teacher:
            raise ValueError(f"{self.method} has no teacher, it learns from rows alone: remove teacher:")
        return self


def check_args(method: str, args: dict[str, Any]) -> list[str]:
    """What is wrong with the names under `args`; nothing can be told where TRL is not installed."""
    known = _fields(method)
    problems = []
    for name in args:
        if name in OURS:
            problems.append(f"args.{name} is set by the factory; remove it")
        elif known and name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
            use = RENAMED.get(name) or (near[0] if near else None)
            problems.append(
                f"args.{name} is not an argument of TRL's {method} trainer" + (f"; use {use}" if use else "")
            )
        elif name in NUMBERS and (isinstance(args[name], bool) or not isinstance(args[name], int | float)):
            problems.append(f"args.{name} is a number, not {args[name]!r}")
    if not problems and args.get("num_train_epochs", 1) <= 0 >= args.get("max_steps", -1):
        problems.append("args.num_train_epochs: no step would be taken; make it more than 0, or set max_steps")
    return problems


@lru_cache(maxsize=4)
def _fields(method: str) -> frozenset[str]:
    """Field names of a method's TRL config class and of its parents, read from the source."""
    trl, transformers = importlib.util.find_spec("trl"), importlib.util.find_spec("transformers")
    if trl is None or transformers is None or not trl.origin or not transformers.origin:
        return frozenset()
    ours, base = Path(trl.origin).parent, Path(transformers.origin).parent
    kind = METHODS[method]
    files = [ours / kind.file, ours / "trainer/base_config.py", base / "training_args.py"]
    wanted = {kind.config, "_BaseConfig", "TrainingArguments"}
    if kind.teacher:  # these extend supervised training
        files.append(ours / METHODS["sft"].file)
        wanted.add(METHODS["sft"].config)
    names: set[str] = set()
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in wanted:
                fields = (n.target for n in node.body if isinstance(n, ast.AnnAssign))
                names |= {target.id for target in fields if isinstance(target, ast.Name)}
    return frozenset(name for name in names if not name.startswith("_"))


def train(
    knobs: Train, *, weights_entry: Weights, teacher: Weights | None = None, rows: Path, out: Path, cache: Path,
    checkpoints: Path, seed: int, on_progress: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """Train on a JSONL file of what the method reads, `TrainRow` or `Pair`; `out/model` is the student. Returns `training.json`.

    Goes on from the last checkpoint of a training that was killed, if `checkpoints` has one. They are removed at the end,
    except where the recipe asks for some (`args.save_strategy`): then they are in `out/checkpoints`.

    Raises RecipeError when the preflight refuses the rows, EngineError when training fails.
    """
    job = {
        "method": knobs.method, "weights": weights_entry.alone(), "teacher": teacher.alone() if teacher else None,
        "cache": str(cache.resolve()), "rows": str(rows.resolve()),
        "out": str(out.resolve()), "checkpoints": str(checkpoints.resolve()), "args": knobs.args, "seed": seed,
        "weights_of_tags": knobs.weights, "order": knobs.order,
        "lora": knobs.lora.model_dump() if knobs.lora else None,
    }  # fmt: skip
    (out / "job.json").write_text(json.dumps(job, indent=2))
    log = out / "train.log"
    started = [*command(knobs.parallel, out), str((out / "job.json").resolve())]
    if started[1:3] != JOB:  # several processes
        say(f"  {shlex.join(started)}")
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            env=child_environment() | _trackers() | SILENCE, start_new_session=True,
        ) as child,
    ):  # fmt: skip
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if line.startswith(b"{"):
                    on_progress(json.loads(line))
            code = child.wait()  # its input stays open until then: the end of it would end the child
        finally:
            child.kill()  # of use only when we are stopped ourselves
    if (out / REFUSED).exists():
        raise RecipeError(f"train {knobs.as_}: {(out / REFUSED).read_text()}")
    if code != 0:
        words = _last_words(log)
        full = "No space left on device" in words  # as Python and as safetensors say it
        error = DiskError if full else EngineError
        raise error(f"train {knobs.as_}: the trainer ended with exit {code}: {words}" + "; free some space" * full)
    if "save_strategy" in knobs.args and checkpoints.is_dir():
        checkpoints.rename(out / "checkpoints")
    shutil.rmtree(checkpoints, ignore_errors=True)
    told: dict[str, Any] = json.loads((out / "training.json").read_text())
    return told


SILENCE = {"TRL_EXPERIMENTAL_SILENCE": "1"}
"""Where TRL's experimental trainers are used the README says so."""


def _trackers() -> dict[str, str]:
    """Settings of experiment trackers: `report_to` passes through, and only reports where the recipe says so."""
    return {k: v for k, v in os.environ.items() if k.startswith(("WANDB_", "TRACKIO_", "MLFLOW_", "ACCELERATE_"))}


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "it printed nothing"
