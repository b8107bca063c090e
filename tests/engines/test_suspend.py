"""A backend that cannot work for now: the host signs off, and on again when it can."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from chimera_daemon.engines.backend import BackendInfo, Events
from chimera_daemon.engines.echo import EchoBackend, EchoOptions
from chimera_daemon.engines.host import Host
from chimera_daemon.messages import Profile
from tests.engines.conftest import chat, echo_engine
from tests.engines.fake_daemon import WAIT_S, FakeDaemon, until

INFO = BackendInfo(max_inflight=3, context_tokens=100, profile=Profile())


class Away(EchoBackend):
    """An echo that is suspended from the start, and may go on before its start has returned."""

    def __init__(self, resumed: bool) -> None:
        super().__init__(EchoOptions())
        self._resumed = resumed

    async def start(self, events: Events) -> BackendInfo:
        info = await super().start(events)
        events.suspend("the server is down")
        if self._resumed:
            events.resume(INFO)
        return info


def run(
    folder: Path,
    body: Callable[[FakeDaemon, Host], Awaitable[None]],
    backend: EchoBackend | None = None,
) -> None:
    async def main() -> None:
        daemon = FakeDaemon(f"ipc://{folder}/back")
        daemon.start()
        options = EchoOptions(step_s=0.001, reply_tokens=(2000, 2000))
        host = Host(echo_engine(), daemon.address, backend or EchoBackend(options))
        task = asyncio.ensure_future(host.run())
        try:
            await asyncio.wait_for(body(daemon, host), WAIT_S)
        finally:
            host.stop(0.0)
            await asyncio.wait_for(task, WAIT_S)
            daemon.stop()

    asyncio.run(main())


def test_without_attempts(tmp_path: Path) -> None:
    async def body(daemon: FakeDaemon, host: Host) -> None:
        first = await daemon.ready()
        await daemon.beat()
        for _ in range(2):  # the second time without effect
            host.suspend("the server is down")
        await until(lambda: daemon.deregisters)
        assert daemon.deregisters[0].incarnation == first.incarnation
        assert (await daemon.beat()).incarnation == first.incarnation  # it is still heard of
        refused = await daemon.submit(chat("x"), 5).failed()
        assert (refused.code, refused.retryable) == ("engine_lost", True)
        assert len(daemon.registers) == 1
        for _ in range(2):
            host.resume(INFO)
        second = await daemon.ready(2)
        assert second.incarnation not in (0, first.incarnation)
        assert (second.max_inflight, second.context_tokens) == (3, 100)
        assert (await daemon.beat()).incarnation == second.incarnation
        assert (len(daemon.registers), len(daemon.deregisters)) == (2, 1)
        await daemon.submit(chat("x"), 5).finished()

    run(tmp_path, body)


def test_attempts_go_on_and_come_first(tmp_path: Path) -> None:
    async def body(daemon: FakeDaemon, host: Host) -> None:
        await daemon.ready()
        attempts = [daemon.submit(chat("x"), tokens) for tokens in (100, 300)]
        await until(lambda: host.running == 2)
        host.suspend("the server is down")
        await until(lambda: daemon.deregisters)
        host.resume(INFO)
        await attempts[0].finished()
        assert set((await daemon.beat()).progress) == {attempts[1].attempt_id}
        assert len(daemon.registers) == 1
        await attempts[1].finished()
        again = await daemon.ready(2)
        assert again.incarnation != daemon.registers[0].incarnation

    run(tmp_path, body)


def test_an_abort_may_be_what_it_waits_for(tmp_path: Path) -> None:
    async def body(daemon: FakeDaemon, host: Host) -> None:
        await daemon.ready()
        attempt = daemon.submit(chat("x"), 1900)
        await until(lambda: host.running == 1)
        host.suspend("the server is down")
        host.resume(INFO)
        await until(lambda: daemon.deregisters)
        daemon.abort(attempt.attempt_id)
        await daemon.ready(2)

    run(tmp_path, body)


def test_suspended_from_the_start(tmp_path: Path) -> None:
    async def body(daemon: FakeDaemon, host: Host) -> None:
        await until(lambda: len(daemon.beats) > 2, "heartbeats before any registration")
        assert not daemon.registers
        host.resume(INFO)
        assert (await daemon.ready()).max_inflight == 3
        await daemon.submit(chat("x"), 5).finished()

    run(tmp_path, body, Away(resumed=False))


def test_resumed_before_its_start_has_returned(tmp_path: Path) -> None:
    async def body(daemon: FakeDaemon, host: Host) -> None:
        assert (await daemon.ready()).max_inflight == 3

    run(tmp_path, body, Away(resumed=True))


def test_the_daemon_restarts_meanwhile(tmp_path: Path) -> None:
    """Not known there any more, and not to be."""

    async def body(daemon: FakeDaemon, host: Host) -> None:
        await daemon.ready()
        host.suspend("the server is down")
        await until(lambda: daemon.deregisters)
        daemon.restart("another")
        await daemon.beat()
        # Whoever might wait for attempts from before is told to give them up.
        assert len(daemon.registers) == len(daemon.deregisters)
        last = daemon.registers[-1].incarnation
        assert daemon.deregisters[-1].incarnation == last
        host.resume(INFO)
        await until(lambda: daemon.registers[-1].incarnation != last)
        await daemon.submit(chat("x"), 5).finished()

    run(tmp_path, body)


def test_the_connection_breaks_meanwhile(tmp_path: Path) -> None:
    """The daemon lives on and waits for attempts: a new incarnation says that they are gone."""

    async def body(daemon: FakeDaemon, host: Host) -> None:
        first = await daemon.ready()
        attempt = daemon.submit(chat("x"), 1900)
        await until(lambda: host.running == 1)
        host.suspend("the server is down")
        await until(lambda: daemon.deregisters)
        daemon.stop()
        await until(lambda: host.running == 0)
        daemon.start()
        second = await daemon.ready(2)
        assert second.incarnation != first.incarnation
        await until(lambda: daemon.deregisters[-1].incarnation == second.incarnation)
        assert not attempt.answers
        await daemon.beat()
        assert len(daemon.registers) == 2

    run(tmp_path, body)


def test_stopping_while_suspended(tmp_path: Path) -> None:
    async def body(daemon: FakeDaemon, host: Host) -> None:
        await daemon.ready()
        attempt = daemon.submit(chat("x"), 200)
        await until(lambda: host.running == 1)
        host.suspend("the server is down")
        host.stop(20.0)
        host.resume(INFO)
        await attempt.finished()
        await until(lambda: host.exit_code is not None)
        assert len(daemon.registers) == 1

    run(tmp_path, body)
