"""The child process of the filter `semantic_duplicates`: `python -m factory.encoder JOB`. Lines of JSON in and out.

A text's vector is the mean of the model's last hidden states over all its tokens, of length 1; a text longer than the
model's context is read in pieces. Vectors wait in a temporary file, 4 bytes a dimension, and are compared block by block:
each with all that stay, so that nothing is missed.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from factory.child import answer_lines, loading
from factory.errors import EngineError
from factory.weights import Weights, materialise, number_format

with loading():
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

TOKENS = {"cpu": 1024, "cuda": 16384}
"""Of a batch, padding included."""
BLOCK = 512
"""Rows that are compared at once ..."""
STAYING = 8192
"""... with so many of those that stay: 16 MB of similarities, whatever the number of rows."""


class Encoder:
    """A model, and the vectors of the texts so far."""

    def __init__(self, folder: Path, name: str, device: str | None, dtype: str) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, told = AutoModel.from_pretrained(
            folder, dtype=getattr(torch, number_format(dtype, self.device.type == "cuda")), trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        if lacking := sorted(key for key in told["missing_keys"] if "pooler" not in key):
            raise EngineError(f"{name} has no trained encoder: {lacking[0]} is missing")
        self.model.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = self.model.config.get_text_config()
        self.width: int = config.hidden_size
        places = getattr(config, "max_position_embeddings", None) or 1 << 30
        # RoBERTa's table of places has two that no token takes: its tokenizer knows
        self.context = min(places, self.tokenizer.model_max_length or places)
        self.vectors: IO[bytes] = tempfile.NamedTemporaryFile(prefix="factory-vectors-")  # noqa: SIM115  (as long as we)
        self.count = 0

    def add(self, texts: list[str]) -> list[bool]:
        """Keep the texts' vectors; for each whether it has one: a text without a token has none."""
        pieces: list[list[int]] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            for piece in self._pieces(text):
                pieces.append(piece)
                owners.append(i)
        sums = torch.zeros(len(texts), self.width)
        for batch in self._batches(pieces):
            for at, total in zip(batch, self._totals([pieces[at] for at in batch]), strict=True):
                sums[owners[at]] += total
        vectors = torch.nn.functional.normalize(sums, dim=1)  # the mean's direction is that of the sum
        self.vectors.write(vectors.numpy().tobytes())
        self.count += len(texts)
        return [bool(sound) for sound in (torch.isfinite(vectors).all(1) & (sums != 0).any(1)).tolist()]

    def _pieces(self, text: str) -> list[list[int]]:
        ids = self.tokenizer(text, verbose=False)["input_ids"] if text.strip() else []
        return [ids[at : at + self.context] for at in range(0, len(ids), self.context)]

    def _batches(self, pieces: list[list[int]]) -> Iterator[list[int]]:
        """Places of pieces, the longest first: what does not fit in memory fails at once."""
        most, batch = TOKENS.get(self.device.type, TOKENS["cuda"]), list[int]()
        for at in sorted(range(len(pieces)), key=lambda at: -len(pieces[at])):
            if batch and (len(batch) + 1) * len(pieces[batch[0]]) > most:
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch

    @torch.inference_mode()
    def _totals(self, pieces: list[list[int]]) -> torch.Tensor:
        """Of each piece the sum of its last hidden states."""
        longest = max(map(len, pieces))
        pads = [longest - len(piece) for piece in pieces]
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([piece + [pad] * n for piece, n in zip(pieces, pads, strict=True)], device=self.device)
        mask = torch.tensor([[1] * (longest - n) + [0] * n for n in pads], device=self.device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        total: torch.Tensor = (states * mask[:, :, None]).sum(1).cpu()
        return total

    def twins(self, order: list[int], threshold: float) -> list[tuple[int, int, float]]:
        """In this order each row stays, or is too near to one that stays: (row, the nearest, similarity). Then all vectors
        are forgotten."""
        self.vectors.flush()
        known = torch.from_file(self.vectors.name, size=self.count * self.width).view(self.count, self.width)
        found: list[tuple[int, int, float]] = []
        staying = torch.empty(0, dtype=torch.long)
        for start in range(0, len(order), BLOCK):
            rows = order[start : start + BLOCK]
            block = known[rows].to(self.device)
            near, at = self._nearest(block, known, staying)
            among = (block @ block.T).cpu()
            here: list[int] = []  # places in the block of those that stay
            for place, row in enumerate(rows):
                similarity, twin = near[place], at[place]
                if here and float(among[place, here].max()) > similarity:
                    nearest = here[int(among[place, here].argmax())]
                    similarity, twin = float(among[place, nearest]), rows[nearest]
                similarity = round(similarity, 4)  # what is behind hides in what order a product was summed up
                if similarity >= threshold:
                    found.append((row, twin, min(similarity, 1.0)))
                else:
                    here.append(place)
            staying = torch.cat([staying, torch.tensor([rows[place] for place in here], dtype=torch.long)])
        self.forget()
        return found

    def _nearest(
        self, block: torch.Tensor, known: torch.Tensor, staying: torch.Tensor
    ) -> tuple[list[float], list[int]]:
        """Of each row the similarity to the nearest of those that stay, and which it is."""
        best = torch.full((len(block),), -2.0)
        at = torch.zeros(len(block), dtype=torch.long)
        for start in range(0, len(staying), STAYING):
            some = staying[start : start + STAYING]
            value, place = (block @ known[some].to(self.device).T).cpu().max(1)
            better = value > best
            best, at = torch.where(better, value, best), torch.where(better, some[place], at)
        return best.tolist(), at.tolist()

    def forget(self) -> None:
        self.vectors.seek(0)
        self.vectors.truncate()
        self.count = 0


def _opened(job: Any) -> Callable[[Any], Any]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    weights = Weights.model_validate(job["weights"])
    encoder = Encoder(materialise(weights, Path(job["cache"])), job["name"], job["device"], weights.dtype)
    return lambda question: encoder.add(question["texts"]) if "texts" in question else encoder.twins(**question)


if __name__ == "__main__":
    answer_lines(_opened)
