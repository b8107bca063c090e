"""The simulated engine against sums by hand and a plain engine without leaps; its bounds."""

import random
from math import inf, isclose

import pytest
from msgspec.structs import replace

from chimera_bench.sim_engine import EngineProfile, Finished, SimEngine

PROFILE = EngineProfile(
    step_s=0.01,
    step_per_seq_s=0.001,
    step_per_kv_token_s=1e-6,
    prefill_s_per_token=1e-4,
    slots=4,
    kv_tokens=1000,
    context_tokens=1000,
    token_budget=64,
    prefix_cache=False,
)


class Arrival:
    """An attempt to come; the plain engine keeps its state in it."""

    def __init__(self, at_s: float, attempt_id: int, priority: int, prompt: int, output: int):
        self.at_s, self.attempt_id, self.priority = at_s, attempt_id, priority
        self.prompt, self.output = prompt, output
        self.read = self.produced = self.held = 0


def run(
    profile: EngineProfile, arrivals: list[Arrival], cancels: dict[int, float] | None = None
) -> tuple[dict[int, float], SimEngine]:
    """Drive a `SimEngine` to its end, with all its checks; finish times by attempt."""
    engine = SimEngine(profile)
    coming: list[tuple[float, int, Arrival | int]] = [(a.at_s, a.attempt_id, a) for a in arrivals]
    coming += [(at_s, attempt_id, attempt_id) for attempt_id, at_s in (cancels or {}).items()]
    coming.sort(key=lambda entry: entry[:2])
    ends: dict[int, float] = {}
    while coming or engine.ends_s < inf:
        now = min(engine.ends_s, coming[0][0] if coming else inf)
        if engine.ends_s == now:
            for finished in engine.complete():
                assert finished.attempt_id not in ends
                ends[finished.attempt_id] = now
        while coming and coming[0][0] == now:
            what = coming.pop(0)[2]
            if isinstance(what, int):
                engine.cancel(now, what)
            else:
                engine.submit(now, what.attempt_id, what.priority, what.prompt, what.output)
        engine.settle(now)
        engine.check()
        assert engine.ends_s > now
    assert not engine.running
    assert not engine.waiting
    return ends, engine


def step_by_step(profile: EngineProfile, arrivals: list[Arrival]) -> dict[int, float]:
    """The same engine without leaps, as plainly as can be; without a prefix cache."""
    coming = sorted(arrivals, key=lambda a: (a.at_s, a.attempt_id))
    order = {a.attempt_id: number for number, a in enumerate(coming)}
    waiting: list[Arrival] = []
    running: list[Arrival] = []
    ends: dict[int, float] = {}
    now = 0.0

    def key(a: Arrival) -> tuple[int, int]:
        return (a.priority, order[a.attempt_id])

    def used() -> int:
        decoding = sum(a.held == a.read for a in running)
        return sum(a.read for a in running) + decoding

    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].at_s + profile.overhead_s)
        while coming and coming[0].at_s + profile.overhead_s <= now:
            coming[0].read = coming[0].prompt
            waiting.append(coming.pop(0))
        preempted = False
        while used() > profile.kv_tokens:
            victim = max(running, key=key)
            running.remove(victim)
            waiting.append(victim)
            victim.held, victim.read = 0, victim.prompt + victim.produced
            preempted = True
        waiting.sort(key=key)
        budget = profile.token_budget - sum(a.held == a.read for a in running)
        budget -= sum(a.read - a.held for a in running)
        begun = len(running)
        while waiting and not preempted and budget > 0 and len(running) < profile.slots:
            if used() + waiting[0].read > profile.kv_tokens:
                break
            budget -= waiting[0].read
            running.append(waiting.pop(0))
        begun = len(running) - begun
        decoding = [a for a in running if a.held == a.read]
        budget = profile.token_budget - len(decoding)
        kv, chunk = sum(a.held for a in running), 0
        for a in running:
            if a.held < a.read:
                take = min(budget, a.read - a.held)
                a.held += take
                budget -= take
                chunk += take
                if a.held == a.read and take:
                    a.produced += 1
        for a in decoding:
            a.held, a.read, a.produced = a.held + 1, a.read + 1, a.produced + 1
        now += profile.step(len(decoding), kv, chunk, begun)
        for a in [a for a in running if a.produced == a.output]:
            running.remove(a)
            ends[a.attempt_id] = now
    return ends


