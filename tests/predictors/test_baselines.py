"""Baselines: they learn what is there to learn, and survive what may be missing."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from chimera_predictors import metrics
from chimera_predictors.baseline_features import row_numbers
from chimera_predictors.baselines import (
    KnnRouter,
    LightGbm,
    Prior,
    QuantileForest,
    TfidfLogistic,
)
from chimera_predictors.evaluate import EvalError, Method
from chimera_predictors.traces import Traces
from fake_traces import make_traces


def count_letters(texts: Sequence[str]) -> np.ndarray:
    """A stand-in for an encoder: how often each letter occurs."""
    return np.array([[text.count(letter) for letter in "adefimoprsu"] for text in texts], float)


METHODS: dict[str, Callable[[], Method]] = {
    "prior": Prior,
    "tfidf": TfidfLogistic,
    "knn": lambda: KnnRouter(count_letters),
    "forest": lambda: QuantileForest(trees=20),
    "lightgbm": lambda: LightGbm(length_rounds=30, success_rounds=40, threads=1),
}
WITH_CONFIDENCE = [name for name in METHODS if name != "forest"]
WITH_LENGTHS = [name for name in METHODS if name != "tfidf"]


def auc_at_stage_0(method: Method, train: Traces, test: Traces) -> float:
    method.fit(train)
    rows = (test.stage == 0) & (test.model == 1)
    confidence = method.predict(test).confidence[rows]
    return float(metrics.auc(confidence, test.success[rows], np.ones((rows.sum(), 1)))[0])


@pytest.fixture(scope="module")
def train() -> Traces:
    return make_traces(120, seed=1)


@pytest.fixture(scope="module")
def test() -> Traces:
    return make_traces(80, seed=2)


def test_trees_learn_from_a_few_rows(test: Traces) -> None:
    few = make_traces(40, seed=1)
    coded = [replace(one, prompt_tokens=_hardness(one)) for one in (few, test)]
    assert auc_at_stage_0(METHODS["lightgbm"](), *coded) > 0.8


def _hardness(traces: Traces) -> np.ndarray:
    hard = np.array(["difficult" in text for text in traces.task_text])
    return np.where(hard, 900, 30)[traces.task]


@pytest.mark.parametrize("name", ["tfidf", "knn"])
def test_text_says_more_about_success_than_the_prior(
    name: str, train: Traces, test: Traces
) -> None:
    assert auc_at_stage_0(METHODS[name](), train, test) > 0.8
    assert auc_at_stage_0(Prior(), train, test) < 0.7


@pytest.mark.parametrize("name", ["forest", "knn", "lightgbm"])
def test_lengths_are_better_than_the_prior(name: str, train: Traces, test: Traces) -> None:
    weights = np.ones((len(test), 1))
    distance = {}
    for one in (METHODS[name](), Prior()):
        one.fit(train)
        median = one.predict(test).remaining_tokens[:, 1]
        distance[one.name] = metrics.kendall_distance(median, test.remaining_tokens, weights)[0]
    assert distance[name] < distance["prior"] - 0.03


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_quantiles_are_ordered_and_cover(name: str, train: Traces, test: Traces) -> None:
    method = METHODS[name]()
    method.fit(train)
    found = method.predict(test)
    for tokens, truth in (
        (found.stage_tokens, test.output_tokens),
        (found.remaining_tokens, test.remaining_tokens),
    ):
        assert (np.diff(tokens, axis=1) >= 0).all()
        assert (tokens > 0).all()
        covered = ((tokens[:, 0] <= truth) & (truth <= tokens[:, 2])).mean()
        assert 0.6 < covered < 0.97


@pytest.mark.parametrize("name", METHODS)
def test_labels_of_test_rows_are_not_looked_at(name: str, train: Traces, test: Traces) -> None:
    method = METHODS[name]()
    method.fit(train)
    last = test.stage == 1  # the only rows whose own output no later stage may see
    hidden = replace(
        test,
        success=np.full(len(test), np.nan),
        remaining_tokens=np.full(len(test), np.nan),
        output_tokens=np.where(last, np.nan, test.output_tokens),
        n_stages=np.full(len(test), 9),
    )
    seen, blind = method.predict(test), method.predict(hidden)
    np.testing.assert_array_equal(seen.confidence, blind.confidence)
    np.testing.assert_array_equal(seen.remaining_tokens, blind.remaining_tokens)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_figures(name: str, train: Traces, test: Traces) -> None:
    found = []
    for _ in range(2):
        method = METHODS[name]()
        method.fit(train)
        found.append(method.predict(test))
    np.testing.assert_array_equal(found[0].confidence, found[1].confidence)
    np.testing.assert_array_equal(found[0].remaining_tokens, found[1].remaining_tokens)


@pytest.mark.parametrize("name", WITH_CONFIDENCE)
def test_missing_labels_and_fractions_train(name: str, train: Traces, test: Traces) -> None:
    rng = np.random.default_rng(0)
    some = rng.random(len(train)) < 0.3
    partly = replace(
        train,
        success=np.where(some, np.nan, 0.2 + 0.6 * train.success),
        output_tokens=np.full(len(train), np.nan),
        remaining_tokens=np.full(len(train), np.nan),
    )
    method = METHODS[name]()
    method.fit(partly)
    found = method.predict(test)
    assert 0.2 < found.confidence.mean() < 0.8
    assert found.confidence.max() < 0.95
    assert np.isnan(found.remaining_tokens).all()


@pytest.mark.parametrize("name", METHODS)
def test_no_success_and_no_text(name: str, train: Traces, test: Traces) -> None:
    def bare(traces: Traces) -> Traces:
        return replace(
            traces,
            success=np.full(len(traces), np.nan),
            new_text=[""] * len(traces),
            workflow_text=[""] * len(traces.workflow_ids),
            task_text=[""] * len(traces.task_ids),
        )

    method = METHODS[name]()
    method.fit(bare(train))
    found = method.predict(bare(test))
    if name in WITH_LENGTHS:
        assert np.isfinite(found.remaining_tokens).all()
    if name == "tfidf":  # nothing was learned: one success and one failure
        assert (found.confidence == 0.5).all()
    else:
        assert np.isnan(found.confidence).all()


@pytest.mark.parametrize("name", METHODS)
def test_unseen_model_kind_and_stage_get_something(name: str, train: Traces) -> None:
    method = METHODS[name]()
    method.fit(train)
    strange = make_traces(10, models=("large", "new", "small"), stages=4, seed=5)
    strange = replace(strange, kind=np.full(len(strange), "unheard of", dtype=object))
    found = method.predict(strange)
    if name in WITH_CONFIDENCE:
        assert ((found.confidence >= 0) & (found.confidence <= 1)).all()
    if name in WITH_LENGTHS:
        assert np.isfinite(found.remaining_tokens).all()


def test_models_are_told_apart_by_name_not_by_code(train: Traces) -> None:
    other = make_traces(40, models=("another", "large", "small"), seed=3)
    method = Prior()
    method.fit(train)
    first = other.stage == 0
    confidence = method.predict(other).confidence
    large, small = (confidence[first & (other.model == code)].mean() for code in (1, 2))
    assert large > small + 0.2


def test_one_outcome_only_is_a_rate(train: Traces, test: Traces) -> None:
    method = TfidfLogistic()
    method.fit(replace(train, success=np.ones(len(train))))
    assert (method.predict(test).confidence > 0.98).all()


def test_prior_pulls_small_cells_to_their_parent() -> None:
    traces = make_traces(50, seed=4)
    rare = np.where(traces.task == 0, "rare", "common").astype(object)
    traces = replace(traces, kind=rare, success=np.where(traces.task == 0, 1.0, 0.0))
    method = Prior(strength=8.0)
    method.fit(traces)
    found = method.predict(traces).confidence
    assert 0.1 < found[traces.task == 0].max() < 0.2  # one row in the cell: 1 / 9 and the parent
    assert found[traces.task != 0].max() < 0.02


def test_numbers_of_a_row_come_from_earlier_stages() -> None:
    traces = make_traces(3, stages=3)
    numbers = row_numbers(traces)
    first = traces.stage == 0
    produced, last = np.expm1(numbers[:, 5]), np.expm1(numbers[:, 6])
    assert (produced[first] == 0).all()
    assert np.isnan(last[first]).all()
    third = np.flatnonzero(traces.stage == 2)
    assert produced[third] == pytest.approx(
        traces.output_tokens[third - 1] + traces.output_tokens[third - 2]
    )
    assert last[third] == pytest.approx(traces.output_tokens[third - 1])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, train: Traces) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(EvalError, match=r"pip install 'chimera-daemon\[baselines\]'"):
        LightGbm().fit(train)
