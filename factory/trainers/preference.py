"""Preference training on pairs, by TRL's DPOTrainer; the reference is the student that it starts from."""

from typing import Any


def dpo(model: Any, tokenizer: Any, rows: list[dict[str, Any]], args: dict[str, Any], peft: Any, callback: Any) -> Any:
    """A TRL trainer over explicit prompt/chosen/rejected rows. With LoRA the reference is the model without adapters."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    return DPOTrainer(
        model=model, args=DPOConfig(**args), train_dataset=data, processing_class=tokenizer, peft_config=peft,
        callbacks=[callback],
    )  # fmt: skip
