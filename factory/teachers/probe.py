"""What an endpoint honours, found out by asking it: a handful of tiny requests, sent by `factory check --live` alone.

Servers ignore keys in silence, so each question is put so that an ignored key shows in the answer. What a busy server or
a broken connection leaves open stays "not known".
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from factory.rows import Failure, Message, Request, Sampling
from factory.run import write_json
from factory.teachers.anthropic import Anthropic, AnthropicTeacher
from factory.teachers.capabilities import FILE, Capabilities
from factory.teachers.failures import RULES
from factory.teachers.openai import REASONING_FIELDS, OpenAI, OpenAITeacher
from factory.teachers.rate_limits import RateLimits
from factory.teachers.strict import strict_json

QUESTION = "Name a random animal and a random number. Plain words, no JSON."
TOKENS = 64
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"type": "string"}},
    "required": ["animal"],
    "additionalProperties": False,
}
FORMATS: dict[str, dict[str, Any]] = {
    "json_object": {"type": "json_object"},
    "json_schema": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
}


class Probe(NamedTuple):
    """What was found. `model` is the name in the answer; `failure` says why there was none, and then nothing is known."""

    model: str = ""
    seconds: float = 0.0
    sent: int = 0
    rate_limits: RateLimits | None = None
    capabilities: Capabilities = Capabilities()
    failure: Failure | None = None


async def probe(entry: OpenAI | Anthropic, runs: Path) -> Probe:
    """Ask an endpoint who it is and what it honours."""
    asking = _Asking(entry.open(runs))
    try:
        return await asking.all()
    finally:
        await asking.teacher.close()


def record(runs: Path, identity: str, found: Probe) -> None:
    """Keep what was found, so that later runs plan by it."""
    path = runs / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = msgspec.json.decode(path.read_bytes()) if path.is_file() else {}
    whole[identity] = {
        "checked": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model": found.model,
        "seconds": round(found.seconds, 3),
        "rate_limits": {what: window._asdict() for what, window in found.rate_limits._asdict().items()}
        if found.rate_limits
        else None,
        "capabilities": found.capabilities.model_dump(exclude_none=True, exclude_defaults=True),
    }
    write_json(path, whole)


class _Asking:
    """The questions to one endpoint. An answer is the parsed body, False for a refusal, None where nothing is known."""

    def __init__(self, teacher: OpenAITeacher | AnthropicTeacher) -> None:
        self.teacher = teacher
        self.sent = 0
        message: Message = {"role": "user", "content": QUESTION}
        self.request = Request(identity="", messages=[message], sampling=Sampling(max_tokens=TOKENS))
        self.body = teacher.body(self.request)

    async def all(self) -> Probe:
        started = time.monotonic()
        raw = await self._send(self.body)
        limit = "max_tokens" if "max_tokens" in self.body else "max_completion_tokens"
        if isinstance(raw, Failure) and "max_completion_tokens" in raw.detail and limit == "max_tokens":
            limit = "max_completion_tokens"
            self.body = {limit if key == "max_tokens" else key: value for key, value in self.body.items()}
            started = time.monotonic()
            raw = await self._send(self.body)
        seconds = time.monotonic() - started
        outcome = raw if isinstance(raw, Failure) else self.teacher.read(self.request, raw)
        data = None if isinstance(raw, Failure) else strict_json(raw)
        if not isinstance(data, dict) or (isinstance(outcome, Failure) and RULES[outcome.reason].action != "set aside"):
            assert isinstance(outcome, Failure)
            return Probe(sent=self.sent, failure=outcome)
        known = await self._capabilities(limit, data)
        return Probe(str(data.get("model") or ""), seconds, self.sent, self.teacher.rate_limits, known)

    async def _capabilities(self, limit: Any, plain: dict[str, Any]) -> Capabilities:
        if isinstance(self.teacher, AnthropicTeacher):
            return Capabilities(structured=await self._structured(["json_schema"]))
        several = await self._ask(n=2)
        odds = await self._ask(logprobs=True)
        return Capabilities(
            n=len(several["choices"]) > 1 if several else several,
            seed=await self._seed(),
            logprobs=_logprobs(odds) if odds else odds,
            structured=await self._structured(["json_object", "json_schema"]),
            limit=limit,
            reasoning=next((name for name in REASONING_FIELDS if isinstance(_message(plain).get(name), str)), None),
        )

    async def _seed(self) -> bool | None:
        """Honoured if the same seed gives the same text, and another seed another one."""
        answers = [await self._ask(seed=seed) for seed in (1, 1, 2)]
        if not all(answers):
            return False if False in answers else None
        first, again, other = (_message(answer or {}).get("content") for answer in answers)
        return bool(first) and first == again != other

    async def _structured(self, forms: list[Any]) -> Any:
        """The forms of `response_format` that made it answer with JSON, although it was asked for plain words."""
        found: list[str] = []
        for form in forms:
            sampling = msgspec.structs.replace(self.request.sampling, response_format=FORMATS[form])
            wanted = self.teacher.body(msgspec.structs.replace(self.request, sampling=sampling))
            changed = {key: value for key, value in wanted.items() if key not in self.body}
            answer = await self._ask(**changed)
            if answer is None:
                return None
            if answer and (form == "json_object" or "animal" in _json_text(answer)) and _json_text(answer):
                found.append(form)
        return found

    async def _ask(self, **changed: Any) -> Any:
        raw = await self._send(self.body | changed)
        data = raw if isinstance(raw, Failure) else strict_json(raw)
        if isinstance(data, Failure):
            return None if RULES[data.reason].action in ("wait", "retry") else False
        answer = "content" if isinstance(self.teacher, AnthropicTeacher) else "choices"
        parts = data.get(answer) if isinstance(data, dict) else None
        return data if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts) else None

    async def _send(self, body: dict[str, Any]) -> bytes | Failure:
        self.sent += 1
        return await self.teacher.post(body)


def _message(data: dict[str, Any]) -> dict[str, Any]:
    choices = data.get("choices")
    message = choices[0].get("message") if choices and isinstance(choices[0], dict) else None
    return message if isinstance(message, dict) else {}


def _logprobs(data: dict[str, Any]) -> bool:
    told = data["choices"][0].get("logprobs")
    return isinstance(told, dict) and bool(told.get("content"))


def _json_text(data: dict[str, Any]) -> dict[str, Any]:
    """The answer's text as the JSON object that it is; empty if it is none."""
    native = data.get("content")
    text = (
        "".join(str(b.get("text") or "") for b in native) if isinstance(native, list) else _message(data).get("content")
    )
    made = strict_json(text.encode()) if isinstance(text, str) else None
    return made if isinstance(made, dict) else {}
