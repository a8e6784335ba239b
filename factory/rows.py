"""The nouns that flow: prompt -> request -> outcome -> sample -> training row or pair.

Rows cross by the million, so they are slotted, frozen `msgspec` structs; one line of JSONL is one row.
People never write these by hand: what people write (recipes) is pydantic, see `knobs.py`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from itertools import chain
from typing import Any, Literal, NamedTuple, TypedDict

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
    `reference` teacher); `completion` is an answer that came with the row and may be curated as it is; `scores` are that
    answer's, and `rejected` is the one that people (or another judge) found worse.
    """

    id: str
    messages: list[Message]
    reference: str | None = None
    completion: str | None = None
    rejected: str | None = None
    scores: dict[str, float] = {}
    source: str = ""
    tags: list[str] = []

    @staticmethod
    def of(messages: list[Message], **rest: Any) -> "Prompt":
        return Prompt(id=digest([[m["role"], m["content"]] for m in messages], size=8), messages=messages, **rest)

    @property
    def text(self) -> str:
        """The last user turn: what filters compare an answer with."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


LABEL = "label"
"""The score of answers that came as wanted (1) or not wanted (0): preference rows, and KTO's, who has the word."""


GIVEN = "given"
"""The model of answers that came with their rows."""


class Beam(Row, frozen=True):
    """Beam search: `width` hypotheses, scored by log-probability / length ** `length_penalty`."""

    width: int
    length_penalty: float = 1.0


