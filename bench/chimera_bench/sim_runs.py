"""A plan of simulations, run over a pool of processes: every setting at every load with every seed.

Owns what a simulation's outcome comes down to (`Columns`). A process builds all it needs from the
plan and shares nothing with others: the numbers do not depend on how many there are.
"""

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from chimera_bench import sim_arrivals, sim_capacity, sim_predictions, sim_workload
from chimera_bench.sim_input import EngineSetup
from chimera_bench.sim_predictions import Answers, Source
from chimera_bench.sim_workload import Gaps, Sample, Task
from chimera_bench.simulator import Result, WorkflowRecord, simulate
from chimera_daemon.config import Config
from chimera_daemon.reading import Model
from chimera_predictors.options import Options, Progress
from chimera_predictors.traces import Traces, read_traces

Floats = NDArray[np.float64]

FOLDS = Path("runs") / "folds"  # bundles trained out of fold are kept here
_AFTER_EACH_OTHER_S = 1e5  # longer than any workflow takes
_NEVER_S = 1e8  # heartbeats of engines that have nothing to say


class Setting(Struct, frozen=True):
    """A row of the table: a policy with its knobs, what it is told, and what clients do.

    ``sweep`` is the name without the policy's dial: settings of one sweep are one curve.
    """

    name: str
    sweep: str
    config: Config
    predictions: str
    tries: int = 1  # of a task whose failure the client sees
    optional: bool = False  # any stage may be declined


class Load(Struct, frozen=True):
    """A share of the uniform capacity; ``whole``: of that of the whole cluster."""

    name: str
    share: float
    whole: bool = False


class Plan(Struct, frozen=True):
    """What to simulate. ``arrivals`` is a name of `sim_arrivals.arrivals`, with its folder."""

    traces: tuple[Path, ...]
    setups: tuple[EngineSetup, ...]
    settings: tuple[Setting, ...]
    loads: tuple[Load, ...]
    seeds: tuple[int, ...]
    workflows: int
    half: Literal["tune", "test", "all"] = "all"
    arrivals: str = "poisson"
    arrivals_folder: Path | None = None
    gaps: Gaps = Gaps()
    seen: float = 1.0  # share of failures that clients see

    @property
    def models(self) -> list[str]:
        """That the cluster serves."""
        return list(dict.fromkeys(setup.model for setup in self.setups))


class Cell(NamedTuple):
    """One simulation."""

    setting: int
    load: int
    seed: int


class Columns(Struct):
    """What a simulation comes down to. Arrays per workflow, in the order of arrival.

    Without an answer a workflow has no latency (NaN) and no success (0).
    """

    task: NDArray[np.intp]  # number of the workflow's task in the ground
    latency_s: Floats
    ms_per_token: Floats
    success: Floats  # NaN: not known
    errors: dict[str, int]
    stages: dict[str, int]  # answered, per model
    utilisation: dict[str, float]  # per engine, of the time: it had anything to do
    occupied: dict[str, float]  # per engine, of its slots, in the mean over time
    longest_wait_s: float
    preemptions: int
    span_s: float
    events: int  # of core and engines
    tries: NDArray[np.intp]  # per workflow


class Bounds(Struct):
    """What every policy is bound by, per task: `[tasks]`, `[tasks, models]`."""

    idle_s: Floats  # of the model that is fastest on this task, on an idle engine, gaps included
    success: Floats  # by a model that does all of it; NaN: not known


class Ground(Struct):
    """What all simulations of a plan share."""

    plan: Plan
    traces: Traces
    found: sim_workload.TaskSet
    tasks: list[Task]  # of the chosen half
    capacity: sim_capacity.Capacity
    made: dict[str, Answers] = {}  # predictions of bundles that were made already, by their name

    def rate_per_s(self, load: Load) -> float:
        """Workflows per second."""
        capacity = self.capacity
        return load.share * (capacity.whole_per_s if load.whole else capacity.uniform_per_s)


