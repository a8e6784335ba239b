"""The command line: verbs, no logic. Heavy modules are imported by the verb that needs them."""

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from factory.errors import FactoryError, RecipeError, disk_error
from factory.signals import Interrupted, interrupting

EXIT_CODES = """
exit codes: 0 done, 1 bug, 2 usage or recipe, 3 finished but over the failure limit or without a row, 4 key or TLS, 5
budget or quota, 6 wrong model, 7 provider outage, 8 local engine, 9 disk, 10 locked, 11 damaged journal, 12 version,
13 a batch is submitted: run the same command again to collect it, 14 complete but `require` not met, 129/130/143
stopped, 141 output closed
"""

RECIPE = "a recipe file, or the name of a shipped one"
LOOK_FIRST_S = 5.0
"""`--wait`: the time to the second look at a batch; it grows from there."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `factory` command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    gc.set_threshold(10_000)  # rows have no cycles: looking for some after every 700 takes a tenth of a long run
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
        ("eval", "through the evaluation, arms included"),
        ("run", "everything, arms included"),
    ):
        verb = verbs.add_parser(name, help=what, description=what, epilog=EXIT_CODES)
        verb.add_argument("recipe", help=RECIPE)
        _recipe_arguments(verb)
        _asking_arguments(verb)
        verb.set_defaults(verb=_run, until=name)
    what = "runs several recipes over one journal, or reads finished runs, and compares their students with the first's"
    verb = verbs.add_parser("compare", help="recipes or finished runs beside the first of them", description=what)
    verb.add_argument("these", nargs="+", metavar="RECIPE", help=f"{RECIPE}; or finished runs")
    _recipe_arguments(verb)
    _asking_arguments(verb)
    verb.set_defaults(verb=_compare)
    verb = verbs.add_parser("check", help="find every problem of a recipe; offline, needs no key and no weights")
    verb.add_argument("recipe", help=RECIPE)
    _recipe_arguments(verb)
    verb.add_argument(
        "--live", action="store_true", help="also ask each endpoint a few tiny questions: who answers, what is honoured"
    )
    verb.set_defaults(verb=_check)
    verb = verbs.add_parser("preview", help="what a training would learn of its rows, token by token; trains nothing")
    verb.add_argument("recipe", help=RECIPE)
    _recipe_arguments(verb)
    verb.set_defaults(verb=_preview)
    verb = verbs.add_parser("ls", help="shipped recipes and local runs")
    verb.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    verb.set_defaults(verb=_ls)
    _result_verbs(verbs)
    _journal_verbs(verbs.add_parser("journal", help="what was paid for: stats, verify, export, import, purge"))
    return parser


def _result_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What is there of a run, and where else it may go."""
    verb = verbs.add_parser("show", help="what a run did: funnel, evaluation, files")
    _run_arguments(verb)
    which = verb.add_mutually_exclusive_group()
    which.add_argument(
        "--row", metavar="ID", help="a row's whole life: of a prompt, an answer, a training row or a pair"
    )
    which.add_argument(
        "--drops", metavar="REASON", nargs="?", const="", help="the rows that ended for a reason; alone, the reasons"
    )
    verb.add_argument(
        "--limit", type=_count, default=20, metavar="N", help="rows that --drops lists; 0 for all (default: 20)"
    )
    verb.set_defaults(verb=_show)
    verb = verbs.add_parser("export", help="a run's data set in the form that another tool reads")
    _run_arguments(verb)
    verb.add_argument("--form", required=True, help="alpaca, sharegpt, messages, prompt_completion, preference or kto")
    verb.add_argument("--to", required=True, type=Path, metavar="FILE", help="a new file, .jsonl or .parquet")
    verb.add_argument("--config", help="one of the data set's configs (default: its default one)")
    verb.add_argument("--split", default="train", help="train or test (default: train)")
    verb.set_defaults(verb=_export)
    verb = verbs.add_parser("push", help="a run's data set to a hub; private, and only with the teachers' terms stated")
    _run_arguments(verb)
    verb.add_argument(
        "--to", required=True, metavar="USER/NAME", help="the data set's id on the hub (HF_ENDPOINT, or huggingface.co)"
    )
    verb.add_argument("--public", action="store_true", help="for everybody to see; without it, private")
    verb.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    verb.set_defaults(verb=_push)


