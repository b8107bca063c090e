"""Results of a demo as words and tables: for a terminal, for Markdown, and a verdict.

Pure functions from summaries to strings; files and plots are made elsewhere.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from chimera_bench.quality import Quality
from chimera_bench.summary import Comparison, Interval, PolicySummary, Relative

Row = Sequence[str]
_Figures = TypeVar("_Figures", PolicySummary, Relative)


class Grid(NamedTuple):
    """Cells as they are shown; the first column is left aligned."""

    head: Row
    rows: Sequence[Row]

    def plain(self) -> str:
        """For a terminal."""
        return table(self.head, self.rows)

    def markdown(self) -> str:
        """For a page."""
        rule = ("---", *("---:" for _ in self.head[1:]))
        lines = (self.head, rule, *self.rows)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def policies_table(summaries: Sequence[PolicySummary]) -> str:
    """`policies` for a terminal."""
    return policies(summaries).plain()


def policies(summaries: Sequence[PolicySummary]) -> Grid:
    """One line per policy; brackets hold 95 % intervals, latencies are in seconds."""
    models = sorted({model for s in summaries for model in s.stage_share})
    head = (
        *("policy", "success %", "mean s", "P50", "P95", "P99", "ms/token"),
        *(f"% {model}" for model in models),
        *("tok/s", "queue s", "longest wait s", "errors", "retried"),
    )
    rows = [
        (
            s.policy,
            _show(s.success, 1, 100.0),
            _show(s.latency_mean_s, 2),
            _number(s.latency_s["p50"], 2),
            _number(s.latency_s["p95"], 2),
            _number(s.latency_s["p99"], 2),
            _show(s.ms_per_token, 1),
            *(f"{100 * s.stage_share.get(model, 0.0):.0f}" for model in models),
            _number(s.tokens_per_s, 0),
            _number(s.queue_mean_s, 3),
            _number(s.queue_longest_s, 2),
            str(s.errors),
            str(s.retried_stages),
        )
        for s in summaries
    ]
    return Grid(head, rows)


def across_loads(
    summaries: Mapping[str, Sequence[PolicySummary]], relatives: Mapping[str, Sequence[Relative]]
) -> list[tuple[str, Grid]]:
    """One titled grid per figure: a line per policy, a column per load, which the keys name.

    Ratios and differences are there where there was a baseline to make them by.
    """
    grids = [
        ("mean latency, s", _by_load(summaries, lambda s: _show(s.latency_mean_s, 2))),
        ("P95, s", _by_load(summaries, lambda s: _number(s.latency_s["p95"], 2))),
        ("success, %", _by_load(summaries, lambda s: _show(s.success, 1, 100.0))),
    ]
    baseline = next((r.baseline for each in relatives.values() for r in each), None)
    if baseline is None:
        return grids
    below = f"divided by that of {baseline} (below 1 is faster)"
    return [
        *grids,
        (f"mean latency {below}", _by_load(relatives, lambda r: _show(r.latency_mean, 2))),
        (f"P95 {below}", _by_load(relatives, lambda r: _show(r.latency_p95, 2))),
        (
            f"success minus that of {baseline}, points",
            _by_load(relatives, lambda r: _show(r.success_gain, 1, 100.0, "+")),
        ),
    ]


def _by_load(found: Mapping[str, Sequence[_Figures]], cell: Callable[[_Figures], str]) -> Grid:
    columns = [{row.policy: cell(row) for row in rows} for rows in found.values()]
    return Grid(
        ("policy", *found), [(name, *(column[name] for column in columns)) for name in columns[0]]
    )


def by_seed(summaries: Sequence[PolicySummary]) -> str:
    """Mean latency of each seed's run, which shows what the intervals do not have in them."""
    means = (
        f"{s.policy} {', '.join(_number(x, 2) for x in s.latency_by_seed_s)}" for s in summaries
    )
    return "mean s by seed: " + "; ".join(means)


def predictions(quality: Quality) -> str:
    """One line: how good a row's learned predictions were in this run."""
    routers = ", ".join(f"{m} {_show(auc, 2)}" for m, auc in quality.router_auc.items())
    return (
        f"predictions of {quality.policy}: router AUC {routers or '- (no static rows)'}; remaining "
        f"tokens: Kendall distance {_show(quality.remaining_kendall, 3)}, 80 % interval covers "
        f"{_show(quality.coverage, 0, 100.0)} %; {100 * quality.in_time:.1f} % of stages in time"
    )


def comparisons_table(comparisons: Sequence[Comparison]) -> str:
    """Ratios over 1 mean that the policy on the left is faster."""
    head = ("policy against baseline", "latency ratio", "ms/token ratio", "success, points")
    rows = [
        (
            f"{c.policy} against {c.baseline}",
            _show(c.latency_ratio, 2),
            _show(c.per_token_ratio, 2),
            _show(c.success_gain, 1, 100.0, "+"),
        )
        for c in comparisons
    ]
    return table(head, rows)


def verdict(comparison: Comparison) -> str:
    """One sentence that claims only what the intervals carry."""
    ratio, gain = comparison.latency_ratio, comparison.success_gain
    if math.isnan(ratio.low) or math.isnan(gain.low):
        said = "nothing can be said: too few workflows were answered"
    else:
        said = f"{_speed_words(ratio)}, {_success_words(gain)}"
    return f"{comparison.policy} against {comparison.baseline}: {said}."


def _speed_words(ratio: Interval) -> str:
    if ratio.low > 1.0:
        return f"{ratio.value:.2f} times faster in mean latency"
    if ratio.high < 1.0:
        return f"{1.0 / ratio.value:.2f} times slower in mean latency"
    return "no difference in mean latency shown"


def _success_words(gain: Interval) -> str:
    points = abs(100.0 * gain.value)
    if gain.low > 0.0:
        return f"{points:.1f} points more success"
    if gain.high < 0.0:
        return f"{points:.1f} points less success"
    return "no difference in success shown"


def table(head: Row, rows: Sequence[Row]) -> str:
    """First column left, the others right aligned."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Row) -> str:
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join((line(head), "  ".join("-" * w for w in widths), *map(line, rows)))


def _show(interval: Interval, digits: int, scale: float = 1.0, sign: str = "") -> str:
    value, low, high = (
        _number(scale * x, digits, sign) for x in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


def _number(value: float, digits: int, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.{digits}f}"
