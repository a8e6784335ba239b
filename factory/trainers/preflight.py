"""Before step 1: every row through the student's own tokenizer and template. What would train wrongly in silence is
refused with the fix: a missing end token, a wrong mask, doubled special tokens, cut answers, a template that renders
training unlike inference.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from factory.rows import kind_of

BYTES_TRAINED = 16
"""Of a parameter: its weight, gradient and AdamW's two moments in float32."""


class Refused(Exception):
    """The rows, or the student, would train wrongly; the text says what to do."""


class Tokens(NamedTuple):
    """One text as the student sees it; `in_loss` marks the tokens that it learns."""

    ids: list[int]
    in_loss: list[bool]


def preflight(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows that train, and rows set aside as {id, reason}; raises `Refused`. `max_length` None: as long as they are."""
    if not tokenizer.chat_template:
        raise Refused("the student has no chat template; start from an instruct model, or give args.chat_template_path")
    if tokenizer.eos_token_id is None:
        raise Refused("the student's tokenizer has no end token; set eos_token in its tokenizer_config.json")
    marks = [mark for mark in tokenizer.all_special_tokens if mark]
    kept: list[dict[str, Any]] = []
    aside: list[dict[str, str]] = []
    for row in rows:
        try:
            length = max(len(tokens.ids) for tokens in _looked_at(row, tokenizer))
        except Refused as e:
            raise Refused(f"row {row.get('id', '?')}: {e}") from None
        if max_length is not None and length > max_length:
            aside.append({"id": row["id"], "reason": f"over_length={length}>{max_length}"})
        elif mark := next((m for m in marks if any(m in turn["content"] for turn in row["prompt"])), None):
            # the student would read it as the template's own
            aside.append({"id": row["id"], "reason": f"template_token:{mark}"})
        else:
            kept.append(row)
    if not kept:
        why = Counter(kind_of(one["reason"]) for one in aside)
        if set(why) == {"over_length"}:
            raise Refused(f"all {len(rows)} rows are longer than max_length={max_length} tokens; raise args.max_length")
        raise Refused(f"none of {len(rows)} rows can train: {', '.join(f'{name} {n}' for name, n in why.items())}")
    return kept, aside


def _looked_at(row: dict[str, Any], tokenizer: Any) -> list[Tokens]:
    """The row's answers as tokens, each with its prompt; raises `Refused` for what would train wrongly."""
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    if "prompt" not in row or len(answers) != (2 if "chosen" in row or "rejected" in row else 1):
        raise Refused(
            f"it has the columns {', '.join(row)}, but needs prompt and completion, or prompt, chosen and rejected"
        )
    _talk(row["prompt"], answers)
    if len(answers) == 2:
        if answers[0] == answers[1]:
            raise Refused("chosen and rejected are the same; drop such pairs")
        if row.get("margin", 0.0) < 0:
            raise Refused("its chosen answer has the lower score: chosen and rejected may be swapped")
    seen = [tokenise(row["prompt"], answer, tokenizer, row.get("masked", 0)) for answer in answers]
    for tokens, answer in zip(seen, answers, strict=True):
        _look(tokens, answer, tokenizer)
    return seen


def _talk(prompt: Any, answers: list[Any]) -> None:
    """Whether it is a conversation that an assistant's turn can end."""
    for turns in (prompt, *answers):
        good = isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)
        if not good or not all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content")):
            raise Refused(f"messages must be a list of {{role, content}} with texts, not {str(turns)[:80]!r}")
    if prompt[-1]["role"] == "assistant":
        raise Refused("its prompt ends with an assistant's turn; that turn belongs into the completion")
    if wrong := [turn["role"] for answer in answers for turn in answer if turn["role"] != "assistant"]:
        raise Refused(f"its answer has a turn of the role {wrong[0]!r}; answers are the assistant's")
    if not all("".join(turn["content"] for turn in answer).strip() for answer in answers):
        raise Refused("its answer is empty; filter such rows out")


