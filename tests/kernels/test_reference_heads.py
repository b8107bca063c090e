"""The heads' reference: each step does what its docstring says, on odd sizes."""

import pytest
import torch
from torch import Tensor

from chimera_kernels import reference_heads as ops

NUMBERS, STEPS, KINDS, STAGES, MODELS, LEVELS, WIDTH, CENTRES, HIDDEN = 3, 2, 2, 3, 5, 7, 8, 4, 6


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture
def weights() -> ops.HeadWeights:
    torch.manual_seed(0)
    values = 2 + 2 * LEVELS
    return ops.HeadWeights(
        edges=torch.arange(STEPS + 1.0).repeat(NUMBERS, 1),
        kind_weight=torch.randn(WIDTH, KINDS),
        kind_bias=torch.zeros(KINDS),
        task_mean=torch.zeros(WIDTH),
        task_projection=torch.randn(WIDTH, 2),
        new_mean=torch.zeros(WIDTH),
        new_projection=torch.randn(WIDTH, 2),
        base=torch.rand(STAGES, KINDS, MODELS, 4),
        centres=unit(CENTRES, WIDTH),
        width=torch.tensor([0.2]),
        shift=torch.randn(CENTRES, MODELS * 3) * 0.1,
        shift_scale=torch.ones(STAGES, 3),
        hidden_weight=torch.randn(NUMBERS * STEPS + KINDS + 4, HIDDEN),
        hidden_bias=torch.randn(HIDDEN),
        out_weight=torch.randn(HIDDEN, MODELS * values),
        out_bias=torch.randn(MODELS * values),
        router_share=torch.full((STAGES,), 0.5),
        platt=torch.tensor([[1.0, 0.0]]).repeat(MODELS, 1),
        conformal=torch.randn(2, STAGES, LEVELS) * 0.1,
    )


def make_inputs(rows: int, **changes: Tensor) -> ops.HeadInputs:
    torch.manual_seed(rows)
    inputs = ops.HeadInputs(
        numbers=torch.rand(rows, NUMBERS) * STEPS,
        stage_group=torch.arange(rows) % STAGES,
        kind=torch.arange(rows) % (KINDS + 1) - 1,
        task=unit(rows, WIDTH),
        new=unit(rows, WIDTH),
    )
    return inputs._replace(**changes)


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_shapes_ranges_and_order(weights: ops.HeadWeights, rows: int) -> None:
    out = ops.heads(make_inputs(rows), weights)
    assert out.confidence.shape == out.after.shape == (rows, MODELS)
    assert ((out.confidence >= 0) & (out.confidence <= 1)).all()
    for quantiles in (out.stage, out.remaining):
        assert quantiles.shape == (rows, MODELS, LEVELS)
        assert (quantiles.diff(dim=-1) >= 0).all()
    assert (out.remaining >= out.stage).all()


def test_rows_do_not_depend_on_their_batch(weights: ops.HeadWeights) -> None:
    inputs = make_inputs(9)
    together = ops.heads(inputs, weights)
    for row in range(9):
        alone = ops.heads(ops.HeadInputs(*(x[row : row + 1] for x in inputs)), weights)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], other[row], atol=1e-5, rtol=1e-5)


def test_a_declared_kind_counts_whatever_the_text(weights: ops.HeadWeights) -> None:
    kinds = ops.kind_vector(make_inputs(6), weights)
    declared = make_inputs(6).kind
    assert (kinds[declared >= 0].max(dim=1).values == 1.0).all()
    soft = kinds[declared < 0]
    assert ((soft > 0) & (soft < 1)).all()
    torch.testing.assert_close(kinds.sum(dim=1), torch.ones(6))


def test_a_number_beyond_the_edges_changes_nothing(weights: ops.HeadWeights) -> None:
    inside, outside = (
        ops.heads(make_inputs(1, numbers=torch.full((1, NUMBERS), value)), weights)
        for value in (float(STEPS), 1e30)
    )
    assert (inside.confidence == outside.confidence).all()


def test_without_a_text_there_is_no_shift(weights: ops.HeadWeights) -> None:
    inputs = make_inputs(4, task=torch.zeros(4, WIDTH))
    assert (ops.text_shift(inputs, weights) == 0).all()


def test_a_text_at_a_centre_is_shifted_by_its_weight(weights: ops.HeadWeights) -> None:
    lonely = torch.eye(CENTRES, WIDTH)  # orthogonal centres hardly see each other
    inputs = make_inputs(1, task=lonely[:1], stage_group=torch.zeros(1, dtype=torch.int64))
    found = ops.text_shift(inputs, weights._replace(centres=lonely, width=torch.tensor([0.01])))
    wanted = weights.shift[0].view(MODELS, 3)
    torch.testing.assert_close(found[0, :, :3], wanted)
    assert (found[0, :, 3] == 0).all()


def test_the_share_mixes_two_estimates(weights: ops.HeadWeights) -> None:
    prior, moved = torch.full((1, MODELS, 4), 0.2), torch.full((1, MODELS, 4), 0.9)
    raw, stage = torch.zeros(1, MODELS, 2 + 2 * LEVELS), torch.zeros(1, dtype=torch.int64)

    def confidence(share: float) -> float:
        mixed = weights._replace(router_share=torch.full((STAGES,), share))
        return float(ops.finish(raw, prior, moved, stage, mixed).confidence[0, 0])

    assert confidence(1.0) == pytest.approx(0.2)
    assert confidence(0.0) == pytest.approx(0.9)
    assert 0.2 < confidence(0.5) < 0.9


def test_quantiles_start_at_the_location() -> None:
    location, gaps = torch.randn(3, 2), torch.randn(3, 2, LEVELS - 1)
    found = ops.quantiles(location, gaps)
    torch.testing.assert_close(found[..., LEVELS // 2], location)
    assert (found.diff(dim=-1) > 0).all()
