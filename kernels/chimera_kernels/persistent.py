"""A whole BERT encoder in one launch: one program per multiprocessor, a barrier after each step.

For small batches, where launches cost more than the work between them. The steps are those of
encoder.py; only who computes which tile, and when, is decided here.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from chimera_kernels.encoder import (
    LOG2_E,
    TritonEncoder,
    attention_block,
    lanes_for,
    recorded,
    shaped_encoder,
)
from chimera_kernels.encoder_kernels import attention_tile, embed_tile, linear_tile
from chimera_kernels.reference import Spec, Weights
from chimera_kernels.resources import Variant

# Tiles of the steps to D columns, and of those to 3D or N: about as many as there are programs at
# 128 tokens, so that a step takes one round or two.
_ROWS, _COLUMNS, _INNER = 16, 32, 128
_WIDE_ROWS, _WIDE_COLUMNS, _WIDE_INNER = 32, 64, 64
_QUERIES = 16
_WARPS, _STAGES = 4, 4
_EMBEDDED_ROWS = 4


@triton.jit
def _barrier(arrived, programs, passed):
    """Waits until all programs have come here; returns how many barriers that makes.

    Release and acquire make what the others wrote before it visible after it. The programs run at
    the same time, which the cooperative launch guarantees.
    """
    passed += 1
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")
    while tl.atomic_add(arrived, 0, sem="acquire") < passed * programs:
        pass
    tl.debug_barrier()
    return passed


@triton.jit(do_not_specialize=["sequences", "query_tiles", "layers"])
def encode_kernel(
    ids, positions, cu_seqlens, token_table, position_table,
    entry_weight, entry_bias, middle_weight, middle_bias,
    qkv_weight, qkv_bias, out_weight, out_bias, up_weight, up_bias, down_weight, down_bias,
    stream, middle, qkv, context, wide, arrived,
    sequences, query_tiles, layers, scale, eps,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, EMBEDDED_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    WIDE_ROWS: tl.constexpr, WIDE_COLUMNS: tl.constexpr, WIDE_INNER: tl.constexpr,
    LANES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """stream [T, WIDTH] = the last layer's sum before its norm; all weights stacked by layer."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.load(cu_seqlens + sequences)
    row_tiles, wide_tiles = tl.cdiv(total, ROWS), tl.cdiv(total, WIDE_ROWS)
    passed = 0
    for tile in range(program, tl.cdiv(total, EMBEDDED_ROWS), programs):
        embed_tile(
            ids, positions, token_table, position_table, stream, tile, total,
            WIDTH, EMBEDDED_ROWS, BLOCK, True,
        )  # fmt: skip
    passed = _barrier(arrived, programs, passed)
    for layer in range(layers):
        entry_gain, entry_shift = entry_weight + layer * WIDTH, entry_bias + layer * WIDTH
        gain, shift = middle_weight + layer * WIDTH, middle_bias + layer * WIDTH
        for tile in range(program, wide_tiles * tl.cdiv(3 * WIDTH, WIDE_COLUMNS), programs):
            linear_tile(
                stream, qkv_weight + layer * 3 * WIDTH * WIDTH, qkv_bias + layer * 3 * WIDTH,
                entry_gain, entry_shift, None, None, None, None, qkv,
                tile % wide_tiles, tile // wide_tiles, total, eps,
                WIDTH, 3 * WIDTH, True, "", "", 1, "", PRECISION,
                WIDE_ROWS, WIDE_COLUMNS, WIDE_INNER,
            )  # fmt: skip
        passed = _barrier(arrived, programs, passed)
        for tile in range(program, sequences * HEADS * query_tiles, programs):
            attention_tile(
                qkv, context, cu_seqlens, tile // (HEADS * query_tiles), tile % HEADS,
                tile // HEADS % query_tiles, scale,
                HEADS, WIDTH // HEADS, LANES, -1, PRECISION, QUERIES, KEYS,
            )  # fmt: skip
        passed = _barrier(arrived, programs, passed)
        for tile in range(program, row_tiles * tl.cdiv(WIDTH, COLUMNS), programs):
            linear_tile(
                context, out_weight + layer * WIDTH * WIDTH, out_bias + layer * WIDTH,
                entry_gain, entry_shift, stream, None, None, None, middle,
                tile % row_tiles, tile // row_tiles, total, eps,
                WIDTH, WIDTH, False, "", "", 1, "normed", PRECISION, ROWS, COLUMNS, INNER,
            )  # fmt: skip
        passed = _barrier(arrived, programs, passed)
        for tile in range(program, wide_tiles * tl.cdiv(WIDE, WIDE_COLUMNS), programs):
            linear_tile(
                middle, up_weight + layer * WIDE * WIDTH, up_bias + layer * WIDE,
                gain, shift, None, None, None, None, wide,
                tile % wide_tiles, tile // wide_tiles, total, eps,
                WIDTH, WIDE, True, ACTIVATION, "", 1, "", PRECISION,
                WIDE_ROWS, WIDE_COLUMNS, WIDE_INNER,
            )  # fmt: skip
        passed = _barrier(arrived, programs, passed)
        for tile in range(program, row_tiles * tl.cdiv(WIDTH, COLUMNS), programs):
            linear_tile(
                wide, down_weight + layer * WIDE * WIDTH, down_bias + layer * WIDTH,
                gain, shift, middle, None, None, None, stream,
                tile % row_tiles, tile // row_tiles, total, eps,
                WIDE, WIDTH, False, "", "", 1, "normed", PRECISION, ROWS, COLUMNS, INNER,
            )  # fmt: skip
        passed = _barrier(arrived, programs, passed)
    # The last one to leave makes the counter ready for the next launch.
    if tl.atomic_add(arrived, 1, sem="acq_rel") == (passed + 1) * programs - 1:
        tl.store(arrived, 0)


