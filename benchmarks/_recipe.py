"""A recipe and its prompts in a folder, as a user would have them, and what a run has made of them."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks._figures import prompts

RUN = "runs/bench"
RECIPE = """\
name: bench
{budget}models:
  teacher: {{type: openai, model: m, base_url: "{url}", limits: {limits}{price}}}
prompts: [{{path: prompts.jsonl, held_out: {held_out}}}]
stages:
{stages}"""

GENERATE = "  - generate: {model: teacher, temperature: 0.7, max_tokens: 256}\n"


def write(
    folder: Path, url: str, count: int, stages: str = GENERATE, *, limits: str = "{}", held_out: int = 0,
    budget: str = "", price: str = "",
) -> None:  # fmt: skip
    """`recipe.yaml` and `prompts.jsonl`; the run's files will be in `runs/bench/`."""
    folder.mkdir(exist_ok=True)
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in prompts(count))
    filled = {"url": url, "limits": limits, "held_out": held_out, "stages": stages, "budget": budget, "price": price}
    (folder / "recipe.yaml").write_text(RECIPE.format(**filled))


def number(question: str) -> int:
    """The position of a question in the list."""
    return int(question.split(":")[0].removeprefix("Question "))


def endings(folder: Path) -> dict[str, list[str]]:
    """How the draws of each question ended at `generate`: "row", or the reason of the failure."""
    ends: dict[str, list[str]] = defaultdict(list)
    for sample in _jsonl(folder, "01-generate-*/*-*.jsonl"):
        verdicts = sample.get("verdicts")
        ends[sample["prompt"]["messages"][-1]["content"]].append(verdicts[-1]["reason"] if verdicts else "row")
    return ends


def duplicates(folder: Path) -> int:
    """Rows of the finished data set that come from a draw which has a row already."""
    drawn = [tuple(row["parents"]) for row in _jsonl(folder, "dataset/train.jsonl")]
    return len(drawn) - len(set(drawn))


def _jsonl(folder: Path, pattern: str) -> list[dict[str, Any]]:
    files = sorted((folder / RUN).glob(pattern))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
