"""Figures of simulations: intervals over tasks and seeds, paired ratios, frontiers."""

import math

import numpy as np
import pytest

from chimera_bench import sim_summary
from chimera_bench.sim_runs import Bounds, Columns
from chimera_bench.sim_summary import Corners, Row, Weights, hypervolume, least_at

NAN = math.nan


def columns(
    task: list[int], latency_s: list[float], success: list[float] | None = None, wait_s: float = 1.0
) -> Columns:
    latency = np.array(latency_s, dtype=float)
    return Columns(
        np.array(task, dtype=np.intp),
        latency,
        10.0 * latency,
        np.ones(len(task)) if success is None else np.array(success, dtype=float),
        {"no_engine": int(np.isnan(latency).sum())} if np.isnan(latency).any() else {},
        {"a": 1, "b": 3},
        {"x": 0.5},
        {"x": 0.25},
        wait_s,
        2,
        100.0,
        0,
        np.ones(len(task), dtype=np.intp),
    )


def random_rows(seed: int, tasks: int = 7) -> list[Columns]:
    random = np.random.default_rng(seed)
    rows: list[Columns] = []
    for workflows in (40, 25):
        latency = random.exponential(3.0, workflows)
        latency[random.random(workflows) < 0.1] = NAN
        success = (random.random(workflows) < 0.5).astype(float)
        rows.append(
            columns(random.integers(tasks, size=workflows).tolist(), [*latency], [*success])
        )
    return rows


def repeated(seeds: list[Columns], weights: Weights, draw: int, name: str) -> np.ndarray:
    """The workflows of a draw, written out."""
    parts = [
        np.repeat(
            getattr(each, name),
            (weights.tasks[draw][each.task] * weights.seeds[draw][seed]).astype(int),
        )
        for seed, each in enumerate(seeds)
    ]
    values = np.concatenate(parts)
    return values[~np.isnan(values)]


def test_draws_are_the_statistics_of_repeated_workflows() -> None:
    seeds = random_rows(1)
    weights = sim_summary.make_weights(7, 2, draws=70, seed=3)
    drawn = sim_summary.draws_of(Row("p", "p", "1", seeds), weights)
    assert (weights.tasks[0] == 1.0).all()
    assert (weights.tasks.sum(axis=1) == 7.0).all()
    assert (weights.seeds.sum(axis=1) == 2.0).all()
    for draw in range(71):
        latency = repeated(seeds, weights, draw, "latency_s")
        assert drawn.latency_s[draw] == pytest.approx(latency.mean())
        success = repeated(seeds, weights, draw, "success")
        assert drawn.success[draw] == pytest.approx(success.mean())
        wanted = np.percentile(latency, (50, 95, 99), method="inverted_cdf")
        assert [drawn.p50_s[draw], drawn.p95_s[draw], drawn.p99_s[draw]] == wanted.tolist()


def test_interval_covers_where_workflows_of_a_task_are_alike() -> None:
    """Taken for independent, 40 workflows of 20 tasks would give intervals too narrow by half."""
    random = np.random.default_rng(5)
    covered = 0
    for trial in range(60):
        of_task = random.normal(10.0, 2.0, 20)
        seeds = [columns(list(range(20)) * 10, np.tile(of_task, 10).tolist()) for _ in range(2)]
        weights = sim_summary.make_weights(20, 2, draws=300, seed=trial)
        found = sim_summary.interval(
            sim_summary.draws_of(Row("p", "p", "1", seeds), weights).latency_s
        )
        assert found.low < found.value < found.high
        covered += found.low < 10.0 < found.high
    assert covered >= 50  # of 60 at a nominal 95 %


def bounds(tasks: int = 7) -> Bounds:
    return Bounds(np.full(tasks, 0.5), np.tile([0.25, 0.75], (tasks, 1)))


