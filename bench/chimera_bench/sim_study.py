"""From a checked plan to figures: what is prepared, simulated and summarised for a cluster.

Owns the order of things and what is shared: all clusters get the same draws of tasks and seeds. A
study may have a second ground, the other half of the tasks, by which settings are chosen.
"""

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from chimera_bench import frontier, machine, sim_runs, sim_summary
from chimera_bench.progress import Progress
from chimera_bench.sim_runs import Cell, Columns, Ground, Plan
from chimera_bench.sim_summary import LoadDraws, LoadSummary, Row, Weights
from chimera_bench.simulate import REFERENCE
from chimera_daemon.config import ConfigError


class Study(Struct, frozen=True):
    """One cluster's grounds."""

    cluster: str
    reported: Ground
    tuning: Ground | None  # None: settings are chosen where they are reported


class Measured(Struct, frozen=True):
    """One cluster's figures; ``cells`` for frontiers over clusters and loads."""

    notes: list[str]
    loads: list[LoadSummary]
    cells: list[frontier.Cell]


def prepared(chosen: Plan, progress: Progress) -> Ground:
    """The ground of the plan, with everything tried that input can make fail."""
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


def study(cluster: str, plan: Plan, tuning_seeds: int | None, progress: Progress) -> Study:
    """``tuning_seeds``: so many simulations per setting and load on the tuning half, None: none."""
    reported = prepared(plan, progress)
    if tuning_seeds is None:
        return Study(cluster, reported, None)
    seeds = tuple(range(plan.seeds[0], plan.seeds[0] + tuning_seeds))
    return Study(
        cluster,
        reported,
        prepared(msgspec.structs.replace(plan, half="tune", seeds=seeds), progress),
    )


def simulations(ground: Ground, jobs: int | None, progress: Progress) -> dict[Cell, Columns]:
    """All cells of the ground's plan; without ``jobs`` on every core."""
    chosen = ground.plan
    total = len(sim_runs.cells(chosen))
    progress.phase("simulations", total)

    def on_cell(done: int, cell: Cell) -> None:
        setting, load = chosen.settings[cell.setting].name, chosen.loads[cell.load].name
        progress.update(done, f"{done}/{total}: {setting}, load {load}, seed {cell.seed}")

    columns = sim_runs.run(chosen, ground, jobs or len(machine.cores()), on_cell)
    progress.end(f"{total} simulations")
    return columns


def figures(
    ground: Ground, columns: dict[Cell, Columns], baseline: str, draws: int | None = None
) -> list[LoadSummary]:
    """Per load; intervals are of so many ``draws``, without any of them NaN."""
    draws = sim_summary.DRAWS if draws is None else draws
    plan = ground.plan
    weights = sim_summary.make_weights(len(ground.tasks), len(plan.seeds), draws)
    return [
        sim_summary.figures(drawn, ground.rate_per_s(load), baseline, REFERENCE)
        for load, drawn in zip(plan.loads, _drawn(ground, columns, weights), strict=True)
    ]


def measured(
    studies: Sequence[Study], baseline: str, jobs: int | None, progress: Progress
) -> list[Measured]:
    """Simulate and summarise cluster after cluster; see `simulations`."""
    keys = [[(task.task_id, task.kind) for task in each.reported.tasks] for each in studies]
    seeds = len(studies[0].reported.plan.seeds)
    weights = frontier.shared_weights(keys, seeds, sim_summary.DRAWS)
    return [
        _measured(each, of_it, baseline, jobs, progress)
        for each, of_it in zip(studies, weights, strict=True)
    ]


def _measured(
    each: Study, weights: Weights, baseline: str, jobs: int | None, progress: Progress
) -> Measured:
    ground, tuning = each.reported, each.tuning
    columns = simulations(ground, jobs, progress)
    tuned = None if tuning is None else simulations(tuning, jobs, progress)
    progress.phase("figures", 1.0)
    drawn = _drawn(ground, columns, weights)
    chosen_by = drawn
    if tuning is not None and tuned is not None:
        once = sim_summary.make_weights(len(tuning.tasks), len(tuning.plan.seeds), draws=0)
        chosen_by = _drawn(tuning, tuned, once)
    loads = [
        sim_summary.figures(of_it, ground.rate_per_s(load), baseline, REFERENCE)
        for load, of_it in zip(ground.plan.loads, drawn, strict=True)
    ]
    cells = [_cell(each.cluster, *of_it) for of_it in zip(loads, drawn, chosen_by, strict=True)]
    progress.end(f"cluster {each.cluster}")
    return Measured(notes(ground, columns), loads, cells)


def _cell(cluster: str, load: LoadSummary, drawn: LoadDraws, chosen_by: LoadDraws) -> frontier.Cell:
    waits_s = {summary.setting: summary.longest_wait_s for summary in load.summaries}
    return frontier.Cell(cluster, load.load, drawn.drawn, drawn.corners, chosen_by.drawn, waits_s)


def _drawn(ground: Ground, columns: dict[Cell, Columns], weights: Weights) -> list[LoadDraws]:
    plan, bounds = ground.plan, sim_runs.bounds(ground)
    return [
        sim_summary.draw_load(
            [
                Row(
                    setting.name,
                    setting.sweep,
                    load.name,
                    [columns[Cell(n, number, seed)] for seed in plan.seeds],
                )
                for n, setting in enumerate(plan.settings)
            ],
            bounds,
            REFERENCE,
            weights,
        )
        for number, load in enumerate(plan.loads)
    ]


def notes(ground: Ground, columns: dict[Cell, Columns]) -> list[str]:
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
