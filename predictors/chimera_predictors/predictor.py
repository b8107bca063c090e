"""A bundle at work: queries in, one forecast per model out. What the daemon and `chimera eval` use.

One encoder pass over the texts not seen before, one pass of the heads over the batch. Knows no
stages of the daemon, no threads and no deadlines.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from chimera_kernels import dispatch
from chimera_kernels import reference_heads as ops
from chimera_kernels.reference_heads import HeadOutputs
from chimera_predictors import calibrate
from chimera_predictors.bundle import Bundle, BundleError, read_bundle
from chimera_predictors.dataset import Described, describe, inputs_of, tensors_of
from chimera_predictors.encoder import EmbeddingCache, Encoder, EncoderError, load_encoder
from chimera_predictors.records import Forecast, StageQuery

if TYPE_CHECKING:
    from chimera_predictors.fused import FusedHeads

__all__ = ["BundleError", "BundlePredictor", "Table", "load"]

Array = NDArray[np.float64]
Heads = Callable[[Described], HeadOutputs]

_CACHED_TEXTS = 16_384  # vectors kept: 25 MB at D = 384


class Table:
    """Forecasts of B queries for all M models of the bundle, as arrays; NaN: nothing known."""

    def __init__(self, confidence: Array, stage: Array, remaining: Array, after: Array) -> None:
        self.confidence = confidence  # [B, M]
        self.stage = stage  # [B, M, Q] log(1 + tokens)
        self.remaining = remaining  # [B, M, Q] log(1 + tokens)
        self.after = after  # [B, M] stages


class BundlePredictor:
    """Predicts with a bundle and its encoder. Not for several threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        cache: EmbeddingCache,
        fused: "FusedHeads | None" = None,
        runs_on: str = "",
    ) -> None:
        """`fused` predicts in place of `cache` and plain torch; `runs_on` tells people where."""
        self.bundle = bundle
        self.cache = cache
        self.runs_on = runs_on
        self._fused = fused
        self._heads: Heads = fused or self._torch_heads
        self.models = frozenset(bundle.info.models)
        self.levels = bundle.info.levels
        self.digest = bundle.info.heads_sha256
        gates = bundle.info.gates
        self._trusted = np.array([[g.confidence, g.lengths] for g in gates])
        self._known = np.array([[g.known_confidence, g.known_lengths] for g in gates])

    @property
    def counters(self) -> dict[str, int]:
        """Of texts seen before and encoded, and of passes where the fused kernels run."""
        if self._fused is not None:
            return self._fused.counters
        return {"texts_known": self.cache.hits, "texts_encoded": self.cache.misses}

    def predict(self, queries: Sequence[StageQuery]) -> list[dict[str, Forecast]]:
        """One dictionary per query: model -> forecast. Fields without any label are NaN."""
        if not queries:
            return []
        table = self.table(queries)
        group = np.array([min(max(q.stage, 0), self.bundle.info.stages - 1) for q in queries])
        means = [
            calibrate.mean_tokens(part) * factor[group][:, None]
            for part, factor in zip(
                (table.stage, table.remaining), self.bundle.mean_factor, strict=True
            )
        ]
        means[1] = np.maximum(means[0], means[1])
        stage, remaining = np.expm1(table.stage).tolist(), np.expm1(table.remaining).tolist()
        columns = zip(
            table.confidence.tolist(), means[0].tolist(), stage, means[1].tolist(), remaining,
            table.after.tolist(), strict=True,
        )  # fmt: skip
        names = self.bundle.info.models
        return [
            {
                name: Forecast(c, mean, tuple(quantiles), rest, tuple(rests), later)
                for name, c, mean, quantiles, rest, rests, later in zip(names, *row, strict=True)
            }
            for row in columns
        ]

    def table(self, queries: Sequence[StageQuery]) -> Table:
        """All forecasts as arrays; the prior's where the gate does not trust the heads."""
        stages = self.describe(queries)
        found = Table(*(part.double().numpy() for part in self._heads(stages)))
        if self._trusted.all() and self._known.all():
            return found
        return self._gated(found, self.prior_table(stages))

    @torch.inference_mode()
    def _torch_heads(self, stages: Described) -> HeadOutputs:
        inputs = inputs_of(stages, self.cache.encode_cached)
        return ops.heads(tensors_of(inputs), self.bundle.weights)

    def prior_table(self, stages: Described) -> Table:
        """What the bundle's stored prior says, without any text."""
        weights, spread = self.bundle.weights, self.bundle.prior_spread.astype(np.float64)
        base = weights.base.double().numpy()[stages.stage_group]  # [B, K, M, 4]
        declared = np.eye(base.shape[1])[np.maximum(stages.kind, 0)]
        kinds = np.where((stages.kind >= 0)[:, None], declared, 1.0 / base.shape[1])
        base = np.einsum("bk,bkmv->bmv", kinds, base)
        stage = np.maximum(base[:, :, 1, None] + spread[0], 0.0)
        remaining = np.maximum(base[:, :, 2, None] + spread[1], stage)
        return Table(np.clip(base[..., 0], 0.0, 1.0), stage, remaining, np.exp(base[..., 3]))

    def describe(self, queries: Sequence[StageQuery]) -> Described:
        """Features of the queries, the same in training (`train_cli`) and serving."""
        return describe(queries, self.bundle.info.kinds)

    def _gated(self, heads: Table, prior: Table) -> Table:
        by_confidence, by_length = self._trusted.T
        without_confidence, without_length = ~self._known.T
        merged = Table(
            np.where(by_confidence, heads.confidence, prior.confidence),
            np.where(by_length[:, None], heads.stage, prior.stage),
            np.where(by_length[:, None], heads.remaining, prior.remaining),
            np.where(by_length, heads.after, prior.after),
        )
        merged.confidence[:, without_confidence] = np.nan
        for part in (merged.stage, merged.remaining, merged.after):
            part[:, without_length] = np.nan
        return merged


