"""Workloads of the simulator: runs as recorded, halves, samples, arrivals, capacity, bad input."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chimera_bench.sim_arrivals import arrivals, bursty_arrivals, replayed_arrivals
from chimera_bench.sim_capacity import capacity, mean_work
from chimera_bench.sim_engine import EngineProfile
from chimera_bench.sim_input import EngineSetup, Run, StageTruth
from chimera_bench.sim_workload import (
    SHAPES,
    Gaps,
    Task,
    contexts,
    half,
    read_tasks,
    sample,
    synthetic_tasks,
    tasks_of,
    verdicts_from_texts,
)
from chimera_bench.simulator import simulate
from chimera_daemon.config import Config
from chimera_daemon.messages import ModelPrediction, Prediction
from chimera_predictors.traces import StageRow, TracesError, read_traces, write_traces
from fake_traces import MODELS, make_traces

PROFILE = EngineProfile(
    step_s=0.01,
    step_per_seq_s=0.0005,
    step_per_kv_token_s=1e-7,
    prefill_s_per_token=1e-4,
    slots=8,
    kv_tokens=50_000,
    context_tokens=20_000,
    token_budget=256,
)


def rows_of(
    task: str,
    model: str,
    sizes: Sequence[tuple[int | None, int | None]],
    *,
    run: str = "",
    kind: str | None = "code",
    success: float | None = 1.0,
    texts: list[str] | None = None,
) -> list[StageRow]:
    """A workflow with (prompt tokens, output tokens) of each stage."""
    return [
        StageRow(
            f"{task}/{model}{run}",
            task,
            kind,
            model,
            number,
            len(sizes),
            texts[number] if texts else f"text {number} of {task}",
            prompt,
            output,
            None,
            success,
        )
        for number, (prompt, output) in enumerate(sizes)
    ]


def folder_of(path: Path, *workflows: list[StageRow]) -> Path:
    write_traces(path, stages=[row for rows in workflows for row in rows])
    return path


def arrivals_in(folder: Path, **traces: list[float]) -> Path:
    names = [name for name, times in traces.items() for _ in times]
    times = [at for each in traces.values() for at in each]
    pq.write_table(pa.table({"trace": names, "t_s": times}), folder / "arrivals.parquet")
    return folder


# Tasks.


def test_runs_are_as_recorded(tmp_path: Path) -> None:
    small = rows_of("t", "small", [(100, 30), (150, 40), (300, 50)], success=0.0)
    large = rows_of("t", "large", [(120, 10)], success=1.0)
    found = read_tasks(folder_of(tmp_path, small, large), ["large", "small"], Gaps(0.0))
    assert (found.left_out, found.lacking, found.unusable) == (0, {}, {})
    (task,) = found.tasks
    assert (task.task_id, task.kind, task.text) == ("t", "code", "text 0 of t")
    assert task.prompt_tokens == 110  # the median of both
    assert task.runs["small"] == Run(
        (StageTruth(30, 20), StageTruth(40, 110), StageTruth(50)), success=0.0
    )
    assert task.runs["large"] == Run((StageTruth(10),), success=1.0)
    assert task.new_texts["small"] == ("text 0 of t", "text 1 of t", "text 2 of t")
    # What it starts with is shared, so that each context is off by the same few tokens.
    assert list(contexts(110, task.runs["small"].stages)) == [(110, 0), (160, 140), (310, 200)]


def test_contexts_that_shrink(tmp_path: Path) -> None:
    rewritten = rows_of("a", "m", [(500, 30), (200, 10)])
    short = rows_of("b", "m", [(500, 30), (520, 10)])
    found = read_tasks(folder_of(tmp_path, rewritten, short), ["m"], Gaps(0.0))
    assert found.tasks[0].runs["m"].stages[0] == StageTruth(30, 200, keeps_context=False)
    assert list(contexts(500, found.tasks[0].runs["m"].stages)) == [(500, 0), (200, 0)]
    assert found.tasks[1].runs["m"].stages[0] == StageTruth(30, 0)


def test_what_is_unknown(tmp_path: Path) -> None:
    texts = ["x" * 401, "y" * 40]
    unknown = rows_of("t", "m", [(None, 0), (None, 7)], success=None, texts=texts)
    (task,) = read_tasks(folder_of(tmp_path, unknown), ["m"], Gaps(0.0)).tasks
    assert task.prompt_tokens == 101
    assert task.runs["m"] == Run((StageTruth(1, 10), StageTruth(7)), None)
    assert mean_work([task], "m").success is None


def test_tasks_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    whole = [(10, 5), (20, 5)]
    mixed = rows_of("mixed", "a", whole)
    mixed[1] = msgspec.structs.replace(mixed[1], model="b")
    found = read_tasks(
        folder_of(
            tmp_path,
            rows_of("good", "a", whole),
            rows_of("good", "a", [(10, 99)], run="again"),
            rows_of("good", "b", whole),
            rows_of("good", "unasked", whole),
            rows_of("one", "a", whole),
            rows_of("late", "a", whole)[1:],
            rows_of("late", "b", whole),
            rows_of("unknown", "a", [(10, None)]),
            rows_of("unknown", "b", [(10, 3)]),
            mixed,
        ),
        ["a", "b", "b"],
    )
    assert [task.task_id for task in found.tasks] == ["good"]
    assert list(found.tasks[0].runs) == ["a", "b"]
    assert len(found.tasks[0].runs["a"].stages) == 2
    assert found.left_out == 4
    assert found.lacking == {"a": 3, "b": 2}
    assert found.unusable == {
        "another run of the same task and model": 1,
        "changes models": 1,
        "output tokens are unknown": 1,
        "stages are missing": 1,
    }


def test_programs_on_one_task_are_tasks(tmp_path: Path) -> None:
    one = rows_of("t", "m", [(10, 5)], kind="code-1", run="1")
    two = rows_of("t", "m", [(10, 5), (20, 5)], kind="code-2", run="2")
    found = read_tasks(folder_of(tmp_path, one, two), ["m"])
    assert [(t.kind, len(t.runs["m"].stages)) for t in found.tasks] == [
        ("code-1", 1),
        ("code-2", 2),
    ]


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path, rows_of("t", "small", [(10, 5)]), rows_of("u", "large", [(10, 5)]))
    with pytest.raises(ValueError, match=rf"{tmp_path}: no workflow by model 'huge'.*large, small"):
        read_tasks(tmp_path, ["small", "huge"])
    with pytest.raises(ValueError, match="none of 2 tasks .* large in 1, small in 1$"):
        read_tasks(tmp_path, ["small", "large"])
    without = folder_of(tmp_path / "without", rows_of("t", "small", [(10, None)]))
    with pytest.raises(ValueError, match=r"small in 1; unusable: output tokens are unknown \(1\)"):
        read_tasks(without, ["small"])
    with pytest.raises(ValueError, match="serves no model"):
        read_tasks(tmp_path, [])
    with pytest.raises(TracesError, match="no such folder"):
        read_tasks(tmp_path / "nowhere", ["small"])


def test_verdicts_in_words(tmp_path: Path) -> None:
    texts = ["task", "wrong: try again", "you see a desk", "not wrong: quoted"]
    rows = rows_of("t", "m", [(10, 5), (20, 5), (30, 5), (40, 5)], texts=texts)
    rows[2] = msgspec.structs.replace(rows[2], verdict=1.0)
    other = rows_of("u", "m", [(10, 5)], texts=["wrong: a task that begins so"])
    lost = rows_of(
        "v", "m", [(10, 5), (20, 5), (30, 5)], texts=["task", "?", "wrong: the lost one"]
    )
    traces = verdicts_from_texts(
        read_traces(folder_of(tmp_path, rows, other, [lost[0], lost[2]])), "wrong:"
    )
    unknown = [math.nan] * 4
    np.testing.assert_array_equal(traces.verdict, [0.0, math.nan, 1.0, *unknown])
    stages = tasks_of(traces, ["m"]).tasks[0].runs["m"].stages
    assert [stage.verdict for stage in stages] == [0.0, None, 1.0, None]


def test_gaps_are_seeded_and_have_their_mean() -> None:
    traces = make_traces(tasks=500)

    def gaps(seed: int) -> list[list[float]]:
        tasks = tasks_of(traces, MODELS, Gaps(2.0, 0.8, seed)).tasks
        return [[t.runs[model].stages[0].gap_s for t in tasks] for model in MODELS]

    first, second = gaps(0), gaps(1)
    assert first == gaps(0) != second
    assert first[0] == first[1]  # of both models
    assert fmean([*first[0], *second[0]]) == pytest.approx(2.0, rel=0.1)
    assert all(
        t.runs[m].stages[-1].gap_s == 0.0 for t in tasks_of(traces, MODELS).tasks for m in MODELS
    )
    with pytest.raises(ValueError, match="mean_s"):
        Gaps(-1.0)
    with pytest.raises(ValueError, match="sigma"):
        Gaps(1.0, math.nan)


def test_halves_part_the_tasks_by_their_texts() -> None:
    traces = make_traces(tasks=80)
    text = list(traces.task_text)
    text[7] = text[3].upper()  # the same task by another id
    traces = replace(traces, task_text=text)
    tasks = tasks_of(traces, MODELS).tasks
    tune, test = half(traces, tasks, "tune"), half(traces, tasks, "test")
    assert {t.task_id for t in tune}.isdisjoint(t.task_id for t in test)
    assert len(tune) + len(test) == len(tasks) == 80
    assert 25 <= len(tune) <= 55
    assert len({"task 3", "task 7"} & {t.task_id for t in tune}) in (0, 2)
    # What `chimera eval` holds out is never chosen by.
    evaluated = {traces.task_ids[code] for code in traces.task[traces.holdout(0.3)]}
    assert evaluated < {t.task_id for t in test}
    # A task's side does not depend on the other tasks.
    fewer = traces.select(traces.task < 40)
    kept = {t.task_id for t in half(fewer, tasks_of(fewer, MODELS).tasks, "tune")}
    assert kept == {t.task_id for t in tune if int(t.task_id.split()[1]) < 40}
    single = traces.select(traces.task == 0)
    with pytest.raises(TracesError, match="too few"):
        half(single, tasks_of(single, MODELS).tasks, "tune")


# Samples.


def test_samples_follow_from_the_seed() -> None:
    tasks = tasks_of(make_traces(tasks=60), MODELS).tasks
    times = [float(n) for n in range(50)]
    drawn = sample(tasks, times, 0)
    assert drawn == sample(tasks, times, 0)
    assert drawn.workflows != sample(tasks, times, 1).workflows
    later = sample(tasks, [2.0 * at for at in times], 0)
    assert later.tasks == drawn.tasks  # at whatever times
    assert [w.arrival_s for w in drawn.workflows] == times
    assert len({id(task) for task in drawn.tasks.values()}) == 50  # none twice
    for workflow in drawn.workflows:
        task = drawn.tasks[workflow.workflow_id]
        assert (workflow.kind, workflow.prompt_tokens) == (task.kind, task.prompt_tokens)
        assert workflow.runs is task.runs


def test_failures_that_clients_do_not_see_follow_from_the_seed() -> None:
    tasks = tasks_of(make_traces(tasks=60), MODELS).tasks
    times = [0.0] * 2000
    half_seen = sample(tasks, times, 0, 0.5)
    assert half_seen == sample(tasks, times, 0, 0.5)
    assert half_seen.tasks == sample(tasks, times, 0).tasks  # the same tasks at any share
    for model in tasks[0].runs:
        unseen = sum(model in workflow.unseen for workflow in half_seen.workflows)
        assert 900 <= unseen <= 1100
    assert not any(workflow.unseen for workflow in sample(tasks, times, 0).workflows)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="failures seen"):
            sample(tasks, times, 0, share)


def test_more_workflows_than_tasks() -> None:
    tasks = tasks_of(make_traces(tasks=20), MODELS).tasks
    drawn = sample(tasks, [0.0] * 2000, 0)
    times = Counter(task.task_id for task in drawn.tasks.values())
    assert len(times) == 20
    assert 60 <= min(times.values()) <= 100 <= max(times.values()) <= 140
    assert len({w.workflow_id for w in drawn.workflows}) == 2000
    with pytest.raises(ValueError, match="no task"):
        sample([], [0.0], 0)


def test_the_bound_of_a_stage_fits_all_tasks() -> None:
    def task(output: int) -> Task:
        return Task("t", "", 10, {"m": Run((StageTruth(output),))})

    assert sample([task(3)], [0.0], 0).workflows[0].max_tokens == 256
    assert sample([task(3), task(512)], [0.0], 0).workflows[0].max_tokens == 512
    assert sample([task(3), task(513)], [0.0], 0).workflows[0].max_tokens == 1024


# Work and capacity.


def test_mean_work_by_hand() -> None:
    stages = (StageTruth(10, 5, 2.0), StageTruth(20, 7, keeps_context=False), StageTruth(30))
    long = Task("a", "", 100, {"m": Run(stages, 1.0)})
    short = Task("b", "", 50, {"m": Run((StageTruth(40),), 0.0)})
    work = mean_work([long, short], "m")
    assert (work.stages, work.gap_s, work.success) == (2.0, 1.0, 0.5)
    assert work.prompt_tokens == (100 + 115 + 7 + 50) / 2
    assert work.new_prompt_tokens == (100 + 5 + 7 + 50) / 2
    assert work.output_tokens == (10 + 20 + 30 + 40) / 2
    held = 10 * 105 + 20 * 125 + 30 * 22 + 40 * 70
    assert work.held_tokens == pytest.approx(held / 100)


def test_capacity_by_hand() -> None:
    tasks = [Task("t", "", 1000, {m: Run((StageTruth(200),)) for m in ("a", "b")})]
    slow = msgspec.structs.replace(PROFILE, step_s=0.05)
    setups = [
        EngineSetup("one", "a", PROFILE),
        EngineSetup("two", "a", PROFILE, max_inflight=4),
        EngineSetup("three", "b", slow),
    ]
    full = capacity(setups, tasks)
    held = 1100
    first = 0.1 + 200 * (0.01 + 8 * 0.0005 + 8 * held * 1e-7) / 8
    second = 0.1 + 200 * (0.01 + 4 * 0.0005 + 4 * held * 1e-7) / 4
    third = 0.1 + 200 * (0.05 + 8 * 0.0005 + 8 * held * 1e-7) / 8
    assert [part.workflow_s for part in full.engines] == pytest.approx([first, second, third])
    assert full.uniform_per_s == pytest.approx(3 / third)
    assert full.whole_per_s == pytest.approx(1 / first + 1 / second + 1 / third)
    small = msgspec.structs.replace(PROFILE, kv_tokens=4400)
    assert capacity([EngineSetup("e", "a", small)], tasks).engines[0].batch == 4.0
    with pytest.raises(ValueError, match="engines and tasks"):
        capacity([], tasks)


def test_capacity_with_and_without_contexts_found_again() -> None:
    run = Run((StageTruth(50, 150), StageTruth(100)))  # prompts of 1000 and 1200, 1050 shared
    tasks = [Task("t", "", 1000, {"m": run})]

    def read(cached: float, prefix_cache: bool = True) -> float:
        profile = msgspec.structs.replace(PROFILE, prefix_cache=prefix_cache)
        part = capacity([EngineSetup("e", "m", profile)], tasks, cached=cached).engines[0]
        held = (50 * 1025 + 100 * 1250) / 150
        decoding_s = 150 * PROFILE.step(8, round(8 * held)) / 8
        return (part.workflow_s - decoding_s) / PROFILE.prefill_s_per_token

    assert read(1.0) == pytest.approx(1150)
    assert read(0.0) == pytest.approx(2200) == read(1.0, prefix_cache=False)
    assert read(0.4) == pytest.approx(2200 - 0.4 * 1050)
    with pytest.raises(ValueError, match="`cached`"):
        read(1.1)


@pytest.mark.parametrize("cache", [True, False])
def test_a_full_engine_does_what_its_capacity_says(cache: bool) -> None:
    tasks = synthetic_tasks({"m": 0.5}, 300, 0, gaps=Gaps(0.5)).tasks
    profile = msgspec.structs.replace(PROFILE, prefix_cache=cache, kv_tokens=200_000)
    engines = [EngineSetup("e", "m", profile)]
    rate = capacity(engines, tasks).uniform_per_s
    drawn = sample(tasks, arrivals("poisson", 2.0 * rate, 600, 0), 0)
    mean = ModelPrediction(0.5, 300.0, (100.0, 300.0, 600.0), 600.0, (200.0, 600.0, 1200.0), 1.0)
    config = Config(policy="round_robin")
    result = simulate(config, engines, drawn.workflows, lambda stage: Prediction({}, mean))
    assert all(workflow.finish_s >= 0.0 for workflow in result.workflows)
    assert len(result.workflows) / result.span_s == pytest.approx(rate, rel=0.08)


# Arrivals.


@pytest.mark.parametrize("name", ["poisson", "bursty", "recorded"])
def test_arrivals_have_their_rate_and_seed(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    arrivals_in(tmp_path, other=[1.0, 2.0], recorded=np.cumsum(rng.exponential(7.0, 3000)).tolist())
    times = arrivals(name, 4.0, 2000, 3, tmp_path)
    assert times == arrivals(name, 4.0, 2000, 3, tmp_path)
    assert times != arrivals(name, 4.0, 2000, 4, tmp_path)
    assert times == sorted(times)
    assert len(times) == 2000
    assert min(times) >= 0.0
    assert times[-1] == pytest.approx(500.0, rel=0.2)
    faster = arrivals(name, 8.0, 2000, 3, tmp_path)
    assert faster == pytest.approx([0.5 * at for at in times])
    assert arrivals(name, 4.0, 0, 3, tmp_path) == []


def test_a_recorded_trace_keeps_its_pattern(tmp_path: Path) -> None:
    arrivals_in(tmp_path, code=[9.0, 5.0, 6.0, 5.0])  # gaps 0, 1, 3
    patterns = set[tuple[float, ...]]()
    for seed in range(20):
        times = replayed_arrivals(tmp_path, "code", 0.5, 6, seed)
        assert times[-1] == pytest.approx(12.0)
        patterns.add(tuple(round(gap, 9) for gap in np.diff([0.0, *times]).tolist()))
    assert patterns == {
        (0.0, 1.5, 4.5, 0.0, 1.5, 4.5),
        (1.5, 4.5, 0.0, 1.5, 4.5, 0.0),
        (4.5, 0.0, 1.5, 4.5, 0.0, 1.5),
    }


def test_bursts_come_on_an_ebb_and_flow() -> None:
    even = bursty_arrivals(2.0, 20_000, 0, variation=1.0, swing=0.0)
    gaps = np.diff([0.0, *even])
    assert stdev(gaps) / fmean(gaps) == pytest.approx(1.0, abs=0.05)
    bursts = np.diff([0.0, *bursty_arrivals(2.0, 20_000, 0, variation=3.0, swing=0.0)])
    assert stdev(bursts) / fmean(bursts) == pytest.approx(3.0, abs=0.3)
    swinging = np.array(bursty_arrivals(2.0, 20_000, 0, variation=0.1, swing=0.8, days=1.0))
    share = float((swinging < 5000.0).mean())  # half of the one day: 1/2 + swing/π of it
    assert share == pytest.approx(0.5 + 0.8 / math.pi, abs=0.01)
    with pytest.raises(ValueError, match="swing"):
        bursty_arrivals(2.0, 10, 0, swing=1.0)


@pytest.mark.parametrize("name", ["poisson", "bursty", "code"])
@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_rates_that_are_none(tmp_path: Path, name: str, rate: float) -> None:
    arrivals_in(tmp_path, code=[0.0, 1.0])
    with pytest.raises(ValueError, match="rate must be more than 0"):
        arrivals(name, rate, 10, 0, tmp_path)


def test_arrival_traces_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'azure': neither poisson nor bursty"):
        arrivals("azure", 1.0, 10, 0)
    with pytest.raises(ValueError, match=r"arrivals\.parquet: cannot be read"):
        arrivals("azure", 1.0, 10, 0, tmp_path)
    arrivals_in(tmp_path, code=[0.0, 1.0], one=[3.0], still=[2.0, 2.0], lost=[1.0, math.nan])
    with pytest.raises(ValueError, match="no trace 'azure'; there are: code, lost, one, still"):
        arrivals("azure", 1.0, 10, 0, tmp_path)
    for name in ("one", "lost"):
        with pytest.raises(ValueError, match="two arrivals"):
            arrivals(name, 1.0, 10, 0, tmp_path)
    with pytest.raises(ValueError, match="at one instant"):
        arrivals("still", 1.0, 10, 0, tmp_path)
    pq.write_table(pa.table({"trace": ["code"]}), tmp_path / "arrivals.parquet")
    with pytest.raises(ValueError, match="cannot be read as arrivals"):
        arrivals("code", 1.0, 10, 0, tmp_path)


# Made-up tasks.


def test_synthetic_tasks_have_the_shapes_and_skills() -> None:
    skills = {"small": 0.4, "large": 0.7}
    made = synthetic_tasks(skills, 3000, 0)
    assert made == synthetic_tasks(skills, 3000, 0)
    assert made.tasks != synthetic_tasks(skills, 3000, 1).tasks
    assert {task.kind for task in made.tasks} == set(SHAPES)
    for task in made.tasks:
        assert {len(run.stages) for run in task.runs.values()} == {len(SHAPES[task.kind])}
        assert all(run.stages[-1].gap_s == 0.0 for run in task.runs.values())
    for model, skill in skills.items():
        assert mean_work(made.tasks, model).success == pytest.approx(skill, abs=0.03)
    solved = [{m: bool(run.success) for m, run in task.runs.items()} for task in made.tasks]
    only_small = fmean(each["small"] and not each["large"] for each in solved)
    assert only_small < 0.4 * 0.3 / 2  # half of what chance would give


def test_the_heavy_tail_is_heavy() -> None:
    lengths = {
        tail: [
            stage.output_tokens
            for task in synthetic_tasks({"m": 0.5}, 6000, 0, tail=tail).tasks
            if task.kind == "code-1"
            for stage in task.runs["m"].stages
        ]
        for tail in ("lognormal", "pareto")
    }
    beyond = {tail: fmean(n > 2000 for n in each) for tail, each in lengths.items()}
    assert beyond["pareto"] > 3 * beyond["lognormal"]
    assert max(lengths["pareto"]) == 4096
    for each in lengths.values():
        assert median(each) == pytest.approx(350, rel=0.1)


def test_synthetic_tasks_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        synthetic_tasks({}, 10, 0)
    with pytest.raises(ValueError, match="'m': its skill"):
        synthetic_tasks({"m": 1.0}, 10, 0)
    with pytest.raises(ValueError, match="no tail 'thin'"):
        synthetic_tasks({"m": 0.5}, 10, 0, tail="thin")  # pyright: ignore[reportArgumentType]
