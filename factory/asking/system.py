"""How a system message is added to a prompt that may have one of its own."""

from factory.rows import Message


def with_system(text: str, messages: list[Message], turns: list[Message] | None = None) -> list[Message]:
    """`messages` with `text` as system message and `turns` after it; blank text adds nothing.

    A system message of the prompt's own stays: ours comes first, then a blank line, then the prompt's.
    """
    own = messages[:1] if messages and messages[0]["role"] == "system" else []
    parts = [part for part in (text.strip(), *(message["content"] for message in own)) if part]
    system = [Message(role="system", content="\n\n".join(parts))] if parts else []
    return [*system, *(turns or []), *messages[len(own) :]]
