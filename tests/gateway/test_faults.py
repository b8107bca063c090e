"""Clients that leave or do not read, engines that die, and a daemon that goes and comes back."""

import asyncio
import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from chimera_daemon.client.errors import ChimeraError, EngineLost, Overloaded, SlowReader
from chimera_daemon.gateway.errors import from_chimera
from chimera_daemon.messages import ErrorCode
from tests.daemon.harness import run, until
from tests.gateway.harness import CHAT, JSON, Door, chat, request


def test_whoever_leaves_takes_his_request_along(tmp_path: Path) -> None:
    """200 clients, waiting or reading, are gone at random points; every count is zero after."""

    async def test() -> None:
        draw = random.Random(6)

        async def one(door: Door, number: int) -> None:
            line = await door.line()
            data = request(chat(str(number), stream=draw.random() < 0.5))
            half = draw.random() < 0.1
            line.say(data[: draw.randrange(len(data))] if half else data)
            if half or draw.random() < 0.5:
                await asyncio.sleep(draw.random() * 0.2)
            else:
                await line.reader.read(draw.randrange(1, 3000))
            if draw.random() < 0.5:
                line.cut()
            else:
                line.close()

        async with Door(tmp_path, step_s=0.001, slots=16, reply_tokens=(50, 400)) as door:
            await asyncio.gather(*(one(door, number) for number in range(200)))
            await door.quiet()
            await until(lambda: door.gateway.server.open == 0, "closed connections")
            assert door.world.counter("internal_errors") == 0
            assert (await door.ask(body=chat())).status == 200

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_at_once(tmp_path: Path, stream: bool) -> None:
    async def test() -> None:
        async with Door(tmp_path, step_s=0.01, reply_tokens=(100_000, 100_000)) as door:
            line = await door.line()
            line.say(request(chat(stream=stream)))
            host, _ = door.world.hosts["e"]
            await until(lambda: host.running == 1, "a running attempt")
            line.cut()
            await until(lambda: host.running == 0, "a free slot")
            assert door.gateway.relay.failures == 1

    run(test())


