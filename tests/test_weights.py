"""Local weights: named by content, made plain from any form, and never a way to run somebody's code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from factory.errors import EngineError, RecipeError
from factory.weights import Weights, chosen, fingerprint, is_path, located, materialise, materialise_in_child
from tests.tiny import tiny_model

GGUF = Path(__file__).parent.parent / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), layers=4)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def name_of(model: Path | str, cache: Path, **fields: Any) -> str:
    return fingerprint(Weights(model=str(model), **fields), cache)


# -- what makes a model itself ---------------------------------------------------------------------------------------------


def test_a_copied_folder_is_the_same_model(folder: Path, copy: Path, tmp_path: Path) -> None:
    assert name_of(folder, tmp_path) == name_of(copy, tmp_path) == name_of(copy, tmp_path / "another")
    os.utime(copy / "model.safetensors", (1, 1))
    assert name_of(folder, tmp_path) == name_of(copy, tmp_path)
    (copy / "NOTES.md").write_text("not part of it")
    assert name_of(folder, tmp_path) == name_of(copy, tmp_path)


@pytest.mark.parametrize("part", ["model.safetensors", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"])  # fmt: skip
def test_a_changed_part_makes_another_model(folder: Path, copy: Path, tmp_path: Path, part: str) -> None:
    before = name_of(copy, tmp_path)
    data = bytearray((copy / part).read_bytes())
    data[-2] ^= 1  # same size
    (copy / part).write_bytes(data)
    assert name_of(copy, tmp_path) != before
    assert name_of(folder, tmp_path) == before


def test_number_format_and_layers_make_another_model(folder: Path, tmp_path: Path) -> None:
    names = [
        name_of(folder, tmp_path, **fields)
        for fields in (
            {}, {"dtype": "bfloat16"}, {"layers": {"first": 2}}, {"layers": {"last": 2}}, {"layers": [0, 2]},
            {"config_overrides": {}}, {"config_overrides": {"num_hidden_layers": 2}},
        )
    ]  # fmt: skip
    assert len(set(names)) == len(names)


def test_hashes_are_remembered_and_follow_the_file(copy: Path, tmp_path: Path) -> None:
    before = name_of(copy, tmp_path)
    memory = tmp_path / "hashes.json"
    known = json.loads(memory.read_text())
    weights = next(key for key in known if "model.safetensors" in key)
    memory.write_text(json.dumps(known | {weights: "remembered"}))
    assert name_of(copy, tmp_path) != before  # read from memory, not from the gigabytes
    (copy / "model.safetensors").touch()
    assert name_of(copy, tmp_path) == before


# -- forms -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ({"uniform": 2}, [0, 3]),
        ({"uniform": 3}, [0, 2, 3]),
        ({"first": 3}, [0, 1, 2]),
        ({"last": 1}, [3]),
        ([2, 0], [0, 2]),
    ],
)
def test_chosen_layers_are_the_models_own(folder: Path, tmp_path: Path, layers: Any, kept: list[int]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert chosen(layers, 4) == kept
    made = materialise(Weights(model=str(folder), layers=layers), tmp_path)
    whole, cut = load_file(folder / "model.safetensors"), load_file(made / "model.safetensors")
    for name, tensor in cut.items():
        before, layered, after = name.partition(".layers.")
        number, _, rest = after.partition(".")
        source = f"{before}.layers.{kept[int(number)]}.{rest}" if layered else name
        assert tensor.equal(whole[source]), name
    assert len(cut) == 3 + len(kept) * (len(whole) - 3) // 4
    model = AutoModelForCausalLM.from_pretrained(made)
    assert len(model.model.layers) == model.config.num_hidden_layers == len(kept)
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(made).eos_token_id
    assert materialise(Weights(model=str(folder), layers=layers), tmp_path) == made  # not made again


def test_a_plain_folder_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert materialise(Weights(model=str(folder)), tmp_path) == folder
    assert materialise_in_child(Weights(model=str(folder)), tmp_path) == folder
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "told"),
    [({"first": 5}, "5 of a model that has 4"), ([0, 4], "there is no layer 4"), ([-1], "there is no layer -1")],
)
def test_layers_that_are_not_there_are_told(layers: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        chosen(layers, 4)


@pytest.mark.parametrize("layers", [{}, [], {"first": 0}, {"first": 1, "last": 1}, {"middle": 2}])
def test_layers_are_one_choice(layers: Any) -> None:
    with pytest.raises(ValidationError):
        Weights(model="m", layers=layers)


def test_a_mistake_in_the_child_is_told_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    weights = Weights(model=str(folder), layers={"first": 9})
    with pytest.raises(EngineError, match=r"cannot prepare the weights of .*: layers: 9 of a model that has 4$"):
        materialise_in_child(weights, tmp_path)


@pytest.mark.weights
def test_a_gguf_file_becomes_a_plain_folder(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    assert GGUF.is_file(), "fetch it with `make weights`"
    weights = Weights(model=str(GGUF), layers={"uniform": 2})
    made = materialise_in_child(weights, tmp_path)
    assert {f.name for f in made.iterdir()} >= {"config.json", "generation_config.json", "model.safetensors"}
    config = AutoConfig.from_pretrained(made)
    assert (config.num_hidden_layers, config.hidden_size) == (2, 576)
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(made)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert asked.endswith("<|im_start|>assistant\n")
    shutil.copy(GGUF, tmp_path / "renamed.gguf")
    assert name_of(tmp_path / "renamed.gguf", tmp_path) == name_of(GGUF, tmp_path)


# -- what is not a model -----------------------------------------------------------------------------------------------------


def test_what_stands_in_for_a_path() -> None:
    assert all(is_path(text) for text in ("./m", "/m", "~/m", "weights/m.gguf", str(Path(__file__).parent)))
    assert not is_path("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("without", "with_", "told"),
    [
        ("config.json", None, "no config.json"),
        ("model.safetensors", None, "holds no weights"),
        ("model.safetensors", "pytorch_model.bin", "can run code"),
        ("model.safetensors", "consolidated.00.pt", "can run code"),
    ],
)
def test_folders_that_are_no_models_are_refused(copy: Path, without: str, with_: str | None, told: str) -> None:
    (copy / without).unlink()
    if with_:
        (copy / with_).write_bytes(b"pickled")
    with pytest.raises(RecipeError, match=told):
        located(Weights(model=str(copy)))
    with pytest.raises(RecipeError, match=told):
        fingerprint(Weights(model=str(copy)), copy)


def test_a_path_without_anything_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no weights at .*make weights"):
        fingerprint(Weights(model=str(tmp_path / "none.gguf")), tmp_path)


def test_custom_code_of_a_folder_never_runs(copy: Path, tmp_path: Path) -> None:
    """Its config asks transformers to import a file of the folder; the import would leave a trace."""
    ran = tmp_path / "ran"
    for module in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (copy / f"{module}.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (copy / "config.json").write_text(json.dumps(config))
    made = materialise(Weights(model=str(copy), layers={"first": 1}), tmp_path)  # a known architecture: ours is taken
    assert (made / "model.safetensors").is_file()
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "evil", "architectures": ["Evil"]}))
    with pytest.raises(ValueError, match="custom code"):
        materialise(Weights(model=str(copy), layers={"first": 1}), tmp_path)
    assert not ran.exists()


# -- the hub -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of its own, and no network."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, folder: Path, commit: str = COMMIT) -> Path:
    """A model as `snapshot_download` leaves it."""
    model = hub / "models--owner--name"
    shutil.copytree(folder, model / "snapshots" / commit, dirs_exist_ok=True)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(commit)
    return model / "snapshots" / commit


def test_a_hub_id_without_network_is_a_clear_error(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from factory.weights import *; from factory.errors import RecipeError\n"
        "try: fingerprint(Weights(model='owner/name'), Path('.'))\n"
        "except RecipeError as e: print(e)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "cannot fetch the model 'owner/name' from the hub" in done.stdout, done.stderr
    assert "give a local folder" in done.stdout


def test_a_hub_id_is_named_by_the_commit_that_the_cache_holds(folder: Path, tmp_path: Path, offline: Path) -> None:
    place = cached(offline, folder)
    before = name_of("owner/name", tmp_path)
    assert materialise(Weights(model="owner/name"), tmp_path) == place
    assert name_of("owner/name", tmp_path, revision=COMMIT) == before
    cached(offline, folder, commit=COMMIT[::-1])
    assert name_of("owner/name", tmp_path) != before
    assert name_of("owner/name", tmp_path, revision="a" * 40) not in (before, name_of("owner/name", tmp_path))


def test_pickled_weights_of_a_hub_model_are_refused(folder: Path, tmp_path: Path, offline: Path) -> None:
    place = cached(offline, folder)
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="can run code"):
        materialise(Weights(model="owner/name"), tmp_path)


# -- a shape without its training ------------------------------------------------------------------------------------------


def test_a_shape_with_random_weights_is_always_the_same_model_and_keeps_the_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = Weights(
        model=str(folder), config_overrides={"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    )
    made = [materialise(shape, tmp_path / name) for name in ("one", "two")]
    first, second, base = (AutoModelForCausalLM.from_pretrained(f) for f in (*made, folder))
    assert (first.config.num_hidden_layers, first.config.hidden_size) == (2, 16)
    assert all((a == b).all() for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert first.generation_config.eos_token_id == base.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(made[0]).get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()

    trained = tiny_model(tmp_path / "trained", seed=1)
    anew = materialise(Weights(model=str(trained), config_overrides={}), tmp_path)
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (trained, anew))
    assert before.num_parameters() == after.num_parameters()
    assert not (before.lm_head.weight == after.lm_head.weight).all()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"hiden_size": 16}, "no 'hiden_size'; did you mean 'hidden_size'?"),
        ({"vocab_size": 5}, "vocab_size 5, but the tokenizer has"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(folder: Path, tmp_path: Path, overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        materialise(Weights(model=str(folder), config_overrides=overrides), tmp_path)


def test_a_shape_has_no_chosen_layers() -> None:
    with pytest.raises(ValidationError, match="remove one of them"):
        Weights(model="x", layers={"first": 2}, config_overrides={})
