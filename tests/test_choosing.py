"""Choices, shapes and pairs as recipes write them, from prompts to data set, with what `check` has to say of them."""

import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from factory import pipeline, recipe
from factory.audit import audit
from factory.choose import Choose, choose
from factory.curate import Curate, curate
from factory.pair import PairUp, pair, unpaired
from factory.rows import Message, Pair, Prompt, Sample, by_prompt
from factory.shape import Shape, shape
from tests.command import read_jsonl, report, typed
from tests.sample_rows import Words
from tests.server import chat, in_thread

QUESTIONS = 40


def folder(path: Path, stages: str, *, models: str = "", held_out: int = 0, references: bool = True) -> Path:
    """A working directory with `recipe.yaml` over rows that bring their answers: two tags, some answers short."""
    path.mkdir(exist_ok=True)
    rows = [
        {
            "prompt": f"Question {i}?",
            "completion": f"It is {i}+1 = {i + 1}. So: {i + 1}" if i % 4 else "No.",
            "tags": ["math"] if i % 2 else ["chat"],
            **({"reference": str(i + 1)} if references else {}),
        }
        for i in range(QUESTIONS)
    ]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = f"models:\n  {models}\n" if models else ""
    text = f"name: tiny\nseed: 3\n{asked}prompts: [{{path: prompts.jsonl, name: qs, held_out: {held_out}}}]\n"
    (path / "recipe.yaml").write_text(f"{text}stages:\n{stages}")
    return path


def run(where: Path, *overrides: str) -> dict[str, Any]:
    with chdir(where):
        pipeline.run(recipe.load(Path("recipe.yaml"), overrides), Path("runs"))
    name = next((o.partition("=")[2] for o in overrides if o.startswith("name=")), "tiny")
    return report(where, f"runs/{name}")


def stages(told: dict[str, Any]) -> dict[str, tuple[int, int, int, int, dict[str, int]]]:
    counts = ("in", "kept", "dropped", "failed", "reasons")
    return {row["stage"]: tuple(row[key] for key in counts) for row in told["funnel"]}  # type: ignore[misc]


def rows(where: Path, name: str = "tiny", split: str = "train") -> list[dict[str, Any]]:
    return read_jsonl(where / f"runs/{name}/dataset/{split}.jsonl")


def test_a_filter_and_its_control_are_two_runs_of_one_recipe(tmp_path: Path) -> None:
    where = folder(tmp_path, "  - filter: {filters: [{words: {min: 3}}]}\n")
    assert stages(run(where))["filter"] == (40, 30, 10, 0, {"words": 10})
    told = run(where, "name=control", "stages.0.filter.control=random")
    assert stages(told)["filter"] == (40, 30, 10, 0, {"not_drawn": 10})
    answers = Counter(row["completion"] == "No." for row in rows(where, "control"))
    assert answers[True] > 0
    assert answers.total() == len(rows(where)) == 30
    first = (where / "runs/control/dataset/train.jsonl").read_bytes()
    run(where, "name=again", "stages.0.filter.control=random")
    assert (where / "runs/again/dataset/train.jsonl").read_bytes() == first


def test_a_quota_shows_up_in_the_funnel(tmp_path: Path) -> None:
    where = folder(tmp_path, "  - choose: {quota: {by: tag, most: {math: 5, chat: 3, maths: 9}}}\n")
    told = run(where)
    assert stages(told)["choose"] == (40, 8, 32, 0, {"over_quota": 32})
    assert told["warnings"] == ["02-choose: quota: no row counts for the tag 'maths'"]
    assert Counter(int(row["prompt"].split()[1].strip("?")) % 2 for row in rows(where)) == {1: 5, 0: 3}


