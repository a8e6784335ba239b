"""SIGKILL anywhere, then the same command again: it ends, asks no stored answer twice, and makes the same data set."""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from tests.command import asked_in_vain, attempts, factory, folder, recipe, report, started
from tests.server import chat, in_thread
from tests.tiny import saying_model

SEED = 20
Moment = tuple[str, Callable[[Path], bool], float]
"""A stage, how to see from outside that it is being worked on, and seconds to let it go on before the kill."""


def files(where: Path) -> dict[str, bytes]:
    """The data set's rows, as bytes."""
    dataset = where / "runs/tiny/dataset"
    return {str(path.relative_to(dataset)): path.read_bytes() for path in sorted(dataset.rglob("*.jsonl"))}


def working_on(stage: str, inside: str = "") -> Callable[[Path], bool]:
    return lambda run: any(run.glob(f"*-{stage}-*.partial/{inside}"))


def answers_stored(count: int) -> Callable[[Path], bool]:
    return lambda run: len([1 for _, status in attempts(run.parent.parent) if status == "read"]) >= count


def publishing(run: Path) -> bool:
    return (run / "dataset.partial").exists()


def storm(where: Path, verb: str, moments: list[Moment], draw: random.Random) -> Counter[str]:
    """Start and kill, once for each moment; then let it end. Returns in which stages the kills landed."""
    run, landed = where / "runs/tiny", Counter[str]()
    for stage, begun, seconds in moments:
        with started(where, verb, "recipe.yaml", stdout=DEVNULL, stderr=DEVNULL) as child:
            while child.poll() is None and not begun(run):
                time.sleep(0.001)
            time.sleep(draw.random() * seconds)
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
            killed = child.wait() == -signal.SIGKILL
        unfinished = [path.name for path in run.glob("*.partial")]
        if killed and (stage == "start" or any(stage in name for name in unfinished)):
            landed[stage] += 1
    done = factory(where, verb, "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert not list(run.rglob("*.partial"))
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"
    report(where)
    return landed


def test_a_data_set_from_an_endpoint(tmp_path: Path) -> None:
    """Thousands of rows, so that filtering and writing take long enough to be hit."""
    draw, concurrency = random.Random(SEED), 8
    stages = """\
  - generate: {model: teacher, n: 12, temperature: 0.7, max_tokens: 64}
  - filter: [finished, {words: {min: 3}}, near_duplicates: {threshold: 0.9}]
  - choose: {cap: 10}
"""

    async def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        question = body["messages"][-1]["content"]
        words = [f"{word}{draw}" for draw in range(body["n"]) for word in question.split()]
        return chat(body, texts=[" ".join(words[i::7]) for i in range(body["n"])])

    prompts = [
        json.dumps({"prompt": f"Tell me {i} about {i * 7919 % 1009} and {i * 104729 % 997}."}) for i in range(300)
    ]
    with in_thread(script) as server:
        text = recipe(server.url, stages=stages, limits=f"max_concurrency: {concurrency}")
        for name in ("calm", "stormy"):
            folder(tmp_path / name, text)
            (tmp_path / name / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
        calm = factory(tmp_path / "calm", "build", "recipe.yaml")
        assert calm.returncode == 0, calm.stderr
        undisturbed = sum(server.seen.values())
        moments: list[Moment] = [
            ("start", lambda run: True, 0.3),
            *(("generate", answers_stored(round(undisturbed * share)), 0.05) for share in (0.02, 0.3, 0.6, 0.9)),
            ("generate", working_on("generate", "kept-*"), 0.05),
            *(("filter", working_on("filter"), seconds) for seconds in (0.0, 0.05)),
            ("filter", working_on("filter", "kept-*"), 0.05),
            ("choose", working_on("choose"), 0.01),
            ("shape", working_on("shape"), 0.01),
            *(("dataset", publishing, seconds) for seconds in (0.0, 0.01, 0.02)),
        ]
        landed = storm(tmp_path / "stormy", "build", moments, draw)
        assert {"generate", "filter", "dataset"} <= landed.keys(), landed
        assert landed["generate"] >= 3, landed
        assert not asked_in_vain(tmp_path / "stormy")
        assert sum(server.seen.values()) - 2 * undisturbed <= concurrency * landed["generate"]
    assert files(tmp_path / "stormy") == files(tmp_path / "calm")
    assert len(files(tmp_path / "calm")["train.jsonl"].splitlines()) > 500


def test_a_whole_run_with_a_local_teacher_and_a_trained_student(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    stages = """\
  - generate: {model: teacher, n: 2, temperature: 0.7, max_tokens: 24}
  - filter: [finished, {words: {min: 3}}]
  - train: {method: sft, student: teacher, args: {num_train_epochs: 1, per_device_train_batch_size: 4}}
  - evaluate: {students: [student], teacher: teacher}
"""
    text = recipe("http://127.0.0.1:9/v1", stages=stages).replace("teacher: {type: openai", "x: {type: openai")
    model = saying_model(
        tmp_path / "model", ["It is blue.", "That thing looks green!", "Nobody knows its colour, sadly."]
    )
    local = f"models:\n  teacher: {{type: transformers, model: {model}, batch_size: 8}}\n"
    for name in ("calm", "stormy"):
        folder(tmp_path / name, text.replace("models:\n", local))
    calm = factory(tmp_path / "calm", "run", "recipe.yaml")
    assert calm.returncode == 0, calm.stderr
    made = len(attempts(tmp_path / "calm")) - 2 * 6  # by `generate`; teacher and student are measured on 6 prompts each
    moments: list[Moment] = [
        ("generate", working_on("generate"), 1.0),
        ("generate", answers_stored(draw.randint(1, made // 2)), 0.05),
        ("student", working_on("student", "job.json"), 1.0),
        ("student", working_on("student", "preview.json"), 0.2),
        ("student", working_on("student", "model"), 0.01),
        ("evaluate", answers_stored(made + 2), 0.5),
        ("evaluate", answers_stored(made + 2 * 6), 1.0),
    ]
    landed = storm(tmp_path / "stormy", "run", moments, draw)
    assert landed.keys() == {"generate", "student", "evaluate"}, landed
    assert not asked_in_vain(tmp_path / "stormy")
    assert files(tmp_path / "stormy") == files(tmp_path / "calm")
    assert files(tmp_path / "calm").keys() == {"train.jsonl", "test.jsonl"}
