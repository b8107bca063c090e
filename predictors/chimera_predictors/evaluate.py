"""Evaluates methods on traces: which rows count, which metric on which rows, resampled by task.

A `Method` turns training rows into a guess for test rows; `evaluate` compares the guesses of
several methods on the rows that all of them predict. Knows neither how a method works nor how a
`Report` is shown.
"""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from chimera_predictors import metrics
from chimera_predictors.metrics import Array, Ints, Mask
from chimera_predictors.report import Key, Report, Samples
from chimera_predictors.trace_files import normalised

if TYPE_CHECKING:
    from chimera_predictors.traces import Traces

Progress = Callable[[str], None]
Pair = tuple[str, str]

COMPARED_LEVELS = (0.1, 0.5, 0.9)
_LAST_STAGE = 5  # this and later ones are shown as one group
_ENOUGH_TASKS = 20  # for a default pair


class EvalError(ValueError):
    """The evaluation cannot be done as asked; the message says what to do."""


@dataclass(frozen=True)
class RowPredictions:
    """What a method says about R rows, each for the row's own model; NaN: nothing."""

    confidence: Array  # [R], probability that the workflow succeeds
    levels: tuple[float, ...]  # Q quantile levels, ascending
    stage_tokens: Array  # [R, Q] tokens of this stage
    remaining_tokens: Array  # [R, Q] tokens of this and all later stages


class Method(Protocol):
    """Something that learns from rows and predicts others."""

    name: str

    def fit(self, train: "Traces") -> None:
        """Learn from the rows that have labels."""
        ...

    def predict(self, test: "Traces") -> RowPredictions:
        """Predict all rows; must not look at the labels of the stage itself or of later ones."""
        ...


class _Case(NamedTuple):
    """Rows of one target that all methods predict, and their weights."""

    target: str
    rows: Ints
    weights: Array  # [len(rows), 1 + bootstrap]


def out_of_fold(
    method: Method, traces: "Traces", fold: Ints, progress: Progress = lambda line: None
) -> RowPredictions:
    """Predict each row by the method trained on the other folds; ``fold`` [R] counts from 0."""
    parts: list[tuple[Ints, RowPredictions]] = []
    for number in np.unique(fold):
        progress(f"{method.name}: fold {number + 1} of {len(np.unique(fold))}")
        method.fit(traces.select(fold != number))
        rows = np.flatnonzero(fold == number)
        parts.append((rows, method.predict(traces.select(fold == number))))
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    if len({part.levels for _, part in parts}) > 1:
        raise ValueError(f"{method.name}: other quantile levels in each fold")
    return RowPredictions(
        confidence=np.concatenate([part.confidence for _, part in parts])[order],
        levels=parts[0][1].levels,
        stage_tokens=np.concatenate([part.stage_tokens for _, part in parts])[order],
        remaining_tokens=np.concatenate([part.remaining_tokens for _, part in parts])[order],
    )


def evaluate(
    predictions: dict[str, RowPredictions],
    traces: "Traces",
    pairs: Sequence[Pair] = (),
    seed: int = 0,
    bootstrap: int = 300,
    progress: Progress = lambda line: None,
) -> Report:
    """All metrics of all methods with bootstrap samples over tasks; tasks of one text are one.

    Targets: `router` (confidence at stage 0), `router_all` (at every stage, where there are later
    ones), `remaining` and `stage` (lengths). A row counts if it has a label and every method that
    says anything about the target says something about this row, so that the columns of a report
    compare; how many rows each method lacks is in `Report.about`. ``pairs`` are (small, large)
    model names.
    Raises `EvalError` for a pair with an unknown model, and if no row counts at all.
    """
    _check(predictions, traces, pairs)
    group = task_groups(traces)
    weights = metrics.task_weights(group, bootstrap, seed)
    cases = {target: _case(target, predictions, traces, weights) for target in _TARGETS}
    counted = {target: len(case.rows) for target, case in cases.items()}
    if not any(counted.values()):
        raise EvalError(
            "nothing to compare: no row has a label (success, output tokens) and a prediction of "
            "every method; are the models of the traces those that were trained?"
        )
    if counted["router_all"] == counted["router"]:  # single stages: the same figures again
        del cases["router_all"]
    samples: dict[str, Samples] = {}
    for name, prediction in predictions.items():
        progress(f"{name}: metrics")
        samples[name] = {}
        for case in cases.values():
            if len(case.rows) and _known(prediction, case.target).any():
                measure = _router if case.target.startswith("router") else _length
                samples[name].update(measure(prediction, traces, case, pairs))
    about = _about(traces, group, seed, bootstrap)
    about["counted"] = counted
    about["left_out"] = {name: _lacking(one, traces) for name, one in predictions.items()}
    about["unknown_models"] = {name: _unknown(one, traces) for name, one in predictions.items()}
    return Report(samples, about, tuple(traces.models), tuple(pairs))


