"""`chimera up` with several workers and gateways as processes: each of them may die at any time."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chimera_daemon import serve
from chimera_daemon.client import Draining, Reply, connect
from chimera_daemon.config import Config, GatewayConfig
from chimera_daemon.prior import PriorPredictor
from chimera_daemon.processes import alive, gone
from chimera_daemon.wire import worker_of
from tests.daemon.harness import ASK, run, sessions, until
from tests.daemon.up import FAST, ROOT, SLOW, Up, with_up

TWO = {"a": FAST, "b": FAST}
CHAT = {"messages": ASK, "max_tokens": 4}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def workflow_of(worker: int) -> str:
    """An id that belongs to this one of two workers."""
    return next(name for n in range(100) if worker_of(name := f"w{n}", 2) == worker)


def everything(folder: Path, **settings: Any) -> Up:
    """Two of each."""
    listen = f"127.0.0.1:{free_port()}"
    return Up(folder, TWO, gateways=2, listen=listen, **({"workers": 2} | settings))


async def answers(url: str) -> bool:
    """Whether a gateway answers a chat with text."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(CHAT).encode(),
        {"content-type": "application/json", "connection": "close"},
    )

    def ask() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=20.0) as response:
                return bool(json.load(response)["choices"][0]["message"]["content"])
        except (OSError, urllib.error.URLError):
            return False

    return await asyncio.to_thread(ask)


async def served(up: Up) -> None:
    """All of both kinds are there, and so is the way through them."""
    await up.ready()
    await until(lambda: len(up.children("gateway")) == 2, "two gateways")
    while not await answers(up.url):
        await asyncio.sleep(0.05)


def board_of(up: Up) -> Path:
    """The file that the workers were told of."""
    (worker,) = up.children("worker")
    words = Path(f"/proc/{worker}/cmdline").read_text().split("\0")
    return Path(words[words.index("--board") + 1])


def test_serves_through_both_front_doors_and_leaves_nothing(tmp_path: Path) -> None:
    async def test(up: Up) -> None:
        await served(up)
        async with connect(up.front) as client:
            for worker in (0, 1):
                async with client.workflow(workflow_id=workflow_of(worker)) as workflow:
                    assert (await workflow.generate(ASK)).text
        first, second = await up.statuses()
        assert first["daemon_id"] != second["daemon_id"]
        assert all(status["core"]["counters"]["completed"] for status in (first, second))
        log = up.log.read_text()
        assert f"{up.url}/v1  (2 processes)" in log
        assert f"{up.front}  (2 workers)" in log
        assert "engines     a: m (echo), b: m (echo)" in log
        assert log.count("ready: m after ") == 1
        board, children = board_of(up), up.children()
        assert sorted(children.values()) == ["engine"] * 2 + ["gateway"] * 2 + ["worker --index 1"]
        assert board.exists()
        up.process.send_signal(signal.SIGTERM)
        assert await up.ended() == 0
        assert not any(map(alive, children))
        assert not board.exists()
        assert "Traceback" not in up.log.read_text()

    with_up(everything(tmp_path), test)


def test_worker_killed_under_load(tmp_path: Path) -> None:
    """Its clients ask its successor again; the other worker's work is not touched."""

    async def test(up: Up) -> None:
        await up.ready()
        before, _ = await up.statuses()
        (killed,) = up.children("worker")
        async with connect(up.front) as client:
            load = asyncio.ensure_future(sessions(client, 20, stages=10, max_tokens=20))
            while not (await up.statuses())[1]["core"]["counters"].get("completed"):
                await asyncio.sleep(0.01)
            os.kill(killed, signal.SIGKILL)
            outcomes = await load
        assert len(outcomes) == 200
        assert all(isinstance(o, Reply) for o in outcomes), outcomes
        assert len({o.request_id for o in outcomes}) == 200
        await up.ready()
        after, again = await up.statuses()
        assert killed not in up.children("worker")
        assert after["daemon_id"] == before["daemon_id"]
        assert not after["core"]["counters"].get("requeued")
        assert not after["core"]["counters"].get("engines_lost")
        assert again["core"]["counters"]["completed"] > 0
        for status in (after, again):
            assert not any(status["core"]["stages"].values())

    with_up(Up(tmp_path, TWO, workers=2), test)


