"""The daemon's side of the back socket, as small as it can be, and a wait on conditions."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from chimera_daemon import wire
from chimera_daemon.channel import Channel, make_socket
from chimera_daemon.messages import (
    Abort,
    Completion,
    DaemonBeat,
    Delta,
    Deregister,
    EngineChunk,
    EngineFailed,
    EngineFinished,
    Heartbeat,
    Register,
    Run,
    Shutdown,
)

WAIT_S = 20.0


async def until(condition: Callable[[], object], what: str = "condition") -> None:
    """Wait until the condition holds; fails after `WAIT_S`."""
    deadline = asyncio.get_running_loop().time() + WAIT_S
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"waited {WAIT_S:.0f} s for: {what}")
        await asyncio.sleep(0.002)


class Attempt:
    """What came back for one attempt."""

    def __init__(self, attempt_id: int) -> None:
        self.attempt_id = attempt_id
        self.chunks: list[tuple[int, str]] = []  # (offset, text)
        self.answers: list[EngineFinished | EngineFailed] = []
        self.texts: list[str] = []

    @property
    def events(self) -> int:
        return len(self.chunks) + len(self.answers)

    async def answer(self) -> EngineFinished | EngineFailed:
        await until(lambda: self.answers, f"an answer of attempt {self.attempt_id}")
        return self.answers[0]

    async def finished(self) -> EngineFinished:
        answer = await self.answer()
        assert isinstance(answer, EngineFinished), answer
        return answer

    async def failed(self) -> EngineFailed:
        answer = await self.answer()
        assert isinstance(answer, EngineFailed), answer
        return answer

    @property
    def text(self) -> str:
        return self.texts[0]


class FakeDaemon:
    """Binds, answers every registration and heartbeat, and keeps what it is told."""

    def __init__(self, address: str, worker: int = 0, workers: int = 1) -> None:
        self.address = address
        self.worker = worker
        self.workers = workers
        self.board = ""
        self.daemon_id = "daemon-1"
        self.heartbeat_s = 0.02
        self.logprobs = False
        self.version: int | None = None
        self.registers: list[Register] = []
        self.beats: list[Heartbeat] = []
        self.deregisters: list[Deregister] = []
        self.order: list[int] = []  # attempts as they were answered
        self.attempts: dict[int, Attempt] = {}
        self.known: set[bytes] = set()
        self.identity = b""
        self._next = worker
        self._context: zmq.Context[Any] | None = None

    def start(self) -> None:
        self._context = zmq.Context()
        socket = make_socket(self._context, zmq.ROUTER, hwm=4096)
        socket.bind(self.address)
        self._channel = Channel(socket, self._on_frames)

    def stop(self) -> None:
        if self._context is not None:
            self._channel.close()
            self._context.term()
            self._context = None

    def restart(self, daemon_id: str) -> None:
        """Another daemon in this one's place: it knows nothing."""
        self.stop()
        self.daemon_id = daemon_id
        self.known.clear()
        self.start()

    async def ready(self, registers: int = 1) -> Register:
        await until(lambda: len(self.registers) >= registers, f"{registers} registrations")
        return self.registers[-1]

    async def beat(self) -> Heartbeat:
        """A heartbeat that began after this call."""
        seen = len(self.beats)
        await until(lambda: len(self.beats) > seen + 1, "two heartbeats")
        return self.beats[-1]

    def submit(
        self,
        payload: bytes,
        max_tokens: int = 8,
        *,
        stream: bool = False,
        priority: int = 0,
        attempt_id: int | None = None,
    ) -> Attempt:
        self._next += self.workers
        attempt = Attempt(self._next if attempt_id is None else attempt_id)
        self.attempts[attempt.attempt_id] = attempt
        run = Run(attempt.attempt_id, priority, max_tokens, stream, self.logprobs)
        self.raw(wire.encode(run), payload)
        return attempt

    def abort(self, attempt_id: int) -> None:
        self.raw(wire.encode(Abort(attempt_id)))

    def shutdown(self) -> None:
        self.raw(wire.encode(Shutdown("test")))

    def raw(self, *frames: bytes) -> None:
        assert self._channel.send([self.identity, *frames])

    def _on_frames(self, frames: list[bytes]) -> None:
        identity, header = frames[0], frames[1]
        self.identity = identity
        message = wire.decode_back(header)
        match message:
            case Register():
                self.registers.append(message)
                self.known.add(identity)
                self._answer(identity)
            case Heartbeat():
                self.beats.append(message)
                self._answer(identity)
            case Deregister():
                self.deregisters.append(message)
            case EngineChunk():
                text = msgspec.json.decode(frames[2], type=Delta).text
                self._attempt(message.attempt_id).chunks.append((message.offset, text))
            case EngineFinished():
                attempt = self._attempt(message.attempt_id)
                attempt.texts.append(msgspec.json.decode(frames[2], type=Completion).text)
                attempt.answers.append(message)
                self.order.append(message.attempt_id)
            case EngineFailed():
                self._attempt(message.attempt_id).answers.append(message)
                self.order.append(message.attempt_id)

    def _attempt(self, attempt_id: int) -> Attempt:
        return self.attempts.setdefault(attempt_id, Attempt(attempt_id))

    def _answer(self, identity: bytes) -> None:
        beat = DaemonBeat(
            self.daemon_id,
            identity in self.known,
            self.heartbeat_s,
            worker=self.worker,
            workers=self.workers,
            board=self.board,
        )
        if self.version is not None:
            beat = msgspec.structs.replace(beat, v=self.version)
        self._channel.send([identity, wire.encode(beat)])
