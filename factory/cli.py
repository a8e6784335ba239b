"""The command line: verbs, no logic. Heavy modules are imported by the verb that needs them."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from factory.errors import FactoryError, RecipeError, disk_error
from factory.signals import Interrupted, interrupting

EXIT_CODES = """
exit codes: 0 done, 1 bug, 2 usage or recipe, 3 finished but over the failure limit, 4 key or TLS, 5 budget or quota,
6 wrong model, 7 provider outage, 8 local engine, 9 disk, 10 locked, 11 damaged journal, 12 version, 129/130/143 stopped
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `factory` command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with interrupting():
            code = int(arguments.verb(arguments) or 0)
            sys.stdout.flush()
            return code
    except FactoryError as e:
        return _told(e)
    except Interrupted as e:
        print(f"factory: stopped by {e}; stored answers are kept, the same command goes on", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as e:
        if (error := disk_error(e, getattr(arguments, "runs", ""))) is None:
            raise
        return _told(error)


def _told(error: FactoryError) -> int:
    print(f"factory: {error}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    from factory import __version__

    parser = argparse.ArgumentParser(
        prog="factory", description="From prompts and a teacher you can call, to a clean data set and a trained student.",
        epilog=EXIT_CODES,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"factory {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, what in (
        ("build", "the data set: every stage before the first train"),
        ("train", "through the last train, asking what is still needed"),
        ("eval", "through the evaluation"),
        ("run", "everything"),
    ):
        verb = verbs.add_parser(name, help=what, description=what, epilog=EXIT_CODES)
        _recipe_arguments(verb)
        verb.set_defaults(verb=_run, until=name)
    verb = verbs.add_parser("check", help="find every problem of a recipe; offline, needs no key and no weights")
    _recipe_arguments(verb)
    verb.set_defaults(verb=_check)
    verb = verbs.add_parser("ls", help="shipped recipes and local runs")
    verb.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    verb.set_defaults(verb=_ls)
    verb = verbs.add_parser("show", help="what a run did: funnel, evaluation, files")
    verb.add_argument("run", type=Path, help="a run's name, or its folder")
    verb.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    verb.set_defaults(verb=_show)
    return parser


def _recipe_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. stages.0.generate.n=4; repeatable"
    )
    verb.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")


def _load(arguments: argparse.Namespace) -> Any:
    from factory.recipe import find, load

    named = arguments.recipe
    path = Path(named)
    if not path.is_file():
        try:
            path = find(named if path.suffix in (".yaml", ".yml") else f"recipes/{named}.yaml")
        except RecipeError:
            raise RecipeError(
                f"there is no recipe {named!r}: no such file, and none of that name ships; `factory ls` lists those that do"
            ) from None
    return load(path, arguments.set)


def _run(arguments: argparse.Namespace) -> int:
    from factory.pipeline import run

    folder = run(_load(arguments), arguments.runs, arguments.until)
    print(f"data    {folder / 'dataset'}")
    print(f"report  {folder / 'report.html'}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from factory.check import check

    recipe = _load(arguments)
    for line in check(recipe):
        print(f"warning: {line}")
    print(f"{recipe.name}: the recipe is valid")
    return 0


def _ls(arguments: argparse.Namespace) -> int:
    from factory.shelf import listing

    print(listing(arguments.runs))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from factory.shelf import describe

    folder = arguments.run if (arguments.run / "manifest.json").is_file() else arguments.runs / arguments.run
    if not (folder / "manifest.json").is_file():
        raise RecipeError(f"there is no run {str(arguments.run)!r} in {arguments.runs}/; `factory ls` lists them")
    print(describe(folder))
    return 0


def entry() -> NoReturn:
    """`python -m factory`."""
    sys.exit(main())
