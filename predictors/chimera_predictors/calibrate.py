"""What is learned from predictions of rows held out: calibration, the gate, how good the bundle is.

Knows outputs, labels and priors, not how they came about.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from chimera_kernels import reference_heads as ops
from chimera_kernels.reference_heads import HeadWeights
from chimera_predictors import features
from chimera_predictors.dataset import Array, Ints, Labels
from chimera_predictors.options import LEVELS

# Rows held out are predicted by a few members, served ones by all, which are off by less: with the
# whole shift, intervals of 80 % held 85 % of new tasks on MINT, with none 79 %.
_SHIFT_SHARE = 0.5
_ENOUGH_ROWS = 50  # for a stage group, or a model, to be judged by itself
_PLATT_STEPS = 50


class Gate(Struct, frozen=True):
    """What may be used of one model's heads; the stored prior stands in for the rest."""

    confidence: bool  # the heads beat the prior on tasks not seen
    lengths: bool
    known_confidence: bool  # there were labels at all
    known_lengths: bool


class Calibration(Struct, frozen=True):
    """Numbers that turn raw predictions into honest ones, and say whom to believe."""

    platt: Tensor  # [M, 2]
    conformal: Tensor  # [2, S, Q]
    mean_factor: NDArray[np.float32]  # [2, S]: real mean over the mean of the quantiles
    prior_spread: NDArray[np.float32]  # [2, M, Q]: log quantiles about the prior
    gates: tuple[Gate, ...]  # [M]


def calibrate(
    outputs: ops.HeadOutputs, prior: Tensor, labels: Labels, group: Ints, fold: Ints
) -> Calibration:
    """From R rows held out: outputs [R, M, ...] not yet calibrated, priors [R, M, 4]."""
    own = _Own(outputs, prior, labels.model)
    platt = _platt(own.confidence, labels.success, fold)
    conformal = np.stack([
        _conformal(own.stage, labels.stage, group),
        _conformal(own.remaining, labels.remaining, group),
    ])  # fmt: skip
    lengths = (labels.stage, labels.remaining)
    quantiles = [
        np.maximum.accumulate(values + shift[group], axis=1)
        for values, shift in zip((own.stage, own.remaining), conformal, strict=True)
    ]
    spread = [
        _spread(target - own.prior[:, 1 + number], labels.model, prior.shape[1])
        for number, target in enumerate(lengths)
    ]
    confidence = _sigmoid(platt[0] * _logit(own.confidence) + platt[1])
    gates = tuple(
        _gate(labels.model == model, confidence, quantiles[1], own.prior, spread[1][model], labels)
        for model in range(prior.shape[1])
    )
    factors = [_factor(q, t, group) for q, t in zip(quantiles, lengths, strict=True)]
    return Calibration(
        torch.tensor([platt] * prior.shape[1], dtype=torch.float32),
        torch.from_numpy(conformal.astype(np.float32)),
        np.stack(factors).astype(np.float32),
        np.stack(spread).astype(np.float32),
        gates,
    )


def calibrated(weights: HeadWeights, calibration: Calibration) -> HeadWeights:
    """The heads with their calibration."""
    return weights._replace(platt=calibration.platt, conformal=calibration.conformal)


class _Own:
    """Each row's outputs for its own model."""

    def __init__(self, outputs: ops.HeadOutputs, prior: Tensor, model: Ints) -> None:
        rows, mine = torch.arange(len(model)), torch.from_numpy(model)
        self.confidence = outputs.confidence[rows, mine].double().numpy()  # [R]
        self.stage = outputs.stage[rows, mine].double().numpy()  # [R, Q]
        self.remaining = outputs.remaining[rows, mine].double().numpy()  # [R, Q]
        self.prior = prior[rows, mine].double().numpy()  # [R, 4]


def _platt(confidence: Array, success: Array, fold: Ints) -> tuple[float, float]:
    """Slope and intercept of the logit, (1, 0) unless fitting them helps rows of other folds."""
    known = ~np.isnan(success)
    if known.sum() < _ENOUGH_ROWS or len(set(success[known] > 0.5)) < 2:
        return 1.0, 0.0
    logit, target, fold = _logit(confidence[known]), success[known], fold[known]
    before = after = 0.0
    for number in np.unique(fold):
        there = fold == number
        if there.all():
            return 1.0, 0.0
        slope, intercept = _logistic(logit[~there], target[~there])
        before += _log_loss(logit[there], target[there]).sum()
        after += _log_loss(slope * logit[there] + intercept, target[there]).sum()
    return _logistic(logit, target) if after < before else (1.0, 0.0)


