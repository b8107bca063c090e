"""Each metric against its definition, on the plain rows and on rows repeated by weight."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera_predictors import metrics

Metric = Callable[..., np.ndarray]

SCORED: dict[str, Metric] = {
    "auc": metrics.auc,
    "average_precision": metrics.average_precision,
    "apgr": metrics.apgr,
    "pearson": metrics.pearson,
    "spearman": metrics.spearman,
    "kendall_distance": metrics.kendall_distance,
    "r2": metrics.r2,
    "brier": metrics.brier,
}


def one(metric: Metric, *values: np.ndarray) -> float:
    """The plain figure: every row once."""
    return float(metric(*values, np.ones((len(values[0]), 1)))[0])


def auc_of_pairs(score: np.ndarray, success: np.ndarray) -> float:
    above = score[success >= 0.5][:, None] - score[success < 0.5]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def kendall_of_pairs(x: np.ndarray, y: np.ndarray) -> float:
    upper = np.triu_indices(len(x), 1)
    a = np.sign(x[:, None] - x)[upper]
    b = np.sign(y[:, None] - y)[upper]
    tau = (a * b).sum() / np.sqrt((a != 0).sum() * (b != 0).sum())
    return float((1 - tau) / 2)


def precision_of_thresholds(score: np.ndarray, success: np.ndarray) -> float:
    total, seen = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        chosen = score >= threshold
        recall = success[chosen].sum() / success.sum()
        total += (recall - seen) * success[chosen].mean()
        seen = recall
    return total


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_figures_are_those_of_the_definitions(rng: np.random.Generator) -> None:
    x = np.round(rng.normal(size=200), 1)
    y = np.round(x + rng.normal(size=200), 1)
    success = (y > 0).astype(float)
    assert one(metrics.auc, x, success) == pytest.approx(auc_of_pairs(x, success))
    assert one(metrics.kendall_distance, x, y) == pytest.approx(kendall_of_pairs(x, y))
    assert one(metrics.average_precision, x, success) == pytest.approx(
        precision_of_thresholds(x, success)
    )
    assert one(metrics.pearson, x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert one(metrics.r2, x, y) == pytest.approx(
        1 - ((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    )


def test_kendall_is_right_for_small_ranks_with_ties() -> None:
    x = np.array([1.0, 2.0, 2.0, 3.0, 5.0, 4.0])
    assert one(metrics.kendall_distance, x, x) == 0.0
    assert one(metrics.kendall_distance, x, -x) == 1.0
    y = np.array([1.0, 1.0, 2.0, 2.0, 0.0, 3.0])
    assert one(metrics.kendall_distance, x, y) == pytest.approx(kendall_of_pairs(x, y))
    assert one(metrics.spearman, x, x**3) == pytest.approx(1.0)


rows = st.tuples(
    st.integers(0, 6).map(lambda value: value / 4),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(0, 3),
)


@pytest.mark.parametrize("name", SCORED)
@settings(max_examples=60)
@given(table=st.lists(rows, min_size=1, max_size=40))
def test_a_weight_stands_for_so_many_equal_rows(
    name: str, table: list[tuple[float, float, int]]
) -> None:
    x, y, weight = (np.array(column) for column in zip(*table, strict=True))
    weights = np.column_stack([np.ones(len(x)), weight]).astype(np.float32)
    copies = np.repeat(np.arange(len(x)), weight)
    if not len(copies):
        return
    weighted = SCORED[name](x, y, weights)[1]
    repeated = one(SCORED[name], x[copies], y[copies])
    assert weighted == pytest.approx(repeated, abs=1e-6, nan_ok=True)


def test_apgr_of_perfect_random_and_reversed_scores() -> None:
    gap = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    # The two tasks that gain are called first: all is recovered after a quarter of the calls.
    assert one(metrics.apgr, gap, gap) == pytest.approx(0.875)
    assert one(metrics.apgr, np.zeros(8), gap) == pytest.approx(0.5)
    assert one(metrics.apgr, -gap, gap) == pytest.approx(0.125)
    assert np.isnan(one(metrics.apgr, gap, -gap))  # the large model is the worse one


def test_calibration_error_of_known_excess() -> None:
    score = np.repeat([0.2, 0.8], 50)
    low, high = np.tile([1.0, 0, 0, 0, 0], 10), np.tile([0.0, 1, 1, 1, 1], 10)
    assert one(metrics.ece, score, np.concatenate([low, high])) == pytest.approx(0.0)
    assert one(metrics.ece, score + 0.1, np.concatenate([low, high])) == pytest.approx(0.1)
    assert one(metrics.ece, 1 - score, np.concatenate([low, high])) == pytest.approx(0.6)


def test_calibration_error_takes_fractional_success() -> None:
    score = np.linspace(0, 1, 300)
    assert one(metrics.ece, score, score) == pytest.approx(0.0)
    assert one(metrics.brier, score, score) == pytest.approx(0.0)
    assert one(metrics.brier, score, score - 0.5) == pytest.approx(0.25)


def test_calibration_error_is_centred_on_the_plain_figure(rng: np.random.Generator) -> None:
    score = rng.random(400)
    success = (rng.random(400) < score).astype(float)
    samples = metrics.ece(score, success, metrics.task_weights(np.arange(400), 300, seed=0))
    assert samples[1:].mean() > samples[0] + 0.01  # raised by the noise of resampling
    shifted = metrics.centred(samples)
    assert shifted[0] == samples[0]
    assert shifted[1:].mean() == pytest.approx(samples[0], abs=0.002)
    assert (metrics.centred(np.array([0.0, 0.1, 0.3])) >= 0).all()


def test_pinball_and_coverage() -> None:
    actual = np.array([1.0, 2.0, 3.0, 4.0])
    weights = np.ones((4, 1))
    assert metrics.pinball(actual - 1, actual, 0.9, weights)[0] == pytest.approx(0.9)
    assert metrics.pinball(actual + 1, actual, 0.9, weights)[0] == pytest.approx(0.1)
    low, high = np.full(4, 2.0), np.full(4, 3.0)
    assert metrics.coverage(low, high, actual, weights)[0] == 0.5


@pytest.mark.parametrize("success", [0.0, 1.0])
def test_one_outcome_only_is_undefined(success: float) -> None:
    score, same = np.linspace(0, 1, 5), np.full(5, success)
    assert np.isnan(one(metrics.auc, score, same))
    assert np.isnan(one(metrics.kendall_distance, score, same))
    assert np.isnan(one(metrics.pearson, score, same))
    assert np.isnan(one(metrics.r2, score, same))
    assert one(metrics.brier, score, same) > 0


@pytest.mark.parametrize("metric", [*SCORED.values(), metrics.ece])
def test_no_rows_are_undefined(metric: Metric) -> None:
    empty = np.zeros(0)
    assert np.isnan(metric(empty, empty, np.ones((0, 3)))).tolist() == [True] * 3


def test_tasks_are_drawn_whole_and_alike_for_a_seed() -> None:
    tasks = np.array([7, 7, 2, 2, 2, 9])
    weights = metrics.task_weights(tasks, 50, seed=1)
    assert weights.shape == (6, 51)
    assert (weights[:, 0] == 1).all()
    assert (weights[0] == weights[1]).all()
    assert (weights[2] == weights[3]).all()
    drawn = weights[[0, 2, 5], 1:]
    assert (drawn.sum(axis=0) == 3).all()
    assert len(np.unique(drawn, axis=1).T) > 3
    assert (weights == metrics.task_weights(tasks, 50, seed=1)).all()
    assert (weights != metrics.task_weights(tasks, 50, seed=2)).any()


def test_intervals_hold_the_truth_about_as_often_as_they_say(rng: np.random.Generator) -> None:
    held = 0
    for _ in range(200):
        by_task = rng.normal(size=40)
        tasks = np.repeat(np.arange(40), 3)  # three equal rows per task: 40 facts, not 120
        weights = metrics.task_weights(tasks, 200, seed=int(rng.integers(1 << 30)))
        found = metrics.figure(metrics.mean(by_task[tasks], weights))
        held += found.low <= 0 <= found.high
    assert 176 <= held <= 199


def test_paired_difference_is_sharper_than_two_intervals(rng: np.random.Generator) -> None:
    common, tasks = rng.normal(size=100), np.arange(100)
    weights = metrics.task_weights(tasks, 300, seed=0)
    a = metrics.mean(common, weights)
    b = metrics.mean(common + 0.05 + 0.01 * rng.normal(size=100), weights)
    found = metrics.paired(b, a)
    assert found.low > 0
    assert metrics.figure(b).low < metrics.figure(a).value


def test_samples_that_are_mostly_undefined_have_no_interval() -> None:
    samples = np.array([0.5, 0.4, np.nan, np.nan, np.nan])
    value, low, high = metrics.figure(samples)
    assert value == 0.5
    assert np.isnan(low)
    assert np.isnan(high)


def test_macro_mean_leaves_undefined_parts_out() -> None:
    parts = [np.array([0.6, 0.5]), np.array([np.nan, 0.9]), np.array([0.8, np.nan])]
    assert metrics.macro(parts).tolist() == pytest.approx([0.7, 0.5])
    assert np.isnan(metrics.macro(parts[1:2])).all()
