"""The fused pass behind a bundle: the same forecasts as plain torch, whatever lies in its table."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from chimera_kernels import dispatch
from chimera_kernels.graph import MAX_STAGES
from chimera_predictors import predictor
from chimera_predictors.encoder import EmbeddingCache
from chimera_predictors.fused import FusedHeads, SlotTable
from chimera_predictors.predictor import BundleError, BundlePredictor
from chimera_predictors.records import StageQuery
from tiny_bundle import Trained

SLOTS = 2 * MAX_STAGES


@pytest.fixture(scope="module")
def fused(trained: Trained, device: str) -> FusedHeads:
    return FusedHeads(
        trained.encoder, trained.bundle.weights, slots=SLOTS, device=device, dtype=torch.float32
    )


def queries_of(trained: Trained, count: int) -> list[StageQuery]:
    return trained.traces.queries()[:count]


def same(trained: Trained, fused: FusedHeads, queries: list[StageQuery]) -> bool:
    cache = EmbeddingCache(trained.encoder)
    found = BundlePredictor(trained.bundle, cache, fused).table(queries)
    wanted = BundlePredictor(trained.bundle, cache).table(queries)
    # The encoder on the other side may be one of bf16.
    exact = trained.encoder.dtype == torch.float32
    return all(
        np.allclose(a, b, atol=1e-4 if exact else 2e-2, equal_nan=True)
        for a, b in zip(vars(found).values(), vars(wanted).values(), strict=True)
    )


@pytest.mark.parametrize("count", [1, 2, 17])
def test_agrees_with_plain_torch(trained: Trained, fused: FusedHeads, count: int) -> None:
    assert same(trained, fused, queries_of(trained, count))


def test_known_texts_are_not_encoded_again(trained: Trained, fused: FusedHeads) -> None:
    queries = queries_of(trained, 9)
    assert same(trained, fused, queries)
    before = fused.counters
    assert same(trained, fused, queries[::-1])
    assert fused.counters["texts_encoded"] == before["texts_encoded"]
    assert fused.counters["texts_known"] > before["texts_known"]


def test_stages_without_texts(trained: Trained, fused: FusedHeads) -> None:
    assert same(trained, fused, [StageQuery(prompt_tokens=9)] * 2)


def test_more_stages_than_one_pass_takes(trained: Trained, fused: FusedHeads) -> None:
    # As many texts as stages would go into the largest buckets of the encoder, which take half a
    # minute in the interpreter. Of the second pass one text is known from the first, two are new.
    # A digit alone is a word of the tiny vocabulary; a number of several digits would be unknown.
    numbers = [*(n % 11 for n in range(MAX_STAGES + 1)), 88, 99]
    query = trained.traces.queries()[0]
    queries = [replace(query, task_text=" ".join(f"{n:02}")) for n in numbers]
    before = fused.counters
    assert same(trained, fused, queries)
    assert fused.counters["passes"] == before["passes"] + 2
    assert fused.counters["texts_encoded"] >= before["texts_encoded"] + 13


def test_texts_of_a_failed_pass_are_encoded_again(
    trained: Trained, fused: FusedHeads, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [replace(query, task_text="of a failed pass") for query in queries_of(trained, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(fused._pass, "run", raise_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            BundlePredictor(trained.bundle, EmbeddingCache(trained.encoder), fused).table(queries)
    before = fused.counters["texts_encoded"]
    assert same(trained, fused, queries)
    assert fused.counters["texts_encoded"] > before


def raise_out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("no room")


class Test_slots:
    @pytest.fixture
    def table(self) -> SlotTable:
        return SlotTable(SLOTS)

    def test_a_key_keeps_its_slot(self, table: SlotTable) -> None:
        first, new = table.place([b"a", b"b"])
        assert new == [0, 1]
        again, new = table.place([b"b", b"c", b"a"])
        assert (again[2], again[0]) == tuple(first)
        assert new == [1]
        assert len(set(again)) == 3

    def test_the_one_unused_for_longest_makes_room(self, table: SlotTable) -> None:
        keys = [b"%d" % n for n in range(SLOTS)]
        slots, _ = table.place(keys)
        table.place([keys[0]])
        found, new = table.place([b"other", keys[2]])
        assert found[0] == slots[1]
        assert new == [0]
        assert len(table) == SLOTS

    def test_a_batch_never_takes_its_own_slots(self, table: SlotTable) -> None:
        table.place([b"%d" % n for n in range(SLOTS)])
        batch = [b"new%d" % n for n in range(SLOTS - 1)] + [b"0"]
        slots, new = table.place(batch)
        assert len(set(slots)) == SLOTS
        assert new == list(range(SLOTS - 1))

    def test_forgotten_slots_are_free(self, table: SlotTable) -> None:
        table.place([b"a", b"b"])
        table.forget([b"b", b"b"])
        assert table.place([b"a", b"b"])[1] == [1]
        assert len(table) == 2

    def test_fewer_slots_than_a_batch_needs(self) -> None:
        with pytest.raises(ValueError, match="511 slots; one batch alone can need 512"):
            SlotTable(SLOTS - 1)


class Test_dispatch:
    def test_no_gpu(self, trained: Trained) -> None:
        spec, heads = trained.encoder.checkpoint.spec, trained.bundle.weights
        choice = dispatch.choose("cpu", trained.encoder.weights, spec, heads)
        assert choice == (False, "no GPU")

    @pytest.mark.parametrize(
        ("capability", "activation", "expected"),
        [
            ((9, 0), "gelu", (True, "A GPU")),
            ((8, 0), "gelu", (True, "A GPU")),
            ((7, 5), "gelu", (False, "the GPU's compute capability is 7.5, below 8.0")),
            ((9, 0), "tanh", (False, "activation 'tanh'")),
        ],
    )
    def test_gpus(
        self,
        trained: Trained,
        monkeypatch: pytest.MonkeyPatch,
        capability: tuple[int, int],
        activation: str,
        expected: tuple[bool, str],
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
        spec = trained.encoder.checkpoint.spec._replace(activation=activation)
        heads = trained.bundle.weights
        found = dispatch.choose("cuda", trained.encoder.weights, spec, heads)
        assert found.fused is expected[0]
        assert found.reason.startswith(expected[1])

    def test_heads_that_are_too_large(
        self, trained: Trained, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        heads = trained.bundle.weights
        wide = heads._replace(hidden_weight=torch.zeros(len(heads.hidden_weight), 4000))
        spec = trained.encoder.checkpoint.spec
        found = dispatch.choose("cuda", trained.encoder.weights, spec, wide)
        assert found == (False, "4000 hidden units; the kernel takes 1 to 2560")

    def test_kernels_that_cannot_be_compiled_leave_plain_torch(
        self, trained: Trained, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no C compiler")

        monkeypatch.setattr(dispatch, "choose", lambda *_: dispatch.Choice(True, "A GPU"))
        monkeypatch.setattr("chimera_predictors.fused.FusedHeads", fail)
        loaded = load(trained)
        assert loaded.runs_on.endswith("cannot be used here (RuntimeError: no C compiler)")
        assert loaded.predict(queries_of(trained, 1))

    def test_what_is_loaded_says_where_it_runs(self, trained: Trained) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        assert load(trained).runs_on == "cpu, plain torch: no GPU"

    def test_a_full_gpu_is_named(self, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "choose", lambda *_: dispatch.Choice(True, "A GPU"))
        monkeypatch.setattr("chimera_predictors.fused.FusedHeads", raise_out_of_memory)
        with pytest.raises(BundleError, match='no room for the predictor .*device = "cpu"'):
            load(trained)


def load(trained: Trained) -> BundlePredictor:
    return predictor.load(trained.folder, device="cpu")
