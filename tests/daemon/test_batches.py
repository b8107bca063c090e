"""Batches of messages: sent to those who can read them, and read from everybody."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq

from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    EngineFinished,
    FrontMessage,
    Ping,
    Pong,
    Register,
    Result,
    Run,
    Submit,
    Usage,
)
from chimera_daemon.wire import BATCH, decode_client, decode_engine, encode, pack, unpack
from tests.daemon.harness import REGISTER, World, body, run

STAGES = 40


class Bare:
    """A DEALER that takes nothing apart: ``batches`` counts those that came."""

    def __init__(self, context: "zmq.Context[Any]", address: str) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(address)
        self.batches = 0

    def say(self, *messages: Sequence[bytes]) -> None:
        single = [frame for message in messages for frame in message]
        self.socket.send_multipart(pack(messages) if len(messages) > 1 else single)

    async def hear(self, enough: int) -> list[list[bytes]]:
        """So many messages at least."""
        heard: list[list[bytes]] = []
        while len(heard) < enough:
            if not self.socket.poll(0):
                await asyncio.sleep(0.001)
                continue
            frames = self.socket.recv_multipart()
            inside = unpack(frames[1]) if frames[0] == BATCH else None
            self.batches += inside is not None
            heard += [frames] if inside is None else inside
        return heard


def submit(number: int) -> tuple[bytes, bytes]:
    return encode(Submit(f"r{number}", f"w{number}", max_tokens=4)), body()


def submits() -> list[tuple[bytes, bytes]]:
    return [submit(number) for number in range(STAGES)]


def hello(batches: bool) -> list[bytes]:
    message: FrontMessage = Ping(PROTOCOL_VERSION, batches=batches)
    return [encode(message)]


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_gets_batches_if_it_reads_them(tmp_path: Path, reads: bool) -> None:
    async def test() -> None:
        context: zmq.Context[Any] = zmq.Context()
        async with World(tmp_path) as world:
            await world.join()
            client = Bare(context, world.config.front)
            client.say(hello(reads))
            (pong,) = await client.hear(1)
            said = decode_client(pong[0])
            assert isinstance(said, Pong)
            assert said.batches
            client.say(*submits())
            answers = [decode_client(frames[0]) for frames in await client.hear(STAGES)]
            assert sorted(a.request_id for a in answers if isinstance(a, Result)) == sorted(
                f"r{number}" for number in range(STAGES)
            )
            assert (client.batches > 0) == reads
            client.say(hello(False))  # it has been replaced by one that does not
            await client.hear(1)
            before = client.batches
            client.say(*(submit(number) for number in range(100, 110)))
            await client.hear(10)
            assert client.batches == before
            client.socket.close()
        context.term()

    run(test())


@pytest.mark.parametrize("reads", [False, True])
def test_an_engine_gets_batches_if_it_reads_them(tmp_path: Path, reads: bool) -> None:
    async def test() -> None:
        context: zmq.Context[Any] = zmq.Context()
        async with World(tmp_path) as world:
            engine = Bare(context, world.config.back)
            register = Register(
                "bare", 1, "m", "test", STAGES, 1000, REGISTER.profile, PROTOCOL_VERSION,
                batches=reads,
            )  # fmt: skip
            engine.say([encode(register)])
            await engine.hear(1)
            client = Bare(context, world.config.front)
            client.say(*submits())
            runs = [decode_engine(frames[0]) for frames in await engine.hear(STAGES)]
            started = [message for message in runs if isinstance(message, Run)]
            assert len(started) == STAGES
            assert (engine.batches > 0) == reads
            done = [EngineFinished(each.attempt_id, Usage(1, 1), "stop") for each in started]
            engine.say(*((encode(message), b'{"text":"x"}') for message in done))
            await client.hear(STAGES)
            engine.socket.close()
            client.socket.close()
        context.term()

    run(test())


def test_garbage_in_a_batch_costs_nobody_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw()
            raw.frames(*pack([submit(1), (b"garbage",), submit(2), (BATCH, b"\x90"), submit(3)]))
            for number in (1, 2, 3):
                await raw.result(f"r{number}")
            assert len(raw.answers("")) == world.counter("unreadable_from_clients") == 2

    run(test())


def test_the_real_client_and_host_use_batches(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            packed: list[int] = []
            for channel in (world.daemon._front, world.daemon._back):  # pyright: ignore[reportPrivateUsage]
                parcel = channel._parcel  # pyright: ignore[reportPrivateUsage]

                def counted(batch: Any, parcel: Any = parcel) -> Any:
                    packed.append(len(batch))
                    return parcel(batch)

                channel._parcel = counted  # pyright: ignore[reportPrivateUsage]
            async with world.client() as client:

                async def one(number: int) -> None:
                    async with client.workflow(workflow_id=f"w{number}") as workflow:
                        await workflow.generate([{"role": "user", "content": "x"}], max_tokens=4)

                await asyncio.gather(*(one(number) for number in range(STAGES)))
            assert max(packed) > 1

    run(test())
