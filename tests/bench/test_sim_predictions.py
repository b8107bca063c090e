"""Predictions for simulations: the truth, what is left of it, bundles asked as the daemon does."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import pytest

from chimera_bench.sim_arrivals import poisson_arrivals
from chimera_bench.sim_engine import EngineProfile
from chimera_bench.sim_input import EngineSetup, Run, StageTruth, Workflow
from chimera_bench.sim_predictions import (
    Constant,
    Folds,
    Learned,
    Noisy,
    Oracle,
    Predicting,
    Prior,
    Source,
    degraded,
    query,
    train_folds,
)
from chimera_bench.sim_workload import Gaps, Task, sample, synthetic_tasks, tasks_of
from chimera_bench.simulator import Result, simulate
from chimera_daemon.config import Config
from chimera_daemon.messages import ModelPrediction, Prediction, Stage, Usage, WorkflowEnded
from chimera_daemon.prior import PriorPredictor
from chimera_predictors.encoder import EmbeddingCache, Encoder
from chimera_predictors.options import Options
from chimera_predictors.predictor import BundlePredictor
from chimera_predictors.records import Forecast, PastStage, StageQuery
from chimera_predictors.traces import Traces, TracesError
from chimera_predictors.trainer import train_bundle
from fake_traces import MODELS, make_traces
from tiny_encoder import make_encoder

OPTIONS = Options(rows_seen=3e3, epochs=(2, 2), hidden=8, folds=2, steps=4)
PROFILE = EngineProfile(
    step_s=0.01,
    step_per_seq_s=0.0005,
    step_per_kv_token_s=1e-7,
    prefill_s_per_token=1e-4,
    slots=4,
    kv_tokens=50_000,
    context_tokens=20_000,
    token_budget=256,
)
# By "slow" three stages, by "quick" two.
TASK = Task(
    "t",
    "code",
    100,
    {
        "quick": Run((StageTruth(10, 5, verdict=0.0), StageTruth(20)), 0.0),
        "slow": Run((StageTruth(40, 6), StageTruth(50, 7), StageTruth(60)), 1.0),
    },
    "the task",
    {
        "quick": ("the task", "quick's second"),
        "slow": ("the task", "slow's second", "slow's third"),
    },
)


def traces_that_fit(tasks: int = 40, stages: int = 3) -> Traces:
    """Contexts grow by every answer and by 7 new tokens, as the simulator's do."""
    traces = make_traces(tasks=tasks, stages=stages)
    prompts = np.zeros(len(traces), dtype=np.int64)
    for row, stage in enumerate(traces.stage):
        before = prompts[row - 1] + int(traces.output_tokens[row - 1]) + 7
        prompts[row] = before if stage else 20
    verdict = np.where(np.arange(len(traces)) % 3 == 0, 0.0, np.nan)
    texts = [f"{text} {row}" for row, text in enumerate(traces.new_text)]
    for row in np.flatnonzero(traces.stage == 0):
        texts[row] = traces.workflow_text[traces.workflow[row]]
    return replace(traces, prompt_tokens=prompts, verdict=verdict, new_text=texts)


def stage_of(workflow: str, number: int = 0, kind: str = "code") -> Stage:
    return Stage(b"c", f"{workflow}/{number}", workflow, number, kind, None, 1, 256, 4, number)


def played(
    tasks: Sequence[Task], source: Source, policy: str = "round_robin"
) -> tuple[Result, list[Prediction]]:
    """A simulation over two engines, changing models at will, and all its predictions."""
    models = list(tasks[0].runs)
    engines = [EngineSetup(f"engine {model}", model, PROFILE) for model in models]
    config = Config(policy=policy)
    drawn = sample(tasks, poisson_arrivals(1.0, 60, 0), 0)
    predicting, seen = source.begin(drawn, config), list[Prediction]()

    def predict(stage: Stage) -> Prediction:
        seen.append(predicting.prediction(stage))
        return seen[-1]

    return simulate(config, engines, drawn.workflows, predict, observers=[predicting]), seen


def certain(confidence: float, stage: float, rest: float, later: float) -> ModelPrediction:
    return ModelPrediction(
        confidence, stage, (stage, stage, stage), rest, (rest, rest, rest), later
    )


