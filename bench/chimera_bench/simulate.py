"""`chimera simulate`: its options, and what a user sees of it.

Imports nothing heavy until it runs. What is simulated is a `Plan` (sim_runs.py).
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_daemon import policy
from chimera_daemon.config import ConfigError

if TYPE_CHECKING:
    from chimera_bench.progress import Progress
    from chimera_bench.sim_runs import Cell, Columns, Ground, Load, Plan, Setting
    from chimera_bench.sim_summary import LoadSummary

_POLICIES = ("chimera:price=0.03/0.1/0.3/1", "paper:tau=0.5/1/2", "least_loaded")
_LOADS = ("0.5", "0.8", "0.95", "1.1")
REFERENCE = "least_loaded"
LOAD_HELP = (
    "rate of arrivals as a share of the capacity under uniform routing; T0.95: of that of the "
    "whole cluster"
)
_TRACES = {"azure-code": "azure_llm_2023_code", "azure-conv": "azure_llm_2023_conv"}
_GENERATED = ("poisson", "bursty")
_ARRIVALS_FILE = "arrivals.parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera simulate`."""
    add_common(parser)
    parser.add_argument("--policy", nargs="+", action="extend", metavar="P",
                        help=f"of: {', '.join(policy.NAMES)}; with knobs as in "
                        "chimera:price=0.1/0.3 (two settings) or paper:tau=1,delta_s=0.1; the knob "
                        "`predictions` replaces --predictions; X_oracle is X told the truth "
                        f"(default: {' '.join(_POLICIES)})")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KNOB=VALUE",
                        help="knobs of all policies that have them")  # fmt: skip
    parser.add_argument("--load", nargs="+", action="extend", metavar="L",
                        help=f"{LOAD_HELP} (default: {' '.join(_LOADS)})")  # fmt: skip
    parser.add_argument("--half", choices=("tune", "test", "all"), default="all",
                        help="of the tasks: one to choose knobs on, one to report on (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--baseline", metavar="P",
                        help="policy that the others are compared with (default: least_loaded, or "
                        "the first)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append rows to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the frontiers")
    parser.add_argument("--html", type=Path, metavar="FILE.html",
                        help="write tables and picture as one page")  # fmt: skip


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command that simulates: all but policies, loads and what is written."""
    parser.add_argument("--traces", nargs="+", action="extend", type=Path, required=True,
                        metavar="DIR",
                        help="trace folders (docs/traces.md) whose tasks are replayed")  # fmt: skip
    parser.add_argument("--cluster", type=Path, required=True, metavar="FILE",
                        help="TOML file of engines, or one that comes with the project: "
                        "a, b or c")  # fmt: skip
    parser.add_argument("--predictions", default="prior", metavar="NAME",
                        help="prior (averages, learned online), bundle (trained out of fold by "
                        "task, kept in runs/folds), bundle:FOLDER (a trained one), constant, "
                        "noise:S, oracle (default: %(default)s)")  # fmt: skip
    parser.add_argument("--arrivals", default="poisson", metavar="NAME",
                        help="poisson, bursty, or a recorded trace, its time scaled to the rate: "
                        "azure-code:FILE, azure-conv:FILE, NAME:FILE with the trace's name in "
                        f"an {_ARRIVALS_FILE} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workflows", type=_count, default=2000, metavar="N",
                        help="per simulation (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", type=_count, default=5, metavar="K",
                        help="simulations of each policy and load; all policies get the same "
                        "workflows (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, metavar="S",
                        help="the first seed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--gap-s", type=float, default=1.0, metavar="SECONDS",
                        help="mean time of a tool between two stages "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=_count, metavar="N",
                        help="processes (default: one per core)")  # fmt: skip


def _count(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number above 0")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Simulate and report; 0, or `ConfigError` for what cannot be simulated."""
    from chimera_bench import machine, sim_report
    from chimera_bench.progress import Progress

    began_s = time.monotonic()
    check_files(arguments)
    chosen = plan(arguments)
    names = [setting.name for setting in chosen.settings]
    baseline = _baseline(arguments.baseline, names)
    with Progress() as progress:
        ground = prepared(chosen, progress)
        columns = simulations(ground, arguments.jobs, progress)
    loads = figures(ground, columns, baseline)
    facts = {**machine.facts(), **described(arguments, ground)}
    facts["seconds"] = round(time.monotonic() - began_s, 1)
    report = sim_report.Report(title(arguments, ground), notes(ground, columns), facts, loads)
    sim_report.show(report, sys.stdout)
    if arguments.out is not None:
        machine.append_rows(arguments.out, sim_report.rows(report))
    sim_report.write(report, arguments.plot, arguments.html)
    return 0


