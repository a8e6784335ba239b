"""The child process of the stage `score`: `python -m factory.scorer JOB`. A line of rows in, a line of scores out.

Rows of similar length share a forward pass, padded on the right. What a row gets depends on nothing but itself: after
rounding to six digits, which hides in what order a matrix product was summed up.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from factory.child import answer_lines, loading
from factory.errors import EngineError
from factory.weights import Weights, materialise, number_format

with loading():
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

TOKENS = {"cpu": 1024, "cuda": 8192}
"""Of a batch, padding included. On a processor more was slower (107 rows a second against 69 with 4,096, a tiny model)."""
CELLS = 1 << 26
"""Logits of a batch, tokens x vocabulary: a quarter of a gigabyte in float32."""

Told = float | str
"""A score, or why there is none."""


class Text(NamedTuple):
    """Tokens, and where the answer among them begins."""

    ids: list[int]
    start: int


class Unscored(Exception):
    """A row that has no score; the message is a verdict's reason."""


class Scorer:
    """A model, and what it says of conversations."""

    def __init__(self, folder: Path, name: str, by: str, device: str | None, dtype: str) -> None:
        self.by = by
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = AutoModelForSequenceClassification if by == "reward" else AutoModelForCausalLM
        self.model, told = kind.from_pretrained(
            folder, dtype=getattr(torch, number_format(dtype, self.device.type == "cuda")), trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        config = self.model.config
        if by == "reward" and (told["missing_keys"] or config.num_labels != 1):
            lacks = (
                f"it has {config.num_labels} labels, not one" if not told["missing_keys"] else "it has no trained head"
            )
            raise EngineError(f"{name} is no reward model: {lacks}")
        self.model.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not self.tokenizer.chat_template:
            raise EngineError(f"{name} has no chat template; use an instruct model")
        self.context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        # a classifier finds the end of a text by its padding; without one it cannot tell rows of a batch apart
        self.pad = config.get_text_config().pad_token_id
        self.most_rows = 1 if by == "reward" and self.pad is None else CELLS
        fitting = CELLS if by == "reward" else CELLS // config.get_text_config().vocab_size
        self.most_tokens = min(TOKENS.get(self.device.type, TOKENS["cuda"]), max(1, fitting))

    def scores(self, rows: list[dict[str, Any]]) -> list[Told]:
        texts: list[list[Text] | str] = [self._tried(row) for row in rows]
        flat = [text for one in texts if not isinstance(one, str) for text in one]
        values = iter(self._values(flat))
        return [one if isinstance(one, str) else self._told([next(values) for _ in one]) for one in texts]

    # -- texts -------------------------------------------------------------------------------------------------------

    def _tried(self, row: dict[str, Any]) -> list[Text] | str:
        try:
            texts = self._texts(row["messages"], row["answer"])
        except TemplateError:
            return "template_refused"
        if any(text.start == len(text.ids) for text in texts):
            return "empty"
        longest = max(len(text.ids) for text in texts)
        return f"over_length={longest}>{self.context}" if longest > self.context else texts

    def _texts(self, messages: list[dict[str, str]], answer: str) -> list[Text]:
        """What the model reads: the whole, or the answer after the prompt, or that and the answer alone."""
        if self.by == "reward":
            whole = [*messages, {"role": "assistant", "content": answer}]
            return [Text(self.tokenizer.apply_chat_template(whole, return_dict=False), 0)]
        head = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        said = self.tokenizer.encode(answer, add_special_tokens=False)
        end, begin = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if self.by == "likelihood":
            return [Text([*head, *said, *([] if end is None else [end])], len(head))]
        # the first word alone must follow something, so that both means are over the same tokens; the end is none of them
        before = begin if begin is not None else end
        return [Text([*head, *said], len(head)), Text([before, *said], 1)]

    # -- values ------------------------------------------------------------------------------------------------------

    def _values(self, texts: list[Text]) -> list[float]:
        values = [0.0] * len(texts)
        for batch in self._batches(texts):
            for i, value in zip(batch, self._forward([texts[i] for i in batch]), strict=True):
                values[i] = value
        return values

    def _batches(self, texts: list[Text]) -> Iterator[list[int]]:
        """Places of texts, the longest first: what does not fit in memory fails at once."""
        batch: list[int] = []
        for i in sorted(range(len(texts)), key=lambda i: -len(texts[i].ids)):
            full = (len(batch) + 1) * len(texts[batch[0] if batch else i].ids) > self.most_tokens
            if batch and (full or len(batch) == self.most_rows):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _forward(self, texts: list[Text]) -> list[float]:
        """The reward of each text, or the mean loss (nats) of its answer's tokens."""
        longest = max(len(text.ids) for text in texts)
        pads = [longest - len(text.ids) for text in texts]
        padded = [text.ids + [self.pad or 0] * n for text, n in zip(texts, pads, strict=True)]
        ids = torch.tensor(padded).to(self.device)
        # a writer sees only what stands before: padding behind needs no mask
        how: dict[str, Any] = {"use_cache": False}
        if self.by == "reward":
            how = {"attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in pads]).to(self.device)}
        with torch.inference_mode():
            told = self.model(input_ids=ids, **how).logits
            if self.by == "reward":
                return [float(one) for one in told[:, 0].float()]
            losses = []
            for row, text, known in zip(told, texts, ids, strict=True):
                said = slice(text.start, len(text.ids))
                before = row[text.start - 1 : len(text.ids) - 1].float()
                losses.append(float(torch.nn.functional.cross_entropy(before, known[said])))
        return losses

    def _told(self, values: list[float]) -> Told:
        if self.by == "ifd":
            asked, alone = values
            value = asked / alone if alone else math.nan
        else:
            value = -values[0] if self.by == "likelihood" else values[0]
        return float(f"{value:.6g}") if math.isfinite(value) else "not_a_number"


def _opened(job: Any) -> Callable[[Any], Any]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    weights = Weights.model_validate(job["weights"])
    folder = materialise(weights, Path(job["cache"]))
    return Scorer(folder, job["name"], job["by"], job["device"], weights.dtype).scores


if __name__ == "__main__":
    answer_lines(_opened)
