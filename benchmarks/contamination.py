"""What decontamination finds: items of a benchmark planted into prompts and answers in several ways, and what it drops wrongly.

The benchmark is made: word problems of about 45 words in three sentences, each of which has two wordings, so that a
paraphrase is the same problem in the other wordings. Clean rows are new problems about the same things, in sentences that
the benchmark does not have, and the shipped prompt lists. Siblings, new problems in the benchmark's own sentences with
other names and numbers, are near copies by these rules: their share is told, not judged.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks._figures import Figure, judged, main
from factory.filters import Kit
from factory.filters.contamination import Contamination
from factory.rows import Message, Prompt, Sample

SHIPPED = Path(__file__).resolve().parent.parent / "prompts"

BEGINNINGS = [
    (
        "{who} keeps {n} {things} in a shed behind the house and wants to sort them before winter.",
        "In the shed that belongs to {who} there lie {n} {things}, to be put in order while it is still warm.",
    ),
    (
        "On market day {who} drove to town with {n} {things} packed in wooden boxes.",
        "{n} {things} in crates went along when {who} took the car to the market.",
    ),
    (
        "A school asked {who} to bring {n} {things} for the summer play.",
        "For a performance in July, {who} was to supply the pupils with {n} {things}.",
    ),
    (
        "After the flood {who} could save only {n} {things} from the cellar.",
        "The water left {who} no more than {n} {things} of all that stood downstairs.",
    ),
    (
        "The museum bought {n} {things} from {who}, who had collected them for years.",
        "{who}, long a collector, sold {n} {things} to a museum.",
    ),
    (
        "Each morning {who} counts {n} {things} on the shelf next to the door.",
        "Beside the entrance there is a board with {n} {things}, as {who} finds at every sunrise.",
    ),
    (
        "When the old bakery closed, {who} took home {n} {things} as a souvenir.",
        "{n} {things} are what {who} carried off to remember the baker's shop by.",
    ),
]
MIDDLES = [
    (
        "A neighbour brings {m} more on Tuesday but borrows {k} of them again the next day.",
        "Wednesday sees {k} lent out next door, a day after {m} others arrived from there.",
    ),
    (
        "Half of them are blue, {m} are green, and {k} have lost their colour in the sun.",
        "There are {m} green ones and {k} bleached ones, while every second one is blue.",
    ),
    (
        "The price of one is {m} coins, and whoever takes {k} or more pays a tenth less.",
        "Customers hand over {m} coins apiece, with ten per cent off from {k} pieces on.",
    ),
    (
        "They fit into baskets of {m}, and {k} of the baskets already have a broken handle.",
        "One basket holds {m} pieces; the handle has come off {k} baskets so far.",
    ),
    (
        "It takes {m} minutes to clean one, with a break of {k} minutes after every hour.",
        "Every sixty minutes of work are followed by {k} of rest, and each piece needs {m} minutes of scrubbing.",
    ),
    (
        "A cousin would like {m} for a birthday and a friend offers {k} coins for the rest.",
        "While {k} coins are bid for what remains, {m} shall be a gift within the family.",
    ),
    (
        "During the journey {m} fall off the cart and a kind rider returns {k} of those.",
        "The road swallows {m} on the way, though someone on a horse hands {k} back.",
    ),
]
ENDINGS = [
    (
        "How many will be left at the end of the week if nothing else happens?",
        "What number remains on Sunday, other things being equal?",
    ),
    (
        "What is the largest number that can be given to each of four children?",
        "Four youngsters share evenly: what is the most that one of them can get?",
    ),
    (
        "How much money is that in total, and how much would be missing for a hundred coins?",
        "State the whole sum, then say what it lacks to be one hundred.",
    ),
    (
        "By how many per cent has the number changed since the beginning of the story?",
        "Compared with the start, give the relative change in hundredths.",
    ),
    (
        "How long does the whole work take when two people share it equally?",
        "With a second pair of hands doing just as much, when is everything finished?",
    ),
]
NAMES = [
    "Alma",
    "Bruno",
    "Clara",
    "Dario",
    "Edda",
    "Felix",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Levin",
    "Mira",
    "Nils",
    "Olga",
    "Pavel",
    "Rosa",
    "Simon",
    "Tilda",
    "Uwe",
]
THINGS = [
    "lanterns",
    "kettles",
    "ladders",
    "pumpkins",
    "violins",
    "blankets",
    "hammers",
    "teapots",
    "kites",
    "saddles",
    "mirrors",
    "puppets",
    "barrels",
    "clocks",
    "wheels",
]

Problem = tuple[str, str]
"""In one wording, and in the other."""


def problem(draw: random.Random) -> Problem:
    fill = {
        "who": draw.choice(NAMES), "things": draw.choice(THINGS),
        "n": draw.randint(20, 400), "m": draw.randint(3, 19), "k": draw.randint(2, 12),
    }  # fmt: skip
    parts = [draw.choice(pool) for pool in (BEGINNINGS, MIDDLES, ENDINGS)]
    return " ".join(p[0] for p in parts).format(**fill), " ".join(p[1] for p in parts).format(**fill)


def changed(text: str, every: int) -> str:
    return " ".join("something" if i % every == every - 1 else word for i, word in enumerate(text.split()))


def prefix(text: str) -> str:
    said = text.split()
    return " ".join(said[: len(said) // 2])


PLANTED: dict[str, tuple[Callable[[Problem], str], str]] = {
    # how an item is planted -> the share that must be found
    "verbatim": (lambda one: one[0], "== 1"),
    "verbatim_within_more": (lambda one: f"Solve this, and say why.\n\n{one[0].upper()}\n\nThink first.", ">= 0.99"),
    "every_tenth_word_changed": (lambda one: changed(one[0], 10), ">= 0.99"),
    "every_fifth_word_changed": (lambda one: changed(one[0], 5), ">= 0.5"),
    "first_half_only": (lambda one: prefix(one[0]), ">= 0.9"),
    "paraphrase": (lambda one: one[1], ">= 0"),
}


class NoKit(Kit):
    def tokenizer(self, name: str | None) -> Callable[[str], int]:
        raise NotImplementedError


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    draw = random.Random(3)
    items = [problem(draw) for _ in range(arguments.items)]
    path = arguments.folder / "bench.jsonl"
    path.write_text("".join(json.dumps({"prompt": one[0]}) + "\n" for one in items))
    guard = Contamination(against=[str(path)]).open(NoKit())
    for kind, (plant, least) in PLANTED.items():
        planted = [plant(one) for one in items]
        for where in ("prompt", "answer"):
            named = [evidence(guard, where, text) == f"{path}:{i}" for i, text in enumerate(planted, 1)]
            yield judged(f"contamination.{kind}_in_{where}", sum(named) / len(named), least)
    new = [problem(draw) for _ in range(5 * arguments.items)]
    siblings = [evidence(guard, "prompt", one[0]) is not None for one in new]
    yield Figure("contamination.siblings_dropped", round(sum(siblings) / len(siblings), 4))
    rows = (json.loads(line) for file in SHIPPED.glob("*.jsonl") for line in file.open())
    shipped = [row["prompt"] for row in rows if "prompt" in row]
    for kind, clean in (("new_problems", [one[1] for one in new]), ("shipped_prompts", shipped)):
        false = sum(evidence(guard, where, text) is not None for text in clean for where in ("prompt", "answer"))
        yield judged(f"contamination.false_drops_of_{kind}", false / (2 * len(clean)), "<= 0.001")


def evidence(guard: Contamination, where: str, text: str) -> str | None:
    """The item that a row is dropped for."""
    prompt = Prompt.of([Message(role="user", content=text if where == "prompt" else "Tell me a story with numbers.")])
    answer = text if where == "answer" else "I would count them one by one."
    row = Sample(id="s", prompt=prompt, asked=prompt.messages, response=answer, model="m")
    return guard.check_group([row])[0].evidence


if __name__ == "__main__":
    main(__doc__, measure, items=(1000, 200))
