"""How vLLM refuses to start; what it does once it has started is in test_conformance."""

import asyncio
import json
import math
import os
import re
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import EngineStartError
from chimera_daemon.engines.payload import PayloadError
from chimera_daemon.engines.vllm import VllmBackend, _mean_logprob
from chimera_daemon.engines.vllm_openai import ServingError, _relay
from chimera_daemon.messages import EngineFinished, Usage
from chimera_daemon.wire import decode_back, encode
from tests.engines.conftest import VLLM_WARNINGS, Sink

pytestmark = [pytest.mark.filterwarnings(w) for w in VLLM_WARNINGS]


def refusal(path: Path | str | None, **args: Any) -> str:
    path = None if path is None else str(path)
    backend = VllmBackend(EngineConfig(name="v", model="m", path=path, args=args))

    async def start() -> None:
        try:
            await backend.start(Sink())
        finally:
            await backend.close()

    with pytest.raises(EngineStartError) as raised:
        asyncio.run(start())
    return str(raised.value)


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "vllm", None)
    message = refusal(tmp_path)
    assert "pip install 'chimera-daemon[vllm]'" in message
    assert "requirements/cpu.lock" in message


def test_no_model_there(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(tmp_path)
    assert "`path` is missing" in refusal(None)


@pytest.mark.parametrize(
    ("total", "tokens", "mean"),
    [
        (-3.0, 4, -0.75),
        (0.0, 4, 0.0),
        (1e-7, 4, 0.0),  # rounded the wrong way
        (-1e12, 4, -1e6),
        (None, 4, None),
        (-3.0, 0, None),
        (-math.inf, 4, None),
        (math.nan, 4, None),
    ],
)
def test_mean_logprob(total: float | None, tokens: int, mean: float | None) -> None:
    """What it gives is what the message may carry."""
    assert _mean_logprob(total, tokens) == mean
    finished = EngineFinished(1, Usage(1, tokens), "stop", mean)
    assert decode_back(encode(finished)) == finished


def relay(*events: str) -> list[tuple[int, bytes]]:
    chunks: list[tuple[int, bytes]] = []

    async def stream() -> AsyncGenerator[str]:
        for event in events:
            yield f"data: {event}\n\n"

    async def run() -> int:
        return await _relay(stream(), lambda offset, chunk: chunks.append((offset, chunk)))

    assert asyncio.run(run()) == len(chunks)
    return chunks


def test_chunks_of_a_stream() -> None:
    assert relay('{"id":"é"}', '{"id":2}', "[DONE]") == [
        (0, '{"id":"é"}'.encode()),
        (1, b'{"id":2}'),
    ]
    assert relay("[DONE]") == []


@pytest.mark.parametrize(
    ("status", "raises"),
    [(400, PayloadError), (404, PayloadError), (429, ServingError), (500, ServingError)],
)
def test_error_in_a_stream(status: int, raises: type[Exception]) -> None:
    error = json.dumps({"error": {"message": "no such grammar", "code": status}})
    with pytest.raises(raises, match="no such grammar"):
        relay('{"id":1}', error, "[DONE]")


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"tool_call_parsr": "hermes"}, "did you mean `tool_call_parser`"),
        ({"tool-call-parser": "hermes"}, "did you mean `tool_call_parser`"),
        ({"port": 8000}, "no argument `port`"),  # there is no HTTP in here
        ({"enable_auto_tool_choice": 7}, "enable_auto_tool_choice"),
        ({"enable_auto_tool_choice": True}, "requires --tool-call-parser"),
        ({"enable_auto_tool_choice": True, "tool_call_parser": "x"}, "invalid tool call parser: x"),
        ({"reasoning_parser": "x"}, "Reasoning parser 'x' not found"),
        ({"chat_template": "/nowhere.jinja"}, "nowhere.jinja"),
        ({"chat_template_content_format": "odd"}, "chat_template_content_format"),
    ],
)
def test_refused_options_of_the_server(tiny_model: Path, args: dict[str, Any], says: str) -> None:
    assert re.search(says, refusal(tiny_model, **args))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_refused_by_vllm(tiny_model: Path, tmp_path: Path) -> None:
    environment = dict(os.environ)
    assert "no_such_argument" in refusal(tiny_model, no_such_argument=1)
    assert "max_num_seqs" in refusal(tiny_model, max_num_seqs=0)
    (tmp_path / "config.json").write_text("{}")
    assert str(tmp_path) in refusal(tmp_path)
    for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "LD_PRELOAD"):
        assert os.environ.get(name) == environment.get(name)
