"""Hosts as processes of their own: signals, exit codes, and what they leave behind."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from chimera_daemon.engines.host import EXIT_ENGINE_DIED, EXIT_NOT_STARTED, EXIT_OK
from tests.engines.conftest import chat
from tests.engines.fake_daemon import Attempt, FakeDaemon, until

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import logging, sys
from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.host import run_host
import msgspec
if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    engine = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    sys.exit(run_host(engine, sys.argv[2]))
"""


class Process:
    """A host of this configuration, started from a file as the CLI would."""

    def __init__(self, folder: Path, engine: str) -> None:
        program = folder / "program.py"
        program.write_text(PROGRAM)
        self.address = f"ipc://{folder}/back.sock"
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(program), engine, self.address],
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def ended(self) -> int:
        await until(lambda: self.popen.poll() is not None, "the end of the host")
        return self.popen.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


Test = Callable[[FakeDaemon, Process], Awaitable[None]]


def with_process(process: Process, test: Test, limit_s: float = 60.0) -> None:
    """Run a test with a process, which then ends in any case."""

    async def run() -> None:
        daemon = FakeDaemon(process.address)
        daemon.start()
        try:
            await test(daemon, process)
        finally:
            process.kill()
            daemon.stop()

    asyncio.run(asyncio.wait_for(run(), limit_s))


ECHO = (
    '{"name":"e","model":"m","kind":"echo","cpus":[0],'
    '"args":{"step_s":0.001,"reply_tokens":[300,300]}}'
)


def test_sigterm_drains(tmp_path: Path) -> None:
    async def test(daemon: FakeDaemon, process: Process) -> None:
        await daemon.ready()
        assert os.sched_getaffinity(process.popen.pid) == {0}
        attempt = daemon.submit(chat("x"), 300)
        await until(lambda: daemon.beats and daemon.beats[-1].progress)
        process.popen.send_signal(signal.SIGTERM)
        await until(lambda: daemon.deregisters)
        await attempt.finished()
        assert await process.ended() == EXIT_OK

    with_process(Process(tmp_path, ECHO), test)


def test_second_signal_does_not_wait(tmp_path: Path) -> None:
    async def test(daemon: FakeDaemon, process: Process) -> None:
        await daemon.ready()
        attempt = daemon.submit(chat("x" * 50_000), 300)
        await until(lambda: daemon.beats and daemon.beats[-1].progress)
        process.popen.send_signal(signal.SIGTERM)
        await until(lambda: daemon.deregisters)
        process.popen.send_signal(signal.SIGINT)
        assert (await attempt.failed()).code == "engine_lost"
        assert await process.ended() == EXIT_OK

    slow = ECHO.replace("0.001", "0.2")
    with_process(Process(tmp_path, slow), test)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ('{"name":"e","model":"m","kind":"echo","args":{"speed":1}}', "speed"),
        ('{"name":"e","model":"m","kind":"vllm","path":"/no/such/model"}', "/no/such/model"),
    ],
)
def test_cannot_start(tmp_path: Path, engine: str, says: str) -> None:
    async def test(daemon: FakeDaemon, process: Process) -> None:
        assert await process.ended() == EXIT_NOT_STARTED
        log = process.log.read_text()
        assert says in log
        assert "Traceback" not in log

    with_process(Process(tmp_path, engine), test)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _vllm(model: Path) -> str:
    args = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    return json.dumps({"name": "v", "model": "m", "path": str(model), "args": args})


@pytest.fixture(scope="module")
def vllm_hosts(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Process]]:
    """One to kill for each test that does. On two cores they start in the time of one."""
    hosts: list[Process] = []
    try:
        for _ in range(2):
            hosts.append(Process(tmp_path_factory.mktemp("host"), _vllm(tiny_model)))
        yield hosts
    finally:
        for host in hosts:  # that no test took
            host.kill()


async def _at_work(daemon: FakeDaemon, process: Process) -> tuple[Attempt, list[int]]:
    """Wait for the engine and give it something to do; returns that and vLLM's process ids."""
    await until(lambda: daemon.registers or process.popen.poll() is not None, "vLLM")
    assert daemon.registers, process.log.read_text()[-3000:]
    host = process.popen.pid
    children = Path(f"/proc/{host}/task/{host}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    cores = [pid for pid, name in names.items() if "EngineCore" in name]
    assert cores, names
    attempt = daemon.submit(chat("x"), 1900)
    await until(lambda: daemon.beats and daemon.beats[-1].progress, "progress")
    return attempt, cores


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_host_takes_vllm_with_it(
    vllm_hosts: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the host is killed; vLLM's engine core would otherwise stay for ever."""
    monkeypatch.setattr("tests.engines.fake_daemon.WAIT_S", 200.0)

    async def test(daemon: FakeDaemon, process: Process) -> None:
        _, cores = await _at_work(daemon, process)
        os.kill(process.popen.pid, signal.SIGKILL)
        process.popen.wait()
        await until(lambda: not any(_alive(pid) for pid in cores), "the end of vLLM")

    with_process(vllm_hosts.pop(), test, 250.0)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_vllm_ends_the_host(
    vllm_hosts: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt fails at once, so that it can run elsewhere, and the supervisor sees the end."""
    monkeypatch.setattr("tests.engines.fake_daemon.WAIT_S", 200.0)

    async def test(daemon: FakeDaemon, process: Process) -> None:
        attempt, cores = await _at_work(daemon, process)
        for pid in cores:
            os.kill(pid, signal.SIGKILL)
        failed = await attempt.failed()
        assert failed.code == "engine_lost"
        assert failed.retryable
        assert await process.ended() == EXIT_ENGINE_DIED

    with_process(vllm_hosts.pop(), test, 250.0)
