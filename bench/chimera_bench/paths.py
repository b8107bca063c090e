"""`chimera bench overhead --paths`: front doors side by side, ours and others', in one run.

All stand on the same cores at the same time and are asked in turn, round after round, by the same
load generators; what a door adds is against its own transport without a door, in the same round.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from chimera_bench import doors, process_costs, static_backend
from chimera_bench.doors import Door
from chimera_bench.loads import ClientLoad, Expected, HttpLoad, Load, Tally, ZmqLoad
from chimera_daemon.config import ConfigError

DIRECT = {"http": "HTTP, no door", "zmq": "ZeroMQ, no door"}
NAMES = {  # by the words of `--paths`
    "proxy": "chimera HTTP, proxy",
    "http": "chimera HTTP",
    "zmq": "chimera ZeroMQ",
    "client": "chimera client library",
}
FORMS = ("plain", "stream")
LEVELS = (1, 32, 256)
_CHUNKS = len(static_backend.WORDS)
_WARM_UP_S = 0.5  # before each run, and at most this part of it
_WARM_UP_SHARE = 0.25
_LEAST_ANSWERS = 100  # a run goes on until it has these
_LONGEST = 6.0  # but no longer than this many times the seconds asked for
_POLL_S = 0.05
_IDLE_S = 2.0
_HEAD = (
    f"{'':30} {'p50 µs':>8} {'p99 µs':>8} {'added p50':>10} {'added p99':>10} {'req/s':>9} "
    f"{'CPU s/1000':>11} {'MiB':>6}"
)


class Route(NamedTuple):
    """One way to an answer. ``direct`` names the route that it is held against."""

    name: str
    direct: str
    door: Door
    load: Callable[[], Load]
    expected: Expected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that belong to the comparison."""
    parser.add_argument("--paths", nargs="*", choices=tuple(NAMES), metavar="PATH",
                        help="compare front doors over the same backend instead, of ours these: "
                        f"{', '.join(NAMES)} (default: all)")  # fmt: skip
    parser.add_argument("--peer", type=_peer, action="append", default=[], metavar="NAME=PROGRAM",
                        help="compare with this router too: "
                        f"{', '.join(doors.PEERS)}; implies --paths")  # fmt: skip
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS),
                        help="with --paths; default: both")  # fmt: skip
    parser.add_argument("--workers", type=whole, default=1,
                        help="daemons of each of our doors; default: %(default)s")  # fmt: skip
    parser.add_argument("--gateways", type=whole, default=1,
                        help="processes of each of our gateways; default: %(default)s")  # fmt: skip
    parser.add_argument("--cpus", type=_cores, metavar="CORES",
                        help="stay on these cores with all processes, such as 0,1")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE",
                        help="write a Markdown page of --paths")  # fmt: skip


def _peer(text: str) -> tuple[str, str]:
    name, _, program = text.partition("=")
    if name not in doors.PEERS or not program:
        known = " or ".join(f"{each}=/path/to/{each}" for each in doors.PEERS)
        raise argparse.ArgumentTypeError(f"{text!r}: write {known}")
    return name, program


def whole(text: str) -> int:
    """A number of things, of which there is at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {number}")
    return number


def positive(text: str) -> float:
    """A measure above 0."""
    number = float(text)
    if not 0.0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"a number above 0, not {number:g}")
    return number


def _cores(text: str) -> set[int]:
    try:
        chosen = {int(core) for core in text.split(",")}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers, such as 0,1") from None
    if not chosen <= os.sched_getaffinity(0):
        there = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise argparse.ArgumentTypeError(f"{text!r}: this machine has {there}")
    return chosen


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all routes at all levels; prints a table of each. Raises ConfigError."""
    rows: list[dict[str, Any]] = []
    for form in arguments.forms:
        with contextlib.ExitStack() as stack:
            routes = list(_routes(arguments, form, stack))
            facts = await _facts(routes, arguments)
            for in_flight in arguments.in_flight or LEVELS:
                rows += await _level(routes, form, in_flight, arguments, facts)
    return rows


def _routes(
    arguments: argparse.Namespace, form: str, stack: contextlib.ExitStack
) -> Iterator[Route]:
    """Start everything, one after the other."""
    chosen, model, start = arguments.paths or list(NAMES), static_backend.MODEL, stack.enter_context
    expected = Expected(static_backend.TEXT, _CHUNKS if form == "stream" else 0)
    backend = start(doors.static_http())

    def over_http(name: str, door: Door, model: str) -> Route:
        load = HttpLoad(door.address, model)
        return Route(name, DIRECT["http"], door, lambda: load, expected)

    if arguments.peer or {"proxy", "http"} & set(chosen):
        yield over_http(DIRECT["http"], backend, model)
    for name, program in arguments.peer:
        yield over_http(name, start(doors.PEERS[name](program, backend)), model)
    policy = {"policy": f'"{arguments.policy}"'}
    daemon = partial(doors.chimera, workers=arguments.workers, settings=policy)
    up = partial(daemon, gateways=arguments.gateways)
    slots = max(arguments.in_flight or LEVELS)
    if "proxy" in chosen:
        _, door = start(up([doors.remote(backend, slots)]))
        yield over_http(NAMES["proxy"], door, "auto")
    if "http" in chosen:
        _, door = start(up([], statics=doors.STATICS))
        yield over_http(NAMES["http"], door, "auto")
    loads: dict[str, Callable[[Door], Load]] = {
        "zmq": lambda door: ZmqLoad(door.address, workers=arguments.workers),
        "client": lambda door: ClientLoad(door.address),
    }
    if not set(loads) & set(chosen):
        return
    bare = start(doors.static_zmq())
    yield Route(DIRECT["zmq"], DIRECT["zmq"], bare, lambda: ZmqLoad(bare.address), expected)
    door, _ = start(daemon([], statics=doors.STATICS))
    for name, load in loads.items():
        if name in chosen:
            # The client library joins chunks that arrive together, so their number says nothing.
            told = expected._replace(chunks=0) if name == "client" else expected
            yield Route(NAMES[name], DIRECT["zmq"], door, partial(load, door), told)


