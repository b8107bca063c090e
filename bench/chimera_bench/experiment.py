"""The demo's course: start engines, calibrate, run every policy on the same workflows, report.

Owns the order of things and the output folder. What is sent is in `workload.py`, processes are in
`cluster.py`, numbers in `summary.py`.
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

from chimera_bench import chaos, machine, plot, quality, report, summary, workload
from chimera_bench.cluster import Cluster
from chimera_bench.progress import Progress
from chimera_bench.variants import Variant
from chimera_bench.workload import Record
from chimera_daemon.client import Client
from chimera_daemon.config import Config, EngineConfig

_CALIBRATION_POLICY = "round_robin"
_CALIBRATION_SEED = 0
_MAX_IN_FLIGHT = 128  # workflows of the calibration
_WARM_UP_SHARE = 0.3  # of the calibration is not counted: queues are filling
_MIN_WORKFLOWS, _MAX_WORKFLOWS = 20, 5000
_BUSY_LOAD = 0.7  # load average over the last minute that a quiet machine does not have
_STRIKE_AT = 0.4  # share of workflows ended when `--chaos` strikes
# Rows that are compared against all others; the second also as a baseline of the first.
_OURS = ("chimera", "paper")


class Terminated(Exception):
    """SIGTERM came."""


class Plan(Struct, frozen=True):
    """What to run. ``rate_per_s`` None: ``load`` times the capacity that is calibrated."""

    config: Config
    variants: tuple[Variant, ...]
    out: Path
    load: float
    rate_per_s: float | None
    workflows: int | None  # per policy and seed; None: what arrives in ``arrivals_s``
    arrivals_s: float
    calibration_s: float
    seeds: tuple[int, ...]
    chaos: bool = False


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
    rate = plan.rate_per_s or plan.load * _capacity(calibration)
    number = plan.workflows or round(rate * plan.arrivals_s)
    number = min(_MAX_WORKFLOWS, max(_MIN_WORKFLOWS, number)) if not plan.workflows else number
    outcomes: dict[str, list[Outcome]] = {variant.name: [] for variant in plan.variants}
    for turn, seed in enumerate(plan.seeds):
        jobs = workload.jobs(number, rate, seed)
        # There and back: what the machine changes slowly then hits all policies alike.
        for variant in plan.variants if turn % 2 == 0 else reversed(plan.variants):
            outcome = await _run(plan, cluster, progress, variant, seed, jobs)
            outcomes[variant.name].append(outcome)
            _write_workflows(plan, variant.name, seed, rate, facts, outcome)
    load = {
        "rate_per_s": rate,
        "load": None if plan.rate_per_s else plan.load,
        "calibration": msgspec.to_builtins(calibration),
        "ready_s": round(ready_s, 1),
        "total_s": round(time.monotonic() - began_s, 1),
    }
    text = _report(plan, outcomes, {**facts, **load}, calibration)
    return all(outcome.sound for runs in outcomes.values() for outcome in runs), text


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
    seed: int,
    jobs: Sequence[workload.Job],
) -> Outcome:
    name = variant.name
    progress.phase(name if len(plan.seeds) == 1 else f"{name}, seed {seed}", len(jobs))
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

    options = [*variant.options, *_recording(plan, variant)]
    async with cluster.daemon(variant.policy, options=options, log_name=name) as client:
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


def _recording(plan: Plan, variant: Variant) -> tuple[str, ...]:
    """Only what was learned is examined afterwards; see `quality`."""
    if variant.bundle is None:
        return ()
    return ("--record", str(_traces(plan, variant.name).absolute()))


def _traces(plan: Plan, name: str) -> Path:
    return plan.out / "traces" / name


def _write_workflows(
    plan: Plan,
    policy: str,
    seed: int,
    rate: float,
    facts: Mapping[str, Any],
    outcome: Outcome,
) -> None:
    """One row per workflow, at once: an interrupted demo keeps what it has measured."""
    common = {"row": "workflow", "policy": policy, "seed": seed, "rate_per_s": rate}
    common |= {key: facts[key] for key in ("run", "machine", "commit", "time", "versions")}
    rows = (
        {**common, **msgspec.to_builtins(r), "output_tokens": r.output_tokens, "lost": r.lost}
        for r in outcome.records
    )
    machine.append_rows(plan.out / "workflows.jsonl", rows)


def _report(
    plan: Plan,
    outcomes: Mapping[str, Sequence[Outcome]],
    facts: Mapping[str, Any],
    calibration: Calibration,
) -> str:
    """Write rows, plot and text; return the text."""
    runs = {policy: [o.records for o in each] for policy, each in outcomes.items()}
    summaries = summary.summarise(runs)
    ours = [policy for policy in _OURS if policy in runs]
    pairs = [(p, b) for p in ours for b in runs if b != p and (p, b) != ("paper", "chimera")]
    comparisons = summary.compare(runs, pairs)
    qualities = [
        quality.judge(v.name, v.bundle, runs, _traces(plan, v.name))
        for v in plan.variants
        if v.bundle is not None
    ]
    rows: list[dict[str, Any]] = []
    for s in summaries:
        seen = [msgspec.to_builtins(o.seen) for o in outcomes[s.policy]]
        strikes = [msgspec.to_builtins(o.strike) for o in outcomes[s.policy] if o.strike]
        row = {"row": "policy", **facts, "seeds": plan.seeds, **msgspec.to_builtins(s)}
        rows.append({**row, "stages": seen, "strikes": strikes})
    rows += [{"row": "comparison", **facts, **msgspec.to_builtins(c)} for c in comparisons]
    rows += [{"row": "predictions", **facts, **msgspec.to_builtins(q)} for q in qualities]
    machine.append_rows(plan.out / "summary.jsonl", rows)
    text = _text(plan, outcomes, facts, calibration, summaries, comparisons, qualities)
    (plan.out / "report.txt").write_text(text + "\n", encoding="utf-8")
    title = f"{facts['machine']}; {facts['rate_per_s']:.1f} workflows/s, " + ", ".join(
        f"{e.model}" for e in plan.config.engines
    )
    latencies_s = {
        policy: [r.latency_s for run in each for r in run if r.latency_s is not None]
        for policy, each in runs.items()
    }
    plot.draw(plan.out / "demo.png", summaries, latencies_s, title)
    return text


def _text(
    plan: Plan,
    outcomes: Mapping[str, Sequence[Outcome]],
    facts: Mapping[str, Any],
    calibration: Calibration,
    summaries: Sequence[summary.PolicySummary],
    comparisons: Sequence[summary.Comparison],
    qualities: Sequence[quality.Quality],
) -> str:
    parts = [_setting(plan, facts, calibration, summaries), report.policies_table(summaries)]
    if qualities:
        parts.append("\n".join(report.predictions(q) for q in qualities))
    if len(plan.seeds) > 1:
        parts.append(report.by_seed(summaries))
    if comparisons:
        parts.append(report.comparisons_table(comparisons))
        parts.append("\n".join(report.verdict(c) for c in comparisons))
    for policy, each in outcomes.items():
        for outcome in each:
            if plan.chaos or not outcome.sound:
                state = "sound" if outcome.sound else "NOT SOUND"
                told = chaos.describe(outcome.strike, outcome.seen, outcome.counters)
                parts.append(f"{policy}: {state}\n{told}")
    return "\n\n".join(parts)


def _setting(
    plan: Plan,
    facts: Mapping[str, Any],
    calibration: Calibration,
    summaries: Sequence[summary.PolicySummary],
) -> str:
    versions = facts["versions"]
    vllm = next((f"{n} {v}" for n, v in versions.items() if n.startswith("vllm")), "no vLLM")
    lines = [f"{facts['machine']}; commit {facts['commit']}; {vllm}"]
    engines = ", ".join(_engine_words(e) for e in plan.config.engines)
    lines.append(f"engines: {engines}; started and calibrated in {facts['ready_s']} s")
    lines.append(
        f"the same {summaries[0].workflows} workflows for every policy (seeds {list(plan.seeds)}), "
        f"Poisson arrivals at {facts['rate_per_s']:.2f} workflows/s"
    )
    lines.append(
        f"  = {facts['rate_per_s'] / _capacity(calibration):.2g} x the "
        f"{calibration.capacity_per_s:.2f} workflows/s that uniform routing reached, "
        f"{calibration.in_flight} at a time ({calibration.tokens_per_s:.0f} output tokens/s)"
    )
    if facts["load_1m"] > _BUSY_LOAD:
        lines.append(
            f"OTHER WORK was on this machine: a load average of {facts['load_1m']:g} on "
            f"{facts['cores']} cores before the start"
        )
    lines.append(
        "brackets: 95 % intervals over the workflows of these runs, for chance in tasks and order;"
        "\n  what the machine changes from run to run is not in them: compare seeds, add --seeds"
    )
    if (late_s := max(s.client_late_s for s in summaries)) > 0.0:
        lines.append(f"the client itself was late by up to {late_s:.2f} s, which counts as latency")
    return "\n".join(lines)


def _engine_words(engine: EngineConfig) -> str:
    cores = f", cores {','.join(map(str, engine.cpus))}" if engine.cpus else ""
    return f"{engine.name} ({engine.model}, {engine.kind}{cores})"


def _where(plan: Plan) -> str:
    return (
        f"rows:  {plan.out / 'summary.jsonl'}, {plan.out / 'workflows.jsonl'}\n"
        f"plot:  {plan.out / 'demo.png'}\n"
        f"text:  {plan.out / 'report.txt'}   logs: {plan.out / 'logs'}"
    )