class PersistentEncoder(TritonEncoder):
    """As `TritonEncoder`, for BERT alone, in one launch of one program per multiprocessor."""

    def __init__(
        self,
        weights: Weights,
        spec: Spec,
        *,
        tokens: int,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """As `TritonEncoder`; ValueError also for encoders that are not of the BERT family."""
        if spec.family != "bert" or weights.positions is None:
            raise ValueError("the persistent kernel computes encoders of the BERT family only")
        super().__init__(weights, spec, tokens=tokens, device=device, dtype=dtype)
        self.kernels = SimpleNamespace(encode_kernel=encode_kernel)
        layers = [(*(layer.entry or ()), *layer.middle, *layer[2:]) for layer in self.layers]
        self._stacked = [torch.stack(parts) for parts in zip(*layers, strict=True)]
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        interpreted = torch.device(device).type == "cpu"
        self._options = {} if interpreted else {"launch_cooperative_grid": True}

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
        """As `TritonEncoder.launch`."""
        width = self.width // self.spec.heads
        self.kernels.encode_kernel[(self.multiprocessors,)](
            ids, positions, cu_seqlens, self._token_table, self._position_table,
            *self._stacked,
            self.stream, self._middle, self._qkv, self._context, self._wide, self._arrived,
            sequences, triton.cdiv(longest, _QUERIES), len(self.layers),
            LOG2_E / width**0.5, self.spec.eps,
            WIDTH=self.width, WIDE=self.inner, HEADS=self.spec.heads,
            ACTIVATION=self.spec.activation, PRECISION=self._precision,
            BLOCK=triton.next_power_of_2(self.width), EMBEDDED_ROWS=_EMBEDDED_ROWS,
            ROWS=_ROWS, COLUMNS=_COLUMNS, INNER=_INNER,
            WIDE_ROWS=_WIDE_ROWS, WIDE_COLUMNS=_WIDE_COLUMNS, WIDE_INNER=_WIDE_INNER,
            LANES=lanes_for(width), QUERIES=_QUERIES, KEYS=attention_block(longest),
            num_warps=_WARPS, num_stages=_STAGES, **self._options,
        )  # fmt: skip
        return self.stream[:tokens]


def variants() -> list[Variant]:
    """The kernel for the shapes of MiniLM-L6 and BERT-base."""
    found: list[Variant] = []
    for name, width, inner in (("minilm", 384, 1536), ("bert-base", 768, 3072)):
        encoder = shaped_encoder(PersistentEncoder, "bert", width, inner, 12, 128, 128)
        found += recorded(encoder, f"persistent {name}", 128, 128)
    # On 8.0 it spills 32 bytes; it is not meant for that.
    return [variant._replace(capabilities=(90,)) for variant in found]