def slow_line(door: Door, data: bytes) -> socket.socket:
    """A client that sends and never reads, with little room in its system."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.connect(door.gateway.address)
    line.sendall(data)
    return line


@pytest.mark.parametrize("limit", [{"slow_reader_s": 0.2}, {"max_unread_bytes": 100_000}])
def test_who_does_not_read_a_stream_is_cut(tmp_path: Path, limit: dict[str, Any]) -> None:
    async def test() -> None:
        settings: dict[str, Any] = {"step_s": 0.00001, "reply_tokens": (900_000, 900_000)}
        settings |= {"context_tokens": 1_000_000}
        async with Door(tmp_path, gateway=limit, **settings) as door:
            with slow_line(door, request(chat(stream=True))):
                await until(lambda: door.gateway.readers.cut == 1, "the slow reader to be cut")
                await until(lambda: door.gateway.relay.streams == 0, "its stream to end")
                await until(lambda: door.world.core.idle, "its slot")
                await until(lambda: door.gateway.server.open == 0, "its connection to be cut")
            assert (await door.ask("/version")).status == 200

    run(test())


def test_who_does_not_read_a_large_answer_is_cut(tmp_path: Path) -> None:
    async def test() -> None:
        settings: dict[str, Any] = {"context_tokens": 10_000_000}
        settings |= {"reply_tokens": (900_000, 900_000)}
        async with Door(tmp_path, gateway={"slow_reader_s": 0.2}, **settings) as door:
            answer = await door.ask(body=chat())
            assert len(answer.body) > 3_000_000
            with slow_line(door, request(chat())):
                await until(lambda: door.gateway.readers.cut == 1, "the slow reader to be cut")
                await until(lambda: door.gateway.server.open <= 1, "its connection to be cut")

    run(test())


def test_who_asks_on_and_on_and_reads_nothing_is_cut(tmp_path: Path) -> None:
    """Each answer is small, and together they are more than is kept for anyone."""

    async def test() -> None:
        settings: dict[str, Any] = {"reply_tokens": (4000, 4000)}
        async with Door(tmp_path, gateway={"slow_reader_s": 0.2}, **settings) as door:
            with slow_line(door, request(chat(max_tokens=4000)) * 400):
                await until(lambda: door.gateway.readers.cut == 1, "the slow reader to be cut")
                await until(lambda: door.gateway.server.open == 0, "its connection to be cut")

    run(test())


def test_a_large_answer_may_take_its_time(tmp_path: Path) -> None:
    """It is made already: the bound on what gathers for a stream is not for it."""

    async def test() -> None:
        settings: dict[str, Any] = {"context_tokens": 10_000_000}
        settings |= {"reply_tokens": (900_000, 900_000)}
        async with Door(tmp_path, gateway={"max_unread_bytes": 1000}, **settings) as door:
            with slow_line(door, request(chat(), "Connection: close")) as slow:
                await until(lambda: door.gateway.readers.waiting_bytes > 1000, "a blocked write")
                slow.setblocking(False)
                received = 0
                while part := await asyncio.get_running_loop().sock_recv(slow, 1 << 20):
                    received += len(part)
                assert received > 3_000_000
            assert door.gateway.readers.cut == 0

    run(test())


def test_a_slow_reader_that_reads_gets_all_of_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, step_s=0.0002, reply_tokens=(2000, 2000)) as door:
            async with door.session.post(CHAT, data=chat(stream=True), headers=JSON) as response:
                await asyncio.sleep(0.3)
                text = (await response.read()).decode()
            events = [e for e in text.split("\n\n") if e.startswith("data: {")]
            said = [json.loads(e[6:])["choices"][0]["delta"].get("content") or "" for e in events]
            assert len("".join(said).split(" ")) == 2000

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_wait_outlive_the_daemon(tmp_path: Path, stream: bool) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            await door.world.kill("e")
            asking = [
                asyncio.ensure_future(door.ask(body=chat(str(n), stream=stream))) for n in range(8)
            ]
            await until(lambda: door.gateway.client.pending == 8, "waiting requests")
            await door.restart_daemon()
            await door.world.join("f", "m")
            answers = await asyncio.gather(*asking)
            assert [a.status for a in answers] == [200] * 8
            if stream:
                assert all(a.events[-1] == "[DONE]" for a in answers)

    run(test())


def test_without_a_daemon_requests_fail_after_a_while_and_then_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, give_up_s=0.3) as door:
            door.world.daemon.close()
            for stream in (False, True, False):
                answer = await door.ask(body=chat(stream=stream))
                assert answer.status == 503
                assert answer.error["code"] == "unreachable"
                assert answer.error["type"] == "server_error"
                assert answer.headers["x-should-retry"] == "true"
            await door.restart_daemon()
            await door.world.join("f", "m")
            await until(lambda: door.gateway.client.connected, "the next daemon")
            assert (await door.ask(body=chat())).status == 200

    run(test())


def test_an_engine_that_dies_in_the_middle_of_a_stream_is_an_event(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(
            tmp_path, step_s=0.01, reply_tokens=(10_000, 10_000), daemon={"engine_timeout_s": 0.3}
        ) as door:
            line = await door.line()
            line.say(request(chat(stream=True)))
            await line.reader.readuntil(b"\n\n")
            await door.world.kill("e")
            rest = (await line.reader.readuntil(b"0\r\n\r\n")).decode()
            event = next(e for e in rest.split("\n\n") if '"error"' in e)
            error = json.loads(event.partition("data: ")[2])["error"]
            assert error["code"] == "engine_lost"
            assert "[DONE]" not in rest
            assert door.gateway.relay.failures == 1
            line.say(request(b"{"))  # the connection is still good
            assert (await line.answer()).status == 400
            await door.world.join("f", "m")

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_a_bad_gateway(tmp_path: Path, stream: bool) -> None:
    async def test() -> None:
        async with Door(tmp_path, fail_rate=1.0) as door:
            answer = await door.ask(body=chat(stream=stream))
            assert answer.status == 502
            assert answer.error["code"] == "engine_error"
            assert answer.headers["x-chimera-workflow-id"]

    run(test())


def test_a_full_daemon_says_when_to_come_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(
            tmp_path,
            step_s=0.01,
            slots=1,
            reply_tokens=(10_000, 10_000),
            daemon={"max_queued_stages": 1},
        ) as door:
            lines = [await door.line() for _ in range(3)]
            for line in lines[:2]:
                line.say(request(chat()))
                await until(lambda: sum(door.world.stages.values()) > 0, "a queued stage")
            await until(lambda: door.world.stages["waiting"] == 1, "a full queue")
            answer = await door.ask(body=chat(stream=True))
            assert answer.status == 429
            assert answer.error["code"] == "overloaded"
            assert answer.error["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["x-should-retry"] == "true"
            for line in lines:
                line.cut()

    run(test())


def test_a_draining_daemon_is_unavailable(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            await door.world.daemon.drain()
            answer = await door.ask(body=chat())
            assert answer.status == 503
            assert answer.error["code"] == "draining"

    run(test())


def test_every_error_has_a_status_and_seconds_are_rounded_up() -> None:
    codes = {kind.code for kind in ChimeraError.__subclasses__()} - {"error"}
    assert set(ErrorCode.__args__) <= codes  # type: ignore[attr-defined]
    for kind in ChimeraError.__subclasses__():
        error = from_chimera(kind("text"))
        assert 400 <= error.status <= 504
        assert error.status != 500, kind
        assert json.loads(error.body())["error"]["message"] == "text"
    busy = from_chimera(Overloaded("busy", retry_after_s=0.2))
    assert (busy.status, busy.headers["Retry-After"]) == (429, "1")
    assert from_chimera(EngineLost("gone")).status == 502
    assert from_chimera(SlowReader("slow")).headers["x-should-retry"] == "true"
