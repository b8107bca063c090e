"""Of an agent's messages, which text counts, and what is kept of a long one.

It keeps its head and its tail, the middle goes, by bytes: 10 MB cost no more than 10 kB. Needs the
standard library only, so that the daemon records traces without any extra. Knows no tokens.
"""

from collections.abc import Sequence

INSTRUCTION_ROLES = frozenset({"system", "developer"})


def cut(text: str | bytes, max_bytes: int) -> str:
    """The first and the last half of `text`, joined by a newline, where it is over `max_bytes`.

    Bytes are read as UTF-8. What is not valid in it is replaced: a lone surrogate by "?", a wrong
    byte by U+FFFD. The result has at most `max_bytes` bytes if nothing was, and no character of it
    is split. Time does not depend on the length of a text that is cut. ValueError: `max_bytes` < 1.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes is at least 1, not {max_bytes}")
    if len(text) > 2 * max_bytes:  # no more of it can be kept, and all else costs time
        text = _ends(text, max_bytes)
    data = text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")
    if len(data) <= max_bytes:
        return data.decode("utf-8", errors="replace")
    tail = (max_bytes - 1) // 2
    head = max_bytes - 1 - tail
    start, end = _character_start(data, len(data) - tail), _character_end(data, head)
    return (data[:end] + b"\n" + data[start:]).decode("utf-8", errors="replace")


def _ends(text: str | bytes, size: int) -> str | bytes:
    if isinstance(text, bytes):
        return text[:size] + text[-size:]
    return text[:size] + text[-size:]


def _is_continuation(data: bytes, at: int) -> bool:
    return at < len(data) and data[at] & 0xC0 == 0x80


def _character_start(data: bytes, at: int) -> int:
    """The next place from `at` where a character begins; `at` itself if the text is no UTF-8."""
    return next((i for i in range(at, at + 4) if not _is_continuation(data, i)), at)


def _character_end(data: bytes, at: int) -> int:
    """The last place up to `at` where a character begins; `at` itself if the text is no UTF-8."""
    return next((i for i in range(at, max(at - 4, -1), -1) if not _is_continuation(data, i)), at)


def new_text(messages: Sequence[tuple[str, str]]) -> str:
    """What this stage adds to its workflow, of OpenAI-style messages as (role, text) in order.

    That is what comes after the last assistant message, instructions (system, developer) and empty
    messages apart, joined by newlines. If nothing is left, the last message that is not empty; ""
    where all are.
    """
    answered = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    since = messages[answered[-1] + 1 :] if answered else messages
    added = [text for role, text in since if text and role not in INSTRUCTION_ROLES]
    if added:
        return "\n".join(added)
    return next((text for _, text in reversed(messages) if text), "")
