"""What each row counts in the loss of supervised training: tasks by their weight, not by how many rows they have.

    L = sum over tasks t of  w_t * (sum of r_i * l_i) / (sum of r_i),   i over the tokens of t that are learned

so the loss is the weighted sum of the tasks' own means (Distilling step-by-step, arXiv 2305.02301, section 3; with ground
truth, Kim & Rush 2016, section 3.2). `r_i` is the weight of the row's class, 1 where it has none.

What a token counts is settled before step 1, from the counts of the whole data, and each step is divided by the same
number: over an epoch the steps' losses have L as their mean, whatever stands in which batch, packed or not, and however
many batches make a step. Means taken in each batch would let a task that is absent from some count for less.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from trl import SFTTrainer

OUTSIDE = -100
"""The label of tokens that are not learned, as TRL has it."""


class Part(NamedTuple):
    """Rows that count alike: of one input and task with its weight, and of one class."""

    input: str
    task: str
    weight: float
    class_weight: float

    @property
    def label(self) -> str:
        return f"{self.input}/{self.task}" if self.input else self.task


def part_of(row: Mapping[str, Any], classes: Mapping[str, float]) -> Part:
    """Where a row belongs; several tags multiply."""
    class_weight = math.prod(classes.get(tag, 1.0) for tag in row.get("tags", []))
    return Part(row.get("input", ""), row.get("task", "answer"), row.get("weight", 1.0), class_weight)


class Mixture:
    """The parts of all rows that train; `numbers` are those of the rows' parts."""

    def __init__(self, rows: list[dict[str, Any]], classes: Mapping[str, float]) -> None:
        parts = [part_of(row, classes) for row in rows]
        self.parts = sorted(set(parts))
        place = {part: i for i, part in enumerate(self.parts)}
        self.numbers = [place[part] for part in parts]

    @property
    def plain(self) -> bool:
        """All rows count alike, and fully: the loss is TRL's own."""
        return [part.weight for part in self.parts] == [1.0]

    def of_tokens(self, counts: Counter[int]) -> list[float]:
        """What a token of each part counts, 1 on average of equal weights; `counts` are the learned tokens of each part."""
        total = sum(counts.values())
        sizes: dict[tuple[str, str, float], float] = defaultdict(float)
        for number, part in enumerate(self.parts):
            sizes[part[:3]] += part.class_weight * counts[number]
        return [part.weight * part.class_weight * total / sizes[part[:3]] for part in self.parts]


class Collator:
    """TRL's own, which lays the tokens' parts out as it does their labels."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.inner(examples)
        batch["parts"] = self.inner([{**one, "labels": one["parts"]} for one in examples])["labels"]
        return batch


class WeightedTrainer(SFTTrainer):  # type: ignore[misc,unused-ignore]
    """TRL's trainer, whose tokens count what `mixture` says; the dataset has a column `parts` beside `labels`."""

    def weigh(self, mixture: Mixture) -> None:
        counts = Counter(number for row in self.train_dataset["parts"] for number in row if number != OUTSIDE)
        self.labels = sorted({part.label for part in mixture.parts})
        self._token_weights = torch.tensor(mixture.of_tokens(counts))
        self._label_of = torch.tensor([self.labels.index(part.label) for part in mixture.parts])
        self._seen = torch.zeros(len(self.labels), 2)
        self._per_step = sum(counts.values()) / self._steps_of_an_epoch()
        self.data_collator: Any = Collator(self.data_collator)

    def _steps_of_an_epoch(self) -> int:
        rounded = math.floor if self.args.dataloader_drop_last else math.ceil
        batches: int = rounded(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))
        return max(1, math.ceil(batches / int(self.args.gradient_accumulation_steps)))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's sum over tokens, each with its weight, by the tokens of an average step instead of those of this one."""
        parts = inputs.pop("parts")[:, 1:]  # as labels are shifted
        learned = parts != OUTSIDE
        number = parts.clamp(min=0)

        def weighed(**given: Any) -> Any:
            outputs = model(**given)
            self._see(outputs.log_probs.detach(), number, learned)
            outputs.log_probs = outputs.log_probs * self._token_weights.to(number.device)[number]
            return outputs

        # TRL multiplies by the processes where it counts the tokens of all; a step is everybody's
        apart = 1 if self.args.average_tokens_across_devices else self.args.world_size
        return super().compute_loss(weighed, inputs, return_outputs, torch.tensor(self._per_step / apart))

    def _see(self, log_probs: torch.Tensor, number: torch.Tensor, learned: torch.Tensor) -> None:
        """Sums and counts of each task since the last log."""
        self._seen = self._seen.to(log_probs.device)
        told = torch.stack([-log_probs[learned], torch.ones_like(log_probs[learned])], dim=1).to(self._seen.dtype)
        self._seen.index_add_(0, self._label_of.to(log_probs.device)[number[learned]], told)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(self._seen, "sum").tolist()
            logs |= {f"loss/{name}": s / n for name, (s, n) in zip(self.labels, sums, strict=True) if n}
            self._seen.zero_()
        super().log(logs, start_time)
