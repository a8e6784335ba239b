"""Supervised fine-tuning on prompts and completions, by TRL's SFTTrainer; the loss is on the answer and its end."""

from typing import Any

from factory.trainers.preflight import Tokens, tokenise
from factory.trainers.setup import Setup, same


def sft(s: Setup) -> Any:
    """A TRL trainer over conversational prompt/completion rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    masked = any(row.get("masked") for row in s.rows)
    columns = _tokenised if masked else _texts  # TRL's own masks end where the answer begins
    data = Dataset.from_list([columns(row, s.tokenizer) for row in s.rows])
    trainer = SFTTrainer(
        model=s.model, args=SFTConfig(**{"packing_strategy": "bfd"} | s.args), train_dataset=data,
        processing_class=s.tokenizer, peft_config=s.peft, callbacks=[s.callback],
    )  # fmt: skip
    if not s.args.get("packing") and not s.args.get("shuffle_dataset"):
        ours = (tokenise(row["prompt"], row["completion"], s.tokenizer, row.get("masked", 0)) for row in s.first_rows)
        same(s.first_rows, ours, (_tokens(row) for row in trainer.train_dataset.select(range(len(s.first_rows)))))
    return trainer


def _tokens(row: dict[str, Any]) -> Tokens:
    labels = row.get("labels")
    return Tokens(
        list(row["input_ids"]),
        [bool(m) for m in row["completion_mask"]] if labels is None else [label != -100 for label in labels],
    )


def _texts(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _tokenised(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokens with labels, which TRL takes as they are; -100 is outside the loss."""
    tokens = tokenise(row["prompt"], row["completion"], tokenizer, row.get("masked", 0))
    labels = [token if in_loss else -100 for token, in_loss in zip(tokens.ids, tokens.in_loss, strict=True)]
    return {"input_ids": tokens.ids, "labels": labels}
