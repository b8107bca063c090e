"""The simulator: queueing theory, one seed one result, faults, bounds, bad input."""

import random
from collections.abc import Iterable, Sequence
from math import inf, isclose

import msgspec
import pytest
from msgspec.structs import replace

from chimera_bench.sim_arrivals import poisson_arrivals
from chimera_bench.sim_engine import EngineProfile, SimEngine
from chimera_bench.sim_input import EngineSetup, Fault, Run, StageTruth, Workflow
from chimera_bench.simulator import Result, mean_outcome, simulate
from chimera_daemon.config import Config
from chimera_daemon.core import Scheduler
from chimera_daemon.messages import ModelPrediction, Prediction, Stage
from chimera_daemon.prior import PriorPredictor

PROFILE = EngineProfile(
    step_s=0.01,
    step_per_seq_s=0.0005,
    step_per_kv_token_s=1e-7,
    prefill_s_per_token=1e-4,
    slots=8,
    kv_tokens=4000,
    context_tokens=4000,
    token_budget=256,
)
# One sequence at a time, and each of its tokens takes a millisecond.
SERVER = EngineProfile(0.001, 0.0, 0.0, 0.0, slots=1, kv_tokens=100_000, context_tokens=100_000)


def known(tokens: float, confidence: float = 0.5, later: float = 0.0) -> ModelPrediction:
    rest = tokens * (1.0 + later)
    return ModelPrediction(
        confidence, tokens, (tokens, tokens, tokens), rest, (rest, rest, rest), later
    )


def middling(stage: Stage) -> Prediction:
    return Prediction({}, known(100.0, later=1.0))


def checked(scheduler: Scheduler, engines: Iterable[SimEngine]) -> None:
    scheduler.check()
    for engine in engines:
        engine.check()


def single(outputs: Sequence[int], arrivals: Sequence[float], model: str = "m") -> list[Workflow]:
    """Workflows of one stage each, with a prompt of one token."""
    return [
        Workflow(f"w{n}", at_s, 1, {model: Run((StageTruth(output),))}, max_tokens=100_000)
        for n, (output, at_s) in enumerate(zip(outputs, arrivals, strict=True))
    ]


def drawn(
    number: int, rate: float, seed: int, models: Sequence[str] = ("small", "large")
) -> list[Workflow]:
    """Workflows of one to four stages, other ones for every model."""
    rng = random.Random(seed)
    workflows: list[Workflow] = []
    for n, at_s in enumerate(poisson_arrivals(rate, number, seed)):
        runs = {
            model: Run(
                tuple(
                    StageTruth(
                        rng.randint(1, 200),
                        rng.randint(1, 50),
                        rng.choice((0.0, 0.3)),
                        rng.random() < 0.8,
                        rng.choice((None, 0.0, 1.0)),
                    )
                    for _ in range(rng.randint(1, 4))
                ),
                float(rng.random() < 0.5),
            )
            for model in models
        }
        workflows.append(Workflow(f"w{n}", at_s, rng.randint(1, 300), runs, "code", 200))
    return workflows


def cluster(**changes: int) -> list[EngineSetup]:
    profile = replace(PROFILE, **changes)
    slow = replace(profile, step_s=0.03)
    return [
        EngineSetup("s0", "small", profile),
        EngineSetup("s1", "small", profile),
        EngineSetup("l0", "large", slow),
    ]


def mean_wait_s(result: Result) -> float:
    return sum(w.stages[0].wait_s for w in result.workflows) / len(result.workflows)


# Theory.


