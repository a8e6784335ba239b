"""The vLLM teacher against a stand-in for the server process: real HTTP, real processes, real signals."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pydantic
import pytest

from factory.ask import Desk, Model
from factory.budget import Budget, Wall
from factory.errors import EngineError, RecipeError
from factory.journal import Journal
from factory.rows import Beam, Choice, Failure, Request, Sampling
from factory.tally import Tally
from factory.teachers.vllm import Vllm, VllmTeacher, beam_problem
from factory.teachers.vllm_server import stop_orphans
from tests.fake_vllm import interpreter, read_notes
from tests.server import chat, error, serving


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def entry(tmp_path: Path, **fields: Any) -> Vllm:
    """A vllm entry on the stand-in; `args` are added to its notes file."""
    args = {"notes": str(tmp_path / "notes"), **fields.pop("args", {})}
    limits = {"max_concurrency": 8, "timeout_s": 10, **fields.pop("limits", {})}
    python = str(interpreter(tmp_path))
    return Vllm(model=str(tmp_path / "some-model"), python=python, args=args, limits=limits, **fields)


def asked(questions: list[str], model: Model, **sampling: Any) -> list[Request]:
    how = Sampling(**{"temperature": 0.7, "max_tokens": 8} | sampling)
    return [
        Request(identity=model.identity, messages=[{"role": "user", "content": q}], sampling=how, seed=i, prompt=q)
        for i, q in enumerate(questions)
    ]


async def ask(
    tmp_path: Path, vllm: Vllm, questions: list[str], **sampling: Any
) -> tuple[Tally, list[Choice | Failure]]:
    runs = tmp_path / "runs"
    model = Model("teacher", vllm, vllm.identity(runs), vllm.open(runs))
    requests = asked(questions, model, **sampling)
    with Journal(runs / "journal.sqlite") as journal:
        desk = Desk(journal, Wall(Budget(), journal.spent("run")), "run")
        async with model:
            tally = await desk.ask(model, requests, len(requests), "test")
        return tally, [draws[0] for _, draws in desk.read(model, requests, tally)]


def texts(outcomes: list[Choice | Failure]) -> list[str]:
    return [o.text if isinstance(o, Choice) else o.reason for o in outcomes]


def starts(tmp_path: Path) -> list[dict[str, Any]]:
    return read_notes(tmp_path / "notes", "start")


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def all_ended(pids: list[int], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(running, pids))


def pids_of(tmp_path: Path) -> list[int]:
    return [pid for start in starts(tmp_path) for pid in start["pids"]]


# -- start, answer, stop ---------------------------------------------------------------------------------------------


async def test_a_server_is_started_asked_and_stopped(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TEACHER_KEY", "OPENAI_API_KEY", "HF_TOKEN", "VLLM_API_KEY", "WANDB_SECRET", "DATABASE"):
        monkeypatch.setenv(name, "canary-7d1f")
    monkeypatch.setenv("PYTHONPATH", "our/own/packages")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    vllm = entry(tmp_path, args={"enforce_eager": True, "async_scheduling": False}, dtype="float32")
    _, answers = await ask(tmp_path, vllm, ["one", "two"], top_p=0.9)
    assert texts(answers) == ["answer to one (seed 0)", "answer to two (seed 1)"]

    (start,) = starts(tmp_path)
    assert all_ended(start["pids"])
    assert not list((tmp_path / "runs/servers").glob("*.running"))
    command = " ".join(start["argv"])
    assert f"serve {model_folder} --host 127.0.0.1 --port" in command
    for flag in ("--enable-prefix-caching", "--dtype float32", "--enforce-eager", "--no-async-scheduling"):
        assert flag in command
    environment = start["environment"]
    assert "canary-7d1f" not in json.dumps(start)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert "PYTHONPATH" not in environment

    bodies = read_notes(tmp_path / "notes", "asked")  # two at once: either may arrive first
    (body,) = [body for body in bodies if body["messages"][-1]["content"] == "one"]
    assert body["seed"] == 0
    pinned = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    assert body.items() >= (pinned | {"presence_penalty": 0, "frequency_penalty": 0}).items()
    assert "n" not in body

    (log,) = (tmp_path / "runs/servers").glob("some-model-*.log")
    assert "vllm serve" in log.read_text()
    (told,) = vllm.served(tmp_path / "runs")
    assert (told["vllm"], told["max_model_len"]) == ("9.9.9", 512)
    assert {"--enable-prefix-caching", "--dtype", "float32"} <= set(told["flags"])


async def test_nothing_starts_when_everything_is_stored(tmp_path: Path, model_folder: Path) -> None:
    await ask(tmp_path, entry(tmp_path), ["one"])
    tally, answers = await ask(tmp_path, entry(tmp_path), ["one"])
    assert texts(answers) == ["answer to one (seed 0)"]
    assert tally.sent == 0
    assert len(starts(tmp_path)) == 1


async def test_a_server_that_dies_while_starting_ends_the_run_with_its_own_words(
    tmp_path: Path, model_folder: Path
) -> None:
    vllm = entry(tmp_path, args={"die_saying": "ValueError: no memory for the cache"})
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"exit 1.*ValueError: no memory for the cache.*some-model-.*\.log"):
        await ask(tmp_path, vllm, [f"question {i}" for i in range(20)])
    assert time.monotonic() - began < 60  # it may take fifteen minutes to start
    (log,) = (tmp_path / "runs/servers").glob("*.log")
    assert log.read_text().count("--- ") == 1  # eight requests waited for it; one attempt is enough


async def test_a_server_that_never_gets_healthy_is_given_up_and_stopped(tmp_path: Path, model_folder: Path) -> None:
    vllm = entry(tmp_path, args={"never_healthy": True}, start_s=0.5)
    with pytest.raises(EngineError, match=r"healthy in 0.5 s"):
        await ask(tmp_path, vllm, ["one"])
    assert all_ended(pids_of(tmp_path))


async def test_a_wrong_interpreter_is_named(tmp_path: Path, model_folder: Path) -> None:
    vllm = Vllm(model=str(model_folder), python="no/such/python")
    with pytest.raises(EngineError, match=r"no program no/such/python; set `python:`"):
        await ask(tmp_path, vllm, ["one"])


async def test_an_interpreter_without_vllm_says_so(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(EngineError, match=r"exit 1.*vllm"):
        await ask(tmp_path, Vllm(model=str(model_folder), python=sys.executable), ["one"])


def test_flags_that_the_factory_sets_are_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match=r"args.served_model_name is set by the factory"):
        Vllm(model="some/model", args={"served-model-name": "x"})


# -- death in mid-run ----------------------------------------------------------------------------------------------------


async def test_an_engine_that_dies_is_started_again_and_nothing_is_lost(tmp_path: Path, model_folder: Path) -> None:
    questions = [f"question {i}" for i in range(30)]
    questions[10] = "fragile question"
    tally, answers = await ask(tmp_path, entry(tmp_path, args={"think": 0.05}), questions)
    assert texts(answers) == [f"answer to {q} (seed {i})" for i, q in enumerate(questions)]
    assert len(starts(tmp_path)) == 2
    assert all_ended(pids_of(tmp_path))
    times = Counter(body["messages"][-1]["content"] for body in read_notes(tmp_path / "notes", "asked"))
    assert max(times.values()) == 2
    assert sum(times.values()) - len(questions) <= 8  # only what was in flight was sent again
    assert tally.failures == {}


async def test_a_request_that_kills_the_engine_twice_is_set_aside_alone(tmp_path: Path, model_folder: Path) -> None:
    questions = [f"question {i}" for i in range(30)]
    questions[10] = "poison"
    _, answers = await ask(tmp_path, entry(tmp_path, args={"think": 0.05}), questions)
    expected = [f"answer to {q} (seed {i})" for i, q in enumerate(questions)]
    assert texts(answers) == [*expected[:10], "engine_died", *expected[11:]]
    failure = answers[10]
    assert isinstance(failure, Failure)
    assert "RuntimeError: the engine choked" in failure.detail
    times = Counter(body["messages"][-1]["content"] for body in read_notes(tmp_path / "notes", "asked"))
    assert times["poison"] == 2
    assert len(starts(tmp_path)) in (
        2,
        3,
    )  # another start is needed only where others still wait after the second death


async def test_a_model_that_dies_of_everything_ends_the_run(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(
        EngineError, match=r"died 4 times without an answer in between: RuntimeError: the engine choked"
    ):
        await ask(tmp_path, entry(tmp_path), [f"poison {i}" for i in range(20)])
    assert len(starts(tmp_path)) == 4
    assert all_ended(pids_of(tmp_path))


async def test_an_answer_that_was_broken_off_is_asked_again(tmp_path: Path, model_folder: Path) -> None:
    tally, answers = await ask(tmp_path, entry(tmp_path), ["cut", "two"])
    assert texts(answers) == ["answer to cut (seed 0)", "answer to two (seed 1)"]
    assert tally.sent == 3


# -- killed runs -----------------------------------------------------------------------------------------------------------


def recipe(tmp_path: Path, vllm: Vllm) -> None:
    rows = [json.dumps({"prompt": f"question {i}", "reference": "x"}) for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    args = json.dumps(vllm.args)
    (tmp_path / "recipe.yaml").write_text(f"""\
