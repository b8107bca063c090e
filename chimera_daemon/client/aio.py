"""The asyncio client: many requests and workflows over one `Link`.

Owns every request without an answer. Rules:
- A request is an entry of ``_pending`` from its submission until its one answer; whoever takes it
  out settles it. Answers to ids that are not there (duplicates, late ones) are dropped.
- Whenever the link comes up, everything that is unanswered is sent again with the same bytes. The
  daemon takes a repeated request id for the same request, so that is always safe.
- Nothing is awaited between encoding and sending: one future, one encode, one send per request, no
  task, and a timer only where a timeout was asked for.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import msgspec

from chimera_daemon.client.calls import Call, Pending, Reply, Stream
from chimera_daemon.client.errors import (
    BadRequest,
    ChimeraError,
    ClientClosed,
    DaemonUnreachable,
    Overloaded,
    ProtocolError,
    RequestTimeout,
    TooLarge,
    VersionMismatch,
    from_failure,
)
from chimera_daemon.client.link import Link
from chimera_daemon.client.workflow import ASK_TIMEOUT_S, Workflow
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Chunk,
    Closed,
    CloseWorkflow,
    Completion,
    Delta,
    Failure,
    Feedback,
    GetStatus,
    Hints,
    Pong,
    Result,
    StatusReply,
    Submit,
    ToClient,
    Tries,
)
from chimera_daemon.wire import MAX_HEADER_BYTES, encode

_log = logging.getLogger("chimera.client")

_decode_completion = msgspec.json.Decoder(Completion).decode
_decode_delta = msgspec.json.Decoder(Delta).decode
_decode_status = msgspec.json.Decoder(dict[str, Any]).decode
_BROKEN = (msgspec.MsgspecError, ValueError, RecursionError)

CONNECT_TIMEOUT_S = 5.0
GIVE_UP_S = 60.0
MAX_PENDING = 10_000
# What is queued when a client closes (cancels, closed workflows) may still be sent for so long.
_LINGER_MS = 200


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


class Client:
    """A connection to a daemon, for any number of workflows at once. Make one with `connect`.

    To be used on one event loop (asyncio or uvloop) and its thread. ``give_up_s``: a daemon that is
    away for longer fails what is pending, and everything new until it is back, with
    `DaemonUnreachable`. ``max_pending``: requests without an answer, beyond that `Overloaded`.
    """

    def __init__(
        self, address: str, *, give_up_s: float = GIVE_UP_S, max_pending: int = MAX_PENDING
    ) -> None:
        if max_pending < 1 or give_up_s <= 0:
            raise ValueError("max_pending and give_up_s must be positive")
        self.address = address
        self.client_id = os.urandom(16).hex()
        self.loop = asyncio.get_running_loop()
        self._max_pending = max_pending
        self._give_up_s = give_up_s
        self._max_payload_bytes = 0
        self._pending: dict[str, Pending] = {}
        self._asks: dict[tuple[str, str], _Ask] = {}
        self._cancels: dict[str, None] = {}  # given up while the link was down
        self._verdicts: dict[tuple[str, int], Feedback] = {}  # likewise not sent yet
        self._requests = 0
        self._workflows = 0
        self._unreadable = 0
        # Why nothing can be submitted at the moment. Made anew each time: a raised exception keeps
        # its traceback, and one that is raised again and again would grow.
        self._broken: Callable[[], ChimeraError] | None = None
        self._closed = False
        self._away_since: float | None = self.loop.time()
        self._ready: asyncio.Future[None] = self.loop.create_future()
        # Room for everything pending to be sent twice, so that a full queue means a stuck daemon.
        hwm = 2 * max_pending + 1000
        self._link = Link(address, self.client_id.encode(), hwm, self)

    @property
    def connected(self) -> bool:
        """Whether the daemon answers at the moment; requests are taken, and kept, also if not."""
        return self._link.up

    @property
    def pending(self) -> int:
        """Requests without an answer."""
        return len(self._pending)

    @property
    def max_payload_bytes(self) -> int:
        """The daemon's bound on one payload."""
        return self._max_payload_bytes

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait for the first answer of the daemon.

        Raises `DaemonUnreachable` after ``timeout_s`` seconds, `VersionMismatch` at once.
        """
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except TimeoutError:
            raise self._unreachable(timeout_s) from None

    def workflow(
        self, kind: str | None = None, workflow_id: str | None = None, *, tries: int = 1
    ) -> Workflow:
        """Start a workflow, best as ``async with client.workflow(...) as workflow``.

        ``kind`` is a free label of at most 64 characters that predictions learn by (such as
        ``"math"``). ``workflow_id``, 1 to 128 characters, must be unique; None makes one up.
        ``tries``: how often you would do the task in all if it fails (`Workflow.again`); the policy
        may then begin with a model that is less likely to succeed but quick to have tried.
        """
        if not 1 <= tries <= 100:
            raise ValueError(f"a task is tried 1 to 100 times, not {tries}")
        return Workflow(self, workflow_id, kind, Tries(left=tries - 1) if tries > 1 else None)

    def new_workflow_id(self) -> str:
        """One that no other workflow has."""
        self._workflows += 1
        return f"{self.client_id[:16]}-{self._workflows}"

    def submit(
        self,
        payload: bytes,
        *,
        workflow_id: str,
        stage: int = 0,
        kind: str | None = None,
        model: str | None = None,
        max_tokens: int = 256,
        prompt_tokens: int | None = None,
        hints: Hints | None = None,
        restart: bool = False,
        tries: Tries | None = None,
        optional: bool = False,
        timeout_s: float | None = None,
    ) -> Call:
        """Send one stage with a payload that is already encoded; returns at once.

        The lower level under `Workflow`: ``payload`` is an OpenAI chat body as JSON. Raises
        `TooLarge`, `Overloaded`, `BadRequest`, `DaemonUnreachable` or `ClientClosed` without having
        sent anything; every other error comes out of the `Call`.
        """
        request_id, frames = self._encode(
            payload,
            workflow_id,
            stage,
            kind,
            model,
            max_tokens,
            prompt_tokens,
            hints,
            restart,
            tries,
            optional,
        )
        call = Call(self, request_id, frames, stage)
        self._launch(call, timeout_s)
        return call

    def stream(
        self,
        payload: bytes,
        *,
        workflow_id: str,
        stage: int = 0,
        kind: str | None = None,
        model: str | None = None,
        max_tokens: int = 256,
        prompt_tokens: int | None = None,
        hints: Hints | None = None,
        restart: bool = False,
        tries: Tries | None = None,
        optional: bool = False,
        timeout_s: float | None = None,
    ) -> Stream:
        """As `submit`, with the text as it is written."""
        request_id, frames = self._encode(
            payload,
            workflow_id,
            stage,
            kind,
            model,
            max_tokens,
            prompt_tokens,
            hints,
            restart,
            tries,
            optional,
            stream=True,
        )
        stream = Stream(self, request_id, frames, stage, restart)
        self._launch(stream, timeout_s)
        return stream

    async def status(self, timeout_s: float = ASK_TIMEOUT_S) -> dict[str, Any]:
        """A snapshot of the daemon. Raises `RequestTimeout` (checked once per heartbeat)."""
        self._requests += 1
        request_id = f"s{self._requests}"
        frames = (encode(GetStatus(request_id=request_id)),)
        return await self._ask(("status", request_id), frames, timeout_s)

    async def close_workflow(
        self, workflow_id: str, success: float | None = None, timeout_s: float = ASK_TIMEOUT_S
    ) -> None:
        """Report the end of a workflow; sent again until the daemon has acknowledged it.

        Raises `RequestTimeout` (checked once per heartbeat).
        """
        frames = (encode(CloseWorkflow(workflow_id=workflow_id, success=success)),)
        await self._ask(("closed", workflow_id), frames, timeout_s)

    def close_workflow_soon(self, workflow_id: str, success: float | None = None) -> None:
        """As `close_workflow`, without waiting and without an error."""
        if not self._closed:
            frames = (encode(CloseWorkflow(workflow_id=workflow_id, success=success)),)
            self._post(("closed", workflow_id), frames, ASK_TIMEOUT_S)

    def feedback(self, workflow_id: str, stage: int, verdict: float) -> None:
        """Say whether a stage's answer was right, as `Workflow.feedback`, without any waiting."""
        if self._closed:
            return
        feedback = Feedback(workflow_id, stage, verdict)
        if self._link.up:
            self._link.send((encode(feedback),))
        elif len(self._verdicts) < self._max_pending:
            self._verdicts[workflow_id, stage] = feedback

    async def close(self) -> None:
        """Cancel what is pending (it fails with `ClientClosed`) and disconnect. Idempotent."""
        self.shut()

    def shut(self) -> None:
        """As `close`, for callers that cannot await."""
        if self._closed:
            return
        self._closed = True
        self._fail_all(lambda: ClientClosed("the client was closed"))
        self._ready.cancel()
        self._link.close(_LINGER_MS)

    # Requests.

    def _encode(
        self,
        payload: bytes,
        workflow_id: str,
        stage: int,
        kind: str | None,
        model: str | None,
        max_tokens: int,
        prompt_tokens: int | None,
        hints: Hints | None,
        restart: bool,
        tries: Tries | None,
        optional: bool,
        stream: bool = False,
    ) -> tuple[str, tuple[bytes, bytes]]:
        """The request's id and frames; refuses what cannot succeed before it costs anything."""
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._broken is not None:
            raise self._broken()
        if len(self._pending) >= self._max_pending:
            raise Overloaded(f"{len(self._pending)} requests are pending in this client already")
        if max_tokens < 1:
            raise BadRequest(f"max_tokens must be at least 1, not {max_tokens}")
        if len(payload) > self._max_payload_bytes > 0:
            raise TooLarge(
                f"the payload has {len(payload)} bytes; "
                f"the daemon takes at most {self._max_payload_bytes}"
            )
        self._requests += 1
        request_id = f"r{self._requests}"
        header = encode(
            Submit(
                request_id=request_id,
                workflow_id=workflow_id,
                stage=stage,
                kind=kind,
                model=model,
                max_tokens=max_tokens,
                prompt_tokens=prompt_tokens,
                stream=stream,
                restart=restart,
                hints=hints,
                tries=tries,
                optional=optional,
            )
        )
        if len(header) > MAX_HEADER_BYTES:
            raise BadRequest(
                f"hints or tries are too long: the header is over {MAX_HEADER_BYTES} bytes"
            )
        return request_id, (header, payload)

    def _launch(self, request: Pending, timeout_s: float | None) -> None:
        if timeout_s is not None:
            request.timer = self.loop.call_later(timeout_s, self._expire, request, timeout_s)
        self._pending[request.request_id] = request
        if self._link.up:
            self._link.send(request.frames)

    def _take(self, request_id: str) -> Pending | None:
        request = self._pending.pop(request_id, None)
        if request is not None and request.timer is not None:
            request.timer.cancel()
        return request

    def _expire(self, request: Pending, timeout_s: float) -> None:
        self.drop(request, RequestTimeout(f"no answer within {timeout_s} s"))

    def drop(self, request: Pending, error: ChimeraError) -> None:
        """Give a request up with this error and tell the daemon; nothing if it is settled."""
        if self._take(request.request_id) is None:
            return
        self._send_cancel(request.request_id)
        request.fail(error)

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
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._broken is not None:
            raise self._broken()
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
            case Result():
                self._on_result(message, frames)
            case Chunk():
                self._on_chunk(message, frames)
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
            text = _decode_completion(frames[1]).text
        except (*_BROKEN, IndexError):
            request.fail(ProtocolError("the answer's payload could not be read"))
            return
        if request.models is not None:
            request.models.add(result.model)
        request.finish(
            Reply(
                text,
                result.model,
                result.engine,
                result.usage,
                result.finish_reason,
                result.receipt,
                result.request_id,
                perf_counter() - request.started,
                request.stage,
                result.logprob,
            )
        )

    def _on_chunk(self, chunk: Chunk, frames: list[bytes]) -> None:
        request = self._pending.get(chunk.request_id)
        if request is None:
            return
        try:
            text = _decode_delta(frames[1]).text
        except (*_BROKEN, IndexError):
            _log.warning("a chunk of request %s could not be read", chunk.request_id)
            return  # a gap, which the final answer fills
        request.on_chunk(chunk, text)

    def _on_failure(self, failure: Failure) -> None:
        error = from_failure(failure)
        if not failure.request_id:
            # It concerns the connection: we cannot know which request the daemon could not read,
            # and one that is never answered must not wait for ever.
            _log.error("the daemon refused a message: %s: %s", failure.code, failure.message)
            if not self._ready.done():
                self._ready.set_exception(error)
            self._fail_all(lambda: from_failure(failure))
            return
        request = self._take(failure.request_id)
        if request is not None:
            request.fail(error)
            return
        ask = self._asks.pop(("status", failure.request_id), None)
        if ask is not None:
            ask.fail(error)

    def _on_status(self, message: StatusReply, frames: list[bytes]) -> None:
        ask = self._asks.pop(("status", message.request_id), None)
        if ask is None:
            return
        try:
            ask.settle(_decode_status(frames[1]))
        except (*_BROKEN, IndexError):
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
        self._away_since = None
        self._broken = None
        self._max_payload_bytes = pong.max_payload_bytes
        if not self._ready.done():
            self._ready.set_result(None)
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

    def on_version(self, version: int) -> None:
        """Called by the link."""
        message = (
            f"the daemon at {self.address} speaks protocol version {version}, this client "
            f"{PROTOCOL_VERSION}: install the same release of Chimera on both sides"
        )
        self._broken = lambda: VersionMismatch(message)
        if not self._ready.done():
            self._ready.set_exception(self._broken())
        self._fail_all(self._broken)

    def on_beat(self) -> None:
        """Called by the link: what is waited for in vain."""
        now = self.loop.time()
        if not self._link.up:
            if self._away_since is None:
                self._away_since = now
            away_since = self._away_since
            if now - away_since >= self._give_up_s and self._broken is None:
                self._broken = lambda: self._unreachable(now - away_since)
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

    def _unreachable(self, away_s: float) -> DaemonUnreachable:
        if self._link.connected:
            what = f"something at {self.address} takes connections but is no Chimera daemon"
        else:
            what = f"no Chimera daemon answers at {self.address}"
        return DaemonUnreachable(
            f"{what} (waited {away_s:.1f} s); start one with `chimera up`, or check the address"
        )


@asynccontextmanager
async def connect(
    address: str,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    give_up_s: float = GIVE_UP_S,
    max_pending: int = MAX_PENDING,
) -> AsyncGenerator[Client, None]:
    """Connect to the daemon at ``tcp://HOST:PORT`` or ``ipc:///PATH``; see `Client`.

    Waits up to ``timeout_s`` seconds for its first answer. Raises `ValueError` for an address that
    cannot be used, `DaemonUnreachable` or `VersionMismatch`.
    """
    client = Client(address, give_up_s=give_up_s, max_pending=max_pending)
    try:
        await client.wait_ready(timeout_s)
        yield client
    finally:
        await client.close()
