"""Baselines to compare a bundle with: what one would try first, each at full strength.

Every class is a `Method` (evaluate.py), seeded, and keeps to two cores and a minute or two on 70k
rows. Missing labels train nothing; a model without training rows gets the mean of all models. The
libraries are optional (extra `baselines`) and imported when a method is fitted.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from chimera_predictors.baseline_features import (
    Key,
    StageFeatures,
    TaskWords,
    cell_keys,
    codes_of,
    library,
    model_names,
    row_numbers,
    rows_by_model,
)
from chimera_predictors.evaluate import RowPredictions
from chimera_predictors.metrics import Array, Ints

if TYPE_CHECKING:
    from chimera_predictors.traces import Traces

LEVELS = (0.1, 0.5, 0.9)
THREADS = 2

Statistic = Callable[[Array], Array]


class Prior:
    """Means and empirical quantiles per (model, stage, kind), each pulled towards its parent cell.

    The chain of cells is all rows, model, model and stage, model and stage and kind; a cell of n
    rows weighs n / (n + strength) against its parent.
    """

    name = "prior"

    def __init__(self, strength: float = 8.0, kind: bool = True) -> None:
        """Without ``kind`` the chain ends at model and stage."""
        self._strength = strength
        self._depth = 3 if kind else 2

    def fit(self, train: "Traces") -> None:
        """Collect the cells of the training rows."""
        keys = cell_keys(train, self._depth)
        self._success = _Cells(keys, train.success, _mean, self._strength)
        self._stage = _Cells(keys, np.log1p(train.output_tokens), _quantiles, self._strength)
        self._rest = _Cells(keys, np.log1p(train.remaining_tokens), _quantiles, self._strength)

    def predict(self, test: "Traces") -> RowPredictions:
        """Look up the narrowest known cell of each row."""
        keys = cell_keys(test, self._depth)
        return RowPredictions(
            confidence=self._success.look_up(keys, 1)[:, 0],
            levels=LEVELS,
            stage_tokens=np.expm1(self._stage.look_up(keys, len(LEVELS))),
            remaining_tokens=np.expm1(self._rest.look_up(keys, len(LEVELS))),
        )


class TfidfLogistic:
    """Success from TF-IDF of the task's words and word pairs, plus its kind: a logistic per model.

    No lengths. Predicts the same for all stages of a workflow.
    """

    name = "tfidf"

    def __init__(self, strength: float = 1.0, seed: int = 0) -> None:
        self._strength = strength
        self._seed = seed

    def fit(self, train: "Traces") -> None:
        """Fit one classifier per model on one row per workflow and model."""
        self._features = TaskWords(train)
        design = self._features(train)
        rows = _workflow_rows(train)
        self._rate = _rate(train.success[rows])
        self._of_model = {
            name: self._classifier(design[own], train.success[own])
            for name, own in rows_by_model(train, rows)
        }

    def predict(self, test: "Traces") -> RowPredictions:
        """Probability of success for each row's model."""
        design = self._features(test)
        confidence = np.full(len(test.model), self._rate)
        for name, own in rows_by_model(test, np.arange(len(test.model))):
            model = self._of_model.get(name, self._rate)
            confidence[own] = (
                model if isinstance(model, float) else model.predict_proba(design[own])[:, 1]
            )
        return _confidence_only(confidence)

    def _classifier(self, design: Any, success: Array) -> Any:
        """A fitted classifier, or the plain rate where only one outcome was seen."""
        rows, outcome, weights = _outcomes(success)
        if len(np.unique(outcome)) < 2:
            return _rate(success)
        linear = library("sklearn.linear_model")
        classifier = linear.LogisticRegression(
            C=self._strength, max_iter=1000, random_state=self._seed
        )
        return classifier.fit(design[rows], outcome, sample_weight=weights)


