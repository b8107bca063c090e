"""From the records of runs to numbers with intervals. Knows no files, no terminal and no sockets.

Intervals of latencies, ratios and differences are 95 % percentile intervals of a block bootstrap:
blocks of consecutive arrivals are drawn, because workflows that queue together are not independent.
All policies ran the same workflows, so every draw takes the same ones of each: differences and
ratios are paired.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from chimera_bench.workload import Record

Floats = NDArray[np.float64]
Runs = Mapping[str, Sequence[Sequence[Record]]]  # policy -> one list of records per seed

DRAWS = 2000
_LEVEL = 95.0
_Z = 1.959964  # of a normal distribution, both sides


class Interval(Struct, frozen=True):
    """An estimate and its 95 % interval; NaN where nothing can be said."""

    value: float
    low: float
    high: float


class PolicySummary(Struct, frozen=True):
    """One row of the table. Latencies are of workflows that ended with an answer."""

    policy: str
    workflows: int
    answered: int
    errors: int
    lost: int
    retried_stages: int
    success: Interval  # share of all workflows, those with errors included
    latency_mean_s: Interval
    latency_by_seed_s: list[float]  # means: how steady the machine was
    latency_s: dict[str, float]  # p20, p50, p80, p95, p99
    ms_per_token: Interval
    queue_mean_s: float  # per stage, in the daemon
    queue_longest_s: float  # of any stage, in the daemon: starvation
    service_mean_s: float  # per stage, at the engine
    tokens_per_s: float  # output tokens of all engines, first arrival to last answer
    span_s: float
    stage_share: dict[str, float]  # per model
    success_by_model: dict[str, float]  # of the model of a workflow's last stage
    client_late_s: float  # the most that a workflow was sent after its time


class Comparison(Struct, frozen=True):
    """``policy`` against ``baseline``, paired. A ratio over 1 means that ``policy`` is faster."""

    policy: str
    baseline: str
    latency_ratio: Interval  # mean workflow latency, baseline / policy
    per_token_ratio: Interval  # mean ms per output token, baseline / policy
    success_gain: Interval  # policy - baseline


class Relative(Struct, frozen=True):
    """Latencies of ``policy`` divided by those of ``baseline``, paired: below 1 is faster."""

    policy: str
    baseline: str
    latency_mean: Interval
    latency_p95: Interval
    success_gain: Interval  # policy - baseline


class _Columns(Struct, frozen=True):
    """Per workflow, in the order of (seed, number); NaN where it ended without an answer."""

    latency_s: Floats
    ms_per_token: Floats
    success: Floats


def summarise(runs: Runs, seed: int = 0, draws: int = DRAWS) -> list[PolicySummary]:
    """One summary per policy, in the given order."""
    picks = _picks(runs, seed, draws)
    return [_summary(policy, seeds, picks) for policy, seeds in runs.items()]


def compare(
    runs: Runs, pairs: Sequence[tuple[str, str]], seed: int = 0, draws: int = DRAWS
) -> list[Comparison]:
    """Each (policy, baseline) of ``pairs``; workflows that either did not answer are left out."""
    picks = _picks(runs, seed, draws)
    columns = {policy: _columns(seeds) for policy, seeds in runs.items()}
    return [_comparison(p, b, columns[p], columns[b], picks) for p, b in pairs]


def relative(runs: Runs, baseline: str, seed: int = 0, draws: int = DRAWS) -> list[Relative]:
    """Every other policy by ``baseline``; workflows that either did not answer are left out."""
    picks = _picks(runs, seed, draws)
    columns = {policy: _columns(seeds) for policy, seeds in runs.items()}
    theirs = columns[baseline]
    return [
        Relative(
            policy=policy,
            baseline=baseline,
            latency_mean=_ratio(_mean, ours.latency_s, theirs.latency_s, picks),
            latency_p95=_ratio(percentile_95, ours.latency_s, theirs.latency_s, picks),
            success_gain=_gain(ours, theirs, picks),
        )
        for policy, ours in columns.items()
        if policy != baseline
    ]


def block_picks(sizes: Sequence[int], draws: int, seed: int) -> NDArray[np.intp]:
    """Indices of a circular block bootstrap, ``[draws, sum(sizes)]``.

    One stratum per run; blocks of about the square root of a run's size stay inside it.
    """
    rng = np.random.default_rng(seed)
    parts: list[NDArray[np.intp]] = []
    start = 0
    for size in sizes:
        if size:
            block = max(1, math.isqrt(size))
            blocks = -(-size // block)
            begin = rng.integers(0, size, (draws, blocks, 1))
            index = (begin + np.arange(block)) % size
            parts.append(start + index.reshape(draws, blocks * block)[:, :size])
        start += size
    return np.concatenate(parts, axis=1) if parts else np.zeros((draws, 0), dtype=np.intp)


def _picks(runs: Runs, seed: int, draws: int) -> NDArray[np.intp]:
    sizes = {tuple(len(records) for records in seeds) for seeds in runs.values()}
    if len(sizes) != 1:
        raise ValueError("all policies must have run the same workflows")
    return block_picks(sizes.pop(), draws, seed)


def _columns(seeds: Sequence[Sequence[Record]]) -> _Columns:
    records = [record for records in seeds for record in records]
    latency_s = [math.nan if r.latency_s is None else r.latency_s for r in records]
    per_token = [
        1e3 * seconds / record.output_tokens if record.output_tokens else math.nan
        for seconds, record in zip(latency_s, records, strict=True)
    ]
    return _Columns(
        np.array(latency_s, dtype=np.float64),
        np.array(per_token, dtype=np.float64),
        np.array([float(r.success) for r in records], dtype=np.float64),
    )


def _summary(
    policy: str, seeds: Sequence[Sequence[Record]], picks: NDArray[np.intp]
) -> PolicySummary:
    records = [record for records in seeds for record in records]
    stages = [stage for record in records for stage in record.stages]
    columns = _columns(seeds)
    span_s = sum(_span_s(run) for run in seeds)
    models = Counter(stage.model for stage in stages)
    return PolicySummary(
        policy=policy,
        workflows=len(records),
        answered=sum(r.latency_s is not None for r in records),
        errors=sum(r.error is not None for r in records),
        lost=sum(r.lost for r in records),
        retried_stages=sum(s.attempts > 1 for s in stages),
        success=wilson(int(columns.success.sum()), len(records)),
        latency_mean_s=_interval(_mean, picks, columns.latency_s),
        latency_by_seed_s=[float(_mean(_columns([run]).latency_s)) for run in seeds],
        latency_s=percentiles(columns.latency_s),
        ms_per_token=_interval(_mean, picks, columns.ms_per_token),
        queue_mean_s=_average([s.queue_s for s in stages]),
        queue_longest_s=max((s.queue_s for s in stages), default=math.nan),
        service_mean_s=_average([s.service_s for s in stages]),
        tokens_per_s=sum(s.output_tokens for s in stages) / span_s if span_s else math.nan,
        span_s=span_s,
        stage_share={m: n / len(stages) for m, n in sorted(models.items())},
        success_by_model=_success_by_model(records),
        client_late_s=max((r.late_s for r in records), default=0.0),
    )


def wilson(right: int, total: int) -> Interval:
    """A share and Wilson's score interval, which is honest near 0 and 1, where draws are all equal.

    Whether an answer is right hardly depends on its neighbours, so no blocks are needed.
    """
    if not total:
        return Interval(math.nan, math.nan, math.nan)
    share, squared = right / total, _Z * _Z / total
    centre = (share + squared / 2) / (1 + squared)
    half = _Z * math.sqrt(share * (1 - share) / total + squared / (4 * total)) / (1 + squared)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def percentiles(values: Floats) -> dict[str, float]:
    """Of what is not NaN."""
    there = values[~np.isnan(values)]
    levels = (20, 50, 80, 95, 99)
    found = np.percentile(there, levels) if there.size else [math.nan] * len(levels)
    return {f"p{level}": float(v) for level, v in zip(levels, found, strict=True)}


def percentile_95(values: Floats) -> Any:
    """Of what is not NaN, along the last axis, interpolated linearly; NaN where nothing is left."""
    ordered = np.sort(values, axis=-1)  # NaN comes last
    there = (~np.isnan(ordered)).sum(axis=-1)
    place = np.asarray(0.95 * np.maximum(there - 1, 0))
    below = np.floor(place).astype(np.intp)
    above = np.ceil(place).astype(np.intp)
    lower = np.take_along_axis(ordered, below[..., None], axis=-1)[..., 0]
    upper = np.take_along_axis(ordered, above[..., None], axis=-1)[..., 0]
    return lower + (place - below) * (upper - lower)


def _span_s(records: Sequence[Record]) -> float:
    ends = [record.end_s for record in records if record.end_s is not None]
    return max(ends) - min(r.arrive_s for r in records) if ends else 0.0


def _success_by_model(records: Sequence[Record]) -> dict[str, float]:
    by_model: dict[str, list[float]] = {}
    for record in records:
        if record.latency_s is not None:
            by_model.setdefault(record.stages[-1].model, []).append(record.success)
    return {model: _average(values) for model, values in sorted(by_model.items())}


def _comparison(
    policy: str, baseline: str, ours: _Columns, theirs: _Columns, picks: NDArray[np.intp]
) -> Comparison:
    return Comparison(
        policy=policy,
        baseline=baseline,
        latency_ratio=_ratio(_mean, theirs.latency_s, ours.latency_s, picks),
        per_token_ratio=_ratio(_mean, theirs.ms_per_token, ours.ms_per_token, picks),
        success_gain=_gain(ours, theirs, picks),
    )


def _ratio(
    statistic: Callable[[Floats], Any],
    numerator: Floats,
    denominator: Floats,
    picks: NDArray[np.intp],
) -> Interval:
    either = np.isnan(numerator) | np.isnan(denominator)
    upper, lower = np.where(either, np.nan, numerator), np.where(either, np.nan, denominator)
    return _interval(lambda a, b: statistic(a) / statistic(b), picks, upper, lower)


def _gain(ours: _Columns, theirs: _Columns, picks: NDArray[np.intp]) -> Interval:
    return _interval(lambda a, b: _mean(a) - _mean(b), picks, ours.success, theirs.success)


def _interval(statistic: Callable[..., Any], picks: NDArray[np.intp], *columns: Floats) -> Interval:
    """``statistic`` reduces the last axis of every column."""
    if not columns[0].size:
        return Interval(math.nan, math.nan, math.nan)
    value = float(statistic(*columns))
    draws = statistic(*(column[picks] for column in columns))
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return Interval(value, math.nan, math.nan)
    tail = (100.0 - _LEVEL) / 2.0
    low, high = np.percentile(draws, (tail, 100.0 - tail))
    return Interval(value, float(low), float(high))


def _mean(values: Floats) -> Any:
    """Of what is not NaN, along the last axis; NaN where nothing is left, without a warning."""
    there = ~np.isnan(values)
    counted = there.sum(axis=-1)
    total = np.where(there, values, 0.0).sum(axis=-1)
    return np.where(counted, total, np.nan) / np.maximum(counted, 1)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
