"""The fused heads give what pooling and `reference_heads` give, and write nothing else."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from chimera_kernels import heads as kernels  # noqa: E402
from chimera_kernels import reference, reference_heads  # noqa: E402
from chimera_kernels.heads import Heads, Sizes, StageBatch  # noqa: E402
from chimera_kernels.reference import Norm, Pooling  # noqa: E402
from chimera_kernels.reference_heads import HeadInputs, HeadOutputs, HeadWeights  # noqa: E402

EPS = 1e-5
SLOTS = 40
# ‖out - ref‖ / ‖ref‖. Both are fp32 and differ in the order of sums, of 1e-7 each; the kernel
# regression divides what it sums by its width of 0.2 and takes exp of it.
BOUND = 5e-6
SMALL = Sizes(D=24, N=3, G=2, K=3, P=5, O=2, S=3, M=5, Q=7, C=37, H=45)
ODD = Sizes(D=70, N=5, G=3, K=8, P=23, O=9, S=6, M=13, Q=7, C=65, H=97)


def unit(*shape: int) -> Tensor:
    return reference.normalise(torch.randn(*shape))


def make_weights(sizes: Sizes) -> HeadWeights:
    D, N, G, K, P, O, S, M, Q, C, H = sizes  # noqa: E741
    joined, values = N * G + K + P + O, M * (2 + 2 * Q)
    return HeadWeights(
        edges=torch.rand(N, G + 1).add(0.1).cumsum(1),
        kind_weight=torch.randn(D, K) * 2,
        kind_bias=torch.randn(K),
        task_mean=torch.randn(D) / D**0.5,
        task_projection=torch.randn(D, P),
        new_mean=torch.randn(D) / D**0.5,
        new_projection=torch.randn(D, O),
        base=torch.rand(S, K, M, 4) * torch.tensor([1.0, 6.0, 8.0, 2.0]),
        centres=unit(C, D),
        width=torch.tensor([0.2]),
        shift=torch.randn(C, M * 3) * 10,
        shift_scale=torch.rand(S, 3) + 0.5,
        hidden_weight=torch.randn(joined, H) / joined**0.5 * 2,
        hidden_bias=torch.randn(H),
        out_weight=torch.randn(H, values) / H**0.5,
        out_bias=torch.randn(values),
        router_share=torch.rand(S),
        platt=torch.randn(M, 2) * 0.3 + torch.tensor([1.0, 0.0]),
        conformal=torch.randn(2, S, Q) * 0.5,
    )


class Batch(NamedTuple):
    """What one launch is asked, without padding."""

    lengths: list[int]
    seq_slots: list[int]
    task_slots: list[int]
    new_slots: list[int]


def spread(lengths: list[int], stages: int) -> Batch:
    """Stages that each point at two of the sequences, some at none, some at the same."""
    slots = torch.randperm(SLOTS)[: len(lengths)].tolist()
    choice = torch.tensor([-1, *slots])
    task, new = (choice[torch.randint(len(choice), (stages,))].tolist() for _ in range(2))
    return Batch(lengths, slots, task, new)


class Bench:
    """One `Heads` with a table of texts, and the same texts kept beside it for the reference."""

    def __init__(
        self,
        sizes: Sizes,
        device: str,
        max_stages: int = 40,
        max_sequences: int = 20,
        slots: int = SLOTS,
        weights: HeadWeights | None = None,
    ) -> None:
        self.sizes, self.device = sizes, device
        self.weights = weights or make_weights(sizes)
        self.heads = Heads(self.weights, device, max_stages, max_sequences)
        self.texts = torch.full((slots, self.heads.text_width), float("nan"), device=device)
        self.vectors = torch.full((slots, sizes.D), float("nan"))

    def run(
        self,
        batch: Batch,
        pooling: Pooling = "mean",
        norm: Norm | None = None,
        dtype: torch.dtype = torch.float32,
        spare: tuple[int, int] = (0, 0),
        **changes: Tensor,
    ) -> tuple[HeadOutputs, HeadOutputs]:
        """What the kernel gives and what the reference gives, for a launch with `spare` room."""
        sizes, stages = self.sizes, len(batch.task_slots)
        hidden = (torch.randn(sum(batch.lengths), sizes.D) * 3 + 1).to(dtype)
        hidden = changes.get("hidden", hidden)
        inputs = HeadInputs(
            torch.randn(stages, sizes.N) * 2,
            torch.randint(sizes.S, (stages,)),
            changes.get("kind", torch.randint(-1, sizes.K, (stages,))),
            torch.empty(0),
            torch.empty(0),
        )
        found = self.launch(hidden, batch, inputs, pooling, norm, spare)
        self.pool(hidden, batch, pooling, norm)
        if not stages:
            return found, found
        task, new = (
            torch.where(slots[:, None] >= 0, self.vectors[slots], 0.0)
            for slots in (torch.tensor(batch.task_slots), torch.tensor(batch.new_slots))
        )
        wanted = reference_heads.heads(inputs._replace(task=task, new=new), self.weights)
        return found, wanted

    def launch(
        self,
        hidden: Tensor,
        batch: Batch,
        inputs: HeadInputs,
        pooling: Pooling,
        norm: Norm | None,
        spare: tuple[int, int],
    ) -> HeadOutputs:
        stages, sequences = len(inputs.kind), len(batch.lengths)
        nowhere = 1 << 30  # what is beyond the counts must not be followed

        def on_device(values: Sequence[int] | Tensor, more: int) -> Tensor:
            numbers = torch.as_tensor(values, dtype=torch.int32)
            padding = torch.full((more,), nowhere, dtype=torch.int32)
            return torch.cat([numbers, padding]).to(self.device)

        numbers = torch.full((stages + spare[1], self.sizes.N), float("nan"))
        numbers[:stages] = inputs.numbers
        batch_of_stages = StageBatch(
            numbers.to(self.device),
            *(
                on_device(values, spare[1])
                for values in (inputs.stage_group, inputs.kind, batch.task_slots, batch.new_slots)
            ),
            counts=on_device([sequences, stages], 0),
        )
        poisoned = torch.full((len(hidden) + 3, self.sizes.D), float("nan"), dtype=hidden.dtype)
        poisoned[: len(hidden)] = hidden
        out = torch.full((stages + spare[1], self.sizes.M, 2 + 2 * self.sizes.Q), float("nan")).to(
            self.device
        )
        for scratch in self.heads._scratch:
            scratch.fill_(float("nan"))
        before = self.texts.clone()
        self.heads.launch(
            poisoned.to(self.device),
            reference.map_tensors(norm, lambda x: x.to(self.device)),
            EPS,
            pooling,
            on_device([0, *accumulate(batch.lengths)], spare[0]),
            on_device(batch.seq_slots, spare[0]),
            batch_of_stages,
            self.texts,
            out,
        )
        assert not out[:stages].isnan().any() or hidden.isnan().any()
        assert out[stages:].isnan().all()
        others = [slot for slot in range(len(before)) if slot not in batch.seq_slots]
        assert torch.equal(self.texts[others].nan_to_num(), before[others].nan_to_num())
        assert not self.heads._counters.any()
        return HeadOutputs(*(x.cpu() for x in kernels.outputs(out[:stages])))

    def pool(self, hidden: Tensor, batch: Batch, pooling: Pooling, norm: Norm | None) -> None:
        if not batch.lengths:
            return
        exact = hidden.float()
        if norm is not None:
            exact = reference.layer_norm(exact, norm, EPS)
        cu_seqlens = torch.tensor([0, *accumulate(batch.lengths)])
        vectors = reference.normalise(reference.pool(exact, cu_seqlens, pooling))
        self.vectors[batch.seq_slots] = vectors
        found = self.texts[batch.seq_slots].cpu()
        used = self.sizes.D + self.sizes.K + self.sizes.P + self.sizes.O
        if not hidden.isnan().any():
            assert error(found[:, : self.sizes.D], vectors) < BOUND
            assert not found[:, :used].isnan().any()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def agree(found: HeadOutputs, wanted: HeadOutputs) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert error(one, other) < BOUND
    assert torch.equal(found.confidence.argsort(), wanted.confidence.argsort())


def norm(width: int, bias: bool = True) -> Norm:
    return Norm(torch.rand(width) + 0.5, torch.randn(width) if bias else None)


@pytest.mark.parametrize("stages", [1, 7, 16, 33])
@pytest.mark.parametrize("sizes", [SMALL, ODD], ids=["small", "odd"])
def test_agrees_with_the_reference(sizes: Sizes, stages: int, device: str) -> None:
    bench = Bench(sizes, device)
    agree(*bench.run(spread([1, 23, 70, 2, 8], stages), norm=norm(sizes.D)))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", ["norm", "norm without bias", "no norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_hidden_states(
    pooling: Pooling, kind: str, dtype: torch.dtype, device: str
) -> None:
    pending = None if kind == "no norm" else norm(SMALL.D, bias=kind == "norm")
    agree(*Bench(SMALL, device).run(spread([1, 35, 300], 5), pooling, pending, dtype))


@pytest.mark.parametrize("models", [1, 2, 32])
@pytest.mark.parametrize("levels", [1, 3, 5, 9])
def test_models_and_levels(models: int, levels: int, device: str) -> None:
    sizes = SMALL._replace(M=models, Q=levels)
    agree(*Bench(sizes, device).run(spread([3, 9], 5)))


def test_gaps_so_wide_that_softplus_is_linear(device: str) -> None:
    weights = make_weights(SMALL)
    bias = torch.full((SMALL.M, 2 + 2 * SMALL.Q), 24.0)
    bias[:, [1, 1 + SMALL.Q]] = 30.0  # the middle one, of which the next below is still above 0
    bias[:, [0, -1]] = 0.0
    weights = weights._replace(out_bias=bias.flatten())
    agree(*Bench(SMALL, device, weights=weights).run(spread([3, 9], 5)))


def test_the_largest_sizes(device: str) -> None:
    sizes = Sizes(S=6, **{symbol: most for symbol, (most, _) in kernels._LIMITS.items()})
    agree(*Bench(sizes, device, 2, 2).run(spread([2, 31], 2), norm=norm(sizes.D)))


@pytest.mark.parametrize(
    ("sequences", "stages"), [(kernels.MAX_SEQUENCES, 3), (4, kernels.MAX_STAGES)]
)
def test_the_most_stages_and_sequences(sequences: int, stages: int, device: str) -> None:
    sizes = SMALL._replace(M=2, Q=3)
    bench = Bench(sizes, device, stages, sequences, slots=600)
    slots = torch.randperm(600)[:sequences]
    task, new = (slots[torch.randint(len(slots), (stages,))].tolist() for _ in range(2))
    lengths = torch.randint(1, 9, (sequences,)).tolist()
    agree(*bench.run(Batch(lengths, slots.tolist(), task, new)))


def test_stages_may_share_texts_and_lack_them(device: str) -> None:
    batch = Batch([4, 40], [7, 3], [7, 7, -1, 3, -1, 7], [3, 7, 3, -1, -1, 7])
    for kind in (-torch.ones(6, dtype=torch.int64), torch.arange(6) % SMALL.K):
        agree(*Bench(SMALL, device).run(batch, kind=kind))


def test_texts_of_earlier_launches(device: str) -> None:
    bench = Bench(SMALL, device)
    agree(*bench.run(Batch([5, 50, 1], [0, 9, SLOTS - 1], [9], [0])))
    agree(*bench.run(Batch([], [], [0, 9, SLOTS - 1], [9, -1, 0])))
    agree(*bench.run(Batch([7], [9], [0, 9, 9], [SLOTS - 1, 9, -1])))


def test_texts_alone(device: str) -> None:
    bench = Bench(SMALL, device)
    found, _ = bench.run(Batch([9, 21], [4, 5], [], []))
    assert len(found.stage) == 0
    agree(*bench.run(Batch([], [], [4, 5], [5, 4])))


def test_nothing_at_all(device: str) -> None:
    bench = Bench(SMALL, device)
    for spare in ((0, 0), (4, 4)):
        bench.run(Batch([], [], [], []), spare=spare)
    agree(*bench.run(spread([2], 1)))


@pytest.mark.parametrize("spare", [(1, 0), (0, 1), (7, 30)], ids=str)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_room_that_is_not_used_changes_nothing(
    spare: tuple[int, int], pooling: Pooling, device: str
) -> None:
    bench = Bench(SMALL, device)
    for _ in range(2):
        agree(*bench.run(spread([1, 17, 3], 9), pooling, spare=spare))


def test_a_text_of_zeros_is_as_no_text(device: str) -> None:
    hidden = torch.randn(9, SMALL.D)
    hidden[:4] = 0.0
    found, wanted = Bench(SMALL, device).run(
        Batch([4, 5], [0, 1], [0, -1, 1], [0, -1, 0]), hidden=hidden
    )
    agree(found, wanted)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_a_broken_text_breaks_its_stages_only(device: str) -> None:
    hidden = torch.randn(9, SMALL.D)
    hidden[2, 3] = float("nan")
    found, wanted = Bench(SMALL, device).run(
        Batch([4, 5], [0, 1], [0, 1, 1, -1], [1, 1, 0, 1]), hidden=hidden
    )
    broken, sound = [0, 2], [1, 3]
    assert all(x[broken].isnan().all() for x in (*found, *wanted))
    agree(*(HeadOutputs(*(x[sound] for x in side)) for side in (found, wanted)))


def test_two_launches_give_the_same_bits(device: str) -> None:
    bench = Bench(ODD, device)
    batch, hidden = spread([40, 3, 90], 20), torch.randn(133, ODD.D)
    inputs = HeadInputs(
        torch.randn(20, ODD.N), torch.randint(ODD.S, (20,)), torch.randint(-1, ODD.K, (20,)),
        torch.empty(0), torch.empty(0),
    )  # fmt: skip
    first, second = (
        bench.launch(hidden, batch, inputs, "mean", None, spare) for spare in ((0, 0), (5, 12))
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"D": 1025}, "1025 dimensions of a text; the kernel takes 1 to 1024"),
        ({"M": 33}, "33 models"),
        ({"Q": 11}, "11 quantile levels"),
        ({"Q": 4}, "odd number"),
        ({"H": 2561}, "2561 hidden units"),
        ({"C": 1025}, "1025 centres"),
        ({"K": 65}, "65 kinds"),
        ({"N": 65}, "65 numbers"),
        ({"G": 17}, "17 steps"),
    ],
)
def test_sizes_beyond_the_limits_are_named(change: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Heads(make_weights(SMALL._replace(**change)), "cpu")


@pytest.mark.parametrize(
    ("room", "says"), [((257, 1), "257 stages at once"), ((1, 513), "513 sequences at once")]
)
def test_more_room_than_the_limits_is_named(room: tuple[int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Heads(make_weights(SMALL), "cpu", *room)


def test_the_cost_counts_every_tensor_once() -> None:
    heads = Heads(make_weights(SMALL), "cpu", 1, 1)
    moved, flops = heads.cost(0, 0, 0, 4)
    assert (moved, flops) == (4 * sum(x.numel() for x in heads._weights), 0)
    one_token = heads.cost(1, 0, 0, 2)[0] - moved
    assert one_token == 2 * SMALL.D
    assert heads.cost(0, 0, 2, 4)[1] == 2 * heads.cost(0, 0, 1, 4)[1] > 0
