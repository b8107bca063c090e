"""`chimera simulate`: its options, and what a user sees of it.

Imports nothing heavy until it runs. What is simulated is a `Plan` (sim_runs.py).
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_daemon import policy
from chimera_daemon.config import ConfigError

if TYPE_CHECKING:
    from chimera_bench.frontier_report import Frontiers
    from chimera_bench.sim_report import Report, Table
    from chimera_bench.sim_runs import Ground, Load, Plan, Setting

_POLICIES = ("chimera:price=0.03/0.1/0.3/1", "paper:tau=0.5/1/2", "least_loaded")
_LOADS = ("0.5", "0.8", "0.95", "1.1")
REFERENCE = "least_loaded"
CLUSTER_HELP = "TOML file of engines, or one that comes with the project: a, b or c"
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
    parser.add_argument("--cluster", nargs="+", action="extend", type=Path, required=True,
                        metavar="FILE", help=CLUSTER_HELP)  # fmt: skip
    parser.add_argument("--policy", nargs="+", action="extend", metavar="P",
                        help=f"of: {', '.join(policy.NAMES)}; with knobs as in "
                        "chimera:price=0.1/0.3 (two settings) or paper:tau=1,delta_s=0.1; the knob "
                        "`predictions` replaces --predictions; `tries=2`: clients do a failed task "
                        "once more; `optional=1`: any stage may be declined; X_oracle is X told "
                        "the truth "
                        f"(default: {' '.join(_POLICIES)})")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KNOB=VALUE",
                        help="knobs of all policies that have them")  # fmt: skip
    parser.add_argument("--load", nargs="+", action="extend", metavar="L",
                        help=f"{LOAD_HELP} (default: {' '.join(_LOADS)})")  # fmt: skip
    parser.add_argument("--half", choices=("tune", "test", "all"), default="all",
                        help="of the tasks: one to choose knobs on, one to report on (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--choose", nargs="?", type=_count, const=1, metavar="K",
                        help="with --half test: choose settings for frontiers over clusters and "
                        "loads on the other half, by K seeds (default: %(const)s)")  # fmt: skip
    parser.add_argument("--baseline", metavar="P",
                        help="setting that the others are compared with (default: least_loaded, "
                        "or the first); areas are compared with all settings of its policy "
                        "together (default: paper's)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append rows to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the frontiers")
    parser.add_argument("--html", type=Path, metavar="FILE.html",
                        help="write tables and picture as one page")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE.md",
                        help="write frontiers over clusters and loads as Markdown, pictures "
                        "beside it; text around its marked part stays")  # fmt: skip


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command that simulates: all but clusters, policies, loads and output."""
    parser.add_argument("--traces", nargs="+", action="extend", type=Path, required=True,
                        metavar="DIR",
                        help="trace folders (docs/traces.md) whose tasks are replayed")  # fmt: skip
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
    parser.add_argument("--seen", type=_share, default=1.0, metavar="SHARE",
                        help="share of failures that clients see: only then do they try a task "
                        "again (knob `tries`; default: %(default)s)")  # fmt: skip
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


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 <= share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}: write a share from 0 to 1")
    return share


def run(arguments: argparse.Namespace) -> int:
    """Simulate and report; 0, or `ConfigError` for what cannot be simulated."""
    from chimera_bench import frontier_report, machine, sim_report, sim_study
    from chimera_bench.progress import Progress

    began_s = time.monotonic()
    check_files(arguments)
    plans = {name: plan(arguments, path) for name, path in _clusters(arguments.cluster).items()}
    settings = next(iter(plans.values())).settings
    _check_choice(arguments, [setting.name for setting in settings])
    baseline, cloud = _baselines(arguments, settings)
    with Progress() as progress:
        studies = [
            sim_study.study(name, each, arguments.choose, progress) for name, each in plans.items()
        ]
        found = sim_study.measured(studies, baseline, arguments.jobs, progress)
    facts = {**machine.facts(), "seconds": round(time.monotonic() - began_s, 1)}
    reports = [
        sim_report.Report(
            title(arguments, each.reported, path),
            of_it.notes,
            {**facts, **described(arguments, each.reported, path)},
            of_it.loads,
            each.cluster,
        )
        for each, of_it, path in zip(studies, found, arguments.cluster, strict=True)
    ]
    frontiers = frontier_report.frontiers(
        reports,
        [cell for of_it in found for cell in of_it.cells],
        settings,
        cloud,
        tuned=arguments.choose is not None,
    )
    _write(arguments, reports, frontiers)
    return 0


