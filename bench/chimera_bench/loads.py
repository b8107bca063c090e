"""Load generators: HTTP and ZeroMQ without any client library, and our client, in closed loop.

So many requests are under way all the time; each answer is checked and begins the next request.
They know how to ask and what a right answer is, nothing of who answers.
"""

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import httptools
import msgspec
import zmq
from msgspec import Struct

from chimera_daemon import wire
from chimera_daemon.channel import Channel, make_socket
from chimera_daemon.client import ChimeraError, Workflow, connect
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Chunk,
    Failure,
    Ping,
    Result,
    Streamed,
    Submit,
)

PROMPT = "What is 17 + 4? Answer with the number alone. " * 4
MESSAGES = [{"role": "user", "content": PROMPT}]
MAX_TOKENS = 16
STAGES_PER_WORKFLOW = 4  # where the client names its workflows
PATIENCE_S = 30.0  # for the last answers of a run
_PAUSE_S = 0.01  # after an error, so that a door that is shut is not stormed
_HWM = 100_000


class _Message(Struct):
    content: str | None = None


class _Choice(Struct):
    message: _Message | None = None
    delta: _Message | None = None


class _Answer(Struct):
    """The part of a `chat.completion` or of one of its chunks that is checked."""

    choices: list[_Choice]


_Done = tuple[float, float, str, int]  # arguments of `Tally.done`

_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_streamed = msgspec.json.Decoder(Streamed).decode


class Expected(NamedTuple):
    """What every answer must say; ``chunks`` are those of a stream that carry text, else 0."""

    text: str
    chunks: int


class Wrong(Exception):
    """An answer that is not the expected one; the message says why, in a few words."""


def text_of(body: bytes) -> str:
    """The text of a `chat.completion`; raises `Wrong`."""
    try:
        return _decode_answer(body).choices[0].message.content or ""  # pyright: ignore[reportOptionalMemberAccess]
    except (msgspec.DecodeError, IndexError, AttributeError):
        raise Wrong("not a completion") from None


def pieces_of(chunks: Sequence[bytes]) -> list[str]:
    """Texts of `chat.completion.chunk` objects, those without any left out; raises `Wrong`."""
    pieces: list[str] = []
    try:
        for chunk in chunks:
            for choice in _decode_answer(chunk).choices:
                if choice.delta is not None and choice.delta.content:
                    pieces.append(choice.delta.content)
    except msgspec.DecodeError:
        raise Wrong("not a chunk") from None
    return pieces


def events_of(body: bytes) -> list[bytes]:
    """Data of the server-sent events of a whole stream; raises `Wrong` without its end."""
    lines = body.replace(b"\r\n", b"\n").split(b"\n")
    events = [line[6:] for line in lines if line.startswith(b"data: ")]
    if not events or events.pop() != b"[DONE]":
        raise Wrong("a stream without its end")
    return events


class Tally:
    """What became of the requests of one run. Nothing counts before `begin` and after `end`."""

    def __init__(self, expected: Expected | None = None) -> None:
        self.expected = expected
        self.text: str | None = None  # of the last answer
        self.chunks = 0
        self.right = 0  # answers as expected, from the start
        self.latencies_s: list[float] = []
        self.firsts_s: list[float] = []  # until the first byte or chunk
        self.errors: Counter[str] = Counter()
        self.running = True
        self._counting = False

    def begin(self) -> None:
        """From here on requests count."""
        self._counting = True

    def end(self) -> None:
        """Requests under way end, none begins."""
        self._counting = self.running = False

    def done(self, started_s: float, first_s: float, text: str, chunks: int) -> None:
        """An answer is whole. Times by `time.perf_counter`; ``chunks`` 0: it was no stream."""
        self.text, self.chunks = text, chunks
        expected = self.expected
        if expected is not None and text != expected.text:
            self.failed("wrong text")
        elif expected is not None and chunks != expected.chunks:
            self.failed(f"{chunks} chunks of text, not {expected.chunks}")
        else:
            self.right += 1
            if self._counting:
                self.latencies_s.append(time.perf_counter() - started_s)
                self.firsts_s.append(first_s - started_s)

    def failed(self, why: str) -> None:
        """Counts also before `begin`: a door that answers wrongly is not measured."""
        self.errors[why] += 1


class Load(Protocol):
    """One kind of client. ``stop`` comes after the tally's `end` and waits for the last answers."""

    async def start(self, in_flight: int, stream: bool, tally: Tally) -> None:
        """Open connections and ask."""
        ...

    async def stop(self, patience_s: float = PATIENCE_S) -> None:
        """Wait for the last answers, at most so long; those missing then are errors."""
        ...


# HTTP.


