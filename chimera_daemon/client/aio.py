"""The asyncio client: many requests and workflows over one `Lane` per worker of the daemon.

Owns the choice of the lane, by workflow id, and how many there are: as many as worker 0 says.
Nothing is awaited between encoding and sending: one future, one encode, one send per request, no
task, and a timer only where a timeout was asked for.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from chimera_daemon.client.calls import Call, RawCall, RawStream, Stream
from chimera_daemon.client.errors import (
    BadRequest,
    ChimeraError,
    ClientClosed,
    DaemonUnreachable,
    Overloaded,
    RequestTimeout,
    TooLarge,
)
from chimera_daemon.client.lane import Lane
from chimera_daemon.client.workflow import ASK_TIMEOUT_S, Workflow
from chimera_daemon.messages import NO_LIMIT, Api, Feedback, Hints, Pong, Submit, Tries
from chimera_daemon.wire import MAX_HEADER_BYTES, encode, worker_of

CONNECT_TIMEOUT_S = 5.0
GIVE_UP_S = 60.0
MAX_PENDING = 10_000
# For the snapshot of a worker that is away when there are others.
_AWAY_STATUS_S = 0.5

Request = TypeVar("Request", Call, RawCall, Stream, RawStream)


class Client:
    """A connection to a daemon, for any number of workflows at once. Make one with `connect`.

    To be used on one event loop (asyncio or uvloop) and its thread. ``address`` is that of worker 0
    of the daemon, which says how many workers there are. ``give_up_s``: a worker that is away for
    longer fails what is pending there, and everything new until it is back, with
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
        self._requests = 0
        self._workflows = 0
        self._closed = False
        self._ready: asyncio.Future[None] = self.loop.create_future()
        self._lanes = [self._open(0)]

    def _open(self, worker: int) -> Lane:
        return Lane(
            self,
            self.address,
            worker,
            self.client_id,
            give_up_s=self._give_up_s,
            max_pending=self._max_pending,
        )

    @property
    def connected(self) -> bool:
        """Whether all workers answer at the moment; requests are taken, and kept, also if not."""
        return all(lane.up for lane in self._lanes)

    @property
    def pending(self) -> int:
        """Requests without an answer."""
        lanes = self._lanes
        return lanes[0].pending if len(lanes) == 1 else sum([lane.pending for lane in lanes])

    @property
    def workers(self) -> int:
        """How many workers the daemon has, as far as is known."""
        return len(self._lanes)

    @property
    def max_payload_bytes(self) -> int:
        """The daemon's bound on one payload."""
        return self._max_payload_bytes

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait for the first answer of every worker.

        Raises `DaemonUnreachable` after ``timeout_s`` seconds, `VersionMismatch` at once.
        """
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except TimeoutError:
            away = [lane for lane in self._lanes if not lane.answered] or self._lanes
            raise away[0].unreachable(timeout_s) from None

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
        header = Submit(
            request_id=self._new_request_id(),
            workflow_id=workflow_id,
            stage=stage,
            kind=kind,
            model=model,
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            restart=restart,
            hints=hints,
            tries=tries,
            optional=optional,
        )
        return self._launch(Call, header, payload, timeout_s)

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
        header = Submit(
            request_id=self._new_request_id(),
            workflow_id=workflow_id,
            stage=stage,
            kind=kind,
            model=model,
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            stream=True,
            restart=restart,
            hints=hints,
            tries=tries,
            optional=optional,
        )
        return self._launch(Stream, header, payload, timeout_s)

    def request(
        self,
        payload: bytes,
        *,
        api: Api,
        workflow_id: str,
        stage: int = 0,
        kind: str | None = None,
        model: str | None = None,
        max_tokens: int = NO_LIMIT,
        prompt_tokens: int | None = None,
        hints: Hints | None = None,
        restart: bool = False,
        tries: Tries | None = None,
        optional: bool = False,
        last: bool = False,
        timeout_s: float | None = None,
    ) -> RawCall:
        """Send a body of OpenAI's API as it is and get the response object as it came.

        ``api`` is ``"chat"`` or ``"completions"``. The engine honours the body's own settings;
        ``max_tokens`` here is what scheduling goes by. ``last``: the workflow ends, without an
        outcome, with this answer. The rest, errors included, is as for `submit`.
        """
        header = Submit(
            request_id=self._new_request_id(),
            workflow_id=workflow_id,
            stage=stage,
            kind=kind,
            model=model,
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            restart=restart,
            hints=hints,
            tries=tries,
            optional=optional,
            api=_raw(api),
            last=last,
        )
        return self._launch(RawCall, header, payload, timeout_s)

    def relay(
        self,
        payload: bytes,
        *,
        api: Api,
        workflow_id: str,
        stage: int = 0,
        kind: str | None = None,
        model: str | None = None,
        max_tokens: int = NO_LIMIT,
        prompt_tokens: int | None = None,
        hints: Hints | None = None,
        restart: bool = False,
        tries: Tries | None = None,
        optional: bool = False,
        last: bool = False,
        timeout_s: float | None = None,
    ) -> RawStream:
        """As `request`, with the chunk objects of a stream as they come."""
        header = Submit(
            request_id=self._new_request_id(),
            workflow_id=workflow_id,
            stage=stage,
            kind=kind,
            model=model,
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            stream=True,
            restart=restart,
            hints=hints,
            tries=tries,
            optional=optional,
            api=_raw(api),
            last=last,
        )
        return self._launch(RawStream, header, payload, timeout_s)

    async def status(self, timeout_s: float = ASK_TIMEOUT_S) -> dict[str, Any]:
        """A snapshot of the daemon; of several workers ``{"workers": [...]}``, a snapshot each.

        A worker that is away is left out, unless all are. Raises `RequestTimeout` (checked once per
        heartbeat).
        """
        self._check_open()
        if len(self._lanes) == 1:
            return await self._lanes[0].status(self._new_request_id(), timeout_s)
        snapshots = await asyncio.gather(
            *(
                lane.status(
                    self._new_request_id(), timeout_s if lane.up else min(timeout_s, _AWAY_STATUS_S)
                )
                for lane in self._lanes
            ),
            return_exceptions=True,
        )
        there = [snapshot for snapshot in snapshots if isinstance(snapshot, dict)]
        for problem in snapshots:
            away = isinstance(problem, (RequestTimeout, DaemonUnreachable))
            if isinstance(problem, BaseException) and not (away and there):
                raise problem
        return {"workers": there}

    async def close_workflow(
        self, workflow_id: str, success: float | None = None, timeout_s: float = ASK_TIMEOUT_S
    ) -> None:
        """Report the end of a workflow; sent again until the daemon has acknowledged it.

        Raises `RequestTimeout` (checked once per heartbeat).
        """
        self._check_open()
        await self._lane_of(workflow_id).close_workflow(workflow_id, success, timeout_s)

    def close_workflow_soon(self, workflow_id: str, success: float | None = None) -> None:
        """As `close_workflow`, without waiting and without an error."""
        if not self._closed:
            self._lane_of(workflow_id).close_workflow_soon(workflow_id, success, ASK_TIMEOUT_S)

    def feedback(self, workflow_id: str, stage: int, verdict: float) -> None:
        """Say whether a stage's answer was right, as `Workflow.feedback`, without any waiting."""
        if not self._closed:
            self._lane_of(workflow_id).send_feedback(Feedback(workflow_id, stage, verdict))

    async def close(self) -> None:
        """Cancel what is pending (it fails with `ClientClosed`) and disconnect. Idempotent."""
        self.shut()

    def shut(self) -> None:
        """As `close`, for callers that cannot await."""
        if self._closed:
            return
        self._closed = True
        self._ready.cancel()
        for lane in self._lanes:
            lane.shut(lambda: ClientClosed("the client was closed"))

    # Requests.

    def _new_request_id(self) -> str:
        self._requests += 1
        return f"r{self._requests}"

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed")

    def _lane_of(self, workflow_id: str) -> Lane:
        lanes = self._lanes
        return lanes[0] if len(lanes) == 1 else lanes[worker_of(workflow_id, len(lanes))]

    def _launch(
        self, form: type[Request], header: Submit, payload: bytes, timeout_s: float | None
    ) -> Request:
        """Send it; refuses what cannot succeed before it costs anything."""
        self._check_open()
        lane = self._lane_of(header.workflow_id)
        lane.check()
        if self.pending >= self._max_pending:
            raise Overloaded(f"{self.pending} requests are pending in this client already")
        if header.max_tokens < 1:
            raise BadRequest(f"max_tokens must be at least 1, not {header.max_tokens}")
        if len(payload) > self._max_payload_bytes > 0:
            raise TooLarge(
                f"the payload has {len(payload)} bytes; "
                f"the daemon takes at most {self._max_payload_bytes}"
            )
        encoded = encode(header)
        if len(encoded) > MAX_HEADER_BYTES:
            raise BadRequest(
                f"hints or tries are too long: the header is over {MAX_HEADER_BYTES} bytes"
            )
        request = form(lane, header, (encoded, payload))
        if timeout_s is not None:
            request.timer = self.loop.call_later(timeout_s, request.expire, timeout_s)
        lane.launch(request)
        return request

    # What the lanes say.

    def on_lane_up(self, lane: Lane, pong: Pong) -> None:
        """Called by a lane."""
        self._max_payload_bytes = pong.max_payload_bytes
        if lane.worker == 0 and pong.workers != len(self._lanes):
            self._resize(pong.workers)
        if not self._ready.done() and all(lane.answered for lane in self._lanes):
            self._ready.set_result(None)

    def on_refused(self, error: ChimeraError) -> None:
        """Called by a lane."""
        if not self._ready.done():
            self._ready.set_exception(error)

    def _resize(self, workers: int) -> None:
        """Worker 0 came up with another number of workers: open, move, and close lanes."""
        before = self._lanes
        added = [self._open(worker) for worker in range(len(before), workers)]
        self._lanes = [*before[:workers], *added]
        for lane in before:
            lane.move(self._lane_of)
        for lane in before[workers:]:
            lane.shut(lambda: DaemonUnreachable("the daemon has fewer workers now"))


def _raw(api: Api) -> Api:
    if api == "text":
        raise BadRequest('a raw request is in one of OpenAI\'s forms: api="chat" or "completions"')
    return api


@asynccontextmanager
async def connect(
    address: str,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    give_up_s: float = GIVE_UP_S,
    max_pending: int = MAX_PENDING,
) -> AsyncGenerator[Client, None]:
    """Connect to the daemon at ``tcp://HOST:PORT`` or ``ipc:///PATH``; see `Client`.

    Of a daemon with several workers this is the address of worker 0. Waits up to ``timeout_s``
    seconds for the first answer of each. Raises `ValueError` for an address that cannot be used,
    `DaemonUnreachable` or `VersionMismatch`.
    """
    client = Client(address, give_up_s=give_up_s, max_pending=max_pending)
    try:
        await client.wait_ready(timeout_s)
        yield client
    finally:
        await client.close()