def test_label_rationale_and_truth_become_rows_with_weights(tmp_path: Path) -> None:
    text = "{tasks: {label: 0.5, rationale: 0.3, truth: 0.2}, answer_after: 'So:'}"
    where = folder(tmp_path, f"  - shape: {text}\n", held_out=8)
    told = run(where)
    count, kept, dropped, failed, reasons = stages(told)["shape"]
    assert (count, kept + failed, dropped) == (32, 32, 0)
    assert reasons == {"no_mark": failed}
    made = rows(where)
    assert Counter((row["task"], row["weight"]) for row in made) == {
        ("label", 0.5): kept, ("rationale", 0.3): kept, ("truth", 0.2): 32,
    }  # fmt: skip
    for row in made:
        begin = "[rationale] " if row["task"] == "rationale" else "[label] "
        assert row["prompt"].startswith(begin)
    measured = rows(where, split="test")
    assert measured
    assert {row["task"] for row in measured} == {"label"}


def test_what_a_mixture_lacks_is_told(tmp_path: Path) -> None:
    where = folder(tmp_path / "some", "  - shape: {tasks: [answer, truth]}\n")
    lines = (where / "prompts.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"reference"', '"something"')
    (where / "prompts.jsonl").write_text("\n".join(lines))
    assert run(where)["warnings"] == ["02-shape: tasks.truth: 1 of 40 prompts have no reference"]
    none = folder(tmp_path / "none", "  - shape: {tasks: [answer, truth]}\n", references=False)
    done = typed(none, "check", "recipe.yaml")
    assert done.returncode != 0
    assert "truth: no prompt of qs has a `reference`" in done.stderr


JUDGED = """\
  - generate: {model: teacher, n: 4, temperature: 1.0}
  - judge: {model: judge, rubric: prompts/rubrics/helpfulness.md}
  - pair: %s
"""
ENDPOINTS = """teacher: {type: openai, model: t, base_url: "URL"}
  judge: {type: openai, model: j, base_url: "URL"}"""


async def scripted(body: dict[str, Any], before: int) -> dict[str, Any]:
    """A teacher whose answers get longer, and a judge who likes them long: 1, 2, 3 and 3 points."""
    asked = body["messages"][-1]["content"]
    if body["model"] == "j":
        words = re.search(r"ANSWER \S*\n(.*?)\nEND OF ANSWER", asked, re.DOTALL)
        assert words
        return chat(body, [f"So.\nScore: {min(words[1].count('very'), 3)}"])
    number = re.search(r"\d+", asked)
    assert number
    return chat(body, [f"{'very ' * i}good {number[0]}.{i}" for i in range(1, 5)][: body.get("n", 1)])


def judged(tmp_path: Path, knobs: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with in_thread(scripted) as server:
        where = folder(tmp_path, JUDGED % knobs, models=ENDPOINTS.replace("URL", server.url))
        text = (where / "prompts.jsonl").read_text().splitlines()[:12]
        (where / "prompts.jsonl").write_text("\n".join(text))
        return run(where), rows(where)


def test_several_pairs_count_as_one_prompt_and_the_report_warns_of_length(tmp_path: Path) -> None:
    told, made = judged(tmp_path, "{pairs_per_prompt: 3, rejected: next, max_length_ratio: 2}")
    assert stages(told)["pair"] == (12, 12, 0, 0, {})
    assert len(made) == 36
    assert told["pairs"]["n"] == 36
    assert told["pairs"]["chosen_longer"] == told["pairs"]["length_auc"] == 1
    assert any("length alone predicts the choice" in line for line in told["warnings"])
    assert any("AUC of length 1.00): length alone predicts the choice" in line for line in told["findings"])


def test_rows_for_kto_count_answers(tmp_path: Path) -> None:
    told, made = judged(tmp_path, "{form: kto, threshold: 3}")
    assert stages(told)["pair"] == (48, 48, 0, 0, {})
    assert Counter(row["label"] for row in made) == {True: 24, False: 24}
    assert told["pairs"]["sides"] == {"desirable": 24, "undesirable": 24}
    page = (tmp_path / "runs/tiny/report.html").read_text()
    assert "undesirable" in page
    assert "AUC of length" in page
    assert any("24 of 48 answers are desirable" in line for line in told["findings"])


MISTAKES = [
    (
        "  - generate: {model: teacher, until: {accepted: 1, at_most: 4}}\n  - filter: {filters: [finished], control: random}\n",
        "a random control behind it would be none",
    ),
    (JUDGED % "{form: kto, threshold: 3}" + "  - train: {method: dpo, student: base}\n", "makes pairs"),
    (JUDGED % "{form: kto}", "go together"),
    ("  - shape: {tasks: [truth]}\n", "nothing of the teacher's"),
    ("  - choose: {quota: {by: source}}\n", "most"),
    (
        "  - choose: {quota: {by: source, most: {qz: 3}}}\n",
        "recipe.yaml:9: no rows of a prompt list 'qz' get here; did you mean 'qs'?",
    ),
]


@pytest.mark.parametrize(("stages", "told"), MISTAKES)
def test_check_tells_what_cannot_be(stages: str, told: str, tmp_path: Path) -> None:
    models = ENDPOINTS.replace("URL", "http://127.0.0.1:9/v1") + "\n  base: {type: transformers, model: ./base}"
    done = typed(folder(tmp_path, stages, models=models), "check", "recipe.yaml")
    assert done.returncode != 0
    assert told in done.stderr


def test_check_says_which_trainers_do_not_weigh_rows(tmp_path: Path) -> None:
    text = "  - shape: {tasks: {answer: 0.7, truth: 0.3}}\n  - train: {method: gkd, student: base, teacher: base}\n"
    where = folder(tmp_path, text, models="base: {type: transformers, model: ./base}")
    done = typed(where, "check", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "gkd counts all rows alike" in done.stdout + done.stderr
    (where / "recipe.yaml").write_text(
        (where / "recipe.yaml")
        .read_text()
        .replace("{method: gkd, student: base, teacher: base}", "{method: sft, student: base}")
    )
    again = typed(where, "check", "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert "counts all rows alike" not in again.stdout + again.stderr


# -- streams ---------------------------------------------------------------------------------------------------------------


def stream(count: int) -> Iterable[list[Sample]]:
    """Prompts with four scored answers each, made when they are asked for."""

    def made() -> Iterator[Sample]:
        for i in range(count // 4):
            asked = Prompt.of([Message(role="user", content=f"q{i}")], source="xy"[i % 2], reference="r")
            for d in range(4):
                yield Sample(
                    id=f"{i}.{d}", prompt=asked, asked=asked.messages, response=f"{i}+{d} = {i + d}" + " word" * d,
                    model="ab"[d % 2], draw=d, scores={"s": float(d) + i % 7 / 7},
                )  # fmt: skip

    return by_prompt(made())


def pairs_of(count: int) -> Iterator[Pair]:
    for made in pair(PairUp(pairs_per_prompt=2), stream(count), 7, lambda asked: asked.messages):
        assert isinstance(made, list)
        yield from made


FLAT = {
    "best": lambda n: choose(Choose(best=1, by="s"), partial(stream, n), 7),
    "distinct": lambda n: choose(Choose(distinct="equations", cap=2), partial(stream, n), 7),
    "quota": lambda n: choose(
        Choose.model_validate({"quota": {"by": "source", "most": 100}}), partial(stream, n), 7
    ),
    "control": lambda n: curate(
        Curate.model_validate({"filters": [{"words": {"min": 5}}], "control": "random"}), partial(stream, n), Words(), 7
    ),
    "shape": lambda n: shape(Shape(tasks=["answer", "truth"]), stream(n)),
    "pair": pairs_of,
    "kto": lambda n: unpaired(PairUp(form="kto", threshold=2), stream(n), lambda asked: asked.messages),
}  # fmt: skip


def peak(rows: Iterable[Any]) -> int:
    """Bytes at the highest while a stream is read."""
    tracemalloc.start()
    try:
        for _ in rows:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FLAT)
def test_memory_does_not_grow_with_the_rows(name: str) -> None:
    small, large = peak(FLAT[name](400)), peak(FLAT[name](2000))
    assert large < small + 30_000  # the 1,600 rows more are a megabyte


def test_the_audit_keeps_eight_bytes_of_a_row() -> None:
    tracemalloc.start()
    try:
        audit(pairs_of(3000))  # 1,500 pairs
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
