"""Keys and values of a batch whose rows begin alike, and the attention that reads them.

What all rows begin with (the system message, worked examples) is stored once and read once for all rows. What follows is
each row's own: written in place, left-aligned; a row that leaves is replaced by the last one.
"""

from typing import Any, NamedTuple

import torch

MORE_COLUMNS = 64
"""Columns by which the rows' own part grows at least."""


class Halves(NamedTuple):
    """Keys or values of one layer: `shared` (kv heads x columns x size, or None), `own` (rows x kv heads x columns x size)."""

    shared: Any
    own: Any

    def whole(self) -> Any:
        """Both as one tensor, rows x kv heads x columns x size."""
        if self.shared is None:
            return self.own
        return torch.cat([self.shared.unsqueeze(0).expand(self.own.shape[0], -1, -1, -1), self.own], 2)


def attend(
    module: Any, query: Any, key: Halves, value: Halves, mask: Any, scaling: float | None = None, **more: Any
) -> tuple[Any, None]:
    """Attention of `query` (rows x heads x tokens x size) with grouped heads, in the form that transformers calls.

    In a prefill, `mask` says True where a token may look, over shared and own columns. In a step of the batch, one token
    per row, it is added to the scores of the own columns. What some architectures ask for beyond that is refused.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]:
        raise NotImplementedError(f"attention with {unknown[0]}")
    if mask.dtype != torch.bool and key.shared is not None:
        return _attend_apart(query, key, value, mask, scaling), None
    rows, heads, length, size = query.shape
    keys, values = key.whole(), value.whole()
    kv_heads = keys.shape[1]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if length == 1:  # grouped heads in the place of a sequence: keys and values need not be copied once per query head
        query = query.reshape(rows, kv_heads, heads // kv_heads, size)
        out = sdpa(query, keys, values, attn_mask=mask, scale=scaling).reshape(rows, 1, heads, size)
    else:
        out = sdpa(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=heads != kv_heads).transpose(1, 2)
    return out.contiguous(), None


def _attend_apart(query: Any, key: Halves, value: Halves, mask: Any, scaling: float | None) -> Any:
    """One token per row: shared columns with the rows in the place of a sequence, so that they are read once for all."""
    rows, heads, _, size = query.shape
    kv_heads, shared, _ = key.shared.shape
    query = query.reshape(rows, kv_heads, heads // kv_heads, size) * (size**-0.5 if scaling is None else scaling)
    folded = query.transpose(0, 1).reshape(kv_heads, -1, size)
    alike = (folded @ key.shared.transpose(1, 2)).view(kv_heads, rows, -1, shared).transpose(0, 1)
    scores = torch.cat([alike, query @ key.own.transpose(2, 3) + mask], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    folded = weights[..., :shared].transpose(0, 1).reshape(kv_heads, -1, shared)
    out = (folded @ value.shared).view(kv_heads, rows, -1, size).transpose(0, 1) + weights[..., shared:] @ value.own
    return out.reshape(rows, 1, heads, size)


class Beginning:
    """Tokens that all rows of a batch begin with, and their keys and values by layer (kv heads x columns x size)."""

    def __init__(self, tokens: list[int], keys: list[Any], values: list[Any]) -> None:
        self.tokens, self.keys, self.values = tokens, keys, values

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> "Beginning":
        """Its first `length` tokens."""
        if length == 0:
            return Beginning([], [], [])
        return Beginning(self.tokens[:length], [k[:, :length] for k in self.keys], [v[:, :length] for v in self.values])

    def layer(self, number: int) -> tuple[Any, Any]:
        return (self.keys[number], self.values[number]) if self.tokens else (None, None)


class Prefill:
    """The cache of one forward over whole prompts: keeps each layer's new keys and values as they come."""

    is_compileable = False

    def __init__(self, beginning: Beginning) -> None:
        self.beginning = beginning
        self.keys: list[Any] = []
        self.values: list[Any] = []

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[Halves, Halves]:
        self.keys.append(key)
        self.values.append(value)
        shared_key, shared_value = self.beginning.layer(layer)
        return Halves(shared_key, key), Halves(shared_value, value)

    def get_seq_length(self, layer: int = 0) -> int:
        return len(self.beginning)

    @property
    def bytes_per_column(self) -> int:
        """What one token of one row takes, over all layers."""
        return sum(side.shape[1] * side.shape[3] * side.element_size() for side in (*self.keys, *self.values))

    def longer(self, tokens: list[int]) -> Beginning:
        """The beginning that this forward has made longer: one row, without padding."""
        sides = []
        for layer in range(len(self.keys)):
            shared = self.beginning.layer(layer)
            new = (self.keys[layer][0], self.values[layer][0])
            sides.append([n if s is None else torch.cat([s, n], 1) for s, n in zip(shared, new, strict=True)])
        return Beginning(tokens, [key for key, _ in sides], [value for _, value in sides])


