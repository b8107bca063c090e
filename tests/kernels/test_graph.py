"""The whole pass: buckets, staging, splitting, and what it says to wrong batches."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import random_encoders as encoders
from chimera_kernels import graph, reference, reference_heads
from chimera_kernels.graph import Batch, FusedPass, bucket_for, buckets
from chimera_kernels.heads import outputs
from chimera_kernels.reference_heads import HeadInputs, HeadWeights

WIDTH, NUMBERS, STEPS, KINDS, GROUPS, MODELS, LEVELS, HIDDEN = 48, 5, 3, 4, 6, 3, 7, 40
SLOTS = 40
WEIGHTS, SPEC = encoders.bert(width=WIDTH, layers=1)


def head_weights() -> HeadWeights:
    values = MODELS * (2 + 2 * LEVELS)
    return HeadWeights(
        edges=torch.arange(STEPS + 1.0).repeat(NUMBERS, 1),
        kind_weight=torch.randn(WIDTH, KINDS),
        kind_bias=torch.randn(KINDS),
        task_mean=torch.randn(WIDTH) * 0.1,
        task_projection=torch.randn(WIDTH, 3),
        new_mean=torch.randn(WIDTH) * 0.1,
        new_projection=torch.randn(WIDTH, 2),
        base=torch.rand(GROUPS, KINDS, MODELS, 4),
        centres=torch.nn.functional.normalize(torch.randn(9, WIDTH), dim=-1),
        width=torch.tensor([0.2]),
        shift=torch.randn(9, MODELS * 3) * 0.1,
        shift_scale=torch.rand(GROUPS, 3),
        hidden_weight=torch.randn(NUMBERS * STEPS + KINDS + 5, HIDDEN) * 0.3,
        hidden_bias=torch.randn(HIDDEN),
        out_weight=torch.randn(HIDDEN, values) * 0.2,
        out_bias=torch.randn(values),
        router_share=torch.rand(GROUPS),
        platt=torch.tensor([[1.1, 0.1]]).repeat(MODELS, 1),
        conformal=torch.randn(2, GROUPS, LEVELS) * 0.1,
    )


HEADS = head_weights()


def make_pass(device: str, **options: Any) -> FusedPass:
    options = {"slots": SLOTS, "dtype": torch.float32} | options
    made = FusedPass(WEIGHTS, SPEC, "mean", HEADS, device=device, **options)
    made.texts.fill_(float("nan"))
    made.capture()
    return made


def make_batch(lengths: list[int], stages: int, slots: list[int] | None = None) -> Batch:
    """Stages whose texts are, in turn, none, the first sequence, the second one, and so on."""
    generator = np.random.default_rng(stages + sum(lengths))
    slots = list(range(len(lengths))) if slots is None else slots
    known = np.array([-1, *slots], dtype=np.int32)
    turn = np.arange(stages)
    return Batch(
        ids=generator.integers(0, encoders.VOCABULARY, sum(lengths), dtype=np.int32),
        lengths=np.array(lengths, dtype=np.int32),
        slots=np.array(slots, dtype=np.int32),
        numbers=generator.uniform(-1, STEPS + 1, (stages, NUMBERS)).astype(np.float32),
        stage_group=(turn % GROUPS).astype(np.int32),
        kind=(turn % (KINDS + 1) - 1).astype(np.int32),
        task_slot=known[turn % len(known)],
        new_slot=known[(turn // 2) % len(known)],
    )


def vectors(batch: Batch) -> Tensor:
    """[S, D] of the batch's own texts, by the reference."""
    ids = torch.from_numpy(batch.ids)
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(batch.lengths)]))
    hidden = reference.forward(ids, bounds, WEIGHTS, SPEC)
    return reference.normalise(reference.pool(hidden, bounds, "mean"))


def wanted(batch: Batch, table: Tensor) -> Tensor:
    """[B, M, 2 + 2Q] by the reference, `table` [slots, D] holding all texts."""

    def rows(slots: np.ndarray) -> Tensor:
        at = torch.from_numpy(slots.astype(np.int64))
        return torch.where((at >= 0)[:, None], table[at], torch.zeros(WIDTH))

    found = reference_heads.heads(
        HeadInputs(
            torch.from_numpy(batch.numbers),
            torch.from_numpy(batch.stage_group.astype(np.int64)),
            torch.from_numpy(batch.kind.astype(np.int64)),
            rows(batch.task_slot),
            rows(batch.new_slot),
        ),
        HEADS,
    )
    one = (found.confidence[..., None], found.after[..., None])
    return torch.cat([*one, found.stage, found.remaining], dim=-1)


def close(found: np.ndarray, expected: Tensor) -> bool:
    return bool(np.linalg.norm(found - expected.numpy()) <= 1e-5 * expected.norm())


@pytest.mark.parametrize(
    ("lengths", "stages"),
    [([1], 1), ([80, 3, 17], 5), ([2] * 9, 33), ([], 2)],
    ids=str,
)
def test_agrees_with_the_reference(lengths: list[int], stages: int, device: str) -> None:
    batch = make_batch(lengths, stages)
    table = torch.zeros(SLOTS, WIDTH)
    if lengths:
        table[: len(lengths)] = vectors(batch)
    assert close(make_pass(device).run(batch), wanted(batch, table))