def test_gateway_killed(tmp_path: Path) -> None:
    """The other one serves meanwhile, and there are two again."""

    async def test(up: Up) -> None:
        await served(up)
        killed, kept = up.children("gateway")
        os.kill(killed, signal.SIGKILL)
        await gone(killed)
        assert all([await answers(up.url) for _ in range(20)])
        await until(lambda: len(up.children("gateway")) == 2, "another gateway")
        assert kept in up.children("gateway")
        assert killed not in up.children("gateway")
        up.seen |= up.children().keys()

    with_up(everything(tmp_path, workers=1), test)


def test_all_workers_learn_at_once_that_an_engine_is_gone(tmp_path: Path) -> None:
    """By its process: its heartbeats would be missed much later than this test waits."""

    async def test(up: Up) -> None:
        pids = await up.ready()
        os.kill(pids["a"], signal.SIGKILL)
        while not all(s["core"]["counters"].get("engines_lost") for s in await up.statuses()):
            await asyncio.sleep(0.01)
        again = await up.ready()
        assert again["a"] != pids["a"]
        assert again["b"] == pids["b"]

    with_up(Up(tmp_path, TWO, workers=2, engine_timeout_s=1000.0), test)


def test_second_sigterm_does_not_wait_for_any(tmp_path: Path) -> None:
    """Those who wait for the other worker hear of it, too."""

    async def test(up: Up) -> None:
        await up.ready()
        children = up.children()
        async with connect(up.front) as client:
            calls = [
                client.workflow(workflow_id=workflow_of(worker)).submit(ASK, max_tokens=1000)
                for worker in (0, 1)
            ]
            while not all(s["core"]["stages"]["running"] for s in await up.statuses()):
                await asyncio.sleep(0.01)
            up.process.send_signal(signal.SIGTERM)
            while not all(s["core"]["draining"] for s in await up.statuses()):
                await asyncio.sleep(0.01)
            up.process.send_signal(signal.SIGTERM)
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(o, Draining) for o in outcomes), outcomes
        assert await up.ended() == 0
        assert not any(map(alive, children))

    with_up(Up(tmp_path, {"a": SLOW}, workers=2, drain_s=1000.0), test)


def test_drains_all_workers(tmp_path: Path) -> None:
    """Running stages of both get their answers, though one worker is idle before the other."""

    async def test(up: Up) -> None:
        await up.ready()
        children = up.children()
        async with connect(up.front) as client:
            calls = [
                client.workflow(workflow_id=workflow_of(worker)).submit(ASK, max_tokens=tokens)
                for worker, tokens in ((0, 5), (1, 60))
            ]
            while not (await up.statuses())[1]["core"]["stages"]["running"]:
                await asyncio.sleep(0.01)
            up.process.send_signal(signal.SIGTERM)
            replies = await asyncio.gather(*calls)
            assert [len(reply.text.split()) for reply in replies] == [5, 60]
        assert await up.ended() == 0
        assert not any(map(alive, children))

    with_up(Up(tmp_path, {"a": SLOW}, workers=2), test)


def test_up_killed(tmp_path: Path) -> None:
    """Its own processes end with it, engines wait; the next start takes over and tidies up."""

    async def test(up: Up) -> None:
        await served(up)
        pids, board = await up.ready(), board_of(up)
        own = [pid for pid in up.children() if pid not in pids.values()]
        up.process.kill()
        up.process.wait()
        for pid in own:
            await gone(pid)
        assert all(map(alive, pids.values()))
        assert board.exists()
        up.start()
        await served(up)
        assert await up.ready() == pids
        assert not board.exists()
        assert board_of(up).exists()
        up.process.send_signal(signal.SIGTERM)
        assert await up.ended() == 0
        assert not any(map(alive, up.seen))

    with_up(everything(tmp_path), test)


