"""SEAM 2: who answers.

A teacher is one async call from a `Request` to the raw body of an answer, and one pure function that reads such a body.
The two are apart so that the body can be stored before anything tries to understand it: an answer that was paid for
is never lost to a parser. Bodies have the shape of an OpenAI chat completion, or are turned into it when they are read
(`anthropic`), so one reader serves all.

To add a teacher: one file with a `Knobs` record (its `type` literal is the name in recipes) that has `identity()`
and `open()`, and its name in the union `Model` below.
"""

from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from factory.rows import Failure, Look, Outcome, Request
from factory.teachers.anthropic import Anthropic, AnthropicTeacher
from factory.teachers.anthropic_batch import AnthropicBatch
from factory.teachers.entry import Entry
from factory.teachers.openai import OpenAI, OpenAITeacher
from factory.teachers.openai_batch import OpenAIBatch
from factory.teachers.reference import Reference
from factory.teachers.replay import Replay
from factory.teachers.transformers import Transformers
from factory.teachers.vllm import Vllm


class Teacher(Protocol):
    """Answers requests. Opened once, asked from many tasks at once, closed once.

    `send` returns the raw body of an answer, or a `Failure` already classified; it never retries and never raises for
    what a server did. Heavy things (a model, a server) start at the first `send`, so a run whose answers are all
    stored starts nothing. `concurrency` is how many requests at once are useful. A teacher behind a rate limit also has
    `rate_limits`, what the last response told of it; one that knows how many requests wait has `queue`.
    """

    concurrency: int

    async def send(self, request: Request) -> bytes | Failure: ...

    def read(self, request: Request, body: bytes) -> Outcome: ...

    async def close(self) -> None: ...


class BatchEndpoint(Protocol):
    """Answers whole files of requests within a day. What it sends back is read by the `Teacher` of the same model.

    Its methods raise a FactoryError for what the endpoint does: OutageError where it may have done what it was told,
    any other where it has not.
    """

    max_lines: int
    max_bytes: int

    def line(self, custom_id: str, request: Request) -> bytes:
        """A request as a line of a file."""
        ...

    async def submit(self, lines: Path, tag: str) -> str:
        """Upload a file and start its batch; returns how the provider names it."""
        ...

    async def find(self, tag: str, since: float, requests: int, others: set[str]) -> str | None:
        """How the provider names the batch that was submitted with this tag, if it has one; Waiting: it cannot tell yet.

        `since` is when it can have been submitted at the earliest, in seconds since the epoch; `others` are batches
        that are known to be other ones.
        """
        ...

    async def collect(self, handle: str, into: Path) -> Look:
        """Look at a batch; if it has ended, write its results into a file, one a line, in any order."""
        ...

    def result(self, line: bytes) -> tuple[str, bytes | Failure]:
        """A line of the results: its custom_id, and the body of its answer or why there is none."""
        ...

    async def close(self) -> None: ...


def batch_endpoint(entry: Entry, teacher: Teacher) -> BatchEndpoint | None:
    """Where a model with `batch: true` takes batches."""
    match entry, teacher:
        case OpenAI(batch=True), OpenAITeacher():
            return OpenAIBatch(entry.base_url, entry.key(), teacher.body)
        case Anthropic(batch=True), AnthropicTeacher():
            return AnthropicBatch(entry.base_url, entry.key(), teacher.body)
        case _:
            return None


ModelEntry = Annotated[OpenAI | Anthropic | Vllm | Transformers | Replay | Reference, Field(discriminator="type")]
"""One entry under `models:` of a recipe."""
