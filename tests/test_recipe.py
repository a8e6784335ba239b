"""Recipes: every problem at once, with file, line and nearest key; parents and overrides merge as documented."""

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.check import check
from factory.errors import RecipeError
from factory.journal import Journal
from factory.knobs import written_out
from factory.pipeline import run
from factory.recipe import draft, load
from factory.recipe_file import find, shipped
from factory.yamlfile import parse

MINIMAL = """\
name: small
models:
  teacher: {type: openai, model: m, base_url: "http://127.0.0.1:9/v1"}
  base: {type: transformers, model: ./weights/none}
prompts:
  - {path: prompts/everyday.jsonl, held_out: 4}
stages:
  - generate: {model: teacher, n: 2}
  - filter: [finished, {words: {min: 2}}]
  - train: {method: sft, student: base}
  - evaluate: {students: [base, student], teacher: teacher}
"""

RECIPES = sorted((shipped() / "recipes").rglob("*.yaml"))


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(write(folder, text))
    return [line.removeprefix(f"{folder}/") for line in str(caught.value).splitlines()]


def test_a_recipe_is_typed(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, MINIMAL))
    assert recipe.stages[0].n == 2
    assert [stage.kind for stage in recipe.stages] == ["generate", "filter", "train", "evaluate"]
    assert recipe.stages[1].filters[1].min == 2
    assert recipe.trained() == {"student": recipe.stages[2]}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("n: 2", "temperature: .inf", "r.yaml:8: stages.0.generate.temperature: Input should be a finite number (got inf)"),
        ("n: 2", "presence_penalty: .nan", "r.yaml:8: stages.0.generate.presence_penalty: Input should be a finite number (got nan)"),
        ("n: 2", "fallback: teacher", "r.yaml:8: stages.0.generate: fallback: teacher is the model itself, which has failed by then; name another one"),
        ("n: 2", "nn: 2", "r.yaml:8: unknown key 'stages.0.generate.nn'; did you mean 'n'?"),
        ("n: 2", "temprature: 1", "r.yaml:8: unknown key 'stages.0.generate.temprature'; did you mean 'temperature'?"),
        ("min: 2", "mim: 2", "r.yaml:9: unknown key 'stages.1.filter.1.words.mim'; did you mean 'min'?"),
        ("words", "wordz", "r.yaml:9: stages.1.filter.1: there is no 'wordz'; did you mean 'words'?"),
        ("- filter", "- fitler", "r.yaml:9: stages.1: there is no 'fitler'; did you mean 'filter'?"),
        ("type: openai", "type: opnai", "r.yaml:3: models.teacher: there is no 'opnai'; did you mean 'openai'?"),
        ("held_out", "heldout", "r.yaml:6: unknown key 'prompts.0.heldout'; did you mean 'held_out'?"),
        ("name: small", "title: small", "r.yaml:1: unknown key 'title'; known here: arms, budget, extends, models, name, prompts, seed, stages"),
        ("model: teacher", "model: techer", "r.yaml:8: there is no model 'techer'; did you mean 'teacher'?"),
        ("[base, student]", "[base, studend]", "r.yaml:11: there is no model 'studend'; did you mean 'student'?"),
        ("filter: [finished, {words: {min: 2}}]", "choose: {best: 1, by: logprob}", "r.yaml:9: models.teacher tells no log-probability; set logprobs: true in the generate stage above"),
        ("n: 2", "n: two", "r.yaml:8: stages.0.generate.n: Input should be a valid integer"),
        ("n: 2", "n: 2, beam: {width: 4}", "r.yaml:8: stages.0.generate: beam search draws nothing at random: remove n"),
        ("n: 2", "from: nowhere", "r.yaml:8: there is no prompt list or earlier stage 'nowhere'"),
        ("base_url: \"http", "base_url: \"ftp", "r.yaml:3: models.teacher.base_url: base_url must look like https://host/v1"),
        ("model: m,", "model: m, api_key: sk-123,", "r.yaml:3: unknown key 'models.teacher.api_key'; did you mean 'api_key_env'?"),
        ("n: 2}", "n: 2, as: ../../../evil}", "r.yaml:8: the name '../../../evil' must be 1 to 64 letters"),
        ("n: 2}", "n: 2, as: ''}", "r.yaml:8: the name '' must be"),
        ("student: base}", "student: base, as: a/b}", "r.yaml:10: the name 'a/b' must be"),
        ("model: teacher, n: 2", "model: [teacher, teacher]", "r.yaml:8: stages.0.generate: a model is named twice"),
        ("[base, student]", "[base, base]", "r.yaml:11: stages.3.evaluate.students: a student is named twice"),
        ("filter: [finished, {words: {min: 2}}]", "pair: {score: logprob}", "r.yaml:9: models.teacher tells no log-probability"),
        ("{words: {min: 2}}", "{near_duplicates: {by: logprob}}", "r.yaml:9: models.teacher tells no log-probability"),
        ("{words: {min: 2}}", "{tokens: {min: 2, model: teacher}}", "r.yaml:9: tokens: models.teacher has no local tokenizer"),
        ("student: base}", "student: base, args: {num_train_epochs: 0}}", "no step would be taken"),
        ("student: base}", "student: base, args: {learning_rate: abc}}", "args.learning_rate is a number, not 'abc'"),
        ("type: openai, model", "typ: openai, model", "r.yaml:3: models.teacher.type is missing; known: anthropic, openai,"),
        ("- generate: {model: teacher, n: 2}", "- {generate: {model: teacher}, genrate: {n: 2}}", "r.yaml:8: stages.0: a map with one key is wanted here, not generate, genrate"),
        ("name: small", "extend: x.yaml\nname: small", "unknown key 'extend'; did you mean 'extends'?"),
        ("held_out: 4", "take: 9", "r.yaml:11: no prompts are held out to be asked"),
        ("student: base}", "student: teacher}", "r.yaml:10: models.teacher is `type: openai`, which cannot be trained"),
        ("method: sft, student: base", "method: sft, student: base, args: {max_seq_length: 5}", "max_length"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_the_nearest_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in MINIMAL
    assert any(told in line for line in problems(tmp_path, MINIMAL.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model: m,", "model: m, api_key_env: sk-canary-123,"),
        ("http://127.0.0.1:9/v1", "http://user:sk-canary-123@127.0.0.1/v1"),
    ],
)
def test_a_key_that_was_pasted_is_not_shown(tmp_path: Path, old: str, new: str) -> None:
    told = problems(tmp_path, MINIMAL.replace(old, new))
    assert told
    assert "canary" not in "".join(told)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_that_is_written_out_reads_as_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    text = yaml.safe_dump(written_out(recipe), sort_keys=False)
    assert load(write(tmp_path, text)) == recipe


def test_keys_called_kind_inside_a_schema_stay_where_they_are(tmp_path: Path) -> None:
    form = "{type: json_schema, json_schema: {name: x, schema: {type: object, properties: {kind: {type: string}}}}}"
    recipe = load(write(tmp_path, MINIMAL.replace("n: 2}", f"response_format: {form}}}", 1)))
    assert load(write(tmp_path, yaml.safe_dump(written_out(recipe)), "again.yaml")) == recipe


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = (
        MINIMAL.replace("n: 2", "nn: 2")
        .replace("min: 2", "mim: 2")
        .replace("heldout", "x")
        .replace("type: openai", "type: x")
    )
    assert len(problems(tmp_path, text)) == 3


MISTAKEN = """\
name: small
budget: {usd: 1, hour: 3}
models:
  teacher: {type: openai, model: m, base_url: "http://example.org/v1", pric: {input: 1, output: 2}}
  judge: {type: opnai, model: m, base_url: "http://127.0.0.1:9/v1"}
  base: {type: transformers, model: ./weights/none}
prompts:
  - {path: asked.jsonl, columns: {prompt: qestion, reference: anser, tag: kind}}
  - {path: nowhere.jsonl}
  - {name: more}
stages:
  - generate: {model: techer, ask: {examples: none.jsonl}, temprature: 1}
  - filter: [finished, near_dupes, {words: {min: some}}]
  - filter: [{contamination: {against: [nothing.jsonl, {path: asked.jsonl, columns: {prompt: qestion}}]}}]
  - judge: {model: judge, rubric: none.md}
  - choose: {best: 1, by: helpfulnes, from: mor}
  - train: {method: sftt, student: teacher}
  - train: {method: sft, student: bas}
  - evaluate: {students: [student], from: more}
"""


def test_every_kind_of_problem_is_told_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes in keys hide neither names that refer to nothing, nor files and columns that are not there."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, '{"question": "Why?", "answer": "So."}\n', "asked.jsonl")
    with pytest.raises(RecipeError) as caught:
        check(draft(write(tmp_path, MISTAKEN)))
    told = [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()]
    wanted = [
        ("r.yaml:2: unknown key 'budget.hour'; did you mean 'hours'?",),
        ("r.yaml:4: unknown key 'models.teacher.pric'; did you mean 'price'?",),
        ("r.yaml:4: models.teacher: http://example.org/v1", "use https"),
        ("r.yaml:5: models.judge: there is no 'opnai'; did you mean 'openai'?",),
        ("r.yaml:8: asked.jsonl:1: columns.prompt: there is no column 'qestion'; did you mean 'question'?",),
        ("r.yaml:8: asked.jsonl:1: columns.reference: there is no column 'anser'; did you mean 'answer'?",),
        ("r.yaml:8: unknown key 'prompts.0.columns.tag'; did you mean 'tags'?",),
        ("r.yaml:9: there is no file 'nowhere.jsonl'",),
        ("r.yaml:10: prompts.2.path is missing",),
        ("r.yaml:12: there is no model 'techer'; did you mean 'teacher'?",),
        ("r.yaml:12: unknown key 'stages.0.generate.temprature'; did you mean 'temperature'?",),
        ("r.yaml:12: there is no file 'none.jsonl'",),
        ("r.yaml:13: stages.1.filter.1: there is no 'near_dupes'; did you mean 'near_duplicates'?",),
        ("r.yaml:13: stages.1.filter.2.words.min: ", "'some'"),
        ("r.yaml:14: there is no file 'nothing.jsonl'",),
        ("r.yaml:14: asked.jsonl:1: columns.prompt: there is no column 'qestion'; did you mean 'question'?",),
        ("r.yaml:15: there is no file 'none.md'",),
        ("r.yaml:16: there is no prompt list or earlier stage 'mor'; did you mean 'more'?",),
        ("r.yaml:17: stages.5.train.method: there is no 'sftt'; did you mean 'sft'?",),
        ("r.yaml:18: there is no model 'bas'; did you mean 'base'?",),
    ]
    for words in wanted:
        assert any(all(word in line for word in words) for line in told), (words, told)
    assert len(told) == len(wanted), told  # nothing that only follows from another mistake


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("- generate: {model: teacher, n: 2}", "- generate: {n: 2}"),
        ("- filter: [finished, {words: {min: 2}}]", "- filter: {filtres: [finished]}"),
        ("- train: {method: sft, student: base}", "- train: {method: sft, studnet: base}"),
        ("type: openai, model: m,", "type: openai,"),
        ("name: small", "name: Not Small"),
        ("{path: prompts/everyday.jsonl, held_out: 4}", "{held_out: 4}"),
    ],
)
def test_a_part_that_is_left_out_makes_no_other_problems(tmp_path: Path, wrong: str, right: str) -> None:
    """What others say of a stage, a model or a list that is wrong itself is no mistake of theirs."""
    assert wrong in MINIMAL
    with pytest.raises(RecipeError) as caught:
        check(draft(write(tmp_path, MINIMAL.replace(wrong, right))))
    lines = str(caught.value).splitlines()
    assert len({line.split(":")[1] for line in lines}) == 1, lines


