"""The ZeroMQ side of any engine: registration, heartbeats, and the way in and out of its attempts.

Owns the socket and the list of attempts that the daemon waits for. Knows no model: that is the
backend's part. What the backend emits for an attempt that is not on the list goes nowhere.

Life: start the backend, connect, register, then beat. The daemon answers every registration and
heartbeat; its answer says who it is and whether it knows this engine. Where it does not (it was
restarted, or believed the engine lost), it waits for none of the attempts here: they are cancelled,
and the host registers again. Messages of one host stay in order, so no later attempt can be hit.
A connection that breaks may have swallowed runs and answers: there the host begins anew under
another incarnation, which tells a daemon that lives on to run those stages again.
"""

import asyncio
import logging
import os
import secrets
import signal
from collections import deque
from collections.abc import Callable
from itertools import islice
from types import FrameType
from typing import Any, assert_never

import msgspec
import uvloop
import zmq
from msgspec import Struct

from chimera_daemon import wire
from chimera_daemon.channel import Channel, make_socket, watch_connection
from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import (
    AttemptEvent,
    Backend,
    BackendInfo,
    EngineStartError,
    make_backend,
)
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Abort,
    DaemonBeat,
    Deregister,
    EngineChunk,
    EngineFailed,
    Heartbeat,
    Register,
    Run,
    Shutdown,
)

log = logging.getLogger("chimera.engine")

EXIT_OK = 0
EXIT_NOT_STARTED = 3  # the configuration must change first: a restart will not help
EXIT_ENGINE_DIED = 4  # a restart will help
EXIT_ORPHANED = 5  # no daemon for `orphan_s`
EXIT_VERSION = 6  # the daemon speaks another version of the protocol

DRAIN_S = 10.0  # for running attempts to end after SIGTERM
_LINGER_MS = 500  # for the last messages to leave
_FIRST_BEAT_S = 0.5  # until the daemon has said how often
_CONNECT_S = 0.05  # between looks for a daemon that is not there
_FLUSH_S = 0.02  # between looks whether a full socket takes messages again
_SEND_HWM = 4096
# Answers kept while the daemon does not take them: about a minute of a busy engine.
_OUTBOX_MESSAGES = 65_536
_OUTBOX_BYTES = 64 << 20
# A header has a bound (`wire.MAX_HEADER_BYTES`); an entry takes at most 14 bytes.
_MAX_PROGRESS = 4096
# ZeroMQ's own heartbeat, which finds a daemon's machine that went away without closing anything.
_PING_MS = 5_000
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Waiting(Struct, gc=False):
    """A message that the socket did not take."""

    attempt_id: int
    frames: tuple[bytes, ...]
    size: int


