"""A run: a folder with manners. Stage folders appear whole or not at all; a manifest tells where every row went.

runs/<name>/recipe.yaml manifest.json prompts-dropped.jsonl NN-name-hash/ dataset/ report.html report.json
NN-name-hash/           kept-00000.jsonl dropped-00000.jsonl failed-00000.jsonl manifest.json

`prompts-dropped.jsonl` is always the last start's, and empty where every row of the lists became a prompt.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from factory.errors import FactoryError
from factory.rows import Row, Sample, by_prompt, encode, kind_of
from factory.signals import Interrupted

ROWS_PER_SHARD = 50_000
PROMPTS_DROPPED = "prompts-dropped.jsonl"
COMPARISON = "comparison.json"
"""In the folder of the first of the runs that are compared."""
R = TypeVar("R", bound=Row)


class StageFolder:
    """One stage's folder. It exists under its own name only when complete."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def complete(self) -> bool:
        return (self.path / "manifest.json").is_file()

    @property
    def manifest(self) -> dict[str, Any]:
        data: dict[str, Any] = msgspec.json.decode((self.path / "manifest.json").read_bytes())
        return data

    def rows(self, kind: type[R], ending: str = "kept") -> Iterator[R]:
        """The stage's rows in order, one at a time."""
        decoder = msgspec.json.Decoder(kind)
        for shard in self.shards(ending):
            with shard.open("rb") as lines:
                yield from map(decoder.decode, lines)

    def shards(self, ending: str = "kept") -> list[Path]:
        return sorted(self.path.glob(f"{ending}-*.jsonl"))

    def groups(self) -> Iterator[list[Sample]]:
        """The kept samples, those of one prompt together."""
        return iter(by_prompt(self.rows(Sample)))

    def linked(self, run: Path) -> "StageFolder":
        """The same folder in another run: its files are hard links, and what was asked for them was reused there."""
        told = self.manifest
        if "requests" in told:
            told["requests"] = {"sent": 0, "reused": told["requests"]["sent"] + told["requests"]["reused"]}
            told |= {"tokens": {"prompt": 0, "completion": 0}, "usd": "0", "compute_seconds": 0.0}
        final = run / self.path.name
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.path, partial, copy_function=_link)
        write_json(partial / "manifest.json", {**told, "seconds": 0.0, "made_in": self.path.parent.name})
        partial.rename(final)
        fsync_folder(run)
        return StageFolder(final)

    def write(self) -> "StageWriter":
        return StageWriter(self.path)


class StageWriter:
    """Writes a stage's rows into `<folder>.partial` and renames it at the end, manifest included."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.folder = final.with_name(final.name + ".partial")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._content = hashlib.blake2b(digest_size=16)
        self._files: dict[str, IO[bytes]] = {}
        self._shards: Counter[str] = Counter()
        self._in_shard: Counter[str] = Counter()
        self._last_prompt: dict[str, str] = {}

    def put(self, row: Row, units: int = 1) -> None:
        """Write a row where its ending says; `units` is what it counts for in the stage's unit."""
        ending, prompt = "kept", ""
        if isinstance(row, Sample):
            ending, prompt = row.ending, row.prompt.id
            if ending != "kept":
                self.count_reason(row.verdicts[-1].reason)
        self.counts[ending] += units
        full = self._in_shard[ending] >= ROWS_PER_SHARD
        if ending not in self._files or (full and (not prompt or prompt != self._last_prompt.get(ending))):
            self._next_shard(ending)
        line = encode(row) + b"\n"
        self._files[ending].write(line)
        if ending == "kept":
            self._content.update(line)
        self._in_shard[ending] += 1
        self._last_prompt[ending] = prompt

    def count_reason(self, reason: str, times: int = 1) -> None:
        self.reasons[kind_of(reason)] += times

    def _next_shard(self, ending: str) -> None:
        if ending in self._files:
            _close(self._files[ending])
        self._files[ending] = (self.folder / f"{ending}-{self._shards[ending]:05}.jsonl").open("wb")
        self._shards[ending] += 1
        self._in_shard[ending] = 0

    def finish(self, manifest: dict[str, Any], planned: int | None) -> StageFolder:
        """Check that every planned unit ended somewhere, write the manifest, make the folder real.

        `content` in the manifest is a hash of the kept rows: what later stages are named by, so that a stage that was
        done again, but came out the same, sets nothing else going.

        `planned` is the number of units that went in; None takes the sum (stages that make their own units).
        """
        for file in self._files.values():
            _close(file)
        ended = sum(self.counts.values())
        if planned is not None and ended != planned:
            raise FactoryError(
                f"{self.final.name}: {planned} {manifest.get('unit', 'rows')} went in, but {ended} ended "
                f"({dict(self.counts)}); this is a bug of ours, the rows are in {self.folder}"
            )
        counts = {"in": ended, **{e: self.counts[e] for e in ("kept", "dropped", "failed")}}
        reasons, content = dict(self.reasons.most_common()), self._content.hexdigest()
        whole = {**manifest, "folder": self.final.name, **counts, "reasons": reasons, "content": content}
        write_json(self.folder / "manifest.json", whole)
        shutil.rmtree(self.final, ignore_errors=True)
        self.folder.rename(self.final)
        fsync_folder(self.final.parent)
        return StageFolder(self.final)


def comparison(run: Path, stages: list[str]) -> dict[str, Any] | None:
    """What a run was compared with, if that can be read and the run is still made of the same stages."""
    try:
        told: dict[str, Any] = msgspec.json.decode((run / COMPARISON).read_bytes())
        return told if told["arms"][0]["stages"] == stages else None
    except (OSError, ValueError, LookupError):
        return None


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write whole or not at all."""
    write_lines(path, [data])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write whole or not at all: a temporary neighbour, fsync, rename. Lines are never held all at once."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def stopped_by(error: BaseException) -> str:
    """For the manifest: the class of what stopped a run, and the first line of what it says. Only errors made for people
    are quoted: a crash inside a library may say anything, a key included."""
    said = str(error).partition("\n")[0] if isinstance(error, FactoryError | Interrupted | OSError) else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _link(source: str, target: str) -> None:
    """A hard link; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
