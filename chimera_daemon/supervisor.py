"""Keeps the engine hosts of a configuration alive: starts, watches, restarts, at last gives up.

Knows processes, not requests. Every host leads a process group of its own, which is killed as a
whole when the host has ended: an engine's worker processes must not outlive it. A host that is
already there when the supervisor starts (its daemon was restarted) is adopted, not started again.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
from msgspec import Struct

from chimera_daemon.config import Config, EngineConfig
from chimera_daemon.daemon import EngineWatcher

log = logging.getLogger("chimera.supervisor")

# A host looks for a lost daemon at least once a second and then says at once that it is there.
_ADOPT_S = 1.5
_BACKOFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
# An engine that served for so long has shown that it can: failures before that are forgiven.
_PROVEN_S = 60.0
_STOP_S = 15.0  # from asking to killing
_ORPHAN_S = 120.0  # a host without any daemon for so long ends itself
_POLL_S = 0.2  # adopted hosts are no children of ours: their end has to be looked for
# Exit codes of hosts after which a restart cannot help; see `engines/host.py`.
_HOPELESS = {3: "it cannot start as configured", 6: "it speaks another protocol version"}

EngineState = Literal["looking", "starting", "ready", "backoff", "gave up", "stopped"]


class _Slot(Struct, eq=False):
    """One supervised engine."""

    engine: EngineConfig
    state: EngineState = "looking"
    pid: int = 0
    failures: int = 0  # in a row
    starts: int = 0
    ready_s: float = 0.0
    joined: asyncio.Event = msgspec.field(default_factory=asyncio.Event)


class Supervisor(EngineWatcher):
    """Starts one host per engine of the configuration; `Daemon` tells it who joined and left.

    ``lost(engine_id, reason)`` is called when a process has ended, so that the daemon need not wait
    for missing heartbeats.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._slots = {e.name: _Slot(e) for e in config.engines}
        self._tasks: list[asyncio.Task[None]] = []
        self.lost: Callable[[str, str], None] = lambda engine_id, reason: None

    def start(self) -> None:
        """Begin to supervise, on the running loop."""
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in self._slots.values()]

    def joined(self, engine_id: str, pid: int) -> None:
        """See `EngineWatcher`."""
        slot = self._slots.get(engine_id)
        if slot is not None:
            if slot.state in ("looking", "backoff") and pid:
                slot.pid = pid
            slot.joined.set()

    def left(self, engine_id: str) -> None:
        """See `EngineWatcher`."""
        slot = self._slots.get(engine_id)
        if slot is not None:
            slot.joined.clear()

    def snapshot(self) -> list[dict[str, Any]]:
        """See `EngineWatcher`."""
        return [
            {
                "engine": slot.engine.name,
                "model": slot.engine.model,
                "state": slot.state,
                "pid": slot.pid,
                "starts": slot.starts,
                "failures": slot.failures,
            }
            for slot in self._slots.values()
        ]

    @property
    def gave_up(self) -> list[str]:
        """Engines that will not be started again."""
        return [s.engine.name for s in self._slots.values() if s.state == "gave up"]

    async def stop(self, *, keep_engines: bool = False) -> None:
        """End supervision, and the hosts with it unless they are to wait for the next daemon."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if keep_engines:
            return
        pids = [s.pid for s in self._slots.values() if s.pid]
        for pid in pids:
            _signal(pid, signal.SIGTERM)
        end = asyncio.get_running_loop().time() + _STOP_S
        while any(_alive(pid) for pid in pids) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S / 4)
        for pid in pids:
            _kill_group(pid)

    async def _keep(self, slot: _Slot) -> None:
        """The life of one engine, until it is given up or supervision ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(slot.joined.wait(), _ADOPT_S)
        if slot.pid:
            log.info("engine %s is here already (pid %d): adopted", slot.engine.name, slot.pid)
            await self._while_ready(slot, self._until_gone(slot.pid))
        while True:
            why = await self._run_once(slot)
            if slot.failures > self._config.max_restarts or why in _HOPELESS.values():
                slot.state = "gave up"
                log.error(
                    "GIVING UP on engine %s after %d starts: %s%s",
                    slot.engine.name,
                    slot.starts,
                    why,
                    self._log_hint(slot),
                )
                return
            slot.state = "backoff"
            wait_s = _BACKOFF_S[min(slot.failures, len(_BACKOFF_S)) - 1]
            log.warning("engine %s: %s; starts again in %g s", slot.engine.name, why, wait_s)
            await asyncio.sleep(wait_s)

    async def _run_once(self, slot: _Slot) -> str:
        """Start the host, wait until it has ended, return why."""
        slot.state = "starting"
        slot.starts += 1
        slot.joined.clear()
        process = await self._spawn(slot.engine)
        slot.pid = process.pid
        ended = asyncio.ensure_future(process.wait())
        joined = asyncio.ensure_future(slot.joined.wait())
        try:
            await asyncio.wait(
                (ended, joined),
                timeout=self._config.ready_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not ended.done() and not joined.done():
                _kill_group(process.pid)
                await ended
                slot.failures += 1
                return f"not ready within {self._config.ready_s:g} s (`ready_s`)"
            if joined.done():
                await self._while_ready(slot, ended)
            else:
                slot.failures += 1
            code = await ended
        finally:
            joined.cancel()
        _kill_group(process.pid)
        if code in _HOPELESS:
            return _HOPELESS[code]
        return f"ended with code {code}" if code >= 0 else f"killed by signal {-code}"

    async def _while_ready(self, slot: _Slot, ended: "asyncio.Future[Any] | Any") -> None:
        """Wait for the end of a host that was ready, and clear away what it leaves."""
        loop = asyncio.get_running_loop()
        slot.state = "ready"
        slot.ready_s = loop.time()
        await asyncio.shield(asyncio.ensure_future(ended))
        proven = loop.time() - slot.ready_s >= _PROVEN_S
        slot.failures = 1 if proven else slot.failures + 1
        _kill_group(slot.pid)
        self.lost(slot.engine.name, f"its process {slot.pid} has ended")

    async def _until_gone(self, pid: int) -> None:
        while _alive(pid):
            await asyncio.sleep(_POLL_S)

    async def _spawn(self, engine: EngineConfig) -> asyncio.subprocess.Process:
        spec = msgspec.json.encode(engine).decode()
        command = [sys.executable, "-m", "chimera_daemon", "engine"]
        command += ["--spec", spec, "--connect", self._config.back, "--orphan-s", str(_ORPHAN_S)]
        with self._log_of(engine) as output:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )

    def _log_of(
        self, engine: EngineConfig
    ) -> "contextlib.AbstractContextManager[IO[bytes] | None]":
        if self._config.log_dir is None:
            return contextlib.nullcontext()
        folder = Path(self._config.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / f"{engine.name}.log").open("ab")

    def _log_hint(self, slot: _Slot) -> str:
        """The last lines of the host's log, where there is one."""
        if self._config.log_dir is None:
            return ""
        path = Path(self._config.log_dir) / f"{slot.engine.name}.log"
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return f"\n  the end of {path}:\n    " + "\n    ".join(lines[-5:])


def _alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _kill_group(pid: int) -> None:
    """Kill the process group that this host leads, workers included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) != pid:
            return  # started by somebody else as part of a larger group
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
