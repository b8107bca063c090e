"""Every op of the predictors in plain torch: what kernels are checked against, and the CPU path.

Sequences lie packed one after the other without padding: `ids` [T] holds them all, `cu_seqlens`
[S+1] says where each begins and ends, T being their total length. This module knows tensors: no
files, no tokens' texts, no requests. All ops but `prepack`'s result are differentiable.
"""

from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["mean", "cls"]

# Attention scores made at once. In bf16 they are half of a core's L2 cache (1 MiB on the AMD Zen 5
# measured), and a pass over 256 tokens takes a fifth less than with those of all heads at once.
SCORES_AT_ONCE = 1 << 18


class Linear(NamedTuple):
    """y = x Wᵀ + b, with `weight` [out, in] and `bias` [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


class Norm(NamedTuple):
    """Layer normalisation's `weight` [D] and `bias` [D] or None."""

    weight: Tensor
    bias: Tensor | None = None


class Layer(NamedTuple):
    """One encoder layer, N being the inner width: `up` gives [T, N], or [T, 2N] for GeGLU.

    BERT normalises after attention and after the MLP, ModernBERT before them; the first layer of
    ModernBERT has no `attention_norm`, because the embedding was just normalised.
    """

    attention_norm: Norm | None
    qkv: Linear  # [3D, D]: the queries', keys' and values' rows in this order
    out: Linear  # [D, D]
    mlp_norm: Norm
    up: Linear  # [N, D] or [2N, D]
    down: Linear  # [D, N]


class Weights(NamedTuple):
    """All tensors of an encoder, of one dtype and device. None: the family has no such part."""

    tokens: Tensor  # [V, D]
    positions: Tensor | None  # [P, D]
    token_types: Tensor | None  # [types, D]; only type 0 is ever used
    embedding_norm: Norm
    layers: tuple[Layer, ...]
    final_norm: Norm | None


class Spec(NamedTuple):
    """What the tensors alone do not say."""

    family: Literal["bert", "modernbert"]
    heads: int
    eps: float  # of the layer normalisations
    max_tokens: int  # longest sequence
    activation: str  # one of ACTIVATIONS
    # ModernBERT, one per layer: how far a token sees to either side (None: all), and RoPE's base
    windows: tuple[int | None, ...] = ()
    thetas: tuple[float, ...] = ()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def forward(ids: Tensor, cu_seqlens: Tensor, weights: Weights, spec: Spec) -> Tensor:
    """Hidden states of the last layer, [T, D] in the weights' dtype.

    `ids` [T] and `cu_seqlens` [S+1] are integers; `cu_seqlens` starts at 0, rises, ends at T.
    BERT (Devlin et al. 2019), post-norm:  h = LN(h + attention(h)); h = LN(h + mlp(h)).
    ModernBERT (Warner et al. 2024), pre-norm:  h = h + attention(LN(h)); h = h + mlp(LN(h)).
    Raises ValueError for no sequence, an empty or too long one, lengths that do not sum to T, and
    ids outside the vocabulary.
    """
    lengths = sequence_lengths(ids, cu_seqlens)
    _check_range(ids, lengths, weights, spec)
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
    hidden = embed(ids, positions, weights, spec)
    if spec.family == "bert":
        for layer in weights.layers:
            hidden = _bert_layer(hidden, lengths, layer, spec)
        return hidden
    rotations = {
        theta: rope_table(positions, weights.tokens.shape[1] // spec.heads, theta)
        for theta in set(spec.thetas)
    }
    for layer, window, theta in zip(weights.layers, spec.windows, spec.thetas, strict=True):
        hidden = _modernbert_layer(hidden, lengths, layer, spec, window, rotations[theta])
    assert weights.final_norm is not None
    return layer_norm(hidden, weights.final_norm, spec.eps)


def pool(hidden: Tensor, cu_seqlens: Tensor, how: Pooling) -> Tensor:
    """One vector per sequence, [S, D] fp32: the mean over its tokens, or its first token.

    `hidden` is [T, D] and `cu_seqlens` [S+1] as for `forward`; raises ValueError as it does.
    """
    lengths = sequence_lengths(hidden[:, 0], cu_seqlens)
    if how == "cls":
        return hidden[cu_seqlens[:-1].long()].float()
    if how != "mean":
        raise ValueError(f"pooling is 'mean' or 'cls', not {how!r}")
    return torch.stack([part.mean(0, dtype=torch.float32) for part in hidden.split(lengths)])


def normalise(vectors: Tensor) -> Tensor:
    """x / max(‖x‖₂, 1e-12) for every row of `vectors` [S, D]."""
    return F.normalize(vectors, dim=-1)


def sequence_lengths(tokens: Tensor, cu_seqlens: Tensor) -> list[int]:
    """The S lengths that `cu_seqlens` [S+1] cuts `tokens` [T] into; ValueError if it cannot."""
    if tokens.dim() != 1 or cu_seqlens.dim() != 1:
        raise ValueError(
            f"ids and cu_seqlens are vectors, not of shapes {list(tokens.shape)} and"
            f" {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens holds integers, of at least one sequence: [0, length, ...]")
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != len(tokens):
        raise ValueError(
            f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}, not from 0 to the"
            f" {len(tokens)} tokens there are"
        )
    if min(lengths) < 1:
        raise ValueError(f"sequence {lengths.index(min(lengths))} has {min(lengths)} tokens")
    return lengths


