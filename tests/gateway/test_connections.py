"""HTTP itself: what comes in pieces, at once, again and again, slowly, or too much."""

import asyncio
import socket
from pathlib import Path

import pytest

from chimera_daemon.config import GatewayConfig
from chimera_daemon.gateway.server import Gateway, GatewayError
from tests.daemon.harness import run, until
from tests.gateway.harness import CHAT, Door, chat, request


def test_a_connection_serves_many_requests(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            line = await door.line()
            for number in range(5):
                line.say(
                    request(chat(str(number), stream=number % 2 == 1), f"x-request-id: {number}")
                )
                answer = await line.answer()
                assert (answer.status, answer.headers["x-request-id"]) == (200, str(number))
                line.say(request(b"{", "x-request-id: bad"))
                assert (await line.answer()).status == 400
            assert door.gateway.server.open == 1
            line.say(request(chat(), "Connection: close"))
            assert (await line.answer()).status == 200
            assert await line.closed() == b""

    run(test())


def test_requests_in_one_packet_are_answered_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, step_s=0.001) as door:
            line = await door.line()
            line.say(b"".join(request(chat(str(n)), f"x-request-id: {n}") for n in range(100)))
            names = [(await line.answer()).headers["x-request-id"] for _ in range(100)]
            assert names == [str(n) for n in range(100)]

    run(test())


def test_a_request_may_come_byte_by_byte(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            line = await door.line()
            for byte in request(chat("ü")):
                line.say(bytes([byte]))
                await asyncio.sleep(0)
            assert (await line.answer()).status == 200

    run(test())


def test_chunked_uploads(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            line = await door.line()
            body = chat("x" * 5000)
            line.say(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                "Transfer-Encoding: chunked\r\n\r\n".encode()
            )
            for begin in range(0, len(body), 1000):
                part = body[begin : begin + 1000]
                line.say(b"%x\r\n%b\r\n" % (len(part), part))
                await asyncio.sleep(0.001)
            line.say(b"0\r\n\r\n")
            answer = await line.answer()
            assert answer.status == 200
            assert answer.json["usage"]["prompt_tokens"] > 1000

    run(test())


def test_a_client_that_asks_first_is_told_to_go_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            line = await door.line()
            body = chat()
            head, _, _ = request(body, "Expect: 100-continue").partition(b"\r\n\r\n")
            line.say(head + b"\r\n\r\n")
            assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            line.say(body)
            assert (await line.answer()).status == 200

    run(test())


def test_old_clients_get_a_stream_that_ends_with_the_connection(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            line = await door.line()
            line.say(request(chat(stream=True, max_tokens=3)).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            answer = await line.answer()
            assert answer.status == 200
            assert "transfer-encoding" not in answer.headers
            assert answer.events[-1] == "[DONE]"

    run(test())


def test_old_clients_may_keep_their_connection(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            line = await door.line()
            for _ in range(2):
                old = request(chat(), "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
                line.say(old)
                answer = await line.answer()
                assert answer.status == 200
                assert answer.headers["connection"] == "keep-alive"
            line.say(request(chat()).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            assert (await line.answer()).status == 200
            assert await line.closed() == b""

    run(test())


def test_a_body_that_does_not_come_is_waited_for_so_long(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, gateway={"body_timeout_s": 0.05}) as door:
            line = await door.line()
            line.say(request(chat())[:-3])
            answer = await line.answer()
            assert answer.status == 408
            assert answer.error["code"] == "timeout"
            assert answer.headers["x-should-retry"] == "true"

    run(test())


def test_idle_connections_and_half_requests_are_closed(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, gateway={"keep_alive_s": 0.1}) as door:
            idle, begun, used = await door.line(), await door.line(), await door.line()
            begun.say(b"POST /v1/chat/comp")
            used.say(request(chat()))
            assert (await used.answer()).status == 200
            for line in (idle, begun, used):
                assert await line.closed() == b""
            await until(lambda: door.gateway.server.open == 0, "closed connections")

    run(test())


def test_connections_over_the_limit_are_told_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, gateway={"max_connections": 3}) as door:
            lines = [await door.line() for _ in range(3)]
            await until(lambda: door.gateway.server.open == 3)
            over = await door.line()
            answer = await over.answer()
            assert answer.status == 503
            assert answer.error["code"] == "overloaded"
            assert answer.headers["retry-after"] == "1"
            assert await over.closed() == b""
            lines[0].close()
            await until(lambda: door.gateway.server.open == 2)
            again = await door.line()
            again.say(request(chat()))
            assert (await again.answer()).status == 200
            assert door.gateway.server.refused == 1

    run(test())


@pytest.mark.parametrize(
    ("listen", "connect", "message"),
    [
        ("localhost", "ipc:///tmp/none", "HOST:PORT"),
        ("127.0.0.1:99999", "ipc:///tmp/none", "HOST:PORT"),
        (":80", "ipc:///tmp/none", "HOST:PORT"),
        ("256.1.1.1:0", "ipc:///tmp/none", "cannot listen"),
        ("127.0.0.1:0", "http://x", "tcp://HOST:PORT"),
    ],
)
def test_what_cannot_be_started_says_why(listen: str, connect: str, message: str) -> None:
    async def test() -> None:
        with pytest.raises(GatewayError, match=message):
            await Gateway(GatewayConfig(listen=listen), connect).start()

    run(test())


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            host, port = door.gateway.address
            config = GatewayConfig(listen=f"{host}:{port}")
            for reuse_port in (False, True):
                second = Gateway(config, door.world.config.front, reuse_port=reuse_port)
                with pytest.raises(GatewayError, match=f"cannot listen on {host}:{port}"):
                    await second.start()

    run(test())


def test_gateways_share_a_port(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            front = door.world.config.front
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            config = GatewayConfig(listen=f"127.0.0.1:{port}")
            async with (
                Gateway(config, front, reuse_port=True) as first,
                Gateway(config, front, reuse_port=True) as second,
            ):
                for _ in range(40):
                    async with door.session.post(
                        f"http://127.0.0.1:{port}{CHAT}",
                        data=chat(),
                        headers={"Content-Type": "application/json", "Connection": "close"},
                    ) as response:
                        assert response.status == 200
                        await response.read()
                assert first.relay.requests + second.relay.requests == 40
                assert first.relay.requests > 0 < second.relay.requests

    run(test())


def test_stopping_lets_requests_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, step_s=0.01, drain_s=30.0) as door:
            busy, idle = await door.line(), await door.line()
            busy.say(request(chat(stream=True)))
            await busy.reader.readuntil(b"\n\n")
            closing = asyncio.ensure_future(door.gateway.close())
            assert await idle.closed() == b""
            rest = await busy.closed()
            assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            await closing
            with pytest.raises(ConnectionError):
                await door.line()
            await door.gateway.start()  # for the end of the test

    run(test())


def test_stopping_does_not_wait_for_ever(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, step_s=0.05, reply_tokens=(5000, 5000), drain_s=0.1) as door:
            line = await door.line()
            line.say(request(chat(stream=True)))
            await line.reader.readuntil(b"\n\n")
            await door.gateway.close()
            assert b"[DONE]" not in await line.closed()
            await until(lambda: door.world.core.idle, "the request to be cancelled")
            await door.gateway.start()

    run(test())
