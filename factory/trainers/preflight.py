"""Before step 1: every row through the student's own tokenizer and template. What would train wrongly in silence is
refused with the fix: a missing end token, a wrong mask, doubled special tokens, cut answers, a template that renders
training unlike inference.
"""

from typing import Any, NamedTuple


class Refused(Exception):
    """The rows, or the student, would train wrongly; the text says what to do."""


class Tokens(NamedTuple):
    """One text as the student sees it; `in_loss` marks the tokens that it learns."""

    ids: list[int]
    in_loss: list[bool]


def preflight(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows that train, and rows set aside as {id, reason}; raises `Refused`."""
    if not tokenizer.chat_template:
        raise Refused("the student has no chat template; start from an instruct model, or give args.chat_template_path")
    if tokenizer.eos_token_id is None:
        raise Refused("the student's tokenizer has no end token; set eos_token in its tokenizer_config.json")
    kept: list[dict[str, Any]] = []
    aside: list[dict[str, str]] = []
    for row in rows:
        try:
            length = max(len(tokens.ids) for tokens in _looked_at(row, tokenizer))
        except Refused as e:
            raise Refused(f"row {row['id']}: {e}") from None
        if max_length is not None and length > max_length:
            aside.append({"id": row["id"], "reason": f"over_length={length}>{max_length}"})
        else:
            kept.append(row)
    if not kept:
        raise Refused(f"all {len(rows)} rows are longer than max_length={max_length} tokens; raise args.max_length")
    return kept, aside


def _looked_at(row: dict[str, Any], tokenizer: Any) -> list[Tokens]:
    """The row's answers as tokens, each with its prompt; raises `Refused` for what would train wrongly."""
    if "chosen" in row and row["chosen"] == row["rejected"]:
        raise Refused("chosen and rejected are the same; drop such pairs")
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    if any(not "".join(message["content"] for message in answer).strip() for answer in answers):
        raise Refused("its answer is empty; filter such rows out")
    seen = [tokenise(row["prompt"], answer, tokenizer, row.get("masked", 0)) for answer in answers]
    for tokens, answer in zip(seen, answers, strict=True):
        _look(tokens, len(answer), tokenizer)
    return seen


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
    if masked:
        begin = asked + answer[0]["content"][:masked]
        if not whole.startswith(begin):
            raise Refused(
                "the chat template does not put the answer as it is behind the prompt, so its trace cannot be masked; "
                "use reasoning: drop, or another template"
            )
        asked = begin
    head: list[int] = tokenizer(asked, add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer(whole, add_special_tokens=False)["input_ids"]
    # a token may span the border: then the border moves to where both agree
    border = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
    return Tokens(ids, [i >= border for i in range(len(ids))])


def _look(tokens: Tokens, turns: int, tokenizer: Any) -> None:
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
    if learned.count(end) > turns:
        raise Refused(f"the end token {tokenizer.eos_token!r} stands more than once; remove it from the answers")
    if start is not None and tokens.ids[:2] == [start, start]:
        raise Refused(f"the beginning token {tokenizer.bos_token!r} stands twice; remove it from template or text")


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
