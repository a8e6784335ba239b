"""The child process of the `transformers` teacher: keeps a large batch full, one JSON line in and out per request.

The batch is rows x columns of keys and values, right-aligned, written in place. A row that has ended leaves; when a
good part of the batch is free, queued rows are prefilled and join. What all queued prompts begin with (the system
message, worked examples) is computed once and copied.
"""

import ctypes
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from factory.rows import Request
from factory.teachers.decoding import BeamSearch, penalise, pick
from factory.weights import Weights, materialise

FREE_SHARE = 0.25
"""Rows join when this share of the batch is free: joining moves the whole batch, so not for each single row."""
MIN_SHARED = 16
"""A shared beginning shorter than this is not worth keeping."""
PREFILL_TOKENS = 4096


def grouped_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
) -> Any:
    """Scaled dot product with grouped queries. For one new token the group stands in the place of the sequence, so that
    keys and values need not be copied once per query head (transformers' own way, and most of a CPU step's time)."""
    rows, heads, length, size = query.shape
    kv_heads = key.shape[1]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if length == 1:
        folded = query.view(rows, kv_heads, heads // kv_heads, size)
        out = sdpa(folded, key, value, attn_mask=mask, scale=scaling).reshape(rows, heads, 1, size)
    else:
        out = sdpa(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).contiguous(), None


class Columns:
    """Keys and values of all layers, rows x heads x columns x size; a forward writes its columns in place."""

    is_compileable = False

    def __init__(self, layers: int) -> None:
        self.keys: list[Any] = [None] * layers
        self.values: list[Any] = [None] * layers
        self.used = 0  # columns filled before the current forward

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        end = self.used + key.shape[2]
        if self.keys[layer] is None or self.keys[layer].shape[2] < end:
            self._grow(layer, key, end)
        self.keys[layer][:, :, self.used : end] = key
        self.values[layer][:, :, self.used : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def _grow(self, layer: int, like: Any, end: int) -> None:
        for side in (self.keys, self.values):
            wider = like.new_zeros(like.shape[0], like.shape[1], end + 64, like.shape[3])
            if side[layer] is not None:
                wider[:, :, : self.used] = side[layer][:, :, : self.used]
            side[layer] = wider

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used

    def take(self, rows: list[int]) -> None:
        """Keep these rows, in this order (a row may stand twice)."""
        for side in (self.keys, self.values):
            for i, tensor in enumerate(side):
                side[i] = tensor[rows]


class Line:
    """One row of the batch: a draw in progress, or one beam of a search."""

    def __init__(self, number: int, tokens: list[int], request: Request, search: BeamSearch | None = None) -> None:
        self.number, self.prompt, self.request, self.search = number, tokens, request, search
        self.random = random.Random(request.seed if request.seed is not None else 0)
        self.answer: list[int] = []
        self.logprob = 0.0
        self.seconds = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


class Engine:
    """The model with its batch."""

    def __init__(self, folder: Path, name: str, batch_size: int, device: str | None, dtype: str) -> None:
        self.name, self.batch_size = name, batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = {"auto": torch.bfloat16 if self.device.type == "cuda" else torch.float32}.get(dtype) or getattr(
            torch, dtype
        )
        AttentionInterface.register("grouped", grouped_attention)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, attn_implementation="grouped")
        self.model.to(self.device).eval()
        self.layers = self.model.config.get_text_config().num_hidden_layers
        ends = self.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        self.context = getattr(self.model.config, "max_position_embeddings", 1 << 30)
        self.rows: list[Line] = []
        self.columns = Columns(self.layers)
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=self.device)
        self.prefix: tuple[list[int], Columns] = ([], Columns(self.layers))

    def render(self, messages: Any) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    # -- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, ids: Any, positions: Any, mask: Any, columns: Columns, last: int = 1) -> Any:
        """Logits of the last `last` columns. `mask` (rows x all columns) says which columns exist."""
        length = ids.shape[1]
        total = columns.used + length
        allowed = mask[:, None, None, :total].expand(-1, 1, length, -1)
        if length > 1:
            causal = torch.ones(length, total, dtype=torch.bool, device=ids.device).tril(columns.used)
            # a padding column must see something, or its softmax is NaN
            own = torch.eye(total, dtype=torch.bool, device=ids.device)[columns.used :]
            allowed = (allowed & causal) | own
        out = self.model(
            input_ids=ids, position_ids=positions, attention_mask=allowed, past_key_values=columns, use_cache=True,
            logits_to_keep=last,
        )  # fmt: skip
        columns.used = total
        return out.logits.float()

    # -- joining and leaving -----------------------------------------------------------------------------------------

    def admit(self, lines: list[Line]) -> None:
        """Prefill new rows and let them join the batch."""
        lines.sort(key=lambda line: len(line.prompt))
        while lines:
            width = max(1, PREFILL_TOKENS // max(len(lines[-1].prompt) - len(self.prefix[0]), 1))
            self._admit(lines[-width:])
            del lines[-width:]

    def _admit(self, lines: list[Line]) -> None:
        self._share([line.prompt for line in lines])
        shared, kept = self.prefix
        suffixes = [line.prompt[len(shared) :] for line in lines]
        longest = max(map(len, suffixes))
        pads = [longest - len(suffix) for suffix in suffixes]
        ids = torch.tensor([[0] * pad + suffix for pad, suffix in zip(pads, suffixes, strict=True)], device=self.device)
        positions = torch.tensor(
            [[0] * pad + list(range(len(shared), len(shared) + longest - pad)) for pad in pads], device=self.device
        )
        mask = torch.tensor(
            [[True] * len(shared) + [False] * pad + [True] * (longest - pad) for pad in pads], device=self.device
        )
        fresh = Columns(self.layers)
        fresh.used = len(shared)
        for i in range(self.layers if shared else 0):
            for side, source in ((fresh.keys, kept.keys), (fresh.values, kept.values)):
                prefix = source[i][:, :, : len(shared)].expand(len(lines), -1, -1, -1)
                side[i] = torch.nn.functional.pad(prefix, (0, 0, 0, longest))
        logits = self._forward(ids, positions, mask, fresh)[:, -1]
        self._join(lines, fresh, mask)
        self._step(logits, len(self.rows) - len(lines))

    def _share(self, prompts: list[list[int]]) -> None:
        """Keep the keys and values of what these prompts begin with alike, if it is not what is kept already."""
        common = _common([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else []
        tokens, kept = self.prefix
        served = all(prompt[: len(tokens)] == tokens and len(prompt) > len(tokens) for prompt in prompts)
        if tokens and served and len(common) < 2 * len(tokens):
            return
        if len(common) < MIN_SHARED:
            self.prefix = ([], Columns(self.layers))
            return
        kept = Columns(self.layers)
        ids = torch.tensor([common], device=self.device)
        positions = torch.arange(len(common), device=self.device).unsqueeze(0)
        self._forward(ids, positions, torch.ones_like(ids, dtype=torch.bool), kept)
        self.prefix = (list(common), kept)

    def _join(self, lines: list[Line], fresh: Columns, fresh_mask: Any) -> None:
        """Put new rows under the old ones, everything right-aligned and no wider than the longest row."""
        if not self.rows:
            self.rows, self.columns, self.mask = list(lines), fresh, fresh_mask
            return
        old = [self.mask[i].nonzero().squeeze(1) for i in range(len(self.rows))]
        new = [fresh_mask[i].nonzero().squeeze(1) for i in range(len(lines))]
        width = max(len(where) for where in (*old, *new))
        joined = Columns(self.layers)
        joined.used = width
        for layer in range(self.layers):
            for out, a, b in (
                (joined.keys, self.columns.keys, fresh.keys), (joined.values, self.columns.values, fresh.values),
            ):  # fmt: skip
                shape = a[layer].shape
                both = a[layer].new_zeros(len(old) + len(new), shape[1], width + 64, shape[3])
                for row, (source, i, where) in enumerate(
                    [(a[layer], i, where) for i, where in enumerate(old)]
                    + [(b[layer], i, where) for i, where in enumerate(new)]
                ):
                    both[row, :, width - len(where) : width] = source[i][:, where]
                out[layer] = both
                a[layer] = None  # one layer at a time: the batch is never in memory twice
        lengths = torch.tensor([len(where) for where in (*old, *new)], device=self.device).unsqueeze(1)
        self.mask = torch.arange(width, device=self.device).unsqueeze(0) >= width - lengths
        self.rows += lines
        self.columns = joined

    # -- one token further -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One token for every row."""
        started = time.monotonic()
        ids = torch.tensor([[line.answer[-1]] for line in self.rows], device=self.device)
        positions = torch.tensor([[line.length - 1] for line in self.rows], device=self.device)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        logits = self._forward(ids, positions, self.mask, self.columns)[:, -1]
        self._step(logits, 0)
        share = (time.monotonic() - started) / max(len(self.rows), 1)
        for line in self.rows:
            line.seconds += share

    def _step(self, logits: Any, first: int) -> None:
        """Decide the next token of the rows from `first` on, given their logits; rows that end leave the batch."""
        lines = self.rows[first:]
        keep, rows = list(range(first)), self.rows[:first]
        drawn = iter(self._draw(logits, [i for i, line in enumerate(lines) if line.search is None], lines))
        searched: set[int] = set()
        for i, line in enumerate(lines):
            if line.search is None:
                token, logprob = next(drawn)
                line.answer.append(token)
                line.logprob += logprob
                if not self._ended(line):
                    keep.append(first + i)
                    rows.append(line)
            elif id(line.search) not in searched:
                searched.add(id(line.search))
                mine = [k for k, other in enumerate(lines) if other.search is line.search]
                for parent, beam in self._grow_beams(line, logits[mine], [lines[k] for k in mine]):
                    keep.append(first + mine[parent])
                    rows.append(beam)
        if keep != list(range(len(self.rows))):
            self.columns.take(keep)
            self.mask = self.mask[keep]
        self.rows = rows

    def _draw(self, logits: Any, where: list[int], lines: list[Line]) -> list[tuple[int, float]]:
        """Token and log-probability (before penalties and temperature) for the lines at `where`."""
        if not where:
            return []
        drawing = [lines[i] for i in where]
        raw = chosen = logits[where]
        if any(_penalised(line) for line in drawing):
            chosen = raw.clone()
            for row, line in zip(chosen, drawing, strict=True):
                if _penalised(line):
                    penalise(row, line.request.sampling, line.prompt, line.answer)
        tokens = pick(chosen, [(line.request.sampling, line.random) for line in drawing])
        picked = raw.gather(1, torch.tensor(tokens, device=raw.device).unsqueeze(1)).squeeze(1)
        return list(zip(tokens, (picked - raw.logsumexp(-1)).tolist(), strict=True))

    def _grow_beams(self, line: Line, logits: Any, beams: list[Line]) -> Iterator[tuple[int, Line]]:
        """One search one token further: (number of the parent beam, the new beam); answers when it has ended."""
        assert line.search is not None
        steps = line.search.advance(torch.log_softmax(logits, -1))
        for parent, token in steps:
            grown = Line(line.number, line.prompt, line.request, line.search)
            grown.answer = [*beams[parent].answer, token]
            grown.seconds = line.seconds
            yield parent, grown
        if not steps:
            self._answer_beams(line)

    def _ended(self, line: Line) -> bool:
        sampling = line.request.sampling
        ended = line.answer[-1] in self.ends
        text = ""
        if sampling.stop and not ended:
            text = self.tokenizer.decode(line.answer, skip_special_tokens=True)
            cut = min((at for stop in sampling.stop if (at := text.find(stop)) >= 0), default=-1)
            if cut >= 0:
                self._answer(line, [_choice(text[:cut], "stop", line.logprob, len(line.answer))])
                return True
        if ended or len(line.answer) >= sampling.max_tokens or line.length >= self.context:
            text = self.tokenizer.decode(line.answer[:-1] if ended else line.answer, skip_special_tokens=True)
            self._answer(line, [_choice(text, "stop" if ended else "length", line.logprob, len(line.answer))])
            return True
        return False

    def _answer_beams(self, line: Line) -> None:
        assert line.search is not None
        choices = []
        for best in line.search.best(line.search.width):
            text = self.tokenizer.decode(best.tokens, skip_special_tokens=True)
            choices.append(
                _choice(text, best.finish, best.logprob, len(best.tokens) + (best.finish == "stop"))
                | {"score": best.score}
            )
        self._answer(line, choices)

    def _answer(self, line: Line, choices: list[dict[str, Any]]) -> None:
        usage = {
            "prompt_tokens": len(line.prompt),
            "completion_tokens": sum(choice["tokens"] for choice in choices),
            "seconds": round(line.seconds, 4),
        }
        tell(line.number, {"model": self.name, "choices": choices, "usage": usage})

    # -- loss --------------------------------------------------------------------------------------------------------

    def loss(self, messages: Any, completion: str) -> tuple[float, int]:
        """Summed negative log-likelihood (nats) of an answer and its end token, and the number of tokens."""
        prompt = self.render(messages)
        answer = [*self.tokenizer.encode(completion, add_special_tokens=False), self.tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]], device=self.device)
        positions = torch.arange(ids.shape[1], device=self.device).unsqueeze(0)
        every = torch.ones_like(ids, dtype=torch.bool)
        logits = self._forward(ids, positions, every, Columns(self.layers), last=len(answer) + 1)[0, :-1]
        lost = torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=self.device), reduction="sum")
        return float(lost), len(answer)


