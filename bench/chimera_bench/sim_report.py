"""What simulations have shown, for readers: tables on a terminal, a picture, one page, rows.

Owns how figures look. Everything is made of `Report`s, which have no figure of their own.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import msgspec
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from msgspec import Struct

from chimera_bench.plot import plain_seconds
from chimera_bench.sim_summary import Comparison, Frontier, LoadSummary, Summary
from chimera_bench.summary import Interval

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = (
    *("#c0392b", "#2471a3", "#1e8449", "#b7950b", "#7d3c98", "#d35400", "#117a65", "#5d4037"),
    *("#e84393", "#34495e", "#7f8c8d", "#27ae60", "#1f618d", "#000000"),
)
_MARKS = "osD^vPX*<>phd"  # more or less than colours, so that pairs repeat late
_BARS_ALPHA = 0.3  # bars of many settings would hide the points
_PLAIN_WIDTH = 240  # columns, where there is no terminal to ask


class Report(Struct, frozen=True):
    """All figures of a cluster, which ``name`` is the name of.

    ``facts`` of machine and run go into every row, ``notes`` above the tables.
    """

    title: str
    notes: list[str]
    facts: dict[str, Any]
    loads: list[LoadSummary]
    name: str = ""


class Table(NamedTuple):
    """Cells as they are shown; the first column is left aligned."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


def tables(report: Report, brief: bool = False) -> Iterator[Table]:
    """Per load: figures, comparisons unless ``brief``, frontiers."""
    for each in report.loads:
        where = f"load {each.load} ({each.rate_per_s:.2f} workflows/s)"
        yield _figures(where, each.summaries)
        if each.comparisons and not brief:
            yield _comparisons(where, each.comparisons)
        if each.frontiers:
            yield _frontiers(where, each.frontiers)


