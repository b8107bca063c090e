"""The text encoder of `reference.py` on packed batches: which kernels are launched, and on what.

Between the linears runs one residual stream that holds each row before its next layer norm; whoever
reads a row normalises it. One captured graph serves all batches up to its capacity. Knows no texts,
no heads and no graphs.
"""

from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from chimera_kernels import encoder_kernels
from chimera_kernels.reference import (
    Layer,
    Linear,
    Norm,
    Spec,
    Weights,
    map_tensors,
    rope_table,
)
from chimera_kernels.resources import Recorder, Variant

# Up to so many tokens each reader normalises its rows by itself. Beyond, where a row has many
# readers, one launch normalises all of them.
_NORM_BY_READER_TOKENS = 1024
_WIDEST_HEAD = 128
_WIDEST_PAIR = 64
# Tiles of 128 rows take up to 132,096 bytes. There are that many on 8.0, 9.0 and 10.0, not on 8.6,
# 8.9 and 12.0, the GPUs of workstations.
_LARGE_SHARED_BYTES = 160_000
_WIDEST = 1024
_NARROWEST_DOT = 16
_KERNEL_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")

Pairing = Literal["", "gate", "rope"]
Family = Literal["bert", "modernbert"]


class Tile(NamedTuple):
    """What one program of a linear computes, and with what."""

    rows: int
    columns: int
    inner: int  # columns of x in one step
    warps: int
    stages: int


# From large to small: the first of which there is at least one for each multiprocessor is taken.
_TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 8, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(32, 64, 64, 4, 3),
    Tile(32, 32, 64, 4, 4),
    Tile(16, 32, 128, 4, 4),
)
SMALL_TILES = tuple(tile for tile in _TILES if tile.rows < 128)


class _Layer(NamedTuple):
    """One layer's tensors as kernels want them: matrices of the operands' type, all else fp32."""

    entry: Norm | None  # what its reader applies to the stream before attention
    middle: Norm  # the same before the MLP
    qkv: Tensor  # [3D, D]
    qkv_bias: Tensor  # [3D]
    out: Tensor  # [D, D]
    out_bias: Tensor  # [D]
    up: Tensor  # [N, D] or [2N, D]
    up_bias: Tensor
    down: Tensor  # [D, N]
    down_bias: Tensor  # [D]


def unsupported(weights: Weights, spec: Spec) -> str:
    """Why the kernels cannot compute this encoder; empty if they can."""
    width = weights.tokens.shape[1]
    if width // spec.heads > _WIDEST_HEAD or width > _WIDEST:
        return f"{width} wide in {spec.heads} heads; at most {_WIDEST}, and {_WIDEST_HEAD} a head"
    if spec.activation not in _KERNEL_ACTIVATIONS:
        return f"activation {spec.activation!r}, not one of {_KERNEL_ACTIVATIONS}"
    if weights.tokens.numel() >= 1 << 31:
        return f"a vocabulary of {len(weights.tokens)}: places in it are 32-bit numbers"
    return ""


def operands_for(spec: Spec) -> torch.dtype:
    """fp16 for BERT, whose values stay small: its error is an eighth of bf16's at the same speed.

    bf16 for ModernBERT, whose gated products have no such bound.
    """
    return torch.float16 if spec.family == "bert" else torch.bfloat16


