"""Where local weights come from, and what makes them themselves.

A model may be a hub id, a folder, a GGUF file, or chosen layers of any of these. `materialise` turns it into a plain
folder (safetensors and tokenizer) that transformers, TRL and vLLM load alike; `fingerprint` names it by content.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from factory.child import child_environment, die_with_parent
from factory.errors import EngineError, FactoryError, RecipeError
from factory.knobs import Knobs
from factory.rows import digest

CONTENT = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
"""What of a folder makes the model: weights, configs, tokenizer, chat template."""


def lacking_packages() -> str | None:
    """What local models and training need and is not installed, with what to do."""
    missing = [name for name in ("torch", "transformers", "trl") if find_spec(name) is None]
    needed = f"local models and training need {', '.join(missing)}: pip install 'distillation-factory[train]'"
    return needed if missing else None


class Weights(Knobs):
    """A local model. `layers` makes a smaller one of it: `{uniform: 6}`, `{first: 6}`, `{last: 6}` or `[0, 4, 9]`.

    `config_overrides` takes only its shape and its tokenizer: `{hidden_size: 64}`; the weights are random, always the same.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    layers: list[int] | dict[Literal["uniform", "first", "last"], int] | None = Field(None, min_length=1)
    config_overrides: dict[str, Any] | None = None

    def alone(self) -> dict[str, Any]:
        """What a child needs to load the model; an entry of a recipe may say more."""
        return {name: getattr(self, name) for name in Weights.model_fields}

    @field_validator("layers")
    @classmethod
    def _one_choice(cls, layers: Any) -> Any:
        if isinstance(layers, dict) and (len(layers) != 1 or min(layers.values()) < 1):
            raise ValueError("write one of {uniform: N}, {first: N}, {last: N}, or a list of layer numbers")
        return layers

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.layers is not None and self.config_overrides is not None:
            raise ValueError(
                "layers keeps trained weights, config_overrides starts from random ones: remove one of them"
            )
        return self

    @property
    def as_they_are(self) -> bool:
        """Whether nothing has to be made of them."""
        return self.layers is None and self.config_overrides is None


def number_format(dtype: str, on_gpu: bool) -> str:
    """torch's name for the numbers of a model: what its entry says, or by itself half the bytes on a GPU."""
    return dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"


def is_path(model: str) -> bool:
    """Whether a model string means a place on this disk rather than a hub id `owner/name`."""
    return model.startswith((".", "/", "~")) or model.endswith(".gguf") or Path(model).is_dir()


def located(weights: Weights) -> Path:
    """The folder or file of a local model; RecipeError where there is none."""
    path = Path(weights.model).expanduser()
    if not path.exists():
        raise RecipeError(
            f"there are no weights at {weights.model!r}; "
            "put a model folder or a .gguf file there (`make weights` fetches a small one)"
        )
    return _checked(path, weights.model) if path.is_dir() else path


def _checked(folder: Path, name: str) -> Path:
    """A folder that can be loaded, and safely: pickled weights can run code when they are read."""
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{name!r} is not a model folder: it has no config.json (a .gguf is named by its file)")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = "its weights are pickled, and reading those can run code" if pickled else "it holds no weights"
        raise RecipeError(f"{name!r}: {why}; give a folder with .safetensors")
    return folder


def fingerprint(weights: Weights, cache: Path) -> str:
    """Names a model by content: never by host or path, so a copied folder is the same model. Needs no torch."""
    if is_path(weights.model):
        path = located(weights)
        files = [path] if path.is_file() else sorted(f for glob in CONTENT for f in path.glob(glob))
        content: Any = [(f.suffix if path.is_file() else f.name, _file_hash(f, cache)) for f in files]
    else:
        content = [weights.model, _commit(weights)]
    shape = [] if weights.config_overrides is None else [weights.config_overrides]
    return digest(content, weights.dtype, weights.layers, *shape)


def _file_hash(file: Path, cache: Path) -> str:
    """Hash of a file's bytes, remembered by path, size and time of change: gigabytes are not read at every start."""
    memory = cache / "hashes.json"
    known: dict[str, str] = json.loads(memory.read_text()) if memory.is_file() else {}
    stat = file.stat()
    key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    if key not in known:
        with file.open("rb") as data:
            known[key] = hashlib.file_digest(data, "blake2b").hexdigest()[:32]
        cache.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(".tmp")
        temporary.write_text(json.dumps(known))
        temporary.rename(memory)
    return known[key]


def _commit(weights: Weights) -> str:
    """The commit that a hub id means on this machine: pinned by the recipe, else what the cache holds, else what the hub
    has now; fetched then, so that the first run and the next name the model alike."""
    if re.fullmatch(r"[0-9a-f]{40}", weights.revision or ""):
        return str(weights.revision)
    return _cached_commit(weights) or _snapshot(weights).name


