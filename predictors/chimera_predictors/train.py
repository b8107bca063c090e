"""Training of the heads: priors and kernel regression in closed form, then a small network on top.

All fitting is by folds of tasks: each of the network's members leaves one fold out, and what it
says about that fold is what calibration, the gate and the reported figures are made from. The mean
of the members is what is served. Seeded: the same traces give the same heads on the same machine.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Struct
from torch import Tensor

from chimera_kernels import reference_heads as ops
from chimera_kernels.reference_heads import HeadInputs, HeadWeights
from chimera_predictors import features, priors
from chimera_predictors.dataset import Array, Inputs, Ints, Labels, tensors_of
from chimera_predictors.network import Network, train_network
from chimera_predictors.options import LEVELS, Options, Progress

# Where nobody has a label: success, log tokens twice, log stages. The gate lets none of it out.
_UNKNOWN = (0.5, 4.6, 5.3, 0.0)
_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class Fit(Struct, frozen=True):
    """Heads with what calibration needs to know of them."""

    weights: HeadWeights
    held_out: ops.HeadOutputs  # [R, M, ...] each row predicted without its task, not calibrated
    prior: Tensor  # [R, M, 4] the priors of each row, likewise without its task


@dataclass(frozen=True)
class _Closed:
    """All of the heads that has a closed form."""

    kind_weight: Array
    kind_bias: Array
    base: Array  # [S, K, M, 4]
    centres: Array
    shift: Array  # [C, M * 3]


def fit(
    inputs: Inputs, labels: Labels, judged: Labels, fold: Ints, kinds: int, models: int,
    options: Options, progress: Progress = lambda what, share: None,
) -> Fit:  # fmt: skip
    """Train on rows whose ``fold`` [R] says which member may not see them.

    ``judged`` are the labels that may decide how much of the texts to believe: all, unless the
    encoder has seen some of the tasks.
    """
    progress("priors and text regression", 0.0)
    folds = int(fold.max()) + 1
    everything = np.ones(len(fold), dtype=bool)
    weights = _start(inputs, _closed(inputs, labels, everything, kinds, models, options), options)
    declared = tensors_of(inputs)
    hidden = declared._replace(kind=torch.full_like(declared.kind, -1))
    ways = [_Held.empty(len(fold), kinds, models) for _ in (declared, hidden)]
    for number in range(folds):
        there = torch.from_numpy(fold == number)
        part = _with(weights, _closed(inputs, labels, fold != number, kinds, models, options))
        for held, given in zip(ways, (declared, hidden), strict=True):
            held.fill(there, HeadInputs(*(x[there] for x in given)), part)
        progress("priors and text regression", 0.15 * (number + 1) / folds)
    scale = _shift_scale(ways[0], judged, inputs.stage_group)
    weights = weights._replace(shift_scale=scale)
    x = [ops.joined(declared, held.kinds, weights) for held in ways]
    prior = [held.prior for held in ways]
    moved = [held.scaled(scale[declared.stage_group]) for held in ways]
    net = Network(folds, options.members(len(fold)), x[0].shape[1], models, options)
    net.start(labels)
    group = inputs.stage_group
    with torch.random.fork_rng(devices=[]):
        widths = (weights.task_projection.shape[1], weights.new_projection.shape[1])
        raw = train_network(net, x, prior, moved, labels, fold, group, widths, options, progress)
    weights = weights._replace(**net.merged())
    weights = weights._replace(router_share=_router_share(raw, prior[0], moved[0], judged, group))
    outputs = ops.finish(raw, prior[0], moved[0], declared.stage_group, weights)
    return Fit(weights, outputs, prior[0])


@dataclass(frozen=True)
class _Held:
    """What the closed forms say of rows whose tasks they have not seen."""

    kinds: Tensor  # [R, K]
    prior: Tensor  # [R, M, 4]
    moved: Tensor  # [R, M, 4] by all of the texts' shift

    @classmethod
    def empty(cls, rows: int, kinds: int, models: int) -> "_Held":
        return cls(
            torch.zeros(rows, kinds), torch.zeros(rows, models, 4), torch.zeros(rows, models, 4)
        )

    def fill(self, there: Tensor, inputs: HeadInputs, weights: HeadWeights) -> None:
        kinds = ops.kind_vector(inputs, weights)
        self.kinds[there] = kinds
        self.prior[there] = ops.prior_of(inputs, kinds, weights)
        self.moved[there] = self.prior[there] + ops.text_shift(inputs, weights)

    def scaled(self, scale: Tensor) -> Tensor:
        """[R, M, 4] moved by as much as ``scale`` [R, 3] says."""
        factor = F.pad(scale, (0, 1))[:, None, :]
        return self.prior + (self.moved - self.prior) * factor


def _shift_scale(held: _Held, labels: Labels, group: Ints) -> Tensor:
    """How much of the texts' shift to believe, [S, 3], by least squares on rows held out."""
    scale = torch.zeros(features.STAGES, 3)
    rows = torch.arange(len(group))
    model = torch.from_numpy(labels.model)
    for number, target in enumerate((labels.success, labels.stage, labels.remaining)):
        prior = held.prior[rows, model, number].numpy()
        step = held.moved[rows, model, number].numpy() - prior
        rest = target - prior
        for stage in range(features.STAGES):
            used = (group == stage) & ~np.isnan(rest)
            power = float((step[used] ** 2).sum())
            if power > 0.0:
                scale[stage, number] = min(max(float((step * rest)[used].sum()) / power, 0.0), 1.5)
    return scale


