"""The benchmarks run in small: each figure has its shape, and those that say whether something is right hold at any size."""

import json
import subprocess
import sys

import pytest

from tests.faults import FAULTS, MIXED
from tests.prompt_lists import ROOT

# What even a small run can judge, and the sizes that keep it short
SMALL = [
    ("client", "--prompts=200 --pairs=1", []),
    ("local", "--prompts=4 --tokens=4", ["differing_texts_that_are_no_ties"]),
    ("memory", "--prompts=1500", ["peak_mb_1500_prompts"]),
    ("scale", "--prompts=3000", ["requests_for_what_is_stored"]),
    ("rules", "--rows=100 --stream=1000", ["planted_faults_that_stay"]),
    ("kills", "--prompts=120 --kills=4", [
        "stored_answers_lost", "stored_answers_paid_again", "duplicate_rows", "requests_beyond_prompts_per_kill",
        "most_requests_beyond_prompts_at_one_kill", "dataset_files_that_differ",
    ]),
    ("faults", "--stops=9", [
        "exit_code", "prompts_without_an_end", "prompts_that_ended_otherwise", "duplicate_rows", "draws_paid_again",
        "exit_code_over_the_failure_limit", "requests_of_the_same_command_again", "exit_code_unsupported_parameter",
        "lost_or_paid_again_after_unsupported_parameter", "exit_code_another_model", "lost_or_paid_again_after_another_model",
    ]),
    ("intervals", "--evaluations=3", [f"wilson_{rate}" for rate in (0.1, 0.3, 0.5, 0.7, 0.9)]),
    ("training", "", [
        "planted_faults_missed", "dpo_loss_at_step_0_beside_ln_2", "dpo_margin_at_step_0", "dpo_loss_precomputed_beside_live",
        "packed_loss_beside_unpacked",
    ]),
    ("duplicates", "--texts=600 --many=1200 --pairs=1 --met=20", ["recall", "precision", "peak_mb_1200"]),
    ("contamination", "--items=100", [
        *(f"{kind}_in_{where}" for where in ("prompt", "answer") for kind in (
            "verbatim", "verbatim_within_more", "every_tenth_word_changed", "every_fifth_word_changed", "first_half_only", "paraphrase",
        )), "false_drops_of_new_problems", "false_drops_of_shipped_prompts",
    ]),
    ("attacks", "--items=120", ["scripted_false_accepts", "plain_answers_stopped_by_the_gate", "parser_escapes"]),
    ("budget", "--prompts=100", [
        f"{unit}_{what}" for unit in ("usd", "requests", "tokens")
        for what in ("overspent", "exit_code_at_the_wall", "exit_code_of_the_same_again", "rows_lost_once_raised")
    ]),
]  # fmt: skip


def run(name: str, *options: str) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", "--small", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(list(figure) == ["name", "value", "target", "ok"] for figure in figures)
    return {figure["name"].removeprefix(f"{name}."): figure for figure in figures}


@pytest.mark.parametrize(("name", "sizes", "right"), SMALL, ids=[name for name, *_ in SMALL])
def test_a_benchmark_holds_in_small(name: str, sizes: str, right: list[str]) -> None:
    figures = run(name, *sizes.split())
    assert {label for label, figure in figures.items() if figure["ok"]} == set(right)
    assert all(isinstance(figure["value"], int | float) for figure in figures.values())
    if name == "faults":
        assert figures["kinds_met"]["value"] == len(MIXED)
    if name == "client":
        assert 0 < figures["cpu_ratio_to_openai"]["value"] < 0.8  # start-up is most of so short a run
        assert 0 < figures["first_request_s"]["value"] < 10


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 90
