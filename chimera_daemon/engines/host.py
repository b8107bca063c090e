"""One engine as the daemon's workers see it: the life of its backend, and whose attempts are where.

Owns the list of attempts that somebody waits for, and an `Uplink` per worker: worker 0, at the
given address, says how many there are. Knows no model: that is the backend's part. What the backend
emits for an attempt that is not on the list goes nowhere.

Life: start the backend, connect, register, then beat, until told to stop. An attempt belongs to the
worker that sent it: one that is lost takes its own along and no other's.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from itertools import islice
from types import FrameType
from typing import Any

import msgspec
import uvloop
import zmq

from chimera_daemon import wire
from chimera_daemon.board import Values
from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import (
    AttemptEvent,
    Backend,
    BackendInfo,
    EngineStartError,
    make_backend,
)
from chimera_daemon.engines.board_line import BoardLine
from chimera_daemon.engines.uplink import Uplink
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    DaemonBeat,
    EngineChunk,
    EngineFailed,
    Heartbeat,
    Register,
    Run,
)

log = logging.getLogger("chimera.engine")

EXIT_OK = 0
EXIT_NOT_STARTED = 3  # the configuration must change first: a restart will not help
EXIT_ENGINE_DIED = 4  # a restart will help
EXIT_ORPHANED = 5  # no daemon for `orphan_s`
EXIT_VERSION = 6  # the daemon speaks another version of the protocol

DRAIN_S = 10.0  # for running attempts to end after SIGTERM
# A header has a bound (`wire.MAX_HEADER_BYTES`); an entry takes at most 14 bytes.
_MAX_PROGRESS = 4096
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Host:
    """One engine's side of the back sockets. ``run`` is a coroutine that returns an exit code."""

    def __init__(
        self,
        engine: EngineConfig,
        connect: str,
        backend: Backend | None = None,
        *,
        orphan_s: float | None = None,
        drain_s: float = DRAIN_S,
    ) -> None:
        self.engine = engine
        self.draining = False
        self.suspended = False
        self.uplinks: list[Uplink] = []  # by number of the worker
        self._address = wire.check_address(connect)
        self._backend = backend or make_backend(engine)
        self._orphan_s = orphan_s
        self._drain_s = drain_s
        self._attempts: dict[int, Uplink] = {}
        self._info: BackendInfo | None = None
        self._strangers: set[str] = set()  # addresses where another worker answers
        self._stopped: asyncio.Future[int] | None = None

    @property
    def running(self) -> int:
        """Attempts that somebody waits for."""
        return len(self._attempts)

    @property
    def incarnation(self) -> int:
        """As worker 0 knows it; 0 before it connects."""
        return self.uplinks[0].incarnation if self.uplinks else 0

    @property
    def exit_code(self) -> int | None:
        """None until the host has decided to leave."""
        if self._stopped is None or not self._stopped.done():
            return None
        return self._stopped.result()

    # Life.

    async def run(self, on_ready: Callable[[], None] | None = None) -> int:
        """Serve until told to stop; raises `EngineStartError` if the engine does not start.

        ``on_ready`` is called once the engine has started.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        try:
            info = await self._backend.start(self)
            if self._info is None:
                self._info = self._limit(info)
            log.info("%s: started; connecting to %s", self.engine.name, self._address)
            if on_ready is not None:
                on_ready()
            self._context: zmq.Context[Any] = zmq.Context()
            self._board = BoardLine(self.engine.name, self._board_values)
            try:
                self._open(0)
                return await self._stopped
            finally:
                self._board.close()
                for uplink in self.uplinks:
                    uplink.close()
                # Waits for the last messages to leave, which another thread may do.
                await asyncio.to_thread(self._context.term)
        finally:
            await self._backend.close()

    def stop(self, drain_s: float | None = None) -> None:
        """Take no more work, let running attempts end, at most so long, then leave. Idempotent."""
        if self._stopped is None or not self.uplinks:
            return
        if not self.draining:
            self.draining = True
            for uplink in self.uplinks:
                uplink.sign_off()
        wait_s = self._drain_s if drain_s is None else drain_s
        if self._attempts and wait_s > 0:
            log.info("%s: stopping, %d attempts running", self.engine.name, len(self._attempts))
            self._loop.call_later(wait_s, self._leave, EXIT_OK)
        else:
            self._leave(EXIT_OK)

    def _limit(self, info: BackendInfo) -> BackendInfo:
        configured = self.engine.max_inflight
        if configured is None:
            return info
        return msgspec.structs.replace(info, max_inflight=configured)

    def _open(self, worker: int) -> None:
        address = wire.worker_address(self._address, worker)
        self.uplinks.append(Uplink(self, self._context, self.engine.name, address, worker))

    def _leave(self, code: int) -> None:
        """Fail what is still running and end `run`."""
        if self._stopped is None or self._stopped.done():
            return
        for attempt_id in tuple(self._attempts):
            self._backend.cancel(attempt_id)
            self.emit(EngineFailed(attempt_id, "engine_lost", "the engine is stopping", True))
        for uplink in self.uplinks:
            uplink.flush()
        self._stopped.set_result(code)

    # From the backend.

    def emit(self, message: AttemptEvent, payload: bytes | None = None) -> None:
        """Pass an event of a wanted attempt on to its worker, now or once that listens again."""
        uplink = self._attempts.get(message.attempt_id)
        if uplink is None:
            return
        if type(message) is not EngineChunk:
            del self._attempts[message.attempt_id]
            uplink.running -= 1
        uplink.pass_on(message, payload)
        if uplink.signed_off and not uplink.running:
            self._on_idle(uplink)

    def suspend(self, reason: str) -> None:
        """Take no new work until `resume`; what runs goes on. Idempotent."""
        if not self.suspended:
            log.warning("%s: suspended: %s", self.engine.name, reason)
            self.suspended = True
            for uplink in self.uplinks:
                uplink.sign_off()

    def resume(self, info: BackendInfo) -> None:
        """Take work (again), with these abilities, from each worker once its attempts are done."""
        self._info = self._limit(info)
        if self.suspended:
            log.info("%s: goes on", self.engine.name)
            self.suspended = False
            if not self.draining:
                for uplink in self.uplinks:
                    uplink.sign_on()

    def died(self, reason: str) -> None:
        """The engine is gone: say so, and end so that somebody starts another."""
        log.error("%s: engine died: %s", self.engine.name, reason)
        for attempt_id in tuple(self._attempts):
            self.emit(EngineFailed(attempt_id, "engine_lost", reason[:4096], True))
        for uplink in self.uplinks:
            uplink.sign_off()
        self._leave(EXIT_ENGINE_DIED)

    def _on_idle(self, uplink: Uplink) -> None:
        """The last attempt of a worker that we have signed off from has ended."""
        if self.draining:
            if not self._attempts:
                self._loop.call_soon(self._leave, EXIT_OK)
        elif not self.suspended:
            uplink.sign_on()

    # From the uplinks.

    def registration(self, incarnation: int) -> Register:
        """Called by an uplink."""
        info = self._info
        assert info is not None, "nothing is registered before the backend has started"
        return Register(
            engine_id=self.engine.name,
            incarnation=incarnation,
            model=self.engine.model,
            kind=self.engine.kind,
            max_inflight=info.max_inflight,
            context_tokens=info.context_tokens,
            profile=info.profile,
            v=PROTOCOL_VERSION,
            pid=os.getpid(),
            batches=True,
        )

    def heartbeat(self, uplink: Uplink) -> Heartbeat:
        """Called by an uplink."""
        of, progress = self._attempts.get, self._backend.progress().items()
        theirs = ((attempt_id, n) for attempt_id, n in progress if of(attempt_id) is uplink)
        return Heartbeat(
            engine_id=self.engine.name,
            incarnation=uplink.incarnation,
            stats=self._backend.stats(),
            progress=dict(islice(theirs, _MAX_PROGRESS)),
        )

    def on_tick(self) -> bool:
        """Called by an uplink: has any worker been heard of lately?"""
        silent_s = self._loop.time() - max(uplink.heard_at for uplink in self.uplinks)
        if self._orphan_s is None or silent_s <= self._orphan_s:
            return True
        log.error("%s: no word from %s for %.1f s", self.engine.name, self._address, silent_s)
        self._leave(EXIT_ORPHANED)
        return False

    def on_run(self, uplink: Uplink, run: Run, payload: bytes) -> None:
        """Called by an uplink."""
        attempt_id = run.attempt_id
        owner = self._attempts.get(attempt_id)
        if owner is not None:
            log.warning("%s: attempt %d runs already", self.engine.name, attempt_id)
            if owner is not uplink:
                message = "an attempt of another worker has this number"
                uplink.pass_on(EngineFailed(attempt_id, "engine_error", message, True), None)
            return
        self._attempts[attempt_id] = uplink
        uplink.running += 1
        if self.draining or self.suspended:
            state = "stopping" if self.draining else "suspended"
            self.emit(EngineFailed(attempt_id, "engine_lost", f"the engine is {state}", True))
        else:
            self._backend.submit(run, payload)

    def on_abort(self, uplink: Uplink, attempt_id: int) -> None:
        """Called by an uplink."""
        if self._attempts.get(attempt_id) is uplink:
            del self._attempts[attempt_id]
            uplink.running -= 1
            self._backend.cancel(attempt_id)
            if uplink.signed_off and not uplink.running:
                self._on_idle(uplink)

    def on_beat(self, uplink: Uplink, beat: DaemonBeat) -> bool:
        """Called by an uplink."""
        if beat.v != PROTOCOL_VERSION:
            log.error(
                "%s: the daemon speaks protocol %d, this host %d; install the same version",
                self.engine.name,
                beat.v,
                PROTOCOL_VERSION,
            )
            self._leave(EXIT_VERSION)
            return False
        if beat.worker != uplink.worker:
            self._on_stranger(uplink, beat)
            return False
        self._board.use(beat.board)
        if uplink.worker == 0 and beat.workers != len(self.uplinks) and not self.draining:
            self._resize(beat.workers)
        return True

    def on_overflow(self, uplink: Uplink, attempt_id: int) -> None:
        """Called by an uplink."""
        self._backend.cancel(attempt_id)
        uplink.discard(attempt_id)
        if self._attempts.pop(attempt_id, None) is not None:
            uplink.running -= 1
        message = "the daemon did not read the output"
        uplink.pass_on(EngineFailed(attempt_id, "engine_error", message, True), None)
        if uplink.signed_off and not uplink.running:
            self._on_idle(uplink)

    def on_forgotten(self, uplink: Uplink) -> None:
        """Called by an uplink: cancel its attempts, and no other's."""
        for attempt_id in [a for a, owner in self._attempts.items() if owner is uplink]:
            del self._attempts[attempt_id]
            self._backend.cancel(attempt_id)
        uplink.running = 0
        if self.draining and not self._attempts:
            self._leave(EXIT_OK)

    def _on_stranger(self, uplink: Uplink, beat: DaemonBeat) -> None:
        if uplink.worker == 0:
            log.error(
                "%s: %s is the address of worker %d; connect to that of worker 0",
                self.engine.name,
                uplink.address,
                beat.worker,
            )
            self._leave(EXIT_NOT_STARTED)
        elif uplink.address not in self._strangers:
            self._strangers.add(uplink.address)
            log.error(
                "%s: worker %d answers at %s, where worker %d was expected; check its ports",
                self.engine.name,
                beat.worker,
                uplink.address,
                uplink.worker,
            )

    def _resize(self, workers: int) -> None:
        if not 1 <= workers <= wire.MAX_WORKERS:
            log.error("%s: the daemon says that it has %d workers", self.engine.name, workers)
            return
        log.info("%s: the daemon has %d workers", self.engine.name, workers)
        for uplink in self.uplinks[workers:]:
            self.on_forgotten(uplink)
            uplink.sign_off()
            uplink.close()
        del self.uplinks[workers:]
        for worker in range(len(self.uplinks), workers):
            self._open(worker)

    def _board_values(self) -> Values:
        stats = self._backend.stats()
        return (
            stats.running,
            stats.waiting,
            int(1e6 * stats.kv_use),
            int(stats.tokens_per_s),
            stats.output_tokens,
            len(self._attempts),
        )


