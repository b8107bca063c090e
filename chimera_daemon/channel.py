"""A ZeroMQ socket on an asyncio loop, read from its file descriptor.

`zmq.asyncio` costs about three times as much per message. The descriptor is edge-triggered: it
becomes readable once, and any send or receive may use up that edge. So after every edge the socket
is read until it is empty, every send asks for one more look, and a slow timer looks again in case
all that fails.
"""

import asyncio
import struct
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any

import zmq
from zmq.backend import Socket as BareSocket

from chimera_daemon.wire import BATCH, MAX_BATCH, pack, unpack

# So many messages read together leave together at most: a larger batch is handed on in parts, so
# that who comes next need not wait for all of it. Of 1 to 256, 16 took the least processor time.
_TOGETHER = 16
# Bounds of a batch, so that it fits wherever a single message does. Copying is cheap up to there.
_BATCH_BYTES = 48 << 10
_SMALL_BYTES = 16 << 10  # larger messages go by themselves
# Messages taken in one go, or a batch more, before other callbacks of the loop get their turn.
_BATCH = 256
_SAFETY_S = 0.25
_NOBLOCK = int(zmq.NOBLOCK)
_POLLIN = int(zmq.POLLIN)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

Frames = Sequence[bytes]
_Posted = tuple[Frames, bool]  # and whether it is droppable


class Sent(Enum):
    """What became of a message."""

    OK = 0
    FULL = 1  # the peer is there and does not read: its queue has reached the high-water mark
    GONE = 2  # no such peer, or the socket is closed


class Together:
    """Channels of one loop whose posted messages leave together, after the messages being read."""

    def __init__(self) -> None:
        self.reading = False
        self.posted: list[Channel] = []
        self._handled = 0  # messages since the last flush

    def flush(self) -> None:
        """Send what was posted."""
        self._handled = 0
        while self.posted:
            self.posted.pop().flush()

    def handled(self, part: int = _TOGETHER) -> None:
        """Another message was read and handled; after so many it is time to flush."""
        self._handled += 1
        if self._handled >= part:
            self.flush()


