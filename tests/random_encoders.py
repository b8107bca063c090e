"""Random encoders of both families and batches for them, with nothing left at 0 or 1."""

from itertools import accumulate

import torch
from torch import Tensor

from chimera_kernels.reference import Layer, Linear, Norm, Spec, Weights

VOCABULARY = 97
MAX_TOKENS = 80


def _linear(out: int, inner: int, biased: bool) -> Linear:
    weight = torch.randn(out, inner) / inner**0.5
    return Linear(weight, torch.randn(out) * 0.3 if biased else None)


def _norm(width: int, biased: bool) -> Norm:
    bias = torch.randn(width) * 0.3 if biased else None
    return Norm(1.0 + 0.3 * torch.randn(width), bias)


def bert(
    width: int = 48, heads: int = 3, inner: int = 72, layers: int = 2, activation: str = "gelu"
) -> tuple[Weights, Spec]:
    """Post-norm, with positions and biases."""
    weights = Weights(
        tokens=torch.randn(VOCABULARY, width),
        positions=torch.randn(MAX_TOKENS, width),
        token_types=torch.randn(2, width),
        embedding_norm=_norm(width, True),
        layers=tuple(
            Layer(
                _norm(width, True),
                _linear(3 * width, width, True),
                _linear(width, width, True),
                _norm(width, True),
                _linear(inner, width, True),
                _linear(width, inner, True),
            )
            for _ in range(layers)
        ),
        final_norm=None,
    )
    return weights, Spec("bert", heads, 1e-12, MAX_TOKENS, activation)


def modernbert(
    width: int = 64, heads: int = 2, inner: int = 40, activation: str = "gelu"
) -> tuple[Weights, Spec]:
    """Pre-norm, gated, rotated, every layer but the first one seeing only its neighbours."""
    windows, thetas = (None, 5, 5), (160_000.0, 10_000.0, 10_000.0)
    weights = Weights(
        tokens=torch.randn(VOCABULARY, width),
        positions=None,
        token_types=None,
        embedding_norm=_norm(width, False),
        layers=tuple(
            Layer(
                _norm(width, False) if number else None,
                _linear(3 * width, width, False),
                _linear(width, width, False),
                _norm(width, False),
                _linear(2 * inner, width, False),
                _linear(width, inner, False),
            )
            for number in range(len(windows))
        ),
        final_norm=_norm(width, False),
    )
    return weights, Spec("modernbert", heads, 1e-5, MAX_TOKENS, activation, windows, thetas)


def batch(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids [T], their positions [T] and cu_seqlens [S+1], all int32."""
    ids = torch.randint(VOCABULARY, (sum(lengths),), dtype=torch.int32)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    return ids, positions, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def padded(values: Tensor, size: int, fill: int) -> Tensor:
    """`values` with `fill` behind them, up to `size`."""
    return torch.cat([values, values.new_full((size - len(values),), fill)])