class Host:
    """One engine's side of the back socket. ``run`` is a coroutine that returns an exit code."""

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
        self.incarnation = secrets.randbits(48)
        self._address = wire.check_address(connect)
        self._backend = backend or make_backend(engine)
        self._orphan_s = orphan_s
        self._drain_s = drain_s
        self._attempts: set[int] = set()
        self._outbox: deque[_Waiting] = deque()
        self._outbox_bytes = 0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._beat_timer: asyncio.TimerHandle | None = None
        self._beat_s = _FIRST_BEAT_S
        self._daemon_id = ""
        self._known = False
        self._draining = False
        self._stopped: asyncio.Future[int] | None = None
        self._channel: Channel | None = None

    @property
    def running(self) -> int:
        """Attempts that the daemon waits for."""
        return len(self._attempts)

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
            self._info = self._limit(await self._backend.start(self))
            if on_ready is not None:
                on_ready()
            context: zmq.Context[Any] = zmq.Context()
            try:
                self._connect(context)
                return await self._stopped
            finally:
                self._disconnect()
                # Waits for the last messages to leave, which another thread may do.
                await asyncio.to_thread(context.term)
        finally:
            await self._backend.close()

    def stop(self, drain_s: float | None = None) -> None:
        """Take no more work, let running attempts end, at most so long, then leave. Idempotent."""
        if self._stopped is None or self._channel is None:
            return
        if not self._draining:
            self._draining = True
            self._send(Deregister(self.engine.name, self.incarnation))
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

    def _connect(self, context: "zmq.Context[Any]") -> None:
        identity = f"{self.engine.name}:{self.incarnation}".encode()
        socket = make_socket(context, zmq.DEALER, hwm=_SEND_HWM, identity=identity)
        # Nothing is queued for a daemon that is not there: it would reach the next one, stale.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * _PING_MS)
        self._socket = socket
        self._monitor = watch_connection(socket, self._on_event)
        socket.connect(self._address)
        self._channel = Channel(socket, self._on_frames)
        self._heard_at = self._loop.time()
        log.info(
            "%s: ready, %d at once, context %d, connecting to %s",
            self.engine.name,
            self._info.max_inflight,
            self._info.context_tokens,
            self._address,
        )
        self._beat()

    def _disconnect(self) -> None:
        for timer in (self._beat_timer, self._flush_timer):
            if timer is not None:
                timer.cancel()
        if self._channel is not None:
            self._socket.disable_monitor()
            self._monitor.close()
            self._channel.close(_LINGER_MS)

    def _leave(self, code: int) -> None:
        """Fail what is still running and end `run`."""
        if self._stopped is None or self._stopped.done():
            return
        for attempt_id in tuple(self._attempts):
            self._backend.cancel(attempt_id)
            self.emit(EngineFailed(attempt_id, "engine_lost", "the engine is stopping", True))
        self._flush()
        self._stopped.set_result(code)

    # From the backend.

    def emit(self, message: AttemptEvent, payload: bytes | None = None) -> None:
        """Pass an event of a wanted attempt on to the daemon, now or once it listens again."""
        attempt_id = message.attempt_id
        if attempt_id not in self._attempts:
            return
        if not isinstance(message, EngineChunk):
            self._attempts.discard(attempt_id)
        header = wire.encode(message)
        frames = (header,) if payload is None else (header, payload)
        if self._outbox or not self._put(frames):
            self._keep(attempt_id, frames, isinstance(message, EngineFailed))
        if self._draining and not self._attempts:
            self._loop.call_soon(self._leave, EXIT_OK)

    def died(self, reason: str) -> None:
        """The engine is gone: say so, and end so that somebody starts another."""
        log.error("%s: engine died: %s", self.engine.name, reason)
        for attempt_id in tuple(self._attempts):
            self.emit(EngineFailed(attempt_id, "engine_lost", reason[:4096], True))
        if self._channel is not None:
            self._send(Deregister(self.engine.name, self.incarnation))
        self._leave(EXIT_ENGINE_DIED)

    # To the daemon.

    def _put(self, frames: tuple[bytes, ...]) -> bool:
        return self._channel is not None and self._channel.send(frames)

    def _send(self, message: Register | Heartbeat | Deregister) -> bool:
        return self._put((wire.encode(message),))

    def _keep(self, attempt_id: int, frames: tuple[bytes, ...], failed: bool) -> None:
        size = sum(map(len, frames))
        over = len(self._outbox) >= _OUTBOX_MESSAGES or self._outbox_bytes + size > _OUTBOX_BYTES
        if over and not failed:  # a failure is small, and there is one per attempt at most
            self._overflow(attempt_id)
            return
        self._outbox.append(_Waiting(attempt_id, frames, size))
        self._outbox_bytes += size
        if self._flush_timer is None:
            self._flush_timer = self._loop.call_later(_FLUSH_S, self._flush)

    def _overflow(self, attempt_id: int) -> None:
        """Give this attempt up: the daemon has not read for so long that its output has no room."""
        self._backend.cancel(attempt_id)
        self._attempts.add(attempt_id)  # it may just have ended
        self._outbox = deque(w for w in self._outbox if w.attempt_id != attempt_id)
        self._outbox_bytes = sum(w.size for w in self._outbox)
        self.emit(
            EngineFailed(attempt_id, "engine_error", "the daemon did not read the output", True)
        )

    def _flush(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        while self._outbox and self._put(self._outbox[0].frames):
            self._outbox_bytes -= self._outbox.popleft().size
        if self._outbox:
            self._flush_timer = self._loop.call_later(_FLUSH_S, self._flush)

    def _beat(self) -> None:
        """Once per heartbeat; more often while there is no daemon to send to."""
        silent_s = self._loop.time() - self._heard_at
        if self._orphan_s is not None and silent_s > self._orphan_s:
            log.error("%s: no word from %s for %.1f s", self.engine.name, self._address, silent_s)
            self._leave(EXIT_ORPHANED)
            return
        if self._known:
            sent = self._send(self._heartbeat())
        elif self._draining:
            sent = True  # a registration now would call for work again
        else:
            sent = self._send(self._registration())
        after_s = self._beat_s if sent else min(self._beat_s, _CONNECT_S)
        self._beat_timer = self._loop.call_later(after_s, self._beat)

    def _registration(self) -> Register:
        info = self._info
        return Register(
            engine_id=self.engine.name,
            incarnation=self.incarnation,
            model=self.engine.model,
            kind=self.engine.kind,
            max_inflight=info.max_inflight,
            context_tokens=info.context_tokens,
            profile=info.profile,
            v=PROTOCOL_VERSION,
            pid=os.getpid(),
        )

    def _heartbeat(self) -> Heartbeat:
        progress = self._backend.progress()
        if len(progress) > _MAX_PROGRESS:
            progress = dict(islice(progress.items(), _MAX_PROGRESS))
        return Heartbeat(
            engine_id=self.engine.name,
            incarnation=self.incarnation,
            stats=self._backend.stats(),
            progress=progress,
        )

    # From the daemon.

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            message = wire.decode_engine(frames[0])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            log.warning("%s: dropped an unreadable message: %s", self.engine.name, error)
            return
        match message:
            case Run():
                if len(frames) == 2:
                    self._on_run(message, frames[1])
                else:
                    log.warning("%s: dropped a run of %d frames", self.engine.name, len(frames))
            case Abort():
                if message.attempt_id in self._attempts:
                    self._attempts.discard(message.attempt_id)
                    self._backend.cancel(message.attempt_id)
                    if self._draining and not self._attempts:
                        self._leave(EXIT_OK)
            case DaemonBeat():
                self._on_beat(message)
            case Shutdown():
                log.info("%s: told to stop: %s", self.engine.name, message.reason)
                self.stop(0.0)
            case _:
                assert_never(message)

    def _on_event(self, event: int) -> None:
        if event == zmq.EVENT_DISCONNECTED:
            self._known = False
            self._forget("the connection to the daemon broke")

    def _on_run(self, run: Run, payload: bytes) -> None:
        if run.attempt_id in self._attempts:
            log.warning("%s: attempt %d runs already", self.engine.name, run.attempt_id)
            return
        self._attempts.add(run.attempt_id)
        if self._draining:
            self.emit(EngineFailed(run.attempt_id, "engine_lost", "the engine is stopping", True))
        else:
            self._backend.submit(run, payload)

    def _on_beat(self, beat: DaemonBeat) -> None:
        if beat.v != PROTOCOL_VERSION:
            log.error(
                "%s: the daemon speaks protocol %d, this host %d; install the same version",
                self.engine.name,
                beat.v,
                PROTOCOL_VERSION,
            )
            self._leave(EXIT_VERSION)
            return
        self._heard_at = self._loop.time()
        self._set_beat(beat.heartbeat_s)
        restarted = self._daemon_id not in ("", beat.daemon_id)
        if self._known and (restarted or not beat.known):
            self._forget(f"daemon {beat.daemon_id} does not know this engine")
        was_known, self._known = self._known, beat.known
        self._daemon_id = beat.daemon_id
        if was_known and not beat.known and not self._draining:
            # Sent at once, and from then on by the timer: answers to older heartbeats may follow.
            self._send(self._registration())
        if self._outbox:
            self._flush()

    def _set_beat(self, beat_s: float) -> None:
        if beat_s == self._beat_s or not 0.001 <= beat_s <= 3600.0:
            return
        self._beat_s = beat_s
        if self._beat_timer is not None:
            self._beat_timer.cancel()
            self._beat_timer = self._loop.call_later(beat_s, self._beat)

    def _forget(self, why: str) -> None:
        """Begin anew: cancel all attempts, under another incarnation.

        The incarnation matters where the daemon does know this engine, for instance because it
        answered a heartbeat from before: it runs again what is cancelled here.
        """
        self.incarnation = secrets.randbits(48)
        name, attempts = self.engine.name, len(self._attempts)
        log.warning("%s: %s; cancelling %d attempts", name, why, attempts)
        running, self._attempts = self._attempts, set()
        for attempt_id in running:
            self._backend.cancel(attempt_id)
        self._outbox.clear()
        self._outbox_bytes = 0
        if self._draining:
            self._leave(EXIT_OK)


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
