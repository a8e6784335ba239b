"""A recipe and its prompts in a folder, as a user would have them."""

import json
from pathlib import Path

from benchmarks._figures import prompts

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
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in prompts(count))
    filled = {"url": url, "limits": limits, "held_out": held_out, "stages": stages, "budget": budget, "price": price}
    (folder / "recipe.yaml").write_text(RECIPE.format(**filled))
