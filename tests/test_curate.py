"""Stage `filter`: order is kept, every row ends somewhere, a broken filter drops nothing, cheap filters stand first."""

import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.curate import Curate, accepts, curate, drawn, row_filters
from factory.filters import GroupFilter, Judge, Look, RowFilter, SetFilter
from factory.rows import Prompt, Sample, Verdict, by_prompt, union
from factory.run import StageFolder
from tests.sample_rows import Words, answer, ends, filtered, one_filter, prompt


class Spy(RowFilter):
    """Keeps all, and remembers whom it saw."""

    kind: Literal["spy"] = "spy"
    seen: list[str] = []

    def check(self, sample: Sample) -> Verdict:
        self.seen.append(sample.id)
        return self.keep()


class Rated(RowFilter):
    kind: Literal["rated"] = "rated"

    def check(self, sample: Sample) -> Verdict:
        return self.keep(score=float(len(sample.response)))


class Longest(GroupFilter):
    """Of a prompt's answers only the longest stays."""

    kind: Literal["longest"] = "longest"

    def check_group(self, samples: list[Sample]) -> list[Verdict]:
        most = max(len(sample.response) for sample in samples)
        return [
            self.keep() if len(s.response) == most else self.drop(f"length={len(s.response)}<{most}") for s in samples
        ]


class Newest(SetFilter):
    """Only the last of all rows stays: known when all were seen."""

    kind: Literal["newest"] = "newest"

    def start(self, look: Look) -> Judge:
        last = [sample.id for group in look() for sample in group][-1]
        return lambda samples: [self.keep() if s.id == last else self.drop("older") for s in samples]


class Broken(RowFilter):
    kind: Literal["broken"] = "broken"
    on: str = ""
    says: Any = None

    def check(self, sample: Sample) -> Verdict:
        if self.on in sample.response:
            return 1 / 0 if self.says is None else self.says  # type: ignore[return-value]
        return self.keep()


class BrokenGroup(GroupFilter):
    kind: Literal["broken_group"] = "broken_group"

    def check_group(self, samples: list[Sample]) -> list[Verdict]:
        return [self.drop("all")] * (len(samples) - 1)


