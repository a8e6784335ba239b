"""The models of a run by name: those that the recipe lists, and the students that it has trained so far."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from factory.ask import Model
from factory.child import Child, ChildEnded
from factory.errors import EngineError, RecipeError
from factory.teachers import ModelEntry
from factory.teachers.openai import OpenAI
from factory.teachers.reference import Reference
from factory.teachers.transformers import Transformers
from factory.teachers.vllm import Vllm
from factory.weights import Weights, lacking_packages, materialise_in_child


class Models:
    """Resolves a name to its entry, its identity, or to a `Model` that can be asked."""

    def __init__(
        self, entries: dict[str, ModelEntry], first_student: str | None, runs: Path, allow_code: bool = False
    ) -> None:
        self.runs, self.allow_code = runs, allow_code
        self.trained: set[str] = set()
        self._entries = dict(entries)
        self._first_student = first_student
        self._identities: dict[str, str] = {}

    def add_student(self, name: str, folder: Path) -> None:
        """A student that a training step has made; it answers through `transformers`."""
        self._entries[name] = Transformers(model=str(folder))
        self.trained.add(name)
        self._identities.pop(name, None)

    def call(self, name: str, student: str) -> None:
        """Give a model another name: that of a student that was not trained for its own sake."""
        self._entries[name] = self.entry(student)
        self.trained.add(name)
        self._identities.pop(name, None)

    def entry(self, name: str) -> ModelEntry:
        if name not in self._entries:
            raise RecipeError(f"the student {name!r} is not trained yet; run the whole recipe with `factory run`")
        return self._entries[name]

    def weights(self, name: str) -> Weights:
        """The entry of a model that is loaded to be trained or read, not to answer."""
        entry = self.entry(name)
        if not isinstance(entry, Weights):
            raise RecipeError(f"models.{name} has no local weights; `type: transformers` has")
        return entry

    def child(self, module: str, name: str, **more: Any) -> Child:
        """Starts a process of our own that loads a local model and reads with it; ChildEnded where it cannot."""
        entry = self.weights(name)
        job = {
            "name": name, "weights": entry.alone(), "cache": str(self.runs / "weights"),
            "device": getattr(entry, "device", None),
        }  # fmt: skip
        child = Child(module, json.dumps(job | more))
        child.hear()
        return child

    def identity(self, name: str) -> str:
        entry = self.entry(name)
        if isinstance(entry, Reference):
            return "reference"
        if name not in self._identities:
            self._identities[name] = entry.identity(self.runs)
        return self._identities[name]

    def ready(self, name: str) -> None:
        """Raise what would stop this model from being asked: no key, no weights, no file."""
        entry = self.entry(name)
        if isinstance(entry, Transformers) and (missing := lacking_packages()):
            raise RecipeError(f"models.{name}: {missing}")
        self.identity(name)
        if isinstance(entry, OpenAI):
            entry.key()

    def open(self, name: str) -> Model:
        entry = self.entry(name)
        if isinstance(entry, Reference):
            raise RecipeError(f"models.{name}: ground truth can be used by `generate` only")
        return Model(name, entry, self.identity(name), entry.open(self.runs), entry.abilities(self.runs))

    def served(self, names: list[str]) -> dict[str, list[dict[str, Any]]]:
        """For models that vLLM serves: the servers that have answered as them, in this run or an earlier one."""
        entries = {name: self.entry(name) for name in names}
        return {name: entry.served(self.runs) for name, entry in entries.items() if isinstance(entry, Vllm)}

    # -- what filters may need (the `Kit` of filters) ------------------------------------------------------------------

    @property
    def default_student(self) -> str:
        """The first student's starting point: its tokenizer is the one whose tokens count."""
        if self._first_student is None:
            raise RecipeError("filter tokens: the recipe trains no student; name a model with `model:`")
        return self._first_student

    def tokenizer(self, name: str | None) -> Callable[[str], int]:
        """Text -> number of tokens, by the tokenizer of a local model; needs the `train` extra."""
        name = name or self.default_student
        entry = self.entry(name)
        if not isinstance(entry, Weights):
            raise RecipeError(f"filter tokens: models.{name} has no local tokenizer; name a local model with `model:`")
        return _counter(materialise_in_child(entry, self.runs / "weights"))

    def encoder(self, name: str) -> Callable[[], Child]:
        """Starts a process in which a local model reads texts; what keeps it from starting is told at once."""
        self.weights(name)

        def start() -> Child:
            try:
                return self.child("factory.encoder", name)
            except ChildEnded as e:
                raise EngineError(f"the encoder {name}: {e}") from None

        return start


@lru_cache(maxsize=8)
def _counter(folder: Path) -> Callable[[str], int]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RecipeError("filter tokens needs a tokenizer: pip install 'distillation-factory[train]'") from None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
