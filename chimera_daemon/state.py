"""The scheduler's own records. Only `core.py` changes them; see there for the rules."""

from enum import IntEnum

from msgspec import Struct

from chimera_daemon.messages import (
    EngineStats,
    ModelPrediction,
    Prediction,
    Profile,
    Receipt,
    Stage,
    StageKey,
    StageOutcome,
)
from chimera_daemon.policy import Choice, ModelView, WorkflowView
from chimera_daemon.queues import Queue


class State(IntEnum):
    """Where a live stage is; in exactly one of these."""

    UNPLACED = 0  # no engine for it yet
    QUEUED = 1  # in the queue of its model
    RUNNING = 2  # one attempt at an engine


class LiveStage(Struct, eq=False):
    """A stage that has not been answered."""

    stage: Stage
    key: StageKey
    prediction: Prediction
    workflow: "Workflow"
    arrival: int
    arrived_s: float
    state: State = State.UNPLACED
    model: str = ""
    predicted: ModelPrediction | None = None  # of `model`
    claim: float = 0.0  # its part of the model's `claimed_tokens`
    tokens: float = 0.0  # its part of the model's `waiting_tokens`
    choice: Choice | None = None
    rank: float = 0.0
    level: int = 0
    ticket: int = -1
    queued_round: int = 0
    attempts: int = 0
    attempt: "Attempt | None" = None
    avoid: str = ""  # the engine that failed it last
    unplaced_s: float = -1.0  # since when it waits for any engine; -1 if it does not


class Attempt(Struct, eq=False):
    """One dispatch of a stage to one engine."""

    attempt_id: int
    live: LiveStage
    engine: "Engine"
    started_s: float
    round: int  # of the model's queue, when it left it
    owed: float  # output tokens still expected
    receipt: Receipt
    produced: int = 0
    streamed: bool = False


class Engine(Struct, eq=False):
    """A registered engine."""

    engine_id: str
    incarnation: int
    model: "Model"
    max_inflight: int
    context_tokens: int
    profile: Profile
    share: int  # of `max_inflight`, if other workers use the engine too
    limit: int  # the share, or what runs if that is more: a share may shrink
    others: int = 0  # attempts of other workers
    draining: bool = False
    rests_until_s: float | None = None  # it wants no new work before
    stats: EngineStats = EngineStats()
    foreign: int = 0  # requests that it reports beyond those of all workers
    running: dict[int, Attempt] = {}
    owed: float = 0.0  # sum over `running`


class Model(Struct, eq=False):
    """A model with its queue. `view` is what policies see of it."""

    view: ModelView
    queue: Queue[LiveStage]
    engines: dict[str, Engine] = {}  # that take work: neither lost nor draining


class Workflow(WorkflowView):
    """A workflow that is not ended."""

    live: dict[StageKey, LiveStage] = {}
    outcomes: list[StageOutcome] = []
    idle_since_s: float = 0.0  # when its last live stage was answered
    closing: bool = False  # by its client, right now
