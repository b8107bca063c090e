"""Workers and gateways that end, fail for good or do not listen. Here they are small scripts."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chimera_daemon import children as module
from chimera_daemon import processes
from chimera_daemon.children import Child, Children, gateways_of, workers_of
from chimera_daemon.config import Config, EngineConfig, GatewayConfig
from chimera_daemon.processes import alive
from tests.daemon.harness import run, until

SLEEPS = "import time; time.sleep(100)"
# Writes each signal into a file, and ends at the last of as many as it is told.
NOTES = """
import signal, sys, time
file, last = open(sys.argv[1], "a", buffering=1), int(sys.argv[2])
told = []
def note(number, frame):
    told.append(number)
    file.write(f"{number}\\n")
    if len(told) >= last:
        sys.exit()
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
file.write("here\\n")
for _ in range(10_000):
    time.sleep(0.01)
"""


class Scripts(Children):
    """Runs Python programs; the arguments of each child are one and its own arguments."""

    async def _execute(self, child: Child) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-c", *child.arguments, start_new_session=True
        )

    @property
    def pids(self) -> list[int]:
        return [s.process.pid for s in self._slots if s.process is not None and s.runs]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_BACKOFF_S", (0.02, 0.05))


def running(children: Scripts, test: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        children.start()
        try:
            await test()
        finally:
            await children.drain()
            await children.finish()
        assert not children.pids

    run(whole())


def test_restarts_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    children = Scripts([Child("a", (SLEEPS,)), Child("b", (SLEEPS,))])

    async def test() -> None:
        await until(lambda: len(children.pids) == 2)
        _, other = children.pids
        for _ in range(10):
            pid = children.pids[0]
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: len(children.pids) == 2 and children.pids[0] != pid)
        assert children.pids[1] == other
        assert children._slots[0].failures == 10

    running(children, test)


def test_a_long_life_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROVEN_S", 0.0)
    children = Scripts([Child("a", ("import sys; sys.exit(1)",))])

    async def test() -> None:
        seen: set[int] = set()
        await until(lambda: seen.update(children.pids) or len(seen) > 3)
        assert children._slots[0].failures == 1

    running(children, test)


def test_final_codes_are_final(caplog: pytest.LogCaptureFixture) -> None:
    children = Scripts([Child("a", ("import sys; sys.exit(3)",), {3: "write another address"})])

    async def test() -> None:
        await children.all_final()

    running(children, test)
    assert "a: write another address" in caplog.text
    assert "starts again" not in caplog.text


def test_what_cannot_be_started_is_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Scripts([Child("a", (SLEEPS,))])
    monkeypatch.setattr(sys, "executable", "/no/such/python")

    async def test() -> None:
        await until(lambda: caplog.text.count("a: cannot be started: ") > 1)
        monkeypatch.undo()
        await until(lambda: children.pids)

    running(children, test)


@pytest.mark.parametrize("last", [1, 2, 100])
def test_ends_politely_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """One that ends at once, one that ends when asked again, one that has to be killed."""
    if last == 100:
        monkeypatch.setattr(module, "_LINGER_S", 0.2)
    told = tmp_path / "told"
    children = Scripts([Child("a", (NOTES, str(told), str(last)), reloads=True)])

    async def test() -> None:
        await until(lambda: told.exists() and told.read_text() == "here\n")
        (pid,) = children.pids
        await children.drain()
        await children.ended(30.0 if last == 1 else 0.1)
        assert alive(pid) == (last > 1)
        await children.finish()
        assert not alive(pid)
        await children.finish()

    running(children, test)
    signals = told.read_text().split()[1:]
    assert signals[0] == "15"
    assert len(signals) == min(last, 3)


def test_drain_in_the_middle_of_a_start() -> None:
    """The process that is just being made is ended as well; none is started afterwards."""
    children = Scripts([Child("a", (SLEEPS,))])

    async def test() -> None:
        await asyncio.sleep(0)
        await children.drain()
        await children.ended(30.0)
        assert not children.pids

    running(children, test)


def test_reload_is_for_those_that_know_it(tmp_path: Path) -> None:
    paths = [tmp_path / "worker", tmp_path / "gateway"]
    children = Scripts(
        [
            Child("worker", (NOTES, str(paths[0]), "100"), reloads=True),
            Child("gateway", (NOTES, str(paths[1]), "100")),
        ]
    )

    async def test() -> None:
        await until(lambda: all(p.exists() and p.read_text() == "here\n" for p in paths))
        children.reload()
        await until(lambda: paths[0].read_text() == "here\n1\n")
        assert paths[1].read_text() == "here\n"
        await children.drain()
        for child in children._slots:
            assert child.process is not None
            child.process.kill()

    running(children, test)


def test_children_of_a_configuration() -> None:
    secret = EngineConfig("e", "m", "openai", "http://h/v1", args={"headers": {"key": "secret"}})
    config = Config(
        workers=3, front="tcp://*:6000", gateway=GatewayConfig(processes=2), engines=(secret,)
    )
    workers = workers_of(config, None)
    assert [w.name for w in workers] == ["worker 1", "worker 2"]
    assert all("--board" not in w.arguments for w in workers)
    assert "secret" not in str(workers)  # arguments of processes can be read by everybody
    assert '"model":"m"' in str(workers)
    assert "/b" in workers_of(config, "/b")[0].arguments
    assert not workers_of(Config(), None)
    gateways = gateways_of(config.gateway, config.front)
    assert [g.name for g in gateways] == ["gateway 1", "gateway 2"]
    assert "tcp://127.0.0.1:6000" in gateways[0].arguments
