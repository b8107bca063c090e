"""`chimera bench overhead --decisions`: how long a decision takes at a given rate of stages.

Submits stages at random times, whatever comes back, and is itself the engines: a stage counts from
its submission to the arrival of its `Run`, on one clock. Two hops over sockets are in that, and
this process; so the same is measured of a bare socket that answers at once.
"""

import argparse
import asyncio
import contextlib
import random
import secrets
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
from chimera_daemon.channel import Channel, make_socket
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Completion,
    EngineFinished,
    EngineStats,
    Failure,
    Heartbeat,
    Ping,
    Profile,
    Register,
    Result,
    Run,
    Submit,
    Usage,
)

_MODELS = ("small", "large")
_SLOTS = 1024
_CONTEXT_TOKENS = 32_768
_HEARTBEAT_S = 0.5
_DIGITS = 10  # of a stage's number, at the end of its payload
_SETTLE_S = 1.0  # before stages count, and after the last one
_SEED = 0
_HWM = 100_000
_HEAD = f"{'':22} {'p50 µs':>8} {'p99 µs':>8} {'late p99':>9} {'stages/s':>9} {'daemon CPU':>11}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that belong to it."""
    parser.add_argument("--decisions", type=positive, nargs="?", const=5000.0, metavar="PER_S",
                        help="instead measure submission to dispatch at so many stages a second "
                        "(default: %(const)g), which arrive at random")  # fmt: skip


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the bare socket and one for the daemon, which take turns. Raises ConfigError."""
    sides = ("bare socket", "daemon")
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    errors: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(doors.static_zmq())
        door, _ = stack.enter_context(
            doors.chimera([], settings={"policy": f'"{arguments.policy}"'})
        )
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
        print(f"{side:22} {row['p50_us']:8,.0f} {row['p99_us']:8,.0f} {row['late_p99_us']:9,.0f} "
              f"{row['stages_per_s']:9,.0f} {row['cpu']:11.0%}")  # fmt: skip
    if errors:
        print(f"ERRORS: {dict(errors)}")
    return rows


class Arrivals:
    """Stages that arrive as a Poisson process, and the engines that they are dispatched to."""

    def __init__(self, door: doors.Door, per_s: float, seed: int) -> None:
        self.errors: Counter[str] = Counter()
        self.door, self._per_s = door, per_s
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._sent_s: list[float] = []
        self._took_s: list[float] = []
        self._late_s: list[float] = []  # of this process, behind the time that was drawn
        self._answered = 0
        self._name = secrets.token_hex(6)
        body = msgspec.json.encode({"messages": MESSAGES, "max_tokens": MAX_TOKENS})
        self._payload = body[:-1] + b',"number":"%s"}'
        self._tail = slice(-_DIGITS - 2, -2)

    async def run(self, seconds: float) -> dict[str, float]:
        """Percentiles of one run."""
        context: zmq.Context[Any] = zmq.Context()
        identity = secrets.token_bytes(16).replace(b"\0", b"1")
        socket = make_socket(context, zmq.DEALER, hwm=_HWM, identity=identity)
        socket.connect(self.door.address)
        self._front = Channel(socket, self._on_front)
        self._front.send((wire.encode(Ping(PROTOCOL_VERSION)),))
        engines = [_Engine(self, context, model) for model in _MODELS if self.door.pid]
        try:
            await asyncio.sleep(_SETTLE_S)
            await self._send(_SETTLE_S)
            return await self._send(seconds)
        finally:
            for engine in engines:
                engine.close()
            self._front.close()
            context.term()

    async def _send(self, seconds: float) -> dict[str, float]:
        cpu_s, started_s = process_costs.cpu_s(self.door.pid), time.perf_counter()
        self._took_s.clear()
        self._late_s.clear()
        await asyncio.to_thread(self._keep_time, seconds)
        spent_s = time.perf_counter() - started_s
        cpu_s = process_costs.cpu_s(self.door.pid) - cpu_s
        await asyncio.sleep(_SETTLE_S)
        if self._answered < len(self._sent_s):
            self.errors["no answer"] += len(self._sent_s) - self._answered
        self._took_s.sort()
        self._late_s.sort()
        return {
            "p50_us": 1e6 * self._took_s[len(self._took_s) // 2],
            "p99_us": 1e6 * self._took_s[len(self._took_s) * 99 // 100],
            "late_p99_us": 1e6 * self._late_s[len(self._late_s) * 99 // 100],
            "stages_per_s": len(self._late_s) / spent_s,
            "cpu": cpu_s / spent_s,
        }

    def _keep_time(self, seconds: float) -> None:
        """Runs in a thread: timers of the event loop are too coarse."""
        due_s = time.perf_counter()
        end_s = due_s + seconds
        while due_s < end_s:
            pause_s = due_s - time.perf_counter()
            if pause_s > 0.0:
                time.sleep(pause_s)
            self._loop.call_soon_threadsafe(self._submit, due_s)
            due_s += self._random.expovariate(self._per_s)

    def _submit(self, due_s: float) -> None:
        number = len(self._sent_s)
        name = f"{self._name}-{number}"
        submit = Submit(name, name, max_tokens=MAX_TOKENS, last=True)
        payload = self._payload % b"%0*d" % (_DIGITS, number)
        now_s = time.perf_counter()
        self._sent_s.append(now_s)
        self._late_s.append(now_s - due_s)
        self._front.send((wire.encode(submit), payload))

    def arrived(self, payload: bytes) -> None:
        """This stage is at an engine."""
        self._took_s.append(time.perf_counter() - self._sent_s[int(payload[self._tail])])

    def _on_front(self, frames: list[bytes]) -> None:
        message = wire.decode_client(frames[0])
        if isinstance(message, Result):
            self._answered += 1
            if not self.door.pid:
                number = int(message.request_id.rpartition("-")[2])
                self._took_s.append(time.perf_counter() - self._sent_s[number])
        elif isinstance(message, Failure):
            self.errors[message.code] += 1


class _Engine:
    """An engine host that answers at once and looks at nothing."""

    def __init__(self, arrivals: Arrivals, context: "zmq.Context[Any]", model: str) -> None:
        self._arrivals = arrivals
        self._model, self._incarnation = model, secrets.randbits(48)
        self._loop = asyncio.get_running_loop()
        self._payload = msgspec.json.encode(Completion("21"))
        socket = make_socket(context, zmq.DEALER, hwm=_HWM, identity=secrets.token_hex(8).encode())
        socket.connect(arrivals.door.back)
        self._channel = Channel(socket, self._on_frames)
        register = Register(
            model, self._incarnation, model, "bench", _SLOTS, _CONTEXT_TOKENS, Profile(),
            PROTOCOL_VERSION,
        )  # fmt: skip
        self._channel.send((wire.encode(register),))
        self._beat()

    def close(self) -> None:
        self._timer.cancel()
        self._channel.close()

    def _beat(self) -> None:
        beat = Heartbeat(self._model, self._incarnation, EngineStats())
        self._channel.send((wire.encode(beat),))
        self._timer = self._loop.call_later(_HEARTBEAT_S, self._beat)

    def _on_frames(self, frames: list[bytes]) -> None:
        message = wire.decode_engine(frames[0])
        if isinstance(message, Run):
            self._arrivals.arrived(frames[1])
            done = EngineFinished(message.attempt_id, Usage(48, MAX_TOKENS), "stop")
            self._channel.send((wire.encode(done), self._payload))
