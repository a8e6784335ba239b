"""A student's card: the README.md beside its weights, made of the run's facts, with how to serve it."""

import json
from pathlib import Path
from typing import Any

from factory.train import Train
from factory.weights import Weights, is_path

SERVING = """\
## Serve it

With vLLM, without further flags (`--dtype float32` where the very texts of `factory eval` are wanted; by itself vLLM may
compute in 16 bits, and a text can then differ from where two tokens are as good as equal):

    vllm serve PATH/TO/THIS/FOLDER

With Ollama, where it knows the architecture: put the line `FROM PATH/TO/THIS/FOLDER` into a file `Modelfile`, then

    ollama create NAME -f Modelfile && ollama run NAME

The chat template is that of the training and stands in this folder; see with `ollama show --template NAME` that Ollama has
taken it over, since a student that is asked in another form answers worse. In Python it is `AutoModelForCausalLM` and
`AutoTokenizer` of transformers. The end token and the padding stand in `generation_config.json`.
"""


def model_card(recipe: str, knobs: Train, start: Weights, told: dict[str, Any]) -> str:
    """`told` is the trainer's `training.json`. Nothing in it changes from run to run but what training itself changes."""
    hub = not is_path(start.model)
    base = f"base_model: {json.dumps(start.model)}\n" if hub else ""
    origin = start.model if hub else Path(start.model).name  # where it lies is nobody's business
    args = "".join(f"- `{name}`: {json.dumps(value)}\n" for name, value in sorted(knobs.args.items()))
    aside = sum(told["rows_set_aside"].values())
    return f"""\
---
library_name: transformers
{base}tags: [distillation]
---
# {knobs.as_}

Made by the recipe {recipe}: {knobs.method} from `{knobs.student}` ({origin}) on {told["rows_trained"]:,} rows
({aside:,} set aside) in {told["steps"]:,} steps. The rows, the models that answered and the terms that they may set stand in
the card of the run's data set; how good the student is stands in the run's report.

{f"Settings of the trainer:{chr(10)}{chr(10)}{args}" if args else "The settings of the trainer are its defaults."}
{SERVING}"""
