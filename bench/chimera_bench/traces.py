"""`chimera bench traces`: runs of the testbed, written down as traces to train predictors on.

Owns which model runs which stage of which task. Tasks are of the validation split: the testbed's
models were not trained on them, and the demo, whose split is another, never asks them.
"""

import argparse
import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chimera_daemon import config as configuration
from chimera_daemon.config import Config, ConfigError, EngineConfig

if TYPE_CHECKING:
    from chimera_bench.cluster import Cluster
    from chimera_bench.progress import Progress
    from chimera_bench.workload import Job, Record
    from chimera_daemon.client import Client

_TESTBED = Path(__file__).parent / "testbed" / "testbed.toml"
_TASKS = 2000
_SEED = 100  # the demo calibrates with seed 0 of the same split
# Of the workflows with several stages one in so many is also run by changing models. It is labelled
# with its end, which its first model is not the cause of: more of them would blur who can do what.
_CHANGING_EVERY = 3
# Workflows at once per model: as many as its engine takes, and some that wait.
_IN_FLIGHT = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera bench traces`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the trace folder")
    parser.add_argument(
        "--tasks",
        type=int,
        default=_TASKS,
        metavar="N",
        help="each is run once by every model; some of those with several stages once more, by "
        "one model up to some stage and another from there on (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=_SEED, metavar="S", help="of the tasks (default: %(default)s)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="TOML", help="engines and models (default: the testbed)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the traces; 0 if every workflow was answered. Raises `ConfigError`."""
    from chimera_bench.cluster import Cluster, ClusterError
    from chimera_bench.progress import Progress

    if arguments.tasks < 1:
        raise ConfigError(f"--tasks must be positive, not {arguments.tasks}")
    out: Path = arguments.out
    if out.exists() and any(out.glob("*.jsonl")):
        raise ConfigError(f"--out: {out} has traces already; name another folder")
    config = one_core_each(configuration.load(arguments.config or _TESTBED))
    todo = plan(arguments.tasks, arguments.seed, config)
    with Cluster(config, out / "logs") as cluster, Progress() as progress:
        try:
            records = asyncio.run(_write(cluster, progress, todo, out))
        except ClusterError as error:
            print(f"chimera bench traces: {error}")
            return 1
    failed = [record for record in records if record.error is not None]
    print(_told(records, out))
    for record in failed[:3]:
        print(f"{record.task_id}: {record.error}: {record.error_message}")
    return 1 if failed else 0


def one_core_each(config: Config) -> Config:
    """Pin each engine to one core where there is no GPU; the first ones share if cores are few.

    The last model of a configuration is the largest: it gets a core of its own.
    """
    from chimera_bench import machine

    engines = config.engines
    if not engines:
        raise ConfigError("the traces need engines that can be started")
    cores = machine.cores()
    if machine.gpus() or any(engine.cpus for engine in engines):
        return config
    pinned = tuple(
        _pinned(engine, cores[max(0, len(cores) - len(engines) + number)])
        for number, engine in enumerate(engines)
    )
    return msgspec.structs.replace(config, engines=pinned)


def _pinned(engine: EngineConfig, core: int) -> EngineConfig:
    return msgspec.structs.replace(engine, cpus=(core,)) if engine.kind == "vllm" else engine


def plan(tasks: int, seed: int, config: Config) -> "dict[str, list[Job]]":
    """Workflows per group that runs at the same time: each model alone, and changing models."""
    from chimera_bench import workload

    models = list(dict.fromkeys(engine.model for engine in config.engines))
    jobs = [
        msgspec.structs.replace(job, arrive_s=0.0, gaps_s=(0.0,) * len(job.gaps_s))
        for job in workload.jobs(tasks, 1.0, seed, "validation")
    ]
    groups = {model: [_by(job, [model] * _stages(job)) for job in jobs] for model in models}
    if len(models) > 1:
        rng = random.Random(f"changes:{seed}")
        several = [job for job in jobs if _stages(job) > 1]
        groups["changing"] = [
            _by(job, _changing(rng, models, _stages(job))) for job in several[::_CHANGING_EVERY]
        ]
    return groups


def _stages(job: "Job") -> int:
    return len(job.gaps_s) + 1


def _by(job: "Job", models: Sequence[str]) -> "Job":
    return msgspec.structs.replace(job, models=tuple(models))


def _changing(rng: random.Random, models: Sequence[str], stages: int) -> list[str]:
    """One model, and from a later stage on another: what a policy that changes its mind does."""
    first, second = rng.sample(models, 2)
    change = rng.randrange(1, stages)
    return [first] * change + [second] * (stages - change)


async def _write(
    cluster: "Cluster", progress: "Progress", todo: "dict[str, list[Job]]", out: Path
) -> "list[Record]":
    engines = cluster.config.engines
    progress.phase("engines start", len(engines))
    options = ("--record", str(out.absolute()))
    async with cluster.daemon("round_robin", options=options) as client:
        progress.end(", ".join(f"{engine.name}: {engine.model}" for engine in engines))
        progress.phase("workflows", sum(map(len, todo.values())))
        records: list[Record] = []
        async with asyncio.TaskGroup() as group:
            for jobs in todo.values():
                waiting = iter(jobs)
                for _ in range(_IN_FLIGHT):
                    group.create_task(_keep_going(client, waiting, records, progress))
        progress.end()
    return records


async def _keep_going(
    client: "Client", waiting: "Iterator[Job]", records: "list[Record]", progress: "Progress"
) -> None:
    from chimera_bench import workload
    from chimera_bench.testbed import tasks

    loop = asyncio.get_running_loop()
    for job in waiting:
        records.append(await workload.run_workflow(client, job, tasks.check, loop.time()))
        progress.update(len(records), f"{len(records)} workflows")


def _told(records: "Sequence[Record]", out: Path) -> str:
    stages = sum(len(record.stages) for record in records)
    return f"{len(records)} workflows with {stages} stages in {out}"
