"""Policies against cases computed by hand, their properties, and Algorithm 1 written out."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chimera_daemon.config import Config, PaperConfig
from chimera_daemon.messages import Dispatch, ModelPrediction, Prediction, Stage, Tries
from chimera_daemon.policy import (
    NAMES,
    Choice,
    ClusterView,
    ModelView,
    WorkflowView,
    after_failure,
    finish_and_delay_s,
    make_policy,
    remaining_given,
)
from core_harness import PROFILE, Watched, dispatched, of, predict, prediction

Make = Callable[..., Watched]


def stage(**fields: Any) -> Stage:
    """A stage of 100 prompt tokens."""
    return msgspec.structs.replace(
        Stage(b"c", "r", "w", 0, "code", None, 100, 1000, 10, 1), **fields
    )


def view(name: str = "small", **fields: Any) -> ModelView:
    """One engine with two slots; 12 ms per step when full, 0.1 ms per prompt token."""
    values = {
        "engines": 1,
        "slots": 2,
        "slots_each": 2.0,
        "step_s": 0.01,
        "step_per_seq_s": 0.001,
        "prefill_s_per_token": 0.0001,
        "full_s_per_token": 0.006,
    }
    return ModelView(name, **(values | fields))


def choose(
    config: Config,
    views: Sequence[ModelView],
    predicted: Prediction,
    workflow: WorkflowView | None = None,
) -> Choice:
    """What the configured policy says."""
    return make_policy(config).choose(
        stage(), predicted, workflow or WorkflowView("w", "code"), views, ClusterView()
    )


# The registry.


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    for name in ("", "fastest", "static:", "static", "Chimera"):
        with pytest.raises(ValueError, match="no policy") as error:
            make_policy(Config(policy=name))
        assert all(known in str(error.value) for known in NAMES)


# chimera.

IDLE = WorkflowView("w", "code")


@pytest.mark.parametrize(
    ("case", "predicted", "workflow", "finish_s", "delay_s"),
    [
        # prefill .01 + 100 tokens in a batch of one
        (view(), predict(100), IDLE, 0.01 + 100 * 0.011, 0.0),
        # a batch of two: .012 per step; the other stands still for the prefill, then 1 ms per step
        (view(running=1), predict(100), IDLE, 0.01 + 1.2, 0.01 + 0.1),
        # requests from elsewhere count the same
        (view(foreign=1), predict(100), IDLE, 0.01 + 1.2, 0.01 + 0.1),
        # full, and one waits: its prefill .02 and its 50 tokens at .006, now and at the next stage
        (
            view(running=2, waiting=1, waiting_prompt=200, waiting_tokens=50.0),
            predict(50, later=1),
            IDLE,
            0.01 + 1.2 + 2 * (0.02 + 0.3),
            0.03 + 100 * (0.006 + 0.002),
        ),
        # two engines share all that
        (
            view(running=4, waiting=2, waiting_prompt=400, waiting_tokens=100.0, engines=2),
            predict(50, later=1),
            IDLE,
            0.01 + 1.2 + 2 * (0.02 + 0.3),
            0.03 + 100 * (0.006 + 0.002),
        ),
        # 60 of the 100 prompt tokens are in the prefix cache
        (
            view(),
            predict(100),
            WorkflowView("w", "code", "small", "e", 60),
            0.004 + 1.1,
            0.0,
        ),
        # and none if it ran on another model
        (view(), predict(100), WorkflowView("w", "code", "large", "e", 60), 0.01 + 1.1, 0.0),
        # stages have been seen to take three times what the profile says: so will this one
        (view(running=1, slowdown=3.0), predict(100), IDLE, 3 * (0.01 + 1.2), 3 * (0.01 + 0.1)),
    ],
)
def test_finish_and_delay_by_hand(
    case: ModelView,
    predicted: ModelPrediction,
    workflow: WorkflowView,
    finish_s: float,
    delay_s: float,
) -> None:
    assert finish_and_delay_s(stage(), predicted, workflow, case) == (
        pytest.approx(finish_s),
        pytest.approx(delay_s),
    )


def test_the_score_is_confidence_less_price_times_relative_seconds() -> None:
    predicted = prediction(small=predict(100, 0.6))
    choice = choose(Config(price=0.5), [view(running=1)], predicted)
    (candidate,) = choice.candidates
    assert candidate.finish_s == pytest.approx(1.21)
    assert candidate.score == pytest.approx(0.6 - 0.5 * (1.21 + 0.11) / 1.0)
    assert (choice.model, choice.reason) == ("small", "score")


def test_a_model_that_takes_over_is_credited_with_no_more_than_the_one_that_has_the_run() -> None:
    predicted = prediction(small=predict(100, 0.3), medium=predict(100, 0.2), large=predict(9, 0.9))
    models = [view(), view("medium"), view("large")]
    for model, expected in ((None, [0.3, 0.2, 0.9]), ("small", [0.3, 0.2, 0.3])):
        workflow = WorkflowView("w", "code", model)
        policy = make_policy(Config(price=0.5))
        choice = policy.choose(stage(stage=2), predicted, workflow, models, ClusterView())
        assert [c.confidence for c in choice.candidates] == expected
        assert choice.model == "large"  # quicker all the same


@pytest.mark.parametrize(
    ("confidence", "failed", "left"),
    [
        (0.4, 0.0, 0.4),  # what can do nothing says nothing by failing
        (0.7, 0.4, 0.7 * 0.5 + 0.3 * 0.7),
        (0.4, 0.4, 0.3 * 0.4),  # nested: nothing is left to a model no better
        (0.2, 0.9, 0.3 * 0.2),
        (1.0, 1.0, 0.3),
    ],
)
def test_confidence_after_a_failure_by_hand(confidence: float, failed: float, left: float) -> None:
    assert after_failure(confidence, failed) == pytest.approx(left)


@given(q=st.floats(0.0, 1.0), more=st.floats(0.0, 1.0), failed=st.floats(0.0, 1.0))
def test_a_failure_never_raises_confidence_and_keeps_order(
    q: float, more: float, failed: float
) -> None:
    assert 0.0 <= after_failure(q, failed) <= q + 1e-12
    assert after_failure(q, failed) <= after_failure(max(q, more), failed) + 1e-12
    assert after_failure(q, max(failed, more)) <= after_failure(q, failed) + 1e-12


def test_a_further_try_goes_to_another_model_with_what_is_left_of_its_confidence() -> None:
    predicted = prediction(
        small=predict(100, 0.3), medium=predict(100, 0.5), large=predict(100, 0.9)
    )
    models = [view(name) for name in ("small", "medium", "large")]
    policy = make_policy(Config(price=0.0))
    again = stage(tries=Tries(("small", "medium")))
    choice = policy.choose(again, predicted, IDLE, models, ClusterView())
    assert choice.model == "large"
    assert [c.confidence for c in choice.candidates] == pytest.approx(
        [0.0, 0.0, after_failure(0.9, 0.5)]
    )


def test_later_stages_of_a_further_try_know_of_the_failure_too() -> None:
    predicted = prediction(small=predict(100, 0.5), large=predict(100, 0.9))
    policy = make_policy(Config(price=0.0))
    later = stage(stage=1, tries=Tries(("medium", "small")))
    workflow = WorkflowView("w", "code", "large")
    choice = policy.choose(later, predicted, workflow, [view(), view("large")], ClusterView())
    assert choice.model == "large"
    left = after_failure(0.9, 0.5)
    assert [c.confidence for c in choice.candidates] == pytest.approx([0.0, left])
    assert left < 0.9


def test_what_is_quick_to_have_tried_comes_first_if_there_is_another_try() -> None:
    """Alone: .5 - .11 against .9 - .33, so large. With the other as second try: small."""
    predicted = prediction(small=predict(10, 0.5), large=predict(30, 0.9))
    models = [view(), view("large")]
    for left, chosen in ((0, "large"), (1, "small")):
        policy = make_policy(Config(price=1.0))
        first = stage(prompt_tokens=0, tries=Tries(left=left))
        choice = policy.choose(first, predicted, IDLE, models, ClusterView())
        assert choice.model == chosen
        small, large = (c.score for c in choice.candidates)
        expected = 0.5 - 0.11 + left * 0.5 * (after_failure(0.9, 0.5) - 0.33)
        assert small == pytest.approx(expected)
        assert large == pytest.approx(0.9 - 0.33 + left * 0.1 * max(0, 0.15 - 0.11))


def test_an_optional_stage_is_declined_if_no_model_is_worth_its_cost() -> None:
    predicted = prediction(small=predict(100, 0.5), large=predict(100, 0.9))
    models = [view(), view("large")]
    for optional, price, declined in ((True, 1.0, True), (False, 1.0, False), (True, 0.5, False)):
        policy = make_policy(Config(price=price))
        choice = policy.choose(stage(optional=optional), predicted, IDLE, models, ClusterView())
        assert choice.declined is declined
        assert choice.model == ("" if declined else "large")
        assert len(choice.candidates) == 2


VIEWS = st.builds(
    lambda engines, slots, running, waiting, tokens, prompt, slowdown, steps: view(
        engines=engines,
        slots=engines * slots,
        slots_each=float(slots),
        running=running,
        waiting=waiting,
        waiting_tokens=tokens,
        waiting_prompt=prompt,
        slowdown=slowdown,
        step_s=steps[0],
        step_per_seq_s=steps[1],
        prefill_s_per_token=steps[2],
        full_s_per_token=max((steps[0] + steps[1] * slots) / slots, 1e-9),
    ),
    st.integers(1, 4),
    st.integers(1, 64),
    st.integers(0, 300),
    st.integers(0, 300),
    st.floats(0, 1e6),
    st.integers(0, 10**6),
    st.floats(0.02, 50.0),
    st.tuples(st.floats(0, 1.0), st.floats(0, 1.0), st.floats(0, 1.0)),
)
PREDICTED = st.builds(
    lambda q, tokens, later: predict(tokens, q, later),
    st.floats(0, 1),
    st.floats(0, 1e5),
    st.floats(0, 10),
)


@given(
    before=VIEWS,
    predicted=PREDICTED,
    more=st.fixed_dictionaries(
        {
            "running": st.integers(0, 50),
            "waiting": st.integers(0, 50),
            "foreign": st.integers(0, 50),
            "waiting_tokens": st.floats(0, 1e6),
            "waiting_prompt": st.integers(0, 10**6),
        }
    ),
)
def test_more_congestion_on_a_model_never_makes_it_score_higher(
    before: ModelView, predicted: ModelPrediction, more: dict[str, Any]
) -> None:
    after = msgspec.structs.replace(
        before, **{name: getattr(before, name) + value for name, value in more.items()}
    )
    scores = [
        choose(Config(), [v], prediction(small=predicted)).candidates[0].score
        for v in (before, after)
    ]
    assert scores[1] <= scores[0] + 1e-9 * abs(scores[0])


CLUSTERS = st.lists(st.tuples(VIEWS, PREDICTED), min_size=1, max_size=4).map(
    lambda pairs: (
        [msgspec.structs.replace(v, name=f"m{i}") for i, (v, _) in enumerate(pairs)],
        Prediction({f"m{i}": p for i, (_, p) in enumerate(pairs)}, predict()),
    )
)


@given(CLUSTERS)
def test_when_time_costs_nothing_the_most_confident_model_is_chosen(
    cluster: tuple[list[ModelView], Prediction],
) -> None:
    views, predicted = cluster
    chosen = choose(Config(price=0.0), views, predicted).model
    assert predicted.of(chosen).confidence == max(p.confidence for p in predicted.models.values())


@given(CLUSTERS)
def test_when_time_costs_very_much_the_fastest_for_all_is_chosen(
    cluster: tuple[list[ModelView], Prediction],
) -> None:
    views, predicted = cluster
    cost = {v.name: sum(finish_and_delay_s(stage(), predicted.of(v.name), IDLE, v)) for v in views}
    chosen = choose(Config(price=1000.0), views, predicted).model
    assert cost[chosen] <= min(cost.values()) * (1 + 1e-9) + 1.0 / 1000.0


@given(CLUSTERS)
def test_the_choice_is_the_first_candidate_of_highest_score(
    cluster: tuple[list[ModelView], Prediction],
) -> None:
    choice = choose(Config(), *cluster)
    assert [c.model for c in choice.candidates] == [v.name for v in cluster[0]]
    assert choice.model == max(choice.candidates, key=lambda c: c.score).model


def test_a_model_is_chosen_even_if_no_score_can_be_told_from_another() -> None:
    for confidence in (float("nan"), float("-inf")):
        assert choose(Config(), [view()], prediction(small=predict(1, confidence))).model == "small"


@given(
    works=st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)),
    arrivals=st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)),
    aging=st.floats(0.01, 1e3),
    later=st.floats(0, 1e6),
)
def test_ranks_order_by_work_less_aging_times_wait_at_any_time(
    works: tuple[float, float], arrivals: tuple[float, float], aging: float, later: float
) -> None:
    rank = make_policy(Config(aging_tokens_per_s=aging)).rank
    ranks = [rank(stage(), predict(w), IDLE, a) for w, a in zip(works, arrivals, strict=True)]
    now = max(arrivals) + later
    keys = [w - aging * (now - a) for w, a in zip(works, arrivals, strict=True)]
    assume(abs(keys[0] - keys[1]) > 1e-6 * (1.0 + aging * now))
    assert (ranks[0] < ranks[1]) == (keys[0] < keys[1])


@given(
    long=st.floats(100.0, 5e3),
    short=st.floats(1.0, 99.0),
    aging=st.floats(5.0, 100.0),
    service_s=st.floats(0.5, 5.0),
)
def test_a_long_stage_starts_within_work_difference_by_aging_and_one_service(
    long: float, short: float, aging: float, service_s: float
) -> None:
    """A stream of short stages keeps the one slot busy for ever; one of them is already ahead."""
    s = Watched(aging_tokens_per_s=aging, reply_keep=1)
    s.join()
    s.submit(prediction(small=predict(short)))
    s.submit(prediction(small=predict(long)), request_id="long")
    bound_s = (long - short) / aging + service_s
    while True:
        s.submit(prediction(small=predict(short)))
        s.now += service_s
        (sent,) = of(s.finish(s.last_attempt), Dispatch)
        if sent.key[1] == "long":
            break
        assert s.now <= bound_s, "starved"
    assert s.now <= bound_s + service_s
    s.finish_all()


@given(data=st.data(), aging=st.sampled_from([1.0, 10.0, 200.0]))
@settings(max_examples=50)
def test_nothing_that_comes_too_late_passes_a_waiting_stage(
    data: st.DataObject, aging: float
) -> None:
    """Whatever starts while a stage of W tokens waits came less than (W + E) / aging after it.

    E: the tokens that its prefix is worth, which may be cached at one of the three engines.
    """
    s = Watched(aging_tokens_per_s=aging)
    for name in "abc":
        s.join(name)
    worth = PROFILE.prefill_s_per_token / PROFILE.step(1)
    stages, contexts = Counter[str](), dict[str, int]()
    waiting: dict[str, tuple[float, float]] = {}  # arrival, rank at arrival and prefix together

    def started(actions: list[Any]) -> None:
        for sent in of(actions, Dispatch):
            arrived_s, _ = waiting.pop(sent.key[1])
            for since_s, tokens in waiting.values():
                assert arrived_s - since_s <= tokens / aging + 1e-6, "passed by what came late"

    for number in range(data.draw(st.integers(20, 60), label="events")):
        s.now += data.draw(st.sampled_from([0.0, 0.1, 5.0]), label="seconds")
        workflow = data.draw(st.sampled_from("uvwxyz"), label="workflow")
        if s.attempts and data.draw(st.booleans(), label="finish"):
            attempt_id = data.draw(st.sampled_from(sorted(s.attempts)), label="attempt")
            whose = s.open[s.attempts[attempt_id][1]].stage.workflow_id
            contexts[whose] = 150
            started(s.finish(attempt_id, tokens=50))
            continue
        tokens = data.draw(st.sampled_from([1.0, 50.0, 900.0]), label="tokens")
        waiting[f"q{number}"] = s.now, tokens + 150 * worth * bool(contexts.get(workflow))
        predicted = prediction(small=predict(tokens))
        started(
            s.submit(
                predicted,
                workflow_id=workflow,
                stage=stages[workflow],
                request_id=f"q{number}",
            )
        )
        stages[workflow] += 1
    s.finish_all()


# What a running stage still owes.


@pytest.mark.parametrize(
    ("quantiles", "produced", "max_tokens", "expected"),
    [
        # .4 on 100..200 and .1 on 200..300
        ((50.0, 100.0, 200.0), 100, 1000, (0.4 * 50 + 0.1 * 150) / 0.5),
        # half of what was on 100..200 is left
        ((50.0, 100.0, 200.0), 150, 1000, (0.2 * 25 + 0.1 * 100) / 0.3),
        # all beyond 100 ends there: .5 is the mass at 100, .2 spread over 75..100
        ((50.0, 100.0, 200.0), 75, 100, (0.2 * 12.5 + 0.5 * 25) / 0.7),
        # a length known for certain: .06 on 40..100, .8 at 100, .1 on 100..150
        ((100.0, 100.0, 100.0), 40, 1000, (0.06 * 30 + 0.8 * 60 + 0.1 * 85) / 0.96),
        # it outlived all that was expected: as long again, or until it must end
        ((50.0, 100.0, 200.0), 300, 1000, 300.0),
        ((50.0, 100.0, 200.0), 900, 1000, 100.0),
        ((50.0, 100.0, 200.0), 1000, 1000, 1.0),
        ((0.0, 0.0, 0.0), 5, 1000, 5.0),
    ],
)
def test_remaining_tokens_by_hand(
    quantiles: tuple[float, float, float], produced: int, max_tokens: int, expected: float
) -> None:
    predicted = ModelPrediction(0.5, 100.0, quantiles, 100.0, quantiles, 0.0)
    assert remaining_given(predicted, produced, max_tokens) == pytest.approx(expected)


LENGTHS = st.sampled_from([0.0, 1.0, 100.0]) | st.floats(0.0, 1e5)
LENGTH_PREDICTIONS = st.builds(
    lambda mean, quantiles: ModelPrediction(
        0.5, mean, tuple(sorted(quantiles)), mean, (0, 0, 0), 0
    ),
    LENGTHS,
    st.tuples(LENGTHS, LENGTHS, LENGTHS),
)


@given(LENGTH_PREDICTIONS, st.integers(1, 10**6))
def test_before_the_first_token_the_mean_remains(
    predicted: ModelPrediction, max_tokens: int
) -> None:
    assert remaining_given(predicted, 0, max_tokens) == min(predicted.stage_tokens_mean, max_tokens)


@given(LENGTH_PREDICTIONS, st.integers(1, 10**6), st.integers(1, 10**6))
def test_at_least_one_token_and_at_most_up_to_max_tokens_remains(
    predicted: ModelPrediction, produced: int, max_tokens: int
) -> None:
    remaining = remaining_given(predicted, produced, max_tokens)
    assert 1.0 <= remaining <= max(1.0, max_tokens - produced) * (1 + 1e-9)


@given(LENGTH_PREDICTIONS, st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**6))
def test_the_total_expected_never_falls_while_tokens_come(
    predicted: ModelPrediction, produced: int, more: int, max_tokens: int
) -> None:
    before = produced + remaining_given(predicted, produced, max_tokens)
    after = produced + more + remaining_given(predicted, produced + more, max_tokens)
    assert after >= before * (1 - 1e-9)


# paper.


def algorithm_1(
    models: list[str],
    q: dict[str, float],
    P: dict[str, float],
    decode_s_per_token: dict[str, float],
    max_batch_size: dict[str, int],
    tau: float,
    delta_s: float,
    bound: str | None,
) -> str:
    """Lines of Algorithm 1 in order, without anything of ours."""
    if bound is not None:
        return bound
    load = {m: P[m] * decode_s_per_token[m] / max_batch_size[m] for m in models}
    fast = models[0]
    for m in models:
        if load[m] < load[fast]:
            fast = m
    left = list(models)
    while left:
        m = left[0]
        for other in left:
            if q[other] > q[m]:
                m = other
        left.remove(m)
        if load[m] <= (1 + tau) * load[fast] and q[m] >= q[fast] + delta_s:
            return m
    return fast


# Sixteenths and powers of two: no rounding anywhere, so that edges are met exactly.
SIXTEENTHS = st.integers(0, 16).map(lambda n: n / 16)


@given(
    models=st.lists(
        st.tuples(
            SIXTEENTHS,  # q
            st.integers(0, 12),  # P
            SIXTEENTHS.filter(bool),  # decode seconds per token, all slots at work
            st.sampled_from([1, 2, 4]),  # slots of an engine
            st.sampled_from([1, 2, 4]),  # engines
        ),
        min_size=1,
        max_size=4,
    ),
    tau=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    delta_s=st.sampled_from([0.0, 1 / 16, 0.125, 0.5, 1.0]),
    bound=st.none() | st.integers(0, 5),
)
def test_paper_chooses_as_algorithm_1_with_the_engines_of_a_model_as_one_larger(
    models: list[tuple[float, int, float, int, int]],
    tau: float,
    delta_s: float,
    bound: int | None,
) -> None:
    names = [f"m{i}" for i in range(len(models))]
    views = [
        view(name, engines=engines, claimed_tokens=float(P), full_s_per_token=decode / slots)
        for name, (_, P, decode, slots, engines) in zip(names, models, strict=True)
    ]
    predicted = Prediction(
        {n: predict(100.0, q) for n, (q, *_) in zip(names, models, strict=True)}, predict()
    )
    last = f"m{bound}" if bound is not None else None
    choice = choose(
        Config(policy="paper", paper=PaperConfig(tau=tau, delta_s=delta_s)),
        views,
        predicted,
        WorkflowView("w", "code", last),
    )
    assert choice.model == algorithm_1(
        names,
        {n: m[0] for n, m in zip(names, models, strict=True)},
        {n: float(m[1]) for n, m in zip(names, models, strict=True)},
        {n: m[2] for n, m in zip(names, models, strict=True)},
        {n: m[3] * m[4] for n, m in zip(names, models, strict=True)},
        tau,
        delta_s,
        last if last in names else None,  # a model without engines binds nobody
    )


def test_paper_counts_the_median_of_the_workflow_until_the_request_completes(
    scheduler: Make,
) -> None:
    s = scheduler(policy="paper")
    s.join(slots=1)

    def claimed() -> float:
        return s.core.snapshot()["models"][0]["claimed_tokens"]

    s.submit(prediction(small=predict(100.0, later=2)))
    s.submit(prediction(small=predict(7.3)))
    assert claimed() == pytest.approx(307.3)
    s.drain_engine("e")
    s.join("f")
    assert claimed() == pytest.approx(307.3)
    s.finish(1)
    assert claimed() == pytest.approx(7.3)
    s.finish(2)
    assert claimed() == 0.0


def test_paper_keeps_a_workflow_on_its_model_and_chooses_anew_if_that_is_gone(
    scheduler: Make,
) -> None:
    s = scheduler(policy="paper")
    s.join("a", "small", slots=9)
    s.join("b", "large", slots=9)
    sure = prediction(small=predict(10.0, 0.1), large=predict(10.0, 0.9))
    unsure = prediction(small=predict(10.0, 0.9), large=predict(10.0, 0.1))
    assert dispatched(s.submit(sure, workflow_id="w")) == [("r1", "b")]
    s.finish(1)
    assert dispatched(s.submit(unsure, workflow_id="w", stage=1)) == [("r2", "b")]
    assert dispatched(s.lose("b")) == [("r2", "a")]


def test_paper_puts_the_fewest_median_tokens_of_the_workflow_first(scheduler: Make) -> None:
    s = scheduler(policy="paper")
    s.join()
    s.submit()
    s.submit(prediction(small=predict(50.0, later=4)))
    s.submit(prediction(small=predict(100.0)))
    assert dispatched(s.finish(1)) == [("r3", "e")]


def test_paper_raises_a_starved_stage_and_lowers_it_after_its_service_rounds(
    scheduler: Make,
) -> None:
    s = scheduler(policy="paper", paper=PaperConfig(starvation_rounds=1, service_rounds=2))
    s.join(slots=2)
    for _ in range(2):
        s.submit()
    s.submit(prediction(small=predict(900.0)))
    s.submit(prediction(small=predict(1.0)))
    assert dispatched(s.finish(1)) == [("r4", "e")]
    (starved,) = of(s.finish(2), Dispatch)
    assert (starved.key[1], starved.priority) == ("r3", 900 - 10_000_000)
    for _ in range(2):  # two rounds while it is in service
        s.submit()
        s.finish(max(s.attempts) if max(s.attempts) != starved.attempt_id else min(s.attempts))
    (again,) = of(s.fail(starved.attempt_id), Dispatch)
    assert (again.key[1], again.priority) == ("r3", 900)


# The baselines.


@pytest.mark.parametrize("policy", ["least_loaded", "mlfq", "ltr", "stjf"])
def test_least_loaded_takes_the_fewest_requests_per_engine(policy: str) -> None:
    config = Config(policy=policy)
    views = [view("a", running=4, engines=2), view("b", running=1, waiting=2), view("c", foreign=3)]
    assert choose(config, views, prediction()).model == "a"
    views[1].waiting = 0
    assert choose(config, views, prediction()).model == "b"
    views[2].foreign = 0
    assert choose(config, views, prediction()).model == "c"


def test_round_robin_takes_models_in_turn_each_as_often_as_it_has_engines(scheduler: Make) -> None:
    s = scheduler(policy="round_robin")
    s.join("a1", "a", slots=99)
    s.join("a2", "a", slots=99)
    s.join("b", "b", slots=99)
    models = [of(s.submit(), Dispatch)[0].receipt.model for _ in range(30)]
    assert Counter(models) == {"a": 20, "b": 10}
    assert all(Counter(models[i : i + 3]) == {"a": 2, "b": 1} for i in range(28))


def test_static_waits_for_its_model_rather_than_take_another(scheduler: Make) -> None:
    s = scheduler(policy="static:large")
    s.join("a", "small", slots=9)
    assert dispatched(s.submit()) == []
    assert dispatched(s.submit(model="small")) == [("r2", "a")]
    assert dispatched(s.join("b", "large")) == [("r1", "b")]


@given(CLUSTERS)
def test_router_only_takes_the_first_of_the_most_confident_whatever_the_load(
    cluster: tuple[list[ModelView], Prediction],
) -> None:
    views, predicted = cluster
    q = [predicted.of(v.name).confidence for v in views]
    assert choose(Config(policy="router_only"), views, predicted).model == f"m{q.index(max(q))}"


@pytest.mark.parametrize("policy", ["least_loaded", "router_only", "round_robin", "static:small"])
def test_baselines_without_a_rank_serve_in_order_of_arrival(policy: str) -> None:
    rank = make_policy(Config(policy=policy)).rank
    served = WorkflowView("w", "code", output_tokens=10_000)
    assert rank(stage(), predict(5.0), IDLE, 9.0) == rank(stage(), predict(500.0), served, 1.0)


@pytest.mark.parametrize(("policy", "first"), [("ltr", "r2"), ("stjf", "r3"), ("paper", "r3")])
def test_ltr_ranks_by_the_stage_and_stjf_by_the_rest_of_the_workflow(
    scheduler: Make, policy: str, first: str
) -> None:
    s = scheduler(policy=policy)
    s.join()
    s.submit()
    s.submit(prediction(small=predict(10.0, later=9)))
    s.submit(prediction(small=predict(50.0)))
    assert dispatched(s.finish(1))[0][0] == first


@pytest.mark.parametrize("policy", ["ltr", "stjf"])
def test_ltr_and_stjf_rank_by_the_median_on_the_chosen_model(policy: str) -> None:
    rank = make_policy(Config(policy=policy)).rank
    low = ModelPrediction(0.5, 900.0, (1.0, 10.0, 999.0), 900.0, (1.0, 10.0, 999.0), 0.0)
    high = ModelPrediction(0.5, 20.0, (19.0, 20.0, 21.0), 20.0, (19.0, 20.0, 21.0), 0.0)
    assert rank(stage(), low, IDLE, 9.0) < rank(stage(), high, IDLE, 1.0)


def rounds_waited(s: Watched, most: int) -> int:
    """Stages of 1 token that start before the one that waits, if one comes for each that ends."""
    (waiting,) = [key for key, seen in s.open.items() if seen.attempt_id is None]
    for rounds in range(most):
        s.submit(prediction(small=predict(1.0)))
        (sent,) = of(s.finish(s.last_attempt, tokens=1), Dispatch)
        if sent.key == waiting:
            return rounds
    return most


@pytest.mark.parametrize("policy", ["ltr", "stjf"])
def test_nothing_bounds_starvation_under_ltr_and_stjf(scheduler: Make, policy: str) -> None:
    s = scheduler(policy=policy, reply_keep=1)
    s.join()
    s.submit()
    s.submit(prediction(small=predict(2.0)))
    assert rounds_waited(s, most=500) == 500


# mlfq.


@pytest.mark.parametrize(
    ("tokens", "level"),
    [(0, 0), (127, 0), (128, 1), (255, 1), (256, 2), (511, 2), (512, 3), (128 << 20, 21)],
)
def test_a_level_of_mlfq_is_twice_as_wide_as_all_before_it(tokens: int, level: int) -> None:
    rank = make_policy(Config(policy="mlfq")).rank
    workflow = WorkflowView("w", "code", output_tokens=tokens)
    assert rank(stage(), predict(5.0), workflow, 1.0) == level


def test_mlfq_puts_workflows_first_that_got_little_and_those_alike_by_arrival(
    scheduler: Make,
) -> None:
    s = scheduler(policy="mlfq")
    s.join()
    for tokens in (600, 100, 127, 0):
        s.submit(workflow_id=f"got{tokens}")
        s.finish(s.last_attempt, tokens)
    s.submit()
    for tokens in (600, 127, 0, 100):
        s.submit(workflow_id=f"got{tokens}", request_id=f"{tokens}", stage=1)
    order = [dispatched(s.finish(s.last_attempt))[0][0] for _ in range(4)]
    assert order == ["127", "0", "100", "600"]


def test_mlfq_counts_every_finished_stage_of_a_workflow_and_no_failed_attempt(
    scheduler: Make,
) -> None:
    s = scheduler(policy="mlfq")
    s.join()
    for number in range(257):  # more than are remembered for the predictors
        s.submit(workflow_id="w", stage=number)
        s.finish(s.last_attempt, tokens=1 if number < 256 else 1000)
    (sent,) = of(s.submit(workflow_id="w", stage=257), Dispatch)
    assert sent.priority == 4  # 1256 tokens: at least 8 quanta, fewer than 16
    s.report("e", {sent.attempt_id: 900})
    (again,) = of(s.fail(sent.attempt_id), Dispatch)
    assert again.priority == 4


def test_mlfq_lets_a_stage_be_passed_by_200_others_and_no_more(scheduler: Make) -> None:
    s = scheduler(policy="mlfq", reply_keep=1)
    s.join()
    s.submit(workflow_id="w")
    s.finish(1, tokens=5000)
    s.submit()
    s.submit(workflow_id="w", stage=1)
    assert rounds_waited(s, most=1000) == 200
