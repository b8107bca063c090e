"""`chimera bench calibration`: the simulator against a real engine, on the same workflows.

Starts one engine of a configuration, measures it (`measure`), runs workflows of the testbed on it
at several loads, and replays in the simulator exactly what they needed: arrivals, tokens, gaps.
Nothing of the replay is fitted to the runs that it is compared with: one profile, measured between
all runs, replays them all.
"""

import argparse
import asyncio
import math
import os
import statistics
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from chimera_bench import machine, measure, sim_engine, sim_input, simulator, workload
from chimera_bench.cluster import Cluster, ClusterError
from chimera_bench.sim_input import EngineSetup, StageTruth, Workflow
from chimera_bench.workload import Record
from chimera_daemon import config as configuration
from chimera_daemon.client import ChimeraError, Client
from chimera_daemon.config import Config, EngineConfig
from chimera_daemon.prior import PriorPredictor

_EXIT_FAILED = 1
_TESTBED = Path(__file__).parent / "testbed" / "testbed.toml"
_CAPACITY_SEED = 0
_SETTLING_SHARE = 0.3  # of the seconds at full load, in which queues are filling
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_GOAL = 0.15
_RATIOS = ("mean_ratio", "p95_ratio")
# What these terms of a profile are worth: the same replay without one of them.
_TERMS = ("prompt_s", "overhead_s", "step_per_kv_token_s")


class Comparison(Struct, frozen=True):
    """One load, really run and simulated. Seconds; ``busy`` of the engine in the simulation."""

    load: float
    rate_per_s: float
    seed: int
    workflows: int
    stages: int
    mean_s: float
    simulated_mean_s: float
    p95_s: float
    simulated_p95_s: float
    service_s: float  # of a stage, from dispatch to answer, mean
    simulated_service_s: float
    wait_s: float  # of a stage in the daemon's queue, mean
    simulated_wait_s: float
    simulated_busy: float
    foreign: float | None  # share of the engine's cores that other processes took meanwhile

    @property
    def mean_ratio(self) -> float:
        """Simulated over real."""
        return self.simulated_mean_s / self.mean_s

    @property
    def p95_ratio(self) -> float:
        """Simulated over real."""
        return self.simulated_p95_s / self.p95_s


