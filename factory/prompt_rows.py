"""One row of a file as a `Prompt`: the forms that are recognised, or the columns that a recipe names.

    prompt (+ completion)            a text, or messages; as TRL has it
    messages                         OpenAI's turns: role, content
    conversations                    ShareGPT's turns: from, value
    system_prompt, question, response     OpenOrca
    instruction, input, output       Alpaca
    chosen, rejected (+ prompt)      preferences, as TRL has them: answers, or two talks that differ in the last turn

All of them may have `system`, `reference`, `tags` (a list, or a text with commas) and `completion` beside. A row that
ends with the assistant brings its own answer: it becomes `Prompt.completion`; a `score` is that answer's. KTO's `label`
(true, false; where a column is named for it, 1 and 0 as well) says whether it is wanted, as `chosen` and `rejected` do: the
score `label` is 1 or 0.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from factory.errors import RecipeError
from factory.rows import LABEL, Message, Prompt
from factory.template import TooMuchOutput, compiled, is_template

Column = Literal[
    "prompt", "system", "messages", "reference", "completion", "tags", "score", "label", "chosen", "rejected"
]
Fields = dict[str, Any]
Reader = Callable[[dict[str, Any], str], Prompt]

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
WANTED = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}


class Unreadable(Exception):
    """A row whose values are not what its columns promise. It is counted, with this text as the reason."""


def prompt_reader(columns: Mapping[Column, str], source: str) -> Reader:
    """From (row, place) to a prompt of the list `source`.

    Raises Unreadable for a row that holds the wrong things, RecipeError (starting with the place, `file:line`) for one
    that does not have the columns at all.
    """
    mapped = {name: _column(text, f"columns.{name}") for name, text in columns.items()}
    by_form = not {"prompt", "messages"} & mapped.keys()
    alone = {"chosen", "rejected"} <= mapped.keys()  # may hold the prompt, too

    def read(row: dict[str, Any], place: str) -> Prompt:
        if not mapped:
            return _prompt({"label": _kto(row), **_recognised(row, place)}, source)
        # also where only the other columns are named: such an answer may be unwanted
        fields: Fields = {"label": _kto(row)}
        wrong: list[str] = []  # all that is wrong with the columns is told at once
        for name, value in mapped.items():
            try:
                fields[name] = value(row, place)
            except RecipeError as e:
                wrong.append(str(e))
        if by_form:
            try:
                fields = {**_recognised(row, place), **fields}
            except RecipeError as e:
                wrong += [] if alone else [str(e)]
        if wrong:
            raise RecipeError("\n".join(wrong))
        return _prompt(fields, source)

    return read


def _column(text: str, where: str) -> Callable[[dict[str, Any], str], Any]:
    """How one field is made of a row: a column by name, or a template."""
    from jinja2 import UndefinedError

    if not is_template(text):

        def look_up(row: dict[str, Any], place: str) -> Any:
            if text in row:
                return row[text]
            near = difflib.get_close_matches(text, row, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RecipeError(f"{place}: {where}: there is no column {text!r}; {hint}{_columns_of(row)}")

        return look_up

    if where == "columns.messages":
        raise RecipeError(f"{where}: a template makes text; name a column that holds messages, or map `prompt`")
    render = compiled(text, where)

    def rendered(row: dict[str, Any], place: str) -> str:
        try:
            return render(row)
        except TooMuchOutput:
            raise Unreadable(f"{where} renders to too much text") from None
        except UndefinedError as e:
            hint = "write {{ name|default('') }} where a column may be missing"
            raise RecipeError(f"{place}: {where}: {e.message}; {_columns_of(row)}; {hint}") from None
        except Exception as e:
            raise RecipeError(f"{place}: {where}: the template fails: {type(e).__name__}: {e}") from e

    return rendered


def _recognised(row: dict[str, Any], place: str) -> Fields:
    """The fields of a row in one of the known forms."""
    beside: Fields = {name: row[name] for name in ("system", "reference", "tags", "completion") if name in row}
    if preferred := row.get("completion") is None and {"chosen", "rejected"} <= row.keys():
        beside |= {"chosen": row["chosen"], "rejected": row["rejected"]}
    if "prompt" in row:
        return {"messages" if isinstance(row["prompt"], list) else "prompt": row["prompt"], **beside}
    if "messages" in row:
        return {"messages": row["messages"], **beside}
    if "conversations" in row:
        return {"messages": row["conversations"], **beside}
    if {"system_prompt", "question"} <= row.keys():
        return {**beside, "prompt": row["question"], "system": row["system_prompt"], "completion": row.get("response")}
    if "instruction" in row:
        if row.get("history"):
            raise Unreadable("Alpaca's history is not supported; give messages")
        parts = [_text(row.get(name), name) for name in ("instruction", "input")]
        return {**beside, "prompt": "\n\n".join(filter(None, parts)), "completion": row.get("output")}
    if preferred:
        return beside
    forms = "prompt, messages, conversations, instruction, system_prompt + question, chosen + rejected"
    raise RecipeError(
        f"{place}: none of the known forms ({forms}); "
        f"{_columns_of(row)}; say which one to ask with `columns: {{prompt: NAME}}`"
    )


def _columns_of(row: Iterable[str]) -> str:
    return f"the row has {', '.join(repr(name)[:60] for name in row) or 'no columns'}"


def _prompt(fields: Fields, source: str) -> Prompt:
    """Fields as a prompt; Unreadable where they hold the wrong things, or contradict each other."""
    messages, scores, rejected = _asked(fields), _scores(fields), ""
    completion = _completion(fields.get("completion"))
    if fields.get("chosen") is not None or fields.get("rejected") is not None:
        if completion:
            raise Unreadable("two answers: chosen and the completion")
        messages, completion, rejected = _preference(messages, fields.get("chosen"), fields.get("rejected"))
        scores[LABEL] = 1.0
    elif messages and messages[-1]["role"] == "assistant":
        if completion:
            raise Unreadable("two answers: the last message and the completion")
        completion = messages.pop()["content"]
    if system := _text(fields.get("system"), "system"):
        if messages and messages[0]["role"] == "system":
            raise Unreadable("two system messages: the first message and the column")
        messages.insert(0, Message(role="system", content=system))
    if not messages or messages[-1]["role"] != "user":
        raise Unreadable("no question: the messages do not end with the user, or with an answer to the user")
    answered = bool(completion.strip())
    return Prompt.of(
        messages, source=source, tags=_tags(fields.get("tags")), completion=completion if answered else None,
        rejected=rejected or None, scores=scores if answered else {},
        reference=_text(fields.get("reference"), "reference") or None,
    )  # fmt: skip


def _asked(fields: Fields) -> list[Message]:
    """What is said before the answer; nothing where chosen and rejected are whole talks."""
    if "messages" in fields:
        return _messages(fields["messages"])
    if "prompt" not in fields and isinstance(fields.get("chosen"), list):
        return []
    return [Message(role="user", content=_text(fields.get("prompt"), "prompt"))]


def _preference(messages: list[Message], chosen: Any, rejected: Any) -> tuple[list[Message], str, str]:
    """The prompt, the better and the worse answer of a preference row."""
    sides = [_side(chosen, "chosen"), _side(rejected, "rejected")]
    (before, better), (before_too, worse) = sides
    if before != before_too:
        raise Unreadable("chosen and rejected answer different prompts")
    if before and not all(turn in before for turn in messages):  # often the first user turn alone stands beside
        raise Unreadable("chosen holds another prompt than the row")
    if better.strip() == worse.strip():
        raise Unreadable("chosen and rejected are the same")
    return before or messages, better, worse


def _side(value: Any, name: str) -> tuple[list[Message], str]:
    """One side of a preference: the turns before the answer, where it is a talk, and the answer."""
    turns = _messages(value) if isinstance(value, list) else [Message(role="assistant", content=_text(value, name))]
    if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise Unreadable(f"{name} does not end with an answer")
    return turns[:-1], turns[-1]["content"]


def _scores(fields: Fields) -> dict[str, float]:
    """The scores that a row has of its answer; one that nobody gave is missing, not zero."""
    scores: dict[str, float] = {}
    if (score := _number(fields.get("score"))) is not None:
        scores["score"] = score
    if (label := fields.get("label")) is not None and str(label).strip():
        if (wanted := WANTED.get(str(label).strip().lower())) is None:
            raise Unreadable(f"label is not true or false but {str(label)[:40]!r}")
        scores[LABEL] = wanted
    return scores


def _kto(row: dict[str, Any]) -> Any:
    """A column `label` that nobody named: true or false, also as text (CSV has nothing else); a class of a
    classification is no label of ours."""
    label = row.get("label")
    return label if str(label).strip().lower() in ("true", "false") else None


def _number(value: Any) -> float | None:
    """A number, also as text (CSV has nothing else); None for nothing, `N/A` and what is not finite."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "none", "null")):
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise Unreadable(f"score is not a number but {str(value)[:40]!r}")
    return number if math.isfinite(number) else None