def test_status_and_hangup_tell_of_all_workers(tmp_path: Path) -> None:
    async def test(up: Up) -> None:
        await up.ready()
        ids = [status["daemon_id"] for status in await up.statuses()]
        command = [sys.executable, "-m", "chimera_daemon", "status", "--address", up.front]
        for options in ([], ["--json"]):
            shown = await asyncio.to_thread(
                subprocess.run, [*command, *options], cwd=ROOT, capture_output=True, text=True
            )
            assert shown.returncode == 0
            assert all(name in shown.stdout for name in ids)
        up.process.send_signal(signal.SIGHUP)
        await until(
            lambda: all(f"daemon {name}  up " in up.log.read_text() for name in ids),
            "the state of both in the log",
        )
        assert (await up.statuses())[1]["daemon_id"] == ids[1]

    with_up(Up(tmp_path, {"a": FAST}, workers=2), test)


def test_hangup_reloads_the_bundle(tmp_path: Path) -> None:
    reloads: list[str] = []
    config = Config(front=f"ipc://{tmp_path}/f", back=f"ipc://{tmp_path}/b")

    async def test() -> None:
        predictor = SimpleNamespace(
            reload=lambda: reloads.append("worker 0"), snapshot=dict, wants_logprobs=False
        )
        server = serve._Server(config, 0, None, PriorPredictor(config), cast(Any, predictor))
        server._children = cast(Any, SimpleNamespace(reload=lambda: reloads.append("others")))
        await server._daemon.start()
        server._hang_up()
        server._daemon.close()

    run(test())
    assert reloads == ["worker 0", "others"]


def test_port_of_the_gateway_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a server that even shares its port: the daemon serves without a gateway and says so."""

    async def test(up: Up) -> None:
        await up.ready()
        log = up.log.read_text()
        (error,) = (line for line in log.splitlines() if "there will be no gateway" in line)
        assert f"cannot listen on {listen}: [Errno 98] Address already in use" in error
        assert "set another `listen`, or `processes = 0` in [gateway]" in error
        assert "OpenAI API  none: see the error above" in log
        async with connect(up.front) as client, client.workflow() as workflow:
            assert (await workflow.generate(ASK)).text
        assert not up.children("gateway")

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with_up(Up(tmp_path, {"a": FAST}, gateways=2, listen=listen), test)


def test_without_aiohttp(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    config = Config(gateway=GatewayConfig(listen=f"127.0.0.1:{free_port()}"))
    assert run(serve._startable_gateways(config)).processes == 0
    assert "pip install 'chimera-daemon[gateway]', or `processes = 0`" in caplog.text


def test_without_a_board(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(serve.Board, "create", full)
    with serve._new_board() as path:
        assert path is None
    assert "there will be no congestion board: No space left on device" in caplog.text


@pytest.mark.parametrize("key", ["front", "back"])
def test_port_of_a_worker_is_taken(tmp_path: Path, key: str) -> None:
    """Nothing starts: half of all workflows would wait for that worker."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "up.toml"
        addresses = {"front": f"ipc://{tmp_path}/f", "back": f"ipc://{tmp_path}/b"}
        addresses[key] = f"tcp://127.0.0.1:{port - 2}"
        lines = [f'{name} = "{address}"' for name, address in addresses.items()]
        path.write_text("\n".join([*lines, "workers = 2", "gateway = {processes = 0}"]))
        ended = subprocess.run(
            [sys.executable, "-m", "chimera_daemon", "up", str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 3
    assert f"worker 1 cannot listen on tcp://127.0.0.1:{port}: Address already" in ended.stderr
    assert f"set `{key}` to another address" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_gateways_alone(tmp_path: Path) -> None:
    """Two of them, started by hand for a daemon that runs; a second pair has no place."""

    async def test(up: Up) -> None:
        await up.ready()
        listen = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "chimera_daemon", "gateway", "--connect", up.front]
        command += ["--listen", listen, "--processes", "2"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as gateways:
            try:
                while not await answers(f"http://{listen}"):
                    await asyncio.sleep(0.05)
                other = await asyncio.to_thread(
                    subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60
                )
                assert other.returncode == 3
                assert f"cannot listen on {listen}: " in other.stderr
                assert await answers(f"http://{listen}")
                gateways.send_signal(signal.SIGTERM)
                await until(lambda: gateways.poll() is not None, "the end of the gateways")
                assert gateways.returncode == 0
                assert not await answers(f"http://{listen}")
            finally:
                gateways.kill()

    with_up(Up(tmp_path, {"a": FAST}), test)