def load(path: str | Path, *, device: str = "auto", threads: int | None = None) -> BundlePredictor:
    """Read a bundle and its encoder; slow (a second or two, on a GPU more). Raises BundleError.

    ``device``: auto, cpu or cuda. ``threads``: of torch, for the whole process; None leaves them.
    """
    bundle = read_bundle(path)
    if threads is not None:
        torch.set_num_threads(threads)
    info = bundle.info.encoder
    device = _device(device)
    try:
        encoder = load_encoder(bundle.encoder_source, max_tokens=info.max_tokens, device=device)
    except EncoderError as error:
        raise BundleError(f"the encoder of {path}: {error}") from error
    if encoder.dim != info.dim or encoder.digest != info.digest:
        raise BundleError(
            f"{path} was trained on other weights of {info.name} than those found here; "
            "train it again with `chimera train`"
        )
    fused, why = _fused(bundle, encoder, device)
    kind = "plain torch" if fused is None else "fused kernels"
    cache = EmbeddingCache(encoder, _CACHED_TEXTS)
    return BundlePredictor(bundle, cache, fused, f"{device}, {kind}: {why}")


def _fused(bundle: Bundle, encoder: Encoder, device: str) -> "tuple[FusedHeads | None, str]":
    """The fused pass where there are kernels for it, and why it is there or not."""
    spec = encoder.checkpoint.spec
    choice = dispatch.choose(device, encoder.weights, spec, bundle.weights)
    if not choice.fused:
        return None, choice.reason
    from chimera_predictors.fused import FusedHeads  # Triton comes with torch for GPUs only

    try:
        fused = FusedHeads(encoder, bundle.weights, slots=_CACHED_TEXTS, device=device)
    except torch.OutOfMemoryError as error:
        raise BundleError(
            f"the GPU has no room for the predictor ({error}); leave it some memory "
            '(engines take what `gpu_memory_utilization` says), or use `device = "cpu"`'
        ) from error
    except Exception as error:  # of a compiler or a driver; plain torch needs neither
        return None, f"the kernels cannot be used here ({type(error).__name__}: {error})"
    return fused, choice.reason


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BundleError("device is `cuda`, but torch finds no GPU; use `auto` or `cpu`")
    return name
