"""The small network on top of the priors: E members side by side, each trained without one fold.

Knows arrays and labels. What it learns is how far the closed forms of `train.py` are off, so it
starts from zero and may end there.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chimera_kernels import reference_heads as ops
from chimera_predictors.dataset import Ints, Labels
from chimera_predictors.options import LEVELS, Options, Progress

_LEAST_STEPS = 300.0


class Network(nn.Module):
    """E members side by side, each with a head for confidence and one for lengths."""

    def __init__(self, folds: int, members: int, width: int, models: int, options: Options) -> None:
        super().__init__()
        self.folds, self.models, self.options = folds, models, options
        self.members_per_fold = members
        self.values = 2 + 2 * len(LEVELS)
        members *= folds
        generator = torch.Generator().manual_seed(options.seed)
        self.router = _Head(members, width, options.hidden, models, 1, generator)
        self.length = _Head(members, width, options.hidden, models, self.values - 1, generator)
        self.start_gaps = nn.Parameter(torch.zeros(members, 1, models, self.values))

    def start(self, labels: Labels) -> None:
        """Set the gaps between the quantiles to those of the residuals of each model."""
        levels = np.array(LEVELS)
        with torch.no_grad():
            for target, values in enumerate((labels.stage, labels.remaining)):
                at = 1 + target * len(LEVELS)
                for model in range(self.models):
                    known = values[(labels.model == model) & ~np.isnan(values)]
                    spread = np.quantile(known, levels) if len(known) > 1 else 2.0 * levels
                    steps = np.maximum(0.7 * np.diff(spread), 0.02)
                    raw = torch.from_numpy(np.log(np.expm1(steps)).astype(np.float32))
                    self.start_gaps[:, :, model, at + 1 : at + len(LEVELS)] = raw

    def forward(self, for_router: Tensor, for_length: Tensor, model: Tensor) -> Tensor:
        """Raw outputs [E, B, V] of rows [E, B, F], each for its own model [E, B]; drops units."""
        raw = torch.cat(
            [
                self.router(for_router, model, self.options.router_dropout),
                self.length(for_length, model, self.options.dropout),
            ],
            dim=-1,
        )
        index = model[..., None, None].expand(*model.shape, 1, self.values)
        gaps = self.start_gaps.expand(-1, model.shape[1], -1, -1).gather(2, index).squeeze(2)
        return raw + gaps

    def all_models(self, x: Tensor, members: slice) -> Tensor:
        """Raw outputs [B, M, V] of rows [B, F] for all models, mean over these members."""
        weight, bias, out, out_bias = self._stacked(members)
        return (F.gelu(x @ weight + bias) @ out + out_bias).view(len(x), self.models, -1)

    def merged(self) -> dict[str, Tensor]:
        """The members as one wide network with the same mean."""
        weight, bias, out, out_bias = self._stacked(slice(None))
        names = ("hidden_weight", "hidden_bias", "out_weight", "out_bias")
        return dict(zip(names, (weight, bias, out, out_bias), strict=True))

    @torch.no_grad()
    def _stacked(self, members: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = (self.router.stacked(members), self.length.stacked(members))
        out = torch.zeros(sum(len(p[2]) for p in parts), self.models, self.values)
        out[: len(parts[0][2]), :, :1] = parts[0][2]
        out[len(parts[0][2]) :, :, 1:] = parts[1][2]
        return (
            torch.cat([p[0] for p in parts], dim=1),
            torch.cat([p[1] for p in parts]),
            out.flatten(1),
            self.start_gaps[members].mean(dim=0).flatten().clone(),
        )


class _Head(nn.Module):
    """One hidden layer for each of E members; output weights are shared plus the model's own."""

    def __init__(
        self, members: int, width: int, hidden: int, models: int, outputs: int,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(members, width, hidden, generator=generator) * width**-0.5
        )
        self.bias = nn.Parameter(torch.randn(members, 1, hidden, generator=generator) * 0.1)
        self.shared = nn.Parameter(torch.zeros(members, hidden, outputs))
        self.own = nn.Parameter(torch.zeros(members, models, hidden, outputs))

    def forward(self, x: Tensor, model: Tensor, dropout: float) -> Tensor:
        """[E, B, outputs] of rows [E, B, F] for their own models [E, B]."""
        hidden = F.dropout(F.gelu(torch.baddbmm(self.bias, x, self.weight)), dropout)
        members, models, width, outputs = self.own.shape
        own = self.own.permute(0, 2, 1, 3).reshape(members, width, models * outputs)
        mine = (hidden @ own).view(*model.shape, models, outputs)
        index = model[..., None, None].expand(*model.shape, 1, outputs)
        return hidden @ self.shared + mine.gather(2, index).squeeze(2)

    def stacked(self, members: slice) -> tuple[Tensor, Tensor, Tensor]:
        """[F, E H], [E H] and [E H, M, outputs] of one network that gives the members' mean."""
        weight, bias = self.weight[members], self.bias[members]
        out = (self.shared[members][:, None] + self.own[members]) / len(weight)
        return (
            weight.permute(1, 0, 2).flatten(1).contiguous(),
            bias.flatten().clone(),
            out.permute(0, 2, 1, 3).flatten(0, 1).contiguous(),
        )


