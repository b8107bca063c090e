"""A daemon with real sockets and echo engines on one loop, and peers that break the rules."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import msgspec
import uvloop
import zmq

from chimera_daemon.channel import Channel, make_socket
from chimera_daemon.client import Client, Reply, connect
from chimera_daemon.config import Config, EngineConfig, PredictorConfig
from chimera_daemon.daemon import Daemon, EngineWatcher
from chimera_daemon.engines.host import Host
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Chunk,
    Completion,
    Failure,
    FrontMessage,
    Ping,
    Pong,
    Profile,
    Register,
    Result,
    Run,
    StatusReply,
    Submit,
    ToClient,
    ToEngine,
)
from chimera_daemon.prior import Predictor, PriorPredictor
from chimera_daemon.wire import decode_client, decode_engine, encode

T = TypeVar("T")
M = TypeVar("M")
TEST_S = 50.0
WAIT_S = 30.0
ASK = [{"role": "user", "content": "2 + 2 = ?"}]


def run(test: Awaitable[T]) -> T:
    """Run to the end on uvloop, as the daemon does; a test that hangs fails."""

    async def limited() -> T:
        return await asyncio.wait_for(test, TEST_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(limited())


async def until(condition: Callable[[], object], what: str = "condition") -> None:
    """Wait until the condition holds."""
    end = asyncio.get_running_loop().time() + WAIT_S
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"waited in vain for: {what}"
        await asyncio.sleep(0.002)


def body(text: str = "2 + 2 = ?", **fields: Any) -> bytes:
    """A chat body."""
    return json.dumps({"messages": [{"role": "user", "content": text}]} | fields).encode()


class World:
    """``async with World(tmp_path) as world``; the state is checked at the end."""

    def __init__(
        self,
        folder: Path,
        *,
        predictor: Predictor | None = None,
        watcher: EngineWatcher | None = None,
        make_predictor: Callable[[Config, PriorPredictor], Predictor] | None = None,
        limits: PredictorConfig | None = None,
        **settings: Any,
    ) -> None:
        settings = {
            "heartbeat_s": 0.05,
            "engine_timeout_s": 5.0,
            "client_timeout_s": 30.0,
        } | settings
        self.config = Config(
            front=f"ipc://{folder}/f",
            back=f"ipc://{folder}/b",
            predictor=limits or PredictorConfig(),
            **settings,
        )
        prior = PriorPredictor(self.config)
        if make_predictor is not None:
            predictor = make_predictor(self.config, prior)
        self.daemon = Daemon(self.config, predictor, watcher, prior)
        self.core = self.daemon._core
        self.hosts: dict[str, tuple[Host, asyncio.Task[int]]] = {}
        self._raws: list[Raw[Any]] = []

    async def __aenter__(self) -> Self:
        await self.daemon.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.check()
        for raw in self._raws:
            raw.close()
        for name in list(self.hosts):
            await self.kill(name)
        self.daemon.close()

    def check(self) -> None:
        """The daemon's books agree with the core's, and with each other."""
        daemon = self.daemon
        self.core.check()
        assert set(daemon._requests) == set(self.core._live)
        assert set(daemon._answers) == set(self.core._answered)
        assert set(daemon._attempts) == set(self.core._attempts)
        assert set(daemon._engines) == set(self.core._engines)
        assert list(daemon._links.values()) == list(daemon._engines.values())
        assert not daemon._events
        assert not daemon._feeding
        assert daemon.counters["internal_errors"] == 0
        held = [key for client in daemon._clients.values() for key in client.requests]
        assert sorted(held) == sorted(daemon._requests)

    def check_empty(self) -> None:
        """Nothing is left of any request but the answers that are kept."""
        self.check()
        daemon = self.daemon
        assert not daemon._requests
        assert not daemon._predicting
        assert not daemon._attempts
        assert not any(c.requests or c.outbox or c.outbox_bytes for c in daemon._clients.values())
        assert self.core.idle
        snapshot = self.core.snapshot()
        for engine in snapshot["engines"]:
            assert engine["running"] == 0 == engine["predicted_tokens"]
        for view in snapshot["models"]:
            assert view["waiting"] == view["running"] == view["claims"] == 0

    async def join(
        self, name: str = "e", model: str = "m", max_inflight: int | None = None, **options: Any
    ) -> Host:
        """An echo engine that is registered."""
        engine = EngineConfig(name, model, "echo", max_inflight=max_inflight, args=options)
        host = Host(engine, self.config.back)
        self.hosts[name] = host, asyncio.ensure_future(host.run())
        await until(lambda: self.core.has_engine(name, host.incarnation), f"engine {name}")
        return host

    async def kill(self, name: str) -> None:
        """The host goes without a word."""
        _, task = self.hosts.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def client(self, **settings: Any) -> Any:
        """A connection of the real client."""
        return connect(self.config.front, timeout_s=WAIT_S, **settings)

    def raw(self, identity: bytes | None = None) -> "RawClient":
        """A bare DEALER at the front."""
        raw = RawClient(self.config.front, identity)
        self._raws.append(raw)
        return raw

    def raw_host(self, identity: bytes | None = None) -> "RawHost":
        """A bare DEALER at the back."""
        raw = RawHost(self.config.back, identity)
        self._raws.append(raw)
        return raw

    async def serves(self) -> Reply:
        """A normal request, of a normal client that comes now, gets its answer."""
        async with self.client() as client, client.workflow() as workflow:
            return await workflow.generate(ASK, max_tokens=4, timeout_s=WAIT_S)

    def counter(self, name: str) -> int:
        return self.core.counters[name] + self.daemon.counters[name]

    @property
    def stages(self) -> dict[str, int]:
        return self.core.snapshot()["stages"]


class Raw(Generic[M]):
    """A DEALER that keeps every message."""

    def __init__(self, address: str, identity: bytes | None, decode: Callable[[bytes], M]) -> None:
        self._decode = decode
        self._context: zmq.Context[Any] = zmq.Context()
        socket = make_socket(self._context, zmq.DEALER, hwm=100_000, identity=identity)
        socket.connect(address)
        self._channel = Channel(socket, self._on_frames)
        self.got: list[tuple[M, bytes]] = []

    def close(self) -> None:
        self._channel.close()
        self._context.term()

    def frames(self, *frames: bytes) -> None:
        assert self._channel.send(frames)

    def _on_frames(self, frames: list[bytes]) -> None:
        self.got.append((self._decode(frames[0]), frames[1] if len(frames) > 1 else b""))

    def of(self, kind: type[T]) -> list[T]:
        return [m for m, _ in self.got if isinstance(m, kind)]

    async def next(self, kind: type[T], n: int = 1) -> T:
        """The n-th message of this type."""
        await until(lambda: len(self.of(kind)) >= n, f"{n} {kind.__name__}")
        return self.of(kind)[n - 1]


class RawClient(Raw[ToClient]):
    """Speaks the front protocol word by word."""

    def __init__(self, address: str, identity: bytes | None) -> None:
        super().__init__(address, identity, decode_client)

    def say(self, message: FrontMessage, *payload: bytes) -> None:
        self.frames(encode(message), *payload)

    def submit(self, request_id: str, payload: bytes | None = None, **fields: Any) -> None:
        fields = {"workflow_id": "w", "max_tokens": 4} | fields
        self.say(Submit(request_id=request_id, **fields), body() if payload is None else payload)

    def answers(self, request_id: str) -> list[Result | Failure]:
        """All final answers of a request; there should be one."""
        return [
            m for m, _ in self.got if isinstance(m, Result | Failure) and m.request_id == request_id
        ]

    async def answer(self, request_id: str, n: int = 1) -> Result | Failure:
        await until(lambda: len(self.answers(request_id)) >= n, f"answer of {request_id}")
        return self.answers(request_id)[n - 1]

    async def result(self, request_id: str) -> Result:
        answer = await self.answer(request_id)
        assert isinstance(answer, Result), answer
        return answer

    async def failure(self, request_id: str, code: str) -> Failure:
        answer = await self.answer(request_id)
        assert isinstance(answer, Failure), answer
        assert answer.code == code, answer
        assert answer.message
        return answer

    async def pong(self) -> Pong:
        """A round trip: all that was sent before has been taken in."""
        seen = len(self.of(Pong))
        self.say(Ping(v=PROTOCOL_VERSION))
        return await self.next(Pong, seen + 1)

    def text(self, request_id: str) -> str:
        (payload,) = (
            p for m, p in self.got if isinstance(m, Result) and m.request_id == request_id
        )
        return msgspec.json.decode(payload, type=Completion).text

    def chunks(self, request_id: str) -> list[tuple[Chunk, bytes]]:
        return [(m, p) for m, p in self.got if isinstance(m, Chunk) and m.request_id == request_id]

    async def status(self) -> dict[str, Any]:
        await self.next(StatusReply)
        (payload,) = (p for m, p in self.got if isinstance(m, StatusReply))
        return json.loads(payload)


REGISTER = Register("raw", 1, "m", "test", 4, 1000, Profile(), PROTOCOL_VERSION)


class RawHost(Raw[ToEngine]):
    """Speaks the back protocol word by word."""

    def __init__(self, address: str, identity: bytes | None) -> None:
        super().__init__(address, identity, decode_engine)

    def say(self, message: Any, *payload: bytes) -> None:
        self.frames(encode(message), *payload)

    def register(self, **changes: Any) -> None:
        self.say(msgspec.structs.replace(REGISTER, **changes))

    async def runs(self, n: int = 1) -> list[Run]:
        await self.next(Run, n)
        return self.of(Run)


async def sessions(client: Client, n: int, stages: int = 2, **settings: Any) -> list[Any]:
    """This many workflows at once; one outcome (reply or error) per stage."""

    async def one(number: int) -> list[Any]:
        outcomes: list[Any] = []
        async with client.workflow() as workflow:
            for stage in range(stages):
                messages = [{"role": "user", "content": f"{number} {stage}"}]
                try:
                    outcomes.append(await workflow.generate(messages, **settings))
                except Exception as error:
                    outcomes.append(error)
        return outcomes

    return [o for outcomes in await asyncio.gather(*map(one, range(n))) for o in outcomes]
