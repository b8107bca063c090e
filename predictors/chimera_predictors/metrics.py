"""Metrics of predictions, each for many weightings of the rows at once.

A metric takes weights [N, B] and returns [B]. With `task_weights` column 0 gives the plain figure
and the others bootstrap samples over tasks, so intervals and paired differences need no second
code path. Knows arrays only, neither traces nor methods. What is undefined is NaN, never an error.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Ints = NDArray[np.integer]
Mask = NDArray[np.bool_]

ECE_BINS = 15
_COLUMNS = 64  # weightings handled together where memory traffic decides: fits a core's cache
_BLOCK = 32  # rows summed together


class Figure(NamedTuple):
    """A value with its 95 % interval over tasks; NaN where undefined."""

    value: float
    low: float
    high: float


def task_weights(tasks: Ints, bootstrap: int, seed: int) -> Array:
    """Row weights [N, 1 + bootstrap]: ones, then how often each sample drew the row's task.

    ``tasks`` [N] are integer codes; rows of one task are always drawn together.
    """
    codes, code_of = np.unique(tasks, return_inverse=True)
    weights = np.ones((len(codes), 1 + bootstrap), dtype=np.float32)
    if len(codes):
        drawn = np.random.default_rng(seed).multinomial(
            len(codes), np.full(len(codes), 1 / len(codes)), size=bootstrap
        )
        weights[:, 1:] = drawn.T
    return weights[code_of]


def figure(samples: Array) -> Figure:
    """Value and percentile interval of one metric's samples [1 + B].

    Samples in which the metric is undefined are left out; with more than half of them the interval
    is NaN.
    """
    value, resampled = float(samples[0]), samples[1:]
    defined = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or 2 * len(defined) <= len(resampled):
        return Figure(value, np.nan, np.nan)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Figure(value, float(low), float(high))


def paired(a: Array, b: Array) -> Figure:
    """Difference a - b of two methods' samples [1 + B] that were drawn with the same weights."""
    return figure(a - b)


def centred(samples: Array) -> Array:
    """Samples [1 + B] of a figure that noise can only raise, shifted to lie around the plain one.

    Not below zero.
    """
    resampled = samples[1:][np.isfinite(samples[1:])]
    if not len(resampled):
        return samples
    shift = np.append(0.0, np.full(len(samples) - 1, resampled.mean() - samples[0]))
    return np.maximum(samples - shift, 0.0)


def mean(values: Array, weights: Array) -> Array:
    """Weighted mean of values [N] -> [B]."""
    return _ratio(values @ weights.astype(np.float64), weights.sum(0, dtype=np.float64))


def macro(parts: Sequence[Array]) -> Array:
    """Mean [B] over those of at least one part (model) whose plain figure, column 0, is defined.

    A part that is undefined in one sample only is left out of that sample.
    """
    table = np.stack(parts)
    known = np.isfinite(table) & np.isfinite(table[:, :1])
    return _ratio(np.where(known, table, 0.0).sum(0), known.sum(0).astype(np.float64))


def auc(score: Array, success: Array, weights: Array) -> Array:
    """Area under the ROC curve, ties counting half; success [N] counts as positive from 0.5."""
    order = np.argsort(score, kind="stable")
    positive, weights = success[order] >= 0.5, weights[order].astype(np.float64)
    start, end = _runs(score[order])
    negatives = _cumulative(weights * ~positive[:, None])
    below = (negatives[start[positive]] + negatives[end[positive]]) / 2
    wins = (weights[positive] * below).sum(0)
    return _ratio(wins, weights[positive].sum(0) * negatives[-1])


def average_precision(score: Array, success: Array, weights: Array) -> Array:
    """Average precision (area of the steps of the precision-recall curve); positive from 0.5."""
    order = np.argsort(-score, kind="stable")
    positive, weights = success[order] >= 0.5, weights[order].astype(np.float64)
    end = np.unique(_runs(score[order])[1])
    hits = _cumulative(weights * positive[:, None])[end]
    called = _cumulative(weights)[end]
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    gained = np.diff(hits, axis=0, prepend=0.0)
    return _ratio((precision * gained).sum(0), weights[positive].sum(0))


