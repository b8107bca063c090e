"""`chimera bench overhead`: what being in the path costs, with engines that answer at once.

Client, daemon and two echo engines are processes of their own on this machine, joined by ipc
sockets. Each of n workers runs workflows of four stages one after the other; a stage counts from
`generate` to its reply. Echo engines are no language models: they answer with fixed words, so all
of the time is overhead. With `--predict` there are two daemons, one of which reads each prompt, and
they take turns with prompts that were never seen before. Front doors side by side are the part of
`paths`, decisions at a given rate that of `decisions`.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from chimera_bench import decisions, machine, paths, paths_report
from chimera_bench.loads import MESSAGES, STAGES_PER_WORKFLOW
from chimera_bench.process_costs import cpu_s, resident_mib
from chimera_daemon.client import Client, connect
from chimera_daemon.config import ConfigError

BUNDLE = Path(__file__).parent / "testbed" / "predictor"
WARM_UP_STAGES = 2000
READY_S = 120.0  # with a bundle to load
_MEMORY_SAMPLES = 10
_HEAD = "in flight   p50 µs   p99 µs   stages/s   daemon CPU µs/stage"
_HEAD_LEARNED = "   learned   fallback   late   shed"  # only where a bundle predicts
_SEED = 0
_THREADS = 1  # of the predictor on a CPU, as in the testbed
# Each is one token for the testbed's encoder, and for those with BERT's vocabulary.
_WORDS = (
    "above add and apples are around away before below books but buy by cards chair coins count "
    "cut decrease degrees divide drop each end equal even finds first for friend from gives "
    "greater has how increase into is item items keep large last left less list loses make many "
    "maximum minimum minus more near now number odd of old one order out part pile plan plus "
    "raise result return reverse scale shares shells shop size skip smallest sort split start "
    "stones sum take than that then there times to total turn with wrong years"
)

Messages = list[dict[str, str]]


class Predictor(NamedTuple):
    """What one of the daemons predicts with; its rows say ``facts``."""

    bundle: Path
    device: str
    models: tuple[str, ...]
    facts: dict[str, Any]


class Side(NamedTuple):
    """One daemon to measure, and what its rows say of it."""

    address: str
    pid: int
    facts: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera bench overhead`."""
    parser.add_argument("--in-flight", type=paths.whole, nargs="+",
                        help="concurrent workers (default: 1 32 128, or 1 32 256 with "
                        "--predict)")  # fmt: skip
    parser.add_argument(
        "--seconds", type=paths.positive, default=5.0, help="per run; default: %(default)s"
    )
    parser.add_argument(
        "--runs", type=paths.whole, default=3, help="per level; default: %(default)s"
    )
    parser.add_argument("--stages", type=int, default=0,
                        help="also run so many stages at 32 in flight and watch the daemon's "
                        "memory, for example 1000000")  # fmt: skip
    parser.add_argument("--predict", type=Path, nargs="?", const=BUNDLE, metavar="BUNDLE",
                        help="also run a daemon that predicts with this bundle (default: the "
                        "testbed's); both get prompts never seen before")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where the predictor runs; default: %(default)s")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=paths.whole, default=128, metavar="TOKENS",
                        help="of each prompt with --predict; default: %(default)s")  # fmt: skip
    parser.add_argument("--policy", default="chimera", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="append JSONL rows to this file")
    paths.add_arguments(parser)
    decisions.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, append rows; the exit code is 0 if every stage was answered.

    Raises ConfigError if the bundle, the device or a peer cannot be used, or a daemon does not
    start.
    """
    _check(arguments)
    facts = machine.facts()
    if arguments.cpus is not None:
        os.sched_setaffinity(0, arguments.cpus)
    if arguments.decisions is not None:
        rows = uvloop.run(decisions.measure(arguments))
    elif arguments.paths is not None or arguments.peer or arguments.report is not None:
        rows = uvloop.run(paths.measure(arguments))
        if arguments.report is not None:
            paths_report.write(arguments.report, rows, facts)
            print(f"report: {arguments.report}")
    else:
        rows = _daemon_only(arguments)
    if arguments.out is not None:
        machine.append_rows(arguments.out, [row | facts for row in rows])
        print(f"rows: {arguments.out}")
    return int(any(row.get("errors") for row in rows))


def _check(arguments: argparse.Namespace) -> None:
    """There are three kinds of measurement; raises ConfigError where options ask for several."""
    compared = arguments.paths is not None or arguments.peer or arguments.report is not None
    asked = {
        "--decisions": arguments.decisions is not None,
        "--paths, --peer or --report": compared,
        "--predict or --stages": arguments.predict is not None or arguments.stages,
    }
    together = [options for options, given in asked.items() if given]
    if len(together) > 1:
        raise ConfigError(f"{' and '.join(together)} ask for different things; run one of them")


def _daemon_only(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of client, daemon and echo engines; with a bundle also of a daemon that reads."""
    predictor, models, levels = None, ("small", "large"), [1, 32, 128]
    prompts, said = itertools.repeat(MESSAGES), {}
    if arguments.predict is not None:
        predictor = _predictor(arguments.predict, arguments.device)
        models, levels = predictor.models, [1, 32, 256]
        prompts, said = novel(arguments.prompt_tokens), {"prompt_tokens": arguments.prompt_tokens}
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(_daemon(arguments.policy, models))
        sides = [Side(*daemon, said | {"prediction": "prior"})]
        if predictor is not None:
            daemon = stack.enter_context(_daemon(arguments.policy, models, predictor))
            sides.append(Side(*daemon, said | {"prediction": "learned"} | predictor.facts))
        return uvloop.run(_measure(sides, prompts, arguments.in_flight or levels, arguments))


