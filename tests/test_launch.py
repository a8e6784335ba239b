"""Trainings in several processes, and what is kept for the next training."""

import io
from pathlib import Path
from typing import Any

import pytest

from factory import launch
from factory.errors import RecipeError
from factory.launch import Parallel
from factory.train import Train
from tests.planted import pair
from tests.test_train import Ran
from tests.test_weighted import mixed
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def test_two_processes_come_to_the_student_of_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights, half of the rows in each: the same losses, of tasks too, and the same weights."""
    from safetensors.torch import load_file

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    args = {"max_length": 128, "learning_rate": 0.01, "num_train_epochs": 2}
    knobs: dict[str, Any] = {"method": "sft", "order": "given"}
    rows = mixed()[:8]
    one = Ran(tmp_path / "one", folder, rows, args=args | {"per_device_train_batch_size": 4}, **knobs)
    two = Ran(
        tmp_path / "two",
        folder,
        rows,
        args=args | {"per_device_train_batch_size": 2},
        parallel={"processes": 2},
        **knobs,
    )
    alone, together = one.run(), two.run()
    assert "-m accelerate.commands.launch --config_file" in capsys.readouterr().err
    assert (alone["steps"], together["steps"]) == (4, 4)
    for ours, theirs in zip(together["log"], alone["log"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    students = [load_file(job.out / "model/model.safetensors") for job in (one, two)]
    assert all(students[0][key].allclose(students[1][key], atol=1e-5) for key in students[0])


@pytest.mark.parametrize("by", ["ddp", "fsdp", "deepspeed"])
def test_the_written_configuration_is_one_of_accelerates(tmp_path: Path, by: str) -> None:
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    told = launch.configuration(by, 4, on_gpu=True)
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(told))
    read = load_config_from_file(str(tmp_path / "accelerate.yaml"))
    assert read.distributed_type == {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}[by]
    assert (read.num_processes, read.mixed_precision, read.use_cpu) == (4, "bf16", False)


@pytest.mark.parametrize("by", ["ddp", "fsdp"])
def test_accelerates_launcher_takes_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: Any) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    _, _, _, *arguments = launch.command(Parallel(by=by), tmp_path)
    read, _, _ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "job.json"]))
    assert (read.num_processes, read.use_fsdp, read.training_script_args) == (3, by == "fsdp", ["job.json"])
    assert not read.use_fsdp or (str(read.fsdp_version), read.fsdp_state_dict_type) == ("2", "FULL_STATE_DICT")


@pytest.mark.parametrize(
    ("visible", "parallel", "told"),
    [
        ("0,1", {"processes": 3}, "3 processes, but 2 GPUs are visible"),
        ("", {"by": "fsdp", "processes": 2}, "fsdp shares a model out over GPUs, and none is visible"),
        ("0,1", {"by": "deepspeed"}, "deepspeed is not installed"),
    ],
)
def test_what_this_machine_cannot_do_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, parallel: dict[str, Any], told: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(RecipeError, match=told):
        launch.command(Parallel.model_validate(parallel), tmp_path)


def test_adapters_are_not_shared_out() -> None:
    with pytest.raises(ValueError, match="adapters are merged into whole weights, fsdp shares them"):
        Train.model_validate({"method": "sft", "student": "base", "lora": {}, "parallel": {"by": "fsdp"}})


# -- the reference of DPO ----------------------------------------------------------------------------------------------------


def references(folder: Path) -> dict[Path, int]:
    """Files with the reference's log-probabilities, and when they were written."""
    from datasets import Dataset

    found = [
        path for path in folder.rglob("*.arrow") if "ref_chosen_logps" in Dataset.from_file(str(path)).column_names
    ]
    return {path: path.stat().st_mtime_ns for path in found}


def test_reference_log_probabilities_are_computed_once_for_all_trainings(folder: Path, tmp_path: Path) -> None:
    """In another process too, and with another beta; other pairs have their own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from factory.trainers.job import _defaults
    from factory.trainers.preference import dpo
    from factory.trainers.setup import Setup
    from factory.trainers.watch import Watch

    args = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 4, "max_length": 64}
    job = Ran(tmp_path / "child", folder, [pair(i) for i in range(8)], method="dpo", args=args | {"beta": 0.5})
    job.run()
    kept = references(job.out / "reference")
    assert kept

    def build(count: int) -> Any:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        given = _defaults(on_gpu=False) | args | {"output_dir": str(tmp_path / "going")}
        rows = [pair(i) for i in range(count)]
        return dpo(Setup(model, tokenizer, rows, given, None, Watch(io.StringIO()), kept=job.out))

    assert "ref_chosen_logps" in build(8).train_dataset.column_names
    assert references(job.out / "reference") == kept
    build(7)
    assert len(references(job.out / "reference")) > len(kept)
