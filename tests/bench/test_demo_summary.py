"""The demo's numbers: intervals, pairing, failures, and the words made of them."""

import math
import random

import numpy as np
import pytest

from chimera_bench import chaos, report, summary
from chimera_bench.summary import Comparison, Interval
from tests.bench.demo_records import failed, record, stage


def test_picks_stay_in_their_run_and_come_in_blocks() -> None:
    picks = summary.block_picks([16, 9], draws=50, seed=1)
    assert picks.shape == (50, 25)
    assert set(np.unique(picks[:, :16])) == set(range(16))
    assert set(np.unique(picks[:, 16:])) == set(range(16, 25))
    first_block = picks[:, :4]  # blocks of sqrt(16), circular
    assert ((np.diff(first_block, axis=1) % 16) == 1).all()
    assert (picks == summary.block_picks([16, 9], draws=50, seed=1)).all()


def test_interval_covers_the_mean_of_a_known_distribution() -> None:
    rng = random.Random(3)
    covered = 0
    for trial in range(60):
        run = [record(i, rng.expovariate(1.0)) for i in range(100)]
        mean = summary.summarise({"p": [run]}, seed=trial, draws=400)[0].latency_mean_s
        assert mean.low < mean.value < mean.high
        covered += mean.low < 1.0 < mean.high
    assert covered >= 50  # of 60 at a nominal 95 %


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(0, 20, 0.0, 0.161), (10, 20, 0.299, 0.701)]
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    found = summary.wilson(right, total)
    assert found.value == right / total
    assert found.low == pytest.approx(low, abs=1e-3)
    assert found.high == pytest.approx(high, abs=1e-3)
    assert math.isnan(summary.wilson(0, 0).value)


def test_summary_of_a_run() -> None:
    run = [
        record(0, 1.0, True, stage("a", 10), stage("b", 30, attempts=2)),
        record(1, 3.0, False, stage("a", 10)),
        failed(2, "engine_lost"),
        failed(3, "timeout"),
    ]
    found = summary.summarise({"p": [run]})[0]
    assert (found.workflows, found.answered, found.errors, found.lost) == (4, 2, 2, 1)
    assert found.retried_stages == 1
    assert found.success.value == 0.25  # errors count as failures
    assert found.latency_mean_s.value == 2.0
    assert found.latency_s["p50"] == 2.0
    assert found.ms_per_token.value == pytest.approx((1000 / 40 + 3000 / 10) / 2)
    assert found.stage_share == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3)}
    assert found.success_by_model == {"a": 0.0, "b": 1.0}
    assert found.span_s == pytest.approx(3.1)
    assert found.tokens_per_s == pytest.approx(50 / 3.1)


def test_nothing_answered_gives_no_numbers_and_no_warning() -> None:
    runs = {"p": [[failed(0, "no_engine")]], "q": [[record(0)]]}
    found = summary.summarise(runs)[0]
    assert math.isnan(found.latency_mean_s.value)
    assert math.isnan(found.tokens_per_s)
    (compared,) = summary.compare(runs, [("p", "q")])
    assert math.isnan(compared.latency_ratio.value)
    assert compared.success_gain.value == -1.0
    assert "-" in report.policies_table([found])


def test_comparison_is_paired() -> None:
    rng = random.Random(5)
    latencies = [rng.expovariate(1.0) for _ in range(50)]
    slow = [record(i, 2.0 * s, i % 2 == 0) for i, s in enumerate(latencies)]
    fast = [record(i, s, True) for i, s in enumerate(latencies)]
    (found,) = summary.compare({"fast": [fast], "slow": [slow]}, [("fast", "slow")])
    # Every workflow is twice as slow: paired, there is nothing uncertain about the ratio.
    for bound in (found.latency_ratio.low, found.latency_ratio.value, found.latency_ratio.high):
        assert bound == pytest.approx(2.0)
    assert found.per_token_ratio.value == pytest.approx(2.0)
    assert found.success_gain.value == 0.5
    assert found.success_gain.low > 0.0


def test_a_workflow_that_one_policy_did_not_answer_is_left_out_of_ratios() -> None:
    ours = [record(0, 1.0), failed(1, "engine_lost")]
    theirs = [record(0, 2.0), record(1, 1000.0)]
    (found,) = summary.compare({"a": [ours], "b": [theirs]}, [("a", "b")])
    assert found.latency_ratio.value == 2.0


def test_policies_must_have_run_the_same_workflows() -> None:
    with pytest.raises(ValueError, match="same workflows"):
        summary.summarise({"a": [[record(0)]], "b": [[record(0), record(1)]]})


def verdict(ratio: tuple[float, float, float], gain: tuple[float, float, float]) -> str:
    per_token = Interval(1.0, 1.0, 1.0)
    return report.verdict(Comparison("a", "b", Interval(*ratio), per_token, Interval(*gain)))


def test_verdict_claims_only_what_the_intervals_carry() -> None:
    faster = verdict((1.5, 1.2, 1.8), (0.02, -0.01, 0.05))
    assert (
        faster == "a against b: 1.50 times faster in mean latency, no difference in success shown."
    )
    slower = verdict((0.5, 0.4, 0.6), (0.10, 0.05, 0.15))
    assert slower == "a against b: 2.00 times slower in mean latency, 10.0 points more success."
    unclear = verdict((1.1, 0.9, 1.3), (-0.10, -0.15, -0.05))
    assert "no difference in mean latency shown, 10.0 points less success" in unclear
    assert "nothing can be said" in verdict((math.nan, math.nan, math.nan), (0.0, 0.0, 0.0))


def test_accounts_balance() -> None:
    run = [record(0, 1.0, True, stage(), stage()), failed(1, "engine_lost"), failed(2, "timeout")]
    seen = chaos.accounts(run, {"completed": 2, "requeued": 3})
    assert (seen.submitted, seen.answered, seen.errors, seen.lost) == (4, 2, 1, 1)
    assert seen.answered_twice == 0
    assert not seen.sound
    assert chaos.accounts(run[:2], {"completed": 2}).sound
    assert chaos.accounts(run[:2], {"completed": 3}).answered_twice == 1
    assert not chaos.accounts([failed(0, "engine_error", retryable=False)], {}).sound