JUNK = [None, 3, -1, 1e99, True, "x", "", [], [1], {}, {"a": 1}, [{}], [None], ["finished"], {"filter": None}]


def paths(data: object, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every value inside plain data."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield (*here, key)
        yield from paths(value, (*here, key))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(JUNK), st.booleans()), min_size=1, max_size=4))
def test_whatever_is_wrong_is_told_and_never_a_crash(changes: list[tuple[int, object, bool]]) -> None:
    data, _ = parse(MINIMAL, "r.yaml")
    for number, junk, as_new_key in changes:
        if every := list(paths(data)):
            *above, last = every[number % len(every)]
            here = data
            for key in above:
                here = here[key]
            here["neu" if as_new_key and isinstance(here, dict) else last] = copy.deepcopy(junk)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), json.dumps(data))
        made, told = draft(path), ""
        with contextlib.suppress(RecipeError):
            check(made, Path(folder))
            told = "nothing is wrong"
        if told:
            assert load(path) == made.recipe
        else:
            with pytest.raises(RecipeError) as caught:
                check(made, Path(folder))
            assert all(line.startswith(f"{path}:1: ") for line in str(caught.value).splitlines()), caught.value


def test_prompts_that_are_no_list_are_one_problem(tmp_path: Path) -> None:
    text = MINIMAL.replace("  - {path: prompts/everyday.jsonl, held_out: 4}", "  path: prompts/everyday.jsonl")
    with pytest.raises(RecipeError, match=r"r\.yaml:5: prompts: [^\n]*list$"):
        check(draft(write(tmp_path, text)))


