"""`chimera up` as people run it: processes, signals, and what is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chimera_daemon.client import Draining, Reply, connect
from chimera_daemon.messages import GetStatus, Result
from chimera_daemon.processes import alive
from chimera_daemon.serve import _on_signals
from tests.daemon.harness import ASK, body, run, sessions, until
from tests.daemon.up import FAST, ROOT, SLOW, Up, with_up


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


def test_signals_can_be_caught_again_and_again() -> None:
    async def test() -> None:
        hung_up: list[None] = []
        stop, at_once = asyncio.Event(), asyncio.Event()
        _on_signals(stop, at_once, lambda: hung_up.append(None))
        for n in (1, 2):
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda n=n: len(hung_up) == n)
        assert not stop.is_set()
        for event in (stop, at_once):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(event.wait(), 10.0)
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
