"""Preference training on pairs: TRL's DPO (all its losses by `args.loss_type`), KTO, ORPO and SimPO.

DPO and KTO compare with a reference, the student that they start from (with LoRA, the model without adapters); ORPO
(Hong et al. 2024, arXiv 2403.07691) and SimPO (Meng et al. 2024, arXiv 2405.14734) need none.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from factory.rows import digest
from factory.trainers.preflight import Tokens, tokenise
from factory.trainers.setup import Setup, same

SIDES = ("chosen", "rejected")


def dpo(s: Setup) -> Any:
    """A TRL trainer over explicit prompt/chosen/rejected rows."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{name: row[name] for name in ("prompt", *SIDES)} for row in s.rows])
    args = s.args
    if args.get("precompute_ref_log_probs") and s.kept is not None:
        data = _on_disk(data, s.rows, s.kept / "reference")
        # the preflight kept it; TRL's own look at it would put all args into the name
        args = args | {"max_length": None}
    trainer = DPOTrainer(
        model=s.model, args=DPOConfig(**args), train_dataset=data, processing_class=s.tokenizer, peft_config=s.peft,
        callbacks=[s.callback],
    )  # fmt: skip
    made = trainer.train_dataset.select(range(len(s.first_rows)))
    for side in SIDES:
        theirs = (_joined(row["prompt_ids"], row[f"{side}_ids"]) for row in made)
        same(s.first_rows, (tokenise(row["prompt"], row[side], s.tokenizer) for row in s.first_rows), theirs)
    return trainer


def _on_disk(data: Any, rows: list[dict[str, Any]], folder: Path) -> Any:
    """The pairs as a file: TRL writes the reference's log-probabilities beside it, under a name made of pairs and weights,
    and finds them there after a kill, and in trainings with another `beta` or loss."""
    from datasets import load_from_disk

    place = folder / digest([[row["prompt"], row["chosen"], row["rejected"]] for row in rows])
    if not place.exists():
        making = folder / f"{place.name}.{os.getpid()}"
        data.save_to_disk(making)
        with contextlib.suppress(OSError):  # another process was first
            making.rename(place)
        shutil.rmtree(making, ignore_errors=True)
    return load_from_disk(place)


def kto(s: Setup) -> Any:
    """A TRL trainer over single answers, desirable or not; of a pair the chosen one is, the rejected one is not (Ethayarajh
    et al. 2024, arXiv 2402.01306)."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [single for row in s.rows for single in _singles(row)]
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "completion", "label")} for row in rows])
    trainer = KTOTrainer(
        model=s.model, args=KTOConfig(**s.args), train_dataset=data, processing_class=s.tokenizer, peft_config=s.peft,
        callbacks=[s.callback],
    )  # fmt: skip
    first = rows[: len(s.first_rows)]
    theirs = (
        _joined(row["prompt_ids"], row["completion_ids"]) for row in trainer.train_dataset.select(range(len(first)))
    )
    same(first, (tokenise(row["prompt"], row["completion"], s.tokenizer) for row in first), theirs)
    return trainer


def _singles(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "chosen" not in row:
        return [row]
    return [
        {"id": row["id"], "prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for side in SIDES
    ]


def orpo(s: Setup) -> Any:
    """Odds-ratio preference optimisation."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return _without_reference(s, ORPOTrainer, ORPOConfig(**s.args))


def simpo(s: Setup) -> Any:
    """SimPO is TRL's CPO trainer with another loss, and without the likelihood of the chosen answer."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return _without_reference(s, CPOTrainer, CPOConfig(**{"loss_type": "simpo", "cpo_alpha": 0.0} | s.args))


def _without_reference(s: Setup, trainer_class: Any, config: Any) -> Any:
    """These trainers put an end token behind whatever does not end with one, also behind a template's last line break: they
    are given texts, each up to its end token."""
    from datasets import Dataset

    ours = {side: [_to_its_end(row, side, s.tokenizer) for row in s.rows] for side in SIDES}
    texts = [{"prompt": _asked(row, s.tokenizer)} for row in s.rows]
    for side in SIDES:
        for text, tokens in zip(texts, ours[side], strict=True):
            text[side] = s.tokenizer.decode(
                [t for t, m in zip(tokens.ids, tokens.in_loss, strict=True) if m], clean_up_tokenization_spaces=False
            )
    trainer = trainer_class(
        model=s.model, args=config, train_dataset=Dataset.from_list(texts), processing_class=s.tokenizer,
        peft_config=s.peft, callbacks=[s.callback],
    )  # fmt: skip
    made = trainer.train_dataset.select(range(len(s.first_rows)))
    for side in SIDES:
        theirs = (
            Tokens(list(row[f"{side}_input_ids"]), [label != -100 for label in row[f"{side}_labels"]]) for row in made
        )
        same(s.first_rows, ours[side][: len(s.first_rows)], theirs)
    return trainer


def _asked(row: dict[str, Any], tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    return text


def _to_its_end(row: dict[str, Any], side: str, tokenizer: Any) -> Tokens:
    """A side of a pair as tokens, without what the template puts behind the end token."""
    tokens = tokenise(row["prompt"], row[side], tokenizer)
    end = len(tokens.ids) - tokens.ids[::-1].index(tokenizer.eos_token_id)
    return Tokens(tokens.ids[:end], tokens.in_loss[:end])


def _joined(prompt: list[int], answer: list[int]) -> Tokens:
    return Tokens([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
