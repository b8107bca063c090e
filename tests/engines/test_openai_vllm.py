"""A remote engine in front of a stock vLLM server."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import BackendInfo
from chimera_daemon.engines.openai import RemoteBackend
from chimera_daemon.messages import Api, EngineFailed, EngineFinished, Run
from tests.engines.conftest import chat
from tests.engines.test_openai import Recorder
from tests.engines.tiny_model import CONTEXT

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]
START_S = 240.0
OPTIONS = ("--enforce-eager", "--max-num-seqs=4", "--scheduling-policy=priority")


@pytest.fixture(scope="module")
def vllm_server(tiny_model: Path) -> Iterator[str]:
    """Base URL of a server that may still be loading."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *OPTIONS]
    command += [f"--model={tiny_model}", "--served-model-name=tiny-remote"]
    command += ["--host=127.0.0.1", f"--port={port}", f"--kv-cache-memory-bytes={64 << 20}"]
    log = tiny_model / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Remote:
    """A backend, and the attempts that are given to it."""

    def __init__(self, backend: RemoteBackend, told: Recorder) -> None:
        self.backend, self.told = backend, told
        self._next = 0

    def submit(
        self, payload: bytes, max_tokens: int = 8, *, stream: bool = True, api: Api = "text"
    ) -> int:
        self._next += 1
        self.backend.submit(Run(self._next, self._next, max_tokens, stream, api=api), payload)
        return self._next

    async def answer(self, attempt_id: int) -> EngineFinished | EngineFailed:
        while attempt_id not in self.told.answers:
            await asyncio.sleep(0.01)
        return self.told.answers[attempt_id]

    async def finished(self, attempt_id: int) -> EngineFinished:
        answer = await self.answer(attempt_id)
        assert isinstance(answer, EngineFinished), answer
        return answer

    def chunks(self, attempt_id: int) -> list[Any]:
        found = self.told.chunks[attempt_id]
        return [payload for _, payload in found]


def test_a_stock_server(vllm_server: str) -> None:
    async def test() -> None:
        args = {"model": "tiny-remote", "slots": 4, "health_s": 0.5, "priority": True}
        engine = EngineConfig(name="r", model="tiny", kind="openai", path=vllm_server, args=args)
        backend, told = RemoteBackend(engine), Recorder()
        try:
            await backend.start(told)
            assert "Cannot connect" in str(told.availability)
            async with asyncio.timeout(START_S):
                while not isinstance(told.availability[-1], BackendInfo):
                    await asyncio.sleep(0.1)
            assert told.availability[-1].context_tokens == CONTEXT
            remote = Remote(backend, told)
            for check in (_text, _openai_stream, _openai_whole, _refusals, _cancel):
                await check(remote)
            assert len(told.availability) == 2
        finally:
            await backend.close()

    asyncio.run(test())


async def _text(remote: Remote) -> None:
    streamed, plain = [remote.submit(chat("tell me"), 40, stream=s) for s in (True, False)]
    for attempt_id in (streamed, plain):
        finished = await remote.finished(attempt_id)
        assert finished.usage.output_tokens == 40
        assert finished.finish_reason == "length"
    text = "".join(payload["text"] for payload in remote.chunks(streamed))
    assert remote.told.payloads[streamed] == remote.told.payloads[plain] == {"text": text}
    fits = await remote.finished(remote.submit(chat("hello"), 1_000_000, stream=False))
    assert fits.usage.prompt_tokens + fits.usage.output_tokens == CONTEXT


async def _openai_stream(remote: Remote) -> None:
    body = chat("a", temperature=1.0, max_tokens=6, n=2, seed=3, logprobs=True, chimera={})
    attempt_id = remote.submit(body, api="chat")
    finished = await remote.finished(attempt_id)
    assert finished.usage.output_tokens == 12
    chunks = remote.chunks(attempt_id)
    assert {chunk["model"] for chunk in chunks} == {"tiny"}
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)
    assert any(choice["logprobs"] for chunk in chunks for choice in chunk["choices"])
    assert remote.told.payloads[attempt_id] == {"chunks": len(chunks)}


async def _openai_whole(remote: Remote) -> None:
    body = {"model": "x", "prompt": ["a", "bc"], "max_tokens": 5, "ignore_eos": True, "echo": True}
    attempt_id = remote.submit(json.dumps(body).encode(), api="completions", stream=False)
    finished = await remote.finished(attempt_id)
    payload = remote.told.payloads[attempt_id]
    assert payload["model"] == "tiny"
    assert [choice["text"][: i + 1] for i, choice in enumerate(payload["choices"])] == ["a", "bc"]
    assert payload["usage"]["completion_tokens"] == finished.usage.output_tokens == 10


async def _refusals(remote: Remote) -> None:
    for stream in (False, True):
        for payload, says in ((chat("x" * 5000), "2048"), (chat("x", temperature=-1), "temper")):
            failed = await remote.answer(remote.submit(payload, stream=stream, api="chat"))
            assert isinstance(failed, EngineFailed), failed
            assert (failed.code, failed.retryable) == ("bad_request", False)
            assert says in failed.message


async def _cancel(remote: Remote) -> None:
    """Four fill the server: what comes after them runs only if they are gone there too."""
    many = [remote.submit(chat(f"{i}"), 1900) for i in range(8)]
    while not all(remote.told.chunks.get(attempt_id) for attempt_id in many[:4]):
        await asyncio.sleep(0.01)
    for attempt_id in many:
        remote.backend.cancel(attempt_id)
    tokens = remote.backend.stats().output_tokens
    await remote.finished(remote.submit(chat("next"), 5))
    assert remote.backend.stats().output_tokens == tokens + 5
    assert not any(attempt_id in remote.told.answers for attempt_id in many)