def test_a_single_workflow_takes_exactly_its_steps_and_gaps() -> None:
    run = Run((StageTruth(30, 20, 1.5), StageTruth(10)), 0.75)
    workflow = Workflow("w", 2.0, 100, {"m": run})
    result = simulate(
        Config(), [EngineSetup("e", "m", PROFILE)], [workflow], middling, watch=checked
    )
    first_s = PROFILE.step(0, 0, 100) + sum(PROFILE.step(1, 100 + n) for n in range(29))
    # 129 tokens of the first stage are cached, its last one has never been read.
    second_s = PROFILE.step(0, 129, 21) + sum(PROFILE.step(1, 150 + n) for n in range(9))
    record = result.workflows[0]
    assert isclose(record.finish_s, 2.0 + first_s + 1.5 + second_s, rel_tol=1e-12)
    assert record.latency_s == record.finish_s - 2.0
    assert (record.success, record.error, record.models) == (0.75, "", ["m", "m"])
    assert [s.prompt_tokens for s in record.stages] == [100, 150]
    assert [s.wait_s for s in record.stages] == [0.0, 0.0]
    engine = result.engines[0]
    assert isclose(engine.busy_s, first_s + second_s, rel_tol=1e-12)
    assert isclose(engine.utilisation, engine.busy_s / result.span_s)
    assert (engine.cached_tokens, engine.prefilled_tokens, engine.output_tokens) == (129, 121, 40)


@pytest.mark.parametrize("max_inflight", [1, 1000])
def test_waits_are_those_of_pollaczek_and_khinchine(max_inflight: int) -> None:
    """M/G/1 at 60 % load, whether core or engine holds the queue.

    Services are 20 or 420 ms, squared coefficient of variation 2.56. Over 100 seeds the mean wait
    of 20,000 workflows had a standard deviation of 3.3 % about the formula (with the moments of
    what was drawn in it) and no bias; three of them are allowed. Every single wait is Lindley's.
    """
    rng = random.Random(11)
    number = 20_000
    outputs = [rng.choice((20,) * 8 + (420,) * 2) for _ in range(number)]
    arrivals = poisson_arrivals(6.0, number, 12)
    config = Config(policy="least_loaded", heartbeat_s=5.0, engine_timeout_s=60.0)
    setup = EngineSetup("e", "m", SERVER, max_inflight)
    result = simulate(config, [setup], single(outputs, arrivals), middling)
    rate = number / arrivals[-1]
    mean = sum(outputs) * 0.001 / number
    square = sum(n * n for n in outputs) * 1e-6 / number
    expected = rate * square / (2.0 * (1.0 - rate * mean))
    assert isclose(mean_wait_s(result), expected, rel_tol=0.1)
    wait_s = 0.0
    for n, record in enumerate(result.workflows):
        if n:
            wait_s = max(0.0, wait_s + outputs[n - 1] * 0.001 - (arrivals[n] - arrivals[n - 1]))
        assert isclose(record.stages[0].wait_s, wait_s, abs_tol=1e-6)
    assert isclose(result.engines[0].busy_s, sum(outputs) * 0.001, rel_tol=1e-9)


def test_shortest_first_waits_less_than_first_come() -> None:
    rng = random.Random(3)
    outputs = [max(1, int(rng.expovariate(1.0 / 100.0))) for _ in range(3000)]
    workflows = single(outputs, poisson_arrivals(9.0, 3000, 4))

    def oracle(stage: Stage) -> Prediction:
        return Prediction({}, known(float(outputs[int(stage.workflow_id[1:])])))

    setup = EngineSetup("e", "m", SERVER)
    shortest = Config(policy="chimera", aging_tokens_per_s=1e-6)
    sjf = simulate(shortest, [setup], workflows, oracle)
    fcfs = simulate(Config(policy="least_loaded"), [setup], workflows, oracle)
    assert mean_wait_s(sjf) < 0.7 * mean_wait_s(fcfs)
    assert sjf.longest_wait_s > fcfs.longest_wait_s, "somebody pays for it"
    starts = [w.stages[0].started_s for w in fcfs.workflows]
    assert starts == sorted(starts)


# The same, always.


def test_equal_input_gives_equal_output_to_the_last_bit() -> None:
    faults = [Fault("s0", 5.0, 9.0, 0.5), Fault("l0", 7.0, 8.0)]

    def once(seed: int) -> bytes:
        prior = PriorPredictor(Config())
        workflows = drawn(150, 8.0, seed)
        result = simulate(
            Config(), cluster(), workflows, prior.prediction, observers=[prior], faults=faults
        )
        return msgspec.json.encode(result)

    assert once(1) == once(1)
    assert once(1) != once(2)


# Bounds and faults.