def auc(scores: Sequence[float], labels: Sequence[float]) -> float:
    pairs = [
        (good > bad) + 0.5 * (good == bad)
        for good, yes in zip(scores, labels, strict=True)
        for bad, no in zip(scores, labels, strict=True)
        if yes > no
    ]
    return fmean(pairs)


# The truth and what is left of it.


def test_the_oracle_says_what_comes() -> None:
    oracle = Oracle()
    first = oracle.answer(TASK, ())
    assert first.models["quick"] == certain(0.0, 10.0, 30.0, 1.0)
    assert first.models["slow"] == certain(1.0, 40.0, 150.0, 2.0)
    assert first.source == "learned"
    after_slow = oracle.answer(TASK, ("slow", "slow"))
    # Quick has no third stage: it goes on at its last one, and ends there.
    assert after_slow.models["quick"].remaining_tokens_mean == 20.0
    assert after_slow.models["quick"].remaining_stages == 0.0
    # The simulation's outcome is the mean over the stages' models.
    assert after_slow.models["quick"].confidence == pytest.approx(2 / 3)
    assert after_slow.models["slow"].confidence == 1.0
    assert oracle.answer(TASK, ("quick",)).models["slow"].confidence == pytest.approx(2 / 3)


def test_the_oracle_takes_the_outcome_of_the_simulation() -> None:
    def last_one_counts(workflow: Workflow, models: Sequence[str]) -> float | None:
        return workflow.runs[models[-1]].success

    assert Oracle(last_one_counts).answer(TASK, ("quick",)).models["slow"].confidence == 1.0
    assert Oracle(lambda workflow, models: None).answer(TASK, ()).models["slow"].confidence == 0.5


def test_in_a_simulation_the_oracle_is_right() -> None:
    tasks = synthetic_tasks({"small": 0.4, "large": 0.7}, 40, 0, gaps=Gaps(0.1)).tasks
    oracle = Oracle()
    result, seen = played(tasks, oracle)
    assert len(seen) == sum(len(w.stages) for w in result.workflows)
    changed = 0
    drawn = sample(tasks, poisson_arrivals(1.0, 60, 0), 0)
    for workflow in result.workflows:
        task, models = drawn.tasks[workflow.workflow_id], workflow.models
        changed += len(set(models)) > 1
        for number, stage in enumerate(workflow.stages):
            known = oracle.answer(task, tuple(models[:number])).models[stage.model]
            assert known.stage_tokens_mean == stage.output_tokens
        last = oracle.answer(task, tuple(models[:-1])).models[models[-1]]
        assert last.remaining_stages == 0.0
        assert last.confidence == workflow.success
    assert changed > 10


def test_constants_are_averages() -> None:
    tasks = [TASK, Task("u", "chat", 10, {m: Run((StageTruth(30),), 0.5) for m in TASK.runs})]
    constant = Constant(tasks)
    predicted = constant.answer(TASK, ())
    assert predicted == constant.answer(tasks[1], ("slow", "quick"))
    quick = predicted.models["quick"]
    assert (quick.confidence, quick.stage_tokens_mean) == (0.25, 20.0)
    assert quick.remaining_tokens_mean == fmean([30, 20, 30])
    assert quick.remaining_stages == pytest.approx(1 / 3)
    assert quick.stage_tokens == pytest.approx((12.0, 20.0, 28.0))
    assert predicted.of("another").confidence == pytest.approx((0.25 + 0.75) / 2)
    unknown = Task("v", "", 10, {"m": Run((StageTruth(30),))})
    assert Constant([unknown]).answer(unknown, ()).models["m"].confidence == 0.5
    with pytest.raises(ValueError, match="no task"):
        Constant([])


