"""The `transformers` teacher beside a naive loop: batches of 32 prompts in their order through `model.generate`, greedy.

Both load the same weights first (SmolLM2-135M; with --small a random model of 0.2 M parameters) and are timed from then
on. Where a text differs, the bare model is asked how far apart the two candidate tokens were: a tie has no right answer.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._figures import Figure, child, judged, main

WEIGHTS = Path("weights/SmolLM2-135M-Instruct.Q4_1.gguf")
LISTS = ("everyday", "tasks", "chat", "simple_sentences")
BATCH = 32
TIE = 0.01
"""Difference of logits, as float32 sums in another order can make it."""


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    model = _tiny(arguments.folder) if arguments.small else _real(arguments.folder)
    asked = arguments.folder / "asked.json"
    asked.write_text(
        json.dumps({"model": str(model), "questions": _questions(arguments.prompts), "limit": arguments.tokens})
    )
    told: dict[str, list[dict[str, Any]]] = {"factory": [], "naive": []}
    for _ in range(arguments.pairs):
        for name, results in told.items():
            results.append(_run(name, asked, arguments.folder / "out.json"))
    speeds = {name: [one["tokens"] / one["seconds"] for one in results] for name, results in told.items()}
    ratios = [mine / naive for mine, naive in zip(speeds["factory"], speeds["naive"], strict=True)]
    yield Figure("local.tokens_per_second", round(statistics.median(speeds["factory"]), 1))
    yield Figure("local.naive_tokens_per_second", round(statistics.median(speeds["naive"]), 1))
    yield judged("local.speed_ratio_to_naive_loop", statistics.median(ratios), ">= 3", not arguments.small)
    ours, theirs = told["factory"][-1]["texts"], told["naive"][-1]["texts"]
    differ = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    yield judged("local.share_of_same_greedy_texts", 1 - len(differ) / len(ours), ">= 0.99", not arguments.small)
    asked.write_text(json.dumps({**json.loads(asked.read_text()), "pairs": [[i, ours[i], theirs[i]] for i in differ]}))
    unexplained = _run("ties", asked, arguments.folder / "out.json")["unexplained"] if differ else 0
    yield judged("local.differing_texts_that_are_no_ties", unexplained, "== 0")


def _run(name: str, asked: Path, out: Path) -> dict[str, Any]:
    cost = child("benchmarks.local", name, asked, out, threads=2)
    assert cost.exit_code == 0, name
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _questions(count: int) -> list[str]:
    """Those that ship, all lists mixed, as often as needed; a number makes repeated ones different."""
    rows = [json.loads(line) for name in LISTS for line in Path(f"prompts/{name}.jsonl").read_text().splitlines()]
    texts = [row["prompt"] for row in rows]
    step = 37  # no common divisor with their number: lengths are mixed
    return [texts[i * step % len(texts)] + (f" ({i})" if i >= len(texts) else "") for i in range(count)]


def _real(folder: Path) -> Path:
    from factory.weights import Weights, materialise_in_child

    return materialise_in_child(Weights(model=str(WEIGHTS)), folder / "weights")


def _tiny(folder: Path) -> Path:
    from tests.tiny import tiny_model

    return tiny_model(folder / "tiny")


# -- the two loops, each in a process of its own ---------------------------------------------------------------------


def _factory(asked: dict[str, Any]) -> dict[str, Any]:
    return asyncio.run(_teach(asked))


async def _teach(asked: dict[str, Any]) -> dict[str, Any]:
    from factory.rows import Reply, Request, Sampling
    from factory.teachers.transformers import Transformers

    entry = Transformers(model=asked["model"], dtype="float32")
    teacher = entry.open(Path())
    how = Sampling(temperature=0.0, max_tokens=asked["limit"])
    requests = [
        Request(identity="m", messages=[{"role": "user", "content": q}], sampling=how) for q in asked["questions"]
    ]
    await teacher.send(msgspec.structs.replace(requests[0], sampling=msgspec.structs.replace(how, max_tokens=1)))
    gate = asyncio.Semaphore(teacher.concurrency)

    async def send(request: Request) -> bytes:
        async with gate:
            body = await teacher.send(request)
        assert isinstance(body, bytes), body
        return body

    started = time.monotonic()
    bodies = await asyncio.gather(*map(send, requests))
    seconds = time.monotonic() - started
    replies = [teacher.read(request, body) for request, body in zip(requests, bodies, strict=True)]
    await teacher.close()
    tokens = sum(reply.usage.completion_tokens for reply in replies if isinstance(reply, Reply))
    texts = [reply.choices[0].text if isinstance(reply, Reply) else "" for reply in replies]
    return {"seconds": seconds, "tokens": tokens, "texts": texts}


def _naive(asked: dict[str, Any]) -> dict[str, Any]:
    import torch

    model, tokenizer = _load(asked["model"])
    texts: list[str] = []
    tokens = 0
    started = time.monotonic()
    for first in range(0, len(asked["questions"]), BATCH):
        batch = [_prompt(tokenizer, q) for q in asked["questions"][first : first + BATCH]]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=asked["limit"], do_sample=False)
        for row in out[:, inputs["input_ids"].shape[1] :].tolist():
            length = next((i + 1 for i, token in enumerate(row) if token == tokenizer.eos_token_id), len(row))
            tokens += length
            texts.append(tokenizer.decode(row[:length], skip_special_tokens=True))
    return {"seconds": time.monotonic() - started, "tokens": tokens, "texts": texts}


def _ties(asked: dict[str, Any]) -> dict[str, Any]:
    """Of the texts that differ, how many do so where the bare model's choice was clear."""
    import torch

    model, tokenizer = _load(asked["model"])
    unexplained = 0
    for number, ours, theirs in asked["pairs"]:
        start = tokenizer(_prompt(tokenizer, asked["questions"][number]), add_special_tokens=False)["input_ids"]
        a, b = (
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in (ours, theirs)
        )
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        with torch.inference_mode():
            logits = model(torch.tensor([[*start, *a[:at]]])).logits[0, -1]
        unexplained += abs(float(logits[a[at]] - logits[b[at]])) > TIE
    return {"unexplained": unexplained}


def _load(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def _prompt(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


LOOPS = {"factory": _factory, "naive": _naive, "ties": _ties}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in LOOPS:
        Path(sys.argv[3]).write_text(json.dumps(LOOPS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
    else:
        main(__doc__, measure, prompts=(96, 12), tokens=(48, 8), pairs=(5, 1))
