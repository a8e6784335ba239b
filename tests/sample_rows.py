"""Samples for tests, and filters as recipes write them run over samples."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pydantic

from factory.curate import Curate, curate
from factory.filters import FilterKnob
from factory.rows import Message, Prompt, Sample, by_prompt


def prompt(text: str = "q", reference: str | None = None, turns: list[Message] | None = None) -> Prompt:
    return Prompt.of(turns or [Message(role="user", content=text)], reference=reference)


def answer(text: str, to: Prompt | None = None, draw: int = 0, **fields: Any) -> Sample:
    """A sample; its id follows from prompt, model and draw, as in a run."""
    to = to or prompt()
    model = fields.pop("model", "m")
    key = fields.pop("id", None) or Sample.key(to, to.messages, model, draw)
    return Sample(id=key, prompt=to, asked=to.messages, response=text, model=model, draw=draw, **fields)


def answers(*texts: str, **scores: Sequence[float]) -> list[Sample]:
    """One answer to each of as many prompts; `name=[...]` gives them scores."""
    each = [{name: values[i] for name, values in scores.items()} for i in range(len(texts))]
    return [answer(text, prompt(f"question {i}"), scores=each[i]) for i, text in enumerate(texts)]


class Words:
    """What filters may need from a run: here a tokenizer that counts words, and leave to run programs."""

    allow_code = True

    def tokenizer(self, name: str | None) -> Callable[[str], int]:
        return lambda text: len(text.split())


def one_filter(spec: Any) -> Any:
    """A filter as a recipe writes it."""
    return pydantic.TypeAdapter(FilterKnob).validate_python(spec)


def filtered(filters: list[Any], samples: Iterable[Sample]) -> list[Sample]:
    """The stage `filter` over samples, those of a prompt standing together."""
    rows = list(samples)
    return list(curate(Curate(filters=filters), lambda: by_prompt(rows), Words()))


def ends(samples: Iterable[Sample]) -> list[str]:
    """Of each sample the reason that ended it; "" for the kept ones."""
    return [sample.verdicts[-1].reason if sample.ending != "kept" else "" for sample in samples]