def tokenise(prompt: list[dict[str, str]], answer: list[dict[str, str]], tokenizer: Any, masked: int = 0) -> Tokens:
    """A conversation as token ids, with the loss on what follows the prompt as it is asked at inference, and on that
    behind the first `masked` characters of the answer."""
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    if not whole.startswith(asked):
        raise Refused(
            "the chat template renders a conversation for training unlike the prompt at inference "
            f"(…{asked[-40:]!r} is not how …{whole[:60]!r} begins); use a template whose answer follows add_generation_prompt"
        )
    said = whole[len(asked) :]
    if masked:
        begin = asked + answer[0]["content"][:masked]
        if not whole.startswith(begin):
            raise Refused(
                "the chat template does not put the answer as it is behind the prompt, so its trace cannot be masked; "
                "use reasoning: drop, or another template"
            )
        asked = begin
    if any(turn["content"].strip() not in said for turn in answer):
        raise Refused(
            "the chat template leaves parts of its answer out (those of reasoning models drop what stands in <think>); "
            "give another one as args.chat_template_path, or shape: {reasoning: drop}"
        )
    head: list[int] = tokenizer(asked, add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer(whole, add_special_tokens=False)["input_ids"]
    # a token may span the border: then the border moves to where both agree
    border = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
    return Tokens(ids, [i >= border for i in range(len(ids))])


def _look(tokens: Tokens, answer: list[dict[str, str]], tokenizer: Any) -> None:
    learned = [token for token, in_loss in zip(tokens.ids, tokens.in_loss, strict=True) if in_loss]
    if not learned:
        raise Refused("nothing of it would be learned (the loss mask is empty)")
    if len(learned) == len(tokens.ids):
        raise Refused("the prompt would be learned too (the loss mask is whole)")
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end not in learned:
        raise Refused(
            f"the end token {tokenizer.eos_token!r} is not in the loss, the student would never learn to stop; "
            "use a chat template that ends the answer with it, or set args.eos_token to the token that does"
        )
    if learned.count(end) > len(answer):
        raise Refused(f"the end token {tokenizer.eos_token!r} stands more than once; remove it from the answers")
    if tokenizer.unk_token_id not in (None, end) and tokenizer.unk_token_id in learned:
        raise Refused(
            "the student's tokenizer has no tokens for parts of its answer; use a student that knows its script"
        )
    if start is not None and tokens.ids[:2] == [start, start]:
        raise Refused(f"the beginning token {tokenizer.bos_token!r} stands twice; remove it from template or text")


def fits(model: Any, tokenizer: Any, args: dict[str, Any]) -> int | None:
    """The longest row in tokens that may train; raises `Refused` for a model or arguments that cannot train as shown."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise Refused(
            f"the tokenizer has {len(tokenizer)} tokens, but the model only {rows}: they do not belong together"
        )
    if args.get("assistant_only_loss") and "{% generation" not in tokenizer.chat_template.replace("{%-", "{%"):
        raise Refused(
            "args.assistant_only_loss needs a chat template with {% generation %} marks; leave it out: the loss is on the "
            "answers alone anyway"
        )
    if args.get("packing") and args.get("packing_strategy", "bfd") != "bfd":
        raise Refused("args.packing_strategy: only bfd keeps rows whole and apart from each other; leave it out")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (args.get("max_length", 1024), context) if limit is not None]
    return min(limits, default=None)


def needed_bytes(model: Any, peft: Any) -> int:
    """Memory for weights, gradients and optimizer; what passes through the layers comes on top."""
    if peft is None:
        return sum(int(parameter.numel()) for parameter in model.parameters()) * BYTES_TRAINED
    frozen = sum(int(parameter.numel() * parameter.element_size()) for parameter in model.parameters())
    trained = sum(int(module.in_features + module.out_features) * int(peft.r) for module in _linear(model))
    return frozen + trained * BYTES_TRAINED


def _linear(model: Any) -> Iterator[Any]:
    head = model.get_output_embeddings()
    return (m for m in model.modules() if type(m).__name__ in ("Linear", "Linear4bit") and m is not head)


def refuse_what_cannot_fit(model: Any, peft: Any) -> None:
    """`Refused` where a single process would run out of memory before its first step."""
    import psutil
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # how several share it is theirs to decide
        return
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    loaded = 0 if torch.cuda.is_available() else sum(p.numel() * p.element_size() for p in model.parameters())
    if (needed := needed_bytes(model, peft)) - loaded > free:
        raise Refused(
            f"weights, gradients and optimizer need {needed / 2**30:.1f} GiB, of which {(loaded + free) / 2**30:.1f} are "
            "there; train with `lora: {}` (`load_in_4bit: true` in it takes least), or a smaller student"
        )


def mend_padding(tokenizer: Any, model: Any) -> list[str]:
    """A pad token that is the end token hides the end from the loss and ends every batched answer: use another one."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return []
    was = "missing" if tokenizer.pad_token_id is None else "the end token"
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token, tokenizer.bos_token}
    spare = next(
        (
            t
            for t in ("<|endoftext|>", "<pad>", "[PAD]", "<unk>", tokenizer.unk_token)
            if t in vocabulary and t not in ends
        ),
        None,
    )
    if spare is None:
        spare = "<|pad|>"
        tokenizer.add_special_tokens({"pad_token": spare})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    tokenizer.pad_token = spare
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return [f"the pad token was {was}; it is {spare!r} now"]


def preview(rows: list[dict[str, Any]], tokenizer: Any, count: int = 3) -> list[list[list[Any]]]:
    """The first rows as [token, in the loss: 0 or 1], for people."""
    shown = []
    for row in rows[:count]:
        tokens = tokenise(row["prompt"], row.get("completion") or row["chosen"], tokenizer, row.get("masked", 0))
        texts = tokenizer.convert_ids_to_tokens(tokens.ids)
        shown.append([[text, int(in_loss)] for text, in_loss in zip(texts, tokens.in_loss, strict=True)])
    return shown