@pytest.mark.parametrize(
    "policy", ["chimera", "paper", "least_loaded", "round_robin", "static:small"]
)
def test_every_policy_keeps_every_bound(policy: str) -> None:
    """Tight memory and few slots, more in flight than the engine has slots, checks all along."""
    tight = [
        replace(setup, max_inflight=8) for setup in cluster(kv_tokens=2100, context_tokens=2000,
                                                            slots=6)
    ]  # fmt: skip
    workflows = drawn(60, 30.0, 5)
    result = simulate(Config(policy=policy), tight, workflows, middling, watch=checked)
    assert all(not record.error for record in result.workflows)
    for engine in result.engines:
        assert engine.peak_kv <= 2100
        assert engine.peak_running <= 6
    answered = sum(len(record.stages) for record in result.workflows)
    assert result.counters["completed"] == result.counters["submitted"] == answered
    assert max(engine.peak_running for engine in result.engines) == 6
    assert sum(engine.preemptions for engine in result.engines) > 0
    for record, workflow in zip(result.workflows, workflows, strict=True):
        assert record.success == mean_outcome(workflow, record.models)
        assert len(record.stages) >= min(len(run.stages) for run in workflow.runs.values())
        for stage, model in zip(record.stages, record.models, strict=True):
            script = workflow.runs[model].stages
            truth = script[min(stage.stage, len(script) - 1)]
            assert stage.output_tokens == truth.output_tokens
            assert stage.submitted_s <= stage.dispatched_s <= stage.started_s < stage.finished_s
        for before, after in zip(record.stages, record.stages[1:], strict=False):
            assert after.submitted_s >= before.finished_s


def test_an_engine_dies_and_comes_back_and_nothing_is_lost_or_done_twice() -> None:
    """`s0` dies unnoticed until it is back, `s1` for good, all are gone for a while."""
    faults = [
        Fault("s0", 1.0, 2.0, noticed_s=3.0),
        Fault("s0", 4.0, 5.5, noticed_s=0.2),
        Fault("s1", 3.0, noticed_s=0.7),
        Fault("l0", 4.2, 5.0),
    ]
    workflows = drawn(60, 15.0, 6)
    config = Config(policy="least_loaded", max_attempts=6)
    result = simulate(config, cluster(), workflows, middling, faults=faults, watch=checked)
    assert all(not record.error for record in result.workflows)
    stages = [stage for record in result.workflows for stage in record.stages]
    assert result.counters["engines_lost"] == 4
    assert result.counters["requeued"] > 10
    assert max(stage.attempts for stage in stages) > 1
    assert sum(stage.attempts for stage in stages) == len(stages) + result.counters["requeued"]
    assert result.counters["completed"] == len(stages)
    for stage in stages:
        assert not (stage.engine == "s1" and stage.started_s > 3.0)
        assert not (stage.engine == "s0" and 1.0 < stage.finished_s < 2.0)
        assert not 4.2 < stage.finished_s < 5.0
    useful = sum(stage.output_tokens for stage in stages)
    assert sum(engine.output_tokens for engine in result.engines) > useful


def test_what_is_sent_to_an_engine_that_nobody_knows_is_dead_runs_when_it_is_back() -> None:
    workflow = Workflow("w", 1.5, 10, {"m": Run((StageTruth(20),) * 2)})
    setup = EngineSetup("e", "m", PROFILE)
    faults = [Fault("e", 1.0, 3.0, noticed_s=9.0)]
    result = simulate(Config(), [setup], [workflow], middling, faults=faults, watch=checked)
    first, second = result.workflows[0].stages
    assert (first.attempts, first.dispatched_s, first.wait_s) == (2, 3.0, 1.5)
    assert second.attempts == 1
    assert result.engines[0].output_tokens == 40


def test_another_context_finds_nothing_of_the_first_in_any_cache() -> None:
    """Engine `y` serves stages 0 and 2; between them the context begins anew on `x`."""
    stages = (StageTruth(5, 100, 0.0, False), StageTruth(5), StageTruth(5))
    runs = {"a": Run(stages), "b": Run(stages)}
    setups = [EngineSetup("x", "a", PROFILE), EngineSetup("y", "b", PROFILE)]
    config = Config(policy="round_robin")
    result = simulate(config, setups, [Workflow("w", 0.0, 50, runs)], middling)
    assert result.workflows[0].models == ["b", "a", "b"]
    assert [stage.prompt_tokens for stage in result.workflows[0].stages] == [50, 100, 105]
    assert [engine.cached_tokens for engine in result.engines] == [0, 0]