def test_noise_has_the_strength_that_is_asked_for() -> None:
    tasks = synthetic_tasks({"m": 0.5, "n": 0.3}, 1500, 0).tasks
    oracle, labels = Oracle(), [task.runs["n"].success or 0.0 for task in tasks]
    for strength, expected in ((0.5, 0.921), (1.0, 0.760), (2.0, 0.638)):
        noisy = Noisy(strength, tasks, 0)
        predicted = [noisy.answer(task, ()).models["n"] for task in tasks]
        truths = [oracle.answer(task, ()).models["n"] for task in tasks]
        errors = [
            math.log(p.remaining_tokens[1] / t.remaining_tokens_mean)
            for p, t in zip(predicted, truths, strict=True)
        ]
        assert fmean(errors) == pytest.approx(0.0, abs=0.1 * strength)
        assert np.std(errors) == pytest.approx(strength, rel=0.1)
        for p in predicted[:10]:  # the mean of a lognormal
            width = math.exp(strength**2 / 2)
            assert p.stage_tokens_mean == pytest.approx(width * p.stage_tokens[1])
            assert p.remaining_tokens_mean == pytest.approx(width * p.remaining_tokens[1])
        inside = [
            p.remaining_tokens[0] <= t.remaining_tokens_mean <= p.remaining_tokens[2]
            for p, t in zip(predicted, truths, strict=True)
        ]
        assert fmean(inside) == pytest.approx(0.8, abs=0.04)
        confidences = [p.confidence for p in predicted]
        assert auc(confidences, labels) == pytest.approx(expected, abs=0.03)
        assert fmean(confidences) == pytest.approx(fmean(labels), abs=0.03)  # calibrated
        sure = [label for q, label in zip(confidences, labels, strict=True) if q > 0.6]
        assert fmean(sure) == pytest.approx(
            fmean(q for q in confidences if q > 0.6), abs=0.08 if strength < 2.0 else 0.3
        )


def test_noise_is_seeded_and_does_not_average_out() -> None:
    tasks = synthetic_tasks({"m": 0.5}, 50, 0).tasks
    tasks = [task for task in tasks if len(task.runs["m"].stages) > 1]
    one, same, other = Noisy(1.0, tasks, 0), Noisy(1.0, tasks, 0), Noisy(1.0, tasks, 1)
    for task in tasks:
        assert one.answer(task, ()) == same.answer(task, ()) != other.answer(task, ())
        first, second = (one.answer(task, h).models["m"] for h in ((), ("m",)))
        lengths = [stage.output_tokens for stage in task.runs["m"].stages]
        assert first.stage_tokens[1] / lengths[0] == pytest.approx(
            second.stage_tokens[1] / lengths[1]
        )
        assert first.confidence == second.confidence
    with pytest.raises(ValueError, match="more than 0"):
        Noisy(0.0, tasks, 0)


# In a simulation.


def test_the_prior_is_the_daemons_and_learns() -> None:
    tasks = [TASK]
    result, seen = played(tasks, Prior())
    assert all(workflow.finish_s > 0.0 for workflow in result.workflows)
    config = Config(policy="round_robin")
    fresh = PriorPredictor(config)
    for model in TASK.runs:
        fresh.add_model(model)
    assert seen[0] == fresh.prediction(stage_of("w"))
    for model, longest in (("quick", 20), ("slow", 60)):
        before, after = (p.models[model].stage_tokens_mean for p in (seen[0], seen[-1]))
        assert before > 100.0
        assert after < 1.2 * longest
    _, again = played(tasks, Prior())
    assert again == seen  # nothing is left of the simulation before


def test_histories_are_of_one_simulation() -> None:
    source, config = Oracle(), Config()
    drawn = sample([TASK], [0.0], 0)
    first = source.begin(drawn, config)
    at_start = first.prediction(stage_of("0"))
    after(first, 0, "slow")
    assert first.prediction(stage_of("0", 1)).models["slow"].stage_tokens_mean == 50.0
    delivered: list[Prediction] = []
    first.predict(stage_of("0", 1), b"", lambda stage, prediction: delivered.append(prediction))
    assert delivered == [first.prediction(stage_of("0", 1))]
    assert source.begin(drawn, config).prediction(stage_of("0")) == at_start
    first.observe_workflow(WorkflowEnded("0", "code", 1.0, ()))
    assert first.prediction(stage_of("0")) == at_start


def after(predicting: Predicting, number: int, model: str) -> None:
    predicting.observe_stage(stage_of("0", number), model, Usage(1, 1), None)