class BrokenSet(SetFilter):
    kind: Literal["broken_set"] = "broken_set"
    at: Literal["start", "rows"] = "start"

    def start(self, look: Look) -> Judge:
        if self.at == "start":
            raise KeyError("nothing to begin with")
        return lambda samples: [self.drop("never") for _ in range(1 // (len(samples) - 1))]


def through(filters: list[Any], rows: list[Sample]) -> list[Sample]:
    """Filters of any class, also those that no recipe knows."""
    return list(curate(Curate.model_construct(filters=filters), lambda: by_prompt(rows), Words()))


def rows(*texts: str, per_prompt: int = 2) -> list[Sample]:
    return [answer(text, prompt(f"q{i // per_prompt}"), draw=i % per_prompt) for i, text in enumerate(texts)]


def test_the_three_shapes_see_one_row_a_prompt_s_rows_and_all_rows() -> None:
    four = rows("a", "bb", "ccc", "dd")
    assert ends(through([one_filter({"words": {"max": 0}})], four)) == ["words=1>0"] * 4
    assert ends(through([Longest()], four)) == ["length=1<2", "", "", "length=2<3"]
    assert ends(through([Newest()], four)) == ["older", "older", "older", ""]
    assert ends(through([Longest(), Newest()], four)) == ["length=1<2", "older", "", "length=2<3"]


def test_a_dropped_row_is_not_shown_to_the_next_filter() -> None:
    spy = Spy()
    three = rows("a b c", "a", "a b c d")
    through([one_filter({"words": {"min": 2}}), spy, one_filter({"words": {"max": 3}})], three)
    assert spy.seen == [three[0].id, three[2].id]


def test_where_no_row_of_a_prompt_is_left_no_filter_is_asked() -> None:
    assert ends(through([one_filter({"words": {"min": 9}}), Longest()], rows("a", "b"))) == ["words=1<9"] * 2


def test_the_look_gives_what_reaches_the_filter_afresh_at_each_call() -> None:
    looks: list[list[list[str]]] = []

    class Curious(SetFilter):
        kind: Literal["curious"] = "curious"

        def start(self, look: Look) -> Judge:
            looks.extend([[s.response for s in group] for group in look()] for _ in range(2))
            return lambda samples: [self.keep() for _ in samples]

    through([one_filter({"words": {"min": 2}}), Longest(), Curious()], rows("a", "b", "c d", "e f g", "h i", "j"))
    assert looks == [[["e f g"], ["h i"]]] * 2


def test_without_a_look_the_rows_are_read_once() -> None:
    reads = 0

    def read() -> Iterator[list[Sample]]:
        nonlocal reads
        reads += 1
        return iter(by_prompt(rows("a", "b", "a", "c")))

    specs: list[Any] = ["finished", "exact_duplicates", "near_duplicates"]
    list(curate(Curate(filters=specs), read, Words()))
    assert reads == 1
    list(curate(Curate(filters=[*specs, {"exact_duplicates": {"by": "q"}}]), read, Words()))
    assert reads == 3


def test_rows_stream_through() -> None:
    taken = 0

    def read() -> Iterator[list[Sample]]:
        nonlocal taken
        for i in range(10_000):
            taken += 1
            yield [answer("a b c", prompt(f"q{i}"))]

    specs: list[Any] = ["finished", {"words": {"min": 1}}, {"exact_duplicates": {"of": "prompts"}}]
    some = curate(Curate(filters=specs), read, Words())
    assert next(some).ending == next(some).ending == "kept"
    assert taken <= 3


# -- broken is not bad -----------------------------------------------------------------------------------------------------

BROKEN = [
    (Broken(on="x"), ["filter_error", "", "filter_error", ""], "ZeroDivisionError"),
    (Broken(on="x", says="keep"), ["filter_error", "", "filter_error", ""], "keep"),
    (Broken(on="x", says=False), ["filter_error", "", "filter_error", ""], "False"),
    (BrokenGroup(), ["filter_error"] * 4, "2 samples"),
    (BrokenSet(), ["filter_error"] * 4, "nothing to begin with"),
]


@pytest.mark.parametrize(("filter_", "expected", "evidence"), BROKEN)
def test_a_broken_filter_sets_rows_aside_and_drops_none(filter_: Any, expected: list[str], evidence: str) -> None:
    spy = Spy()
    ended = through([filter_, spy], rows("ax", "b", "cx", "d"))
    assert ends(ended) == expected
    aside = [row for row in ended if row.ending != "kept"]
    assert {row.ending for row in aside} == {"failed"}
    assert all(evidence in (row.verdicts[-1].evidence or "") for row in aside)
    assert spy.seen == [row.id for row in ended if row.ending == "kept"]


def test_a_set_filter_that_breaks_on_some_rows_sets_those_aside() -> None:
    ended = through([BrokenSet(at="rows")], [*rows("a", "b"), answer("c", prompt("other"))])
    assert [row.ending for row in ended] == ["failed"] * 3


def test_an_error_while_reading_is_no_fault_of_a_filter() -> None:
    def read() -> Iterator[list[Sample]]:
        yield rows("a", "b")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(curate(Curate(filters=[{"exact_duplicates": {"by": "q"}}]), read, Words()))


# -- every row ends somewhere ----------------------------------------------------------------------------------------------

SPECS: list[Any] = [
    "finished", {"words": {"min": 2}}, "repetition", "no_refusal", "exact_duplicates", {"near_duplicates": {"by": "q"}},
    {"format": {"pattern": "[a-z ]+"}}, {"matches_reference": {"how": "contains"}},
]  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "a b", "a b c d", "Sorry, I can't do that.", "b c d e f"]), st.sampled_from(["stop", "length"]), st.none() | st.integers(0, 2)), max_size=20),
    st.lists(st.sampled_from(SPECS), min_size=1, max_size=5),
)  # fmt: skip
def test_in_equals_kept_plus_dropped_plus_failed_in_the_same_order(
    given_: list[tuple[str, str, int | None]], specs: list[Any]
) -> None:
    samples = [
        answer(
            text,
            prompt(f"q{i // 3}", reference="a"),
            draw=i % 3,
            finish=finish,
            scores={} if q is None else {"q": float(q)},
        )
        for i, (text, finish, q) in enumerate(given_)
    ]
    ended = filtered(specs, samples)
    assert [row.id for row in ended] == [row.id for row in samples]
    for before, after in zip(samples, ended, strict=True):
        assert (after.prompt, after.response, after.scores) == (before.prompt, before.response, before.scores)
        assert after.ending == "kept" or after.verdicts[-1].reason
        assert sum(1 for verdict in after.verdicts if not verdict.keep) <= 1


def test_the_folder_counts_what_the_stage_gave(tmp_path: Any) -> None:
    draw = random.Random(1)
    samples = rows(*[draw.choice(["a", "a b", "a b c", "x"]) for _ in range(60)], per_prompt=3)
    writer = StageFolder(tmp_path / "01-filter-x").write()
    ended = through([one_filter({"words": {"min": 2}}), Broken(on="c"), one_filter("exact_duplicates")], samples)
    for row in ended:
        writer.put(row)
    folder = writer.finish({"stage": "filter", "unit": "samples"}, planned=60)
    told = folder.manifest
    assert (told["in"], told["kept"] + told["dropped"] + told["failed"]) == (60, 60)
    assert told["reasons"] == {
        reason: sum(1 for row in ended if row.ending != "kept" and row.verdicts[-1].reason.startswith(reason))
        for reason in told["reasons"]
    }
    assert set(told["reasons"]) == {"words", "filter_error", "duplicate"}
    assert [row.id for row in folder.rows(Sample)] == [row.id for row in ended if row.ending == "kept"]


def test_a_kept_row_keeps_the_score_that_a_filter_measured() -> None:
    (row,) = through([Rated(), one_filter("finished")], [answer("abc")])
    assert [(v.filter, v.keep, v.score) for v in row.verdicts] == [("rated", True, 3.0)]


