"""`chimera bench soak`: many streams for a long time, and clients that go away in the middle.

Looks at what must not happen: an error, memory that grows, a count that stays. Echo engines with a
token clock stand behind the door; the whole text of every stream is checked.
"""

import argparse
import asyncio
import contextlib
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import uvloop

from chimera_bench import doors, machine, process_costs
from chimera_bench.doors import Door
from chimera_bench.loads import Expected, HttpLoad, Load, Tally, ZmqLoad, chat_request
from chimera_bench.paths import positive, whole
from chimera_daemon.board import Board, Row
from chimera_daemon.client import Client, connect
from chimera_daemon.config import ConfigError

GROWTH = 0.05  # of memory, from the end of the first minute on
FREE_S = 2.0  # for every slot and count, once clients have gone
_FIRST_S = 60.0  # memory settles,
_FIRST_SHARE = 0.25  # in short runs in this part of them
_SAMPLES = 120
_LEAST_SAMPLE_S = 0.5
_AT_EACH_END = 3  # samples, of which the median counts
_GROUPS = 20  # of streams, which begin at different times
_LEAVE_BEFORE = 0.75  # of a stream: clients that go away do so somewhere before
_GIVE_UP_S = 30.0  # waiting for counts to become zero
_LATE = 5.0  # a stream may take so many times as long as its tokens
_POLL_S = 0.02
_SEED = 0
_OPEN_FILES = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera bench soak`."""
    parser.add_argument("--streams", type=whole, default=1000,
                        help="at any time; default: %(default)s")  # fmt: skip
    parser.add_argument("--tokens", type=whole, default=256,
                        help="of each stream; default: %(default)s")  # fmt: skip
    parser.add_argument("--minutes", type=_minutes, default=10.0,
                        help="0: leave this part out; default: %(default)s")  # fmt: skip
    parser.add_argument("--disconnect", type=_clients, default=2000, metavar="CLIENTS",
                        help="then let half of so many clients go away in the middle of their "
                        "streams; 0: leave this part out; default: %(default)s")  # fmt: skip
    parser.add_argument("--tokens-per-s", type=positive, default=10_000.0,
                        help="of all streams together; default: %(default)g")  # fmt: skip
    parser.add_argument("--door", choices=("http", "zmq"), default="http",
                        help="of the long part; default: %(default)s")  # fmt: skip
    parser.add_argument("--workers", type=whole, default=1, help="daemons; default: %(default)s")
    parser.add_argument("--gateways", type=whole, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="append JSONL rows to this file")


def _clients(text: str) -> int:
    number = int(text)
    if number < 0 or number == 1:
        raise argparse.ArgumentTypeError(f"0, or at least 2, not {number}")
    return number


def _minutes(text: str) -> float:
    number = float(text)
    if not 0.0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"at least 0, not {number:g}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run both parts, print a verdict, append rows; the exit code is 1 if a bound is broken."""
    facts = machine.facts()
    _allow_open_files()
    rows: list[dict[str, Any]] = []
    if arguments.minutes > 0:
        rows += uvloop.run(_with_door(arguments, arguments.streams, _long))
    if arguments.disconnect > 0:
        rows += uvloop.run(_with_door(arguments, arguments.disconnect, _disconnect))
    if arguments.out is not None:
        machine.append_rows(arguments.out, [row | facts for row in rows])
        print(f"rows: {arguments.out}")
    return int(any(row.get("broken") for row in rows))


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Scene(NamedTuple):
    """A running Chimera and the ways to look into it."""

    arguments: argparse.Namespace
    zmq: Door
    http: Door
    client: Client
    board: Board | None
    stream_s: float  # that a stream takes
    expected: Expected


_Part = Callable[[_Scene], Any]


async def _with_door(
    arguments: argparse.Namespace, streams: int, part: _Part
) -> list[dict[str, Any]]:
    """Start Chimera for so many streams at once, and let ``part`` make rows of it."""
    tokens, step_s = arguments.tokens, streams / arguments.tokens_per_s
    options = f"slots = {streams}, reply_tokens = [{tokens}, {tokens}], step_s = {step_s}"
    engines = [engine._replace(args=options) for engine in doors.ECHOES]
    async with contextlib.AsyncExitStack() as stack:
        up = doors.chimera(engines, gateways=arguments.gateways, workers=arguments.workers)
        over_zmq, over_http = stack.enter_context(up)
        client = await stack.enter_async_context(connect(over_zmq.address, timeout_s=doors.READY_S))
        path = doors.of_workers(await client.status())[0]["board"]["path"]
        board = stack.enter_context(Board.open(path)) if path else None
        scene = _Scene(
            arguments, over_zmq, over_http, client, board, tokens * step_s, Expected("", tokens)
        )
        return await part(scene._replace(expected=await _expected(scene)))


async def _expected(scene: _Scene) -> Expected:
    """The text that the engines say to the bench's prompt: asked for once."""
    tally, load = Tally(), _load(scene)
    await load.start(1, True, tally)
    tally.end()
    await load.stop(_patience_s(scene))
    if tally.text is None or len(tally.text.split()) != scene.arguments.tokens:
        raise ConfigError(f"{tally.text!r} is not what an echo engine says; {dict(tally.errors)}")
    return Expected(tally.text, scene.arguments.tokens)


def _load(scene: _Scene, door: str | None = None) -> Load:
    tokens, workers = scene.arguments.tokens, scene.arguments.workers
    if (door or scene.arguments.door) == "zmq":
        return ZmqLoad(scene.zmq.address, workers=workers, max_tokens=tokens, stages=1)
    return HttpLoad(scene.http.address, "auto", max_tokens=tokens)


def _patience_s(scene: _Scene) -> float:
    """For a stream under way to end."""
    return _GIVE_UP_S + _LATE * scene.stream_s


# Many streams for a long time.


async def _long(scene: _Scene) -> list[dict[str, Any]]:
    arguments = scene.arguments
    seconds = 60.0 * arguments.minutes
    tally, loads = Tally(scene.expected), list[Load]()
    samples: list[dict[str, Any]] = []
    started_s = time.monotonic()
    for group in range(_GROUPS):
        share = len(range(group, arguments.streams, _GROUPS))
        if share:
            loads.append(_load(scene))
            await loads[-1].start(share, True, tally)
            await asyncio.sleep(min(scene.stream_s, _FIRST_SHARE * seconds) / _GROUPS)
    tally.begin()
    pause_s = max(_LEAST_SAMPLE_S, seconds / _SAMPLES)
    while time.monotonic() < started_s + seconds:
        samples.append(await _sample(scene, time.monotonic() - started_s, tally))
        await asyncio.sleep(pause_s)
    streams, latencies_s = tally.right, sorted(tally.latencies_s)
    tally.end()
    await asyncio.gather(*(load.stop(_patience_s(scene)) for load in loads))
    zero_s, left = await _until_zero(scene)
    grown = growth(samples, min(_FIRST_S, _FIRST_SHARE * seconds))
    row: dict[str, Any] = {
        "bench": "soak",
        "door": arguments.door,
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "tokens_per_s_asked": arguments.tokens_per_s,
        "workers": arguments.workers,
        "gateways": arguments.gateways,
        "minutes": arguments.minutes,
        "answers": streams,
        "tokens_per_s": streams * arguments.tokens / seconds,
        "p50_s": latencies_s[len(latencies_s) // 2] if latencies_s else None,
        "p99_s": latencies_s[len(latencies_s) * 99 // 100] if latencies_s else None,
        "errors": dict(tally.errors),
        "growth": grown,
        "zero_s": zero_s,
        "left": left,
    }
    row["broken"] = [
        *(f"{count} times: {why}" for why, count in tally.errors.items()),
        *(
            f"memory of {role} grew by {share:.1%}, more than {GROWTH:.0%}"
            for role, share in grown.items()
            if share > GROWTH
        ),
        *late("after the last stream", zero_s, left),
        *([] if streams else ["no stream ended"]),
    ]
    print(
        f"{arguments.streams} streams of {arguments.tokens} tokens over {arguments.door} for "
        f"{arguments.minutes:g} min: {streams:,} answers, {row['tokens_per_s']:,.0f} tokens/s"
    )
    for role, share in grown.items():
        first, last = samples[0]["resident_mib"][role], samples[-1]["resident_mib"][role]
        print(f"  memory of {role}: {first:.1f} MiB at the start, {last:.1f} MiB at the end, "
              f"{share:+.1%} from the first minute on")  # fmt: skip
    _verdict(row)
    return [*samples, row]


async def _sample(scene: _Scene, at_s: float, tally: Tally) -> dict[str, Any]:
    status = await scene.client.status()
    return {
        "bench": "soak_sample",
        "at_s": at_s,
        "answers": tally.right,
        "errors": sum(tally.errors.values()),
        "resident_mib": process_costs.resident_by_role(scene.zmq.pid),
        "counts": counts(doors.of_workers(status), scene.board.read() if scene.board else ()),
    }


def growth(samples: Sequence[Mapping[str, Any]], first_s: float) -> dict[str, float]:
    """Of each role's memory, from ``first_s`` on to the last sample."""
    settled = [s["resident_mib"] for s in samples if s["at_s"] >= first_s]
    if not settled:
        return {}

    def middle(some: Sequence[Mapping[str, float]], role: str) -> float:
        return statistics.median(each.get(role, 0.0) for each in some)

    return {
        role: middle(settled[-_AT_EACH_END:], role) / middle(settled[:_AT_EACH_END], role) - 1.0
        for role in settled[0]
    }


# Clients that go away.


async def _disconnect(scene: _Scene) -> list[dict[str, Any]]:
    """Half of the clients leave at random points; the others must get their whole streams."""
    arguments = scene.arguments
    clients = arguments.disconnect
    kept, leaving = clients - clients // 2, clients // 2
    draw = random.Random(_SEED)
    tally, staying = Tally(scene.expected), HttpLoad(
        scene.http.address, "auto", max_tokens=arguments.tokens
    )  # fmt: skip
    request = chat_request(scene.http.address, "auto", True, arguments.tokens)
    host, _, port = scene.http.address.rpartition(":")
    last = int(_LEAVE_BEFORE * arguments.tokens)
    leavers = [_Leaver(request, draw.randint(0, last), draw.random() < 0.5) for _ in range(leaving)]
    loop = asyncio.get_running_loop()
    await asyncio.gather(
        staying.start(kept, True, tally),
        *(loop.create_connection(lambda each=each: each, host, int(port)) for each in leavers),
    )
    tally.end()  # one stream for each
    await asyncio.wait([leaver.left for leaver in leavers], timeout=_patience_s(scene))
    stuck = sum(not leaver.left.done() for leaver in leavers)
    freed_s, held = await _until(scene, lambda: staying.unfinished)
    await staying.stop(_patience_s(scene))
    zero_s, left = await _until_zero(scene)
    row: dict[str, Any] = {
        "bench": "disconnect",
        "clients": clients,
        "left_early": leaving - stuck,
        "tokens": arguments.tokens,
        "tokens_per_s_asked": arguments.tokens_per_s,
        "workers": arguments.workers,
        "gateways": arguments.gateways,
        "seed": _SEED,
        "answers": tally.right,
        "errors": dict(tally.errors),
        "freed_s": freed_s,
        "held": held,
        "zero_s": zero_s,
        "left": left,
    }
    wrong = [leaver.wrong for leaver in leavers if leaver.wrong]
    row["broken"] = [
        *(f"{count} times: {why}" for why, count in tally.errors.items()),
        *([f"{stuck} clients got no stream to leave"] if stuck else []),
        *([f"{len(wrong)} clients that left were refused before: {wrong[0]}"] if wrong else []),
        *late("after the last client went away", freed_s, held),
        *late("after the last stream", zero_s, left),
        *([] if tally.right == kept else [f"{tally.right} of {kept} streams were whole"]),
    ]
    print(f"{leaving} of {clients} clients went away: slots and counts of theirs free "
          f"{freed_s:.2f} s after the last one; all counts zero {zero_s:.2f} s after the last "
          f"of the other streams, {tally.right} of {kept} whole")  # fmt: skip
    _verdict(row)
    return [row]


class _Leaver(asyncio.Protocol):
    """A client that closes its connection, politely or not, after so many events of its stream."""

    def __init__(self, request: bytes, leave_after: int, politely: bool) -> None:
        self._request, self._leave_after, self._politely = request, leave_after, politely
        self._head, self._events = b"", 0
        self.wrong = ""  # first line of an answer that is none
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._transport.write(self._request)
        self._leave_if_due()

    def data_received(self, data: bytes) -> None:
        if not self._head:
            self._head = data
            if not data.startswith(b"HTTP/1.1 200 "):
                self.wrong = data.partition(b"\r\n")[0].decode("latin-1")
        self._events += data.count(b"data: ")
        self._leave_if_due()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.left.done():
            self.wrong = self.wrong or "the connection was closed from there"
            self.left.set_result(None)

    def _leave_if_due(self) -> None:
        if self._events >= self._leave_after and not self.left.done():
            self.left.set_result(None)
            if self._politely:
                self._transport.close()
            else:
                self._transport.abort()


# Counts.


def counts(workers: Sequence[Mapping[str, Any]], board: Sequence[Row]) -> dict[str, int]:
    """What is at work somewhere, by the snapshots of all workers and by the board."""
    found = {"stages running": 0, "stages waiting": 0, "workflows": 0, "slots taken": 0}
    for worker in workers:
        core = worker["core"]
        found["stages running"] += core["stages"]["running"]
        found["stages waiting"] += core["stages"]["waiting"]
        found["workflows"] += core["workflows"]
        found["slots taken"] += sum(engine["running"] for engine in core["engines"])
    for row in board:
        for what, position in _OF_BOARD[row.role if row.role != "worker" else _about(row.key)]:
            found[what] = found.get(what, 0) + row.values[position]
    return found


# What of a line must be zero when nobody asks anything, and where it stands.
_OF_BOARD: dict[str, tuple[tuple[str, int], ...]] = {
    "engine": (
        ("board: running at engines", 0),
        ("board: waiting at engines", 1),
        ("board: attempts at engines", 5),
    ),
    "worker engine": (("board: in flight", 0), ("board: tokens due", 1)),
    "worker model": (("board: stages waiting", 0), ("board: tokens waiting", 1)),
    "gateway": (
        ("board: requests at gateways", 1),
        ("board: streams at gateways", 2),
        ("board: bytes unread", 5),
    ),
}


def _about(key: str) -> str:
    return "worker " + key.partition(":")[0]


async def _until_zero(scene: _Scene) -> tuple[float, dict[str, int]]:
    return await _until(scene, lambda: 0)


async def _until(scene: _Scene, most: Callable[[], int]) -> tuple[float, dict[str, int]]:
    """Seconds until no count of requests is above ``most``, and what is still above then."""
    started_s = time.monotonic()
    while True:
        status = await scene.client.status()
        rows = scene.board.read() if scene.board else []
        allowed = most()
        above = {
            what: count
            for what, count in counts(doors.of_workers(status), rows).items()
            if count > allowed and not (allowed and ("tokens" in what or "bytes" in what))
        }
        spent_s = time.monotonic() - started_s
        if not above or spent_s > _GIVE_UP_S:
            return spent_s, above
        await asyncio.sleep(_POLL_S)


def late(when: str, spent_s: float, above: Mapping[str, int]) -> list[str]:
    if above:
        return [f"{spent_s:.0f} s {when} there were still {dict(above)}"]
    return [f"counts were right {spent_s:.2f} s {when}, later than {FREE_S:g} s"] * (
        spent_s > FREE_S
    )


def _verdict(row: Mapping[str, Any]) -> None:
    for broken in row["broken"]:
        print(f"  BROKEN: {broken}")
    if not row["broken"]:
        print("  all bounds kept")