def drawn(rng: random.Random, count: int, rate: float, context: int) -> list[Arrival]:
    now, arrivals = 0.0, list[Arrival]()
    for attempt_id in range(count):
        now += rng.expovariate(rate)
        prompt = rng.randint(1, context - 2)
        output = rng.randint(1, min(context - prompt, 120))
        arrivals.append(Arrival(now, attempt_id, rng.randint(0, 3), prompt, output))
    return arrivals


def test_a_single_job_takes_exactly_its_steps() -> None:
    ends, engine = run(PROFILE, [Arrival(1.0, 7, 0, 100, 30)])
    first, second = PROFILE.step(0, 0, 64), PROFILE.step(0, 64, 36)
    decode = sum(PROFILE.step(1, 100 + token) for token in range(29))
    assert isclose(ends[7], 1.0 + first + second + decode, rel_tol=1e-12)
    assert isclose(engine.busy_s, first + second + decode, rel_tol=1e-12)
    assert (engine.prefilled_tokens, engine.output_tokens) == (100, 30)


def test_two_sequences_share_the_batch_exactly() -> None:
    """The second comes within a decode step of the first, whose next step reads its prompt."""
    first, prefill = PROFILE.step(0, 0, 10), PROFILE.step(1, 11, 20)
    at_s = first + 0.5 * PROFILE.step(1, 10)
    ends, _ = run(PROFILE, [Arrival(0.0, 1, 0, 10, 6), Arrival(at_s, 2, 0, 20, 9)])
    now = first + PROFILE.step(1, 10) + prefill
    for token in range(3):
        now += PROFILE.step(2, 12 + 20 + 2 * token)
    assert isclose(ends[1], now, rel_tol=1e-12)
    for token in range(5):
        now += PROFILE.step(1, 23 + token)
    assert isclose(ends[2], now, rel_tol=1e-12)


def test_leaps_agree_with_single_steps() -> None:
    """Random loads: light and heavy, tight memory, long prompts, without and with KV cost."""
    preemptions = leaps = steps = 0
    for seed in range(60):
        rng = random.Random(seed)
        profile = EngineProfile(
            step_s=rng.choice((0.01, 0.003)),
            step_per_seq_s=rng.choice((0.0, 0.001)),
            step_per_kv_token_s=rng.choice((0.0, 1e-5)),
            prefill_s_per_token=rng.choice((0.0, 1e-4)),
            slots=rng.randint(1, 8),
            kv_tokens=rng.choice((300, 500, 2000)),
            context_tokens=rng.choice((60, 280)),
            token_budget=rng.choice((9, 64, 512)),
            prefix_cache=False,
            prompt_s=rng.choice((0.0, 0.0, 0.004)),
            overhead_s=rng.choice((0.0, 0.0, 0.002, 0.3)),
        )
        arrivals = drawn(rng, 40, rng.choice((0.5, 5.0, 50.0)), profile.context_tokens)
        ends, engine = run(profile, arrivals)
        expected = step_by_step(profile, arrivals)
        assert ends.keys() == expected.keys() == {a.attempt_id for a in arrivals}
        for attempt_id, end_s in ends.items():
            assert isclose(end_s, expected[attempt_id], rel_tol=1e-9), (seed, attempt_id)
        assert engine.peak_kv <= profile.kv_tokens
        assert engine.peak_running <= profile.slots
        assert engine.output_tokens >= sum(a.output for a in arrivals)
        preemptions += engine.preemptions
        leaps += engine.events
        steps += engine.output_tokens
    assert preemptions > 20, "the loads do not fill the memory"
    assert leaps < steps / 2, "the leaps are no longer than steps"


