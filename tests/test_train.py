"""Training: what is learned of a row, what is refused before step 1, and how the trainer's process lives and dies."""

import dataclasses
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory import launch
from factory import train as stage
from factory.errors import EngineError, RecipeError
from factory.train import Train, check_args
from factory.trainers.preflight import (
    Refused,
    fits,
    mend_padding,
    needed_bytes,
    preflight,
    preview,
    refuse_what_cannot_fit,
    tokenise,
)
from factory.weights import Weights
from tests.planted import FAULTS, LONG, Planted, Row, pair, said, sft_row
from tests.tiny import TEMPLATE, tiny_model

QUESTIONS = [f"What is the colour of thing number {i}?" for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# -- whole trainings, in their own processes, side by side ---------------------------------------------------------------


class Ran:
    """One training: its folder, what it told on the way, and its result or error."""

    def __init__(self, out: Path, base: Path, rows: list[Row], teacher: Path | None = None, **knobs: Any) -> None:
        self.out, self.base, self.teacher, self.progress = out, base, teacher, []  # type: ignore[var-annotated]
        out.mkdir()
        (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.knobs = Train.model_validate({"student": "base"} | ({"teacher": "big"} if teacher else {}) | knobs)

    def run(self) -> dict[str, Any]:
        return stage.train(
            self.knobs, weights_entry=Weights(model=str(self.base)), rows=self.out / "rows.jsonl", out=self.out,
            teacher=Weights(model=str(self.teacher)) if self.teacher else None, cache=self.out, checkpoints=self.out / "going", seed=1, on_progress=self.progress.append,
        )  # fmt: skip

    def read(self, name: str) -> Any:
        return json.loads((self.out / name).read_text())


SMALL = {"per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Ran, Future[dict[str, Any]]]]:
    """Every kind of training once. The students start from a folder without template, or with the end as padding."""
    from transformers import AutoTokenizer

    place = tmp_path_factory.mktemp("ran")
    bare = place / "bare"
    shutil.copytree(folder, bare)
    (bare / "chat_template.jinja").unlink()
    (place / "template.jinja").write_text(TEMPLATE)
    padded = AutoTokenizer.from_pretrained(folder)
    padded.pad_token = padded.eos_token
    shutil.copytree(folder, place / "padded")
    padded.save_pretrained(place / "padded")
    rows = [sft_row(i) for i in range(8)]
    weighted = [row | {"weight": 0.5} for row in rows]
    template = {"chat_template_path": str(place / "template.jinja")}
    pairs = [pair(i) for i in range(8)]
    big = tiny_model(place / "big", hidden=128, seed=5)
    foreign = tiny_model(place / "foreign", vocab=280, seed=6)
    jobs = {
        "kto": Ran(place / "kto", folder, pairs, method="kto", args=SMALL),
        "orpo": Ran(place / "orpo", folder, pairs, method="orpo", args=SMALL),
        "simpo": Ran(place / "simpo", folder, pairs, method="simpo", args=SMALL),
        "gkd": Ran(place / "gkd", folder, weighted, big, method="gkd", args=SMALL | {"max_new_tokens": 8}),
        "gold": Ran(place / "gold", folder, rows, foreign, method="gold", args=SMALL | {"max_completion_length": 8}),
        "gkd, another vocabulary": Ran(place / "other", folder, rows, foreign, method="gkd", args=SMALL),
        "sft": Ran(place / "sft", place / "padded", [*rows, sft_row(9, "blue " * 80)], method="sft", args=SMALL | {"num_train_epochs": 2}),
        "dpo": Ran(place / "dpo", folder, pairs, method="dpo", args=SMALL),
        "4bit": Ran(place / "4bit", folder, rows, method="sft", lora={"r": 4, "alpha": 8, "load_in_4bit": True}, args=SMALL),
        "lora": Ran(place / "lora", bare, weighted, method="sft", lora={"r": 4, "alpha": 8}, args=SMALL | template),
        "crash": Ran(place / "crash", folder, rows, method="sft", args={"optim": "no_such_optimizer"}),
        "rising": Ran(place / "rising", folder, rows, method="sft", args=SMALL | {"learning_rate": 1e9, "num_train_epochs": 20}),
        "refused": Ran(place / "refused", folder, [pair(0), pair(1, "same", "same")], method="dpo"),
    }  # fmt: skip
    with ThreadPoolExecutor(len(jobs)) as pool:
        return {name: (job, pool.submit(job.run)) for name, job in jobs.items()}


def test_sft_learns_the_answer_and_its_end_and_counts_every_row(ran: Any) -> None:
    job, result = ran["sft"]
    told = result.result()
    assert told == job.read("training.json")
    assert (told["rows_in"], told["rows_trained"], told["rows_set_aside"]) == (9, 8, {"over_length": 1})
    (aside,) = [json.loads(line) for line in (job.out / "set_aside.jsonl").read_text().splitlines()]
    assert aside["id"] == "r9"
    assert aside["reason"].startswith("over_length=")
    assert aside["reason"].endswith(">64")
    assert (told["steps"], len(told["log"])) == (4, 4)
    assert [entry["step"] for entry in job.progress] == [1, 2, 3, 4]
    assert all(entry["steps"] == 4 for entry in job.progress)
    assert told["log"][-1]["loss"] < told["log"][0]["loss"]
    assert told["tokens"] > 8 * 20
    assert told["notes"] == ["the pad token was the end token; it is '<|endoftext|>' now"]


def test_the_preview_shows_what_is_in_the_loss(ran: Any) -> None:
    job, result = ran["sft"]
    result.result()
    shown = job.read("preview.json")
    assert len(shown) == 3
    for i, row in enumerate(shown):
        text = ["".join(token for token, in_loss in row if in_loss == which).replace("Ġ", " ").replace("Ċ", "\n") for which in (0, 1)]  # fmt: skip
        assert text == [
            f"<|im_start|>user\n{QUESTIONS[i]}<|im_end|>\n<|im_start|>assistant\n",
            "The sky is blue.<|im_end|>\n",
        ]


def test_a_student_is_a_plain_folder_that_ends_its_answers(ran: Any, folder: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("sft", "dpo", "lora", "4bit", "kto", "orpo", "simpo", "gkd", "gold"):
        job, result = ran[name]
        result.result()
        student = job.out / "model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
        assert tokenizer.chat_template == TEMPLATE
        assert (
            model.generation_config.eos_token_id
            == tokenizer.eos_token_id
            == tokenizer.convert_tokens_to_ids("<|im_end|>")
        )
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        before, after = load_file(folder / "model.safetensors"), load_file(student / "model.safetensors")
        assert before.keys() == after.keys()
        changed = {key for key in before if not before[key].equal(after[key])}
        assert {before[key].dtype for key in before} == {after[key].dtype for key in after}
        if name in ("lora", "4bit"):  # linear layers alone
            assert changed == {key for key in before if "proj" in key}
            assert (job.out / "adapter" / "adapter_model.safetensors").is_file()
            assert not (student / "adapter_config.json").exists()
        else:
            assert changed == before.keys()


def test_an_adapter_over_4_bits_is_merged_into_whole_weights(ran: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    job, result = ran["4bit"]
    told = result.result()
    assert told["log"][-1]["loss"] < told["log"][0]["loss"]
    before, after = (load_file(f / "model.safetensors") for f in (folder, job.out / "model"))
    adapter = load_file(job.out / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    grown = before[f"{name}.weight"] + (8 / 4) * (b.float() @ a.float())
    assert (after[f"{name}.weight"] - grown).abs().max() < 1e-5


def test_it_is_told_where_weights_are_not_used(ran: Any) -> None:
    assert ran["gkd"][1].result()["notes"] == ["the rows have weights, which sft alone uses: all rows count alike"]
    assert ran["lora"][1].result()["notes"] == []
    assert ran["dpo"][1].result()["notes"] == []


def test_dpo_logs_rewards_and_learns_the_preference(ran: Any) -> None:
    _, result = ran["dpo"]
    log = result.result()["log"]
    wanted = {"step", "loss", "learning_rate", "grad_norm", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"}  # fmt: skip
    assert all(entry.keys() == wanted for entry in log)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # it starts as its own reference
    assert log[-1]["rewards/margins"] > 0.1


@pytest.mark.parametrize("method", ["kto", "orpo", "simpo", "gkd", "gold"])
def test_every_method_trains_all_rows(ran: Any, method: str) -> None:
    _, result = ran[method]
    told = result.result()
    assert (told["method"], told["rows_trained"], told["rows_set_aside"]) == (method, 8, {})
    steps = 12 if method == "kto" else 6  # three times through 8 rows by fours; KTO makes two rows of a pair
    assert (told["steps"], len(told["log"])) == (steps, steps)
    assert told["log"][-1]["loss"] < told["log"][0]["loss"]


def test_distributions_over_two_vocabularies_are_no_gkd(ran: Any) -> None:
    _, result = ran["gkd, another vocabulary"]
    with pytest.raises(RecipeError, match=r"train student: gkd .* tokens and the teacher's 280; use method: gold"):
        result.result()


@pytest.mark.parametrize(
    ("method", "teacher", "told"), [("gkd", None, "name a model with teacher:"), ("dpo", "big", "remove teacher:")]
)
def test_who_teaches_is_asked_where_somebody_does(method: str, teacher: str | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Train.model_validate({"method": method, "student": "base", "teacher": teacher})


def test_a_crash_is_an_engine_error_with_the_last_words(ran: Any) -> None:
    _, result = ran["crash"]
    with pytest.raises(EngineError, match=r"train student: the trainer ended with exit 1: .*no_such_optimizer"):
        result.result()


def test_refused_rows_are_a_recipe_error_that_says_what_to_do(ran: Any) -> None:
    job, result = ran["refused"]
    with pytest.raises(RecipeError, match="train student: row p1: chosen and rejected are the same; drop such pairs"):
        result.result()
    assert not (job.out / "model").exists()


def test_a_training_that_diverges_is_stopped_with_what_to_try(ran: Any) -> None:
    job, result = ran["rising"]
    with pytest.raises(
        RecipeError, match=r"train student: it diverges: the loss .* lower args.learning_rate \(now 1e\+09\)"
    ):
        result.result()
    assert 0 < len(job.progress) < 40
    assert not (job.out / "going").exists()


def test_what_diverges_is_told_from_what_jumps() -> None:
    from factory.trainers.watch import diverges

    assert diverges([float("nan")]) == diverges([2.0, float("inf")]) == "the loss is no number"
    jumping = [2.0, 1.0, 6.0] * 20
    assert not any(diverges(jumping[:i]) for i in range(1, 60))
    assert "rises (1 at first, 4 now)" in str(diverges([1.0] * 10 + [4.0] * 10))
    assert diverges([0.1] * 10 + [0.5] * 10) is None  # half a nat is nothing to end a training for


KILLED = """
import sys
from tests.test_train import GOING_ON, Path, Ran, sft_row
Ran(Path(sys.argv[1]), Path(sys.argv[2]), [sft_row(i) for i in range(12)], **GOING_ON).run()
"""
GOING_ON: dict[str, Any] = {
    "method": "sft", "args": SMALL | {"num_train_epochs": 10, "save_strategy": "steps", "save_steps": 7},
}  # fmt: skip


def test_a_killed_training_goes_on_and_comes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "killed"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(folder)]) as parent:
        while not (out / "going/checkpoint-14").exists():  # it is being written
            assert parent.poll() is None
            time.sleep(0.01)
        children = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(children, timeout=30)[1]
    torn = out / "going" / "checkpoint-999"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 99')
    again, whole = object.__new__(Ran), Ran(tmp_path / "whole", folder, [sft_row(i) for i in range(12)], **GOING_ON)
    again.out, again.base, again.teacher, again.progress, again.knobs = out, folder, None, [], whole.knobs
    told, undisturbed = again.run(), whole.run()
    assert told["resumed_at"] % 7 == 0 < told["resumed_at"] == again.progress[0]["step"] - 1
    assert undisturbed["resumed_at"] is None
    assert told["log"] == undisturbed["log"]
    ours, theirs = (load_file(where / "model/model.safetensors") for where in (out, tmp_path / "whole"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert (out / "checkpoints").is_dir()  # the recipe asked for them


def test_a_long_training_is_saved_by_the_clock(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from factory.trainers.job import _defaults
    from factory.trainers.setup import Setup
    from factory.trainers.sft import sft
    from factory.trainers.watch import SAVE_EVERY_S, Watch, last_checkpoint

    watch = Watch(io.StringIO())
    args = {"output_dir": str(tmp_path / "going"), "max_steps": 3} | _defaults(on_gpu=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trainer = sft(Setup(model, tokenizer, [sft_row(i) for i in range(8)], args, None, watch))
    watch._saved -= SAVE_EVERY_S
    trainer.train()
    assert last_checkpoint(tmp_path / "going") == tmp_path / "going/checkpoint-1"


PARENT = """
import sys
from tests.test_train import Path, Ran, sft_row
Ran(Path(sys.argv[1]), Path(sys.argv[2]), [sft_row(i) for i in range(8)], method="sft", args={"num_train_epochs": 1000}).run()
"""


def test_the_trainer_dies_with_its_parent(folder: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "out"), str(folder)]) as parent:
        child = None
        while child is None and parent.poll() is None:
            time.sleep(0.1)
            child = next(
                (c for c in psutil.Process(parent.pid).children() if "factory.trainers.job" in c.cmdline()), None
            )
        assert child is not None
        while not any("libtorch_cpu" in region.path for region in child.memory_maps()):
            time.sleep(0.1)
        parent.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs([child], timeout=30)[1]


# -- the mask, as TRL's own collator makes it --------------------------------------------------------------------------------


def collated(folder: Path, rows: list[Row], tmp_path: Path, **args: Any) -> list[str]:
    """The text that each row's labels learn, of one batch of TRL's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from factory.trainers.job import _defaults
    from factory.trainers.setup import Setup
    from factory.trainers.sft import sft
    from factory.trainers.watch import Watch

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token  # planted: padding would hide the end
    mend_padding(tokenizer, model)
    given = {"output_dir": str(tmp_path)} | _defaults(on_gpu=False) | args
    trainer = sft(Setup(model, tokenizer, rows, given, None, Watch(None)))
    labels = trainer.data_collator(list(trainer.train_dataset))["labels"]
    return [tokenizer.decode([label for label in row.tolist() if label != -100]) for row in labels]


def test_labels_of_trl_are_the_answer_and_its_end(folder: Path, tmp_path: Path) -> None:
    answers = ["Yes.", "The sky is blue and the grass is green.", "Because: it is warm.\nAnswer: yes"]
    rows = [sft_row(i, answer) for i, answer in enumerate(answers)]
    talk = said("system", "Be short.") + said("user", "Hi.") + said("assistant", "Hello.") + said("user", "And now?")
    rows.append({"id": "talk", "prompt": talk, "completion": said("assistant", "Bye.")})
    assert collated(folder, rows, tmp_path) == [f"{answer}<|im_end|>\n" for answer in [*answers, "Bye."]]


TRACE = "<think>\nThe sky is blue.\n</think>\n\n"


def test_a_masked_trace_is_seen_and_not_learned(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [sft_row(0, TRACE + "Yes.") | {"masked": len(TRACE)}, sft_row(1, TRACE + "No."), sft_row(2, "Yes.")]
    assert collated(folder, rows, tmp_path) == ["Yes.<|im_end|>\n", f"{TRACE}No.<|im_end|>\n", "Yes.<|im_end|>\n"]
    tokens = tokenise(rows[0]["prompt"], rows[0]["completion"], tokenizer, len(TRACE))
    plain = tokenise(rows[0]["prompt"], rows[0]["completion"], tokenizer)
    assert tokens.ids == plain.ids
    assert "The sky is blue." in tokenizer.decode(tokens.ids)
    (shown,) = preview(rows[:1], tokenizer)
    assert [in_loss for _, in_loss in shown] == [int(in_loss) for in_loss in tokens.in_loss]
    assert preflight(rows, tokenizer, 512)[0] == rows


def test_a_trace_that_the_template_changes_is_not_masked_but_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("['content']", "['content'].split('</think>')[-1]").replace(
        ".content", ".content.split('</think>')[-1]"
    )
    row = sft_row(0, TRACE + "Yes.") | {"masked": len(TRACE)}
    with pytest.raises(Refused, match=r"row r0: .* its trace cannot be masked"):
        preflight([row], tokenizer, 512)


def test_a_mask_other_than_the_preflights_is_refused(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [sft_row(0), sft_row(1)]
    length = len(tokenise(rows[0]["prompt"], rows[0]["completion"], tokenizer).ids)
    for args in ({"completion_only_loss": False}, {"max_length": length - 1}):
        with pytest.raises(Refused, match=r"row r0: TRL's tokens or loss mask differ"):
            collated(folder, rows, tmp_path, **args)
    assert collated(folder, rows, tmp_path, max_length=length)


# -- the preflight ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_would_train_wrongly_is_refused(folder: Path, tokenizer: Any, fault: Planted) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    good = pair(3) if "chosen" in fault.row else sft_row(3)
    assert preflight([good], tokenizer, fits(model, tokenizer, {}))[0] == [good]  # sound without the fault
    for name, value in fault.tokenizer.items():
        setattr(tokenizer, name, value)
    if fault.embeddings:
        model.resize_token_embeddings(fault.embeddings)
    with pytest.raises(Refused, match=fault.told):
        preflight([fault.row], tokenizer, fits(model, tokenizer, fault.args))


def test_rows_that_cannot_train_are_set_aside_with_their_reason(tokenizer: Any) -> None:
    marked = sft_row(1) | {"prompt": said("user", "Is <|endoftext|> a word?")}
    kept, aside = preflight([sft_row(0), marked, sft_row(2, LONG)], tokenizer, 64)
    assert [row["id"] for row in kept] == ["r0"]
    assert aside[0] == {"id": "r1", "reason": "template_token:<|endoftext|>"}
    assert aside[1]["reason"].startswith("over_length=")


def test_the_memory_of_a_training_is_counted_before_it(folder: Path) -> None:
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from factory.trainers.job import peft_of

    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = model.num_parameters()
    assert needed_bytes(model, None) == 16 * whole
    lora = peft_of({"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"})
    counted = needed_bytes(model, lora)
    adapted = get_peft_model(model, lora)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counted == 4 * whole + 16 * trained
    refuse_what_cannot_fit(model, lora)
    with torch.device("meta"):  # four hundred thousand million parameters, none of them anywhere
        config = AutoConfig.from_pretrained(folder, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126)
        huge = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Refused, match=r"need .* GiB, of which .* are there; train with `lora: \{\}`"):
        refuse_what_cannot_fit(huge, None)


def test_every_row_is_looked_at(tokenizer: Any) -> None:
    rows = [sft_row(i % 12) for i in range(300)]
    assert preflight(rows, tokenizer, None)[0] == rows
    with pytest.raises(Refused, match="row last"):
        preflight([*rows, sft_row(0, "Yes.<|im_end|>") | {"id": "last"}], tokenizer, None)


def test_a_pair_is_as_long_as_its_longer_side(tokenizer: Any) -> None:
    kept, aside = preflight([pair(0), pair(1, rejected="blue " * 80)], tokenizer, 64)
    assert [row["id"] for row in kept] == ["p0"]
    assert [row["id"] for row in aside] == ["p1"]


@settings(max_examples=80, deadline=None)
@given(question=st.text(max_size=30), answer=st.text(min_size=1, max_size=40).filter(str.strip))
def test_the_loss_begins_with_the_answer_whatever_is_said(folder: Path, question: str, answer: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder) if not _kept else _kept[0]
    _kept[:] = [tokenizer]
    tokens = tokenise(said("user", question), said("assistant", answer), tokenizer)
    learned = [token for token, in_loss in zip(tokens.ids, tokens.in_loss, strict=True) if in_loss]
    assert learned == tokenizer(answer + "<|im_end|>\n")["input_ids"]


_kept: list[Any] = []
"""One tokenizer for all examples of a property."""


def test_padding_is_mended_without_touching_the_end(folder: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert mend_padding(tokenizer, model) == []
    size = model.get_input_embeddings().weight.shape[0]
    tokenizer.pad_token = tokenizer.eos_token
    assert "was the end token" in mend_padding(tokenizer, model)[0]
    assert (tokenizer.pad_token, model.config.pad_token_id) == ("<|endoftext|>", tokenizer.pad_token_id)
    assert model.get_input_embeddings().weight.shape[0] == size
    tokenizer.eos_token = tokenizer.pad_token  # now no spare token is left in the vocabulary
    assert mend_padding(tokenizer, model) == ["the pad token was the end token; it is '<|pad|>' now"]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == size + 1
    tokenizer.pad_token = None
    assert "was missing" in mend_padding(tokenizer, model)[0]


def test_a_preview_is_of_the_chosen_side(tokenizer: Any) -> None:
    ((*_, (token, in_loss)),) = preview([pair(0, chosen="blue")], tokenizer)
    assert (token, in_loss) == ("Ċ", 1)


# -- arguments and the launcher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "told"),
    [
        ("sft", "max_seq_length", "use max_length"),
        ("sft", "learning_rat", "use learning_rate"),
        ("sft", "warmup_ratio", "use warmup_steps"),
        ("sft", "epochs", "use num_train_epochs"),
        ("sft", "packng", "use packing"),
        ("dpo", "max_prompt_length", "use max_length"),
        ("dpo", "packing", "not an argument of TRL's dpo trainer"),
        ("sft", "beta", "not an argument of TRL's sft trainer"),
        ("sft", "output_dir", "is set by the factory"),
        ("dpo", "qqqqqqqq", "not an argument of TRL's dpo trainer"),
    ],
)
def test_unknown_arguments_are_told_with_the_nearest(method: str, name: str, told: str) -> None:
    (problem,) = check_args(method, {name: 1, "learning_rate": 1e-5})
    assert problem.startswith(f"args.{name} ")
    assert told in problem


@pytest.mark.parametrize("method", stage.METHODS)
def test_known_arguments_are_those_of_the_installed_trl(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    kind = stage.METHODS[method]
    config = getattr(importlib.import_module("trl." + kind.file.removesuffix(".py").replace("/", ".")), kind.config)
    assert stage._fields(method) == {f.name for f in dataclasses.fields(config) if not f.name.startswith("_")}


@pytest.mark.parametrize(("visible", "processes"), [("0,1", 2), ("2, 5,7", 3), ("0", 1), ("", 1), ("-1", 1)])
def test_several_gpus_go_through_accelerate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, processes: int
) -> None:
    from accelerate.commands.launch import launch_command_parser

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    python, *command = launch.command(None, tmp_path)
    assert python == sys.executable
    if processes == 1:
        assert command == ["-m", "factory.trainers.job"]
        return
    assert command[:2] == ["-m", "accelerate.commands.launch"]
    read = launch_command_parser().parse_args([*command[2:], "job.json"])
    assert (read.num_processes, read.module, read.training_script) == (processes, True, "factory.trainers.job")
    assert read.training_script_args == ["job.json"]


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.command(None, tmp_path) == [sys.executable, "-m", "factory.trainers.job"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A'\necho 'GPU 1: B'\n")
    tool.chmod(0o755)
    assert "--num_processes 2" in " ".join(launch.command(None, tmp_path))


def test_trackers_keep_their_settings_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "set")
    known = stage.child_environment() | stage._trackers()
    assert known["WANDB_PROJECT"] == "set"
    assert not {"OPENAI_API_KEY", "HF_TOKEN"} & known.keys()
    assert known["PATH"] == os.environ["PATH"]
