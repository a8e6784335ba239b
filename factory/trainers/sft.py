"""Supervised fine-tuning on prompts and completions, by TRL's SFTTrainer; the loss is on the answer and its end."""

from typing import Any

from factory.trainers.preflight import Refused, Tokens, tokenise
from factory.trainers.setup import Setup, same


def sft(s: Setup) -> Any:
    """A TRL trainer over conversational prompt/completion rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from factory.trainers.weighted import Mixture

    mixture = Mixture(s.rows, s.classes)
    if not mixture.plain:
        return _weighted(s, mixture)
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


def _weighted(s: Setup, mixture: Any) -> Any:
    """The same, where tasks or rows have weights: prepared here, as TRL's own preparation leaves other columns behind."""
    from datasets import Dataset
    from trl import SFTConfig, pack_dataset

    from factory.trainers.weighted import OUTSIDE, WeightedTrainer

    for name, plain in (("loss_type", "nll"), ("label_smoothing_factor", 0)):
        if s.args.get(name, plain) != plain:
            raise Refused(f"args.{name} has a loss of its own, which knows no weights; leave it out, or the weights")
    made = [
        row | {"parts": [OUTSIDE if label == OUTSIDE else number for label in row["labels"]]}
        for row, number in zip((_tokenised(row, s.tokenizer) for row in s.rows), mixture.numbers, strict=True)
    ]
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    config = SFTConfig(**{"packing_strategy": "bfd"} | s.args | prepared)
    data = Dataset.from_list(made)
    data = data.shuffle(seed=config.seed) if config.shuffle_dataset else data
    trainer = WeightedTrainer(
        model=s.model, args=config, train_dataset=pack_dataset(data, config.max_length) if config.packing else data,
        processing_class=s.tokenizer, peft_config=s.peft, callbacks=[s.callback],
    )  # fmt: skip
    trainer.weigh(mixture)
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