def compared_quantiles(tokens: Array, levels: tuple[float, ...]) -> tuple[Array, Array, Array]:
    """The .1, .5 and .9 quantiles [R] of [R, Q]; interpolated between levels, NaN outside them."""
    low, middle, high = (_at_level(tokens, levels, level) for level in COMPARED_LEVELS)
    return low, middle, high


def default_pairs(traces: "Traces") -> list[Pair]:
    """(small, large) pairs: worst and best model by success, then each of them with the middle one.

    Models count that share at least 20 tasks with the best one at stage 0.
    """
    rates, tasks = _success_by_model(traces)
    ranked = sorted(rates, key=lambda code: rates[code])
    if not ranked:
        return []
    best = ranked[-1]
    ranked = [code for code in ranked if len(tasks[code] & tasks[best]) >= _ENOUGH_TASKS]
    if len(ranked) < 2:
        return []
    chosen = sorted({0, len(ranked) // 2, len(ranked) - 1})
    neighbours = [(a, b) for a, b in pairwise(chosen)] if len(chosen) > 2 else []
    return [
        (traces.models[ranked[a]], traces.models[ranked[b]])
        for a, b in [(chosen[0], chosen[-1]), *neighbours]
        if rates[ranked[a]] < rates[ranked[b]]
    ]


def task_groups(traces: "Traces") -> Ints:
    """Codes [R] of the tasks; those with the same text are one, as in the splits of `Traces`."""
    code_of: dict[str, int] = {}
    group = [
        code_of.setdefault(normalised(text) or f"\0{number}", len(code_of))
        for number, text in enumerate(traces.task_text)
    ]
    return np.array(group, dtype=np.int64)[traces.task]


_TARGETS = ("router", "router_all", "remaining", "stage")


def _check(predictions: dict[str, RowPredictions], traces: "Traces", pairs: Sequence[Pair]) -> None:
    for name in (name for pair in pairs for name in pair):
        if name not in traces.models:
            raise EvalError(f"no model {name!r} in the traces; there are: {_listed(traces.models)}")
    for name, prediction in predictions.items():
        expected = (len(traces.model), len(prediction.levels))
        shapes = prediction.stage_tokens.shape, prediction.remaining_tokens.shape
        if prediction.confidence.shape != expected[:1] or shapes != (expected, expected):
            raise ValueError(f"{name}: predictions do not have one row per row of the traces")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _known(prediction: RowPredictions, target: str) -> Mask:
    """Rows [R] for which the method says something."""
    if target.startswith("router"):
        return np.isfinite(prediction.confidence)
    tokens = prediction.stage_tokens if target == "stage" else prediction.remaining_tokens
    return np.logical_and.reduce(np.isfinite(tokens), axis=1)


def _labelled(traces: "Traces", target: str) -> Mask:
    """Rows [R] whose truth is known and belongs to the target."""
    if target == "router":
        return np.isfinite(traces.success) & (traces.stage == 0)
    if target == "router_all":
        return np.isfinite(traces.success)
    return np.isfinite(traces.output_tokens if target == "stage" else traces.remaining_tokens)


def _case(
    target: str, predictions: dict[str, RowPredictions], traces: "Traces", weights: Array
) -> _Case:
    counted = _labelled(traces, target)
    for prediction in predictions.values():
        known = _known(prediction, target)
        if known.any():
            counted = counted & known
    rows = np.flatnonzero(counted)
    return _Case(target, rows, weights[rows])


def _lacking(prediction: RowPredictions, traces: "Traces") -> dict[str, int]:
    """Labelled rows without a prediction, per target for which the method has any."""
    known = {target: _known(prediction, target) for target in _TARGETS}
    return {
        target: int((_labelled(traces, target) & ~rows).sum())
        for target, rows in known.items()
        if rows.any()
    }


def _unknown(prediction: RowPredictions, traces: "Traces") -> dict[str, int]:
    """Rows of each model for which the method says nothing at all."""
    silent = ~np.any([_known(prediction, target) for target in _TARGETS], axis=0)
    rows = ((name, traces.model == code) for code, name in enumerate(traces.models))
    return {name: int(own.sum()) for name, own in rows if own.any() and silent[own].all()}


def _router(
    prediction: RowPredictions, traces: "Traces", case: _Case, pairs: Sequence[Pair]
) -> Samples:
    score, success = prediction.confidence[case.rows], traces.success[case.rows]
    samples: Samples = {
        Key(case.target, "brier"): metrics.brier(score, success, case.weights),
        Key(case.target, "ece"): metrics.centred(metrics.ece(score, success, case.weights)),
    }
    by_model = list(_by_model(traces, case.rows))
    for metric, function in (
        ("auc", metrics.auc),
        ("ap", metrics.average_precision),
        ("brier", metrics.brier),
    ):
        for name, own in by_model:
            measured = function(score[own], success[own], case.weights[own])
            samples[Key(case.target, metric, f"model={name}")] = measured
    for metric in ("auc", "ap"):
        parts = [samples[Key(case.target, metric, f"model={name}")] for name, _ in by_model]
        samples[Key(case.target, metric)] = metrics.macro(parts)
    if case.target == "router":
        for pair in pairs:
            samples.update(_pair(score, success, traces, case, pair))
    return samples


def _pair(score: Array, success: Array, traces: "Traces", case: _Case, pair: Pair) -> Samples:
    """Gap metrics of one (small, large) pair over the tasks that both models have at stage 0."""
    small, large = (
        _by_task(score, success, traces, case.rows, traces.models.index(name)) for name in pair
    )
    common = sorted(small.keys() & large.keys())
    values = np.array([(*small[task][:2], *large[task][:2]) for task in common]).reshape(-1, 4)
    weights = case.weights[[small[task][2] for task in common]]
    predicted, actual = values[:, 2] - values[:, 0], values[:, 3] - values[:, 1]
    group = f"pair={pair[0]}:{pair[1]}"
    return {
        Key(case.target, "apgr", group): metrics.apgr(predicted, actual, weights),
        Key(case.target, "gap_pearson", group): metrics.pearson(predicted, actual, weights),
        Key(case.target, "gap_spearman", group): metrics.spearman(predicted, actual, weights),
    }


def _by_task(
    score: Array, success: Array, traces: "Traces", rows: Ints, model: int
) -> dict[int, tuple[float, float, int]]:
    """Mean score, mean success and one position per task of a model's rows."""
    own = np.flatnonzero(traces.model[rows] == model)
    tasks, first, inverse = np.unique(
        traces.task[rows][own], return_index=True, return_inverse=True
    )
    counts = np.bincount(inverse)
    scores = np.bincount(inverse, weights=score[own]) / counts
    successes = np.bincount(inverse, weights=success[own]) / counts
    values = zip(scores.tolist(), successes.tolist(), own[first].tolist(), strict=True)
    return dict(zip(tasks.tolist(), values, strict=True))


def _length(
    prediction: RowPredictions, traces: "Traces", case: _Case, pairs: Sequence[Pair]
) -> Samples:
    stage = case.target == "stage"
    tokens = prediction.stage_tokens if stage else prediction.remaining_tokens
    truth = traces.output_tokens if stage else traces.remaining_tokens
    predicted = np.log1p(np.maximum(tokens[case.rows], 0.0))
    actual = np.log1p(truth[case.rows])
    samples: Samples = {}
    for group, own in _length_groups(traces, case.rows):
        measured = _length_figures(
            predicted[own], actual[own], prediction.levels, case.weights[own], full=not group
        )
        samples.update({Key(case.target, metric, group): one for metric, one in measured.items()})
    return samples


def _length_figures(
    predicted: Array, actual: Array, levels: tuple[float, ...], weights: Array, full: bool
) -> dict[str, Array]:
    """Figures of quantiles [n, Q] in log1p; if ``full`` the rarer ones too."""
    at = {level: _at_level(predicted, levels, level) for level in COMPARED_LEVELS}
    middle = at[0.5]
    losses = {level: metrics.pinball(at[level], actual, level, weights) for level in at}
    found = {
        "kendall": metrics.kendall_distance(middle, actual, weights),
        "pinball": np.mean(list(losses.values()), axis=0),
        "coverage": metrics.coverage(at[0.1], at[0.9], actual, weights),
        "r2_log": metrics.r2(middle, actual, weights),
    }
    if full:
        found["spearman"] = metrics.spearman(middle, actual, weights)
        for column, level in enumerate(levels):
            found[f"pinball@{level:g}"] = metrics.pinball(
                predicted[:, column], actual, level, weights
            )
    return found


def _at_level(predicted: Array, levels: tuple[float, ...], level: float) -> Array:
    """Quantiles [n] at a level, interpolated between the method's own; NaN outside them."""
    upper = int(np.searchsorted(levels, level - 1e-9))
    if upper < len(levels) and abs(levels[upper] - level) < 1e-6:
        return predicted[:, upper]
    if not 0 < upper < len(levels):
        return np.full(len(predicted), np.nan)
    share = (level - levels[upper - 1]) / (levels[upper] - levels[upper - 1])
    return (1 - share) * predicted[:, upper - 1] + share * predicted[:, upper]


def _length_groups(traces: "Traces", rows: Ints) -> Iterator[tuple[str, Ints]]:
    """Name ("" for all) and positions of each group of rows."""
    yield "", np.arange(len(rows))
    stages = np.minimum(traces.stage[rows], _LAST_STAGE)
    for stage in np.unique(stages):
        later = "+" if stage == _LAST_STAGE else ""
        yield f"stage={stage}{later}", np.flatnonzero(stages == stage)
    for name, own in _by_model(traces, rows):
        yield f"model={name}", own


def _by_model(traces: "Traces", rows: Ints) -> Iterator[tuple[str, Ints]]:
    for code, name in enumerate(traces.models):
        own = np.flatnonzero(traces.model[rows] == code)
        if len(own):
            yield name, own


def _success_by_model(traces: "Traces") -> tuple[dict[int, float], dict[int, set[int]]]:
    """Mean success and tasks of each model's labelled stage-0 rows."""
    labelled = _labelled(traces, "router")
    rates, tasks = {}, {}
    for code in range(len(traces.models)):
        own = labelled & (traces.model == code)
        if own.any():
            rates[code] = float(traces.success[own].mean())
            tasks[code] = set(traces.task[own].tolist())
    return rates, tasks


def _about(traces: "Traces", group: Ints, seed: int, bootstrap: int) -> dict[str, Any]:
    """What the figures were measured on and with."""
    libraries = ("chimera-daemon", "numpy", "torch", "scikit-learn", "lightgbm", "quantile-forest")
    return {
        "rows": len(traces.model),
        "workflows": len(np.unique(traces.workflow)),
        "tasks": len(np.unique(traces.task)),
        "task_texts": len(np.unique(group)),
        "data_digest": data_digest(traces),
        "seed": seed,
        "bootstrap": bootstrap,
        "ece_bins": metrics.ECE_BINS,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | _versions(libraries),
    }


def _versions(names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def data_digest(traces: "Traces") -> str:
    """Digest of the rows that were evaluated, in their order: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    labels = (traces.output_tokens, traces.remaining_tokens, traces.success)
    for values in (traces.model, traces.stage, traces.prompt_tokens, *labels):
        digest.update(np.nan_to_num(np.asarray(values, dtype="<f8"), nan=-1.0).tobytes())
    rows = ("\0".join(row) for row in zip(traces.kind, traces.new_text, strict=True))
    for text in (*traces.models, *(traces.task_ids[task] for task in traces.task), *rows):
        digest.update(text.encode("utf-8", "replace") + b"\n")
    return digest.hexdigest()
