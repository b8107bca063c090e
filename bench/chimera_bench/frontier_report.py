"""Frontiers over clusters and loads, for readers: tables, rows, a Markdown page with its pictures.

Figures come from `frontier`; how a number looks is `sim_report`'s part.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from chimera_bench import frontier, sim_report
from chimera_bench.frontier import ALL, Area, Cell, Match, Metric
from chimera_bench.sim_report import Report, Table, number, shown
from chimera_bench.sim_runs import Setting
from chimera_bench.simulate import REFERENCE
from chimera_daemon.config import ConfigError, PaperConfig

BEGIN = "<!-- chimera simulate: figures begin -->"
END = "<!-- chimera simulate: figures end -->"
_PICTURE_DPI = 75
_PAPER = PaperConfig(tau=1.0)  # the second reference, where it is among the settings
_OF_CLUSTER = ("cluster", "tasks", "uniform_per_s", "whole_per_s")  # facts of one cluster
_HEADS: dict[Metric, tuple[str, str]] = {  # title, what a cell of the table says
    "mean": ("Mean latency over {}'s, succeeding no less", "ratio at points of success gained"),
    "p95": ("P95 latency over {}'s, succeeding no less", "ratio at points of success gained"),
    "success": (
        "Success over {}'s, at no more mean latency",
        "points gained at ratio of mean latencies",
    ),
}


class Frontiers(Struct, frozen=True):
    """Everything over the cells of all reports; ``reports`` has one per cluster."""

    reports: Sequence[Report]
    cells: Sequence[Cell]
    sweeps: frontier.Sweeps
    areas: list[Area]
    matches: list[Match]
    tuned: bool  # settings were chosen on tasks that nothing is reported on

    @property
    def worth_a_table(self) -> bool:
        """Of a single cell all is said in its own tables, unless settings were chosen for it."""
        return len(self.cells) > 1 or self.tuned


def frontiers(
    reports: Sequence[Report],
    cells: Sequence[Cell],
    settings: Sequence[Setting],
    baseline: Sequence[Setting],
    tuned: bool,
) -> Frontiers | None:
    """All figures over cells; the settings of ``baseline`` together are what areas are held to.

    None where the reference policy was not run.
    """
    names = [setting.name for setting in settings]
    if REFERENCE not in names:
        return None
    sweeps: dict[str, list[str]] = {}
    for setting in settings:
        sweeps.setdefault(setting.sweep, []).append(setting.name)
    cloud = [setting.name for setting in baseline]
    called = f"{cloud[0].split()[0]} ({len(cloud)} points)"
    references = [REFERENCE, *_paper(baseline, settings)]
    return Frontiers(
        reports,
        cells,
        sweeps,
        frontier.areas(cells, sweeps, called, cloud),
        [each for name in references for each in frontier.matches(cells, sweeps, name)],
        tuned,
    )


def _paper(first: Sequence[Setting], settings: Sequence[Setting]) -> list[str]:
    alike = [
        each.name
        for each in (*first, *settings)
        if each.config.policy == "paper" and each.config.paper == _PAPER
    ]
    return sorted(alike, key=len)[:1]  # the one with the fewest other knobs


def rows(found: Frontiers) -> Iterator[dict[str, Any]]:
    """One flat object per area and match, with the facts that all clusters share."""
    facts = {k: v for k, v in found.reports[0].facts.items() if k not in _OF_CLUSTER}
    common = {**facts, "clusters": [str(report.facts["cluster"]) for report in found.reports],
              "tuned": found.tuned}  # fmt: skip
    for area in found.areas:
        yield {"row": "area", **common, **sim_report.plain(area)}
    for match in found.matches:
        yield {"row": "match", **common, **sim_report.plain(match), "reached": match.reached}


def tables(found: Frontiers) -> Iterator[Table]:
    """Areas; then, per reference, sweeps at its success and at its latency."""
    places = list(frontier.scopes(found.cells))
    yield _areas(found, places)
    metrics: list[tuple[str, Metric]] = [(each.reference, each.metric) for each in found.matches]
    for reference, metric in dict.fromkeys(metrics):
        yield _matches(found, reference, metric, places)


def _areas(found: Frontiers, places: Sequence[str]) -> Table:
    baseline = found.areas[0].baseline
    by_place = {(area.sweep, area.where): area for area in found.areas}
    lines = [
        (
            sweep,
            str(len(names)),
            shown(by_place[sweep, ALL].hypervolume, 3),
            *(shown(by_place[sweep, place].ratio, 3) for place in places),
        )
        for sweep, names in found.sweeps.items()
    ]
    return Table(
        f"Frontiers over {_cells(found)}: area, and ratios to {baseline}",
        ["sweep", "points", "area", *(f"ratio, {_where(place)}" for place in places)],
        lines,
        f"area: mean over cells of the area dominated from (twice {REFERENCE}'s mean latency, the "
        "worst model's success), 1 = (fastest idle latency, share of tasks that any model solves); "
        f"{baseline}: all of its settings together; brackets: paired 95 % intervals over tasks and "
        "seeds",
    )


def _matches(found: Frontiers, reference: str, metric: Metric, places: Sequence[str]) -> Table:
    by_place = {
        (match.sweep, match.where): match
        for match in found.matches
        if (match.reference, match.metric) == (reference, metric)
    }
    title, saying = _HEADS[metric]
    return Table(
        title.format(reference),
        ["sweep", *map(_where, places)],
        [
            (sweep, *(_matched(by_place[sweep, place]) for place in places))
            for sweep, names in found.sweeps.items()
            if list(names) != [reference]
        ],
        f"{saying}, means over cells; -: no setting gets there; (n/m): in n of m cells one does, "
        f"and the figure is theirs; {_choice(found)}",
    )


def _matched(match: Match) -> str:
    if not match.reached:
        return "-"
    if match.metric == "success":
        text = f"{shown(match.success_gain, 1, 100.0, '+')} at {number(match.ratio.value, 3)}"
    else:
        gain = number(100.0 * match.success_gain.value, 1, "+")
        text = f"{shown(match.ratio, 3)} at {gain}"
    cells = len(match.settings)
    return text if match.reached == cells else f"{text} ({match.reached}/{cells})"


def _choice(found: Frontiers) -> str:
    if found.tuned:
        return "a cell's setting is chosen on the tuning half of the tasks, reported on the other"
    return "a cell's setting is chosen on the tasks that are reported, which flatters: --choose"


def _where(place: str) -> str:
    return place if place == ALL else f"cluster {place}"


def _cells(found: Frontiers) -> str:
    loads = ", ".join(each.load for each in found.reports[0].loads)
    clusters = ", ".join(report.name for report in found.reports)
    return f"clusters {clusters} x loads {loads}"


# The page.


def check(path: Path) -> None:
    """Raise `ConfigError` for a file that is there and says nowhere what may be replaced."""
    try:
        unmarked = path.is_file() and not _parts(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--report: {path} cannot be read: {error}") from error
    if unmarked:
        raise ConfigError(
            f"--report: {path} has no part between {BEGIN!r} and {END!r}, which would be replaced; "
            "add these two lines or name another file"
        )


def _parts(path: Path) -> tuple[str, str] | None:
    """Text before and after the marked part."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    return (before, after) if begin and end else None