def _messages(turns: Any) -> list[Message]:
    """Turns in either spelling. Blank system turns say nothing and are left out."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unreadable("messages are not a list of turns with role and content")
    messages = []
    for number, turn in enumerate(turns):
        role = str(turn.get("role", turn.get("from")))
        if role not in ROLES:
            raise Unreadable(f"turn {number} has the role {role[:40]!r}; known: {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, str):
            raise Unreadable(f"turn {number} holds no text")
        if role != "system" or content.strip():
            messages.append(Message(role=ROLES[role], content=content))
    return messages


def _completion(value: Any) -> str:
    """An answer as a text, or as one assistant message."""
    if not isinstance(value, list):
        return _text(value, "completion")
    messages = _messages(value)
    if [message["role"] for message in messages] != ["assistant"]:
        raise Unreadable("the completion is not one assistant message")
    return messages[0]["content"]


def _text(value: Any, name: str) -> str:
    """A value as text: numbers as JSON writes them, nothing as nothing; blank text is nothing, too, as is NaN, by which
    tables of numbers say that one is missing."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise Unreadable(f"{name} is not text but {type(value).__name__}")


def _tags(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [_text(tag, "a tag") for tag in value]
    return [tag.strip() for tag in _text(value, "tags").split(",") if tag.strip()]