class Slots:
    """The cache of the batch: row i has its own columns 0 to `filled[i]`; a step writes one column of each row."""

    is_compileable = False

    def __init__(self) -> None:
        self.beginning = Beginning([], [], [])
        self.keys: list[Any] = []
        self.values: list[Any] = []
        self._rows: Any = None
        self._filled: Any = None
        self._width = 0

    def before_step(self, filled: list[int], like: Any) -> Any:
        """Make room for one more column of each row; returns the mask to add to scores (rows x 1 x 1 x columns)."""
        self._width = max(filled) + 1
        self._reserve(len(filled), self._width)
        self._rows = torch.arange(len(filled), device=like.device)
        self._filled = torch.tensor(filled, device=like.device)
        hidden = torch.arange(self._width, device=like.device) > self._filled.unsqueeze(1)
        return like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None, :]

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[Halves, Halves]:
        self.keys[layer][self._rows, :, self._filled] = key[:, :, 0]
        self.values[layer][self._rows, :, self._filled] = value[:, :, 0]
        count = len(self._rows)
        shared_key, shared_value = self.beginning.layer(layer)
        return (
            Halves(shared_key, self.keys[layer][:count, :, : self._width]),
            Halves(shared_value, self.values[layer][:count, :, : self._width]),
        )

    def get_seq_length(self, layer: int = 0) -> int:
        return len(self.beginning) + self._width - 1

    def join(self, first: int, fresh: Prefill, source: list[int], pads: list[int]) -> None:
        """Rows from `first` on: row `first + i` is row `source[i]` of a prefill, without its left padding."""
        columns = fresh.keys[0].shape[2]
        if not self.keys:
            self.keys = [key.new_zeros(0, key.shape[1], 0, key.shape[3]) for key in fresh.keys]
            self.values = [value.new_zeros(0, value.shape[1], 0, value.shape[3]) for value in fresh.values]
        self._reserve(first + len(source), columns)
        device = fresh.keys[0].device
        rows = torch.tensor(source, device=device)
        shift = torch.tensor([pads[i] for i in source], device=device)
        where = (torch.arange(columns, device=device) + shift.unsqueeze(1)).clamp_(max=columns - 1)
        for side, new in ((self.keys, fresh.keys), (self.values, fresh.values)):
            for layer, tensor in enumerate(new):
                moved = tensor[rows.unsqueeze(1), :, where].transpose(1, 2)
                side[layer][first : first + len(source), :, :columns] = moved

    def move(self, taken: list[int]) -> None:
        """Row i becomes what row `taken[i]` was; a row may be taken twice. Costs only what really moves."""
        moved = [(to, row) for to, row in enumerate(taken) if to != row]
        if not moved:
            return
        self._reserve(len(taken), 0)
        to, row = (list(numbers) for numbers in zip(*moved, strict=True))
        for side in (self.keys, self.values):
            for tensor in side:
                tensor[to] = tensor[row]

    def begin_shorter(self, length: int, rows: int) -> None:
        """Rows that begin alike for only `length` tokens: the rest of the beginning becomes each row's own."""
        rest = len(self.beginning) - length
        columns = self.keys[0].shape[2] if self.keys else 0
        for side, shared in ((self.keys, self.beginning.keys), (self.values, self.beginning.values)):
            for layer, own in enumerate(side):
                wider = own.new_zeros(own.shape[0], own.shape[1], rest + columns, own.shape[3])
                wider[:rows, :, :rest] = shared[layer][:, length:]
                wider[:rows, :, rest:] = own[:rows]
                side[layer] = wider
        self.beginning = self.beginning.cut(length)

    def _reserve(self, rows: int, columns: int) -> None:
        if not self.keys or (self.keys[0].shape[0] >= rows and self.keys[0].shape[2] >= columns):
            return
        have_rows, _, have, _ = self.keys[0].shape
        rows = max(rows, have_rows)
        columns = have if columns <= have else max(columns, have + max(have // 4, MORE_COLUMNS))
        for side in (self.keys, self.values):
            for layer, own in enumerate(side):
                wider = own.new_zeros(rows, own.shape[1], columns, own.shape[3])
                wider[:have_rows, :, :have] = own
                side[layer] = wider
