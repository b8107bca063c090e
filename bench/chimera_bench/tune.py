"""`chimera tune`: a policy's knob for a goal, chosen by simulation on half of the tasks.

Owns goals and the search; simulations and figures are those of `chimera simulate`. What the knob
does is reported on the other half of the tasks, which the search never sees.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from chimera_bench import machine, sim_policies, simulate
from chimera_daemon.config import Config, ConfigError

if TYPE_CHECKING:
    from chimera_bench import sim_report
    from chimera_bench.progress import Progress
    from chimera_bench.sim_runs import Cell, Columns, Ground, Plan, Setting
    from chimera_bench.sim_summary import LoadSummary, Summary
    from chimera_bench.summary import Interval

# Where a search begins: the trade is between ratios, so the steps are. At both ends of a dial its
# policy hardly changes any more.
_COARSE = {
    "price": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "tau": (0.1, 0.3, 1.0, 3.0, 10.0),
    "delta_s": (0.0125, 0.05, 0.2, 0.8),
}
_REFINEMENTS = 3  # each tries the middle between the best value and its neighbours
_DIGITS = 3
_LATENCIES = {
    "mean": "latency_mean_s",
    "p50": "latency_p50_s",
    "p95": "latency_p95_s",
    "p99": "latency_p99_s",
}
_BEST = "best"
_SUCCESS = "success"

Point = tuple[float, ...]  # a value of each dial


class Goal(Struct, frozen=True):
    """What to reach: ``metric`` is `best`, `success` (at least ``bound``) or of a latency."""

    text: str
    metric: str
    bound: float = math.nan

    def figure(self, summary: "Summary", area: float) -> float:
        """What the goal is about, of one setting."""
        return area if self.metric == _BEST else self.interval(summary).value

    def interval(self, summary: "Summary") -> "Interval":
        """Likewise with its interval, of a goal with a bound."""
        return getattr(summary, _LATENCIES.get(self.metric, self.metric))

    def met(self, value: float) -> bool:
        """Whether a figure keeps the bound, which `best` does not have."""
        return value >= self.bound if self.metric == _SUCCESS else value <= self.bound

    def rank(self, summary: "Summary", area: float) -> tuple[float, ...]:
        """Greater is better. Where no setting keeps the bound, the nearest one is the best."""
        success, mean_s = summary.success.value, summary.latency_mean_s.value
        # NaN, which is not known or never answered, comes last.
        faster = -math.inf if math.isnan(mean_s) else -mean_s
        better = 0.0 if math.isnan(success) else success
        figure = self.figure(summary, area)
        if self.metric == _BEST:
            return (figure, faster)
        if self.metric == _SUCCESS:
            return (1.0, faster) if self.met(figure) else (0.0, better)
        near = -math.inf if math.isnan(figure) else -figure
        return (1.0, better, faster) if self.met(figure) else (0.0, near)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera tune`."""
    parser.add_argument("--goal", required=True, metavar="GOAL",
                        help="'p95<=20' (also mean, p50, p99; seconds): most success within it; "
                        "'success>=0.45': least mean latency with it; best: the largest area that "
                        "the setting alone dominates, in (mean latency, success), from twice "
                        "least_loaded's latency and the worst model's success")  # fmt: skip
    parser.add_argument("--policy", default="chimera", metavar="P",
                        help="chimera (its price) or paper (tau and delta_s); knobs that are "
                        "written, as in paper:delta_s=0.1, stay so (default: "
                        "%(default)s)")  # fmt: skip
    simulate.add_common(parser)
    parser.add_argument("--cluster", type=Path, required=True, metavar="FILE",
                        help=simulate.CLUSTER_HELP)  # fmt: skip
    parser.add_argument("--load", default="0.8", metavar="L",
                        help=f"{simulate.LOAD_HELP} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl",
                        help="append rows of both halves to this file")  # fmt: skip