def plan(arguments: argparse.Namespace) -> "Plan":
    """Options as one checked plan; raises `ConfigError`."""
    from chimera_bench import sim_cluster, sim_policies
    from chimera_bench.sim_runs import Plan
    from chimera_bench.sim_workload import Gaps

    setups = sim_cluster.load(arguments.cluster)
    models = list(dict.fromkeys(setup.model for setup in setups))
    common = sim_policies.common_knobs(arguments.set)
    settings: dict[str, Setting] = {}
    for written in arguments.policy or _POLICIES:
        for setting in sim_policies.settings(written, common, arguments.predictions, models):
            settings[setting.name] = setting
    loads = {load.name: load for load in map(_load, arguments.load or _LOADS)}
    arrivals, folder = _arrivals(arguments.arrivals)
    try:
        gaps = Gaps(arguments.gap_s)
    except ValueError as error:
        raise ConfigError(f"--gap-s: {error}") from error
    return Plan(
        traces=tuple(arguments.traces),
        setups=setups,
        settings=tuple(settings.values()),
        loads=tuple(loads.values()),
        seeds=tuple(range(arguments.seed, arguments.seed + arguments.seeds)),
        workflows=arguments.workflows,
        half=arguments.half,
        arrivals=arrivals,
        arrivals_folder=folder,
        gaps=gaps,
    )


def _load(text: str) -> "Load":
    from chimera_bench.sim_runs import Load

    whole = text.startswith("T")
    try:
        share = float(text.removeprefix("T"))
    except ValueError:
        share = math.nan
    if not 0.0 < share < math.inf:
        raise ConfigError(f"--load {text!r}: write a share above 0, such as 0.8 or T0.95")
    return Load(text, share, whole)


def _arrivals(text: str) -> tuple[str, Path | None]:
    if text in _GENERATED:
        return text, None
    name, colon, path = text.partition(":")
    if not (name and colon and path):
        known = ", ".join((*_GENERATED, *(f"{trace}:FILE" for trace in _TRACES), "NAME:FILE"))
        raise ConfigError(f"--arrivals {text!r}: there are: {known}")
    folder = Path(path)
    return _TRACES.get(name, name), folder.parent if folder.name == _ARRIVALS_FILE else folder


def _baseline(wanted: str | None, names: Sequence[str]) -> str:
    if wanted is None:
        return REFERENCE if REFERENCE in names else names[0]
    if wanted not in names:
        raise ConfigError(f"--baseline {wanted!r}: it is not simulated; there are: "
                          f"{', '.join(map(repr, names))}")  # fmt: skip
    return wanted


def check_files(arguments: argparse.Namespace) -> None:
    """Find what would fail only after minutes of work."""
    for name in ("out", "plot", "html"):
        path: Path | None = getattr(arguments, name)
        if path is not None and path.is_dir():
            raise ConfigError(f"--{name}: {path} is a folder; name a file")
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name}: no folder {path.parent}")


def prepared(chosen: "Plan", progress: "Progress") -> "Ground":
    """The ground of the plan, with everything tried that input can make fail."""
    from chimera_bench import sim_runs

    progress.phase("traces and predictions", 1.0)
    try:
        ground = sim_runs.ground(chosen)
        for load in chosen.loads:
            sim_runs.draw(ground, load, chosen.seeds[0])
        for name in dict.fromkeys(setting.predictions for setting in chosen.settings):
            sim_runs.source(ground, name, 0, lambda what, share: progress.update(share, what))
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    progress.end(f"{len(ground.tasks)} tasks")
    return ground