def _figures(where: str, summaries: Sequence[Summary]) -> Table:
    models, engines = list(summaries[0].stage_share), list(summaries[0].utilisation)
    head = ("policy", "success %", "mean s", "P50", "P95", "P99", "ms/token", "stages %",
            "busy %", "slots %", "longest wait", "tries", "errors")  # fmt: skip
    rows = [
        (
            s.setting,
            shown(s.success, 1, 100.0),
            shown(s.latency_mean_s, 2),
            number(s.latency_p50_s.value, 1),
            shown(s.latency_p95_s, 1),
            shown(s.latency_p99_s, 1),
            shown(s.ms_per_token, 1),
            _parts(s.stage_share, models),
            _parts(s.utilisation, engines),
            _parts(s.occupied, engines),
            number(s.longest_wait_s, 1),
            number(s.tries, 2),
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
            shown(c.latency_ratio, 3),
            shown(c.p95_ratio, 3),
            shown(c.p99_ratio, 3),
            shown(c.per_token_ratio, 3),
            shown(c.success_gain, 1, 100.0, "+"),
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
            shown(f.hypervolume, 3),
            shown(f.latency_ratio, 3),
            shown(f.p95_ratio, 3),
            shown(f.success_gain, 1, 100.0, "+"),
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


def shown(interval: Interval, digits: int, scale: float = 1.0, sign: str = "") -> str:
    """A figure with its interval in brackets, - for none."""
    value, low, high = (
        number(scale * x, digits, sign) for x in (interval.value, interval.low, interval.high)
    )
    return value if low == high == "-" else f"{value} [{low}, {high}]"


def number(value: float, digits: int, sign: str = "") -> str:
    """A figure, - for none."""
    return "-" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def show(report: Report, output: TextIO, brief: bool = False) -> None:
    """Title, notes and tables as text."""
    console = _console(output)
    console.print(report.title, markup=False)
    for note in report.notes:
        console.print(f"  {note}", markup=False)
    show_tables(tables(report, brief), output)


def show_tables(shown_ones: Iterable[Table], output: TextIO) -> None:
    """Tables as text."""
    from rich import box
    from rich.table import Table as Grid

    console = _console(output)
    for table in shown_ones:
        grid = Grid(box=box.SIMPLE, title=table.title, title_justify="left", title_style="bold")
        for place, name in enumerate(table.head):
            grid.add_column(name, justify="right" if place else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(grid)
        console.print(f"  {table.caption}\n", markup=False, style="dim")


def _console(output: TextIO) -> "Console":
    from rich.console import Console

    return Console(file=output, width=None if output.isatty() else _PLAIN_WIDTH, highlight=False)


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
                yield {"row": kind, **common, **plain(struct)}


def plain(struct: Struct) -> dict[str, Any]:
    """As JSON can be: NaN is null."""
    return _without_nan(msgspec.to_builtins(struct))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# The picture.


def draw(reports: Sequence[Report], dpi: int = 120) -> bytes:
    """A PNG: success against mean latency, one panel per load, of several reports a line each.

    Points of a sweep are joined where no other one of it is both faster and better.
    """
    several = len(reports) > 1
    loads = [(report, each) for report in reports for each in report.loads]
    count = len(reports[0].loads)
    columns = count if several or count <= 3 else math.isqrt(count - 1) + 1
    lines = -(-len(loads) // columns)
    figure = Figure(figsize=(5.2 * columns + 1.0, 4.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    sweeps = list(dict.fromkeys(s.sweep for _, each in loads for s in each.summaries))
    for panel, (report, each) in zip(panels, loads, strict=False):
        _panel(panel, each, sweeps, f"cluster {report.name}, " if several else "")
    for panel in panels[len(loads) :]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(sweeps), 6), fontsize=9
    )
    bars = "bars: 95 % intervals; differences between policies are paired and more certain"
    titles = "\n".join(report.title for report in reports)
    figure.suptitle(f"{titles}\n{bars}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _panel(axes: Axes, each: LoadSummary, sweeps: Sequence[str], where: str) -> None:
    for place, sweep in enumerate(sweeps):
        points = [s for s in each.summaries if s.sweep == sweep and s.latency_mean_s.value > 0.0]
        front = _undominated(points)
        mark, colour = _MARKS[place % len(_MARKS)], _COLOURS[place % len(_COLOURS)]
        axes.errorbar(
            [s.latency_mean_s.value for s in front],
            [100.0 * s.success.value for s in front],
            xerr=_bars([s.latency_mean_s for s in front]),
            yerr=_bars([s.success for s in front], 100.0),
            fmt=f"{mark}-",
            color=colour,
            markersize=6,
            linewidth=1.2,
            ecolor=to_rgba(colour, _BARS_ALPHA),
            elinewidth=0.6,
            capsize=2,
            label=sweep,
        )
        others = [s for s in points if s not in front]
        axes.plot(
            [s.latency_mean_s.value for s in others],
            [100.0 * s.success.value for s in others],
            mark,
            color=colour,
            markersize=4,
            alpha=0.35,
        )
    axes.set_title(f"{where}load {each.load}: {each.rate_per_s:.2f} workflows/s", fontsize=10)
    axes.set_xscale("log")
    if axes.has_data():
        low, high = axes.get_xlim()
        plain_seconds(axes, (1.0, 3.0) if high > 30.0 * low else (1.0, 2.0, 5.0))
    axes.set_xlabel("mean workflow latency, s (log; left is better)")
    axes.set_ylabel("success, % (up is better)")
    axes.grid(alpha=0.3)


def _undominated(points: Sequence[Summary]) -> list[Summary]:
    front: list[Summary] = []
    for point in sorted(points, key=lambda s: (s.latency_mean_s.value, -s.success.value)):
        if not front or point.success.value > front[-1].success.value:
            front.append(point)
    return front


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


def page(reports: Sequence[Report], over_all: Sequence[Table]) -> str:
    """One HTML page that needs no other file; tables ``over_all`` reports come first."""
    picture = base64.b64encode(draw(reports)).decode()
    title = html.escape(reports[0].title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
        '<img alt="success against mean workflow latency" '
        f'src="data:image/png;base64,{picture}">{"".join(map(_section, over_all))}'
        f"{''.join(map(_chapter, reports))}</body></html>\n"
    )


def _chapter(report: Report) -> str:
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    body = "".join(_section(table) for table in tables(report))
    facts = "; ".join(f"{key}: {value}" for key, value in report.facts.items())
    return (
        f"<h1>{html.escape(report.title)}</h1><ul>{notes}</ul>{body}"
        f"<footer>{html.escape(facts)}</footer>"
    )


def _section(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return (
        f'<h2>{html.escape(table.title)}</h2><div class="scroll"><table>{line(table.head, "th")}'
        f"{''.join(line(row, 'td') for row in table.rows)}</table></div>"
        f'<p class="caption">{html.escape(table.caption)}</p>'
    )


def write(
    reports: Sequence[Report], over_all: Sequence[Table], plot: Path | None, page_at: Path | None
) -> None:
    """Write the picture and the page where they are wanted."""
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(draw(reports))
    if page_at is not None:
        page_at.parent.mkdir(parents=True, exist_ok=True)
        page_at.write_text(page(reports, over_all), encoding="utf-8")