SCORED = """\
name: scored
models:
  teacher: {type: openai, model: m, base_url: "http://127.0.0.1:9/v1"}
  other: {type: openai, model: o, base_url: "http://127.0.0.1:9/v1"}
  known: {type: reference}
prompts:
  - {path: asked.jsonl}
stages:
"""


UNFIT = [
    ("by_example", "listwise", "its examples show how one answer is graded"),
    ("by_example", "pairwise", "its examples show how one answer is graded"),
    ("helpfulness", "listwise", "it asks for verdicts of how: pointwise, and this stage reads those of how: listwise"),
    ("helpfulness", "pairwise", "it asks for verdicts of how: pointwise"),
    ("aspects", "pairwise", "it asks for verdicts of how: pointwise"),
    ("listwise", "pointwise", "it asks for verdicts of how: listwise"),
    ("pairwise", "pointwise", "it asks for verdicts of how: pairwise"),
    ("pairwise", "listwise", "it asks for verdicts of how: pairwise"),
]
"""A rubric, and a way of judging that it is not written for."""


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (["generate: {model: teacher, n: 2}", "choose: {best: 1, by: nonsense}"], "r.yaml:10: nothing before it gives the score 'nonsense'; known: logprob"),
        (["generate: {model: teacher}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md}", "choose: {best: 1, by: helpfulnes}"], "r.yaml:11: nothing before it gives the score 'helpfulnes'; did you mean 'helpfulness'?"),
        (["generate: {model: teacher}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md, as: grade}", "choose: {best: 1, by: helpfulness}"], "r.yaml:11: nothing before it gives the score 'helpfulness'; known: grade, logprob"),
        (["generate: {model: teacher}", "filter: [{near_duplicates: {by: grade}}]"], "r.yaml:10: nothing before it gives the score 'grade'"),
        (["generate: {model: teacher, n: 2}", "choose: {best: 1, by: closest_to_reference}"], "r.yaml:10: closest_to_reference: no prompt of asked has a `reference`"),
        (["generate: {model: teacher, n: 2}", "pair"], "r.yaml:10: nothing before it scores the answers"),
        (["generate: {model: teacher, n: 2}", "pair: {score: grade}"], "r.yaml:10: nothing before it gives the score 'grade'"),
        (["generate: {model: teacher}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md}", "pair"], "r.yaml:11: a pair needs two answers"),
        (["generate: {model: {teacher: 1, other: 2}}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md}", "pair"], "r.yaml:11: a pair needs two answers"),
        (["generate: {model: teacher, n: 4}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md}", "choose: {best: 1, by: helpfulness}", "pair"], "r.yaml:12: a pair needs two answers"),
        (["generate: {model: teacher, n: 2}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md, as: grade}", "pair"], "r.yaml:12: the answers have several scores (grade, helpfulness)"),
        *((["generate: {model: [teacher, known]}", f"judge: {{model: other, rubric: prompts/rubrics/{rubric}.md, how: {how}}}"], f"r.yaml:10: prompts/rubrics/{rubric}.md: {told}") for rubric, how, told in UNFIT),
        (["generate: {model: known}"], "r.yaml:9: no prompt of asked has a `reference`"),
        (["filter: [finished]"], "r.yaml:6: no row of asked brings an answer"),
        (["generate: {model: teacher, as: here}", "filter: {from: asked, filters: [finished]}"], "r.yaml:6: no row of asked brings an answer"),
    ],
)  # fmt: skip
def test_a_stage_that_can_give_no_row_is_found_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, '{"prompt": "Why?"}\n{"prompt": "How?"}\n', "asked.jsonl")
    text = SCORED + "".join(f"  - {stage}\n" for stage in stages)
    with pytest.raises(RecipeError) as caught:
        check(draft(write(tmp_path, text)))
    (line,) = str(caught.value).splitlines()
    assert told in line
    with pytest.raises(RecipeError, match=r"stages|prompts"):  # whoever calls the run itself is kept from it, too
        run(load(tmp_path / "r.yaml"), tmp_path / "runs")
    with Journal(tmp_path / "runs/journal.sqlite") as journal:
        assert journal.spent("scored").requests == 0


