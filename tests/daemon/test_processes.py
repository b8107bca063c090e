"""`chimera up` as people run it: processes, signals, and what is left behind."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chimera_daemon.client import Draining, Reply, connect
from chimera_daemon.messages import GetStatus, Result
from chimera_daemon.serve import _on_signals
from tests.daemon.harness import ASK, WAIT_S, RawClient, World, body, run, sessions, until

ROOT = Path(__file__).parents[2]
SLOW = "step_s = 0.02, reply_tokens = [1000, 1000]"
FAST = "step_s = 0.002, reply_tokens = [5, 20], slots = 4"


class Up:
    """A daemon of a TOML file as a process, its log, and the engines it was seen with."""

    def __init__(self, folder: Path, engines: dict[str, str], **settings: object) -> None:
        self.folder = folder
        self.front = f"ipc://{folder}/f"
        settings = {
            "front": self.front,
            "back": f"ipc://{folder}/b",
            "heartbeat_s": 0.05,
            "log_dir": str(folder / "logs"),
        } | settings
        lines = [f"{key} = {_toml(value)}" for key, value in settings.items()]
        for name, args in engines.items():
            lines += ["[[engines]]", f'name = "{name}"', 'model = "m"', 'kind = "echo"']
            lines += [f"args = {{ {args} }}"]
        self.config = folder / "up.toml"
        self.config.write_text("\n".join(lines))
        self.log = folder / "up.log"
        self.seen: set[int] = set()
        self.process: subprocess.Popen[bytes]
        self._raws: list[RawClient] = []

    def start(self, *options: str) -> None:
        command = [sys.executable, "-m", "chimera_daemon", "up", str(self.config), *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def ended(self) -> int:
        await until(lambda: self.process.poll() is not None, "the end of the daemon")
        return self.process.returncode

    def raw(self) -> RawClient:
        self._raws.append(RawClient(self.front, None))
        return self._raws[-1]

    async def status(self) -> dict[str, Any]:
        async with connect(self.front, timeout_s=WAIT_S) as client:
            status = await client.status()
        self.seen |= {row["pid"] for row in status["supervised"] if row["pid"]}
        return status

    async def ready(self) -> dict[str, int]:
        """Wait for all engines; their process ids."""
        end = asyncio.get_running_loop().time() + WAIT_S
        while True:
            status = await self.status()
            rows = status["supervised"]
            if all(r["state"] == "ready" for r in rows) and len(status["core"]["engines"]) == len(
                rows
            ):
                return {r["engine"]: r["pid"] for r in rows}
            assert asyncio.get_running_loop().time() < end, (status, self.log.read_text())
            await asyncio.sleep(0.05)

    def clean(self) -> None:
        """End whatever a failed test has left."""
        for pid in {self.process.pid, *self.seen}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.wait()
        for raw in self._raws:
            raw.close()


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def alive(pid: int) -> bool:
    """Whether it runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def with_up(up: Up, test: Callable[[Up], Awaitable[None]], *options: str) -> None:
    async def whole() -> None:
        up.start(*options)
        try:
            await test(up)
        finally:
            up.clean()

    run(whole())


def test_up_serves_and_leaves_nothing(tmp_path: Path) -> None:
    async def test(up: Up) -> None:
        pids = await up.ready()
        async with connect(up.front) as client, client.workflow() as workflow:
            assert (await workflow.generate(ASK)).text
        up.process.send_signal(signal.SIGHUP)
        await until(lambda: "failures in a row" in up.log.read_text(), "the state in the log")
        up.process.send_signal(signal.SIGTERM)
        assert await up.ended() == 0
        assert not any(map(alive, pids.values()))
        assert "Traceback" not in up.log.read_text()
        assert {p.name for p in (up.folder / "logs").iterdir()} == {"a.log", "b.log"}

    with_up(Up(tmp_path, {"a": FAST, "b": FAST}), test)


def test_up_records_traces(tmp_path: Path) -> None:
    """To the folder of the command line, with the workflows that end in the last moment."""

    async def test(up: Up) -> None:
        await up.ready()
        async with connect(up.front) as client, client.workflow(kind="k") as workflow:
            reply = await workflow.generate(ASK)
            await workflow.feedback(reply, True)
            await workflow.close(success=True)

        def told() -> bool:  # asked again each time: the recorder writes in a thread of its own
            up.process.send_signal(signal.SIGHUP)
            return "written 1" in up.log.read_text()

        await until(told, "the state in the log")
        async with connect(up.front) as client, client.workflow() as workflow:
            await workflow.generate(ASK)
        up.process.send_signal(signal.SIGTERM)
        assert await up.ended() == 0
        assert "Traceback" not in up.log.read_text()
        (path,) = (tmp_path / "traces").iterdir()
        first, second = path.read_text().splitlines()
        assert '"verdict":1.0' in first
        assert '"kind":"k"' in first
        assert "2 + 2" in second

    with_up(Up(tmp_path, {"a": FAST}), test, "--record", str(tmp_path / "traces"))


