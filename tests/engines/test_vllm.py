"""How vLLM refuses to start; what it does once it has started is in test_conformance."""

import asyncio
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import EngineStartError
from chimera_daemon.engines.vllm import VllmBackend, _mean_logprob
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
