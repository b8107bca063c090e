"""A daemon's front socket without a daemon: tests decide what it answers and when it is away."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import zmq

from chimera_daemon.channel import Channel, make_socket
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Chunk,
    Closed,
    CloseWorkflow,
    Completion,
    Delta,
    ErrorCode,
    Failure,
    GetStatus,
    Ping,
    Pong,
    Receipt,
    Result,
    StatusReply,
    Submit,
    ToFront,
    Usage,
)
from chimera_daemon.wire import decode_front, encode

T = TypeVar("T")

RECEIPT = Receipt("fake", "prior", "small", "only one", ())
BEAT_S = 0.02


def run(body: "Callable[[FakeFront], Awaitable[None]]", timeout_s: float = 20.0) -> None:
    """Run on plain asyncio and on uvloop, where that is installed."""

    async def main() -> None:
        async with asyncio.timeout(timeout_s), FakeFront() as front:
            await body(front)

    try:
        import uvloop
    except ImportError:
        factories = [asyncio.new_event_loop]
    else:
        factories = [asyncio.new_event_loop, uvloop.new_event_loop]
    problems: list[str] = []
    for factory in factories:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.get_loop().set_exception_handler(lambda _, c: problems.append(str(c)))
            runner.run(main())
    assert problems == []


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    while not condition():
        await asyncio.sleep(0.002)


@dataclass
class Received:
    """One message of a client, and the means to answer it."""

    front: "FakeFront"
    client: bytes
    message: ToFront
    payload: bytes

    @property
    def submit(self) -> Submit:
        assert isinstance(self.message, Submit)
        return self.message

    def result(self, text: str, *, request_id: str | None = None) -> None:
        self.answer(msgspec.json.encode(Completion(text)), len(text.split()), request_id)

    def answer(self, payload: bytes, output_tokens: int = 1, request_id: str | None = None) -> None:
        header = Result(
            request_id=request_id or self.submit.request_id,
            model="small",
            engine="small-0",
            usage=Usage(prompt_tokens=3, output_tokens=output_tokens),
            finish_reason="stop",
            receipt=RECEIPT,
            logprob=-0.5,
        )
        self.raw(encode(header), payload)

    def chunk(self, offset: int, text: str, attempt_id: int = 1) -> None:
        self.piece(offset, msgspec.json.encode(Delta(text)), attempt_id)

    def piece(self, offset: int, payload: bytes, attempt_id: int = 1) -> None:
        header = Chunk(request_id=self.submit.request_id, attempt_id=attempt_id, offset=offset)
        self.raw(encode(header), payload)

    def failure(
        self,
        code: ErrorCode,
        *,
        request_id: str | None = None,
        retryable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        rid = self.submit.request_id if request_id is None else request_id
        self.raw(encode(Failure(rid, code, f"fake {code}", retryable, retry_after_s)))

    def raw(self, *frames: bytes) -> None:
        """Send to this client; lost if it, or the front itself, is gone by now."""
        if self.front.channel is not None:
            self.front.channel.send((self.client, *frames))


class FakeFront:
    """Answers pings, status and closes by itself; stages as ``on_submit`` says, else not at all."""

    def __init__(
        self, address: str = "tcp://127.0.0.1:*", worker: int = 0, workers: int = 1
    ) -> None:
        self.worker = worker
        self.workers = workers
        self.daemon_id = "one"
        self.version = PROTOCOL_VERSION
        self.max_payload_bytes = 1 << 20
        self.answer_pings = True
        self.answer_closes = True
        self.on_submit: Callable[[Received], None] | None = None
        self.address = address
        self.channel: Channel | None = None
        self.received: list[Received] = []
        self._news = asyncio.Event()
        self._seen = 0

    async def __aenter__(self) -> "FakeFront":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    async def start(self) -> None:
        """Bind, the second time at the same address as the first."""
        socket = make_socket(zmq.Context.instance(), zmq.ROUTER, hwm=10_000)
        while True:
            try:
                socket.bind(self.address)
                break
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE:
                    raise
                await asyncio.sleep(0.005)  # the socket before is closed by ZeroMQ's own thread
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.channel = Channel(socket, self._on_frames)

    def stop(self) -> None:
        """Go away without a word."""
        if self.channel is not None:
            self.channel.close(linger_ms=100)
            self.channel = None

    async def restart(self, daemon_id: str | None = None) -> None:
        """Break the connection and come back, as a new daemon if it gets a new id."""
        self.stop()
        if daemon_id is not None:
            self.daemon_id = daemon_id
        await self.start()

    async def next(self, kind: type[T]) -> Received:
        """The next message of this type, those before it (other than pings) being skipped."""
        while True:
            while self._seen < len(self.received):
                received = self.received[self._seen]
                self._seen += 1
                if isinstance(received.message, kind):
                    return received
            self._news.clear()
            await self._news.wait()

    def count(self, kind: type[T]) -> int:
        return sum(isinstance(r.message, kind) for r in self.received)

    async def pings(self, n: int) -> None:
        """Wait for so many more pings: whatever was sent before the last of them has arrived."""
        for _ in range(n):
            await self.next(Ping)

    def _on_frames(self, frames: list[bytes]) -> None:
        message = decode_front(frames[1])
        payload = frames[2] if len(frames) > 2 else b""
        received = Received(self, frames[0], message, payload)
        self.received.append(received)
        self._news.set()
        match message:
            case Ping() if self.answer_pings:
                pong = Pong(
                    self.daemon_id,
                    BEAT_S,
                    self.max_payload_bytes,
                    self.version,
                    self.worker,
                    self.workers,
                )
                received.raw(encode(pong))
            case CloseWorkflow() if self.answer_closes:
                received.raw(encode(Closed(message.workflow_id)))
            case GetStatus():
                received.raw(encode(StatusReply(message.request_id)), b'{"engines":[]}')
            case Submit() if self.on_submit is not None:
                self.on_submit(received)
            case _:
                pass
