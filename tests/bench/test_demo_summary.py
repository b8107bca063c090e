"""The demo's numbers: intervals, pairing, failures, and the words made of them."""

import math
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from chimera_bench import chaos, plot, report, summary
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
    assert found.queue_longest_s == 0.1
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


@pytest.mark.parametrize("size", [1, 2, 19, 20, 21, 100])
def test_percentile_of_what_is_there(size: int) -> None:
    values = np.random.default_rng(size).exponential(size=(3, size))
    assert summary.percentile_95(values) == pytest.approx(np.percentile(values, 95, axis=1))
    holes = np.concatenate([values, np.full((3, 4), math.nan)], axis=1)[:, ::-1]
    assert summary.percentile_95(holes) == pytest.approx(np.percentile(values, 95, axis=1))
    assert math.isnan(summary.percentile_95(np.array([math.nan, math.nan])))


def test_relative_figures_are_paired_and_below_one_where_it_is_faster() -> None:
    rng = random.Random(5)
    latencies = [rng.expovariate(1.0) for _ in range(50)]
    base = [[record(i, s, i % 2 == 0) for i, s in enumerate(latencies)]]
    fast = [[record(i, 0.5 * s, True) for i, s in enumerate(latencies)]]
    found = summary.relative({"fast": fast, "base": base}, "base")
    (row,) = found
    assert (row.policy, row.baseline) == ("fast", "base")
    for ratio in (row.latency_mean, row.latency_p95):
        for bound in (ratio.low, ratio.value, ratio.high):
            assert bound == pytest.approx(0.5)
    assert row.success_gain.value == 0.5
    with pytest.raises(KeyError):
        summary.relative({"fast": fast}, "base")


def test_relative_figures_leave_out_what_either_did_not_answer() -> None:
    ours = [record(0, 1.0), failed(1, "engine_lost")]
    theirs = [record(0, 2.0), record(1, 1000.0)]
    (row,) = summary.relative({"a": [ours], "b": [theirs]}, "b")
    assert row.latency_mean.value == row.latency_p95.value == 0.5
    nothing = [failed(0, "no_engine"), failed(1, "no_engine")]
    (row,) = summary.relative({"a": [nothing], "b": [theirs]}, "b")
    assert math.isnan(row.latency_mean.value)
    assert math.isnan(row.latency_p95.low)


def test_the_longest_wait_and_the_tail_are_in_the_table() -> None:
    waited = msgspec.structs.replace(stage(), queue_s=7.25)
    run = [record(i, 1.0 + i, True, stage(), stage()) for i in range(101)]
    run[3] = record(3, 4.0, True, stage(), waited)
    grid = report.policies(summary.summarise({"p": [run]}))
    cells = dict(zip(grid.head, grid.rows[0], strict=True))
    assert cells["longest wait s"] == "7.25"
    assert cells["P99"] == "100.00"
    assert "longest wait s" in grid.plain()


def test_figures_over_loads_have_a_line_per_policy_and_a_column_per_load() -> None:
    def runs(factor: float) -> summary.Runs:
        return {
            "least_loaded": [[record(i, factor * (1 + i)) for i in range(9)]],
            "p": [[record(i, 0.5 * factor * (1 + i), i < 3) for i in range(9)]],
        }

    summaries = {f"load {x}": summary.summarise(runs(x)) for x in (1, 3)}
    relatives = {f"load {x}": summary.relative(runs(x), "least_loaded") for x in (1, 3)}
    grids = dict(report.across_loads(summaries, relatives))
    assert len(grids) == 6
    assert grids["mean latency, s"].head == ("policy", "load 1", "load 3")
    means = [[cell.split()[0] for cell in row] for row in grids["mean latency, s"].rows]
    assert means == [["least_loaded", "5.00", "15.00"], ["p", "2.50", "7.50"]]
    assert grids["P95, s"].rows[1] == ("p", "4.30", "12.90")
    (row,) = grids["mean latency divided by that of least_loaded (below 1 is faster)"].rows
    assert row == ("p", "0.50 [0.50, 0.50]", "0.50 [0.50, 0.50]")
    (row,) = grids["success minus that of least_loaded, points"].rows
    assert row[1].startswith("-66.7 [")
    lines = grids["P95, s"].markdown().splitlines()
    assert lines[:2] == ["| policy | load 1 | load 3 |", "| --- | ---: | ---: |"]
    assert lines[3] == "| p | 4.30 | 12.90 |"
    without = report.across_loads(summaries, {name: [] for name in relatives})
    assert [title for title, _ in without] == ["mean latency, s", "P95, s", "success, %"]


def test_a_picture_per_load_also_where_nothing_was_answered(tmp_path: Path) -> None:
    def panel(load: float, answered: bool) -> plot.Panel:
        run = [record(i, load * (1 + i)) if answered else failed(i, "timeout") for i in range(5)]
        names = ("chimera price=0.1", "chimera price=0.3", "odd")
        summaries = summary.summarise({name: [run] for name in names})
        latencies_s = [r.latency_s for r in run if r.latency_s is not None]
        return plot.Panel(f"load {load}", summaries, dict.fromkeys(names, latencies_s))

    sweeps = {f"chimera price={x}": "chimera" for x in (0.1, 0.3)}
    paths = [tmp_path / "two.png", tmp_path / "three.png"]
    panels = [panel(0.5, True), panel(1.0, False), panel(1.5, True)]
    plot.draw_loads(paths[0], panels[:2], "title", sweeps)
    plot.draw_loads(paths[1], panels, "title", sweeps)
    two, three = (int.from_bytes(path.read_bytes()[16:20], "big") for path in paths)  # widths
    assert two < three


def test_points_of_one_curve_share_its_colour_and_differ_otherwise() -> None:
    sweeps = {f"chimera price={x}": "chimera" for x in (0.1, 0.3)}
    styles = plot._styles([*sweeps, "chimera", "paper", "x", "y"], {**sweeps, "chimera": "chimera"})
    one, two, plain = (styles[name] for name in (*sweeps, "chimera"))
    assert one.colour == two.colour == plain.colour
    assert len({one.mark, two.mark, plain.mark}) == 3
    assert len({style.colour for style in styles.values()}) == 4


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
