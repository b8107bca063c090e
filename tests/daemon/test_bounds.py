"""Over a bound: a clear rejection that says when to come back, and no growth."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from chimera_daemon import daemon as daemon_module
from chimera_daemon.client import SlowReader
from chimera_daemon.config import Config
from chimera_daemon.messages import (
    Chunk,
    DaemonBeat,
    EngineChunk,
    EngineFinished,
    GetStatus,
    Run,
    Shutdown,
    Stage,
    Submit,
    Usage,
)
from chimera_daemon.prior import Deliver, PriorPredictor
from chimera_daemon.wire import decode_client, encode
from tests.daemon.harness import REGISTER, WAIT_S, World, body, run, until

SLOW = {"step_s": 0.02, "reply_tokens": (1000, 1000)}


@pytest.mark.parametrize(
    ("bound", "says"),
    [
        ({"max_queued_stages": 3}, "stages wait"),
        ({"max_queued_bytes": 3 * len(body())}, "bytes wait"),
        ({"max_workflows": 4}, "workflows"),
    ],
)
def test_work_over_a_bound(tmp_path: Path, bound: dict[str, Any], says: str) -> None:
    """One runs, three wait, the fifth is refused, and taken again once there is room."""

    async def test() -> None:
        async with World(tmp_path, **bound) as world:
            host = world.raw_host()
            host.register(max_inflight=1)
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            for number in range(5):
                raw.submit(f"r{number}", workflow_id=f"w{number}")
            failure = await raw.failure("r4", "overloaded")
            assert says in failure.message
            assert failure.retryable
            assert failure.retry_after_s is not None
            assert failure.retry_after_s > 0
            assert world.stages == {"waiting": 3, "running": 1, "without_engine": 0}
            for number in range(4):
                started = (await host.runs(number + 1))[number]
                finished = EngineFinished(started.attempt_id, Usage(1, 1), "stop")
                host.say(finished, b'{"text":"x"}')
            for number in range(4):
                await raw.result(f"r{number}")
            raw.submit("again", workflow_id="w4")
            await host.runs(5)
            world.check()

    run(test())


def test_too_many_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "_MAX_CLIENTS", 3)

    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raws = [world.raw() for _ in range(3)]
            for raw in raws:
                await raw.pong()
            late = world.raw()
            late.submit("r")
            failure = await late.failure("", "overloaded")
            assert failure.retryable
            assert failure.retry_after_s
            raws[0].submit("r")
            await raws[0].result("r")

    run(test())


def test_too_many_engines(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, max_engines=2) as world:
            await world.join("a")
            await world.join("b")
            late = world.raw_host()
            late.register(engine_id="c")
            assert "max_engines" in (await late.next(Shutdown)).reason
            assert sorted(world.daemon.engines_of()) == ["a", "b"]
            await world.serves()
            again = world.raw_host()
            again.register(engine_id="b")  # one that takes a name over needs no room
            assert (await again.next(DaemonBeat)).known
            assert sorted(world.daemon.engines_of()) == ["a", "b"]

    run(test())


class Never(PriorPredictor):
    """Does not answer."""

    def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
        pass


class Deaf:
    """A client that sends and never reads, with queues as short as they can be."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in ((zmq.RCVHWM, 1), (zmq.RCVBUF, 1), (zmq.LINGER, 0)):
            self._socket.setsockopt(option, value)
        self._socket.connect(address)

    async def send(self, *frames: bytes) -> None:
        """Waits for room, while the loop runs."""
        await until(lambda: self._socket.poll(0, zmq.POLLOUT))
        self._socket.send_multipart(frames)

    def drain(self) -> list[list[bytes]]:
        """Read all that is there at last."""
        messages: list[list[bytes]] = []
        while self._socket.poll(200):
            messages.append(self._socket.recv_multipart())
        return messages

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def test_client_that_never_reads_is_cut(tmp_path: Path) -> None:
    """Its answers are held up to a bound, then its work is cancelled; others feel nothing."""

    async def test() -> None:
        async with World(tmp_path, send_hwm=16, reply_keep=20) as world:
            host = await world.join("slow", "slow", **SLOW)
            await world.join("e", "m", reply_tokens=(500, 500))
            deaf = Deaf(world.config.front)
            try:
                running = Submit("running", "w", model="slow", max_tokens=1000)
                await deaf.send(encode(running), body())
                await until(lambda: host.running)
                for number in range(3000):
                    submit = Submit(f"r{number}", "w", model="m", max_tokens=500)
                    await deaf.send(encode(submit), body())
                    if not number % 100:
                        await world.serves()
                        (worst,) = [max(len(c.outbox) for c in world.daemon._clients.values())]
                        assert worst <= 16
                        assert len(world.daemon._answers) <= 20
                    if world.daemon.counters["slow_clients_cut"]:
                        break
                    await asyncio.sleep(0)
                await until(lambda: world.daemon.counters["slow_clients_cut"])
                await until(lambda: not host.running)
                await until(lambda: world.counter("failed_slow_reader"))
                await world.serves()
                world.check()
            finally:
                deaf.close()

    run(test())


