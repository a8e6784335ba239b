"""How tokens are picked and beams are grown, against exact probabilities, exhaustive search and transformers' own beams."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.rows import Sampling
from factory.teachers.decoding import CANDIDATES, BeamSearch, beam_search, penalise, pick
from tests.tiny import tiny_model

DRAWS = 6_000
VOCABULARY = 3 * CANDIDATES  # so large that the best candidates are not all there is


def logits_of(seed: int, spread: float, rows: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def exact(logits: torch.Tensor, sampling: Sampling) -> list[float]:
    """The distribution that a token must have, by vLLM's definitions, one cut after the other, each renormalised."""
    p = torch.softmax(logits.double() / sampling.temperature, -1)
    p = torch.where(p >= sampling.min_p * p.max(), p, 0.0)
    if sampling.top_k:
        p = torch.where(p >= p.sort(descending=True).values[min(sampling.top_k, len(p)) - 1], p, 0.0)
    p = p / p.sum()
    if sampling.top_p < 1:
        best = p.sort(descending=True).values
        inside = best.cumsum(0) - best < sampling.top_p
        p = torch.where(p >= best[inside].min(), p, 0.0)  # equals stay together
    return (p / p.sum()).tolist()


# -- draws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=5),
        Sampling(top_k=1),
        Sampling(top_k=VOCABULARY * 2),
        Sampling(top_p=0.5),
        Sampling(top_p=0.95),
        Sampling(temperature=0.7, top_p=0.999),
        Sampling(min_p=0.2),
        Sampling(temperature=1.5, min_p=0.01, top_p=0.9),
        Sampling(temperature=0.8, top_k=20, top_p=0.7, min_p=0.05),
        Sampling(top_k=CANDIDATES + 9, top_p=0.99),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(sampling: Sampling, spread: float) -> None:
    logits = logits_of(1, spread)
    rows = [(sampling, random.Random(seed)) for seed in range(DRAWS)]
    counts = torch.bincount(torch.tensor(pick(logits.expand(DRAWS, -1), rows)), minlength=VOCABULARY).tolist()
    for token, (count, p) in enumerate(zip(counts, exact(logits[0], sampling), strict=True)):
        assert abs(count - DRAWS * p) <= 5 * math.sqrt(DRAWS * p * (1 - p)) + 3 * (p > 0), (token, count, p)


def test_top_p_counts_the_mass_that_top_k_and_min_p_have_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(200, 1)
    for narrowed in (Sampling(top_k=2, top_p=0.55), Sampling(min_p=0.6, top_p=0.55)):
        # of the two that are left, the first has 0.57 of the mass
        assert set(pick(logits, [(narrowed, random.Random(i)) for i in range(200)])) == {0}


def test_greedy_takes_the_best_token_and_uses_no_noise() -> None:
    logits = logits_of(2, 1.0, rows=50)
    noises = [random.Random(i) for i in range(50)]
    assert pick(logits, [(Sampling(temperature=0), noise) for noise in noises]) == logits.argmax(-1).tolist()
    assert [noise.random() for noise in noises] == [random.Random(i).random() for i in range(50)]


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.2, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 7, CANDIDATES + 1]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
"""Few values of each, so that a batch holds rows of every kind."""


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(samplings, min_size=2, max_size=12),
    seed=st.integers(0, 999),
    order=st.randoms(use_true_random=False),
)
def test_a_row_gets_the_same_token_alone_in_any_batch_and_in_any_order(
    kinds: list[Sampling], seed: int, order: random.Random
) -> None:
    logits = torch.cat([logits_of(seed + i, spread=0.1 + i, rows=1) for i in range(len(kinds))])
    alone = [pick(logits[i : i + 1], [(kind, random.Random(i))])[0] for i, kind in enumerate(kinds)]
    assert pick(logits, [(kind, random.Random(i)) for i, kind in enumerate(kinds)]) == alone
    shuffled = order.sample(range(len(kinds)), len(kinds))
    moved = pick(logits[shuffled], [(kinds[i], random.Random(i)) for i in shuffled])
    assert moved == [alone[i] for i in shuffled]