name: killed
models:
  teacher: {{type: vllm, model: {vllm.model}, python: {vllm.python}, args: {args}, limits: {{max_concurrency: 2}}}}
prompts: [{{path: prompts.jsonl}}]
stages:
  - generate: {{model: teacher, max_tokens: 8}}
""")


def build(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "factory", "build", "recipe.yaml", *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def until_asked(tmp_path: Path, times: int) -> None:
    deadline = time.monotonic() + 60
    while len(read_notes(tmp_path / "notes", "asked")) < times:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(child: "subprocess.Popen[str]") -> str:
    told = child.communicate(timeout=60)[1]
    assert child.returncode == 0, told
    return told


def stage_manifest(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "runs/killed").glob("01-generate-*/manifest.json")
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def test_a_killed_factory_leaves_no_server_and_the_next_start_goes_on(tmp_path: Path, model_folder: Path) -> None:
    recipe(tmp_path, entry(tmp_path, args={"think": 0.2}))
    first = build(tmp_path)
    until_asked(tmp_path, 5)
    first.kill()
    first.communicate(timeout=10)
    assert all_ended(pids_of(tmp_path))
    end(build(tmp_path))
    manifest = stage_manifest(tmp_path)
    assert manifest["kept"] == 12
    assert manifest["servers"]["teacher"][0]["vllm"] == "9.9.9"
    assert len(read_notes(tmp_path / "notes", "asked")) - 12 <= 2
    assert not list((tmp_path / "runs/servers").glob("*.running"))


def test_what_outlives_its_keeper_is_stopped_at_the_next_start(tmp_path: Path, model_folder: Path) -> None:
    recipe(tmp_path, entry(tmp_path, args={"think": 0.2, "stubborn": True}))
    first = build(tmp_path)
    until_asked(tmp_path, 3)
    (record,) = (tmp_path / "runs/servers").glob("*.running")
    first.kill()
    os.kill(int(record.stem), signal.SIGKILL)  # the keeper
    first.communicate(timeout=10)
    left = pids_of(tmp_path)
    assert all(map(running, left))
    # whatever the next run asks for: here another teacher
    told = end(build(tmp_path, "--set", "models.teacher={type: reference}"))
    assert "stopped a vLLM server that an earlier run left behind (2 processes)" in told
    assert all_ended(left, 0)
    assert not record.exists()


def test_a_stubborn_engine_is_stopped_too(tmp_path: Path, model_folder: Path) -> None:
    """Its keeper asks, waits its grace, and then does not ask any more."""
    recipe(tmp_path, entry(tmp_path, args={"stubborn": True}))
    end(build(tmp_path))
    assert all_ended(pids_of(tmp_path), 0)


def test_processes_of_a_living_factory_or_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        mine = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
        server = {
            "session": child.pid,
            "started": fields[19],
            "boot": boot,
            "owner": os.getpid(),
            "owner_started": mine,
        }
        for told, kept in (
            (server, True),  # its factory, this process, is alive
            (server | {"owner_started": "1", "started": "1"}, False),  # the number went to somebody else
            (server | {"owner_started": "1", "boot": "another"}, False),  # before the machine was started anew
        ):
            record = tmp_path / "1.running"
            record.write_text(json.dumps(told))
            stop_orphans(tmp_path)
            assert child.poll() is None
            assert record.exists() == kept
        record.write_text(json.dumps(server | {"owner_started": "1"}))
        stop_orphans(tmp_path)
        assert child.wait(5) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


# -- running servers -------------------------------------------------------------------------------------------------------


async def test_requests_are_spread_over_running_servers(tmp_path: Path, model_folder: Path) -> None:
    async with serving(delay_s=0.02) as one, serving(delay_s=0.02) as two, serving(delay_s=0.02) as three:
        urls = [server.url for server in (one, two, three)]
        vllm = Vllm(model=str(model_folder), base_url=urls, limits={"max_concurrency": 6})
        _, answers = await ask(tmp_path, vllm, [f"question {i}" for i in range(60)])
        counts = [sum(server.seen.values()) for server in (one, two, three)]
    assert all(isinstance(answer, Choice) for answer in answers)
    assert sum(counts) == 60
    assert min(counts) >= 15


async def test_a_server_that_fails_rests_and_the_others_take_over(tmp_path: Path, model_folder: Path) -> None:
    async def broken(body: dict[str, Any], before: int) -> Any:
        return error(500, "EngineCore encountered an issue")

    async with serving(broken) as one, serving(delay_s=0.01) as two:
        gone = "http://127.0.0.1:9/v1"
        vllm = Vllm(model=str(model_folder), base_url=[gone, one.url, two.url], limits={"max_concurrency": 4})
        _, answers = await ask(tmp_path, vllm, [f"question {i}" for i in range(40)])
        assert sum(one.seen.values()) <= 4
    assert all(isinstance(answer, Choice) for answer in answers)


async def test_one_running_server_is_used_as_it_is(tmp_path: Path, model_folder: Path) -> None:
    async with serving() as server:
        vllm = Vllm(model=str(model_folder), base_url=f"{server.url}/")
        _, answers = await ask(tmp_path, vllm, ["one"])
        assert server.bodies[0]["model"] == str(model_folder)
    assert isinstance(answers[0], Choice)


@pytest.mark.parametrize("url", ["ftp://host", "host:8000", ["http://fine", "http://a:b@host"], []])
def test_a_wrong_base_url_is_refused(url: Any) -> None:
    with pytest.raises(pydantic.ValidationError, match=r"base_url"):
        Vllm(model="some/model", base_url=url)


# -- log-probabilities and beams -----------------------------------------------------------------------------------------


async def test_log_probabilities_are_asked_for_when_wanted_and_kept_as_sums(tmp_path: Path, model_folder: Path) -> None:
    _, plain = await ask(tmp_path, entry(tmp_path), ["one"])
    _, told = await ask(tmp_path, entry(tmp_path), ["one"], logprobs=True)
    assert [o.logprob for o in (*plain, *told) if isinstance(o, Choice)] == [None, -2.5]
    bodies = read_notes(tmp_path / "notes", "asked")
    assert ["logprobs" in body for body in bodies] == [False, True]
    with Journal(tmp_path / "runs/journal.sqlite") as journal:
        stored = [body for (body,) in journal._db.execute("SELECT body FROM attempt ORDER BY id")]
    assert b'"logprob":-2.5' in stored[1]
    assert b'"content":[' not in stored[1]


@pytest.mark.parametrize(("width", "penalty", "best"), [(2, 1.0, "a long one here"), (2, 0.0, "short one")])
async def test_beams_are_ranked_by_the_answer_alone(
    tmp_path: Path, model_folder: Path, width: int, penalty: float, best: str
) -> None:
    vllm = entry(tmp_path)
    runs = tmp_path / "runs"
    model = Model("teacher", vllm, vllm.identity(runs), vllm.open(runs))
    (request,) = asked(["one"], model, beam=Beam(width=width, length_penalty=penalty), temperature=1.0)
    with Journal(runs / "journal.sqlite") as journal:
        desk = Desk(journal, Wall(Budget(), journal.spent("run")), "run")
        both = [Request(identity=model.identity, messages=request.messages, sampling=request.sampling, n=2)]
        async with model:
            tally = await desk.ask(model, both, 2, "test")
        (drawn,) = (draws for _, draws in desk.read(model, both, tally))
    answers = {o.text: (o.finish, o.logprob, o.tokens) for o in drawn if isinstance(o, Choice)}
    assert next(iter(answers)) == best
    assert answers == {"a long one here": ("length", -4.0, 4), "short one": ("stop", -3.0, 1)}
    body = read_notes(tmp_path / "notes", "asked")[0]
    assert body["use_beam_search"] is True
    assert (body["n"], body["temperature"]) == (width, 0)
    assert body["length_penalty"] == penalty * (24 + 8) / 8  # the prompt has 24 tokens, the answer at most 8


async def test_the_widest_beam_fits_a_server_of_ours(tmp_path: Path, model_folder: Path) -> None:
    _, answers = await ask(tmp_path, entry(tmp_path), ["one"], beam=Beam(width=16))
    assert isinstance(answers[0], Choice)
    assert " --max-logprobs 32" in " ".join(starts(tmp_path)[0]["argv"])


async def test_a_running_server_with_too_narrow_beams_is_told(tmp_path: Path, model_folder: Path) -> None:
    async def script(body: dict[str, Any], before: int) -> Any:
        if body["n"] > 10:
            return error(400, f"Requested sample logprobs of {2 * body['n']}, which is greater than max allowed: 20")
        return chat(body)

    async with serving(script) as server:
        vllm = Vllm(model=str(model_folder), base_url=server.url)
        with pytest.raises(RecipeError, match=r"beams of width 12: .*start it with --max-logprobs 24"):
            await ask(tmp_path, vllm, ["one"], beam=Beam(width=12))


@pytest.mark.parametrize(
    ("end_token", "template", "fine"),
    [
        ("<|im_end|>", "{{ m.content }}<|im_end|>", True),
        ({"content": "</s>"}, "{{ m.content }}{{ eos_token }}", True),
        ("<eos>", "{{ m.content }}<end_of_turn>", False),
        (None, "{{ m.content }}<end_of_turn>", True),
    ],
)
async def test_beams_need_the_end_token_that_ends_turns(
    tmp_path: Path, model_folder: Path, end_token: Any, template: str, fine: bool
) -> None:
    (model_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end_token}))
    (model_folder / "chat_template.jinja").write_text(template)
    assert (beam_problem(model_folder) is None) == fine
    if not fine:
        with pytest.raises(RecipeError, match=r"ends at '<eos>' alone"):
            await ask(tmp_path, entry(tmp_path), ["one"], beam=Beam(width=2))
        assert starts(tmp_path) == []


async def test_closing_in_the_middle_of_a_start_leaves_nothing(tmp_path: Path, model_folder: Path) -> None:
    vllm = entry(tmp_path, args={"never_healthy": True})
    teacher = VllmTeacher(vllm, tmp_path / "runs")
    model = Model("teacher", vllm, "x", teacher)
    sending = asyncio.create_task(teacher.send(asked(["one"], model)[0]))
    while not starts(tmp_path):
        await asyncio.sleep(0.02)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await teacher.close()
    assert all_ended(pids_of(tmp_path))
