"""Texts and stages for the fused pass of a GPU: which text lies in which slot of its table.

A text is tokenised and encoded when it is first seen, and stays on the device until its slot is
needed for another. The kernels belong to `chimera_kernels.graph`; knows no bundle and no gates.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from chimera_kernels.graph import MAX_STAGES, Batch, FusedPass
from chimera_kernels.heads import outputs
from chimera_kernels.reference_heads import HeadOutputs, HeadWeights
from chimera_predictors.dataset import Described
from chimera_predictors.encoder import Encoder
from chimera_predictors.text import cut

Slots = NDArray[np.int32]


class SlotTable:
    """Slots of texts, by the digest of what is kept of each; the one unused for longest goes."""

    def __init__(self, capacity: int) -> None:
        if capacity < 2 * MAX_STAGES:
            raise ValueError(f"{capacity} slots; one batch alone can need {2 * MAX_STAGES}")
        self._free = list(range(capacity))
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._slots)

    def place(self, keys: Sequence[bytes]) -> tuple[Slots, list[int]]:
        """A slot for each of at most 2 `MAX_STAGES` keys, and which of them are new to theirs."""
        for key in keys:
            if key in self._slots:
                self._slots.move_to_end(key)  # so that no new key of this batch takes its slot
        new: list[int] = []
        for number, key in enumerate(keys):
            if key not in self._slots:
                self._slots[key] = self._take()
                new.append(number)
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        return np.array([self._slots[key] for key in keys], dtype=np.int32), new

    def forget(self, keys: Sequence[bytes]) -> None:
        """These hold nothing after all."""
        self._free += [self._slots.pop(key) for key in dict.fromkeys(keys)]

    def _take(self) -> int:
        return self._free.pop() if self._free else self._slots.popitem(last=False)[1]


class FusedHeads:
    """From described stages to predictions through `FusedPass`. Not for several threads at once."""

    def __init__(
        self,
        encoder: Encoder,
        weights: HeadWeights,
        *,
        slots: int,
        device: str = "cuda",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Compiles and captures, which takes seconds, the first time on a machine many of them.

        Raises ValueError where there are no kernels for these weights.
        """
        self._tokenizer = encoder.tokenizer
        self._table = SlotTable(slots)
        self._pass = FusedPass(
            encoder.weights, encoder.checkpoint.spec, encoder.checkpoint.pooling, weights,
            slots=slots, longest=encoder.max_tokens, device=device, dtype=dtype,
        )  # fmt: skip
        self._pass.capture()

    @property
    def counters(self) -> dict[str, int]:
        """Of passes, and of texts known and new to the device's table."""
        texts = {"texts_known": self._table.hits, "texts_encoded": self._table.misses}
        return self._pass.counters | texts

    def __call__(self, stages: Described) -> HeadOutputs:
        """Predictions for any number of stages."""
        parts = [
            self._predict(stages, slice(start, start + MAX_STAGES))
            for start in range(0, len(stages.numbers), MAX_STAGES)
        ]
        return outputs(torch.from_numpy(np.concatenate(parts)))

    def _predict(self, stages: Described, rows: slice) -> NDArray[np.float32]:
        task, new = stages.task[rows], stages.new[rows]
        numbers = np.unique(np.concatenate([task, new]))
        numbers = numbers[numbers >= 0]
        texts = [cut(stages.texts[number], self._tokenizer.max_bytes) for number in numbers]
        keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        slots, fresh = self._table.place(keys)
        try:
            packed = self._tokenizer.encode([texts[i] for i in fresh])
            return self._pass.run(
                Batch(
                    packed.ids,
                    packed.lengths,
                    slots[fresh],
                    stages.numbers[rows],
                    stages.stage_group[rows].astype(np.int32),
                    stages.kind[rows].astype(np.int32),
                    _slots_of(task, numbers, slots),
                    _slots_of(new, numbers, slots),
                )
            )
        except BaseException:
            self._table.forget([keys[i] for i in fresh])  # their slots were perhaps not filled
            raise


def _slots_of(which: NDArray[np.int64], numbers: NDArray[np.int64], slots: Slots) -> Slots:
    """Slots of text numbers [R], -1 for -1; `numbers` are the ascending ones that have `slots`."""
    if not len(numbers):
        return np.full(len(which), -1, dtype=np.int32)
    return np.where(which >= 0, slots[np.searchsorted(numbers, which)], -1).astype(np.int32)
