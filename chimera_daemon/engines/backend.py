"""The narrow interface between an engine host and what runs the model: submit, cancel, and events.

`host.py` knows sockets and no model, a backend a model and no sockets; this file knows neither.
"""

from typing import Protocol

from msgspec import Struct

from chimera_daemon.config import EngineConfig
from chimera_daemon.messages import (
    EngineChunk,
    EngineFailed,
    EngineFinished,
    EngineStats,
    Profile,
    Run,
)

AttemptEvent = EngineChunk | EngineFinished | EngineFailed


class EngineStartError(RuntimeError):
    """The engine cannot start as it is configured; the message says what to do about it."""


class BackendInfo(Struct, frozen=True):
    """What an engine is able to do, known once it has started."""

    max_inflight: int  # attempts that it runs at once
    context_tokens: int  # prompt and output together
    profile: Profile


class Events(Protocol):
    """Where a backend tells what happened: on the loop's thread, also from inside `submit`."""

    def emit(self, message: AttemptEvent, payload: bytes | None = None) -> None:
        """One chunk or the one answer of an attempt; chunks and answers carry a JSON payload."""
        ...

    def suspend(self, reason: str) -> None:
        """No new work until `resume`: the host signs off. Its attempts go on. Idempotent."""
        ...

    def resume(self, info: BackendInfo) -> None:
        """Work is welcome (again), with these abilities. Idempotent."""
        ...

    def died(self, reason: str) -> None:
        """The engine will never answer again; its attempts have been failed by `emit` before."""
        ...


class Backend(Protocol):
    """Something that runs attempts. Every attempt ends in one finished or failed event.

    A cancelled attempt emits nothing after `cancel` has returned. Attempts above ``max_inflight``
    are queued by the backend, by priority. No method but `start` and `close` may wait.
    """

    async def start(self, events: Events) -> BackendInfo:
        """Load, warm up and measure; raises `EngineStartError`."""
        ...

    def submit(self, attempt: Run, payload: bytes) -> None:
        """Begin an attempt; whatever is wrong with it comes back as an `EngineFailed`."""
        ...

    def cancel(self, attempt_id: int) -> None:
        """Stop an attempt and free its slot; an unknown or ended one is a no-op."""
        ...

    def stats(self) -> EngineStats:
        """What goes into the next heartbeat."""
        ...

    def progress(self) -> dict[int, int]:
        """Output tokens so far of every running attempt."""
        ...

    async def close(self) -> None:
        """Release everything; nothing is emitted afterwards."""
        ...


def make_backend(engine: EngineConfig) -> Backend:
    """The backend that this configuration names. Imports nothing heavy: `start` does."""
    match engine.kind:
        case "echo":
            from chimera_daemon.engines.echo import EchoBackend

            return EchoBackend.from_config(engine)
        case "openai":
            from chimera_daemon.engines.openai import RemoteBackend

            return RemoteBackend(engine)
        case "vllm":
            from chimera_daemon.engines.vllm import VllmBackend

            return VllmBackend(engine)
