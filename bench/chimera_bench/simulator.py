"""A cluster in virtual time: the daemon's own scheduler core over simulated engines and clients.

Owns the clock, the heap of what is to come, and the daemon's part: it turns answers, heartbeats,
timers and faults into events for `Scheduler.handle` and carries the actions out. It decides
nothing, reads no clock and draws nothing at random: equal input gives equal output to the last bit.
What engines do is `sim_engine`'s part; what tasks need and what is predicted comes from the caller.

What a workflow needs depends on the model: each has its own `Run` of the task. A stage takes from
the run of the model that serves it; the last stage of that run ends the workflow. Where a workflow
changes models it goes on at the same stage number of the other's run, or at its last.

A client that sees its workflow fail may do the task again from the beginning, as a workflow of its
own (`Tries`), or take the daemon's advice that no model is worth it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any, NamedTuple, assert_never

from msgspec import Struct, field

from chimera_bench.sim_engine import SimEngine
from chimera_bench.sim_input import (
    EngineSetup,
    Fault,
    StageTruth,
    Workflow,
    check_engines,
    check_faults,
    check_policy,
    check_workflows,
)
from chimera_daemon.config import Config
from chimera_daemon.core import Scheduler
from chimera_daemon.messages import (
    AbortAttempt,
    Action,
    Attach,
    AttemptFailed,
    AttemptFinished,
    Dispatch,
    EngineLost,
    EngineRegistered,
    EngineReported,
    Event,
    Fail,
    Forget,
    Prediction,
    Reject,
    Replay,
    Reply,
    Stage,
    StageKey,
    StageSubmitted,
    Tries,
    Usage,
    WakeAt,
    Woke,
    WorkflowClosed,
    WorkflowEnded,
)
from chimera_daemon.prior import Predictor

_CLIENT = b"simulator"
_TRY = "~"  # between the id of a workflow and the number of a further try
_BYTES_PER_TOKEN = 4

Predict = Callable[[Stage], Prediction]
Outcome = Callable[[Workflow, Sequence[str]], float | None]


class StageRecord(Struct):
    """What became of a stage; models and times are those of the attempt that answered."""

    stage: int
    submitted_s: float
    prompt_tokens: int
    model: str = ""
    engine: str = ""
    attempts: int = 0
    dispatched_s: float = -1.0
    started_s: float = -1.0  # in a slot of the engine, after its own queue
    finished_s: float = -1.0
    output_tokens: int = 0

    @property
    def wait_s(self) -> float:
        """Seconds in queues: the core's, the engine's, and attempts lost."""
        return self.started_s - self.submitted_s


class WorkflowRecord(Struct):
    """What became of a workflow. ``error`` is why it has no outcome; empty: it has run through."""

    workflow_id: str
    kind: str
    arrival_s: float
    finish_s: float = -1.0
    success: float | None = None  # of its last try
    error: str = ""
    stages: list[StageRecord] = field(default_factory=list[StageRecord])  # of all tries
    tries: int = 1
    declined: bool = False  # its last try ended because a stage was declined

    @property
    def latency_s(self) -> float:
        """From arrival to the last answer, gaps included."""
        return self.finish_s - self.arrival_s

    @property
    def output_tokens(self) -> int:
        """Of all answered stages."""
        return sum(stage.output_tokens for stage in self.stages)

    @property
    def models(self) -> list[str]:
        """The model of each answered stage."""
        return [stage.model for stage in self.stages if stage.finished_s >= 0.0]


class EngineRecord(Struct):
    """What an engine has done, its incarnations together."""

    name: str
    model: str
    busy_s: float = 0.0
    utilisation: float = 0.0  # busy seconds / seconds of the whole simulation
    attempts: int = 0  # that were given a slot, each time
    preemptions: int = 0
    output_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    peak_running: int = 0
    peak_kv: int = 0


class Result(Struct):
    """The outcome of a simulation; workflows in the order of their input."""

    workflows: list[WorkflowRecord]
    engines: list[EngineRecord]
    span_s: float  # virtual seconds, from 0 to the end of the last workflow
    core_events: int  # calls of `Scheduler.handle`
    engine_events: int  # see `SimEngine.events`
    counters: dict[str, int]  # of the core

    @property
    def longest_wait_s(self) -> float:
        """Of any answered stage."""
        waits = (s.wait_s for w in self.workflows for s in w.stages if s.finished_s >= 0.0)
        return max(waits, default=0.0)


def mean_outcome(workflow: Workflow, models: Sequence[str]) -> float | None:
    """Success of a workflow whose stages these models ran: the mean over stages of their runs'.

    Nobody has seen a mixed run. This is as if the model of a stage drawn at random decided, so
    that a last stage on a good model does not redeem the others.
    """
    total = 0.0
    for model in models:
        success = workflow.runs[model].success
        if success is None:
            return None
        total += success
    return total / len(models)


def simulate(
    config: Config,
    engines: Sequence[EngineSetup],
    workflows: Sequence[Workflow],
    predict: Predict,
    *,
    observers: Sequence[Predictor] = (),
    faults: Sequence[Fault] = (),
    outcome: Outcome = mean_outcome,
    tries: int = 1,
    optional: bool = False,
    watch: Callable[[Scheduler, Iterable[SimEngine]], None] | None = None,
) -> Result:
    """Run all workflows to their ends under the policy of the configuration.

    A workflow that its client sees fail, with a success below one half, is done again until there
    have been ``tries``. Further tries may be declined; with ``optional`` any stage may be, which
    ends its try as a failure.

    ``predict`` is asked before a stage enters the core; ``observers`` are told what the daemon
    tells its predictors. ``watch`` sees the core and all engines after every event, for checks.
    Predictions take no time, messages what the engines' profiles say; stages do not stream. Raises
    `ValueError` for input that makes no sense, naming the place.
    """
    if tries < 1:
        raise ValueError(f"a task is tried at least once, not {tries} times")
    check_engines(engines)
    check_policy(config.policy, engines)
    check_workflows(workflows, engines)
    check_faults(faults, engines)
    clients = _Clients(outcome, tries, optional)
    return _Simulation(config, engines, workflows, predict, observers, clients, watch).run(faults)


def first_workflow_id(workflow_id: str) -> str:
    """Of the task that the workflow of this id is a try of."""
    return workflow_id.partition(_TRY)[0]


class _Host:
    """An engine host, as daemon and engine see it; the engine is new after every death."""

    __slots__ = ("setup", "engine", "incarnation", "alive", "known", "expected_s", "record")

    def __init__(self, setup: EngineSetup) -> None:
        self.setup = setup
        self.engine = SimEngine(setup.profile)
        self.incarnation = 0
        self.alive = False
        self.known = False  # to the core
        self.expected_s = inf  # the leap's end that is in the heap
        self.record = EngineRecord(setup.name, setup.model)


class _Clients(NamedTuple):
    """What they do about outcomes."""

    outcome: Outcome
    tries: int
    optional: bool


class _Flow:
    """A workflow under way: a task in one of its tries."""

    __slots__ = ("truth", "record", "workflow_id", "first", "failed", "context", "shared", "prefix")

    def __init__(self, truth: Workflow) -> None:
        self.truth = truth
        self.record = WorkflowRecord(truth.workflow_id, truth.kind, truth.arrival_s)
        self.failed: tuple[str, ...] = ()  # models of earlier tries
        self.begin(truth.workflow_id)

    def begin(self, workflow_id: str) -> None:
        """A try, from nothing."""
        self.workflow_id = workflow_id
        self.first = len(self.record.stages)  # of this try, among all stages
        self.context = self.truth.prompt_tokens  # of the next stage
        self.shared = 0  # of it, tokens that were the context of the last stage
        self.prefix = workflow_id  # names the context; another one, another name

    @property
    def models(self) -> list[str]:
        """Of this try's answered stages."""
        return [stage.model for stage in self.record.stages[self.first :] if stage.model]