def _cached_commit(weights: Weights) -> str | None:
    """The commit that the local hub cache holds for a model's revision."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    ref = hub / f"models--{weights.model.replace('/', '--')}" / "refs" / (weights.revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def materialise(weights: Weights, cache: Path) -> Path:
    """A plain folder with the model. Loads torch where something must be converted: call it in a child process."""
    path = located(weights) if is_path(weights.model) else None
    if path is not None and path.is_dir() and weights.as_they_are:
        return path
    folder = cache / fingerprint(weights, cache)
    if not folder.is_dir():
        source = path if path is not None else _snapshot(weights)
        if path is None and weights.as_they_are:
            return source
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        _convert(source, weights, temporary)
        if folder.is_dir():  # another process was faster
            shutil.rmtree(temporary)
        else:
            temporary.rename(folder)
    return folder


def materialise_in_child(weights: Weights, cache: Path) -> Path:
    """The same from the parent, which must stay free of torch."""
    if is_path(weights.model) and weights.as_they_are and located(weights).is_dir():
        return located(weights)
    # a model entry has fields of its own beside these
    plain = weights.model_dump_json(include=set(Weights.model_fields))
    command = [sys.executable, "-m", "factory.weights", plain, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    if done.returncode != 0:
        last_words = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        raise EngineError(f"cannot prepare the weights of {weights.model}: {last_words}")
    return Path(done.stdout.strip().splitlines()[-1])


def _snapshot(weights: Weights) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RecipeError(
            "a hub model needs the training packages: pip install 'distillation-factory[train]'"
        ) from None
    try:
        found: str = snapshot_download(
            weights.model, revision=_cached_commit(weights) or weights.revision,
            allow_patterns=[glob for glob in CONTENT if glob != "*.gguf"], ignore_patterns="*/*",
        )  # fmt: skip
    except Exception as e:  # the hub's errors have no common root
        raise RecipeError(
            f"cannot fetch the model {weights.model!r} from the hub: {type(e).__name__}; "
            "give a local folder, or check the name and the network"
        ) from None
    return _checked(Path(found), weights.model)


def _convert(source: Path, weights: Weights, folder: Path) -> None:
    """Load or make anew, cut to the chosen layers, and save as safetensors."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"gguf_file": source.name} if source.is_file() else {}
    root = source.parent if source.is_file() else source
    dtype = getattr(torch, number_format(weights.dtype, on_gpu=False))
    tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False, **where)
    if weights.config_overrides is None:
        plain = _trained(root, where, weights.layers, dtype)
    else:
        plain = _random(root, where, weights.config_overrides, dtype, len(tokenizer))
    plain.tie_weights()
    if plain.generation_config.eos_token_id is None:
        plain.generation_config.eos_token_id = plain.config.eos_token_id or tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trained(root: Path, where: dict[str, str], layers: Any, dtype: Any) -> Any:
    """The model with the layers that were chosen of it."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(root, dtype=dtype, trust_remote_code=False, **where)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised by now; with it, saving is refused
    state = loaded.state_dict()
    if layers is not None:
        state = _cut(state, config, chosen(layers, config.num_hidden_layers))
    with torch.device("meta"):  # takes the tensors over: never two copies in memory
        plain = type(loaded)(config)
    plain.load_state_dict(state, assign=True)
    plain.generation_config.eos_token_id = loaded.generation_config.eos_token_id
    return plain


def _random(root: Path, where: dict[str, str], overrides: dict[str, Any], dtype: Any, vocabulary: int) -> Any:
    """A model of the same kind in another shape, not trained."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    like = AutoConfig.from_pretrained(root, trust_remote_code=False, **where)
    values = {k: v for k, v in like.to_dict().items() if k != "quantization_config"}
    if unknown := sorted(set(overrides) - set(values)):
        near = get_close_matches(unknown[0], values, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"config_overrides: a {like.model_type} model has no {unknown[0]!r}{meant}")
    if "head_dim" not in overrides and {"hidden_size", "num_attention_heads"} & set(overrides):
        values.pop("head_dim", None)  # follows from the two
    if "layer_types" not in overrides and "num_hidden_layers" in overrides:
        values.pop("layer_types", None)
    config = type(like)(**values | overrides)
    if config.vocab_size < vocabulary:
        raise RecipeError(
            f"config_overrides: vocab_size {config.vocab_size}, but the tokenizer has {vocabulary} tokens"
        )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def chosen(layers: list[int] | dict[Any, int], total: int) -> list[int]:
    """Layer numbers to keep, ascending; `uniform` always keeps the first and the last."""
    if isinstance(layers, list):
        numbers = layers
    else:
        ((how, count),) = layers.items()
        if count > total:
            raise RecipeError(f"layers: {count} of a model that has {total}")
        spread = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
        numbers = {"first": list(range(count)), "last": list(range(total - count, total)), "uniform": spread}[how]
    if wrong := [n for n in numbers if not 0 <= n < total]:
        raise RecipeError(f"layers: there is no layer {wrong[0]}; the model has {total}, counted from 0")
    return sorted(set(numbers))


def _cut(state: dict[str, Any], config: Any, keep: list[int]) -> dict[str, Any]:
    """The state of the kept layers, renumbered; the config is changed to fit."""
    renumbered = {old: new for new, old in enumerate(keep)}
    kept = {}
    for name, tensor in state.items():
        before, layered, after = name.partition(".layers.")
        if layered:
            number, _, rest = after.partition(".")
            if int(number) not in renumbered:
                continue
            name = f"{before}.layers.{renumbered[int(number)]}.{rest}"
        kept[name] = tensor
    if len(kept) == len(state) and len(keep) < config.num_hidden_layers:
        raise RecipeError(f"layers: cannot be chosen for a {config.model_type} model; leave them out")
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[old] for old in keep]
    return kept


def main() -> None:
    """`python -m factory.weights WEIGHTS CACHE`: prints the folder."""
    die_with_parent()
    try:
        print(materialise(Weights.model_validate_json(sys.argv[1]), Path(sys.argv[2])))
    except FactoryError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
