"""`chimera bench core`: events per second of the scheduler core, in pure Python on one core.

The load: ``--queued`` stages wait for ``--engines`` engines of four models all the time. Each
further stage of a three-stage workflow brings its events: submitted, first text streamed, finished;
after the third the workflow is closed. Every engine reports once in a thousand stages. Measured is
the CPU time of this process inside `Scheduler.handle` and the loop around it, without the garbage
collection of cycles, which the daemon puts off, too.
"""

import argparse
import gc
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from chimera_bench import machine
from chimera_daemon.config import Config
from chimera_daemon.core import Scheduler
from chimera_daemon.messages import (
    AttemptFinished,
    AttemptStreamed,
    Dispatch,
    EngineRegistered,
    EngineReported,
    EngineStats,
    Event,
    ModelPrediction,
    Prediction,
    Profile,
    Stage,
    StageSubmitted,
    Usage,
    WorkflowClosed,
)

MODELS = 4
STAGES_PER_WORKFLOW = 3
SLOTS = 16
STREAM_S = 1e-4  # virtual seconds between stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera bench core`."""
    parser.add_argument("--policy", default="chimera", help="default: %(default)s")
    parser.add_argument("--queued", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--engines", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--stages", type=int, default=50_000, help="per run; default: %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append JSONL rows to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit code is 0."""
    rates = sorted(_measure(arguments, seed) for seed in _seeds(arguments))
    median = statistics.median(rates)
    print(
        f"core, policy {arguments.policy}, {arguments.queued} stages queued, "
        f"{arguments.engines} engines: {median:,.0f} events/s "
        f"(min {rates[0]:,.0f}, max {rates[-1]:,.0f}, {arguments.runs} runs)"
    )
    if arguments.out is not None:
        row = {
            "bench": "core",
            "policy": arguments.policy,
            "queued": arguments.queued,
            "engines": arguments.engines,
            "stages": arguments.stages,
            "runs": arguments.runs,
            "seed": arguments.seed,
            "events_per_s_min": rates[0],
            "events_per_s_p50": median,
            "events_per_s_max": rates[-1],
        }
        machine.append_rows(arguments.out, [row | machine.facts()])
    return 0


def _seeds(arguments: argparse.Namespace) -> range:
    return range(arguments.seed, arguments.seed + arguments.runs)


def _measure(arguments: argparse.Namespace, seed: int) -> float:
    """Events per second of CPU time of one run."""
    config = Config(policy=arguments.policy, max_queued_stages=2 * arguments.queued + 1)
    scheduler = Scheduler(config)
    for engine in range(arguments.engines):
        model = f"m{engine % MODELS}"
        event = EngineRegistered(f"e{engine}", 1, model, SLOTS, 8192, Profile())
        scheduler.handle(event, 0.0)
    ahead = arguments.queued + arguments.engines * SLOTS
    submissions = list(_submissions(ahead + arguments.stages, seed))
    running: deque[tuple[int, int]] = deque()  # attempt, number of its stage
    left = [STAGES_PER_WORKFLOW] * (len(submissions) // STAGES_PER_WORKFLOW + 1)
    now = 0.0
    for event in submissions[:ahead]:
        _run(scheduler, event, now, running)
    usage, stats = Usage(200, 60), EngineStats(SLOTS)
    events = 0
    gc.collect()
    gc.disable()
    started = time.process_time()
    for number, event in enumerate(submissions[ahead:]):
        now += STREAM_S
        _run(scheduler, event, now, running)
        attempt, stage = running.popleft()
        scheduler.handle(AttemptStreamed(attempt), now)
        _run(scheduler, AttemptFinished(attempt, usage, 300), now, running)
        events += 3
        workflow = stage // STAGES_PER_WORKFLOW
        left[workflow] -= 1
        if not left[workflow]:
            scheduler.handle(WorkflowClosed(f"w{workflow}", 1.0), now)
            events += 1
        if number % 1000 == 0:
            for engine in range(arguments.engines):
                scheduler.handle(EngineReported(f"e{engine}", 1, stats, {}), now)
            events += arguments.engines
    spent = time.process_time() - started
    gc.enable()
    scheduler.check()
    return events / spent


def _run(scheduler: Scheduler, event: Event, now: float, running: deque[tuple[int, int]]) -> None:
    for action in scheduler.handle(event, now):
        if type(action) is Dispatch:
            running.append((action.attempt_id, int(action.key[1])))


def _submissions(count: int, seed: int) -> Iterator[StageSubmitted]:
    rng = random.Random(seed)
    predictions = [_prediction(rng) for _ in range(256)]
    for i in range(count):
        stage = Stage(
            client_id=b"client",
            request_id=str(i),
            workflow_id=f"w{i // STAGES_PER_WORKFLOW}",
            stage=i % STAGES_PER_WORKFLOW,
            kind="math",
            model=None,
            prompt_tokens=200,
            max_tokens=256,
            payload_bytes=800,
            digest=i,
        )
        yield StageSubmitted(stage, predictions[i % len(predictions)])


def _prediction(rng: random.Random) -> Prediction:
    models = {f"m{m}": _model_prediction(rng.random(), rng.uniform(10, 200)) for m in range(MODELS)}
    return Prediction(models, _model_prediction(0.5, 100.0))


def _model_prediction(confidence: float, tokens: float) -> ModelPrediction:
    spread = (tokens / 2, tokens, tokens * 2)
    whole = (tokens, tokens * 2, tokens * 4)
    return ModelPrediction(confidence, tokens, spread, tokens * 2, whole, 2.0)
