"""Who lives, who is a host of ours, and whose end is told at once."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chimera_daemon import processes
from tests.daemon.harness import run, until

SLEEPS = "import time; time.sleep(100)"


def sleeper(*arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-S", "-c", SLEEPS, *arguments])
    while not Path(f"/proc/{process.pid}/cmdline").read_bytes():  # a moment after the start
        pass
    return process


@pytest.mark.parametrize("kernel", [True, False], ids=["told", "looked for"])
def test_the_end_is_seen_once(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.setattr(processes, "_POLL_S", 0.01)
    process = sleeper()
    ends: list[int] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        watching = processes.watch(loop, process.pid, lambda: ends.append(process.pid))
        unwanted = processes.watch(loop, process.pid, lambda: ends.append(-1))
        unwanted.cancel()
        unwanted.cancel()
        await asyncio.sleep(0.05)
        assert not ends
        process.kill()
        await until(lambda: ends)
        await processes.gone(process.pid)
        process.wait()
        await processes.gone(process.pid)  # nobody has this number any more
        assert ends == [process.pid]
        watching.cancel()

    run(test())


def test_watches_leave_no_descriptor() -> None:
    process = sleeper()

    async def test() -> None:
        loop = asyncio.get_running_loop()
        before = len(os.listdir("/proc/self/fd"))
        watching = [processes.watch(loop, process.pid, lambda: None) for _ in range(20)]
        assert len(os.listdir("/proc/self/fd")) == before + 20
        for watch in watching[::2]:
            watch.cancel()
        process.kill()
        await processes.gone(process.pid)
        await until(lambda: len(os.listdir("/proc/self/fd")) == before)

    run(test())
    process.wait()


def test_alive() -> None:
    process = sleeper()
    assert processes.alive(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not processes.alive(process.pid)  # a zombie
    process.wait()
    assert not processes.alive(process.pid)


@pytest.mark.parametrize("words", [("chimera", "engine"), ("/x/bin/chimera", "engine")])
def test_hosts_lead_a_group_and_say_what_they_are(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-S", "-c", SLEEPS, *words]
    with subprocess.Popen(command, start_new_session=True) as host:
        while not Path(f"/proc/{host.pid}/cmdline").read_bytes():
            pass
        assert processes.is_host(host.pid)
        processes.kill_group(host.pid)
    assert not processes.is_host(host.pid)


def test_others_are_no_hosts() -> None:
    member = sleeper("chimera", "engine")  # of our group, which must not be killed
    assert not processes.is_host(member.pid)
    processes.kill_group(member.pid)
    assert processes.alive(member.pid)
    member.kill()
    member.wait()
    for number in (0, 1, os.getpid(), 1 << 40):
        assert not processes.is_host(number)


def test_a_child_dies_with_its_parent() -> None:
    """Whether it is asleep, or late: its parent had ended before it looked."""
    child = (
        "import os, sys, time; from chimera_daemon.processes import die_with; "
        "die_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(100)"
    )
    parent = (
        "import os, subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())]); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert processes.alive(pid)
        process.send_signal(signal.SIGKILL)
        run(processes.gone(pid))
    late = subprocess.run(
        [sys.executable, "-c", child, str(process.pid)], capture_output=True, text=True, timeout=60
    )
    assert late.returncode == 1
    assert f"process {process.pid}, which started this one, has ended" in late.stderr


def test_addresses_of_all_hosts_are_reached_at_this_one() -> None:
    for listened in ("tcp://*:5570", "tcp://0.0.0.0:5570", "tcp://[::]:5570"):
        assert processes.local_address(listened) == "tcp://127.0.0.1:5570"
    for given in ("tcp://10.0.0.7:5570", "ipc:///tmp/x", "nonsense"):
        assert processes.local_address(given) == given


def test_backoff_grows_to_its_last_value() -> None:
    waits = [processes.backoff_s(n) for n in range(12)]
    assert waits == sorted(waits)
    assert waits[0] == waits[1] < waits[2]
    assert waits[-1] == waits[-2] == 30.0
