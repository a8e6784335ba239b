"""Supervised fine-tuning on prompts and completions, by TRL's SFTTrainer; the loss is on the answer and its end."""

from typing import Any

from factory.trainers.preflight import Refused, tokenise

LOOKED_AT = 50


def sft(model: Any, tokenizer: Any, rows: list[dict[str, Any]], args: dict[str, Any], peft: Any, callback: Any) -> Any:
    """A TRL trainer over conversational prompt/completion rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**{"packing_strategy": "bfd"} | args), train_dataset=data, processing_class=tokenizer,
        peft_config=peft, callbacks=[callback],
    )  # fmt: skip
    if not args.get("packing") and not args.get("shuffle_dataset"):
        _same(trainer.train_dataset, rows, tokenizer)
    return trainer


def _same(made: Any, rows: list[dict[str, Any]], tokenizer: Any) -> None:
    """What TRL made is what the preflight saw: the same tokens, the same of them in the loss."""
    for row, got in zip(rows[:LOOKED_AT], made.select(range(min(LOOKED_AT, len(made)))), strict=False):
        ours = tokenise(row["prompt"], row["completion"], tokenizer)
        mask = (
            [label != -100 for label in got["labels"]] if "labels" in got else [bool(m) for m in got["completion_mask"]]
        )
        if list(got["input_ids"]) != ours.ids or mask != ours.in_loss:
            raise Refused(
                f"row {row['id']}: TRL's tokens or loss mask differ from the preflight's; the row would train otherwise than shown"
            )