def _write(
    arguments: argparse.Namespace,
    reports: "Sequence[Report]",
    frontiers: "Frontiers | None",
) -> None:
    from chimera_bench import frontier_report, machine, sim_report

    over_cells: list[Table] = []
    over_cell_rows: list[dict[str, Any]] = []
    if frontiers is not None and frontiers.worth_a_table:
        over_cells += frontier_report.tables(frontiers)
        over_cell_rows += frontier_report.rows(frontiers)
    for report in reports:
        sim_report.show(report, sys.stdout, brief=len(reports) > 1)
    sim_report.show_tables(over_cells, sys.stdout)
    if arguments.out is not None:
        for report in reports:
            machine.append_rows(arguments.out, sim_report.rows(report))
        machine.append_rows(arguments.out, over_cell_rows)
    sim_report.write(reports, over_cells, arguments.plot, arguments.html)
    if arguments.report is not None and frontiers is not None:
        frontier_report.write(arguments.report, frontiers, command_line(arguments))


def _clusters(paths: Sequence[Path]) -> dict[str, Path]:
    clusters: dict[str, Path] = {}
    for path in paths:
        if path.stem in clusters:
            raise ConfigError(
                f"--cluster: {clusters[path.stem]} and {path} are both called {path.stem!r}; "
                "name each cluster once, or rename a file"
            )
        clusters[path.stem] = path
    return clusters


def _check_choice(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    if arguments.choose is not None and arguments.half != "test":
        raise ConfigError(
            f"--choose: settings are chosen on the tuning half, so report on the other one: write "
            f"--half test, not {arguments.half}"
        )
    for option in ("choose", "report"):
        if getattr(arguments, option) is not None and REFERENCE not in names:
            raise ConfigError(
                f"--{option}: settings are held against {REFERENCE}: add it to --policy"
            )


def plan(arguments: argparse.Namespace, cluster: Path) -> "Plan":
    """Options as one checked plan for one cluster; raises `ConfigError`."""
    from chimera_bench import sim_cluster, sim_policies
    from chimera_bench.sim_runs import Plan
    from chimera_bench.sim_workload import Gaps

    setups = sim_cluster.load(cluster)
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
        seen=arguments.seen,
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


def _baselines(
    arguments: argparse.Namespace, settings: "Sequence[Setting]"
) -> "tuple[str, Sequence[Setting]]":
    """The setting that others are compared with, and the settings that areas are.

    The latter are all of one policy with the same predictions.
    """
    wanted, names = arguments.baseline, [setting.name for setting in settings]
    usual = REFERENCE if REFERENCE in names else names[0]
    if wanted is None:
        papers = [
            each.name
            for each in settings
            if each.config.policy == "paper" and each.predictions == arguments.predictions
        ]
        return usual, _same_policy(settings, (papers or [usual])[0])
    if wanted in names:
        return wanted, _same_policy(settings, wanted)
    of_it = [name for name in names if name.split()[0] == wanted]
    if not of_it:
        raise ConfigError(f"--baseline {wanted!r}: it is not simulated; there are: "
                          f"{', '.join(map(repr, names))}")  # fmt: skip
    return usual, _same_policy(settings, of_it[0])


def _same_policy(settings: "Sequence[Setting]", name: str) -> "Sequence[Setting]":
    like = next(setting for setting in settings if setting.name == name)
    return [
        each
        for each in settings
        if (each.config.policy, each.predictions) == (like.config.policy, like.predictions)
    ]


def check_files(arguments: argparse.Namespace) -> None:
    """Find what would fail only after minutes of work."""
    for name in ("out", "plot", "html", "report"):
        path: Path | None = getattr(arguments, name)
        if path is not None and path.is_dir():
            raise ConfigError(f"--{name}: {path} is a folder; name a file")
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name}: no folder {path.parent}")
    if arguments.report is not None:
        from chimera_bench import frontier_report

        frontier_report.check(arguments.report)


def title(arguments: argparse.Namespace, ground: "Ground", cluster: Path) -> str:
    """What was simulated, in a line."""
    traces = ", ".join(path.name for path in arguments.traces)
    return (
        f"Simulated: traces {traces} ({ground.plan.half} tasks), cluster {cluster}, "
        f"{ground.plan.arrivals} arrivals, predictions {arguments.predictions}"
    )


def described(arguments: argparse.Namespace, ground: "Ground", cluster: Path) -> dict[str, Any]:
    """Facts of the run that go into every row."""
    plan = ground.plan
    return {
        "traces": [str(path) for path in arguments.traces],
        "cluster": str(cluster),
        "half": plan.half,
        "tasks": len(ground.tasks),
        "workflows_per_seed": plan.workflows,
        "seeds": list(plan.seeds),
        "arrivals": plan.arrivals,
        "gap_s": plan.gaps.mean_s,
        "seen": plan.seen,
        "predictions": arguments.predictions,
        "knobs": arguments.set,
        "uniform_per_s": ground.capacity.uniform_per_s,
        "whole_per_s": ground.capacity.whole_per_s,
    }


def command_line(arguments: argparse.Namespace) -> str:
    """What to write to simulate the same again; files that are written, and processes, included."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["chimera", "simulate"]
    required = ["--traces", "", "--cluster", ""]
    defaults: Mapping[str, Any] = vars(parser.parse_args(required))
    for name, usual in defaults.items():
        value = getattr(arguments, name)
        if value != usual:
            several = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, several)]
    return shlex.join(words)
