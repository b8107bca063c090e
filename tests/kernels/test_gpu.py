"""What only a GPU can show: tensor cores at every tile, races, graphs, and threads side by side."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

import random_encoders as encoders
from chimera_kernels import encoder as kernels
from chimera_kernels import reference
from chimera_kernels.encoder import TritonEncoder
from chimera_kernels.persistent import PersistentEncoder
from tests.kernels.test_encoder_kernels import BOUND, error, run
from tests.kernels.test_graph import SLOTS, make_batch, make_pass, vectors, wanted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

REPLAYS = 1000
NARROW = [torch.bfloat16, torch.float16]


def lengths_of(total: int) -> list[int]:
    """Texts of odd lengths, `total` tokens together."""
    lengths = [17 + 9 * n % 61 for n in range(total // 20)]
    while sum(lengths) > total:
        lengths.pop()
    return [*lengths, total - sum(lengths)] if sum(lengths) < total else lengths


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("tile", kernels._TILES, ids=str)
@pytest.mark.parametrize("total", [300, 1100])
def test_every_tile_on_tensor_cores(
    tile: kernels.Tile, dtype: torch.dtype, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpaired = kernels.tile_for

    def chosen(tokens: int, places: int, pairing: Any, *more: Any) -> kernels.Tile:
        fits = not pairing or tile.columns <= kernels._WIDEST_PAIR
        return tile if fits else unpaired(tokens, places, pairing, *more)

    monkeypatch.setattr(kernels, "tile_for", chosen)
    for weights, spec in (
        encoders.bert(width=384, heads=12, inner=1536),
        encoders.bert(width=1024, heads=16, inner=640, layers=1),
        encoders.modernbert(width=768, heads=12, inner=1152),
    ):
        encoder = TritonEncoder(weights, spec, tokens=total, device="cuda", dtype=dtype)
        found, ids, cu_seqlens = run(encoder, lengths_of(total))
        assert error(found, reference.forward(ids, cu_seqlens, weights, spec)) <= BOUND[dtype]


@pytest.mark.parametrize("kind", [TritonEncoder, PersistentEncoder])
@pytest.mark.parametrize("total", [128, 700])
def test_replays_give_the_same_bits(kind: type[TritonEncoder], total: int) -> None:
    """A missing barrier or a stale cache line shows as a difference now and then."""
    weights, spec = encoders.bert(width=384, heads=12, inner=1536, layers=6)
    encoder = kind(weights, spec, tokens=total, device="cuda", dtype=torch.float16)
    ids, positions, cu_seqlens = (x.cuda() for x in encoders.batch(lengths_of(total)))
    sequences = len(cu_seqlens) - 1

    def launch() -> torch.Tensor:
        return encoder.launch(
            ids, positions, cu_seqlens, tokens=total, sequences=sequences, longest=80
        )

    first = launch().clone()
    differing = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(REPLAYS):
        encoder.stream.fill_(float("nan"))
        differing += (launch() != first).any()
    assert int(differing) == 0


def test_one_launch_and_many_agree() -> None:
    weights, spec = encoders.bert(width=384, heads=12, inner=1536, layers=6)
    found: list[torch.Tensor] = []
    for kind in (TritonEncoder, PersistentEncoder):
        torch.manual_seed(7)
        encoder = kind(weights, spec, tokens=128, device="cuda", dtype=torch.float16)
        found.append(run(encoder, lengths_of(128))[0])
    assert error(found[1], found[0]) <= BOUND[torch.float16]


def test_serving_goes_on_while_another_pass_is_captured() -> None:
    """A bundle is loaded again on a thread of its own."""
    serving = make_pass("cuda")
    batch = make_batch([5, 40], 3)
    table = torch.zeros(SLOTS, encoders.bert()[0].tokens.shape[1])
    table[:2] = vectors(batch)
    expected = wanted(batch, table).numpy()
    failures: list[Exception] = []
    ended = threading.Event()

    def serve() -> None:
        try:
            while not ended.is_set():
                found = serving.run(batch)
                assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        loaded = make_pass("cuda")
    finally:
        ended.set()
        thread.join()
    assert not failures
    assert np.linalg.norm(loaded.run(batch) - expected) <= 1e-4 * np.linalg.norm(expected)