class Sampling(Row, frozen=True):
    """How an answer is decoded; the names are vLLM's. `temperature=0` is greedy; `beam` overrides draws.

    `response_format` is the wire's own: `{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": ...}`.
    `logprobs` asks a server for the log-probability of each answer; local models and beams tell it anyway.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = []
    logprobs: bool = False
    max_tokens: int = 1024
    beam: Beam | None = None
    response_format: dict[str, Any] | None = None


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

    def plus(self, other: "Usage") -> "Usage":
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class Cost(NamedTuple):
    """What an attempt turned out to cost; until that is known, what was reserved for it counts."""

    usage: Usage = Usage()
    usd: Decimal = Decimal(0)


FREE = Cost()


TRUNCATED = frozenset({"length", "unknown"})
"""How an answer ends that a larger limit may make whole; `unknown`: the server did not say how it ended."""
CUT = TRUNCATED | {"reasoning_only"}
"""The same, with the failure that a small limit brings about: the reasoning took all of it."""


class Choice(Row, frozen=True):
    """One answer. `finish` is the server's own word: only `stop` means that the model ended by itself.

    `served` is which version of the model the server says it is from: "name system_fingerprint".
    """

    text: str
    finish: str
    reasoning: str | None = None
    logprob: float | None = None
    tokens: int | None = None
    served: str = ""


class Reply(Row, frozen=True):
    """What came back. `model` is the name that the server gave.

    `failed` says why some of the choices that came are no answers; what is still missing after them never came.
    `counted` is whether the server told its usage: where it did not, nobody knows that the answer was free.
    """

    choices: list[Choice]
    usage: Usage = Usage()
    model: str = ""
    failed: list["Failure"] = []
    counted: bool = True


Reason = Literal[
    "auth", "bad_encoding", "bad_json", "bad_request", "body_too_large", "budget", "conflict", "context_overflow",
    "empty", "engine_died", "filtered_output", "forbidden", "gateway_timeout", "html_page", "misread_request",
    "missing_choice", "model_not_found", "no_stored_answer", "not_answered", "outage", "overloaded", "quota", "rate_limited",
    "reasoning_only", "reasoning_unclosed", "redirect", "refused", "refused_input", "server_error", "special_tokens",
    "timeout", "tls", "too_large", "tool_calls", "transport", "unsafe_json", "unsupported_n", "unsupported_parameter",
    "wrong_model",
]  # fmt: skip
"""Why there is no answer. `teachers/failures.py` says what each of them means for the run."""


class Failure(Row, frozen=True):
    """A request that ended without an answer; `reason` is from a closed vocabulary, `detail` is for people.

    `usage` is what the server counted for a body that is no answer, where it told.
    """

    reason: Reason
    detail: str = ""
    status: int | None = None
    retry_after: float | None = None
    usage: Usage | None = None


Outcome = Reply | Failure


def endings(outcome: Outcome, n: int) -> list[tuple[str, int | None]]:
    """How each draw of a stored body ended, with its tokens: its answers first, then what came but is no answer.

    The ending of an answer is the server's word, that of a failure its reason.
    """
    if isinstance(outcome, Failure):
        return [(outcome.reason, None)] * n
    good: list[tuple[str, int | None]] = [(choice.finish, choice.tokens) for choice in outcome.choices]
    return [*good, *((failure.reason, None) for failure in outcome.failed)][:n]


def kind_of(reason: str) -> str:
    """What the funnel counts of a reason, which may carry a measured value behind "=" or ":"."""
    return reason.partition("=")[0].partition(":")[0]


class Look(Row, frozen=True):
    """What a look at a batch has found: so many requests answered; `ended` is the provider's word for how it ended.

    `refused`: the provider ended it before any of its requests ran. `succeeded`: of the answered ones, those with an answer.
    """

    answered: int
    succeeded: int = 0
    ended: str | None = None
    refused: Failure | None = None


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
    served: str = ""
    scores: dict[str, float] = {}
    verdicts: list[Verdict] = []
    parents: list[str] = []

    @staticmethod
    def key(prompt: Prompt, asked: list[Message], model: str, draw: int) -> str:
        return digest(prompt.id, [[m["role"], m["content"]] for m in asked], model, draw, size=8)

    def judged(self, verdict: Verdict) -> "Sample":
        """The same sample with one more verdict."""
        return msgspec.structs.replace(self, verdicts=[*self.verdicts, verdict])

    def scored(self, /, **scores: float) -> "Sample":
        """The same sample with more scores."""
        return msgspec.structs.replace(self, scores={**self.scores, **scores})

    def value(self, by: str) -> float | None:
        """A score by its name, or `logprob`; None where there is none."""
        return self.logprob if by == "logprob" else self.scores.get(by)

    @property
    def ending(self) -> Literal["kept", "dropped", "failed"]:
        """Where the sample stands: the last verdict decides."""
        keep = self.verdicts[-1].keep if self.verdicts else True
        return "kept" if keep else "failed" if keep is None else "dropped"


class TrainRow(Row, frozen=True):
    """What supervised training reads: the asking is already erased. The first `masked` characters of the completion are
    seen, but not learned."""

    id: str
    prompt: list[Message]
    completion: list[Message]
    masked: int = 0
    task: str = "answer"
    weight: float = 1.0
    source: str = ""
    model: str = ""
    tags: list[str] = []
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


class Unpaired(Row, frozen=True):
    """What KTO reads: an answer, and whether it is desirable."""

    id: str
    prompt: list[Message]
    completion: list[Message]
    label: bool
    score: float | None = None
    source: str = ""
    model: str = ""
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


def union(sources: list[Callable[[], Iterable[list[Sample]]]]) -> Iterator[list[Sample]]:
    """The groups of several sources as one list: a prompt's samples stand together, whichever source they are from.

    Prompts come in the order of their first appearance; what a source gives in another order waits in memory.
    """
    several = sources if len(sources) > 1 else []
    known = [dict.fromkeys(group[0].prompt.id for group in source()) for source in several]
    streams = [iter(source()) for source in sources]
    aside: list[dict[str, list[Sample]]] = [{} for _ in known]
    for id_ in dict.fromkeys(chain.from_iterable(known)):
        joined: list[Sample] = []
        for ids, stream, waiting in zip(known, streams, aside, strict=True):
            while id_ in ids and id_ not in waiting:
                group = next(stream)
                waiting.setdefault(group[0].prompt.id, []).extend(group)
            joined += waiting.pop(id_, [])
        yield joined
    # a single source, and prompts that a source comes back to
    yield from chain(*(waiting.values() for waiting in aside), *streams)
