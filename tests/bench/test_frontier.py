"""Figures over cells against plain loops over draws; which setting is held against a reference."""

import math

import numpy as np
import pytest

from chimera_bench import frontier
from chimera_bench.frontier import ALL, Cell
from chimera_bench.sim_summary import Corners, Drawn, interval

NAN = math.nan
DRAWS = 40
SWEEPS = {"ours": ["ours 1", "ours 2", "ours 3"], "paper": ["paper 1", "paper 2"], "ll": ["ll"]}
NAMES = [name for names in SWEEPS.values() for name in names]


def point(success: float, latency_s: float, p95_s: float) -> Drawn:
    """A setting as it is where settings are chosen."""
    success_, latency, p95 = (np.array([value]) for value in (success, latency_s, p95_s))
    return Drawn(latency, latency, p95, p95, latency, success_)


def drawn(random: np.random.Generator) -> Drawn:
    mean, p50, p95, p99, per_token = random.uniform(1.0, 9.0, (5, 1 + DRAWS))
    return Drawn(mean, p50, p95, p99, per_token, random.uniform(0.2, 0.8, 1 + DRAWS))


def a_cell(cluster: str, load: str, seed: int, tuning: dict[str, Drawn] | None = None) -> Cell:
    random = np.random.default_rng(seed)
    figures = {name: drawn(random) for name in NAMES}
    edges = Corners(*(np.full(1 + DRAWS, value) for value in (8.0, 0.25, 0.5, 0.9)))
    return Cell(cluster, load, figures, edges, tuning or figures, dict.fromkeys(NAMES, 1.0))


CELLS = [a_cell("a", "0.8", 1), a_cell("a", "1.1", 2), a_cell("b", "0.8", 3)]


def plain_area(cell: Cell, names: list[str], draw: int) -> float:
    """Upper left staircase, by hand."""
    points = sorted(
        (float(cell.drawn[name].latency_s[draw]), float(cell.drawn[name].success[draw]))
        for name in names
    )
    area, reached = 0.0, 0.25
    for latency, success in points:
        if latency < 8.0 and success > reached:
            area += (8.0 - latency) * (success - reached)
            reached = success
    return area / ((8.0 - 0.5) * (0.9 - 0.25))


def test_areas_are_means_of_cells_draw_by_draw() -> None:
    cloud = ["paper 1", "paper 2", "ll"]
    found = {
        (each.sweep, each.where): each for each in frontier.areas(CELLS, SWEEPS, "base", cloud)
    }
    assert len(found) == 9  # three sweeps, all cells and two clusters
    for where, cells in ((ALL, CELLS), ("a", CELLS[:2]), ("b", CELLS[2:])):
        for sweep, names in SWEEPS.items():
            ours, base = (
                np.array([
                    sum(plain_area(cell, points, draw) for cell in cells) / len(cells)
                    for draw in range(1 + DRAWS)
                ])
                for points in (names, cloud)
            )  # fmt: skip
            each = found[sweep, where]
            assert (each.baseline, each.cells, each.points) == ("base", len(cells), len(names))
            wanted = interval(ours), interval(ours / base)
            for one, other in zip((each.hypervolume, each.ratio), wanted, strict=True):
                assert (one.value, one.low, one.high) == pytest.approx(
                    (other.value, other.low, other.high)
                )


def test_the_baseline_has_ratio_one_in_every_draw() -> None:
    found = frontier.areas(CELLS, {"cloud": SWEEPS["paper"]}, "cloud", SWEEPS["paper"])
    for each in found:
        ratio = each.ratio
        assert (ratio.low, ratio.value, ratio.high) == (1.0, 1.0, 1.0)


def test_a_baseline_without_any_area_gives_no_ratio() -> None:
    cell = CELLS[0]
    never = np.full(1 + DRAWS, NAN)
    nothing = Drawn(never, never, never, never, never, np.zeros(1 + DRAWS))
    dead = Cell("a", "1", {**cell.drawn, "ll": nothing}, cell.corners, cell.tuning, {})
    (found,) = frontier.areas([dead], {"ours": SWEEPS["ours"]}, "ll", ["ll"])
    assert found.hypervolume.value > 0.0
    assert math.isnan(found.ratio.value)
    assert math.isnan(found.ratio.low)


