"""The scheduler: one door in (`Scheduler.handle`), one list of actions out.

Everything that changes scheduling state lives in this file. It is synchronous and deterministic:
time comes with the event, nothing is awaited, nothing is drawn at random, ties break by arrival.

Life of a stage::

    StageSubmitted ─▶ UNPLACED ⇄ QUEUED ─▶ RUNNING ─▶ done (kept a while for repeated requests)
                         no engine   ▲          │
                                     └──────────┘ attempt failed or engine lost, attempts left

A stage waits in the queue of a *model*; which engine runs it is decided when a slot frees. An
engine holds at most ``max_inflight`` attempts, or this worker's share of them. Every attempt has a
number that is never used again, so an answer that comes late finds nothing and is dropped.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from itertools import count
from math import ceil
from typing import Any, assert_never

from msgspec import to_builtins

from chimera_daemon.config import Config
from chimera_daemon.messages import (
    NO_LIMIT,
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
    ErrorCode,
    Event,
    Fail,
    Forget,
    PeerQueue,
    PeersReported,
    Prediction,
    Receipt,
    Reject,
    Replay,
    Reply,
    Stage,
    StageCancelled,
    StageKey,
    StageOutcome,
    StageSubmitted,
    WakeAt,
    Woke,
    WorkflowClosed,
    WorkflowEnded,
)
from chimera_daemon.policy import (
    Choice,
    ClusterView,
    ModelView,
    Policy,
    congestion,
    idle_latency_s,
    make_policy,
    remaining_given,
)
from chimera_daemon.pricing import LearnedPrice
from chimera_daemon.queues import Queue, RankQueue, StarvationQueue
from chimera_daemon.state import Attempt, Engine, LiveStage, Model, State, Workflow

# Finished stages remembered per workflow for the predictors; of a longer one, the first.
_MAX_OUTCOMES = 256
# Weight of the newest value in the running averages (about the last 64 values count).
_NEWEST = 1.0 / 64.0
# Services shorter than this by the profile say nothing about it; a single one no more than this.
_MIN_SERVICE_S = 1e-4
_MAX_SLOWDOWN = 50.0
# One in so many new workflows is looked at for the idle latency: it changes slowly.
_SAMPLE = 4
# Timers that come due within so many seconds share one `Woke`.
_NAP_S = 0.01
# Models without an engine are remembered up to this many times `max_engines`.
_MODELS_PER_ENGINE = 4
# An engine that wants a pause gets no longer one, whatever it asks for.
_LONGEST_REST_S = 30.0
# A free workflow on an idle engine would make the price of a second infinite.
_MIN_IDLE_LATENCY_S = 1e-6
# An engine that states no context size.
_ANY_CONTEXT = 1 << 60
_DECIDED = {source: f"decided_{source}" for source in ("prior", "learned", "fallback")}
# vLLM's priority is one integer: the paper's level counts more than any length.
_LEVEL_SPAN = 10_000_000


class Scheduler:
    """The core. Its configuration is frozen; its state changes through `handle` alone.

    ``first_attempt`` is the number of the first attempt; a daemon passes one that no earlier run of
    it has used, so that answers to attempts of an earlier run are recognised as such. Workers that
    share engines count in steps of ``config.workers`` from different numbers.
    """

    def __init__(self, config: Config, first_attempt: int = 1) -> None:
        self._config = config
        self._policy: Policy = make_policy(config)
        self._known_models = {m.name for m in config.models} | {e.model for e in config.engines}
        self._now = float("-inf")
        self._out: list[Action] = []
        self._next_attempt = first_attempt
        self._draining = False
        self._armed_s: float | None = None
        self._idle_latency_seen = False
        self._cluster = ClusterView()
        self._learned: LearnedPrice | None = None
        if config.p95_target_s and self._policy.has_price:
            self._learned = LearnedPrice(config.price, config.p95_target_s)
        self._models: dict[str, Model] = {}
        self._placeable: list[ModelView] = []  # views of models with engines, in order of joining
        self._smallest_context = _ANY_CONTEXT
        self._engines: dict[str, Engine] = {}
        self._resting: dict[str, Engine] = {}
        self._live: dict[StageKey, LiveStage] = {}
        # Ordered dicts where the oldest is removed: a plain dict looks through its removed entries.
        self._unplaced: OrderedDict[StageKey, LiveStage] = OrderedDict()  # longest waiting first
        self._attempts: dict[int, Attempt] = {}
        self._patience_s = min(config.reply_keep_s, config.workflow_idle_s)
        self._tickets = count(1)
        self._waiting = 0
        self._waiting_bytes = 0
        self._workflows: dict[str, Workflow] = {}
        self._idle: OrderedDict[str, Workflow] = OrderedDict()  # no live stages, longest first
        self._closed: OrderedDict[str, None] = OrderedDict()  # by their clients, oldest first
        self._answered: dict[StageKey, tuple[int, int]] = {}  # digest, bytes of the answer
        self._answered_order: deque[tuple[float, StageKey]] = deque()
        self._answered_bytes = 0
        self.counters: Counter[str] = Counter()

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at time ``now`` (seconds, never less than before); return what is to do.

        The caller carries the actions out in order. Raises `ValueError` if time went back.
        """
        if not now >= self._now:  # also refuses NaN
            raise ValueError(f"time went back from {self._now} to {now}")
        self._now = now
        out: list[Action] = []
        self._out = out
        if self._learned is not None:
            self._learned.pass_time(now)
            self._cluster.price = self._learned.price
        match event:
            case StageSubmitted():
                self._submitted(event.stage, event.prediction)
            case AttemptFinished():
                self._finished(event)
            case AttemptStreamed():
                attempt = self._attempts.get(event.attempt_id)
                if attempt is not None:
                    attempt.streamed = True
            case EngineReported():
                self._reported(event)
            case WorkflowClosed():
                self._closed_by_client(event.workflow_id, event.success)
            case StageCancelled():
                self._cancelled(event)
            case AttemptFailed():
                self._failed(event)
            case Woke():
                self._woke()
            case EngineRegistered():
                self._registered(event)
            case EngineLost():
                self._lost(event)
            case EngineDraining():
                engine = self._engine(event.engine_id, event.incarnation)
                if engine is not None and not engine.draining:
                    engine.draining = True
                    self._withdraw(engine)
            case PeersReported():
                self._peers_reported(event)
            case DrainStarted():
                self._draining = True
            case _:
                assert_never(event)
        return out

    # Stages come in.

    def _submitted(self, stage: Stage, prediction: Prediction) -> None:
        key = stage.key
        live = self._live.get(key)
        answered = self._answered.get(key)
        if live is not None or answered is not None:
            self._repeated(stage, key, live, answered)
            return
        refused = self._refusal(stage)
        if refused is not None:
            self.counters["rejected"] += 1
            self.counters["rejected_" + refused[0]] += 1
            self._out.append(Reject(key, *refused))
            return
        self.counters["submitted"] += 1
        workflow = self._workflow_of(stage)
        self._cluster.arrivals += 1
        live = LiveStage(stage, key, prediction, workflow, self._cluster.arrivals, self._now)
        self._live[key] = live
        workflow.live[key] = live
        self._waiting += 1
        self._waiting_bytes += stage.payload_bytes
        self._place(live)

    def _repeated(
        self, stage: Stage, key: StageKey, live: LiveStage | None, answered: tuple[int, int] | None
    ) -> None:
        """The same request again: one answer for both. The same id for another request: refused."""
        digest = live.stage.digest if live is not None else answered[0] if answered else 0
        self.counters["repeated"] += 1
        if digest != stage.digest:
            message = f"request id {stage.request_id!r} was used before with another body"
            self._out.append(Reject(key, "conflict", message))
        elif live is not None:
            self._out.append(Attach(key))
        else:
            self._out.append(Replay(key))

    def _refusal(self, stage: Stage) -> tuple[ErrorCode, str, float | None] | None:
        config = self._config
        if self._draining:
            return "draining", "the daemon is stopping", 1.0
        if stage.workflow_id in self._closed:
            return "workflow_closed", f"workflow {stage.workflow_id!r} has ended", None
        if stage.model is not None and not self._knows(stage.model):
            names = ", ".join(sorted(self._known_models | self._models.keys())) or "none"
            return "unknown_model", f"no model {stage.model!r}; there are: {names}", None
        if self._waiting >= config.max_queued_stages:
            return "overloaded", f"{self._waiting} stages wait already", self._relief_s()
        if self._waiting_bytes + stage.payload_bytes > config.max_queued_bytes:
            return "overloaded", f"{self._waiting_bytes} bytes wait already", self._relief_s()
        if stage.workflow_id not in self._workflows and not self._room_for_workflow():
            return "overloaded", f"{len(self._workflows)} workflows are at work", self._relief_s()
        return None

    def _knows(self, model: str) -> bool:
        return model in self._models or model in self._known_models

    def _relief_s(self) -> float:
        """Time in which a tenth of what waits should be done: when it is worth asking again."""
        rate = tokens = 0.0
        for model in self._models.values():
            view = model.view
            tokens += view.waiting_tokens
            if view.engines:
                rate += view.engines / view.full_s_per_token
        return min(max(0.1 * tokens / rate, 0.05), 60.0) if rate else 5.0

    def _room_for_workflow(self) -> bool:
        """At the bound the workflow that has been idle longest gives way, if one is idle at all."""
        if len(self._workflows) < self._config.max_workflows:
            return True
        if not self._idle:
            return False
        self.counters["workflows_evicted"] += 1
        self._end_workflow(next(iter(self._idle.values())), None)
        return True

    def _workflow_of(self, stage: Stage) -> Workflow:
        workflow = self._workflows.get(stage.workflow_id)
        if workflow is None:
            workflow = Workflow(stage.workflow_id, stage.kind)
            self._workflows[stage.workflow_id] = workflow
            if self._learned is not None:
                self._learned.begin(workflow, self._now)
        elif not workflow.live:
            del self._idle[stage.workflow_id]
            if self._learned is not None:
                self._learned.go_on(workflow)
        return workflow

    # Stages are placed, wait and start.

    def _place(self, live: LiveStage) -> None:
        """Choose the model; start at once if nobody waits there and a slot is free, else wait.

        A caller that has freed a slot of a model in which stages wait calls `_fill` after this.
        """
        choice = self._choose(live)
        live.choice = choice
        if choice.declined:
            self._waiting -= 1
            self._waiting_bytes -= live.stage.payload_bytes
            self._fail(live, "declined", f"no model is worth its cost: {choice.reason}", False)
            return
        if not choice.model:
            live.state = State.UNPLACED
            self._unplaced[live.key] = live
            if live.unplaced_s < 0.0:
                live.unplaced_s = self._now
            self._arm(live.unplaced_s + self._config.no_engine_s)
            return
        model = self._models[choice.model]
        view = model.view
        predicted = live.prediction.of(choice.model)
        live.unplaced_s = -1.0
        first = not live.model
        live.model = choice.model
        live.predicted = predicted
        tokens, bound = predicted.stage_tokens_mean, live.stage.max_tokens
        live.tokens = tokens if tokens < bound else float(bound)
        live.rank = self._policy.rank(live.stage, predicted, live.workflow, live.arrived_s)
        live.claim = claim = predicted.remaining_tokens[1]
        view.claims += 1
        view.claimed_tokens += claim
        if first:
            if live.workflow.model is None and not (
                self._idle_latency_seen and live.arrival % _SAMPLE
            ):
                self._learn_idle_latency(live)
            self.counters[_DECIDED[live.prediction.source]] += 1
        if view.waiting or view.running >= view.slots:
            self._enqueue(live, model)
        else:
            self._start(live, self._free_engine(model, live))

    def _choose(self, live: LiveStage) -> Choice:
        pinned = live.stage.model
        if pinned is not None:
            model = self._models.get(pinned)
            return Choice(pinned if model is not None and model.engines else "", "pinned")
        if not self._placeable:
            return Choice("", "no engine")
        needed = live.stage.prompt_tokens
        if live.stage.max_tokens < NO_LIMIT:
            needed += live.stage.max_tokens
        if needed > self._smallest_context:
            # Prompt sizes may be estimates: if none seems large enough, an engine shall say so.
            fitting = [v for v in self._placeable if needed <= v.context_tokens]
            if not fitting:  # better to wait for one that rests than to be refused
                serving = [m.view for m in self._models.values() if m.engines]
                fitting = [v for v in serving if needed <= v.context_tokens]
            choice = self._ask_policy(live, fitting) if fitting else None
            if choice is not None and choice.model:
                return choice
        return self._ask_policy(live, self._placeable)

    def _ask_policy(self, live: LiveStage, views: list[ModelView]) -> Choice:
        for view in views:
            if view.congestion is None:
                view.congestion = congestion(view)
        return self._policy.choose(live.stage, live.prediction, live.workflow, views, self._cluster)

    def _learn_idle_latency(self, live: LiveStage) -> None:
        """Running average of what a new workflow would take on the fastest idle model."""
        value = min(
            idle_latency_s(live.stage, live.prediction.of(view.name), view)
            for view in self._placeable
        )
        if value < _MIN_IDLE_LATENCY_S:
            return
        if self._idle_latency_seen:
            self._cluster.idle_latency_s += _NEWEST * (value - self._cluster.idle_latency_s)
        else:
            self._cluster.idle_latency_s = value
            self._idle_latency_seen = True

    def _free_engine(self, model: Model, live: LiveStage) -> Engine:
        """The engine that holds the workflow's prefix if it has a free slot, else the emptiest.

        Only for a model with a free slot.
        """
        home = model.engines.get(live.workflow.engine or "")
        if home is not None and len(home.running) < home.limit and home.engine_id != live.avoid:
            return home
        best: Engine | None = None
        best_load = 0.0
        for engine in model.engines.values():
            if len(engine.running) >= engine.limit:
                continue
            load = engine.owed
            if engine.engine_id == live.avoid:
                load += 1e18  # only if there is no other
            if best is None or load < best_load:
                best, best_load = engine, load
        assert best is not None
        return best

    def _enqueue(self, live: LiveStage, model: Model) -> None:
        live.state = State.QUEUED
        view = model.view
        view.congestion = None
        view.waiting += 1
        view.waiting_tokens += live.tokens
        view.waiting_prompt += live.stage.prompt_tokens
        model.queue.push(live)

    def _dequeued(self, live: LiveStage, model: Model) -> None:
        view = model.view
        view.congestion = None
        view.waiting -= 1
        # Sums of floats drift; an empty queue is where the sum is known.
        view.waiting_tokens = view.waiting_tokens - live.tokens if view.waiting else 0.0
        view.waiting_prompt -= live.stage.prompt_tokens

    def _start(self, live: LiveStage, engine: Engine) -> None:
        """Dispatch to an engine with a free slot."""
        assert live.predicted is not None
        assert live.choice is not None
        model = engine.model
        live.state = State.RUNNING
        live.attempts += 1
        self._waiting -= 1
        self._waiting_bytes -= live.stage.payload_bytes
        owed = live.tokens
        receipt = Receipt(
            self._policy.name,
            live.prediction.source,
            live.model,
            live.choice.reason,
            live.choice.candidates,
            live.predicted.stage_tokens[1],
            None,
            self._now - live.arrived_s,
            None,
            live.attempts,
        )
        attempt_id = self._next_attempt
        self._next_attempt = attempt_id + self._config.workers
        attempt = Attempt(attempt_id, live, engine, self._now, model.queue.rounds, owed, receipt)
        live.attempt = attempt
        self._attempts[attempt_id] = attempt
        engine.running[attempt_id] = attempt
        engine.owed += owed
        view = model.view
        view.congestion = None
        view.running += 1
        view.running_tokens += owed
        live.workflow.model = live.model
        live.workflow.engine = engine.engine_id
        priority = live.level * _LEVEL_SPAN + int(live.rank)
        self._out.append(Dispatch(live.key, attempt_id, engine.engine_id, priority, receipt))

    def _fill(self, model: Model, freed: Engine | None = None) -> None:
        """Give free slots to what waits for this model; ``freed`` is where one came free."""
        view, queue = model.view, model.queue
        while view.waiting and view.running < view.slots:
            live = self._next(model, freed)
            engine = freed
            if (
                engine is None
                or engine.draining
                or len(engine.running) >= engine.limit
                or engine.engine_id == live.avoid
            ):
                engine = self._free_engine(model, live)
            if (
                engine.engine_id == live.avoid
                and view.waiting > 1
                and any(e is not engine and e.rests_until_s is None for e in model.engines.values())
            ):
                # It failed there: let the next one have this slot, and wait for another engine.
                avoiding, live = live, queue.pop()
                queue.push(avoiding)
            self._dequeued(live, model)
            self._start(live, engine)

    def _next(self, model: Model, freed: Engine | None) -> LiveStage:
        """Take from the queue what runs next, ``freed`` having a slot for it if it is given.

        To run elsewhere than where its prefix is cached is work, which counts as rank: the tokens
        that could be written in the time of reading the prefix again.
        """
        queue = model.queue
        if freed is None or not self._policy.spares_prefix or not isinstance(queue, RankQueue):
            return queue.pop()
        here, engines = freed.engine_id, model.engines
        home = queue.first().workflow.engine
        if home is None or home == here or home not in engines:
            return queue.pop()
        tokens = model.view.prefill_s_per_token / model.view.full_s_per_token

        def lost(live: LiveStage) -> float:
            workflow = live.workflow
            home = workflow.engine
            return workflow.context_tokens * tokens if home != here and home in engines else 0.0

        return queue.pop_cheapest(lost)

    # Attempts end.

    def _finished(self, event: AttemptFinished) -> None:
        attempt = self._attempts.get(event.attempt_id)
        if attempt is None:
            self.counters["late_answers"] += 1
            return
        live, engine = attempt.live, attempt.engine
        self._release(attempt)
        usage = event.usage
        workflow = live.workflow
        workflow.context_tokens = usage.prompt_tokens + usage.output_tokens
        workflow.output_tokens += usage.output_tokens
        if len(workflow.outcomes) < _MAX_OUTCOMES:
            workflow.outcomes.append(
                StageOutcome(live.stage.stage, live.model, usage.prompt_tokens, usage.output_tokens)
            )
        receipt = attempt.receipt
        receipt.actual_tokens = usage.output_tokens
        receipt.service_s = service_s = self._now - attempt.started_s
        # The profile was measured alone; what stages really take is learned as they finish.
        profile = engine.profile
        expected_s = (
            usage.prompt_tokens * profile.prefill_s_per_token
            + usage.output_tokens * profile.step(len(engine.running) + 1)
        )
        if expected_s > _MIN_SERVICE_S:
            ratio = min(max(service_s / expected_s, 1.0 / _MAX_SLOWDOWN), _MAX_SLOWDOWN)
            view = engine.model.view
            view.congestion = None
            view.slowdown += _NEWEST * (ratio - view.slowdown)
        self.counters["completed"] += 1
        self._out.append(Reply(live.key, attempt.attempt_id, engine.engine_id, receipt))
        self._answer(live, event.answer_bytes)
        self._fill(engine.model, engine)

    def _failed(self, event: AttemptFailed) -> None:
        attempt = self._attempts.get(event.attempt_id)
        if attempt is None:
            self.counters["late_answers"] += 1
            return
        self._release(attempt)
        attempt.live.avoid = attempt.engine.engine_id
        pause_s = None
        if event.retry_after_s:
            pause_s = min(event.retry_after_s, _LONGEST_REST_S)
            self._rest(attempt.engine, pause_s)
        self._retry_or_fail(attempt, event.code, event.message, event.retryable, pause_s)
        self._fill(attempt.engine.model, attempt.engine)

    def _retry_or_fail(
        self,
        attempt: Attempt,
        code: ErrorCode,
        message: str,
        retryable: bool,
        retry_after_s: float | None = None,
    ) -> None:
        """Again elsewhere, if that can help, is allowed, and the client has seen nothing yet."""
        live = attempt.live
        visible = attempt.streamed and not live.stage.restart
        if not retryable or visible or live.attempts >= self._config.max_attempts:
            if retryable and live.attempts >= self._config.max_attempts:
                message = f"{message} (attempt {live.attempts}, the last)"
            self._fail(live, code, message, retryable, retry_after_s if retryable else None)
            return
        self.counters["requeued"] += 1
        self._waiting += 1
        self._waiting_bytes += live.stage.payload_bytes
        # The paper's aging: a starved stage that has had its rounds of service goes back up.
        served = attempt.engine.model.queue.rounds - attempt.round
        live.level = min(0, live.level + served // self._policy.service_rounds)
        self._place(live)

    def _release(self, attempt: Attempt) -> None:
        """Take an attempt off its engine. Its stage is in no state until the caller says which."""
        live, engine = attempt.live, attempt.engine
        view = engine.model.view
        del self._attempts[attempt.attempt_id]
        del engine.running[attempt.attempt_id]
        live.attempt = None
        engine.owed = engine.owed - attempt.owed if engine.running else 0.0
        if engine.engine_id in engine.model.engines:
            view.congestion = None
            view.running -= 1
            view.running_tokens = view.running_tokens - attempt.owed if view.running else 0.0
            if engine.limit > engine.share:
                engine.limit -= 1
                view.slots -= 1
        self._unclaim(live, view)

    def _unclaim(self, live: LiveStage, view: ModelView) -> None:
        """The stage counts on its model no longer."""
        view.claims -= 1
        view.claimed_tokens = max(view.claimed_tokens - live.claim, 0.0) if view.claims else 0.0
        live.claim = 0.0

    # Stages are answered.

    def _answer(self, live: LiveStage, answer_bytes: int) -> None:
        """The stage has its one answer; remember that for repetitions of the request."""
        config = self._config
        del self._live[live.key]
        workflow = live.workflow
        del workflow.live[live.key]
        if not workflow.live:
            workflow.idle_since_s = self._now
            self._idle[workflow.workflow_id] = workflow
            if live.stage.last and not workflow.closing:
                self._end_workflow(workflow, None)
        self._answered[live.key] = (live.stage.digest, answer_bytes)
        self._answered_order.append((self._now + config.reply_keep_s, live.key))
        self._answered_bytes += answer_bytes
        answered = self._answered
        while self._answered_bytes > config.reply_keep_bytes or len(answered) > config.reply_keep:
            self._forget_oldest()
        if self._armed_s is None or self._armed_s > self._now + self._patience_s:
            self._arm(self._now + self._patience_s)

    def _forget_oldest(self) -> None:
        _, key = self._answered_order.popleft()
        self._answered_bytes -= self._answered.pop(key)[1]
        self._out.append(Forget(key))

    def _fail(
        self,
        live: LiveStage,
        code: ErrorCode,
        message: str,
        retryable: bool,
        retry_after_s: float | None = None,
    ) -> None:
        """Answer a stage that is in no queue and at no engine with an error."""
        self.counters["failed"] += 1
        self.counters["failed_" + code] += 1
        self._out.append(Fail(live.key, code, message, retryable, retry_after_s))
        self._answer(live, len(message))

    def _cancelled(self, event: StageCancelled) -> None:
        live = self._live.get(event.key)
        if live is not None:
            self._cancel(live, event.code, event.message, event.retryable)

    def _cancel(
        self, live: LiveStage, code: ErrorCode, message: str, retryable: bool = False
    ) -> None:
        attempt = live.attempt
        self._take_off(live)
        self._fail(live, code, message, retryable)
        if attempt is not None:
            self._out.append(AbortAttempt(attempt.engine.engine_id, attempt.attempt_id))
            self._fill(attempt.engine.model, attempt.engine)

    def _take_off(self, live: LiveStage) -> None:
        """Remove a stage from wherever it waits or runs."""
        if live.attempt is not None:
            self._release(live.attempt)
            return
        self._waiting -= 1
        self._waiting_bytes -= live.stage.payload_bytes
        if live.state is State.UNPLACED:
            del self._unplaced[live.key]
        else:
            model = self._models[live.model]
            model.queue.remove(live)
            self._dequeued(live, model)
            self._unclaim(live, model.view)

    # Workflows end.

    def _closed_by_client(self, workflow_id: str, success: float | None) -> None:
        workflow = self._workflows.get(workflow_id)
        if workflow is None:
            return
        workflow.closing = True
        # Those that wait first, so that none of them starts in a slot of those that run.
        for live in sorted(workflow.live.values(), key=lambda live: live.state):
            self._cancel(live, "cancelled", "its workflow was closed")
        self.counters["workflows_closed"] += 1
        self._end_workflow(workflow, success)
        self._closed[workflow_id] = None
        if len(self._closed) > self._config.max_workflows:
            self._closed.popitem(last=False)

    def _end_workflow(self, workflow: Workflow, success: float | None) -> None:
        """Forget an idle workflow. Only if a client closed it are later stages of it refused."""
        del self._workflows[workflow.workflow_id]
        del self._idle[workflow.workflow_id]
        if self._learned is not None:
            self._learned.end(workflow)
        self._out.append(
            WorkflowEnded(workflow.workflow_id, workflow.kind, success, tuple(workflow.outcomes))
        )

    # Engines come, report and go.

    def _engine(self, engine_id: str, incarnation: int) -> Engine | None:
        engine = self._engines.get(engine_id)
        return engine if engine is not None and engine.incarnation == incarnation else None

    def _registered(self, event: EngineRegistered) -> None:
        old = self._engines.get(event.engine_id)
        if old is not None and old.incarnation == event.incarnation:
            return
        if old is not None:
            self._remove_engine(old, "another process took its name")
        if len(self._engines) >= self._config.max_engines:
            self.counters["engines_refused"] += 1
            return
        model = self._models.get(event.model)
        if model is None:
            self._forget_models()
            rounds = self._policy.starvation_rounds
            queue: Queue[LiveStage] = (
                StarvationQueue(self._tickets, rounds) if rounds else RankQueue(self._tickets)
            )
            model = Model(ModelView(event.model), queue)
            self._models[event.model] = model
        engine = Engine(
            event.engine_id,
            event.incarnation,
            model,
            event.max_inflight,
            event.context_tokens,
            event.profile,
            event.max_inflight,
            event.max_inflight,
        )
        self._engines[event.engine_id] = engine
        model.engines[event.engine_id] = engine
        self.counters["engines_registered"] += 1
        self._recompute(model)
        self._fill(model)
        self._place_again()

    def _place_again(self) -> None:
        """For what had no engine there may be one now."""
        for live in list(self._unplaced.values()):
            del self._unplaced[live.key]
            self._place(live)

    def _rest(self, engine: Engine, seconds: float) -> None:
        """No new work for so long. Other models come first, if there are any that do not rest."""
        until_s = self._now + seconds
        if engine.draining or (engine.rests_until_s or 0.0) >= until_s:
            return
        self.counters["rests"] += engine.rests_until_s is None
        engine.rests_until_s = until_s
        self._resting[engine.engine_id] = engine
        self._share(engine, 0)
        self._recompute(engine.model)
        self._arm(until_s)
        if all(view is not engine.model.view for view in self._placeable):
            self._place_queue_again(engine.model)

    def _place_queue_again(self, model: Model) -> None:
        """The model has no engine now. What is pinned to it waits for one that rests."""
        for live in sorted(model.queue.items(), key=lambda s: s.arrival):
            if live.stage.model is None or not model.engines:
                model.queue.remove(live)
                self._dequeued(live, model)
                self._unclaim(live, model.view)
                self._place(live)

    def _rested(self, engine: Engine) -> None:
        """It takes work again."""
        engine.rests_until_s = None
        del self._resting[engine.engine_id]
        self._share(engine, max(1, engine.max_inflight - engine.others))
        self._recompute(engine.model)
        self._fill(engine.model)

    def _share(self, engine: Engine, share: int) -> None:
        """Set how many attempts it may have; the caller makes the model's view agree."""
        engine.share = 0 if engine.rests_until_s is not None else share
        engine.limit = max(engine.share, len(engine.running))

    def _forget_models(self) -> None:
        """Bound the models that are remembered although no engine serves them any more."""
        if len(self._models) >= _MODELS_PER_ENGINE * self._config.max_engines:
            served = {engine.model.view.name for engine in self._engines.values()}
            self._models = {name: m for name, m in self._models.items() if name in served}

    def _recompute(self, model: Model) -> None:
        """Set what the model's view sums over its engines. Engines change rarely."""
        view, engines = model.view, list(model.engines.values())
        view.congestion = None
        view.engines = len(engines)
        view.slots = sum(e.limit for e in engines)
        view.running = sum(len(e.running) for e in engines)
        view.running_tokens = sum(e.owed for e in engines)
        view.foreign = sum(e.foreign + e.others for e in engines)
        if engines:
            total = sum(e.max_inflight for e in engines)
            view.step_s = sum(e.profile.step_s * e.max_inflight for e in engines) / total
            view.step_per_seq_s = (
                sum(e.profile.step_per_seq_s * e.max_inflight for e in engines) / total
            )
            view.prefill_s_per_token = (
                sum(e.profile.prefill_s_per_token * e.max_inflight for e in engines) / total
            )
            view.slots_each = total / len(engines)
            full_step = view.step_s + view.step_per_seq_s * view.slots_each
            view.full_s_per_token = max(full_step / view.slots_each, 1e-9)
            view.context_tokens = min(e.context_tokens or _ANY_CONTEXT for e in engines)
        serving = [m for m in self._models.values() if m.engines]
        awake = [m for m in serving if any(e.rests_until_s is None for e in m.engines.values())]
        self._placeable = [m.view for m in awake or serving]
        self._smallest_context = min((v.context_tokens for v in self._placeable), default=0)

    def _reported(self, event: EngineReported) -> None:
        engine = self._engine(event.engine_id, event.incarnation)
        if engine is None:
            return
        stats = event.stats
        engine.stats = stats
        view = engine.model.view
        serving = engine.engine_id in engine.model.engines
        # Ours as of now or as of the report, whichever is more: some ended or began in between.
        ours = max(len(engine.running), len(event.progress)) + engine.others
        foreign = max(stats.running + stats.waiting - ours, 0)
        if serving and foreign != engine.foreign:
            view.congestion = None
            view.foreign += foreign - engine.foreign
        engine.foreign = foreign
        for attempt_id, produced in event.progress.items():
            attempt = engine.running.get(attempt_id)
            if attempt is None or produced <= attempt.produced:
                continue
            live = attempt.live
            assert live.predicted is not None
            attempt.produced = produced
            owed = remaining_given(live.predicted, produced, live.stage.max_tokens)
            engine.owed += owed - attempt.owed
            if serving:
                view.running_tokens += owed - attempt.owed
            attempt.owed = owed

    def _peers_reported(self, event: PeersReported) -> None:
        """Share the slots with the other workers.

        Where all that waits and runs has room, everybody takes what is free. Where it has not, each
        has a share in proportion to what it has to do, which it gets as attempts of those above
        theirs end. A share is at least one attempt: the engine queues what is too much for it.
        """
        nothing = PeerQueue()
        for name, model in self._models.items():
            view, peers = model.view, event.models.get(name, nothing)
            view.congestion = None
            view.peers_waiting, view.peers_waiting_tokens = peers.waiting, peers.waiting_tokens
            slots = foreign = capacity = 0
            for engine in model.engines.values():
                others = event.engines.get(engine.engine_id, 0)
                rests = engine.rests_until_s is not None
                capacity += len(engine.running) + others if rests else engine.max_inflight
            ours, theirs = view.waiting + view.running, peers.waiting + peers.running
            part = ours / (ours + theirs) if ours + theirs > capacity else 1.0
            for engine in model.engines.values():
                engine.others = event.engines.get(engine.engine_id, 0)
                free = engine.max_inflight - engine.others
                self._share(engine, max(1, min(ceil(part * engine.max_inflight), free)))
                slots += engine.limit
                foreign += engine.foreign + engine.others
            view.slots, view.foreign = slots, foreign
            self._fill(model)

    def _lost(self, event: EngineLost) -> None:
        engine = self._engine(event.engine_id, event.incarnation)
        if engine is not None:
            self.counters["engines_lost"] += 1
            self._remove_engine(engine, event.reason)

    def _remove_engine(self, engine: Engine, reason: str) -> None:
        del self._engines[engine.engine_id]
        self._resting.pop(engine.engine_id, None)
        if engine.engine_id in engine.model.engines:
            self._withdraw(engine)
        message = f"engine {engine.engine_id!r} was lost: {reason}"
        for attempt in list(engine.running.values()):
            self._release(attempt)
            self._retry_or_fail(attempt, "engine_lost", message, True)

    def _withdraw(self, engine: Engine) -> None:
        """No new work for this engine. Without any engine the model's queue is placed anew."""
        model = engine.model
        del model.engines[engine.engine_id]
        self._resting.pop(engine.engine_id, None)
        self._recompute(model)
        if not model.engines:
            self._place_queue_again(model)

    # Time passes.

    def _arm(self, at: float) -> None:
        """Ask for a `Woke` no later than this."""
        if self._armed_s is None or at < self._armed_s:
            self._armed_s = at
            self._out.append(WakeAt(at))

    def _woke(self) -> None:
        self._armed_s = None
        now, config = self._now, self._config
        while self._answered_order and self._answered_order[0][0] <= now:
            self._forget_oldest()
        while self._unplaced:
            live = next(iter(self._unplaced.values()))
            if live.unplaced_s + config.no_engine_s > now:
                break
            self._take_off(live)
            wanted = f"model {live.stage.model!r}" if live.stage.model else "any model"
            message = f"no engine of {wanted} came within {config.no_engine_s:g} s"
            self._fail(live, "no_engine", message, True)
        rested = [e for e in self._resting.values() if (e.rests_until_s or now) <= now]
        for engine in rested:
            self._rested(engine)
        if rested:
            self._place_again()
        while self._idle:
            workflow = next(iter(self._idle.values()))
            if workflow.idle_since_s + config.workflow_idle_s > now:
                break
            self.counters["workflows_expired"] += 1
            self._end_workflow(workflow, None)
        self._arm_next()

    def _arm_next(self) -> None:
        config = self._config
        due: list[float] = []
        if self._answered_order:
            due.append(self._answered_order[0][0])
        if self._unplaced:
            due.append(next(iter(self._unplaced.values())).unplaced_s + config.no_engine_s)
        if self._idle:
            due.append(next(iter(self._idle.values())).idle_since_s + config.workflow_idle_s)
        due += [engine.rests_until_s or self._now for engine in self._resting.values()]
        if due:
            self._arm(max(min(due), self._now + _NAP_S))

    # Looking in from outside.

    def has_engine(self, engine_id: str, incarnation: int) -> bool:
        """Whether this process of this engine is registered."""
        return self._engine(engine_id, incarnation) is not None

    def has_workflow(self, workflow_id: str) -> bool:
        """Whether this workflow has begun and has not ended."""
        return workflow_id in self._workflows

    @property
    def idle(self) -> bool:
        """Whether no stage waits or runs."""
        return not self._live

    def in_flight(self) -> Iterator[tuple[str, int, float]]:
        """Of each engine: its name, attempts in flight there, predicted tokens due."""
        for engine in self._engines.values():
            yield engine.engine_id, len(engine.running), engine.owed

    def queues(self) -> Iterator[tuple[str, PeerQueue]]:
        """Of each model: its name, and what waits and runs here."""
        for name, model in self._models.items():
            view = model.view
            yield name, PeerQueue(view.waiting, view.waiting_tokens, view.running)

    def check(self) -> None:
        """Assert every invariant; for tests, after every event. Costs time linear in the state."""
        by_state = {state: set[StageKey]() for state in State}
        for key, live in self._live.items():
            assert key == live.key
            assert self._workflows[live.stage.workflow_id] is live.workflow
            assert live.workflow.live[key] is live
            assert key not in self._answered
            by_state[live.state].add(key)
            assert (live.attempt is not None) == (live.state is State.RUNNING)
            assert live.attempts <= self._config.max_attempts
            assert (live.ticket >= 0) == (live.state is State.QUEUED)
        assert sum(len(w.live) for w in self._workflows.values()) == len(self._live)
        for workflow in self._workflows.values():
            remembered = sum(o.output_tokens for o in workflow.outcomes)
            complete = len(workflow.outcomes) < _MAX_OUTCOMES
            assert workflow.output_tokens == remembered or not complete
        assert by_state[State.UNPLACED] == set(self._unplaced)
        assert by_state[State.RUNNING] == {a.live.key for a in self._attempts.values()}
        queued = [s for m in self._models.values() for s in m.queue.items()]
        assert len(queued) == len(by_state[State.QUEUED]) == len({s.key for s in queued})
        assert {s.key for s in queued} == by_state[State.QUEUED]
        self._check_engines()
        self._check_bounds()
        for name, model in self._models.items():
            self._check_model(name, model)

    def _check_engines(self) -> None:
        attempts = 0
        for engine_id, engine in self._engines.items():
            assert engine_id == engine.engine_id
            assert len(engine.running) <= engine.limit <= engine.max_inflight
            assert engine.limit == max(engine.share, len(engine.running)) or engine.draining
            assert (engine_id in engine.model.engines) == (not engine.draining)
            rests = engine.rests_until_s is not None and not engine.draining
            assert (engine_id in self._resting) == rests
            assert not rests or engine.share == 0
            assert abs(engine.owed - sum(a.owed for a in engine.running.values())) < 1e-3
            for attempt_id, attempt in engine.running.items():
                assert self._attempts[attempt_id] is attempt
                assert attempt.live.attempt is attempt
                assert attempt.engine is engine
                assert attempt.live.model == engine.model.view.name
                assert attempt_id < self._next_attempt
                assert attempt.owed >= 0.0
            attempts += len(engine.running)
        assert attempts == len(self._attempts)

    def _check_model(self, name: str, model: Model) -> None:
        view, queued = model.view, model.queue.items()
        engines = list(model.engines.values())
        assert name == view.name
        assert len(model.queue) == view.waiting == len(queued)
        assert all(s.model == name and s.state is State.QUEUED for s in queued)
        assert view.engines == len(engines)
        assert engines or not queued
        assert view.slots == sum(e.limit for e in engines)
        assert view.running == sum(len(e.running) for e in engines)
        assert view.foreign == sum(e.foreign + e.others for e in engines)
        assert view.congestion is None or view.congestion == congestion(view)
        assert not view.waiting or view.running == view.slots, "a slot is free and a stage waits"
        assert abs(view.running_tokens - sum(e.owed for e in engines)) < 1e-3
        assert abs(view.waiting_tokens - sum(s.tokens for s in queued)) < 1e-3
        assert view.waiting_prompt == sum(s.stage.prompt_tokens for s in queued)
        placed = [s for s in self._live.values() if s.state is not State.UNPLACED]
        claims = [s.claim for s in placed if s.model == name]
        assert view.claims == len(claims)
        assert abs(view.claimed_tokens - sum(claims)) < 1e-3
        awake = any(e.rests_until_s is None for e in engines)
        all_rest = len(self._resting) == sum(len(m.engines) for m in self._models.values())
        assert (view in self._placeable) == (awake or (all_rest and bool(engines)))

    def _check_bounds(self) -> None:
        config = self._config
        waiting = [s for s in self._live.values() if s.state is not State.RUNNING]
        assert self._waiting == len(waiting)
        assert self._waiting_bytes == sum(s.stage.payload_bytes for s in waiting)
        assert len(self._workflows) <= config.max_workflows >= len(self._closed)
        assert len(self._engines) <= config.max_engines
        assert len(self._answered) == len(self._answered_order) <= config.reply_keep
        assert self._answered_bytes == sum(size for _, size in self._answered.values())
        assert self._idle == {k: w for k, w in self._workflows.items() if not w.live}
        timed = self._answered or self._unplaced or self._idle or self._resting
        assert self._armed_s is not None or not timed
        if self._learned is not None:
            self._learned.check(self._workflows)

    def snapshot(self) -> dict[str, Any]:
        """What `chimera status` shows: plain values, safe to encode as JSON."""
        return {
            "policy": self._policy.name,
            "draining": self._draining,
            "idle_latency_s": self._cluster.idle_latency_s,
            "price": None if self._learned is None else self._learned.snapshot(),
            "workflows": len(self._workflows),
            "stages": {
                "waiting": self._waiting,
                "without_engine": len(self._unplaced),
                "running": len(self._attempts),
            },
            "counters": dict(self.counters),
            "models": [to_builtins(m.view) for m in self._models.values()],
            "engines": [_engine_row(e) for e in self._engines.values()],
        }


def _engine_row(engine: Engine) -> dict[str, Any]:
    return {
        "engine": engine.engine_id,
        "model": engine.model.view.name,
        "draining": engine.draining,
        "resting": engine.rests_until_s is not None,
        "running": len(engine.running),
        "max_inflight": engine.max_inflight,
        "predicted_tokens": engine.owed,
        "context_tokens": engine.context_tokens,
        "profile": to_builtins(engine.profile),
        "reported": to_builtins(engine.stats),
    }