def brier(score: Array, success: Array, weights: Array) -> Array:
    """Mean squared error of a confidence; success may be fractional."""
    return mean((score - success) ** 2, weights)


def ece(score: Array, success: Array, weights: Array, bins: int = ECE_BINS) -> Array:
    """Expected calibration error over bins of equal mass; success may be fractional.

    Bins are cut once, on the unweighted rows, and equal scores share a bin. Noise can only add to
    this error, and bootstrap samples have more of it than the rows: see `centred`.
    """
    edges = np.unique(np.quantile(score, np.arange(1, bins) / bins)) if len(score) else score
    bin_of = np.searchsorted(edges, score, side="right")
    excess = score - success
    total = np.zeros(weights.shape[1])
    for number in np.unique(bin_of):
        rows = bin_of == number
        total += np.abs(excess[rows] @ weights[rows].astype(np.float64))
    return _ratio(total, weights.sum(0, dtype=np.float64))


def apgr(score: Array, gap: Array, weights: Array) -> Array:
    """Average performance gap recovered (RouteLLM, arXiv 2406.18665, section 3.2).

    One row per task: ``score`` says how much better the large model is thought to be, ``gap`` how
    much better it was. The gap recovered at a share x of calls to the large model, those with the
    highest scores, is averaged over x from 0 to 1, exactly where RouteLLM takes ten steps; equal
    scores are called in random order. 0.5 is chance. NaN unless the large model is better overall.
    """
    order = np.argsort(-score, kind="stable")
    weights = weights[order].astype(np.float64)
    bounds = np.unique(np.append(_runs(score[order])[1], 0))
    called = _cumulative(weights)[bounds]
    gained = _cumulative(weights * gap[order][:, None])[bounds]
    area = (np.diff(called, axis=0) * (gained[1:] + gained[:-1]) / 2).sum(0)
    return _ratio(area, called[-1] * gained[-1])


def pearson(x: Array, y: Array, weights: Array) -> Array:
    """Linear correlation [B] of x and y, each [N] or already per weighting [N, B]."""
    weights = weights.astype(np.float64)
    x, x_spread = _around_mean(x, weights)
    y, y_spread = _around_mean(y, weights)
    return _ratio((weights * x * y).sum(0), np.sqrt(x_spread * y_spread))


def spearman(x: Array, y: Array, weights: Array) -> Array:
    """Rank correlation, ties at their middle rank."""
    return _by_columns(lambda part: pearson(_ranks(x, part), _ranks(y, part), part), weights)


def kendall_distance(x: Array, y: Array, weights: Array) -> Array:
    """(1 - tau_b) / 2: 0 for the same order, 0.5 for none, 1 for the reverse one."""
    x_rank = np.unique(x, return_inverse=True)[1]
    y_rank = np.unique(y, return_inverse=True)[1]
    if len(x) and x_rank.max() > y_rank.max():
        x_rank, y_rank = y_rank, x_rank  # the cost grows with the distinct values of the first
    return _by_columns(lambda part: _kendall(x_rank, y_rank, part), weights)


def r2(predicted: Array, actual: Array, weights: Array) -> Array:
    """Share of the variance of ``actual`` that is explained; callers pass logarithms."""
    weights = weights.astype(np.float64)
    spread = _around_mean(actual, weights)[1]
    return 1.0 - _ratio(((predicted - actual) ** 2) @ weights, spread)


def pinball(predicted: Array, actual: Array, level: float, weights: Array) -> Array:
    """Mean quantile loss at one level, in the units of its arguments (callers pass log1p)."""
    error = actual - predicted
    return mean(np.maximum(level * error, (level - 1.0) * error), weights)


def coverage(low: Array, high: Array, actual: Array, weights: Array) -> Array:
    """Share of rows with low <= actual <= high."""
    return mean(((low <= actual) & (actual <= high)).astype(np.float64), weights)


def _ratio(numerator: Array, denominator: Array) -> Array:
    nothing = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.divide(numerator, denominator, out=nothing, where=denominator > 0)


