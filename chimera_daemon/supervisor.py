"""Keeps the engine hosts of a configuration alive: starts, watches, restarts, at last gives up.

Knows processes, not requests. Every host leads a process group of its own, which is killed as a
whole when the host has ended: an engine's worker processes must not outlive it. A host that is
already there when the supervisor starts (its daemon was restarted) is adopted, not started again.
"""

import asyncio
import contextlib
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
from msgspec import Struct

from chimera_daemon import processes
from chimera_daemon.config import Config, EngineConfig
from chimera_daemon.daemon import EngineWatcher

log = logging.getLogger("chimera.supervisor")

# A host looks for a lost daemon at least once a second and then says at once that it is there.
_ADOPT_S = 1.5
# An engine that served for so long has shown that it can: failures before that are forgiven.
_PROVEN_S = 60.0
_STOP_S = 15.0  # from asking to killing
_KILL_S = 2.0  # from killing to having ended
_ORPHAN_S = 120.0  # a host without any daemon for so long ends itself
_LOOK_S = 1.0  # between looks whether a host that runs is also heard of
# Exit codes of hosts after which a restart cannot help; see `engines/host.py`.
_HOPELESS = {3: "it cannot start as configured", 6: "it speaks another protocol version"}

EngineState = Literal["looking", "starting", "ready", "backoff", "gave up", "stopped"]


class _Slot(Struct, eq=False):
    """One supervised engine."""

    engine: EngineConfig
    state: EngineState = "looking"
    pid: int = 0  # of the host that is watched
    here: int = 0  # of the host that is registered with the daemon, which may be another one
    left_s: float = 0.0
    failures: int = 0  # in a row
    starts: int = 0
    ready_s: float = 0.0
    joined: asyncio.Event = msgspec.field(default_factory=asyncio.Event)


class Supervisor(EngineWatcher):
    """Starts one host per engine of the configuration; `Daemon` tells it who joined and left.

    ``ready(engine)`` is called each time one of them has joined.
    """

    def __init__(
        self, config: Config, ready: Callable[[EngineConfig], None] = lambda engine: None
    ) -> None:
        self._config = config
        self._slots = {e.name: _Slot(e) for e in config.engines}
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = ready

    def start(self) -> None:
        """Begin to supervise, on the running loop."""
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in self._slots.values()]

    def joined(self, engine_id: str, pid: int) -> None:
        """See `EngineWatcher`."""
        slot = self._slots.get(engine_id)
        if slot is not None:
            slot.here = pid
            slot.joined.set()
            self._ready(slot.engine)

    def left(self, engine_id: str) -> None:
        """See `EngineWatcher`."""
        slot = self._slots.get(engine_id)
        if slot is not None:
            slot.here = 0
            slot.left_s = asyncio.get_running_loop().time()
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

    @property
    def hopeless(self) -> bool:
        """Whether there are engines to supervise and all of them are given up."""
        return bool(self._slots) and len(self.gave_up) == len(self._slots)

    async def stop(self, *, keep_engines: bool = False) -> None:
        """End supervision, and the hosts with it unless they are to wait for the next daemon."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if keep_engines:
            return
        pids = [s.pid for s in self._slots.values() if s.pid]
        for pid in pids:
            processes.send_signal(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_gone(pids), _STOP_S)
        await self.kill()

    async def kill(self) -> None:
        """End all hosts and what they have started, at once; after `stop`."""
        pids = [s.pid for s in self._slots.values() if s.pid]
        for pid in pids:
            processes.kill_group(pid)
        for slot in self._slots.values():
            slot.pid = 0
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_gone(pids), _KILL_S)

    async def _keep(self, slot: _Slot) -> None:
        """The life of one engine, until it is given up or supervision ends."""
        await self._adopt(slot, _ADOPT_S)
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
            wait_s = processes.backoff_s(slot.failures)
            log.warning("engine %s: %s; starts again in %g s", slot.engine.name, why, wait_s)
            await self._adopt(slot, wait_s)

    async def _adopt(self, slot: _Slot, wait_s: float) -> None:
        """Wait, and if a host of this name joins meanwhile, watch that one until it has ended."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(slot.joined.wait(), wait_s)
        if not processes.is_host(slot.here):
            await asyncio.sleep(end - loop.time())
            return
        slot.pid = slot.here
        log.info("engine %s is here already (pid %d): adopted", slot.engine.name, slot.pid)
        await self._while_ready(slot, asyncio.ensure_future(processes.gone(slot.pid)))

    async def _run_once(self, slot: _Slot) -> str:
        """Start the host, wait until it has ended, return why."""
        slot.state = "starting"
        slot.starts += 1
        slot.joined.clear()
        try:
            process = await self._spawn(slot)
        except OSError as error:
            slot.failures += 1
            return f"cannot be started: {error}"
        ended = asyncio.ensure_future(process.wait())
        joined = asyncio.ensure_future(slot.joined.wait())
        try:
            await asyncio.wait(
                (ended, joined),
                timeout=self._patience_s(slot),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            joined.cancel()
        if slot.joined.is_set():
            await self._while_ready(slot, ended)
        else:
            slot.failures += 1
            late = not ended.done()
            self._clear(slot)
            await ended
            if late:
                return f"not ready within {self._config.ready_s:g} s (`ready_s`)"
        code = ended.result()
        if code in _HOPELESS:
            return _HOPELESS[code]
        return f"ended with code {code}" if code >= 0 else f"killed by signal {-code}"

    async def _while_ready(self, slot: _Slot, ended: "asyncio.Future[Any]") -> None:
        """Wait for the end of a host that was ready, and clear away what it leaves."""
        loop = asyncio.get_running_loop()
        slot.state = "ready"
        slot.ready_s = loop.time()
        while not ended.done():
            await asyncio.wait((ended,), timeout=_LOOK_S)
            away_s = 0.0 if slot.joined.is_set() else loop.time() - slot.left_s
            if away_s > self._patience_s(slot):
                log.error("engine %s hangs: killed", slot.engine.name)
                processes.kill_group(slot.pid)
                await ended
        proven = loop.time() - slot.ready_s >= _PROVEN_S
        slot.failures = 1 if proven else slot.failures + 1
        self._clear(slot)

    def _patience_s(self, slot: _Slot) -> float:
        """How long a host that runs may not be heard of."""
        # One of a remote server signs on when that answers, which is nothing a restart could help.
        return math.inf if slot.engine.kind == "openai" else self._config.ready_s

    def _clear(self, slot: _Slot) -> None:
        """Leave nothing of this host; its number may belong to another process from now on."""
        pid, slot.pid = slot.pid, 0
        if slot.here == pid:
            self.left(slot.engine.name)
        processes.kill_group(pid)

    async def _spawn(self, slot: _Slot) -> asyncio.subprocess.Process:
        """Start a host; when cancelled, not before its number is known to `stop`."""
        spawning = asyncio.ensure_future(self._execute(slot.engine))
        try:
            process = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            slot.pid = (await spawning).pid
            raise
        slot.pid = process.pid
        return process

    async def _execute(self, engine: EngineConfig) -> asyncio.subprocess.Process:
        spec = msgspec.json.encode(engine).decode()
        command = [sys.executable, "-m", "chimera_daemon", "engine"]
        command += ["--spec", spec, "--connect", processes.local_address(self._config.back)]
        command += ["--orphan-s", str(_ORPHAN_S)]
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
        return f"\n  the end of {path}:\n    " + "\n    ".join(lines[-5:]) if lines else ""


async def _gone(pids: Iterable[int]) -> None:
    await asyncio.gather(*map(processes.gone, pids))
