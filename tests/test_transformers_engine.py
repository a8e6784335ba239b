"""The engine of the local teacher beside transformers' own `generate`: architectures, batches, beginnings, limits."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from factory.errors import EngineError
from factory.rows import Beam, Request, Sampling
from factory.teachers.transformers_engine import Engine
from tests.tiny import tiny_model

WORDS = [
    "the",
    "sky",
    "is",
    "blue",
    "and",
    "green",
    "because",
    "it",
    "was",
    "warm",
    "what",
    "colour",
    "of",
    "thing",
    "number",
    "answer",
    "yes",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"), spread=0.2)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def text_of(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(words))


def ask(text: str, system: str = "", seed: int | None = None, **sampling: Any) -> Request:
    messages = [{"role": "system", "content": system}] if system else []
    how = Sampling(**{"temperature": 0.0, "max_tokens": 12} | sampling)
    return Request(identity="m", messages=[*messages, {"role": "user", "content": text}], sampling=how, seed=seed)  # type: ignore[list-item]


def started(folder: Path, batch_size: int = 8, dtype: str = "auto") -> tuple[Engine, dict[int, Any]]:
    told: dict[int, Any] = {}
    return Engine(folder, "tiny", batch_size, "cpu", dtype, told.__setitem__), told


def answers(engine: Engine, told: dict[int, Any], requests: list[Request], waves: int = 1) -> list[Any]:
    """The answers' texts (all beams of a search) to requests that come in `waves`, a few steps apart."""
    told.clear()
    lines = [line for i, request in enumerate(requests) if (line := engine.line(i, request))]
    size = -(-len(lines) // waves)
    waiting = [lines[i : i + size] for i in range(0, len(lines), size)]
    queue = waiting.pop(0)
    while queue or engine.rows or waiting:
        count = engine.fitting(queue)
        engine.admit(queue[:count])
        del queue[:count]
        for _ in range(3):
            if engine.rows:
                engine.step()
        queue += waiting.pop(0) if waiting else []
    assert sorted(told) == list(range(len(requests)))
    return [
        told[i].get("error") or [choice["message"]["content"] for choice in told[i]["choices"]] for i in sorted(told)
    ]


class Plain:
    """transformers' own `generate`, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(self, request: Request) -> list[str]:
        prompt = self.tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        beam = request.sampling.beam
        how = {
            "num_beams": beam.width, "num_return_sequences": beam.width, "length_penalty": beam.length_penalty,
            "early_stopping": "never",
        } if beam else {}  # fmt: skip
        made = self.model.generate(**prompt, do_sample=False, max_new_tokens=request.sampling.max_tokens, **how)
        return [self.tokenizer.decode(row[prompt["input_ids"].shape[1] :], skip_special_tokens=True) for row in made]


# -- architectures ---------------------------------------------------------------------------------------------------------

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}


def tiny_of(folder: Path, llama: Path, architecture: str, **fields: Any) -> Path:
    """A random model of another architecture with the tokenizer of the tiny Llama."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(1)
    shape = GPT2 if architecture == "gpt2" else SHAPE
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **shape | fields,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("gpt2", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {}),
        ("gemma3_text", {"sliding_window": 200}),
        ("smollm3", {}),
        ("olmo2", {}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_architectures_answer_as_under_transformers(
    tmp_path: Path, llama: Path, architecture: str, fields: dict[str, Any]
) -> None:
    folder = tiny_of(tmp_path, llama, architecture, **fields)
    requests = [ask(text_of(i, 2 + 3 * i), max_tokens=6) for i in range(4)]
    requests.append(ask("what is blue", max_tokens=4, beam=Beam(width=3)))
    engine, told = started(folder)
    plain = Plain(folder)
    assert answers(engine, told, requests) == [plain.answers(request) for request in requests]


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("gemma2", {"attn_logit_softcapping": 5.0}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("bloom", {}),
    ],
)
def test_architectures_that_it_would_run_wrongly_are_refused(
    tmp_path: Path, llama: Path, architecture: str, fields: dict[str, Any]
) -> None:
    folder = tiny_of(tmp_path, llama, architecture, **fields)
    with pytest.raises(EngineError, match="use vllm"):
        started(folder)


def test_a_sliding_window_is_a_limit(tmp_path: Path, llama: Path) -> None:
    engine, told = started(tiny_of(tmp_path, llama, "mistral", sliding_window=64))
    short, long = answers(engine, told, [ask("blue", max_tokens=100), ask(text_of(1, 60))])
    assert "maximum context length is 64" in long["message"]
    assert told[0]["usage"]["prompt_tokens"] + told[0]["usage"]["completion_tokens"] <= 64
    assert len(short) == 1


# -- batches -----------------------------------------------------------------------------------------------------------------


def mixed(count: int) -> list[Request]:
    """Greedy, draws of each kind and beams; prompts that begin alike for long, for a little, and not at all."""
    systems = ["", text_of(100, 40), text_of(100, 40) + text_of(101, 9), text_of(102, 30)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 1.0},
        {"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.2},
        {"beam": Beam(width=3, length_penalty=0.8)},
    ]
    return [
        ask(text_of(i // 2, 1 + i % 9), systems[i % 4], seed=i, max_tokens=1 + i % 14, **kinds[i % 5])
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def alone(llama: Path) -> list[Any]:
    """The answers to `mixed(40)`, asked one by one."""
    with torch.inference_mode():
        engine, told = started(llama, batch_size=1)
        return [answers(engine, told, [request])[0] for request in mixed(40)]


@pytest.mark.parametrize(("batch_size", "waves"), [(3, 1), (8, 3), (40, 1), (40, 8)])
def test_an_answer_is_the_same_alone_and_in_any_batch(
    llama: Path, alone: list[Any], batch_size: int, waves: int
) -> None:
    engine, told = started(llama, batch_size)
    assert answers(engine, told, mixed(40), waves) == alone
    order = random.Random(waves).sample(range(40), 40)
    assert answers(engine, told, [mixed(40)[i] for i in order], waves) == [alone[i] for i in order]


def test_draws_of_one_prompt_differ_and_come_again(llama: Path) -> None:
    engine, told = started(llama)
    requests = [ask("what is blue", seed=seed, temperature=1.0) for seed in range(8)]
    first = answers(engine, told, requests)
    assert len({text for (text,) in first}) == 8
    assert answers(engine, told, requests[::-1]) == first[::-1]


def test_equal_prompts_are_computed_once(llama: Path) -> None:
    """Counted by what the model is given to compute, the padding included."""
    engine, told = started(llama, batch_size=64)
    tokens = 0

    def count(module: Any, given: Any) -> None:
        nonlocal tokens
        tokens += given[0].numel()

    engine.model.get_input_embeddings().register_forward_pre_hook(count)
    system = text_of(7, 60)
    prompts = [text_of(i, 5) for i in range(4)]
    answers(
        engine, told, [ask(text, system, seed=k, temperature=1.0, max_tokens=1) for text in prompts for k in range(16)]
    )
    lengths = {usage["usage"]["prompt_tokens"] for usage in told.values()}
    longest = max(lengths)
    assert longest <= tokens <= 2 * longest  # the common beginning once, and four short endings; not 64 prompts


def test_memory_limits_the_batch_and_nothing_is_lost(llama: Path, alone: list[Any]) -> None:
    engine, told = started(llama, batch_size=40)
    lines = [line for i, request in enumerate(mixed(40)) if (line := engine.line(i, request))]
    assert engine.fitting(lines) > 20
    engine.cells = 5 * max(line.columns for line in lines)
    assert engine.fitting(lines) <= 8
    engine.cells = 1  # one at a time goes on
    assert engine.fitting(lines) == 1
    assert answers(engine, told, mixed(40)[:8]) == alone[:8]


def test_free_memory_is_shared_out_in_columns(llama: Path) -> None:
    engine, _ = started(llama)
    per_column = 2 * 2 * 2 * 16 * 4  # layers x (keys, values) x heads x size x bytes
    assert 1e8 < engine.cells * per_column < 1e12


# -- limits ------------------------------------------------------------------------------------------------------------------


def test_answers_end_at_their_limit_and_at_the_context(llama: Path) -> None:
    engine, told = started(llama)
    long = text_of(3, 110)
    requests = [
        ask("blue", max_tokens=5), ask(long, max_tokens=500), ask(long, max_tokens=500, beam=Beam(width=2)),
        ask(text_of(4, 300)),
    ]  # fmt: skip
    *_, refused = answers(engine, told, requests)
    assert told[0]["choices"][0]["tokens"] == 5
    assert told[0]["choices"][0]["finish_reason"] == "length"
    for i in (1, 2):
        prompt, choice = told[i]["usage"]["prompt_tokens"], told[i]["choices"][0]
        assert prompt + choice["tokens"] <= 512
        assert choice["finish_reason"] == "stop" or prompt + choice["tokens"] == 512
    assert refused["code"] == "context_length_exceeded"


def test_a_stop_string_ends_the_answer_before_it(llama: Path) -> None:
    engine, told = started(llama)
    ((whole,),) = answers(engine, told, [ask("blue", max_tokens=12)])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    ((cut,),) = answers(engine, told, [ask("blue", max_tokens=12, stop=["never seen", stop])])
    assert cut == whole[: whole.index(stop)]
    assert told[0]["choices"][0]["finish_reason"] == "stop"
    assert told[0]["choices"][0]["tokens"] < 12


def test_logprobs_are_the_models(llama: Path) -> None:
    engine, told = started(llama)
    line = engine.line(0, ask("what is green", seed=3, temperature=1.4, top_k=30, max_tokens=6))
    assert line is not None
    engine.admit([line])
    while engine.rows:
        engine.step()
    logits = Plain(llama).model(torch.tensor([[*line.prompt, *line.answer]])).logits[0, len(line.prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(line.answer)[:, None]).sum()
    assert told[0]["choices"][0]["logprob"] == pytest.approx(float(expected), abs=1e-3)


# -- what cannot be run --------------------------------------------------------------------------------------------------------


def test_a_template_that_refuses_the_messages_fails_that_request_alone(tmp_path: Path, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine, told = started(tmp_path)
    refused, answered = answers(engine, told, [ask("blue", system="be kind"), ask("blue")])
    assert "no system role" in refused["message"]
    assert len(answered) == 1


def test_a_model_without_template_or_with_broken_weights_is_refused(tmp_path: Path, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="NaN"):
        started(tmp_path)
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="no chat template"):
        started(tmp_path)


def test_other_number_formats_answer_too(llama: Path) -> None:
    engine, told = started(llama, dtype="bfloat16")
    assert len(answers(engine, told, [ask("blue"), ask("green", seed=1, temperature=0.8)])) == 2
