"""One host, several workers: whose attempts are whose, and what happens when one of them goes."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from chimera_daemon import wire
from chimera_daemon.board import Board
from chimera_daemon.engines.host import EXIT_NOT_STARTED, EXIT_OK, EXIT_ORPHANED, Host
from chimera_daemon.messages import Run
from tests.engines.conftest import ECHO, chat, echo_engine
from tests.engines.fake_daemon import WAIT_S, FakeDaemon, until

CLOCKED = echo_engine(step_s=0.001, **{**ECHO, "slots": 16})

Body = Callable[[list[FakeDaemon], Host], Awaitable[None]]


def run(
    folder: Path,
    workers: int,
    body: Body,
    *,
    started: int | None = None,
    orphan_s: float | None = None,
) -> int:
    """Run a test with fake workers and a host; returns the host's exit code."""
    return asyncio.run(
        _run(folder, workers, body, workers if started is None else started, orphan_s)
    )


async def _run(folder: Path, workers: int, body: Body, started: int, orphan_s: float | None) -> int:
    back = f"ipc://{folder}/back"
    daemons = [FakeDaemon(wire.worker_address(back, n), n, workers) for n in range(workers)]
    for daemon in daemons[:started]:
        daemon.start()
    host = Host(CLOCKED, back, orphan_s=orphan_s)
    task = asyncio.ensure_future(host.run())
    try:
        await asyncio.wait_for(body(daemons, host), WAIT_S)
    finally:
        host.stop(0.0)
        code = await asyncio.wait_for(task, WAIT_S)
        for daemon in daemons:
            daemon.stop()
    for daemon in daemons:
        assert all(len(a.answers) <= 1 for a in daemon.attempts.values())
    return code


async def ready(daemons: list[FakeDaemon]) -> None:
    for daemon in daemons:
        await daemon.ready()
        await daemon.beat()


