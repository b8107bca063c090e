"""Keeps the daemon's own processes, workers and gateways, alive: starts, watches, restarts, ends.

Knows processes, not requests. A child is wanted as long as its parent lives, and dies with it
(`processes.die_with`): none is adopted, and none is given up unless its exit code says that another
start is of no use. Engine hosts are another matter: see `supervisor.py`.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct

from chimera_daemon import processes
from chimera_daemon.config import Config, EngineConfig, GatewayConfig

log = logging.getLogger("chimera.children")

# A child that ran for so long has shown that it can: failures before that are forgiven.
_PROVEN_S = 60.0
_LINGER_S = 2.0  # from asking for the last time to killing
# Exit code of a gateway that cannot serve as configured; see `chimera_daemon.gateway`.
_NO_GATEWAY = {
    3: "it cannot serve as configured (its own message is above); set `listen` of [gateway] to "
    "another address, or `processes = 0` for none"
}


class Child(Struct, frozen=True):
    """What is to run: arguments of `chimera`, and exit codes that are final, with what to say."""

    name: str
    arguments: tuple[str, ...]
    final: Mapping[int, str] = {}
    reloads: bool = False  # knows SIGHUP


class _Slot(Struct, eq=False):
    child: Child
    process: asyncio.subprocess.Process | None = None
    failures: int = 0  # in a row

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.returncode is None


class Children:
    """Use `start` on the running loop, then `drain`, `ended` and `finish`, in this order."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._slots = [_Slot(child) for child in children]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to start and to watch."""
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in self._slots]

    async def all_final(self) -> None:
        """Wait until none is left that would be started again."""
        await asyncio.gather(*self._tasks)

    def reload(self) -> None:
        """Pass SIGHUP on. It ends one that has just been started, which then starts anew."""
        self._signal(signal.SIGHUP, [slot for slot in self._slots if slot.child.reloads])

    async def drain(self) -> None:
        """Start none again, and ask all to finish what they have and to end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._signal(signal.SIGTERM, self._slots)

    async def ended(self, limit_s: float) -> None:
        """Wait until all have ended, for so long at most."""
        running = [slot.process.wait() for slot in self._slots if slot.process is not None]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*running), limit_s)

    async def finish(self) -> None:
        """End those that are left: ask not to wait any longer, then kill."""
        # Two signals mean "at once". They differ because a second one of a kind may go unnoticed.
        self._signal(signal.SIGTERM, self._slots)
        self._signal(signal.SIGINT, self._slots)
        await self.ended(_LINGER_S)
        self._signal(signal.SIGKILL, self._slots)
        await self.ended(_LINGER_S)

    def _signal(self, number: signal.Signals, slots: Sequence[_Slot]) -> None:
        for slot in slots:
            if slot.process is not None and slot.runs:
                processes.send_signal(slot.process.pid, number)

    async def _keep(self, slot: _Slot) -> None:
        """The life of one child, with all its starts."""
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            try:
                code = await (await self._spawn(slot)).wait()
            except OSError as error:
                why = f"cannot be started: {error}"
            else:
                if code in slot.child.final:
                    log.error("%s: %s", slot.child.name, slot.child.final[code])
                    return
                why = f"ended with code {code}" if code >= 0 else f"killed by signal {-code}"
            proven = loop.time() - started_s >= _PROVEN_S
            slot.failures = 1 if proven else slot.failures + 1
            wait_s = processes.backoff_s(slot.failures)
            log.warning("%s: %s; starts again in %g s", slot.child.name, why, wait_s)
            await asyncio.sleep(wait_s)

    async def _spawn(self, slot: _Slot) -> asyncio.subprocess.Process:
        """Start it; when cancelled, not before `drain` can find it."""
        spawning = asyncio.ensure_future(self._execute(slot.child))
        try:
            process = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            slot.process = await spawning
            raise
        slot.process = process
        return process

    async def _execute(self, child: Child) -> asyncio.subprocess.Process:
        level = logging.getLevelName(log.getEffectiveLevel()).lower()
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "chimera_daemon", "--log-level", level),
            *(*child.arguments, "--parent", str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent alone
        )


def workers_of(config: Config, board: str | None) -> list[Child]:
    """All workers but the first, which is the parent itself; ``board``: path, None without one."""
    # Of the engines a worker needs to know the models only; what is passed on can be seen by all.
    engines = tuple(EngineConfig(e.name, e.model, e.kind) for e in config.engines)
    spec = msgspec.json.encode(msgspec.structs.replace(config, engines=engines)).decode()
    shared = () if board is None else ("--board", board)
    return [
        Child(
            f"worker {index}",
            ("worker", "--index", str(index), "--spec", spec, *shared),
            reloads=True,
        )
        for index in range(1, config.workers)
    ]


def gateways_of(gateway: GatewayConfig, connect: str) -> list[Child]:
    """As many gateways as configured, all on one port, clients of the daemon at this address."""
    spec = msgspec.json.encode(gateway).decode()
    arguments = ("gateway", "--spec", spec, "--connect", processes.local_address(connect))
    return [
        Child(f"gateway {number}", arguments, final=_NO_GATEWAY)
        for number in range(1, gateway.processes + 1)
    ]
