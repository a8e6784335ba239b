"""The rules on labelled answers: recall and precision, on the half they were set on and on the half they were not."""

import re
from collections import Counter

import pytest

from factory.rows import digest
from tests.labelled_rows import RULES, labelled, scored
from tests.prompt_lists import ROOT

HALVES = {"tuned on": False, "held out": True}


@pytest.mark.parametrize("rule", RULES)
def test_each_set_has_two_hundred_rows_each_way_and_no_row_twice(rule: str) -> None:
    rows = labelled(rule)
    assert min(Counter(row.bad for row in rows).values()) >= 200
    assert min(Counter((row.bad, row.held_out) for row in rows).values()) >= 80
    seen = Counter(
        digest(r.sample.response, [m["content"] for m in r.sample.prompt.messages], r.sample.reasoning) for r in rows
    )
    assert max(seen.values()) == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("half", HALVES)
def test_each_rule_finds_95_of_100_with_at_most_2_false_alarms_in_100(rule: str, half: str) -> None:
    score = scored(rule, HALVES[half])
    assert score.recall >= 0.95
    assert score.precision >= 0.98


def test_the_table_in_the_docs_is_what_is_measured() -> None:
    told = {}
    for page in (ROOT / "docs").glob("curation*.md"):  # the page of the rules, or the one that joins all
        for line in page.read_text(encoding="utf-8").splitlines():
            if found := re.fullmatch(r"\| `(\w+)` \| (tuned on|held out) \| (.*) \|", line):
                told[found[1], found[2]] = found[3]
    measured = {}
    for rule in RULES:
        for half, held_out in HALVES.items():
            s = scored(rule, held_out)
            measured[rule, half] = (
                f"{s.caught} of {s.bad} | {s.alarms} of {s.good} | {s.recall:.1%} | {s.precision:.1%}"
            )
    assert told == measured
