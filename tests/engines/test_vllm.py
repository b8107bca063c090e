"""How vLLM refuses to start; what it does once it has started is in test_conformance."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import EngineStartError
from chimera_daemon.engines.vllm import VllmBackend
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