def test_comparisons_are_paired() -> None:
    slow = random_rows(2)
    fast = [
        columns(each.task.tolist(), (each.latency_s / 2.0).tolist(), each.success.tolist())
        for each in slow
    ]
    rows = [Row("fast", "fast", "0.8", fast), Row("slow", "slow", "0.8", slow)]
    found = sim_summary.summarise_load(rows, 2.0, bounds(), "slow", "slow", draws=50)
    (compared,) = found.comparisons
    assert (compared.setting, compared.baseline, compared.load) == ("fast", "slow", "0.8")
    for ratio in (compared.latency_ratio, compared.p95_ratio, compared.per_token_ratio):
        assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    gain = compared.success_gain
    assert (gain.low, gain.value, gain.high) == (0.0, 0.0, 0.0)
    assert found.summaries[1].latency_mean_s.low < found.summaries[1].latency_mean_s.high


def test_summary_counts_what_happened() -> None:
    seeds = [columns([0, 1], [2.0, NAN], [1.0, 0.0]), columns([1, 1], [4.0, 6.0], wait_s=7.0)]
    rows = [Row("p", "sweep", "0.8", seeds)]
    found = sim_summary.summarise_load(rows, 2.0, bounds(2), "p", "absent", draws=50)
    assert found.frontiers == found.comparisons == []
    (summary,) = found.summaries
    assert (summary.workflows, summary.errors, summary.preemptions) == (4, {"no_engine": 1}, 4)
    assert summary.success.value == 0.75  # without an answer: no success
    assert summary.latency_mean_s.value == 4.0
    assert summary.latency_p50_s.value == 4.0
    assert summary.ms_per_token.value == 40.0
    assert summary.latency_by_seed_s == [2.0, 5.0]
    assert summary.stage_share == {"a": 0.25, "b": 0.75}
    assert (summary.utilisation, summary.occupied) == ({"x": 0.5}, {"x": 0.25})
    assert summary.longest_wait_s == 7.0


def test_nothing_answered_gives_no_numbers_and_no_warning() -> None:
    nothing = [columns([0, 1], [NAN, NAN], [0.0, 0.0])]
    rows = [Row("p", "p", "1", nothing), Row("q", "q", "1", [columns([0, 1], [1.0, 2.0])])]
    found = sim_summary.summarise_load(rows, 1.0, bounds(2), "q", "q", draws=20)
    assert math.isnan(found.summaries[0].latency_mean_s.value)
    assert math.isnan(found.summaries[0].latency_p99_s.low)
    assert math.isnan(found.comparisons[0].latency_ratio.value)
    assert found.frontiers[0].hypervolume.value == 0.0


# Worst (latency 10, success 0), best (2, 1): an area of 8.
@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0.0),
        ([(2.0, 1.0)], 1.0),
        ([(6.0, 0.5)], 4.0 * 0.5 / 8.0),
        ([(6.0, 0.5), (6.0, 0.5)], 4.0 * 0.5 / 8.0),
        ([(6.0, 0.5), (7.0, 0.4)], 4.0 * 0.5 / 8.0),  # dominated
        ([(8.0, 1.0), (4.0, 0.25)], (6.0 * 0.25 + 2.0 * 0.75) / 8.0),  # any order
        ([(6.0, 0.5), (6.0, 0.75)], 4.0 * 0.75 / 8.0),  # equally fast
        ([(12.0, 0.9)], 0.0),  # slower than the worst
        ([(5.0, -0.1)], 0.0),  # worse than the worst model
        ([(NAN, 0.5), (6.0, 0.5)], 4.0 * 0.5 / 8.0),
    ],
)
def test_hypervolume_by_hand(points: list[tuple[float, float]], area: float) -> None:
    assert area_of(points, worst=(10.0, 0.0), best=(2.0, 1.0)) == pytest.approx(area)


def area_of(
    points: list[tuple[float, float]], worst: tuple[float, float], best: tuple[float, float]
) -> float:
    latency, success = np.array(points, dtype=float).reshape(-1, 2, 1).transpose(1, 0, 2)
    edges = Corners(*(np.array([value]) for value in (*worst, *best)))
    return hypervolume(latency, success, edges)[0]


