"""From traces to a bundle, and the same as a method that `chimera eval` can cross-validate."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from chimera_predictors import calibrate, features
from chimera_predictors.bundle import SCHEMA, Bundle, BundleInfo, EncoderInfo
from chimera_predictors.dataset import Ints, Labels, describe, inputs_of, labels_of
from chimera_predictors.encoder import EmbeddingCache, Encoder, load_encoder
from chimera_predictors.evaluate import RowPredictions, data_digest
from chimera_predictors.options import LEVELS, Options, Progress
from chimera_predictors.predictor import BundlePredictor, Table
from chimera_predictors.records import StageQuery
from chimera_predictors.train import Fit, fit

if TYPE_CHECKING:
    from chimera_predictors.traces import Traces

_MANY_TEXTS = 200_000  # vectors kept while training: 300 MB at D = 384
_LEAST_FOLDS = 2
_ENCODED_AT_ONCE = 256


class TrainError(ValueError):
    """These traces cannot be trained on; the message says what is missing."""


def train_bundle(
    traces: "Traces",
    cache: EmbeddingCache,
    options: Options,
    progress: Progress = lambda what, share: None,
    included: bool = False,
    unseen: np.ndarray | None = None,
) -> Bundle:
    """Train heads on these traces; raises TrainError.

    ``included`` says that the encoder goes into the bundle. ``unseen`` [R] marks the rows whose
    tasks the encoder was not fine-tuned on: only these may judge; None: all.
    """
    _check(traces)
    kinds = tuple(sorted({str(kind) for kind in traces.kind if kind})) or ("",)
    encode = _Encoding(cache, progress)
    inputs = inputs_of(describe(traces.queries(), kinds), encode)
    labels = labels_of(traces)
    judged = labels if unseen is None else labels.only(unseen)
    fold = _folds(traces, options)
    found = fit(
        inputs, labels, judged, fold, len(kinds), len(traces.models), options,
        lambda what, share: progress(what, 0.4 + 0.55 * share),
    )  # fmt: skip
    progress("calibration", 0.95)
    calibration = calibrate.calibrate(found.held_out, found.prior, judged, inputs.stage_group, fold)
    encoder = cache.encoder
    info = BundleInfo(
        schema=SCHEMA,
        encoder=EncoderInfo(
            encoder.name, encoder.digest, encoder.dim, encoder.max_tokens, included
        ),
        models=traces.models,
        kinds=kinds,
        levels=LEVELS,
        features=features.NAMES,
        stages=features.STAGES,
        gates=calibration.gates,
        heads_sha256="",
        trained=_about(traces, options),
        metrics=_metrics(found, judged, traces, calibration),
    )
    progress("done", 1.0)
    return Bundle(
        info,
        calibrate.calibrated(found.weights, calibration),
        calibration.mean_factor,
        calibration.prior_spread,
    )


class _Encoding:
    """Encodes texts in portions, so that progress can be shown."""

    def __init__(self, cache: EmbeddingCache, progress: Progress) -> None:
        self.cache = cache
        self.progress = progress

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(texts), self.cache.encoder.dim), dtype=np.float32)
        # Neighbours of one length make the fullest batches.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), _ENCODED_AT_ONCE):
            self.progress(f"encoding {len(texts):,} texts", 0.4 * start / len(order))
            rows = order[start : start + _ENCODED_AT_ONCE]
            found[rows] = self.cache.encode_cached([texts[i] for i in rows])
        return found


def _check(traces: "Traces") -> None:
    if not np.isfinite(traces.success).any() and not np.isfinite(traces.output_tokens).any():
        raise TrainError(
            "no row has a label: `success` and `output_tokens` are empty everywhere; "
            "at least one of them is needed (docs/traces.md)"
        )


def _folds(traces: "Traces", options: Options) -> Ints:
    """Folds by task, as many as there are tasks for."""
    tasks = len({" ".join(text.split()) or name for text, name in zip(
        traces.task_text, traces.task_ids, strict=True)})  # fmt: skip
    if tasks < _LEAST_FOLDS:
        raise TrainError(
            f"the traces hold {tasks} distinct task; training needs at least {_LEAST_FOLDS} "
            "to see how well it does on tasks it has not seen (hundreds to be of use)"
        )
    return traces.fold_of(min(options.folds, tasks), options.seed)


def _about(traces: "Traces", options: Options) -> dict[str, object]:
    return {
        "rows": len(traces),
        "workflows": len(traces.workflow_ids),
        "tasks": len(traces.task_ids),
        "data_digest": data_digest(traces),
        "options": msgspec.to_builtins(options),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", "tokenizers")},
    }


def _metrics(
    found: Fit, labels: Labels, traces: "Traces", calibration: calibrate.Calibration
) -> dict[str, object]:
    """A few figures on tasks held out; `chimera eval` gives all of them with intervals."""
    from chimera_predictors import metrics

    model = labels.model
    rows = torch.arange(len(model))
    confidence = found.held_out.confidence[rows, torch.from_numpy(model)].double().numpy()
    remaining = found.held_out.remaining[rows, torch.from_numpy(model)].double().numpy()
    ones = np.ones((len(model), 1))
    first = (traces.stage == 0) & np.isfinite(labels.success)
    by_model: dict[str, object] = {}
    for number, name in enumerate(traces.models):
        at = first & (model == number)
        auc = metrics.auc(confidence[at], labels.success[at], ones[at])
        by_model[name] = _number(auc)
    known = np.isfinite(labels.remaining)
    length = metrics.kendall_distance(
        remaining[known, len(LEVELS) // 2], labels.remaining[known], ones[known]
    )
    return {
        "auc_first_stage": by_model,
        "kendall_distance": _number(length),
        "trusted": {
            name: {"confidence": gate.confidence, "lengths": gate.lengths}
            for name, gate in zip(traces.models, calibration.gates, strict=True)
        },
    }


def _number(values: np.ndarray) -> float | None:
    value = float(np.asarray(values).ravel()[0])
    return round(value, 4) if np.isfinite(value) else None


class BundleMethod:
    """A trained bundle as a method of `chimera eval`; rows of models it does not know get NaN."""

    name = "bundle"

    def __init__(self, predictor: BundlePredictor) -> None:
        self.predictor = predictor

    def fit(self, train: "Traces") -> None:
        """Nothing: the bundle is trained."""

    def predict(self, test: "Traces") -> RowPredictions:
        """Each row for its own model."""
        return _own_rows(self.table(test.queries()), test, self.predictor)

    def table(self, queries: Sequence[StageQuery]) -> Table:
        """All models' forecasts."""
        return self.predictor.table(queries)


