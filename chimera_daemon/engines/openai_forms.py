"""What is said to an OpenAI-compatible server and what it says: bodies, answers, streams of events.

Bytes in, bytes out: knows no connection, no clock and no host. What a server sends is believed as
little as what a client sends: all of it is decoded, bounded and refused with a reason.
"""

from email.utils import parsedate_to_datetime
from math import isnan
from typing import Any, cast

import msgspec
from msgspec import Raw, Struct

from chimera_daemon.engines.payload import (
    ChatBody,
    PayloadError,
    decode_body,
    encode_completion,
    encode_delta,
)
from chimera_daemon.messages import ErrorCode, Run, Streamed, Usage

CHARACTERS_PER_TOKEN = 4  # where the server does not say how many tokens there were
MAX_ANSWER_BYTES = 64 << 20
_MAX_TOKENS = 10_000_000  # as `messages.Tokens`
_MAX_REASON = 64  # as `messages.Label`
_MAX_WORDS = 500  # characters of the server's own words in an error message

_SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "seed"),
    *("presence_penalty", "frequency_penalty", "user"),
)
# Ours alone: a hint to Chimera, and an order that the scheduler has given already.
_NOT_PASSED_ON = ("chimera", "priority")
_RETRYABLE_STATUS = (408, 425, 429)
_BUSY_STATUS = (429, 503)  # the server wants a pause
_PAUSE_S = 1.0  # where it does not say how long
_LONGEST_PAUSE_S = 3600.0
_NULL = Raw(b"null")


