"""The whole pass: token ids and numbers in, predictions out, with one wait.

On a GPU each bucket (a capacity of tokens, sequences and stages) is one captured CUDA graph over
fixed memory; the inputs go there in one copy and the outputs come back in one. Elsewhere, which is
Triton's interpreter in tests, the same launches run one by one. Knows no texts.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chimera_kernels.encoder import TritonEncoder, operands_for
from chimera_kernels.heads import Heads, StageBatch
from chimera_kernels.persistent import PersistentEncoder
from chimera_kernels.reference import Pooling, Spec, Weights
from chimera_kernels.reference_heads import HeadWeights

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

MAX_STAGES = 256
MAX_TOKENS = 16_384
_TOKENS = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, MAX_TOKENS)
_STAGES = (16, 64, MAX_STAGES)  # the heads work on sixteen stages at a time
_TOKENS_PER_SEQUENCE = 32
_FEWEST_SEQUENCES = 8
_ALIGNED_WORDS = 4  # kernels load 16 bytes at once


class Batch(NamedTuple):
    """B stages, with the S texts among theirs whose vectors are not in the table yet."""

    ids: Ints  # [T] token ids of the texts, one after the other
    lengths: Ints  # [S] their numbers of tokens
    slots: Ints  # [S] where in the table each one's vector goes
    numbers: Floats  # [B, N] as `HeadInputs.numbers`
    stage_group: Ints  # [B]
    kind: Ints  # [B], -1 where the text has to tell it
    task_slot: Ints  # [B] where in the table the vector is, -1 without a text
    new_slot: Ints  # [B]


class Bucket(NamedTuple):
    """What one captured graph has room for."""

    tokens: int
    sequences: int
    stages: int


@cache
def buckets() -> tuple[Bucket, ...]:
    """All buckets, from small to large.

    Programs beyond the real batch return at once, so room costs little and powers of two suffice.
    """
    return tuple(
        Bucket(tokens, _sequences(tokens), stages) for tokens in _TOKENS for stages in _STAGES
    )


def _sequences(tokens: int) -> int:
    return max(_FEWEST_SEQUENCES, tokens // _TOKENS_PER_SEQUENCE) if tokens else 0


def bucket_for(tokens: int, sequences: int, stages: int) -> Bucket | None:
    """The smallest bucket with room for so much; None where there is none."""
    for bucket in buckets():
        if tokens <= bucket.tokens and sequences <= bucket.sequences and stages <= bucket.stages:
            return bucket
    return None


class FusedPass:
    """Encoder and heads of one bundle on one device. Not for several threads at once.

    What is known of texts stays on the device, in a table whose slots the caller gives out.
    """

    def __init__(
        self,
        weights: Weights,
        spec: Spec,
        pooling: Pooling,
        heads: HeadWeights,
        *,
        slots: int,
        device: str,
        longest: int | None = None,
        dtype: torch.dtype | None = None,
        persistent_tokens: int = 0,
    ) -> None:
        """`slots` of the table; `longest` text in tokens, by default all that the encoder takes.

        A shorter `longest` saves programs that would find nothing to do. `dtype` is that of the
        encoder's operands, by default `operands_for`. Batches of up to `persistent_tokens` use the
        persistent kernel. Raises ValueError where there are no kernels for these weights.
        """
        dtype = dtype or operands_for(spec)
        self.spec: Spec = spec
        self.pooling: Pooling = pooling
        self.longest = min(longest or spec.max_tokens, spec.max_tokens, MAX_TOKENS)
        self._encoder = TritonEncoder(weights, spec, tokens=MAX_TOKENS, device=device, dtype=dtype)
        self._small: TritonEncoder | None = None
        if persistent_tokens:
            self._small = PersistentEncoder(
                weights, spec, tokens=persistent_tokens, device=device, dtype=dtype
            )
        largest = buckets()[-1]
        self._heads = Heads(heads, device, largest.stages, largest.sequences)
        self.numbers, self.slots = heads.edges.shape[0], slots
        self.models, self.levels = heads.platt.shape[0], heads.conformal.shape[2]
        self.texts = torch.zeros(slots, self._heads.text_width, device=device)
        self._out = torch.empty(largest.stages, self.models, 2 + 2 * self.levels, device=device)
        self._on_gpu = torch.device(device).type == "cuda"
        self._staging = {bucket: _Layout(bucket, self.numbers) for bucket in buckets()}
        words = max(layout.words for layout in self._staging.values())
        self._host_in = _host(words, torch.int32, self._on_gpu)
        self._device_in = torch.empty(words, dtype=torch.int32, device=device)
        self._host_out = _host(self._out.numel(), torch.float32, self._on_gpu)
        self._graphs: dict[Bucket, Any] = {}
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        if self._stream is not None:
            # Weights and counters were made on another stream, which would not be waited for.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self.counters = {"passes": 0, "passes_split": 0}

    def capture(self) -> None:
        """Compile the kernels and capture every bucket; without it the first passes are slow."""
        if self._stream is None:
            return
        for bucket in buckets():
            layout = self._staging[bucket]
            layout.fill(self._host_in.numpy(), _smallest_batch(self.numbers))
            with torch.cuda.stream(self._stream):
                self._device_in.copy_(self._host_in, non_blocking=True)
                self._body(bucket, layout)  # compiles; what is captured must be compiled
                graph = torch.cuda.CUDAGraph()
                self._stream.synchronize()
                # Another pass may be serving meanwhile, on another thread.
                with torch.cuda.graph(
                    graph, stream=self._stream, capture_error_mode="thread_local"
                ):
                    self._body(bucket, layout)
            self._graphs[bucket] = graph

    def run(self, batch: Batch) -> Floats:
        """Predictions [B, M, 2 + 2Q] as `heads.outputs` reads them; fills the table's slots.

        Raises ValueError for lengths that do not sum, ids outside the vocabulary, texts that are
        empty or too long, no stage or more than `MAX_STAGES`, slots outside the table. Where the
        texts are more than the largest bucket takes, they are encoded in several passes. Raises
        FloatingPointError where the result is not finite: operands in fp16 have a limit.
        """
        self._check(batch)
        self.counters["passes"] += 1
        bucket = bucket_for(len(batch.ids), len(batch.lengths), len(batch.numbers))
        if bucket is None:
            self.counters["passes_split"] += 1
            batch = self._split(batch)
            bucket = bucket_for(0, 0, len(batch.numbers))
        assert bucket is not None  # of stages there are no more than MAX_STAGES
        found = self._launch(bucket, batch)
        if not np.isfinite(found).all():
            raise FloatingPointError("the fused pass gave values that are not finite")
        return found

    def _split(self, batch: Batch) -> Batch:
        """Encodes all texts, as many at once as fit; what is left are the stages."""
        nothing = batch._replace(
            numbers=batch.numbers[:0], stage_group=batch.stage_group[:0], kind=batch.kind[:0],
            task_slot=batch.task_slot[:0], new_slot=batch.new_slot[:0],
        )  # fmt: skip
        bounds = np.concatenate([[0], np.cumsum(batch.lengths)])
        largest = buckets()[-1]
        start = 0
        while start < len(batch.lengths):
            fits = np.searchsorted(bounds, bounds[start] + largest.tokens, "right") - 1
            end = min(int(fits), start + largest.sequences)
            part = nothing._replace(
                ids=batch.ids[bounds[start] : bounds[end]],
                lengths=batch.lengths[start:end],
                slots=batch.slots[start:end],
            )
            self._launch(largest, part)
            start = end
        return batch._replace(ids=batch.ids[:0], lengths=batch.lengths[:0], slots=batch.slots[:0])

    def _launch(self, bucket: Bucket, batch: Batch) -> Floats:
        layout = self._staging[bucket]
        layout.fill(self._host_in.numpy(), batch)
        stages = len(batch.numbers)
        used = stages * self._out[0].numel()
        if self._stream is None:
            self._device_in.copy_(self._host_in)
            self._body(bucket, layout)
            self._host_out[:used].copy_(self._out.view(-1)[:used])
        else:
            with torch.cuda.stream(self._stream):
                part = slice(0, layout.words)
                self._device_in[part].copy_(self._host_in[part], non_blocking=True)
                graph = self._graphs.get(bucket)
                if graph is None:
                    self._body(bucket, layout)
                else:
                    graph.replay()
                self._host_out[:used].copy_(self._out.view(-1)[:used], non_blocking=True)
            self._stream.synchronize()
        found = self._host_out[:used].numpy().copy()
        return found.reshape(stages, self.models, 2 + 2 * self.levels)

    def _body(self, bucket: Bucket, layout: "_Layout") -> None:
        """All launches of a bucket; allocates nothing."""
        inputs = layout.views(self._device_in)
        encoder = self._encoder
        if bucket.tokens:
            if self._small is not None and bucket.tokens <= self._small.tokens:
                encoder = self._small
            encoder.launch(
                inputs["ids"], inputs["positions"], inputs["cu_seqlens"],
                tokens=bucket.tokens, sequences=bucket.sequences,
                longest=min(self.longest, bucket.tokens),
            )  # fmt: skip
        self._heads.launch(
            encoder.stream, encoder.final_norm, self.spec.eps, self.pooling,
            inputs["cu_seqlens"], inputs["slots"],
            StageBatch(
                inputs["numbers"].view(torch.float32).view(-1, self.numbers),
                inputs["stage_group"], inputs["kind"], inputs["task_slot"], inputs["new_slot"],
                inputs["counts"],
            ),
            self.texts, self._out[: bucket.stages],
        )  # fmt: skip

    def _check(self, batch: Batch) -> None:
        stages, sequences = len(batch.numbers), len(batch.lengths)
        if not 1 <= stages <= MAX_STAGES:
            raise ValueError(f"a batch has 1 to {MAX_STAGES} stages, not {stages}")
        if batch.numbers.shape[1] != self.numbers:
            raise ValueError(
                f"{batch.numbers.shape[1]} numbers per stage; the heads take {self.numbers}"
            )
        for name in ("stage_group", "kind", "task_slot", "new_slot"):
            if len(getattr(batch, name)) != stages:
                raise ValueError(f"{name} has {len(getattr(batch, name))} rows, not {stages}")
        _check_range("stage_group", batch.stage_group, 0, self._heads.sizes.S)
        _check_range("kind", batch.kind, -1, self._heads.sizes.K)
        _check_range("task_slot", batch.task_slot, -1, self.slots)
        _check_range("new_slot", batch.new_slot, -1, self.slots)
        if len(batch.slots) != sequences or batch.lengths.sum() != len(batch.ids):
            raise ValueError(
                f"{len(batch.ids)} token ids and {len(batch.slots)} slots do not fit"
                f" {sequences} texts of {batch.lengths.sum()} tokens"
            )
        _check_range("a text's length", batch.lengths, 1, self.longest + 1)
        _check_range("slot", batch.slots, 0, self.slots)
        _check_range("token id", batch.ids, 0, self._encoder.vocabulary)


def _check_range(what: str, values: Ints, low: int, end: int) -> None:
    if len(values) and not (values.min() >= low and values.max() < end):
        wrong = values.min() if values.min() < low else values.max()
        raise ValueError(f"{what} {wrong} is not from {low} to {end - 1}")


class _Layout:
    """Where in the staging memory, counted in words of 32 bits, each input of a bucket lies."""

    def __init__(self, bucket: Bucket, numbers: int) -> None:
        stages = bucket.stages
        sizes = {
            "ids": bucket.tokens, "positions": bucket.tokens,
            "cu_seqlens": bucket.sequences + 1, "slots": bucket.sequences, "counts": 2,
            "numbers": stages * numbers, "stage_group": stages, "kind": stages,
            "task_slot": stages, "new_slot": stages,
        }  # fmt: skip
        self._places: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            self._places[name] = slice(start, start + size)
            start += -(-size // _ALIGNED_WORDS) * _ALIGNED_WORDS
        self.words = start

    def views(self, words: Tensor) -> dict[str, Tensor]:
        """Each input in `words`, int32."""
        return {name: words[place] for name, place in self._places.items()}

    def fill(self, words: Ints, batch: Batch) -> None:
        """Writes a batch that fits; what lies beyond it is not read."""
        tokens, sequences, stages = len(batch.ids), len(batch.lengths), len(batch.numbers)
        bounds = np.cumsum(batch.lengths, dtype=np.int32)
        starts = bounds - batch.lengths
        places = {name: words[place] for name, place in self._places.items()}
        places["ids"][:tokens] = batch.ids
        places["positions"][:tokens] = np.arange(tokens) - np.repeat(starts, batch.lengths)
        places["cu_seqlens"][0] = 0
        places["cu_seqlens"][1 : sequences + 1] = bounds
        places["cu_seqlens"][sequences + 1 :] = tokens  # empty ones up to the capacity
        places["slots"][:sequences] = batch.slots
        places["counts"][:] = (sequences, stages)
        places["numbers"].view(np.float32)[: batch.numbers.size] = batch.numbers.ravel()
        for name in ("stage_group", "kind", "task_slot", "new_slot"):
            places[name][:stages] = getattr(batch, name)


def _host(size: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """Host memory that the GPU copies to and from without the CPU's help."""
    return torch.empty(size, dtype=dtype, pin_memory=pinned)


def _smallest_batch(numbers: int) -> Batch:
    none = np.zeros(0, dtype=np.int32)
    one = np.zeros(1, dtype=np.int32)
    return Batch(
        none, none, none, np.zeros((1, numbers), dtype=np.float32), one, one, one - 1, one - 1
    )