@pytest.mark.parametrize(
    "stages",
    [
        ["generate: {model: [teacher, other]}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md}", "pair"],
        ["generate: {model: teacher, n: 2}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md, as: grade}", "choose: {best: 2, by: grade}", "pair: {score: grade}"],
        ["generate: {model: teacher, as: a}", "generate: {model: other, from: asked, as: b}", "judge: {model: other, rubric: prompts/rubrics/helpfulness.md, from: [a, b]}", "pair"],
        ["generate: {model: teacher, logprobs: true, n: 2}", "pair: {score: logprob}"],
        ["evaluate: {students: [teacher]}"],
        *(["generate: {model: teacher, n: 2}", f"judge: {{model: other, rubric: prompts/rubrics/{rubric}.md, how: {how}}}"] for rubric, how in
          [("by_example", "pointwise"), ("aspects", "pointwise"), ("listwise", "listwise"), ("pairwise", "pairwise")]),
    ],
)  # fmt: skip
def test_what_may_give_rows_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, '{"prompt": "Why?"}\n{"prompt": "How?"}\n', "asked.jsonl")
    text = SCORED.replace("asked.jsonl}", "asked.jsonl, held_out: 1}") + "".join(f"  - {stage}\n" for stage in stages)
    check(draft(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("asked", "judge", "same"),
    [
        ("teacher", "teacher", "'teacher'"),
        ("[teacher, other]", "other", "'other'"),
        ("teacher", "again", "'teacher'"),
        ("teacher", "other", None),
    ],
)
def test_a_judge_of_its_own_answers_draws_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, judge: str, same: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, '{"prompt": "Why?"}\n', "asked.jsonl")
    again = SCORED.replace("  known:", '  again: {type: openai, model: m, base_url: "http://127.0.0.1:9/v1"}\n  known:')
    stages = (
        f"  - generate: {{model: {asked}}}\n  - judge: {{model: {judge}, rubric: prompts/rubrics/helpfulness.md}}\n"
    )
    told = [line for line in check(draft(write(tmp_path, again + stages))).warnings if "favour their own" in line]
    assert [f"stages.1.judge: {judge!r} is the same model as {same}" in line for line in told] == (
        [True] if same else []
    )


