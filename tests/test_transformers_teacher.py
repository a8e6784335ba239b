"""The local teacher through its child process: the same texts as transformers, whatever dies, and no keys inside."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from factory.ask import Desk, Model
from factory.budget import Budget, Wall
from factory.errors import EngineError, RecipeError
from factory.journal import Journal, answer_keys
from factory.rows import Beam, Choice, Failure, Message, Outcome, Reply, Request, Sampling
from factory.teachers.transformers import Transformers, TransformersTeacher
from tests.tiny import tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORDS = [
    "the",
    "sky",
    "is",
    "blue",
    "and",
    "green",
    "because",
    "it",
    "was",
    "warm",
    "what",
    "colour",
    "thing",
    "number",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), spread=0.2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TransformersTeacher]:
    """One child for all that only ask; keys stand in the environment that it starts from."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as environment:
        for name in ("OPENAI_API_KEY", "HF_TOKEN", "TEACHER_KEY", "HF_API_KEY", "TORCH_SECRET"):
            environment.setenv(name, "sk-canary")
        opened = Transformers(model=str(folder), batch_size=32).open(runs)
        await opened.send(ask("what is blue"))
    yield opened
    await opened.close()


def text_of(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(words))


def ask(text: str, seed: int | None = None, n: int = 1, **sampling: Any) -> Request:
    how = Sampling(**{"temperature": 0.0, "max_tokens": 12} | sampling)
    return Request(identity="m", messages=[Message(role="user", content=text)], sampling=how, seed=seed, n=n)


async def outcomes(teacher: TransformersTeacher, requests: list[Request]) -> list[Outcome]:
    sent = await asyncio.gather(*(teacher.send(request) for request in requests))
    return [
        body if isinstance(body, Failure) else teacher.read(request, body)
        for request, body in zip(requests, sent, strict=True)
    ]


async def texts(teacher: TransformersTeacher, requests: list[Request]) -> list[list[str]]:
    found = await outcomes(teacher, requests)
    assert all(isinstance(outcome, Reply) for outcome in found), found
    return [[choice.text for choice in outcome.choices] for outcome in found if isinstance(outcome, Reply)]


def child_of(pid: int, module: str = "factory.teachers.transformers_worker") -> psutil.Process:
    """The child process of a teacher: the newest if there are several."""
    found = [child for child in psutil.Process(pid).children(recursive=True) if module in child.cmdline()]
    return max(found, key=lambda child: child.create_time())


# -- the same texts as transformers --------------------------------------------------------------------------------------


async def test_greedy_texts_are_generates(teacher: TransformersTeacher, folder: Path) -> None:
    """At least 99 % the same; a text may only differ where two tokens are as good as equal."""
    requests = [ask(text_of(i, 1 + i % 25), max_tokens=16) for i in range(100)]
    ours = await texts(teacher, requests)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs: list[str] = []
    with torch.inference_mode():
        for first in range(0, 100, 32):  # static batches, as a plain loop would ask
            messages = [request.messages for request in requests[first : first + 32]]
            batch = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            made = model.generate(**batch, do_sample=False, max_new_tokens=16)
            theirs += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    differing = [i for i in range(100) if ours[i][0] != theirs[i]]
    assert len(differing) <= 1, differing
    assert len(set(theirs)) > 80  # the model does not say the same to everybody