class HttpLoad:
    """A connection for each request in flight, kept open."""

    def __init__(self, address: str, model: str, *, max_tokens: int = MAX_TOKENS) -> None:
        self._address, self._model, self._max_tokens = address, model, max_tokens
        self._connections: list[_Connection] = []

    @property
    def unfinished(self) -> int:
        """Connections that still ask or wait for an answer."""
        return sum(not connection.done.done() for connection in self._connections)

    async def start(self, in_flight: int, stream: bool, tally: Tally) -> None:
        """Open the connections and ask over each."""
        host, _, port = self._address.rpartition(":")
        request = chat_request(self._address, self._model, stream, self._max_tokens)
        self._connections = [
            _Connection(host, int(port), request, stream, tally) for _ in range(in_flight)
        ]
        await asyncio.gather(*(connection.open() for connection in self._connections))

    async def stop(self, patience_s: float = PATIENCE_S) -> None:
        """See `Load`."""
        done = [connection.done for connection in self._connections]
        await asyncio.wait(done, timeout=patience_s)
        for connection in self._connections:
            connection.close()


def chat_request(address: str, model: str, stream: bool, max_tokens: int) -> bytes:
    """A whole request for `/v1/chat/completions`."""
    fields = {"model": model, "messages": MESSAGES, "max_tokens": max_tokens}
    body = msgspec.json.encode(fields | ({"stream": True} if stream else {}))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Connection(asyncio.Protocol):
    """Asks, checks, asks again; opens itself again where the server closed it."""

    def __init__(self, host: str, port: int, request: bytes, stream: bool, tally: Tally) -> None:
        self._host, self._port = host, port
        self._request, self._stream, self._tally = request, stream, tally
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._asking = False
        self.done: asyncio.Future[None] = self._loop.create_future()

    async def open(self) -> None:
        """Connect and ask; a refusal is an error of the tally, tried again."""
        try:
            await self._loop.create_connection(lambda: self, self._host, self._port)
        except OSError as error:
            self._fail(f"cannot connect: {type(error).__name__}")

    def close(self) -> None:
        if self._asking:
            self._tally.failed("no answer")
            self._asking = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._parser = httptools.HttpResponseParser(self)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._asking:
            self._fail("connection lost")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail("not HTTP")

    def _ask(self) -> None:
        if not self._tally.running:
            if not self.done.done():
                self.done.set_result(None)
            return
        if self._transport is None:
            self._opening = self._loop.create_task(self.open())
            return
        self._asking, self._pieces = True, []
        self._started_s = time.perf_counter()
        self._transport.write(self._request)

    def _fail(self, why: str) -> None:
        self._tally.failed(why)
        self._asking = False
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._loop.call_later(_PAUSE_S, self._ask)

    # Called by the parser.

    def on_body(self, piece: bytes) -> None:
        if not self._pieces:
            self._first_s = time.perf_counter()
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self._asking = False
        status, body = self._parser.get_status_code(), b"".join(self._pieces)
        if status != 200 or not body:
            self._fail(f"status {status}")
            return
        try:
            if self._stream:
                pieces = pieces_of(events_of(body))
                text, chunks = "".join(pieces), len(pieces)
            else:
                text, chunks = text_of(body), 0
        except Wrong as wrong:
            self._fail(str(wrong))
            return
        self._tally.done(self._started_s, self._first_s, text, chunks)
        if self._transport is not None and not self._parser.should_keep_alive():
            self._transport.close()
            self._transport = None
        self._ask()


# ZeroMQ.


class _Asker:
    """One request in flight over ZeroMQ: the stages of a workflow, then of the next one."""

    __slots__ = ("chunks", "first_s", "stage", "started_s", "workflow_id", "worker")

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.workflow_id = ""
        self.worker = 0
        self.started_s = self.first_s = 0.0
        self.chunks: list[bytes] = []


