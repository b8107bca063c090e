"""The demo's picture: success against latency, and how latencies are distributed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chimera_bench.summary import PolicySummary

_KNOWN = {
    "chimera": "#c0392b",
    "chimera (prior)": "#e59866",
    "paper": "#2471a3",
    "least_loaded": "#7f8c8d",
}
_OTHERS = ("#1e8449", "#b7950b", "#7d3c98", "#d35400", "#117a65", "#5d4037")


def draw(
    path: Path,
    summaries: Sequence[PolicySummary],
    latencies_s: Mapping[str, Sequence[float]],
    title: str,
) -> None:
    """Write a PNG. ``latencies_s`` maps each policy to the latencies of its answered workflows."""
    colours = _colours([s.policy for s in summaries])
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _frontier(left, summaries, colours)
    _distribution(right, latencies_s, colours)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _colours(policies: Sequence[str]) -> dict[str, str]:
    others = iter(_OTHERS * (1 + len(policies) // len(_OTHERS)))
    return {policy: _KNOWN.get(policy) or next(others) for policy in policies}


def _frontier(axes: Axes, summaries: Sequence[PolicySummary], colours: Mapping[str, str]) -> None:
    for s in summaries:
        if not s.answered:
            continue
        x, y = s.latency_mean_s, s.success
        axes.errorbar(
            x.value,
            100 * y.value,
            xerr=[[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]],
            yerr=[[max(0.0, 100 * (y.value - y.low))], [max(0.0, 100 * (y.high - y.value))]],
            fmt="o",
            markersize=7,
            capsize=3,
            color=colours[s.policy],
            label=s.policy,
        )
    axes.set_xscale("log")
    _plain_seconds(axes, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    axes.set_xlabel("mean workflow latency, s (log; left is better)")
    axes.set_ylabel("workflows answered correctly, % (up is better)")
    axes.set_title("mean with 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _distribution(
    axes: Axes, latencies_s: Mapping[str, Sequence[float]], colours: Mapping[str, str]
) -> None:
    for policy, values in latencies_s.items():
        if not values:
            continue
        ordered = sorted(values)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.step(ordered, shares, where="post", color=colours[policy], label=policy)
    axes.set_xscale("log")
    _plain_seconds(axes, (1.0, 2.0, 5.0))
    axes.set_ylim(0.0, 1.01)
    axes.set_xlabel("workflow latency, s (log)")
    axes.set_ylabel("share of workflows that took no longer")
    axes.set_title("distribution", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")


def _plain_seconds(axes: Axes, marks: Sequence[float]) -> None:
    """These numbers in every decade, instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=marks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
