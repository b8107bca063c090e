"""The gateway as a process: signals and exit codes."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.daemon.harness import run
from tests.gateway.harness import Door, Line, chat, request

SERVE = """
import logging, sys
from chimera_daemon.config import GatewayConfig
from chimera_daemon.gateway import run_gateway
logging.basicConfig(level="INFO")
config = GatewayConfig(listen=sys.argv[1])
sys.exit(run_gateway(config, sys.argv[2], reuse_port=False))
"""


async def start(listen: str, connect: str, code: str = SERVE) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, listen, connect), stderr=asyncio.subprocess.PIPE
    )


async def ready(process: asyncio.subprocess.Process) -> None:
    """It has said that it serves."""
    assert process.stderr is not None
    while b"gateway: http://" not in (line := await process.stderr.readline()):
        assert line, "the gateway ended before it served"


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_end_and_a_second_one_does_not(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def test() -> None:
        async with Door(tmp_path, step_s=0.01, reply_tokens=(100_000, 100_000)) as door:
            listen = free_address()
            process = await start(listen, door.world.config.front)
            await ready(process)
            host, port = listen.split(":")
            line = Line(*await asyncio.open_connection(host, int(port)))
            line.say(request(chat(stream=True)))
            await line.reader.readuntil(b"\n\n")
            process.send_signal(number)
            await line.reader.readexactly(20_000)  # it goes on
            assert process.returncode is None
            process.send_signal(number)
            assert b"[DONE]" not in await line.closed()
            line.close()
            _, errors = await process.communicate()
            assert process.returncode == 0, errors.decode()
            assert b"Traceback" not in errors

    run(test())


def test_an_address_that_is_taken_is_a_code_of_its_own(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            host, port = door.gateway.address
            process = await start(f"{host}:{port}", door.world.config.front)
            _, errors = await process.communicate()
            assert process.returncode == 3
            assert f"cannot listen on {host}:{port}".encode() in errors
            assert b"Traceback" not in errors

    run(test())


def test_without_aiohttp_it_says_what_to_install() -> None:
    async def test() -> None:
        hidden = "import sys; sys.modules['aiohttp'] = None\n" + SERVE
        process = await start("127.0.0.1:0", "ipc:///tmp/none", hidden)
        _, errors = await process.communicate()
        assert process.returncode == 3
        assert b"pip install 'chimera-daemon[gateway]'" in errors
        assert b"Traceback" not in errors

    run(test())
