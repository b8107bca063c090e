"""Bodies that HTTP clients send, and what the gateway reads of them.

A body to be generated from goes to the engine as it came: of its fields only those are decoded that
decide where and when it runs. Our own extension, ``chimera``, is read strictly and taken out.
"""

import re
from typing import Any

import msgspec
from msgspec import Struct

from chimera_daemon.gateway.errors import HttpError
from chimera_daemon.gateway.identity import Sections
from chimera_daemon.messages import (
    NO_LIMIT,
    Hints,
    Label,
    Probability,
    StageNumber,
    Tries,
)

_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")


class Extension(Struct, frozen=True, forbid_unknown_fields=True):
    """``chimera`` in a body: what OpenAI's API has no field for."""

    workflow_id: str | None = None
    kind: Label | None = None
    stage: StageNumber | None = None
    hints: Hints | None = None
    tries: Tries | None = None
    optional: bool = False
    confidence: dict[str, Probability] | None = None  # per model; the same as in `hints`


class Body(Struct, frozen=True):
    """The fields of a chat or completions body that the gateway reads."""

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    program_id: Any = None
    agent_hint: Any = None
    nvext: Any = None
    vllm_xargs: Any = None
    chimera: Extension | None = None

    @property
    def sections(self) -> Sections:
        """Where others put ids."""
        return Sections(self.program_id, self.agent_hint, self.nvext, self.vllm_xargs)

    @property
    def wanted_model(self) -> str | None:
        """The model that the client insists on; None leaves the choice to Chimera."""
        return None if self.model in (None, "", "auto") else self.model

    @property
    def most_tokens(self) -> int:
        """Bound on the output tokens of all choices, for the scheduler; the engine checks them."""
        each = self.max_completion_tokens or self.max_tokens
        if each is None:
            return NO_LIMIT
        return max(1, min(each * max(self.n or 1, 1), NO_LIMIT))

    @property
    def hints(self) -> Hints | None:
        """What the client says about the stage."""
        extension = self.chimera
        if extension is None or extension.confidence is None:
            return extension.hints if extension else None
        return msgspec.structs.replace(extension.hints or Hints(), confidence=extension.confidence)


class Outcome(Struct, frozen=True, forbid_unknown_fields=True):
    """How a workflow ended; null if nobody knows."""

    success: bool | Probability | None


class Verdict(Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the answer of a stage was right."""

    stage: StageNumber
    verdict: bool | Probability


_decode_body = msgspec.json.Decoder(Body).decode
_decode_outcome = msgspec.json.Decoder(Outcome).decode
_decode_verdict = msgspec.json.Decoder(Verdict).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def read_body(payload: bytes) -> tuple[Body, bytes]:
    """A body and what goes to the engine. Raises `HttpError` that names the field at fault."""
    body = _read(_decode_body, payload)
    if body.chimera is not None:
        members = _decode_members(payload)
        del members["chimera"]
        payload = _encode(members)
    return body, payload


def read_outcome(payload: bytes) -> float | None:
    """How a workflow ended, from 0 to 1. Raises `HttpError`."""
    success = _read(_decode_outcome, payload).success
    return None if success is None else float(success)


def read_verdict(payload: bytes) -> tuple[int, float]:
    """A stage and its verdict, from 0 to 1. Raises `HttpError`."""
    verdict = _read(_decode_verdict, payload)
    return verdict.stage, float(verdict.verdict)


def read_stage(text: str) -> int:
    """A stage's number in a header. Raises `HttpError`."""
    # `int` would take signs, underscores and other scripts' digits as well.
    if re.fullmatch(r"[0-9]{1,6}", text) and int(text) <= 100_000:
        return int(text)
    raise HttpError(
        400,
        "the header x-chimera-stage must be a number from 0 to 100000",
        code="bad_request",
        param="x-chimera-stage",
        retryable=False,
    )


def read_kind(text: str) -> str:
    """A workflow's kind in a header. Raises `HttpError`."""
    if len(text) <= 64 and text.isprintable():
        return text
    raise HttpError(
        400,
        "the header x-chimera-kind must be at most 64 printable characters",
        code="bad_request",
        param="x-chimera-kind",
        retryable=False,
    )


def _read(decode: Any, payload: bytes) -> Any:
    """Decode, with all that can be wrong about the bytes told as an `HttpError`."""
    try:
        # Strings that nobody reads are skipped by the decoder without a look at their characters.
        if not payload.isascii():
            payload.decode()
        return decode(payload)
    except UnicodeDecodeError as error:
        raise _refusal(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise _refusal("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        message = str(error)
        path = _PATH.search(message)
        param = path.group(1) if path else None
        if path:
            message = f"`{param}`: {message[: path.start()]}"
        elif "required field" in message or "unknown field" in message:
            param = message.rpartition("field ")[2].strip("`")
        raise _refusal(message, param) from None
    except msgspec.DecodeError as error:
        raise _refusal(f"the body is not JSON: {error}") from None


def _refusal(message: str, param: str | None = None) -> HttpError:
    return HttpError(400, message, code="bad_request", param=param, retryable=False)