class Run(Struct, frozen=True):
    """Workflows that have really run. ``foreign`` as in `Comparison`."""

    load: float
    rate_per_s: float
    seed: int
    records: list[Record]
    foreign: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera bench calibration`."""
    parser.add_argument("--config", type=Path, metavar="TOML", default=_TESTBED,
                        help="engines and models (default: the testbed)")  # fmt: skip
    parser.add_argument("--engine", metavar="NAME", help="of the configuration (default: its last)")
    parser.add_argument("--loads", type=_load, nargs="+", default=[0.4, 0.7, 0.9], metavar="X",
                        help="shares of the measured capacity (default: .4 .7 .9)")  # fmt: skip
    parser.add_argument("--seconds", type=_seconds, default=30.0, metavar="S",
                        help="of arrivals per load and pass (default: %(default)s)")  # fmt: skip
    parser.add_argument("--passes", type=_passes, default=3, metavar="N",
                        help="over all loads, each with other workflows; the engine is measured "
                        "before and after every run; medians (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="append JSONL rows to this file")


def _load(text: str) -> float:
    value = _number(text)
    if not 0.0 < value <= 2.0:
        raise argparse.ArgumentTypeError(f"{text!r}: write a share above 0, at most 2")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not 1.0 <= value <= 3600.0:
        raise argparse.ArgumentTypeError(f"{text!r}: write seconds from 1 to 3600")
    return value


def _passes(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from 1 to 100")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def run(arguments: argparse.Namespace) -> int:
    """Run, print a table, append rows; the exit code is 0 if there is a comparison."""
    measure.require_numpy()
    facts = machine.facts()
    config = _config(configuration.load(arguments.config), arguments.engine)
    with (
        tempfile.TemporaryDirectory(prefix="chimera-calibration-") as logs,
        _elsewhere(config.engines[0].cpus),
        Cluster(config, Path(logs)) as cluster,
    ):
        try:
            rows = asyncio.run(_calibrate(cluster, arguments))
        except (ClusterError, ChimeraError, measure.MeasureError) as error:
            print(f"chimera bench calibration: {error}")
            return _EXIT_FAILED
    if arguments.out is not None:
        machine.append_rows(arguments.out, [row | facts for row in rows])
        print(f"rows: {arguments.out}")
    return 0


def _config(config: Config, name: str | None) -> Config:
    """One engine on a core of its own, if there are two; no prefix cache, no learned predictor."""
    named = {engine.name: engine for engine in config.engines}
    if not named:
        raise configuration.ConfigError("--config: there is no engine in it that can be started")
    engine = named.get(name) if name is not None else config.engines[-1]
    if engine is None:
        raise configuration.ConfigError(
            f"--engine: no engine {name!r}; there are: {', '.join(named)}"
        )
    if engine.kind == "vllm":
        engine = _alone(engine)
    return msgspec.structs.replace(
        config,
        policy=f"static:{engine.model}",
        engines=(engine,),
        predictor=msgspec.structs.replace(config.predictor, bundle=None),
    )


def _alone(engine: EngineConfig) -> EngineConfig:
    cores = machine.cores()
    cpus = () if len(cores) < 2 or machine.gpus() else cores[-1:]
    args = {"enable_prefix_caching": False, **engine.args}
    return msgspec.structs.replace(engine, cpus=engine.cpus or cpus, args=args)


@contextmanager
def _elsewhere(cpus: Sequence[int]) -> Generator[None]:
    """Keep this process, and the daemon that it starts, off the engine's cores."""
    before = machine.cores()
    others = set(before) - set(cpus)
    if not cpus or not others:
        yield
        return
    os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _calibrate(cluster: Cluster, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all comparisons and of the medians, which are printed."""
    (engine,) = cluster.config.engines
    print(f"engine {engine.name}: {engine.model}; it starts", flush=True)
    runs: list[Run] = []
    async with cluster.daemon(cluster.config.policy) as client:
        foreign = _Foreign(engine, cluster.pid(await client.status(), engine.name))
        gauge = measure.Gauge(client, engine.model)
        bounds = await gauge.bounds(None, measure.DEFAULT_TOKEN_BUDGET)
        capacity = await _capacity(client, bounds.slots, arguments.seconds)
        print(f"capacity {capacity:.1f} workflows/s", flush=True)
        rounds = [await gauge.round(bounds)]
        for seed in range(1, arguments.passes + 1):
            for load in arguments.loads:
                print(f"pass {seed} of {arguments.passes}, load {load:g}", flush=True)
                runs.append(await _run(client, load, load * capacity, seed, arguments, foreign))
                rounds.append(await gauge.round(bounds))
    measured = measure.fitted(bounds, rounds)
    print(measure.to_toml(measured, engine.name))
    return _rows(cluster.config, measured, capacity, runs)


def _rows(
    config: Config, measured: measure.Measurement, capacity: float, runs: Sequence[Run]
) -> list[dict[str, Any]]:
    """Of every run, then of the medians by load; printed on the way."""
    common = {
        "bench": "calibration",
        "engine": measured.engine,
        "model": measured.model,
        "capacity_per_s": capacity,
        "profile": msgspec.to_builtins(measured.profile),
        "fit_error": measured.relative_error,
        "fit_spread": measured.spread,
        "rounds": measured.rounds,
    }
    found = [compare(config, measured.profile, real) for real in runs]
    rows: list[dict[str, Any]] = []
    for real, each in zip(runs, found, strict=True):
        print(_words(each), flush=True)
        ratios = {"mean_ratio": each.mean_ratio, "p95_ratio": each.p95_ratio}
        without = _without(config, measured.profile, real)
        row = {"row": "comparison", **msgspec.to_builtins(each), **ratios, "without": without}
        rows.append(common | row)
    medians = [_median([r for r in rows if r["load"] == load]) for load in _loads(runs)]
    print(_table(medians))
    load_1m = round(os.getloadavg()[0], 2)
    return [
        {**row, "load_1m_after": load_1m}
        for row in (*rows, *({**common, "row": "medians", **each} for each in medians))
    ]


def _loads(runs: Sequence[Run]) -> list[float]:
    return list(dict.fromkeys(real.load for real in runs))


async def _capacity(client: Client, slots: int, seconds: float) -> float:
    """Workflows/s of a full engine, from stages/s: workflows that are short end first."""
    records = await workload.run_closed(client, _CAPACITY_SEED, 2 * slots, seconds)
    counted_s = (1.0 - _SETTLING_SHARE) * seconds
    stages = sum(s.end_s > seconds - counted_s for r in records for s in r.stages)
    if not stages:
        raise measure.MeasureError(f"no stage was answered within {seconds:g} s; raise --seconds")
    return stages / counted_s / workload.mean_stages()


async def _run(
    client: Client,
    load: float,
    rate_per_s: float,
    seed: int,
    arguments: argparse.Namespace,
    foreign: "_Foreign",
) -> Run:
    jobs = workload.jobs(max(1, round(rate_per_s * arguments.seconds)), rate_per_s, seed)
    foreign.begin()
    records = await workload.run_open(client, jobs)
    failed = [r for r in records if r.latency_s is None]
    if failed:
        raise measure.MeasureError(
            f"{len(failed)} of {len(records)} workflows failed, the first with "
            f"{failed[0].error}: {failed[0].error_message}"
        )
    return Run(load, rate_per_s, seed, records, foreign.end())


def replayed(record: Record, model: str) -> Workflow:
    """What a workflow that has really run needed, from its first submission on.

    Gaps are what the client took between an answer and the next submission, its own time included.
    """
    begins = [stage.end_s - stage.latency_s for stage in record.stages]
    truths: list[StageTruth] = []
    for number, stage in enumerate(record.stages):
        last = number + 1 == len(record.stages)
        after = stage if last else record.stages[number + 1]
        new = after.prompt_tokens - stage.prompt_tokens - stage.output_tokens
        keeps = last or new >= 0
        truths.append(
            StageTruth(
                stage.output_tokens,
                new_tokens=0 if last else new if keeps else after.prompt_tokens,
                gap_s=0.0 if last else max(0.0, begins[number + 1] - stage.end_s),
                keeps_context=keeps,
            )
        )
    return Workflow(
        str(record.number),
        begins[0],
        record.stages[0].prompt_tokens,
        {model: sim_input.Run(tuple(truths), float(record.success))},
        record.kind,
    )


def compare(config: Config, profile: sim_engine.EngineProfile, real: Run) -> Comparison:
    """Replay what has run, under the same configuration, and put both side by side."""
    (engine,) = config.engines
    prior = PriorPredictor(config)
    workflows = [replayed(record, engine.model) for record in real.records]
    setup = EngineSetup(engine.name, engine.model, profile)
    result = simulator.simulate(config, [setup], workflows, prior.prediction, observers=[prior])
    answered = [stage for record in real.records for stage in record.stages]
    simulated = [stage for record in result.workflows for stage in record.stages]
    latencies_s = [_latency_s(record) for record in real.records]
    simulated_s = [record.latency_s for record in result.workflows]
    return Comparison(
        *(real.load, real.rate_per_s, real.seed, len(latencies_s), len(answered)),
        *(statistics.fmean(latencies_s), statistics.fmean(simulated_s)),
        *(_p95(latencies_s), _p95(simulated_s)),
        service_s=statistics.fmean(s.service_s for s in answered),
        simulated_service_s=statistics.fmean(s.finished_s - s.dispatched_s for s in simulated),
        wait_s=statistics.fmean(s.queue_s for s in answered),
        simulated_wait_s=statistics.fmean(s.dispatched_s - s.submitted_s for s in simulated),
        simulated_busy=result.engines[0].utilisation,
        foreign=real.foreign,
    )


def _without(
    config: Config, profile: sim_engine.EngineProfile, real: Run
) -> dict[str, dict[str, float]]:
    ratios: dict[str, dict[str, float]] = {}
    for term in _TERMS:
        found = compare(config, msgspec.structs.replace(profile, **{term: 0.0}), real)
        ratios[term] = {"mean_ratio": found.mean_ratio, "p95_ratio": found.p95_ratio}
    return ratios


def _latency_s(record: Record) -> float:
    """From the first submission: how late the client's clock was is no time of the engine."""
    first = record.stages[0]
    return record.stages[-1].end_s - (first.end_s - first.latency_s)


def _p95(values: Sequence[float]) -> float:
    return (
        statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    )


class _Foreign:
    """How much of an engine's cores goes to other processes, by the kernel's own accounts."""

    def __init__(self, engine: EngineConfig, pid: int) -> None:
        self._cpus = engine.cpus
        self._pid = pid
        self._before = (0.0, 0.0, 0.0)

    def begin(self) -> None:
        """Count from now."""
        self._before = self._now()

    def end(self) -> float | None:
        """The share since `begin`; None where the engine has no cores of its own."""
        if not self._cpus:
            return None
        total_s, busy_s, own_s = (a - b for a, b in zip(self._now(), self._before, strict=True))
        return round(max(0.0, busy_s - own_s) / max(total_s, _TICK_S), 4)

    def _now(self) -> tuple[float, float, float]:
        """Seconds of the cores, of these busy, of these the engine's."""
        total = busy = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in [f"cpu{cpu}" for cpu in self._cpus]:
                ticks = [int(field) for field in fields[:8]]
                total += sum(ticks)
                busy += sum(ticks) - ticks[3] - ticks[4]  # idle, waiting for a disk
        own = sum(_ticks(pid) for pid in _family(self._pid))
        return total * _TICK_S, busy * _TICK_S, own * _TICK_S


def _family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from _family(int(child))


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # in user and in kernel mode


# What comes out.


def _median(of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the passes, ratios with their ranges."""

    def median(values: Iterable[float]) -> float:
        return statistics.median(values)

    names = ("load", "rate_per_s", "mean_s", "simulated_mean_s", "p95_s", "simulated_p95_s")
    row: dict[str, Any] = {name: median(r[name] for r in of) for name in names}
    for name in _RATIOS:
        values = [r[name] for r in of]
        row |= {name: median(values), f"{name}_range": [min(values), max(values)]}
    row["without"] = {
        term: {name: median(r["without"][term][name] for r in of) for name in _RATIOS}
        for term in _TERMS
    }
    within = all(abs(row[name] - 1.0) <= _GOAL for name in _RATIOS)
    workflows = sum(r["workflows"] for r in of)
    return row | {"workflows": workflows, "passes": len(of), "within": within}


def _words(c: Comparison) -> str:
    foreign = "" if c.foreign is None else f"; others took {c.foreign:.0%} of its core"
    return (
        f"load {c.load:g}, seed {c.seed}: mean {c.mean_s:.3f} s, simulated {c.simulated_mean_s:.3f}"
        f" ({c.mean_ratio:.2f}); P95 {c.p95_s:.3f} s, simulated {c.simulated_p95_s:.3f} "
        f"({c.p95_ratio:.2f}); a stage's wait {1e3 * c.wait_s:.0f} ms, "
        f"{1e3 * c.simulated_wait_s:.0f}, and service {1e3 * c.service_s:.0f} ms, "
        f"{1e3 * c.simulated_service_s:.0f}{foreign}"
    )


def _table(medians: Sequence[Mapping[str, Any]]) -> str:
    lines = ["load   mean s  simulated   ratio    P95 s  simulated   ratio   (medians of passes)"]
    lines += [
        f"{m['load']:4g} {m['mean_s']:8.3f} {m['simulated_mean_s']:10.3f} {m['mean_ratio']:7.2f} "
        f"{m['p95_s']:8.3f} {m['simulated_p95_s']:10.3f} {m['p95_ratio']:7.2f}"
        f"{'' if m['within'] else '   more than 15 % off'}"
        for m in medians
    ]
    return "\n".join(lines)
