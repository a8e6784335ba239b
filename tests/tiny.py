"""Tiny real models for tests: a random Llama, a byte-level BPE tokenizer, a chat template; made in a second or two."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from factory.rows import Message

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "The sky is blue and the grass is green.",
    "What is the colour of thing number 12?",
    "Because: it is warm.\nAnswer: yes",
]


def tiny_model(
    folder: Path, *, layers: int = 2, hidden: int = 64, seed: int = 0, vocab: int = 400, context: int = 512,
    text: list[str] = TEXT, spread: float = 0.02, sharpness: float = 1.0,
) -> Path:  # fmt: skip
    """A folder that transformers, TRL and vLLM load: `layers` layers, about 0.2 M parameters, its end is <|im_end|>.

    `text` is what the tokenizer learns its words from, `context` the longest row in tokens. The weights are random; the
    larger their `spread`, the surer the model is of what it says, and `sharpness` multiplies its logits. vLLM on a CPU
    needs heads of 32 or more, so `hidden` of 128.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, initializer_range=spread,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data.mul_(sharpness)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward_model(folder: Path, *, labels: int = 1, pad: bool = True, both_ways: bool = False) -> Path:
    """A tiny sequence classifier with the same tokenizer and template; without `pad` its config knows no padding; one that
    reads `both_ways` is a Bert, in which every token sees every other."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig

    tiny_model(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=labels)
    if both_ways:
        config = BertConfig(
            vocab_size=config.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=labels,
            intermediate_size=64, pad_token_id=config.pad_token_id, initializer_range=0.5,
        )  # fmt: skip
    if not pad:
        config.pad_token_id = None
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def saying_model(folder: Path, sentences: list[str], sure: float = 24.0) -> Path:
    """A tiny model that answers anything with one of `sentences`, drawn at random, and ends: no training needed.

    Attention and feed-forward add nothing, so that the next token depends on the last one alone; which one is written
    into the output weights. A token that stands in two sentences leads on into both.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model(folder, text=[*TEXT, *sentences * 9])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    start = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)[-1]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        known = model.model.embed_tokens.weight
        known /= known.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1e-6)  # the padding token has no direction
        follows: set[tuple[int, int]] = set()
        for sentence in sentences:
            chain = [start, *tokenizer.encode(sentence, add_special_tokens=False), tokenizer.eos_token_id]
            follows.update(pairwise(chain))
        for last, following in sorted(follows):
            model.lm_head.weight[following] += sure * known[last] / known.shape[1]
    model.save_pretrained(folder)
    return folder


def taught_model(
    folder: Path,
    asked: list[list[Message]],
    answers: list[str],
    *,
    steps: int = 200,
    enough: float = 0.05,
    **shape: Any,
) -> Path:
    """A tiny model that answers like `answers` when it is asked like `asked` (in pairs), and ends; trained until the loss
    is `enough`. It starts with attention that looks everywhere alike, so what is said anywhere is learnt quickly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = [message["content"] for messages in asked for message in messages]
    tiny_model(folder, text=[*TEXT, *words, *answers], **shape)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows, begin = [], []
    for messages, answer in zip(asked, answers, strict=True):
        head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        begin.append(len(head))
        rows.append([*head, *tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    labels = torch.tensor([
        [-100] * start + row[start:] + [-100] * (longest - len(row)) for row, start in zip(rows, begin, strict=True)
    ])  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < enough:
            break
    model.save_pretrained(folder)
    return folder