class TritonEncoder:
    """Weights and scratch memory of one encoder on one device; `launch` allocates nothing.

    `stream` [T, D] holds the last launch's result: the hidden states before `final_norm`, which
    whoever reads them applies. Not for several streams at once.
    """

    def __init__(
        self,
        weights: Weights,
        spec: Spec,
        *,
        tokens: int,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Room for `tokens` per launch; operands in `dtype`, sums in fp32.

        So is the residual, but for a BERT's batches of more tokens than each reader normalises.

        Raises ValueError for an encoder that `unsupported` speaks of.
        """
        reason = unsupported(weights, spec)
        if reason:
            raise ValueError(f"no kernels for this encoder: {reason}")
        self.kernels: Any = encoder_kernels
        self.spec = spec
        self.tokens = tokens
        self.dtype = dtype
        self.width = weights.tokens.shape[1]
        self.inner = weights.layers[0].down.weight.shape[1]
        self.vocabulary = len(weights.tokens)
        self.multiprocessors, self.tiles = _limits(device)
        self._precision = "ieee" if dtype == torch.float32 else "tf32"
        plain = map_tensors(weights, lambda t: t.detach().to(device, torch.float32))
        self._token_table = plain.tokens.to(dtype)
        self._position_table: Tensor | None = None
        if plain.positions is not None:
            first = 0.0 if plain.token_types is None else plain.token_types[0]
            self._position_table = (plain.positions + first).contiguous()
        self._embedding_norm = _norm(plain.embedding_norm)
        post = spec.family == "bert"
        norms = [layer.attention_norm if not post else layer.mlp_norm for layer in plain.layers]
        entries = [plain.embedding_norm, *norms[:-1]] if post else norms
        self.layers = tuple(
            _prepared(layer, entry, post, dtype)
            for layer, entry in zip(plain.layers, entries, strict=True)
        )
        self.final_norm = _norm(norms[-1] if post else plain.final_norm)
        self._rotations = {theta: self._rotation(theta, device) for theta in set(spec.thetas)}
        self.stream = torch.empty(tokens, self.width, device=device)
        self._middle = torch.empty_like(self.stream)
        self._normed = torch.empty(tokens, self.width, device=device, dtype=dtype)
        self._qkv = torch.empty(tokens, 3 * self.width, device=device, dtype=dtype)
        self._context = torch.empty_like(self._normed)
        self._wide = torch.empty(tokens, self.inner, device=device, dtype=dtype)

    def launch(
        self,
        ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        *,
        tokens: int,
        sequences: int,
        longest: int,
    ) -> Tensor:
        """Hidden states before `final_norm`, [tokens, D] fp32, a view of `stream`.

        `ids` and `positions` (of a token in its sequence) are int32 [>= tokens], `cu_seqlens` int32
        [>= sequences + 1]. The last three numbers are capacities: `cu_seqlens[sequences]` says how
        many tokens there are, further sequences are empty ones; no sequence is beyond `longest`.
        Rows beyond the real tokens keep what they held. Values are not checked: that is for who
        has them on the host.
        """
        assert ids.dtype == positions.dtype == cu_seqlens.dtype == torch.int32
        assert tokens <= min(self.tokens, len(ids), len(positions))
        assert len(cu_seqlens) > sequences
        assert longest <= self.spec.max_tokens
        batch = _Batch(ids, positions, cu_seqlens, tokens, sequences, longest)
        self._embed(batch)
        for number, layer in enumerate(self.layers):
            self._layer(batch, number, layer)
        return self.stream[:tokens]

    def _embed(self, batch: "_Batch") -> None:
        rows, block = 4, triton.next_power_of_2(self.width)
        post = self.spec.family == "bert"
        into = self.stream if post else self._middle
        self.kernels.embed_kernel[(triton.cdiv(batch.tokens, rows),)](
            batch.ids, batch.positions, self._token_table, self._position_table, into,
            batch.cu_seqlens, batch.sequences,
            WIDTH=self.width, ROWS=rows, BLOCK=block, POSITIONS=self._position_table is not None,
        )  # fmt: skip
        if not post:
            self._normalise(batch, self._middle, self._embedding_norm, self.stream)

    def _layer(self, batch: "_Batch", number: int, layer: _Layer) -> None:
        spec, post = self.spec, self.spec.family == "bert"
        by_reader = batch.tokens <= _NORM_BY_READER_TOKENS
        window = spec.windows[number] if spec.windows else None
        rotation = self._rotations[spec.thetas[number]] if spec.thetas else (None, None)

        x, norm, residual, how = self._read(batch, self.stream, layer.entry, post, by_reader)
        self._linear(
            batch, x, norm, layer.qkv, layer.qkv_bias, self._qkv,
            pairing="rope" if spec.thetas else "", rotation=rotation,
        )  # fmt: skip
        self._attention(batch, window)
        self._linear(
            batch, self._context, None, layer.out, layer.out_bias, self._middle,
            residual=residual, how=how, residual_norm=layer.entry,
        )  # fmt: skip
        x, norm, residual, how = self._read(batch, self._middle, layer.middle, post, by_reader)
        self._linear(
            batch, x, norm, layer.up, layer.up_bias, self._wide,
            pairing="" if post else "gate", activation=spec.activation,
        )  # fmt: skip
        self._linear(
            batch, self._wide, None, layer.down, layer.down_bias, self.stream,
            residual=residual, how=how, residual_norm=layer.middle,
        )  # fmt: skip

    def _read(
        self, batch: "_Batch", stream: Tensor, norm: Norm | None, post: bool, by_reader: bool
    ) -> tuple[Tensor, Norm | None, Tensor, str]:
        """What a linear reads of the stream and through which norm; the residual likewise."""
        if norm is None:
            return stream, None, stream, "plain"
        if by_reader:
            return stream, norm, stream, "normed" if post else "plain"
        self._normalise(batch, stream, norm, self._normed)
        return self._normed, None, self._normed if post else stream, "plain"

    def _normalise(self, batch: "_Batch", x: Tensor, norm: Norm, y: Tensor) -> None:
        rows, block = 4, triton.next_power_of_2(self.width)
        self.kernels.normalise_kernel[(triton.cdiv(batch.tokens, rows),)](
            x, norm.weight, norm.bias, y, batch.cu_seqlens, self.spec.eps, batch.sequences,
            WIDTH=self.width, ROWS=rows, BLOCK=block,
        )  # fmt: skip

    def _linear(
        self,
        batch: "_Batch",
        x: Tensor,
        norm: Norm | None,
        weight: Tensor,
        bias: Tensor,
        y: Tensor,
        *,
        pairing: Pairing = "",
        activation: str = "",
        rotation: tuple[Tensor | None, Tensor | None] = (None, None),
        residual: Tensor | None = None,
        residual_norm: Norm | None = None,
        how: str = "",
    ) -> None:
        out = y.shape[1]
        places = out // 2 if pairing == "rope" else out
        tile = tile_for(batch.tokens, places, pairing, self.multiprocessors, self.tiles)
        used = norm or residual_norm
        grid = (triton.cdiv(batch.tokens, tile.rows), triton.cdiv(places, tile.columns))
        self.kernels.linear_kernel[grid](
            x, weight, bias,
            None if used is None else used.weight, None if used is None else used.bias,
            residual, batch.positions, *rotation, y,
            batch.cu_seqlens, self.spec.eps, batch.sequences,
            IN=x.shape[1], OUT=out, NORM=norm is not None, ACTIVATION=activation,
            PAIRING=pairing, HALF=self.width // self.spec.heads // 2, RESIDUAL=how,
            PRECISION=self._precision, ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def _attention(self, batch: "_Batch", window: int | None) -> None:
        queries = attention_block(batch.longest)
        keys = min(queries, 64)
        grid = (triton.cdiv(batch.longest, queries), self.spec.heads, batch.sequences)
        width = self.width // self.spec.heads
        self.kernels.attention_kernel[grid](
            self._qkv, self._context, batch.cu_seqlens, LOG2_E / width**0.5,
            HEADS=self.spec.heads, WIDTH=width, LANES=lanes_for(width),
            WINDOW=-1 if window is None else window, PRECISION=self._precision, QUERIES=queries,
            KEYS=keys, num_warps=4, num_stages=2,
        )  # fmt: skip

    def _rotation(self, theta: float, device: str) -> tuple[Tensor, Tensor]:
        """cos and sin for every position, [P, d/2] fp32 each."""
        places = torch.arange(self.spec.max_tokens, device=device)
        cos, sin = rope_table(places, self.width // self.spec.heads, theta)
        return cos.flatten(1).contiguous(), sin.flatten(1).contiguous()


class _Batch(NamedTuple):
    """Inputs of one launch and the capacities it is made for."""

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    tokens: int
    sequences: int
    longest: int


LOG2_E = 1.4426950408889634


def lanes_for(width: int) -> int:
    """The power of two that one head's values lie in; a product takes no fewer than sixteen."""
    return max(_NARROWEST_DOT, int(triton.next_power_of_2(width)))


def attention_block(longest: int) -> int:
    """Queries of one program of attention, for sequences of up to `longest` tokens."""
    return max(_NARROWEST_DOT, min(64, int(triton.next_power_of_2(longest))))


def tile_for(
    tokens: int,
    places: int,
    pairing: Pairing,
    multiprocessors: int,
    tiles: tuple[Tile, ...] = _TILES,
) -> Tile:
    """The largest of `tiles` that still gives every multiprocessor a program, else the smallest.

    A pairing keeps two sums per place, so the widest tile would not fit into registers.
    """
    for tile in tiles:
        if pairing and tile.columns > _WIDEST_PAIR:
            continue
        programs = triton.cdiv(tokens, tile.rows) * triton.cdiv(places, tile.columns)
        if programs >= multiprocessors:
            return tile
    return tiles[-1]


def _limits(device: str) -> tuple[int, tuple[Tile, ...]]:
    """Multiprocessors, and the tiles that fit into the shared memory of one."""
    if torch.device(device).type != "cuda":
        return 1, _TILES  # the interpreter runs one program after the other
    found = torch.cuda.get_device_properties(device)
    large = found.shared_memory_per_block_optin >= _LARGE_SHARED_BYTES
    return found.multi_processor_count, _TILES if large else SMALL_TILES


def _norm(norm: Any) -> Norm:
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return Norm(norm.weight.contiguous(), bias.contiguous())


def _prepared(layer: Any, entry: Any, post: bool, dtype: torch.dtype) -> _Layer:
    matrices: list[Tensor] = []
    for linear in (layer.qkv, layer.out, layer.up, layer.down):
        weight = linear.weight
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
        matrices += [weight.to(dtype).contiguous(), bias.contiguous()]
    middle = layer.attention_norm if post else layer.mlp_norm
    return _Layer(None if entry is None else _norm(entry), _norm(middle), *matrices)


# Multiprocessors of an H200 and of an L4, and (width, inner width, heads, tokens at once, longest
# text) of encoders that people use.
_H200, _L4 = 132, 58
_SHAPES: tuple[tuple[str, Family, tuple[int, int, int, int, int]], ...] = (
    ("minilm", "bert", (384, 1536, 12, 128, 128)),
    ("minilm", "bert", (384, 1536, 12, 1024, 128)),
    ("minilm", "bert", (384, 1536, 12, 16_384, 256)),
    ("bert-base", "bert", (768, 3072, 12, 128, 128)),
    ("modernbert-large", "modernbert", (1024, 2624, 16, 4096, 512)),
)


def variants() -> list[Variant]:
    """All kernels that are launched for some encoders and batches, as they are launched."""
    found: list[Variant] = []
    for name, family, (width, inner, heads, tokens, longest) in _SHAPES:
        encoder = shaped_encoder(TritonEncoder, family, width, inner, heads, tokens, longest)
        found += recorded(encoder, f"{name} {tokens}", tokens, longest)
    for name, family, (width, inner, heads, tokens, longest) in _SHAPES[1::3]:
        encoder = shaped_encoder(TritonEncoder, family, width, inner, heads, tokens, longest)
        encoder.multiprocessors, encoder.tiles = _L4, SMALL_TILES
        made = recorded(encoder, f"{name} {tokens}, small tiles", tokens, longest)
        found += [variant._replace(capabilities=(86, 89)) for variant in made]
    return found


def recorded(encoder: TritonEncoder, name: str, tokens: int, longest: int) -> list[Variant]:
    """The different kernels of one launch; `encoder` lies on the device "meta"."""
    recorder = Recorder(encoder.kernels, name)
    encoder.kernels = recorder
    sequences = tokens // longest
    places = torch.empty(tokens, dtype=torch.int32, device="meta")
    bounds = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    encoder.launch(places, places, bounds, tokens=tokens, sequences=sequences, longest=longest)
    return recorder.variants


def shaped_encoder(
    kind: "type[TritonEncoder]",
    family: Family,
    width: int,
    inner: int,
    heads: int,
    tokens: int,
    longest: int,
) -> TritonEncoder:
    """An encoder of two layers that has shapes, but neither values nor memory."""

    def linear(out: int, into: int) -> Linear:
        return Linear(torch.empty(out, into, device="meta"), None)

    norm = Norm(torch.empty(width, device="meta"))
    bert = family == "bert"
    layer = Layer(
        norm, linear(3 * width, width), linear(width, width),
        norm, linear(inner if bert else 2 * inner, width), linear(width, inner),
    )  # fmt: skip
    tables = torch.empty(longest, width, device="meta")
    weights = Weights(tables, tables if bert else None, None, norm, (layer, layer), norm)
    spec = Spec(family, heads, 1e-5, longest, "gelu")
    if not bert:
        spec = spec._replace(windows=(None, 64), thetas=(160_000.0, 10_000.0))
    encoder = kind(weights, spec, tokens=tokens, device="meta")
    encoder.multiprocessors = _H200
    return encoder
