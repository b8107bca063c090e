"""What sweeps are worth over several cells (cluster x load): areas, and points held to a reference.

Pure: from the draws of `sim_summary` to figures with intervals. Draw number n is the same resample
of tasks and seeds in every cell, so means over cells and ratios of them are paired. A point is
chosen by `Cell.tuning`, which may be of other tasks than those that it is reported on.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from chimera_bench.sim_summary import Corners, Drawn, Weights, hypervolume, interval, make_weights
from chimera_bench.summary import Interval

Floats = NDArray[np.float64]
Sweeps = Mapping[str, Sequence[str]]  # names of settings
Metric = Literal["mean", "p95", "success"]

ALL = "all cells"  # of every cluster together
METRICS: tuple[Metric, ...] = ("mean", "p95", "success")


class Cell(Struct, frozen=True):
    """One cluster at one load; mappings are by setting, the same ones in every cell."""

    cluster: str
    load: str
    drawn: Mapping[str, Drawn]
    corners: Corners | None  # None: the reference was not run
    tuning: Mapping[str, Drawn]  # the first value of each statistic is what a choice goes by
    longest_wait_s: Mapping[str, float]


class Area(Struct, frozen=True):
    """A sweep's normalised hypervolume: mean over cells, and over the baseline's mean."""

    sweep: str
    baseline: str
    where: str  # a cluster or `ALL`
    cells: int
    points: int
    hypervolume: Interval
    ratio: Interval


class Match(Struct, frozen=True):
    """Points of a sweep against a reference setting: means over the cells where one was found.

    By ``metric``, a cell's point is the one with the least mean or P95 latency that succeeds no
    less than the reference, or the one that succeeds most at no more mean latency. ``ratio`` is of
    P95 where the metric is, else of the mean; ``success_gain`` a difference.
    """

    sweep: str
    reference: str
    metric: Metric
    where: str
    settings: list[str | None]  # of each cell
    ratio: Interval
    success_gain: Interval

    @property
    def reached(self) -> int:
        """Cells with such a point."""
        return sum(setting is not None for setting in self.settings)


def shared_weights(
    tasks: Sequence[Sequence[tuple[str, str]]], seeds: int, draws: int
) -> list[Weights]:
    """Weights for each list of tasks, drawn once for the union of all.

    A task counts as often in every list that it is in.
    """
    places = {key: n for n, key in enumerate(dict.fromkeys(key for of in tasks for key in of))}
    whole = make_weights(len(places), seeds, draws)
    return [Weights(whole.tasks[:, [places[key] for key in of]], whole.seeds) for of in tasks]


def scopes(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """All cells, and those of each cluster if there are several."""
    clusters = dict.fromkeys(cell.cluster for cell in cells)
    each = {name: [cell for cell in cells if cell.cluster == name] for name in clusters}
    return {ALL: list(cells), **(each if len(each) > 1 else {})}


def areas(cells: Sequence[Cell], sweeps: Sweeps, baseline: str, cloud: Sequence[str]) -> list[Area]:
    """Of each sweep everywhere; the settings of ``cloud`` together are the ``baseline``.

    Empty where areas cannot be told, as the reference was not run.
    """
    if any(cell.corners is None for cell in cells):
        return []
    found: list[Area] = []
    for where, inside in scopes(cells).items():
        base = _mean_area(inside, cloud)
        for sweep, names in sweeps.items():
            ours = _mean_area(inside, names)
            ratio = np.where(base > 0.0, ours, np.nan) / np.where(base > 0.0, base, 1.0)
            found.append(
                Area(
                    sweep,
                    baseline,
                    where,
                    len(inside),
                    len(names),
                    interval(ours),
                    interval(ratio),
                )
            )
    return found


def _mean_area(cells: Sequence[Cell], names: Sequence[str]) -> Floats:
    return np.mean([_area(cell, names) for cell in cells], axis=0)


def _area(cell: Cell, names: Sequence[str]) -> Floats:
    assert cell.corners is not None
    return hypervolume(
        np.array([cell.drawn[name].latency_s for name in names]),
        np.array([cell.drawn[name].success for name in names]),
        cell.corners,
    )


def matches(cells: Sequence[Cell], sweeps: Sweeps, reference: str) -> list[Match]:
    """Every sweep by every metric everywhere, against the ``reference`` of the same cell."""
    return [
        _match(inside, sweep, names, reference, metric, where)
        for where, inside in scopes(cells).items()
        for sweep, names in sweeps.items()
        for metric in METRICS
    ]


def _match(
    cells: Sequence[Cell],
    sweep: str,
    names: Sequence[str],
    reference: str,
    metric: Metric,
    where: str,
) -> Match:
    settings = [chosen(cell, names, reference, metric) for cell in cells]
    ratios: list[Floats] = []
    gains: list[Floats] = []
    for cell, setting in zip(cells, settings, strict=True):
        if setting is not None:
            ours, theirs = cell.drawn[setting], cell.drawn[reference]
            ratios.append(_latency(ours, metric) / _latency(theirs, metric))
            gains.append(ours.success - theirs.success)
    return Match(
        sweep, reference, metric, where, settings, _mean_interval(ratios), _mean_interval(gains)
    )


def _latency(drawn: Drawn, metric: Metric) -> Floats:
    return drawn.p95_s if metric == "p95" else drawn.latency_s


def _mean_interval(values: Sequence[Floats]) -> Interval:
    return interval(np.mean(values, axis=0) if values else np.array([math.nan]))


def chosen(cell: Cell, names: Sequence[str], reference: str, metric: Metric) -> str | None:
    """The setting that ``metric`` asks for where the cell is tuned; None: none gets so far."""
    theirs = cell.tuning[reference]

    def cost(name: str) -> float:
        ours = cell.tuning[name]
        if metric == "success":
            allowed, value = ours.latency_s[0] <= theirs.latency_s[0], -ours.success[0]
        else:
            allowed, value = ours.success[0] >= theirs.success[0], _latency(ours, metric)[0]
        return float(value) if allowed and not math.isnan(value) else math.inf

    best = min(names, key=cost)
    return best if cost(best) < math.inf else None


def most_successful(cell: Cell, names: Sequence[str]) -> str:
    """The setting that succeeds most often where the cell is tuned."""
    return max(names, key=lambda name: np.nan_to_num(cell.tuning[name].success[0], nan=-1.0))


def tail_ratio(cell: Cell, setting: str, reference: str) -> Interval:
    """P99 latency over the reference's, paired."""
    return interval(cell.drawn[setting].p99_s / cell.drawn[reference].p99_s)
