"""What concerns the host alone: silence, versions, full buffers, a dying engine. Backend: echo."""

import asyncio

import pytest

from chimera_daemon import wire
from chimera_daemon.channel import Frames, Sent
from chimera_daemon.engines import uplink as uplink_module
from chimera_daemon.engines.echo import EchoBackend
from chimera_daemon.engines.host import (
    EXIT_ENGINE_DIED,
    EXIT_ORPHANED,
    EXIT_VERSION,
    Host,
)
from chimera_daemon.messages import Run
from tests.engines.conftest import Rig, chat
from tests.engines.fake_daemon import FakeDaemon, until


def test_configured_slots_win(echo_now: Rig) -> None:
    import msgspec

    echo_now.engine = msgspec.structs.replace(echo_now.engine, max_inflight=2)

    async def test(daemon: FakeDaemon, host: Host) -> None:
        assert (await daemon.ready()).max_inflight == 2

    echo_now.run(test)


def test_orphan_leaves(echo_now: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        await daemon.beat()
        daemon.stop()
        await until(lambda: host.exit_code is not None, "the end of the host")

    echo_now.run(test, orphan_s=0.2)
    assert echo_now.codes == [EXIT_ORPHANED]


def test_orphan_from_the_start(echo_now: Rig) -> None:
    async def run() -> int:
        host = Host(echo_now.engine, f"ipc://{echo_now.folder}/nobody.sock", orphan_s=0.1)
        return await asyncio.wait_for(host.run(), 20.0)

    assert echo_now.runner.run(run()) == EXIT_ORPHANED


def test_other_version_of_the_protocol(echo_now: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        daemon.version = 99
        await until(lambda: host.exit_code is not None, "the end of the host")

    echo_now.run(test)
    assert echo_now.codes == [EXIT_VERSION]


def test_same_attempt_twice_runs_once(echo_clock: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        attempt = daemon.submit(chat("x"), 50)
        daemon.raw(wire.encode(Run(attempt.attempt_id, 0, 50, False)), chat("x"))
        await attempt.finished()
        await daemon.submit(chat("y"), 60).finished()
        assert len(attempt.answers) == 1

    echo_clock.run(test)


def test_daemon_that_stops_reading(echo_now: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the bound an attempt is given up, with one failure; the order of the rest is kept."""
    monkeypatch.setattr(uplink_module, "_OUTBOX_MESSAGES", 10)

    async def test(daemon: FakeDaemon, host: Host) -> None:
        uplink = host.uplinks[0]
        open_again = False
        real = uplink._channel._try_send

        def try_send(frames: Frames) -> Sent:
            return real(frames) if open_again else Sent.FULL

        monkeypatch.setattr(uplink._channel, "_try_send", try_send)
        attempts = [daemon.submit(chat(str(i)), 5) for i in range(30)]
        await until(lambda: len(uplink._outbox) == 30, "thirty answers waiting")
        open_again = True
        for attempt in attempts[:10]:
            await attempt.finished()
        for attempt in attempts[10:]:
            failed = await attempt.failed()
            assert failed.retryable
        assert daemon.order == [a.attempt_id for a in attempts]
        assert uplink._outbox_bytes == 0
        assert not uplink._outbox

    echo_now.run(test)


def test_stream_that_is_not_read_is_cancelled(
    echo_clock: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uplink_module, "_OUTBOX_BYTES", 2000)

    async def test(daemon: FakeDaemon, host: Host) -> None:
        closed = True
        uplink = host.uplinks[0]
        real = uplink._channel._try_send
        monkeypatch.setattr(
            uplink._channel, "_try_send", lambda frames: Sent.FULL if closed else real(frames)
        )
        # Sent by hand: heartbeats do not pass either.
        attempt = daemon.submit(chat("x"), 1500, stream=True)
        await until(lambda: host.running == 1)
        await until(lambda: host.running == 0, "giving it up")
        await until(lambda: len(uplink._outbox) == 1, "its failure waiting")
        closed = False
        failed = await attempt.failed()
        assert failed.code == "engine_error"
        beat = await daemon.beat()
        assert beat.stats.running == 0

    echo_clock.run(test)


def test_dead_engine_ends_the_host(echo_clock: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        attempt = daemon.submit(chat("x"), 1500)
        await until(lambda: host.running == 1)
        host.died("test")
        failed = await attempt.failed()
        assert failed.code == "engine_lost"
        assert failed.retryable
        await until(lambda: daemon.deregisters)

    echo_clock.run(test)
    assert echo_clock.codes == [EXIT_ENGINE_DIED]


def test_stop_has_a_bound(echo_clock: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        attempt = daemon.submit(chat("x"), 1500)
        await until(lambda: host.running == 1)
        host.stop(0.05)
        await until(lambda: daemon.deregisters)
        late = daemon.submit(chat("late"), 5)
        for refused in (late, attempt):
            failed = await refused.failed()
            assert failed.code == "engine_lost"
            assert failed.retryable

    echo_clock.run(test)


def test_heartbeats_go_on_while_it_drains(echo_clock: Rig) -> None:
    """Without them the daemon would take a slowly draining engine for lost."""

    async def test(daemon: FakeDaemon, host: Host) -> None:
        attempt = daemon.submit(chat("x"), 400)
        await until(lambda: host.running == 1)
        host.stop(20.0)
        await until(lambda: daemon.deregisters)
        assert attempt.attempt_id in (await daemon.beat()).progress
        await attempt.finished()

    echo_clock.run(test)


def test_events_of_unknown_attempts_go_nowhere(echo_now: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        backend = EchoBackend()
        await backend.start(host)
        backend.submit(Run(77, 0, 5, True), chat("x"))
        await daemon.submit(chat("y"), 5).finished()
        assert 77 not in daemon.attempts

    echo_now.run(test)
