"""One connection to a daemon: whether it is up, and news of it coming back.

Knows pings, the socket and its monitor; knows nothing of requests. Nothing may be sent while the
link is not ``up``: its owner keeps what is unanswered and sends it again when told that it is up.
The link is up from the first `Pong` after a ZeroMQ handshake until the connection breaks, pongs
stay away, or the send queue is full. What was under way when it broke is simply sent again.
"""

import asyncio
import logging
from typing import Protocol

import msgspec
import zmq

from chimera_daemon.channel import Channel, Frames, Sent, make_socket, watch_connection
from chimera_daemon.messages import PROTOCOL_VERSION, Ping, Pong, ToClient
from chimera_daemon.wire import check_address, decode_client, encode, request_id_of

_log = logging.getLogger("chimera.client")

_PING = (encode(Ping(v=PROTOCOL_VERSION, batches=True)),)
# Until the first pong names the daemon's own; later ones are kept within these bounds.
_FIRST_BEAT_S = 0.5
_MIN_BEAT_S = 0.02
_MAX_BEAT_S = 10.0
# Pings without a pong until the daemon counts as away. Counted in pings rather than in seconds: a
# loop that was blocked by its own program must not take the daemon for lost.
_SILENT_PINGS = 6
# ZMTP heartbeats find connections that died without a word (a cable, a firewall).
_ZMTP_BEAT_MS = 2_000
_ZMTP_TIMEOUT_MS = 6_000
_MAX_FRAME_BYTES = 256 << 20

_BROKEN = (msgspec.MsgspecError, ValueError, RecursionError)


class LinkOwner(Protocol):
    """What the link tells its owner; all of it on the loop's thread."""

    def on_message(self, message: ToClient, frames: list[bytes]) -> None:
        """A message other than `Pong`; its payload, if it has one, is the second frame."""

    def on_unreadable(self, request_id: str) -> None:
        """A message that is not one of this protocol; the id is empty if none could be found."""

    def on_up(self, pong: Pong, new_daemon: bool) -> None:
        """The link is up (again). ``new_daemon``: another process, which remembers nothing."""

    def accept(self, pong: Pong) -> bool:
        """Whether this is the daemon that is wanted; if not, the link goes, or stays, down."""
        ...

    def on_beat(self) -> None:
        """Once per heartbeat, whatever the state."""


class Link:
    """A DEALER socket with heartbeats. Must be made and used on the thread of the running loop.

    Raises `ValueError` for an address that cannot be used.
    """

    def __init__(self, address: str, identity: bytes, hwm: int, owner: LinkOwner) -> None:
        check_address(address)
        self.up = False
        self.connected = False
        self.beat_s = _FIRST_BEAT_S
        self._daemon_id = ""
        self._unanswered = 0
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        socket = make_socket(
            zmq.Context.instance(),  # pyright: ignore[reportUnknownArgumentType]
            zmq.DEALER,
            hwm=hwm,
            max_bytes=_MAX_FRAME_BYTES,
            identity=identity,
        )
        socket.setsockopt(zmq.HEARTBEAT_IVL, _ZMTP_BEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _ZMTP_TIMEOUT_MS)
        self._monitor = watch_connection(socket, self._on_event)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            self._monitor.close()
            socket.close(linger=0)
            raise ValueError(f"address {address!r} is not usable: {error}") from error
        self._socket = socket
        self._channel = Channel(socket, self._on_frames, self._on_unsent)
        self._timer = self._loop.call_later(self.beat_s, self._beat)

    def send(self, frames: Frames) -> None:
        """Queue a message, only while ``up``; a full queue takes it down until the next pong."""
        self._channel.post(frames)

    def _on_unsent(self, _frames: Frames, _why: Sent) -> None:
        self._down("its send queue is full")

    def close(self, linger_ms: int) -> None:
        """Stop; what is queued may still be sent for ``linger_ms``."""
        self.up = self.connected = False
        self._timer.cancel()
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._monitor.close()
        self._channel.close(linger_ms)

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            message = decode_client(frames[0])
        except _BROKEN:
            self._owner.on_unreadable(request_id_of(frames[0]))
            return
        if isinstance(message, Pong):
            self._on_pong(message)
        else:
            self._owner.on_message(message, frames)

    def _on_pong(self, pong: Pong) -> None:
        if not self.connected:
            return  # left over from a connection that has broken since
        self._unanswered = 0
        if not self._owner.accept(pong):
            self.up = False
            return
        self._channel.batches(pong.batches)
        self._set_beat(pong.heartbeat_s)
        new_daemon = pong.daemon_id != self._daemon_id
        if self.up and not new_daemon:
            return
        self._daemon_id = pong.daemon_id
        self.up = True
        self._owner.on_up(pong, new_daemon)

    def _on_event(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.connected = True
            self.up = False
            self._unanswered = 0
            self._ping()
        elif event == zmq.EVENT_DISCONNECTED:
            self.connected = False
            self._down("the connection broke")

    def _beat(self) -> None:
        self._timer = self._loop.call_later(self.beat_s, self._beat)
        if self.connected:
            if self._unanswered >= _SILENT_PINGS:
                self._down("it does not answer pings")
            self._ping()
        self._owner.on_beat()

    def _set_beat(self, beat_s: float) -> None:
        beat_s = min(_MAX_BEAT_S, max(_MIN_BEAT_S, beat_s))  # in this order NaN becomes the minimum
        if beat_s != self.beat_s:
            self.beat_s = beat_s
            self._timer.cancel()
            self._timer = self._loop.call_later(beat_s, self._beat)

    def _ping(self) -> None:
        self._unanswered += 1
        self._channel.send(_PING)

    def _down(self, why: str) -> None:
        if self.up:
            self.up = False
            _log.warning("lost the daemon: %s; waiting for it to come back", why)
