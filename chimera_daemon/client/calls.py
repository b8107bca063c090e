"""Requests without an answer: awaited as a whole or read along, in our text form or as raw bytes.

Each is a small state machine that its `Owner` feeds with chunks and settles once. Owns the rules of
streams: what is delivered, what a gap or an overlap means, and when an answer has to begin again.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from time import perf_counter
from typing import Any, Generic, Protocol, Self, TypeVar

import msgspec
from msgspec import Struct

from chimera_daemon.client.errors import (
    Cancelled,
    ChimeraError,
    ClientClosed,
    RequestTimeout,
    StreamInterrupted,
)
from chimera_daemon.messages import (
    Chunk,
    Completion,
    Delta,
    Receipt,
    Result,
    Streamed,
    Submit,
    Usage,
)

_decode_completion = msgspec.json.Decoder(Completion).decode
_decode_delta = msgspec.json.Decoder(Delta).decode
_decode_streamed = msgspec.json.Decoder(Streamed).decode

_INTERRUPTED = (
    "the answer had to start again after part of it was delivered; pass restart=True to receive it "
    "from the beginning, or send the stage again"
)
_RAW_INTERRUPTED = "the answer had to start again after part of it was delivered; send it again"
_RAW_GAP = "a part of the answer was lost on the way; send the request again"


class Owner(Protocol):
    """Whoever sends requests and hears of their answers."""

    loop: asyncio.AbstractEventLoop

    def drop(self, request: "Pending[Any, Any]", error: ChimeraError) -> None:
        """Give a request up with this error and tell the daemon; nothing if it is settled."""


class Reply(Struct, frozen=True, gc=False):
    """The answer of one stage.

    ``text`` is the whole answer, also after streaming; ``latency_s`` runs from submission to answer
    as this client saw it; ``receipt`` says why the stage went where it went; ``logprob`` is the
    mean natural log-probability per output token, None where nothing that learns asks for it.
    """

    text: str
    model: str
    engine: str
    usage: Usage
    finish_reason: str
    receipt: Receipt
    request_id: str
    latency_s: float
    stage: int
    logprob: float | None = None


class RawReply(Struct, frozen=True, gc=False):
    """The answer of one request in one of OpenAI's forms; the rest is as in `Reply`.

    ``payload`` is the response object as JSON, or after `Client.relay` a `Streamed`.
    """

    payload: bytes
    model: str
    engine: str
    usage: Usage
    finish_reason: str
    receipt: Receipt
    request_id: str
    latency_s: float


Piece = TypeVar("Piece", str, bytes)
Answer = TypeVar("Answer", Reply, RawReply)


class Pending(Generic[Piece, Answer]):
    """A request without an answer: its frames for sending again, and its timer if it has one."""

    __slots__ = (
        "frames",
        "models",
        "owner",
        "request_id",
        "stage",
        "started",
        "timer",
        "workflow_id",
    )

    def __init__(self, owner: Owner, submit: Submit, frames: tuple[bytes, bytes]) -> None:
        self.owner = owner
        self.request_id = submit.request_id
        self.workflow_id = submit.workflow_id
        self.stage = submit.stage
        self.frames = frames
        self.timer: asyncio.TimerHandle | None = None
        self.models: set[str] | None = None  # where the model that answers is to be noted
        self.started = perf_counter()

    def read_answer(self, result: Result, payload: bytes) -> Answer:
        """Decode the answer; raises what `msgspec` raises."""
        raise NotImplementedError

    def finish(self, reply: Answer) -> None:
        """Settle with the answer."""
        raise NotImplementedError

    def fail(self, error: ChimeraError) -> None:
        """Settle with an error."""
        raise NotImplementedError

    def read_chunk(self, payload: bytes) -> Piece:
        """Decode a piece of a stream; raises what `msgspec` raises."""
        raise NotImplementedError

    def on_chunk(self, chunk: Chunk, piece: Piece) -> None:
        """A piece of a stream; others ignore it."""

    def on_new_daemon(self) -> bool:
        """The daemon restarted. True if the request is to be sent again."""
        return True

    def expire(self, timeout_s: float) -> None:
        """The time that the caller gave is up."""
        self.owner.drop(self, RequestTimeout(f"no answer within {timeout_s} s"))

    def cancel(self) -> None:
        """Give the request up: the daemon is told, whoever waits gets `Cancelled`. Idempotent."""
        self.owner.drop(self, Cancelled("cancelled by the caller"))


def _text_reply(request: Pending[str, Reply], result: Result, payload: bytes) -> Reply:
    return Reply(
        _decode_completion(payload).text,
        result.model,
        result.engine,
        result.usage,
        result.finish_reason,
        result.receipt,
        result.request_id,
        perf_counter() - request.started,
        request.stage,
        result.logprob,
    )


def _raw_reply(request: Pending[bytes, RawReply], result: Result, payload: bytes) -> RawReply:
    return RawReply(
        payload,
        result.model,
        result.engine,
        result.usage,
        result.finish_reason,
        result.receipt,
        result.request_id,
        perf_counter() - request.started,
    )


# Awaited as a whole.


class _Awaited(Pending[Piece, Answer]):
    __slots__ = ("_future",)

    def __init__(self, owner: Owner, submit: Submit, frames: tuple[bytes, bytes]) -> None:
        super().__init__(owner, submit, frames)
        self._future: asyncio.Future[Answer] = owner.loop.create_future()

    def __await__(self) -> Generator[Any, None, Answer]:
        try:
            return (yield from self._future.__await__())
        except asyncio.CancelledError:
            self.cancel()
            raise

    def done(self) -> bool:
        """Whether it has its answer, an error included."""
        return self._future.done()

    def finish(self, reply: Answer) -> None:
        if not self._future.done():
            self._future.set_result(reply)

    def fail(self, error: ChimeraError) -> None:
        if not self._future.done():
            self._future.set_exception(error)
            if isinstance(error, (Cancelled, ClientClosed)):
                self._future.exception()  # nobody needs to collect what was given up on purpose


class Call(_Awaited[str, Reply]):
    """One submitted request: await it for its `Reply`, or `cancel` it.

    Cancelling the task that awaits it cancels the request too. Made by `Workflow.submit` and
    `Client.submit`. Await it from one place only.
    """

    __slots__ = ()

    def read_answer(self, result: Result, payload: bytes) -> Reply:
        return _text_reply(self, result, payload)


class RawCall(_Awaited[bytes, RawReply]):
    """As `Call`, for a request in one of OpenAI's forms: await it for its `RawReply`."""

    __slots__ = ()

    def read_answer(self, result: Result, payload: bytes) -> RawReply:
        return _raw_reply(self, result, payload)


