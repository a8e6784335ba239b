"""Money, requests and tokens against what the server has really served: never more than the budget, kills and restarts included.

Each budget is about half of what the recipe would need. The run is killed on its way, ends at the wall with exit
code 5, is started once more, and is finished with a larger budget. The server's usage is honest: 20 tokens in, 150 out.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks._figures import Figure, environment, factory, judged, main
from benchmarks._recipe import endings, write
from benchmarks._server import Server, Stats, serving

PROMPT_TOKENS, COMPLETION_TOKENS = 20, 150
INPUT_USD, OUTPUT_USD = 1.0, 4.0


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    count = arguments.prompts
    tokens = count * (PROMPT_TOKENS + COMPLETION_TOKENS)
    usd = count * (PROMPT_TOKENS * INPUT_USD + COMPLETION_TOKENS * OUTPUT_USD) / 1e6
    for name, needed in (("usd", usd), ("requests", float(count)), ("tokens", float(tokens))):
        yield from _against(arguments.folder / name, name, needed / 2, count, arguments.kills)


def _against(folder: Path, name: str, limit: float, count: int, kills: int) -> Iterator[Figure]:
    shown = f"{limit:.6f}" if name == "usd" else f"{limit:.0f}"
    price = f", price: {{input: {INPUT_USD}, output: {OUTPUT_USD}}}"
    with serving(20) as server:
        write(
            folder,
            server.url,
            count,
            limits="{max_concurrency: 16}",
            budget=f"budget: {{{name}: {shown}}}\n",
            price=price,
        )
        for _ in range(kills):
            _killed(folder, server, count // 10)
        at_wall = factory("build", "recipe.yaml", cwd=folder)
        spent = _spent(name, server.stats())
        resumed = factory("build", "recipe.yaml", cwd=folder)
        after = _spent(name, server.stats())
        raised = factory("build", "recipe.yaml", "--set", f"budget.{name}={limit * 10:.6g}", cwd=folder)
        rows = sum(end == "row" for ends in endings(folder).values() for end in ends)
    yield judged(f"budget.{name}_overspent", max(0.0, after - float(shown)), "== 0")
    yield judged(f"budget.{name}_exit_code_at_the_wall", at_wall.returncode, "== 5")
    yield judged(f"budget.{name}_exit_code_of_the_same_again", resumed.returncode, "== 5")
    yield judged(f"budget.{name}_rows_lost_once_raised", count - rows if raised.returncode == 0 else count, "== 0")
    yield Figure(f"budget.{name}_share_used", round(spent / float(shown), 3))


def _killed(folder: Path, server: Server, requests: int) -> None:
    """Start the run, and kill it when that many more requests have come."""
    before = server.stats().requests
    child = subprocess.Popen(
        [sys.executable, "-m", "factory", "build", "recipe.yaml"], cwd=folder, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while child.poll() is None and server.stats().requests < before + requests:
        time.sleep(0.005)
    child.kill()
    child.wait()


def _spent(name: str, seen: Stats) -> float:
    """What the server has served, in the budget's unit."""
    tokens = (seen.requests * PROMPT_TOKENS, seen.draws * COMPLETION_TOKENS)
    usd = (tokens[0] * INPUT_USD + tokens[1] * OUTPUT_USD) / 1e6
    return {"usd": usd, "requests": float(seen.requests), "tokens": float(sum(tokens))}[name]


if __name__ == "__main__":
    main(__doc__, measure, prompts=(2_000, 200), kills=(2, 1))