def _common(prompts: list[list[int]]) -> list[int]:
    """What all token lists begin with: the smallest and the largest differ first."""
    low, high = min(prompts), max(prompts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def _penalised(line: Line) -> bool:
    s = line.request.sampling
    return (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0)


def _choice(text: str, finish: str, logprob: float, tokens: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"message": message, "finish_reason": finish, "logprob": logprob, "tokens": tokens}


_out = os.fdopen(os.dup(1), "w", buffering=1)


def tell(number: int, body: dict[str, Any]) -> None:
    """One line to the parent."""
    _out.write(json.dumps({"number": number, "body": body}) + "\n")


def serve(engine: Engine, inbox: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Answer until the parent closes our input."""
    waiting: list[Line] = []
    while True:
        for message in _arrived(inbox, block=not (engine.rows or waiting)):
            if message is None:
                return
            if message["op"] == "loss":
                total, count = engine.loss(message["messages"], message["completion"])
                tell(message["number"], {"loss": total, "tokens": count})
            else:
                line = _line(engine, message)
                waiting += [line] if line else []
        free = engine.batch_size - len(engine.rows)
        if waiting and (not engine.rows or free >= engine.batch_size * FREE_SHARE):
            joining: list[Line] = []
            while waiting and (not (joining or engine.rows) or _rows_of(waiting[0]) <= free):
                free -= _rows_of(waiting[0])
                joining.append(waiting.pop(0))
            engine.admit(joining)
        if engine.rows:
            engine.step()


def _arrived(inbox: Any, block: bool) -> Iterator[Any]:
    """What has come in. After a wait, a moment more: requests come in crowds, and a full batch is worth it."""
    if block:
        yield inbox.get()
        time.sleep(0.05)
    while not inbox.empty():
        yield inbox.get()


def _rows_of(line: Line) -> int:
    return line.search.width if line.search else 1


def _line(engine: Engine, message: dict[str, Any]) -> Line | None:
    request = msgspec.convert(message["request"], Request)
    tokens = engine.render(request.messages)
    if len(tokens) >= engine.context:
        told = f"the prompt has {len(tokens)} tokens, the maximum context length is {engine.context}"
        tell(message["number"], {"error": {"code": "context_length_exceeded", "message": told}})
        return None
    beam = request.sampling.beam
    search = BeamSearch(beam.width, beam.length_penalty, request.sampling.max_tokens, engine.ends) if beam else None
    return Line(message["number"], tokens, request, search)


def _listen(inbox: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Read the parent's lines; when they end, the parent has ended, and so must we, whatever we compute."""
    for raw in sys.stdin.buffer:
        inbox.put(json.loads(raw))
    os._exit(0)


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    settings = json.loads(sys.argv[1])
    os.dup2(2, 1)  # whatever libraries print must not stand between our lines
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    weights = Weights.model_validate(settings["weights"])
    folder = materialise(weights, Path(settings["cache"]))
    with torch.inference_mode():
        engine = Engine(folder, settings["name"], settings["batch_size"], settings["device"], weights.dtype)
        tell(0, {"ready": True})
        serve(engine, inbox)


if __name__ == "__main__":
    main()
