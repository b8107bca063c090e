"""Training finds what is in the traces, the same each time, and copes with what is not there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chimera_predictors import features, finetune, metrics, network
from chimera_predictors.encoder import EmbeddingCache, Encoder
from chimera_predictors.options import LEVELS
from chimera_predictors.predictor import BundlePredictor
from chimera_predictors.records import PastStage, StageQuery
from chimera_predictors.traces import Traces, TracesError
from chimera_predictors.trainer import (
    BundleMethod,
    JointMethod,
    PriorMethod,
    TrainError,
    train_bundle,
)
from fake_traces import make_traces
from tiny_bundle import OPTIONS, Trained


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> BundlePredictor:
    return BundlePredictor(trained.bundle, EmbeddingCache(trained.encoder))


def auc(confidence: np.ndarray, traces: Traces) -> float:
    first = traces.stage == 0
    ones = np.ones((first.sum(), 1))
    return float(metrics.auc(confidence[first], traces.success[first], ones).ravel()[0])


def test_predicts_new_tasks_better_than_the_prior(predictor: BundlePredictor) -> None:
    fresh = make_traces(tasks=80, seed=7)
    learned, prior = (m(predictor).predict(fresh) for m in (BundleMethod, PriorMethod))
    small = fresh.model == 1
    assert auc(learned.confidence[small], fresh.select(small)) > 0.8
    assert auc(prior.confidence[small], fresh.select(small)) < 0.65
    truth, middle = fresh.remaining_tokens, len(LEVELS) // 2
    ones = np.ones((len(truth), 1))
    distances = [
        float(np.ravel(metrics.kendall_distance(p.remaining_tokens[:, middle], truth, ones))[0])
        for p in (learned, prior)
    ]
    assert distances[0] < distances[1] - 0.05
    low, high = learned.remaining_tokens[:, 1], learned.remaining_tokens[:, -2]
    assert 0.65 < np.mean((truth >= low) & (truth <= high)) < 0.95


def test_the_same_traces_give_the_same_heads(trained: Trained) -> None:
    again = train_bundle(trained.traces, EmbeddingCache(trained.encoder), OPTIONS)
    for one, other in zip(again.weights, trained.bundle.weights, strict=True):
        assert (one == other).all()


def test_forecasts_are_sound_for_queries_of_any_sort(predictor: BundlePredictor) -> None:
    queries = [
        StageQuery(),
        StageQuery(kind="never seen", stage=10**6, task_text="💥" * 5000, new_text="\x00"),
        StageQuery(kind="code", stage=3, past=(PastStage("other", 5, None),), prompt_tokens=10**9),
        StageQuery(task_text="difficult proof", stage=1, new_text="observation"),
    ]
    for forecasts in predictor.predict(queries):
        assert set(forecasts) == predictor.models
        for forecast in forecasts.values():
            assert 0.0 <= forecast.confidence <= 1.0
            for values in (forecast.stage_tokens, forecast.remaining_tokens):
                assert list(values) == sorted(values)
                assert np.isfinite(values).all()
                assert values[0] >= 0.0
            pairs = zip(forecast.remaining_tokens, forecast.stage_tokens, strict=True)
            assert all(rest >= stage for rest, stage in pairs)
            assert forecast.remaining_tokens_mean >= forecast.stage_tokens_mean > 0.0
            assert forecast.remaining_stages >= 0.0
    assert predictor.predict([]) == []


def test_a_batch_gives_what_single_queries_give(predictor: BundlePredictor) -> None:
    queries = make_traces(tasks=4, seed=3).queries()
    together = predictor.predict(queries)
    for query, forecasts in zip(queries, together, strict=True):
        alone = predictor.predict([query])[0]
        for name, forecast in forecasts.items():
            assert alone[name].confidence == pytest.approx(forecast.confidence, abs=1e-3)
            assert alone[name].remaining_tokens == pytest.approx(
                forecast.remaining_tokens, rel=1e-2
            )


def test_rows_of_a_model_that_is_not_known_get_nothing(predictor: BundlePredictor) -> None:
    found = BundleMethod(predictor).predict(make_traces(tasks=5, models=("large", "new")))
    rows = np.arange(20).reshape(5, 2, 2)
    assert np.isnan(found.confidence[rows[:, 1].ravel()]).all()
    assert np.isfinite(found.confidence[rows[:, 0].ravel()]).all()


def without(traces: Traces, **columns: float) -> Traces:
    full = {name: np.full(len(traces), value) for name, value in columns.items()}
    return replace(traces, **full)


def test_labels_of_one_sort_are_enough(encoder: Encoder) -> None:
    traces, cache = make_traces(tasks=60), EmbeddingCache(encoder)
    lengths = train_bundle(without(traces, success=np.nan), cache, OPTIONS)
    forecast = BundlePredictor(lengths, cache).predict([StageQuery()])[0]["large"]
    assert np.isnan(forecast.confidence)
    assert forecast.remaining_tokens_mean > 0.0
    blank = {"output_tokens": np.nan, "remaining_tokens": np.nan}
    success = train_bundle(without(traces, **blank), cache, OPTIONS)
    forecast = BundlePredictor(success, cache).predict([StageQuery()])[0]["large"]
    assert np.isfinite(forecast.confidence)
    assert np.isnan(forecast.remaining_tokens_mean)


def test_a_model_without_labels_gets_no_forecast_and_harms_no_other(encoder: Encoder) -> None:
    traces = make_traces(tasks=60)
    second = traces.model == 1
    hidden = {
        name: np.where(second, np.nan, getattr(traces, name))
        for name in ("success", "output_tokens", "remaining_tokens")
    }
    cache = EmbeddingCache(encoder)
    bundle = train_bundle(replace(traces, **hidden), cache, OPTIONS)
    forecasts = BundlePredictor(bundle, cache).predict([StageQuery(task_text="simple sum")])[0]
    assert np.isnan(forecasts["small"].confidence)
    assert np.isfinite(forecasts["large"].confidence)


def test_text_that_says_nothing_leaves_the_prior_in_charge(encoder: Encoder) -> None:
    traces, rng = make_traces(tasks=60), np.random.default_rng(0)
    noise = replace(traces, success=rng.integers(2, size=len(traces)).astype(float))
    bundle = train_bundle(noise, EmbeddingCache(encoder), OPTIONS)
    confidence = BundleMethod(BundlePredictor(bundle, EmbeddingCache(encoder))).predict(noise)
    assert np.ptp(confidence.confidence) < 0.4


def test_traces_that_cannot_be_trained_on(encoder: Encoder) -> None:
    traces, cache = make_traces(tasks=30), EmbeddingCache(encoder)
    blank = dict.fromkeys(("success", "output_tokens", "remaining_tokens"), np.nan)
    with pytest.raises(TrainError, match="no row has a label"):
        train_bundle(without(traces, **blank), cache, OPTIONS)
    with pytest.raises((TrainError, TracesError), match="1 distinct task"):
        train_bundle(make_traces(tasks=1), cache, OPTIONS)


def test_no_text_and_no_kind_still_train(encoder: Encoder) -> None:
    traces = make_traces(tasks=40).without_kind()
    silent = replace(
        traces,
        new_text=[""] * len(traces),
        workflow_text=[""] * len(traces.workflow_ids),
        task_text=[""] * len(traces.task_ids),
    )
    cache = EmbeddingCache(encoder)
    bundle = train_bundle(silent, cache, OPTIONS)
    assert bundle.info.kinds == ("",)
    forecast = BundlePredictor(bundle, cache).predict([StageQuery(task_text="simple sum")])[0]
    assert np.isfinite(forecast["large"].remaining_tokens_mean)


def test_a_declared_kind_counts_and_a_hidden_one_is_told_from_the_text(trained: Trained) -> None:
    predictor = BundlePredictor(trained.bundle, EmbeddingCache(trained.encoder))
    code, chat = (
        predictor.predict([StageQuery(kind=kind, task_text="simple sum")])[0]["large"]
        for kind in ("code", "chat")
    )
    assert chat.stage_tokens_mean > 1.2 * code.stage_tokens_mean


def test_a_bad_verdict_lowers_the_confidence(encoder: Encoder) -> None:
    traces = make_traces(tasks=120)
    # The client's verdict on the first stage tells how the workflow will end.
    verdict = np.where(traces.stage == 0, traces.success, np.nan)
    cache = EmbeddingCache(encoder)
    bundle = train_bundle(replace(traces, verdict=verdict), cache, OPTIONS)
    predictor = BundlePredictor(bundle, cache)
    good, bad = (
        predictor.predict([
            StageQuery(stage=1, task_text="difficult proof", new_text="observation",
                       prompt_tokens=120, past=(PastStage("small", 20, 40, verdict=v),))
        ])[0]["small"].confidence
        for v in (1.0, 0.0)
    )  # fmt: skip
    assert good > bad + 0.2


def test_cross_validation_encodes_each_text_once(encoder: Encoder) -> None:
    traces = make_traces(tasks=30)
    cache = EmbeddingCache(encoder)
    method = JointMethod(OPTIONS, cache)
    for fold in (0, 1):
        method.fit(traces.select(traces.fold_of(2) != fold))
        found = method.predict(traces.select(traces.fold_of(2) == fold))
        assert np.isfinite(found.confidence).all()
    assert cache.misses == 31  # 30 tasks and one observation


def test_fine_tuning_moves_the_encoder_and_keeps_a_fold_unseen(encoder: Encoder) -> None:
    traces = make_traces(tasks=40)
    tuned, unseen = finetune.finetune(encoder, traces, OPTIONS, lambda what, share: None)
    assert 0 < unseen.sum() < len(traces)
    assert not np.allclose(tuned.encode(["simple sum"]), encoder.encode(["simple sum"]))
    seen_tasks = set(traces.task[~unseen])
    assert not seen_tasks & set(traces.task[unseen])
    blank = dict.fromkeys(("success", "output_tokens", "remaining_tokens"), np.nan)
    with pytest.raises(finetune.FinetuneError, match="texts and labels"):
        finetune.finetune(encoder, without(traces, **blank), OPTIONS, lambda what, share: None)


def test_features_are_as_many_as_the_heads_were_trained_on(trained: Trained) -> None:
    assert trained.bundle.weights.edges.shape[0] == len(features.NAMES)


def test_leaving_a_text_out_leaves_numbers_and_the_other_text_in() -> None:
    drop = network._Dropout(width=10, text_widths=(3, 2), rate=0.5)
    left = drop(torch.ones(4, 50, 10), torch.Generator().manual_seed(0))
    assert (left[..., :5] == 1.0).all()
    for part in (left[..., 5:8], left[..., 8:]):
        assert (part == part[..., :1]).all()
        assert 0.2 < part.mean() < 0.8
    assert (left[..., 5] != left[..., 8]).any()