def test_a_check_against_references_that_no_prompt_has_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = SCORED + "  - generate: {model: teacher}\n  - filter: [finished, {matches_reference: {how: numeric}}]\n"
    write(tmp_path, '{"prompt": "Why?"}\n', "asked.jsonl")
    (told,) = [line for line in check(draft(write(tmp_path, text))).warnings if "keeps everything" in line]
    assert told.startswith("stages.1.filter.1: matches_reference keeps everything")
    write(tmp_path, '{"prompt": "Why?", "reference": "So."}\n', "asked.jsonl")
    assert not any("keeps everything" in line for line in check(draft(tmp_path / "r.yaml")).warnings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nname: b\n", "r.yaml:2: the key 'name' appears twice"),
        ("name: [a\nprompts: x", "r.yaml:2: not YAML"),
        ("name: !!python/object/apply:os.system [x]", "r.yaml:1: the tag"),
        ("- a", "r.yaml:1: a recipe is a map"),
        ("name: x\nstages: &a [*a]", "r.yaml:2: more than 50 values inside each other"),
        ("a: &a [x]\nb: &b [*a, *a]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n" for p, c in zip("bcdefgh", "cdefghi", strict=True)), "aliases expand"),
    ],
)  # fmt: skip
def test_broken_yaml_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    assert told in problems(tmp_path, text)[0]


