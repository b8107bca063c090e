"""The encoder's kernels compute what the reference computes, and write nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import random_encoders as encoders
from chimera_kernels import encoder as kernels
from chimera_kernels import reference
from chimera_kernels.encoder import TritonEncoder
from chimera_kernels.reference import Norm, Spec, Weights

LENGTHS = [
    [1],
    [80],
    [1, 23, 7, 7, 64, 31, 2],
    [17] * 9,
    [16, 32, 64],
]
# ‖out - ref‖ / ‖ref‖ against the fp32 reference. fp32: rounding in another order. The others: each
# operand has 8 (bf16) or 11 (fp16) bits, so 2^-9 and 2^-12 of it are lost, anew in every layer.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
FAMILIES: dict[str, Callable[[], tuple[Weights, Spec]]] = {
    "bert": encoders.bert,
    "modernbert": encoders.modernbert,
}


def poisoned(encoder: TritonEncoder) -> TritonEncoder:
    """All scratch memory is NaN: what is read before it is written shows."""
    for scratch in (
        encoder.stream, encoder._middle, encoder._normed,
        encoder._qkv, encoder._context, encoder._wide,
    ):  # fmt: skip
        scratch.fill_(float("nan"))
    return encoder


def run(
    encoder: TritonEncoder, lengths: list[int], *, spare_tokens: int = 0, spare_sequences: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states after the final norm [T, D] in fp32 on the CPU, with ids and cu_seqlens."""
    ids, positions, cu_seqlens = encoders.batch(lengths)
    total, device = len(ids), encoder.stream.device
    tokens, sequences = total + spare_tokens, len(lengths) + spare_sequences
    rows = encoder.launch(
        encoders.padded(ids, tokens, 10**6).to(device),  # far outside the vocabulary
        encoders.padded(positions, tokens, 10**6).to(device),
        encoders.padded(cu_seqlens, sequences + 1, total).to(device),
        tokens=tokens, sequences=sequences, longest=encoders.MAX_TOKENS,
    )  # fmt: skip
    assert rows[total:].isnan().all()  # nothing is written where there are no tokens
    hidden = rows[:total].float()
    return (
        reference.layer_norm(hidden, encoder.final_norm, encoder.spec.eps).cpu(), ids, cu_seqlens,
    )  # fmt: skip


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def check(weights: Weights, spec: Spec, lengths: list[int], device: str, **options: Any) -> None:
    dtype = options.pop("dtype", torch.float32)
    spares = {name: options.pop(name, 0) for name in ("spare_tokens", "spare_sequences")}
    tokens = sum(lengths) + spares["spare_tokens"]
    encoder = poisoned(TritonEncoder(weights, spec, tokens=tokens, device=device, dtype=dtype))
    found, ids, cu_seqlens = run(encoder, lengths, **spares)
    assert error(found, reference.forward(ids, cu_seqlens, weights, spec)) <= BOUND[dtype]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_agrees_with_the_reference(family: str, lengths: list[int], device: str) -> None:
    check(*FAMILIES[family](), lengths, device)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_narrow_operands(family: str, dtype: torch.dtype, device: str) -> None:
    check(*FAMILIES[family](), [1, 23, 7, 40], device, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_capacities_beyond_the_batch_change_nothing(family: str, device: str) -> None:
    lengths = [5, 33]
    check(*FAMILIES[family](), lengths, device, spare_tokens=70, spare_sequences=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_normalised_once_for_all_readers(
    family: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_NORM_BY_READER_TOKENS", 0)
    check(*FAMILIES[family](), [9, 41], device, spare_tokens=11)


@pytest.mark.parametrize("activation", kernels._KERNEL_ACTIVATIONS)
def test_activations(activation: str, device: str) -> None:
    check(*encoders.bert(layers=1, activation=activation), [19], device)
    check(*encoders.modernbert(activation=activation), [6], device)


@pytest.mark.parametrize("tile", kernels._TILES, ids=str)
def test_every_tile(tile: kernels.Tile, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("large tiles in fp32 spill; test_gpu.py has them as they are used")
    monkeypatch.setattr(kernels, "tile_for", lambda *_: tile)
    check(*encoders.bert(layers=1), [70], device)
    check(*encoders.modernbert(), [70], device)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12])
def test_widths_of_heads(heads: int, device: str) -> None:
    check(*encoders.bert(width=96, heads=heads, layers=1), [3, 18], device)


def test_256_sequences(device: str) -> None:
    weights, spec = encoders.bert(layers=1)
    check(weights, spec, [1 + n % 3 for n in range(256)], device)


def test_a_launch_leaves_nothing_for_the_next(device: str) -> None:
    weights, spec = encoders.bert()
    encoder = poisoned(TritonEncoder(weights, spec, tokens=90, device=device, dtype=torch.float32))
    for lengths in ([80, 10], [3], [20, 20]):
        encoder.stream.fill_(float("nan"))
        found, ids, cu_seqlens = run(encoder, lengths)
        assert error(found, reference.forward(ids, cu_seqlens, weights, spec)) <= 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"heads": 1}, "129 wide in 1 heads"), ({"activation": "tanh"}, "activation 'tanh'")],
)
def test_says_what_it_cannot_compute(change: dict, reason: str) -> None:
    weights, spec = encoders.bert(width=129, heads=3, layers=1)
    with pytest.raises(ValueError, match=reason):
        TritonEncoder(weights, spec._replace(**change), tokens=8, device="cpu")


@pytest.mark.parametrize(
    ("tokens", "places", "pairing", "rows"),
    [(16384, 1536, "", 128), (128, 384, "", 16), (128, 1536, "", 32), (4096, 2624, "gate", 128)],
)
def test_tiles_fill_the_multiprocessors(
    tokens: int, places: int, pairing: kernels.Pairing, rows: int
) -> None:
    assert kernels.tile_for(tokens, places, pairing, 132).rows == rows


def test_norm_without_bias_counts_as_zero() -> None:
    bias = kernels._norm(Norm(torch.ones(3))).bias
    assert bias is not None
    assert torch.equal(bias, torch.zeros(3))
