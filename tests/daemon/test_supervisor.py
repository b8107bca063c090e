"""Processes that end, hang, come too late or from elsewhere. The hosts here are small scripts."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chimera_daemon import processes
from chimera_daemon import supervisor as module
from chimera_daemon.config import Config, EngineConfig
from chimera_daemon.processes import alive
from chimera_daemon.supervisor import Supervisor
from tests.daemon.harness import run, until

# A host that says its number, and one that also has a worker of its own (in the same group).
SLEEPS = "import os, time; print('number', os.getpid(), flush=True); time.sleep(100)"
HAS_WORKER = (
    "import subprocess, sys; worker = subprocess.Popen([sys.executable, '-c', "
    "'import time; time.sleep(100)']); print('worker', worker.pid, flush=True); worker.wait()"
)
ENDS = "import sys; print('so it ends', flush=True); sys.exit({code})"


class Scripts(Supervisor):
    """Starts scripts instead of engine hosts: the n-th start runs the n-th, the last for ever."""

    def __init__(self, folder: Path, *scripts: str, kind: Any = "echo", **settings: Any) -> None:
        engine = EngineConfig("e", "m", kind)
        self.told: list[str] = []
        super().__init__(
            Config(engines=(engine,), log_dir=str(folder), **settings),
            lambda engine: self.told.append(engine.name),
        )
        self.scripts = scripts
        self.path = folder / "e.log"
        self.slot = self._slots["e"]

    async def _execute(self, engine: EngineConfig) -> asyncio.subprocess.Process:
        script = self.scripts[min(self.slot.starts, len(self.scripts)) - 1]
        with self._log_of(engine) as output:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-S", "-c", script, stdout=output, start_new_session=True
            )

    async def ready(self) -> int:
        """The host runs and registers; its number."""
        await until(lambda: self.slot.state == "starting" and self.slot.pid, "a start")
        self.joined("e", self.slot.pid)
        await until(lambda: self.slot.state == "ready")
        return self.slot.pid


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ADOPT_S", 0.02)
    monkeypatch.setattr(processes, "_BACKOFF_S", (0.02, 0.05))
    monkeypatch.setattr(module, "_LOOK_S", 0.05)


def supervised(
    supervisor: Scripts, test: Callable[[], Awaitable[None]], keep_engines: bool = False
) -> None:
    async def whole() -> None:
        supervisor.start()
        try:
            await test()
            await supervisor.stop(keep_engines=keep_engines)
        finally:
            await supervisor.stop()

    run(whole())


@contextlib.contextmanager
def elsewhere(*arguments: str) -> Iterator[int]:
    """A process that was started by somebody else, leading a group."""
    command = [sys.executable, "-S", "-c", "import time; time.sleep(100)", *arguments]
    process = subprocess.Popen(command, start_new_session=True)
    cmdline = Path(f"/proc/{process.pid}/cmdline")
    while not cmdline.read_bytes():  # there a moment after the process is
        pass
    try:
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_restarts(tmp_path: Path) -> None:
    supervisor = Scripts(tmp_path, SLEEPS)

    async def test() -> None:
        first = await supervisor.ready()
        os.kill(first, signal.SIGKILL)
        second = await supervisor.ready()
        assert second != first
        assert supervisor.told == ["e", "e"]
        (row,) = supervisor.snapshot()
        assert (row["starts"], row["failures"], row["pid"]) == (2, 1, second)

    supervised(supervisor, test)
    assert not alive(supervisor.slot.pid or 1 << 22)


def test_gives_up_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Scripts(tmp_path, ENDS.format(code=1), max_restarts=2)

    async def test() -> None:
        await until(lambda: supervisor.gave_up == ["e"])

    supervised(supervisor, test)
    assert supervisor.slot.starts == 3
    assert supervisor.slot.pid == 0
    assert "GIVING UP on engine e after 3 starts: ended with code 1" in caplog.text
    assert "so it ends" in caplog.text  # the end of its log


def test_becoming_ready_does_not_forgive_at_once(tmp_path: Path) -> None:
    """An engine that dies soon after every start is given up, too."""
    supervisor = Scripts(tmp_path, SLEEPS, max_restarts=1)

    async def test() -> None:
        for _ in range(2):
            os.kill(await supervisor.ready(), signal.SIGKILL)
        await until(lambda: supervisor.gave_up)

    supervised(supervisor, test)


def test_having_served_for_long_forgives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROVEN_S", 0.0)
    supervisor = Scripts(tmp_path, SLEEPS, max_restarts=1)

    async def test() -> None:
        for _ in range(4):
            os.kill(await supervisor.ready(), signal.SIGKILL)
        await supervisor.ready()
        assert supervisor.slot.failures == 1

    supervised(supervisor, test)


@pytest.mark.parametrize("code", sorted(module._HOPELESS))
def test_hopeless_ends_are_final(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    supervisor = Scripts(tmp_path, ENDS.format(code=code))

    async def test() -> None:
        await until(lambda: supervisor.gave_up)

    supervised(supervisor, test)
    assert supervisor.slot.starts == 1
    assert module._HOPELESS[code] in caplog.text


def test_never_ready(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Scripts(tmp_path, SLEEPS, ready_s=0.1, max_restarts=1)
    seen: set[int] = set()

    async def test() -> None:
        await until(lambda: seen.add(supervisor.slot.pid) or supervisor.gave_up)

    supervised(supervisor, test)
    assert "after 2 starts: not ready within 0.1 s (`ready_s`)" in caplog.text
    assert not any(map(alive, seen - {0}))


def test_host_of_a_remote_server_may_wait_for_it(tmp_path: Path) -> None:
    """It signs on once the server answers, and off when that goes away: neither is a fault."""
    supervisor = Scripts(tmp_path, SLEEPS, kind="openai", ready_s=0.01)
    loop_s = 10 * supervisor._config.ready_s

    async def test() -> None:
        await until(lambda: supervisor.slot.pid, "a start")
        await asyncio.sleep(loop_s)
        host = await supervisor.ready()
        supervisor.left("e")
        await asyncio.sleep(loop_s)
        assert supervisor.slot.pid == host
        assert supervisor.slot.starts == 1
        assert alive(host)

    supervised(supervisor, test)


def test_host_that_hangs_is_killed(tmp_path: Path) -> None:
    """It was ready, runs, and has not been heard of for `ready_s`."""
    supervisor = Scripts(tmp_path, SLEEPS, ready_s=0.2)

    async def test() -> None:
        first = await supervisor.ready()
        supervisor.left("e")
        await until(lambda: not alive(first))
        assert await supervisor.ready() != first

    supervised(supervisor, test)


def test_silence_that_ends_is_forgiven(tmp_path: Path) -> None:
    supervisor = Scripts(tmp_path, SLEEPS, ready_s=5.0)

    async def test() -> None:
        first = await supervisor.ready()
        supervisor.left("e")
        supervisor.joined("e", first)
        await asyncio.sleep(0.1)
        assert supervisor.slot.pid == first
        assert alive(first)

    supervised(supervisor, test)


def test_cannot_be_started(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    supervisor = Scripts(tmp_path / "file", SLEEPS, max_restarts=1)

    async def test() -> None:
        await until(lambda: supervisor.gave_up)

    supervised(supervisor, test)
    assert "cannot be started" in caplog.text


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_workers_end_with_their_host(tmp_path: Path, how: str) -> None:
    supervisor = Scripts(tmp_path, HAS_WORKER)

    async def test() -> None:
        host = await supervisor.ready()
        await until(lambda: supervisor.path.read_text().startswith("worker"))
        worker = int(supervisor.path.read_text().split()[1])
        assert alive(worker)
        if how == "killed":
            os.kill(host, signal.SIGKILL)
        else:
            await supervisor.stop()
        await until(lambda: not alive(worker))

    supervised(supervisor, test)


def test_adopts_a_host_that_is_here(tmp_path: Path) -> None:
    """Its daemon was restarted. It is not started again, but after its end another is."""
    supervisor = Scripts(tmp_path, SLEEPS)

    async def test() -> None:
        supervisor.joined("e", pid)
        await until(lambda: supervisor.slot.state == "ready")
        assert supervisor.slot.pid == pid
        assert supervisor.slot.starts == 0
        os.kill(pid, signal.SIGKILL)
        again = await supervisor.ready()
        assert again != pid
        assert supervisor.told == ["e", "e"]

    with elsewhere("chimera", "engine") as pid:
        supervised(supervisor, test)


def test_adopts_while_it_waits_to_start_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_BACKOFF_S", (100.0,))
    supervisor = Scripts(tmp_path, SLEEPS)

    async def test() -> None:
        os.kill(await supervisor.ready(), signal.SIGKILL)
        await until(lambda: supervisor.slot.state == "backoff")
        with elsewhere("chimera", "engine") as pid:
            supervisor.joined("e", pid)
            await until(lambda: supervisor.slot.pid == pid)
            assert supervisor.slot.starts == 1

    supervised(supervisor, test)


def test_number_of_another_machine_is_not_adopted(tmp_path: Path) -> None:
    """A host elsewhere gives a number that here belongs to somebody else, who must live."""
    supervisor = Scripts(tmp_path, SLEEPS)

    async def test() -> None:
        supervisor.joined("e", pid)
        ours = await supervisor.ready()
        assert ours != pid
        await supervisor.stop()
        assert alive(pid)

    with elsewhere("/home/chimera/not_one_of_ours", "chimera") as pid:
        supervised(supervisor, test)


def test_numbers_of_the_dead_are_forgotten(tmp_path: Path) -> None:
    """By the time of `stop` they may belong to somebody else."""
    supervisor = Scripts(tmp_path, ENDS.format(code=3))

    async def test() -> None:
        await until(lambda: supervisor.gave_up)
        assert supervisor.slot.pid == 0

    supervised(supervisor, test)


def test_stop_in_the_middle_of_a_start(tmp_path: Path) -> None:
    """The process that is just being made is ended as well."""
    supervisor = Scripts(tmp_path, SLEEPS)

    async def test() -> None:
        await until(lambda: supervisor.slot.state == "starting")
        assert supervisor.slot.pid == 0
        await supervisor.stop()
        text = supervisor.path.read_text()
        assert not text or not alive(int(text.split()[1]))

    supervised(supervisor, test)


def test_stop_kills_who_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STOP_S", 0.1)
    supervisor = Scripts(
        tmp_path, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS
    )

    async def test() -> None:
        pid = await supervisor.ready()
        await until(lambda: "number" in supervisor.path.read_text())
        await supervisor.stop()
        await until(lambda: not alive(pid))

    supervised(supervisor, test)


def test_keep_engines(tmp_path: Path) -> None:
    supervisor = Scripts(tmp_path, SLEEPS)
    pid = 0

    async def test() -> None:
        nonlocal pid
        pid = await supervisor.ready()
        await supervisor.stop(keep_engines=True)
        assert alive(pid)

    supervised(supervisor, test, keep_engines=True)


def test_words_of_strangers(tmp_path: Path) -> None:
    supervisor = Scripts(tmp_path, SLEEPS)

    async def test() -> None:
        supervisor.joined("who", 1)
        supervisor.left("who")
        assert [row["engine"] for row in supervisor.snapshot()] == ["e"]

    supervised(supervisor, test)