def test_registers_with_all_and_answers_each(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        registers = [daemon.registers[0] for daemon in daemons]
        assert len({r.incarnation for r in registers}) == 3
        assert len({msgspec.structs.replace(r, incarnation=0) for r in registers}) == 1
        attempts = [
            (daemon, daemon.submit(chat(f"{n}"), 20, stream=True))
            for n in range(5)
            for daemon in daemons
        ]
        for daemon, attempt in attempts:
            await attempt.finished()
            assert "".join(text for _, text in attempt.chunks) == attempt.text
            assert attempt.attempt_id in daemon.order
        assert [len(daemon.order) for daemon in daemons] == [5, 5, 5]
        assert host.running == 0

    assert run(tmp_path, 3, body) == EXIT_OK


def test_heartbeats_tell_each_worker_of_its_own_attempts(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        attempts = [daemon.submit(chat(f"{n}"), 800) for n, daemon in enumerate(daemons)]
        await until(lambda: host.running == 2)
        for daemon, attempt in zip(daemons, attempts, strict=True):
            beat = await daemon.beat()
            assert list(beat.progress) == [attempt.attempt_id]
            assert beat.stats.running == 2
        daemons[0].abort(attempts[1].attempt_id)  # none of its business
        daemons[0].abort(attempts[0].attempt_id)
        await until(lambda: host.running == 1)
        assert list((await daemons[1].beat()).progress) == [attempts[1].attempt_id]
        await attempts[1].finished()

    run(tmp_path, 2, body)


@pytest.mark.parametrize("how", ["killed", "long away", "cut off", "forgetful"])
def test_a_lost_worker_takes_only_its_own_attempts(tmp_path: Path, how: str) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        theirs, ours = daemons[1].submit(chat("a"), 1900), daemons[0].submit(chat("b"), 600)
        await until(lambda: host.running == 2)
        if how == "forgetful":
            daemons[1].known.clear()
        else:
            daemons[1].stop()
        await until(lambda: host.running == 1)
        later = daemons[0].submit(chat("c"), 5)
        await later.finished()
        if how == "long away":
            await ours.finished()
        if how not in ("forgetful", "cut off"):
            daemons[1].known.clear()
            daemons[1].daemon_id = "another"
        if how != "forgetful":
            daemons[1].start()
        again = await daemons[1].ready(2)
        assert again.incarnation != daemons[1].registers[0].incarnation
        await daemons[1].submit(chat("d"), 5).finished()
        await ours.finished()
        assert not theirs.answers
        assert len(daemons[0].registers) == 1

    run(tmp_path, 2, body)


def test_worker_0_may_be_the_one_that_is_lost(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        attempt = daemons[1].submit(chat("a"), 300)
        await until(lambda: host.running == 1)
        daemons[0].stop()
        await attempt.finished()
        await daemons[1].submit(chat("b"), 5).finished()
        daemons[0].restart("another")
        await daemons[0].ready(2)
        await daemons[0].submit(chat("c"), 5).finished()

    run(tmp_path, 2, body)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_workers(tmp_path: Path, before: int, after: int) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        for daemon in daemons:
            daemon.workers = before
        for daemon in daemons[:before]:
            daemon.start()
        await ready(daemons[:before])
        gone = [daemon.submit(chat("gone"), 1900) for daemon in daemons[after:before]]
        await until(lambda: host.running == len(gone))
        for daemon in daemons[:after]:
            daemon.workers = after
            daemon.restart("another")
        await until(lambda: len(host.uplinks) == after)
        await until(
            lambda: all(len(d.registers) > (n < before) for n, d in enumerate(daemons[:after]))
        )
        await until(lambda: host.running == 0)
        for daemon in daemons[:after]:
            await daemon.submit(chat("here"), 5).finished()
        for daemon in daemons[after:before]:
            await until(lambda daemon=daemon: daemon.deregisters)
            seen = len(daemon.beats)
            await daemons[0].beat()
            assert len(daemon.beats) <= seen + 1  # one may have been under way
        assert not any(attempt.answers for attempt in gone)

    run(tmp_path, max(before, after), body, started=0)


@pytest.mark.parametrize("workers", [0, -3, 65, 1 << 40])
def test_a_count_that_cannot_be_is_not_followed(tmp_path: Path, workers: int) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        daemons[0].workers = workers
        daemons[0].start()
        await ready(daemons)
        assert len(host.uplinks) == 1
        daemons[0].workers = 1
        await daemons[0].submit(chat("x"), 5).finished()

    run(tmp_path, 1, body, started=0)


def test_the_address_of_another_worker(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        daemons[0].worker = 1
        daemons[0].start()
        await until(lambda: host.exit_code is not None)

    assert run(tmp_path, 1, body, started=0) == EXIT_NOT_STARTED


def test_a_stranger_at_the_port_of_a_worker_is_not_served(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        daemons[1].worker = 0
        for daemon in daemons:
            daemon.start()
        await daemons[0].ready()
        await daemons[1].beat()
        await daemons[0].submit(chat("x"), 5).finished()
        assert not daemons[1].registers
        daemons[1].worker = 1
        await daemons[1].ready()

    run(tmp_path, 2, body, started=0)


def test_one_number_from_two_workers(tmp_path: Path) -> None:
    """It cannot be answered twice: the second one is told, the first one unharmed."""

    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        first = daemons[0].submit(chat("x"), 300, attempt_id=7)
        await until(lambda: host.running == 1)
        failed = await daemons[1].submit(chat("y"), 5, attempt_id=7).failed()
        assert failed.retryable
        await first.finished()

    run(tmp_path, 2, body)


def test_orphaned_only_when_all_are_silent(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        daemons[0].stop()
        for _ in range(20):
            await daemons[1].beat()
        assert host.exit_code is None
        daemons[1].stop()
        await until(lambda: host.exit_code is not None)

    assert run(tmp_path, 2, body, orphan_s=0.3) == EXIT_ORPHANED


def test_stop_waits_for_the_attempts_of_all(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        attempts = [daemon.submit(chat("x"), 100 * n + 50) for n, daemon in enumerate(daemons)]
        await until(lambda: host.running == 3)
        host.stop(20.0)
        for daemon in daemons:
            await until(lambda daemon=daemon: daemon.deregisters)
        for attempt in attempts:
            assert host.exit_code is None
            await attempt.finished()
        await until(lambda: host.exit_code is not None)

    assert run(tmp_path, 3, body) == EXIT_OK


def test_stop_has_a_bound_for_all(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        attempts = [daemon.submit(chat("x"), 1900) for daemon in daemons]
        await until(lambda: host.running == 2)
        host.stop(0.05)
        for attempt in attempts:
            assert (await attempt.failed()).code == "engine_lost"

    run(tmp_path, 2, body)


def test_the_line_on_the_board(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        with Board.create(str(tmp_path / "chimera-board-test")) as board:
            await ready(daemons)
            assert board.read() == []
            for daemon in daemons:
                daemon.board = board.path
            await until(lambda: board.read(), "the line")
            attempts = [daemon.submit(chat(str(n)), 1900) for n, daemon in enumerate(daemons)]
            await until(lambda: board.read()[0].values[5] == 2, "both attempts")
            (row,) = board.read()
            assert (row.role, row.name, row.key) == ("engine", "echo-1", "echo-1")
            running, waiting, kv_ppm, _, output_tokens, _ = row.values
            assert (running, waiting) == (2, 0)
            assert 0 < kv_ppm < 1_000_000
            await until(lambda: board.read()[0].values[4] > output_tokens, "tokens")
            await until(lambda: board.read()[0].values[3] > 0, "tokens per second")
            for daemon, attempt in zip(daemons, attempts, strict=True):
                daemon.abort(attempt.attempt_id)
            await until(lambda: board.read()[0].values[5] == 0, "no attempts")
            for daemon in daemons:
                daemon.board = ""
            await until(lambda: not board.read(), "its leave")

    run(tmp_path, 2, body)


def test_a_board_that_cannot_be_used(tmp_path: Path) -> None:
    """Work goes on; another path is tried."""
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"no board")

    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        for path in (str(tmp_path / "missing"), str(nonsense), "\0", str(tmp_path)):
            daemons[0].board = path
            await daemons[0].beat()
            await daemons[0].submit(chat("x"), 5).finished()
        with Board.create(str(tmp_path / "chimera-board-test")) as board:
            daemons[0].board = board.path
            await until(lambda: board.read(), "the line")

    run(tmp_path, 1, body)


def test_attempts_that_are_refused_while_it_stops(tmp_path: Path) -> None:
    async def body(daemons: list[FakeDaemon], host: Host) -> None:
        await ready(daemons)
        running = daemons[0].submit(chat("x"), 1900)
        await until(lambda: host.running == 1)
        host.stop(20.0)
        assert (await daemons[1].submit(chat("late"), 5).failed()).retryable
        daemons[1].raw(wire.encode(Run(running.attempt_id, 0, 5, False)), chat("same number"))
        daemons[0].abort(running.attempt_id)
        await until(lambda: host.exit_code is not None)

    assert run(tmp_path, 2, body) == EXIT_OK
