"""Replays need exactly what ran; a simulated reality is met exactly; the command with an engine."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from chimera_bench import calibration, sim_input, simulator
from chimera_bench.sim_engine import EngineProfile
from chimera_bench.sim_input import EngineSetup, StageTruth, Workflow
from chimera_bench.testbed import tasks
from chimera_bench.workload import Record, StageRecord
from chimera_daemon.config import Config, ConfigError, EngineConfig
from chimera_daemon.prior import PriorPredictor

PROFILE = EngineProfile(0.004, 2e-4, 8e-7, 5e-5, slots=4, prompt_s=0.002, overhead_s=0.003)
CONFIG = Config(policy="static:m", engines=(EngineConfig("e", "m", "echo"),))

ECHO = """
[[engines]]
name = "other"
model = "other"
kind = "echo"

[[engines]]
name = "e"
model = "m"
kind = "echo"
args = {step_s = 0.001, step_per_seq_s = 1e-4, reply_tokens = [80, 80], slots = 4}
"""


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    calibration.add_arguments(parser)
    return parser.parse_args(given)


def stage(begin_s: float, end_s: float, prompt: int, output: int) -> StageRecord:
    return StageRecord(
        *("m", "e", prompt, output, 0.0, end_s - begin_s, end_s - begin_s, end_s, 1, "only one")
    )


def test_a_replay_needs_what_ran() -> None:
    stages = [stage(2.1, 3.0, 50, 20), stage(3.25, 4.0, 80, 10), stage(4.0, 5.0, 60, 5)]
    record = Record(7, "task", "math-solver", 1, 2.0, 3.0, True, stages)
    workflow = calibration.replayed(record, "m")
    assert (workflow.workflow_id, workflow.prompt_tokens) == ("7", 50)
    assert workflow.arrival_s == pytest.approx(2.1)  # of its submission, not as planned
    first, second, third = workflow.runs["m"].stages
    assert (first.output_tokens, first.new_tokens, first.keeps_context) == (20, 10, True)
    assert first.gap_s == pytest.approx(0.25)
    # The third prompt is shorter than the context before it: it was written anew.
    assert (second.new_tokens, second.keeps_context) == (60, False)
    assert second.gap_s == 0.0
    assert (third.output_tokens, third.new_tokens, third.gap_s) == (5, 0, 0.0)
    assert workflow.runs["m"].success == 1.0


def test_a_reality_that_is_the_simulator_is_met_exactly() -> None:
    workflows = [
        Workflow(
            str(n),
            0.05 * n,
            30 + n,
            {"m": sim_input.Run((StageTruth(20 + n, 5, 0.1), StageTruth(9, 0, 0.0)), 1.0)},
        )
        for n in range(40)
    ]
    prior = PriorPredictor(CONFIG)
    setup = EngineSetup("e", "m", PROFILE)
    real = simulator.simulate(CONFIG, [setup], workflows, prior.prediction, observers=[prior])
    records = [
        Record(
            *(int(w.workflow_id), "task", "", 1, w.arrival_s, w.latency_s, True),
            [
                StageRecord(
                    *("m", "e", s.prompt_tokens, s.output_tokens, s.dispatched_s - s.submitted_s),
                    *(s.finished_s - s.dispatched_s, s.finished_s - s.submitted_s, s.finished_s),
                    *(1, "only one"),
                )
                for s in w.stages
            ],
        )
        for w in real.workflows
    ]
    runs = calibration.Run(0.5, 20.0, 1, records, None)
    found = calibration.compare(CONFIG, PROFILE, runs)
    assert (found.workflows, found.stages) == (40, 80)
    assert found.mean_ratio == pytest.approx(1.0, rel=1e-9)
    assert found.p95_ratio == pytest.approx(1.0, rel=1e-9)
    assert found.wait_s > 0.0
    assert found.simulated_wait_s == pytest.approx(found.wait_s, rel=1e-6)
    assert found.simulated_service_s == pytest.approx(found.service_s, rel=1e-6)
    slower = EngineProfile(0.005, 2e-4, 8e-7, 5e-5, slots=4, prompt_s=0.002, overhead_s=0.003)
    assert calibration.compare(CONFIG, slower, runs).mean_ratio > 1.05


def test_the_command_with_an_echo_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That it runs and what it writes; an echo engine's times are those of this machine."""
    toml, out = tmp_path / "echo.toml", tmp_path / "rows.jsonl"
    toml.write_text(ECHO)
    given = ("--config", str(toml), "--loads", "0.3", "--seconds", "1", "--passes", "2")
    assert calibration.run(arguments(*given, "--out", str(out))) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == ["comparison", "comparison", "medians"]
    for row in rows:
        assert (row["bench"], row["engine"], row["model"]) == ("calibration", "e", "m")
        assert {"machine", "commit", "versions", "load_1m"} <= row.keys()
        assert 0.0 < row["mean_ratio"] < 10.0
    first, second, medians = rows
    assert (first["seed"], second["seed"], medians["passes"]) == (1, 2, 2)
    assert first["foreign"] is None  # echo engines have no core of their own
    assert set(first["without"]) == {"prompt_s", "overhead_s", "step_per_kv_token_s"}
    assert first["profile"]["slots"] == 4
    low, high = medians["mean_ratio_range"]
    assert low <= medians["mean_ratio"] <= high
    said = capsys.readouterr().out
    assert "capacity" in said
    assert "load 0.3, seed 2" in said


def test_an_engine_that_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "echo.toml"
    toml.write_text(ECHO.replace("slots = 4", "slots = 1"))
    assert calibration.run(arguments("--config", str(toml))) == 1
    assert "runs one request at a time" in capsys.readouterr().out


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "echo.toml"
    toml.write_text(ECHO)
    with pytest.raises(ConfigError, match="--engine: no engine 'x'; there are: other, e"):
        calibration.run(arguments("--config", str(toml), "--engine", "x"))
    toml.write_text("")
    with pytest.raises(ConfigError, match="no engine in it that can be started"):
        calibration.run(arguments("--config", str(toml)))
    for option, value, says in (
        ("--loads", "0", "write a share above 0"),
        ("--loads", "x", "write a share above 0"),
        ("--seconds", "0.5", "write seconds from 1 to 3600"),
        ("--passes", "0", "write a whole number from 1 to 100"),
    ):
        with pytest.raises(SystemExit):
            arguments(option, value)
        assert says in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)  # compiling a model for the first time takes a minute or two
def test_a_real_engine(tmp_path: Path) -> None:
    """That a real engine can be measured and compared; how well is for the benchmark to say."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    weights = Path(tasks.__file__).parent / "models" / "testbed-s" / "model.safetensors"
    if not weights.is_file():
        pytest.skip(f"no weights at {weights}")
    out = tmp_path / "rows.jsonl"
    given = ("--engine", "s", "--loads", "0.5", "--seconds", "4", "--passes", "1")
    assert calibration.run(arguments(*given, "--out", str(out))) == 0
    comparison, _ = [json.loads(line) for line in out.read_text().splitlines()]
    assert comparison["workflows"] > 10
    profile = comparison["profile"]
    assert 1e-4 < profile["step_s"] < 0.1
    assert profile["prefill_s_per_token"] > 0.0
    assert profile["kv_tokens"] > 30_000
