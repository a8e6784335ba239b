"""SEAM 2: who answers.

A teacher is one async call from a `Request` to the raw body of an answer, and one pure function that reads such a body.
The two are apart so that the body can be stored before anything tries to understand it: an answer that was paid for
is never lost to a parser. Bodies have the shape of an OpenAI chat completion, or are turned into it when they are read
(`anthropic`), so one reader serves all.

To add a teacher: one file with a `Knobs` record (its `type` literal is the name in recipes) that has `identity()`
and `open()`, and its name in the union `Model` below.
"""

from typing import Annotated, Protocol

from pydantic import Field

from factory.rows import Failure, Outcome, Request
from factory.teachers.anthropic import Anthropic
from factory.teachers.openai import OpenAI
from factory.teachers.reference import Reference
from factory.teachers.replay import Replay
from factory.teachers.transformers import Transformers
from factory.teachers.vllm import Vllm


class Teacher(Protocol):
    """Answers requests. Opened once, asked from many tasks at once, closed once.

    `send` returns the raw body of an answer, or a `Failure` already classified; it never retries and never raises for
    what a server did. Heavy things (a model, a server) start at the first `send`, so a run whose answers are all
    stored starts nothing. `concurrency` is how many requests at once are useful. A teacher behind a rate limit also has
    `rate_limits`, what the last response told of it.
    """

    concurrency: int

    async def send(self, request: Request) -> bytes | Failure: ...

    def read(self, request: Request, body: bytes) -> Outcome: ...

    async def close(self) -> None: ...


ModelEntry = Annotated[OpenAI | Anthropic | Vllm | Transformers | Replay | Reference, Field(discriminator="type")]
"""One entry under `models:` of a recipe."""