def test_a_workflow_that_cannot_go_on_ends_with_its_error() -> None:
    long = Workflow("long", 0.0, 3900, {"m": Run((StageTruth(200),))})
    never = Workflow("never", 5.0, 10, {"m": Run((StageTruth(20),))})
    result = simulate(
        Config(no_engine_s=2.0),
        [EngineSetup("e", "m", PROFILE)],
        [long, never],
        middling,
        faults=[Fault("e", 4.0)],
        watch=checked,
    )
    assert [w.error for w in result.workflows] == ["bad_request", "no_engine"]
    assert [w.success for w in result.workflows] == [None, None]
    assert result.workflows[0].finish_s == 0.0
    assert result.workflows[1].finish_s == pytest.approx(7.0, abs=0.02)
    crowd = single([1000] * 5, [0.0] * 5)
    full = simulate(
        Config(policy="least_loaded", max_queued_stages=2),
        [EngineSetup("e", "m", SERVER)],
        crowd,
        middling,
        watch=checked,
    )
    assert [w.error for w in full.workflows] == ["", "", "", "overloaded", "overloaded"]


def test_a_prompt_that_an_engine_refuses_is_forgotten_while_the_engine_lives() -> None:
    long = Workflow("long", 0.0, 3900, {"m": Run((StageTruth(200),))})
    result = simulate(Config(), [EngineSetup("e", "m", PROFILE)], [long], middling, watch=checked)
    assert [w.error for w in result.workflows] == ["bad_request"]


def test_a_workflow_that_changes_models_goes_on_in_the_other_run() -> None:
    """Turn by turn, `b` first. Its run has but one stage; that of `a` has four."""
    runs = {"a": Run((StageTruth(5),) * 4, 1.0), "b": Run((StageTruth(7),), 0.0)}
    setups = [EngineSetup("x", "a", PROFILE), EngineSetup("y", "b", PROFILE)]
    workflows = [Workflow("v", 0.0, 50, runs), Workflow("w", 5.0, 50, runs)]
    result = simulate(Config(policy="round_robin"), setups, workflows, middling, watch=checked)
    assert [record.models for record in result.workflows] == [["b"], ["a", "b"]]
    assert [record.success for record in result.workflows] == [0.0, 0.5]
    assert [record.output_tokens for record in result.workflows] == [7, 12]
    workflow = workflows[0]
    assert mean_outcome(workflow, ["a", "b"]) == 0.5
    assert mean_outcome(Workflow("w", 0.0, 1, {"a": Run((StageTruth(1),))}), ["a"]) is None


def failing(weak: float = 0.0, strong: float = 1.0, unseen: tuple[str, ...] = ()) -> Workflow:
    """Two stages on `weak`, one on `strong`."""
    runs = {
        "weak": Run((StageTruth(10, 7, 0.5), StageTruth(20)), weak),
        "strong": Run((StageTruth(30),), strong),
    }
    return Workflow("w", 1.0, 50, runs, unseen=unseen)


WEAK_THEN_STRONG = [
    EngineSetup("x", "weak", SERVER),
    EngineSetup("y", "strong", replace(SERVER, step_s=0.01)),
]


def half_and_half(stage: Stage) -> Prediction:
    return Prediction({"weak": known(30.0, 0.5), "strong": known(30.0, 0.9)}, known(30.0))


@pytest.mark.parametrize("load", [0.4, 1.2])
def test_a_learned_price_keeps_its_target_whatever_the_load(load: float) -> None:
    """At the price that it starts from, the stronger model has long queues."""
    confident, draw = random.Random(1), random.Random(2)
    gains = {f"w{n}": confident.random() for n in range(3000)}
    workflows = [
        Workflow(
            name,
            at_s,
            1,
            {model: Run((StageTruth(30),), draw.random()) for model in ("weak", "strong")},
            max_tokens=100,
        )
        for name, at_s in zip(gains, poisson_arrivals(load / 0.06, 3000, 3), strict=True)
    ]

    def told(stage: Stage) -> Prediction:
        gain = gains[stage.workflow_id]
        return Prediction({"weak": known(30.0, 0.0), "strong": known(30.0, gain)}, known(30.0))

    def late(target_s: float) -> float:
        config = Config(price=0.01, p95_target_s=target_s)
        result = simulate(config, WEAK_THEN_STRONG, workflows, told)
        later = result.workflows[500:]
        return sum(w.latency_s > 0.9 for w in later) / len(later)

    assert late(0.0) > 0.15
    assert late(0.9) == pytest.approx(0.05, abs=0.01)