@pytest.mark.parametrize("name", ["prior", "constant", "oracle", "noise:0.7"])
def test_one_seed_one_result(name: str) -> None:
    tasks = synthetic_tasks({"small": 0.4, "large": 0.7}, 40, 0, gaps=Gaps(0.1)).tasks
    first = played(tasks, degraded(name, tasks, 0), "chimera")
    source = degraded(name, tasks, 0)
    played(tasks, source, "least_loaded")  # one source serves many simulations
    assert played(tasks, source, "chimera") == first


@pytest.mark.parametrize("name", ["", "bundle", "noise", "noise:", "noise:x", "noises:1", "Oracle"])
def test_names_that_there_are_not(name: str) -> None:
    with pytest.raises(ValueError, match="there are: prior, constant, oracle, noise:S"):
        degraded(name, [TASK], 0)


def test_noise_that_is_none() -> None:
    for name in ("noise:0", "noise:-1", "noise:nan", "noise:inf"):
        with pytest.raises(ValueError, match="more than 0"):
            degraded(name, [TASK], 0)


# Bundles.


def test_a_query_knows_what_the_daemon_would() -> None:
    assert query(TASK, ()) == StageQuery("code", 0, "the task", "the task", 100)
    assert query(TASK, ("quick",)) == StageQuery(
        "code", 1, "the task", "quick's second", 115, (PastStage("quick", 100, 10, 0.0),)
    )
    assert query(TASK, ("quick", "slow")) == StageQuery(
        "code",
        2,
        "the task",
        "slow's third",
        115 + 50 + 7,
        (PastStage("quick", 100, 10, 0.0), PastStage("slow", 115, 50)),
    )


def test_queries_are_those_that_are_trained_on() -> None:
    traces = traces_that_fit()
    tasks = {task.task_id: task for task in tasks_of(traces, MODELS).tasks}
    for row, trained in enumerate(traces.queries()):
        task = tasks[traces.task_ids[traces.task[row]]]
        history = (traces.models[traces.model[row]],) * int(traces.stage[row])
        assert query(task, history) == trained


class EchoModel:
    """A bundle that says what it was asked; knows nothing of some parts."""

    models = frozenset({"quick", "slow", "unused"})
    levels = (0.1, 0.5, 0.9)
    digest = runs_on = ""

    def __init__(self, confidence: float = 0.25, length: float = 8.0) -> None:
        self.confidence = confidence
        self.length = length
        self.asked: list[list[StageQuery]] = []
        self.counters: dict[str, int] = {}

    def predict(self, queries: Sequence[StageQuery]) -> Sequence[dict[str, Forecast]]:
        self.asked.append(list(queries))
        n, three = self.length, (self.length,) * 3
        return [
            {
                name: Forecast(self.confidence, n, three, n * 2, three, 1.0 + 0.0 * n)
                for name in sorted(self.models)
            }
            for _ in queries
        ]


def test_bundles_are_asked_once_and_in_batches() -> None:
    model = EchoModel()
    learned = Learned([TASK], lambda task: model)
    faithful = [(), ("quick",), ("slow",), ("slow", "slow")]
    assert model.asked == [[query(TASK, history) for history in faithful]]
    for history in faithful * 2:
        assert learned.answer(TASK, history).models["quick"].confidence == 0.25
    assert len(model.asked) == 1
    for _ in range(2):
        found = learned.answer(TASK, ("quick", "slow"))
    assert model.asked[1:] == [[query(TASK, ("quick", "slow"))]]
    assert set(found.models) == set(TASK.runs)
    assert found.other.stage_tokens_mean == 8.0


def test_what_a_bundle_said_is_handed_on() -> None:
    asked, again = EchoModel(), EchoModel(confidence=0.75)
    first = Learned([TASK], lambda task: asked)
    second = Learned([TASK], lambda task: again, made=first.made)
    for history in ((), ("slow",)):
        assert second.answer(TASK, history) == first.answer(TASK, history)
    assert again.asked == []
    mixed = ("quick", "slow")  # which was not made
    assert second.answer(TASK, mixed).models["quick"].confidence == 0.75