class _Attempt:
    """A stage at an engine."""

    __slots__ = ("flow", "truth", "host", "dispatched_s", "attempts")

    def __init__(
        self, flow: _Flow, truth: StageTruth, host: _Host, dispatched_s: float, attempts: int
    ) -> None:
        self.flow = flow
        self.truth = truth
        self.host = host
        self.dispatched_s = dispatched_s
        self.attempts = attempts


class _Simulation:
    """One run. The heap holds (time, number, what to call, with what)."""

    def __init__(
        self,
        config: Config,
        engines: Sequence[EngineSetup],
        workflows: Sequence[Workflow],
        predict: Predict,
        observers: Sequence[Predictor],
        clients: _Clients,
        watch: Callable[[Scheduler, Iterable[SimEngine]], None] | None,
    ) -> None:
        self._core = Scheduler(config)
        self._beat_s = config.heartbeat_s
        self._predict = predict
        self._observers = observers
        self._clients = clients
        self._watch = watch
        self._now = 0.0
        self._numbers = count()
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._hosts = {setup.name: _Host(setup) for setup in engines}
        self._flows = [_Flow(workflow) for workflow in workflows]
        self._left = len(self._flows)
        self._stages: dict[StageKey, tuple[_Flow, Stage]] = {}
        self._attempts: dict[int, _Attempt] = {}
        self._touched: list[_Host] = []  # with a leap to plan at this instant
        self._events: deque[Event] = deque()
        self._answering: tuple[_Attempt, float] | None = None  # with the time it got its slot
        self._wake_s = inf
        self._core_events = 0
        self._engine_events = 0

    def run(self, faults: Sequence[Fault]) -> Result:
        """Until every workflow has ended."""
        for number, host in enumerate(self._hosts.values()):
            self._join(host)
            # Engines start at different times; their heartbeats do not come together.
            self._at(self._beat_s * number / len(self._hosts), self._beat, host)
        for fault in faults:
            self._at(fault.killed_s, self._kill, fault)
        for flow in self._flows:
            self._at(flow.truth.arrival_s, self._submit, flow)
        heap, touched = self._heap, self._touched
        while self._left:
            self._now, _, act, argument = heappop(heap)
            act(argument)
            while touched:
                self._settle(touched.pop())
        assert not self._stages, "a stage has neither answer nor error"
        assert not self._attempts, "an attempt outlives its workflow"
        for host in self._hosts.values():
            self._count(host)
            host.record.utilisation = host.record.busy_s / self._now if self._now else 0.0
        return Result(
            [flow.record for flow in self._flows],
            [host.record for host in self._hosts.values()],
            self._now,
            self._core_events,
            self._engine_events,
            dict(self._core.counters),
        )

    def _at(self, at_s: float, act: Callable[[Any], None], argument: Any) -> None:
        heappush(self._heap, (at_s, next(self._numbers), act, argument))

    # The daemon's part: events in, actions out.

    def _feed(self, event: Event) -> None:
        """Hand an event to the core and act; what its actions bring about comes after them."""
        events = self._events
        while True:
            self._core_events += 1
            for action in self._core.handle(event, self._now):
                self._act(action)
            if self._watch is not None:
                self._watch(self._core, [host.engine for host in self._hosts.values()])
            if not events:
                return
            event = events.popleft()

    def _act(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case Reply():
                self._answered(action)
            case Forget():
                pass
            case WakeAt():
                self._wake_s = action.at
                self._at(action.at, self._wake, action.at)
            case WorkflowEnded():
                for observer in self._observers:
                    observer.observe_workflow(action)
            case AbortAttempt():
                attempt = self._attempts.pop(action.attempt_id)
                attempt.host.engine.cancel(self._now, action.attempt_id)
                self._touched.append(attempt.host)
            case Fail() | Reject():
                flow, _ = self._stages.pop(action.key)
                if action.code == "declined":
                    self._declined(flow)
                else:
                    flow.record.error = action.code
                    self._end(flow, None)
            case Attach() | Replay():
                raise AssertionError("no request is repeated here")
            case _:
                assert_never(action)

    def _wake(self, at_s: float) -> None:
        if at_s == self._wake_s:
            self._wake_s = inf
            self._feed(Woke())

    # Clients.

    def _submit(self, flow: _Flow) -> None:
        truth, stages = flow.truth, flow.record.stages
        number, prompt = len(stages) - flow.first, flow.context
        stages.append(StageRecord(number, self._now, prompt))
        left = self._clients.tries - flow.record.tries
        stage = Stage(
            _CLIENT,
            f"{flow.workflow_id}/{number}",
            flow.workflow_id,
            number,
            truth.kind,
            None,
            prompt,
            truth.max_tokens,
            prompt * _BYTES_PER_TOKEN,
            number,
            tries=Tries(flow.failed, left) if left or flow.failed else None,
            optional=self._clients.optional or (bool(flow.failed) and not number),
        )
        self._stages[stage.key] = flow, stage
        self._feed(StageSubmitted(stage, self._predict(stage)))

    def _answered(self, reply: Reply) -> None:
        """A stage has its answer: its client goes on to the next one or ends the try."""
        assert self._answering is not None
        attempt, started_s = self._answering
        flow, stage = self._stages.pop(reply.key)
        assert flow is attempt.flow
        truth, record, model = attempt.truth, flow.record.stages[-1], reply.receipt.model
        assert record.finished_s < 0.0, "a stage was answered twice"
        record.model, record.engine = model, reply.engine_id
        record.attempts = attempt.attempts
        record.dispatched_s, record.started_s = attempt.dispatched_s, started_s
        record.finished_s, record.output_tokens = self._now, truth.output_tokens
        for observer in self._observers:
            observer.observe_stage(
                stage, model, Usage(stage.prompt_tokens, truth.output_tokens), None
            )
            if truth.verdict is not None:
                observer.observe_feedback(stage.workflow_id, stage.stage, truth.verdict)
        done = len(flow.record.stages) - flow.first
        if done >= len(flow.truth.runs[model].stages):
            self._tried(flow, model)
            return
        if truth.keeps_context:
            flow.shared = stage.prompt_tokens + truth.output_tokens
        else:
            flow.shared, flow.prefix = 0, f"{stage.workflow_id}/{done}"
        flow.context = flow.shared + truth.new_tokens
        self._at(self._now + truth.gap_s, self._submit, flow)

    def _tried(self, flow: _Flow, model: str) -> None:
        """A try has run through; this model had its last stage."""
        models, truth = flow.models, flow.truth
        success = self._clients.outcome(truth, models)
        left = self._clients.tries - flow.record.tries
        if success is None or success >= 0.5 or not left or model in truth.unseen:
            self._end(flow, success)
            return
        self._events.append(WorkflowClosed(flow.workflow_id, success))
        flow.failed = (*flow.failed, *dict.fromkeys(models))
        flow.begin(f"{truth.workflow_id}{_TRY}{flow.record.tries}")
        flow.record.tries += 1
        self._at(self._now, self._submit, flow)

    def _declined(self, flow: _Flow) -> None:
        """The client gives the task up; what has failed stays failed."""
        record = flow.record
        record.stages.pop()
        record.declined = True
        record.tries -= not flow.models
        self._end(flow, 0.0)

    def _end(self, flow: _Flow, success: float | None) -> None:
        record = flow.record
        assert record.finish_s < 0.0, "a workflow has ended twice"
        record.finish_s, record.success = self._now, success
        self._left -= 1
        self._events.append(WorkflowClosed(flow.workflow_id, success))

    # Engines.

    def _join(self, host: _Host) -> None:
        host.alive = host.known = True
        host.incarnation += 1
        setup = host.setup
        for observer in self._observers:
            observer.add_model(setup.model)
        self._feed(
            EngineRegistered(
                setup.name,
                host.incarnation,
                setup.model,
                setup.max_inflight or setup.profile.slots,
                setup.profile.context_tokens,
                setup.believed or setup.profile.believed(),
            )
        )

    def _dispatch(self, action: Dispatch) -> None:
        flow, stage = self._stages[action.key]
        host = self._hosts[action.engine_id]
        script = flow.truth.runs[action.receipt.model].stages
        truth = script[min(stage.stage, len(script) - 1)]
        attempt_id, now = action.attempt_id, self._now
        prompt, output = stage.prompt_tokens, truth.output_tokens
        refusal = host.setup.profile.refusal(prompt, output)
        if host.alive and refusal:
            self._events.append(AttemptFailed(attempt_id, "bad_request", refusal, False))
            return
        self._attempts[attempt_id] = _Attempt(flow, truth, host, now, action.receipt.attempts)
        if not host.alive:
            return  # the daemon will hear of it
        host.engine.submit(
            now, attempt_id, action.priority, prompt, output, flow.prefix, flow.shared
        )
        self._touched.append(host)

    def _settle(self, host: _Host) -> None:
        """Let the engine go on, and expect the end of its leap."""
        engine = host.engine
        engine.settle(self._now)
        if engine.ends_s != host.expected_s:
            host.expected_s = engine.ends_s
            if engine.ends_s < inf:
                self._at(engine.ends_s, self._leaped, host)

    def _leaped(self, host: _Host) -> None:
        """A leap has ended, unless it was shortened or the engine died meanwhile."""
        engine, now = host.engine, self._now
        if engine.ends_s != now or not host.alive:
            return
        attempts = self._attempts
        for finished in engine.complete():
            attempt_id = finished.attempt_id
            attempt = attempts.pop(attempt_id)
            prompt = attempt.flow.record.stages[-1].prompt_tokens
            tokens = finished.output_tokens
            self._answering = attempt, finished.started_s
            usage = Usage(prompt, tokens)
            self._feed(AttemptFinished(attempt_id, usage, tokens * _BYTES_PER_TOKEN))
        self._touched.append(host)

    def _beat(self, host: _Host) -> None:
        if host.alive:
            stats, progress = host.engine.report(self._now)
            self._feed(EngineReported(host.setup.name, host.incarnation, stats, progress))
        self._at(self._now + self._beat_s, self._beat, host)

    def _kill(self, fault: Fault) -> None:
        host = self._hosts[fault.engine]
        self._count(host)
        host.engine = SimEngine(host.setup.profile)
        host.expected_s = inf
        host.alive = False
        if fault.back_s < inf:
            self._at(fault.back_s, self._restart, host)
        self._at(self._now + fault.noticed_s, self._notice, (host, host.incarnation))

    def _notice(self, whose: tuple[_Host, int]) -> None:
        """The daemon takes the engine for lost, unless it did so because another one came."""
        host, incarnation = whose
        if host.incarnation != incarnation or not host.known:
            return
        host.known = False
        for attempt_id in [a for a, attempt in self._attempts.items() if attempt.host is host]:
            del self._attempts[attempt_id]
        self._feed(EngineLost(host.setup.name, incarnation, "killed by plan"))

    def _restart(self, host: _Host) -> None:
        self._notice((host, host.incarnation))
        self._join(host)

    def _count(self, host: _Host) -> None:
        """Add what an engine has done to its record, for good."""
        engine, record = host.engine, host.record
        record.busy_s += engine.busy_s
        record.attempts += engine.admissions
        record.preemptions += engine.preemptions
        record.output_tokens += engine.output_tokens
        record.prefilled_tokens += engine.prefilled_tokens
        record.cached_tokens += engine.cached_tokens
        record.peak_running = max(record.peak_running, engine.peak_running)
        record.peak_kv = max(record.peak_kv, engine.peak_kv)
        self._engine_events += engine.events
