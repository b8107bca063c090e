"""The connection between daemon and host breaks while both live: what was under way runs again."""

import asyncio
import contextlib
from pathlib import Path

from chimera_daemon.client import Reply
from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.host import Host
from tests.daemon.harness import World, run, sessions, until

BREAKS = 5
STAGES_BETWEEN = 100


class Relay:
    """Passes bytes between two unix sockets until told to cut every connection."""

    def __init__(self, path: Path, target: Path) -> None:
        self._path, self._target = path, target
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_unix_server(self._accept, self._path)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        far, far_out = await asyncio.open_unix_connection(self._target)
        self._writers += [near_out, far_out]
        await asyncio.gather(self._pass(near, far_out), self._pass(far, near_out))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()


def test_connections_cut_under_load_lose_no_stage(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            World(tmp_path, max_attempts=2 * BREAKS) as world,
            Relay(tmp_path / "relay", tmp_path / "b") as relay,
        ):
            engine = EngineConfig("e", "m", "echo", args={"reply_tokens": (3, 3)})
            host = Host(engine, f"ipc://{tmp_path}/relay")
            serving = asyncio.ensure_future(host.run())
            await until(world.daemon.engines_of, "the engine")
            async with world.client() as client:
                load = asyncio.ensure_future(sessions(client, 20, stages=100, max_tokens=8))
                for number in range(1, BREAKS + 1):
                    goal = number * STAGES_BETWEEN
                    await until(lambda goal=goal: world.counter("completed") >= goal, f"{goal}")
                    relay.cut()
                outcomes = await load
            assert len(outcomes) == 20 * 100
            assert all(isinstance(o, Reply) for o in outcomes)
            assert world.counter("engines_lost") >= 1
            world.check_empty()
            host.stop(0.0)
            await serving

    run(test())
