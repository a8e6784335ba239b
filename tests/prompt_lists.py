"""Lists of prompts for tests: written to a folder, read with the shipped ones within reach."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from factory.errors import RecipeError
from factory.prompts import PromptList, PromptLists, PromptSet, load
from factory.rows import Prompt

ROOT = Path(__file__).parent.parent


def find(path: str) -> Path:
    for place in (Path(), ROOT):
        if (place / path).exists():
            return place / path
    raise RecipeError(f"there is no file {path!r}")


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def loaded(path: Path, seed: int = 0, **knobs: Any) -> PromptList:
    (one,) = load([PromptSet(path=str(path), **knobs)], seed, find)
    return one


def lists(seed: int = 0, **sets: dict[str, Any]) -> PromptLists:
    return load([PromptSet(name=name, **knobs) for name, knobs in sets.items()], seed, find)


def short(prompt: Prompt) -> str:
    """A prompt on one line: `u` and `a` are the user and the assistant, `s` is the system message."""
    answer = [f"={prompt.completion}"] if prompt.completion is not None else []
    return " ".join([f"{m['role'][0]}:{m['content']}" for m in prompt.messages] + answer)
