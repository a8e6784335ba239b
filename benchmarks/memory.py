"""Peak memory of `factory build`: it should not grow with the list of prompts, only with what a set filter remembers."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks._figures import Cost, Figure, child, judged, main
from benchmarks._recipe import write
from benchmarks._server import serving

STAGES = """\
  - generate: {model: teacher, temperature: 0.7, max_tokens: 256}
  - filter: [finished, no_refusal, {words: {min: 3}}]
"""


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    few, many = arguments.prompts // 10, arguments.prompts
    before, after = (_build(arguments.folder / str(count), count) for count in (few, many))
    yield Figure(f"memory.peak_mb_{few}_prompts", round(before.peak_mb, 1))
    yield judged(f"memory.peak_mb_{many}_prompts", after.peak_mb, "<= 150")
    growth = after.peak_mb / before.peak_mb - 1
    yield judged("memory.growth", growth, "<= 0.2", not arguments.small)
    held_out = _build(arguments.folder / "held_out", many, held_out=many // 100)
    yield Figure(f"memory.peak_mb_{many}_prompts_with_held_out", round(held_out.peak_mb, 1))


def _build(folder: Path, count: int, held_out: int = 0) -> Cost:
    with serving(delay_ms=10) as server:
        write(folder, server.url, count, STAGES, limits="{max_concurrency: 64}", held_out=held_out)
        cost = child("factory", "build", "recipe.yaml", cwd=folder)
        seen = server.stats()
    assert cost.exit_code == 0
    assert seen.requests == count - held_out, seen
    return cost


if __name__ == "__main__":
    main(__doc__, measure, prompts=(100_000, 5_000))