def _logistic(logit: Array, target: Array) -> tuple[float, float]:
    """Newton's method on the log loss of sigmoid(slope * logit + intercept)."""
    x = np.stack([logit, np.ones_like(logit)], axis=1)
    found = np.array([1.0, 0.0])
    for _ in range(_PLATT_STEPS):
        p = _sigmoid(x @ found)
        hessian = (x * (p * (1.0 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (p - target))
        found = found - np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-8:
            break
    return float(np.clip(found[0], 0.2, 5.0)), float(found[1])


def _conformal(quantiles: Array, target: Array, group: Ints) -> Array:
    """[S, Q]: what to add so that a share of `level` lies below; few rows take all rows' shift."""
    known = ~np.isnan(target)
    shift = np.zeros((features.STAGES, len(LEVELS)))
    if known.sum() < _ENOUGH_ROWS:
        return shift
    error = target[:, None] - quantiles
    for column, level in enumerate(LEVELS):
        shift[:, column] = np.quantile(error[known, column], level)
        for stage in range(features.STAGES):
            rows = known & (group == stage)
            if rows.sum() >= _ENOUGH_ROWS:
                shift[stage, column] = np.quantile(error[rows, column], level)
    return _SHIFT_SHARE * shift


def _spread(error: Array, model: Ints, models: int) -> Array:
    """[M, Q] quantiles of the log error of the prior's mean."""
    known = ~np.isnan(error)
    levels = np.array(LEVELS)
    overall = np.quantile(error[known], levels) if known.any() else np.zeros(len(levels))
    table = np.tile(overall, (models, 1))
    for number in range(models):
        rows = known & (model == number)
        if rows.sum() >= _ENOUGH_ROWS:
            table[number] = np.quantile(error[rows], levels)
    return table.astype(np.float64)


def _factor(quantiles: Array, target: Array, group: Ints) -> Array:
    """[S] real mean tokens over the mean that the quantiles suggest."""
    known = ~np.isnan(target)
    factor = np.ones(features.STAGES)
    mean = mean_tokens(quantiles)
    for stage in range(features.STAGES):
        rows = known & (group == stage)
        if rows.sum() >= _ENOUGH_ROWS:
            ratio = np.expm1(target[rows]).mean() / max(mean[rows].mean(), 1e-9)
            factor[stage] = min(max(ratio, 0.5), 2.0)
    return factor


def mean_tokens(quantiles: NDArray[np.floating]) -> Array:
    """Mean tokens [...] of log quantiles [..., Q]: trapezoids between, flat ends beyond."""
    tokens = np.expm1(quantiles.astype(np.float64))
    levels = np.array(LEVELS)
    inner = ((tokens[..., 1:] + tokens[..., :-1]) / 2.0 * np.diff(levels)).sum(axis=-1)
    ends = tokens[..., 0] * levels[0] + tokens[..., -1] * (1.0 - levels[-1])
    return (inner + ends).astype(np.float64)


def _gate(
    mine: NDArray[np.bool_], confidence: Array, remaining: Array, prior: Array, spread: Array,
    labels: Labels,
) -> Gate:  # fmt: skip
    with_success = mine & ~np.isnan(labels.success)
    with_length = mine & ~np.isnan(labels.remaining)
    target = labels.success[with_success]
    learned = _log_loss(_logit(confidence[with_success]), target).sum()
    known = _log_loss(_logit(prior[with_success, 0]), target).sum()
    wanted = labels.remaining[with_length]
    mean = prior[with_length, 2]
    return Gate(
        confidence=bool(with_success.sum() >= _ENOUGH_ROWS and learned < known),
        lengths=bool(
            with_length.sum() >= _ENOUGH_ROWS
            and _pinball(remaining[with_length], wanted)
            < _pinball(mean[:, None] + spread[None, :], wanted)
        ),
        known_confidence=bool(with_success.any()),
        known_lengths=bool(with_length.any()),
    )


def _pinball(quantiles: Array, target: Array) -> float:
    error = target[:, None] - quantiles
    levels = np.array(LEVELS)
    return float(np.maximum(levels * error, (levels - 1.0) * error).sum())


def _log_loss(logit: Array, target: Array) -> Array:
    tensor = F.binary_cross_entropy_with_logits(
        torch.from_numpy(logit), torch.from_numpy(target), reduction="none"
    )
    return tensor.numpy()


def _logit(p: Array) -> Array:
    p = np.clip(p, 1e-4, 1.0 - 1e-4)
    return np.log(p / (1.0 - p))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -math.inf, 500.0)))