def _journal_verbs(journal: argparse.ArgumentParser) -> None:
    verbs = journal.add_subparsers(title="verbs", metavar="VERB", dest="what", required=True)
    stats = verbs.add_parser("stats", help="requests, tokens, money, failures and waste of each run and model")
    stats.add_argument("--json", action="store_true", help="for programs")
    verify = verbs.add_parser("verify", help="check every stored answer; exit code 11 names the damaged rows")
    export = verbs.add_parser("export", help="write what was paid for as JSON lines, for another machine")
    export.add_argument("file", metavar="FILE", help="a new file, or - for stdout")
    imports = verbs.add_parser("import", help="take in an export or another journal; what is here already is kept")
    imports.add_argument("file", metavar="FILE", type=Path, help="an export, or a journal.sqlite")
    purge = verbs.add_parser("purge", help="forget answers for good; what they cost stays counted")
    purge.add_argument("--yes", action="store_true", help="do it; without it, only say what would be forgotten")
    which = purge.add_mutually_exclusive_group(required=True)
    for some in (export, which):
        some.add_argument("--prompt", metavar="ID", help="a prompt's id, the beginning of it, or its text")
        some.add_argument("--run", help="a run's name, as `stats` shows it")
        some.add_argument("--model", metavar="ID", help="a model's identity, as `stats` shows it")
    which.add_argument("--failed", action="store_true", help="requests that brought no answer")
    for verb in (stats, verify, export, imports, purge):
        verb.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
        verb.set_defaults(verb=_journal)


def _recipe_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. stages.0.generate.n=4; repeatable"
    )
    verb.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    verb.add_argument(
        "--allow-http", action="store_true", help="send keys and prompts unencrypted to hosts other than this machine"
    )


def _asking_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--max-failed", type=_share, default=0.02, metavar="SHARE",
        help="share of a stage's draws that may stay without an answer, e.g. 5%% or 0.05 (default: 2%%)",
    )  # fmt: skip
    verb.add_argument("--retry-failed", action="store_true", help="ask again for draws that have no answer")
    verb.add_argument(
        "--wait", action="store_true", help="where a batch is submitted, stay until it is done instead of leaving"
    )
    verb.add_argument(
        "--allow-code", action="store_true", help="let the filter `code` run programs that models wrote on this machine"
    )


def _run_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", type=Path, help="a run's name, or its folder")
    verb.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"write a whole number, not {text!r}")
    return int(text)


def _share(text: str) -> float:
    """`5%` or `0.05`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"write a share of 0 to 1, or of 0% to 100%, not {text!r}")
    return value


def _draft(named: str, overrides: list[str]) -> Any:
    from factory.recipe import draft
    from factory.recipe_file import find

    path = Path(named)
    if path.is_dir():
        raise RecipeError(f"{named} is a folder; name a recipe file, {path / 'recipe.yaml'} for example")
    if not path.is_file():
        try:
            path = find(named if path.suffix in (".yaml", ".yml") else f"recipes/{named}.yaml")
        except RecipeError:
            raise RecipeError(
                f"there is no recipe {named!r}: no such file, and none of that name ships; `factory ls` lists those that do"
            ) from None
    return draft(path, overrides)


def _run(arguments: argparse.Namespace) -> int:
    from factory.check import check
    from factory.pipeline import run

    draft, a = _draft(arguments.recipe, arguments.set), arguments
    checked = check(draft, a.runs, a.allow_http, fetch=True)
    wait = LOOK_FIRST_S if a.wait else None
    if draft.arms and a.until in ("eval", "run"):
        its = [(arm.recipe, checked.arms[name]) for name, arm in draft.arms.items()]
        return _run_several([(draft.recipe, checked.prompts), *its], a, a.until, one_wall=True)
    folder = run(draft.recipe, a.runs, a.until, a.max_failed, a.retry_failed, wait, checked.prompts, a.allow_code)
    print(f"data    {folder / 'dataset'}")
    print(f"report  {folder / 'report.html'}")
    return 0


def _run_several(recipes: list[Any], a: argparse.Namespace, until: Any, one_wall: bool) -> int:
    """Recipes with their prompts, and the comparison with the first."""
    from factory import arms

    its, wait = [arms.Arm(*one) for one in recipes], LOOK_FIRST_S if a.wait else None
    told = arms.run(its, a.runs, until, a.max_failed, a.retry_failed, wait, a.allow_code, one_wall)
    print(f"{told.text}\n\nreport  {a.runs / its[0].recipe.name / 'report.html'}")
    if told.error is not None:
        raise told.error
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from factory.check import check
    from factory.compare import as_text, compare

    a = arguments
    folders = [folder for named in a.these if (folder := _finished(named, a.runs))]
    if folders and len(folders) < len(a.these):
        raise RecipeError(f"name recipes, or finished runs: {folders[0]} is a run, and not all of the others are")
    if len(a.these) < 2:
        raise RecipeError(
            "name two recipes or more, or two finished runs: the first is what the others are compared with"
        )
    if folders:
        print(f"{as_text(compare(folders, a.allow_code))}\n\nreport  {folders[0] / 'report.html'}")
        return 0
    drafts = [_draft(named, a.set) for named in a.these]
    checked = [check(draft, a.runs, a.allow_http, fetch=True).prompts for draft in drafts]
    recipes = [(draft.recipe, prompts) for draft, prompts in zip(drafts, checked, strict=True)]
    return _run_several(recipes, a, "run", one_wall=False)


def _finished(named: str, runs: Path) -> Path | None:
    """The folder of a run; a name that is a recipe's as well means the recipe, which runs nothing where it is complete."""
    folder = Path(named)
    if folder.is_dir():
        return folder if (folder / "manifest.json").is_file() else None
    try:
        _draft(named, [])
    except RecipeError:
        return runs / named if (runs / named / "manifest.json").is_file() else None
    return None


