"""An engine host's way to one worker of a daemon: registration, heartbeats, what waits to leave.

Owns one socket of the back side. Knows no backend, and of other workers nothing: the attempts are
its owner's, who says which of them are this worker's.

The daemon answers every registration and heartbeat; its answer says who it is and whether it knows
this engine. Where it does not (it was restarted, or believed the engine lost), it waits for none of
the attempts here: they are cancelled, and the engine registers again. Messages of one uplink stay
in order, so no later attempt can be hit. A connection that breaks may have swallowed runs and
answers: there the uplink begins anew under another incarnation, which tells a daemon that lives on
to run those stages again.
"""

import asyncio
import logging
import secrets
from collections import deque
from typing import Any, Protocol, assert_never

import msgspec
import zmq
from msgspec import Struct

from chimera_daemon import wire
from chimera_daemon.channel import Channel, Frames, Sent, make_socket, watch_connection
from chimera_daemon.engines.backend import AttemptEvent
from chimera_daemon.messages import (
    Abort,
    DaemonBeat,
    Deregister,
    EngineChunk,
    EngineFailed,
    EngineFinished,
    Heartbeat,
    Register,
    Run,
    Shutdown,
)

log = logging.getLogger("chimera.engine")

_LINGER_MS = 500  # for the last messages to leave
_FIRST_BEAT_S = 0.5  # until the daemon has said how often
_CONNECT_S = 0.05  # between looks for a daemon that is not there
_FLUSH_S = 0.02  # between looks whether a full socket takes messages again
_SEND_HWM = 4096
# Answers kept while the daemon does not take them: about a minute of a busy engine.
_OUTBOX_MESSAGES = 65_536
_OUTBOX_BYTES = 64 << 20
# ZeroMQ's own heartbeat, which finds a daemon's machine that went away without closing anything.
_PING_MS = 5_000


class UplinkOwner(Protocol):
    """The host, as an uplink knows it."""

    @property
    def draining(self) -> bool:
        """Leaving: no registration any more."""
        ...

    @property
    def suspended(self) -> bool:
        """Not to be registered for now."""
        ...

    def registration(self, incarnation: int) -> Register:
        """What the engine is able to do."""
        ...

    def heartbeat(self, uplink: "Uplink") -> Heartbeat:
        """How the engine and the attempts of this worker are."""
        ...

    def on_tick(self) -> bool:
        """Before every heartbeat; False if the host has just decided to leave."""
        ...

    def on_run(self, uplink: "Uplink", run: Run, payload: bytes) -> None:
        """An attempt for the backend."""
        ...

    def on_abort(self, uplink: "Uplink", attempt_id: int) -> None:
        """An attempt that is not wanted any more."""
        ...

    def on_beat(self, uplink: "Uplink", beat: DaemonBeat) -> bool:
        """Whether this is the worker that was expected there, in a version that is understood."""
        ...

    def on_overflow(self, uplink: "Uplink", attempt_id: int) -> None:
        """The worker has not read for so long that this attempt's output finds no room."""
        ...

    def on_forgotten(self, uplink: "Uplink") -> None:
        """The worker waits for none of its attempts here."""
        ...

    def stop(self, drain_s: float | None = None) -> None:
        """Leave."""
        ...


class _Waiting(Struct, gc=False):
    """A message that the socket did not take."""

    attempt_id: int
    frames: Frames
    size: int


