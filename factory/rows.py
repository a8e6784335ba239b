"""The nouns that flow: prompt -> request -> outcome -> sample -> training row or pair.

Rows cross by the million, so they are slotted, frozen `msgspec` structs; one line of JSONL is one row.
People never write these by hand: what people write (recipes) is pydantic, see `knobs.py`.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, Literal, TypedDict

import msgspec

encode = msgspec.json.Encoder(order="deterministic").encode


class Message(TypedDict):
    """One turn, in the shape that both the wire and TRL use."""

    role: str
    content: str


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all rows: frozen, keyword-only, fields at their default are left out of the JSON."""


def digest(*parts: Any, size: int = 16) -> str:
    """Hex hash of JSON-encodable parts, keys sorted: equal content, equal hash, on every machine."""
    return hashlib.blake2b(encode(parts), digest_size=size).hexdigest()


class Prompt(Row, frozen=True):
    """What is to be answered.

    `id` hashes the messages alone. `reference` is the known right answer (for checks, Seq-Inter and the
    `reference` teacher); `completion` is an answer that came with the row and may be curated as it is.
    """

    id: str
    messages: list[Message]
    reference: str | None = None
    completion: str | None = None
    source: str = ""
    tags: list[str] = []

    @staticmethod
    def of(messages: list[Message], **rest: Any) -> "Prompt":
        return Prompt(id=digest([[m["role"], m["content"]] for m in messages], size=8), messages=messages, **rest)

    @property
    def text(self) -> str:
        """The last user turn: what filters compare an answer with."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


class Beam(Row, frozen=True):
    """Beam search: `width` hypotheses, scored by log-probability / length ** `length_penalty`."""

    width: int
    length_penalty: float = 1.0


class Sampling(Row, frozen=True):
    """How an answer is decoded; the names are vLLM's. `temperature=0` is greedy; `beam` overrides draws."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = []
    max_tokens: int = 1024
    beam: Beam | None = None


class Request(Row, frozen=True):
    """What is asked once: `n` draws of one prompt, numbered from `draw` (for beams: the `n` best, by rank).

    `seed` is None where the endpoint's seeds are not to be trusted. `prompt` is the prompt's id, kept for the
    ledger only: it is not part of what makes two answers the same.
    """

    identity: str
    messages: list[Message]
    sampling: Sampling
    draw: int = 0
    n: int = 1
    seed: int | None = None
    prompt: str = ""


class Usage(Row, frozen=True):
    """Tokens of one request as the server counts them; `seconds` is compute time of a local model."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    seconds: float = 0.0


class Choice(Row, frozen=True):
    """One answer. `finish` is the server's own word: only `stop` means that the model ended by itself."""

    text: str
    finish: str
    reasoning: str | None = None
    logprob: float | None = None
    tokens: int | None = None


class Reply(Row, frozen=True):
    """What came back. `model` is the name that the server gave."""

    choices: list[Choice]
    usage: Usage = Usage()
    model: str = ""


Reason = Literal[
    "auth", "bad_json", "bad_request", "budget", "context_overflow", "empty", "engine_died", "filtered_output",
    "missing_choice", "model_not_found", "no_stored_answer", "outage", "quota", "rate_limited", "reasoning_only",
    "refused_input", "server_error", "timeout", "too_large", "tool_calls", "transport", "unknown_finish", "wrong_model",
]  # fmt: skip


class Failure(Row, frozen=True):
    """A request that ended without an answer; `reason` is from a closed vocabulary, `detail` is for people."""

    reason: Reason
    detail: str = ""
    status: int | None = None
    retry_after: float | None = None


Outcome = Reply | Failure


class Verdict(Row, frozen=True):
    """What a filter said of a sample.

    `keep` is True, False, or None when it could not be told (broken is not bad). `reason` names the failure and
    carries the measured value ("words=3<5"); its part before "=" or ":" is what the funnel counts.
    `evidence` is the twin's id, the benchmark item, the pattern that matched ...
    """

    filter: str
    keep: bool | None
    reason: str = ""
    score: float | None = None
    evidence: str | None = None


class Sample(Row, frozen=True):
    """One answer on its way to becoming data: the record that flows through the stages."""

    id: str
    prompt: Prompt
    asked: list[Message]
    response: str
    model: str
    draw: int = 0
    finish: str = "stop"
    reasoning: str | None = None
    logprob: float | None = None
    tokens: int | None = None
    scores: dict[str, float] = {}
    verdicts: list[Verdict] = []
    parents: list[str] = []

    @staticmethod
    def key(prompt: Prompt, asked: list[Message], model: str, draw: int) -> str:
        return digest(prompt.id, [[m["role"], m["content"]] for m in asked], model, draw, size=8)

    def judged(self, verdict: Verdict) -> "Sample":
        """The same sample with one more verdict."""
        return msgspec.structs.replace(self, verdicts=[*self.verdicts, verdict])

    def scored(self, **scores: float) -> "Sample":
        """The same sample with more scores."""
        return msgspec.structs.replace(self, scores={**self.scores, **scores})

    @property
    def ending(self) -> Literal["kept", "dropped", "failed"]:
        """Where the sample stands: the last verdict decides."""
        keep = self.verdicts[-1].keep if self.verdicts else True
        return "kept" if keep else "failed" if keep is None else "dropped"


class TrainRow(Row, frozen=True):
    """What supervised training reads: the asking is already erased."""

    id: str
    prompt: list[Message]
    completion: list[Message]
    task: str = "answer"
    weight: float = 1.0
    source: str = ""
    model: str = ""
    scores: dict[str, float] = {}
    parents: list[str] = []


class Pair(Row, frozen=True):
    """What preference training reads; `margin` is score(chosen) - score(rejected), in the judge's units."""

    id: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float = 0.0
    chosen_model: str = ""
    rejected_model: str = ""
    chosen_score: float | None = None
    rejected_score: float | None = None
    source: str = ""
    parents: list[str] = []


decode_sample = msgspec.json.Decoder(Sample).decode
decode_prompt = msgspec.json.Decoder(Prompt).decode


def by_prompt(samples: Iterable[Sample]) -> Iterable[list[Sample]]:
    """Neighbouring samples of one prompt as one group; rows of one prompt always stand together on disk."""
    group: list[Sample] = []
    for sample in samples:
        if group and group[0].prompt.id != sample.prompt.id:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