def test_bytes_for_a_client_that_never_reads_are_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        limit = 100_000
        async with World(tmp_path, send_hwm=8, reply_keep_bytes=limit) as world:
            deaf = Deaf(world.config.front)
            try:
                for number in range(20_000):
                    await deaf.send(encode(GetStatus(f"s{number}" + "x" * 100)))
                    if world.daemon.counters["slow_clients_cut"]:
                        break
                    if not number % 20:
                        await asyncio.sleep(0)
                        held = [c.outbox_bytes for c in world.daemon._clients.values()]
                        assert all(h <= limit for h in held)
                await until(lambda: world.daemon.counters["slow_clients_cut"])
                await world.join()
                await world.serves()
            finally:
                deaf.close()

    run(test())


def test_chunks_for_a_client_that_never_reads_are_dropped(tmp_path: Path) -> None:
    """The answer has the whole text: one who reads late still gets all of it."""

    async def test() -> None:
        async with World(tmp_path, send_hwm=8) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            deaf = Deaf(world.config.front)
            try:
                await deaf.send(encode(Submit("r", "w", stream=True)), body())
                (started,) = await host.runs()
                for number in range(5000):
                    host.say(EngineChunk(started.attempt_id, number), b"x" * 1000)
                host.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b"{}")
                await until(lambda: world.counter("completed"))
                assert world.daemon.chunks_dropped
                (client,) = world.daemon._clients.values()
                assert len(client.outbox) <= 1
                # Whoever reads again gets what was held, without asking.
                await until(lambda: deaf.drain() and not client.outbox)
                await world.join("e", "m")
                world.check_empty()
            finally:
                deaf.close()

    run(test())


def test_chunks_in_openai_form_wait_in_order_or_the_client_is_cut(tmp_path: Path) -> None:
    """Nothing else has their text: a reader gets all of them in order, or an error."""

    async def test() -> None:
        async with World(tmp_path, send_hwm=1200) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            deaf = Deaf(world.config.front)
            try:
                await deaf.send(encode(Submit("r", "w", stream=True, api="chat")), body())
                (started,) = await host.runs()
                for number in range(2000):
                    host.say(EngineChunk(started.attempt_id, number), b"x" * 2000)
                host.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b"{}")
                await until(lambda: world.counter("completed"))
                (client,) = world.daemon._clients.values()
                assert client.outbox
                assert not world.daemon.chunks_dropped
                seen: list[int] = []

                def all_read() -> bool:
                    for frames in deaf.drain():
                        message = decode_client(frames[0])
                        if isinstance(message, Chunk):
                            seen.append(message.offset)
                    return len(seen) == 2000

                await until(all_read)
                assert seen == list(range(2000))
            finally:
                deaf.close()

    run(test())


def test_slow_reader_is_told_when_it_reads_again(tmp_path: Path) -> None:
    """The real client: while it is cut its requests end with a retryable error, none hangs."""

    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join(**SLOW)
            async with world.client() as client:
                workflow = client.workflow()
                call = workflow.submit([{"role": "user", "content": "x"}], max_tokens=1000)
                await until(lambda: host.running)
                (peer,) = world.daemon._clients.values()
                message = "the client does not read its answers"
                world.daemon._abandon(peer, "slow_reader", message)
                with pytest.raises(SlowReader) as caught:
                    await asyncio.wait_for(call, WAIT_S)
                assert caught.value.retryable
                world.check_empty()

    run(test())


def test_engine_that_takes_no_more_is_lost(tmp_path: Path) -> None:
    """Its queue is full: the attempts go elsewhere instead of waiting for it."""

    async def test() -> None:
        async with World(tmp_path, send_hwm=8, engine_timeout_s=1000) as world:
            deaf = Deaf(world.config.back)
            try:
                await deaf.send(encode(msgspec.structs.replace(REGISTER, max_inflight=1000)))
                await until(lambda: world.daemon.engines_of())
                raw = world.raw()
                # Small payloads pile up in the kernel's buffers: send large ones.
                big = body("x" * 100_000)
                sent = 0
                while not world.counter("engines_lost"):
                    raw.submit(f"r{sent}", big, workflow_id=f"w{sent}", max_tokens=1)
                    sent += 1
                    await raw.pong()
                assert not world.daemon.engines_of()
                await world.join("good", "m", max_inflight=2)
                for number in range(sent):
                    await raw.result(f"r{number}")
                    assert len(raw.answers(f"r{number}")) == 1
                world.check_empty()
            finally:
                deaf.close()

    run(test())


def test_stages_that_wait_for_a_prediction_are_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, predictor=Never(Config()), max_queued_stages=2) as world:
            raw = world.raw()
            for number in range(3):
                raw.submit(f"r{number}")
            failure = await raw.failure("r2", "overloaded")
            assert failure.retry_after_s
            assert "prediction" in failure.message
            assert len(world.daemon._predicting) == 2

    run(test())


def test_run_is_sent_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("r")
            await host.runs()
            for _ in range(3):
                host.register()  # saying again that it is here starts nothing anew
            await host.next(DaemonBeat, 4)
            assert len(host.of(Run)) == 1

    run(test())