async def _facts(
    routes: Sequence[Route], arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """What all rows of a route say, by its name."""
    before = [_cpu_s(route.door) for route in routes]
    await asyncio.sleep(_IDLE_S)
    return {
        route.name: {
            "bench": "paths",
            "path": route.name,
            "direct": route.direct,
            "version": route.door.version,
            "idle_cpu": (_cpu_s(route.door) - cpu_s) / _IDLE_S,
            "seconds": arguments.seconds,
            "runs": arguments.runs,
            "workers": arguments.workers,
            "gateways": arguments.gateways,
            "policy": arguments.policy,
            "cpus": sorted(arguments.cpus or ()),
        }
        for route, cpu_s in zip(routes, before, strict=True)
    }


async def _level(
    routes: Sequence[Route],
    form: str,
    in_flight: int,
    arguments: argparse.Namespace,
    facts: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each route. They take turns; another one begins in each round."""
    runs: dict[str, list[dict[str, float]]] = {route.name: [] for route in routes}
    errors: dict[str, Counter[str]] = {route.name: Counter() for route in routes}
    for number in range(arguments.runs):
        first = number % len(routes)
        for route in (*routes[first:], *routes[:first]):
            tally, figures = await _one_run(route, form, in_flight, arguments.seconds)
            errors[route.name] += tally.errors
            runs[route.name].append(figures)
    print(f"\n{form}, {in_flight} in flight\n{_HEAD}")
    rows: list[dict[str, Any]] = []
    for route in routes:
        row = dict(facts[route.name]) | {"form": form, "in_flight": in_flight}
        row["errors"] = errors[route.name]
        row |= summary(runs[route.name], runs[route.direct])
        row["resident_mib"] = _resident_mib(route.door)
        rows.append(row)
        print(_line(row))
    return rows


async def _one_run(
    route: Route, form: str, in_flight: int, seconds: float
) -> tuple[Tally, dict[str, float]]:
    tally, load = Tally(route.expected), route.load()
    await load.start(in_flight, form == "stream", tally)
    await asyncio.sleep(min(_WARM_UP_S, _WARM_UP_SHARE * seconds))
    cpu_s, own_s, started_s = _cpu_s(route.door), time.process_time(), time.perf_counter()
    tally.begin()
    await asyncio.sleep(seconds)
    least = max(in_flight, _LEAST_ANSWERS)
    while len(tally.latencies_s) < least and time.perf_counter() < started_s + _LONGEST * seconds:
        await asyncio.sleep(_POLL_S)
    tally.end()
    spent_s = time.perf_counter() - started_s
    cpu_s, own_s = _cpu_s(route.door) - cpu_s, time.process_time() - own_s
    await load.stop()
    if not tally.latencies_s:
        raise ConfigError(f"{route.name}: no answer in {spent_s:.0f} s; {dict(tally.errors)}")
    answers = len(tally.latencies_s)
    p50, p99 = _percentiles(tally.latencies_s)
    return tally, {
        "p50_us": 1e6 * p50,
        "p99_us": 1e6 * p99,
        "first_p50_us": 1e6 * _percentiles(tally.firsts_s)[0],
        "requests_per_s": answers / spent_s,
        "cpu_s_per_1000": 1000.0 * cpu_s / answers,
        "load_cpu_s_per_1000": 1000.0 * own_s / answers,
    }


def _percentiles(values: list[float]) -> tuple[float, float]:
    """P50 and P99."""
    values.sort()
    return values[len(values) // 2], values[len(values) * 99 // 100]


def summary(
    runs: Sequence[Mapping[str, float]], direct: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """P20, P50 and P80 over the runs, of each figure and of what is added to the direct way."""
    figures = {name: [run[name] for run in runs] for name in runs[0]}
    for name in ("p50_us", "p99_us", "first_p50_us"):
        figures[f"added_{name}"] = [
            run[name] - other[name] for run, other in zip(runs, direct, strict=True)
        ]
    summary: dict[str, float] = {}
    for name, values in figures.items():
        summary[name] = statistics.median(values)
        cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values
        summary |= {f"{name}_p20": cuts[0], f"{name}_p80": cuts[-1]}
    return summary


def _cpu_s(door: Door) -> float:
    return sum(map(process_costs.cpu_s, _processes(door)))


def _resident_mib(door: Door) -> float:
    return sum(map(process_costs.resident_mib, _processes(door)))


def _processes(door: Door) -> list[int]:
    return [*process_costs.family(door.pid), *door.hosts] if door.pid else []


def _line(row: Mapping[str, Any]) -> str:
    line = (
        f"{row['path']:30} {row['p50_us']:8,.0f} {row['p99_us']:8,.0f} "
        f"{row['added_p50_us']:10,.0f} {row['added_p99_us']:10,.0f} {row['requests_per_s']:9,.0f} "
        f"{row['cpu_s_per_1000']:11.3f} {row['resident_mib']:6.0f}"
    )
    return f"{line}  ERRORS {row['errors']}" if row["errors"] else line
