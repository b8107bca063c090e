"""The core's contract, sentence by sentence. Each test ends by emptying and replaying the core."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from chimera_daemon.config import EngineConfig, ModelConfig, PaperConfig
from chimera_daemon.core import Scheduler
from chimera_daemon.messages import (
    AbortAttempt,
    Attach,
    AttemptStreamed,
    Dispatch,
    DrainStarted,
    Fail,
    Forget,
    Profile,
    Reject,
    Replay,
    Reply,
    StageCancelled,
    StageOutcome,
    Tries,
    WakeAt,
    Woke,
    WorkflowClosed,
    WorkflowEnded,
)
from core_harness import POLICIES, Watched, dispatched, of, predict, prediction

Make = Callable[..., Watched]


def refused(actions: list[Any]) -> Reject:
    """The one action is a refusal."""
    (action,) = actions
    assert isinstance(action, Reject)
    return action


# One door in, one list out.


def test_a_stage_is_dispatched_and_its_answer_is_the_reply(scheduler: Make) -> None:
    s = scheduler()
    assert s.join("e", slots=2) == []
    (sent,) = of(s.submit(), Dispatch)
    s.now = 2.0
    (reply,) = of(s.finish(sent.attempt_id, tokens=40), Reply)
    assert (reply.key, reply.engine_id) == ((b"client", "r1"), "e")


def test_time_that_goes_back_is_refused_and_changes_nothing() -> None:
    core = Scheduler(Watched().config)
    core.handle(Woke(), 5.0)
    for earlier in (4.999, float("-inf"), float("nan")):
        with pytest.raises(ValueError, match="time went back"):
            core.handle(DrainStarted(), earlier)
    assert not core.snapshot()["draining"]
    core.handle(Woke(), 5.0)


def test_the_first_attempt_has_the_number_that_was_asked_for() -> None:
    s = Watched()
    s.core = Scheduler(s.config, first_attempt=1000)
    s.join()
    assert of(s.submit(), Dispatch)[0].attempt_id == 1000


def test_the_same_events_give_the_same_actions(scheduler: Make) -> None:
    s = scheduler(max_attempts=2)
    s.join("a", slots=2)
    s.join("b", "large", slots=1)
    for number in range(12):
        s.now += 0.1
        s.submit(prediction(small=predict(10.0 * number), large=predict(30.0, 0.9)))
        if number % 3 == 0:
            s.fail(min(s.attempts))
    s.lose("a")
    s.sleep(500.0)
    s.assert_replays()


def test_timers_are_actions_and_the_next_one_is_asked_for_after_waking(scheduler: Make) -> None:
    s = scheduler(reply_keep_s=60.0, workflow_idle_s=1000.0)
    s.join()
    s.submit()
    assert of(s.finish(1), WakeAt) == [WakeAt(60.0)]
    assert s.wake() == [Forget((b"client", "r1")), WakeAt(1000.0)]
    assert of(s.wake(), WorkflowEnded, WakeAt) == [WorkflowEnded("w1", "code", None, (
        StageOutcome(0, "small", 100, 50),
    ))]  # fmt: skip


def test_an_early_or_needless_wake_is_harmless(scheduler: Make) -> None:
    s = scheduler()
    assert s.handle(Woke()) == []
    s.join()
    s.submit()
    s.finish(1)
    assert s.handle(Woke()) == [WakeAt(60.0)]


def test_timers_close_to_each_other_share_one_wake(scheduler: Make) -> None:
    s = scheduler()
    s.join(slots=100)
    for _ in range(100):
        s.submit()
    for attempt_id in list(s.attempts):
        s.now += 1e-5
        s.finish(attempt_id)
    wakes = 0
    while s.kept:
        s.wake()
        wakes += 1
    assert wakes == 2


def test_ties_break_by_arrival_number(scheduler: Make) -> None:
    for policy in POLICIES:
        s = scheduler(policy=policy)
        s.join()
        for _ in range(20):
            s.submit()
        order = [dispatched(s.finish(number))[0][0] for number in range(1, 20)]
        assert order == [f"r{number}" for number in range(2, 21)], policy


# Where work waits.


def test_an_engine_never_has_more_than_max_inflight_attempts(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", slots=3)
    s.join("b", slots=1)
    for _ in range(9):
        s.submit()
    assert {n: len(e.running) for n, e in s.engines.items()} == {"a": 3, "b": 1}


def test_order_is_open_until_a_slot_frees(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit()
    s.submit(prediction(small=predict(500.0)))
    s.submit(prediction(small=predict(5.0)))
    assert dispatched(s.finish(1)) == [("r3", "e")]


def test_the_engine_is_open_until_a_slot_frees(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    s.join("b")
    for _ in range(4):
        s.submit()
    assert dispatched(s.finish(2)) == [("r3", "b")]
    assert dispatched(s.finish(1)) == [("r4", "a")]


def test_a_waiting_stage_takes_the_slots_of_an_engine_that_joins(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    for _ in range(4):
        s.submit()
    assert dispatched(s.join("b", slots=2)) == [("r2", "b"), ("r3", "b")]


def test_the_model_is_chosen_anew_when_its_last_engine_leaves(scheduler: Make) -> None:
    for leave in ("lose", "drain_engine"):
        s = scheduler(policy="least_loaded")
        s.join("a", "small")
        s.join("b", "large", slots=8)
        s.submit(model="small")
        s.submit(model="small")
        for _ in range(6):
            s.submit()
        waiting = [k[1] for k, seen in s.open.items() if seen.attempt_id is None]
        assert len(waiting) > 1
        moved = [name for name, _ in dispatched(getattr(s, leave)("a"))]
        assert [name for name in waiting if name != "r2"] == [m for m in moved if m != "r1"]


def test_a_stage_that_moved_to_another_model_waits_there_only(scheduler: Make) -> None:
    s = scheduler(price=0.0)
    for model in ("small", "large"):
        s.join(model, model)
        s.submit(model=model)
    for _ in range(3):
        s.submit(prediction(small=predict(100.0, 0.9), large=predict(100.0, 0.1)))
    s.drain_engine("small")
    s.join("again", "small")
    s.submit(model="small")
    s.submit(model="small")
    assert dispatched(s.finish(s.last_attempt)) == [("r7", "again")]


def test_a_workflow_goes_back_to_the_engine_that_has_its_prefix(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", slots=4)
    s.join("b", slots=4)
    (first,) = of(s.submit(workflow_id="w"), Dispatch)
    for _ in range(3):
        s.submit()
    s.finish(first.attempt_id)
    assert dispatched(s.submit(workflow_id="w", stage=1)) == [("r5", first.engine_id)]


@pytest.mark.parametrize(("tokens", "sent"), [(101.0, "other"), (102.0, "follower")])
def test_a_freed_slot_goes_to_a_longer_stage_if_less_than_a_prefix_is_longer(
    scheduler: Make, tokens: float, sent: str
) -> None:
    """To read 150 tokens again takes this engine as long as to write 1.4."""
    s = scheduler()
    s.join("a")
    s.join("b")
    (at_a,) = of(s.submit(workflow_id="w"), Dispatch)
    (at_b,) = of(s.submit(), Dispatch)
    s.finish(at_a.attempt_id)
    assert dispatched(s.submit(request_id="blocks")) == [("blocks", "a")]
    s.submit(prediction(small=predict(100.0)), workflow_id="w", stage=1, request_id="follower")
    s.submit(prediction(small=predict(tokens)), request_id="other")
    assert dispatched(s.finish(at_b.attempt_id)) == [(sent, "b")]


def test_a_declined_stage_has_its_answer_and_leaves_nothing_behind(scheduler: Make) -> None:
    s = scheduler(price=10.0)
    s.join("e")
    (refusal,) = of(s.submit(workflow_id="w", optional=True), Fail)
    assert (refusal.key[1], refusal.code, refusal.retryable) == ("r1", "declined", False)
    assert "worth" in refusal.message
    assert of(s.submit(workflow_id="w", optional=True, request_id="r1"), Replay)
    (sent,) = of(s.submit(workflow_id="w"), Dispatch)  # an engine is free, the workflow goes on
    assert of(s.finish(sent.attempt_id), Reply)


@pytest.mark.parametrize("why", ["pinned", "another policy", "no engine"])
def test_what_is_no_matter_of_worth_is_not_declined(scheduler: Make, why: str) -> None:
    s = scheduler(price=10.0, policy="least_loaded" if why == "another policy" else "chimera")
    if why != "no engine":
        s.join("e")
    model = "small" if why == "pinned" else None
    actions = s.submit(optional=True, model=model, tries=Tries(("small",)))
    assert not of(actions, Fail)
    assert bool(of(actions, Dispatch)) == (why != "no engine")


def test_an_optional_stage_that_lost_its_engine_may_be_declined_then(scheduler: Make) -> None:
    s = scheduler(price=0.1)
    s.join("e")
    s.join("slow", "large", profile=Profile(100.0, 0.0, 0.0))
    assert dispatched(s.submit(optional=True)) == [("r1", "e")]
    assert [f.code for f in of(s.lose("e"), Fail)] == ["declined"]


def test_a_stage_goes_to_the_engine_that_owes_fewest_tokens(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", slots=4)
    s.join("b", slots=4)
    s.submit(prediction(small=predict(100.0)))
    s.submit(prediction(small=predict(30.0)))
    assert dispatched(s.submit()) == [("r3", "b")]
    s.report("a", {1: 95})
    assert dispatched(s.submit()) == [("r4", "a")]


def test_the_priority_passed_on_orders_like_the_queue(scheduler: Make) -> None:
    s = scheduler(aging_tokens_per_s=10.0)
    s.join(slots=3)
    s.now = 7.0
    sizes = (50.0, 500.0, 5.0)
    sent = [of(s.submit(prediction(small=predict(size))), Dispatch)[0] for size in sizes]
    assert [d.priority for d in sent] == [120, 570, 75]


def test_a_starved_stage_keeps_its_level_in_the_priority_passed_on(scheduler: Make) -> None:
    s = scheduler(policy="paper", paper=PaperConfig(starvation_rounds=2))
    s.join()
    s.submit()
    s.submit(prediction(small=predict(900.0)))
    for _ in range(2):
        s.submit(prediction(small=predict(1.0)))
    assert dispatched(s.finish(1)) == [("r3", "e")]
    assert dispatched(s.finish(2)) == [("r4", "e")]
    s.submit(prediction(small=predict(1.0)))
    (sent,) = of(s.finish(3), Dispatch)
    assert (sent.key[1], sent.priority) == ("r2", 900 - 10_000_000)


def test_a_model_whose_engines_cannot_hold_the_stage_is_passed_over(scheduler: Make) -> None:
    s = scheduler(policy="least_loaded")
    s.join("a", "small", context_tokens=1000, slots=2)
    s.join("b", "large", context_tokens=8000, slots=2)
    assert dispatched(s.submit(prompt_tokens=1000, max_tokens=1)) == [("r1", "b")]
    assert dispatched(s.submit(prompt_tokens=999, max_tokens=1)) == [("r2", "a")]
    # Prompt sizes may be estimates: none seems large enough, so an engine is to judge.
    assert dispatched(s.submit(prompt_tokens=9000, max_tokens=1)) == [("r3", "a")]


def test_a_policy_that_knows_one_model_only_may_use_it_for_any_size(scheduler: Make) -> None:
    s = scheduler(policy="static:small")
    s.join("a", "small", context_tokens=10)
    s.join("b", "large")
    assert dispatched(s.submit()) == [("r1", "a")]


# Nothing is lost or done twice.


def test_attempt_numbers_only_rise_and_every_answer_names_its_attempt(scheduler: Make) -> None:
    s = scheduler(max_attempts=9)
    s.join("a", slots=2)
    s.submit()
    numbers = [of(s.fail(s.last_attempt), Dispatch)[0].attempt_id for _ in range(5)]
    assert numbers == [2, 3, 4, 5, 6]
    assert of(s.finish(6), Reply)[0].attempt_id == 6


def test_late_answers_of_a_lost_attempt_are_dropped(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    s.submit()
    s.lose("a")
    assert s.finish(1) == []
    s.join("b")
    assert s.fail(1) == []
    s.handle(AttemptStreamed(1))
    assert s.core.counters["late_answers"] == 2
    assert of(s.finish(2), Reply)


def test_a_duplicate_finish_is_a_no_op(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit()
    assert of(s.finish(1), Reply)
    assert s.finish(1) == []
    assert s.fail(1) == []
    assert s.finish(12345) == []


def test_a_duplicate_registration_is_a_no_op(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    s.submit()
    assert s.join("a", slots=7) == []
    assert s.core.counters["engines_registered"] == 1
    assert s.core.has_engine("a", 1)
    assert not s.core.has_engine("a", 2)


def test_a_lost_engine_requeues_its_attempts_elsewhere(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", slots=2)
    s.submit()
    s.submit()
    s.join("b", slots=2)
    assert dispatched(s.lose("a")) == [("r1", "b"), ("r2", "b")]


def test_an_engine_that_is_lost_for_the_last_time_fails_the_stage_retryably(
    scheduler: Make,
) -> None:
    s = scheduler(max_attempts=2)
    for engine_id in "ab":
        s.join(engine_id)
    s.submit()
    assert dispatched(s.lose("a")) == [("r1", "b")]
    (failed,) = of(s.lose("b"), Fail)
    assert (failed.code, failed.retryable) == ("engine_lost", True)
    assert "attempt 2, the last" in failed.message


def test_losing_an_unknown_engine_or_an_earlier_incarnation_is_a_no_op(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", incarnation=2)
    s.submit()
    assert s.lose("a", 1) == s.lose("b") == s.drain_engine("a", 1) == []
    assert s.core.has_engine("a", 2)


def test_a_new_incarnation_replaces_the_engine_and_takes_its_stages(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", slots=2)
    s.submit()
    s.submit()
    assert dispatched(s.join("a", slots=1, incarnation=2)) == [("r1", "a")]
    assert dispatched(s.finish(3)) == [("r2", "a")]


def test_a_new_incarnation_may_serve_another_model(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", "small")
    s.submit()
    s.submit(model="small")
    assert dispatched(s.join("a", "large", incarnation=2)) == [("r1", "a")]
    assert s.core.snapshot()["stages"]["without_engine"] == 1


def test_a_failed_stage_tries_another_engine_first(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    s.join("b")
    assert dispatched(s.submit()) == [("r1", "a")]
    assert dispatched(s.fail(1)) == [("r1", "b")]


def test_a_failed_stage_leaves_the_slot_to_the_next_while_other_engines_are_full(
    scheduler: Make,
) -> None:
    s = scheduler()
    s.join("a")
    s.join("b")
    for _ in range(4):
        s.submit()
    assert dispatched(s.fail(1)) == [("r3", "a")]
    assert dispatched(s.finish(2)) == [("r1", "b")]


def test_a_failed_stage_does_not_pass_those_that_rank_before_it(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit(prediction(small=predict(500.0)))
    s.submit(prediction(small=predict(5.0)))
    assert dispatched(s.fail(1)) == [("r2", "e")]


def test_a_failed_stage_runs_on_the_same_engine_if_there_is_no_other(scheduler: Make) -> None:
    s = scheduler(max_attempts=2)
    s.join()
    s.submit()
    assert dispatched(s.fail(1)) == [("r1", "e")]
    (failed,) = of(s.fail(2), Fail)
    assert (failed.code, failed.retryable) == ("engine_error", True)


def test_an_engine_that_wants_a_pause_has_one(scheduler: Make) -> None:
    s = scheduler(max_attempts=3)
    s.join(slots=2)
    for _ in range(3):
        s.submit()
    assert not dispatched(s.fail(1, retry_after_s=2.0))
    assert not dispatched(s.finish(2))  # what runs goes on, and its slot stays free
    assert not dispatched(s.sleep(1.9))
    assert s.core.snapshot()["engines"][0]["resting"]
    assert dispatched(s.sleep(0.2)) == [("r1", "e"), ("r3", "e")]
    assert not s.core.snapshot()["engines"][0]["resting"]
    assert s.core.snapshot()["counters"]["rests"] == 1


def test_during_a_pause_others_serve(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", "large")
    s.join("b", "small")
    assert dispatched(
        s.submit(prediction(large=predict(confidence=0.9), small=predict(confidence=0.1)))
    ) == [("r1", "a")]
    assert dispatched(s.fail(1, retry_after_s=60.0)) == [("r1", "b")]
    pinned = s.submit(model="large")
    assert not dispatched(pinned)
    assert not dispatched(s.sleep(29.0))
    assert dispatched(s.sleep(2.0)) == [("r2", "a")]  # nobody rests for longer


def test_the_last_failure_says_when_to_come_back(scheduler: Make) -> None:
    s = scheduler(max_attempts=1)
    s.join()
    s.submit()
    (failed,) = of(s.fail(1, retry_after_s=2.5), Fail)
    assert (failed.retryable, failed.retry_after_s) == (True, 2.5)


def test_a_long_prompt_waits_for_an_engine_that_rests(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", "small", context_tokens=1000)
    s.join("b", "large", context_tokens=100_000)
    long: dict[str, Any] = {"prompt_tokens": 50_000, "max_tokens": 100}
    assert dispatched(s.submit(**long)) == [("r1", "b")]
    assert not dispatched(s.fail(1, retry_after_s=2.0))
    assert not dispatched(s.submit(**long))
    assert dispatched(s.submit(prompt_tokens=10, max_tokens=10)) == [("r3", "a")]
    assert dispatched(s.sleep(3.0)) == [("r1", "b")]


def test_what_waits_for_an_engine_that_rests_goes_elsewhere_unless_it_is_pinned(
    scheduler: Make,
) -> None:
    s = scheduler()
    s.join("a", "large")
    s.join("b", "small", slots=4)
    better = prediction(large=predict(confidence=0.9), small=predict(confidence=0.1))
    s.submit(better)
    s.submit(better)
    s.submit(better, model="large")
    assert dispatched(s.fail(1, retry_after_s=20.0)) == [("r2", "b"), ("r1", "b")]
    assert dispatched(s.sleep(21.0)) == [("r3", "a")]


def test_a_stage_does_not_avoid_the_only_engine_that_is_awake(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    s.join("b")
    for _ in range(5):
        s.submit()
    s.fail(2, retry_after_s=30.0)  # r2 at b
    ran = [*dispatched(s.fail(1))]
    for attempt_id in range(3, 7):
        ran += dispatched(s.finish(attempt_id))
    assert {engine for _, engine in ran} == {"a"}
    assert [request for request, _ in ran][:2] in (["r1", "r2"], ["r2", "r1"])


def test_the_advice_is_no_longer_than_the_pause(scheduler: Make) -> None:
    s = scheduler(max_attempts=1)
    s.join()
    s.submit()
    (failed,) = of(s.fail(1, retry_after_s=3600.0), Fail)
    assert failed.retry_after_s == 30.0
    s.sleep(31.0)
    s.submit()
    (failed,) = of(s.fail(2, retryable=False, retry_after_s=5.0), Fail)
    assert failed.retry_after_s is None


def test_an_engine_may_be_lost_while_it_rests(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit()
    s.fail(1, retry_after_s=1.0)
    s.lose("e")
    assert dispatched(s.join(incarnation=2)) == [("r1", "e")]
    assert not dispatched(s.sleep(2.0))


def test_a_failure_that_cannot_be_mended_is_not_tried_again(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit()
    (failed,) = of(s.fail(1, retryable=False), Fail)
    assert (failed.code, failed.message, failed.retryable) == ("engine_error", "broken", False)


def test_a_repeated_request_attaches_to_the_first(scheduler: Make) -> None:
    s = scheduler()
    assert of(s.submit(request_id="x"), Attach, Dispatch) == []  # no engine yet
    assert s.submit(request_id="x") == [Attach((b"client", "x"))]
    s.join()
    assert s.submit(request_id="x") == [Attach((b"client", "x"))]
    s.submit(request_id="y")
    assert s.submit(request_id="y") == [Attach((b"client", "y"))]


def test_a_repeated_request_is_replayed_while_its_answer_is_kept(scheduler: Make) -> None:
    s = scheduler(reply_keep_s=10.0)
    s.join()
    s.submit(request_id="x")
    s.finish(1)
    s.now = 9.0
    assert s.submit(request_id="x") == [Replay((b"client", "x"))]
    s.sleep(2.0)
    assert dispatched(s.submit(request_id="x")) == [("x", "e")]


def test_a_request_id_with_another_body_is_a_conflict(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    for _ in range(2):
        s.submit(request_id="x", digest=1)
        reject = refused(s.submit(request_id="x", digest=2))
        assert (reject.code, reject.retry_after_s) == ("conflict", None)
        s.finish(1)


def test_request_ids_are_unique_per_client_only(scheduler: Make) -> None:
    s = scheduler()
    s.join(slots=2)
    sent = [of(s.submit(request_id="x", client_id=c, digest=d), Dispatch) for c, d in
            ((b"a", 1), (b"b", 2))]  # fmt: skip
    assert all(sent)


@pytest.mark.parametrize("state", ["unplaced", "queued", "running", "streamed"])
def test_cancel_ends_a_stage_in_every_state(scheduler: Make, state: str) -> None:
    s = scheduler()
    if state != "unplaced":
        s.join()
    if state == "queued":
        s.submit(request_id="before")
    s.submit(request_id="x")
    if state == "streamed":
        s.handle(AttemptStreamed(1))
    failed, *rest = of(s.cancel("x"), Fail, AbortAttempt)
    assert (failed.code, failed.retryable) == ("cancelled", False)
    assert rest == ([AbortAttempt("e", 1)] if state in ("running", "streamed") else [])
    assert s.cancel("x") == []


def test_cancel_of_what_is_done_or_unknown_is_a_no_op(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit(request_id="x")
    s.finish(1)
    assert s.cancel("x") == s.cancel("never") == s.cancel("x", b"stranger") == []


def test_a_cancelled_attempt_gives_its_slot_to_the_next(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit()
    s.submit()
    assert dispatched(s.cancel("r1")) == [("r2", "e")]
    assert s.finish(1) == []


def test_a_cancel_says_why(scheduler: Make) -> None:
    s = scheduler()
    s.submit(request_id="x")
    (failed,) = of(s.handle(StageCancelled((b"client", "x"), "slow_reader", "did not read")), Fail)
    assert (failed.code, failed.message) == ("slow_reader", "did not read")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("how", ["lose", "fail"])
def test_a_stage_that_has_streamed_fails_retryably_unless_it_may_restart(
    scheduler: Make, restart: bool, how: str
) -> None:
    s = scheduler()
    s.join("a")
    s.submit(stream=True, restart=restart)
    s.handle(AttemptStreamed(1))
    s.join("b")
    actions = s.lose("a") if how == "lose" else s.fail(1)
    if restart:
        assert dispatched(actions) == [("r1", "b")]
    else:
        (failed,) = of(actions, Fail)
        assert failed.code == ("engine_lost" if how == "lose" else "engine_error")
        assert failed.retryable


def test_a_stream_that_has_shown_nothing_yet_is_requeued(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    s.submit(stream=True)
    s.join("b")
    assert dispatched(s.lose("a")) == [("r1", "b")]


def test_a_draining_engine_takes_no_more_and_finishes_what_it_has(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    s.submit()
    s.submit()
    assert dispatched(s.drain_engine("a")) == []
    assert s.drain_engine("a") == []
    assert of(s.finish(1), Reply)
    assert dispatched(s.join("b")) == [("r2", "b")]


def test_a_draining_engine_that_is_lost_gives_back_what_it_had(scheduler: Make) -> None:
    s = scheduler()
    s.join("a")
    s.submit()
    s.drain_engine("a")
    s.join("b")
    assert dispatched(s.lose("a")) == [("r1", "b")]


# Everything is bounded.


def test_queued_stages_are_bounded(scheduler: Make) -> None:
    s = scheduler(max_queued_stages=2)
    s.join()
    for _ in range(3):
        s.submit()
    reject = refused(s.submit())
    assert (reject.code, reject.message) == ("overloaded", "2 stages wait already")
    assert reject.retry_after_s
    s.finish(1)
    assert not of(s.submit(), Reject)


def test_queued_bytes_are_bounded(scheduler: Make) -> None:
    s = scheduler(max_queued_bytes=100)
    s.join()
    s.submit(payload_bytes=100)  # runs: it does not wait
    s.submit(payload_bytes=60)
    assert refused(s.submit(payload_bytes=41)).code == "overloaded"
    s.submit(payload_bytes=40)


def test_a_refusal_says_when_a_tenth_of_the_work_should_be_done(scheduler: Make) -> None:
    s = scheduler(max_queued_stages=10)
    profile = Profile(step_s=0.0, step_per_seq_s=0.01, prefill_s_per_token=0.0)
    s.join(slots=4, profile=profile)  # 100 tokens/s
    for _ in range(14):
        s.submit(prediction(small=predict(300.0)))
    assert refused(s.submit()).retry_after_s == pytest.approx(3.0)


def test_attempts_are_bounded(scheduler: Make) -> None:
    s = scheduler(max_attempts=3)
    s.join()
    s.submit()
    assert not of(s.fail(1), Fail)
    assert not of(s.fail(2), Fail)
    assert of(s.fail(3), Fail)
    assert s.core.counters["requeued"] == 2


def test_workflows_are_bounded_while_all_are_at_work(scheduler: Make) -> None:
    s = scheduler(max_workflows=2)
    s.join(slots=9)
    s.submit(workflow_id="a")
    s.submit(workflow_id="b")
    reject = refused(s.submit(workflow_id="c"))
    assert (reject.code, reject.message) == ("overloaded", "2 workflows are at work")
    assert reject.retry_after_s
    s.submit(workflow_id="a")


def test_the_workflow_that_is_idle_longest_gives_way_to_a_new_one(scheduler: Make) -> None:
    s = scheduler(max_workflows=102)
    s.join(slots=200)
    for number in range(100):  # at work, and before the idle ones in every order
        s.submit(workflow_id=f"busy{number}")
    s.submit(workflow_id="late")
    s.submit(workflow_id="early")
    s.finish(102)
    s.finish(101)
    ended = of(s.submit(workflow_id="new"), WorkflowEnded)
    assert [e.workflow_id for e in ended] == ["early"]
    assert s.core.counters["workflows_evicted"] == 1
    # It was not closed by its client, which may go on with it.
    ended = of(s.submit(workflow_id="early"), WorkflowEnded)
    assert [e.workflow_id for e in ended] == ["late"]


def test_a_workflow_without_stages_ends_after_its_idle_age(scheduler: Make) -> None:
    s = scheduler(workflow_idle_s=100.0)
    s.join(slots=2)
    s.submit(workflow_id="w")
    s.submit(workflow_id="busy")
    s.now = 50.0
    s.finish(1)
    s.submit(workflow_id="w", stage=1)
    s.now = 90.0
    s.finish(3, tokens=7)
    assert of(s.sleep(99.0), WorkflowEnded) == []
    (ended,) = of(s.sleep(2.0), WorkflowEnded)
    assert (ended.workflow_id, ended.success) == ("w", None)
    assert [o.output_tokens for o in ended.stages] == [50, 7]
    assert s.core.counters["workflows_expired"] == 1
    assert s.core.snapshot()["workflows"] == 1


def test_a_thousand_workflows_that_expire_at_once_all_end(scheduler: Make) -> None:
    s = scheduler()
    s.join(slots=1000)
    for _ in range(1000):
        s.submit()
    for attempt_id in list(s.attempts):
        s.finish(attempt_id)
    s.now = 1e20  # where a second more is no difference
    assert len(of(s.handle(Woke()), WorkflowEnded)) == 1000


def test_engines_are_bounded(scheduler: Make) -> None:
    s = scheduler(max_engines=2)
    for engine_id in "abc":
        s.join(engine_id)
    assert not s.core.has_engine("c", 1)
    assert s.core.counters["engines_refused"] == 1
    s.join("a", incarnation=2)
    assert s.core.has_engine("a", 2)


def test_models_that_no_engine_serves_any_more_are_forgotten_in_the_end(scheduler: Make) -> None:
    s = scheduler(max_engines=2)
    s.join("a", "steady")
    for number in range(50):
        s.join("b", f"m{number}", incarnation=number)
    models = [view["name"] for view in s.core.snapshot()["models"]]
    assert len(models) <= 8
    assert {"steady", "m49"} <= set(models)


@pytest.mark.parametrize(
    ("bound", "value"), [("reply_keep", 3), ("reply_keep_bytes", 30), ("reply_keep_s", 0.035)]
)
def test_kept_answers_are_bounded(scheduler: Make, bound: str, value: float) -> None:
    s = scheduler(**{bound: value})
    s.join()
    forgotten: list[str] = []
    for number in range(1, 9):
        s.submit()
        forgotten += [a.key[1] for a in of(s.finish(number, answer_bytes=10), Forget)]
        forgotten += [a.key[1] for a in of(s.sleep(0.01), Forget)]
    assert forgotten == ["r1", "r2", "r3", "r4", "r5"]
    assert s.submit(request_id="r8") == [Replay((b"client", "r8"))]


def test_an_answer_too_large_to_keep_is_given_and_forgotten(scheduler: Make) -> None:
    s = scheduler(reply_keep_bytes=30)
    s.join()
    s.submit()
    reply, forget, *_ = s.finish(1, answer_bytes=31)
    assert isinstance(reply, Reply)
    assert forget == Forget(reply.key)


def test_outcomes_kept_of_one_workflow_are_bounded(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    for stage in range(300):
        s.submit(workflow_id="w", stage=stage)
        s.finish(stage + 1)
    (ended,) = of(s.handle(WorkflowClosed("w", 1.0)), WorkflowEnded)
    assert [o.stage for o in ended.stages] == list(range(256))


def test_a_stage_without_any_engine_fails_after_no_engine_s(scheduler: Make) -> None:
    s = scheduler(no_engine_s=10.0)
    assert of(s.submit(), WakeAt) == [WakeAt(10.0)]
    s.now = 5.0
    s.join("a", "small")  # takes r1
    s.submit(model="small")
    s.lose("a")
    assert s.core.snapshot()["stages"]["without_engine"] == 2
    assert of(s.sleep(9.0), Fail) == []
    failed = of(s.sleep(1.1), Fail)
    assert [(f.key[1], f.code, f.retryable) for f in failed] == [
        ("r2", "no_engine", True),
        ("r1", "no_engine", True),
    ]
    assert "model 'small'" in failed[0].message


def test_an_engine_of_another_model_does_not_renew_the_wait_for_a_pinned_one(
    scheduler: Make,
) -> None:
    s = scheduler(no_engine_s=10.0)
    s.join("a", "large")
    s.lose("a")
    s.submit(model="large")
    for second in range(1, 10):
        s.sleep(1.0)
        s.join("a", "small", incarnation=second)
    assert [f.code for f in of(s.sleep(2.0), Fail)] == ["no_engine"]


def test_a_pinned_stage_waits_for_its_model(scheduler: Make) -> None:
    s = scheduler()
    s.join("a", "small", slots=9)
    s.join("b", "large")
    assert dispatched(s.submit(model="large")) == [("r1", "b")]
    assert dispatched(s.submit(model="large")) == []
    assert dispatched(s.finish(1)) == [("r2", "b")]


def test_an_unknown_model_is_refused_by_name_and_a_configured_one_is_awaited(
    scheduler: Make,
) -> None:
    s = scheduler(models=(ModelConfig("small"),), engines=(EngineConfig("e", "large", path="/m"),))
    reject = refused(s.submit(model="huge"))
    assert (reject.code, reject.retry_after_s) == ("unknown_model", None)
    assert reject.message == "no model 'huge'; there are: large, small"
    for name in ("small", "large"):
        assert not of(s.submit(model=name), Reject)
        assert dispatched(s.join(name, name))


# Ends.


def test_a_closed_workflow_takes_no_more_stages(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit(workflow_id="w")
    s.finish(1, tokens=33)
    (ended,) = of(s.handle(WorkflowClosed("w", 0.75)), WorkflowEnded)
    assert ended == WorkflowEnded("w", "code", 0.75, (StageOutcome(0, "small", 100, 33),))
    assert refused(s.submit(workflow_id="w")).code == "workflow_closed"
    assert s.handle(WorkflowClosed("w", 0.5)) == []


def test_closing_an_unknown_workflow_is_a_no_op(scheduler: Make) -> None:
    s = scheduler()
    assert s.handle(WorkflowClosed("never", None)) == []
    s.join()
    assert dispatched(s.submit(workflow_id="never"))


def test_closing_a_workflow_cancels_its_stages_without_starting_any(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    for _ in range(3):
        s.submit(workflow_id="w")
    s.submit(workflow_id="other")
    actions = s.handle(WorkflowClosed("w", None))
    assert {a.key[1] for a in of(actions, Fail)} == {"r1", "r2", "r3"}
    assert dispatched(actions) == [("r4", "e")]
    assert isinstance(actions[-1], WorkflowEnded)


def test_closed_workflows_are_remembered_up_to_a_bound(scheduler: Make) -> None:
    s = scheduler(max_workflows=3)
    s.join()
    for number in range(1, 6):
        s.submit(workflow_id=f"w{number}")
        s.finish(number)
        s.handle(WorkflowClosed(f"w{number}", None))
    for number, closed in ((5, True), (3, True), (2, False)):
        assert bool(of(s.submit(workflow_id=f"w{number}"), Reject)) == closed


def test_a_draining_daemon_finishes_what_is_here_and_takes_nothing_new(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit(request_id="x")
    s.submit(request_id="y")
    s.handle(DrainStarted())
    reject = refused(s.submit())
    assert (reject.code, reject.retry_after_s) == ("draining", 1.0)
    assert s.submit(request_id="y") == [Attach((b"client", "y"))]
    assert not s.core.idle
    assert dispatched(s.finish(1)) == [("y", "e")]
    assert s.submit(request_id="x") == [Replay((b"client", "x"))]
    s.finish(2)
    assert s.core.idle


# Receipts and counters.


def test_each_dispatch_carries_its_receipt_and_the_reply_what_really_happened(
    scheduler: Make,
) -> None:
    s = scheduler()
    s.join("a", "small")
    s.join("b", "large")
    s.now = 1.0
    predicted = prediction("prior", small=predict(10.0, 0.1), large=predict(20.0, 0.9))
    (sent,) = of(s.submit(predicted), Dispatch)
    receipt = msgspec.structs.replace(sent.receipt)
    assert (receipt.policy, receipt.source, receipt.model) == ("chimera", "prior", "large")
    assert [c.model for c in receipt.candidates] == ["small", "large"]
    assert max(receipt.candidates, key=lambda c: c.score).model == "large"
    assert (receipt.predicted_tokens_p50, receipt.actual_tokens) == (20.0, None)
    assert (receipt.queue_s, receipt.service_s, receipt.attempts) == (0.0, None, 1)
    s.now = 4.5
    (reply,) = of(s.finish(1, tokens=33), Reply)
    assert reply.receipt == msgspec.structs.replace(receipt, actual_tokens=33, service_s=3.5)


def test_a_receipt_says_how_long_the_stage_waited(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit()
    s.submit()
    s.now = 2.0
    (sent,) = of(s.finish(1), Dispatch)
    assert sent.receipt.queue_s == 2.0


@pytest.mark.parametrize("policy", POLICIES)
def test_receipts_name_the_policy_and_its_reason(scheduler: Make, policy: str) -> None:
    s = scheduler(policy=policy)
    s.join()
    (sent,) = of(s.submit(), Dispatch)
    assert sent.receipt.policy == policy
    assert sent.receipt.reason
    s.join("pinned", "large")
    (sent,) = of(s.submit(model="large"), Dispatch)
    assert sent.receipt.reason == "pinned"


def test_counters_say_how_many_decisions_used_which_prediction(scheduler: Make) -> None:
    s = scheduler()
    s.join(slots=2)
    for source, times in (("learned", 3), ("prior", 2), ("fallback", 1)):
        for _ in range(times):
            s.submit(prediction(source))
    s.fail(1)
    counters = s.core.counters
    assert [counters[f"decided_{n}"] for n in ("learned", "prior", "fallback")] == [3, 2, 1]
    assert counters["submitted"] == 6


def test_counters_count_refusals_and_failures_by_code(scheduler: Make) -> None:
    s = scheduler(max_queued_stages=1)
    s.submit()
    s.submit()
    s.cancel("r1")
    counters = s.core.counters
    assert counters["rejected"] == counters["rejected_overloaded"] == 1
    assert counters["failed"] == counters["failed_cancelled"] == 1


def test_a_snapshot_can_be_written_as_json(scheduler: Make) -> None:
    s = scheduler()
    s.join(slots=1)
    for _ in range(2):
        s.submit()
    row = msgspec.json.decode(msgspec.json.encode(s.core.snapshot()))
    assert row["stages"] == {"waiting": 1, "without_engine": 0, "running": 1}
    assert row["engines"][0]["engine"] == "e"


# Reports of engines.


def test_progress_lowers_what_an_engine_owes_and_never_goes_back(scheduler: Make) -> None:
    s = scheduler()
    s.join()
    s.submit(prediction(small=predict(100.0)))

    def owed() -> float:
        return s.core.snapshot()["engines"][0]["predicted_tokens"]

    assert owed() == 100.0
    s.report("e", {1: 90})
    after = owed()
    assert after < 100.0
    s.report("e", {1: 10, 77: 5})
    assert owed() == after


def test_requests_that_an_engine_has_from_elsewhere_count_as_load(scheduler: Make) -> None:
    s = scheduler(policy="least_loaded")
    s.join("a", "small", slots=4)
    s.join("b", "large", slots=4)
    s.report("a", {}, running=3, waiting=1)
    assert dispatched(s.submit()) == [("r1", "b")]
    s.report("a", {})
    assert dispatched(s.submit()) == [("r2", "a")]


def test_profiles_of_zeros_and_tiny_limits_are_legal(scheduler: Make) -> None:
    for policy in ("chimera", "paper"):
        s = scheduler(policy=policy, price=1000.0)
        s.join("a", profile=Profile(0.0, 0.0, 0.0))
        s.join("b", "large", profile=Profile(1e9, 1e9, 1e9))
        for _ in range(3):
            s.submit(prediction(small=predict(0.0)), max_tokens=1, prompt_tokens=0)
            s.finish(s.last_attempt, tokens=1)
            s.submit(max_tokens=1_000_000, prompt_tokens=10_000_000)


def test_free_workflows_do_not_make_the_price_of_a_second_infinite(scheduler: Make) -> None:
    s = scheduler(reply_keep=1)
    s.join("a", slots=2)
    s.submit()
    s.join("b", "free", slots=2, profile=Profile(0.0, 0.0, 0.0))
    for _ in range(1000):
        s.submit(model="free")
        s.finish(s.last_attempt)
    assert s.core.snapshot()["idle_latency_s"] > 0.1


def test_what_stages_really_take_is_learned_and_moves_the_choice(scheduler: Make) -> None:
    """The small model is quicker by its profile, and ten times slower than that in truth."""
    s = scheduler(price=1.0)
    s.join("a", "small", slots=4)
    s.join("b", "large", slots=4, profile=Profile(0.02, 0.002, 0.0002))
    same = prediction("prior", small=predict(50.0, 0.5), large=predict(50.0, 0.5))
    models: list[str] = []
    for _ in range(100):
        (sent,) = of(s.submit(same), Dispatch)
        models.append(sent.receipt.model)
        s.now += (10.0 if sent.receipt.model == "small" else 2.0) * (0.01 + 50 * 0.011)
        s.finish(sent.attempt_id, tokens=50)
    assert models[0] == "small"
    assert models[-1] == "large"
