"""Several workers share engines: each takes what is free, or where that is too little its part."""

from collections.abc import Callable

import pytest

from chimera_daemon.messages import (
    AttemptFinished,
    Dispatch,
    Stage,
    StageSubmitted,
    Usage,
    WorkflowClosed,
    WorkflowEnded,
)
from core_harness import PROFILE, Watched, dispatched, of, prediction

Make = Callable[..., Watched]


def test_takes_what_the_others_leave_free(scheduler: Make) -> None:
    watched = scheduler()
    watched.join(slots=4)
    watched.peers({"e": 3}, small=(0, 0.0, 3))
    assert len(dispatched(watched.submit())) == 1
    assert not dispatched(watched.submit())


def test_what_the_others_free_is_taken_at_once(scheduler: Make) -> None:
    watched = scheduler()
    watched.join(slots=4)
    watched.peers({"e": 3}, small=(0, 0.0, 3))
    for _ in range(3):
        watched.submit()
    assert len(watched.attempts) == 1
    assert len(dispatched(watched.peers({"e": 1}, small=(0, 0.0, 1)))) == 2


def test_one_attempt_is_always_allowed(scheduler: Make) -> None:
    """Else a worker would wait for ever on others that fill what they free themselves."""
    watched = scheduler()
    watched.join(slots=4)
    watched.peers({"e": 4}, small=(100, 1e4, 4))
    assert len(dispatched(watched.submit())) == 1


def test_a_worker_above_its_share_does_not_refill(scheduler: Make) -> None:
    watched = scheduler()
    watched.join(slots=8)
    for _ in range(20):
        watched.submit()
    assert len(watched.attempts) == 8
    watched.peers({}, small=(20, 2000.0, 0))  # as much to do as here
    for left in (7, 6, 5, 4):
        assert not dispatched(watched.finish(next(iter(watched.attempts))))
        assert len(watched.attempts) == left
        watched.peers({"e": 8 - left}, small=(20, 2000.0, 0))
    # 16 wait and run here, 20 there: four of eight slots.
    assert len(dispatched(watched.finish(next(iter(watched.attempts))))) == 1


def test_shares_end_with_the_others(scheduler: Make) -> None:
    watched = scheduler()
    watched.join(slots=8)
    watched.peers({"e": 4}, small=(20, 2000.0, 4))
    for _ in range(20):
        watched.submit()
    assert len(watched.attempts) < 8
    watched.peers()
    assert len(watched.attempts) == 8


def test_a_queue_elsewhere_counts_as_congestion(scheduler: Make) -> None:
    """Two models alike, the first with a long queue at another worker."""
    watched = scheduler()
    watched.join("a", "large", slots=1, profile=PROFILE)
    watched.join("b", "small", slots=1, profile=PROFILE)
    watched.peers({"a": 1}, large=(50, 1e5, 1))
    assert dispatched(watched.submit()) == [("r1", "b")]
    watched.peers({"b": 1}, small=(50, 1e5, 1))
    watched.finish(next(iter(watched.attempts)))
    assert dispatched(watched.submit()) == [("r2", "a")]


def test_requests_of_other_workers_are_not_foreign_twice(scheduler: Make) -> None:
    watched = scheduler()
    watched.join(slots=8)
    watched.peers({"e": 3}, small=(0, 0.0, 3))
    watched.report("e", {}, running=5)
    (view,) = watched.core.snapshot()["models"]
    assert view["foreign"] == 5  # three of the others, two of nobody


@pytest.mark.parametrize("policy", ["chimera", "least_loaded"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_two_workers_with_different_traffic_stay_balanced(policy: str, part: float) -> None:
    """Two cores, one engine of 16 slots, and work that comes to the first in this part.

    Steps of one: every attempt takes ten. What the slots do follows the demand, none is over-used
    by more than one per worker, and both finish all they got.
    """
    slots, length, steps = 16, 10, 600
    workers = [Watched(policy=policy), Watched(policy=policy)]
    ends: list[list[tuple[int, int]]] = [[], []]
    served = [0, 0]
    most = 0
    for worker in workers:
        worker.join(slots=slots)
    for step in range(steps):
        for number, worker in enumerate(workers):
            actions = []
            while ends[number] and ends[number][0][0] <= step:
                attempt = ends[number].pop(0)[1]
                served[number] += 1
                actions += worker.handle(AttemptFinished(attempt, Usage(1, 50)))
            here = part if number == 0 else 1.0 - part
            for _ in range(int((step + 1) * 2 * here) - int(step * 2 * here)):  # 2 a step: too many
                if step < steps / 2:
                    actions += worker.submit()
            other = workers[1 - number]
            (queue,) = other.core.queues()
            ((_, attempts, _),) = other.core.in_flight()
            actions += worker.peers(
                {"e": attempts}, small=(queue[1].waiting, queue[1].waiting_tokens, attempts)
            )
            started = [a for a in actions if isinstance(a, Dispatch)]
            ends[number] += [(step + length, a.attempt_id) for a in started]
            worker.now += 1.0
        most = max(most, sum(len(w.attempts) for w in workers))
        if step == steps // 2:
            asked = [int(steps * part), int(steps * (1.0 - part))]
            done = [s / a for s, a in zip(served, asked, strict=True)]
            assert abs(done[0] - done[1]) < 0.1, "one of them got more than its part"
    assert slots <= most <= slots + len(workers)
    assert all(w.core.idle for w in workers)


def test_attempts_of_workers_never_meet() -> None:
    numbers: list[set[int]] = []
    for worker in range(3):
        watched = Watched(workers=3)
        watched.core._next_attempt = 1000 + worker
        watched.join(slots=8)
        for _ in range(8):
            watched.submit()
        numbers.append(set(watched.attempts))
    assert len(set.union(*numbers)) == 24


def test_the_last_stage_ends_its_workflow(scheduler: Make) -> None:
    watched = scheduler()
    watched.join()
    watched.submit(workflow_id="w", last=True)
    assert watched.core.snapshot()["workflows"] == 1
    watched.finish(next(iter(watched.attempts)))
    assert watched.core.snapshot()["workflows"] == 0
    assert len(dispatched(watched.submit(workflow_id="w"))) == 1, "it was not closed by its client"


def test_closing_a_workflow_counts_although_its_last_stage_is_at_work(scheduler: Make) -> None:
    watched = scheduler()
    watched.join()
    watched.submit(workflow_id="w", last=True)
    (ended,) = of(watched.handle(WorkflowClosed("w", 1.0)), WorkflowEnded)
    assert ended.success == 1.0


def test_a_limit_that_is_none_does_not_exclude_small_contexts(scheduler: Make) -> None:
    watched = scheduler(policy="static:small")
    watched.join("a", "small", context_tokens=1000)
    watched.join("b", "large", context_tokens=100_000)
    stage = Stage(b"c", "q", "w", 0, "", None, 100, 1_000_000, 10, 1)
    assert dispatched(watched.handle(StageSubmitted(stage, prediction()))) == [("q", "a")]