async def test_a_draw_is_the_same_alone_in_a_batch_and_in_another_order(teacher: TransformersTeacher) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 1.0},
        {"top_k": 9, "temperature": 2.0},
    ]
    requests = [ask(text_of(i // 4, 1 + i % 11), seed=i, **kinds[i % 3]) for i in range(32)]
    together = await texts(teacher, requests)
    order = random.Random(0).sample(range(32), 32)
    assert await texts(teacher, [requests[i] for i in order]) == [together[i] for i in order]
    alone = [(await texts(teacher, [request]))[0] for request in requests[:6]]
    assert alone == together[:6]


async def test_draws_of_one_prompt_have_their_own_seeds(teacher: TransformersTeacher) -> None:
    requests = [ask("what is blue", seed=seed, temperature=1.0) for seed in range(6)]
    assert len({text for (text,) in await texts(teacher, requests)}) == 6


@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (4, 0.0), (3, 2.0)])
async def test_beams_are_generates(teacher: TransformersTeacher, folder: Path, width: int, penalty: float) -> None:
    requests = [
        ask(text_of(i, 3), n=width, max_tokens=6, beam=Beam(width=width, length_penalty=penalty)) for i in range(4)
    ]
    drawn = ask("what is green", seed=1, temperature=1.0)
    *found, _ = await outcomes(teacher, [*requests, drawn])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for request, outcome in zip(requests, found, strict=True):
        prompt = tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            made = model.generate(
                **prompt, num_beams=width, num_return_sequences=width, length_penalty=penalty, early_stopping="never",
                do_sample=False, max_new_tokens=6,
            )  # fmt: skip
        assert isinstance(outcome, Reply)
        answers = tokenizer.batch_decode(made[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [choice.text for choice in outcome.choices] == answers


async def test_stop_strings_and_limits(teacher: TransformersTeacher) -> None:
    ((whole,),) = await texts(teacher, [ask("blue")])
    stop = whole[len(whole) // 2 :][:2]
    found = await outcomes(
        teacher,
        [
            ask("blue", stop=[stop]),
            ask(text_of(1, 400)),
            ask("blue", max_tokens=3),
            ask(text_of(1, 100), max_tokens=999),
        ],
    )
    cut, overflow, short, full = found
    assert isinstance(cut, Reply)
    assert isinstance(overflow, Failure)
    assert isinstance(short, Reply)
    assert isinstance(full, Reply)
    assert (cut.choices[0].text, cut.choices[0].finish) == (whole[: whole.index(stop)], "stop")
    assert overflow.reason == "context_overflow"
    assert "512" in overflow.detail
    assert (short.choices[0].tokens, short.choices[0].finish) == (3, "length")
    assert full.usage.prompt_tokens + full.usage.completion_tokens <= 512
    assert full.usage.seconds > 0


async def test_loss_is_the_plain_computation(teacher: TransformersTeacher, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for i in range(3):
        messages, answer = [Message(role="user", content=text_of(i, 4 + i))], text_of(50 + i, 6)
        told = await teacher.forced(messages, answer)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        learned = [*tokenizer.encode(answer), tokenizer.convert_tokens_to_ids("<|im_end|>")]
        labels = torch.tensor([[-100] * len(prompt) + learned])
        with torch.inference_mode():
            plain = model(input_ids=torch.tensor([[*prompt, *learned]]), labels=labels)
        assert told.tokens == len(learned)
        assert told.loss / told.tokens == pytest.approx(float(plain.loss), rel=1e-4)
        chosen = plain.logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert told.agreed == sum(a == b for a, b in zip(chosen, learned, strict=True))


# -- the child -------------------------------------------------------------------------------------------------------------


async def test_the_child_knows_no_key(teacher: TransformersTeacher) -> None:
    environment = child_of(os.getpid()).environ()
    assert "sk-canary" not in str(environment)
    assert environment["PATH"] == os.environ["PATH"]


async def test_its_peak_memory_is_the_childs_own(teacher: TransformersTeacher, folder: Path, tmp_path: Path) -> None:
    """Not less than it holds now, not what its parent held when it was made; of one that was never asked, nothing."""
    told = await teacher.memory()
    assert told is not None
    assert child_of(os.getpid()).memory_info().rss <= told < 2e9
    assert await Transformers(model=str(folder)).open(tmp_path).memory() is None


async def test_a_cancelled_request_harms_nobody(teacher: TransformersTeacher) -> None:
    gone = asyncio.create_task(teacher.send(ask("blue", max_tokens=30)))
    others = [asyncio.create_task(teacher.send(ask(text_of(i, 3)))) for i in range(3)]
    await asyncio.sleep(0.01)
    gone.cancel()
    assert all(isinstance(body, bytes) for body in await asyncio.gather(*others))
    await asyncio.sleep(0.2)
    assert await texts(teacher, [ask("blue")])


async def test_a_killed_child_is_started_again_and_the_round_ends_as_if_nothing_were(
    teacher: TransformersTeacher, folder: Path, tmp_path: Path
) -> None:
    entry = Transformers(model=str(folder), batch_size=4)
    model = Model("teacher", entry, entry.identity(tmp_path), entry.open(tmp_path))
    requests = [
        msgspec.structs.replace(ask(text_of(i, 5), seed=i, temperature=1.0, max_tokens=60), identity=model.identity)
        for i in range(24)
    ]
    keys = [key for request in requests for key in answer_keys(request)]

    async def kill_in_mid_run() -> int:
        while not (stored := len(journal.answers(keys))):
            await asyncio.sleep(0.02)
        child_of(os.getpid()).kill()
        return stored

    with Journal(tmp_path / "journal.sqlite") as journal:
        desk = Desk(journal, Wall(Budget(), journal.spent("run")), "run")
        killer = asyncio.create_task(kill_in_mid_run())
        async with model:
            tally = await desk.ask(model, requests, len(requests), "test")
        found = [draws[0] for _, draws in desk.read(model, requests, tally)]
    assert await killer < 24
    assert tally.sent > 24
    assert [[c.text] if isinstance(c, Choice) else c for c in found] == await texts(teacher, requests)


PARENT = """
import asyncio, sys
from pathlib import Path
from factory.rows import Request, Sampling
from factory.teachers.transformers import Transformers

async def main():
    teacher = Transformers(model=sys.argv[1], batch_size=2).open(Path(sys.argv[2]))
    how = Sampling(max_tokens=400)
    messages = [{"role": "user", "content": "what is blue"}]
    requests = [Request(identity="m", messages=messages, sampling=how, seed=i) for i in range(500)]
    asked = [asyncio.create_task(teacher.send(request)) for request in requests]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    print("busy", flush=True)
    await asyncio.gather(*asked)

asyncio.run(main())
"""


async def test_the_child_dies_with_its_parent(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"busy\n"
        child = child_of(parent.pid)
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs([child], timeout=30)[1]


async def test_a_model_that_cannot_be_loaded_is_told_in_its_own_words(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    teacher = Transformers(model=str(tmp_path / "model")).open(tmp_path)
    with pytest.raises(EngineError, match=r"cannot load the model .*: .* has no chat template; use an instruct model$"):
        await teacher.send(ask("blue"))
    await teacher.close()
    with pytest.raises(RecipeError, match="there are no weights"):
        Transformers(model="./no/such/folder").open(tmp_path)
