"""A local model with a batch that is kept full: seeded draws and beam searches side by side.

What all rows begin with is computed once and read once per step; equal prompts (the draws of one prompt) are computed
once. What a row answers depends on nothing but its own request.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from jinja2 import TemplateError
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from factory.errors import EngineError
from factory.rows import Request
from factory.teachers.attention import Beginning, Prefill, Slots, attend
from factory.teachers.decoding import BeamSearch, penalise, pick
from factory.weights import number_format

MIN_SHARED = 16
"""A shared beginning shorter than this is not worth keeping."""
PREFILL_TOKENS = 4096
PROBE = 12
"""Tokens on which a model must answer alike with its own attention and with ours."""

Tell = Callable[[int, dict[str, Any]], None]
"""Passes an answer on: number of the request, body."""


class Line:
    """One row of the batch: a draw in progress, or one beam of a search."""

    def __init__(self, number: int, tokens: list[int], request: Request, search: BeamSearch | None = None) -> None:
        self.number, self.prompt, self.request, self.search = number, tokens, request, search
        self.beam = 0  # which of its search's live beams it is
        self.random = random.Random(request.seed if request.seed is not None else 0)
        self.answer: list[int] = []
        self.logprob = 0.0
        self.seconds = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def rows(self) -> int:
        """Rows of the batch that it may come to fill."""
        return self.search.width if self.search else 1

    @property
    def columns(self) -> int:
        """Columns that each of its rows may come to fill."""
        return len(self.prompt) + self.request.sampling.max_tokens


class Engine:
    """The model with its batch; answers go to `tell`."""

    def __init__(self, folder: Path, name: str, batch_size: int, device: str | None, dtype: str, tell: Tell) -> None:
        self.name, self.batch_size, self.tell = name, batch_size, tell
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = getattr(torch, number_format(dtype, self.device.type == "cuda"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not self.tokenizer.chat_template:
            raise EngineError(f"{name} has no chat template; use an instruct model")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, trust_remote_code=False)
        self.model.to(self.device).eval()
        if self.device.type == "cpu":
            _lay_out_for_cpu(self.model)
        ends = self.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        self.context = _context(self.model.config.get_text_config())
        self.rows: list[Line] = []
        self.slots = Slots()
        self._take_over_attention()

    def _take_over_attention(self) -> None:
        """Read keys and values our way, if that gives what the model's own way gives."""
        tokens = list(range(PROBE))
        own = self.model(input_ids=torch.tensor([tokens], device=self.device)).logits[0, -1].float()
        self._are_numbers(own.tolist())
        AttentionInterface.register("shared_beginning", attend)
        try:
            self.model.set_attn_implementation("shared_beginning")
            self._begin(tokens[: PROBE // 2])
            _, fresh, pads = self._prefill([tokens[:-1]], self.slots.beginning)
            self.slots.join(0, fresh, [0], pads)
            ours = self._decode(tokens[-1:], [PROBE - 1])[0]
            alike = torch.allclose(own, ours, rtol=0, atol=(1e-3 if self.dtype == torch.float32 else 0.3) * own.std())
        except (AttributeError, TypeError, ValueError, NotImplementedError) as e:
            raise EngineError(f"{self.name}: the local teacher cannot run this architecture ({e}); use vllm") from e
        if not alike:
            raise EngineError(f"{self.name}: the local teacher would run this architecture wrongly; use vllm")
        self.slots = Slots()
        self.cells = _free_bytes(self.device) // 2 // fresh.bytes_per_column

    def line(self, number: int, request: Request) -> Line | None:
        """A request as a row that waits; None where it was refused at once."""
        try:
            tokens: list[int] = self.tokenizer.apply_chat_template(
                request.messages, add_generation_prompt=True, return_dict=False
            )
        except TemplateError as e:
            self.tell(number, {"error": {"code": "bad_request", "message": f"the chat template refuses this: {e}"}})
            return None
        if len(tokens) >= self.context:
            told = f"the prompt has {len(tokens)} tokens, the maximum context length is {self.context}"
            self.tell(number, {"error": {"code": "context_length_exceeded", "message": told}})
            return None
        beam = request.sampling.beam
        limit = min(request.sampling.max_tokens, self.context - len(tokens))
        search = BeamSearch(beam.width, beam.length_penalty, limit, self.ends) if beam else None
        return Line(number, tokens, request, search)

    # -- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, ids: Any, positions: Any, mask: Any, cache: Any, last: int = 1) -> Any:
        """Logits of the last `last` columns (rows x last x vocabulary, float32)."""
        out = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True,
            logits_to_keep=last,
        )  # fmt: skip
        return out.logits.float()

    def _prefill(self, prompts: list[list[int]], beginning: Beginning, last: int = 1) -> tuple[Any, Prefill, list[int]]:
        """What follows the beginning, left-padded: logits of the last columns, keys and values, paddings."""
        start = len(beginning)
        longest = max(map(len, prompts)) - start
        pads = [longest - (len(prompt) - start) for prompt in prompts]
        ids = [[0] * pad + prompt[start:] for pad, prompt in zip(pads, prompts, strict=True)]
        padded = torch.tensor(pads, device=self.device).unsqueeze(1)
        columns = torch.arange(-start, longest, device=self.device)
        positions = (columns[start:] - padded).clamp_(min=0) + start
        # a column is seen where it is of the beginning, or neither padding nor later; a padding column must see
        # something, or its softmax is NaN: the beginning, or itself
        own = torch.arange(longest, device=self.device).unsqueeze(1)
        seen = ((columns < 0) | (columns >= padded))[:, None, None, :] & (columns <= own)
        fresh = Prefill(beginning)
        mask = seen | (columns == own)
        return self._forward(torch.tensor(ids, device=self.device), positions, mask, fresh, last), fresh, pads

    def _decode(self, tokens: list[int], lengths: list[int]) -> Any:
        """Logits after one more token of each row; `lengths` are the tokens before it (rows x vocabulary)."""
        start = len(self.slots.beginning)
        filled = [length - start for length in lengths]
        mask = self.slots.before_step(filled, torch.empty(0, dtype=self.dtype, device=self.device))
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        positions = torch.tensor(lengths, device=self.device).unsqueeze(1)
        return self._forward(ids, positions, mask, self.slots)[:, -1]

    # -- joining -----------------------------------------------------------------------------------------------------

    def fitting(self, waiting: list[Line]) -> int:
        """How many of `waiting`, first come first served, fit beside the rows of the batch, by number and by memory; an
        empty batch takes at least one."""
        rows, widest = len(self.rows), max((line.columns for line in self.rows), default=0)
        for count, line in enumerate(waiting):
            rows, widest = rows + line.rows, max(widest, line.columns)
            if (rows > self.batch_size or rows * widest > self.cells) and (self.rows or count):
                return count
        return len(waiting)

    def admit(self, lines: list[Line]) -> None:
        """Prefill new rows and let them join the batch."""
        groups: dict[tuple[int, ...], list[Line]] = {}
        for line in lines:
            groups.setdefault(tuple(line.prompt), []).append(line)
        if groups:
            self._share([list(prompt) for prompt in groups])
        prompts = sorted(groups, key=len)
        while prompts:
            count = max(1, PREFILL_TOKENS // (len(prompts[-1]) - len(self.slots.beginning)))
            self._admit([groups[prompt] for prompt in prompts[-count:]])
            del prompts[-count:]

    def _admit(self, groups: list[list[Line]]) -> None:
        """Lines grouped by prompt: each prompt is computed once and joins as many rows as it has lines."""
        started = time.monotonic()
        logits, fresh, pads = self._prefill([group[0].prompt for group in groups], self.slots.beginning)
        source = [i for i, group in enumerate(groups) for _ in group]
        first = len(self.rows)
        self.slots.join(first, fresh, source, pads)
        self.rows += [line for group in groups for line in group]
        self._decide(logits[:, -1][source], first, started)

    def _share(self, prompts: list[list[int]]) -> None:
        """Settle what the whole batch begins with, now that these prompts join it."""
        kept = self.slots.beginning
        common = _common([prompt[:-1] for prompt in prompts])  # something must be left to compute
        if not self.rows:
            self._begin(common if len(common) >= MIN_SHARED else [])
            return
        length = len(_common([common, kept.tokens]))
        if length < len(kept):
            self.slots.begin_shorter(length if length >= MIN_SHARED else 0, len(self.rows))

    def _begin(self, tokens: list[int]) -> None:
        """Begin an empty batch with these tokens; what is kept of them already is not computed again."""
        self.slots.beginning = self.slots.beginning.cut(len(_common([tokens, self.slots.beginning.tokens])))
        if len(tokens) > len(self.slots.beginning):
            _, fresh, _ = self._prefill([tokens], self.slots.beginning)
            self.slots.beginning = fresh.longer(tokens)

    # -- one token further -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One token for every row."""
        started = time.monotonic()
        logits = self._decode([line.answer[-1] for line in self.rows], [line.length - 1 for line in self.rows])
        self._decide(logits, 0, started)

    def _decide(self, logits: Any, first: int, started: float) -> None:
        """Decide the next token of the rows from `first` on, given their logits; rows that end leave the batch."""
        lines = self.rows[first:]
        drawn = iter(self._draw(logits, [i for i, line in enumerate(lines) if line.search is None], lines))
        for line in lines:
            line.seconds += (time.monotonic() - started) / len(lines)
        stay: list[tuple[int, Line]] = []
        searched: set[int] = set()
        for i, line in enumerate(lines):
            if line.search is None:
                token, logprob = next(drawn)
                line.answer.append(token)
                line.logprob += logprob
                if not self._ended(line):
                    stay.append((first + i, line))
            elif id(line.search) not in searched:
                searched.add(id(line.search))
                mine = [k for k, other in enumerate(lines) if other.search is line.search]
                mine.sort(key=lambda k: lines[k].beam)
                grown = self._grow_beams(line, logits[mine], [lines[k] for k in mine])
                stay += [(first + mine[parent], beam) for parent, beam in grown]
        self._settle([*enumerate(self.rows[:first]), *stay])

    def _settle(self, stay: list[tuple[int, Line]]) -> None:
        """Rows (number so far, line) that stay. Each keeps its place where it can: moving keys and values costs time."""
        places: list[tuple[int, Line] | None] = [None] * len(stay)
        movers: list[tuple[int, Line]] = []
        for row, line in stay:
            if row < len(places) and places[row] is None:
                places[row] = (row, line)
            else:
                movers.append((row, line))
        settled = [place or movers.pop() for place in places]
        self.slots.move([row for row, _ in settled])
        self.rows = [line for _, line in settled]

    def _draw(self, logits: Any, where: list[int], lines: list[Line]) -> list[tuple[int, float]]:
        """Token and log-probability (before penalties and temperature) for the lines at `where`."""
        if not where:
            return []
        drawing = [lines[i] for i in where]
        raw = chosen = logits if len(where) == len(lines) else logits[where]
        if any(_penalised(line) for line in drawing):
            chosen = raw.clone()
            for row, line in zip(chosen, drawing, strict=True):
                if _penalised(line):
                    penalise(row, line.request.sampling, line.prompt, line.answer)
        tokens = pick(chosen, [(line.request.sampling, line.random) for line in drawing])
        where_picked = torch.tensor(tokens, device=raw.device).unsqueeze(1)
        logprobs: list[float] = torch.softmax(raw, -1).gather(1, where_picked).squeeze(1).log().tolist()
        self._are_numbers(logprobs)
        return list(zip(tokens, logprobs, strict=True))

    def _are_numbers(self, values: list[float]) -> None:
        if any(value != value for value in values):
            raise EngineError(
                f"{self.name} computes NaN in {self.dtype}: try dtype: float32; or its weights are broken"
            )

    def _grow_beams(self, line: Line, logits: Any, beams: list[Line]) -> Iterator[tuple[int, Line]]:
        """One search one token further: (number of the parent beam, the new beam); answers when it has ended."""
        assert line.search is not None
        steps = line.search.advance(torch.log_softmax(logits, -1))
        for beam, (parent, token) in enumerate(steps):
            grown = Line(line.number, line.prompt, line.request, line.search)
            grown.beam, grown.answer = beam, [*beams[parent].answer, token]
            grown.seconds = sum(one.seconds for one in beams) / len(steps)
            yield parent, grown
        if not steps:
            self._answer_beams(line, sum(one.seconds for one in beams))

    # -- answers -----------------------------------------------------------------------------------------------------

    def _ended(self, line: Line) -> bool:
        sampling = line.request.sampling
        ended = line.answer[-1] in self.ends
        if sampling.stop and not ended:
            text = self._text(line.answer)
            cut = min((at for stop in sampling.stop if (at := text.find(stop)) >= 0), default=-1)
            if cut >= 0:
                self._answer(line, line.seconds, [_choice(text[:cut], "stop", line.logprob, len(line.answer))])
                return True
        if ended or len(line.answer) >= sampling.max_tokens or line.length >= self.context:
            text = self._text(line.answer[:-1] if ended else line.answer)
            finish = "stop" if ended else "length"
            self._answer(line, line.seconds, [_choice(text, finish, line.logprob, len(line.answer))])
            return True
        return False

    def _answer_beams(self, line: Line, seconds: float) -> None:
        assert line.search is not None
        choices = []
        for best in line.search.best(line.search.width):
            tokens = len(best.tokens) + (best.finish == "stop")
            choice = _choice(self._text(best.tokens), best.finish, best.logprob, tokens)
            choices.append(choice | {"score": best.score})
        self._answer(line, seconds, choices)

    def _answer(self, line: Line, seconds: float, choices: list[dict[str, Any]]) -> None:
        usage = {
            "prompt_tokens": len(line.prompt), "completion_tokens": sum(choice["tokens"] for choice in choices),
            "seconds": round(seconds, 4),
        }  # fmt: skip
        self.tell(line.number, {"model": self.name, "choices": choices, "usage": usage})

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def forced(self, messages: Any, completion: str) -> dict[str, float]:
        """Led along an answer and its end token: summed negative log-likelihood (nats), the number of tokens, and how many
        of them are what the model would choose."""
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = [*self.tokenizer.encode(completion, add_special_tokens=False), self.tokenizer.eos_token_id]
        logits, _, _ = self._prefill([[*prompt, *answer]], Beginning([], [], []), last=len(answer) + 1)
        wanted = torch.tensor(answer, device=self.device)
        lost = torch.nn.functional.cross_entropy(logits[0, :-1], wanted, reduction="sum")
        agreed = (logits[0, :-1].argmax(-1) == wanted).sum()
        return {"loss": float(lost), "tokens": len(answer), "agreed": int(agreed)}


def _lay_out_for_cpu(model: Any) -> None:
    """Weights of linear layers column by column: a product with a batch of rows is then up to a third faster. All are
    copied, so that the file they were mapped from can leave memory."""
    head = model.get_output_embeddings()
    for module in model.modules():
        by_columns = isinstance(module, torch.nn.Linear) and module is not head  # the head may be the embedding, too
        for parameter in module.parameters(recurse=False):
            turned = by_columns and parameter.dim() == 2
            parameter.data = parameter.data.t().contiguous().t() if turned else parameter.data.clone()


def _free_bytes(device: Any) -> int:
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _context(config: Any) -> int:
    """Tokens that the model can look back on; a window that slides over the text is not modelled, so it is a limit."""
    limits = [
        getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window", "attention_chunk_size")
    ]
    return min([limit for limit in limits if limit], default=1 << 30)


def _common(texts: Iterable[list[int]]) -> list[int]:
    """What all token lists begin with: the smallest and the largest differ first."""
    low, high = min(texts), max(texts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def _penalised(line: Line) -> bool:
    s = line.request.sampling
    return (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0)


def _choice(text: str, finish: str, logprob: float, tokens: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"message": message, "finish_reason": finish, "logprob": logprob, "tokens": tokens}
