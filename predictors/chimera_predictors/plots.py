"""Pictures of an evaluation as PNG: how far confidences and predicted lengths can be trusted.

Draws what it is given; which rows and methods to show is the caller's choice. Needs matplotlib
(extra `bench`), which is imported when something is drawn.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from chimera_predictors.evaluate import EvalError
from chimera_predictors.metrics import Array

_BINS = 10
_POINTS = 4000  # more in one panel only hide each other
_COLOUR = "#1f5f8b"


def reliability(path: Path, confidence: dict[str, Array], success: Array) -> None:
    """Success rate against confidence in bins of equal mass, a panel per method -> PNG.

    ``confidence`` [N] per method, ``success`` [N] in 0..1. Bars are the number of rows.
    """
    figure, panels = _panels(len(confidence))
    for axes, (name, score) in zip(panels, confidence.items(), strict=False):
        counted = np.isfinite(score) & np.isfinite(success)
        _reliability_panel(axes, name, score[counted], success[counted])
    figure.supylabel("success rate")
    _save(figure, path)


def length_scatter(
    path: Path, quantiles: dict[str, tuple[Array, Array, Array]], truth: Array
) -> None:
    """Actual against predicted tokens, both on log axes, a panel per method -> PNG.

    ``quantiles``: per method the .1, .5 and .9 quantiles [N] in tokens; ``truth`` [N] tokens.
    """
    figure, panels = _panels(len(quantiles))
    for axes, (name, levels) in zip(panels, quantiles.items(), strict=False):
        counted = np.isfinite(levels).all(axis=0) & np.isfinite(truth)
        low, median, high = (one[counted] for one in levels)
        _scatter_panel(axes, name, low, median, high, truth[counted])
    figure.supylabel("actual remaining tokens")
    _save(figure, path)


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with at least ``count`` panels in one row, or two if there are many."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvalError(f"{error}; plots need: pip install 'chimera-daemon[bench]'") from error
    rows = 1 if count <= 3 else 2
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(3.8 * columns + 0.4, 4.2 * rows), layout="compressed")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in panels[count:]:
        spare.set_visible(False)
    return figure, panels


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise EvalError(f"cannot write the plot {path}: {error.strerror or error}") from error


def _reliability_panel(axes: Any, name: str, score: Array, success: Array) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=f"{name} ({len(score)} rows)")
    axes.set_box_aspect(1)
    axes.grid(color="0.92")
    if not len(score):
        return
    counts = axes.twinx()
    counts.hist(score, bins=20, range=(0, 1), color="0.85")
    counts.set_yticks([])
    counts.set_ylim(0, counts.get_ylim()[1] * 4)  # in the lower quarter, below the points
    counts.set_box_aspect(1)
    counts.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    edges = np.unique(np.quantile(score, np.arange(1, _BINS) / _BINS))
    bin_of = np.searchsorted(edges, score, side="right")
    members = [bin_of == number for number in np.unique(bin_of)]
    rate = np.array([success[own].mean() for own in members])
    error = 1.96 * np.array([success[own].std() / np.sqrt(own.sum()) for own in members])
    middle = [score[own].mean() for own in members]
    axes.errorbar(middle, rate, yerr=error, fmt="o-", color=_COLOUR, linewidth=1.2, markersize=4)


def _scatter_panel(
    axes: Any, name: str, low: Array, median: Array, high: Array, truth: Array
) -> None:
    inside = (low <= truth) & (truth <= high)
    share = f"{100 * inside.mean():.0f} %" if len(truth) else "–"
    axes.set_title(f"{name}: 80 % band covers {share}")
    axes.set(xscale="log", yscale="log", xlabel="predicted remaining tokens (median)")
    axes.set_box_aspect(1)
    axes.grid(color="0.92")
    if not len(truth):
        return
    shown = np.random.default_rng(0).permutation(len(truth))[:_POINTS]
    x, y = np.maximum(median[shown], 1.0), np.maximum(truth[shown], 1.0)
    for chosen, colour, text in (
        (inside[shown], _COLOUR, "inside the band"),
        (~inside[shown], "#c8553d", "outside"),
    ):
        axes.scatter(x[chosen], y[chosen], s=5, alpha=0.35, color=colour, linewidths=0, label=text)
    bounds = [0.8 * min(x.min(), y.min()), 1.25 * max(x.max(), y.max())]
    axes.plot(bounds, bounds, color="0.4", linewidth=1, linestyle="--")
    axes.set(xlim=bounds, ylim=bounds)
    legend = axes.legend(loc="upper left", fontsize="small", markerscale=3)
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)
