"""What rows count in training: tasks by the mean of their own tokens, whatever stands in which batch."""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factory.train import Train
from tests.planted import Row, pair, sft_row
from tests.test_train import Ran
from tests.tiny import tiny_model

ANSWERS = {
    "label": ["Yes.", "No.", "Yes.", "No.", "Yes."],
    "rationale": ["The sky is blue because it is warm and the grass is green.", "Because: it is warm.", "Because."],
    "truth": ["yes"],
}
WEIGHTS = {"label": 1.0, "rationale": 0.5, "truth": 0.25}


def mixed(**weights: float) -> list[Row]:
    """Three tasks of unlike numbers and lengths."""
    weights = weights or WEIGHTS
    return [
        sft_row(i, answer) | {"id": f"{task}{i}", "task": task, "weight": weights[task]}
        for task, answers in ANSWERS.items()
        for i, answer in enumerate(answers)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """A trainer that has trained for an epoch; its student learns nothing where no learning rate is given."""

    def train(rows: list[Row], classes: dict[str, float] | None = None, **args: Any) -> Any:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from factory.trainers.job import _defaults
        from factory.trainers.setup import Setup
        from factory.trainers.sft import sft
        from factory.trainers.watch import Watch

        still = {"output_dir": str(tmp_path / "going"), "num_train_epochs": 1, "learning_rate": 0.0, "max_length": 128}
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        given = _defaults(on_gpu=False) | still | {"per_device_train_batch_size": 2} | args
        trainer = sft(Setup(model, tokenizer, rows, given, None, Watch(io.StringIO()), classes=classes or {}))
        trainer.train()
        return trainer

    return train


def losses(folder: Path, rows: list[Row]) -> Any:
    """Of each row its summed loss, which has a gradient, and the tokens that it learns; and the model. Without TRL."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from factory.trainers.preflight import tokenise

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    told = []
    for row in rows:
        tokens = tokenise(row["prompt"], row["completion"], tokenizer)
        learned = torch.tensor(tokens.in_loss[1:])
        logits = model(input_ids=torch.tensor([tokens.ids])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens.ids[1:]), reduction="none")
        told.append((each[learned].sum(), int(learned.sum())))
    return told, model


def mean_of(folder: Path, rows: list[Row], task: str) -> float:
    told, _ = losses(folder, [row for row in rows if row["task"] == task])
    return float(sum(loss.detach() for loss, _ in told)) / sum(count for _, count in told)


def epoch_loss(trainer: Any) -> float:
    logged = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    return sum(logged) / len(logged)


WAYS: list[dict[str, Any]] = [
    {}, {"gradient_accumulation_steps": 3}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    {"packing": True}, {"train_sampling_strategy": "group_by_length"}, {"average_tokens_across_devices": False},
    {"gradient_checkpointing": True}, {"bf16": True},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_epochs_loss_is_the_weighted_sum_of_the_tasks_means(
    folder: Path, trained: Callable[..., Any], way: dict[str, Any]
) -> None:
    rows = mixed()
    means = {task: mean_of(folder, rows, task) for task in ANSWERS}
    trainer = trained(rows, **way)
    assert trainer.state.global_step > 1
    exact = 1e-3 if way.get("bf16") else 1e-5
    assert epoch_loss(trainer) == pytest.approx(sum(WEIGHTS[task] * means[task] for task in ANSWERS), rel=exact)


def test_each_task_has_its_own_curve(folder: Path, trained: Callable[..., Any]) -> None:
    from factory.trainers.watch import entry

    rows = mixed()
    trainer = trained(rows, logging_steps=100, logging_strategy="epoch")
    (log,) = [entry(logs, 1) for logs in trainer.state.log_history if "loss" in logs]
    for task in ANSWERS:
        assert log[f"loss/{task}"] == pytest.approx(mean_of(folder, rows, task), rel=1e-5)
    trainer = trained(rows)
    seen = [{name for name in logs if name.startswith("loss/")} for logs in trainer.state.log_history if "loss" in logs]
    assert set().union(*seen) == {f"loss/{task}" for task in ANSWERS}
    assert sum("loss/truth" in names for names in seen) == 1  # a task stands where it was seen


def test_more_rows_of_a_task_do_not_make_it_count_for_more(folder: Path, trained: Callable[..., Any]) -> None:
    rows = mixed()
    twice = [*rows, *(row | {"id": row["id"] + "again"} for row in rows if row["task"] == "rationale")]
    assert epoch_loss(trained(twice)) == pytest.approx(epoch_loss(trained(rows)), rel=1e-5)
    told, _ = losses(folder, rows)
    pooled = float(sum(loss.detach() for loss, _ in told)) / sum(count for _, count in told)
    assert epoch_loss(trained(rows)) != pytest.approx(sum(WEIGHTS.values()) * pooled, rel=1e-3)


@pytest.mark.parametrize(
    "way", [
        {"gradient_accumulation_steps": 5}, {"packing": True, "per_device_train_batch_size": 9},
        {"gradient_accumulation_steps": 5, "gradient_checkpointing": True},
    ],
)  # fmt: skip
def test_a_step_goes_down_the_gradient_of_that_loss(
    folder: Path, trained: Callable[..., Any], way: dict[str, Any]
) -> None:
    """All rows in one step of plain gradient descent, beside the gradient taken by hand."""
    rows = mixed()
    trainer = trained(rows, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **way)
    assert trainer.state.global_step == 1
    told, by_hand = losses(folder, rows)
    sizes = {task: sum(n for row, (_, n) in zip(rows, told, strict=True) if row["task"] == task) for task in ANSWERS}
    pairs = zip(rows, told, strict=True)
    sum(WEIGHTS[row["task"]] * loss / sizes[row["task"]] for row, (loss, _) in pairs).backward()
    moved = dict(trainer.model.named_parameters())
    for name, before in by_hand.named_parameters():
        assert moved[name].allclose(before - 0.5 * before.grad, atol=1e-6), name


def test_one_task_of_weight_1_is_trls_own_training(trained: Callable[..., Any]) -> None:
    from trl import SFTTrainer

    assert type(trained([sft_row(i) for i in range(4)])) is SFTTrainer
    assert type(trained([sft_row(i) | {"weight": 0.5} for i in range(4)])) is not SFTTrainer


def test_a_class_counts_as_if_its_rows_stood_there_so_often(trained: Callable[..., Any]) -> None:
    rows = [sft_row(i, answer) for i, answer in enumerate(ANSWERS["rationale"])]
    rare = rows[0] | {"tags": ["rare", "long"]}
    weighted = trained([rare, *rows[1:]], {"rare": 3.0, "absent from all but one": 1.0})
    thrice = trained([rows[0] | {"weight": 0.999999}] * 3 + [row | {"weight": 0.999999} for row in rows[1:]])
    assert epoch_loss(weighted) == pytest.approx(epoch_loss(thrice), rel=1e-5)
    assert epoch_loss(weighted) != pytest.approx(epoch_loss(trained(rows)), rel=1e-4)
    products = trained([rare, *rows[1:]], {"rare": 1.5, "long": 2.0})
    assert epoch_loss(products) == pytest.approx(epoch_loss(weighted), rel=1e-6)


@pytest.mark.parametrize("args", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_a_loss_that_knows_no_weights_is_refused(trained: Callable[..., Any], args: dict[str, Any]) -> None:
    from factory.trainers.preflight import Refused

    with pytest.raises(Refused, match=rf"args.{next(iter(args))} has a loss of its own, which knows no weights"):
        trained(mixed(), **args)


# -- whole trainings ---------------------------------------------------------------------------------------------------------


def test_with_no_weight_on_the_rationale_the_student_is_that_of_the_labels(folder: Path, tmp_path: Path) -> None:
    """Bit for bit (Distilling step-by-step with alpha = 1)."""
    args = {"per_device_train_batch_size": 2, "max_length": 128, "learning_rate": 0.01}
    rows = mixed(label=1.0, rationale=0.0, truth=0.0)
    both = Ran(tmp_path / "both", folder, rows, method="sft", args=args)
    alone = Ran(tmp_path / "alone", folder, [row for row in rows if row["task"] == "label"], method="sft", args=args)
    told, _ = both.run(), alone.run()
    assert (told["rows_trained"], told["rows_set_aside"]) == (5, {"no_weight": 4})
    students = [(job.out / "model/model.safetensors").read_bytes() for job in (both, alone)]
    assert students[0] == students[1]


def test_a_weight_for_a_tag_that_no_row_has_is_refused() -> None:
    from factory.trainers.lineup import counted
    from factory.trainers.preflight import Refused

    rows = [sft_row(0) | {"tags": ["maths"]}, sft_row(1)]
    with pytest.raises(Refused, match="weights: no row has the tag 'math'; they have maths"):
        counted(rows, {"math": 2.0})
    assert counted(rows, {"maths": 2.0}) == (rows, [])
    assert counted(rows, {"maths": 0.0}) == (rows[1:], [{"id": "r0", "reason": "no_weight"}])
    with pytest.raises(Refused, match="every row has a weight of 0"):
        counted(rows[:1], {"maths": 0.0})


def test_weights_of_tags_are_for_sft() -> None:
    with pytest.raises(ValueError, match="weights: dpo counts all rows alike"):
        Train.model_validate({"method": "dpo", "student": "base", "weights": {"rare": 2}})


# -- order -------------------------------------------------------------------------------------------------------------------


def test_rows_train_in_the_order_of_a_score(folder: Path, tmp_path: Path) -> None:
    """What each step's loss was tells which row it saw."""
    rows = [
        sft_row(i, answer) | {"scores": {"ease": ease} if ease is not None else {}}
        for i, (answer, ease) in enumerate(zip(ANSWERS["rationale"] + ["Yes."], [0.2, 0.9, None, 0.9], strict=True))
    ]
    args = {"per_device_train_batch_size": 1, "learning_rate": 0.0, "num_train_epochs": 2, "max_length": 128}
    told = Ran(tmp_path / "out", folder, rows, method="sft", order="-ease", args=args).run()
    each = [float(loss.detach()) / count for loss, count in losses(folder, rows)[0]]
    assert [entry["loss"] for entry in told["log"]] == pytest.approx([each[i] for i in (1, 3, 0, 2)] * 2, rel=1e-4)
    assert told["notes"] == ["order: 1 of 4 rows have no 'ease'; they come last"]


def test_a_loss_may_rise_where_rows_come_in_an_order(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from factory.trainers.preflight import Refused
    from factory.trainers.watch import Watch

    def rises(strategy: str, last: float) -> None:
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, train_sampling_strategy=strategy)
        watch = Watch(io.StringIO())
        for loss in [1.0] * 10 + [4.0] * 9 + [last]:
            watch.on_log(args, TrainerState(), TrainerControl(), logs={"loss": loss})

    rises("sequential", 4.0)
    for strategy, last, told in [("random", 4.0, "the loss rises"), ("sequential", math.nan, "no number")]:
        with pytest.raises(Refused, match=told):
            rises(strategy, last)


ORDERS = [
    ("given", "0123"), ("-given", "3210"), ("length", "2031"), ("-length", "1302"), ("ease", "3012"), ("-ease", "2013"),
    ("margin", "1032"),
]  # fmt: skip


@pytest.mark.parametrize(("order", "first"), ORDERS)
def test_an_order_is_of_a_score_of_length_or_as_given(folder: Path, order: str, first: str) -> None:
    from transformers import AutoTokenizer

    from factory.trainers.lineup import in_order

    rows = [
        sft_row(i, answer) | {"id": str(i), "scores": {"ease": ease}, "margin": margin}
        for i, (answer, ease, margin) in enumerate(
            [
                ("Yes, it is.", 1, 0.2),
                ("Yes, it is so, and it is so.", 1, 0.1),
                ("A", 2, 0.9),
                ("Yes, it is so.", -1, 0.5),
            ]
        )
    ]
    made, notes = in_order(rows, order, AutoTokenizer.from_pretrained(folder))
    assert ("".join(row["id"] for row in made), notes) == (first, [])


def test_an_order_by_what_no_row_has_is_refused() -> None:
    from factory.trainers.lineup import in_order
    from factory.trainers.preflight import Refused

    with pytest.raises(Refused, match="order: no row has the score 'easy'; they have ease"):
        in_order([sft_row(0) | {"scores": {"ease": 1.0}}], "-easy", None)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo", "simpo"])
def test_an_ordered_trainer_does_not_shuffle(folder: Path, tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from factory.trainers.job import TRAINERS, _defaults
    from factory.trainers.setup import Setup
    from factory.trainers.watch import Watch

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = [sft_row(i) if method == "sft" else pair(i) for i in range(8)]
    args = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "output_dir": str(tmp_path)}
    given = _defaults(on_gpu=False) | args
    trainer = TRAINERS[method](Setup(model, tokenizer, rows, given, None, Watch(io.StringIO())))
    column = "prompt_input_ids" if method in ("orpo", "simpo") else "input_ids"
    seen = [int(digits[-1]) for batch in trainer.get_train_dataloader()
            for text in tokenizer.batch_decode(batch["KL_completion_ids" if column not in batch else column])
            if (digits := re.findall(r"number (\d+)", text))]  # fmt: skip
    assert list(dict.fromkeys(seen)) == list(range(8))


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"method": "gold", "teacher": "big"}, "gold draws its batches by itself"),
        ({"method": "sft", "args": {"packing": True}}, "args.packing puts rows into an order of its own"),
        ({"method": "sft", "args": {"train_sampling_strategy": "group_by_length"}}, "an order of its own"),
    ],
)
def test_two_orders_are_one_too_many(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Train.model_validate({"student": "base", "order": "length"} | knobs)


# -- unions ------------------------------------------------------------------------------------------------------------------

UNION = """
name: union
models:
  base: {type: transformers, model: BASE}
prompts:
  - {path: a.jsonl, name: a}
  - {path: b.jsonl, name: b}
stages:
  - filter: {from: a, as: rows_a, filters: [finished]}
  - filter: {from: b, as: rows_b, filters: [finished]}
  - train: {method: sft, student: base, from: {rows_a: 2, rows_b: 0.5}, args: ARGS}
"""
STILL = "{learning_rate: 0.0, num_train_epochs: 1, per_device_train_batch_size: 2, max_length: 128}"


def union(where: Path, base: Path) -> Path:
    for name, answers in (("a", ANSWERS["label"]), ("b", ANSWERS["rationale"])):
        lines = [{"prompt": f"What is {name} number {i}?", "completion": answer} for i, answer in enumerate(answers)]
        (where / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (where / "recipe.yaml").write_text(UNION.replace("BASE", str(base)).replace("ARGS", STILL))
    return where / "recipe.yaml"


def test_inputs_of_a_union_count_by_their_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import factory

    monkeypatch.chdir(tmp_path)
    union(tmp_path, folder)
    factory.run_recipe(factory.load(Path("recipe.yaml")), Path("runs"))
    (out,) = (tmp_path / "runs/union").glob("*-student-*")
    log = json.loads((out / "training.json").read_text())["log"]
    rows = [json.loads(line) | {"task": line[0]} for line in (out / "rows.jsonl").read_text().splitlines()]
    means = {
        name: mean_of(folder, [row | {"task": row["input"]} for row in rows], name) for name in ("rows_a", "rows_b")
    }
    mean = sum(entry["loss"] for entry in log) / len(log)
    assert mean == pytest.approx(2 * means["rows_a"] + 0.5 * means["rows_b"], rel=1e-4)
    assert {name for entry in log for name in entry if "/" in name} == {"loss/rows_a/answer", "loss/rows_b/answer"}


def test_weights_of_a_union_name_the_step(folder: Path, tmp_path: Path) -> None:
    """Other weights are another training; without any, they do not stand in its name."""
    from factory.plan import plan
    from factory.recipe import load

    path = union(tmp_path, folder)
    assert [step.knobs.kind for step in plan(load(path))] == ["given", "filter", "given", "filter", "shape", "shape", "train"]  # fmt: skip
    path.write_text(path.read_text().replace("{rows_a: 2, rows_b: 0.5}", "[rows_a, rows_b]"))
    assert [step.knobs.kind for step in plan(load(path))] == ["given", "filter", "given", "filter", "shape", "train"]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("{rows_a: 2, b: 1}", "weights are for the rows of earlier stages, not for prompt lists"),
        ("{rows_a: 2, rows_c: 1}", "there is no prompt list or earlier stage 'rows_c'; did you mean 'rows_b'"),
        ("{rows_a: -1}", "from"),
    ],
)
def test_what_is_wrong_in_a_union_is_told(folder: Path, tmp_path: Path, written: str, told: str) -> None:
    from factory.errors import RecipeError
    from factory.plan import plan
    from factory.recipe import load

    path = union(tmp_path, folder)
    path.write_text(path.read_text().replace("{rows_a: 2, rows_b: 0.5}", written))
    with pytest.raises(RecipeError, match=told):
        plan(load(path))
