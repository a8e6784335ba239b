"""vLLM as a teacher: a server that the factory starts, waits for, speaks to like any API, and stops; or running ones.

vLLM lives in an environment of its own (its pins fight TRL's): `python:` names that environment's interpreter. The server
starts at the first request that has no stored answer and is stopped after the stage, so its memory is surely free again.
When its engine dies it is started anew, and the requests that were in flight are sent once more, one at a time: the one
that kills it again is the culprit, and the others are not lost with it.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import msgspec
from pydantic import Field, field_validator

from factory.errors import EngineError, RecipeError
from factory.progress import say
from factory.rows import Beam, Failure, Outcome, Request, digest
from factory.teachers.capabilities import VLLM, Capabilities
from factory.teachers.entry import BaseUrl, Entry
from factory.teachers.openai import OpenAITeacher, read_chat
from factory.teachers.vllm_queue import Queue, queues
from factory.teachers.vllm_server import SERVED_NAME, Server, describe, remember, remembered
from factory.weights import Weights, fingerprint, is_path, materialise_in_child

MAX_DEATHS = 3
"""Deaths in a row without a single answer in between after which the model, not a request, is at fault."""
REST_S = 10.0
"""How long one of several running servers gets no requests after one has failed there, as long as others answer."""
OURS = {"host", "port", "served_model_name", "model", "dtype", "revision", "uds", "headless"}
DEAD_OR_ALIVE = {"outage", "transport", "timeout", "server_error", "overloaded"}
"""Failures after which a server of ours is asked for its health."""
LEAST_LOGPROBS = 20  # vLLM's own default for --max-logprobs


class Vllm(Weights, Entry):
    """`{type: vllm, model}`: starts a server with `args` as its flags; `{type: vllm, model, base_url}` uses running ones.

    `base_url` may be a list: requests go to the least busy server. `start_s` is how many seconds loading may take.
    """

    type: Literal["vllm"] = "vllm"
    python: str | None = None
    base_url: BaseUrl | Annotated[list[BaseUrl], Field(min_length=1)] | None = None
    args: dict[str, str | int | float | bool] = Field(default_factory=dict)
    start_s: float = Field(900.0, gt=0)

    @field_validator("args")
    @classmethod
    def _not_ours(cls, args: dict[str, Any]) -> dict[str, Any]:
        plain = {name.lstrip("-").replace("-", "_"): value for name, value in args.items()}
        if taken := OURS & plain.keys():
            raise ValueError(
                f"args.{min(taken)} is set by the factory; remove it (dtype and revision stand beside model:)"
            )
        return plain

    def abilities(self, runs: Path) -> Capabilities:
        return VLLM

    def urls(self) -> list[str]:
        return [self.base_url] if isinstance(self.base_url, str) else self.base_url or []

    def identity(self, runs: Path) -> str:
        return f"weights:{fingerprint(self, runs / 'weights')}"

    def open(self, runs: Path) -> "VllmTeacher":
        return VllmTeacher(self, runs)

    def name(self, runs: Path) -> str:
        """Under which name `runs/servers/` keeps what belongs to this model."""
        return f"{Path(self.model).name}-{fingerprint(self, runs / 'weights')[:8]}"

    def served(self, runs: Path) -> list[dict[str, Any]]:
        """The servers that have answered as this model so far: vLLM's version, flags, longest context."""
        return remembered(runs / "servers", self.name(runs))

    def flags(self, folder: bool, beam: Beam | None) -> list[str]:
        """The flags of `vllm serve`; `folder` is whether it is given a plain folder."""
        known: dict[str, Any] = {"enable_prefix_caching": True, "disable_uvicorn_access_log": True}
        if self.dtype != "auto":
            known["dtype"] = self.dtype
        if self.revision and not folder:
            known["revision"] = self.revision
        if beam is not None:  # it looks at twice as many tokens per step as there are beams
            known["max_logprobs"] = max(LEAST_LOGPROBS, 2 * beam.width)
        flags: list[str] = []
        for name, value in (known | self.args).items():
            flag = name.replace("_", "-")
            flags += (
                [f"--{flag}"] if value is True else [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
            )
        return flags


class _Place:
    """A server that answers: ours, or one that ran before."""

    def __init__(self, client: OpenAITeacher, server: Server | None) -> None:
        self.client, self.server = client, server
        self.busy = 0
        self.sent = 0
        self.rests_until = 0.0

    @property
    def root(self) -> str:
        """Where vLLM has what is not OpenAI's: metrics, tokenizer."""
        return self.client.base_url.removesuffix("/v1")

    async def fitted(self, request: Request) -> Request:
        """The request as vLLM must be asked. It divides a beam's log-probability by a power of its length together with
        the prompt's, so short beams win; a larger power makes the two rise alike near the limit of length."""
        sampling = request.sampling
        if sampling.beam is None or sampling.beam.length_penalty == 0:
            return request
        prompt = await self._prompt_tokens(request)
        penalty = sampling.beam.length_penalty * (prompt + sampling.max_tokens) / sampling.max_tokens
        beam = msgspec.structs.replace(sampling.beam, length_penalty=penalty)
        return msgspec.structs.replace(request, sampling=msgspec.structs.replace(sampling, beam=beam))

    async def _prompt_tokens(self, request: Request) -> int:
        """How many tokens the prompt has; 0 where the server does not tell."""
        body = {"model": self.client.model, "messages": request.messages}
        async with httpx.AsyncClient(timeout=30) as client:
            try:
                told = await client.post(f"{self.root}/tokenize", json=body)
                return int(told.json()["count"])
            except (httpx.HTTPError, ValueError, LookupError, TypeError):
                return 0

    async def close(self) -> None:
        await self.client.close()
        if self.server is not None:
            await self.server.stop()


class VllmTeacher:
    """Speaks to its servers through `OpenAITeacher`: the same wire, with every sampling field pinned, seeds honoured."""

    def __init__(self, entry: Vllm, runs: Path) -> None:
        self.entry, self.runs = entry, runs
        self.concurrency = entry.limits.max_concurrency
        self._places: list[_Place] = []
        self._opening = asyncio.Lock()
        self._broken: EngineError | RecipeError | None = None
        self._suspects: set[str] = set()  # requests that were in flight when the engine died
        self._alone = asyncio.Lock()
        self._deaths = 0  # since the last answer
        self.queue: Queue | None = None
        self._watch: asyncio.Task[None] | None = None

    async def send(self, request: Request) -> bytes | Failure:
        if self._suspects and _mark(request) in self._suspects:
            async with self._alone:
                return await self._send(request)
        return await self._send(request)

    def read(self, request: Request, body: bytes) -> Outcome:
        return read_chat(body, request.n, reasoning=VLLM.reasoning)

    async def close(self) -> None:
        places, self._places, self._broken = self._places, [], None
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await asyncio.gather(*(place.close() for place in places))

    async def _send(self, request: Request) -> bytes | Failure:
        place = await self._place(request.sampling.beam)
        place.busy += 1
        place.sent += 1
        try:
            answer = await place.client.send(await place.fitted(request))
        finally:
            place.busy -= 1
        if isinstance(answer, Failure):
            return await self._failed(place, request, answer)
        self._deaths = 0
        if self._suspects:
            self._suspects.discard(_mark(request))
        told = request.sampling.logprobs or request.sampling.beam is not None
        return condensed(answer, request.sampling.beam) if told else answer

    async def _place(self, beam: Beam | None) -> _Place:
        """The server for the next request; starts ours if it does not run."""
        async with self._opening:
            if self._broken is not None:
                raise self._broken  # many wait here: the first one's attempt is enough
            if not self._places:
                try:
                    self._places = await self._open(beam)
                except (EngineError, RecipeError) as e:
                    self._broken = e
                    raise
                if self._watch is not None:
                    self._watch.cancel()
                self._watch = asyncio.create_task(self._watch_queue([place.root for place in self._places]))
        now = asyncio.get_running_loop().time()
        return min(self._places, key=lambda p: (p.rests_until > now, p.busy, p.sent))

    async def _watch_queue(self, roots: list[str]) -> None:
        async for queue in queues(roots):
            self.queue = queue

    async def _open(self, beam: Beam | None) -> list[_Place]:
        entry, folder, name = self.entry, self.runs / "servers", self.entry.name(self.runs)
        if urls := entry.urls():
            for url in urls:
                await _note(url, folder, name)
            return [_Place(self._client(entry.model, url), None) for url in urls]
        plain = is_path(entry.model) or not entry.as_they_are
        model = entry.model
        if plain:
            model = str(await asyncio.to_thread(materialise_in_child, entry, self.runs / "weights"))
        if beam is not None and (problem := beam_problem(Path(model))):
            raise RecipeError(f"{entry.model}: {problem}")
        flags = entry.flags(plain, beam)
        server = Server(entry.python or sys.executable, model, flags, folder, name, entry.start_s)
        say(f"  starting vLLM with {entry.model} (its log: {server.log})")
        remember(folder, name, await server.start())
        return [_Place(self._client(SERVED_NAME, f"{server.url}/v1"), server)]

    def _client(self, model: str, url: str) -> OpenAITeacher:
        return OpenAITeacher(model, url, None, self.entry.limits.timeout_s, self.concurrency, vllm=True)

    async def _failed(self, place: _Place, request: Request, failure: Failure) -> Failure:
        """What a failed request really means: too wide a beam, a server to be spared for a while, or a dead engine."""
        beam = request.sampling.beam
        if beam is not None and failure.reason == "bad_request" and "logprobs" in failure.detail:
            raise RecipeError(
                f"{place.client.base_url} does not search beams of width {beam.width}: {failure.detail}; "
                f"start it with --max-logprobs {2 * beam.width}, or make the beam narrower"
            )
        if failure.reason not in DEAD_OR_ALIVE:
            return failure
        if place.server is None:
            place.rests_until = asyncio.get_running_loop().time() + REST_S
            return failure
        if not await place.server.dead():
            return failure
        self._suspects.add(_mark(request))
        words = place.server.last_words()
        await self._bury(place, words)
        return Failure(reason="engine_died", detail=words)

    async def _bury(self, place: _Place, words: str) -> None:
        """Clear a dead server away, once, so that the next request starts another."""
        async with self._opening:
            if place not in self._places:
                return
            self._places.remove(place)
            self._deaths += 1
            say(f"vLLM died: {words}")
            await place.close()
            if self._deaths > MAX_DEATHS:
                self._broken = EngineError(f"vLLM died {self._deaths} times without an answer in between: {words}")


def _mark(request: Request) -> str:
    return digest(request.messages, request.draw, request.seed)


async def _note(url: str, folder: Path, name: str) -> None:
    """Remember a running server, if it tells of itself; whether it answers at all is for the requests to see."""
    async with httpx.AsyncClient(timeout=5) as client:
        try:
            told = await describe(client, url.removesuffix("/v1"))
        except (httpx.HTTPError, ValueError, LookupError):
            return
    remember(folder, name, {**told, "base_url": url})


def condensed(body: bytes, beam: Beam | None) -> bytes:
    """A body with the log-probability and the number of tokens of each answer in place of a record per token.

    Beams come in the order of our own score, log-probability / tokens ** length_penalty: vLLM counts the prompt's tokens
    as well. A body of another shape is left as it is.
    """
    try:
        data = msgspec.json.decode(body)
        for choice in data["choices"]:
            tokens = (choice.pop("logprobs") or {}).get("content") or []
            if tokens:
                choice |= {"logprob": sum(t["logprob"] for t in tokens), "tokens": len(tokens)}
        if beam is not None:
            data["choices"].sort(key=lambda c: -c["logprob"] / c["tokens"] ** beam.length_penalty)
            for rank, choice in enumerate(data["choices"]):
                choice["index"] = rank
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return body
    return msgspec.json.encode(data)


def beam_problem(folder: Path) -> str | None:
    """Why vLLM's beams would never end for a model, if so: they end at the tokenizer's own end token and nothing else."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return None
    end, template = settings.get("eos_token"), settings.get("chat_template")
    end = end.get("content") if isinstance(end, dict) else end
    beside = folder / "chat_template.jinja"
    template = beside.read_text() if beside.is_file() else template
    if not isinstance(end, str) or not isinstance(template, str) or end in template or "eos_token" in template:
        return None
    return (
        f"vLLM's beam search ends at {end!r} alone, and this model's chat template ends its turns otherwise: every beam "
        "would run to max_tokens; use `type: transformers`, or set eos_token in the folder's tokenizer_config.json"
    )
