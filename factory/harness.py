"""`lm_eval:` of `evaluate`: tasks of the lm-evaluation-harness on local models, in a child process of their own.

The harness makes the items, asks and scores; its standard errors stand beside its values. Where a metric is the mean of
values of single items, models are compared item by item as on the held-out prompts.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from factory import stats
from factory.child import Child, ChildEnded, die_with_parent, own_output
from factory.errors import EngineError, FactoryError, RecipeError
from factory.knobs import Knobs
from factory.models import Models
from factory.teachers.transformers import Transformers
from factory.weights import materialise_in_child, number_format

Row = dict[str, Any]


class LmEval(Knobs):
    """The keys are the harness's own. `limit` is in items a task; `include_path` a folder with tasks of one's own."""

    tasks: list[str] = Field(min_length=1)
    limit: int | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)
    include_path: str | None = None
    batch_size: int = Field(8, gt=0)
    apply_chat_template: bool = True

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        if find_spec("lm_eval") is None:
            raise ValueError("lm_eval needs the package: pip install 'distillation-factory[lm-eval]'")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"include_path: there is no folder {self.include_path}")
        return self

    def files(self) -> list[str]:
        """The tasks of one's own; not the data that they name."""
        return sorted(map(str, Path(self.include_path).rglob("*.y*ml"))) if self.include_path else []


class Harness:
    """The child: it knows the tasks when this is made, or that there are none of these names. It ends with this object."""

    def __init__(self, knobs: LmEval) -> None:
        self.child = Child("factory.harness", knobs.model_dump_json())
        self.version = self._heard()["version"]

    def measured(self, entry: Transformers, models: Models) -> Row:
        folder = materialise_in_child(entry, models.runs / "weights")
        return self._heard({"folder": str(folder), "dtype": entry.dtype, "device": entry.device})

    def _heard(self, question: Row | None = None) -> Row:
        try:
            told: Row = self.child.hear() if question is None else self.child.ask(question)
        except ChildEnded as e:
            self.child.close()
            raise EngineError(f"evaluate: lm_eval: {e}") from None
        return told


def run_tasks(harness: Harness, named: dict[str, str], models: Models, seed: int) -> Row:
    """Local models, name -> role, on all tasks: `rows` as the harness tells them, `comparisons` with the base."""
    entries = {name: entry for name in named if isinstance(entry := models.entry(name), Transformers)}
    told = {name: harness.measured(entry, models) for name, entry in entries.items()}
    harness.child.close()
    rows = [{"model": name, "role": named[name], **row} for name, found in told.items() for row in found["rows"]]
    base = next((name for name in entries if named[name] == "base"), None)
    found = [
        row
        for name in entries if base not in (None, name)
        for row in _compared(name, str(base), told, seed)
    ]  # fmt: skip
    for row, p in zip(found, stats.holm([row.pop("p") for row in found]), strict=True):
        row["p_holm"] = p
    return {"version": harness.version, "rows": rows, "comparisons": found}


def _compared(a: str, b: str, told: dict[str, Row], seed: int) -> Iterator[Row]:
    """What one model reaches less what the other does, over the items of each task and metric."""
    for task, metrics in told[a]["items"].items():
        for metric, of_a in metrics.items():
            of_b = told[b]["items"].get(task, {}).get(metric, {})
            both = sorted(of_a.keys() & of_b.keys())
            if not both:
                continue
            one, other = [of_a[i] for i in both], [of_b[i] for i in both]
            value, low, high = stats.paired_bootstrap_difference(one, other, seed, both)
            yield {
                "task": task, "metric": metric, "a": a, "b": b, "value": value, "low": low, "high": high, "n": len(both),
                "p": stats.mcnemar(one, other),
            }  # fmt: skip


# -- in the child ------------------------------------------------------------------------------------------------------


def _manager(knobs: LmEval) -> Any:
    """What knows the tasks: one's own alone where that is enough, since the harness reads thousands of files for its own."""
    from lm_eval.tasks import TaskManager

    def unknown(manager: Any) -> list[str]:
        return [task for task in knobs.tasks if not manager.match_tasks([task])]

    if knobs.include_path is not None:
        manager = TaskManager(include_path=knobs.include_path, include_defaults=False)
        if not unknown(manager):
            return manager
    manager = TaskManager(include_path=knobs.include_path)
    if missing := unknown(manager):
        raise RecipeError(f"there is no task {missing[0]!r}; `lm-eval ls tasks` lists them")
    return manager


def _measured(knobs: LmEval, manager: Any, model: Row) -> Row:
    import lm_eval
    import torch

    device = model["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = number_format(model["dtype"], device.startswith("cuda"))
    told = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": model["folder"], "dtype": dtype}, device=device, task_manager=manager,
        tasks=knobs.tasks, limit=knobs.limit, num_fewshot=knobs.num_fewshot, batch_size=knobs.batch_size,
        apply_chat_template=knobs.apply_chat_template,
    )  # fmt: skip
    rows = [
        {"task": task, "metric": metric, "value": _number(value), "stderr": _number(known.get(_of_error(metric))),
         "n": told["n-samples"].get(task, {}).get("effective")}
        for task, known in told["results"].items()
        for metric, value in known.items()
        if "," in metric and "_stderr," not in metric
    ]  # fmt: skip
    return {"rows": rows, "items": _items(told["samples"], rows)}


def _of_error(metric: str) -> str:
    """`acc,none` -> `acc_stderr,none`."""
    name, _, answer_filter = metric.partition(",")
    return f"{name}_stderr,{answer_filter}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _items(samples: dict[str, list[Row]], rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """By task and metric each item's value, of metrics that are the mean of these."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        name, _, answer_filter = row["metric"].partition(",")
        of_it = [one for one in samples.get(row["task"], []) if one.get("filter", "none") == answer_filter]
        values = {str(one["doc_id"]): value for one in of_it if (value := _number(one.get(name))) is not None}
        whole = math.fsum(values.values()) / len(values) if values else math.nan
        if len(values) == len(of_it) and row["value"] is not None and math.isclose(whole, row["value"], abs_tol=1e-6):
            found.setdefault(row["task"], {})[row["metric"]] = values
    return found


def main() -> None:
    """`python -m factory.harness KNOBS`: the version when the tasks are known, then a line for each model's line."""
    die_with_parent()
    lines, out = os.fdopen(os.dup(0), "rb"), own_output()
    try:
        knobs = LmEval.model_validate_json(sys.argv[1])
        manager = _manager(knobs)
        from importlib.metadata import version

        out.write(json.dumps({"version": version("lm_eval")}) + "\n")
        for line in lines:
            out.write(json.dumps(_measured(knobs, manager, json.loads(line)), allow_nan=False) + "\n")
    except FactoryError as e:
        sys.exit(str(e))
    except Exception as e:  # tasks are programs, and their errors have no common root
        sys.exit(" ".join(f"{type(e).__name__}: {e}".split())[:500])


if __name__ == "__main__":
    main()