@settings(max_examples=60, deadline=None)
@given(sampling=samplings, seed=st.integers(0, 999), spread=st.sampled_from([0.0, 0.2, 2.0, 30.0]))
def test_only_tokens_that_every_cut_keeps_are_drawn(sampling: Sampling, seed: int, spread: float) -> None:
    logits = logits_of(seed, spread)
    allowed = exact(logits[0], sampling) if sampling.temperature else [float(x == logits.max()) for x in logits[0]]
    for token in pick(logits.expand(20, -1), [(sampling, random.Random(seed + i)) for i in range(20)]):
        assert allowed[token] > 0


def test_a_tiny_error_in_the_logits_hardly_ever_changes_a_draw() -> None:
    """Why tokens stand in the order of their ids: in order of probability, two near equals would change places."""
    logits = logits_of(3, 0.01, rows=2000)  # near equals everywhere
    noisy = logits + 1e-6 * logits_of(4, 1.0, rows=2000)
    for sampling in (Sampling(), Sampling(temperature=0.7, top_p=0.95), Sampling(top_p=0.5)):
        drawn = [pick(x, [(sampling, random.Random(i)) for i in range(2000)]) for x in (logits, noisy)]
        assert sum(a != b for a, b in zip(*drawn, strict=True)) <= 4


# -- penalties ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sampling=st.builds(
        Sampling,
        repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
        presence_penalty=st.sampled_from([-1.0, 0.0, 0.7]),
        frequency_penalty=st.sampled_from([0.0, 0.4]),
    ),
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    answer=st.lists(st.integers(0, 9), max_size=8),
)
def test_penalties_are_vllms(sampling: Sampling, prompt: list[int], answer: list[int]) -> None:
    row = logits_of(5, 2.0, vocabulary=10)[0]
    expected = row.tolist()
    for token in range(10):
        if token in prompt or token in answer:
            factor = sampling.repetition_penalty
            expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
        if token in answer:
            expected[token] -= sampling.presence_penalty + sampling.frequency_penalty * answer.count(token)
    penalise(row, sampling, prompt, answer)
    assert row.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


# -- beams -------------------------------------------------------------------------------------------------------------------

Step = Callable[[list[list[int]]], torch.Tensor]


def toy(seed: int, vocabulary: int = 4) -> Step:
    """A model whose next token depends on the whole text before it."""

    def after(tokens: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *tokens)) % 2**31)
        return torch.log_softmax(2 * torch.randn(vocabulary, generator=generator, dtype=torch.float64), -1)

    return lambda texts: torch.stack([after(tokens) for tokens in texts])