def parse(text: str) -> Goal:
    """A goal as a user writes it; raises `ConfigError`."""
    if text.strip() == _BEST:
        return Goal(_BEST, _BEST)
    for sign, metrics, most in (("<=", tuple(_LATENCIES), math.inf), (">=", (_SUCCESS,), 1.0)):
        metric, found, bound = (part.strip() for part in text.partition(sign))
        if found and metric in metrics and 0.0 < (number := _number(bound)) <= most:
            return Goal(f"{metric}{sign}{bound}", metric, number)
    raise ConfigError(
        f"--goal {text!r}: write 'p95<=SECONDS' (or mean, p50, p99), 'success>=SHARE' or best"
    )


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def run(arguments: argparse.Namespace) -> int:
    """Search on one half, report on the other; 0, or `ConfigError` for what cannot be tuned."""
    from chimera_bench import sim_report, sim_study
    from chimera_bench.progress import Progress

    goal = parse(arguments.goal)
    halves = [_as_simulation(arguments, half) for half in ("tune", "test")]
    simulate.check_files(halves[0])
    plans = [_plan(half) for half in halves]
    with Progress() as progress:
        grounds = [sim_study.prepared(plan, progress) for plan in plans]
        search = Search(goal, arguments, grounds[0], progress)
        refine([_COARSE[dial] for dial in search.dials], search.best_with)
        tested = _with_settings(grounds[1], _reported(plans[1], search.chosen))
        columns = sim_study.simulations(tested, arguments.jobs, progress)
    report = _report(halves[1], tested, columns)
    print("\n".join(_searched_lines(search, len(columns))))
    sim_report.show(report, sys.stdout)
    said = _verdict(goal, search.figures.summaries[search.row], report.loads[0])
    print("\n".join([*said, "", *_toml(search.chosen.config, search.dials)]))
    if arguments.out is not None:
        searched = _with_settings(grounds[0], search.settings)
        before = sim_report.Report(
            "", [], simulate.described(halves[0], searched, arguments.cluster), [search.figures]
        )
        _write(arguments.out, search, [before, report])
    return 0


def _as_simulation(arguments: argparse.Namespace, half: str) -> argparse.Namespace:
    """As `chimera simulate` would be told: the policy as it is and the reference."""
    policies = [arguments.policy, simulate.REFERENCE]
    told = {"policy": policies, "set": [], "load": [arguments.load], "half": half}
    return argparse.Namespace(
        **{**vars(arguments), **told, "plot": None, "html": None, "report": None}
    )


def _plan(arguments: argparse.Namespace) -> "Plan":
    plan = simulate.plan(arguments, arguments.cluster)
    written = arguments.policy[0]
    if not sim_policies.free_dials(written):
        raise ConfigError(f"--policy {written!r}: no knob is left to tune; write chimera or paper")
    if len(plan.settings) != 2:
        raise ConfigError(f"--policy {written!r}: give each knob one value")
    return plan


def _with_settings(ground: "Ground", settings: "Sequence[Setting]") -> "Ground":
    """Each setting is a curve of its own: areas are those of single points."""
    alone = tuple(msgspec.structs.replace(setting, sweep=setting.name) for setting in settings)
    plan = msgspec.structs.replace(ground.plan, settings=alone)
    return msgspec.structs.replace(ground, plan=plan)


# The search.


class Search:
    """What has been tried on one half: the reference first, then all points in their order."""

    def __init__(
        self, goal: Goal, arguments: argparse.Namespace, ground: "Ground", progress: "Progress"
    ) -> None:
        self.goal = goal
        self.dials = sim_policies.free_dials(arguments.policy)
        self.points: list[Point] = []
        self.settings = [ground.plan.settings[1]]
        self.columns: dict[Cell, Columns] = {}
        self.row = 0  # of the best point, in settings and figures
        self._arguments = arguments
        self._ground = ground
        self._progress = progress

    @property
    def chosen(self) -> "Setting":
        """The best setting so far."""
        return self.settings[self.row]

    def best_with(self, points: Sequence[Point]) -> Point:
        """Try more points; the best one of all."""
        from chimera_bench import sim_study

        begin = len(self.settings) if self.columns else 0
        self.settings += map(self._setting, points)
        self.points += points
        new = _with_settings(self._ground, self.settings[begin:])
        columns = sim_study.simulations(new, self._arguments.jobs, self._progress)
        for cell, each in columns.items():
            self.columns[cell._replace(setting=begin + cell.setting)] = each
        # Without intervals: those of the best of many would say too much.
        every = _with_settings(self._ground, self.settings)
        (self.figures,) = sim_study.figures(every, self.columns, simulate.REFERENCE, draws=0)
        self.row = _best_row(self.goal, self.figures)
        return self.points[self.row - 1]

    def _setting(self, point: Point) -> "Setting":
        knobs = {dial: f"{value:g}" for dial, value in zip(self.dials, point, strict=True)}
        written = sim_policies.with_knobs(self._arguments.policy, knobs)
        models = self._ground.plan.models
        (found,) = sim_policies.settings(written, {}, self._arguments.predictions, models)
        return found


def refine(grid: Sequence[Sequence[float]], best_with: Callable[[list[Point]], Point]) -> None:
    """Try a grid, then points between the best one and its neighbours, dial by dial.

    ``best_with`` tries new points and says which one is the best of all so far.
    """
    known: list[Point] = []
    new: list[Point] = list(product(*grid))
    for _ in range(1 + _REFINEMENTS):
        best = best_with(new)
        known += new
        new = [point for point in _between(known, best) if point not in known]
        if not new:
            return


