"""One worker of a daemon as the client sees it: its link, and all that it has not answered yet.

Knows nothing of other workers. Rules:
- A request is an entry of ``_pending`` from its submission until its one answer; whoever takes it
  out settles it. Answers to ids that are not there (duplicates, late ones) are dropped.
- Whenever the link comes up, everything that is unanswered is sent again with the same bytes. The
  daemon takes a repeated request id for the same request, so that is always safe.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from chimera_daemon.client.calls import Pending
from chimera_daemon.client.errors import (
    ChimeraError,
    DaemonUnreachable,
    Overloaded,
    ProtocolError,
    RequestTimeout,
    VersionMismatch,
    from_failure,
)
from chimera_daemon.client.link import Link
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Chunk,
    Closed,
    CloseWorkflow,
    Failure,
    Feedback,
    GetStatus,
    Pong,
    Result,
    StatusReply,
    ToClient,
)
from chimera_daemon.wire import MAX_WORKERS, encode, worker_address

_log = logging.getLogger("chimera.client")

_decode_status = msgspec.json.Decoder(dict[str, Any]).decode
_BROKEN = (msgspec.MsgspecError, ValueError, RecursionError, IndexError)

AnyPending = Pending[Any, Any]

# What is queued when a client closes (cancels, closed workflows) may still be sent for so long.
_LINGER_MS = 200


class LaneOwner(Protocol):
    """What a lane tells the client."""

    def on_lane_up(self, lane: "Lane", pong: Pong) -> None:
        """Its worker answers (again); nothing has been sent again yet."""

    def on_refused(self, error: ChimeraError) -> None:
        """Its worker cannot be worked with, or will not."""


class _Ask:
    """A question or notice that is sent again until it is answered or its time is up."""

    __slots__ = ("expires_at", "frames", "futures")

    def __init__(self, frames: tuple[bytes], expires_at: float) -> None:
        self.frames = frames
        self.expires_at = expires_at
        self.futures: list[asyncio.Future[Any]] = []

    def settle(self, value: object) -> None:
        for future in self.futures:
            if not future.done():
                future.set_result(value)

    def fail(self, error: ChimeraError) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(error)


class Lane:
    """The way to one worker. ``address`` is that of worker 0, whichever ``worker`` this is.

    ``max_pending`` bounds each kind of thing that is kept while the worker is away; ``give_up_s``
    is after how long away all of it fails. Raises `ValueError` for an address that is not usable.
    """

    def __init__(
        self,
        owner: LaneOwner,
        address: str,
        worker: int,
        client_id: str,
        *,
        give_up_s: float,
        max_pending: int,
    ) -> None:
        self.worker = worker
        self.address = worker_address(address, worker)
        self.loop = asyncio.get_running_loop()
        self.answered = False  # at least once
        self._front = address
        self._owner = owner
        self._give_up_s = give_up_s
        self._max_pending = max_pending
        self._pending: dict[str, AnyPending] = {}
        self._asks: dict[tuple[str, str], _Ask] = {}
        self._cancels: dict[str, None] = {}  # given up while the link was down
        self._verdicts: dict[tuple[str, int], Feedback] = {}  # likewise not sent yet
        self._unreadable = 0
        # Why nothing can be submitted at the moment. Made anew each time: a raised exception keeps
        # its traceback, and one that is raised again and again would grow.
        self._broken: Callable[[], ChimeraError] | None = None
        self._away_since: float | None = self.loop.time()
        # Room for everything pending to be sent twice, so that a full queue means a stuck daemon.
        hwm = 2 * max_pending + 1000
        identity = f"{client_id}.{worker}" if worker else client_id
        self._link = Link(self.address, identity.encode(), hwm, self)

    @property
    def up(self) -> bool:
        """Whether the worker answers at the moment."""
        return self._link.up

    @property
    def pending(self) -> int:
        """Requests without an answer."""
        return len(self._pending)

    def check(self) -> None:
        """Raise why nothing can be submitted at the moment, if so."""
        if self._broken is not None:
            raise self._broken()

    # What the client asks for.

    def launch(self, request: AnyPending) -> None:
        """Send it, now or when the worker is back."""
        self._pending[request.request_id] = request
        if self._link.up:
            self._link.send(request.frames)

    def drop(self, request: AnyPending, error: ChimeraError) -> None:
        """Give a request up with this error and tell the daemon; nothing if it is settled."""
        if self._take(request.request_id) is None:
            return
        self._send_cancel(request.request_id)
        request.fail(error)

    def send_feedback(self, feedback: Feedback) -> None:
        """Send it, now or when the worker is back; without a promise."""
        if self._link.up:
            self._link.send((encode(feedback),))
        elif len(self._verdicts) < self._max_pending:
            self._verdicts[feedback.workflow_id, feedback.stage] = feedback

    async def status(self, request_id: str, timeout_s: float) -> dict[str, Any]:
        """The worker's snapshot."""
        frames = (encode(GetStatus(request_id=request_id)),)
        return await self._ask(("status", request_id), frames, timeout_s)

    async def close_workflow(
        self, workflow_id: str, success: float | None, timeout_s: float
    ) -> None:
        """Returns when the worker has acknowledged it."""
        frames = (encode(CloseWorkflow(workflow_id=workflow_id, success=success)),)
        await self._ask(("closed", workflow_id), frames, timeout_s)

    def close_workflow_soon(
        self, workflow_id: str, success: float | None, timeout_s: float
    ) -> None:
        """As `close_workflow`, without waiting and without an error."""
        frames = (encode(CloseWorkflow(workflow_id=workflow_id, success=success)),)
        self._post(("closed", workflow_id), frames, timeout_s)

    def shut(self, error: Callable[[], ChimeraError]) -> None:
        """Cancel and fail what is unanswered, and disconnect."""
        self._fail_all(error)
        self._link.close(_LINGER_MS)

    # When the number of workers changes.

    def move(self, home_of: Callable[[str], "Lane"]) -> None:
        """Hand everything over whose workflow belongs to another lane now."""
        for request in list(self._pending.values()):
            home = home_of(request.workflow_id)
            if home is not self:
                del self._pending[request.request_id]
                self._send_cancel(request.request_id)
                home._adopt(request)
        for key in [key for key in self._asks if key[0] == "closed"]:
            home = home_of(key[1])
            if home is not self:
                home._adopt_ask(key, self._asks.pop(key))

    def _adopt(self, request: AnyPending) -> None:
        request.owner = self
        self._pending[request.request_id] = request
        # To this worker it is new, as everything is to a daemon that restarted.
        if request.on_new_daemon() and self._link.up:
            self._link.send(request.frames)

    def _adopt_ask(self, key: tuple[str, str], ask: _Ask) -> None:
        self._asks[key] = ask
        if self._link.up:
            self._link.send(ask.frames)

    # Requests and asks.

    def _take(self, request_id: str) -> AnyPending | None:
        request = self._pending.pop(request_id, None)
        if request is not None and request.timer is not None:
            request.timer.cancel()
        return request

    def _send_cancel(self, request_id: str) -> None:
        if self._link.up:
            self._link.send((encode(Cancel(request_id=request_id)),))
        elif len(self._cancels) < self._max_pending:
            self._cancels[request_id] = None

    def _fail_all(self, error: Callable[[], ChimeraError]) -> None:
        """Settle everything with an error of its own, and let the daemon know."""
        pending, self._pending = self._pending, {}
        asks, self._asks = self._asks, {}
        for request in pending.values():
            if request.timer is not None:
                request.timer.cancel()
            self._send_cancel(request.request_id)
            request.fail(error())
        for ask in asks.values():
            ask.fail(error())

    async def _ask(self, key: tuple[str, str], frames: tuple[bytes], timeout_s: float) -> Any:
        self.check()
        ask = self._post(key, frames, timeout_s)
        future: asyncio.Future[Any] = self.loop.create_future()
        ask.futures.append(future)
        return await future

    def _post(self, key: tuple[str, str], frames: tuple[bytes], timeout_s: float) -> _Ask:
        ask = self._asks.get(key)
        if ask is None:
            if len(self._asks) >= self._max_pending:
                raise Overloaded(f"{len(self._asks)} notices wait for an answer already")
            ask = self._asks[key] = _Ask(frames, self.loop.time() + timeout_s)
        if self._link.up:
            self._link.send(frames)
        return ask

    # What the link says.

    def on_message(self, message: ToClient, frames: list[bytes]) -> None:
        """Called by the link."""
        match message:
            case Chunk():
                self._on_chunk(message, frames)
            case Result():
                self._on_result(message, frames)
            case Failure():
                self._on_failure(message)
            case Closed():
                ask = self._asks.pop(("closed", message.workflow_id), None)
                if ask is not None:
                    ask.settle(None)
            case StatusReply():
                self._on_status(message, frames)
            case Pong():
                pass  # the link's own

    def _on_result(self, result: Result, frames: list[bytes]) -> None:
        request = self._take(result.request_id)
        if request is None:
            return
        try:
            reply = request.read_answer(result, frames[1])
        except _BROKEN:
            request.fail(ProtocolError("the answer's payload could not be read"))
            return
        if request.models is not None:
            request.models.add(result.model)
        request.finish(reply)

    def _on_chunk(self, chunk: Chunk, frames: list[bytes]) -> None:
        request = self._pending.get(chunk.request_id)
        if request is None:
            return
        try:
            piece = request.read_chunk(frames[1])
        except _BROKEN:
            _log.warning("a chunk of request %s could not be read", chunk.request_id)
            return  # a gap
        request.on_chunk(chunk, piece)

    def _on_failure(self, failure: Failure) -> None:
        if not failure.request_id:
            # It concerns the connection: we cannot know which request the daemon could not read,
            # and one that is never answered must not wait for ever.
            _log.error("the daemon refused a message: %s: %s", failure.code, failure.message)
            self._owner.on_refused(from_failure(failure))
            self._fail_all(lambda: from_failure(failure))
            return
        request = self._take(failure.request_id)
        if request is not None:
            request.fail(from_failure(failure))
            return
        ask = self._asks.pop(("status", failure.request_id), None)
        if ask is not None:
            ask.fail(from_failure(failure))

    def _on_status(self, message: StatusReply, frames: list[bytes]) -> None:
        ask = self._asks.pop(("status", message.request_id), None)
        if ask is None:
            return
        try:
            ask.settle(_decode_status(frames[1]))
        except _BROKEN:
            ask.fail(ProtocolError("the status could not be read"))

    def on_unreadable(self, request_id: str) -> None:
        """Called by the link."""
        self._unreadable += 1
        if self._unreadable & (self._unreadable - 1) == 0:  # 1, 2, 4, ...: a flood stays readable
            _log.warning("%d unreadable messages from %s", self._unreadable, self.address)
        request = self._take(request_id)
        if request is not None:
            self._send_cancel(request_id)
            request.fail(ProtocolError("the daemon's answer could not be read"))

    def on_up(self, pong: Pong, new_daemon: bool) -> None:
        """Called by the link: send again all that is unanswered, in the order it was asked."""
        self.answered = True
        self._away_since = None
        self._broken = None
        self._owner.on_lane_up(self, pong)
        if not new_daemon:
            for request_id in self._cancels:
                self._link.send((encode(Cancel(request_id=request_id)),))
            for feedback in self._verdicts.values():
                self._link.send((encode(feedback),))
        self._cancels.clear()
        self._verdicts.clear()
        for request in list(self._pending.values()):
            if (not new_daemon or request.on_new_daemon()) and self._link.up:
                self._link.send(request.frames)
        self._resend_asks()

    def accept(self, pong: Pong) -> bool:
        """Called by the link: is this the worker that is expected here, and can we talk to it?"""
        problem = self._problem(pong)
        if problem is None:
            return True
        self._broken = problem
        self._owner.on_refused(problem())
        self._fail_all(problem)
        return False

    def _problem(self, pong: Pong) -> Callable[[], ChimeraError] | None:
        if pong.v != PROTOCOL_VERSION:
            return lambda: VersionMismatch(
                f"the daemon at {self.address} speaks protocol version {pong.v}, this client "
                f"{PROTOCOL_VERSION}: install the same release of Chimera on both sides"
            )
        if pong.worker != self.worker:
            advice = "connect to the address of worker 0" if self.worker == 0 else "check its ports"
            return lambda: DaemonUnreachable(
                f"worker {pong.worker} of a daemon answers at {self.address}, where worker "
                f"{self.worker} was expected: {advice}",
                retryable=False,
            )
        if not self._can_reach(pong.workers):
            return lambda: ProtocolError(
                f"the daemon at {self.address} says that it has {pong.workers} workers, more than "
                f"can be reached: at most {MAX_WORKERS}, each two ports further on"
            )
        return None

    def _can_reach(self, workers: int) -> bool:
        if not 1 <= workers <= MAX_WORKERS:
            return False
        try:
            worker_address(self._front, workers - 1)
        except ValueError:
            return False
        return True

    def on_beat(self) -> None:
        """Called by the link: what is waited for in vain."""
        now = self.loop.time()
        if not self._link.up:
            if self._away_since is None:
                self._away_since = now
            away_since = self._away_since
            if now - away_since >= self._give_up_s and self._broken is None:
                self._broken = lambda: self.unreachable(now - away_since)
                self._fail_all(self._broken)
        for key, ask in list(self._asks.items()):
            if now >= ask.expires_at:
                del self._asks[key]
                ask.fail(RequestTimeout("the daemon did not acknowledge in time"))
        self._resend_asks()

    def _resend_asks(self) -> None:
        for ask in self._asks.values():
            if not self._link.up:
                return
            self._link.send(ask.frames)

    def unreachable(self, away_s: float) -> DaemonUnreachable:
        """What to say of a worker that has been away for so long."""
        if self._link.connected:
            what = f"something at {self.address} takes connections but is no Chimera daemon"
        else:
            what = f"no Chimera daemon answers at {self.address}"
        return DaemonUnreachable(
            f"{what} (waited {away_s:.1f} s); start one with `chimera up`, or check the address"
        )