def _predictor(bundle: Path, device: str) -> Predictor:
    from chimera_predictors.bundle import BundleError, read_bundle

    try:
        info = read_bundle(bundle).info
    except BundleError as error:
        raise ConfigError(f"--predict: {error}") from error
    facts = {
        "encoder": info.encoder.name,
        "encoder_dim": info.encoder.dim,
        "encoder_max_tokens": info.encoder.max_tokens,
        "heads_sha256": info.heads_sha256,
        "threads": _THREADS,
        "seed": _SEED,
    }
    # Of two engines, both of a model that the bundle knows; it may know one only.
    models = (info.models[0], info.models[-1])
    return Predictor(bundle.absolute(), device, models, facts)


@contextlib.contextmanager
def _daemon(
    policy: str, models: Sequence[str], predictor: Predictor | None = None
) -> Iterator[tuple[str, int]]:
    """A daemon with two echo engines on private addresses; its address and process id."""
    with tempfile.TemporaryDirectory(prefix="chimera-") as folder:
        config, front = Path(folder) / "overhead.toml", Path(folder) / "front"
        lines = [
            f'front = "ipc://{front}"',
            f'back = "ipc://{folder}/back"',
            f'policy = "{policy}"',
            f'log_dir = "{folder}"',
            "gateway = { processes = 0 }",
        ]
        if predictor is not None:
            lines += ["[predictor]", f"bundle = {json.dumps(str(predictor.bundle))}"]
            lines += [f'device = "{predictor.device}"', f"threads = {_THREADS}"]
        for name, model in zip(("small", "large"), models, strict=True):
            lines += ["[[engines]]", f'name = "{name}"', f"model = {json.dumps(model)}"]
            lines += ['kind = "echo"', "args = { slots = 256, reply_tokens = [16, 16] }"]
        config.write_text("\n".join(lines))
        command = [sys.executable, "-m", "chimera_daemon", "--log-level", "warning", "up"]
        with subprocess.Popen([*command, str(config)]) as process:
            try:
                _until_listening(process, front)
                yield f"ipc://{front}", process.pid
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


def _until_listening(process: subprocess.Popen[bytes], front: Path) -> None:
    end = time.monotonic() + READY_S
    while not front.exists():
        if process.poll() is not None:
            raise ConfigError("the daemon ended at once; why is written above")
        if time.monotonic() > end:
            raise RuntimeError(f"the daemon did not listen within {READY_S:g} s")
        time.sleep(0.02)


