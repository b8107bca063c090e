"""A backend without a host: what it emits, kept per attempt with the payloads as they are."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from chimera_daemon.engines.backend import AttemptEvent, Backend, BackendInfo, make_backend
from chimera_daemon.messages import (
    Api,
    EngineChunk,
    EngineFailed,
    EngineFinished,
    Run,
    Streamed,
)
from tests.engines.conftest import TEST_S, Rig
from tests.engines.fake_daemon import until


class Seen:
    """What came of one attempt."""

    def __init__(self, attempt_id: int) -> None:
        self.attempt_id = attempt_id
        self.offsets: list[int] = []
        self.chunks: list[Any] = []  # objects
        self.answers: list[EngineFinished | EngineFailed] = []
        self.payload: bytes | None = None  # of the answer

    @property
    def events(self) -> int:
        return len(self.chunks) + len(self.answers)

    async def finished(self) -> EngineFinished:
        await until(lambda: self.answers, f"an answer of attempt {self.attempt_id}")
        answer = self.answers[0]
        assert isinstance(answer, EngineFinished), answer
        return answer

    async def refused(self) -> str:
        """The message of a bad request."""
        await until(lambda: self.answers, f"an answer of attempt {self.attempt_id}")
        answer = self.answers[0]
        assert isinstance(answer, EngineFailed), answer
        assert (answer.code, answer.retryable) == ("bad_request", False), answer
        return answer.message

    @property
    def object(self) -> Any:
        """The answer's payload."""
        assert self.payload is not None
        return json.loads(self.payload)

    @property
    def streamed(self) -> Streamed:
        assert self.payload is not None
        return msgspec.json.decode(self.payload, type=Streamed)

    def text(self, choice: int = 0) -> str:
        """Of one choice, whole or from its chunks."""
        objects = self.chunks or [self.object]
        said = [c for o in objects for c in o["choices"] if c["index"] == choice]
        parts = [c["text"] if "text" in c else _content(c) for c in said]
        return "".join(parts)


def _content(choice: Any) -> str:
    return (choice.get("delta") or choice.get("message") or {}).get("content") or ""


class Direct:
    """Submits to a backend and is where its events go."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.seen: dict[int, Seen] = {}

    def submit(
        self,
        api: Api,
        payload: bytes,
        *,
        stream: bool = False,
        max_tokens: int = 1,
        priority: int = 0,
        logprobs: bool = False,
    ) -> Seen:
        seen = self.seen[len(self.seen) + 1] = Seen(len(self.seen) + 1)
        run = Run(seen.attempt_id, priority, max_tokens, stream, logprobs, api)
        self.backend.submit(run, payload)
        return seen

    def emit(self, message: AttemptEvent, payload: bytes | None = None) -> None:
        seen = self.seen[message.attempt_id]
        assert not seen.answers, "an event after the answer"
        if isinstance(message, EngineChunk):
            seen.offsets.append(message.offset)
            seen.chunks.append(json.loads(payload or b""))
        else:
            seen.payload = payload
            seen.answers.append(message)

    def suspend(self, reason: str) -> None:
        raise AssertionError(reason)

    def resume(self, info: BackendInfo) -> None:
        raise AssertionError(info)

    def died(self, reason: str) -> None:
        raise AssertionError(reason)


def run_direct(rig: Rig, test: Callable[[Direct], Awaitable[None]]) -> None:
    """Run a test coroutine with the rig's backend, which must be idle at the end of it."""

    async def run() -> None:
        if rig.shared is not None:
            backend, _, sink = rig.shared
            direct = sink.events = Direct(backend)
        else:
            backend = make_backend(rig.engine)
            direct = Direct(backend)
            await backend.start(direct)
        try:
            await test(direct)
            await until(lambda: backend.stats().running == 0, "an idle engine")
            assert (backend.progress(), backend.stats().waiting) == ({}, 0)
        finally:
            for attempt_id in direct.seen:
                backend.cancel(attempt_id)
            if rig.shared is None:
                await backend.close()

    rig.runner.run(asyncio.wait_for(run(), TEST_S))
