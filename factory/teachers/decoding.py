"""How answers are decoded: seeded draws, stop rules, and beam search, apart from any model.

A draw takes one uniform number per token from its row's own generator and inverts the distribution's cumulative sum in
token-id order. So the same request gives the same text whatever else is in the batch: tiny float differences move a
boundary by as little, where sorting by probability could swap two tokens.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from factory.rows import Sampling

CANDIDATES = 256
"""Tokens that top-p looks at first: sorting a whole vocabulary costs more than the model does on a CPU."""


def pick(logits: Any, rows: list[tuple[Sampling, random.Random]]) -> list[int]:
    """One token per row of `logits` (rows x vocabulary, float), by each row's sampling and its own noise."""
    import torch

    tokens = logits.argmax(-1).tolist()
    drawn = [i for i, (sampling, _) in enumerate(rows) if sampling.temperature > 0]
    if not drawn:
        return [int(token) for token in tokens]
    knobs = [rows[i][0] for i in drawn]
    temperature = torch.tensor([s.temperature for s in knobs], device=logits.device).unsqueeze(1)
    probabilities = torch.softmax(logits[drawn] / temperature, -1)
    probabilities = probabilities * (probabilities >= _floor(probabilities, knobs))
    cumulative = probabilities.double().cumsum(-1)
    noise = torch.tensor([rows[i][1].random() for i in drawn], dtype=torch.float64, device=logits.device).unsqueeze(1)
    picked = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True).squeeze(1)
    for i, token in zip(drawn, picked.clamp_(max=logits.shape[-1] - 1).tolist(), strict=True):
        tokens[i] = token
    return [int(token) for token in tokens]


def _floor(probabilities: Any, knobs: list[Sampling]) -> Any:
    """The smallest probability that each row keeps, by its top_k, top_p and min_p (rows x 1)."""
    import torch

    floor = probabilities.new_tensor([s.min_p for s in knobs]).unsqueeze(1) * probabilities.amax(-1, keepdim=True)
    widest = max((s.top_k for s in knobs), default=0)
    if widest == 0 and all(s.top_p >= 1 for s in knobs):
        return floor
    vocabulary = probabilities.shape[-1]
    top_p = probabilities.new_tensor([s.top_p for s in knobs]).unsqueeze(1)
    best = probabilities.topk(min(max(CANDIDATES, widest), vocabulary), -1).values
    if bool(((best.sum(-1, keepdim=True) < top_p) & (top_p < 1)).any()):
        best = probabilities.sort(-1, descending=True).values
    # nucleus: the fewest best tokens whose mass reaches top_p (Holtzman et al. 2020, section 3.1)
    before = best.cumsum(-1) - best
    nucleus = torch.where(before < top_p, best, best.new_tensor(2.0)).amin(-1, keepdim=True)
    floor = torch.where(top_p < 1, torch.maximum(floor, nucleus), floor)
    kth = [best[i, min(s.top_k, best.shape[-1]) - 1] if s.top_k else best.new_tensor(0.0) for i, s in enumerate(knobs)]
    return torch.maximum(floor, torch.stack(kth).unsqueeze(1))


def penalise(logits: Any, sampling: Sampling, prompt: list[int], answer: list[int]) -> None:
    """Apply repetition, presence and frequency penalties to one row, in place (definitions as in vLLM)."""
    import torch

    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        used, counts = torch.unique(torch.tensor(answer, device=logits.device), return_counts=True)
        logits[used] -= sampling.presence_penalty + sampling.frequency_penalty * counts


class Hypothesis(NamedTuple):
    """A beam's tokens without the end, the sum of their log-probabilities (the end's included), and its score."""

    tokens: list[int]
    logprob: float
    score: float
    finish: str


class BeamSearch:
    """Beam search over one prompt: score = sum of log-probabilities / length ** length_penalty, the end counted.

    `advance` takes log-probabilities (live beams x vocabulary) and says which (parent, token) live on. It stops when no
    live beam can still beat the worst of the `width` best finished ones.
    """

    def __init__(self, width: int, length_penalty: float, max_tokens: int, ends: set[int]) -> None:
        self.width, self.length_penalty, self.max_tokens, self.ends = width, length_penalty, max_tokens, ends
        self.live: list[tuple[list[int], float]] = [([], 0.0)]
        self.finished: list[Hypothesis] = []

    def advance(self, logprobs: Any) -> list[tuple[int, int]]:
        """One token further; returns parents and tokens of the live beams, none when the search has ended."""
        import torch

        sums = (
            torch.tensor([total for _, total in self.live], dtype=torch.float64).unsqueeze(1) + logprobs.double().cpu()
        )
        count = min(2 * self.width, sums.numel())
        best = sums.flatten().topk(count)
        grown: list[tuple[list[int], float]] = []
        steps: list[tuple[int, int]] = []
        for rank, (total, flat) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(flat, sums.shape[1])
            tokens = self.live[parent][0]
            if total == float("-inf"):
                continue
            if token in self.ends:
                if rank < self.width:
                    self._finish(tokens, total, len(tokens) + 1, "stop")
            elif len(grown) < self.width:
                grown.append(([*tokens, token], total))
                steps.append((parent, token))
        self.live = grown
        if grown and len(grown[0][0]) >= self.max_tokens:
            for tokens, total in grown:
                self._finish(tokens, total, len(tokens), "length")
            self.live = []
        if self._hopeless():
            self.live = []
        return steps if self.live else []

    def best(self, count: int) -> list[Hypothesis]:
        return self.finished[:count]

    def _finish(self, tokens: list[int], total: float, length: int, finish: str) -> None:
        self.finished.append(Hypothesis(tokens, total, total / length**self.length_penalty, finish))
        self.finished.sort(key=lambda h: -h.score)
        del self.finished[self.width :]

    def _hopeless(self) -> bool:
        """Whether the best live beam, at the length that flatters it most, stays below what is kept."""
        if not self.live or len(self.finished) < self.width:
            return False
        total = max(total for _, total in self.live)
        length = self.max_tokens if self.length_penalty >= 0 else len(self.live[0][0]) + 1
        return bool(total / length**self.length_penalty <= self.finished[-1].score)


def beam_search(
    step: Callable[[list[list[int]]], Any], width: int, max_tokens: int, ends: set[int], length_penalty: float = 1.0
) -> list[Hypothesis]:
    """The search over any `step`: token lists -> log-probabilities of what follows (lists x vocabulary)."""
    search = BeamSearch(width, length_penalty, max_tokens, ends)
    while search.live:
        search.advance(step([tokens for tokens, _ in search.live]))
    return search.best(width)