def test_parts_that_a_bundle_does_not_know() -> None:
    constant = Constant([TASK]).models["slow"]
    without_length = EchoModel(length=math.nan)
    found = Learned([TASK], lambda task: without_length).answer(TASK, ()).models["slow"]
    assert found.confidence == 0.25
    assert found.remaining_tokens == constant.remaining_tokens
    without_confidence = EchoModel(confidence=math.nan)
    found = Learned([TASK], lambda task: without_confidence).answer(TASK, ()).models["slow"]
    assert (found.confidence, found.stage_tokens_mean) == (constant.confidence, 8.0)
    without_any = EchoModel(math.nan, math.nan)
    assert Learned([TASK], lambda task: without_any).answer(TASK, ()).models["slow"] == constant


def test_a_bundle_that_does_not_know_a_model() -> None:
    other = Task("t", "", 10, {"huge": Run((StageTruth(1),))})
    with pytest.raises(ValueError, match="does not know model 'huge'.*quick, slow, unused"):
        Learned([other], lambda task: EchoModel())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def folds(encoder: Encoder) -> tuple[Traces, Folds]:
    traces = traces_that_fit(tasks=40)
    text = list(traces.task_text)
    text[7] = text[3]
    traces = replace(traces, task_text=text)
    return traces, train_folds(traces, encoder, OPTIONS, folds=2)


def test_no_bundle_predicts_a_task_that_it_has_seen(
    folds: tuple[Traces, Folds], encoder: Encoder
) -> None:
    traces, trained = folds
    assert sorted(trained.fold_of) == sorted(traces.task_ids)
    assert trained.fold_of["task 3"] == trained.fold_of["task 7"]
    fold = np.array([trained.fold_of[traces.task_ids[task]] for task in traces.task])
    for number in (0, 1):
        assert 15 <= sum(f == number for f in trained.fold_of.values()) <= 25
        alone = train_bundle(traces.select(fold != number), EmbeddingCache(encoder), OPTIONS)
        queries = traces.queries()[:4]
        expected = BundlePredictor(alone, EmbeddingCache(encoder)).predict(queries)
        for got, want in zip(trained.models[number].predict(queries), expected, strict=True):
            assert got["small"].remaining_tokens_mean == pytest.approx(
                want["small"].remaining_tokens_mean, rel=1e-4
            )
    for task in tasks_of(traces, MODELS).tasks:
        assert trained.model_of(task) is trained.models[trained.fold_of[task.task_id]]


def test_learned_predictions_in_a_simulation(folds: tuple[Traces, Folds]) -> None:
    traces, trained = folds
    tasks = tasks_of(traces, MODELS, Gaps(0.1)).tasks
    source = Learned(tasks, trained.model_of)
    first = played(tasks, source, "round_robin")
    assert any(len(set(workflow.models)) > 1 for workflow in first[0].workflows)
    assert played(tasks, source, "round_robin") == first
    anew = Learned(tasks, trained.model_of)
    played(tasks, anew, "chimera")  # which asks in another order
    assert played(tasks, anew, "round_robin") == first
    lengths = [p.models["small"].remaining_tokens_mean for p in first[1]]
    assert median(lengths) > 20.0
    assert len(set(lengths)) > 50


def test_folds_are_kept(encoder: Encoder, tmp_path: Path) -> None:
    traces = make_traces(tasks=12)
    progress: list[float] = []
    first = train_folds(
        traces, encoder, OPTIONS, folds=2, keep=tmp_path, progress=lambda _, x: progress.append(x)
    )
    assert progress == sorted(progress)
    assert 0.0 <= progress[0] <= progress[-1] <= 1.0
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == 2
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/*"))]
    second = train_folds(traces, encoder, OPTIONS, folds=2, keep=tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/*"))] == written
    queries = traces.queries()[:3]
    for before, again in zip(first.models, second.models, strict=True):
        assert before.predict(queries) == again.predict(queries)
    judged = replace(traces, verdict=np.zeros(len(traces)))
    train_folds(judged, encoder, OPTIONS, folds=2, keep=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4  # other data, other bundles
    with pytest.raises(TracesError, match="folds"):
        train_folds(traces, encoder, OPTIONS, folds=13)