def test_a_task_that_fails_is_done_again_by_another_model_from_the_beginning() -> None:
    result = simulate(
        Config(price=0.05),
        WEAK_THEN_STRONG,
        [failing()],
        half_and_half,
        tries=2,
        watch=checked,
    )
    (record,) = result.workflows
    assert (record.success, record.error, record.tries) == (1.0, "", 2)
    assert record.models == ["weak", "weak", "strong"]
    assert [stage.prompt_tokens for stage in record.stages] == [50, 67, 50]
    assert record.latency_s == pytest.approx(0.010 + 0.5 + 0.020 + 0.300)
    assert [engine.cached_tokens for engine in result.engines] == [59, 0]


@pytest.mark.parametrize(
    ("workflow", "tries", "success"),
    [
        (failing(), 1, 0.0),  # nobody tries again
        (failing(unseen=("weak",)), 2, 0.0),  # the client does not know that it failed
        (failing(weak=0.5), 2, 0.5),  # it did not
    ],
)
def test_a_task_is_not_done_again_without_a_reason(
    workflow: Workflow, tries: int, success: float
) -> None:
    config = Config(policy="static:weak")
    result = simulate(config, WEAK_THEN_STRONG, [workflow], half_and_half, tries=tries)
    (record,) = result.workflows
    assert (record.models, record.success, record.tries) == (["weak", "weak"], success, 1)


def test_a_further_try_that_is_worth_too_little_is_declined() -> None:
    def hopeless(stage: Stage) -> Prediction:
        return Prediction({"weak": known(30.0, 0.5), "strong": known(30.0, 0.5)}, known(30.0))

    result = simulate(
        Config(price=0.05), WEAK_THEN_STRONG, [failing()], hopeless, tries=3, watch=checked
    )
    (record,) = result.workflows
    assert (record.models, record.success, record.tries) == (["weak", "weak"], 0.0, 1)
    assert record.declined
    assert record.finish_s == pytest.approx(1.0 + 0.010 + 0.5 + 0.020)
    assert len(record.stages) == 2
    assert record.error == ""


def test_where_all_is_optional_a_workflow_may_end_before_it_began() -> None:
    result = simulate(
        Config(price=100.0), WEAK_THEN_STRONG, [failing()], half_and_half, optional=True
    )
    (record,) = result.workflows
    assert (record.stages, record.success, record.tries) == ([], 0.0, 0)
    assert (record.latency_s, record.declined) == (0.0, True)


@pytest.mark.parametrize("policy", ["chimera", "paper", "mlfq", "least_loaded", "router_only"])
def test_tries_under_every_policy_keep_every_bound(policy: str) -> None:
    workflows = drawn(150, 20.0, seed=7)
    predictor = PriorPredictor(Config())
    result = simulate(
        Config(policy=policy, max_queued_stages=50),
        cluster(),
        workflows,
        predictor.prediction,
        observers=[predictor],
        faults=[Fault("l0", 1.0, 3.0, 0.5)],
        tries=3,
        optional=True,
        watch=checked,
    )
    assert {record.tries for record in result.workflows} >= {1, 2}
    for record in result.workflows:
        assert record.tries <= 3
        assert record.error or record.success is not None
        if record.success == 0.0 and not record.error:
            assert record.tries == 3 or record.declined