def ground(plan: Plan) -> Ground:
    """Read the traces and find the capacity. Raises `ValueError`, naming the place."""
    traces = read_traces(plan.traces)
    where = ", ".join(map(str, plan.traces))
    found = sim_workload.tasks_of(traces, plan.models, plan.gaps, where)
    tasks = list(found.tasks)
    if plan.half != "all":
        tasks = sim_workload.half(traces, tasks, plan.half)
    return Ground(plan, traces, found, tasks, sim_capacity.capacity(plan.setups, tasks))


def draw(ground: Ground, load: Load, seed: int) -> Sample:
    """The workflows that every setting gets at this load with this seed."""
    plan = ground.plan
    times = sim_arrivals.arrivals(
        plan.arrivals, ground.rate_per_s(load), plan.workflows, seed, plan.arrivals_folder
    )
    return sim_workload.sample(ground.tasks, times, seed, plan.seen)


def source(ground: Ground, name: str, seed: int, progress: Progress | None = None) -> Source:
    """Predictions by name, `bundle` and `bundle:FOLDER` included; ``seed`` is that of noise.

    What bundles say is kept in the ground, and a bundle is read only for what is not there.
    Averages over tasks are those of the half that knobs are chosen on. Raises `ValueError`.
    """
    what, colon, folder = name.partition(":")
    if what != "bundle":
        return sim_predictions.degraded(name, _known_tasks(ground), seed)
    say = progress or (lambda what, share: None)
    model_of = _model_of(ground.traces, folder if colon else None, say)
    learned = sim_predictions.Learned(ground.tasks, model_of, say, ground.made.get(name))
    ground.made[name] = learned.made
    return learned


def _model_of(traces: Traces, folder: str | None, say: Progress) -> Callable[[Task], Model]:
    """Which bundle a task is predicted with: that of the folder, or one that has not seen it.

    Bundles are read, or trained, when the first task is asked for.
    """
    from chimera_predictors import predictor
    from chimera_predictors.encoder import load_encoder

    if folder is not None:
        bundle = cache(lambda: predictor.load(folder, device="cpu"))
        return lambda task: bundle()
    folds = cache(
        lambda: sim_predictions.train_folds(
            traces, load_encoder(), Options(), keep=FOLDS, progress=say
        )
    )
    return lambda task: folds().model_of(task)


def _known_tasks(ground: Ground) -> Sequence[Task]:
    if ground.plan.half == "all":
        return ground.tasks
    return sim_workload.half(ground.traces, ground.found.tasks, "tune")


def run(
    plan: Plan, prepared: Ground, jobs: int, progress: Callable[[int, Cell], None]
) -> dict[Cell, Columns]:
    """All cells of the plan. ``progress`` is told how many are done, and which one came last."""
    done: dict[Cell, Columns] = {}
    for cell, columns in _all(plan, prepared, jobs):
        done[cell] = columns
        progress(len(done), cell)
    return {cell: done[cell] for cell in cells(plan)}


def cells(plan: Plan) -> list[Cell]:
    """Settings of one load and seed are neighbours: their workflows are drawn once."""
    keys = product(range(len(plan.loads)), plan.seeds, range(len(plan.settings)))
    return [Cell(setting, load, seed) for load, seed, setting in keys]


def _all(plan: Plan, prepared: Ground, jobs: int) -> Iterator[tuple[Cell, Columns]]:
    todo = cells(plan)
    if jobs == 1:
        worker = _Worker(prepared)
        yield from ((cell, worker.run(cell)) for cell in todo)
        return
    # Spawned, as torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(jobs, len(todo)), context, initializer=_start, initargs=(plan, prepared.made)
    ) as pool:
        try:
            futures = {pool.submit(_run, cell): cell for cell in todo}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """Runs cells, keeps what several of them need."""

    def __init__(self, prepared: Ground) -> None:
        self._ground = prepared
        self._numbers = {_key(task): n for n, task in enumerate(prepared.tasks)}
        self._source = cache(partial(source, prepared))

    def run(self, cell: Cell) -> Columns:
        plan = self._ground.plan
        setting = plan.settings[cell.setting]
        sample = draw(self._ground, plan.loads[cell.load], cell.seed)
        noise = cell.seed if setting.predictions.startswith("noise") else 0
        predicting = self._source(setting.predictions, noise).begin(sample, setting.config)
        result = simulate(
            setting.config,
            plan.setups,
            sample.workflows,
            predicting.prediction,
            observers=[predicting],
            tries=setting.tries,
            optional=setting.optional,
        )
        task = [self._numbers[_key(sample.tasks[w.workflow_id])] for w in result.workflows]
        return _columns(result, task, plan.setups)


