"""Stage `judge`: a model scores samples with a rubric file. A verdict that cannot be read is missing, never a number.

The gate, the questions of one of the three ways, up to three draws of each, the strict reading, the scores. Answers that
are stored are never asked for again: whatever is not in a question may change for free.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

from pydantic import Field

from factory.agreement import Agreement, Gold
from factory.ask import Desk, Model
from factory.canaries import Canaries, canaries, told_by, warning
from factory.generate import draw_seed
from factory.hijack import hijack
from factory.knobs import Knobs
from factory.rows import Choice, Failure, Message, Request, Sample, Sampling, Verdict, by_prompt
from factory.rubric import Rubric
from factory.tally import Tally
from factory.teachers import batch_endpoint
from factory.verdicts import Form
from factory.ways import WAYS, Question, Scores, Told, missing

UNREADABLE, TRUNCATED = "judge_unreadable", "judge_truncated"
"""Reasons of a verdict that came and has no score: a truncated one may go on after what looks like its score."""
QUOTED = 160
"""Characters of a verdict that an error quotes."""
AGAIN = 2
"""How often a verdict that cannot be read is asked for again."""
WARMER = 0.7
"""At least, the temperature then: at 0 the same would come."""
TRIAL = 100
"""Questions that are seen to their end first: a judge that no rubric can help is known after them."""


class Judge(Knobs):
    """`judge:`; the score is filed under `as`, or else under the rubric's own name; those of aspects as `name.aspect`."""

    kind: Literal["judge"] = "judge"
    model: str
    rubric: str
    from_: str | list[str] | None = Field(None, alias="from")
    as_: str | None = Field(None, alias="as")
    how: Literal["pointwise", "listwise", "pairwise"] = "pointwise"
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(512, gt=0)
    structured: bool = False
    gate: bool = True
    canaries: Canaries | None = None
    gold: Gold | None = None

    def sampling(self, form: Form, again: int) -> Sampling:
        return Sampling(
            temperature=max(self.temperature, WARMER) if again else self.temperature,
            max_tokens=self.max_tokens,
            response_format=form.response_format if form.structured else None,
        )


class Judged(NamedTuple):
    """What asking did, the samples in order, and facts for the manifest, which are whole when the samples are through."""

    tally: Tally
    samples: Iterator[Sample]
    facts: dict[str, Any]


async def judge(
    knobs: Judge, rubric: Rubric, open_samples: Callable[[], Iterable[Sample]], total: int, model: Model, desk: Desk,
    seed: int,
) -> Judged:  # fmt: skip
    """Ask for all verdicts, then give the samples back in order, scored or set aside with the reason."""
    known = list(canaries(knobs.canaries, total, seed)) if knobs.canaries else []
    judging = Judging(knobs, rubric, lambda: chain(known, by_prompt(open_samples())), model, desk, seed)
    async with model:
        await judging.ask(total)
    facts: dict[str, Any] = {}
    agreement = Agreement(knobs.gold) if knobs.gold else None
    name = knobs.as_ or rubric.head.name
    groups = judging.results()
    if known:
        middle = 0.5 if knobs.how == "pairwise" else sum(rubric.head.scale) / 2
        ends = ((s.model, end if isinstance(end, Verdict) else end[""]) for _ in known for s, end in next(groups))
        facts["canaries"] = told_by(ends, middle)
        facts["warnings"] = list(filter(None, [warning(facts["canaries"])]))

    def scored() -> Iterator[Sample]:
        for sample, end in chain.from_iterable(groups):
            if isinstance(end, Verdict):
                yield sample.judged(end)
                continue
            if agreement:
                agreement.note(sample, end[""])
            yield sample.scored(**{f"{name}.{aspect}" if aspect else name: value for aspect, value in end.items()})
        if agreement:
            facts["gold"] = agreement.facts()

    return Judged(judging.tally, scored(), facts)