def _check(arguments: argparse.Namespace) -> int:
    from factory.check import check, live

    draft = _draft(arguments.recipe, arguments.set)
    for line in check(draft, arguments.runs, arguments.allow_http).warnings:
        print(f"warning: {line}")
    print(f"{draft.recipe.name}: the recipe is valid")
    if arguments.live:
        for line in live(draft.recipe, arguments.runs, draft.arms):
            print(line, flush=True)
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    from factory.check import check
    from factory.preview import preview

    draft = _draft(arguments.recipe, arguments.set)
    checked = check(draft, arguments.runs, arguments.allow_http, fetch=True)
    for line in preview(draft.recipe, arguments.runs, checked.prompts):
        print(line)
    return 0


def _ls(arguments: argparse.Namespace) -> int:
    from factory.shelf import listing

    print(listing(arguments.runs))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from factory import lives
    from factory.shelf import describe

    folder, a = _run_folder(arguments), arguments
    if a.row is not None:
        print(lives.life(folder, a.row))
    elif a.drops is not None:
        print(lives.drops(folder, a.drops, a.limit) if a.drops else lives.reasons(folder))
    else:
        print(describe(folder))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from factory.forms import export

    a = arguments
    print(export(_run_folder(a), a.form, a.to, a.config, a.split))
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from factory.push import push

    a = arguments
    for line in push(_run_folder(a), a.to, a.public, a.dry_run):
        print(line, flush=True)
    return 0


def _run_folder(arguments: argparse.Namespace) -> Path:
    folder = arguments.run if (arguments.run / "manifest.json").is_file() else arguments.runs / arguments.run
    if not (folder / "manifest.json").is_file():
        raise RecipeError(f"there is no run {str(arguments.run)!r} in {arguments.runs}/; `factory ls` lists them")
    return Path(folder)


def _journal(arguments: argparse.Namespace) -> int:
    import json

    from factory import exchange, ledger, spending
    from factory.progress import say

    path, a = arguments.runs / "journal.sqlite", arguments
    match a.what:
        case "stats":
            counted = spending.stats(path)
            print(json.dumps(counted, indent=2) if a.json else spending.as_text(counted))
        case "verify":
            print(ledger.verify(path, print))
        case "export":
            say(exchange.export(path, a.file, say, a.prompt, a.run, a.model))
        case "import":
            print(exchange.merge(path, a.file, say))
        case "purge":
            print(ledger.purge(path, prompt=a.prompt, run=a.run, model=a.model, failed=a.failed, sure=a.yes))
    return 0


def entry() -> NoReturn:
    """`python -m factory`."""
    sys.exit(main())
