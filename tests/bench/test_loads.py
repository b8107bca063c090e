"""The load generators of `chimera bench overhead`: against the static backends, and wrong ones."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import uvloop
import zmq

from chimera_bench import loads, static_backend
from chimera_bench.loads import Expected, HttpLoad, Load, Tally, ZmqLoad
from chimera_daemon import wire
from chimera_daemon.channel import Channel, make_socket
from chimera_daemon.messages import Chunk, Failure, Receipt, Result, Streamed, Submit, Usage

T = TypeVar("T")
TEST_S = 30.0
PLAIN = Expected(static_backend.TEXT, 0)
STREAM = Expected(static_backend.TEXT, 16)


def run(test: Awaitable[T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(test, TEST_S)

    return uvloop.run(limited())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def http_backend() -> AsyncIterator[str]:
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(static_backend.serve_http(port.set_result))
    try:
        yield f"127.0.0.1:{await port}"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def zmq_backend(folder: Path) -> AsyncIterator[str]:
    address = f"ipc://{folder}/front"
    task = asyncio.create_task(static_backend.serve_zmq(address))
    try:
        yield address
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def answers(load: Load, expected: Expected, *, count: int = 50) -> Tally:
    """A tally with so many counted answers or any error."""
    tally = Tally(expected)
    await load.start(4, expected.chunks > 0, tally)
    tally.begin()
    await until(lambda: len(tally.latencies_s) >= count or tally.errors)
    tally.end()
    await load.stop(patience_s=TEST_S)
    return tally


@pytest.mark.parametrize("expected", [PLAIN, STREAM])
def test_http(expected: Expected) -> None:
    async def test() -> None:
        async with http_backend() as address:
            load = HttpLoad(address, "static")
            tally = await answers(load, expected)
            assert not tally.errors
            assert (tally.text, tally.chunks) == expected
            assert len(tally.firsts_s) == len(tally.latencies_s) <= tally.right
            pairs = zip(tally.firsts_s, tally.latencies_s, strict=True)
            assert all(0 < first <= whole for first, whole in pairs)
            assert load.unfinished == 0

    run(test())


@pytest.mark.parametrize("expected", [PLAIN, STREAM])
def test_zmq(expected: Expected, tmp_path: Path) -> None:
    async def test() -> None:
        async with zmq_backend(tmp_path) as address:
            tally = await answers(ZmqLoad(address), expected)
            assert not tally.errors
            assert (tally.text, tally.chunks) == expected
            assert all(first > 0 for first in tally.firsts_s)

    run(test())


def test_nothing_counts_before_the_beginning_and_after_the_end() -> None:
    tally = Tally(PLAIN)
    tally.done(0.0, 0.0, PLAIN.text, 0)
    assert (tally.right, tally.latencies_s) == (1, [])
    tally.begin()
    tally.done(0.0, 0.0, PLAIN.text, 0)
    tally.end()
    tally.done(0.0, 0.0, PLAIN.text, 0)
    assert (tally.right, len(tally.latencies_s), tally.running) == (3, 1, False)


@pytest.mark.parametrize(
    ("expected", "error"),
    [
        (Expected("something else", 16), "wrong text"),
        (Expected(static_backend.TEXT, 17), "16 chunks of text, not 17"),
    ],
)
def test_a_wrong_answer_is_an_error(expected: Expected, error: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with http_backend() as address, zmq_backend(tmp_path) as front:
            for load in (HttpLoad(address, "static"), ZmqLoad(front)):
                tally = await answers(load, expected)
                assert set(tally.errors) == {error}
                assert tally.latencies_s == []

    run(test())


def respond(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


EVENT = b'data: {"choices": [{"delta": {"content": "w0"}}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "stream", "error"),
    [
        (respond(b"{}", "503 Service Unavailable"), False, "status 503"),
        (respond(b""), False, "status 200"),
        (respond(b"[]"), False, "not a completion"),
        (respond(b'{"choices": []}'), False, "not a completion"),
        (respond(EVENT), True, "a stream without its end"),
        (respond(b"data: 1\n\ndata: [DONE]\n\n"), True, "not a chunk"),
        (respond(b"whole")[:-2], False, "connection lost"),
        (b"", False, "connection lost"),
        (b"good morning\r\n\r\n", False, "not HTTP"),
    ],
)
def test_what_a_broken_server_does(answer: bytes, stream: bool, error: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        tally = Tally(STREAM if stream else PLAIN)
        load = HttpLoad(address, "static")
        await load.start(1, stream, tally)
        await until(lambda: tally.errors.total() >= 3)  # it goes on asking
        tally.end()
        await load.stop(patience_s=TEST_S)
        assert set(tally.errors) == {error}
        server.close()
        await server.wait_closed()

    run(test())


def test_a_server_that_is_not_there_and_one_that_says_nothing() -> None:
    gone: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        gone.append(1)

    async def test() -> None:
        silent = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        tally, load = Tally(PLAIN), HttpLoad(address, "static")
        await load.start(3, False, tally)
        tally.end()
        assert load.unfinished == 3
        await load.stop(patience_s=0.05)
        assert tally.errors == {"no answer": 3}
        await until(lambda: len(gone) == 3)
        silent.close()
        await silent.wait_closed()

        tally, load = Tally(PLAIN), HttpLoad(address, "static")
        await load.start(1, False, tally)
        await until(lambda: tally.errors.total() >= 2)
        tally.end()
        await load.stop(patience_s=TEST_S)
        assert set(tally.errors) == {"cannot connect: ConnectionRefusedError"}

    run(test())


class Front:
    """A front socket whose answers are given: header and payload for each submission."""

    def __init__(self, address: str, answer: Callable[[Submit], Iterator[tuple[Any, ...]]]) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._answer = answer
        self.submits: list[Submit] = []
        socket = make_socket(self._context, zmq.ROUTER, hwm=1000)
        socket.bind(address)
        self._channel = Channel(socket, self._on_frames)

    def close(self) -> None:
        self._channel.close()
        self._context.term()

    def _on_frames(self, frames: list[bytes]) -> None:
        message = wire.decode_front(frames[1])
        if isinstance(message, Submit):
            self.submits.append(message)
            for header, *payload in self._answer(message):
                self._channel.send((frames[0], wire.encode(header), *payload))


def result(submit: Submit, payload: bytes) -> tuple[Any, ...]:
    receipt = Receipt("test", "prior", "m", "only one", ())
    return (Result(submit.request_id, "m", "e", Usage(1, 1), "stop", receipt), payload)


def too_few(submit: Submit) -> Iterator[tuple[Any, ...]]:
    yield (Chunk(submit.request_id, 1, 0), static_backend.chunks()[1])
    yield result(submit, msgspec.json.encode(Streamed(2)))


def refused(submit: Submit) -> Iterator[tuple[Any, ...]]:
    yield (Failure(submit.request_id, "overloaded", "too much", True),)


def plain(submit: Submit) -> Iterator[tuple[Any, ...]]:
    yield result(submit, static_backend.completion())


def nothing(submit: Submit) -> Iterator[tuple[Any, ...]]:
    yield from ()


@pytest.mark.parametrize(
    ("answer", "expected", "error"),
    [(too_few, STREAM, "chunks are missing"), (refused, PLAIN, "overloaded")],
)
def test_what_a_broken_daemon_does(
    answer: Any, expected: Expected, error: str, tmp_path: Path
) -> None:
    async def test() -> None:
        front = Front(f"ipc://{tmp_path}/front", answer)
        tally = await answers(ZmqLoad(f"ipc://{tmp_path}/front"), expected)
        assert set(tally.errors) == {error}
        front.close()

    run(test())


def test_a_daemon_that_says_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        front = Front(f"ipc://{tmp_path}/front", nothing)
        tally, load = Tally(PLAIN), ZmqLoad(f"ipc://{tmp_path}/front")
        await load.start(3, False, tally)
        tally.end()
        await load.stop(patience_s=0.05)
        assert tally.errors == {"no answer": 3}
        front.close()

    run(test())


def test_workflows_have_four_stages_and_go_to_their_worker(tmp_path: Path) -> None:
    async def test() -> None:
        address = f"ipc://{tmp_path}/front"
        fronts = [Front(wire.worker_address(address, i), plain) for i in range(2)]
        tally = await answers(ZmqLoad(address, workers=2), PLAIN, count=100)
        assert not tally.errors
        for i, front in enumerate(fronts):
            assert front.submits
            assert {wire.worker_of(s.workflow_id, 2) for s in front.submits} == {i}
            assert all(s.last == (s.stage == 3) for s in front.submits)
            assert {s.api for s in front.submits} == {"chat"}
            front.close()
        requests = [s.request_id for front in fronts for s in front.submits]
        assert len(set(requests)) == len(requests)

    run(test())


def test_static_backend_says_what_is_there_and_what_is_not() -> None:
    async def ask(address: str, request: bytes) -> bytes:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    def post(body: bytes) -> bytes:
        head = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def test() -> None:
        async with http_backend() as address:
            for path, wanted in (("/health", b"200 OK"), ("/v1/models", b'"static"')):
                assert wanted in await ask(address, f"GET {path} HTTP/1.1\r\n\r\n".encode())
            assert b" 404 " in await ask(address, b"GET /nowhere HTTP/1.1\r\n\r\n")
            assert b" 404 " in await ask(
                address, b"POST /v1/x HTTP/1.1\r\ncontent-length: 0\r\n\r\n"
            )
            assert b" 400 " in await ask(address, post(b"{"))
            usage = b'{"stream": true, "stream_options": {"include_usage": true}}'
            assert (await ask(address, post(usage))).count(b'"usage"') == 1
            assert b'"usage"' not in await ask(address, post(b'{"stream": true}'))

    run(test())


def test_events_in_either_kind_of_lines() -> None:
    body = b": hello\r\n\r\ndata: 1\r\n\r\ndata: [DONE]\r\n\r\n"
    assert loads.events_of(body) == loads.events_of(body.replace(b"\r", b"")) == [b"1"]
