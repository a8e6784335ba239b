"""kill -9 at random moments, over and over, in one run: nothing stored is lost or paid for again, the data is the same.

Most kills come while requests are in flight, some while the process starts, the last ones while stages are written. After
each one the journal is looked into: whatever is stored then must be there at the end, and must never be asked again.
"""

import argparse
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from benchmarks._figures import Figure, environment, factory, judged, main
from benchmarks._recipe import RUN, duplicates, write
from benchmarks._server import Server, serving
from factory.rows import Prompt

CONCURRENCY = 16
DELAY_MS = 100.0
STAGES = """\
  - generate: {model: teacher, temperature: 0.7, max_tokens: 256}
  - filter: [finished, {words: {min: 3}}]
"""
AT_THE_END = 0.05
"""Share of the kills that is kept for the time when everything is answered."""


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    calm, stormy = arguments.folder / "calm", arguments.folder / "stormy"
    limits = f"{{max_concurrency: {CONCURRENCY}}}"
    with serving(DELAY_MS) as server:
        write(stormy, server.url, arguments.prompts, STAGES, limits=limits)
        storm = _Storm(stormy, server, arguments.prompts, arguments.kills)
        storm.rage()
        finished = factory("build", "recipe.yaml", cwd=stormy)
        storm.look()
        write(calm, server.url, arguments.prompts, STAGES, limits=limits)
        undisturbed = factory("build", "recipe.yaml", cwd=calm)
    assert (finished.returncode, undisturbed.returncode) == (0, 0), finished.stderr + undisturbed.stderr
    files = sorted(path.name for path in (calm / RUN / "dataset").glob("*.jsonl"))
    differ = sum(
        (calm / RUN / "dataset" / f).read_bytes() != (stormy / RUN / "dataset" / f).read_bytes() for f in files
    )
    enough = not arguments.small
    yield judged("kills.kills", storm.kills, f">= {arguments.kills}", enough)
    yield judged("kills.stored_answers_lost", storm.lost, "== 0")
    yield judged("kills.stored_answers_paid_again", storm.paid_again, "== 0")
    yield judged("kills.duplicate_rows", duplicates(stormy), "== 0")
    yield judged("kills.requests_beyond_prompts_per_kill", storm.excess / max(storm.kills, 1), f"<= {CONCURRENCY}")
    yield judged("kills.most_requests_beyond_prompts_at_one_kill", storm.worst, f"<= {CONCURRENCY}")
    yield judged("kills.dataset_files_that_differ", differ, "== 0")
    yield Figure("kills.dataset_files", len(files))


class _Storm:
    """Starts the same command and kills it, and keeps book of what is stored and of what is asked."""

    def __init__(self, folder: Path, server: Server, prompts: int, kills: int) -> None:
        self.folder, self.server, self.prompts, self.planned = folder, server, prompts, kills
        self.kills = self.lost = self.paid_again = self.excess = self.worst = 0
        self.stored: dict[str, int] = {}  # question -> how often it was asked until it was stored
        self._random = random.Random(7)

    def rage(self) -> None:
        while self.kills < self.planned:
            seen = self.server.stats()
            last = self.planned * (1 - AT_THE_END) <= self.kills or seen.distinct == self.prompts
            child = subprocess.Popen(
                [sys.executable, "-m", "factory", "build", "recipe.yaml"], cwd=self.folder, env=environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._wait(child, seen.requests, last)
            if child.poll() is not None:  # too late: the rest of the kills is for the same once more, from the journal
                shutil.rmtree(self.folder / RUN)
                continue
            child.kill()
            child.wait()
            self.kills += 1
            self.look()

    def _wait(self, child: subprocess.Popen[bytes], requests: int, last: bool) -> None:
        """Until a random moment: of the start, of the asking, or of the end."""
        left = max(self.prompts - self.server.stats().distinct, 1) * DELAY_MS / 1000 / CONCURRENCY
        if last or self._random.random() < 0.2:
            _until(lambda: child.poll() is not None, self._random.uniform(0.0, 1.2))
            return
        _until(lambda: child.poll() is not None or self.server.stats().requests > requests, 60)
        share = left / max(self.planned * (1 - AT_THE_END) - self.kills, 1)
        _until(lambda: child.poll() is not None, self._random.uniform(0.0, 2 * share))

    def look(self) -> None:
        """Compare the journal and the server's book with those after the kill before."""
        seen = self.server.seen()
        excess = sum(seen.values()) - len(seen)
        self.worst, self.excess = max(self.worst, excess - self.excess), excess
        there = self._in_journal(list(seen))
        self.lost += len(self.stored.keys() - there)
        self.paid_again += sum(seen[question] > asked for question, asked in self.stored.items())
        self.stored = {question: seen[question] for question in there}

    def _in_journal(self, questions: list[str]) -> set[str]:
        """The questions with a stored answer; looked up in a copy, so that the factory has to recover its own files."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in (self.folder / "runs").glob("journal.sqlite*"):
            if not file.name.endswith("-shm"):
                shutil.copy(file, copy)
        with closing(sqlite3.connect(copy / "journal.sqlite")) as db:
            there = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'attempt'").fetchone()[0]
            sql = "SELECT prompt FROM attempt WHERE status IN ('stored', 'read') AND body IS NOT NULL"
            ids = {prompt for (prompt,) in db.execute(sql)} if there else set()
        return {question for question in questions if Prompt.of([{"role": "user", "content": question}]).id in ids}


def _until(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not happened():
        time.sleep(0.005)


if __name__ == "__main__":
    main(__doc__, measure, prompts=(5_000, 200), kills=(200, 8))
