"""SEAM 3: what to keep.

A filter is a small record of its thresholds with one method, and comes in three shapes that tell its cost:

    RowFilter     check(sample) -> Verdict                   looks at one sample
    GroupFilter   check_group(samples) -> list[Verdict]      all samples of one prompt
    SetFilter     start(look) -> judge(samples) -> verdicts  all rows; keeps an index that grows

To add one: a class in a file here, its name in the union `Filter` below, and a table of rows in `tests/test_filters.py`.
"""

from typing import Any, TypeAlias

from factory.filters.contamination import Contamination
from factory.filters.duplicates import ExactDuplicates, NearDuplicates
from factory.filters.reference import MatchesReference
from factory.filters.refusal import NoRefusal
from factory.filters.rules import Finished, Format, Repetition, Tokens, Words
from factory.filters.shapes import GroupFilter, Judge, Kit, Look, RowFilter, SetFilter
from factory.knobs import one_key

Filter: TypeAlias = (
    Finished | Words | Tokens | NoRefusal | Repetition | Format | MatchesReference | ExactDuplicates | NearDuplicates
    | Contamination
)  # fmt: skip
FilterKnob: Any = one_key(Filter)

__all__ = ["Filter", "FilterKnob", "GroupFilter", "Judge", "Kit", "Look", "RowFilter", "SetFilter"]
