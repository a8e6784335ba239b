"""The public names, and the rule that data flows one way."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import factory
from factory import errors
from factory.cli import EXIT_CODES
from factory.signals import STOPS, Interrupted

HERE = Path(factory.__file__).parent
OUTSIDE = {"__init__", "__main__"}


def order() -> list[str]:
    """Files and folders of the package in the order of the map in docs/design.md."""
    text = (Path(__file__).parent.parent / "docs/design.md").read_text()
    return [name.removesuffix(".py").rstrip("/") for name in re.findall(r"^  ([a-z_]+(?:\.py|/)) ", text, re.MULTILINE)]


def part(path: Path) -> str:
    return path.relative_to(HERE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The parts of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "factory":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("factory."):
            yield str(node.module).split(".")[1]


def test_the_map_has_every_file_and_data_flows_one_way_down_it() -> None:
    files = [path for path in HERE.rglob("*.py") if part(path) not in OUTSIDE]
    place = {name: i for i, name in enumerate(order())}
    assert {part(path) for path in files} == set(place) - OUTSIDE
    for path in files:
        upwards = [name for name in imported(path) if name in place and place[name] > place[part(path)]]
        assert not upwards, f"{path} imports from below itself: {upwards}"


def test_every_public_name_is_there_and_is_what_it_says() -> None:
    for name in factory.__all__:
        assert getattr(factory, name).__name__ in (name, "load", "build", "run")
    assert set(factory.__all__) == set(factory._NAMES)


def test_the_readme_and_the_help_tell_every_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FactoryError)]
    codes = {0, *(kind.exit_code for kind in kinds), *(Interrupted(number).exit_code for number in STOPS), 141}
    readme = (HERE.parent / "README.md").read_text().partition("Exit codes: ")[2].partition("\n\n")[0]
    for told in (readme, EXIT_CODES):
        assert {int(number) for number in re.findall(r"\b\d+\b", told)} == codes


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(factory, "nothing_of_the_kind")