class KnnRouter:
    """RouteBalance's router: what happened on the 10 training tasks with the nearest embeddings.

    Neighbours are those tasks for which the same model has a label at the same stage. Confidence is
    their mean success, lengths are quantiles of theirs. Tasks without text get, and give, none:
    their rows take the mean (quantiles) of the model at that stage.
    """

    name = "knn"

    def __init__(self, encode: Callable[[Sequence[str]], Any], neighbours: int = 10) -> None:
        """``encode`` maps n texts to an array [n, D]; it need not be normalised."""
        self._encode = encode
        self._neighbours = neighbours

    def fit(self, train: "Traces") -> None:
        """Embed the training tasks."""
        self._train = train
        self._embedded = self._embed(train)
        self._fallback = Prior(kind=False)
        self._fallback.fit(train)

    def predict(self, test: "Traces") -> RowPredictions:
        """Look up the neighbours of each row's task."""
        likeness = self._embed(test) @ self._embedded.T  # [test tasks, train tasks]
        widest = self._fallback.predict(test)
        train = self._train
        confidence = self._from_neighbours(test, likeness, train.success, _mean)
        stage = self._from_neighbours(test, likeness, np.log1p(train.output_tokens), _quantiles)
        rest = self._from_neighbours(test, likeness, np.log1p(train.remaining_tokens), _quantiles)
        return RowPredictions(
            confidence=_filled(confidence[:, 0], widest.confidence),
            levels=LEVELS,
            stage_tokens=_filled(np.expm1(stage), widest.stage_tokens),
            remaining_tokens=_filled(np.expm1(rest), widest.remaining_tokens),
        )

    def _embed(self, traces: "Traces") -> Array:
        """Unit vectors [tasks, D]; NaN for tasks without text."""
        vectors = np.asarray(self._encode(traces.task_text), dtype=np.float32)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        vectors[[not text.strip() for text in traces.task_text]] = np.nan
        return vectors

    def _from_neighbours(
        self, test: "Traces", likeness: Array, labels: Array, statistic: Statistic
    ) -> Array:
        """Statistic of the nearest labels [rows, S]; NaN where there are none."""
        found = np.full((len(test.model), len(statistic(np.zeros((1, 1))))), np.nan)
        labelled = _groups(self._train, np.isfinite(labels))
        for key, rows in _groups(test, np.ones(len(test.model), dtype=bool)).items():
            if key not in labelled:
                continue
            tasks, values = _task_means(self._train.task[labelled[key]], labels[labelled[key]])
            near = likeness[np.ix_(test.task[rows], tasks)]
            usable = np.isfinite(near).any(axis=1)
            nearest = _largest(np.nan_to_num(near[usable], nan=-2.0), self._neighbours)
            found[rows[usable]] = statistic(values[nearest].T).T
        return found


class QuantileForest:
    """The paper's length predictor: one quantile random forest per model, on log tokens.

    Features: the numbers of `row_numbers`, the kind, and TF-IDF of the stage's words and word pairs
    reduced to ``components`` by truncated SVD. No confidence. At most ``max_rows`` rows per model,
    drawn at random, train its trees.
    """

    name = "forest"

    def __init__(
        self, trees: int = 150, components: int = 32, max_rows: int = 10_000, seed: int = 0
    ) -> None:
        self._trees = trees
        self._components = components
        self._max_rows = max_rows
        self._seed = seed

    def fit(self, train: "Traces") -> None:
        """Fit two forests per model: tokens of the stage, and of the rest of the workflow."""
        self._features = StageFeatures(train, self._components, self._seed)
        design = self._features(train)
        rest, stage = train.remaining_tokens, train.output_tokens
        self._rest = self._forests(train, design, np.log1p(rest))
        same = np.array_equal(rest, stage, equal_nan=True)  # every workflow has one stage
        self._stage = self._rest if same else self._forests(train, design, np.log1p(stage))

    def predict(self, test: "Traces") -> RowPredictions:
        """Quantiles for each row's model."""
        design = self._features(test)
        return RowPredictions(
            confidence=np.full(len(test.model), np.nan),
            levels=LEVELS,
            stage_tokens=np.expm1(self._quantiles(test, design, self._stage)),
            remaining_tokens=np.expm1(self._quantiles(test, design, self._rest)),
        )

    def _forests(self, train: "Traces", design: Array, labels: Array) -> dict[str, Any]:
        """A forest per model name, and under "" the plain quantiles of all rows."""
        rows = np.flatnonzero(np.isfinite(labels))
        if not len(rows):
            return {"": np.full(len(LEVELS), np.nan)}
        rng = np.random.default_rng(self._seed)
        by_model = rows_by_model(train, rows)
        return {
            "": np.quantile(labels[rows], LEVELS),
            **{name: self._forest(design, labels, own, rng) for name, own in by_model},
        }

    def _forest(self, design: Array, labels: Array, rows: Ints, rng: np.random.Generator) -> Any:
        forests = library("quantile_forest")
        if len(rows) > self._max_rows:
            rows = rng.choice(rows, self._max_rows, replace=False)
        forest = forests.RandomForestQuantileRegressor(
            n_estimators=self._trees,
            min_samples_leaf=3,
            max_samples_leaf=32,  # a leaf of equal rows can be huge, and all are padded to it
            max_features=0.33,
            random_state=self._seed,
            n_jobs=THREADS,
        )
        return forest.fit(design[rows], labels[rows])

    def _quantiles(self, test: "Traces", design: Array, forests: dict[str, Any]) -> Array:
        values = np.tile(forests[""], (len(design), 1))
        for name, own in rows_by_model(test, np.arange(len(design))):
            if name in forests:
                values[own] = forests[name].predict(design[own], quantiles=list(LEVELS))
        return values


