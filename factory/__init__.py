"""Black-box distillation: prompts and a teacher in, a clean data set and a small trained student out.

The map, in the order that data flows (a file imports only from files above it):

    rows, errors, knobs      the nouns; the error tree; what recipes are made of
    signals, run             told to stop; the run folder
    recipe_file, mistakes    a recipe's text; what is wrong in it
    prompt_*, prompts        prompt lists in: ids, train/test split, lint
    asking/                  seam 1: what is said
    child, weights           processes that load torch; where local weights come from
    journal                  what was paid for
    teachers/                seam 2: who answers
    budget, pace, retry      the wall; how fast; what is sent again
    stored, batch, ask       what is answered already; batch endpoints; the only caller of teachers
    models, generate         stage: draws, beams, rounds
    filters/, encoder, curate    seam 3: what to keep; stage `filter`
    rubric, verdicts, ways   what a judge is asked, and how it is read; pointwise, listwise, pairwise
    hijack, canaries, agreement  answers that speak to the judge; answers of known worth; labels
    judge                    stage: scores by a model
    scorer, score            stage: scores by local models and verifiers
    choose, shape, pair      stages: best of N; sample -> training row; samples -> preference pairs
    audit                    what preference rows would teach besides quality
    dataset                  training files and card
    launch, train, trainers/ how trainers start; stage `train`; seam 4: how the student learns
    model_card               how a student was made, and how it is served
    stats, measures          intervals and tests; what is measured of answers
    win_rate, harness        a judge compares two models' answers; tasks of lm_eval
    footprint, summary       size, speed and price; models compared
    gates, evaluate          what must be reached; stage `evaluate`
    recipe, plan, foresight  all stages' knobs as one typed file; which stage reads what; what can come to nothing
    cautions                 what may stop a right recipe here, or mislead
    naming                   what names a step's folder
    rejects, data_findings, findings, report  what a run shows: sentences, one page, one JSON
    compare                  runs beside the first of them
    publish, pipeline, arms  what a run publishes; the whole run on one screen; several over one journal
    ledger, spending, exchange   the journal from outside
    forms, push              what a run made, for other tools and for a hub
    lives, shelf             a row's life; what has run, for people
    cli                      verbs

`docs/design.md` has a line for each file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from factory.errors import FactoryError, RecipeError
    from factory.filters.shapes import GroupFilter, RowFilter, SetFilter
    from factory.journal import Journal
    from factory.pipeline import run as run_recipe
    from factory.prompts import load as load_prompts
    from factory.recipe import Recipe, load
    from factory.report import build as build_report
    from factory.rows import Failure, Message, Pair, Prompt, Reply, Request, Sample, Sampling, TrainRow, Verdict

__version__ = "0.1.0"

__all__ = [
    "FactoryError",
    "Failure",
    "GroupFilter",
    "Journal",
    "Message",
    "Pair",
    "Prompt",
    "Recipe",
    "RecipeError",
    "Reply",
    "Request",
    "RowFilter",
    "Sample",
    "Sampling",
    "SetFilter",
    "TrainRow",
    "Verdict",
    "build_report",
    "load",
    "load_prompts",
    "run_recipe",
]  # fmt: skip

_PLACES = {
    "factory.errors": ("FactoryError", "RecipeError"),
    "factory.filters.shapes": ("GroupFilter", "RowFilter", "SetFilter"),
    "factory.journal": ("Journal",),
    "factory.recipe": ("Recipe", "load"),
    "factory.rows": ("Failure", "Message", "Pair", "Prompt", "Reply", "Request", "Sample", "Sampling", "TrainRow", "Verdict"),
}  # fmt: skip
_RENAMED = {
    "build_report": ("factory.report", "build"),
    "load_prompts": ("factory.prompts", "load"),
    "run_recipe": ("factory.pipeline", "run"),
}
_NAMES = {name: (module, name) for module, names in _PLACES.items() for name in names} | _RENAMED


def __getattr__(name: str) -> Any:
    """Public names are imported at their first use: `factory --help` must not wait for pydantic."""
    if name not in _NAMES:
        raise AttributeError(f"module 'factory' has no attribute {name!r}")
    module, original = _NAMES[name]
    return getattr(import_module(module), original)
