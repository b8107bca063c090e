"""The demo's course: start engines, calibrate, run every policy on the same workflows, report.

Owns the order of things and the output folder. What is sent is in `workload.py`, processes are in
`cluster.py`, what comes of it in `findings.py`.
"""

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from chimera_bench import chaos, findings, machine, workload
from chimera_bench.cluster import Cluster, to_toml
from chimera_bench.progress import Progress
from chimera_bench.variants import Variant
from chimera_bench.workload import Record
from chimera_daemon.client import Client
from chimera_daemon.config import Config

_CALIBRATION_POLICY = "round_robin"
_CALIBRATION_SEED = 0
_MAX_IN_FLIGHT = 128  # workflows of the calibration
_WARM_UP_SHARE = 0.3  # of the calibration is not counted: queues are filling
_MIN_WORKFLOWS, _MAX_WORKFLOWS = 20, 5000
_STRIKE_AT = 0.4  # share of workflows ended when `--chaos` strikes


class Terminated(Exception):
    """SIGTERM came."""


class Plan(Struct, frozen=True):
    """What to run. ``rate_per_s`` None: each of ``loads`` times the capacity that is calibrated.

    ``report`` is a Markdown page to write, ``command`` what it says it was made by.
    """

    config: Config
    variants: tuple[Variant, ...]
    out: Path
    loads: tuple[float, ...]
    rate_per_s: float | None
    workflows: int | None  # per policy, load and seed; None: what arrives in ``arrivals_s``
    arrivals_s: float
    calibration_s: float
    seeds: tuple[int, ...]
    chaos: bool = False
    report: Path | None = None
    command: str = "chimera demo"


class Level(Struct, frozen=True):
    """One arrival rate; ``load`` is None where the rate itself was given."""

    load: float | None
    rate_per_s: float
    workflows: int  # per policy and seed

    @property
    def name(self) -> str:
        """In words."""
        rate = f"{self.rate_per_s:g} workflows/s"
        return rate if self.load is None else f"load {self.load:g}"


class Calibration(Struct, frozen=True):
    """Throughput of all engines together under uniform routing, all of them kept busy."""

    capacity_per_s: float  # workflows
    stages_per_s: float
    tokens_per_s: float
    in_flight: int  # workflows
    counted_s: float
    success: float


class Outcome(Struct):
    """One policy's run with one seed."""

    records: list[Record]
    seen: chaos.Accounts
    counters: dict[str, int]
    engine_failures: int
    strike: chaos.Strike | None = None

    @property
    def sound(self) -> bool:
        """Nothing lost and nothing failed but by intent."""
        struck = self.strike is not None
        came_back = self.strike is None or self.strike.back_s is not None
        return self.seen.sound and came_back and (struck or self.engine_failures == 0)


def conduct(plan: Plan) -> bool:
    """Run it all, print the report; True if every run was sound. Ends whatever it started."""
    plan.out.mkdir(parents=True, exist_ok=True)
    with Cluster(plan.config, plan.out / "logs") as cluster, Progress() as progress:
        try:
            sound, text = asyncio.run(_conduct(plan, cluster, progress))
        except asyncio.CancelledError:
            raise Terminated from None
    print(f"\n{text}\n\n{_where(plan)}", flush=True)  # after the bars: they redraw themselves
    return sound


async def _conduct(plan: Plan, cluster: Cluster, progress: Progress) -> tuple[bool, str]:
    """Whether every run was sound, and the report."""
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    began_s = time.monotonic()
    facts = {"run": plan.out.name, **machine.facts()}
    calibration = await _prepare(plan, cluster, progress)
    ready_s = time.monotonic() - began_s
    measured: list[tuple[Level, dict[str, list[Outcome]]]] = []
    for level in _levels(plan, calibration):
        measured.append((level, await _run_level(plan, cluster, progress, level, facts)))
    facts |= {
        "calibration": msgspec.to_builtins(calibration),
        "ready_s": round(ready_s, 1),
        "total_s": round(time.monotonic() - began_s, 1),
    }
    found = [findings.examine(plan, level, o, _traces(plan, level)) for level, o in measured]
    text = findings.write(plan, found, facts, calibration)
    runs = (run for _, outcomes in measured for each in outcomes.values() for run in each)
    return all(outcome.sound for outcome in runs), text


