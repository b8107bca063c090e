"""The demo's picture: success against latency, and how latencies are distributed."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from chimera_bench.summary import PolicySummary

_KNOWN = {
    "chimera": "#c0392b",
    "chimera (prior)": "#e59866",
    "paper": "#2471a3",
    "least_loaded": "#7f8c8d",
}
_OTHERS = ("#1e8449", "#b7950b", "#7d3c98", "#d35400", "#117a65", "#5d4037")
_MARKS = "osD^vPX*<>"
_Line = Literal["-", "--", "-.", ":"]
_LINES: tuple[_Line, ...] = ("-", "--", "-.", ":")


class Panel(NamedTuple):
    """What is shown of one load; ``latencies_s`` as in `draw`."""

    title: str
    summaries: Sequence[PolicySummary]
    latencies_s: Mapping[str, Sequence[float]]


def draw(
    path: Path,
    summaries: Sequence[PolicySummary],
    latencies_s: Mapping[str, Sequence[float]],
    title: str,
    sweeps: Mapping[str, str] | None = None,
) -> None:
    """Write a PNG. ``latencies_s`` maps each policy to the latencies of its answered workflows.

    ``sweeps`` names the curve that a policy is a point of; without it each is one of its own.
    """
    styles = _styles([s.policy for s in summaries], sweeps or {})
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _frontier(left, summaries, styles)
    _join(left, summaries, styles, sweeps or {})
    _distribution(right, latencies_s, styles)
    left.legend(handles=_keys(styles), fontsize=8, handlelength=4)
    right.legend(handles=_keys(styles), fontsize=8, handlelength=4, loc="lower right")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def draw_loads(path: Path, panels: Sequence[Panel], title: str, sweeps: Mapping[str, str]) -> None:
    """Write a PNG with a column per load, all to the same scales; ``sweeps`` as in `draw`."""
    styles = _styles([s.policy for s in panels[0].summaries], sweeps)
    figure = Figure(figsize=(1.0 + 5.5 * len(panels), 9.6), layout="constrained")
    rows = figure.subplots(2, len(panels), squeeze=False, sharex="row", sharey="row")
    for panel, upper, lower in zip(panels, *rows, strict=True):
        _frontier(upper, panel.summaries, styles)
        _join(upper, panel.summaries, styles, sweeps)
        _distribution(lower, panel.latencies_s, styles)
        upper.set_title(panel.title, fontsize=10)
        lower.set_title("")
    for axes in (*rows[0][1:], *rows[1][1:]):
        axes.set_ylabel("")
    figure.legend(
        handles=_keys(styles), loc="outside lower center", ncols=5, fontsize=8, handlelength=4
    )
    figure.suptitle(f"{title}; means with 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=100)


class _Style(NamedTuple):
    colour: str
    mark: str
    line: _Line


def _styles(policies: Sequence[str], sweeps: Mapping[str, str]) -> dict[str, _Style]:
    """A colour per curve; its points differ by their marks, their distributions by the line."""
    curves: dict[str, list[str]] = {}
    for policy in policies:
        curves.setdefault(sweeps.get(policy, policy), []).append(policy)
    others = cycle(_OTHERS)
    styles: dict[str, _Style] = {}
    for curve, members in curves.items():
        colour = _KNOWN.get(curve) or next(others)
        for i, policy in enumerate(members):
            mark, line = _MARKS[i % len(_MARKS)], _LINES[i % len(_LINES)]
            styles[policy] = _Style(colour, mark, line)
    return styles


def _keys(styles: Mapping[str, _Style]) -> list[Line2D]:
    """Of a legend, for points and distributions alike."""
    return [
        Line2D([], [], color=s.colour, marker=s.mark, linestyle=s.line, markersize=5, label=name)
        for name, s in styles.items()
    ]


def _join(
    axes: Axes,
    summaries: Sequence[PolicySummary],
    styles: Mapping[str, _Style],
    sweeps: Mapping[str, str],
) -> None:
    """A line through the points of each curve, from the fastest to the slowest."""
    curves: dict[str, list[PolicySummary]] = {}
    for s in summaries:
        if s.answered and s.policy in sweeps:
            curves.setdefault(sweeps[s.policy], []).append(s)
    for curve in curves.values():
        curve.sort(key=lambda s: s.latency_mean_s.value)
        x = [s.latency_mean_s.value for s in curve]
        y = [100 * s.success.value for s in curve]
        axes.plot(x, y, color=styles[curve[0].policy].colour, linewidth=1, alpha=0.6)


def _frontier(axes: Axes, summaries: Sequence[PolicySummary], styles: Mapping[str, _Style]) -> None:
    for s in summaries:
        if not s.answered:
            continue
        x, y = s.latency_mean_s, s.success
        axes.errorbar(
            x.value,
            100 * y.value,
            xerr=[[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]],
            yerr=[[max(0.0, 100 * (y.value - y.low))], [max(0.0, 100 * (y.high - y.value))]],
            fmt=styles[s.policy].mark,
            markersize=7,
            capsize=3,
            color=styles[s.policy].colour,
        )
    axes.set_xscale("log")
    plain_seconds(axes, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    axes.set_xlabel("mean workflow latency, s (log; left is better)")
    axes.set_ylabel("workflows answered correctly, % (up is better)")
    axes.set_title("mean with 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3, which="both")


def _distribution(
    axes: Axes, latencies_s: Mapping[str, Sequence[float]], styles: Mapping[str, _Style]
) -> None:
    for policy, values in latencies_s.items():
        if not values:
            continue
        ordered = sorted(values)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.step(
            ordered,
            shares,
            where="post",
            color=styles[policy].colour,
            linestyle=styles[policy].line,
        )
    axes.set_xscale("log")
    plain_seconds(axes, (1.0, 2.0, 5.0))
    axes.set_ylim(0.0, 1.01)
    axes.set_xlabel("workflow latency, s (log)")
    axes.set_ylabel("share of workflows that took no longer")
    axes.set_title("distribution", fontsize=10)
    axes.grid(alpha=0.3, which="both")


def plain_seconds(axes: Axes, marks: Sequence[float]) -> None:
    """These numbers in every decade, instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=marks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
