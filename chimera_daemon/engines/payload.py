"""The payload of our own text form as engines read it: a chat body as JSON, decoded strictly.

A field that no engine would honour is refused instead of ignored, so that nobody samples with
settings other than those asked for.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from chimera_daemon.messages import Completion, Delta, Streamed


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of the conversation."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | tuple[TextPart, ...]

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What a client asks of the model. None leaves a setting to the engine's default."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1)]
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: str | Annotated[tuple[str, ...], Meta(max_length=16)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    ignore_eos: bool = False
    # The header of the stage decides these; accepted here so that an OpenAI body passes as it is.
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    user: str | None = None
    n: Literal[1] = 1

    @property
    def stops(self) -> list[str]:
        """Strings that end the output."""
        stop = self.stop
        if stop is None:
            return []
        return [s for s in ((stop,) if isinstance(stop, str) else stop) if s]


class PayloadError(ValueError):
    """The payload cannot be used; the message names the field."""


_decode = msgspec.json.Decoder(ChatBody).decode
_encode = msgspec.json.Encoder().encode


def decode_body(payload: bytes) -> ChatBody:
    """Decode and validate; raises `PayloadError`."""
    try:
        return _decode(payload)
    except msgspec.DecodeError as error:  # ValidationError included: its message has the path
        raise PayloadError(f"payload is not a usable JSON chat body: {error}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise PayloadError(f"payload is not JSON in UTF-8: {error}") from error


def encode_delta(text: str) -> bytes:
    """Payload of a chunk."""
    return _encode(Delta(text))


def encode_completion(text: str) -> bytes:
    """Payload of an answer."""
    return _encode(Completion(text))


def encode_streamed(chunks: int) -> bytes:
    """Payload of the answer to a stream in one of OpenAI's forms."""
    return _encode(Streamed(chunks))
