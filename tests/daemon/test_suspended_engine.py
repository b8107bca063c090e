"""An engine that cannot work for now, with a real daemon: its stages wait, and nothing is lost."""

import asyncio
from pathlib import Path

from chimera_daemon.client import Reply
from chimera_daemon.engines.backend import BackendInfo
from chimera_daemon.messages import Profile
from tests.daemon.harness import ASK, WAIT_S, World, run, sessions, until

INFO = BackendInfo(max_inflight=4, context_tokens=2048, profile=Profile())


def test_stages_wait_until_it_goes_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join(step_s=0.001, reply_tokens=(200, 200))
            first = host.incarnation
            async with world.client() as client:
                under_way = client.workflow().submit(ASK, max_tokens=200)
                await until(lambda: host.running == 1)
                host.suspend("the server is down")
                await until(lambda: _drains(world))
                waiting = client.workflow().submit(ASK, max_tokens=2)
                await asyncio.wait_for(under_way, WAIT_S)
                assert not waiting.done()
                host.resume(INFO)
                await asyncio.wait_for(waiting, WAIT_S)
            assert host.incarnation != first
            assert world.core.has_engine("e", host.incarnation)
            assert world.core.snapshot()["engines"][0]["max_inflight"] == 4
            world.check_empty()

    run(test())


def _drains(world: World) -> bool:
    return world.core.snapshot()["engines"][0]["draining"]


def test_going_on_and_off_under_load_loses_no_stage(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, max_attempts=10) as world:
            hosts = [await world.join(name, step_s=0.0005, reply_tokens=(3, 9)) for name in "ab"]
            async with world.client() as client:
                load = asyncio.ensure_future(sessions(client, 20, stages=40, max_tokens=9))
                for number in range(20):
                    host = hosts[number % 2]
                    host.suspend("the server is down")
                    await asyncio.sleep(0.005 * (number % 3))
                    host.resume(INFO)
                    await until(
                        lambda host=host: (
                            world.core.has_engine(host.engine.name, host.incarnation)
                            and not host.uplinks[0].signed_off
                        ),
                        "its return",
                    )
                outcomes = await asyncio.wait_for(load, WAIT_S)
                assert [o for o in outcomes if not isinstance(o, Reply)] == []
                assert len(outcomes) == 800
            world.check_empty()

    run(test())
