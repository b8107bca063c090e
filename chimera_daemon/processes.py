"""Processes of this machine, by their numbers: who lives, who is a host of ours, who has ended.

Shared by the daemon, which learns of an engine's end here, and by what starts and ends processes.
Knows neither sockets nor requests. Linux; elsewhere the end of a process is looked for in turns.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.2  # between looks where the kernel does not tell
# Between a failure and the next start; the last for all further failures in a row.
_BACKOFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
_PR_SET_PDEATHSIG = 1


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def is_host(pid: int) -> bool:
    """Whether a host of ours runs here under this number: it leads a group, and says what it is.

    A host that joins from another machine gives a number that means something else here.
    """
    try:
        return (
            pid > 1
            and os.getpgid(pid) == pid != os.getpgrp()
            and _is_host_command(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
        )
    except (OSError, OverflowError):
        return False


def _is_host_command(words: list[bytes]) -> bool:
    """Whether this is `chimera engine`, however called; a folder of that name proves nothing."""
    names = {os.path.basename(word) for word in words}
    return b"engine" in names and not names.isdisjoint((b"chimera", b"chimera_daemon"))


class Watch:
    """Waits for the end of one process; made by `watch`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pid: int, on_end: Callable[[], None]
    ) -> None:
        self._loop, self._pid, self._on_end = loop, pid, on_end
        self._descriptor: int | None = None
        self._timer: asyncio.Handle | None = None
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._timer = loop.call_soon(self._ended)
        except (AttributeError, OSError):  # not Linux, or too many files are open
            self._look()
        else:
            loop.add_reader(self._descriptor, self._ended)

    def cancel(self) -> None:
        """Wait no longer. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _look(self) -> None:
        if alive(self._pid):
            self._timer = self._loop.call_later(_POLL_S, self._look)
        else:
            self._timer = self._loop.call_soon(self._ended)

    def _ended(self) -> None:
        self.cancel()
        self._on_end()


def watch(loop: asyncio.AbstractEventLoop, pid: int, on_end: Callable[[], None]) -> Watch:
    """Call ``on_end`` once, from the loop, when this process has ended: at once, not by polling."""
    return Watch(loop, pid, on_end)


async def gone(pid: int) -> None:
    """Wait until this process has ended."""
    ended = asyncio.Event()
    watching = watch(asyncio.get_running_loop(), pid, ended.set)
    try:
        await ended.wait()
    finally:
        watching.cancel()


def send_signal(pid: int, number: signal.Signals) -> None:
    """Like `os.kill`, but a process that is gone, or belongs to somebody else, is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def kill_group(pid: int) -> None:
    """Kill the process group that this process leads or led, all that it has started included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) != pid:
            return  # started by somebody else as part of a larger group
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, which has this number, ends.

    To be called by the child itself, early. Raises `SystemExit` if the parent is gone already.
    """
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(f"process {parent}, which started this one, has ended")


def local_address(address: str) -> str:
    """How a process of this machine reaches who listens on this address, perhaps at all hosts."""
    for everywhere in ("tcp://*:", "tcp://0.0.0.0:", "tcp://[::]:"):
        if address.startswith(everywhere):
            return f"tcp://127.0.0.1:{address.removeprefix(everywhere)}"
    return address


def backoff_s(failures: int) -> float:
    """How long to wait after so many failures in a row before the next start."""
    return _BACKOFF_S[min(max(failures, 1), len(_BACKOFF_S)) - 1]
