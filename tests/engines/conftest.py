"""Rigs: a host of each kind of backend, wired to a fake daemon in one event loop."""

import asyncio
import importlib.util
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import Backend, BackendInfo, Events, make_backend
from chimera_daemon.engines.host import Host
from chimera_daemon.engines.vllm import VllmBackend
from chimera_daemon.messages import EngineFailed, EngineStats, Run
from tests.engines.fake_daemon import WAIT_S, FakeDaemon
from tests.engines.tiny_model import TEMPLATE, write_tiny_model

T = TypeVar("T")
TEST_S = 60.0

# What vLLM's own imports warn of, and its chat form of a field that it has marked as deprecated.
VLLM_WARNINGS = (
    "ignore:max_tokens is deprecated:DeprecationWarning",
    "ignore:`torch.jit.script:DeprecationWarning",
    "ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning",
)


def chat(text: str, **extra: Any) -> bytes:
    """A chat body with one user message; always runs to `max_tokens` where the engine can."""
    messages = [{"role": "user", "content": text}]
    return json.dumps(
        {"messages": messages, "ignore_eos": True, "temperature": 0.0} | extra
    ).encode()


class Shared:
    """A started backend lent to one host after the other."""

    def __init__(self, backend: Backend, info: BackendInfo, sink: "Sink") -> None:
        self._backend, self._info, self._sink = backend, info, sink
        self._lent: set[int] = set()

    async def start(self, events: Events) -> BackendInfo:
        self._sink.events = events
        return self._info

    def submit(self, attempt: Run, payload: bytes) -> None:
        self._lent.add(attempt.attempt_id)
        self._backend.submit(attempt, payload)

    def cancel(self, attempt_id: int) -> None:
        self._backend.cancel(attempt_id)

    def stats(self) -> EngineStats:
        return self._backend.stats()

    def progress(self) -> dict[int, int]:
        return self._backend.progress()

    async def close(self) -> None:
        for attempt_id in self._lent:
            self._backend.cancel(attempt_id)
        self._sink.events = None


class Sink:
    """Passes a shared backend's events on to whoever has it now."""

    def __init__(self) -> None:
        self.events: Events | None = None

    def emit(self, message: Any, payload: bytes | None = None) -> None:
        if self.events is not None:
            self.events.emit(message, payload)

    def suspend(self, reason: str) -> None:
        if self.events is not None:
            self.events.suspend(reason)

    def resume(self, info: BackendInfo) -> None:
        if self.events is not None:
            self.events.resume(info)

    def died(self, reason: str) -> None:
        if self.events is not None:
            self.events.died(reason)


class Rig:
    """Runs test coroutines, each with a host and a fake daemon of its own."""

    def __init__(self, engine: EngineConfig, runner: asyncio.Runner, folder: Path) -> None:
        self.engine = engine
        self.runner = runner
        self.folder = folder
        self.clocked = True
        self.shared: tuple[Backend, BackendInfo, Sink] | None = None
        self.codes: list[int] = []

    @property
    def max_inflight(self) -> int:
        return 4

    def run(self, test: "Callable[[FakeDaemon, Host], Awaitable[T]]", **host: Any) -> T:
        return self.runner.run(asyncio.wait_for(self._with_host(test, host), TEST_S))

    async def _with_host(self, test: Any, options: dict[str, Any]) -> Any:
        daemon = FakeDaemon(f"ipc://{self.folder}/back.sock")
        daemon.start()
        backend = Shared(*self.shared) if self.shared else make_backend(self.engine)
        host = Host(self.engine, daemon.address, backend, **options)
        task = asyncio.ensure_future(host.run())
        try:
            await daemon.ready()
            result = await test(daemon, host)
        finally:
            host.stop(0.0)
            self.codes.append(await asyncio.wait_for(task, WAIT_S))
            daemon.stop()
        for attempt in daemon.attempts.values():
            assert len(attempt.answers) <= 1, f"two answers: {attempt.answers}"
        return result


def echo_engine(**args: Any) -> EngineConfig:
    return EngineConfig(name="echo-1", model="echo", kind="echo", args=args)


ECHO = {"reply_tokens": [100_000, 100_000], "context_tokens": 2048, "slots": 4}


@pytest.fixture
def echo_clock(tmp_path: Path) -> Iterator[Rig]:
    with asyncio.Runner() as runner:
        yield Rig(echo_engine(step_s=0.001, **ECHO), runner, tmp_path)


@pytest.fixture
def echo_now(tmp_path: Path) -> Iterator[Rig]:
    with asyncio.Runner() as runner:
        rig = Rig(echo_engine(**ECHO), runner, tmp_path)
        rig.clocked = False
        yield rig


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def vllm_real(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One real engine for all tests that want it: its start takes many seconds."""
    args = {
        "enforce_eager": True,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
        "chat_template": "{{ greeting }}" + TEMPLATE,
        "default_chat_template_kwargs": {"greeting": "yo"},
    }
    engine = EngineConfig(name="vllm-1", model="tiny", path=str(tiny_model), args=args)
    with asyncio.Runner() as runner:
        rig = Rig(engine, runner, tmp_path_factory.mktemp("vllm"))
        backend, sink = VllmBackend(engine), Sink()
        rig.shared = (backend, runner.run(backend.start(sink)), sink)
        try:
            yield rig
        finally:
            leak = backend._llm.engine_core.resources.ctx
            runner.run(backend.close())
            leak.destroy(linger=0)  # vLLM leaves its ZeroMQ context open


@pytest.fixture(
    params=[
        "echo_clock",
        "echo_now",
        pytest.param("vllm_real", marks=[pytest.mark.vllm, pytest.mark.timeout(300)]),
    ]
)
def rig(request: pytest.FixtureRequest) -> Rig:
    return request.getfixturevalue(request.param)


def is_bad_request(answer: object) -> bool:
    return (
        isinstance(answer, EngineFailed) and answer.code == "bad_request" and not answer.retryable
    )
