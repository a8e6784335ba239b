"""A student that the factory has trained, behind a plain `vllm serve`: the same texts, and it ends by itself."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tests.tiny import tiny_model
from tests.vllm.conftest import Running, served

COLOURS = ["blue as the sky", "green as grass", "yellow as the sun at noon"]
ROWS = [
    {"prompt": f"Colour {COLOURS[i % 3].split()[0]}, thing number {i}?", "completion": f"It is {COLOURS[i % 3]}."}
    for i in range(48)
]
RECIPE = """\
name: served
models:
  base: {type: transformers, model: base}
prompts:
  - {path: rows.jsonl, name: rows, held_out: 12}
stages:
  - train: {method: sft, student: base, args: {num_train_epochs: 40, learning_rate: 0.003, per_device_train_batch_size: 12, report_to: none}}
  - evaluate: {students: [base, student], max_tokens: 64}
"""


def trained(folder: Path) -> dict[str, Any]:
    """Runs the recipe; the evaluation."""
    tiny_model(folder / "base", hidden=128, text=[row["completion"] for row in ROWS] + [row["prompt"] for row in ROWS])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "factory", "run", "recipe.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(next(folder.glob("runs/served/*-evaluate-*/evaluation.json")).read_text())
    return told


def ask(server: Running, prompt: str) -> dict[str, Any]:
    """As any client would; without a limit it goes on to the end of the context, unless it ends by itself."""
    body = {"model": server.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        (choice,) = json.loads(answer.read())["choices"]
    return {"text": choice["message"]["content"], "finish": choice["finish_reason"]}


def test_a_student_behind_a_plain_server_says_what_it_said_in_evaluate(tmp_path: Path, vllm_python: str) -> None:
    shown = [(one["prompt"], one["answers"]["student"]) for one in trained(tmp_path)["samples"]]
    assert len(shown) == 12
    assert {answer["finish"] for _, answer in shown} == {"stop"}
    assert len({answer["text"] for _, answer in shown}) > 1
    (student,) = (tmp_path / "runs/served").glob("*-student-*/model")
    with served(vllm_python, student, tmp_path / "vllm.log") as server:
        assert [ask(server, prompt) for prompt, _ in shown] == [
            {"text": answer["text"], "finish": "stop"} for _, answer in shown
        ]
