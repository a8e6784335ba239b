"""Win rate: a judge compares each answer with another model's to the same prompt, in both orders.

Verdicts that disagree are a tie, and so are equal answers, about which nobody is asked. What has no verdict is missing.
Win rate = wins + ties / 2 (Zheng et al., arXiv 2306.05685, section 3.4).
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from factory.ask import Desk
from factory.judge import TRUNCATED, UNREADABLE, Judge, Judging
from factory.knobs import Knobs
from factory.measures import Scored, Values
from factory.models import Models
from factory.recipe_file import find
from factory.rows import Sample, Verdict
from factory.rubric import load
from factory.tally import Tally
from factory.verdicts import BETTER
from factory.ways import WAYS, Question, Scores, Told

Opponent = Literal["base", "teacher"]
MEASURED = {"base": "win_rate", "teacher": "win_rate_teacher"}
"""By opponent, the measure that its comparisons give."""

Pair = tuple[str, frozenset[str]]
"""Two answers to a prompt, whoever gave them: its id, and the texts."""


class WinRate(Knobs):
    """`judge:` of `evaluate`: the model that compares, and with whose answers."""

    model: str
    rubric: str = "prompts/rubrics/pairwise.md"
    against: list[Opponent] = Field(["base"], min_length=1)
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(512, gt=0)
    structured: bool = False
    gate: bool = True

    @field_validator("against", mode="before")
    @classmethod
    def _one_or_several(cls, against: Any) -> Any:
        return [against] if isinstance(against, str) else against

    def pairwise(self) -> Judge:
        return Judge(how="pairwise", **self.model_dump(exclude={"against"}))


class Compared:
    """What asking came to: `tally`, `verdicts` for the manifest, and for each two models what the report tells."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.verdicts: dict[str, Any] = {
            "planned": tally.planned, "unanswered": len(tally.failures), "unreadable": 0, "flaw": tally.flaw,
        }  # fmt: skip
        self.told: list[dict[str, Any]] = []

    def notes(self) -> Iterator[str]:
        """Comparisons that are missing, with the reasons."""
        for one in self.told:
            if one["missing"]:
                why = ", ".join(f"{reason} {count}" for reason, count in one["missing"].items())
                total = one["wins"] + one["ties"] + one["losses"] + (lost := sum(one["missing"].values()))
                yield f"{one['measure']}: {lost} of {total} comparisons of {one['a']} with {one['b']} have no verdict ({why})"


async def compare(knobs: WinRate, scored: list[Scored], models: Models, desk: Desk, seed: int) -> Compared:
    """Adds the win rates to what is `scored`; two answers are judged once, whoever gave them."""
    contests = [
        (own, other, MEASURED[against])
        for against in knobs.against
        for other in scored if other.role == against
        for own in scored if own.role not in (against, "teacher")
    ]  # fmt: skip
    pairs: dict[Pair, list[Sample]] = {}
    for own, other, _ in contests:
        for a, b in zip(own.samples, other.samples, strict=True):
            if _answered(a, b) and a.response != b.response:
                pairs.setdefault(_pair(a, b), [a, b])
    model = models.open(knobs.model)
    judging = Judging(knobs.pairwise(), load(find(knobs.rubric)), pairs.values, model, desk, seed)
    async with model:
        await judging.ask(2 * len(pairs))
    found = Compared(judging.tally)
    ends: dict[Pair, dict[str, float | Verdict]] = {}
    by_place: set[Pair] = set()
    for pair, (group, answers, told) in zip(pairs, judging.told(), strict=True):
        found.verdicts["unreadable"] += sum(_unreadable(said) for _, said in told)
        scores = WAYS["pairwise"].score(judging.rubric, len(answers), told)
        ends[pair] = _ends(judging, group, {a.response: end for a, end in zip(answers, scores, strict=True)})
        if _place_decides(told):
            by_place.add(pair)
    for own, other, measure in contests:
        found.told.append(_filed(own, other, measure, ends, by_place))
    return found


def _filed(
    own: Scored, other: Scored, measure: str, ends: dict[Pair, dict[str, float | Verdict]], by_place: set[Pair]
) -> dict[str, Any]:
    """One model's wins over another, added to its measures, and what is to be told of them."""
    wins: Values = []
    missing: Counter[str] = Counter()
    placed = 0
    for a, b in zip(own.samples, other.samples, strict=True):
        if not _answered(a, b):
            wins.append(None)
            missing["no_answer"] += 1
        elif a.response == b.response:
            wins.append(0.5)
        else:
            end = ends[_pair(a, b)][a.response]
            wins.append(None if isinstance(end, Verdict) else end)
            missing += Counter([end.reason] if isinstance(end, Verdict) else [])
            placed += _pair(a, b) in by_place
    own.add_wins(measure, wins, other)
    counts = {"wins": wins.count(1.0), "ties": wins.count(0.5), "losses": wins.count(0.0), "place_decided": placed}
    return {"measure": measure, "a": own.name, "b": other.name, **counts, "missing": dict(missing)}


def _pair(a: Sample, b: Sample) -> Pair:
    return a.prompt.id, frozenset((a.response, b.response))


def _answered(*samples: Sample) -> bool:
    return all(sample.ending == "kept" for sample in samples)


def _ends(judging: Judging, group: list[Sample], scores: dict[str, Scores | Verdict]) -> dict[str, float | Verdict]:
    """By text the share of wins; where either of two may not be asked about, both have its reason."""
    refused = next(filter(None, map(judging.unasked, group)), None)
    told = {s.response: refused or scores[s.response] for s in group}
    return {text: end if isinstance(end, Verdict) else end[""] for text, end in told.items()}


def _unreadable(said: Told) -> bool:
    return isinstance(said, Verdict) and said.reason in (UNREADABLE, TRUNCATED)


def _place_decides(told: list[tuple[Question, Told]]) -> bool:
    """Whether both orders prefer what stands at the same place."""
    said = [one[BETTER] for _, one in told if not isinstance(one, Verdict)]
    return len(said) == 2 and said[0] == said[1] != 0.5
