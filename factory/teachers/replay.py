"""Answers that exist already: a JSONL file of prompts with their answers, or another journal."""

import hashlib
import sqlite3
from pathlib import Path
from typing import Any, Literal

import msgspec

from factory.errors import RecipeError
from factory.journal import unpack
from factory.rows import Choice, Failure, Outcome, Prompt, Reply, Request
from factory.teachers.anthropic import read_any
from factory.teachers.entry import Entry
from factory.teachers.openai import read_chat


class Replay(Entry):
    """`{type: replay, path}`: a `.jsonl` with `messages` or `prompt` + `completion`, or a `journal.sqlite`.

    From a journal, `model` chooses whose answers are replayed: the identity that `factory journal stats` prints;
    needed only where the journal holds several. Answers are found by what was asked and by draw.
    """

    type: Literal["replay"] = "replay"
    path: str
    model: str | None = None

    def identity(self, runs: Path) -> str:
        path = Path(self.path)
        if not path.is_file():
            raise RecipeError(f"replay: there is no file {self.path!r}; give a .jsonl of answers or a journal.sqlite")
        if path.suffix == ".jsonl":
            return "replay:" + hashlib.file_digest(path.open("rb"), "blake2b").hexdigest()[:32]
        return f"replay:{self.model or 'journal'}"

    def open(self, runs: Path) -> "ReplayTeacher":
        path = Path(self.path)
        answers = _from_jsonl(path) if path.suffix == ".jsonl" else Stored(path, self.model)
        return ReplayTeacher(answers, self.path)


class ReplayTeacher:
    """Looks answers up; what is not there is a failure, never a guess."""

    concurrency = 16

    def __init__(self, answers: "dict[tuple[str, int], bytes] | Stored", path: str) -> None:
        self._answers, self._path = answers, path

    async def send(self, request: Request) -> bytes | Failure:
        asked = Prompt.of(request.messages).id
        body = self._answers.get((asked, request.draw))
        return body or Failure(reason="no_stored_answer", detail=f"{self._path} has no answer for this prompt and draw")

    def read(self, request: Request, body: bytes) -> Outcome:
        return read_chat(body)

    async def close(self) -> None:
        pass


def stored_body(choice: Choice) -> bytes:
    """An answer that we already have, in the shape that a server would send."""
    message = {"role": "assistant", "content": choice.text, "reasoning": choice.reasoning}
    rest = {"finish_reason": choice.finish, "logprob": choice.logprob, "tokens": choice.tokens}
    return msgspec.json.encode({"choices": [{"message": message, **rest}]})


def _from_jsonl(path: Path) -> dict[tuple[str, int], bytes]:
    """Prompt id and draw -> body; several answers to one prompt are its draws, in file order."""
    answers: dict[tuple[str, int], bytes] = {}
    drawn: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Any = msgspec.json.decode(line)
            messages, text = _messages_and_answer(row)
        except (msgspec.DecodeError, KeyError, TypeError, IndexError):
            raise RecipeError(
                f"{path}:{number}: not a row with `messages`, or with `prompt` and `completion`"
            ) from None
        asked = Prompt.of(messages).id
        draw = drawn.get(asked, 0)
        drawn[asked] = draw + 1
        answers[asked, draw] = stored_body(Choice(text=text, finish="stop"))
    return answers


def _messages_and_answer(row: dict[str, Any]) -> tuple[list[Any], str]:
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1]["content"]
    prompt, completion = row["prompt"], row["completion"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages, completion if isinstance(completion, str) else completion[-1]["content"]


class Stored:
    """The answers of one model in a journal, read one at a time: only their places are kept in memory."""

    def __init__(self, path: Path, model: str | None) -> None:
        self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        models = [m for (m,) in self._db.execute("SELECT DISTINCT identity FROM answer")]
        if model is None and len(models) > 1:
            raise RecipeError(f"replay: {path} holds answers of several models; set `model` to one of {models}")
        rows = self._db.execute(
            "SELECT asked, answer.draw, attempt.id, choice FROM answer JOIN attempt ON attempt.id = answer.attempt "
            "WHERE answer.identity = ?",
            [model or (models[0] if models else "")],
        )
        self._places = {(asked, draw): (attempt, choice) for asked, draw, attempt, choice in rows}

    def get(self, key: tuple[str, int]) -> bytes | None:
        """The stored body, with the asked draw as its only choice."""
        if key not in self._places:
            return None
        attempt, choice = self._places[key]
        (body,) = self._db.execute("SELECT body FROM attempt WHERE id = ?", [attempt]).fetchone()
        read = read_any(unpack(body))
        return stored_body(read.choices[choice]) if isinstance(read, Reply) and choice < len(read.choices) else None