class ZmqLoad:
    """One DEALER socket for each worker of the daemon, all requests over it, in OpenAI's form."""

    def __init__(
        self,
        address: str,
        *,
        workers: int = 1,
        max_tokens: int = MAX_TOKENS,
        stages: int = STAGES_PER_WORKFLOW,
    ) -> None:
        self._addresses = [wire.worker_address(address, i) for i in range(workers)]
        self._max_tokens, self._stages = max_tokens, stages

    async def start(self, in_flight: int, stream: bool, tally: Tally) -> None:
        """Connect and ask."""
        self._stream, self._tally = stream, tally
        self._loop = asyncio.get_running_loop()
        fields = {"messages": MESSAGES, "max_tokens": self._max_tokens}
        self._payload = msgspec.json.encode(fields | ({"stream": True} if stream else {}))
        self._context: zmq.Context[Any] = zmq.Context()
        self._name = secrets.token_hex(6)
        self._asked: dict[str, _Asker] = {}
        self._requests = 0
        self._idle = asyncio.Event()
        self._channels = [self._open(address) for address in self._addresses]
        for _ in range(in_flight):
            self._ask(_Asker(self._stages))

    async def stop(self, patience_s: float = PATIENCE_S) -> None:
        """See `Load`."""
        if self._asked:
            try:
                await asyncio.wait_for(self._idle.wait(), patience_s)
            except TimeoutError:
                self._tally.errors["no answer"] += len(self._asked)
        for channel in self._channels:
            channel.close()
        self._context.term()

    def _open(self, address: str) -> Channel:
        identity = b"l" + secrets.token_bytes(15)
        socket = make_socket(self._context, zmq.DEALER, hwm=_HWM, identity=identity)
        socket.connect(address)
        channel = Channel(socket, self._on_frames)
        channel.send((wire.encode(Ping(PROTOCOL_VERSION, batches=True)),))
        channel.batches(True)
        return channel

    def _ask(self, asker: _Asker) -> None:
        if not self._tally.running:
            if not self._asked:
                self._idle.set()
            return
        self._requests += 1
        if asker.stage == self._stages:
            asker.stage = 0
            asker.workflow_id = f"{self._name}-{self._requests}"
            asker.worker = wire.worker_of(asker.workflow_id, len(self._channels))
        stage, request_id = asker.stage, str(self._requests)
        asker.stage += 1
        submit = Submit(
            request_id,
            asker.workflow_id,
            stage,
            max_tokens=self._max_tokens,
            stream=self._stream,
            api="chat",
            last=asker.stage == self._stages,
        )
        self._asked[request_id] = asker
        asker.chunks = []
        asker.started_s = time.perf_counter()
        self._channels[asker.worker].post((wire.encode(submit), self._payload))

    def _on_frames(self, frames: list[bytes]) -> None:
        match wire.decode_client(frames[0]):
            case Chunk() as chunk:
                asker = self._asked[chunk.request_id]
                if not asker.chunks:
                    asker.first_s = time.perf_counter()
                asker.chunks.append(frames[1])
            case Result() as result:
                self._answered(self._asked.pop(result.request_id), frames[1])
            case Failure() as failure:
                self._tally.failed(failure.code)
                asker = self._asked.pop(failure.request_id, None)
                if asker is not None:
                    asker.stage = self._stages
                    self._loop.call_later(_PAUSE_S, self._ask, asker)
            case _:
                pass  # the pong

    def _answered(self, asker: _Asker, payload: bytes) -> None:
        try:
            if self._stream:
                if _decode_streamed(payload).chunks != len(asker.chunks):
                    raise Wrong("chunks are missing")
                pieces = pieces_of(asker.chunks)
                text, chunks = "".join(pieces), len(pieces)
            else:
                text, chunks = text_of(payload), 0
                asker.first_s = time.perf_counter()
        except Wrong as wrong:
            self._tally.failed(str(wrong))
        else:
            self._tally.done(asker.started_s, asker.first_s, text, chunks)
        self._ask(asker)


# Our client library.


class ClientLoad:
    """`chimera_daemon.client` over ZeroMQ, in its text form, a task for each request in flight."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def start(self, in_flight: int, stream: bool, tally: Tally) -> None:
        """Connect and start the tasks."""
        self._tally = tally
        self._stack = contextlib.AsyncExitStack()
        self._client = await self._stack.enter_async_context(
            connect(self._address, timeout_s=PATIENCE_S)
        )
        ask = _ask_stream if stream else _ask_plain
        self._tasks = [asyncio.create_task(self._ask(ask)) for _ in range(in_flight)]

    async def stop(self, patience_s: float = PATIENCE_S) -> None:
        """See `Load`."""
        _, late = await asyncio.wait(self._tasks, timeout=patience_s)
        self._tally.errors["no answer"] += len(late)
        for task in late:
            task.cancel()
        await self._stack.aclose()
        self._tally.errors += Counter()  # leaves out what is zero

    async def _ask(self, ask: Callable[[Workflow], Awaitable[_Done]]) -> None:
        tally = self._tally
        while tally.running:
            try:
                async with self._client.workflow(kind="bench") as workflow:
                    for _ in range(STAGES_PER_WORKFLOW):
                        if not tally.running:
                            break
                        tally.done(*await ask(workflow))
            except ChimeraError as error:
                tally.failed(error.code)
                await asyncio.sleep(_PAUSE_S)


async def _ask_plain(workflow: Workflow) -> _Done:
    started_s = time.perf_counter()
    reply = await workflow.generate(MESSAGES, max_tokens=MAX_TOKENS)
    return started_s, time.perf_counter(), reply.text, 0


async def _ask_stream(workflow: Workflow) -> _Done:
    """The client joins chunks that arrive together, so their number says nothing."""
    started_s, first_s, pieces = time.perf_counter(), 0.0, list[str]()
    async with workflow.stream(MESSAGES, max_tokens=MAX_TOKENS) as stream:
        async for piece in stream:
            first_s = first_s or time.perf_counter()
            pieces.append(piece)
    return started_s, first_s, "".join(pieces), 0
