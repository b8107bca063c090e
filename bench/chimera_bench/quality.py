"""How good the learned predictions of a run were, by what then happened in it.

Confidence is judged on the policy's own workflows, but by the runs in which one model did all of
each: what a policy chooses to run where is no fair sample. Lengths are judged on what ran, by the
traces of the run and the same bundle. Knows no sockets; needs the extra `predict`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from chimera_bench.summary import Interval
from chimera_bench.workload import Record

if TYPE_CHECKING:
    from chimera_predictors.records import StageQuery

_DRAWS = 500
_CHUNK = 256
_LEVELS = (0.1, 0.5, 0.9)

Floats = NDArray[np.floating]


class Quality(Struct, frozen=True):
    """Of one row of the table. NaN where there is nothing to judge by."""

    policy: str
    in_time: float  # share of answered stages whose prediction was there before the deadline
    router_auc: dict[str, Interval]  # per model, of whether it would solve a workflow alone
    remaining_kendall: Interval  # distance: 0 same order, 0.5 none
    coverage: Interval  # of the 80 % interval of remaining tokens; 0.8 is right
    stages: int  # that the last two are about


def judge(
    policy: str, bundle: str, runs: Mapping[str, Sequence[Sequence[Record]]], traces: Path
) -> Quality:
    """``runs``: rows of the table, one list of records per seed; ``traces`` of this policy's."""
    records = [record for run in runs[policy] for record in run]
    sources = [stage.source for record in records for stage in record.stages]
    kendall, coverage, stages = _lengths(bundle, traces)
    return Quality(
        policy=policy,
        in_time=sources.count("learned") / len(sources) if sources else math.nan,
        router_auc=router_auc(policy, runs),
        remaining_kendall=kendall,
        coverage=coverage,
        stages=stages,
    )


def router_auc(policy: str, runs: Mapping[str, Sequence[Sequence[Record]]]) -> dict[str, Interval]:
    """Area under the ROC curve per model that has a `static:` row: predicted here, right there."""
    from chimera_predictors import metrics

    found: dict[str, Interval] = {}
    for row, seeds in runs.items():
        kind, _, model = row.partition(":")
        if kind != "static":
            continue
        pairs = [
            (ours.stages[0].confidence[model], float(theirs.success))
            for our_run, their_run in zip(runs[policy], seeds, strict=True)
            for ours, theirs in zip(our_run, their_run, strict=True)
            if theirs.latency_s is not None and _predicted(ours, model)
        ]
        score, right = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        weights = metrics.task_weights(np.arange(len(score)), _DRAWS, 0)
        found[model] = _interval(metrics.auc(score, right, weights))
    return found


def _predicted(record: Record, model: str) -> bool:
    first = record.stages[0] if record.stages else None
    return first is not None and first.source == "learned" and model in first.confidence


def _lengths(bundle: str, folder: Path) -> tuple[Interval, Interval, int]:
    from chimera_predictors import metrics
    from chimera_predictors.traces import read_traces

    nothing = Interval(math.nan, math.nan, math.nan)
    if not any(folder.glob("*.jsonl")):
        return nothing, nothing, 0
    traces = read_traces(folder)
    names = [traces.models[code] for code in traces.model]
    low, middle, high = _remaining(bundle, traces.queries(), names).T
    known = ~np.isnan(traces.remaining_tokens) & ~np.isnan(middle)
    actual = traces.remaining_tokens[known]
    weights = metrics.task_weights(traces.workflow[known], _DRAWS, 0)
    kendall = metrics.kendall_distance(middle[known], actual, weights)
    # A length is a whole number: an interval covers those that it reaches by rounding.
    covered = metrics.coverage(np.floor(low[known]), np.ceil(high[known]), actual, weights)
    return _interval(kendall), _interval(covered), len(actual)


def _remaining(bundle: str, queries: "Sequence[StageQuery]", models: Sequence[str]) -> Floats:
    """[R, 3] quantiles of remaining tokens for the model that each stage ran on."""
    from chimera_predictors.predictor import load

    predictor = load(bundle, device="cpu")
    at = [predictor.levels.index(level) for level in _LEVELS]
    rows: list[list[float]] = []
    for start in range(0, len(queries), _CHUNK):
        forecasts = predictor.predict(queries[start : start + _CHUNK])
        for forecast, model in zip(forecasts, models[start : start + _CHUNK], strict=True):
            quantiles = forecast[model].remaining_tokens if model in forecast else None
            rows.append([math.nan] * 3 if quantiles is None else [quantiles[i] for i in at])
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _interval(samples: Floats) -> Interval:
    from chimera_predictors import metrics

    return Interval(*metrics.figure(samples))
