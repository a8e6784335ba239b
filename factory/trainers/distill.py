"""Distillation from a local teacher's distributions: TRL's GKD (one vocabulary) and GOLD (two).

The student learns from the teacher's probabilities of every next token, on the data set's answers and, for the share
`args.lmbda`, on answers of its own (Agarwal et al. 2023, arXiv 2306.13649). `args.beta` is the divergence: 0 forward KL, 1
reverse KL, between them Jensen-Shannon. GOLD compares distributions over different vocabularies.
"""

from typing import Any

from factory.trainers.preflight import Refused, Tokens, tokenise
from factory.trainers.setup import Setup, same


def gkd(s: Setup) -> Any:
    """Student and teacher share their vocabulary."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    sizes = [model.get_output_embeddings().weight.shape[0] for model in (s.model, s.teacher)]
    if sizes[0] != sizes[1]:
        raise Refused(
            f"gkd compares distributions over one vocabulary, but the student's has {sizes[0]} tokens and the teacher's "
            f"{sizes[1]}; use method: gold"
        )
    return _trainer(s, GKDTrainer, GKDConfig(**s.args))


def gold(s: Setup) -> Any:
    """Student and teacher may have vocabularies of their own."""
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    given = {"use_uld_loss": True, "teacher_tokenizer_name_or_path": s.teacher.config._name_or_path} | s.args
    return _trainer(s, GOLDTrainer, GOLDConfig(**given))


def _trainer(s: Setup, trainer_class: Any, config: Any) -> Any:
    from datasets import Dataset

    if any(row.get("masked") for row in s.rows):
        raise Refused(
            "rows whose trace is outside the loss train with sft alone: use shape: {reasoning: drop}, or keep"
        )
    data = Dataset.from_list([{"messages": [*row["prompt"], *row["completion"]]} for row in s.rows])
    trainer = trainer_class(
        model=s.model, teacher_model=s.teacher, args=config, train_dataset=data, processing_class=s.tokenizer,
        peft_config=s.peft, callbacks=[s.callback],
    )  # fmt: skip
    made = (trainer.data_collator([trainer.train_dataset[i]]) for i in range(len(s.first_rows)))
    theirs = (
        Tokens(batch["input_ids"][0].tolist(), [label != -100 for label in batch["labels"][0].tolist()])
        for batch in made
    )
    same(s.first_rows, (tokenise(row["prompt"], row["completion"], s.tokenizer) for row in s.first_rows), theirs)
    return trainer
