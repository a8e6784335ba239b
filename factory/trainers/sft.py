"""Supervised fine-tuning on prompts and completions, by TRL's SFTTrainer; the loss is on the answer and its end."""

from typing import Any

from factory.trainers.preflight import Refused, tokenise

LOOKED_AT = 50


def sft(model: Any, tokenizer: Any, rows: list[dict[str, Any]], args: dict[str, Any], peft: Any, callback: Any) -> Any:
    """A TRL trainer over conversational prompt/completion rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    masked = any(row.get("masked") for row in rows)
    columns = _tokenised if masked else _texts  # TRL's own masks end where the answer begins
    data = Dataset.from_list([columns(row, tokenizer) for row in rows])
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**{"packing_strategy": "bfd"} | args), train_dataset=data, processing_class=tokenizer,
        peft_config=peft, callbacks=[callback],
    )  # fmt: skip
    if not args.get("packing") and not args.get("shuffle_dataset"):
        _same(trainer.train_dataset, rows, tokenizer)
    return trainer


def _texts(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _tokenised(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokens with labels, which TRL takes as they are; -100 is outside the loss."""
    tokens = tokenise(row["prompt"], row["completion"], tokenizer, row.get("masked", 0))
    labels = [token if in_loss else -100 for token, in_loss in zip(tokens.ids, tokens.in_loss, strict=True)]
    return {"input_ids": tokens.ids, "labels": labels}


def _same(made: Any, rows: list[dict[str, Any]], tokenizer: Any) -> None:
    """What TRL made is what the preflight saw: the same tokens, the same of them in the loss."""
    for row, got in zip(rows[:LOOKED_AT], made.select(range(min(LOOKED_AT, len(made)))), strict=False):
        ours = tokenise(row["prompt"], row["completion"], tokenizer, row.get("masked", 0))
        mask = (
            [label != -100 for label in got["labels"]] if "labels" in got else [bool(m) for m in got["completion_mask"]]
        )
        if list(got["input_ids"]) != ours.ids or mask != ours.in_loss:
            raise Refused(
                f"row {row['id']}: TRL's tokens or loss mask differ from the preflight's; the row would train otherwise than shown"
            )