class PriorMethod(BundleMethod):
    """The prior that is stored in a bundle."""

    name = "prior"

    def table(self, queries: Sequence[StageQuery]) -> Table:
        return self.predictor.prior_table(self.predictor.describe(queries))


class JointMethod:
    """Our predictors, trained on whatever traces `fit` is given."""

    name = "chimera"

    def __init__(self, options: Options | None = None, cache: EmbeddingCache | None = None) -> None:
        self.options = options or Options()
        self._cache = cache
        self._bundle: BundleMethod | None = None

    def fit(self, train: "Traces") -> None:
        """Train a bundle in memory; texts are encoded once over all folds."""
        if self._cache is None:
            self._cache = EmbeddingCache(load_encoder(), _MANY_TEXTS)
        bundle = train_bundle(train, self._cache, self.options)
        self._bundle = BundleMethod(BundlePredictor(bundle, self._cache))

    def predict(self, test: "Traces") -> RowPredictions:
        """As the bundle."""
        assert self._bundle is not None, "fit comes first"
        return self._bundle.predict(test)


def training_cache(encoder: Encoder) -> EmbeddingCache:
    """Keeps the vectors of all texts that a training on a trace folder can have."""
    return EmbeddingCache(encoder, _MANY_TEXTS)


def _own_rows(table: Table, traces: "Traces", predictor: BundlePredictor) -> RowPredictions:
    place = {name: number for number, name in enumerate(predictor.bundle.info.models)}
    column = np.array([place.get(name, -1) for name in traces.models])[traces.model]
    rows, unknown = np.arange(len(column)), column < 0
    confidence = table.confidence[rows, column]
    stage, remaining = (np.expm1(p[rows, column]) for p in (table.stage, table.remaining))
    for part in (confidence, stage, remaining):
        part[unknown] = np.nan
    return RowPredictions(confidence, predictor.levels, stage, remaining)
