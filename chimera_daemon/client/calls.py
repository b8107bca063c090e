"""Requests without an answer: a `Call` waits for all of it, a `Stream` reads along.

Each is a small state machine that its `Owner` feeds with chunks and settles once. Owns the rules of
streams: what is delivered, what a gap or an overlap means, and when a text has to begin again.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from time import perf_counter
from typing import Any, Protocol, Self

from msgspec import Struct

from chimera_daemon.client.errors import (
    Cancelled,
    ChimeraError,
    ClientClosed,
    StreamInterrupted,
)
from chimera_daemon.messages import Chunk, Receipt, Usage

_INTERRUPTED = (
    "the answer had to start again after part of it was delivered; pass restart=True to receive it "
    "from the beginning, or send the stage again"
)


class Owner(Protocol):
    """Whoever sends requests and hears of their answers."""

    loop: asyncio.AbstractEventLoop

    def drop(self, request: "Pending", error: ChimeraError) -> None:
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


class Pending:
    """A request without an answer: its frames for sending again, and its timer if it has one."""

    __slots__ = ("_owner", "frames", "models", "request_id", "stage", "started", "timer")

    def __init__(
        self, owner: Owner, request_id: str, frames: tuple[bytes, bytes], stage: int
    ) -> None:
        self._owner = owner
        self.request_id = request_id
        self.stage = stage
        self.frames = frames
        self.timer: asyncio.TimerHandle | None = None
        self.models: set[str] | None = None  # where the model that answers is to be noted
        self.started = perf_counter()

    def finish(self, reply: Reply) -> None:
        """Settle with the answer."""
        raise NotImplementedError

    def fail(self, error: ChimeraError) -> None:
        """Settle with an error."""
        raise NotImplementedError

    def on_chunk(self, chunk: Chunk, text: str) -> None:
        """Text of a stream; others ignore it."""

    def on_new_daemon(self) -> bool:
        """The daemon restarted. True if the request is to be sent again."""
        return True

    def cancel(self) -> None:
        """Give the request up: the daemon is told, whoever waits gets `Cancelled`. Idempotent."""
        self._owner.drop(self, Cancelled("cancelled by the caller"))


class Call(Pending):
    """One submitted request: await it for its `Reply`, or `cancel` it.

    Cancelling the task that awaits it cancels the request too. Made by `Workflow.submit` and
    `Client.submit`. Await it from one place only.
    """

    __slots__ = ("_future",)

    def __init__(
        self, owner: Owner, request_id: str, frames: tuple[bytes, bytes], stage: int
    ) -> None:
        super().__init__(owner, request_id, frames, stage)
        self._future: asyncio.Future[Reply] = owner.loop.create_future()

    def __await__(self) -> Generator[Any, None, Reply]:
        try:
            return (yield from self._future.__await__())
        except asyncio.CancelledError:
            self.cancel()
            raise

    def done(self) -> bool:
        """Whether it has its answer, an error included."""
        return self._future.done()

    def finish(self, reply: Reply) -> None:
        if not self._future.done():
            self._future.set_result(reply)

    def fail(self, error: ChimeraError) -> None:
        if not self._future.done():
            self._future.set_exception(error)
            if isinstance(error, (Cancelled, ClientClosed)):
                self._future.exception()  # nobody needs to collect what was given up on purpose


class Stream(Pending):
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

    __slots__ = (
        "_attempt_id",
        "_begun",
        "_delivered",
        "_outcome",
        "_parts",
        "_received",
        "_restart",
        "_waiter",
        "restarted",
    )

    def __init__(
        self, owner: Owner, request_id: str, frames: tuple[bytes, bytes], stage: int, restart: bool
    ) -> None:
        super().__init__(owner, request_id, frames, stage)
        self.restarted = 0
        self._restart = restart
        self._begun = 0  # what `restarted` becomes with the next piece
        self._attempt_id: int | None = None
        self._parts: list[str] = []  # text of this attempt, without gap
        self._received = 0  # its characters
        self._delivered = 0  # its parts given to the reader
        self._outcome: Reply | ChimeraError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def reply(self) -> Reply:
        """The whole answer, once the stream has ended; raises its error; before, `RuntimeError`."""
        match self._outcome:
            case None:
                raise RuntimeError("the stream has not ended yet")
            case Reply() as reply:
                return reply
            case error:
                raise error

    @property
    def ended(self) -> bool:
        """Whether the answer or an error has come; text may still be unread."""
        return self._outcome is not None

    @property
    def unread(self) -> int:
        """Characters that wait for the reader."""
        return sum(map(len, self._parts[self._delivered :]))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

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
            self.cancel()
        self.restarted = self._begun
        if isinstance(self._outcome, ChimeraError):
            raise self._outcome

    async def _more(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("a stream has one reader")
        self._waiter = self._owner.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def on_chunk(self, chunk: Chunk, text: str) -> None:
        if self._attempt_id is None:
            self._attempt_id = chunk.attempt_id
        elif chunk.attempt_id < self._attempt_id:
            return  # a late word of an attempt that was lost
        elif chunk.attempt_id > self._attempt_id:
            if not self._begin_again():
                self._owner.drop(self, StreamInterrupted(_INTERRUPTED))
                return
            self._attempt_id = chunk.attempt_id
        # Text beyond a gap is left to the final answer, which has all of it.
        if chunk.offset <= self._received:
            self._append(text[self._received - chunk.offset :])

    def on_new_daemon(self) -> bool:
        if self._begin_again():
            return True
        self._owner.drop(self, StreamInterrupted(_INTERRUPTED))
        return False

    def finish(self, reply: Reply) -> None:
        known = "".join(self._parts)
        if not reply.text.startswith(known):
            # Another attempt than the one that we heard of: its chunks were lost on the way.
            if not self._begin_again():
                self.fail(StreamInterrupted(_INTERRUPTED))
                return
            known = ""
        self._append(reply.text[len(known) :])
        self._outcome = reply
        self._wake()

    def fail(self, error: ChimeraError) -> None:
        if self._outcome is None:
            self._outcome = error
            self._wake()

    def _append(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._received += len(text)
            self._wake()

    def _begin_again(self) -> bool:
        """Forget the text so far; False if the reader cannot, who has some of it."""
        if self._delivered:
            if not self._restart:
                return False
            self._begun += 1
        self._parts.clear()
        self._attempt_id = None
        self._received = self._delivered = 0
        return True
