"""YAML as plain data that remembers its lines, by YAML 1.2's core rules.

PyYAML's own reading follows YAML 1.1, where `1e-5` is a string and `no` is False, keeps the last of two equal keys in
silence, and forgets lines. Here only maps, lists and plain scalars exist; no tag can build anything else.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from factory.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 50

Place = tuple[str, int]
"""File and line, for messages."""

Path_ = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_CONSTANTS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None, "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False, ".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(path: Path) -> tuple[Any, dict[Path_, Place]]:
    """A file's data, and the place of every value in it by its path of keys and indexes."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: {len(raw)} bytes is more than a recipe can be ({MAX_BYTES})")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 ({e.reason}); save the file as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[Any, dict[Path_, Place]]:
    """The same for a text; `name` stands for the file in messages."""
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise RecipeError(f"{name}:{mark.line + 1 if mark else 1}: not YAML: {e.problem or e.context}") from None
    except yaml.YAMLError as e:
        raise RecipeError(f"{name}: not YAML: {e}") from None
    builder = _Builder(name)
    return (builder.build(node, ()) if node is not None else None), builder.places


def place(places: dict[Path_, Place], at: Path_, name: str) -> Place:
    """Where a value stands, or the nearest thing around one that is missing; `name` is the file of the whole."""
    while at and at not in places:
        at = at[:-1]
    return places.get(at, (name, 1))


def written(where: Place) -> str:
    """`file:line`; what is no file has the line 0."""
    file, line = where
    return f"{file}:{line}" if line else file


class _Builder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Path_, Place] = {}

    def build(self, node: Any, path: Path_) -> Any:
        line = node.start_mark.line + 1
        self.places[path] = (self.name, line)
        if len(path) > MAX_DEPTH:
            raise RecipeError(
                f"{self.name}:{line}: more than {MAX_DEPTH} values inside each other; an alias inside itself?"
            )
        if len(self.places) > MAX_NODES:
            raise RecipeError(f"{self.name}:{line}: aliases expand to more than {MAX_NODES} values")
        if not str(node.tag).startswith("tag:yaml.org,2002:") or ":python" in node.tag:
            raise RecipeError(f"{self.name}:{line}: the tag {node.tag!r} is not allowed; write plain values")
        if isinstance(node, yaml.ScalarNode):
            return node.value if node.style else _scalar(node.value)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in data:
                raise RecipeError(f"{self.name}:{key_node.start_mark.line + 1}: the key {key!r} appears twice")
            data[key] = self.build(value_node, (*path, key))
            # a block value starts on the next line; people look for the key
            self.places[(*path, key)] = (self.name, key_node.start_mark.line + 1)
        return data


def _scalar(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return text
