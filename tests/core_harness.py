"""A scheduler under watch: every event is followed by `check()` and by an outside view of its own.

The outside view counts slots, attempts and answers from events and actions alone. It shares no code
and no belief with the core, so a core that is wrong but consistent does not pass.
"""

from typing import Any

from msgspec import Struct, field

from chimera_daemon.config import Config
from chimera_daemon.core import Scheduler
from chimera_daemon.messages import (
    AbortAttempt,
    Action,
    Attach,
    AttemptFailed,
    AttemptFinished,
    AttemptStreamed,
    Dispatch,
    DrainStarted,
    EngineDraining,
    EngineLost,
    EngineRegistered,
    EngineReported,
    EngineStats,
    Event,
    Fail,
    Forget,
    ModelPrediction,
    PeerQueue,
    PeersReported,
    Prediction,
    Profile,
    Reject,
    Replay,
    Reply,
    Stage,
    StageCancelled,
    StageKey,
    StageSubmitted,
    Usage,
    WakeAt,
    Woke,
    WorkflowClosed,
    WorkflowEnded,
)
from chimera_daemon.policy import NAMES

POLICIES = tuple(name.replace("MODEL", "small") for name in NAMES)
PROFILE = Profile(step_s=0.01, step_per_seq_s=0.001, prefill_s_per_token=0.0001)


def predict(tokens: float = 100.0, confidence: float = 0.5, later: float = 0.0) -> ModelPrediction:
    """A prediction of this many tokens for the stage and twice `later` stages like it."""
    rest = tokens * (1.0 + later)
    quantiles = (tokens / 2, tokens, tokens * 2)
    return ModelPrediction(
        confidence, tokens, quantiles, rest, (rest / 2, rest, rest * 2), float(later)
    )


def prediction(
    source: str = "learned", other: ModelPrediction | None = None, **models: ModelPrediction
) -> Prediction:
    """Predictions by model name, and the same middling one for all other models."""
    return Prediction(models, other or predict(), source)  # pyright: ignore[reportArgumentType]


LONGEST_REST_S = 30.0


class EngineSeen(Struct):
    """What the outside knows of an engine."""

    incarnation: int
    model: str
    slots: int
    draining: bool = False
    rests_until_s: float | None = None  # it wants a pause; over with the first `Woke` after that
    running: set[int] = field(default_factory=set[int])


class StageSeen(Struct):
    """What the outside knows of an accepted stage that has no answer."""

    stage: Stage
    since_s: float
    attempts: int = 0
    attempt_id: int | None = None
    streamed: bool = False