def test_hypervolume_is_relative_to_its_corners() -> None:
    moved = area_of([(106.0, 3.5)], worst=(110.0, 3.0), best=(102.0, 4.0))
    assert moved == pytest.approx(4.0 * 0.5 / 8.0)
    assert math.isnan(area_of([(1.0, 1.0)], worst=(1.0, 0.5), best=(2.0, 1.0)))


def test_hypervolume_of_every_draw_is_that_of_a_plain_loop() -> None:
    random = np.random.default_rng(11)
    latency, success = random.uniform(0.0, 3.0, (6, 50)), random.uniform(0.0, 1.0, (6, 50))
    latency[random.random(latency.shape) < 0.1] = NAN
    success[:3] = np.round(success[:3], 1)  # some are equal
    edges = Corners(*(random.uniform(*ends, 50) for ends in ((2, 3), (0, 0.4), (0, 1), (0.6, 1))))
    found = hypervolume(latency, success, edges)
    for draw in range(50):
        worst = edges.worst_latency_s[draw], edges.worst_success[draw]
        area, reached = 0.0, worst[1]
        for seconds, share in sorted(zip(latency[:, draw], success[:, draw], strict=True),
                                     key=lambda p: (math.isnan(p[0]), p[0], -p[1])):  # fmt: skip
            if seconds < worst[0] and share > reached:
                area += (worst[0] - seconds) * (share - reached)
                reached = share
        whole = (worst[0] - edges.best_latency_s[draw]) * (edges.best_success[draw] - worst[1])
        assert found[draw] == pytest.approx(area / whole)


@pytest.mark.parametrize(
    ("wanted", "cost"),
    [
        (0.1, 1.0),  # the cheapest does more
        (0.2, 1.0),
        (0.3, 2.0),  # half way between (0.2, 1) and (0.4, 3)
        (0.5, 5.0),  # the hull passes below the point (0.5, 9)
        (0.6, 7.0),
        (0.7, NAN),
    ],
)
def test_cost_of_a_gain_along_a_curve(wanted: float, cost: float) -> None:
    gains, costs = np.array([0.4, 0.2, 0.5, 0.6]), np.array([3.0, 1.0, 9.0, 7.0])
    assert least_at(gains, costs, wanted) == pytest.approx(cost, nan_ok=True)


def test_frontier_by_hand() -> None:
    """Baseline: 4 s at 0.5. The sweep: 2 s at 0.25 and 6 s at 0.75, so 4 s at 0.5 in between."""
    task = [0, 1, 2, 3]
    base = Row("base", "base", "1", [columns(task, [4.0] * 4, [0, 1, 0, 1])])
    fast = Row("s 1", "s", "1", [columns(task, [2.0] * 4, [0, 1, 0, 0])])
    good = Row("s 2", "s", "1", [columns(task, [6.0] * 4, [1, 1, 0, 1])])
    edges = Bounds(np.full(4, 1.0), np.array([[0, 0], [0, 1], [0, 1], [0, 1]], dtype=float))
    found = sim_summary.summarise_load([base, fast, good], 1.0, edges, "base", "base", draws=20)
    sweep = found.frontiers[1]
    assert (sweep.sweep, sweep.settings) == ("s", ["s 1", "s 2"])
    # Worst corner (8, 0), best (1, 0.75).
    assert sweep.hypervolume.value == pytest.approx((6 * 0.25 + 2 * 0.5) / (7 * 0.75))
    assert sweep.latency_ratio.value == pytest.approx(1.0)
    assert sweep.success_gain.value == pytest.approx(0.0)
    itself = found.frontiers[0]
    assert itself.hypervolume.value == pytest.approx(4 * 0.5 / (7 * 0.75))
    assert itself.latency_ratio == sim_summary.Interval(1.0, 1.0, 1.0)