def _between(known: Sequence[Point], best: Point) -> list[Point]:
    found: list[Point] = []
    for dial, value in enumerate(best):
        others = {point[dial] for point in known}
        below = [other for other in others if other < value]
        above = [other for other in others if other > value]
        for other in [*([max(below)] if below else []), *([min(above)] if above else [])]:
            middle = float(f"{math.sqrt(value * other):.{_DIGITS}g}")
            found.append((*best[:dial], middle, *best[dial + 1 :]))
    return found


def _best_row(goal: Goal, load: "LoadSummary") -> int:
    ranked = {row: (load.summaries[row], _areas(load)[row]) for row in range(1, len(_areas(load)))}
    if all(math.isnan(goal.figure(*each)) for each in ranked.values()):
        why = "nothing is answered" if goal.metric in _LATENCIES else "the traces tell no success"
        raise ConfigError(f"--goal {goal.text}: {why}")
    return max(ranked, key=lambda row: goal.rank(*ranked[row]))


def _areas(load: "LoadSummary") -> list[float]:
    return [frontier.hypervolume.value for frontier in load.frontiers]


# What a user sees.


def _reported(plan: "Plan", chosen: "Setting") -> "list[Setting]":
    """The reference, the chosen setting, and the policy as it is if that is another one."""
    default, reference = plan.settings
    return [reference, chosen, *([default] if default.config != chosen.config else [])]


def _report(
    arguments: argparse.Namespace, ground: "Ground", columns: "dict[Cell, Columns]"
) -> "sim_report.Report":
    from chimera_bench import sim_report, sim_study

    return sim_report.Report(
        simulate.title(arguments, ground, arguments.cluster),
        sim_study.notes(ground, columns),
        simulate.described(arguments, ground, arguments.cluster),
        sim_study.figures(ground, columns, simulate.REFERENCE),
    )


def _write(path: Path, search: Search, reports: "Sequence[sim_report.Report]") -> None:
    from chimera_bench import sim_report

    common = {**machine.facts(), "goal": search.goal.text, "chosen": search.chosen.name}
    for report in reports:
        machine.append_rows(path, ({**common, **row} for row in sim_report.rows(report)))


def _searched_lines(search: Search, reported: int) -> list[str]:
    load = search.figures
    lines = [
        f"Search for {search.goal.text} on the tune half: {len(search.columns)} simulations of "
        f"{len(search.settings)} settings, the same workflows for all; then {reported} on the "
        "test half",
        f"  {'  '.join(f'{dial:>8}' for dial in search.dials)}"
        "  success %   mean s    P95 s     area",
    ]
    chosen = search.points[search.row - 1]
    for point, summary, area in sorted(
        zip(search.points, load.summaries[1:], _areas(load)[1:], strict=True)
    ):
        values = "  ".join(f"{value:>8g}" for value in point)
        figures = (
            f"{100.0 * summary.success.value:9.1f}{summary.latency_mean_s.value:9.2f}"
            f"{summary.latency_p95_s.value:9.1f}{area:9.3f}"
        )
        lines.append(f"  {values}  {figures}{'  chosen' if point == chosen else ''}")
    return lines


def _verdict(goal: Goal, searched: "Summary", load: "LoadSummary") -> list[str]:
    where, chosen = "on the test half", load.summaries[1]
    if goal.metric == _BEST:
        areas = dict(zip((s.setting for s in load.summaries), load.frontiers, strict=True))
        ours = areas.pop(chosen.setting).hypervolume
        better = [name for name, f in areas.items() if f.hypervolume.value >= ours.value]
        told = ", ".join(f"{n} {_shown(f.hypervolume)}" for n, f in areas.items())
        lines = [f"Area {where}: {chosen.setting} {_shown(ours)}; {told}"]
        return lines + [f"NOT better there than {', '.join(better)}"] if better else lines
    lines = []
    if not goal.met(goal.interval(searched).value):
        lines.append("No value tried keeps the goal on the tune half: this one comes nearest")
    found = goal.interval(chosen)
    kept = goal.met(found.value)
    sure = goal.met(found.low) == goal.met(found.high) == kept
    said = "met" if kept else "NOT met"
    lines.append(
        f"Goal {goal.text} {where}: {said}{'' if sure else ', not surely'}: {_shown(found)}"
    )
    return lines


def _shown(interval: "Interval") -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _toml(config: Config, dials: Sequence[str]) -> list[str]:
    """Lines of the daemon's configuration: the dials, and knobs that are not the default."""
    tables: dict[tuple[str, ...], list[str]] = {(): [f'policy = "{config.policy}"']}
    for knob, path in sim_policies.paths(config.policy).items():
        value, usual = reduce(getattr, path, config), reduce(getattr, path, Config())
        if knob in dials or value != usual:
            tables.setdefault(path[:-1], []).append(f"{knob} = {value}")
    lines = ["For the daemon's configuration:"]
    for table, of_it in tables.items():
        lines += [f"[{'.'.join(table)}]", *of_it] if table else of_it
    return lines
