"""SEAM 3: what to keep.

A filter is a small record of its thresholds with one method, and comes in three shapes that tell its cost:

    RowFilter     check(sample) -> Verdict                   looks at one sample
    GroupFilter   check_group(samples) -> list[Verdict]      all samples of one prompt
    SetFilter     start(look) -> judge(samples) -> verdicts  all rows; keeps an index that grows

To add one: a class in a file here, its name in the union `Filter` below, and a table of rows in `tests/test_filters.py`.
"""

from typing import Any, TypeAlias, get_args

from factory.filters.code import Code
from factory.filters.contamination import Contamination
from factory.filters.duplicates import ExactDuplicates, NearDuplicates
from factory.filters.form import Format
from factory.filters.gym import ReasoningGym
from factory.filters.language import Language
from factory.filters.leakage import CopiedPrompt, Leakage
from factory.filters.personal_data import PersonalData
from factory.filters.reference import MatchesReference
from factory.filters.refusal import NoRefusal
from factory.filters.repetition import Repetition
from factory.filters.rules import Finished, Ratio, Tokens, Words
from factory.filters.semantic import SemanticDuplicates
from factory.filters.shapes import GroupFilter, Judge, Kit, Look, RowFilter, SetFilter
from factory.filters.threshold import Threshold
from factory.filters.trace import Trace
from factory.filters.verifier import Verifier
from factory.knobs import one_key

Filter: TypeAlias = (
    Finished | Words | Tokens | Ratio | Language | NoRefusal | Repetition | CopiedPrompt | Leakage | Trace | PersonalData
    | Format | MatchesReference | Code | ReasoningGym | Threshold | ExactDuplicates | NearDuplicates | SemanticDuplicates
    | Contamination
)  # fmt: skip
FilterKnob: Any = one_key(Filter)
AnyVerifier: TypeAlias = MatchesReference | Code | ReasoningGym
VerifierKnob: Any = one_key(AnyVerifier)
VERIFIERS = frozenset(record.model_fields["kind"].default for record in get_args(AnyVerifier))

__all__ = [
    "VERIFIERS",
    "Filter",
    "FilterKnob",
    "GroupFilter",
    "Judge",
    "Kit",
    "Look",
    "RowFilter",
    "SetFilter",
    "Verifier",
    "VerifierKnob",
]