class RemoteError(Exception):
    """An attempt ends without an answer, for this reason."""

    def __init__(
        self, code: ErrorCode, message: str, retryable: bool, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class Target(Struct, frozen=True):
    """How bodies are addressed."""

    model: str  # in Chimera
    remote_model: str
    context_tokens: int
    limit_field: str  # name of the output limit in a chat body
    priority: bool  # the server takes one


class Request(Struct, frozen=True):
    """What to post below the base URL, and who reads the answer."""

    path: str
    body: bytes
    answer: "Answer"


# Bodies.

_encode = msgspec.json.Encoder().encode
_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode


def translate(run: Run, payload: bytes, target: Target) -> Request:
    """The request for an attempt; raises `PayloadError`."""
    if run.api == "text":
        return _translate_text(run, payload, target)
    return _translate_openai(run, payload, target)


def _translate_text(run: Run, payload: bytes, target: Target) -> Request:
    body = decode_body(payload)
    fields = _text_fields(body)
    if run.max_tokens < target.context_tokens:  # else: as many as fit
        fields[target.limit_field] = run.max_tokens
    if run.stream:
        fields["stream_options"] = {"include_usage": True}
    _address(fields, run, target)
    characters = sum(len(message.text) for message in body.messages)
    return Request("/chat/completions", _encode(fields), TextAnswer(characters))


def _text_fields(body: ChatBody) -> dict[str, Any]:
    given = {name: getattr(body, name) for name in _SAMPLING_FIELDS}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    fields["messages"] = [{"role": m.role, "content": m.text} for m in body.messages]
    if body.stops:
        fields["stop"] = body.stops
    if body.ignore_eos:
        fields["ignore_eos"] = True
    return fields


def _translate_openai(run: Run, payload: bytes, target: Target) -> Request:
    """Everything but the fields that address it is passed on as it is written."""
    try:
        payload.decode()  # below it is skipped over unread
        fields: dict[str, Any] = dict(_decode_fields(payload))
        asked = _ask_for_usage(fields) if run.stream else True
        choices = _number(fields.get("n", _NULL))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PayloadError(f"payload is not a JSON object in UTF-8: {error}") from error
    for name in _NOT_PASSED_ON:
        fields.pop(name, None)
    if "stream" in fields and not run.stream:
        fields["stream"] = False
    _address(fields, run, target)
    path = "/chat/completions" if run.api == "chat" else "/completions"
    answer = OpenAIAnswer(len(payload), target.model, keep_usage=asked, choices=choices)
    return Request(path, _encode(fields), answer)


def _ask_for_usage(fields: dict[str, Any]) -> bool:
    """Returns whether the client wants it too."""
    options: Any = msgspec.json.decode(fields.get("stream_options", _NULL))
    if options is None:
        options = {}
    if not isinstance(options, dict):
        return True  # left to the server, which refuses it
    known = cast("dict[str, Any]", options)
    fields["stream_options"] = known | {"include_usage": True}
    return bool(known.get("include_usage"))


def _number(raw: Raw) -> int:
    value: Any = msgspec.json.decode(raw)
    return value if isinstance(value, int) else 1


def _address(fields: dict[str, Any], run: Run, target: Target) -> None:
    fields["model"] = target.remote_model
    if run.stream:
        fields["stream"] = True
    if target.priority:
        fields["priority"] = run.priority


# Answers.


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Words(Struct):
    """A message, or what a chunk adds to one."""

    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None
    function_call: Any = None
    refusal: Any = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else ""

    @property
    def empty(self) -> bool:
        return not (
            self.content
            or self.tool_calls
            or self.reasoning_content
            or self.reasoning
            or self.function_call
            or self.refusal
        )


class _Choice(Struct):
    index: int = 0
    text: str | None = None
    delta: _Words | None = None
    message: _Words | None = None
    finish_reason: str | None = None


class _Reply(Struct):
    """A response or a chunk; what is not needed here is skipped."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_reply = msgspec.json.Decoder(_Reply).decode


def _read(data: bytes) -> _Reply:
    try:
        reply = _decode_reply(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteError(
            "engine_error", f"the remote's answer is garbage: {error}", True
        ) from None
    if reply.error is not None:
        raise _error_within(reply.error)
    return reply


class Answer:
    """Reads what the server says to one attempt and makes of it what the client gets.

    ``sent`` is the offset of the next chunk, ``tokens`` counts chunks with output in them.
    """

    def __init__(self, prompt_characters: int, choices: int = 1) -> None:
        self.sent: int = 0
        self.tokens: int = 0
        self._prompt_characters = prompt_characters
        self._output_characters = 0
        self._wanted = choices
        self._seen: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._usage: _Usage | None = None

    def read_chunk(self, data: bytes) -> bytes | None:
        """Payload of the chunk to relay, if this event is one; raises `RemoteError`."""
        reply = _read(data)
        if reply.usage is not None:
            self._usage = reply.usage
        said = False
        for choice in reply.choices:
            words = choice.delta
            said = said or bool(choice.text) or (words is not None and not words.empty)
            self._note(choice)
        self.tokens += said
        return self._relay(reply, data)

    def end_of_stream(self, *, done: bool) -> bytes:
        """Payload of the answer; raises `RemoteError` if something is missing.

        ``done``: the server has said that this is the end.
        """
        ended = len(self._reasons) >= self._wanted and self._reasons.keys() >= self._seen
        if not self._seen or not (done or ended):
            raise RemoteError("engine_error", "the remote's stream ended before its answer", True)
        return self._stream_payload()

    def read_whole(self, data: bytes) -> bytes:
        """Payload of the answer that came in one piece; raises `RemoteError`."""
        reply = _read(data)
        if not reply.choices:
            raise RemoteError("engine_error", "the remote's answer holds no choices", True)
        self._usage = reply.usage
        for choice in reply.choices:
            self._note(choice)
        return self._whole_payload(reply, data)

    @property
    def finish_reason(self) -> str:
        """Of the first choice."""
        return self._reasons.get(min(self._reasons, default=0), "stop")[:_MAX_REASON]

    @property
    def usage(self) -> Usage:
        """As the server says, else estimated."""
        said = self._usage or _Usage()
        prompt, output = said.prompt_tokens, said.completion_tokens
        if prompt is None:
            prompt = self._prompt_characters // CHARACTERS_PER_TOKEN
        if output is None:
            output = max(self.tokens, self._output_characters // CHARACTERS_PER_TOKEN)
        return Usage(min(max(prompt, 0), _MAX_TOKENS), min(max(output, 0), _MAX_TOKENS))

    def _note(self, choice: _Choice) -> None:
        self._seen.add(choice.index)
        if choice.finish_reason is not None:
            self._reasons[choice.index] = choice.finish_reason
        words = choice.delta or choice.message
        self._output_characters += len(choice.text or (words.text if words else ""))

    def _relay(self, reply: _Reply, data: bytes) -> bytes | None:
        raise NotImplementedError

    def _stream_payload(self) -> bytes:
        raise NotImplementedError

    def _whole_payload(self, reply: _Reply, data: bytes) -> bytes:
        raise NotImplementedError


class TextAnswer(Answer):
    """In our own form: text and nothing else."""

    def __init__(self, prompt_characters: int) -> None:
        super().__init__(prompt_characters)
        self._parts: list[str] = []

    def _relay(self, reply: _Reply, data: bytes) -> bytes | None:
        text = "".join([c.delta.text for c in reply.choices if c.index == 0 and c.delta])
        if not text:
            return None
        self._parts.append(text)
        self.sent += len(text)
        if self.sent > MAX_ANSWER_BYTES:
            raise too_large()
        return encode_delta(text)

    def _stream_payload(self) -> bytes:
        return encode_completion("".join(self._parts))

    def _whole_payload(self, reply: _Reply, data: bytes) -> bytes:
        message = reply.choices[0].message
        return encode_completion(message.text if message else "")


class OpenAIAnswer(Answer):
    """In OpenAI's forms: as the server says it, under the model's name in Chimera."""

    def __init__(
        self, prompt_characters: int, model: str, *, keep_usage: bool, choices: int
    ) -> None:
        super().__init__(prompt_characters, choices)
        self._model = Raw(_encode(model))
        self._keep_usage = keep_usage

    def _relay(self, reply: _Reply, data: bytes) -> bytes | None:
        if not self._keep_usage and not reply.choices:
            return None
        self.sent += 1
        return self._renamed(data)

    def _stream_payload(self) -> bytes:
        return _encode(Streamed(self.sent))

    def _whole_payload(self, reply: _Reply, data: bytes) -> bytes:
        return self._renamed(data)

    def _renamed(self, data: bytes) -> bytes:
        fields = _decode_fields(data)
        fields["model"] = self._model
        if not self._keep_usage:
            fields.pop("usage", None)
        return _encode(fields)


# Errors.


def refusal(status: int, body: bytes, pause_s: float = _PAUSE_S) -> RemoteError:
    """What an answer with this HTTP status, not 200, means for the attempt.

    A server that has too much to do is left alone for ``pause_s``.
    """
    if status in (401, 403):
        return RemoteError(
            "engine_error",
            f"the remote refused the key (status {status}); see `api_key_file`",
            False,
        )
    if 300 <= status < 400:
        return RemoteError(
            "engine_error",
            f"the remote redirects (status {status}); `path` must be the address it redirects to",
            False,
        )
    words = _words_of(body) or "no reason given"
    if status in _RETRYABLE_STATUS or status >= 500 or status < 300:
        rest_s = pause_s if status in _BUSY_STATUS else None
        return RemoteError("engine_error", f"the remote answered {status}: {words}", True, rest_s)
    return RemoteError("bad_request", f"the remote refused it ({status}): {words}", False)


def pause_of(retry_after: str | None, now_s: float) -> float:
    """Seconds that the header ``Retry-After`` asks for: a number, or a date; else a default.

    ``now_s`` by the clock of dates, `time.time`.
    """
    if retry_after is None:
        return _PAUSE_S
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - now_s
        except (ValueError, OverflowError):
            return _PAUSE_S
    if isnan(seconds):
        return _PAUSE_S
    return min(max(seconds, 0.0), _LONGEST_PAUSE_S)


def too_large() -> RemoteError:
    """More than anybody can mean to send."""
    limit = MAX_ANSWER_BYTES >> 20
    return RemoteError("engine_error", f"the remote's answer is larger than {limit} MiB", True)


def _error_within(error: object) -> RemoteError:
    """An error object in a stream or under status 200."""
    code: Any = cast("dict[str, Any]", error).get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return refusal(status, _encode({"error": error}))


def _words_of(body: bytes) -> str:
    """What the server says went wrong, wherever it says so, on one line and cut."""
    try:
        found: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = body.decode(errors="replace")
    for _ in range(3):
        if not isinstance(found, dict):
            break
        table = cast("dict[str, Any]", found)
        found = next((table[k] for k in ("error", "message", "detail") if table.get(k)), "")
    words = found if isinstance(found, str) else msgspec.json.encode(found).decode()
    return " ".join(words.split())[:_MAX_WORDS]


# Streams of events (the text/event-stream of the HTML standard).


class EventStream:
    """Takes bytes as they come, cut anywhere, and gives the data of each event."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._line: list[bytes] = []  # pieces of the line that has not ended
        self._data: list[bytes] = []  # lines of the event that has not ended
        self._held = 0
        self._after_return = False  # a line feed now belongs to the line end before

    def feed(self, block: bytes) -> list[bytes]:
        """Data of the events that end in this block; raises `RemoteError` if one is too large."""
        if self._after_return and block.startswith(b"\n"):
            block = block[1:]
            self._after_return = False
        if not block:
            return []
        self._after_return = block.endswith(b"\r")
        lines = block.splitlines()
        rest = b"" if block.endswith((b"\r", b"\n")) else lines.pop()
        events: list[bytes] = []
        if lines and self._line:
            lines[0] = b"".join([*self._line, lines[0]])
            self._line.clear()
        for line in lines:
            self._take(line, events)
        if rest:
            self._line.append(rest)
        if lines and (events or not self._data):
            self._held = len(rest) + sum(map(len, self._data))
        else:
            self._held += len(block)
        if self._held > self._max_bytes:
            raise too_large()
        return events

    def close(self) -> list[bytes]:
        """The event that was not ended, if any."""
        events: list[bytes] = []
        self._take(b"".join(self._line), events)
        self._line.clear()
        self._take(b"", events)
        return events

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif not line and self._data:
            events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
            self._data.clear()
