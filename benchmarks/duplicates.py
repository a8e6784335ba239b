"""Near duplicates of 100,000 texts of 125 words, a tenth of them edited copies, beside bare rensa and datasketch.

Processor time is that of the filter at its defaults over rows in memory; the peers do the equivalent work: split, word
bigrams, 128 permutations, an index that is asked and added to. Ratios are medians of pairs, run in turn. Then a million
texts, and how often two texts of a known similarity meet in the index, beside the formula of its bands.
"""

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks._figures import Figure, child, judged, main
from factory.filters import NearDuplicates
from factory.rows import Message, Prompt, Sample, by_prompt
from factory.similar import BANDS, PERMUTATIONS, Index, sketch

WORDS, EDITED = 125, 6
"""Words of a text, and how many of them a copy changes: 5 %; the bigrams' similarity is then .81 to .86."""
SEED = 11


def texts(count: int) -> Iterator[tuple[str, int | None]]:
    """Texts, and for a copy the number of the one that it was made of. Sentences, commas and capitals as in prose."""
    draw = random.Random(SEED)
    known = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 10))) for _ in range(20_000)]
    for i in range(count):
        if i % 10 < 9 or not i:
            yield _prose(random.Random(SEED + i).choices(known, k=WORDS)), None
            continue
        of = draw.randrange(i // 10 + 1) * 10 + draw.randrange(9)
        said = random.Random(SEED + of).choices(known, k=WORDS)
        for at in draw.sample(range(2, WORDS - 2, 3), EDITED):
            said[at] = f"{draw.choice(known)}x"
        yield _prose(said), of


def _prose(said: list[str]) -> str:
    sentences = (said[i : i + 14] for i in range(0, len(said), 14))
    return " ".join(f"{' '.join(s[:6])}, {' '.join(s[6:])}.".capitalize() for s in sentences)


def samples(count: int) -> Iterator[Sample]:
    for i, (text, _) in enumerate(texts(count)):
        asked = [Message(role="user", content=f"Question {i}")]
        prompt = Prompt(id=f"{i:016x}", messages=asked)
        yield Sample(id=f"{i:016x}", prompt=prompt, asked=asked, response=text, model="m")


def filtered(rows: list[Sample]) -> list[str | None]:
    """What the filter drops: the twin's id, or None for what it keeps."""
    judge = NearDuplicates().start(lambda: by_prompt(rows))
    return [judge([row])[0].evidence for row in rows]


def bare_rensa(told: list[str]) -> int:
    from rensa import RMinHash, RMinHashLSH

    index, kept, dropped = RMinHashLSH(0.7, PERMUTATIONS, BANDS), list[RMinHash](), 0
    for text in told:
        signature = RMinHash(PERMUTATIONS, 42)
        signature.update([f"{a} {b}" for a, b in pairwise(text.split())])
        if any(kept[i].jaccard(signature) >= 0.7 for i in index.query(signature)):
            dropped += 1
        else:
            index.insert(len(kept), signature)
            kept.append(signature)
    return dropped


def datasketch(told: list[str]) -> int:
    from datasketch import MinHash, MinHashLSH

    index, kept, dropped = MinHashLSH(0.7, PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS)), list[MinHash](), 0
    for text in told:
        signature = MinHash(PERMUTATIONS)
        signature.update_batch([f"{a} {b}".encode() for a, b in pairwise(text.split())])
        if any(kept[i].jaccard(signature) >= 0.7 for i in index.query(signature)):
            dropped += 1
        else:
            index.insert(len(kept), signature)
            kept.append(signature)
    return dropped