def _router_share(raw: Tensor, prior: Tensor, moved: Tensor, labels: Labels, group: Ints) -> Tensor:
    """The network's share of the logit, [S], by the log loss of rows held out."""
    rows, model = torch.arange(len(group)), torch.from_numpy(labels.model)
    network = ops.logit_of(prior[rows, model]) + raw[rows, model, 0]
    texts = ops.logit_of(moved[rows, model])
    success = torch.from_numpy(labels.success.astype(np.float32))
    found = torch.zeros(features.STAGES)
    for stage in range(features.STAGES):
        used = torch.from_numpy(group == stage) & ~success.isnan()
        if used.any():
            losses = {
                share: float(
                    F.binary_cross_entropy_with_logits(
                        share * network[used] + (1.0 - share) * texts[used], success[used]
                    )
                )
                for share in _SHARES
            }
            found[stage] = min(losses, key=lambda share: losses[share])
    return found


def _closed(
    inputs: Inputs, labels: Labels, rows: np.ndarray, kinds: int, models: int, options: Options
) -> _Closed:
    """Priors and kernel regression from these rows."""
    group, kind, model = inputs.stage_group[rows], inputs.kind[rows], labels.model[rows]
    task, texts = inputs.task[rows], inputs.texts.astype(np.float64)
    used, first = np.unique(task, return_index=True)
    used, first = used[used >= 0], first[used >= 0]
    kind_weight, kind_bias = priors.kind_classifier(texts[used], kind[first], kinds)
    after = np.log(0.05 + labels.after[rows])
    targets = (labels.success[rows], labels.stage[rows], labels.remaining[rows], after)
    base = np.stack(
        [
            _table(target, group, kind, model, kinds, models, unknown)
            for target, unknown in zip(targets, _UNKNOWN, strict=True)
        ],
        axis=-1,
    )
    share = _kind_share(kind, kinds)
    # The first stage has one row per run, and it is what routing is about.
    counts = (group == 0) & (task >= 0)
    centres = priors.choose_centres(texts[np.unique(task[counts])], options.centres, options.seed)
    shifts: list[Array] = []
    for number, target in enumerate(targets[:3]):
        declared = base[group, kind, model, number]
        unknown = (share * base[group, :, model, number]).sum(axis=-1)
        residual = np.where(counts, target - np.where(kind >= 0, declared, unknown), np.nan)
        shifts.append(
            priors.kernel_ridge(
                texts, centres, task, model, residual, models, options.width,
                options.shared_noise, options.own_noise,
            )
        )  # fmt: skip
    shift = np.stack(shifts, axis=-1).reshape(len(centres), -1)
    return _Closed(kind_weight, kind_bias, base, centres, shift)


