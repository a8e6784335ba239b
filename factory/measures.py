"""What is measured of a model's answers: for each measure one value per held-out prompt, None where it cannot be told.

The mean over the prompts is what the report shows, so that every difference can be paired prompt by prompt.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from factory.choose import sentence_bleu
from factory.curate import accepts
from factory.filters import RowFilter
from factory.filters.reference import MatchesReference
from factory.rows import Sample
from factory.teachers.transformers import Forced

RATES = ("accepted", "correct", "wrong", "unread", "finished")
"""0 or 1 for each prompt: Wilson intervals and exact tests are for these."""
MEASURES = {
    "accepted": "share of answers that the recipe's own row filters accept",
    "correct": "share of answers that match the prompt's reference",
    "wrong": "share of answers whose result can be read and does not match the reference",
    "unread": "share of answers without a readable result: nothing where `extract` looks, no number, no option, no answer at all",
    "finished": "share of answers that ended by themselves",
    "teacher_loss": "mean loss per token on the teacher's accepted answers (nats; lower is closer to the teacher)",
    "teacher_perplexity": "exp of teacher_loss",
    "token_agreement": "share of the tokens of the teacher's accepted answers that the model would choose in their place (greedy, "
    "given the teacher's tokens before)",
    "teacher_overlap": "ROUGE-L with the teacher's accepted answer (0 to 1): likeness of wording, not of content",
    "bleu": "smoothed sentence BLEU with the reference (0 to 1)",
    "rouge_l": "ROUGE-L with the reference: F1 of the longest common subsequence of words (0 to 1)",
    "brier": "mean squared distance between confidence and correctness (0 to 1, lower is better); confidence is the geometric "
    "mean of the probabilities of the answer's tokens",
    "ece": "expected calibration error: distance between mean confidence and share of correct answers, in ten bins of confidence, "
    "weighted by their size (0 to 1, lower is better; small samples raise it)",
    "distinct_1": "different words / all words, over the answers to a prompt",
    "distinct_2": "different pairs of words / all pairs, over the answers to a prompt",
    "words": "mean length of an answer in words",
    "win_rate": "share of prompts for which the judge prefers the answer to the base model's, asked in both orders; ties, and "
    "verdicts that follow the order, count half",
    "lc_win_rate": "win_rate at equal length: where a logistic fit on the difference of lengths stands at zero",
    "win_rate_teacher": "the same as win_rate, beside the teacher's answer",
    "lc_win_rate_teacher": "win_rate_teacher at equal length",
}
UNREAD = ("no_answer", "unread")
"""What `matches_reference` says where it finds nothing to compare."""
TEXTS = ("exact", "normalised", "contains")
"""Ways of comparing for which the reference is a text rather than a result."""
BINS = 10
"""Of confidence, equally wide (Naeini et al. 2015)."""

Values = list[float | None]


class Scored:
    """One model's answers to the held-out prompts, measured; lists run parallel to the prompts.

    `samples` are the answers that most measures are about; `draws` are sampled ones beside them, equally many for each
    prompt; `k` is that of pass@k.
    """

    def __init__(
        self, name: str, role: str, samples: list[Sample], filters: list[RowFilter], check: MatchesReference,
        draws: list[list[Sample]] | None = None, k: int = 1,
    ) -> None:  # fmt: skip
        self.name, self.role, self.samples = name, role, samples
        self.judged = [_judged(filters, s) for s in samples]
        self.drawn = [[_judged(filters, s) for s in answers] for answers in draws or []]
        results = [_result(s, check) for s in samples]
        self.values: dict[str, Values] = {
            "accepted": [_accepted(s) for s in self.judged],
            **{
                name: [None if r is None else float(r == name) for r in results]
                for name in ("correct", "wrong", "unread")
            },
            "finished": [float(s.finish == "stop") for s in samples],
            "words": [float(len(s.response.split())) for s in samples],
        }
        if check.extract is None and check.how in TEXTS:
            self.values["bleu"] = [_like_reference(s, sentence_bleu) for s in samples]
            self.values["rouge_l"] = [_like_reference(s, rouge_l) for s in samples]
        self.confidence = [_confidence(s) for s in samples]
        both = list(zip(self.confidence, self.values["correct"], strict=True))
        self.values["brier"] = [None if c is None or right is None else (c - right) ** 2 for c, right in both]
        said = [[s.response for s in answers if s.finish != "failed"] for answers in draws or [[s] for s in samples]]
        for n in (1, 2):
            self.values[f"distinct_{n}"] = [distinct(texts, n) for texts in said]
        self.longer: dict[str, Values] = {}
        if draws:
            self._add_draws(check, k)

    def answers(self) -> list[Sample]:
        """All of them with their verdicts, those to one prompt together."""
        drawn = self.drawn or [[] for _ in self.judged]
        return [s for first, more in zip(self.judged, drawn, strict=True) for s in (first, *more)]

    def _add_draws(self, check: MatchesReference, k: int) -> None:
        results = [[_result(s, check) for s in answers] for answers in self.drawn]
        correct = [[None if r is None else float(r == "correct") for r in answers] for answers in results]
        accepted = [[_accepted(s) for s in answers] for answers in self.drawn]
        for name, outcomes in (("pass", correct), ("accepted", accepted)):
            for size in sorted({1, k}):
                self.values[f"{name}@{size}"] = [_pass_of(known, size) for known in outcomes]

    def add_forced(self, teacher: "Scored", forced: Sequence[Forced | None]) -> None:
        """What a local model makes of the teacher's accepted answers; empty where it cannot be told."""
        if forced:
            self.values["teacher_loss"] = [f.loss / f.tokens if f and f.tokens else None for f in forced]
            self.values["token_agreement"] = [f.agreed / f.tokens if f and f.tokens else None for f in forced]
        pairs = zip(self.samples, teacher.judged, strict=True)
        self.values["teacher_overlap"] = [
            rouge_l(own.response, other.response) if other.ending == "kept" else None for own, other in pairs
        ]

    def add_wins(self, measure: str, wins: Values, other: "Scored") -> None:
        """What a judge says beside another model's answers: 1, 0.5 or 0; `longer` holds by how many words these are."""
        self.values[measure] = wins
        lengths = zip(self.samples, other.samples, strict=True)
        self.longer[measure] = [float(len(a.response.split()) - len(b.response.split())) for a, b in lengths]


