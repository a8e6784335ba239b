"""A column made of other columns: a sandboxed Jinja template over one row.

Only the recipe's own text is compiled; what rows hold is data and stays inert. The sandbox alone stops attribute tricks
but happily fills the memory, so the language is cut down until it cannot grow: no calls, no arithmetic, no assignments,
no loop in a loop, a handful of filters. Output ends at `MAX_OUTPUT`. Not covered: a loop over a very long text that
looks through the whole text each time still takes the square of its length.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from factory.errors import RecipeError

MAX_TEMPLATE = 10_000
MAX_NODES = 600
MAX_OUTPUT = 1_000_000

FILTERS = ("capitalize", "d", "default", "first", "last", "length", "lower", "title", "trim", "upper")
NODES = {
    "And", "Compare", "CondExpr", "Const", "Filter", "For", "Getattr", "Getitem", "If", "List", "Name", "Neg", "Not",
    "Operand", "Or", "Output", "Slice", "Template", "TemplateData", "Test", "Tuple",
}  # fmt: skip


class TooMuchOutput(Exception):
    """A rendered text passed `MAX_OUTPUT` characters."""


def is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def compiled(source: str, where: str) -> Callable[[dict[str, Any]], str]:
    """A template as a function of a row.

    RecipeError, starting with `where`, for what is not in the language. The function raises what rendering raises:
    jinja2's UndefinedError for a column that the row lacks, TooMuchOutput, TypeError ...
    """
    import jinja2

    environment = _environment()
    try:
        tree = environment.parse(source) if len(source) <= MAX_TEMPLATE else None
        if fault := _fault(tree):
            raise RecipeError(f"{where}: template: {fault}")
        template = environment.from_string(source)
    except (jinja2.TemplateError, SyntaxError, RecursionError) as e:
        raise RecipeError(f"{where}: not a template: {e}") from None

    def render(row: dict[str, Any]) -> str:
        pieces, size = [], 0
        for piece in template.generate(row):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT:
                raise TooMuchOutput
        return "".join(pieces)

    return render


def _fault(tree: Any) -> str | None:
    """What of the syntax tree is not in the language, or None."""
    from jinja2 import nodes

    if tree is None:
        return f"longer than {MAX_TEMPLATE} characters"
    every = [tree, *tree.find_all(nodes.Node)]
    if len(every) > MAX_NODES:
        return f"{len(every)} parts are more than {MAX_NODES}"
    for node in every:
        if type(node).__name__ not in NODES:
            return f"line {node.lineno}: {type(node).__name__} is not allowed; columns, `if`, `for` and filters are"
        if isinstance(node, nodes.Name) and node.name == "self":
            return f"line {node.lineno}: 'self' is the template, not a column"
        if isinstance(node, nodes.For) and (node.recursive or any(node.find_all(nodes.For))):
            return f"line {node.lineno}: a loop inside a loop is not allowed"
    return None


def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Data(ImmutableSandboxedEnvironment):
        """Looks names up in the row's maps and lists, never as Python attributes, so `{{ row.items }}` is a column."""

        def getitem(self, obj: Any, argument: Any) -> Any:
            try:
                return obj[argument]
            except (LookupError, TypeError):
                return self.undefined(obj=obj, name=argument)

        def getattr(self, obj: Any, attribute: str) -> Any:
            return super().getattr(obj, attribute) if isinstance(obj, LoopContext) else self.getitem(obj, attribute)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return not callable(value) and super().is_safe_attribute(obj, attr, value)

    environment = Data(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_blank_for_none)
    environment.globals.clear()
    environment.filters = {name: environment.filters[name] for name in FILTERS} | {"join": _join, "tojson": _json}
    return environment


def _blank_for_none(value: Any) -> Any:
    return "" if value is None else value


def _json(value: Any) -> str:
    """A value as JSON, marks of HTML left as they are."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_OUTPUT:  # quotes are escaped, and escaped again, and again
        raise TooMuchOutput
    return text


def _join(values: Iterable[Any], separator: str = "") -> str:
    """Jinja's own would build any length before we could count it."""
    parts = [str(value) for value in values]
    if sum(map(len, parts)) + len(separator) * len(parts) > MAX_OUTPUT:
        raise TooMuchOutput
    return separator.join(parts)
