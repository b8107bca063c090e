"""The two heads in plain torch: texts and numbers -> confidence and token quantiles per model.

The truth for the fused kernel and the CPU path, as `reference.py` is for the encoder. All models
come out of one pass; which of them are used is not decided here. All arithmetic is fp32.

Symbols: B stages, D text vector, N numbers, G steps of each, K kinds, S stage groups, M models,
Q quantile levels, C centres, P and O projected widths, H hidden units, V = 2 + 2Q raw outputs per
model: one logit, twice a location with Q - 1 gaps, one log count.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PROBABILITY_LIMIT = 0.02  # of the prior after the text has moved it
_MAX_LOG_TOKENS = 16.2  # log(1 + 10,000,000)
_SHIFTED = 3  # what the text moves directly: success and both lengths


class HeadInputs(NamedTuple):
    """What B stages are predicted from."""

    numbers: Tensor  # [B, N] as `features.numbers` makes them
    stage_group: Tensor  # [B] int64, 0..S-1
    kind: Tensor  # [B] int64, 0..K-1, or -1 where the text has to tell it
    task: Tensor  # [B, D] unit vector of the workflow's first text, or zeros
    new: Tensor  # [B, D] unit vector of this stage's own text, or zeros


class HeadWeights(NamedTuple):
    """All tensors of the heads, fp32."""

    edges: Tensor  # [N, G + 1] ascending: where each number's steps begin and end
    kind_weight: Tensor  # [D, K]
    kind_bias: Tensor  # [K]
    task_mean: Tensor  # [D]
    task_projection: Tensor  # [D, P]
    new_mean: Tensor  # [D]
    new_projection: Tensor  # [D, O]
    base: Tensor  # [S, K, M, 4]: success, two mean log lengths, log of the mean stages after
    centres: Tensor  # [C, D]
    width: Tensor  # [1]
    shift: Tensor  # [C, M * 3]: what a text near a centre adds to the base
    shift_scale: Tensor  # [S, 3]: how much of that counts at each stage
    hidden_weight: Tensor  # [N G + K + P + O, H]
    hidden_bias: Tensor  # [H]
    out_weight: Tensor  # [H, M * V]
    out_bias: Tensor  # [M * V]
    router_share: Tensor  # [S]: the network's share of the logit at each stage
    platt: Tensor  # [M, 2]: slope and intercept of the logit
    conformal: Tensor  # [2, S, Q]: what calibration adds to the log quantiles


class HeadOutputs(NamedTuple):
    """Predictions for B stages and M models."""

    confidence: Tensor  # [B, M] probability of success
    stage: Tensor  # [B, M, Q] quantiles of log(1 + output tokens of this stage), ascending
    remaining: Tensor  # [B, M, Q] the same for this and all later stages, never below `stage`
    after: Tensor  # [B, M] expected stages after this one


def heads(inputs: HeadInputs, weights: HeadWeights) -> HeadOutputs:
    """Both heads for all models; the functions below are its steps."""
    kinds = kind_vector(inputs, weights)
    prior = prior_of(inputs, kinds, weights)
    moved = prior + text_shift(inputs, weights)
    x = joined(inputs, kinds, weights)
    hidden = F.gelu(x @ weights.hidden_weight + weights.hidden_bias)
    raw = (hidden @ weights.out_weight + weights.out_bias).view(len(x), prior.shape[1], -1)
    return finish(raw, prior, moved, inputs.stage_group, weights)


def kind_vector(inputs: HeadInputs, weights: HeadWeights) -> Tensor:
    """[B, K]: one-hot of the declared kind; elsewhere softmax(task W + b), a soft cluster."""
    soft = F.softmax(inputs.task @ weights.kind_weight + weights.kind_bias, dim=-1)
    known = F.one_hot(inputs.kind.clamp(min=0), soft.shape[1]).to(soft.dtype)
    return torch.where((inputs.kind >= 0)[:, None], known, soft)


def prior_of(inputs: HeadInputs, kinds: Tensor, weights: HeadWeights) -> Tensor:
    """[B, M, 4]: kinds · table[stage group], the mean of what was seen of (stage, kind, model)."""
    return torch.einsum("bk,bkmv->bmv", kinds, weights.base[inputs.stage_group])


def text_shift(inputs: HeadInputs, weights: HeadWeights) -> Tensor:
    """[B, M, 4]: how far texts alike were off their prior; 0 for the last value and without a text.

    exp((task Zᵀ - 1) / width) · shift, with centres Z: a kernel ridge regression of what the prior
    left unexplained, so that a text far from all others leaves the prior as it is.
    """
    near = torch.exp((inputs.task @ weights.centres.T - 1.0) / weights.width)
    has_text = (inputs.task != 0).any(dim=1, keepdim=True)
    shift = (near * has_text) @ weights.shift
    shift = shift.view(len(shift), -1, _SHIFTED) * weights.shift_scale[inputs.stage_group][:, None]
    return F.pad(shift, (0, 1))


def joined(inputs: HeadInputs, kinds: Tensor, weights: HeadWeights) -> Tensor:
    """[B, N G + K + P + O]: numbers in steps, kinds, and both texts on few dimensions.

    A number x becomes G values clip((x - e_g) / (e_{g+1} - e_g), 0, 1): piecewise linear encoding
    (Gorishniy et al. 2022). Beyond the outer edges nothing changes any more, so that a value never
    seen in training cannot explode.
    """
    low, high = weights.edges[:, :-1], weights.edges[:, 1:]
    steps = ((inputs.numbers[:, :, None] - low) / (high - low)).clamp(0.0, 1.0)
    task = (inputs.task - weights.task_mean) @ weights.task_projection
    new = (inputs.new - weights.new_mean) @ weights.new_projection
    return torch.cat(
        [
            steps.flatten(1),
            kinds,
            task * (inputs.task != 0).any(dim=1, keepdim=True),
            new * (inputs.new != 0).any(dim=1, keepdim=True),
        ],
        dim=1,
    )


def logit_of(base: Tensor) -> Tensor:
    """log(p / (1 - p)) of the success in `base` [..., 4], kept away from 0 and 1."""
    return torch.logit(base[..., 0].clamp(_PROBABILITY_LIMIT, 1.0 - _PROBABILITY_LIMIT))


def quantiles(location: Tensor, gaps: Tensor) -> Tensor:
    """[..., Q] from the middle one [...] and the Q - 1 raw gaps [..., Q - 1], ascending always."""
    steps = F.softplus(gaps)
    middle = steps.shape[-1] // 2
    below = steps[..., :middle].flip(-1).cumsum(-1).flip(-1)
    above = steps[..., middle:].cumsum(-1)
    location = location[..., None]
    return torch.cat([location - below, location, location + above], dim=-1)


def finish(
    raw: Tensor, prior: Tensor, moved: Tensor, stage_group: Tensor, weights: HeadWeights
) -> HeadOutputs:
    """Raw outputs [B, M, V], prior and moved prior [B, M, 4] -> calibrated, monotone predictions.

    Two estimates of the confidence start from the prior: the network's and the kernel regression's.
    Their logits are mixed, with a share of the network's per stage group.
    """
    levels = (raw.shape[-1] - 2) // 2
    share = weights.router_share[stage_group][:, None]
    network = logit_of(prior) + raw[..., 0]
    logit = share * network + (1.0 - share) * logit_of(moved)
    confidence = torch.sigmoid(weights.platt[:, 0] * logit + weights.platt[:, 1])
    found: list[Tensor] = []
    for target in (0, 1):
        part = raw[..., 1 + target * levels : 1 + (target + 1) * levels]
        values = quantiles(moved[..., 1 + target] + part[..., 0], part[..., 1:])
        values = values + weights.conformal[target, stage_group][:, None, :]
        found.append(values.cummax(dim=-1).values.clamp(0.0, _MAX_LOG_TOKENS))
    stage, remaining = found
    after = torch.exp((moved[..., 3] + raw[..., -1]).clamp(max=8.0))
    return HeadOutputs(confidence, stage, torch.maximum(stage, remaining), after)