# Where settings are chosen: success, mean and P95 latency.
TUNING = {
    "ours 1": point(0.55, 3.0, 9.0),
    "ours 2": point(0.50, 4.0, 5.0),  # as good as the reference: good enough
    "ours 3": point(0.70, 5.0, 8.0),  # as slow: fast enough
    "paper 1": point(0.49, 1.0, 1.0),
    "paper 2": point(0.90, 5.1, 1.0),
    "ll": point(0.50, 5.0, 7.0),
}


@pytest.mark.parametrize(
    ("names", "metric", "wanted"),
    [
        (SWEEPS["ours"], "mean", "ours 1"),
        (SWEEPS["ours"], "p95", "ours 2"),
        (SWEEPS["ours"], "success", "ours 3"),
        (SWEEPS["paper"], "mean", "paper 2"),
        (["paper 1"], "mean", None),
        (["paper 1"], "p95", None),
        (["paper 2"], "success", None),
        (["ll"], "mean", "ll"),
    ],
)
def test_choice(names: list[str], metric: frontier.Metric, wanted: str | None) -> None:
    cell = a_cell("a", "0.8", 1, TUNING)
    assert frontier.chosen(cell, names, "ll", metric) == wanted


def test_what_nobody_answered_or_judged_is_never_chosen() -> None:
    tuning = {**TUNING, "ours 1": point(0.9, NAN, NAN), "ours 2": point(NAN, 1.0, 1.0)}
    cell = a_cell("a", "0.8", 1, tuning)
    for metric in frontier.METRICS:
        assert frontier.chosen(cell, ["ours 1", "ours 2"], "ll", metric) is None
    assert frontier.most_successful(cell, ["ours 2", "paper 1"]) == "paper 1"


def test_matches_report_the_choice_on_other_draws() -> None:
    """Of two cells only one has a point of the paper's as good as the reference."""
    without = {**TUNING, "paper 2": point(0.1, 1.0, 1.0)}
    cells = [a_cell("a", "0.8", 1, TUNING), a_cell("b", "0.8", 2, without)]
    found = {
        (each.sweep, each.metric, each.where): each
        for each in frontier.matches(cells, SWEEPS, "ll")
    }
    paper = found["paper", "p95", ALL]
    assert (paper.settings, paper.reached) == (["paper 2", None], 1)
    first = cells[0].drawn
    wanted = interval(first["paper 2"].p95_s / first["ll"].p95_s)
    assert paper.ratio == wanted == found["paper", "p95", "a"].ratio
    assert found["paper", "p95", "b"].reached == 0
    assert math.isnan(found["paper", "p95", "b"].ratio.value)

    ours = found["ours", "success", ALL]
    assert ours.settings == ["ours 3", "ours 3"]
    gains, ratios = (
        [sum(values) / 2.0 for values in zip(*each, strict=True)]
        for each in (
            [cell.drawn["ours 3"].success - cell.drawn["ll"].success for cell in cells],
            [cell.drawn["ours 3"].latency_s / cell.drawn["ll"].latency_s for cell in cells],
        )
    )
    assert ours.success_gain == interval(np.array(gains))
    assert ours.ratio == interval(np.array(ratios))
    tail = frontier.tail_ratio(cells[1], "ours 3", "ll")
    assert tail == interval(cells[1].drawn["ours 3"].p99_s / cells[1].drawn["ll"].p99_s)


def test_one_cluster_is_not_said_twice() -> None:
    assert list(frontier.scopes(CELLS)) == [ALL, "a", "b"]
    assert list(frontier.scopes(CELLS[:2])) == [ALL]


def test_a_task_counts_as_often_in_every_cluster() -> None:
    one, other = [("t1", "x"), ("t2", "x"), ("t2", "y")], [("t2", "y"), ("t3", "x"), ("t1", "x")]
    first, second = frontier.shared_weights([one, other], seeds=2, draws=30)
    assert first.tasks.shape == second.tasks.shape == (31, 3)
    assert (first.tasks[:, 0] == second.tasks[:, 2]).all()
    assert (first.tasks[:, 2] == second.tasks[:, 0]).all()
    assert (first.tasks[1:].std(axis=0) > 0.0).all()
    assert first.seeds is second.seeds
