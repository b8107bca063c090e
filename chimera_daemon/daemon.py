"""The daemon: sockets and timers around the core.

Turns messages into events, hands them to `Scheduler.handle`, and carries the actions out. Decides
nothing. Payloads and chunks are opaque here: the daemon reads headers only.
"""

import asyncio
import logging
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import msgspec
import zmq
from msgspec import Struct

from chimera_daemon import wire
from chimera_daemon.board import BEAT_S
from chimera_daemon.channel import Channel, Frames, Sent, Together, make_socket
from chimera_daemon.config import Config
from chimera_daemon.core import Scheduler
from chimera_daemon.durations import Durations
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Abort,
    AbortAttempt,
    Action,
    Api,
    Attach,
    AttemptFailed,
    AttemptFinished,
    AttemptStreamed,
    Cancel,
    Chunk,
    Closed,
    CloseWorkflow,
    DaemonBeat,
    Deregister,
    Dispatch,
    DrainStarted,
    EngineChunk,
    EngineDraining,
    EngineFailed,
    EngineFinished,
    EngineLost,
    EngineRegistered,
    EngineReported,
    ErrorCode,
    Event,
    Fail,
    Failure,
    Feedback,
    Forget,
    GetStatus,
    Heartbeat,
    Ping,
    Pong,
    Prediction,
    Register,
    Reject,
    Replay,
    Reply,
    Result,
    Run,
    Shutdown,
    Stage,
    StageCancelled,
    StageKey,
    StageSubmitted,
    StatusReply,
    Submit,
    ToClient,
    WakeAt,
    Woke,
    WorkflowClosed,
    WorkflowEnded,
)
from chimera_daemon.prior import Predictor, PriorPredictor
from chimera_daemon.processes import Watch, is_host, watch
from chimera_daemon.sharing import Sharing

log = logging.getLogger("chimera.daemon")

# Attempt numbers start at the seconds since this date times 2**22: a later run of the daemon starts
# above all numbers of an earlier one, and they stay below 2**53, exact in JSON, until 2094.
_EPOCH_S = 1_767_225_600  # 2026-01-01
_ATTEMPTS_PER_S = 1 << 22
# Rough size of a token until engines have reported real ones.
_BYTES_PER_TOKEN = 4.0
_NEWEST = 1.0 / 256.0
_MAX_CLIENTS = 10_000
# Between looks at what the other workers have in flight: the longest that a slot of a shared engine
# stays empty because those who wait for it have not seen it.
_SHARE_S = 0.005
_INTERNAL = "internal error of the daemon; its log says more"


class DaemonError(RuntimeError):
    """The daemon cannot start; the message says what to change."""


class _Client(Struct, eq=False):
    """A peer of the front socket."""

    identity: bytes
    seen_s: float
    requests: set[StageKey] = msgspec.field(default_factory=set[StageKey])
    outbox: deque[tuple[bytes, ...]] = msgspec.field(default_factory=deque[tuple[bytes, ...]])
    outbox_bytes: int = 0


class _Request(Struct, eq=False):
    """An accepted request with what the core need not know."""

    client: _Client
    request_id: str
    payload: bytes
    max_tokens: int
    stream: bool
    api: Api
    stage: Stage
    came_s: float  # on the clock of `time.perf_counter`
    link: "_Link | None" = None  # the engine of its last attempt
    streamed: bool = False  # text of that attempt was relayed


class _Link(Struct, eq=False):
    """A registered engine host."""

    identity: bytes
    engine_id: str
    incarnation: int
    model: str
    pid: int
    seen_s: float
    leaving: bool = False  # it said so
    watch: Watch | None = None  # of its process, if that is on this machine

    def is_of(self, message: Register | Heartbeat | Deregister) -> bool:
        """Whether the message speaks of the process that this link was made for."""
        return (message.engine_id, message.incarnation) == (self.engine_id, self.incarnation)


class EngineWatcher:
    """Hears of engines that come and go. The supervisor is one; by default nobody cares."""

    def joined(self, engine_id: str, pid: int) -> None:
        """A process with this id is ready for work."""

    def left(self, engine_id: str) -> None:
        """The engine went silent or said goodbye."""

    def snapshot(self) -> list[dict[str, Any]]:
        """One row per supervised engine, for `chimera status`."""
        return []