def _runs(values: np.ndarray) -> tuple[Ints, Ints]:
    """Where the run of equal values that each of N sorted values is in starts and ends [N]."""
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    bounds = np.concatenate(([0], changes, [len(values)]))
    run = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return bounds[run], bounds[run + 1]


def _cumulative(values: Array) -> Array:
    """Sums of the first 0, 1, ..., N rows: [N, B] -> [N + 1, B].

    Adds whole rows within blocks, then the blocks' totals: three times the speed of `np.cumsum`.
    """
    blocks = -(-len(values) // _BLOCK)
    sums = np.zeros((blocks * _BLOCK + 1, values.shape[1]), dtype=values.dtype)
    sums[1 : len(values) + 1] = values
    within = sums[1:].reshape(blocks, _BLOCK, values.shape[1])
    for row in range(1, _BLOCK):
        within[:, row] += within[:, row - 1]
    within[1:] += np.cumsum(within[:-1, -1], axis=0)[:, None]
    return sums[: len(values) + 1]


def _by_columns(metric: Callable[[Array], Array], weights: Array) -> Array:
    parts = [
        metric(np.ascontiguousarray(weights[:, start : start + _COLUMNS]))
        for start in range(0, weights.shape[1], _COLUMNS)
    ]
    return np.concatenate(parts)


def _around_mean(values: Array, weights: Array) -> tuple[Array, Array]:
    """Values less their mean [N, B], and the sum of the squares of these [B].

    The sum of equal values is exactly 0, whatever rounding leaves of it.
    """
    table = values[:, None] if values.ndim == 1 else values
    size = (weights * np.abs(table)).sum(0)
    table = table - _ratio((weights * table).sum(0), weights.sum(0))
    spread = (weights * table * table).sum(0)
    return table, np.where(spread > 1e-20 * size**2, spread, 0.0)


def _ranks(values: Array, weights: Array) -> Array:
    """Middle ranks [N, B] in the sample that holds each row as often as its weight says."""
    order = np.argsort(values, kind="stable")
    start, end = _runs(values[order])
    before = _cumulative(weights[order].astype(np.float64))
    ranks = np.empty(weights.shape)
    ranks[order] = (before[start] + before[end]) / 2
    return ranks


def _kendall(x: Ints, y: Ints, weights: Array) -> Array:
    """Distance from dense ranks. A row of weight w counts as w rows that are tied in x and y."""
    agreement = np.zeros(weights.shape[1])
    for bit in range(int(x.max()).bit_length() if len(x) else 0):
        agreement += _agreement_at(x >> bit, y, weights)
    untied = np.sqrt(_untied_pairs(x, weights) * _untied_pairs(y, weights))
    return (1.0 - _ratio(agreement, untied)) / 2


def _agreement_at(x: Ints, y: Ints, weights: Array) -> Array:
    """Concordant minus discordant pairs [B] among those whose x differ in the last bit only.

    Two different numbers differ first at exactly one bit, so that the sum over all shifts of x
    counts each pair once; within a block of equal higher bits the rows with bit 0 lie below those
    with bit 1, and a running sum over the block's rows in order of y counts the pairs.
    """
    order = np.lexsort((y, x >> 1))
    x, y, weights = x[order], y[order], weights[order]
    upper = (x & 1).astype(bool)
    if not upper.any():
        return np.zeros(weights.shape[1])
    lowers = _cumulative(weights[~upper])
    seen = np.concatenate(([0], np.cumsum(~upper)))  # lower rows among the first n rows
    block_start, block_end = (seen[bound[upper]] for bound in _runs(x >> 1))
    tie_start, tie_end = (seen[b[upper]] for b in _runs((x >> 1) * (int(y.max()) + 1) + y))
    balance = lowers[tie_start] - lowers[block_start] - lowers[block_end] + lowers[tie_end]
    balance *= weights[upper]
    return balance.sum(0, dtype=np.float64)


def _untied_pairs(ranks: Ints, weights: Array) -> Array:
    order = np.argsort(ranks, kind="stable")
    ends = np.unique(_runs(ranks[order])[1])
    tied = np.diff(_cumulative(weights[order].astype(np.float64))[ends], axis=0, prepend=0.0)
    return (tied.sum(0) ** 2 - (tied**2).sum(0)) / 2
