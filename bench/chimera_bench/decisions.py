"""`chimera bench overhead --decisions`: how long a decision takes at a given rate of stages.

Submits stages at random times, whatever comes back. A stage counts from its submission here to its
arrival at an engine, which says when that was. Two hops over sockets are in that, which the daemon
has no part in; so a bare socket is measured too, one hop away, and the daemon says itself how long
it took from having read a stage to having handed it to its other socket.
"""

import argparse
import asyncio
import contextlib
import random
import secrets
import select
import statistics
import time
from collections import Counter
from typing import Any

import msgspec
import zmq

from chimera_bench import doors, process_costs
from chimera_bench.loads import MAX_TOKENS, MESSAGES
from chimera_bench.paths import positive
from chimera_daemon import wire
from chimera_daemon.channel import make_socket
from chimera_daemon.client import connect
from chimera_daemon.durations import quantile
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Completion,
    Failure,
    Ping,
    Result,
    Submit,
)

_SETTLE_S = 1.0  # before stages count
_PATIENCE_S = 5.0  # for the last answers
_SEED = 0
_HWM = 100_000
_HEAD = (
    f"{'':22} {'p50 µs':>8} {'p99 µs':>8} {'late p99':>9} {'stages/s':>9} {'daemon CPU':>11} "
    f"{'by itself p50':>14} {'p99':>6}"
)
_decode_answer = msgspec.json.Decoder(Completion).decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that belong to it."""
    parser.add_argument("--decisions", type=positive, nargs="?", const=5000.0, metavar="PER_S",
                        help="instead measure submission to dispatch at so many stages a second "
                        "(default: %(const)g), which arrive at random")  # fmt: skip


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the bare socket and one for the daemon, which take turns. Raises ConfigError."""
    sides = ("bare socket, one hop", "daemon, two hops")
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    errors: Counter[str] = Counter()
    settings = {"policy": f'"{arguments.policy}"'}
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(doors.static_zmq(stamps=True))
        served = doors.chimera([], statics=doors.STATICS, stamps=True, settings=settings)
        door, _ = stack.enter_context(served)
        for number in range(arguments.runs):
            for side, each in zip(sides, (bare, door), strict=True):
                arrivals = Arrivals(each, arguments.decisions, _SEED + number)
                runs[side].append(await arrivals.run(arguments.seconds))
                errors += arrivals.errors
    print(_HEAD)
    rows: list[dict[str, Any]] = []
    for side in sides:
        row: dict[str, Any] = {"bench": "decisions", "side": side, "seed": _SEED}
        row["policy"] = arguments.policy
        row |= {"asked_per_s": arguments.decisions, "seconds": arguments.seconds}
        row |= {"runs": arguments.runs, "errors": dict(errors)}
        for name in runs[side][0]:
            values = sorted(run[name] for run in runs[side])
            row |= {name: statistics.median(values), f"{name}_max": values[-1]}
        rows.append(row)
        print(_line(row))
    if errors:
        print(f"ERRORS: {dict(errors)}")
    return rows


def _line(row: dict[str, Any]) -> str:
    line = (
        f"{row['side']:22} {row['p50_us']:8,.0f} {row['p99_us']:8,.0f} {row['late_p99_us']:9,.0f} "
        f"{row['stages_per_s']:9,.0f} {row['cpu']:11.0%}"
    )
    if "own_p99_us" in row:
        line += f" {row['own_p50_us']:14,.0f} {row['own_p99_us']:6,.0f}"
    return line


