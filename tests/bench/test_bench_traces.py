"""`chimera bench traces`: who runs what, what is written down, and what is kept apart."""

import argparse
from pathlib import Path

import msgspec
import pytest

from chimera_bench import traces, workload
from chimera_bench.testbed import tasks, workflows
from chimera_daemon.config import Config, ConfigError, EngineConfig
from chimera_predictors.records import WorkflowLog

ECHO = """
[[engines]]
name = "s"
model = "small"
kind = "echo"
args = {step_s = 0.001, reply_tokens = [3, 6]}

[[engines]]
name = "l"
model = "large"
kind = "echo"
args = {step_s = 0.001, reply_tokens = [3, 6]}
"""
TWO = Config(
    engines=tuple(EngineConfig(name=n, model=n, kind="echo", path=None) for n in ("small", "large"))
)


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    traces.add_arguments(parser)
    return parser.parse_args(given)


def test_every_model_runs_every_task_and_some_change() -> None:
    groups = traces.plan(60, 7, TWO)
    small, large, changing = groups["small"], groups["large"], groups["changing"]
    assert [j.task for j in small] == [j.task for j in large]
    assert {model for job in small for model in job.models} == {"small"}
    several = [job.task for job in small if len(job.models) > 1]
    assert [job.task for job in changing] == several[::3]
    assert len(changing) > 8
    for job in changing:
        assert len(job.models) == len(workflows.shape(job.shape).stages)
        assert sum(a != b for a, b in zip(job.models, job.models[1:], strict=False)) == 1


def test_tasks_are_not_those_of_the_demo() -> None:
    trained = {job.task.prompt for job in traces.plan(400, 100, TWO)["small"]}
    assert all(tasks.split_of(j.task) == "validation" for j in traces.plan(400, 100, TWO)["small"])
    assert not trained & {job.task.prompt for job in workload.jobs(2000, 1.0, seed=1)}


def test_engines_share_cores_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chimera_bench.machine.gpus", list)
    engines = tuple(EngineConfig(name=n, model=n, path="p") for n in "sml")
    for cores, wanted in (((4, 7), [(4,), (4,), (7,)]), ((0, 1, 2, 3), [(1,), (2,), (3,)])):
        monkeypatch.setattr("chimera_bench.machine.cores", lambda cores=cores: cores)
        pinned = traces.one_core_each(Config(engines=engines)).engines
        assert [engine.cpus for engine in pinned] == wanted


def test_what_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "echo.toml").write_text(ECHO)
    given = ("--config", str(tmp_path / "echo.toml"), "--out", str(tmp_path / "out"))
    assert traces.run(arguments(*given, "--tasks", "8", "--seed", "3")) == 0
    (file,) = (tmp_path / "out").glob("*.jsonl")
    logs = [msgspec.json.decode(line, type=WorkflowLog) for line in file.read_text().splitlines()]
    groups = traces.plan(8, 3, TWO)
    assert len(logs) == sum(map(len, groups.values()))
    jobs = [job for group in groups.values() for job in group]
    wanted = sorted((first_text(job), job.kind, job.models) for job in jobs)
    seen = sorted(
        (log.stages[0].prompt_text, log.kind, tuple(stage.model for stage in log.stages))
        for log in logs
    )
    assert seen == wanted
    later = {stage.prompt_text for log in logs for stage in log.stages[1:]}
    assert later <= set(workflows.INSTRUCTION.values())  # no answer of a model among them
    assert all(log.success == 0.0 for log in logs)  # an echo solves nothing
    # What an echo says is no solution, as any client can see.
    assert all(log.stages[-1].verdict == 0.0 for log in logs)
    assert f"{len(logs)} workflows" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has traces already"):
        traces.run(arguments(*given))


def first_text(job: workload.Job) -> str:
    shape = workflows.shape(job.shape)
    return workflows.messages_for(0, job.task, shape, [])[0]["content"]


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tasks must be positive"):
        traces.run(arguments("--out", str(tmp_path), "--tasks", "0"))
