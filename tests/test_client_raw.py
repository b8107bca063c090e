"""OpenAI's forms through the client: payloads untouched, streams counted in chunks."""

import asyncio

import msgspec
import pytest

from chimera_daemon.client import (
    BadRequest,
    Cancelled,
    EngineLost,
    ProtocolError,
    RawStream,
    RequestTimeout,
    StreamInterrupted,
    TooLarge,
    connect,
)
from chimera_daemon.messages import NO_LIMIT, Cancel, Chunk, Hints, Streamed, Submit, Tries
from chimera_daemon.wire import encode
from fake_front import RECEIPT, FakeFront, Received, run, until

BODY = b'{"messages": [{"role": "user", "content": "\xff not even UTF-8'


def streamed(chunks: int) -> bytes:
    return msgspec.json.encode(Streamed(chunks))


async def read(stream: RawStream) -> list[bytes]:
    return [payload async for payloads in stream for payload in payloads]


def test_a_request_and_its_answer_pass_untouched() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            call = client.request(BODY, api="chat", workflow_id="w", last=True)
            received = await front.next(Submit)
            assert received.payload == BODY
            assert received.submit == Submit(
                call.request_id, "w", max_tokens=NO_LIMIT, api="chat", last=True
            )
            received.answer(b"\x00 no JSON", output_tokens=7)
            reply = await call
            assert reply.payload == b"\x00 no JSON"
            assert (reply.model, reply.engine, reply.finish_reason) == ("small", "small-0", "stop")
            assert (reply.usage.output_tokens, reply.receipt) == (7, RECEIPT)
            assert reply.request_id == call.request_id
            assert reply.latency_s > 0
            assert client.pending == 0

    run(body)


def test_all_of_the_header_is_passed_on() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            settings = {
                "workflow_id": "w",
                "stage": 3,
                "kind": "math",
                "model": "small",
                "max_tokens": 9,
                "prompt_tokens": 5,
                "hints": Hints(output_tokens=4),
                "restart": True,
                "tries": Tries(left=2),
                "optional": True,
            }
            for stream, launch in ((False, client.request), (True, client.relay)):
                pending = launch(BODY, api="completions", **settings)
                expected = Submit(pending.request_id, stream=stream, api="completions", **settings)
                assert (await front.next(Submit)).submit == expected

    run(body)


def test_errors_and_limits() -> None:
    async def body(front: FakeFront) -> None:
        front.max_payload_bytes = 100
        async with connect(front.address) as client:
            with pytest.raises(BadRequest, match="api="):
                client.request(BODY, api="text", workflow_id="w")
            with pytest.raises(BadRequest, match="api="):
                client.relay(BODY, api="text", workflow_id="w")
            with pytest.raises(TooLarge):
                client.relay(b"x" * 101, api="chat", workflow_id="w")
            with pytest.raises(RequestTimeout):
                await client.request(BODY, api="chat", workflow_id="w", timeout_s=0.02)
            await front.next(Cancel)
            stream = client.relay(BODY, api="chat", workflow_id="w", timeout_s=0.02)
            with pytest.raises(RequestTimeout):
                await read(stream)
            await front.next(Cancel)
            front.on_submit = lambda r: r.failure("engine_lost", retry_after_s=2.5)
            with pytest.raises(EngineLost) as caught:
                await client.request(BODY, api="chat", workflow_id="w")
            assert (caught.value.retryable, caught.value.retry_after_s) == (True, 2.5)
            front.on_submit = lambda r: r.answer(b"{}")
            with pytest.raises(ProtocolError):
                await read(client.relay(BODY, api="chat", workflow_id="w"))
            assert client.pending == 0

    run(body)


def test_stream_of_chunks() -> None:
    async def body(front: FakeFront) -> None:
        async with (
            connect(front.address) as client,
            client.relay(BODY, api="chat", workflow_id="w") as stream,
        ):
            received = await front.next(Submit)
            assert received.submit.stream
            for n, payload in enumerate((b"one", b"\xff", b"three")):
                received.piece(n, payload)
            await until(lambda: stream.unread_bytes == 9)
            batches = aiter(stream)
            assert await anext(batches) == [b"one", b"\xff", b"three"]
            assert stream.unread_bytes == 0
            received.piece(1, b"\xff")  # a repeated one
            received.piece(3, b"four")
            assert await anext(batches) == [b"four"]
            assert not stream.ended
            with pytest.raises(RuntimeError, match="not ended"):
                _ = stream.reply
            received.answer(streamed(4), output_tokens=4)
            assert [batch async for batch in batches] == []
            assert stream.reply.payload == streamed(4)
            assert stream.reply.usage.output_tokens == 4
        assert front.count(Cancel) == 0

    run(body)