class Uplink:
    """The socket to one worker, connected from the start.

    ``running`` counts its attempts; ``signed_off``: it was told to send no more of them.
    """

    def __init__(
        self,
        owner: UplinkOwner,
        context: "zmq.Context[Any]",
        engine_id: str,
        address: str,
        worker: int,
    ) -> None:
        self.address = address
        self.worker = worker
        self.incarnation = secrets.randbits(48)
        self.running = 0  # kept by the owner
        self._owner = owner
        self._engine_id = engine_id
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        self._outbox: deque[_Waiting] = deque()
        self._outbox_bytes = 0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._beat_s = _FIRST_BEAT_S
        self._daemon_id = ""
        self._known = False
        self.signed_off = False  # under this incarnation
        self._told = False  # and that has left
        self._owes_word = False  # to a worker that may wait for attempts that were cancelled
        # The first address is to be trusted; at the others nobody is told what we can do before
        # the right worker has answered.
        self._met = worker == 0
        identity = f"{engine_id}:{self.incarnation}".encode()
        socket = make_socket(context, zmq.DEALER, hwm=_SEND_HWM, identity=identity)
        # Nothing is queued for a daemon that is not there: it would reach the next one, stale.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * _PING_MS)
        self._socket = socket
        self._monitor = watch_connection(socket, self._on_event)
        socket.connect(address)
        self._channel = Channel(socket, self._on_frames, self._on_unsent)
        self._beat_timer = self._loop.call_soon(self._beat)

    def close(self) -> None:
        """Disconnect; what is queued may still leave."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._channel.close(_LINGER_MS)
        self._beat_timer.cancel()
        if self._flush_timer is not None:
            self._flush_timer.cancel()

    # To the worker.

    def pass_on(self, message: AttemptEvent, payload: bytes | None) -> None:
        """Send an event of an attempt, now or once the worker takes messages again."""
        header = wire.encode(message)
        frames = (header,) if payload is None else (header, payload)
        if self._outbox:
            self._keep(message, frames)
        else:
            self._channel.post(frames)

    def sign_off(self) -> None:
        """No new work from this worker under this incarnation."""
        if not self.signed_off:
            self.signed_off = True
            self._told = self._send(Deregister(self._engine_id, self.incarnation))

    def sign_on(self) -> None:
        """Register (again), once the attempts from before are done.

        The worker takes another incarnation for another process, and gives up on the one before.
        """
        if self.signed_off and not self.running:
            self._renew()
        if not self.signed_off and not self._known:
            self._present()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        while self._outbox and self._channel.send(self._outbox[0].frames):
            self._outbox_bytes -= self._outbox.popleft().size
        if self._outbox:
            self._flush_timer = self._loop.call_later(_FLUSH_S, self.flush)

    def discard(self, attempt_id: int) -> None:
        """Forget what of this attempt waits to leave."""
        self._outbox = deque(w for w in self._outbox if w.attempt_id != attempt_id)
        self._outbox_bytes = sum(w.size for w in self._outbox)

    def _send(self, message: Register | Heartbeat | Deregister) -> bool:
        self._channel.flush()  # what was to leave before comes first
        if self._outbox:
            self.flush()
        return not self._outbox and self._channel.send((wire.encode(message),))

    def _on_unsent(self, frames: Frames, _why: Sent) -> None:
        message = wire.decode_back(frames[0])
        if isinstance(message, (EngineChunk, EngineFinished, EngineFailed)):
            self._keep(message, frames)

    def _keep(self, message: AttemptEvent, frames: Frames) -> None:
        size = sum(map(len, frames))
        over = len(self._outbox) >= _OUTBOX_MESSAGES or self._outbox_bytes + size > _OUTBOX_BYTES
        # A failure is small, and there is one per attempt at most.
        if over and not isinstance(message, EngineFailed):
            self._owner.on_overflow(self, message.attempt_id)
            return
        self._outbox.append(_Waiting(message.attempt_id, frames, size))
        self._outbox_bytes += size
        if self._flush_timer is None:
            self._flush_timer = self._loop.call_later(_FLUSH_S, self.flush)

    def _present(self) -> bool:
        """Say that the engine is here; while it is suspended only to be forgotten at once."""
        if not self._met:
            return self._send(self._owner.heartbeat(self))
        sent = self._send(self._owner.registration(self.incarnation))
        if sent and self._owner.suspended:
            self.sign_off()
        self._owes_word = self._owes_word and not sent
        return sent

    def _beat(self) -> None:
        """Once per heartbeat; more often while there is no daemon to send to."""
        if not self._owner.on_tick():
            return
        if self.signed_off and not self._told:
            self._told = self._send(Deregister(self._engine_id, self.incarnation))
        if self._known or not self._may_register():
            sent = self._send(self._owner.heartbeat(self))
        else:
            sent = self._present()
        after_s = self._beat_s if sent else min(self._beat_s, _CONNECT_S)
        self._beat_timer = self._loop.call_later(after_s, self._beat)

    def _may_register(self) -> bool:
        """Whether to say that the engine is here, which calls for work."""
        if self._owner.draining or self.signed_off:
            return False
        return self._owes_word or not self._owner.suspended

    def _set_beat(self, beat_s: float) -> None:
        if beat_s == self._beat_s or not 0.001 <= beat_s <= 3600.0:
            return
        self._beat_s = beat_s
        self._beat_timer.cancel()
        self._beat_timer = self._loop.call_later(beat_s, self._beat)

    # From the worker.

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            message = wire.decode_engine(frames[0])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            log.warning("%s: dropped an unreadable message: %s", self._engine_id, error)
            return
        match message:
            case Run():
                if len(frames) == 2:
                    self._owner.on_run(self, message, frames[1])
                else:
                    log.warning("%s: dropped a run of %d frames", self._engine_id, len(frames))
            case Abort():
                self._owner.on_abort(self, message.attempt_id)
            case DaemonBeat():
                self._on_beat(message)
            case Shutdown():
                log.info("%s: told to stop: %s", self._engine_id, message.reason)
                self._owner.stop(0.0)
            case _:
                assert_never(message)

    def _on_event(self, event: int) -> None:
        if event == zmq.EVENT_DISCONNECTED:
            self._known = False
            self._met = self.worker == 0
            self._forget("the connection to the daemon broke")

    def _on_beat(self, beat: DaemonBeat) -> None:
        if not self._owner.on_beat(self, beat):
            return
        self.heard_at = self._loop.time()
        self._channel.batches(beat.batches)
        self._set_beat(beat.heartbeat_s)
        restarted = self._daemon_id not in ("", beat.daemon_id)
        was_known, was_met = self._known, self._met
        if was_known and (restarted or not beat.known):
            self._forget(f"daemon {beat.daemon_id} does not know this engine")
        self._known = beat.known and was_met  # before we had met it can only mean somebody else
        self._met = True
        self._daemon_id = beat.daemon_id
        if not self._known and (was_known or not was_met) and self._may_register():
            # Sent at once, and from then on by the timer: answers to older heartbeats may follow.
            self._present()
        if self._outbox:
            self.flush()

    def _forget(self, why: str) -> None:
        """Begin anew: without attempts, and under another incarnation.

        The incarnation matters where the worker does know this engine, for instance because it
        answered a heartbeat from before: it runs again what is cancelled here.
        """
        log.warning("%s: %s; cancelling %d attempts", self._engine_id, why, self.running)
        self._renew()
        self._owes_word = True
        self._channel.flush()  # into the outbox, if it does not leave
        self._outbox.clear()
        self._outbox_bytes = 0
        self._owner.on_forgotten(self)

    def _renew(self) -> None:
        self.incarnation = secrets.randbits(48)
        self.signed_off = self._told = self._known = False
