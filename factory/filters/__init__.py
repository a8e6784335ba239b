"""SEAM 3: what to keep.

A filter is a small record of its thresholds with one method, and comes in three shapes that tell its cost:

    RowFilter     check(sample) -> Verdict                   looks at one sample
    GroupFilter   check_group(samples) -> list[Verdict]      all samples of one prompt
    SetFilter     start() -> check_group-like function       all rows; keeps an index that grows

To add one: a class in a file here, its name in the union `Filter` below, and a table of rows in `tests/test_filters.py`.
"""
