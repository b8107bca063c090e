"""Every typed message of Chimera: the nouns, what crosses the wire, what the core takes and gives.

Owns field names, units and bounds. Knows nothing of sockets, engines or policies, and imports only
msgspec, so that an agent framework which installs the client pays for nothing else. Wire messages
are msgpack maps tagged by ``type``; `docs/protocol.md` describes them for other languages.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

PROTOCOL_VERSION = 1

# A request id is unique per client: together they are the idempotency key of a stage.
StageKey = tuple[bytes, str]

Id = Annotated[str, Meta(min_length=1, max_length=128)]
Label = Annotated[str, Meta(max_length=64)]
Tokens = Annotated[int, Meta(ge=0, le=10_000_000)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
# Mean natural log-probability of the tokens of an answer, as the model that wrote it saw them.
LogProbability = Annotated[float, Meta(ge=-1e6, le=0.0)]
StageNumber = Annotated[int, Meta(ge=0, le=100_000)]

# The form of a payload and its answer: our own for text, or one of OpenAI's, passed on as it is.
Api = Literal["text", "chat", "completions"]

# As `max_tokens`: as many as fit into the context of the engine.
NO_LIMIT = 1_000_000

# Quantile levels of every length prediction, lowest first; index 1 is the median.
LEVELS = (0.1, 0.5, 0.9)

ErrorCode = Literal[
    "bad_request",  # the message or the payload cannot be used as it is
    "version",  # another protocol version
    "too_large",  # payload over `max_payload_bytes`
    "unknown_model",  # no engine serves it and none is configured to
    "conflict",  # request id seen before with another body
    "overloaded",  # a bound of the daemon is reached
    "draining",  # the daemon is stopping
    "workflow_closed",  # a stage of a workflow that has ended
    "cancelled",  # by the client, or because its workflow was closed
    "engine_lost",  # the engine went away and the stage may not be restarted
    "engine_error",  # the engine failed on this stage
    "slow_reader",  # the client did not read its stream in time
    "no_engine",  # a stage waited too long without any engine for it
    "declined",  # an optional stage that is not worth its cost on any model
]


class Hints(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the client itself knows; each field given replaces the predictor's value."""

    output_tokens: Tokens | None = None  # of this stage
    remaining_tokens: Tokens | None = None  # of this and all later stages
    remaining_stages: Annotated[int, Meta(ge=0, le=10_000)] | None = None  # after this one
    confidence: dict[str, Probability] | None = None  # per model