def write(path: Path, found: Frontiers, command: str) -> None:
    """Write the page's marked part, and beside it `frontier-CLUSTER.png` of each cluster."""
    before, after = (_parts(path) if path.is_file() else None) or ("", "\n")
    path.write_text(f"{before}{BEGIN}\n{page(found, command)}{END}{after}", encoding="utf-8")
    for report in found.reports:
        (path.parent / _picture(report)).write_bytes(sim_report.draw([report], _PICTURE_DPI))


def _picture(report: Report) -> str:
    return f"frontier-{report.name}.png"


def page(found: Frontiers, command: str) -> str:
    """Markdown: what was run, figures over cells, figures of each cluster, starvation."""
    parts = [_run(found, command), *(_markdown(table) for table in tables(found))]
    for report in found.reports:
        cells = [cell for cell in found.cells if cell.cluster == report.name]
        parts += [
            _markdown(_cluster(found, report, cells)),
            f"![Success against mean workflow latency, cluster {report.name}]"
            f"({_picture(report)})\n",
            _markdown(_starvation(found, report, cells)),
        ]
    return "\n".join(parts)


def _run(found: Frontiers, command: str) -> str:
    facts = found.reports[0].facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    tasks = ", ".join(f"{report.name} {report.facts['tasks']}" for report in found.reports)
    seeds = ", ".join(map(str, facts["seeds"]))
    return (
        f"```\n{command}\n```\n\n"
        f"- {facts['time']}, commit {facts['commit'] or 'unknown'}, {facts['machine']}, "
        f"Python {facts['python']}, {versions}; {facts['seconds']} s\n"
        f"- {facts['half']} tasks: {tasks}; {facts['workflows_per_seed']} workflows for each of "
        f"the seeds {seeds}, the same ones for every policy; {facts['arrivals']} arrivals; "
        f"predictions {facts['predictions']}\n"
    )


