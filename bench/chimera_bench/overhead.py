"""`chimera bench overhead`: what being in the path costs, with engines that answer at once.

Client, daemon and two echo engines are processes of their own on this machine, joined by ipc
sockets. Each of n workers runs workflows of four stages one after the other; a stage counts from
`generate` to its reply. Echo engines are no language models: they answer with fixed words, so all
of the time is overhead.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from chimera_bench import machine
from chimera_daemon.client import Client, connect

STAGES_PER_WORKFLOW = 4
MESSAGES = [{"role": "user", "content": "What is 17 + 4? Answer with the number alone. " * 4}]
WARM_UP_STAGES = 2000
READY_S = 30.0
_MEMORY_SAMPLES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera bench overhead`."""
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 32, 128],
                        help="concurrent workers (default: 1 32 128)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=5.0, help="per run; default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="per level; default: %(default)s")
    parser.add_argument("--stages", type=int, default=0,
                        help="also run so many stages at 32 in flight and watch the daemon's "
                        "memory, for example 1000000")  # fmt: skip
    parser.add_argument("--policy", default="chimera", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="append JSONL rows to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, append rows; the exit code is 0 if every stage was answered."""
    facts = machine.facts()
    with _daemon(arguments.policy) as (address, pid):
        rows = uvloop.run(_measure(address, pid, arguments))
    if arguments.out is not None:
        machine.append_rows(arguments.out, [row | facts for row in rows])
        print(f"rows: {arguments.out}")
    return 0


@contextlib.contextmanager
def _daemon(policy: str) -> Iterator[tuple[str, int]]:
    """A daemon with two echo engines on private addresses; its address and process id."""
    with tempfile.TemporaryDirectory(prefix="chimera-") as folder:
        config = Path(folder) / "overhead.toml"
        front = f"ipc://{folder}/front"
        lines = [
            f'front = "{front}"',
            f'back = "ipc://{folder}/back"',
            f'policy = "{policy}"',
            f'log_dir = "{folder}"',
        ]
        for name in ("small", "large"):
            lines += ["[[engines]]", f'name = "{name}"', f'model = "{name}"', 'kind = "echo"']
            lines += ["args = { slots = 256, reply_tokens = [16, 16] }"]
        config.write_text("\n".join(lines))
        command = [sys.executable, "-m", "chimera_daemon", "--log-level", "warning", "up"]
        with subprocess.Popen([*command, str(config)]) as process:
            try:
                yield front, process.pid
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


async def _measure(address: str, pid: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    async with connect(address, timeout_s=READY_S) as client:
        await _until_engines(client, 2)
        await _load(client, 32, stages=WARM_UP_STAGES)
        print("in flight   p50 µs   p99 µs   stages/s   daemon CPU µs/stage")
        rows: list[dict[str, Any]] = []
        for in_flight in arguments.in_flight:
            runs = [
                await _one_run(client, pid, in_flight, arguments.seconds)
                for _ in range(arguments.runs)
            ]
            row = {"bench": "overhead", "policy": arguments.policy, "in_flight": in_flight}
            row |= {"runs": len(runs), "seconds": arguments.seconds}
            for field in runs[0]:
                values = sorted(r[field] for r in runs)
                row |= {field: statistics.median(values), f"{field}_min": values[0]}
                row |= {f"{field}_max": values[-1]}
            rows.append(row)
            print(
                f"{in_flight:9d} {row['p50_us']:8.0f} {row['p99_us']:8.0f} "
                f"{row['stages_per_s']:10,.0f} {row['daemon_cpu_us']:8.1f}"
            )
        if arguments.stages:
            rows.append(await _memory_run(client, pid, arguments))
    return rows


async def _one_run(client: Client, pid: int, in_flight: int, seconds: float) -> dict[str, float]:
    cpu, started = _cpu_s(pid), time.perf_counter()
    latencies = await _load(client, in_flight, seconds=seconds)
    spent = time.perf_counter() - started
    latencies.sort()
    return {
        "p50_us": 1e6 * latencies[len(latencies) // 2],
        "p99_us": 1e6 * latencies[len(latencies) * 99 // 100],
        "stages_per_s": len(latencies) / spent,
        "daemon_cpu_us": 1e6 * (_cpu_s(pid) - cpu) / len(latencies),
    }


async def _memory_run(client: Client, pid: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of the daemon over many stages, sampled after every tenth of them."""
    samples: list[float] = []
    for _ in range(_MEMORY_SAMPLES):
        await _load(client, 32, stages=arguments.stages // _MEMORY_SAMPLES)
        samples.append(_resident_mib(pid))
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
    }


async def _load(
    client: Client, in_flight: int, *, seconds: float = 1e9, stages: int = 1 << 62
) -> list[float]:
    """Latencies in seconds of all stages until the time or the number is reached."""
    end = time.perf_counter() + seconds
    latencies: list[float] = []

    async def worker() -> None:
        while time.perf_counter() < end and len(latencies) < stages:
            async with client.workflow(kind="bench") as workflow:
                for _ in range(STAGES_PER_WORKFLOW):
                    started = time.perf_counter()
                    await workflow.generate(MESSAGES, max_tokens=16)
                    latencies.append(time.perf_counter() - started)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return latencies


async def _until_engines(client: Client, count: int) -> None:
    end = time.monotonic() + READY_S
    while len((await client.status())["core"]["engines"]) < count:
        if time.monotonic() > end:
            raise RuntimeError(f"the echo engines did not join within {READY_S:g} s")
        await asyncio.sleep(0.05)


def _cpu_s(pid: int) -> float:
    """User and system time of a process, all threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
