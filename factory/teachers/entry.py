"""What all model entries of a recipe have in common: limits, prices, terms; and what is asked over a network."""

import ipaddress
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, ClassVar, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from factory.errors import AuthError
from factory.knobs import Knobs
from factory.rows import Cost, Failure, Outcome, Usage
from factory.teachers.capabilities import LOOKED_UP, Capabilities, of_host, recorded

MILLION = 1_000_000


class Limits(Knobs):
    """How hard a teacher may be driven. `timeout_s` is for the whole request; a 429 or 503 is not an attempt."""

    rpm: int | None = Field(None, gt=0)
    tpm: int | None = Field(None, gt=0)
    max_concurrency: int = Field(64, gt=0)
    timeout_s: float = Field(120.0, gt=0, allow_inf_nan=False)
    max_attempts: int = Field(6, gt=0)


class Price(Knobs):
    """US dollars per million tokens; `batch` is the factor on all of them in a batch, for example 0.5.

    `cached` is for prompt tokens that the server found in its cache, `reasoning` for tokens of thought, where these have
    a price of their own.
    """

    input: Decimal = Field(ge=0)
    output: Decimal = Field(ge=0)
    cached: Decimal | None = Field(None, ge=0)
    reasoning: Decimal | None = Field(None, ge=0)
    batch: Decimal = Field(Decimal(1), ge=0)

    def usd(self, usage: Usage) -> Decimal:
        """What a request cost."""
        cached = min(usage.cached_tokens, usage.prompt_tokens) if self.cached is not None else 0
        thought = min(usage.reasoning_tokens, usage.completion_tokens) if self.reasoning is not None else 0
        prompt = self.input * (usage.prompt_tokens - cached) + (self.cached or 0) * cached
        return (prompt + self.output * (usage.completion_tokens - thought) + (self.reasoning or 0) * thought) / MILLION

    def worst(self, prompt_tokens: int, completion_tokens: int) -> Decimal:
        """What a request of so many tokens can cost at most, whatever kind they turn out to be."""
        prompt = max(self.input, self.cached or Decimal(0))
        answer = max(self.output, self.reasoning or Decimal(0))
        return (prompt * prompt_tokens + answer * completion_tokens) / MILLION

    def in_batch(self) -> "Price":
        """What the same tokens cost in a batch."""
        prices = {name: price * self.batch for name, price in self if price is not None}
        return self.model_copy(update=prices | {"batch": Decimal(1)})


class Entry(Knobs):
    """A model that can answer: base of the records under `models:`. `terms` says what its answers may be used for."""

    billed: ClassVar[bool] = False
    """Whether somebody sends a bill: then a money budget needs a price."""

    limits: Limits = Limits()
    price: Price | None = None
    terms: str | None = None

    def in_batch(self) -> Self:
        """The same entry at the prices of a batch."""
        return self.model_copy(update={"price": self.price.in_batch()}) if self.price else self

    def cost(self, outcome: Outcome) -> Cost | None:
        """What a body cost by the server's own count; None where it told none and somebody will send a bill."""
        counted = outcome.usage is not None if isinstance(outcome, Failure) else outcome.counted or not self.billed
        if not counted:
            return None
        usage = outcome.usage or Usage()
        return Cost(usage, self.price.usd(usage) if self.price else Decimal(0))

    def abilities(self, runs: Path) -> Capabilities:
        """What this model honours; `generate` plans its requests by it."""
        return LOOKED_UP

    def urls(self) -> list[str]:
        """Where requests go over a network."""
        return []


def _is_url(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    a_number = host.replace(".", "").isdigit() and _address(host) is None  # some read 2852039166 as an address
    if parts.scheme not in ("http", "https") or not host or a_number or parts.port == 0:
        raise ValueError(f"base_url must look like https://host/v1, not {url!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base_url must not hold credentials or a query; name the key's variable in api_key_env")
    return url.rstrip("/")


BaseUrl = Annotated[str, AfterValidator(_is_url)]
"""An http(s) URL without credentials; a slash at its end is dropped."""


def _is_no_key(name: str | None) -> str | None:
    mixed = name is not None and re.search(r"[a-z]", name) and re.search(r"\d", name) and len(name) >= LIKE_A_KEY
    if name is not None and mixed and name not in os.environ:
        raise ValueError("this looks like a key; write the name of the variable that holds it")
    return name


LIKE_A_KEY = 16
KeyVariable = Annotated[str | None, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(_is_no_key)]
"""The name of an environment variable, never a key itself."""


class Endpoint(Entry):
    """A model behind somebody's HTTP API. The recipe names the variable that holds the key, never the key."""

    billed: ClassVar[bool] = True

    model: str
    base_url: BaseUrl
    api_key_env: KeyVariable = None
    capabilities: Capabilities = Capabilities()
    batch: bool = False
    """Ask through the provider's batch endpoint; it is not part of what makes two answers the same."""

    def identity(self, runs: Path) -> str:
        raise NotImplementedError

    def known(self) -> Capabilities:
        """What is known of the endpoint without asking it."""
        return of_host(urlsplit(self.base_url).hostname or "")

    def abilities(self, runs: Path) -> Capabilities:
        """The recipe's word comes first, then what `check --live` found, then the table.

        A seed is part of what makes two answers the same, so one that was only found never turns seeds on: the answers
        that were paid for without them would be asked again.
        """
        found = recorded(runs, self.identity(runs)).model_copy(update={"seed": None})
        return self.capabilities.over(found.over(self.known()))

    def urls(self) -> list[str]:
        return [self.base_url]

    def key(self) -> str | None:
        """The key from the environment; AuthError where there is none, or one that cannot stand in a header."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise AuthError(
                f"the variable {self.api_key_env} is not set; export it, it holds the key for {self.base_url}"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise AuthError(f"the variable {self.api_key_env} holds characters that no key has; set it anew")
        return key


METADATA_HOSTS = {"metadata", "metadata.google.internal", "metadata.goog", "instance-data"}
_METADATA = [
    ipaddress.ip_network(n) for n in ("169.254.0.0/16", "fe80::/10", "100.100.100.200/32", "fd00:ec2::254/128")
]


def is_metadata(host: str) -> bool:
    """Whether a host or address is a cloud's metadata service, which hands out credentials to who asks."""
    address = _address(host)
    if address is None:
        return host.lower().rstrip(".") in METADATA_HOSTS
    mapped = getattr(address, "ipv4_mapped", None) or address
    return any(mapped in network for network in _METADATA if network.version == mapped.version)


def url_problem(url: str, allow_http: bool) -> str | None:
    """Why a key or a prompt should not be sent to `url`, with what to do; None where nothing speaks against it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_metadata(host):
        return f"{host} is a cloud's metadata service, not a model"
    if parts.scheme == "https" or allow_http:
        return None
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return None
    return f"{url} would send key and prompts unencrypted; use https, or say --allow-http on a network you trust"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return None
