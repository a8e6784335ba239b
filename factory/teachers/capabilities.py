"""What an endpoint honours: one small table by host, what `check --live` found out, and what a recipe says.

"OpenAI-compatible" servers differ in what they refuse and, worse, in what they ignore. None means: not known. Of what is
not known nothing is claimed (no seed is trusted), but what a recipe asks for is sent: the server may well know it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator

from factory.errors import RecipeError
from factory.knobs import Knobs
from factory.rows import Sampling

FILE = "capabilities.json"
"""In the folder of runs: model identity -> what `check --live` found."""


class Capabilities(Knobs):
    """`capabilities:` of a model entry; a value that is given there is taken at its word.

    `n`: several draws in one request. `seed`: the same seed gives the same text. `structured`: the forms of
    `response_format`. `limit`: the name of the token limit. `reasoning`: the message field that holds it.
    `keys`: the sampling keys it takes. `echoes`: other names under which the server speaks of this model.
    """

    n: bool | None = None
    seed: bool | None = None
    logprobs: bool | None = None
    beam: bool | None = None
    structured: list[Literal["json_object", "json_schema"]] | None = None
    limit: Literal["max_tokens", "max_completion_tokens"] | None = None
    reasoning: str | None = None
    keys: list[str] | None = None
    echoes: list[str] = []

    def over(self, under: "Capabilities") -> "Capabilities":
        """`under`, with everything that is known here in its place."""
        return under.model_copy(update=self.model_dump(exclude_none=True, exclude_defaults=True))

    def refusal(self, sampling: Sampling) -> str | None:
        """What of a way of decoding this endpoint surely does not do, as a sentence; None where it may do all of it."""
        if sampling.beam is not None and self.beam is False:
            return "it has no beam search"
        wanted = sampling.response_format["type"] if sampling.response_format else None
        if wanted and self.structured is not None and wanted not in self.structured:
            return f"it has no response_format {wanted}"
        if sampling.logprobs and self.logprobs is False:
            return "it tells no log-probabilities"
        if self.keys is not None:
            neutral = Sampling()
            unknown = [k for k in SAMPLING_KEYS if getattr(sampling, k) != getattr(neutral, k) and k not in self.keys]
            if unknown:
                return f"it does not take {', '.join(unknown)}"
        return None


SAMPLING_KEYS = ("top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty", "stop")
_JSON: Any = ["json_object", "json_schema"]

LOOKED_UP = Capabilities(n=False, seed=True)
"""One draw a request, each with its seed; nothing else matters to answers that exist already."""

LOCAL = Capabilities(n=False, seed=True, beam=True, structured=[])
VLLM = Capabilities(n=True, seed=True, logprobs=True, beam=True, structured=_JSON, reasoning="reasoning")
ANTHROPIC = Capabilities(
    n=False, seed=False, logprobs=False, beam=False, structured=["json_schema"], keys=["top_p", "top_k", "stop"]
)

_PENALTIES = ["top_p", "presence_penalty", "frequency_penalty", "stop"]
HOSTS: dict[str, Capabilities] = {
    # `seed` is "best effort" everywhere here, so none claims it; what is left out is not documented
    "api.openai.com": Capabilities(
        n=True, seed=False, logprobs=True, beam=False, structured=_JSON, limit="max_completion_tokens", keys=_PENALTIES
    ),
    "openai.azure.com": Capabilities(
        n=True, seed=False, beam=False, structured=_JSON, limit="max_completion_tokens", keys=_PENALTIES
    ),
    "api.deepseek.com": Capabilities(
        n=False, seed=False, logprobs=True, beam=False, structured=["json_object"], reasoning="reasoning_content", keys=_PENALTIES
    ),
    "api.together.xyz": Capabilities(n=True, seed=False, beam=False, structured=_JSON, reasoning="reasoning"),
    "api.together.ai": Capabilities(n=True, seed=False, beam=False, structured=_JSON, reasoning="reasoning"),
    "openrouter.ai": Capabilities(n=False, seed=False, beam=False, reasoning="reasoning"),
    "api.groq.com": Capabilities(
        n=False, seed=False, logprobs=False, beam=False, structured=_JSON, limit="max_completion_tokens",
        reasoning="reasoning",
    ),
    "api.mistral.ai": Capabilities(n=True, seed=False, beam=False, structured=_JSON),
    "api.fireworks.ai": Capabilities(n=True, seed=False, beam=False, structured=_JSON),
    "generativelanguage.googleapis.com": Capabilities(n=True, seed=False, beam=False, structured=_JSON),
    "api.x.ai": Capabilities(n=True, seed=False, beam=False, structured=_JSON, reasoning="reasoning_content"),
}  # fmt: skip


def of_host(host: str) -> Capabilities:
    """What the table knows of a host or of the domain it is in; nothing of all others."""
    known = (found for name, found in HOSTS.items() if host == name or host.endswith("." + name))
    return next(known, Capabilities())


def recorded(runs: Path, identity: str) -> Capabilities:
    """What `factory check --live` found out about a model, if it was asked."""
    path = runs / FILE
    if not path.is_file():
        return Capabilities()
    try:
        found = msgspec.json.decode(path.read_bytes()).get(identity, {}).get("capabilities", {})
        return Capabilities.model_validate(found)
    except (msgspec.DecodeError, AttributeError, ValueError):
        raise RecipeError(f"{path} cannot be read; delete it, `factory check --live` writes it anew") from None


def _wire_format(value: Any) -> Any:
    if value == "json_object" or (isinstance(value, dict) and value.get("type") == "json_object"):
        return {"type": "json_object"}
    if not isinstance(value, dict):
        return value
    if value.get("type") == "json_schema":
        if not isinstance(value.get("json_schema"), dict) or not isinstance(value["json_schema"].get("schema"), dict):
            raise ValueError("a json_schema holds {json_schema: {name, schema}}; or write the JSON schema itself")
        return {"type": "json_schema", "json_schema": {"name": "answer", **value["json_schema"]}}
    if not {"type", "properties", "$ref", "anyOf", "oneOf", "enum"} & value.keys():
        raise ValueError("write json_object, or a JSON schema (a map with `type`, `properties` ...)")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, "strict": True}}


ResponseFormat = Annotated[dict[str, Any] | None, BeforeValidator(_wire_format)]
"""`response_format:` of a recipe: `json_object`, a JSON schema, or the wire's own form; here it is the wire's."""