def test_sighup_reloads_the_bundle(tmp_path: Path) -> None:
    async def test() -> None:
        reloads: list[None] = []
        async with World(tmp_path) as world:
            predictor = SimpleNamespace(reload=lambda: reloads.append(None))
            _on_signals(asyncio.Event(), asyncio.Event(), world.daemon, cast(Any, predictor))
            for n in (1, 2):
                os.kill(os.getpid(), signal.SIGHUP)
                await until(lambda n=n: len(reloads) == n)
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().remove_signal_handler(number)

    run(test())


def test_sigterm_drains(tmp_path: Path) -> None:
    """Running stages get their answers, new ones are refused, engines are gone afterwards."""

    async def test(up: Up) -> None:
        pids = await up.ready()
        async with connect(up.front) as client:
            call = client.workflow().submit(ASK, max_tokens=60)
            while not (await client.status())["core"]["stages"]["running"]:
                await asyncio.sleep(0.01)
            up.process.send_signal(signal.SIGTERM)
            while not (await client.status())["core"]["draining"]:
                await asyncio.sleep(0.01)
            outcome = (
                await asyncio.gather(client.workflow().generate(ASK), return_exceptions=True)
            )[0]
            assert isinstance(outcome, Draining), outcome
            assert outcome.retry_after_s
            assert len((await call).text.split()) == 60
        assert await up.ended() == 0
        assert not any(map(alive, pids.values()))

    with_up(Up(tmp_path, {"a": SLOW}), test)


def test_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    async def test(up: Up) -> None:
        pids = await up.ready()
        async with connect(up.front) as client:
            call = client.workflow().submit(ASK, max_tokens=1000)
            while not (await client.status())["core"]["stages"]["running"]:
                await asyncio.sleep(0.01)
            up.process.send_signal(signal.SIGTERM)
            while not (await client.status())["core"]["draining"]:
                await asyncio.sleep(0.01)
            up.process.send_signal(signal.SIGTERM)
            (outcome,) = await asyncio.gather(call, return_exceptions=True)
            assert isinstance(outcome, Draining), outcome
        assert await up.ended() == 0
        assert not any(map(alive, pids.values()))

    with_up(Up(tmp_path, {"a": SLOW}, drain_s=1000.0), test)


def test_engine_host_killed_under_load(tmp_path: Path) -> None:
    """Every stage is answered exactly once, also as seen at a bare socket; the engine is back."""

    async def test(up: Up) -> None:
        pids = await up.ready()
        raw = up.raw()
        for number in range(300):
            raw.submit(f"r{number}", body(str(number)), workflow_id=f"w{number}", max_tokens=20)
        async with connect(up.front) as client:
            load = asyncio.ensure_future(sessions(client, 20, stages=10, max_tokens=20))
            await until(lambda: len(raw.of(Result)) > 20)
            os.kill(pids["a"], signal.SIGKILL)
            outcomes = await load
        assert len(outcomes) == 200
        assert all(isinstance(o, Reply) for o in outcomes), outcomes
        for number in range(300):
            await raw.result(f"r{number}")
        await raw.pong()
        assert all(len(raw.answers(f"r{n}")) == 1 for n in range(300))
        again = await up.ready()
        assert again["a"] != pids["a"]
        assert again["b"] == pids["b"]
        raw.say(GetStatus("s"))
        core = (await raw.status())["core"]
        assert core["counters"]["engines_lost"] == 1
        assert core["counters"]["requeued"] >= 1
        assert core["stages"] == {"waiting": 0, "without_engine": 0, "running": 0}
        assert not alive(pids["a"])

    with_up(Up(tmp_path, {"a": FAST, "b": FAST}), test)


def test_engine_host_stopped_and_continued(tmp_path: Path) -> None:
    """SIGSTOP: lost, its stages go elsewhere. SIGCONT: the same process registers again."""

    async def test(up: Up) -> None:
        pids = await up.ready()
        async with connect(up.front) as client:
            load = asyncio.ensure_future(sessions(client, 12, stages=15, max_tokens=20))
            await asyncio.sleep(0)
            os.kill(pids["a"], signal.SIGSTOP)
            while len((await client.status())["core"]["engines"]) == 2:
                await asyncio.sleep(0.02)
            outcomes = await load
            assert all(isinstance(o, Reply) for o in outcomes), outcomes
            assert len(outcomes) == 180
            os.kill(pids["a"], signal.SIGCONT)
            while len((await client.status())["core"]["engines"]) == 1:
                await asyncio.sleep(0.02)
            replies = await sessions(client, 12, stages=2, max_tokens=20)
            assert {r.engine for r in replies} == {"a", "b"}
            assert await up.ready() == pids

    with_up(Up(tmp_path, {"a": FAST, "b": FAST}, engine_timeout_s=0.5), test)