async def _measure(
    sides: Sequence[Side],
    prompts: Iterator[Messages],
    levels: Sequence[int],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Rows of all levels."""
    rows: list[dict[str, Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(connect(side.address, timeout_s=READY_S))
            for side in sides
        ]
        for client in clients:
            await _until_engines(client, 2)
            await _load(client, prompts, 32, stages=WARM_UP_STAGES)
        for side, client in zip(sides, clients, strict=True):
            if side.facts["prediction"] == "learned":
                side.facts["runs_on"] = (await client.status())["predictor"]["runs_on"]
        connected = list(zip(sides, clients, strict=True))
        print(_HEAD + (_HEAD_LEARNED if len(sides) > 1 else ""))
        for in_flight in levels:
            rows += await _level(connected, prompts, in_flight, arguments)
        if arguments.stages:
            rows += [await _memory_run(*each, prompts, arguments) for each in connected]
    return rows


async def _level(
    sides: Sequence[tuple[Side, Client]],
    prompts: Iterator[Messages],
    in_flight: int,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row for each side, which take turns; the second says by how much it is over the first."""
    runs: list[list[dict[str, float]]] = [[] for _ in sides]
    for _ in range(arguments.runs):
        for (side, client), done in zip(sides, runs, strict=True):
            done.append(await _one_run(side, client, prompts, in_flight, arguments.seconds))
    rows: list[dict[str, Any]] = []
    for (side, _), done in zip(sides, runs, strict=True):
        row: dict[str, Any] = {"bench": "overhead", "policy": arguments.policy} | side.facts
        row |= {"in_flight": in_flight, "runs": len(done), "seconds": arguments.seconds}
        for field in done[0]:
            values = sorted(r[field] for r in done)
            row |= {field: statistics.median(values), f"{field}_min": values[0]}
            row |= {f"{field}_max": values[-1]}
        if rows:
            over = ("p50_us", "p99_us", "daemon_cpu_us")
            row |= {f"added_{field}": row[field] - rows[0][field] for field in over}
        rows.append(row)
        print(_line(row))
    return rows


def _line(row: dict[str, Any]) -> str:
    line = (
        f"{row['in_flight']:9d} {row['p50_us']:8.0f} {row['p99_us']:8.0f} "
        f"{row['stages_per_s']:10,.0f} {row['daemon_cpu_us']:21.1f}"
    )
    if row["prediction"] == "learned":
        line += f" {row['learned_share']:9.1%} {row['fallback_share']:10.1%}"
        line += f" {row['late']:6.0f} {row['shed']:6.0f}"
    return line


async def _one_run(
    side: Side, client: Client, prompts: Iterator[Messages], in_flight: int, seconds: float
) -> dict[str, float]:
    before = await _counters(client)
    cpu, started = cpu_s(side.pid), time.perf_counter()
    latencies, sources = await _load(client, prompts, in_flight, seconds=seconds)
    spent = time.perf_counter() - started
    cpu = cpu_s(side.pid) - cpu
    latencies.sort()
    stages = len(latencies)
    measured = {
        "p50_us": 1e6 * latencies[stages // 2],
        "p99_us": 1e6 * latencies[stages * 99 // 100],
        "stages_per_s": stages / spent,
        "daemon_cpu_us": 1e6 * cpu / stages,
    }
    if side.facts["prediction"] == "learned":
        counted = await _counters(client) - before
        measured |= {f"{s}_share": sources[s] / stages for s in ("learned", "fallback")}
        measured |= {name: float(counted[f"predictions_{name}"]) for name in ("late", "shed")}
    return measured


async def _counters(client: Client) -> Counter[str]:
    """Of the predictor; none where the prior predicts."""
    return Counter((await client.status())["predictor"].get("counters", {}))


async def _memory_run(
    side: Side, client: Client, prompts: Iterator[Messages], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Resident memory of the daemon over many stages, sampled after every tenth of them."""
    samples: list[float] = []
    for _ in range(_MEMORY_SAMPLES):
        await _load(client, prompts, 32, stages=arguments.stages // _MEMORY_SAMPLES)
        samples.append(resident_mib(side.pid))
        print(f"{len(samples) * arguments.stages // _MEMORY_SAMPLES:9,d} stages: "
              f"daemon {samples[-1]:.1f} MiB")  # fmt: skip
    growth = samples[-1] / samples[0] - 1.0
    print(f"growth of memory from the first tenth to the last: {growth:+.1%}")
    return {
        "bench": "overhead_memory",
        "policy": arguments.policy,
        "stages": arguments.stages,
        "resident_mib": samples,
        "growth": growth,
    } | side.facts


async def _load(
    client: Client,
    prompts: Iterator[Messages],
    in_flight: int,
    *,
    seconds: float = 1e9,
    stages: int = 1 << 62,
) -> tuple[list[float], Counter[str]]:
    """Latencies in seconds of all stages until the time or the number is reached.

    And who predicted how many of them, by the receipts.
    """
    end = time.perf_counter() + seconds
    latencies: list[float] = []
    sources: Counter[str] = Counter()

    async def worker() -> None:
        while time.perf_counter() < end and len(latencies) < stages:
            async with client.workflow(kind="bench") as workflow:
                for _ in range(STAGES_PER_WORKFLOW):
                    messages = next(prompts)
                    started = time.perf_counter()
                    reply = await workflow.generate(messages, max_tokens=16)
                    latencies.append(time.perf_counter() - started)
                    sources[reply.receipt.source] += 1

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return latencies, sources


def novel(tokens: int) -> Iterator[Messages]:
    """Prompts of so many words at random, without an end; no two are the same but for tiny ones."""
    draw, words = random.Random(_SEED), _WORDS.split()
    while True:
        yield [{"role": "user", "content": " ".join(draw.choices(words, k=tokens))}]


async def _until_engines(client: Client, count: int) -> None:
    end = time.monotonic() + READY_S
    while len((await client.status())["core"]["engines"]) < count:
        if time.monotonic() > end:
            raise RuntimeError(f"the echo engines did not join within {READY_S:g} s")
        await asyncio.sleep(0.05)