def train_network(
    network: Network, x: list[Tensor], priors: list[Tensor], moved: list[Tensor], labels: Labels,
    fold: Ints, group: Ints, text_widths: tuple[int, int], options: Options, progress: Progress,
) -> Tensor:  # fmt: skip
    """Train all members at once; raw outputs [R, M, V] of each row by those that never saw it.

    Inputs [R, F], priors and moved priors [R, M, 4] come twice, for the declared kind and for
    one that the text had to tell: each row is trained on either, at random. The last of the F
    inputs are the two texts, of ``text_widths``.
    """
    torch.manual_seed(options.seed + 1)  # of the caller's fork; dropout takes no generator
    generator = torch.Generator().manual_seed(options.seed + 1)
    model = torch.from_numpy(labels.model)
    targets = _Targets(labels, torch.from_numpy(_router_weight(group, options)))
    each = torch.arange(len(model))
    own_base = [base[each, model] for base in moved]
    own_prior = [ops.logit_of(prior[each, model]) for prior in priors]
    seen = [np.flatnonzero(fold != f) for f in range(network.folds)]
    least = min(len(rows) for rows in seen)
    batch = min(max(least // 50, 64), 1024)
    low, high = options.epochs
    steps = int(min(max(options.rows_seen / least, low), high) * least / batch) + 1
    router_steps = min(max(options.router_epochs * least / batch, _LEAST_STEPS), steps)
    optimiser = torch.optim.AdamW(
        [
            {"params": [*network.router.parameters()], "lr": options.router_rate},
            {"params": [*network.length.parameters(), network.start_gaps]},
        ],
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, [_Slope(router_steps), _Slope(float(steps))]
    )
    cut = _Dropout(x[0].shape[1], text_widths, options.text_dropout)
    rows_of = [torch.from_numpy(rows) for rows in seen for _ in range(network.members_per_fold)]
    for step in range(steps):
        at = torch.stack(
            [rows[torch.randint(len(rows), (batch,), generator=generator)] for rows in rows_of]
        )
        blind = torch.rand(at.shape, generator=generator) < options.kind_dropout
        rows = torch.where(blind[..., None], x[1][at], x[0][at])
        base = torch.where(blind[..., None], own_base[1][at], own_base[0][at])
        prior_logit = torch.where(blind, own_prior[1][at], own_prior[0][at])
        for_router = F.dropout(rows, options.input_dropout)
        raw = network(for_router, cut(rows, generator), model[at])
        loss = targets.loss(raw, prior_logit, base, at, options)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            progress("network", 0.15 + 0.8 * step / steps)
    held = torch.zeros(len(model), network.models, network.values)
    with torch.no_grad():
        for number in range(network.folds):
            there = torch.from_numpy(np.flatnonzero(fold == number))
            first = number * network.members_per_fold
            members = slice(first, first + network.members_per_fold)
            held[there] = network.all_models(x[0][there], members)
    return held


class _Slope:
    """Learning rate over steps: a short rise, then down to nothing."""

    def __init__(self, steps: float) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / 30) * max(1.0 - step / self.steps, 0.0)


class _Dropout:
    """Leaves whole texts out, so that the network also works without and leans on none too much."""

    def __init__(self, width: int, text_widths: tuple[int, int], rate: float) -> None:
        task, new = text_widths
        self.parts = (slice(width - new - task, width - new), slice(width - new, width))
        self.rate = rate

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        x = x.clone()
        for part in self.parts:
            keep = torch.rand(x.shape[:2], generator=generator) >= self.rate
            x[..., part] *= keep[..., None]
        return x


def _router_weight(group: Ints, options: Options) -> np.ndarray:
    return np.where(group == 0, 1.0, options.later_weight).astype(np.float32)


class _Targets:
    """Labels as tensors, and the loss."""

    def __init__(self, labels: Labels, weight: Tensor) -> None:
        self.success, self.stage, self.remaining, self.after = (
            torch.from_numpy(values.astype(np.float32))
            for values in (labels.success, labels.stage, labels.remaining, labels.after)
        )
        self.weight = weight
        self.levels = torch.tensor(LEVELS)

    def loss(
        self, raw: Tensor, prior_logit: Tensor, base: Tensor, at: Tensor, options: Options
    ) -> Tensor:
        """Sum over members of masked cross entropy, pinball and Poisson losses."""
        members = len(raw)
        success, weight = self.success[at], self.weight[at]
        logit = prior_logit + raw[..., 0]
        entropy = F.binary_cross_entropy_with_logits(
            logit, success.nan_to_num(0.0), reduction="none"
        )
        total = _masked_mean(entropy * weight, ~success.isnan())
        for target, values in enumerate((self.stage, self.remaining)):
            levels = len(LEVELS)
            part = raw[..., 1 + target * levels : 1 + (target + 1) * levels]
            found = ops.quantiles(base[..., 1 + target] + part[..., 0], part[..., 1:])
            wanted = values[at]
            error = wanted.nan_to_num(0.0)[..., None] - found
            pinball = torch.maximum(self.levels * error, (self.levels - 1.0) * error).mean(dim=-1)
            total = total + options.length_weight * _masked_mean(pinball, ~wanted.isnan())
        after = self.after[at]
        log_rate = (base[..., 3] + raw[..., -1]).clamp(max=8.0)
        poisson = log_rate.exp() - after.nan_to_num(0.0) * log_rate
        return members * (total + 0.1 * _masked_mean(poisson, ~after.isnan()))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