def _levels(plan: Plan, calibration: Calibration) -> list[Level]:
    if plan.rate_per_s is not None:
        return [Level(None, plan.rate_per_s, _number(plan, plan.rate_per_s))]
    rates = [(load, load * _capacity(calibration)) for load in plan.loads]
    return [Level(load, rate, _number(plan, rate)) for load, rate in rates]


def _number(plan: Plan, rate_per_s: float) -> int:
    arriving = round(rate_per_s * plan.arrivals_s)
    return plan.workflows or min(_MAX_WORKFLOWS, max(_MIN_WORKFLOWS, arriving))


async def _run_level(
    plan: Plan, cluster: Cluster, progress: Progress, level: Level, facts: Mapping[str, Any]
) -> dict[str, list[Outcome]]:
    """All policies with all seeds; outcomes per row of the table, one per seed."""
    outcomes: dict[str, list[Outcome]] = {variant.name: [] for variant in plan.variants}
    for turn, seed in enumerate(plan.seeds):
        jobs = workload.jobs(level.workflows, level.rate_per_s, seed)
        # There and back: what the machine changes slowly then hits all policies alike.
        for variant in plan.variants if turn % 2 == 0 else reversed(plan.variants):
            progress.phase(_phase(plan, variant, level, seed), len(jobs))
            outcome = await _run(plan, cluster, progress, variant, jobs, _traces(plan, level))
            outcomes[variant.name].append(outcome)
            _write_workflows(plan, variant.name, seed, level, facts, outcome)
    return outcomes


def _phase(plan: Plan, variant: Variant, level: Level, seed: int) -> str:
    words = [variant.name]
    words += [level.name] if len(plan.loads) > 1 else []
    words += [f"seed {seed}"] if len(plan.seeds) > 1 else []
    return ", ".join(words)


def _capacity(calibration: Calibration) -> float:
    if not calibration.capacity_per_s > 0.0:
        raise RuntimeError("the calibration saw no finished stage; give --rate")
    return calibration.capacity_per_s


async def _prepare(plan: Plan, cluster: Cluster, progress: Progress) -> Calibration:
    """Start the engines and measure what they can do.

    Also where the rate is given: engines that have not yet seen many batches are slow for seconds,
    and the first policy would pay for it (seen: four times the latency).
    """
    engines = plan.config.engines
    progress.phase("engines start", len(engines))

    def on_state(status: dict[str, Any]) -> None:
        missing = cluster.missing(status)
        note = f"waiting for {', '.join(missing)}" if missing else ""
        progress.update(len(engines) - len(missing), note)

    async with cluster.daemon(_CALIBRATION_POLICY, on_state) as client:
        status = await client.status()
        progress.end(", ".join(f"{e.name}: {e.model}" for e in engines))
        slots = sum(row["max_inflight"] for row in status["core"]["engines"])
        return await _calibrate(client, progress, min(_MAX_IN_FLIGHT, 2 * slots), plan)


async def _calibrate(client: Client, progress: Progress, in_flight: int, plan: Plan) -> Calibration:
    """Workflows/s from stages/s: short workflows, which end first, would bias a direct count."""
    progress.phase("calibration", plan.calibration_s)
    async with _ticking(progress):
        records = await workload.run_closed(
            client, _CALIBRATION_SEED, in_flight, plan.calibration_s
        )
    counted_s = (1.0 - _WARM_UP_SHARE) * plan.calibration_s
    stages = [s for r in records for s in r.stages if s.end_s > plan.calibration_s - counted_s]
    ended = [r for r in records if r.latency_s is not None]
    stages_per_s = len(stages) / counted_s
    calibration = Calibration(
        capacity_per_s=stages_per_s / workload.mean_stages(),
        stages_per_s=stages_per_s,
        tokens_per_s=sum(s.output_tokens for s in stages) / counted_s,
        in_flight=in_flight,
        counted_s=counted_s,
        success=sum(r.success for r in ended) / max(1, len(ended)),
    )
    progress.end(f"{calibration.capacity_per_s:.1f} workflows/s")
    return calibration