def _check_range(ids: Tensor, lengths: list[int], weights: Weights, spec: Spec) -> None:
    if ids.is_floating_point():
        raise ValueError(f"token ids are integers, not {ids.dtype}")
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= len(weights.tokens):
        raise ValueError(
            f"token ids from {low} to {high} do not fit a vocabulary of {len(weights.tokens)}"
        )
    if max(lengths) > spec.max_tokens:
        raise ValueError(
            f"a sequence of {max(lengths)} tokens; this encoder takes {spec.max_tokens} at most"
        )


def embed(ids: Tensor, positions: Tensor, weights: Weights, spec: Spec) -> Tensor:
    """LN(token [+ position + token type 0]), [T, D], for `ids` [T] at `positions` [T]."""
    hidden = F.embedding(ids, weights.tokens)
    if weights.token_types is not None:
        hidden = hidden + weights.token_types[0]
    if weights.positions is not None:
        hidden = hidden + F.embedding(positions, weights.positions)
    return layer_norm(hidden, weights.embedding_norm, spec.eps)


def _bert_layer(hidden: Tensor, lengths: list[int], layer: Layer, spec: Spec) -> Tensor:
    assert layer.attention_norm is not None
    qkv = linear(hidden, layer.qkv).unflatten(1, (3, spec.heads, -1))
    mixed = linear(attention(qkv, lengths), layer.out)
    hidden = layer_norm(hidden + mixed, layer.attention_norm, spec.eps)
    wide = ACTIVATIONS[spec.activation](linear(hidden, layer.up))
    return layer_norm(hidden + linear(wide, layer.down), layer.mlp_norm, spec.eps)


def _modernbert_layer(
    hidden: Tensor,
    lengths: list[int],
    layer: Layer,
    spec: Spec,
    window: int | None,
    rotation: tuple[Tensor, Tensor],
) -> Tensor:
    norm = layer.attention_norm
    normed = hidden if norm is None else layer_norm(hidden, norm, spec.eps)
    qkv = rotate(linear(normed, layer.qkv).unflatten(1, (3, spec.heads, -1)), rotation)
    hidden = hidden + linear(attention(qkv, lengths, window), layer.out)
    wide = linear(layer_norm(hidden, layer.mlp_norm, spec.eps), layer.up)
    value, gate = wide.chunk(2, dim=-1)
    return hidden + linear(ACTIVATIONS[spec.activation](value) * gate, layer.down)


def linear(x: Tensor, weights: Linear) -> Tensor:
    """x Wᵀ + b: [T, in] -> [T, out]."""
    if weights.weight.is_mkldnn:  # see prepack
        return torch.ops.mkldnn._linear_pointwise(x, *weights, "none", [], "")
    return F.linear(x, *weights)


