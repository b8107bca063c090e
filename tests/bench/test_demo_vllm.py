"""A very small demo on real vLLM engines that serve the testbed's models."""

import argparse
import importlib.util
import json
from pathlib import Path

import msgspec
import pytest

from chimera_bench import demo
from chimera_bench.testbed import tasks, workflows
from chimera_daemon.config import EngineConfig

MODELS = Path(tasks.__file__).parent / "models"
ENGINES = ("s", "l")
fair = demo.fair


def fair_and_eager(
    engines: tuple[EngineConfig, ...], cores: tuple[int, ...]
) -> tuple[EngineConfig, ...]:
    """Not compiled, which takes vLLM a minute for `l` at every start; see `test_calibration`."""
    args = {"enforce_eager": True}
    return tuple(msgspec.structs.replace(e, args=e.args | args) for e in fair(engines, cores))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_engines_answer_real_workflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    for name in ENGINES:
        if not (MODELS / f"testbed-{name}" / "model.safetensors").is_file():
            pytest.skip(f"no weights in {MODELS / f'testbed-{name}'}")
    monkeypatch.setattr(demo, "fair", fair_and_eager)
    out = tmp_path / "out"
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    options = ["--out", str(out), "--engines", ",".join(ENGINES), "--workflows", "12"]
    options += ["--quick", "--rate", "6", "--policies", "chimera,static:testbed-l"]
    assert demo.run(parser.parse_args(options)) == 0

    rows = [json.loads(line) for line in (out / "workflows.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    by_id = {task.task_id: task for task in tasks.generate("demo", 12, seed=1)}
    for row in rows:
        assert row["error"] is None
        shape = workflows.shape(row["kind"].partition("-")[2])
        assert len(row["stages"]) == len(shape.stages)
        assert row["task_id"] in by_id
        for stage, most in zip(row["stages"], shape.max_tokens, strict=True):
            assert stage["prompt_tokens"] > 0
            assert 0 < stage["output_tokens"] <= most
    assert {s["model"] for row in rows[12:] for s in row["stages"]} == {"testbed-l"}
    # The committed bundle is what predicts, for both models, and mostly in time.
    learned = [s for row in rows[:12] for s in row["stages"] if s["source"] == "learned"]
    assert len(learned) >= 6
    assert all(set(s["confidence"]) == {"testbed-s", "testbed-l"} for s in learned)
    summary = [json.loads(line) for line in (out / "summary.jsonl").read_text().splitlines()]
    (predictions,) = (row for row in summary if row["row"] == "predictions")
    assert predictions["stages"] == sum(len(row["stages"]) for row in rows[:12])
    assert any(row["success"] for row in rows), "not one answer was right"
