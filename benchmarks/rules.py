"""The text rules: rows a second through `curate` on one core, beside the bare reading of the rows; and flat memory.

Answers of about 125 words to prompts of about 30, with a system message; every hundredth is bad in one of several ways. Rows
come decoded one after another from a generator, as a stage reads them, and are given on at once. Docstrings of Python show
how often rules drop prose that is not ours.
"""

import argparse
import ast
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._figures import Figure, child, judged, main
from factory.curate import Curate, curate
from factory.rows import Message, Prompt, Sample, by_prompt

RULES: list[Any] = [
    "finished", {"words": {"min": 5, "max": 800}}, {"ratio": {"min": 0.1, "max": 100}}, {"format": {"pattern": r"\S", "full": False}},
    "no_refusal", "repetition", "copied_prompt", "leakage", "trace", "personal_data",
]  # fmt: skip
DEAR: list[Any] = [{"language": {"allowed": ["en"]}}, {"tokens": {"max": 4096}}]
SYSTEM = Message(
    role="system", content="You are a patient teacher. Always answer in plain words and give one example from life."
)
SENTENCES = [
    "The {} stands near the {}, and nobody knows since when.", "If you want to understand a {}, look at its {} first.",
    "In {}, most people would not think of the {} at all.", "There are three reasons: cost, time, and the {} of the {}.",
    "It's often said that a {} needs no {}, but that isn't quite right.", "You can measure the {} with a simple {}.",
    "For example, a {} of 12 cm holds {} for about two days.", "Before 1950 the {} was rare, and a {} cost a month's pay.",
    "Let us compare the {} with the {}.", "So the {} follows from the {}, which was to be shown.",
    "My advice: begin with the {}, and leave the {} for later.", "A good {} costs little; a bad {} costs a whole winter.",
    "Nobody had seen such a {} before, not even the {} makers.", "Put the {} next to the {} and wait for 20 minutes.",
]  # fmt: skip
WORDS = [
    "river", "stone", "garden", "winter", "lamp", "copper", "music", "paper", "morning", "window", "bridge", "forest", "sugar",
    "letter", "engine", "silver", "valley", "market", "thunder", "blanket", "harbour", "candle", "meadow", "pocket", "ladder",
    "orange", "pencil", "mirror", "island", "button", "teacher", "question", "method", "number",
]  # fmt: skip
FAULTS = [
    "I'm sorry, but I can't help with that.", "and so on " * 30, "The answer is here.<|im_end|>",
    "Okay, so the user wants to know about this. I should explain it.", "Write to lena.hartmann@posteo.de for more.",
]  # fmt: skip


class Counted:
    """A tokenizer for the filter `tokens`: one that is trained on the sentences, from the library that students use."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        texts = (sample.response for sample in rows(500))
        self._tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, show_progress=False))

    def tokenizer(self, name: str | None) -> Callable[[str], int]:
        return lambda text: len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def text(draw: random.Random, words: int) -> str:
    """Sentences in any order, none twice, up to about so many words."""
    said: list[str] = []
    for sentence in draw.sample(SENTENCES, len(SENTENCES)):
        if sum(len(one.split()) for one in said) >= words:
            break
        said.append(sentence.format(draw.choice(WORDS), draw.choice(WORDS)))
    return " ".join(said)


def rows(count: int) -> Iterator[Sample]:
    """Samples, each of a prompt of its own; texts come from a pool, so that making them costs little beside the rules."""
    draw = random.Random(5)
    prompts = [text(draw, 25) for _ in range(1000)]
    pool = [text(draw, 115) for _ in range(2003)]
    for i in range(count):
        asked = [SYSTEM, Message(role="user", content=f"{i}: {prompts[i % 1000]}")]
        answer = FAULTS[i // 100 % len(FAULTS)] if i % 100 == 99 else f"{pool[i % 2003]} That is {i}."
        yield Sample(id=str(i), prompt=Prompt(id=str(i), messages=asked), asked=asked, response=answer, model="m")


def foreign() -> list[Sample]:
    """Passages that nobody here wrote: the longer docstrings in half of Python's standard library."""
    said: list[str] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::2]:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
        said += filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders)))
    asked = Prompt.of([Message(role="user", content="Explain it.")])
    long = [text for text in said if len(text.split()) >= 25]
    return [
        Sample(id=str(i), prompt=asked, asked=asked.messages, response=text, model="m") for i, text in enumerate(long)
    ]


def passed(filters: list[Any], count: int, kit: Any) -> tuple[float, int]:
    """Processor seconds for so many rows through the stage, those of making the rows aside; and how many were kept."""
    before = time.process_time()
    for _ in by_prompt(rows(count)):
        pass
    bare = time.process_time() - before
    knobs = Curate.model_validate({"filters": filters})
    before = time.process_time()
    kept = sum(sample.ending == "kept" for sample in curate(knobs, lambda: by_prompt(rows(count)), kit))
    return time.process_time() - before - bare, kept


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    full, count = not arguments.small, arguments.rows
    few, many = arguments.stream // 100, arguments.stream  # before this process grows: a child begins with its size
    before, after = (child("benchmarks.rules", "--child", size).peak_mb for size in (few, many))
    yield Figure(f"rules.peak_mb_{few}_rows", round(before, 1))
    yield Figure(f"rules.peak_mb_{many}_rows", round(after, 1))
    yield judged("rules.growth", after / before - 1, "<= 0.1", full)
    kit = Counted()
    yield Figure("rules.words_an_answer", round(sum(len(s.response.split()) for s in rows(90)) / 90, 1))
    rates = {"cheap": list[float](), "all": list[float]()}
    kept = 0
    for _ in range(5):
        for name, filters in (("cheap", RULES), ("all", [*RULES, *DEAR])):
            seconds, kept = passed(filters, count, kit)
            rates[name].append(count / seconds)
    yield judged("rules.rows_s_without_language_and_tokens", median(rates["cheap"]), ">= 5000", full)
    yield judged("rules.rows_s_with_both", median(rates["all"]), ">= 1000", full)
    passages = foreign()
    dropped = [
        s for s in curate(Curate.model_validate({"filters": RULES[4:]}), lambda: [passages], kit) if s.ending != "kept"
    ]
    yield Figure("rules.docstrings_of_python_dropped_of_1000", round(1000 * len(dropped) / len(passages), 2))
    yield judged("rules.planted_faults_that_stay", kept - (count - count // 100), "== 0")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        passed(RULES, int(sys.argv[2]), None)
    else:
        main(__doc__, measure, rows=(10_000, 500), stream=(1_000_000, 10_000))
