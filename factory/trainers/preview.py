"""The preview's child: `python -m factory.trainers.preview JOB.json` looks at rows as a training would, and trains nothing."""

import json
import sys
from pathlib import Path
from typing import Any

from factory.child import die_with_parent
from factory.errors import FactoryError
from factory.trainers.job import peft_of, tokenizer_of
from factory.trainers.preflight import Refused, fits, needed_bytes, preflight, preview
from factory.weights import Weights, materialise


def main() -> None:
    die_with_parent()
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        print(json.dumps(_look(job)))
    except (Refused, FactoryError) as e:
        print(json.dumps({"refused": str(e)}))


def _look(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = materialise(Weights.model_validate(job["weights"]), Path(job["cache"]))
    tokenizer = tokenizer_of(folder, job["args"])
    with torch.device("meta"):  # its shape alone: nothing is loaded
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    kept, aside = preflight(job["rows"], tokenizer, fits(model, tokenizer, job["args"]))
    return {"rows": preview(kept, tokenizer), "aside": aside, "bytes": needed_bytes(model, peft_of(job["lora"]))}


if __name__ == "__main__":
    main()