def test_texts_of_earlier_passes_are_known(device: str) -> None:
    made = make_pass(device)
    first, second = make_batch([7, 30], 3, slots=[SLOTS - 1, 4]), make_batch([12], 2, slots=[9])
    table = torch.zeros(SLOTS, WIDTH)
    table[[SLOTS - 1, 4]], table[[9]] = vectors(first), vectors(second)
    assert close(made.run(first), wanted(first, table))
    mixed = second._replace(
        task_slot=np.array([4, 9], np.int32), new_slot=np.array([SLOTS - 1, 4], np.int32)
    )
    assert close(made.run(mixed), wanted(mixed, table))


def test_more_texts_than_the_largest_bucket_takes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (graph.Bucket(0, 0, 16), graph.Bucket(64, 3, 16))
    monkeypatch.setattr(graph, "buckets", lambda: few)
    made = make_pass(device)
    batch = make_batch([60, 1, 1, 1, 30, 40], 7)
    table = torch.zeros(SLOTS, WIDTH)
    table[:6] = vectors(batch)
    assert close(made.run(batch), wanted(batch, table))
    assert made.counters == {"passes": 1, "passes_split": 1}


def test_small_batches_in_one_launch(device: str) -> None:
    made = make_pass(device, persistent_tokens=64)
    for lengths in ([9, 20], [70]):
        batch = make_batch(lengths, 2)
        table = torch.zeros(SLOTS, WIDTH)
        table[: len(lengths)] = vectors(batch)
        assert close(made.run(batch), wanted(batch, table))


def test_texts_longer_than_agreed(device: str) -> None:
    made = make_pass(device, longest=9)
    batch = make_batch([9, 4], 2)
    table = torch.zeros(SLOTS, WIDTH)
    table[:2] = vectors(batch)
    assert close(made.run(batch), wanted(batch, table))
    with pytest.raises(ValueError, match="length 10 is not from 1 to 9"):
        made.run(make_batch([10], 2))


def test_outputs_are_not_overwritten_by_the_next_pass(device: str) -> None:
    made = make_pass(device)
    first = made.run(make_batch([5], 2))
    kept = first.copy()
    made.run(make_batch([6], 3))
    assert np.array_equal(first, kept)
    assert outputs(torch.from_numpy(first)).confidence.shape == (2, MODELS)


def test_values_beyond_fp16_are_not_passed_on(device: str) -> None:
    layer = WEIGHTS.layers[0]
    wild = layer._replace(up=layer.up._replace(weight=layer.up.weight * 1e6))
    made = FusedPass(
        WEIGHTS._replace(layers=(wild,)), SPEC, "mean", HEADS,
        slots=SLOTS, device=device, dtype=torch.float16,
    )  # fmt: skip
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="not finite"):
        made.run(make_batch([5], 2))


INTS = np.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": np.array([3], INTS)}, "4 token ids and 1 slots do not fit 1 texts of 3"),
        ({"lengths": np.array([2, 2], INTS)}, "4 token ids and 1 slots do not fit 2 texts of 4"),
        ({"lengths": np.array([4, 0], INTS), "slots": np.array([0, 1], INTS)}, "length 0 is not"),
        ({"ids": np.array([1, 2, 97, 3], INTS)}, "token id 97 is not from 0 to 96"),
        ({"ids": np.array([1, -1, 7, 3], INTS)}, "token id -1 is not"),
        ({"ids": np.zeros(81, INTS), "lengths": np.array([81], INTS)}, "length 81 is not"),
        ({"slots": np.array([SLOTS], INTS)}, f"slot {SLOTS} is not from 0 to {SLOTS - 1}"),
        ({"task_slot": np.array([SLOTS, 0], INTS)}, f"task_slot {SLOTS} is not"),
        ({"new_slot": np.array([-2, 0], INTS)}, "new_slot -2 is not"),
        ({"kind": np.array([KINDS, 0], INTS)}, "kind 4 is not from -1 to 3"),
        ({"stage_group": np.array([GROUPS, 0], INTS)}, "stage_group 6 is not"),
        ({"stage_group": np.array([0], INTS)}, "stage_group has 1 rows, not 2"),
        ({"numbers": np.zeros((0, NUMBERS), np.float32)}, "1 to 256 stages, not 0"),
        ({"numbers": np.zeros((257, NUMBERS), np.float32)}, "1 to 256 stages, not 257"),
        ({"numbers": np.zeros((2, NUMBERS + 1), np.float32)}, "6 numbers per stage"),
    ],
    ids=str,
)
def test_wrong_batches_are_named(change: dict[str, np.ndarray], message: str, device: str) -> None:
    made = make_pass(device)
    good = make_batch([4], 2)
    with pytest.raises(ValueError, match=message):
        made.run(good._replace(**change))
    table = torch.zeros(SLOTS, WIDTH)
    table[:1] = vectors(good)
    assert close(made.run(good), wanted(good, table))  # and it goes on


def test_every_size_has_a_bucket_up_to_the_largest() -> None:
    largest = buckets()[-1]
    assert bucket_for(*largest) == largest
    for beyond in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert bucket_for(*(a + b for a, b in zip(largest, beyond, strict=True))) is None
    assert bucket_for(0, 0, 1) == (0, 0, 16)
    for tokens in range(1, 17_000, 37):
        bucket = bucket_for(tokens, 1, 1)
        assert bucket is None or 64 <= bucket.tokens < max(65, 2 * tokens)