class Daemon:
    """Serves the two sockets of its configuration on the running loop.

    ``prior`` is given where the predictor uses it too, so that it learns once. ``worker`` is its
    number among those that share the engines, by way of the ``board``, a file.
    ``await start()`` binds, ``await drain()`` finishes what is there and ``close()`` ends it. All
    methods belong to the loop's thread.
    """

    def __init__(
        self,
        config: Config,
        predictor: Predictor | None = None,
        watcher: EngineWatcher | None = None,
        prior: PriorPredictor | None = None,
        *,
        worker: int = 0,
        board: str | None = None,
    ) -> None:
        self.daemon_id = secrets.token_hex(8)
        self._config = config
        self._worker = worker
        # Stands in where the predictor fails, so it learns alongside.
        self._prior = prior or PriorPredictor(config)
        self._predictor: Predictor = predictor or self._prior
        self._learners = (self._prior,) if predictor is None else (self._prior, predictor)
        self._watcher = watcher or EngineWatcher()
        first = max(int(time.time()) - _EPOCH_S, 1) * _ATTEMPTS_PER_S
        self._core = Scheduler(config, first_attempt=first + worker)
        self._sharing = Sharing(board, worker, self._core)
        self._started_s = self._next_beat_s = 0.0
        self._clients: dict[bytes, _Client] = {}
        self._requests: dict[StageKey, _Request] = {}
        self._predicting: dict[StageKey, _Request] = {}
        self._answers: dict[StageKey, tuple[bytes, ...]] = {}
        self._attempts: dict[int, _Request] = {}
        self._links: dict[bytes, _Link] = {}
        self._engines: dict[str, _Link] = {}
        self._events: deque[Event] = deque()
        self._feeding = False
        # What the engine said that is finishing an attempt right now; see `_reply`.
        self._finished: tuple[EngineFinished, bytes] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._share: asyncio.TimerHandle | None = None
        self._bytes_per_token = _BYTES_PER_TOKEN
        self._draining = False
        self.counters: Counter[str] = Counter()
        self.decisions = Durations()  # from submission to dispatch, of stages that need not wait

    # Start and stop.

    async def start(self) -> None:
        """Bind both sockets and serve; raises `DaemonError` if an address cannot be had."""
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[Any] = zmq.Context()
        self._together = Together()
        config, worker = self._config, self._worker
        front = wire.worker_address(config.front, worker)
        back = wire.worker_address(config.back, worker)
        self._front = self._bind(front, self._on_front, self._on_front_unsent)
        try:
            self._back = self._bind(back, self._on_back, self._on_back_unsent)
        except DaemonError:
            self._front.close()
            self._context.term()
            raise
        self._started_s = self._loop.time()
        self._next_beat_s = self._started_s + config.heartbeat_s
        self._beat = self._loop.call_at(self._next_beat_s, self._on_beat)
        if self._sharing.path:
            self._share_s = _SHARE_S if config.workers > 1 else BEAT_S
            self._on_share()
        log.info("daemon %s: clients %s, engines %s, policy %s",
                 self.daemon_id, front, back, config.policy)  # fmt: skip

    def _bind(
        self,
        address: str,
        on_frames: Callable[[list[bytes]], None],
        on_unsent: Callable[[Frames, Sent], None],
    ) -> Channel:
        hwm = self._config.send_hwm
        socket = make_socket(
            self._context, zmq.ROUTER, hwm=hwm, max_bytes=2 * self._config.max_payload_bytes + 65536
        )
        try:
            wire.check_address(address)
            if address.startswith("ipc://"):
                _refuse_live_socket(Path(address.removeprefix("ipc://")))
            socket.bind(address)
        except (zmq.ZMQError, ValueError, OSError) as error:
            socket.close()
            raise DaemonError(
                f"cannot listen on {address}: {error}; is another daemon running? stop it, "
                "or set `front` and `back` to other addresses"
            ) from error
        return Channel(socket, on_frames, on_unsent, self._together)

    async def drain(self) -> None:
        """Take nothing new, wait until all stages are answered or ``drain_s`` is over."""
        if not self._draining:
            self._draining = True
            self._feed(DrainStarted())
        end = self._loop.time() + self._config.drain_s
        while (self._predicting or not self._core.idle) and self._loop.time() < end:
            await asyncio.sleep(0.02)

    def give_up(self) -> None:
        """Answer whatever is left with a retryable error and stop it at its engines."""
        message = "the daemon stopped before this stage was done"
        for client in list(self._clients.values()):
            self._abandon(client, "draining", message)

    def close(self) -> None:
        """Close the sockets. Answers already queued get half a second to leave."""
        for timer in (self._timer, self._beat, self._share):
            if timer is not None:
                timer.cancel()
        for link in self._links.values():
            if link.watch is not None:
                link.watch.cancel()
        self._sharing.close()
        self._front.close(linger_ms=500)
        self._back.close(linger_ms=500)
        self._context.term()

    def engines_of(self, model: str | None = None) -> list[str]:
        """Names of the engines that are registered now, of one model or of all."""
        return [e.engine_id for e in self._engines.values() if model in (None, e.model)]

    # Events go in, actions come out.

    def _feed(self, event: Event) -> None:
        """Hand an event to the core and act. An event that arises meanwhile waits its turn."""
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                event = self._events.popleft()
                try:
                    actions = self._core.handle(event, self._loop.time())
                except Exception:
                    self._internal_error("event", event)
                    continue
                for action in actions:
                    try:
                        self._act(action)
                    except Exception:
                        self._internal_error("action", action)
        finally:
            self._feeding = False

    def _internal_error(self, what: str, of: object) -> None:
        """A programming error of ours, inside an `except`: one stage may be hurt, not the rest."""
        self.counters["internal_errors"] += 1
        log.exception("internal error at %s %s", what, type(of).__name__)
        if isinstance(of, StageSubmitted):
            key = of.stage.key
            client = self._clients.get(key[0])
            self._drop(key)
            if client is not None:
                self._refuse(client, key[1], "engine_error", _INTERNAL)

    def _act(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case Reply():
                self._reply(action)
            case Forget():
                self._answers.pop(action.key, None)
            case WakeAt():
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_at(action.at, self._wake)
            case WorkflowEnded():
                for predictor in self._learners:
                    predictor.observe_workflow(action)
            case AbortAttempt():
                self._attempts.pop(action.attempt_id, None)
                link = self._engines.get(action.engine_id)
                if link is not None:
                    self._to_engine(link.identity, Abort(action.attempt_id))
            case Fail():
                self._fail(action)
            case Reject():
                self._reject(action)
            case Attach():
                pass  # one answer will go to the client, whichever connection it has by then
            case Replay():
                self._replay(action.key)
            case _:
                assert_never(action)

    def _wake(self) -> None:
        self._timer = None
        self._feed(Woke())

    # Clients.

    def _on_front(self, frames: list[bytes]) -> None:
        identity, header = frames[0], frames[1] if len(frames) > 1 else b""
        client = self._clients.get(identity)
        if client is None:
            client = self._new_client(identity)
            if client is None:
                return
        client.seen_s = self._loop.time()
        if len(header) > wire.MAX_HEADER_BYTES:
            self.counters["unreadable_from_clients"] += 1
            message = f"a header of {len(header)} bytes; the limit is {wire.MAX_HEADER_BYTES}"
            self._refuse(client, "", "too_large", message)
            return
        try:
            message = wire.decode_front(header)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self.counters["unreadable_from_clients"] += 1
            self._refuse(client, wire.request_id_of(header), "bad_request", str(error))
            return
        try:
            match message:
                case Submit():
                    self._submit(client, message, header, frames)
                case CloseWorkflow():
                    for request in list(self._predicting.values()):
                        if request.stage.workflow_id == message.workflow_id:
                            self._unpredicted(request, "cancelled", "its workflow was closed")
                    self._feed(WorkflowClosed(message.workflow_id, message.success))
                    self._to_client(client, Closed(message.workflow_id))
                case Feedback():
                    for predictor in self._learners:
                        predictor.observe_feedback(
                            message.workflow_id, message.stage, message.verdict
                        )
                case Cancel():
                    key = (identity, message.request_id)
                    request = self._predicting.get(key)
                    if request is not None:
                        self._unpredicted(request, "cancelled", "cancelled by the client")
                    self._feed(StageCancelled(key))
                case Ping():
                    self._ping(client, message)
                case GetStatus():
                    status = msgspec.json.encode(self.status())
                    self._to_client(client, StatusReply(message.request_id), status)
                case _:
                    assert_never(message)
        except Exception:
            self._internal_error("message", message)
            if isinstance(message, Submit) and message.request_id:
                self._predicting.pop((identity, message.request_id), None)
                self._refuse(client, message.request_id, "engine_error", _INTERNAL)

    def _new_client(self, identity: bytes) -> _Client | None:
        if len(self._clients) >= _MAX_CLIENTS:
            self.counters["clients_refused"] += 1
            failure = Failure("", "overloaded", f"{_MAX_CLIENTS} clients already", True, 5.0)
            self._front.post((identity, wire.encode(failure)))
            return None
        client = _Client(identity, self._loop.time())
        self._clients[identity] = client
        return client

    def _ping(self, client: _Client, ping: Ping) -> None:
        if ping.v != PROTOCOL_VERSION:
            message = f"this daemon speaks version {PROTOCOL_VERSION} of the protocol, not {ping.v}"
            self._refuse(client, "", "version", message)
            return
        config = self._config
        self._front.batches(ping.batches, client.identity)
        pong = Pong(
            self.daemon_id,
            config.heartbeat_s,
            config.max_payload_bytes,
            worker=self._worker,
            workers=config.workers,
            board=self._sharing.path,
            batches=True,
        )
        self._to_client(client, pong)

    def _submit(self, client: _Client, submit: Submit, header: bytes, frames: list[bytes]) -> None:
        came_s = time.perf_counter()
        if len(frames) != 3:
            message = f"a submit has 2 frames (header and payload), not {len(frames) - 1}"
            self._refuse(client, submit.request_id, "bad_request", message)
            return
        payload = frames[2]
        if len(payload) > self._config.max_payload_bytes:
            message = f"{len(payload)} bytes; the limit is {self._config.max_payload_bytes}"
            self._refuse(client, submit.request_id, "too_large", message)
            return
        prompt_tokens = submit.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = int(len(payload) / self._bytes_per_token) + 1
        stage = Stage(
            client.identity,
            submit.request_id,
            submit.workflow_id,
            submit.stage,
            submit.kind or "",
            submit.model,
            prompt_tokens,
            submit.max_tokens,
            len(payload),
            hash((header, payload)),
            submit.stream,
            submit.restart,
            submit.hints,
            submit.tries,
            submit.optional,
            submit.last,
        )
        request = _Request(
            client,
            submit.request_id,
            payload,
            submit.max_tokens,
            submit.stream,
            submit.api,
            stage,
            came_s,
        )
        key = stage.key
        first = self._predicting.get(key)
        if first is None:
            if len(self._predicting) >= self._config.max_queued_stages:
                message = f"{len(self._predicting)} stages wait for a prediction already"
                self._refuse(client, submit.request_id, "overloaded", message, 1.0)
                return
            self._predicting[key] = request
            self._predict(stage, payload)
        elif first.stage.digest != stage.digest:
            message = f"request id {submit.request_id!r} was used before with another body"
            self._refuse(client, submit.request_id, "conflict", message)

    def _predict(self, stage: Stage, payload: bytes) -> None:
        """Ask the predictor; where it fails, the prior has to do, and the receipt says so."""
        try:
            self._predictor.predict(stage, payload, self._predicted)
        except Exception:
            self.counters["predictor_errors"] += 1
            log.exception("the predictor failed; the prior stands in")
            self._prior.predict(stage, payload, self._predicted_instead)

    def _predicted_instead(self, stage: Stage, prediction: Prediction) -> None:
        self._predicted(stage, msgspec.structs.replace(prediction, source="fallback"))

    def _unpredicted(
        self, request: _Request, code: ErrorCode, message: str, retryable: bool = False
    ) -> None:
        """Answer a request that the core has not seen yet, unless it repeats one that it has."""
        key = request.stage.key
        del self._predicting[key]
        self._predictor.cancel(request.stage)
        self._forget_refused(request.stage)
        if key not in self._requests:
            failure = Failure(request.request_id, code, message, retryable)
            self._to_client(request.client, failure)

    def _predicted(self, stage: Stage, prediction: Prediction) -> None:
        """The predictor is done; unless the client has cancelled meanwhile, the core takes over."""
        key = stage.key
        request = self._predicting.pop(key, None)
        if request is None:
            return
        if key not in self._requests and key not in self._answers:
            self._requests[key] = request
            request.client.requests.add(key)
        self._feed(StageSubmitted(stage, prediction))

    def _reject(self, action: Reject) -> None:
        request = self._requests.get(action.key)
        client = self._clients.get(action.key[0])
        if action.code != "conflict" and request is not None:
            self._drop(action.key)
            self._forget_refused(request.stage)
        if client is not None:
            self._refuse(client, action.key[1], action.code, action.message, action.retry_after_s)

    def _forget_refused(self, stage: Stage) -> None:
        """Predictors have seen this stage; of a workflow that never began nothing shall stay."""
        if not self._core.has_workflow(stage.workflow_id):
            for predictor in self._learners:
                predictor.observe_workflow(WorkflowEnded(stage.workflow_id, stage.kind, None, ()))

    def _drop(self, key: StageKey) -> None:
        request = self._requests.pop(key, None)
        if request is not None:
            request.client.requests.discard(key)

    def _refuse(
        self,
        client: _Client,
        request_id: str,
        code: ErrorCode,
        message: str,
        retry_after_s: float | None = None,
    ) -> None:
        retryable = retry_after_s is not None
        self._to_client(client, Failure(request_id, code, message, retryable, retry_after_s))

    def _answer(self, key: StageKey, frames: tuple[bytes, ...]) -> None:
        """Send the one answer of a request; it is kept until the core says `Forget`."""
        self._answers[key] = frames
        request = self._requests.pop(key)
        request.client.requests.discard(key)
        self._deliver(request.client, frames)

    def _fail(self, action: Fail) -> None:
        request_id = action.key[1]
        failure = Failure(
            request_id, action.code, action.message, action.retryable, action.retry_after_s
        )
        self._answer(action.key, (wire.encode(failure),))

    def _replay(self, key: StageKey) -> None:
        client, frames = self._clients.get(key[0]), self._answers.get(key)
        if client is not None and frames is not None:
            self._deliver(client, frames)

    def _to_client(self, client: _Client, message: ToClient, *payload: bytes) -> None:
        self._deliver(client, (wire.encode(message), *payload))

    def _deliver(self, client: _Client, frames: tuple[bytes, ...]) -> None:
        """Send in order: what waits goes first."""
        if client.outbox:
            self._keep(client, frames)
        else:
            self._front.post((client.identity, *frames))

    def _on_front_unsent(self, frames: Frames, why: Sent) -> None:
        """A client that is gone asks again when it is back; the answers wait for it."""
        client = self._clients.get(frames[0])
        if client is not None and why is Sent.FULL:
            self._keep(client, tuple(frames[1:]))

    def _keep(self, client: _Client, frames: tuple[bytes, ...]) -> None:
        """For a client that does not read; it is cut when its outbox is full, too."""
        client.outbox.append(frames)
        client.outbox_bytes += sum(map(len, frames))
        config = self._config
        if len(client.outbox) > config.send_hwm or client.outbox_bytes > config.reply_keep_bytes:
            self.counters["slow_clients_cut"] += 1
            client.outbox.clear()
            client.outbox_bytes = 0
            self._abandon(client, "slow_reader", "the client does not read its answers")

    def _abandon(self, client: _Client, code: ErrorCode, message: str) -> None:
        """End all that this client waits for. It did not ask for that, so it may try again."""
        for request in [r for r in self._predicting.values() if r.client is client]:
            self._unpredicted(request, code, message, retryable=True)
        for key in list(client.requests):
            self._feed(StageCancelled(key, code, message, retryable=True))

    # Engines.

    def _on_back(self, frames: list[bytes]) -> None:
        identity = frames[0]
        try:
            message = wire.decode_back(frames[1] if len(frames) > 1 else b"")
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self.counters["unreadable_from_engines"] += 1
            log.warning("engine host %r sent an unreadable message: %s", identity[:64], error)
            return
        link = self._links.get(identity)
        if link is not None:
            link.seen_s = self._loop.time()
        try:
            match message:
                case EngineChunk():
                    self._chunk(message, frames)
                case EngineFinished():
                    self._finish(message, frames)
                case EngineFailed():
                    if self._ends(message.attempt_id, identity):
                        self._feed(
                            AttemptFailed(
                                message.attempt_id,
                                message.code,
                                message.message,
                                message.retryable,
                                message.retry_after_s,
                            )
                        )
                case Heartbeat():
                    self._heartbeat(identity, link, message)
                case Register():
                    self._register(identity, message)
                case Deregister():
                    if link is not None and link.is_of(message):
                        link.leaving = True
                        self._feed(EngineDraining(message.engine_id, message.incarnation))
                case _:
                    assert_never(message)
        except Exception:
            self._internal_error("message", message)

    def _chunk(self, chunk: EngineChunk, frames: list[bytes]) -> None:
        request = self._attempts.get(chunk.attempt_id)
        if request is None or request.link is None or request.link.identity != frames[0]:
            self.counters["late_chunks"] += 1
            return
        if len(frames) != 3:
            return
        if not request.streamed:
            request.streamed = True
            self._feed(AttemptStreamed(chunk.attempt_id))
        client = request.client
        header = wire.encode(Chunk(request.request_id, chunk.attempt_id, chunk.offset))
        if request.api != "text":
            self._deliver(client, (header, frames[2]))
        elif client.outbox:
            self.counters["chunks_dropped"] += 1  # the answer has the whole text
        else:
            self._front.post((client.identity, header, frames[2]), droppable=True)

    def _ends(self, attempt_id: int, identity: bytes) -> bool:
        """Whether this answer is of an attempt that its sender runs; if so it is the last."""
        request = self._attempts.get(attempt_id)
        if request is None or request.link is None or request.link.identity != identity:
            self.counters["late_answers"] += 1
            return False
        del self._attempts[attempt_id]
        return True

    def _finish(self, message: EngineFinished, frames: list[bytes]) -> None:
        if not self._ends(message.attempt_id, frames[0]):
            return
        payload = frames[2] if len(frames) == 3 else b""
        self._finished = (message, payload)
        self._feed(AttemptFinished(message.attempt_id, message.usage, len(payload)))
        self._finished = None

    def _reply(self, action: Reply) -> None:
        """An attempt is finished and its answer wanted: it is the one `_finish` is handing in."""
        assert self._finished is not None
        message, payload = self._finished
        stage = self._requests[action.key].stage
        usage, model = message.usage, action.receipt.model
        if stage.payload_bytes and usage.prompt_tokens:
            size = stage.payload_bytes / usage.prompt_tokens
            self._bytes_per_token += _NEWEST * (size - self._bytes_per_token)
        result = Result(
            action.key[1],
            model,
            action.engine_id,
            usage,
            message.finish_reason,
            action.receipt,
            message.logprob,
        )
        self._answer(action.key, (wire.encode(result), payload))
        for predictor in self._learners:
            predictor.observe_stage(stage, model, usage, message.logprob)

    def _dispatch(self, action: Dispatch) -> None:
        request = self._requests[action.key]
        request.streamed = False
        self._attempts[action.attempt_id] = request
        link = request.link = self._engines[action.engine_id]
        run = Run(
            action.attempt_id,
            action.priority,
            request.max_tokens,
            request.stream,
            self._predictor.wants_logprobs,
            request.api,
        )
        self._back.post((link.identity, wire.encode(run), request.payload))
        if action.receipt.queue_s == 0.0:
            self.decisions.add(time.perf_counter() - request.came_s)

    def _to_engine(self, identity: bytes, message: Abort | DaemonBeat | Shutdown) -> None:
        self._back.post((identity, wire.encode(message)))

    def _on_back_unsent(self, frames: Frames, why: Sent) -> None:
        link = self._links.get(frames[0])
        if link is not None and len(frames) == 3:  # a run: nobody would ever answer it
            self._unlink(link, "its connection takes no more messages")

    def _register(self, identity: bytes, message: Register) -> None:
        if message.v != PROTOCOL_VERSION:
            reason = f"this daemon speaks version {PROTOCOL_VERSION} of the protocol"
            self._to_engine(identity, Shutdown(reason))
            return
        engine_id = message.engine_id
        link = self._links.get(identity)
        if link is not None and not link.is_of(message):
            self._unlink(link, "its host registered as another engine")
        old = self._engines.get(engine_id)
        if old is not None and old.identity != identity:
            self._to_engine(old.identity, Shutdown("another process took its name"))
            self._unlink(old, "another process took its name")
        if engine_id not in self._engines and len(self._engines) >= self._config.max_engines:
            reason = f"the daemon has {self._config.max_engines} engines already (`max_engines`)"
            self._to_engine(identity, Shutdown(reason))
            return
        joins = identity not in self._links
        if joins:
            link = _Link(
                identity,
                engine_id,
                message.incarnation,
                message.model,
                message.pid,
                self._loop.time(),
            )
            self._links[identity] = self._engines[engine_id] = link
            self._back.batches(message.batches, identity)
            if is_host(message.pid):
                reason = f"its process {message.pid} has ended"
                link.watch = watch(self._loop, message.pid, partial(self._unlink, link, reason))
            log.info(
                "engine %s joined: model %s, %d slots, pid %d",
                engine_id,
                message.model,
                message.max_inflight,
                message.pid,
            )
        self._answer_engine(identity, known=True)
        for predictor in self._learners:
            predictor.add_model(message.model)
        self._feed(
            EngineRegistered(
                engine_id,
                message.incarnation,
                message.model,
                message.max_inflight,
                message.context_tokens,
                message.profile,
            )
        )
        if joins:
            self._watcher.joined(engine_id, message.pid)

    def _heartbeat(self, identity: bytes, link: _Link | None, message: Heartbeat) -> None:
        known = link is not None and link.is_of(message)
        if known:
            self._feed(
                EngineReported(
                    message.engine_id, message.incarnation, message.stats, message.progress
                )
            )
        self._answer_engine(identity, known=known)

    def _answer_engine(self, identity: bytes, *, known: bool) -> None:
        config = self._config
        beat = DaemonBeat(
            self.daemon_id,
            known,
            config.heartbeat_s,
            worker=self._worker,
            workers=config.workers,
            board=self._sharing.path,
            batches=True,
        )
        self._to_engine(identity, beat)

    def _unlink(self, link: _Link, reason: str) -> None:
        """An engine is gone: its attempts go elsewhere."""
        if self._links.pop(link.identity, None) is None:
            return
        self._back.batches(False, link.identity)
        if link.watch is not None:
            link.watch.cancel()
        del self._engines[link.engine_id]
        lost = [a for a, request in self._attempts.items() if request.link is link]
        for attempt_id in lost:
            del self._attempts[attempt_id]
        if link.leaving and not lost:
            log.info("engine %s left: %s", link.engine_id, reason)
        else:
            log.warning("engine %s lost: %s", link.engine_id, reason)
        self._watcher.left(link.engine_id)
        self._feed(EngineLost(link.engine_id, link.incarnation, reason))

    # Time.

    def _on_beat(self) -> None:
        """Once per heartbeat: who has gone silent, and what waits to be sent."""
        config, now = self._config, self._loop.time()
        # Time in which this process stood still (stopped, starved) is nobody else's silence: what
        # they sent meanwhile has not been read yet.
        late_s = now - self._next_beat_s
        if late_s > config.heartbeat_s:
            for peer in (*self._links.values(), *self._clients.values()):
                peer.seen_s += late_s
        self._next_beat_s = now + config.heartbeat_s
        self._beat = self._loop.call_at(self._next_beat_s, self._on_beat)
        for link in list(self._links.values()):
            if now - link.seen_s > config.engine_timeout_s:
                self._unlink(link, f"no heartbeat for {now - link.seen_s:.1f} s")
        for client in list(self._clients.values()):
            if now - client.seen_s > config.client_timeout_s:
                self._abandon(client, "cancelled", "the client has gone silent")
                del self._clients[client.identity]
                self._front.batches(False, client.identity)
            else:
                self._flush(client)

    def _on_share(self) -> None:
        """Tell the other workers, and those who look, what is in flight; hear what they have."""
        self._share = self._loop.call_later(self._share_s, self._on_share)
        self._sharing.write()
        if self._config.workers > 1:
            peers = self._sharing.read()
            if peers is not None:
                self._feed(peers)

    def _flush(self, client: _Client) -> None:
        while client.outbox:
            if self._front.try_send((client.identity, *client.outbox[0])) is Sent.FULL:
                return
            client.outbox_bytes -= sum(map(len, client.outbox.popleft()))

    @property
    def chunks_dropped(self) -> int:
        """Of streams of text whose clients did not read them."""
        return self.counters["chunks_dropped"] + self._front.dropped

    def status(self) -> dict[str, Any]:
        """What `chimera status` shows, as plain values."""
        return {
            "daemon_id": self.daemon_id,
            "worker": self._worker,
            "uptime_s": self._loop.time() - self._started_s,
            "clients": len(self._clients),
            "answers_kept": len(self._answers),
            "connections": dict(self.counters) | {"chunks_dropped": self.chunks_dropped},
            "decisions": self.decisions.snapshot(),
            "supervised": self._watcher.snapshot(),
            "predictor": self._predictor.snapshot(),
            "core": self._core.snapshot(),
            "board": self._sharing.snapshot(),
        }


def _refuse_live_socket(path: Path) -> None:
    """ZeroMQ would silently take a live socket file over from another daemon."""

    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return  # left over from a daemon that is gone
    raise OSError(f"{path} is in use")