class Watched:
    """A `Scheduler`, its clock, and what an observer of its events and actions would conclude."""

    def __init__(self, **config: Any) -> None:
        self.config = Config(**config)
        self.core = Scheduler(self.config)
        self.now = 0.0
        self.log: list[tuple[Event, float, str]] = []
        self.engines: dict[str, EngineSeen] = {}
        self.open: dict[StageKey, StageSeen] = {}
        self.attempts: dict[int, tuple[str, StageKey]] = {}
        self.kept: dict[StageKey, int] = {}
        self.answers: list[Reply | Fail] = []
        self.last_attempt = 0
        self.wake_at: float | None = None
        self.draining = False
        self.shared = False  # with other workers that have something to do
        self._ids = 0

    # Events, in short.

    def submit(self, predicted: Prediction | None = None, **fields: Any) -> list[Action]:
        """Submit a stage; what is not given is made up, a new request id among it."""
        self._ids += 1
        values: dict[str, Any] = {
            "client_id": b"client",
            "request_id": f"r{self._ids}",
            "workflow_id": f"w{self._ids}",
            "stage": 0,
            "kind": "code",
            "model": None,
            "prompt_tokens": 100,
            "max_tokens": 1000,
            "payload_bytes": 10,
            "digest": 1,
        }
        return self.handle(StageSubmitted(Stage(**(values | fields)), predicted or prediction()))

    def join(
        self,
        engine_id: str = "e",
        model: str = "small",
        slots: int = 1,
        incarnation: int = 1,
        context_tokens: int = 0,
        profile: Profile = PROFILE,
    ) -> list[Action]:
        """Register an engine."""
        return self.handle(
            EngineRegistered(engine_id, incarnation, model, slots, context_tokens, profile)
        )

    def lose(self, engine_id: str, incarnation: int = 1) -> list[Action]:
        """An engine is gone."""
        return self.handle(EngineLost(engine_id, incarnation, "test"))

    def drain_engine(self, engine_id: str, incarnation: int = 1) -> list[Action]:
        """An engine wants no more work."""
        return self.handle(EngineDraining(engine_id, incarnation))

    def finish(self, attempt_id: int, tokens: int = 50, answer_bytes: int = 7) -> list[Action]:
        """An engine answers."""
        return self.handle(AttemptFinished(attempt_id, Usage(100, tokens), answer_bytes))

    def fail(
        self, attempt_id: int, retryable: bool = True, retry_after_s: float | None = None
    ) -> list[Action]:
        """An engine fails on an attempt, and may want a pause."""
        event = AttemptFailed(attempt_id, "engine_error", "broken", retryable, retry_after_s)
        return self.handle(event)

    def cancel(self, request_id: str, client_id: bytes = b"client") -> list[Action]:
        """A client gives up."""
        return self.handle(StageCancelled((client_id, request_id)))

    def report(
        self, engine_id: str, progress: dict[int, int], incarnation: int = 1, **stats: int
    ) -> list[Action]:
        """A heartbeat."""
        return self.handle(
            EngineReported(engine_id, incarnation, EngineStats(**stats), progress)  # pyright: ignore[reportArgumentType]
        )

    def peers(
        self,
        engines: dict[str, int] | None = None,
        **models: tuple[int, float, int],
    ) -> list[Action]:
        """Others have so many attempts at engines, and of models (waiting, tokens, running)."""
        queues = {name: PeerQueue(*numbers) for name, numbers in models.items()}
        return self.handle(PeersReported(engines or {}, queues))

    def wake(self) -> list[Action]:
        """Let time pass until the scheduler wants to be woken, and wake it."""
        assert self.wake_at is not None
        self.now = max(self.now, self.wake_at)
        return self.handle(Woke())

    def sleep(self, seconds: float) -> list[Action]:
        """Let time pass, waking the scheduler whenever it wants to be; all that it did."""
        until, actions = self.now + seconds, list[Action]()
        while self.wake_at is not None and self.wake_at <= until:
            actions += self.wake()
        self.now = until
        return actions

    # The one door, watched.

    def handle(self, event: Event) -> list[Action]:
        """Pass an event on, check everything, and return the actions."""
        expect_nothing = self._happened(event)
        actions = self.core.handle(event, self.now)
        self.log.append((event, self.now, repr(actions)))
        assert not (expect_nothing and actions), f"{event} should have been a no-op: {actions}"
        if isinstance(event, StageSubmitted):
            self._decided(event.stage, actions)
        for action in actions:
            self._check(action, event)
        self.core.check()
        self._check_work_conserved()
        return actions

    def _happened(self, event: Event) -> bool:
        """Take note of what the event says about the world; whether it must have no effect."""
        match event:
            case AttemptFinished() | AttemptFailed():
                if event.attempt_id not in self.attempts:
                    return True
                if isinstance(event, AttemptFailed) and event.retry_after_s:
                    self._rest(self.attempts[event.attempt_id][0], event.retry_after_s)
                self._gone(event.attempt_id)
            case AttemptStreamed():
                if event.attempt_id in self.attempts:
                    self.open[self.attempts[event.attempt_id][1]].streamed = True
                return True
            case EngineRegistered():
                old = self.engines.get(event.engine_id)
                if old is not None and old.incarnation == event.incarnation:
                    return True
                if old is not None:
                    self._engine_gone(event.engine_id)
                if len(self.engines) < self.config.max_engines:
                    self.engines[event.engine_id] = EngineSeen(
                        event.incarnation, event.model, event.max_inflight
                    )
            case EngineDraining() | EngineLost() | EngineReported():
                engine = self.engines.get(event.engine_id)
                if engine is None or engine.incarnation != event.incarnation:
                    return True
                if isinstance(event, EngineReported):
                    return True
                if isinstance(event, EngineDraining):
                    again, engine.draining = engine.draining, True
                    return again
                self._engine_gone(event.engine_id)
            case StageCancelled():
                return event.key not in self.open
            case DrainStarted():
                self.draining = True
                return True
            case PeersReported():
                self.shared = bool(event.engines or event.models)
            case StageSubmitted() | WorkflowClosed() | Woke():
                if isinstance(event, Woke):
                    self.wake_at = None
                    for engine in self.engines.values():
                        if engine.rests_until_s is not None and engine.rests_until_s <= self.now:
                            engine.rests_until_s = None
        return False

    def _rest(self, engine_id: str, seconds: float) -> None:
        engine, until_s = self.engines[engine_id], self.now + min(seconds, LONGEST_REST_S)
        if not engine.draining and until_s > (engine.rests_until_s or 0.0):
            engine.rests_until_s = until_s

    def _gone(self, attempt_id: int) -> None:
        engine_id, key = self.attempts.pop(attempt_id)
        self.engines[engine_id].running.remove(attempt_id)
        self.open[key].attempt_id = None

    def _engine_gone(self, engine_id: str) -> None:
        for attempt_id in list(self.engines[engine_id].running):
            self._gone(attempt_id)
        del self.engines[engine_id]

    def _decided(self, stage: Stage, actions: list[Action]) -> None:
        """A new stage is accepted unless it was refused or is a repetition."""
        verdicts = [a for a in actions if isinstance(a, Reject | Attach | Replay)]
        assert all(v.key == stage.key for v in verdicts)
        if not verdicts:
            assert stage.key not in self.open
            assert stage.key not in self.kept
            assert not self.draining
            self.open[stage.key] = StageSeen(stage, self.now)
        assert len(verdicts) <= 1

    def _check(self, action: Action, event: Event) -> None:
        match action:
            case Dispatch():
                self._check_dispatch(action)
            case Reply():
                assert isinstance(event, AttemptFinished)
                assert action.attempt_id == event.attempt_id
                assert action.receipt.actual_tokens == event.usage.output_tokens
                assert action.receipt.attempts == self.open[action.key].attempts
                self._answered(action)
            case Fail():
                self._answered(action)
            case AbortAttempt():
                engine_id, key = self.attempts.pop(action.attempt_id)
                assert engine_id == action.engine_id
                assert key not in self.open, "aborted without an answer"
                self.engines[engine_id].running.remove(action.attempt_id)
            case Reject():
                assert isinstance(event, StageSubmitted)
                repeated = action.key in self.open or action.key in self.kept
                assert (action.code == "conflict") == repeated
            case Attach():
                assert isinstance(event, StageSubmitted)
                assert self.open[action.key].stage.digest == event.stage.digest
            case Replay():
                assert isinstance(event, StageSubmitted)
                assert self.kept[action.key] == event.stage.digest
            case Forget():
                del self.kept[action.key]
            case WorkflowEnded():
                assert all(s.stage.workflow_id != action.workflow_id for s in self.open.values())
            case WakeAt():
                assert action.at >= self.now
                self.wake_at = action.at

    def _check_dispatch(self, action: Dispatch) -> None:
        engine, seen = self.engines[action.engine_id], self.open[action.key]
        assert not engine.draining
        assert engine.rests_until_s is None
        assert len(engine.running) < engine.slots, "over-committed"
        assert seen.stage.model in (None, engine.model)
        assert seen.attempt_id is None, "two attempts of a stage at once"
        assert not seen.streamed or seen.stage.restart, "text already seen would be sent again"
        assert action.attempt_id > self.last_attempt
        seen.attempts += 1
        seen.streamed = False
        assert seen.attempts <= self.config.max_attempts
        receipt = action.receipt
        assert receipt.policy == self.config.policy
        assert receipt.model == engine.model
        assert receipt.attempts == seen.attempts
        assert receipt.queue_s == self.now - seen.since_s
        self.last_attempt = seen.attempt_id = action.attempt_id
        engine.running.add(action.attempt_id)
        self.attempts[action.attempt_id] = (action.engine_id, action.key)

    def _answered(self, action: Reply | Fail) -> None:
        seen = self.open.pop(action.key)
        self.kept[action.key] = seen.stage.digest
        self.answers.append(action)

    def _check_work_conserved(self) -> None:
        """No stage waits for a model that has a free slot, of shared engines none at all."""
        serving = [e for e in self.engines.values() if not e.draining]
        awake = [e for e in serving if e.rests_until_s is None]
        free = {e.model for e in awake if len(e.running) < (1 if self.shared else e.slots)}
        full = {e.model for e in serving} - free
        for seen in self.open.values():
            if seen.attempt_id is not None:
                continue
            if seen.stage.model is not None:
                assert seen.stage.model not in free
            elif not self.config.policy.startswith("static:"):
                assert full or not free, "all engines have free slots and a stage waits"

    # Endings.

    def finish_all(self) -> None:
        """Engines come for everything that waits, answer everything; then nothing may be left."""
        self.peers()
        if any(engine.rests_until_s is not None for engine in self.engines.values()):
            self.sleep(LONGEST_REST_S)
        wanted = {s.stage.model for s in self.open.values()} - {None}
        wanted.add(self.config.policy.removeprefix("static:"))
        for number, model in enumerate(sorted(map(str, wanted))):
            if len(self.engines) >= self.config.max_engines:
                engine_id, engine = next(iter(self.engines.items()))
                self.lose(engine_id, engine.incarnation)
            self.join(f"last-{number}", model, 4)
            while self.attempts:
                self.finish(next(iter(self.attempts)))
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """All stages are answered and every sum that the core keeps is zero again."""
        assert not self.open
        assert not self.attempts
        assert self.core.idle
        snapshot = self.core.snapshot()
        assert snapshot["stages"] == {"waiting": 0, "without_engine": 0, "running": 0}
        for view in snapshot["models"]:
            for name in ("running", "running_tokens", "waiting", "waiting_tokens"):
                assert view[name] == 0, name
            assert view["waiting_prompt"] == view["claims"] == view["claimed_tokens"] == 0
        assert all(e["predicted_tokens"] == 0 == e["running"] for e in snapshot["engines"])

    def assert_replays(self) -> None:
        """The same events give the same actions."""
        again = Scheduler(self.config)
        for event, now, actions in self.log:
            assert repr(again.handle(event, now)) == actions


def of(actions: list[Action], *types: type) -> list[Any]:
    """The actions of these types."""
    return [a for a in actions if isinstance(a, types)]


def dispatched(actions: list[Action]) -> list[tuple[str, str]]:
    """Request and engine of each dispatch."""
    return [(a.key[1], a.engine_id) for a in actions if isinstance(a, Dispatch)]