class Judging:
    """One stage's questions, asked and read back. Nothing of them is kept but the numbers of those to ask again."""

    def __init__(
        self, knobs: Judge, rubric: Rubric, open_groups: Callable[[], Iterable[list[Sample]]], model: Model, desk: Desk,
        seed: int,
    ) -> None:  # fmt: skip
        self.knobs, self.rubric, self.open_groups = knobs, rubric, open_groups
        self.model, self.desk, self.seed = model, desk, seed
        self.way = WAYS[knobs.how]
        forms = model.capabilities.structured
        self.structured = knobs.structured and (forms is None or "json_schema" in forms)
        self.tally = Tally()
        # in batches each further draw would be another wait of up to a day
        self.last = 0 if batch_endpoint(model.entry, model.teacher) else AGAIN
        self.again: dict[int, int] = {}
        self._forms: dict[tuple[str, str], Form] = {}

    # -- asking --------------------------------------------------------------------------------------------------------

    async def ask(self, samples: int) -> None:
        """All questions to their end: a first draw, and others of those verdicts that cannot be read."""
        total = samples if self.knobs.how == "pointwise" else sum(1 for _ in self._questions())
        self.tally.planned = total
        trial = [] if self.last == 0 else [TRIAL]
        for first, last in pairwise([0, *trial, total + TRIAL]):
            for draw in range(1 + self.last):
                if draw and not any(first <= i < last and k == draw for i, k in self.again.items()):
                    break
                await self._draw(range(first, last), draw)

    async def _draw(self, span: range, draw: int) -> None:
        """One draw of the questions in a span that want it."""
        wanted = partial(self._requests, span, draw)
        label = f"judge {self.model.name}{', again' if draw else ''}"
        tally = await self.desk.ask(self.model, self._noted(wanted(), draw), self.tally.planned, label, self._flaw)
        self.tally.add(tally)
        if draw < self.last:
            read = self.desk.read(self.model, (request for _, _, request in wanted()), tally)
            for (number, question, _), (_, (outcome,)) in zip(wanted(), read, strict=True):
                if _unreadable(question.form, outcome):
                    self.again[number] = draw + 1

    def _noted(self, wanted: Iterable[tuple[int, Question, Request]], draw: int) -> Iterator[Request]:
        """The requests, and until its verdict has come the form that each wants, where no other draw will follow."""
        for _, question, request in wanted:
            if draw == self.last:
                self._forms[request.prompt, request.messages[-1]["content"]] = question.form
            yield request

    def _requests(self, span: range, draw: int) -> Iterator[tuple[int, Question, Request]]:
        for number, question in enumerate(self._questions()):
            if number >= span.stop:
                return
            if number in span and (not draw or self.again.get(number) == draw):
                yield number, question, self._request(question, draw)

    def _request(self, question: Question, draw: int) -> Request:
        sampling = self.knobs.sampling(question.form, draw)
        unseeded = sampling.temperature == 0 or not self.model.capabilities.seed
        seed = draw_seed(self.seed, question.prompt, question.draw)
        return Request(
            identity=self.model.identity, messages=question.messages, sampling=sampling, draw=draw,
            seed=None if unseeded else seed + draw, prompt=question.prompt.id,
        )  # fmt: skip

    def _flaw(self, request: Request, verdict: Choice) -> str | None:
        """Why a verdict has no score and what to do, for people; None where it has one, or where another draw will follow."""
        cut = verdict.finish != "stop"
        form = self._forms.pop((request.prompt, request.messages[-1]["content"]), None)
        if not cut and (form is None or form.read(verdict.text) is not None):
            return None
        said = " ".join(verdict.text.split())
        if len(said) > QUOTED:  # how it ends tells more often what is wrong
            said = f"{said[: QUOTED // 2]} ... {said[-QUOTED // 2 :]}"
        if form is None or cut:
            limit = self.knobs.max_tokens
            return (
                f"{said!r}, which was cut off: raise max_tokens ({limit}), or change {self.knobs.rubric} or the judge"
            )
        return f"{said!r}; {self.knobs.rubric} wants {form.wants}: change the rubric or the judge"

    # -- what is asked, and what is not --------------------------------------------------------------------------------

    def _questions(self) -> Iterator[Question]:
        for group in self.open_groups():
            yield from self._of_group(group)

    def _of_group(self, group: list[Sample]) -> Iterator[Question]:
        """Equal answers to a prompt are asked about once."""
        if answers := self._distinct(group):
            for question in self.way.ask(self.rubric, answers, self.seed):
                yield self._as_json(question) if self.structured else question

    def _distinct(self, group: list[Sample]) -> list[Sample]:
        """The first answer of each text that may be asked about."""
        first: dict[str, Sample] = {}
        for sample in group:
            if sample.response not in first and self.unasked(sample) is None:
                first[sample.response] = sample
        return list(first.values())

    def unasked(self, sample: Sample) -> Verdict | None:
        """Why an answer is set aside before anybody is asked."""
        if self.rubric.guided and not sample.prompt.reference:
            return missing("judge_no_reference")
        if self.knobs.gate and (found := hijack(sample.response)):
            return missing(f"judge_gate:{found[0]}", found[1])
        return None

    def _as_json(self, question: Question) -> Question:
        form = question.form._replace(structured=True)
        *before, last = question.messages
        order = Message(role="user", content=f"{last['content']}\n\n{form.order}")
        return question._replace(messages=[*before, order], form=form)

    # -- reading -------------------------------------------------------------------------------------------------------

    def results(self) -> Iterator[list[tuple[Sample, Scores | Verdict]]]:
        """Group by group, each sample with its scores or with why it has none; from the journal alone."""
        for group, answers, told in self.told():
            ends = dict(
                zip((s.response for s in answers), self.way.score(self.rubric, len(answers), told), strict=True)
            )
            yield [(sample, self.unasked(sample) or ends[sample.response]) for sample in group]

    def told(self) -> Iterator[tuple[list[Sample], list[Sample], list[tuple[Question, Told]]]]:
        """Each group, its answers that were asked about, and the questions about them with what was said."""
        requests = (self._request(one, self.again.get(i, 0)) for i, one in enumerate(self._questions()))
        read = self.desk.read(self.model, requests, self.tally)
        for group in self.open_groups():
            told = [(question, _told(question.form, next(read)[1][0])) for question in self._of_group(group)]
            yield group, self._distinct(group), told


def lost(reasons: Counter[str], total: int, tally: Tally) -> dict[str, Any]:
    """For the manifest, in samples: those whose verdicts did not come, or could not be read at the last draw."""
    unreadable = reasons[UNREADABLE] + reasons[TRUNCATED]
    causes = {f"judge_{failure.reason}" for failure in tally.failures.values()}
    unanswered = sum(count for reason, count in reasons.items() if reason in causes)
    return {"planned": total, "unanswered": unanswered, "unreadable": unreadable, "flaw": tally.flaw}


def _unreadable(form: Form, outcome: Choice | Failure) -> bool:
    """Whether another draw may help; one that was cut off needs a larger limit."""
    return isinstance(outcome, Choice) and outcome.finish == "stop" and form.read(outcome.text) is None


def _told(form: Form, outcome: Choice | Failure) -> Told:
    if isinstance(outcome, Failure):
        return missing(f"judge_{outcome.reason}", outcome.detail[:500])
    if outcome.finish != "stop":
        return missing(TRUNCATED, outcome.text[-500:])
    said = form.read(outcome.text)
    return missing(UNREADABLE, outcome.text[:500]) if said is None else said
