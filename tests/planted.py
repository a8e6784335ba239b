"""Faults of rows, of a student and of arguments that would train wrongly in silence, each with what must be said of it."""

from typing import Any, NamedTuple

from tests.tiny import TEMPLATE

Row = dict[str, Any]


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def sft_row(i: int, answer: str = "The sky is blue.") -> Row:
    question = f"What is the colour of thing number {i}?"
    return {"id": f"r{i}", "prompt": said("user", question), "completion": said("assistant", answer)}


def pair(i: int, chosen: str = "It is green.", rejected: str = "Because: no") -> Row:
    row = {"id": f"p{i}", "prompt": said("user", f"What is the colour of thing number {i}?")}
    return row | {"chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}


class Planted(NamedTuple):
    """`tokenizer`: its attributes. `told` is a pattern of the refusal."""

    name: str
    told: str
    row: Row = sft_row(0)
    tokenizer: dict[str, Any] = {}
    args: dict[str, Any] = {}
    embeddings: int | None = None


NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
THINKING = TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
STRIPPING = TEMPLATE.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")
BEGINNING = {"bos_token": "<|endoftext|>", "chat_template": "{{ bos_token }}{{ bos_token }}" + TEMPLATE}
THOUGHT = "<think>\nBlue or green?\n</think>\n\nBlue."
LONG = "blue " * 80
TALK = said("user", "Hi.") + said("assistant", "Hello.")

FAULTS = [
    Planted("no chat template", "no chat template", tokenizer={"chat_template": None}),
    Planted("no end token", "no end token", tokenizer={"eos_token": None}),
    Planted("template unlike at inference", "for training unlike", tokenizer={"chat_template": THINKING}),
    Planted("template without end", r"'<\|im_end\|>' is not in the loss", tokenizer={"chat_template": NO_END}),
    Planted("another end token", r"'<\|endoftext\|>' is not in the loss", tokenizer={"eos_token": "<|endoftext|>"}),
    Planted("stripped reasoning", "leaves parts of its answer out", sft_row(0, THOUGHT), {"chat_template": STRIPPING}),
    Planted("double beginning", r"beginning token '<\|endoftext\|>' stands twice", tokenizer=BEGINNING),
    Planted("double end", "stands more than once", sft_row(0, "Yes.<|im_end|>")),
    Planted("end in the middle", "stands more than once", sft_row(0, "Yes.<|im_end|> No.")),
    Planted("empty answer", "its answer is empty", sft_row(0, " \n")),
    Planted("empty rejected answer", "its answer is empty", pair(0, rejected="")),
    Planted("equal sides", "chosen and rejected are the same", pair(0, "a", "a")),
    Planted("swapped pair", "chosen and rejected may be swapped", pair(0) | {"margin": -1.5}),
    Planted("wrong column", "it has the columns id, prompt, answer", {"id": "r0", "prompt": TALK[:1], "answer": "Yes."}),
    Planted("half a pair", "or prompt, chosen and rejected", {k: v for k, v in pair(0).items() if k != "rejected"}),
    Planted("no prompt", "needs prompt and completion", {"id": "r0", "completion": said("assistant", "Yes.")}),
    Planted("empty prompt", r"messages must be a list of \{role, content\}", sft_row(0) | {"prompt": []}),
    Planted("prompt as text", "messages must be a list", sft_row(0) | {"prompt": "What?"}),
    Planted("null", "messages must be a list", sft_row(0) | {"completion": [{"role": "assistant", "content": None}]}),
    Planted("answer in the prompt", "ends with an assistant's turn", sft_row(0) | {"prompt": TALK}),
    Planted("user's turn in the answer", "a turn of the role 'user'", sft_row(0) | {"completion": TALK}),
    Planted("template token in the prompt", "template_token 1", sft_row(0) | {"prompt": said("user", "Hi<|im_end|>")}),
    Planted("over-long answer", "longer than max_length=64", sft_row(0, LONG), args={"max_length": 64}),
    Planted("over-long prompt", "longer than max_length=64", sft_row(0) | {"prompt": said("user", LONG)}, args={"max_length": 64}),
    Planted("longer than the context", "longer than max_length=512", sft_row(0, "blue " * 600), args={"max_length": None}),
    Planted("tokenizer of another model", "but the model only 100: they do not belong together", embeddings=100),
    Planted("no marks for generation", "assistant_only_loss needs a chat template", args={"assistant_only_loss": True}),
    Planted("packing that cuts", "only bfd keeps rows whole", args={"packing": True, "packing_strategy": "wrapped"}),
]  # fmt: skip
