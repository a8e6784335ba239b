"""How answers are decoded: seeded draws, stop rules, and beam search, apart from any model.

A draw takes one uniform number per token from its row's own generator and inverts the distribution's cumulative sum in
token-id order. So the same request gives the same text whatever else is in the batch: tiny float differences move a
boundary by as little, where sorting by probability could swap two tokens.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from factory.rows import Sampling

CANDIDATES = 64
"""Tokens that top-p looks at first: sorting a whole vocabulary costs more than the model does on a CPU."""
MORE_CANDIDATES = 16
"""Where they were too few, it looks at so many times more."""


def pick(logits: Any, rows: list[tuple[Sampling, random.Random]]) -> list[int]:
    """One token per row of `logits` (rows x vocabulary, float), by each row's sampling and its own noise."""
    tokens = [0] * len(rows)
    ways: dict[Callable[..., list[int]], list[int]] = {}
    for i, (sampling, _) in enumerate(rows):
        ways.setdefault(_way(sampling), []).append(i)
    for way, where in ways.items():
        mine = logits if len(where) == len(rows) else logits[where]
        for i, token in zip(where, way(mine, [rows[i] for i in where]), strict=True):
            tokens[i] = token
    return tokens


def _way(sampling: Sampling) -> Callable[..., list[int]]:
    if sampling.temperature == 0:
        return _greedy
    return _from_best if sampling.top_k or sampling.top_p < 1 or sampling.min_p else _from_all


def _greedy(logits: Any, _: Any) -> list[int]:
    # NumPy's argmax takes a tenth of the time of torch's on a CPU
    best = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)
    tokens: list[int] = best.tolist()
    return tokens


def _from_all(logits: Any, rows: list[tuple[Sampling, random.Random]]) -> list[int]:
    """Draws from the whole distribution."""
    import torch

    temperature = logits.new_tensor([s.temperature for s, _ in rows]).unsqueeze(1)
    tokens: list[int] = _invert(torch.softmax(logits / temperature, -1), [noise.random() for _, noise in rows]).tolist()
    return tokens


def _from_best(logits: Any, rows: list[tuple[Sampling, random.Random]]) -> list[int]:
    """Draws from what min_p, top_k and top_p leave of the distribution."""
    import torch

    temperature = logits.new_tensor([s.temperature for s, _ in rows]).unsqueeze(1)
    knobs = [sampling for sampling, _ in rows]
    return _draw_best(torch.softmax(logits / temperature, -1), knobs, [noise.random() for _, noise in rows], CANDIDATES)


def _draw_best(distribution: Any, knobs: list[Sampling], noise: list[float], candidates: int) -> list[int]:
    """Looks at the best `candidates` tokens of each row, and at more where they are too few to tell."""
    vocabulary = distribution.shape[-1]
    count = min(max(candidates, *(s.top_k for s in knobs)), vocabulary)
    probabilities, ids = distribution.topk(count, -1)
    kept, enough = _kept(probabilities, knobs)
    ids, order = ids.sort(-1)
    picked = _invert((probabilities * kept).gather(1, order), noise)
    tokens: list[int] = ids.gather(1, picked.unsqueeze(1)).squeeze(1).tolist()
    lacking = [] if count == vocabulary else (~enough).nonzero().squeeze(1).tolist()
    if lacking:
        again = [knobs[i] for i in lacking], [noise[i] for i in lacking], count * MORE_CANDIDATES
        for i, token in zip(lacking, _draw_best(distribution[lacking], *again), strict=True):
            tokens[i] = token
    return tokens


def _kept(best: Any, knobs: list[Sampling]) -> tuple[Any, Any]:
    """Which of each row's best probabilities (rows x count, descending) its min_p, top_k and top_p keep, in vLLM's order:
    each looks at what the one before it has left. And whether these were enough to tell (rows)."""
    import torch

    count = best.shape[1]
    top_p, min_p = (best.new_tensor([getattr(s, name) for s in knobs]).unsqueeze(1) for name in ("top_p", "min_p"))
    counted = torch.tensor([[0 < s.top_k <= count] for s in knobs], device=best.device)
    kth = torch.tensor([[min(s.top_k or count, count) - 1] for s in knobs], device=best.device)
    floor = torch.maximum(min_p * best[:, :1], best.gather(1, kth) * counted)
    left = best * (best >= floor)
    # what min_p or top_k has cut is all seen; uncut, there may be more than these
    mass = torch.where(counted | (min_p > 0), left.sum(1, keepdim=True), 1.0)
    # nucleus: the fewest best tokens whose mass reaches top_p (Holtzman et al. 2020, section 3.1); equals stay together
    reached = left.cumsum(1) - left >= top_p * mass
    nucleus = left.masked_fill(reached | (left == 0), 2.0).amin(1, keepdim=True)
    kept = (left > 0) & ((left >= nucleus) | (top_p == 1))
    enough = counted | (left[:, -1:] == 0) | ((min_p == 0) & (top_p < 1) & (left.sum(1, keepdim=True) >= top_p))
    return kept, enough.squeeze(1)


def _invert(weights: Any, noise: list[float]) -> Any:
    """The columns that `noise` (0..1, one a row) falls on when each row's weights stand side by side."""
    import torch

    cumulative = weights.double().cumsum(-1)
    at = torch.tensor(noise, dtype=torch.float64, device=weights.device).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp_(max=weights.shape[-1] - 1)


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
        # so many that `width` of them go on, whatever number of them ends
        count = min((1 + max(len(self.ends), 1)) * self.width, sums.numel())
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
