"""A run in which every fifth prompt meets a fault: does every prompt end, is nothing paid twice, are the exit codes right?

The faults are those of `tests/faults.py`, each of them about as often. `--max-failed 100%` lets the run go on to its end;
the same command with the default limit must then say 3, and ask nothing. Faults that end a run are played one by one: it
must end with the documented code, and the same command must finish it when the fault is gone.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks._figures import Figure, factory, judged, main
from benchmarks._recipe import duplicates, endings, number, write
from tests.faults import ELSEWHERE, MIXED, STOPPING, Fault, FaultServer, faulty

EVERY = 5
CALM = 100
"""Prompts at the start without a fault: a teacher that never answered anything is judged otherwise."""
N = 2
STAGES = f"  - generate: {{model: teacher, n: {N}, temperature: 0.7, max_tokens: 64}}\n"
LIMITS = "{timeout_s: 2, max_attempts: 3, max_concurrency: 64}"


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    yield from _mixed(arguments.folder / "mixed", arguments.prompts)
    for fault in STOPPING[:: arguments.stops]:
        yield from _stop(arguments.folder / fault.name, fault)
    if not arguments.small:
        for name, (url, code) in ELSEWHERE.items():
            write(arguments.folder / name, url, 3, STAGES, limits=LIMITS)
            got = factory("build", "recipe.yaml", cwd=arguments.folder / name).returncode
            yield judged(f"faults.exit_code_{name}", got, f"== {code}")


def _mixed(folder: Path, count: int) -> Iterator[Figure]:
    with faulty(every_fifth(MIXED)) as server:
        write(folder, server.url, count, STAGES, limits=LIMITS)
        done = factory("build", "recipe.yaml", "--max-failed", "100%", cwd=folder)
        sent = server.seen.total()
        again = factory("build", "recipe.yaml", cwd=folder)
        resent = server.seen.total() - sent
    ends = endings(folder)
    yield judged("faults.exit_code", done.returncode, "== 0")
    yield judged(
        "faults.prompts_without_an_end", sum(len(ends[q]) != N for q in server.seen) + count - len(ends), "== 0"
    )
    yield judged("faults.prompts_that_ended_otherwise", len(list(_wrong(server, ends))), "== 0")
    yield judged("faults.duplicate_rows", duplicates(folder), "== 0")
    yield judged("faults.draws_paid_again", sum(max(0, given - N) for given in server.given.values()), "== 0")
    yield judged("faults.exit_code_over_the_failure_limit", again.returncode, "== 3")
    yield judged("faults.requests_of_the_same_command_again", resent, "== 0")
    yield Figure("faults.kinds_met", len({fault.name for fault in server.met.values()}))
    yield Figure("faults.share_of_prompts_with_a_fault", round(len(server.met) / count, 3))
    yield Figure("faults.rows", sum(end == "row" for of_prompt in ends.values() for end in of_prompt))


def _wrong(server: FaultServer, ends: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Prompts that did not end as their fault says, with how they did."""
    for question in server.seen:
        fault = server.met.get(question)
        if set(ends[question]) != {fault.end if fault else "row"}:
            yield (fault.name if fault else "no fault"), ends[question]


def _stop(folder: Path, fault: Fault) -> Iterator[Figure]:
    """A fault that ends the run, met once: first its exit code, then the same command again."""
    met = Counter[str]()

    def once(question: str) -> Fault | None:
        met[question] += number(question) == 40
        return fault if number(question) == 40 and met[question] == 1 else None

    with faulty(once) as server:
        write(folder, server.url, 60, STAGES, limits="{max_concurrency: 4}")
        stopped = factory("build", "recipe.yaml", cwd=folder).returncode
        finished = factory("build", "recipe.yaml", cwd=folder).returncode
    yield judged(f"faults.exit_code_{fault.name}", stopped, f"== {fault.exit}")
    lost = 60 - sum(end == ["row"] * N for end in endings(folder).values()) if finished == 0 else 60
    paid = sum(max(0, given - N) for given in server.given.values())
    yield judged(f"faults.lost_or_paid_again_after_{fault.name}", lost + paid, "== 0")


def every_fifth(faults: Sequence[Fault]) -> Callable[[str], Fault | None]:
    """Faults in turn, by the number of the question."""

    def fault_of(question: str) -> Fault | None:
        i = number(question)
        return None if i < CALM or i % EVERY else faults[i // EVERY % len(faults)]

    return fault_of


if __name__ == "__main__":
    main(__doc__, measure, prompts=(10_000, 550), stops=(1, 5))