def layer_norm(x: Tensor, norm: Norm, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last axis of x [T, D]."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)


def attention(qkv: Tensor, lengths: list[int], window: int | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v within each sequence and head: [T, 3, H, d] -> [T, H·d].

    With a `window`, token i sees token j only where |i - j| <= window. The products are written
    out because on a CPU in bf16 that takes 0.6 of the time of torch's fused attention.
    """
    runs = [(n, len(list(same))) for n, same in groupby(lengths)]
    parts = qkv.split([n * count for n, count in runs])
    mixed = [
        _attend_equal(part, n, window) for part, (n, _) in zip(parts, runs, strict=True)
    ]  # each [n · count, H·d]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _attend_equal(qkv: Tensor, n: int, window: int | None) -> Tensor:
    """Attention of sequences that all have n tokens."""
    _, _, heads, width = qkv.shape
    blocks = qkv.unflatten(0, (-1, n)).permute(2, 0, 3, 1, 4)  # [3, sequences, H, n, d]
    blocks = blocks.reshape(3, -1, n, width)
    step = max(1, SCORES_AT_ONCE // (n * n))
    hidden_pairs = None if window is None or n <= window + 1 else _outside(n, window, qkv)
    mixed = [_softmax_mix(block, hidden_pairs) for block in blocks.split(step, dim=1)]
    joined = mixed[0] if len(mixed) == 1 else torch.cat(mixed)  # [sequences · H, n, d]
    return joined.unflatten(0, (-1, heads)).transpose(1, 2).reshape(-1, heads * width)


def _outside(n: int, window: int, like: Tensor) -> Tensor:
    """[n, n]: -inf where two tokens are more than `window` apart, else 0."""
    places = torch.arange(n, device=like.device)
    apart = (places[:, None] - places).abs() > window
    return like.new_zeros(n, n).masked_fill(apart, float("-inf"))


def _softmax_mix(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v: [3, B, n, d] and a bias of [n, n] -> [B, n, d]."""
    query, key, value = qkv.unbind()
    scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    if bias is not None:
        scores = scores + bias
    return torch.bmm(scores.softmax(-1), value)


def rope_table(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(-2i/d) for i < d/2, each [T, 1, 1, d/2] fp32."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions[:, None].float() * theta**-exponents
    angles = angles[:, None, None]
    return angles.cos(), angles.sin()


def rotate(qkv: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su et al. 2021) on the queries and keys of qkv [T, 3, H, d].

    With x = [a | b] split in the middle: [a cos - b sin | b cos + a sin], computed in fp32.
    """
    cos, sin = rotation
    query_key, value = qkv.split([2, 1], dim=1)
    a, b = query_key.float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(qkv.dtype), value], dim=1)


def map_tensors(weights: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of `Weights` (or a part) with `change` applied to each tensor."""
    if weights is None or not isinstance(weights, tuple):
        return None if weights is None else change(weights)
    parts = [map_tensors(part, change) for part in weights]
    return type(weights)(*parts) if hasattr(weights, "_fields") else tuple(parts)


def tensors(weights: Any) -> Iterator[Any]:
    """All tensors of `Weights` (or a part), in order: the parameters when fine-tuning."""
    if isinstance(weights, tuple):
        for part in weights:
            yield from tensors(part)
    elif weights is not None:
        yield weights


def prepack(weights: Weights) -> Weights:
    """A copy for inference on the CPU, its matrices laid out as oneDNN wants them.

    Saves laying them out anew in each call (a tenth of a pass in bf16), and in fp32 goes to oneDNN
    instead of MKL (twice as fast on AMD). It cannot be differentiated, moved or saved. Where torch
    has no such op the weights come back as they are.
    """
    if not _can_prepack():
        return weights
    return weights._replace(layers=tuple(_prepack_layer(layer) for layer in weights.layers))


def _can_prepack() -> bool:
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def _prepack_layer(layer: Layer) -> Layer:
    return layer._replace(
        qkv=_prepack_linear(layer.qkv),
        out=_prepack_linear(layer.out),
        up=_prepack_linear(layer.up),
        down=_prepack_linear(layer.down),
    )


def _prepack_linear(weights: Linear) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weights.weight.detach().contiguous(), None)
    return Linear(packed, weights.bias)