@asynccontextmanager
async def _ticking(progress: Progress) -> AsyncGenerator[None, None]:
    """A phase whose units are seconds."""
    began_s = time.monotonic()

    async def tick() -> None:
        while True:
            progress.update(time.monotonic() - began_s)
            await asyncio.sleep(0.25)

    ticker = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticker.cancel()


async def _run(
    plan: Plan,
    cluster: Cluster,
    progress: Progress,
    variant: Variant,
    jobs: Sequence[workload.Job],
    traces: Path,
) -> Outcome:
    ended: list[Record] = []
    due = asyncio.Event()

    def on_end(record: Record) -> None:
        ended.append(record)
        errors = sum(r.error is not None for r in ended)
        right = sum(r.success for r in ended) / len(ended)
        note = f"{len(ended)}/{len(jobs)} workflows, {right:.0%} right"
        progress.update(len(ended), f"{note}, {errors} errors" if errors else note)
        if len(ended) >= _STRIKE_AT * len(jobs):
            due.set()

    options = [*variant.options, *_recording(variant, traces)]
    # Each daemon reads the file at its start; engines are none of a knob's business.
    written = to_toml(variant.applied(cluster.config))
    (plan.out / "logs" / "config.toml").write_text(written, encoding="utf-8")
    async with cluster.daemon(variant.policy, options=options, log_name=variant.name) as client:
        strike = asyncio.create_task(chaos.strike(client, cluster, due)) if plan.chaos else None
        try:
            records = await workload.run_open(client, jobs, on_end=on_end)
            struck = None
            if strike is not None:
                progress.phase("engine comes back", plan.config.ready_s)
                async with _ticking(progress):
                    struck = await strike
        finally:
            if strike is not None:
                strike.cancel()
        status = await client.status()
    counters = status["core"]["counters"]
    failures = sum(row["failures"] for row in status["supervised"])
    outcome = Outcome(records, chaos.accounts(records, counters), counters, failures, struck)
    waited = [r.latency_s for r in records if r.latency_s is not None]
    progress.end(f"mean {sum(waited) / max(1, len(waited)):.2f} s" if waited else "no answers")
    return outcome


def _recording(variant: Variant, traces: Path) -> tuple[str, ...]:
    """Only what was learned is examined afterwards; see `quality`."""
    if variant.bundle is None:
        return ()
    return ("--record", str((traces / variant.name).absolute()))


def _traces(plan: Plan, level: Level) -> Path:
    return plan.out / "traces" / level.name.replace("/", " per ")


def _write_workflows(
    plan: Plan,
    policy: str,
    seed: int,
    level: Level,
    facts: Mapping[str, Any],
    outcome: Outcome,
) -> None:
    """One row per workflow, at once: an interrupted demo keeps what it has measured."""
    common: dict[str, Any] = {"row": "workflow", "policy": policy, "seed": seed}
    common |= {"load": level.load, "rate_per_s": level.rate_per_s}
    common |= {key: facts[key] for key in ("run", "machine", "commit", "time", "versions")}
    rows = (
        {**common, **msgspec.to_builtins(r), "output_tokens": r.output_tokens, "lost": r.lost}
        for r in outcome.records
    )
    machine.append_rows(plan.out / "workflows.jsonl", rows)


def _where(plan: Plan) -> str:
    lines = [
        f"rows:  {plan.out / 'summary.jsonl'}, {plan.out / 'workflows.jsonl'}",
        f"plot:  {plan.out / 'demo.png'}",
        f"text:  {plan.out / 'report.txt'}   logs: {plan.out / 'logs'}",
    ]
    if plan.report is not None:
        lines.append(f"page:  {plan.report}, {plan.report.with_suffix('.png')}")
    return "\n".join(lines)