def simulations(ground: "Ground", jobs: int | None, progress: "Progress") -> "dict[Cell, Columns]":
    """All cells of the ground's plan; without ``jobs`` on every core."""
    from chimera_bench import machine, sim_runs

    chosen = ground.plan
    total = len(sim_runs.cells(chosen))
    progress.phase("simulations", total)

    def on_cell(done: int, cell: "Cell") -> None:
        setting, load = chosen.settings[cell.setting].name, chosen.loads[cell.load].name
        progress.update(done, f"{done}/{total}: {setting}, load {load}, seed {cell.seed}")

    columns = sim_runs.run(chosen, ground, jobs or len(machine.cores()), on_cell)
    progress.end(f"{total} simulations")
    return columns


def figures(
    ground: "Ground", columns: "dict[Cell, Columns]", baseline: str, draws: int | None = None
) -> "list[LoadSummary]":
    """Per load; intervals are of so many ``draws``, without any of them NaN."""
    from chimera_bench import sim_runs, sim_summary

    draws = sim_summary.DRAWS if draws is None else draws
    chosen, bounds = ground.plan, sim_runs.bounds(ground)
    found: list[LoadSummary] = []
    for number, load in enumerate(chosen.loads):
        rows = [
            sim_summary.Row(
                setting.name,
                setting.sweep,
                load.name,
                [columns[sim_runs.Cell(n, number, seed)] for seed in chosen.seeds],
            )
            for n, setting in enumerate(chosen.settings)
        ]
        rate_per_s = ground.rate_per_s(load)
        found.append(
            sim_summary.summarise_load(rows, rate_per_s, bounds, baseline, REFERENCE, draws)
        )
    return found


def title(arguments: argparse.Namespace, ground: "Ground") -> str:
    """What was simulated, in a line."""
    traces = ", ".join(path.name for path in arguments.traces)
    return (
        f"Simulated: traces {traces} ({ground.plan.half} tasks), cluster {arguments.cluster}, "
        f"{ground.plan.arrivals} arrivals, predictions {arguments.predictions}"
    )


def notes(ground: "Ground", columns: "dict[Cell, Columns]") -> list[str]:
    """What a reader of the figures must know."""
    plan, found, capacity = ground.plan, ground.found, ground.capacity
    lacking = ", ".join(f"{model} in {number}" for model, number in found.lacking.items())
    unusable = ", ".join(f"{number}: {why}" for why, number in found.unusable.items())
    engines = ", ".join(f"{p.engine} {p.model} {p.per_s:.2f}/s" for p in capacity.engines)
    notes = [
        f"{len(ground.tasks)} tasks; {plan.workflows} workflows for each of {len(plan.seeds)} "
        f"seeds, the same ones for every policy",
        f"capacity {capacity.uniform_per_s:.2f} workflows/s under uniform routing, "
        f"{capacity.whole_per_s:.2f} of the whole cluster; {engines}",
        "brackets: 95 % intervals over tasks and seeds"
        + (" (one seed: over tasks alone)" if len(plan.seeds) == 1 else ""),
    ]
    if found.left_out:
        notes.append(f"{found.left_out} tasks left out; lacking: {lacking or 'nothing'}")
    if unusable:
        notes.append(f"workflows that cannot be replayed: {unusable}")
    if preempted := sum(each.preemptions for each in columns.values()):
        notes.append(f"{preempted} preemptions: engines were short of memory")
    return notes


def described(arguments: argparse.Namespace, ground: "Ground") -> dict[str, Any]:
    """Facts of the run that go into every row."""
    plan = ground.plan
    return {
        "traces": [str(path) for path in arguments.traces],
        "cluster": str(arguments.cluster),
        "half": plan.half,
        "tasks": len(ground.tasks),
        "workflows_per_seed": plan.workflows,
        "seeds": list(plan.seeds),
        "arrivals": plan.arrivals,
        "gap_s": plan.gaps.mean_s,
        "predictions": arguments.predictions,
        "knobs": arguments.set,
        "uniform_per_s": ground.capacity.uniform_per_s,
        "whole_per_s": ground.capacity.whole_per_s,
    }
