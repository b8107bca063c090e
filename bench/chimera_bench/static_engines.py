"""Engines that answer at once with canned text, all in one process: what our doors lead to in
`chimera bench overhead`, as `static_backend` is what other routers lead to.

Each is an engine host of its own, with all that a host does; only its backend is none.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import uvloop

from chimera_bench import static_backend
from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import BackendInfo, Events
from chimera_daemon.engines.host import Host
from chimera_daemon.engines.payload import encode_completion, encode_delta
from chimera_daemon.messages import (
    EngineChunk,
    EngineFinished,
    EngineStats,
    Profile,
    Run,
    Streamed,
)

SLOTS = 1024
_CONTEXT_TOKENS = 32_768
_STATS = EngineStats()
_json = msgspec.json.Encoder().encode


class _Answer(NamedTuple):
    """In one form of the protocol: whole, or in chunks with their offsets, and what ends them."""

    whole: bytes
    chunks: Sequence[tuple[int, bytes]]
    end: bytes


def _as_text() -> _Answer:
    whole, offset, chunks = encode_completion(static_backend.TEXT), 0, list[tuple[int, bytes]]()
    for word in static_backend.WORDS:
        text = f" {word}" if chunks else word
        chunks.append((offset, encode_delta(text)))
        offset += len(text)
    return _Answer(whole, chunks, whole)


def _as_chat() -> _Answer:
    chunks = list(enumerate(static_backend.chunks()))
    return _Answer(static_backend.completion(), chunks, _json(Streamed(len(chunks))))


class StaticBackend:
    """A `Backend` that answers inside of `submit`, without a look at the request.

    ``stamps``: it says instead when the request came, in seconds by `time.perf_counter`, which is
    one clock for all processes of a machine.
    """

    def __init__(self, *, stamps: bool = False) -> None:
        self._stamps = stamps
        self._answers = {"text": _as_text(), "chat": _as_chat()}

    async def start(self, events: Events) -> BackendInfo:
        """See `Backend`."""
        self._events = events
        return BackendInfo(SLOTS, _CONTEXT_TOKENS, Profile())

    def submit(self, attempt: Run, payload: bytes) -> None:
        """See `Backend`."""
        if self._stamps:
            answer = encode_completion(str(time.perf_counter()))
        else:
            whole, chunks, end = self._answers[attempt.api]
            answer = end if attempt.stream else whole
            if attempt.stream:
                for offset, chunk in chunks:
                    self._events.emit(EngineChunk(attempt.attempt_id, offset), chunk)
        done = EngineFinished(attempt.attempt_id, static_backend.USAGE, "stop")
        self._events.emit(done, answer)

    def cancel(self, attempt_id: int) -> None:
        """See `Backend`. Nothing is ever under way."""

    def stats(self) -> EngineStats:
        """See `Backend`."""
        return _STATS

    def progress(self) -> dict[int, int]:
        """See `Backend`."""
        return {}

    async def close(self) -> None:
        """See `Backend`."""


async def serve(address: str, names: Sequence[str], *, stamps: bool = False) -> None:
    """An engine for each name, connected to a daemon's back address, until SIGTERM or SIGINT."""
    hosts = [
        Host(EngineConfig(name, name, "echo"), address, StaticBackend(stamps=stamps))
        for name in names
    ]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: [host.stop(0.0) for host in hosts])
    await asyncio.gather(*(host.run() for host in hosts))


def main(argv: Sequence[str] | None = None) -> None:
    """See `serve`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+")
    parser.add_argument("--connect", required=True, metavar="ADDRESS")
    parser.add_argument("--stamps", action="store_true", help="answer with the time of arrival")
    arguments = parser.parse_args(argv)
    uvloop.run(serve(arguments.connect, arguments.names, stamps=arguments.stamps))


if __name__ == "__main__":
    sys.exit(main())
