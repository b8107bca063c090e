"""What simulations have shown, for readers: tables on a terminal, a picture, one page, rows.

Owns how figures look. Everything is made of one `Report`, which has no figure of its own.
"""

import base64
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from msgspec import Struct

from chimera_bench.sim_summary import Comparison, Frontier, LoadSummary, Summary
from chimera_bench.summary import Interval

_COLOURS = (
    *("#c0392b", "#2471a3", "#1e8449", "#b7950b", "#7d3c98", "#d35400", "#117a65", "#5d4037"),
    *("#e84393", "#34495e"),
)
_MARKS = "osD^vPX*<>"
_PLAIN_WIDTH = 240  # columns, where there is no terminal to ask


class Report(Struct, frozen=True):
    """All figures. ``facts`` of machine and run go into every row, ``notes`` above the tables."""

    title: str
    notes: list[str]
    facts: dict[str, Any]
    loads: list[LoadSummary]


class Table(NamedTuple):
    """Cells as they are shown; the first column is left aligned."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


def tables(report: Report) -> Iterator[Table]:
    """Per load: figures, comparisons, frontiers."""
    for each in report.loads:
        where = f"load {each.load} ({each.rate_per_s:.2f} workflows/s)"
        yield _figures(where, each.summaries)
        if each.comparisons:
            yield _comparisons(where, each.comparisons)
        if each.frontiers:
            yield _frontiers(where, each.frontiers)


def _figures(where: str, summaries: Sequence[Summary]) -> Table:
    models, engines = list(summaries[0].stage_share), list(summaries[0].utilisation)
    head = ("policy", "success %", "mean s", "P50", "P95", "P99", "ms/token", "stages %",
            "busy %", "slots %", "longest wait", "errors")  # fmt: skip
    rows = [
        (
            s.setting,
            _show(s.success, 1, 100.0),
            _show(s.latency_mean_s, 2),
            _number(s.latency_p50_s.value, 1),
            _show(s.latency_p95_s, 1),
            _show(s.latency_p99_s, 1),
            _show(s.ms_per_token, 1),
            _parts(s.stage_share, models),
            _parts(s.utilisation, engines),
            _parts(s.occupied, engines),
            _number(s.longest_wait_s, 1),
            str(sum(s.errors.values())),
        )
        for s in summaries
    ]
    caption = (
        f"stages: {' / '.join(models)}; busy (of the time) and slots in use (mean over it): "
        f"{' / '.join(engines)}"
    )
    return Table(where, head, rows, caption)


def _comparisons(where: str, comparisons: Sequence[Comparison]) -> Table:
    head = ("policy", "mean latency", "P95", "P99", "ms/token", "success, points")
    rows = [
        (
            c.setting,
            _show(c.latency_ratio, 3),
            _show(c.p95_ratio, 3),
            _show(c.p99_ratio, 3),
            _show(c.per_token_ratio, 3),
            _show(c.success_gain, 1, 100.0, "+"),
        )
        for c in comparisons
    ]
    title = f"{where}: ratios to {comparisons[0].baseline}"
    return Table(title, head, rows, "paired; a ratio below 1 is faster")


def _frontiers(where: str, frontiers: Sequence[Frontier]) -> Table:
    head = ("sweep", "points", "hypervolume", "mean at equal success", "P95 at equal success",
            "success at equal mean, points")  # fmt: skip
    rows = [
        (
            f.sweep,
            str(len(f.settings)),
            _show(f.hypervolume, 3),
            _show(f.latency_ratio, 3),
            _show(f.p95_ratio, 3),
            _show(f.success_gain, 1, 100.0, "+"),
        )
        for f in frontiers
    ]
    baseline = frontiers[0].baseline
    caption = (
        f"hypervolume: normalised area dominated from (twice {baseline}'s mean latency, the worst "
        "model's success), 1 = (fastest idle latency, share of tasks that any model solves); -: "
        "the sweep does not reach that far"
    )
    return Table(f"{where}: sweeps against {baseline}", head, rows, caption)


def _parts(shares: Mapping[str, float], names: Sequence[str]) -> str:
    return "/".join(f"{100.0 * shares.get(name, 0.0):.0f}" for name in names)


def _show(interval: Interval, digits: int, scale: float = 1.0, sign: str = "") -> str:
    value, low, high = (
        _number(scale * x, digits, sign) for x in (interval.value, interval.low, interval.high)
    )
    return value if low == high == "-" else f"{value} [{low}, {high}]"


def _number(value: float, digits: int, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def show(report: Report, output: TextIO) -> None:
    """Title, notes and tables as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(file=output, width=None if output.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(report.title, markup=False)
    for note in report.notes:
        console.print(f"  {note}", markup=False)
    for table in tables(report):
        grid = Grid(box=box.SIMPLE, title=table.title, title_justify="left", title_style="bold")
        for number, name in enumerate(table.head):
            grid.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(grid)
        console.print(f"  {table.caption}\n", markup=False, style="dim")


def rows(report: Report) -> Iterator[dict[str, Any]]:
    """One flat object per figure, comparison and frontier, each with all facts."""
    for each in report.loads:
        common = {**report.facts, "rate_per_s": each.rate_per_s}
        for kind, structs in (
            ("policy", each.summaries),
            ("comparison", each.comparisons),
            ("frontier", each.frontiers),
        ):
            for struct in structs:
                yield {"row": kind, **common, **_without_nan(msgspec.to_builtins(struct))}


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# The picture.


def draw(report: Report) -> bytes:
    """A PNG: success against mean latency, one panel per load; settings of a sweep are joined."""
    number = len(report.loads)
    columns = number if number <= 3 else math.isqrt(number - 1) + 1
    lines = -(-number // columns)
    figure = Figure(figsize=(5.2 * columns + 1.0, 4.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    sweeps = list(dict.fromkeys(s.sweep for each in report.loads for s in each.summaries))
    for panel, each in zip(panels, report.loads, strict=False):
        _panel(panel, each, sweeps)
    for panel in panels[number:]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(sweeps), 6), fontsize=9
    )
    bars = "bars: 95 % intervals; differences between policies are paired and more certain"
    figure.suptitle(f"{report.title}\n{bars}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _panel(axes: Axes, each: LoadSummary, sweeps: Sequence[str]) -> None:
    for number, sweep in enumerate(sweeps):
        points = [s for s in each.summaries if s.sweep == sweep and s.latency_mean_s.value > 0.0]
        points.sort(key=lambda s: s.latency_mean_s.value)
        axes.errorbar(
            [s.latency_mean_s.value for s in points],
            [100.0 * s.success.value for s in points],
            xerr=_bars([s.latency_mean_s for s in points]),
            yerr=_bars([s.success for s in points], 100.0),
            fmt=f"{_MARKS[number % len(_MARKS)]}-",
            color=_COLOURS[number % len(_COLOURS)],
            markersize=6,
            linewidth=1.2,
            elinewidth=0.6,
            capsize=2,
            label=sweep,
        )
    axes.set_title(f"load {each.load}: {each.rate_per_s:.2f} workflows/s", fontsize=10)
    axes.set_xlabel("mean workflow latency, s (left is better)")
    axes.set_ylabel("success, % (up is better)")
    axes.grid(alpha=0.3)


def _bars(intervals: Sequence[Interval], scale: float = 1.0) -> list[list[float]]:
    def length(much: float) -> float:
        return 0.0 if math.isnan(much) else max(0.0, scale * much)

    below = [length(i.value - i.low) for i in intervals]
    above = [length(i.high - i.value) for i in intervals]
    return [below, above]


# The page.

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem;
       color: #1c1c1c; background: #fff; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 1px solid #888; } tr:nth-child(even) td { background: #f4f4f4; }
p.caption, footer { color: #555; font-size: .8rem; } img { max-width: 100%; }
"""


def page(report: Report) -> str:
    """One HTML page that needs no other file."""
    picture = base64.b64encode(draw(report)).decode()
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    body = "".join(_section(table) for table in tables(report))
    facts = "; ".join(f"{key}: {value}" for key, value in report.facts.items())
    title = html.escape(report.title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f'<ul>{notes}</ul><img alt="success against mean workflow latency" '
        f'src="data:image/png;base64,{picture}">{body}'
        f"<footer>{html.escape(facts)}</footer></body></html>\n"
    )


def _section(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return (
        f'<h2>{html.escape(table.title)}</h2><div class="scroll"><table>{line(table.head, "th")}'
        f"{''.join(line(row, 'td') for row in table.rows)}</table></div>"
        f'<p class="caption">{html.escape(table.caption)}</p>'
    )


def write(report: Report, plot: Path | None, page_at: Path | None) -> None:
    """Write the picture and the page where they are wanted."""
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(draw(report))
    if page_at is not None:
        page_at.parent.mkdir(parents=True, exist_ok=True)
        page_at.write_text(page(report), encoding="utf-8")