def test_a_predictor_hears_what_it_would_hear_from_the_daemon() -> None:
    prior = PriorPredictor(Config())
    workflows = [
        Workflow(f"w{n}", 0.1 * n, 20, {"m": Run((StageTruth(30), StageTruth(50)), 1.0)}, "code")
        for n in range(200)
    ]
    setup = EngineSetup("e", "m", PROFILE)
    simulate(Config(), [setup], workflows, prior.prediction, observers=[prior])
    stage = Stage(b"c", "r", "w", 0, "code", None, 10, 200, 40, 0)
    learned = prior.prediction(stage).of("m")
    assert learned.confidence == pytest.approx(1.0, abs=0.05)
    assert learned.stage_tokens_mean == pytest.approx(30.0, abs=5.0)
    assert learned.remaining_tokens_mean == pytest.approx(80.0, abs=5.0)


# Bad input.

GOOD = Workflow("good", 0.0, 10, {"m": Run((StageTruth(5),), 1.0)})


def changed(stage: StageTruth | None = None, **fields: object) -> Workflow:
    bad = replace(GOOD, workflow_id="bad", **fields)
    return bad if stage is None else replace(bad, runs={"m": Run((StageTruth(5), stage))})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD, "workflow 1 .'good'.: the id is used twice"),
        (changed(arrival_s=-1.0), "workflow 1 .'bad'.: `arrival_s` must be 0 or more"),
        (changed(arrival_s=inf), "`arrival_s` must be 0 or more, not inf"),
        (changed(prompt_tokens=0), "`prompt_tokens` must be at least 1"),
        (changed(runs={"x": Run((StageTruth(5),))}), "no run of model 'm', which engine 'e'"),
        (changed(runs={"m": Run(())}), "workflow 1 .'bad'., model 'm': the run has no stage"),
        (changed(runs={"m": Run((StageTruth(5),), 2.0)}), "`success` must be from 0 to 1, not 2.0"),
        (changed(StageTruth(0)), "stage 1: 0 output tokens; from 1 to 1024"),
        (changed(StageTruth(5, 0, -0.5)), "stage 1: the next stage begins -0.5 s .* overlap"),
        (changed(StageTruth(5, -1)), "stage 1: the next stage would have -1 new tokens"),
        (changed(StageTruth(5, 0, 0.0, False)), "stage 1: the next stage would have 0 new tokens"),
    ],
)  # fmt: skip
def test_bad_workflows_are_refused_by_name(bad: Workflow, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(Config(), [EngineSetup("e", "m", PROFILE)], [GOOD, bad], middling)


def test_bad_clusters_faults_and_rates_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="at least once, not 0 times"):
        simulate(Config(), cluster(), drawn(1, 1.0, 1), middling, tries=0)
    setup = EngineSetup("e", "m", PROFILE)
    with pytest.raises(ValueError, match="the cluster has no engine"):
        simulate(Config(), [], [GOOD], middling)
    with pytest.raises(ValueError, match="engine 'e': the name is used 2 times"):
        simulate(Config(), [setup, setup], [GOOD], middling)
    with pytest.raises(ValueError, match="engine 'e': `max_inflight` must be at least 1"):
        simulate(Config(), [replace(setup, max_inflight=0)], [GOOD], middling)
    with pytest.raises(ValueError, match="there is no workflow"):
        simulate(Config(), [setup], [], middling)
    with pytest.raises(ValueError, match="no policy 'chimaera'; there are: chimera"):
        simulate(Config(policy="chimaera"), [setup], [GOOD], middling)
    with pytest.raises(ValueError, match="'static:n': no engine serves 'n'; there are: m"):
        simulate(Config(policy="static:n"), [setup], [GOOD], middling)
    with pytest.raises(ValueError, match="no engine 'f'; there are: e"):
        simulate(Config(), [setup], [GOOD], middling, faults=[Fault("f", 1.0)])
    with pytest.raises(ValueError, match="killed at 2.0, back at 1.0"):
        simulate(Config(), [setup], [GOOD], middling, faults=[Fault("e", 2.0, 1.0)])
    faults = [Fault("e", 2.0, 4.0), Fault("e", 1.0, 3.0)]
    with pytest.raises(ValueError, match="killed at 2.0 s while it is gone"):
        simulate(Config(), [setup], [GOOD], middling, faults=faults)
    for rate in (0.0, -1.0, inf):
        with pytest.raises(ValueError, match="the arrival rate must be more than 0"):
            poisson_arrivals(rate, 10, 0)