def test_lower_priority_runs_first_and_is_preempted_last() -> None:
    one = replace(PROFILE, slots=1)
    ends, _ = run(
        one, [Arrival(0.0, 1, 0, 8, 9), Arrival(0.01, 2, 5, 8, 9), Arrival(0.02, 3, 1, 8, 9)]
    )
    assert ends[1] < ends[3] < ends[2]
    tight = replace(PROFILE, kv_tokens=120)
    arrivals = [Arrival(0.0, 1, 5, 40, 60), Arrival(0.0, 2, 0, 40, 60)]
    ends, engine = run(tight, arrivals)
    assert engine.preemptions == 1
    assert ends[2] < ends[1]
    assert engine.prefilled_tokens == 40 + 40 + 60, "what it had produced is read again"


def test_what_was_preempted_is_found_again_as_far_as_memory_was_left() -> None:
    """At 119 of 120 tokens the second of two gives way; what the first grows by is gone then."""
    engine = SimEngine(replace(PROFILE, kv_tokens=120, prefix_cache=True))
    engine.submit(0.0, 1, 0, 40, 30, "first")
    engine.submit(0.0, 2, 5, 40, 60, "second")
    engine.settle(0.0)
    while engine.ends_s < inf:
        now = engine.ends_s
        engine.complete()
        engine.settle(now)
        engine.check()
    assert engine.preemptions == 1
    assert engine.output_tokens == 90
    # The first held 60 of its 69 tokens then, so that 51 of the second's 59 were left at its end.
    assert engine.cached_tokens == 51
    assert engine.prefilled_tokens == 40 + 40 + 60 - 51


def test_a_prefix_is_read_once_and_forgotten_when_memory_is_needed() -> None:
    engine = SimEngine(replace(PROFILE, prefix_cache=True, kv_tokens=300, slots=1))

    def serve(attempt_id: int, prompt: int, output: int, prefix: str, shared: int = 0) -> int:
        before = engine.prefilled_tokens
        engine.submit(attempt_id, attempt_id, 0, prompt, output, prefix, shared)
        engine.settle(attempt_id)
        while engine.ends_s < inf:
            now = engine.ends_s
            engine.complete()
            engine.settle(now)
            engine.check()
        return engine.prefilled_tokens - before

    assert serve(10, 100, 21, "a") == 100
    assert serve(20, 150, 11, "a", 121) == 150 - 120, "its last token was never put into memory"
    assert serve(30, 200, 11, "b") == 200
    assert serve(40, 170, 1, "a", 161) == 170 - 90, "another one took 210 of 300"
    assert serve(50, 90, 1, "a", 0) == 90, "a new context shares nothing"
    assert serve(60, 90, 1, "") == 90
    assert engine.cached_tokens == 120 + 90


def test_what_a_request_needs_beside_steps_delays_it_and_nobody_else() -> None:
    profile = replace(PROFILE, overhead_s=0.25, prompt_s=0.005)
    alone, engine = run(profile, [Arrival(1.0, 1, 0, 10, 100)])
    prefill, decode = profile.step(0, 0, 10, 1), [PROFILE.step(1, 10 + t) for t in range(99)]
    assert isclose(prefill, PROFILE.step(0, 0, 10) + 0.005)
    assert isclose(alone[1], 1.25 + prefill + sum(decode), rel_tol=1e-12)
    assert isclose(engine.busy_s, alone[1] - 1.25, rel_tol=1e-12)
    # The second is on its way while the first decodes, and joins after the step of its arrival.
    ends, _ = run(profile, [Arrival(1.0, 1, 0, 10, 100), Arrival(1.1, 2, 0, 20, 1)])
    now, steps = 1.25 + prefill, 0
    while now < 1.35:
        now, steps = now + decode[steps], steps + 1
    joined = profile.step(1, 10 + steps, 20, 1)
    assert isclose(ends[2], now + joined, rel_tol=1e-12)
    assert isclose(ends[1], alone[1] + joined - decode[steps], rel_tol=1e-12)