class LightGbm:
    """Gradient-boosted trees on numbers, kind and model; quantile loss in log tokens.

    One booster per target and level, for all models together; success with cross entropy, so that
    fractional labels count. A kind or model not seen in training is a missing value to the trees.
    """

    name = "lightgbm"

    def __init__(
        self,
        length_rounds: int = 200,
        success_rounds: int = 150,
        seed: int = 0,
        threads: int = THREADS,
    ) -> None:
        self._length_rounds = length_rounds
        self._success_rounds = success_rounds
        self._threads = threads
        self._seed = seed

    def fit(self, train: "Traces") -> None:
        """Fit the boosters: one for success, three for each of the two lengths."""
        self._kinds = codes_of(train.kind.tolist())
        self._models = codes_of(model_names(train))
        design = self._design(train)
        self._success = self._booster(design, train.success, _SUCCESS_TREES, self._success_rounds)
        self._stage = self._quantile_boosters(design, np.log1p(train.output_tokens))
        self._rest = self._quantile_boosters(design, np.log1p(train.remaining_tokens))

    def predict(self, test: "Traces") -> RowPredictions:
        """Confidence and quantiles; crossing quantiles are put in order."""
        design = self._design(test)
        nothing = np.full(len(design), np.nan)
        return RowPredictions(
            confidence=nothing if self._success is None else self._success.predict(design),
            levels=LEVELS,
            stage_tokens=_boosted(self._stage, design),
            remaining_tokens=_boosted(self._rest, design),
        )

    def _design(self, traces: "Traces") -> Array:
        """[R, 2 + F]: codes of kind and model (NaN where unknown), then the numbers."""
        kind = [self._kinds.get(kind, np.nan) for kind in traces.kind]
        model = [self._models.get(name, np.nan) for name in model_names(traces)]
        return np.column_stack([kind, model, row_numbers(traces)])

    def _quantile_boosters(self, design: Array, labels: Array) -> list[Any]:
        return [
            self._booster(
                design,
                labels,
                _LENGTH_TREES | {"alpha": level, "num_leaves": leaves},
                self._length_rounds,
            )
            for level, leaves in zip(LEVELS, _LENGTH_LEAVES, strict=True)
        ]

    def _booster(self, design: Array, labels: Array, trees: dict[str, Any], rounds: int) -> Any:
        boosting = library("lightgbm")
        rows = np.isfinite(labels)
        if not rows.any():
            return None
        data = boosting.Dataset(design[rows], labels[rows], categorical_feature=[0, 1])
        leaf = min(trees["min_data_in_leaf"], max(5, int(rows.sum()) // 50))
        fixed = {"min_data_in_leaf": leaf, "num_threads": self._threads, "seed": self._seed}
        return boosting.train(_ALL_TREES | trees | fixed, data, num_boost_round=rounds)


# Chosen by three-fold cross-validation on a public set of 400 tasks and 13 models. Success has one
# label per workflow, so its trees must be much smaller than those of the lengths. With less than
# 50 times `min_data_in_leaf` rows the leaves shrink with them.
_ALL_TREES: dict[str, Any] = {
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 1.0,
    "deterministic": True,
    "verbosity": -1,
}
_SUCCESS_TREES: dict[str, Any] = {
    "objective": "cross_entropy",
    "learning_rate": 0.04,
    "num_leaves": 15,
    "min_data_in_leaf": 150,
    "feature_fraction": 0.5,
    "cat_smooth": 20.0,
}
_LENGTH_TREES: dict[str, Any] = {
    "objective": "quantile",
    "learning_rate": 0.05,
    "min_data_in_leaf": 20,
    "feature_fraction": 0.8,
    "cat_smooth": 5.0,
    "cat_l2": 2.0,
}
_LENGTH_LEAVES = (15, 63, 15)  # per level; larger trees in the tails cover too little


class _Cells:
    """One statistic per cell of a chain of ever narrower cells, shrunk towards the wider one."""

    def __init__(
        self, keys: list[Key], values: Array, statistic: Statistic, strength: float
    ) -> None:
        rows = np.flatnonzero(np.isfinite(values))
        self._of_cell: dict[Key, Array] = {}
        for depth in range(len(keys[0]) + 1 if len(rows) else 0):
            members: dict[Key, list[int]] = {}
            for row in rows:
                members.setdefault(keys[row][:depth], []).append(row)
            for cell, own in members.items():
                measured = statistic(values[own][:, None])[:, 0]
                trust = len(own) / (len(own) + strength) if depth else 1.0
                parent = self._of_cell[cell[:-1]] if depth else measured
                self._of_cell[cell] = trust * measured + (1.0 - trust) * parent

    def look_up(self, keys: list[Key], width: int) -> Array:
        """Values [R, width] of each key's narrowest known cell; NaN where nothing is known."""
        nothing = np.full(width, np.nan)
        found = np.empty((len(keys), width))
        known: dict[Key, Array] = {}
        for row, key in enumerate(keys):
            if key not in known:
                chain = (self._of_cell.get(key[:depth]) for depth in range(len(key), -1, -1))
                known[key] = next((value for value in chain if value is not None), nothing)
            found[row] = known[key]
        return found


def _mean(values: Array) -> Array:
    """Means of the columns of [n, columns] -> [1, columns]."""
    return values.mean(axis=0, keepdims=True)


def _quantiles(values: Array) -> Array:
    """Quantiles of the columns of [n, columns] -> [levels, columns]."""
    return np.quantile(values, LEVELS, axis=0)


def _groups(traces: "Traces", wanted: np.ndarray) -> dict[Key, Ints]:
    """Wanted rows by (model, stage)."""
    members: dict[Key, list[int]] = {}
    for row, key in enumerate(cell_keys(traces, 2)):
        if wanted[row]:
            members.setdefault(key, []).append(row)
    return {key: np.array(rows) for key, rows in members.items()}


def _workflow_rows(traces: "Traces") -> Ints:
    """The first row of each workflow and model with a known success."""
    known = np.flatnonzero(np.isfinite(traces.success))
    pairs = np.column_stack([traces.workflow[known], traces.model[known]])
    return known[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]


def _outcomes(success: Array) -> tuple[Ints, Ints, Array]:
    """Rows, outcomes 0 or 1 and weights that stand for fractional successes [n]."""
    rows = np.tile(np.arange(len(success)), 2)
    outcome = np.repeat([1, 0], len(success))
    weights = np.concatenate([success, 1.0 - success])
    kept = weights > 0
    return rows[kept], outcome[kept], weights[kept]


def _rate(success: Array) -> float:
    """Mean success, one success and one failure added; 0.5 without rows."""
    return float((success.sum() + 1.0) / (len(success) + 2.0))


def _confidence_only(confidence: Array) -> RowPredictions:
    nothing = np.full((len(confidence), len(LEVELS)), np.nan)
    return RowPredictions(confidence, LEVELS, nothing, nothing)


def _task_means(tasks: Ints, values: Array) -> tuple[Ints, Array]:
    """Distinct tasks and the mean of their values."""
    distinct, inverse, counts = np.unique(tasks, return_inverse=True, return_counts=True)
    return distinct, np.bincount(inverse, weights=values) / counts


def _largest(table: Array, count: int) -> Ints:
    """Columns [n, count] of the largest entries of each row, in no order."""
    count = min(count, table.shape[1])
    return np.argpartition(table, -count, axis=1)[:, -count:]


def _filled(values: Array, otherwise: Array) -> Array:
    return np.where(np.isfinite(values), values, otherwise)


def _boosted(boosters: list[Any], design: Array) -> Array:
    if boosters[0] is None:
        return np.full((len(design), len(LEVELS)), np.nan)
    return np.expm1(np.sort(np.column_stack([one.predict(design) for one in boosters]), axis=1))