def test_daemon_killed_under_load(tmp_path: Path) -> None:
    """The next one takes the same engine processes over; clients ask again by themselves."""

    async def test(up: Up) -> None:
        pids = await up.ready()
        async with connect(up.front) as client:
            load = asyncio.ensure_future(sessions(client, 20, stages=10, max_tokens=20))
            while (await client.status())["core"]["counters"].get("completed", 0) < 20:
                await asyncio.sleep(0.01)
            up.process.kill()
            up.process.wait()
            assert all(map(alive, pids.values()))
            up.start()
            outcomes = await load
        assert len(outcomes) == 200
        assert all(isinstance(o, Reply) for o in outcomes), outcomes
        assert len({o.request_id for o in outcomes}) == 200
        assert await up.ready() == pids
        supervised = (await up.status())["supervised"]
        assert all(row["starts"] == 0 for row in supervised)
        up.process.send_signal(signal.SIGTERM)  # adopted engines are ended all the same
        assert await up.ended() == 0
        assert not any(map(alive, pids.values()))

    with_up(Up(tmp_path, {"a": FAST, "b": FAST}), test)


def test_keep_engines(tmp_path: Path) -> None:
    """A hand-over: SIGTERM leaves the engines to the next daemon."""

    async def test(up: Up) -> None:
        pids = await up.ready()
        up.process.send_signal(signal.SIGTERM)
        assert await up.ended() == 0
        assert all(map(alive, pids.values()))
        up.start()
        assert await up.ready() == pids
        os.kill(pids["a"], signal.SIGKILL)  # an adopted one is watched, too
        while (await up.ready())["a"] == pids["a"]:
            await asyncio.sleep(0.05)
        async with connect(up.front) as client, client.workflow() as workflow:
            assert (await workflow.generate(ASK)).text
        up.process.send_signal(signal.SIGTERM)
        assert await up.ended() == 0
        assert not any(map(alive, up.seen))

    with_up(Up(tmp_path, {"a": FAST}), test, "--keep-engines")


@pytest.mark.parametrize(
    ("engine", "ready_s", "says"),
    [
        ("speed = 1", 60.0, ("after 1 starts: it cannot start as configured", "speed")),
        (FAST, 0.05, ("after 2 starts: not ready within 0.05 s",)),
    ],
)
def test_no_engine_left(tmp_path: Path, engine: str, ready_s: float, says: tuple[str, ...]) -> None:
    """An engine that cannot start, or is never ready: given up loudly, and nothing else is left."""

    async def test(up: Up) -> None:
        raw = up.raw()
        raw.submit("r", body())
        assert await up.ended() == 4
        log = up.log.read_text()
        assert "GIVING UP on engine e " in log
        assert all(s in log for s in says), log
        assert "no engine could be started" in log
        assert "Traceback" not in log
        assert (await raw.failure("r", "draining")).retryable

    with_up(Up(tmp_path, {"e": engine}, ready_s=ready_s, max_restarts=1), test)


def test_no_engine_left_but_one_from_elsewhere(tmp_path: Path) -> None:
    """The daemon goes on for an engine that came by itself."""

    async def test(up: Up) -> None:
        command = [sys.executable, "-m", "chimera_daemon", "engine", "--kind", "echo"]
        command += ["--model", "m", "--name", "guest", "--connect", f"ipc://{up.folder}/b"]
        guest = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not (await up.status())["core"]["engines"]:
                await asyncio.sleep(0.05)
            await until(lambda: "GIVING UP" in up.log.read_text())
            async with connect(up.front) as client, client.workflow() as workflow:
                since_s = (await client.status())["uptime_s"]
                while (await client.status())["uptime_s"] < since_s + 1.5:  # it looks once a second
                    await workflow.generate(ASK)
                    await asyncio.sleep(0.05)
            assert up.process.poll() is None
            up.process.send_signal(signal.SIGTERM)
            assert await up.ended() == 0
            assert guest.poll() is None  # not ours to end
        finally:
            guest.terminate()
            guest.wait()

    with_up(Up(tmp_path, {"bad": "speed = 1"}), test)