def test_an_attempt_can_be_cancelled_on_its_way() -> None:
    profile = replace(PROFILE, overhead_s=0.25)
    arrivals = [Arrival(0.0, n, 0, 10, 50) for n in (1, 2)]
    ends, engine = run(profile, arrivals, {1: 0.1})
    assert ends == run(profile, arrivals[1:])[0]
    assert engine.admissions == 1


def test_cancelled_attempts_free_slot_and_memory_after_the_step() -> None:
    one = replace(PROFILE, slots=1)
    arrivals = [Arrival(0.0, n, 0, 10, 50) for n in (1, 2, 3)]
    ends, engine = run(one, arrivals, {1: 0.1, 2: 0.1, 9: 0.1})
    assert list(ends) == [3]
    freed_s = ends[3] - run(one, [Arrival(0.0, 3, 0, 10, 50)])[0][3]
    assert 0.1 < freed_s < 0.1 + PROFILE.step(1, 60)
    assert isclose(engine.busy_s, ends[3])


def test_a_report_counts_whole_steps_in_the_middle_of_a_leap() -> None:
    engine = SimEngine(PROFILE)
    engine.submit(0.0, 1, 0, 10, 50)
    engine.settle(0.0)
    prefill_s = engine.ends_s
    assert engine.report(0.5 * prefill_s)[1] == {}
    engine.complete()
    engine.settle(prefill_s)
    now = prefill_s
    for token in range(10):
        assert engine.report(now + 0.2 * PROFILE.step(1, 10 + token))[1] == {1: 1 + token}
        now += PROFILE.step(1, 10 + token)
    stats, progress = engine.report(now)
    assert progress == {1: 11}
    assert (stats.running, stats.waiting, stats.output_tokens) == (1, 0, 11)
    assert stats.kv_use == 20 / PROFILE.kv_tokens


def test_the_same_instant_makes_one_batch() -> None:
    apart, _ = run(PROFILE, [Arrival(0.0, 1, 0, 10, 1), Arrival(0.0, 2, 0, 10, 1)])
    engine = SimEngine(PROFILE)
    for attempt_id in (1, 2):
        engine.submit(0.0, attempt_id, 0, 10, 1)
        engine.settle(0.0)
    assert engine.ends_s == apart[1] == apart[2] == PROFILE.step(0, 0, 20)
    assert [f.attempt_id for f in engine.complete()] == [1, 2]


def test_finished_says_since_when_it_had_its_slot() -> None:
    engine = SimEngine(replace(PROFILE, slots=1))
    engine.submit(0.0, 1, 0, 10, 1)
    engine.submit(0.0, 2, 0, 10, 1)
    engine.settle(0.0)
    first_s = engine.ends_s
    assert engine.complete() == [Finished(1, 1, 0.0)]
    engine.settle(first_s)
    assert engine.complete() == [Finished(2, 1, first_s)]


def test_bad_input_is_refused_by_name() -> None:
    for change, message in (
        ({"step_s": 0.0}, "`step_s` must be more than 0"),
        ({"prefill_s_per_token": -1.0}, "`prefill_s_per_token` must be a finite time"),
        ({"step_per_seq_s": inf}, "`step_per_seq_s` must be a finite time"),
        ({"prompt_s": -1.0}, "`prompt_s` must be a finite time"),
        ({"overhead_s": inf}, "`overhead_s` must be a finite time"),
        ({"slots": 0}, "`slots` must be at least 1"),
        ({"token_budget": 4}, "`token_budget` .4. must be more than `slots`"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(PROFILE, **change)
    engine = SimEngine(PROFILE)
    with pytest.raises(ValueError, match="1001 tokens do not fit"):
        engine.submit(0.0, 1, 0, 1000, 1)
    with pytest.raises(ValueError, match="token count"):
        engine.submit(0.0, 1, 0, 0, 1)
    engine.submit(0.0, 1, 0, 10, 1)
    with pytest.raises(ValueError, match="here already"):
        engine.submit(0.0, 1, 0, 10, 1)