def _table(
    target: Array, group: Ints, kind: Ints, model: Ints, kinds: int, models: int, unknown: float
) -> Array:
    """Shrunk means [S, K, M]; rows without a kind count for their model alone."""
    stages = features.STAGES
    known = ~np.isnan(target)
    default = float(target[known].mean()) if known.any() else unknown
    by_model = priors.refine(target, model, np.full(models, default))
    declared = np.where(kind >= 0, target, np.nan)
    place = model * kinds + np.maximum(kind, 0)
    by_kind = priors.refine(declared, place, np.repeat(by_model, kinds))
    finest = priors.refine(declared, place * stages + group, np.repeat(by_kind, stages))
    return finest.reshape(models, kinds, stages).transpose(2, 1, 0)


def _kind_share(kind: Ints, kinds: int) -> Array:
    count = np.bincount(kind[kind >= 0], minlength=kinds) + 1.0
    return count / count.sum()


def _start(inputs: Inputs, closed: _Closed, options: Options) -> HeadWeights:
    """All weights but the network's; calibration does nothing yet."""
    numbers = inputs.numbers.astype(np.float64)
    tasks = np.unique(inputs.task[inputs.task >= 0])
    news = np.unique(inputs.new[inputs.new >= 0])
    # Hundreds of tasks cannot tell hundreds of directions apart.
    task_width = options.task_width or min(max(len(tasks) // 16, 8), inputs.texts.shape[1])
    task_mean, task_projection = _projection(inputs.texts[tasks], task_width)
    new_mean, new_projection = _projection(inputs.texts[news], options.new_width)
    models = closed.base.shape[2]
    arrays = {
        "edges": _edges(numbers, options.steps),
        "task_mean": task_mean,
        "task_projection": task_projection,
        "new_mean": new_mean,
        "new_projection": new_projection,
        "width": np.array([options.width]),
        "shift_scale": np.ones((features.STAGES, 3)),
        "router_share": np.ones(features.STAGES),
        "platt": np.tile([1.0, 0.0], (models, 1)),
        "conformal": np.zeros((2, features.STAGES, len(LEVELS))),
    }
    tensors = {name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items()}
    nothing = torch.zeros(0)
    empty = dict.fromkeys(("hidden_weight", "hidden_bias", "out_weight", "out_bias"), nothing)
    blank = dict.fromkeys(("kind_weight", "kind_bias", "base", "centres", "shift"), nothing)
    return _with(HeadWeights(**tensors, **empty, **blank), closed)


def _edges(numbers: Array, steps: int) -> Array:
    """Quantiles of each number [N, G + 1], kept apart: a number with few values has idle steps."""
    edges = np.quantile(numbers, np.linspace(0.0, 1.0, steps + 1), axis=0).T
    for row, values in zip(edges, numbers.T, strict=True):
        distinct = np.unique(row)
        row[:] = distinct[-1] + 1.0 + np.arange(len(row))
        row[: len(distinct)] = distinct
        if len(distinct) == 1 and values.max() > values.min():
            row[:2] = values.min(), values.max()
    return edges


def _projection(texts: np.ndarray, width: int) -> tuple[Array, Array]:
    if len(texts) < 2:
        return np.zeros(texts.shape[1]), np.zeros((texts.shape[1], 1))
    return priors.projection(texts.astype(np.float64), width)


def _with(weights: HeadWeights, closed: _Closed) -> HeadWeights:
    parts = {
        name: torch.from_numpy(np.ascontiguousarray(getattr(closed, name), dtype=np.float32))
        for name in ("kind_weight", "kind_bias", "base", "centres", "shift")
    }
    return weights._replace(**parts)
