"""Worked examples in the conversation: what a small teacher follows best (few-shot prompting, Brown et al. 2020)."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from factory import yamlfile
from factory.asking.system import with_system
from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.prompt_files import Find, read
from factory.prompt_rows import Unreadable, prompt_reader
from factory.rows import Message, Prompt


class Examples(Knobs):
    """`ask: {examples: {path}}`: a system message, worked examples as earlier turns, then the prompt.

    The file is a `.jsonl` of rows with `prompt` and `completion`, or a `.yaml` with a list of such rows under
    `examples` and, if wanted, `system`. `system` here replaces the file's; an empty one leaves it out.
    """

    kind: Literal["examples"] = "examples"
    path: str
    system: str | None = None

    def open(self, find: Find) -> "ExamplesAsker":
        """Read the file; RecipeError with file and line."""
        path = find(self.path)
        told, rows = _from_yaml(path) if path.suffix in (".yaml", ".yml") else ("", list(_from_lines(path)))
        turns = [turn for place, row in rows for turn in _turns(row, place)]
        if not turns:
            raise RecipeError(f"{path}: there are no examples in it")
        return ExamplesAsker(told if self.system is None else self.system, turns)


class ExamplesAsker(NamedTuple):
    system: str
    turns: list[Message]

    def messages(self, prompt: Prompt, seed: int) -> list[Message]:
        return with_system(self.system, prompt.messages, self.turns)


def _from_yaml(path: Path) -> tuple[str, list[tuple[str, Any]]]:
    """The system text, and the rows with their places."""
    data, places = yamlfile.read(path)

    def place(*at: str | int) -> str:
        return ":".join(map(str, places[at]))

    if not isinstance(data, dict) or not isinstance(data.get("examples"), list):
        raise RecipeError(f"{path}:1: write a map with `examples:`, a list of rows with prompt and completion")
    for key in data.keys() - {"system", "examples"}:
        raise RecipeError(f"{place(key)}: unknown key {key!r}; known here: system, examples")
    system = data.get("system") or ""
    if not isinstance(system, str):
        raise RecipeError(f"{place('system')}: system must be a text")
    return system, [(place("examples", i), row) for i, row in enumerate(data["examples"])]


def _from_lines(path: Path) -> Any:
    """The rows of any file that prompts can be read from, with their places; `path` is found already."""
    for line, row in read(str(path), None, lambda _: path):
        if row is not None:
            yield f"{path}:{line}", row


def _turns(row: Any, place: str) -> list[Message]:
    """One example as turns: the question's messages and the assistant's answer."""
    try:
        if not isinstance(row, dict):
            raise Unreadable("it is not a map")
        example = prompt_reader({}, "")(row, place)
    except Unreadable as e:
        raise RecipeError(f"{place}: not a worked example: {e}") from None
    if not example.text.strip() or example.completion is None:
        raise RecipeError(f"{place}: a worked example needs a prompt and a completion, both with text")
    if example.messages[0]["role"] == "system":
        raise RecipeError(f"{place}: a worked example has no system message; put it into `system`")
    return [*example.messages, Message(role="assistant", content=example.completion)]