def _key(task: Task) -> tuple[str, str]:
    return task.task_id, task.kind


_worker: _Worker | None = None  # of a process of the pool


def _start(plan: Plan, made: dict[str, Answers]) -> None:
    global _worker
    if any(setting.predictions.startswith("bundle") for setting in plan.settings):
        import torch

        torch.set_num_threads(1)  # there are as many processes as cores
    own = ground(plan)
    own.made.update(made)
    _worker = _Worker(own)


def _run(cell: Cell) -> Columns:
    assert _worker is not None
    return _worker.run(cell)


def _columns(result: Result, task: Sequence[int], setups: Sequence[EngineSetup]) -> Columns:
    workflows = result.workflows
    stages = Counter(model for w in workflows for model in w.models)
    latency_s = [math.nan if w.error else w.latency_s for w in workflows]
    per_token = [
        1e3 * seconds / max(1, w.output_tokens)
        for seconds, w in zip(latency_s, workflows, strict=True)
    ]
    return Columns(
        np.array(task, dtype=np.intp),
        np.array(latency_s),
        np.array(per_token),
        np.array([_success(w) for w in workflows]),
        dict(Counter(w.error for w in workflows if w.error)),
        {setup.model: stages[setup.model] for setup in setups},
        {engine.name: engine.utilisation for engine in result.engines},
        _occupied(result, setups),
        result.longest_wait_s,
        sum(engine.preemptions for engine in result.engines),
        result.span_s,
        result.core_events + result.engine_events,
        np.array([w.tries for w in workflows], dtype=np.intp),
    )


def _occupied(result: Result, setups: Sequence[EngineSetup]) -> dict[str, float]:
    served_s = {setup.name: 0.0 for setup in setups}
    for workflow in result.workflows:
        for stage in workflow.stages:
            if stage.finished_s >= 0.0:
                served_s[stage.engine] += stage.finished_s - stage.started_s
    return {s.name: served_s[s.name] / (result.span_s * s.profile.slots) for s in setups}


def _success(workflow: WorkflowRecord) -> float:
    if workflow.error:
        return 0.0
    return math.nan if workflow.success is None else workflow.success


def bounds(ground: Ground) -> Bounds:
    """Found by letting every engine do all tasks, one after the other.

    Engines of one model and one profile are alike, so one of them will do.
    """
    kinds = {(setup.model, setup.profile): setup for setup in ground.plan.setups}
    idle_s = np.array([_alone_s(ground, setup) for setup in kinds.values()]).min(axis=0)
    success = [
        [math.nan if (known := task.runs[m].success) is None else known for m in ground.plan.models]
        for task in ground.tasks
    ]
    return Bounds(idle_s, np.array(success))


def _alone_s(ground: Ground, setup: EngineSetup) -> list[float]:
    config = Config(policy="round_robin", heartbeat_s=_NEVER_S, engine_timeout_s=2 * _NEVER_S)
    times = [_AFTER_EACH_OTHER_S * number for number in range(len(ground.tasks))]
    every = sim_workload.sample(ground.tasks, times, seed=0)
    predicting = sim_predictions.Prior().begin(every, config)
    result = simulate(config, [setup], every.workflows, predicting.prediction)
    latency_s = {
        _key(every.tasks[w.workflow_id]): math.inf if w.error else w.latency_s
        for w in result.workflows
    }
    return [latency_s[_key(task)] for task in ground.tasks]