class Arrivals:
    """Stages that arrive as a Poisson process."""

    def __init__(self, door: doors.Door, per_s: float, seed: int) -> None:
        self.errors: Counter[str] = Counter()
        self._door, self._per_s = door, per_s
        self._random = random.Random(seed)
        self._name = secrets.token_hex(6)
        self._sent = 0
        self._under_way: dict[str, float] = {}  # when they left
        self._took_s: list[float] = []
        self._late_s: list[float] = []  # of this process, behind the time that was drawn
        self._payload = msgspec.json.encode({"messages": MESSAGES, "max_tokens": MAX_TOKENS})

    async def run(self, seconds: float) -> dict[str, float]:
        """Percentiles of one run."""
        context: zmq.Context[Any] = zmq.Context()
        identity = secrets.token_bytes(16).replace(b"\0", b"1")
        self._socket = make_socket(context, zmq.DEALER, hwm=_HWM, identity=identity)
        try:
            self._socket.connect(self._door.address)
            self._socket.send(wire.encode(Ping(PROTOCOL_VERSION)))
            await asyncio.to_thread(self._send, _SETTLE_S)
            own = await self._own()
            figures = await asyncio.to_thread(self._send, seconds)
            if own:
                counted = [now - then for now, then in zip(await self._own(), own, strict=True)]
                for name, level in (("own_p50_us", 0.5), ("own_p99_us", 0.99)):
                    figures[name] = 1e6 * quantile(counted, level)
                figures["own_count"] = sum(counted)
            return figures
        finally:
            self._socket.close(linger=0)
            context.term()

    async def _own(self) -> list[int]:
        """The daemon's own count, in the buckets of `durations`; none of a bare socket."""
        if not self._door.pid:
            return []
        async with connect(self._door.address, timeout_s=_PATIENCE_S) as client:
            return (await client.status())["decisions"]["buckets"]

    def _send(self, seconds: float) -> dict[str, float]:
        """Waits in `select`: timers of an event loop are too coarse."""
        self._took_s.clear()
        self._late_s.clear()
        cpu_s, started_s = process_costs.cpu_s(self._door.pid), time.perf_counter()
        due_s, end_s = started_s, started_s + seconds
        while due_s < end_s:
            self._read_until(due_s)
            self._submit(due_s)
            due_s += self._random.expovariate(self._per_s)
        spent_s = time.perf_counter() - started_s
        cpu_s = process_costs.cpu_s(self._door.pid) - cpu_s
        patient_s = time.perf_counter() + _PATIENCE_S
        while self._under_way and time.perf_counter() < patient_s:
            self._read_until(time.perf_counter() + 0.01)
        if self._under_way:
            self.errors["no answer"] += len(self._under_way)
            self._under_way.clear()
        self._took_s.sort()
        self._late_s.sort()
        return {
            "p50_us": 1e6 * self._took_s[len(self._took_s) // 2],
            "p99_us": 1e6 * self._took_s[len(self._took_s) * 99 // 100],
            "late_p99_us": 1e6 * self._late_s[len(self._late_s) * 99 // 100],
            "stages_per_s": len(self._late_s) / spent_s,
            "cpu": cpu_s / spent_s,
        }

    def _submit(self, due_s: float) -> None:
        self._sent += 1
        name = f"{self._name}-{self._sent}"
        submit = Submit(name, name, max_tokens=MAX_TOKENS, last=True)
        now_s = self._under_way[name] = time.perf_counter()
        self._late_s.append(now_s - due_s)
        self._socket.send_multipart((wire.encode(submit), self._payload))

    def _read_until(self, due_s: float) -> None:
        """Take answers until then; returns at once where it is past."""
        while True:
            while self._socket.poll(0):
                self._on_frames(self._socket.recv_multipart())
            pause_s = due_s - time.perf_counter()
            if pause_s <= 0.0:
                return
            select.select((self._socket,), (), (), pause_s)

    def _on_frames(self, frames: list[bytes]) -> None:
        message = wire.decode_client(frames[0])
        if isinstance(message, Result):
            left_s = self._under_way.pop(message.request_id)
            self._took_s.append(float(_decode_answer(frames[1]).text) - left_s)
        elif isinstance(message, Failure):
            self._under_way.pop(message.request_id, None)
            self.errors[message.code] += 1