def everything(step: Step, max_tokens: int, ends: set[int], penalty: float) -> Iterator[tuple[float, list[int], str]]:
    """Every answer there is: (score, tokens without the end, finish)."""
    vocabulary = step([[]]).shape[1]
    others = [token for token in range(vocabulary) if token not in ends]
    for length in range(max_tokens + 1):
        for tokens in itertools.product(others, repeat=length):
            total = sum(float(step([list(tokens[:i])])[0, token]) for i, token in enumerate(tokens))
            if length == max_tokens:
                yield total / length**penalty, list(tokens), "length"
            else:
                for end in ends:
                    ended = total + float(step([list(tokens)])[0, end])
                    yield ended / (length + 1) ** penalty, list(tokens), "stop"


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize(("ends", "max_tokens"), [({0}, 4), ({2}, 3), ({0, 3}, 4), ({1}, 1), (set(), 3)])
def test_a_wide_beam_is_exhaustive_search(ends: set[int], max_tokens: int, penalty: float) -> None:
    for seed in range(4):
        step = toy(seed)
        best = sorted(everything(step, max_tokens, ends, penalty), key=lambda a: -a[0])
        found = beam_search(step, 400, max_tokens, ends, penalty)
        assert [(h.tokens, h.finish) for h in found] == [(tokens, finish) for _, tokens, finish in best]
        assert [h.score for h in found] == pytest.approx([score for score, _, _ in best])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000), width=st.integers(1, 8), max_tokens=st.integers(1, 6),
    ends=st.sets(st.integers(0, 4), max_size=3), penalty=st.sampled_from([-0.5, 0.0, 1.0, 1.7]),
)  # fmt: skip
def test_what_a_beam_finds_is_real_sorted_and_distinct(
    seed: int, width: int, max_tokens: int, ends: set[int], penalty: float
) -> None:
    step = toy(seed, vocabulary=5)
    found = beam_search(step, width, max_tokens, ends, penalty)
    real = {(tuple(tokens), finish): score for score, tokens, finish in everything(step, max_tokens, ends, penalty)} if len(ends) == 1 and max_tokens < 4 else {}  # fmt: skip
    assert 1 <= len(found) <= width
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    if len(ends) <= 1:
        assert len({(tuple(h.tokens), h.finish) for h in found}) == len(found)
    for h in found:
        assert len(h.tokens) + (h.finish == "stop") <= max_tokens
        assert not ends & set(h.tokens)
        assert h.score == pytest.approx(h.logprob / (len(h.tokens) + (h.finish == "stop")) ** penalty)
        if real:
            assert h.score == pytest.approx(real[tuple(h.tokens), h.finish])


def test_many_end_tokens_do_not_starve_the_beams() -> None:
    """The best candidates may all be ends: the search must go on with what comes after them."""
    logprobs = torch.tensor([0.2, 0.19, 0.18, 0.17, 0.16, 0.1], dtype=torch.float64).log().unsqueeze(0)
    search = BeamSearch(2, 1.0, 8, ends={0, 1, 2, 3})
    assert search.advance(logprobs) == [(0, 4), (0, 5)]
    assert [h.finish for h in search.finished] == ["stop", "stop"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path_factory.mktemp("tiny"), spread=0.25)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 3, 5])
def test_a_narrow_beam_is_transformers_own(tiny: Any, width: int, penalty: float) -> None:
    """`early_stopping="never"` is the rule that stops when no live beam can still win, as ours does."""
    limit, finishes = 7, set()
    ends = set(range(3, tiny.config.vocab_size, 8))  # a random model would hardly ever end with one of them
    for seed in range(6):
        prompt = torch.randint(5, tiny.config.vocab_size, (1, 6), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            theirs = tiny.generate(
                prompt, attention_mask=torch.ones_like(prompt), num_beams=width, num_return_sequences=width, max_new_tokens=limit,
                length_penalty=penalty, early_stopping="never", do_sample=False, return_dict_in_generate=True, output_scores=True,
                eos_token_id=sorted(ends), pad_token_id=0,
            )  # fmt: skip

            def step(texts: list[list[int]], prompt: torch.Tensor = prompt) -> torch.Tensor:
                ids = torch.cat([prompt.expand(len(texts), -1), torch.tensor(texts, dtype=torch.long)], 1)
                return torch.log_softmax(tiny(ids).logits[:, -1], -1)

            ours = beam_search(step, width, limit, ends, penalty)
        cut = [
            next((i for i, token in enumerate(row) if token in ends), limit) for row in theirs.sequences[:, 6:].tolist()
        ]
        assert ours[0].tokens == theirs.sequences[0, 6 : 6 + cut[0]].tolist()
        assert [h.score for h in ours] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        finishes |= {h.finish for h in ours}
    assert finishes >= {"stop"}


def test_a_search_ends_as_soon_as_nothing_can_win() -> None:
    sure = torch.tensor([[0.98, 0.01, 0.01]], dtype=torch.float64).log()
    asked = 0

    def step(texts: list[list[int]]) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return sure.expand(len(texts), -1)

    found = beam_search(step, 1, 100, {0}, length_penalty=0.0)
    assert (found[0].tokens, found[0].finish) == ([], "stop")
    assert asked == 1
