"""What CONTRIBUTING.md shows is true: its filter is added to a copy of the package, as text, and used in a recipe."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPE = """\
name: loud
prompts: [{{path: rows.jsonl}}]
stages:
  {stage}
"""
ANSWERS = ["Quiet and clear.", "THIS IS LOUD!", "A bit LOUD here", "!!!", "NASA said so today", "ÄÖÜ ß", "123 456"]


def run(where: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=where, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(where)},
    )  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package with the guide's filter: one file, and its name in the union."""
    shutil.copytree(ROOT / "factory", tmp_path / "factory", ignore=shutil.ignore_patterns("__pycache__"))
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "factory/filters/no_shouting.py").write_text(code)
    union = tmp_path / "factory/filters/__init__.py"
    text = union.read_text()
    (names,) = re.findall(r"^Filter: TypeAlias = \(\n(.*?)\n\)", text, re.MULTILINE | re.DOTALL)
    import_ = "from factory.filters.personal_data import PersonalData\n"
    assert import_ in text
    text = text.replace(import_, "from factory.filters.no_shouting import NoShouting\n" + import_)
    union.write_text(text.replace(names, f"{names} | NoShouting"))
    rows = [{"prompt": f"question {i}", "completion": text} for i, text in enumerate(ANSWERS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_guide_s_filter_works_in_a_recipe(copy: Path) -> None:
    (stage,) = re.findall(r"`(- filter: [^`]+)`", GUIDE)
    (copy / "recipe.yaml").write_text(RECIPE.format(stage=stage))
    done = run(copy, "factory", "build", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads((copy / "runs/loud/report.json").read_text())
    (filtered,) = [row for row in report["funnel"] if row["stage"] == "filter"]
    assert (filtered["in"], filtered["kept"], filtered["dropped"], filtered["failed"]) == (7, 4, 3, 0)
    assert filtered["reasons"] == {"capitals": 3}
    kept = [
        json.loads(line)["completion"] for line in (copy / "runs/loud/dataset/train.jsonl").read_text().splitlines()
    ]
    assert kept == ["Quiet and clear.", "!!!", "NASA said so today", "123 456"]
    (shard,) = (copy / "runs/loud").glob("02-filter-*/dropped-*.jsonl")
    dropped = [json.loads(line) for line in shard.read_text().splitlines()]
    assert [row["verdicts"][-1]["reason"] for row in dropped] == [
        "capitals=1.00>0.3", "capitals=0.42>0.3", "capitals=0.75>0.3"
    ]  # fmt: skip


def test_its_unknown_keys_and_wrong_values_are_errors(copy: Path) -> None:
    for settings, told in (("max_shar: 1", "did you mean 'max_share'?"), ("max_share: 2", "less than or equal to 1")):
        (copy / "recipe.yaml").write_text(RECIPE.format(stage=f"- filter: [no_shouting: {{{settings}}}]"))
        wrong = run(copy, "factory", "check", "recipe.yaml")
        assert wrong.returncode == 2
        assert "recipe.yaml:4" in wrong.stderr
        assert told in wrong.stderr


def test_it_passes_our_own_lint(copy: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", copy)
    for verb in (["check"], ["format", "--check"]):
        linted = run(copy, "ruff", *verb, "factory/filters")
        assert linted.returncode == 0, linted.stdout