def test_failure_comes_after_the_chunks_before_it() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            stream = client.relay(BODY, api="chat", workflow_id="w")
            received = await front.next(Submit)
            received.piece(0, b"so far")
            received.failure("engine_lost")
            batches = aiter(stream)
            assert await anext(batches) == [b"so far"]
            with pytest.raises(EngineLost):
                await anext(batches)
            with pytest.raises(EngineLost):
                _ = stream.reply

    run(body)


@pytest.mark.parametrize("delivered", [False, True])
@pytest.mark.parametrize("how", ["offset", "frame", "count"])
def test_a_missing_chunk_is_never_hidden(how: str, delivered: bool) -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            stream = client.relay(BODY, api="chat", workflow_id="w", restart=True)
            received = await front.next(Submit)
            received.piece(0, b"a")
            batches = aiter(stream)
            if delivered:
                assert await anext(batches) == [b"a"]
            if how == "offset":
                received.piece(2, b"c")
            elif how == "frame":
                received.raw(encode(Chunk(received.submit.request_id, 1, 1)))
                received.piece(2, b"c")
            else:
                received.answer(streamed(2))
            with pytest.raises(StreamInterrupted, match="lost"):
                _ = [batch async for batch in batches]
            if how != "count":
                await front.next(Cancel)
            assert client.pending == 0

    run(body)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("delivered", [False, True])
@pytest.mark.parametrize("how", ["daemon", "attempt"])
def test_another_attempt(how: str, delivered: bool, restart: bool) -> None:
    """Seamless if the reader has nothing yet, else an error, also where a restart was allowed."""

    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            stream = client.relay(BODY, api="chat", workflow_id="w", restart=restart)
            received = await front.next(Submit)
            assert received.submit.restart is restart
            received.piece(0, b"old", attempt_id=5)
            batches = aiter(stream)
            if delivered:
                assert await anext(batches) == [b"old"]
            else:
                await until(lambda: stream.unread_bytes == 3)
            if how == "daemon":
                await front.restart("two")
                if not delivered:
                    received = await front.next(Submit)
            if how == "attempt" or not delivered:
                received.piece(0, b"new", attempt_id=6)
                received.piece(1, b"late", attempt_id=5 if how == "attempt" else 1)
                received.answer(streamed(1))
            if not delivered:
                await until(lambda: stream.ended)
                assert [p async for batch in batches for p in batch] == [b"new"]
                assert stream.reply.model == "small"
                return
            with pytest.raises(StreamInterrupted, match="start again"):
                _ = [batch async for batch in batches]
            await front.next(Cancel)

    run(body)


def test_leaving_cancels() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            async with client.relay(BODY, api="chat", workflow_id="w") as stream:
                (await front.next(Submit)).piece(0, b"enough")
                async for _ in stream:
                    break
            await front.next(Cancel)
            with pytest.raises(Cancelled):
                _ = stream.reply
            reader = asyncio.ensure_future(read(client.relay(BODY, api="chat", workflow_id="w")))
            await front.next(Submit)
            reader.cancel()
            await front.next(Cancel)
            call = client.request(BODY, api="chat", workflow_id="w")
            await front.next(Submit)
            call.cancel()
            await front.next(Cancel)
            with pytest.raises(Cancelled):
                await call
            waiting = asyncio.ensure_future(
                _wait(client.request(BODY, api="chat", workflow_id="w"))
            )
            await front.next(Submit)
            waiting.cancel()
            await front.next(Cancel)
            assert client.pending == 0

    async def _wait(call: object) -> object:
        return await call  # type: ignore[misc]

    run(body)


def test_many_streams_and_requests_side_by_side() -> None:
    def answer(received: Received) -> None:
        submit = received.submit
        if not submit.stream:
            received.answer(received.payload)
            return
        for n in range(5):
            received.piece(n, received.payload + b"%d" % n)
        received.answer(streamed(5))

    async def body(front: FakeFront) -> None:
        front.on_submit = answer
        async with connect(front.address) as client:
            names = [b"%d-" % n for n in range(100)]
            streams = [client.relay(n, api="chat", workflow_id="w") for n in names]
            calls = [client.request(n, api="completions", workflow_id="w") for n in names]
            for name, stream, call in zip(names, streams, calls, strict=True):
                assert await read(stream) == [name + b"%d" % n for n in range(5)]
                assert (await call).payload == name
            assert client.pending == 0

    run(body)