def _markdown(table: Table) -> str:
    def line(texts: Sequence[str]) -> str:
        cells = " | ".join(text.replace("|", "\\|") for text in texts)
        return f"| {cells} |"

    rule = "|---" + "|---:" * (len(table.head) - 1) + "|"
    rows = [line(table.head), rule, *map(line, table.rows)]
    return "\n".join((f"### {table.title}", "", *rows, "", f"{table.caption}.", ""))


def _cluster(found: Frontiers, report: Report, cells: Sequence[Cell]) -> Table:
    def text(sweep: str, cell: Cell) -> str:
        setting, mark = _shown_setting(found, sweep, cell)
        drawn = cell.drawn[setting]
        return (
            f"{_dial(setting, sweep)}{mark}{number(100.0 * drawn.success[0], 1)} %, "
            f"{number(drawn.latency_s[0], 2)} s, P95 {number(drawn.p95_s[0], 1)} s"
        )

    head = [f"load {each.load} ({each.rate_per_s:.2f}/s)" for each in report.loads]
    return Table(
        f"Cluster {report.name}: success, mean and P95 latency",
        ["sweep", *head],
        [(sweep, *(text(sweep, cell) for cell in cells)) for sweep in found.sweeps],
        f"of a sweep the fastest setting that succeeds no less than {REFERENCE}; *: none does, "
        f"this one succeeds most often; {_choice(found)}",
    )


def _starvation(found: Frontiers, report: Report, cells: Sequence[Cell]) -> Table:
    def text(sweep: str, cell: Cell) -> str:
        setting, mark = _shown_setting(found, sweep, cell)
        ratio = frontier.tail_ratio(cell, setting, REFERENCE)
        return f"{mark}{shown(ratio, 2)}, {number(cell.longest_wait_s[setting], 1)} s"

    return Table(
        f"Cluster {report.name}: starvation",
        ["sweep", *(f"load {each.load}" for each in report.loads)],
        [(sweep, *(text(sweep, cell) for cell in cells)) for sweep in found.sweeps],
        f"P99 workflow latency over that of {REFERENCE}, which serves in order of arrival, and the "
        "longest wait of any stage; settings as above",
    )


def _shown_setting(found: Frontiers, sweep: str, cell: Cell) -> tuple[str, str]:
    """The setting of a sweep that a table shows, and a mark where it is not the one wanted."""
    names = found.sweeps[sweep]
    if len(names) == 1:
        return names[0], ""
    best = frontier.chosen(cell, names, REFERENCE, "mean")
    return (best, "") if best else (frontier.most_successful(cell, names), "* ")


def _dial(setting: str, sweep: str) -> str:
    words = [word for word in setting.split() if word not in sweep.split()]
    return f"{' '.join(words)}: " if words else ""