# As a process.


def run_host(engine: EngineConfig, connect: str, *, orphan_s: float | None = None) -> int:
    """Run one engine host in this process until it ends; returns the exit code (`EXIT_*`).

    ``connect`` is the daemon's back address. ``orphan_s``: leave after so long without a daemon
    (None: try for ever). Must be called on the main thread, from a program that guards its
    ``__main__``: vLLM starts a process of its own.
    """
    _pin(engine)
    # While a model loads the loop stands still, so that only a plain handler hears a signal.
    for number in _SIGNALS:
        signal.signal(number, _exit_while_starting)
    try:
        return uvloop.run(_serve(Host(engine, connect, orphan_s=orphan_s)))
    except EngineStartError as error:
        log.error("%s: cannot start: %s", engine.name, error)
        return EXIT_NOT_STARTED
    except SystemExit:
        return EXIT_OK
    except Exception:
        log.exception("%s: failed", engine.name)
        return EXIT_ENGINE_DIED


def _pin(engine: EngineConfig) -> None:
    """Before anything that counts cores is imported: torch and OpenMP size their pools once."""
    if not engine.cpus:
        return
    try:
        os.sched_setaffinity(0, engine.cpus)
    except (OSError, AttributeError) as error:
        log.warning("%s: cannot be pinned to cores %s: %s", engine.name, engine.cpus, error)


def _exit_while_starting(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(EXIT_OK)


async def _serve(host: Host) -> int:
    loop = asyncio.get_running_loop()
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        host.stop(None if signals == 1 else 0.0)  # the second one does not wait

    def on_ready() -> None:
        for number in _SIGNALS:
            loop.add_signal_handler(number, on_signal)

    return await host.run(on_ready)