class Channel:
    """Owns the socket. ``on_frames`` is called with the frames of every message, in order.

    Must be made and used on the thread of the running loop. Errors raised by ``on_frames`` are
    programming errors and go to the loop's exception handler; reading goes on.

    Messages leave at once with `send`, or with `post` when what came in together has been read:
    ZeroMQ's thread is woken once for all of them then, and what goes to one peer goes as a batch if
    that can read it: that saves a good part of the processor time of a busy daemon. Messages to one
    peer keep their order only if all of them are posted.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        on_frames: Callable[[list[bytes]], None],
        on_unsent: Callable[[Frames, Sent], None] | None = None,
        together: Together | None = None,
    ) -> None:
        """``on_unsent`` gets posted messages that could not leave, with the reason."""
        self._socket = socket
        # pyzmq's own multipart calls spend more time on enums than on messages (2.9 against 1.8 µs
        # to receive two frames, 2.0 against 0.7 µs to send them).
        self._send: Callable[[bytes, int], Any] = partial(BareSocket.send, socket)
        self._receive: Callable[[int, bool], Any] = partial(BareSocket.recv, socket)
        self._events: Callable[[], Any] = partial(BareSocket.get, socket, int(zmq.EVENTS))
        self._on_frames = on_frames
        self._on_unsent = on_unsent
        self._together = together or Together()
        self._to_one = socket.type != zmq.ROUTER
        self._posted: list[_Posted] = []
        self._batch_readers: set[bytes] = set()
        self.dropped = 0
        self._alone = True  # there was no more than one message the last time
        self._loop = asyncio.get_running_loop()
        self._fd: int = socket.getsockopt(zmq.FD)  # pyright: ignore[reportAttributeAccessIssue]
        self._scheduled = False
        self._closed = False
        self._loop.add_reader(self._fd, self._drain)
        self._timer = self._loop.call_later(_SAFETY_S, self._look_again)
        self._schedule()

    def batches(self, readable: bool, peer: bytes = b"") -> None:
        """Say whether a peer (of a ROUTER: this one) can read batches; none can to begin with."""
        if readable:
            self._batch_readers.add(peer)
        else:
            self._batch_readers.discard(peer)

    def post(self, frames: Frames, *, droppable: bool = False) -> None:
        """Queue a message that leaves with others, soon; see ``on_unsent``.

        One that is ``droppable`` is not handed back but counted in ``dropped``.
        """
        if not self._posted:
            self._together.posted.append(self)
            if not self._together.reading:
                self._loop.call_soon(self._together.flush)
        self._posted.append((frames, droppable))

    def flush(self) -> None:
        """Send what was posted. After one message that a peer does not take no other goes there."""
        refusing: set[bytes] = set()
        posted, self._posted = self._posted, []
        if len(posted) == 1 or not self._batch_readers:
            parcels = [(each[0], (each,)) for each in posted]
        else:
            parcels = self._parcels(posted)
        for frames, members in parcels:
            peer = b"" if self._to_one else frames[0]
            sent = Sent.FULL if peer in refusing else self._try_send(frames)
            if sent is not Sent.OK:
                if sent is Sent.FULL:
                    refusing.add(peer)
                self._give_back(members, sent)
        # Sending may have used up the edge that says what has come in.
        if not self._scheduled and not self._closed and self._events() & _POLLIN:
            self._schedule()

    def _parcels(self, posted: list[_Posted]) -> list[tuple[Frames, Sequence[_Posted]]]:
        """What leaves for each peer: batches, where they can be read, and single messages."""
        by_peer: dict[bytes, list[_Posted]] = {}
        for each in posted:
            by_peer.setdefault(b"" if self._to_one else each[0][0], []).append(each)
        parcels: list[tuple[Frames, Sequence[_Posted]]] = []
        for peer, messages in by_peer.items():
            if peer not in self._batch_readers:
                parcels += [(each[0], (each,)) for each in messages]
                continue
            batch: list[_Posted] = []
            left = _BATCH_BYTES
            for each in messages:
                size = sum(map(len, each[0]))
                small = size <= _SMALL_BYTES
                if batch and not (small and size <= left and len(batch) < MAX_BATCH):
                    parcels.append(self._parcel(batch))
                    batch, left = [], _BATCH_BYTES
                if small:
                    batch.append(each)
                    left -= size
                else:
                    parcels.append((each[0], (each,)))
            if batch:
                parcels.append(self._parcel(batch))
        return parcels

    def _parcel(self, batch: list[_Posted]) -> tuple[Frames, Sequence[_Posted]]:
        frames = batch[0][0]
        if len(batch) > 1:
            if self._to_one:
                frames = pack([each[0] for each in batch])
            else:
                frames = (frames[0], *pack([each[0][1:] for each in batch]))
        return frames, batch

    def _give_back(self, messages: Sequence[_Posted], why: Sent) -> None:
        for frames, droppable in messages:
            if droppable:
                self.dropped += 1
            elif self._on_unsent is not None:
                self._on_unsent(frames, why)

    def send(self, frames: Frames) -> bool:
        """Queue a message; False if the peer is unknown or its queue is full. Never blocks."""
        return self.try_send(frames) is Sent.OK

    def try_send(self, frames: Frames) -> Sent:
        """Queue a message and say what became of it. Never blocks."""
        try:
            return self._try_send(frames)
        finally:
            if not self._scheduled:
                self._schedule()

    def close(self, linger_ms: int = 0) -> None:
        """Stop reading and close the socket; what is queued may be sent for ``linger_ms``."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=linger_ms)

    def _try_send(self, frames: Frames) -> Sent:
        last = len(frames) - 1
        try:
            for i, frame in enumerate(frames):
                self._send(frame, _NOBLOCK if i == last else _NOBLOCK_MORE)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.ENOTSOCK, zmq.ETERM):
                return Sent.GONE
            raise
        return Sent.OK

    def _schedule(self) -> None:
        if not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _look_again(self) -> None:
        self._timer = self._loop.call_later(_SAFETY_S, self._look_again)
        if not self._scheduled:
            self._drain()

    def _drain(self) -> None:
        # Marked as scheduled while it runs, so that sends from a handler do not schedule another.
        self._scheduled = True
        together = self._together
        together.reading = True
        more = True  # if a handler raises: it has been logged, and what is behind it shall be read
        try:
            more = self._read()
        finally:
            together.reading = False
            self._scheduled = more
            if together.posted:
                together.flush()
            if more:
                self._schedule()

    def _read(self) -> bool:
        """Take what is there; True if there may be more."""
        receive, batch_frames = self._receive, 2 if self._to_one else 3
        taken = 0
        while taken < _BATCH:
            if self._closed:
                return False
            # `Again` costs three times as much as asking, which pays where messages come alone.
            if taken == 1 and self._alone and not self._events() & _POLLIN:
                return False
            try:
                frame = receive(_NOBLOCK, False)
            except zmq.Again:
                self._alone = taken < 2
                return False
            frames = [frame.bytes]
            while frame.more:
                frame = receive(_NOBLOCK, False)
                frames.append(frame.bytes)
            if len(frames) == batch_frames and frames[-2] == BATCH:
                taken += self._on_batch(frames)
            else:
                taken += 1
                self._on_frames(frames)
                self._together.handled()
        self._alone = False
        return True

    def _on_batch(self, frames: list[bytes]) -> int:
        """Pass its messages on; one that is broken goes as it is. Returns how many there were."""
        messages = unpack(frames[-1])
        if messages is None:
            self._on_frames(frames)
            return 1
        part = max(_TOGETHER, len(messages) // 2)
        for parts in messages:
            if self._closed:
                break
            try:
                self._on_frames(parts if self._to_one else [frames[0], *parts])
                self._together.handled(part)
            except Exception as error:  # those behind it shall be heard all the same
                context = {"message": "a message's handler failed", "exception": error}
                self._loop.call_exception_handler(context)
        return max(1, len(messages))


def watch_connection(socket: "zmq.Socket[bytes]", on_event: Callable[[int], None]) -> Channel:
    """Hear of handshakes and broken connections of a socket; call it before ``connect``.

    ``on_event`` gets `zmq.EVENT_HANDSHAKE_SUCCEEDED` or `zmq.EVENT_DISCONNECTED`. What is under way
    when a connection breaks is lost without a word; this is how an end learns of it. Call the
    socket's ``disable_monitor`` before closing the returned channel.
    """
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    def on_frames(frames: list[bytes]) -> None:
        if len(frames[0]) >= 2:
            on_event(struct.unpack_from("=H", frames[0])[0])

    return Channel(monitor, on_frames)


def make_socket(
    context: "zmq.Context[Any]",
    kind: int,
    *,
    hwm: int,
    max_bytes: int = -1,
    identity: bytes | None = None,
) -> "zmq.Socket[bytes]":
    """A socket with explicit bounds: ``hwm`` messages per peer and way, ``max_bytes`` a frame."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, hwm)
    socket.setsockopt(zmq.RCVHWM, hwm)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    if kind == zmq.ROUTER:
        # Unknown or stuck peers are errors we see, and a peer that comes back takes its name over.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
    # A peer that comes back is found soon; the cap keeps a dead one cheap.
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    return socket
