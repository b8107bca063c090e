"""From simulations to figures with intervals. Knows no files, no terminal and no policies' names.

Intervals are 95 % percentile intervals of a bootstrap over tasks and seeds: in each draw a task's
workflows come together, as often as the task is drawn, and so do those of a seed. All settings ran
the same workflows and get the same draws: ratios and differences are paired.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from chimera_bench.sim_runs import Bounds, Columns
from chimera_bench.summary import Interval

Floats = NDArray[np.float64]

DRAWS = 1000
_LEVEL = 95.0
_PERCENTILES = (50, 95, 99)
_BLOCK = 128  # workflows


class Summary(Struct, frozen=True):
    """One setting at one load. Latencies are of workflows that were answered."""

    setting: str
    sweep: str
    load: str
    workflows: int
    errors: dict[str, int]
    success: Interval  # share of all workflows, those with errors included
    latency_mean_s: Interval
    latency_p50_s: Interval
    latency_p95_s: Interval
    latency_p99_s: Interval
    ms_per_token: Interval  # mean over workflows of latency / output tokens
    latency_by_seed_s: list[float]  # means
    stage_share: dict[str, float]  # per model
    utilisation: dict[str, float]  # per engine, share of the time with anything to do
    occupied: dict[str, float]  # per engine, share of its slots at work
    longest_wait_s: float  # of any stage in queues: starvation
    preemptions: int
    tries: float  # mean per workflow


class Comparison(Struct, frozen=True):
    """``setting`` against ``baseline`` at one load, paired. A ratio below 1: faster."""

    setting: str
    baseline: str
    load: str
    latency_ratio: Interval
    p95_ratio: Interval
    p99_ratio: Interval
    per_token_ratio: Interval
    success_gain: Interval


class Frontier(Struct, frozen=True):
    """A sweep at one load against a baseline; NaN where the sweep does not reach that far."""

    sweep: str
    baseline: str
    load: str
    settings: list[str]
    hypervolume: Interval  # normalised; see `hypervolume`
    latency_ratio: Interval  # mean, at the baseline's success
    p95_ratio: Interval  # likewise
    success_gain: Interval  # at the baseline's mean latency


class LoadSummary(Struct, frozen=True):
    """All figures of one load; the frontiers need a baseline of their own (`summarise_load`)."""

    load: str
    rate_per_s: float
    summaries: list[Summary]
    comparisons: list[Comparison]
    frontiers: list[Frontier]


class Row(NamedTuple):
    """What is summarised: a setting at a load, with its columns, one per seed."""

    setting: str
    sweep: str
    load: str
    seeds: Sequence[Columns]


def summarise_load(
    rows: Sequence[Row],
    rate_per_s: float,
    bounds: Bounds,
    baseline: str,
    reference: str,
    draws: int = DRAWS,
) -> LoadSummary:
    """All figures of the rows of one load.

    ``baseline`` is the setting that others are compared with, ``reference`` the one that sweeps are
    measured by: if it was not run, there are no frontiers.
    """
    weights = make_weights(len(bounds.idle_s), len(rows[0].seeds), draws)
    return figures(draw_load(rows, bounds, reference, weights), rate_per_s, baseline, reference)


def draw_load(
    rows: Sequence[Row], bounds: Bounds, reference: str, weights: "Weights"
) -> "LoadDraws":
    """What all figures of one load are made of; see `summarise_load`."""
    drawn = {row.setting: draws_of(row, weights) for row in rows}
    base = next((row for row in rows if row.setting == reference), None)
    edges = None if base is None else corners(base, drawn[reference], bounds, weights)
    return LoadDraws(rows, drawn, edges)


def figures(load: "LoadDraws", rate_per_s: float, baseline: str, reference: str) -> LoadSummary:
    """The figures of one load; ``reference`` is the one that it was drawn with."""
    rows, drawn = load.rows, load.drawn
    base = next(row for row in rows if row.setting == baseline)
    return LoadSummary(
        base.load,
        rate_per_s,
        [summarise(row, drawn[row.setting]) for row in rows],
        [
            compare(row, base, drawn[row.setting], drawn[baseline])
            for row in rows
            if row is not base
        ],
        _frontiers(load, reference),
    )


def _frontiers(load: "LoadDraws", reference: str) -> list[Frontier]:
    if load.corners is None:
        return []
    base = next(row for row in load.rows if row.setting == reference)
    sweeps: dict[str, list[Row]] = {}
    for row in load.rows:
        sweeps.setdefault(row.sweep, []).append(row)
    return [
        frontier(
            of_it,
            [load.drawn[row.setting] for row in of_it],
            base,
            load.drawn[reference],
            load.corners,
        )
        for of_it in sweeps.values()
    ]


class Drawn(Struct, frozen=True):
    """Statistics of a row for the whole sample (first) and for every draw."""

    latency_s: Floats
    p50_s: Floats
    p95_s: Floats
    p99_s: Floats
    ms_per_token: Floats
    success: Floats


class Corners(Struct, frozen=True):
    """What a hypervolume is measured between, per draw; see `hypervolume`."""

    worst_latency_s: Floats
    worst_success: Floats
    best_latency_s: Floats
    best_success: Floats


class LoadDraws(Struct, frozen=True):
    """Rows of one load with their statistics; no ``corners`` where the reference was not run."""

    rows: Sequence[Row]
    drawn: Mapping[str, Drawn]  # by setting
    corners: Corners | None


class Weights(Struct, frozen=True):
    """How often each task and each seed counts; the first row is the sample itself, all ones."""

    tasks: Floats  # [1 + draws, tasks]
    seeds: Floats  # [1 + draws, seeds]


def make_weights(tasks: int, seeds: int, draws: int = DRAWS, seed: int = 0) -> Weights:
    """Tasks and seeds drawn with replacement, each as many as there are."""
    random = np.random.default_rng(seed)

    def drawn(number: int) -> Floats:
        counts = random.multinomial(number, np.full(number, 1.0 / number), size=draws)
        return np.concatenate([np.ones((1, number)), counts.astype(np.float64)])

    return Weights(drawn(tasks), drawn(seeds))


def draws_of(row: Row, weights: Weights) -> Drawn:
    """All statistics that intervals, ratios and frontiers are made of."""
    tasks = [columns.task for columns in row.seeds]

    def mean(name: str) -> Floats:
        return weighted_mean(tasks, [getattr(columns, name) for columns in row.seeds], weights)

    p50, p95, p99 = weighted_percentiles(tasks, [c.latency_s for c in row.seeds], weights)
    return Drawn(mean("latency_s"), p50, p95, p99, mean("ms_per_token"), mean("success"))


def weighted_mean(
    tasks: Sequence[NDArray[np.intp]], values: Sequence[Floats], weights: Weights
) -> Floats:
    """Per draw, over workflows whose value is not NaN; ``tasks`` and ``values`` per seed."""
    number = weights.tasks.shape[1]
    total = np.empty((number, len(values)))
    counted = np.empty_like(total)
    for seed, (task, value) in enumerate(zip(tasks, values, strict=True)):
        there = ~np.isnan(value)
        total[:, seed] = np.bincount(task[there], value[there], number)
        counted[:, seed] = np.bincount(task[there], minlength=number)
    above = ((weights.tasks @ total) * weights.seeds).sum(axis=1)
    below = ((weights.tasks @ counted) * weights.seeds).sum(axis=1)
    return np.where(below > 0.0, above, np.nan) / np.maximum(below, 1.0)


def weighted_percentiles(
    tasks: Sequence[NDArray[np.intp]], values: Sequence[Floats], weights: Weights
) -> list[Floats]:
    """P50, P95 and P99 per draw: the least value that this share of the workflows does not pass.

    Found in two steps: the block of ascending values, then the place in it.
    """
    value, task = np.concatenate(values), np.concatenate(tasks)
    seed = np.repeat(np.arange(len(values)), [len(each) for each in values])
    order = np.argsort(value)[: int((~np.isnan(value)).sum())]  # NaN comes last
    value, task, seed = value[order], task[order], seed[order]
    until = np.cumsum(_block_weights(task, seed, weights), axis=1)  # [1 + draws, blocks]
    whole = until[:, -1] if until.size else np.zeros(len(until))
    found = np.full((len(_PERCENTILES), len(until)), np.nan)
    for line, percent in zip(found, _PERCENTILES, strict=True):
        wanted = percent / 100.0 * whole
        block = (until < wanted[:, None]).sum(axis=1)
        for draw in np.flatnonzero(whole > 0.0):
            inside = slice(block[draw] * _BLOCK, (block[draw] + 1) * _BLOCK)
            each = weights.tasks[draw, task[inside]] * weights.seeds[draw, seed[inside]]
            before = until[draw, block[draw] - 1] if block[draw] else 0.0
            place = np.searchsorted(before + np.cumsum(each), wanted[draw])
            line[draw] = value[inside][place]
    return list(found)


def _block_weights(task: NDArray[np.intp], seed: NDArray[np.intp], weights: Weights) -> Floats:
    """Of every `_BLOCK` workflows together, per draw; whole numbers, so that sums are exact."""
    blocks, number = -(-len(task) // _BLOCK), weights.tasks.shape[1]
    block = np.arange(len(task)) // _BLOCK
    total = np.zeros((len(weights.tasks), blocks))
    for one in range(weights.seeds.shape[1]):
        of_it = seed == one
        counts = np.bincount(block[of_it] * number + task[of_it], minlength=blocks * number)
        by_task = counts.reshape(blocks, number).astype(np.float64)
        total += weights.seeds[:, one, None] * (weights.tasks @ by_task.T)
    return total


def interval(draws: Floats) -> Interval:
    """The first value, and between which values 95 % of the others lie."""
    others = draws[1:][~np.isnan(draws[1:])]
    if math.isnan(draws[0]) or not others.size:
        return Interval(float(draws[0]), math.nan, math.nan)
    tail = (100.0 - _LEVEL) / 2.0
    low, high = np.percentile(others, (tail, 100.0 - tail))
    return Interval(float(draws[0]), float(low), float(high))


def summarise(row: Row, drawn: Drawn) -> Summary:
    """The figures of one row of the table."""
    errors = sum((Counter(columns.errors) for columns in row.seeds), Counter[str]())
    engines, models = row.seeds[0].utilisation, row.seeds[0].stages
    stages = {model: sum(columns.stages[model] for columns in row.seeds) for model in models}
    answered = max(1, sum(stages.values()))
    return Summary(
        row.setting,
        row.sweep,
        row.load,
        sum(len(columns.task) for columns in row.seeds),
        dict(errors),
        interval(drawn.success),
        interval(drawn.latency_s),
        interval(drawn.p50_s),
        interval(drawn.p95_s),
        interval(drawn.p99_s),
        interval(drawn.ms_per_token),
        [_mean(columns.latency_s) for columns in row.seeds],
        {model: number / answered for model, number in stages.items()},
        {name: _mean(np.array([c.utilisation[name] for c in row.seeds])) for name in engines},
        {name: _mean(np.array([c.occupied[name] for c in row.seeds])) for name in engines},
        max(columns.longest_wait_s for columns in row.seeds),
        sum(columns.preemptions for columns in row.seeds),
        float(np.mean(np.concatenate([columns.tries for columns in row.seeds]))),
    )


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else math.nan


def compare(row: Row, baseline: Row, ours: Drawn, theirs: Drawn) -> Comparison:
    """One row against another one of the same load."""
    return Comparison(
        row.setting,
        baseline.setting,
        row.load,
        interval(ours.latency_s / theirs.latency_s),
        interval(ours.p95_s / theirs.p95_s),
        interval(ours.p99_s / theirs.p99_s),
        interval(ours.ms_per_token / theirs.ms_per_token),
        interval(ours.success - theirs.success),
    )


def corners(baseline: Row, theirs: Drawn, bounds: Bounds, weights: Weights) -> Corners:
    """Of the workflows of a load; ``baseline`` is the run whose latency twice is the worst."""
    tasks = [columns.task for columns in baseline.seeds]

    def mean(per_task: Floats) -> Floats:
        return weighted_mean(tasks, [per_task[task] for task in tasks], weights)

    by_model = [mean(success) for success in bounds.success.T]
    return Corners(
        2.0 * theirs.latency_s,
        np.min(by_model, axis=0),
        mean(bounds.idle_s),
        mean(bounds.success.max(axis=1)),
    )


def hypervolume(latency_s: Floats, success: Floats, edges: Corners) -> Floats:
    """Area that points `[points, draws]` dominate, seen from the worst corner; `[draws]`.

    1 is what the best corner alone would dominate. Latency is better when low, success when high.
    What is not better than the worst corner in both counts nothing. In our use the worst is (twice
    the least-loaded policy's mean latency, the success of the worst model), the best (the latency
    of the fastest choice on idle engines, the share of tasks that any model solves): nothing gets
    there, as engines are not idle.
    """
    usable = (latency_s < edges.worst_latency_s) & (success > edges.worst_success)  # never NaN
    latency_s = np.where(usable, latency_s, edges.worst_latency_s)
    success = np.where(usable, success, edges.worst_success)
    order = np.argsort(latency_s, axis=0)
    wide = edges.worst_latency_s - np.take_along_axis(latency_s, order, axis=0)
    reached = np.maximum.accumulate(np.take_along_axis(success, order, axis=0), axis=0)
    gained = np.diff(reached, axis=0, prepend=edges.worst_success[None])
    whole = (edges.worst_latency_s - edges.best_latency_s) * (
        edges.best_success - edges.worst_success
    )
    return np.where(whole > 0.0, (wide * gained).sum(axis=0), np.nan) / np.maximum(whole, 1e-300)


def frontier(
    rows: Sequence[Row],
    drawn: Sequence[Drawn],
    baseline: Row,
    theirs: Drawn,
    edges: Corners,
) -> Frontier:
    """The settings of one sweep at one load as one curve."""
    latency_s, p95_s = np.array([d.latency_s for d in drawn]), np.array([d.p95_s for d in drawn])
    success = np.array([d.success for d in drawn])
    curves = np.array([
        (
            least_at(success[:, n], latency_s[:, n], theirs.success[n]) / theirs.latency_s[n],
            least_at(success[:, n], p95_s[:, n], theirs.success[n]) / theirs.p95_s[n],
            -least_at(-latency_s[:, n], -success[:, n], -theirs.latency_s[n]) - theirs.success[n],
        )
        for n in range(len(theirs.success))
    ])  # fmt: skip
    return Frontier(
        rows[0].sweep,
        baseline.setting,
        rows[0].load,
        [row.setting for row in rows],
        interval(hypervolume(latency_s, success, edges)),
        *(interval(column) for column in curves.T),
    )


def least_at(gains: Floats, costs: Floats, wanted: float) -> float:
    """The least cost of a gain of at least ``wanted`` along a curve through these points.

    Between two points a part of the workflows may go by one and the rest by the other: the curve is
    the lower convex hull. NaN where no point gains as much.
    """
    points = [(float(g), float(c)) for g, c in zip(gains, costs, strict=True)]
    enough = [cost for gain, cost in points if gain >= wanted]
    short = [(gain, cost) for gain, cost in points if gain < wanted]
    if not enough:
        return math.nan
    mixed = (
        cost + (wanted - gain) / (better - gain) * (dearer - cost)
        for gain, cost in short
        for better, dearer in points
        if better >= wanted
    )
    return min([*enough, *mixed])