def test_a_recipe_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: a\nprompts: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: not UTF-8"):
        load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("5.0e-5", 5e-5), ("no", "no"), ("on", "on"), ("0x1F", "0x1F"), ("012", 12), ("~", None), ("'3'", "3"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("true", True)],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse(text, "t")[0] == value


@pytest.mark.parametrize(
    ("override", "check_"),
    [
        ("stages.0.generate.n=4", lambda r: r.stages[0].n == 4),
        ("seed=3", lambda r: r.seed == 3),
        ("models.teacher={type: transformers, model: x/y}", lambda r: r.models["teacher"].type == "transformers"),
        ("stages.1.filter.1.words.max=9", lambda r: (r.stages[1].filters[1].min, r.stages[1].filters[1].max) == (2, 9)),
        ("budget={requests: 5}", lambda r: r.budget.requests == 5),
        ("prompts.0.take=7", lambda r: (r.prompts[0].take, r.prompts[0].held_out) == (7, 4)),
    ],
)  # fmt: skip
def test_set_changes_one_value(tmp_path: Path, override: str, check_: object) -> None:
    assert check_(load(write(tmp_path, MINIMAL), [override]))  # type: ignore[operator]


@pytest.mark.parametrize("override", ["modls.t.model=x", "models.teacher.limts.rpm=3", "stages.4.generat.n=1"])
def test_a_wrong_key_of_a_set_is_not_blamed_on_the_file(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(tmp_path, MINIMAL), [override])
    lines = str(caught.value).splitlines()
    assert any(line.startswith(f"--set {override.partition('=')[0]}: ") for line in lines), lines


@pytest.mark.parametrize("override", ["nonsense", "stages.9.generate.n=1", "name.x=1", "stages.0.generate.nn=1"])
def test_a_bad_set_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"--set|unknown key"):
        load(write(tmp_path, MINIMAL), [override])


def test_extends_merges_maps_and_replaces_lists_and_models(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "budget: {requests: 5, tokens: 9}\n", "parent.yaml")
    child = write(
        tmp_path,
        "extends: parent.yaml\nname: child\nbudget: {requests: 6}\n"
        "models:\n  teacher: {type: transformers, model: a/b}\nprompts:\n  - {path: x.txt, held_out: 2}\n",
    )
    recipe = load(child)
    assert (recipe.name, recipe.budget.requests, recipe.budget.tokens) == ("child", 6, 9)
    assert recipe.models["teacher"].type == "transformers"
    assert recipe.models["base"].model == "./weights/none"
    assert [p.path for p in recipe.prompts] == ["x.txt"]
    assert len(recipe.stages) == 4


def test_a_mistake_in_a_parent_names_the_parent(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL.replace("n: 2", "nn: 2"), "parent.yaml")
    assert problems(tmp_path, "extends: parent.yaml\nname: child\n")[0].startswith("parent.yaml:8:")


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: r.yaml\n", "a.yaml")
    assert "circle" in problems(tmp_path, "extends: a.yaml\n")[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_passes_check(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no weights, no keys, not even the repository's own folder
    told = check(draft(path)).warnings
    assert all("prompts:" not in line and "keeps everything" not in line for line in told), told


def test_the_four_recipes_ship() -> None:
    assert {"quickstart", "seqkd", "orca", "zephyr"} <= {path.stem for path in RECIPES}
    assert find("prompts/everyday.jsonl").exists()