# Read along.


class _Streaming(Pending[Piece, Answer]):
    """What all streams have: one reader, who is woken, an attempt that is read, and an outcome."""

    __slots__ = ("_attempt_id", "_outcome", "_waiter")

    def __init__(self, owner: Owner, submit: Submit, frames: tuple[bytes, bytes]) -> None:
        super().__init__(owner, submit, frames)
        self._attempt_id: int | None = None
        self._outcome: Answer | ChimeraError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def reply(self) -> Answer:
        """The whole answer, once the stream has ended; raises its error; before, `RuntimeError`."""
        outcome = self._outcome
        if outcome is None:
            raise RuntimeError("the stream has not ended yet")
        if isinstance(outcome, ChimeraError):
            raise outcome
        return outcome

    @property
    def ended(self) -> bool:
        """Whether the answer or an error has come; pieces may still be unread."""
        return self._outcome is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def fail(self, error: ChimeraError) -> None:
        if self._outcome is None:
            self._settle(error)

    def on_new_daemon(self) -> bool:
        if self._begin_again():
            return True
        self._interrupt()
        return False

    def _settle(self, outcome: Answer | ChimeraError) -> None:
        self._outcome = outcome
        self._wake()

    def _leave(self) -> None:
        """The reader stops."""
        if self._outcome is None:
            self.cancel()

    async def _more(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("a stream has one reader")
        self._waiter = self.owner.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _admit(self, attempt_id: int) -> bool:
        """Whether pieces of this attempt are wanted: those of the latest, if it may begin again."""
        if attempt_id == self._attempt_id:
            return True
        if self._attempt_id is not None:
            if attempt_id < self._attempt_id:
                return False  # a late word of an attempt that was lost
            if not self._begin_again():
                self._interrupt()
                return False
        self._attempt_id = attempt_id
        return True

    def _begin_again(self) -> bool:
        """Forget the pieces so far; False if the reader cannot, who has some of them."""
        raise NotImplementedError

    def _interrupt(self) -> None:
        self.owner.drop(self, StreamInterrupted(_INTERRUPTED))


class Stream(_Streaming[str, Reply]):
    """The answer of one stage while it is written.

        async with workflow.stream(messages) as stream:
            async for text in stream:
                print(text, end="")
        print(stream.reply.usage)

    The request was sent when `Workflow.stream` returned. Iterating yields pieces of text in order
    without gap or overlap, joined where the reader is slower than the engine, and raises the
    request's error, if any, after the text before it. Leaving the loop or the block early cancels
    the request. Iterate once. Unread text is kept: at most what ``max_tokens`` allows.

    ``restarted`` counts how often the answer began anew after text had been delivered (only with
    ``restart=True``; otherwise that raises `StreamInterrupted`). It grows together with the first
    piece of the new text: a reader that sees it changed forgets the text gathered before.
    """

    __slots__ = ("_begun", "_delivered", "_parts", "_received", "_restart", "restarted")

    def __init__(self, owner: Owner, submit: Submit, frames: tuple[bytes, bytes]) -> None:
        super().__init__(owner, submit, frames)
        self.restarted = 0
        self._restart = submit.restart
        self._begun = 0  # what `restarted` becomes with the next piece
        self._parts: list[str] = []  # text of this attempt, without gap
        self._received = 0  # its characters
        self._delivered = 0  # its parts given to the reader

    @property
    def unread(self) -> int:
        """Characters that wait for the reader."""
        return sum(map(len, self._parts[self._delivered :]))

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        try:
            while True:
                if self._delivered < len(self._parts):
                    text = "".join(self._parts[self._delivered :])
                    self._delivered = len(self._parts)
                    self.restarted = self._begun
                    yield text
                elif self._outcome is None:
                    await self._more()
                else:
                    break
        finally:
            self._leave()
        self.restarted = self._begun
        if isinstance(self._outcome, ChimeraError):
            raise self._outcome

    def read_chunk(self, payload: bytes) -> str:
        return _decode_delta(payload).text

    def on_chunk(self, chunk: Chunk, piece: str) -> None:
        # Text beyond a gap is left to the final answer, which has all of it.
        if self._admit(chunk.attempt_id) and chunk.offset <= self._received:
            self._append(piece[self._received - chunk.offset :])

    def read_answer(self, result: Result, payload: bytes) -> Reply:
        return _text_reply(self, result, payload)

    def finish(self, reply: Reply) -> None:
        known = "".join(self._parts)
        if not reply.text.startswith(known):
            # Another attempt than the one that we heard of: its chunks were lost on the way.
            if not self._begin_again():
                self.fail(StreamInterrupted(_INTERRUPTED))
                return
            known = ""
        self._append(reply.text[len(known) :])
        self._settle(reply)

    def _append(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._received += len(text)
            self._wake()

    def _begin_again(self) -> bool:
        if self._delivered:
            if not self._restart:
                return False
            self._begun += 1
        self._parts.clear()
        self._attempt_id = None
        self._received = self._delivered = 0
        return True


class RawStream(_Streaming[bytes, RawReply]):
    """The answer of a request in one of OpenAI's forms while it is written. Made by `Client.relay`.

        async with client.relay(body, api="chat", workflow_id="w") as stream:
            async for frames in stream:
                send(frames)
        print(stream.reply.usage)

    Iterating yields the payloads of chunks that have arrived since, in order and without gap, and
    raises the request's error, if any, after them. What is lost or begins again raises
    `StreamInterrupted`, unless nothing was delivered yet; `restart` says no more than that the
    daemon may try it. Leaving the loop or the block early cancels the request. Iterate once.

    ``unread_bytes``: of payloads that wait for the reader, who must bound it.
    """

    __slots__ = ("_delivered", "_expected", "_received", "_unread", "unread_bytes")

    def __init__(self, owner: Owner, submit: Submit, frames: tuple[bytes, bytes]) -> None:
        super().__init__(owner, submit, frames)
        self.unread_bytes = 0
        self._unread: list[bytes] = []
        self._received = 0  # chunks of this attempt
        self._delivered = False  # some of them to the reader
        self._expected = 0  # as the answer says

    async def __aiter__(self) -> AsyncGenerator[list[bytes], None]:
        try:
            while True:
                if self._unread:
                    payloads, self._unread = self._unread, []
                    self.unread_bytes = 0
                    self._delivered = True
                    yield payloads
                elif self._outcome is None:
                    await self._more()
                else:
                    break
        finally:
            self._leave()
        if isinstance(self._outcome, ChimeraError):
            raise self._outcome

    def read_chunk(self, payload: bytes) -> bytes:
        return payload

    def on_chunk(self, chunk: Chunk, piece: bytes) -> None:
        if not self._admit(chunk.attempt_id):
            return
        if chunk.offset == self._received:
            self._received += 1
            self._unread.append(piece)
            self.unread_bytes += len(piece)
            self._wake()
        elif chunk.offset > self._received:
            self.owner.drop(self, StreamInterrupted(_RAW_GAP))

    def read_answer(self, result: Result, payload: bytes) -> RawReply:
        self._expected = _decode_streamed(payload).chunks
        return _raw_reply(self, result, payload)

    def finish(self, reply: RawReply) -> None:
        if self._received == self._expected:
            self._settle(reply)
        else:
            self.fail(StreamInterrupted(_RAW_GAP))

    def _begin_again(self) -> bool:
        if self._delivered:
            return False
        self._unread.clear()
        self._attempt_id = None
        self._received = self.unread_bytes = 0
        return True

    def _interrupt(self) -> None:
        self.owner.drop(self, StreamInterrupted(_RAW_INTERRUPTED))