# -- several sources -------------------------------------------------------------------------------------------------------

PROMPTS = [prompt(f"q{i}") for i in range(6)]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=3))
def test_of_several_sources_a_prompt_s_rows_stand_together(sources: list[list[int]]) -> None:
    stored = [
        [answer("x", PROMPTS[i], draw=draw, model=f"m{which}") for draw, i in enumerate(numbers)]
        for which, numbers in enumerate(sources)
    ]
    groups = list(union([partial(by_prompt, rows_) for rows_ in stored]))
    assert sorted(row.id for group in groups for row in group) == sorted(row.id for rows_ in stored for row in rows_)
    assert all(len({row.prompt.id for row in group}) == 1 for group in groups)
    if all(len(set(numbers)) == len(numbers) for numbers in sources):
        order = list(dict.fromkeys(i for numbers in sources for i in numbers))
        assert [group[0].prompt.id for group in groups] == [PROMPTS[i].id for i in order]
        assert all([row.model for row in group] == sorted(row.model for row in group) for group in groups)


# -- what "accepted" means -------------------------------------------------------------------------------------------------


def test_accepting_asks_the_row_filters_alone_and_tells_the_first_that_does_not_keep() -> None:
    knobs = Curate(filters=["finished", {"words": {"min": 2}}, "exact_duplicates", {"format": {"pattern": "a.*"}}])
    filters = row_filters([knobs], Words())
    assert [one.kind for one in filters] == ["finished", "words", "format"]
    reasons = [accepts(filters, answer(text)) for text in ("a b", "a", "b", "b c")]
    assert [verdict and verdict.reason for verdict in reasons] == [None, "words=1<2", "words=1<2", "format"]
    broken = accepts([Broken()], answer("a"))
    assert broken is not None
    assert (broken.keep, broken.reason) == (None, "filter_error")


# -- the control -------------------------------------------------------------------------------------------------------


def of_lists(count: int) -> list[Sample]:
    """Answers of two models to prompts of two lists; those of the second list and of model b are shorter more often."""
    chance = random.Random(0)
    rows = []
    for i in range(count):
        source = "xy"[i % 2]
        asked = Prompt.of([{"role": "user", "content": f"q{i}"}], source=source)
        for model in "ab":
            long = chance.random() < (0.8 if source == "x" else 0.4) - (0.3 if model == "b" else 0)
            rows.append(answer("one two three" if long else "one", asked, model=model))
    return rows


def kept_of(rows: list[Sample], seed: int = 7, **knobs: Any) -> list[Sample]:
    made = Curate.model_validate({"filters": [{"words": {"min": 2}}]} | knobs)
    ended = list(curate(made, lambda: by_prompt(rows), Words(), seed))
    assert [row.id for row in ended] == [row.id for row in rows]
    return [row for row in ended if row.ending == "kept"]


def test_a_random_control_keeps_as_many_of_each_list_and_model_whatever_they_say() -> None:
    rows = of_lists(400)
    real, control = kept_of(rows), kept_of(rows, control="random")

    def strata(kept: list[Sample]) -> Counter[tuple[str, str]]:
        return Counter((row.prompt.source, row.model) for row in kept)

    assert strata(control) == strata(real)
    assert len(set(strata(real).values())) == 4  # each list and model has its own number
    assert {row.response for row in real} == {"one two three"}
    short = sum(row.response == "one" for row in control)
    assert short > len(control) / 4  # chance takes what the filter would not
    assert control == kept_of(rows, control="random")
    assert control != kept_of(rows, seed=8, control="random")


def test_the_rows_that_a_control_leaves_out_say_so() -> None:
    rows = of_lists(40)
    made = Curate.model_validate({"filters": ["no_refusal", {"words": {"min": 2}}], "control": "random"})
    reasons = Counter(ends(curate(made, lambda: by_prompt(rows), Words(), 7)))
    assert set(reasons) == {"", "not_drawn"}


def test_where_filters_compare_the_answers_of_a_prompt_the_control_draws_from_each_prompt() -> None:
    asked = [prompt(f"q{i}") for i in range(60)]
    rows = [answer("x" * (1 + d), one, draw=d) for one in asked for d in range(4)]
    knobs = Curate.model_construct(filters=[Longest()], control="random")
    ended = list(curate(knobs, lambda: by_prompt(rows), Words(), 7))
    kept = [row for row in ended if row.ending == "kept"]
    assert [row.prompt.id for row in kept] == [one.id for one in asked]  # one each
    assert {row.draw for row in kept} == {0, 1, 2, 3}


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 9))
@settings(deadline=None)
def test_a_draw_takes_exactly_as_many_as_it_shall(take: int, more: int, seed: int) -> None:
    found = list(drawn(take, take + more, random.Random(seed)))
    assert (len(found), sum(found)) == (take + more, take)


def test_each_row_of_a_draw_is_taken_equally_often() -> None:
    chance = random.Random(0)
    counts = Counter(i for _ in range(4000) for i, taken in enumerate(drawn(3, 8, chance)) if taken)
    assert all(1350 < counts[i] < 1650 for i in range(8))  # five standard deviations around 1500
