"""What a judge has to write, and its strict reading: lines `Label: N`, or a JSON object of the same.

A verdict is read whole or not at all. What cannot be read is missing: the best-known preference set read "1" as 10 in
thousands of rows. `N/A` is no number and no mistake: that label is left out.
"""

import json
import re
from typing import Any, NamedTuple

Scale = tuple[float, float]

_MARKER = r"^[ \t>*_#-]*{label}[*_ \t]*:[*_ \t]*(.*)$"
_PLAIN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*([0-9]+))?[\s.*_]*")
_NOT_APPLICABLE = re.compile(r"n/?a[\s.*_]*", re.IGNORECASE)
BETTER = "Better"
WINS = {"1": 1.0, "2": 0.0, "tie": 0.5}
"""What the first of two answers gets."""


class Form(NamedTuple):
    """The labels of a verdict, and the scale of their numbers; without a scale the label tells which of two is better."""

    labels: tuple[str, ...]
    scale: Scale | None
    structured: bool = False

    def read(self, text: str) -> dict[str, float] | None:
        """Label -> number, without those that do not apply; None unless every label can be read."""
        told = self._of_json(text) if self.structured else {label: _lines(label, text) for label in self.labels}
        found: dict[str, float] = {}
        for label in self.labels:
            # said twice, it must be the same
            values = {self._value(said) for said in told.get(label, [])}
            if len(values) != 1 or (value := values.pop()) is None:
                return None
            if value != "n/a":
                found[label] = float(value)
        return found

    def _value(self, said: str) -> float | str | None:
        if self.scale is None:
            return WINS.get(said.strip(" \t\r.*_").lower())
        return "n/a" if _NOT_APPLICABLE.fullmatch(said.strip()) else plain_number(self.scale, said)

    def _of_json(self, text: str) -> dict[str, list[str]]:
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError):
            return {}
        keys = {key_of(label): label for label in self.labels}
        told: dict[str, list[str]] = {}
        for pair in pairs if isinstance(pairs, list) else []:
            if isinstance(pair, tuple) and pair[0] in keys:
                told.setdefault(keys[pair[0]], []).append(_said(pair[1]))
        return told

    @property
    def wants(self) -> str:
        """For people: what the verdict should have held."""
        if self.structured:
            return f"a JSON object with {', '.join(map(key_of, self.labels))}"
        if self.scale is None:
            return f"a line `{BETTER}: 1`, `{BETTER}: 2` or `{BETTER}: tie`"
        low, high = self.scale
        return f"a line {' and '.join(f'`{label}: N`' for label in self.labels)} with N from {low:g} to {high:g}"

    @property
    def order(self) -> str:
        """For the judge: how a structured verdict is written."""
        values = "the number" if self.scale else '"1", "2" or "tie"'
        keys = ", ".join(f'"{key_of(label)}": {values}' for label in self.labels)
        return f'In place of any line asked for above, answer with one JSON object: {{"reason": one short sentence, {keys}}}'

    @property
    def response_format(self) -> dict[str, Any]:
        """The JSON schema of the verdict, in the wire's form. The reason comes first: it is what the score follows from."""
        one: dict[str, Any] = {"enum": list(WINS)} if self.scale is None else {"type": ["number", "string"]}
        properties = {"reason": {"type": "string"}, **{key_of(label): one for label in self.labels}}
        schema = {
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
        }  # fmt: skip
        return {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}


def key_of(label: str) -> str:
    """`Answer 1` -> `answer_1`."""
    return label.lower().replace(" ", "_")


def plain_number(scale: Scale, said: str) -> float | None:
    """One number within the scale; "1/10" on a scale to 5 is another scale, not a 1."""
    low, high = scale
    found = _PLAIN.fullmatch(said.strip())
    if found is None or (found[2] is not None and float(found[2]) != high):
        return None
    value = float(found[1])
    return value if low <= value <= high else None


def _lines(label: str, text: str) -> list[str]:
    """What follows a label at the start of a line, wherever the text has it."""
    return re.findall(_MARKER.format(label=re.escape(label)), text, re.IGNORECASE | re.MULTILINE)


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""
