"""Whatever happens in whatever order: the outside view of `core_harness` holds, nothing is lost."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chimera_daemon.config import PaperConfig
from chimera_daemon.messages import (
    AttemptStreamed,
    DrainStarted,
    ModelPrediction,
    Prediction,
    Profile,
    Tries,
    WorkflowClosed,
)
from core_harness import POLICIES, PROFILE, Watched

ENGINES = st.sampled_from("abcd")
MODELS = st.sampled_from(["small", "large"])
CLIENTS = st.sampled_from([b"one", b"two"])
TOKENS = st.sampled_from([0.0, 0.3, 1.0, 40.0, 100.0, 1e7]) | st.floats(0.0, 1e4)
QUANTILES = st.tuples(TOKENS, TOKENS, TOKENS).map(lambda t: tuple(sorted(t)))
PREDICTED = st.builds(
    ModelPrediction, st.floats(0.0, 1.0), TOKENS, QUANTILES, TOKENS, QUANTILES, st.floats(0.0, 5.0)
)
PREDICTIONS = st.builds(
    Prediction,
    st.dictionaries(MODELS, PREDICTED, max_size=2),
    PREDICTED,
    st.sampled_from(["prior", "learned", "fallback"]),
)
PROFILES = st.sampled_from([PROFILE, Profile(), Profile(0.0, 0.0, 0.0), Profile(1e9, 1e9, 1e9)])
JUMPS = st.sampled_from([0.0, 1e-9, 0.01, 1.0, 61.0, 121.0, 3601.0, 1e9]) | st.floats(0.0, 10.0)

busy = precondition(lambda self: self.watched.attempts)


class Machine(RuleBasedStateMachine):
    """Clients, engines and clocks that do what they like."""

    policy = "chimera"

    @initialize(
        attempts=st.integers(1, 3),
        queued=st.sampled_from([2, 6, 1000]),
        workflows=st.sampled_from([1, 3, 1000]),
        kept=st.sampled_from([1, 5, 1000]),
        kept_bytes=st.sampled_from([1, 100, 1 << 20]),
        rounds=st.sampled_from([1, 2, 200]),
        engines=st.sampled_from([1, 3, 100]),
        target_s=st.sampled_from([0.0, 0.5, 60.0]),
    )
    def start(
        self,
        attempts: int,
        queued: int,
        workflows: int,
        kept: int,
        kept_bytes: int,
        rounds: int,
        engines: int,
        target_s: float,
    ) -> None:
        self.watched = Watched(
            policy=self.policy,
            max_attempts=attempts,
            max_queued_stages=queued,
            max_queued_bytes=5 * queued,
            max_workflows=workflows,
            reply_keep=kept,
            reply_keep_bytes=kept_bytes,
            max_engines=engines,
            p95_target_s=target_s,
            paper=PaperConfig(starvation_rounds=rounds, service_rounds=rounds),
        )
        self.submitted: list[tuple[Prediction, dict[str, Any]]] = []
        self.past: list[int] = []

    def _attempt(self, data: st.DataObject) -> int:
        attempt_id = data.draw(st.sampled_from(sorted(self.watched.attempts)), label="attempt")
        self.past.append(attempt_id)
        return attempt_id

    @rule(
        predicted=PREDICTIONS,
        client_id=CLIENTS,
        workflow=st.integers(0, 4),
        model=st.none() | st.sampled_from(["small", "large", "never"]),
        prompt_tokens=st.sampled_from([0, 100, 10_000_000]),
        max_tokens=st.sampled_from([1, 100, 1_000_000]),
        payload_bytes=st.integers(0, 10),
        stream=st.booleans(),
        restart=st.booleans(),
        optional=st.booleans(),
        last=st.booleans(),
        tries=st.none() | st.builds(Tries, st.sampled_from([(), ("small",)]), st.integers(0, 1)),
    )
    def submit(self, predicted: Prediction, workflow: int, **fields: Any) -> None:
        fields["workflow_id"] = f"w{workflow}"
        fields["request_id"] = f"q{len(self.submitted)}"
        self.submitted.append((predicted, fields))
        self.watched.submit(predicted, **fields)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), digest=st.sampled_from([1, 1, 2]))
    def submit_again(self, data: st.DataObject, digest: int) -> None:
        predicted, fields = data.draw(st.sampled_from(self.submitted[-8:]))
        self.watched.submit(predicted, **fields, digest=digest)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        _, fields = data.draw(st.sampled_from(self.submitted[-8:]))
        self.watched.cancel(fields["request_id"], fields["client_id"])

    @rule(workflow=st.integers(0, 5), success=st.sampled_from([None, 0.0, 1.0]))
    def close(self, workflow: int, success: float | None) -> None:
        self.watched.handle(WorkflowClosed(f"w{workflow}", success))

    @busy
    @rule(data=st.data(), tokens=st.sampled_from([0, 1, 50, 10_000_000]), size=st.integers(0, 60))
    def finish(self, data: st.DataObject, tokens: int, size: int) -> None:
        self.watched.finish(self._attempt(data), tokens, size)

    @busy
    @rule(
        data=st.data(),
        retryable=st.booleans(),
        pause_s=st.sampled_from([None, None, 0.0, 0.2, 3.0, 1e9]),
    )
    def fail(self, data: st.DataObject, retryable: bool, pause_s: float | None) -> None:
        self.watched.fail(self._attempt(data), retryable, pause_s)

    @busy
    @rule(data=st.data())
    def stream(self, data: st.DataObject) -> None:
        self.watched.handle(AttemptStreamed(self._attempt(data)))

    @precondition(lambda self: self.past)
    @rule(data=st.data(), how=st.sampled_from(["finish", "fail", "stream"]))
    def answer_late_or_twice(self, data: st.DataObject, how: str) -> None:
        attempt_id = data.draw(st.sampled_from([*self.past[-5:], 10**9]))
        if how == "finish":
            self.watched.finish(attempt_id)
        elif how == "fail":
            self.watched.fail(attempt_id)
        else:
            self.watched.handle(AttemptStreamed(attempt_id))

    @rule(
        engine_id=ENGINES,
        model=MODELS,
        slots=st.integers(1, 3),
        incarnation=st.sampled_from([1, 1, 1, 2, 3]),
        context_tokens=st.sampled_from([0, 150, 4096]),
        profile=PROFILES,
    )
    def join(self, **fields: Any) -> None:
        self.watched.join(**fields)

    @rule(engine_id=ENGINES, incarnation=st.sampled_from([1, 1, 2]))
    def lose(self, engine_id: str, incarnation: int) -> None:
        running = getattr(self.watched.engines.get(engine_id), "running", ())
        self.past.extend(running)
        self.watched.lose(engine_id, incarnation)

    @rule(engine_id=ENGINES, incarnation=st.sampled_from([1, 1, 2]))
    def drain_engine(self, engine_id: str, incarnation: int) -> None:
        self.watched.drain_engine(engine_id, incarnation)

    @rule(
        engine_id=ENGINES,
        produced=st.sampled_from([0, 1, 60, 5000, 10_000_000]),
        running=st.integers(0, 5),
        waiting=st.integers(0, 5),
    )
    def report(self, engine_id: str, produced: int, running: int, waiting: int) -> None:
        progress = dict.fromkeys([*self.watched.attempts, *self.past[-3:]], produced)
        self.watched.report(engine_id, progress, running=running, waiting=waiting)

    @rule(
        engines=st.dictionaries(ENGINES, st.integers(0, 4)),
        small=st.tuples(st.integers(0, 9), TOKENS, st.integers(0, 9)),
        large=st.tuples(st.integers(0, 9), TOKENS, st.integers(0, 9)),
    )
    def peers(self, engines: dict[str, int], **models: tuple[int, float, int]) -> None:
        self.watched.peers(engines, **models)

    @rule(seconds=JUMPS, late=st.booleans())
    def time_passes(self, seconds: float, late: bool) -> None:
        if late:  # the shell was busy: everything comes due at once
            self.watched.now += seconds
            if self.watched.wake_at is not None and self.watched.wake_at <= self.watched.now:
                self.watched.wake()
        else:
            self.watched.sleep(seconds)

    @precondition(lambda self: self.watched.wake_at is not None)
    @rule()
    def wake(self) -> None:
        self.watched.wake()

    @rule(sure=st.integers(0, 9))
    def drain(self, sure: int) -> None:
        if sure == 0:
            self.watched.handle(DrainStarted())

    def teardown(self) -> None:
        if not hasattr(self, "watched"):
            return
        self.watched.finish_all()
        self.watched.assert_replays()
        self.watched.sleep(1e9)
        assert not self.watched.kept, "answers were kept for ever"
        assert self.watched.core.snapshot()["workflows"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_or_done_twice_whatever_happens(policy: str) -> None:
    machine = type("Machine", (Machine,), {"policy": policy})
    examples = settings.default.max_examples if settings.default else 100
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=50, deadline=None)
    )
