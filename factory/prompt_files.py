"""Files in: from a path in a recipe to rows with the number of their line, streamed (but a `.json` array, read whole).

Text, JSON, JSON lines, CSV and TSV need nothing; parquet, folders and Hugging Face data sets need the extra `parquet`. A file that
is not what its name says is an error with file, line and column: guessing would put garbage in front of a teacher.
"""

import csv
import hashlib
import importlib
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import msgspec

from factory.errors import RecipeError

MAX_LINE = 1 << 24
"""Bytes of one line. A longer one means that the file is not what its suffix says."""

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may part the columns of a CSV file."""

HUB_ID = re.compile(r"[\w-]+/[\w.-]+\Z", re.ASCII)

Find = Callable[[str], Path]
"""From a path in a recipe to a file: in the working directory, else among what ships; RecipeError if in neither."""

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row | None]]
"""Line (or row, where there are no lines; both count from 1), and the row; None is a blank line."""


def read(path: str, split: str | None, find: Find) -> Numbered:
    """The rows of a local file, a folder or a hub data set; RecipeError where they cannot be read."""
    if is_hub_id(path, find):
        return _dataset(path, split)
    there = find(path)
    if there.is_dir():
        return _dataset(str(there), split)
    if split is not None:
        raise RecipeError(f"{path}: `split` chooses a part of a data set; a file has none")
    if there.suffix not in READERS:
        known = ", ".join(READERS)
        raise RecipeError(f"{path}: cannot read {there.suffix!r} files; give {known}, a folder or a hub id")
    return READERS[there.suffix](there)


def is_hub_id(path: str, find: Find) -> bool:
    """Whether a path names a data set on the hub: `owner/name`, and no folder `owner` is found here."""
    return bool(HUB_ID.match(path)) and Path(path).suffix not in READERS and not _exists(str(Path(path).parent), find)


def content(there: Path) -> str:
    """Hex hash of a file's bytes, or of all files of a folder: equal when there is the same in them."""
    files = sorted(one for one in there.rglob("*") if one.is_file()) if there.is_dir() else [there]
    total = hashlib.blake2b(digest_size=16)
    for one in files:
        with one.open("rb") as file:
            total.update(hashlib.file_digest(file, "blake2b").digest())
    return total.hexdigest()


def _exists(path: str, find: Find) -> bool:
    try:
        return bool(find(path))
    except RecipeError:
        return False


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends. Only a line feed ends one: JSON may hold the other Unicode line breaks."""
    try:
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(MAX_LINE + 1)
                if not line:
                    return
                if len(line) > MAX_LINE:
                    raise RecipeError(f"{path}:{number}: a line of more than {MAX_LINE} bytes; is this {path.suffix}?")
                try:
                    # spreadsheets put a byte order mark first
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as e:
                    wrong = f"byte {e.start + 1} of the line is 0x{line[e.start]:02x}"
                    raise RecipeError(f"{path}:{number}: not UTF-8: {wrong}; save the file as UTF-8") from None
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}") from None


def _txt(path: Path) -> Numbered:
    for number, line in _lines(path):
        yield number, {"prompt": line.strip()} if line.strip() else None


def _jsonl(path: Path) -> Numbered:
    for number, line in _lines(path):
        if not line.strip():
            yield number, None
            continue
        try:
            row = msgspec.json.decode(line)
        except msgspec.DecodeError as e:
            raise RecipeError(f"{path}:{number}:{_column(line, e)}: not JSON: {e}; one object per line") from None
        except RecursionError:
            raise RecipeError(f"{path}:{number}:1: not JSON: nested too deeply") from None
        if not isinstance(row, dict):
            raise RecipeError(f"{path}:{number}:1: a row is an object with columns, not {line.strip()[:40]!r}")
        yield number, row


def _column(line: str, error: Exception) -> int:
    """The column in characters; the decoder tells bytes, or nothing where the line ends too early."""
    byte = re.search(r"byte (\d+)", str(error))
    return len(line.encode()[: int(byte[1])].decode(errors="ignore")) + 1 if byte else len(line.rstrip())


def _json(path: Path) -> Numbered:
    """One array of objects, in memory as a whole; counted from 1, since lines say nothing here."""
    try:
        rows = msgspec.json.decode(path.read_bytes().removeprefix(BOM_UTF8))
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # no JSON, not UTF-8, nested too deeply
        hint = "one array of objects; for one object per line call the file .jsonl"
        raise RecipeError(f"{path}: not JSON: {e}; {hint}") from None
    if not isinstance(rows, list):
        raise RecipeError(f"{path}: it holds one {type(rows).__name__}, not an array of objects; give the array alone")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RecipeError(f"{path}: item {number}: a row is an object with columns, not {str(row)[:40]!r}")
        yield number, row


def _tsv(path: Path) -> Numbered:
    return _csv(path, "\t")


def _csv(path: Path, separator: str | None = None) -> Numbered:
    csv.field_size_limit(MAX_LINE)
    lines = (line for _, line in _lines(path))
    first = next(lines, "")
    separator = separator or _separator(first)
    reader = csv.reader(chain([first], lines), delimiter=separator, strict=True)
    start = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise RecipeError(f"{path}:1: two columns have the same name: {', '.join(map(repr, header))}")
        start = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                counts = f"{len(fields)} fields, but the header has {len(header)}"
                raise RecipeError(f"{path}:{start}: {counts}; quote text that holds {SEPARATORS[separator]}")
            yield start, dict(zip(header, fields, strict=True)) if fields else None
            start = reader.line_num + 1  # a quoted field may go over several lines
    except csv.Error as e:
        raise RecipeError(f"{path}:{start}: not CSV: {e}") from None


def _separator(header: str) -> str:
    """What parts the names in a header; spreadsheets of many countries write semicolons. A comma wins over the others,
    and none of them means one column."""
    bare = re.sub(r'"[^"]*"?', "", header)
    return next((mark for mark in SEPARATORS if mark in bare), ",")


def _parquet(path: Path) -> Numbered:
    parquet = extra("pyarrow.parquet", path)
    with _readable(str(path)):
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _dataset(path: str, split: str | None) -> Numbered:
    """A hub data set, a folder that looks like one, or what `save_to_disk` wrote; remote ones are streamed."""
    datasets = extra("datasets", path)
    with _readable(path):
        saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
        data = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, streaming=True)
        if isinstance(data, dict):
            wanted = split or ("train" if "train" in data else next(iter(data)) if len(data) == 1 else None)
            if wanted not in data:
                wrong = f"there is no split {split!r}" if split else "say which split to read"
                raise RecipeError(f"{path}: {wrong}; `split:` can be {', '.join(data)}")
            data = data[wanted]
        elif split is not None:
            raise RecipeError(f"{path}: this data set has no splits; remove `split`")
        yield from enumerate(map(dict, data), 1)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Whatever those libraries raise means, to the reader of a recipe, that this path cannot be read."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as e:
        told = str(e).strip().partition("\n")[0][:300]
        raise RecipeError(f"{path}: cannot be read as a data set: {type(e).__name__}: {told}") from e


def extra(module: str, path: str | Path) -> Any:
    """A module of the extra `parquet`, for a file that needs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise RecipeError(
            f"{path}: it needs {module.partition('.')[0]}: pip install 'distillation-factory[parquet]'"
        ) from None


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".txt": _txt, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet,
}  # fmt: skip