class Tries(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of a task that its client may do again after a failure; each try is a workflow of its own."""

    failed: Annotated[tuple[Id, ...], Meta(max_length=64)] = ()  # models of earlier tries
    left: Annotated[int, Meta(ge=0, le=100)] = 0  # tries that may still follow this one


class Usage(Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens that an engine really read and wrote."""

    prompt_tokens: Tokens
    output_tokens: Tokens


class Profile(Struct, frozen=True, forbid_unknown_fields=True):
    """Cost model of an engine: a decode step of n sequences takes step_s + step_per_seq_s * n."""

    step_s: Seconds = 0.003
    step_per_seq_s: Seconds = 0.0001
    prefill_s_per_token: Seconds = 0.00001

    def step(self, sequences: float) -> float:
        """Seconds of one decode step with this many sequences in the batch."""
        return self.step_s + self.step_per_seq_s * sequences


class EngineStats(Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine says about itself in a heartbeat."""

    running: Count = 0
    waiting: Count = 0
    kv_use: Probability = 0.0
    tokens_per_s: Annotated[float, Meta(ge=0.0, le=1e12)] = 0.0
    output_tokens: Count = 0  # since the engine started


class ModelPrediction(Struct, frozen=True, gc=False):
    """One model's part of a prediction. Token quantiles are at `LEVELS`."""

    confidence: float
    stage_tokens_mean: float
    stage_tokens: tuple[float, float, float]
    remaining_tokens_mean: float  # this stage included
    remaining_tokens: tuple[float, float, float]
    remaining_stages: float  # stages still to come after this one


class Prediction(Struct, frozen=True):
    """Per model; ``source`` says who made it, so that a fall-back is never silent.

    ``other`` stands for models that are not named, such as one that joins while the stage waits.
    """

    models: dict[str, ModelPrediction]
    other: ModelPrediction
    source: Literal["prior", "learned", "fallback"] = "prior"

    def of(self, model: str) -> ModelPrediction:
        """The prediction for this model."""
        return self.models.get(model, self.other)


class Candidate(Struct, frozen=True, gc=False):
    """How one model looked when a stage was placed. Higher score wins."""

    model: str
    score: float
    confidence: float
    finish_s: float  # expected seconds until the rest of the workflow is done there
    waiting_tokens: float  # predicted tokens in flight there at that moment


class Receipt(Struct, gc=False):
    """Why a stage went where it went. What really happened is filled in when it has finished."""

    policy: str
    source: str
    model: str
    reason: str
    candidates: tuple[Candidate, ...]
    predicted_tokens_p50: float = 0.0
    actual_tokens: int | None = None
    queue_s: float | None = None
    service_s: float | None = None
    attempts: int = 0


# Wire: client -> daemon (front socket).


class FrontMessage(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """Base of what a client sends."""


class Ping(FrontMessage, frozen=True, tag="ping"):
    """Heartbeat, and the first message of a connection; answered by `Pong`."""

    v: int  # required, so that it is always sent
    batches: bool = False  # the sender can read them


class Submit(FrontMessage, frozen=True, tag="submit"):
    """One stage. Frame 2 is the payload: an OpenAI body as JSON, opaque to the daemon."""

    request_id: Id
    workflow_id: Id
    stage: StageNumber = 0
    kind: Label | None = None
    model: Id | None = None  # pinned; None lets the policy choose
    max_tokens: Annotated[int, Meta(ge=1, le=NO_LIMIT)] = 256
    prompt_tokens: Tokens | None = None  # None: estimated from the payload's size
    stream: bool = False
    restart: bool = False  # a stream that lost its engine may start again from nothing
    hints: Hints | None = None
    tries: Tries | None = None
    optional: bool = False  # decline it rather than run what is not worth its cost
    api: Api = "text"  # form of payload and answer
    last: bool = False  # the workflow ends, without an outcome, with the answer of this stage


class Cancel(FrontMessage, frozen=True, tag="cancel"):
    """Give up one request; legal in every state, also for ids never seen."""

    request_id: Id


class CloseWorkflow(FrontMessage, frozen=True, tag="close"):
    """The workflow has ended, with its outcome if known; answered by `Closed`."""

    workflow_id: Id
    success: Probability | None = None


class Feedback(FrontMessage, frozen=True, tag="feedback"):
    """Was this stage's answer right? For the predictor; never answered, legal for any stage."""

    workflow_id: Id
    stage: StageNumber
    verdict: Probability


class GetStatus(FrontMessage, frozen=True, tag="status"):
    """Ask for a snapshot of the daemon; answered by `StatusReply` with a JSON payload frame."""

    request_id: Id


ToFront = Ping | Submit | Cancel | CloseWorkflow | Feedback | GetStatus


# Wire: daemon -> client.


class Pong(Struct, frozen=True, tag="pong"):
    """``daemon_id`` changes when the daemon restarts: its memory of requests is gone then.

    Of a daemon with several workers each has an address (`wire.worker_address`) and an id.
    """

    daemon_id: str
    heartbeat_s: float
    max_payload_bytes: int
    v: int = PROTOCOL_VERSION
    worker: int = 0
    workers: int = 1
    board: str = ""  # path of the congestion board, for processes of the same machine
    batches: bool = False  # as in `Ping`


class Chunk(Struct, frozen=True, tag="chunk"):
    """Frame 2 is a `Delta` as JSON, ``offset`` the characters sent before this chunk.

    In OpenAI's forms frame 2 is one chunk object of a stream, ``offset`` the chunks before it.
    """

    request_id: str
    attempt_id: int
    offset: int


class Result(Struct, frozen=True, tag="result"):
    """The one answer of a request. Frame 2 is a `Completion` as JSON.

    In OpenAI's forms it is the response object, or after a stream `Streamed`.
    """

    request_id: str
    model: str
    engine: str
    usage: Usage
    finish_reason: str
    receipt: Receipt
    logprob: float | None = None


class Failure(Struct, frozen=True, omit_defaults=True, tag="failure"):
    """The one answer of a request that failed; no ``request_id``: an unreadable message."""

    request_id: str
    code: ErrorCode
    message: str
    retryable: bool = False
    retry_after_s: float | None = None


class Closed(Struct, frozen=True, tag="closed"):
    """A workflow is closed (also when it was unknown or closed before)."""

    workflow_id: str


class StatusReply(Struct, frozen=True, tag="status"):
    """Frame 2 is the snapshot as JSON."""

    request_id: str


ToClient = Chunk | Result | Failure | Pong | Closed | StatusReply


# Wire: engine host -> daemon (back socket).


class BackMessage(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of what an engine host sends."""


class Register(BackMessage, frozen=True, tag="register"):
    """An engine is ready. ``incarnation`` is new for every process that bears its engine id."""

    engine_id: Id
    incarnation: Count
    model: Id
    kind: Label  # vllm, echo, ...
    max_inflight: Annotated[int, Meta(ge=1, le=100_000)]
    context_tokens: Tokens
    profile: Profile
    v: int
    pid: Count = 0
    batches: bool = False  # as in `Ping`


class Heartbeat(BackMessage, frozen=True, tag="heartbeat"):
    """``progress`` maps running attempts to the output tokens they have produced so far."""

    engine_id: Id
    incarnation: Count
    stats: EngineStats
    progress: dict[int, Tokens] = field(default_factory=dict[int, int])


class EngineChunk(BackMessage, frozen=True, tag="chunk"):
    """Frame 2 is a `Delta` as JSON, relayed to the client untouched."""

    attempt_id: Count
    offset: Count


class EngineFinished(BackMessage, frozen=True, tag="finished"):
    """Frame 2 is a `Completion` as JSON, relayed to the client untouched."""

    attempt_id: Count
    usage: Usage
    finish_reason: Label
    logprob: LogProbability | None = None  # None: the engine does not say


class EngineFailed(BackMessage, frozen=True, tag="failed"):
    """An attempt ended without an answer; ``retryable`` if another engine might do better.

    ``retry_after_s``: the engine wants no attempts for so long.
    """

    attempt_id: Count
    code: ErrorCode
    message: Annotated[str, Meta(max_length=4096)]
    retryable: bool = False
    retry_after_s: Seconds | None = None


class Deregister(BackMessage, frozen=True, tag="deregister"):
    """The engine takes no new work and leaves when its running attempts are done."""

    engine_id: Id
    incarnation: Count


FromEngine = EngineChunk | EngineFinished | EngineFailed | Heartbeat | Register | Deregister


# Wire: daemon -> engine host.


class Run(Struct, frozen=True, omit_defaults=True, tag="run"):
    """Start an attempt. Frame 2 is the client's payload. Lower ``priority`` runs first."""

    attempt_id: int
    priority: int
    max_tokens: int
    stream: bool
    logprobs: bool = False  # wanted with the answer, if they can be had
    api: Api = "text"


class Abort(Struct, frozen=True, tag="abort"):
    """Stop an attempt; no answer is expected, a late one is dropped."""

    attempt_id: int


class DaemonBeat(Struct, frozen=True, tag="beat"):
    """Sent on every `Register` and `Heartbeat`. Not ``known`` asks the host to register (again)."""

    daemon_id: str
    known: bool
    heartbeat_s: float
    v: int = PROTOCOL_VERSION
    worker: int = 0
    workers: int = 1
    board: str = ""  # as in `Pong`
    batches: bool = False  # as in `Ping`


class Shutdown(Struct, frozen=True, tag="shutdown"):
    """The host must stop: the daemon stops it, or another incarnation took its name."""

    reason: str


ToEngine = Run | Abort | DaemonBeat | Shutdown


# Payloads: decoded by clients and engine hosts only.


class Delta(Struct, frozen=True):
    """Payload of a chunk: text since the chunk before."""

    text: str


class Completion(Struct, frozen=True):
    """Payload of an answer: the whole text, also after chunks."""

    text: str


class Streamed(Struct, frozen=True):
    """Payload of the answer to a stream in one of OpenAI's forms, whose text was in its chunks."""

    chunks: int  # how many there were: tells whether any is missing


# Core: events (past tense).


class Stage(Struct, frozen=True):
    """One LLM call of a workflow, as the core sees it."""

    client_id: bytes
    request_id: str
    workflow_id: str
    stage: int
    kind: str
    model: str | None
    prompt_tokens: int
    max_tokens: int
    payload_bytes: int
    digest: int  # of header and payload: tells a repeated request from a conflicting one
    stream: bool = False
    restart: bool = False
    hints: Hints | None = None
    tries: Tries | None = None
    optional: bool = False
    last: bool = False

    @property
    def key(self) -> StageKey:
        """Idempotency key."""
        return (self.client_id, self.request_id)


class StageSubmitted(Struct, frozen=True):
    """A client asked for a stage; the prediction was made before."""

    stage: Stage
    prediction: Prediction


class StageCancelled(Struct, frozen=True):
    """The client gave up, or is gone. ``code`` and ``message`` go into its `Fail`."""

    key: StageKey
    code: ErrorCode = "cancelled"
    message: str = "cancelled by the client"
    retryable: bool = False


class WorkflowClosed(Struct, frozen=True):
    """The client reported the end of a workflow."""

    workflow_id: str
    success: float | None


class AttemptStreamed(Struct, frozen=True):
    """The first text of an attempt was relayed: from here on a restart would be visible."""

    attempt_id: int


class AttemptFinished(Struct, frozen=True):
    """An engine answered; the answer is kept for a while and counts with its size."""

    attempt_id: int
    usage: Usage
    answer_bytes: int = 0


class AttemptFailed(Struct, frozen=True):
    """An engine could not answer; it wants no attempts for ``retry_after_s``."""

    attempt_id: int
    code: ErrorCode
    message: str
    retryable: bool
    retry_after_s: float | None = None


class EngineRegistered(Struct, frozen=True):
    """An engine joined, or said again that it is here."""

    engine_id: str
    incarnation: int
    model: str
    max_inflight: int
    context_tokens: int
    profile: Profile


class EngineReported(Struct, frozen=True):
    """A heartbeat with statistics and token counts per running attempt."""

    engine_id: str
    incarnation: int
    stats: EngineStats
    progress: dict[int, int]


class EngineDraining(Struct, frozen=True):
    """An engine takes no more work."""

    engine_id: str
    incarnation: int


class EngineLost(Struct, frozen=True):
    """An engine is gone: process ended, heartbeats missing, or connection refused."""

    engine_id: str
    incarnation: int
    reason: str


class DrainStarted(Struct, frozen=True):
    """The daemon is stopping: finish what is here, take nothing new."""


class PeerQueue(Struct, frozen=True, gc=False):
    """What all other workers together have of one model."""

    waiting: int = 0  # stages
    waiting_tokens: float = 0.0
    running: int = 0  # attempts


class PeersReported(Struct, frozen=True):
    """What the other workers have at the engines, and waiting, by the congestion board."""

    engines: dict[str, int]  # attempts in flight, per engine
    models: dict[str, PeerQueue]


class Woke(Struct, frozen=True):
    """A `WakeAt` came due."""


Event = (
    StageSubmitted
    | AttemptFinished
    | AttemptStreamed
    | EngineReported
    | WorkflowClosed
    | StageCancelled
    | AttemptFailed
    | Woke
    | EngineRegistered
    | EngineLost
    | EngineDraining
    | DrainStarted
    | PeersReported
)


# Core: actions (imperative).


class Dispatch(Struct, frozen=True, gc=False):
    """Send this stage to this engine as this attempt."""

    key: StageKey
    attempt_id: int
    engine_id: str
    priority: int  # vLLM's: lower runs first
    receipt: Receipt


class AbortAttempt(Struct, frozen=True, gc=False):
    """Tell the engine to stop an attempt whose answer is not wanted any more."""

    engine_id: str
    attempt_id: int


class Reply(Struct, frozen=True, gc=False):
    """Answer the request with what this attempt produced."""

    key: StageKey
    attempt_id: int
    engine_id: str
    receipt: Receipt


class Fail(Struct, frozen=True, gc=False):
    """Answer the request with an error and maybe advice; it was accepted before."""

    key: StageKey
    code: ErrorCode
    message: str
    retryable: bool
    retry_after_s: float | None = None


class Reject(Struct, frozen=True, gc=False):
    """Do not accept the request; nothing is remembered of it."""

    key: StageKey
    code: ErrorCode
    message: str
    retry_after_s: float | None = None


class Attach(Struct, frozen=True, gc=False):
    """The request is a repetition of one still at work: its answer will do for both."""

    key: StageKey


class Replay(Struct, frozen=True, gc=False):
    """The request is a repetition of one answered a moment ago: send that answer again."""

    key: StageKey


class Forget(Struct, frozen=True, gc=False):
    """The answer of this request need not be kept any longer."""

    key: StageKey


class StageOutcome(Struct, frozen=True, gc=False):
    """One finished stage of an ended workflow, for predictors to learn from."""

    stage: int
    model: str
    prompt_tokens: int
    output_tokens: int


class WorkflowEnded(Struct, frozen=True, gc=False):
    """A workflow was closed or has been idle too long; what happened in it."""

    workflow_id: str
    kind: str
    success: float | None
    stages: tuple[StageOutcome, ...]


class WakeAt(Struct, frozen=True, gc=False):
    """Send `Woke` at this time (seconds, same clock as ``now``); replaces an earlier one."""

    at: float


Action = (
    Dispatch
    | Reply
    | AbortAttempt
    | Fail
    | Reject
    | Attach
    | Replay
    | Forget
    | WorkflowEnded
    | WakeAt
)