def cpu(work: Callable[[Any], object], rows: Sequence[object]) -> float:
    """Processor seconds; what lay about before is put away first, so that it is paid for by nobody."""
    gc.collect()
    start = time.process_time()
    work(rows)
    return time.process_time() - start


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    full, count = not arguments.small, arguments.texts
    yield from grown(count, arguments.many, full)  # first: a child's peak is never told below what its parent holds
    rows, origins = list(samples(count)), [of for _, of in texts(count)]
    told = [row.response for row in rows]
    yield from found(filtered(rows), origins)
    ours, theirs = list[float](), list[float]()
    for _ in range(arguments.pairs):
        ours.append(cpu(filtered, rows))
        theirs.append(cpu(bare_rensa, told))
    yield Figure("duplicates.docs_per_cpu_s", round(count / median(ours)))
    yield Figure("duplicates.docs_per_cpu_s_rensa", round(count / median(theirs)))
    yield judged("duplicates.ratio_to_rensa", median(b / a for a, b in zip(ours, theirs, strict=True)), ">= 0.8", full)
    few, ratios = count // 10, list[float]()
    for _ in range(arguments.pairs):
        ratios.append(cpu(datasketch, told[:few]) / cpu(filtered, rows[:few]))
    yield judged("duplicates.ratio_to_datasketch", median(ratios), ">= 5", full)
    yield from curve(arguments.met, full)


def found(twins: list[str | None], origins: list[int | None]) -> Iterator[Figure]:
    """A copy is found when it is dropped; a drop is right when its twin is the text that it was made of, or its copy."""
    hits = [(int(twin, 16), i) for i, twin in enumerate(twins) if twin is not None]
    right = sum(origins[i] is not None and origins[i] in (twin, origins[twin]) for twin, i in hits)
    copies = sum(of is not None for of in origins)
    yield judged("duplicates.recall", right / max(copies, 1), ">= 0.98")
    yield judged("duplicates.precision", right / max(len(hits), 1), ">= 0.99")


def curve(pairs: int, full: bool) -> Iterator[Figure]:
    """Pairs of a true similarity that the index brings together: the difference to 1 - (1 - s**4) ** 32, in standard errors."""
    for percent in (50, 70, 80, 90):
        met = expected = 0.0
        variance = 0.0
        for number in range(pairs):
            one, two, s = two_texts(percent / 100, number)
            index = Index(0.0)
            index.add(sketch(one), "one")
            met += bool(index.near(sketch(two)))
            chance = 1 - (1 - s ** (PERMUTATIONS // BANDS)) ** BANDS
            expected += chance
            variance += chance * (1 - chance)
        off = (met - expected) / max(variance, 1.0) ** 0.5  # at .9 less than one pair of 5,000 is missed
        yield Figure(f"duplicates.met_at_{percent}", round(met / pairs, 4))
        yield judged(f"duplicates.standard_errors_off_at_{percent}", abs(off), "<= 3", full)


def two_texts(similarity: float, number: int) -> tuple[str, str, float]:
    """Two texts of 101 words whose 100 bigrams have about this similarity, and which it is exactly."""
    said = [f"w{number}x{i}" for i in range(202)]
    shared = round(200 * similarity / (1 + similarity))
    return " ".join(said[:101]), " ".join([*said[: shared + 1], *said[101 : 201 - shared]]), shared / (200 - shared)


def grown(few: int, many: int, full: bool) -> Iterator[Figure]:
    """Ten times as many texts, each run in a process of its own, rows coming one by one; made texts cost both the same."""
    costs = {}
    for count in (few, many):
        cost = child("benchmarks.duplicates", "--alone", count)
        assert cost.exit_code == 0
        costs[count] = cost
    idle = child("benchmarks.duplicates", "--alone", 1)
    yield Figure(f"duplicates.s_{few}", round(costs[few].wall_s, 1))
    yield Figure(f"duplicates.s_{many}", round(costs[many].wall_s, 1))
    yield judged("duplicates.time_ratio", costs[many].cpu_s / costs[few].cpu_s, f"<= {1.1 * many / few:g}", full)
    yield judged(f"duplicates.peak_mb_{many}", costs[many].peak_mb, "<= 4000")
    yield Figure("duplicates.bytes_per_row", round((costs[many].peak_mb - idle.peak_mb) * 2**20 / many))


def alone(count: int) -> None:
    """The filter over rows that are made one at a time: what it keeps is all the memory there is."""
    judge = NearDuplicates().start(lambda: by_prompt(samples(count)))
    for row in samples(count):
        judge([row])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(int(sys.argv[2]))
    else:
        main(__doc__, measure, texts=(100_000, 4_000), many=(1_000_000, 8_000), pairs=(5, 3), met=(5_000, 300))