def definition(measure: str) -> str:
    """What a measure is, for people."""
    name, at, k = measure.partition("@")
    if not at:
        return MEASURES[measure]
    of = "matches the reference" if name == "pass" else "is accepted by the row filters"
    if k == "1":
        return f"share of sampled answers of which each {of}"
    return f"chance that at least one of {k} sampled answers {of}, estimated without bias from all that were drawn"


def known(measure: str) -> bool:
    """Whether there is a measure of that name."""
    name, at, k = measure.partition("@")
    return (name in ("pass", "accepted") and k.isdecimal() and int(k) > 0) if at else measure in MEASURES


# -- one answer --------------------------------------------------------------------------------------------------------


def _judged(filters: list[RowFilter], sample: Sample) -> Sample:
    verdict = accepts(filters, sample) if sample.ending == "kept" else None
    return sample if verdict is None else sample.judged(verdict)


def _accepted(judged: Sample) -> float | None:
    """1 or 0, also where no answer came; None where a filter could not tell."""
    if judged.ending == "failed" and judged.verdicts[-1].filter != "generate":
        return None
    return float(judged.ending == "kept")


def _result(sample: Sample, check: MatchesReference) -> str | None:
    """`correct`, `wrong` or `unread`; None where there is no reference, or where it cannot be told."""
    if sample.prompt.reference is None:
        return None
    if sample.ending != "kept":
        return "unread"
    verdict = check.check(sample)
    if verdict.keep is None:
        return None
    return "correct" if verdict.keep else "unread" if verdict.reason.startswith(UNREAD) else "wrong"


def _like_reference(sample: Sample, likeness: Callable[[str, str], float]) -> float | None:
    reference = sample.prompt.reference
    return None if reference is None else likeness(sample.response, reference)


def _confidence(sample: Sample) -> float | None:
    """Geometric mean of the probabilities of an answer's tokens (Malinin & Gales 2021: length-normalised likelihood)."""
    if sample.ending != "kept" or sample.logprob is None or not sample.tokens:
        return None
    return math.exp(min(sample.logprob / sample.tokens, 0.0))


# -- several answers, two texts ----------------------------------------------------------------------------------------


def _pass_of(outcomes: list[float | None], k: int) -> float | None:
    told = [outcome for outcome in outcomes if outcome is not None]
    return pass_at(k, len(told), round(sum(told))) if len(told) >= k else None


def pass_at(k: int, n: int, right: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, when `right` of n were: 1 - C(n - right, k) / C(n, k)
    (Chen et al. 2021, arXiv 2107.03374, section 2.1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def distinct(texts: list[str], n: int) -> float | None:
    """Different n-grams of words / all of them (Li et al. 2016, arXiv 1510.03055), over the answers to one prompt."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.casefold().split()
        grams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else None


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), case and punctuation aside."""
    said, wanted = (re.findall(r"\w+", text.casefold()) for text in (candidate, reference))
    common = longest_common(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        met = row & places.get(word, 0)
        row = ((row + met) | (row - met)) & every
    return len(a) - row.bit_count()


def off_by_bin(confidence: float | None, correct: float | None) -> tuple[float, ...] | None:
    """What one answer adds to the calibration error: correctness minus confidence, in the place of its bin."""
    if confidence is None or correct is None:
        return None
    at = min(int(confidence * BINS), BINS - 1)
    return tuple(correct - confidence if i == at else 0.0 for i in range(BINS))


def calibration_error(*sums: float) -> float:
    """ECE from the sums of `off_by_bin` and, last, the number of answers: bins weigh as much as they hold."""
    *bins, n = sums
    return math.fsum(map(abs, bins)) / n
