"""Predictors as the daemon has them, for `chimera bench kernels`: text in, scores out.

Each comes with one that computes the same in fp32 by the references. Owns the prompts; knows no
clock and no table.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from chimera_bench.kernel_cases import (
    MINT,
    TEXT_TOKENS,
    config_of,
    random_heads,
    random_weights,
    spec_of,
)
from chimera_bench.roofline import MODELS
from chimera_kernels.graph import Batch, FusedPass
from chimera_kernels.reference_heads import HeadWeights
from chimera_predictors import predictor
from chimera_predictors.bundle import Bundle, read_bundle
from chimera_predictors.calibrate import Gate
from chimera_predictors.checkpoint import Checkpoint
from chimera_predictors.encoder import EmbeddingCache, Encoder, EncoderError, load_encoder
from chimera_predictors.fused import FusedHeads
from chimera_predictors.predictor import BundlePredictor, Table
from chimera_predictors.records import StageQuery
from chimera_predictors.tokenizer import Tokenizer

# Confidences nearer to each other than this may change places: bf16 cannot tell them apart.
_RANKING_GAP = 0.01
_SLOTS = 16_384
_FREQUENT_WORDS = 2000


class Served(NamedTuple):
    """One predictor, by the fused kernels and by plain torch in fp32."""

    name: str
    fused: BundlePredictor
    plain: BundlePredictor
    encoder: Encoder
    whole_pass: FusedPass

    @property
    def is_minilm(self) -> bool:
        """Whether the goals of text in to scores out are meant for it."""
        return (self.encoder.dim, len(self.encoder.weights.layers)) == (384, 6)


def served(folder: Path, device: str) -> Served:
    """A bundle on disk, with its own encoder. Raises BundleError."""
    loaded = predictor.load(folder, device="cpu")
    return _served(folder.name, loaded.bundle, loaded.cache.encoder, device)


def shaped(encoder: str, testbed: Path, device: str) -> Served:
    """MiniLM with random heads of MINT's sizes; where it cannot be had, its shape at random.

    The tokenizer is then the testbed's; to both, frequent words are one token each.
    """
    bundle = read_bundle(testbed)
    name = "MiniLM, random heads"
    try:
        loaded = load_encoder(encoder, max_tokens=TEXT_TOKENS)
    except EncoderError:
        name = "random MiniLM, random heads"
        known = load_encoder(bundle.encoder_source, max_tokens=TEXT_TOKENS)
        model = MODELS["minilm"]
        made = Checkpoint(name, config_of(model), spec_of(model), "mean", known.tokenizer)
        loaded = Encoder(made, random_weights(model, "cpu"), "cpu", torch.float32)
    info = msgspec.structs.replace(
        bundle.info,
        models=tuple(f"model {number}" for number in range(MINT.M)),
        kinds=tuple(f"kind {number}" for number in range(MINT.K)),
        gates=(Gate(True, True, True, True),) * MINT.M,
    )
    spread = np.zeros((2, MINT.M, MINT.Q), dtype=np.float32)
    made = Bundle(info, random_heads(MINT), bundle.mean_factor, spread)
    return _served(name, made, loaded, device)


def _served(name: str, bundle: Bundle, encoder: Encoder, device: str) -> Served:
    exact = Encoder(encoder.checkpoint, encoder.weights, device, torch.float32)
    heads = FusedHeads(exact, bundle.weights, slots=_SLOTS, device=device)
    cache = EmbeddingCache(exact)
    return Served(
        name,
        BundlePredictor(bundle, cache, heads),
        BundlePredictor(bundle, cache),
        exact,
        heads._pass,
    )


def head_weights(folder: Path) -> HeadWeights:
    """Those of a bundle on disk. Raises BundleError."""
    return read_bundle(folder).weights


def prompts(tokenizer: Tokenizer, tokens: int, seed: int) -> Iterator[str]:
    """Random frequent words of the tokenizer, about so many tokens, without an end."""
    vocabulary = json.loads(tokenizer.definition)["model"]["vocab"]
    entries = vocabulary if isinstance(vocabulary, dict) else dict(vocabulary)
    words = [word for word in entries if word.isascii() and word.isalpha() and len(word) > 1]
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choices(words[:_FREQUENT_WORDS], k=tokens))


def queries(texts: Iterator[str], stages: int) -> list[StageQuery]:
    """First stages of as many workflows, each with the next text."""
    return [
        StageQuery(task_text=text, new_text=text, prompt_tokens=TEXT_TOKENS)
        for text in itertools.islice(texts, stages)
    ]


def batches(made: Served, stages: int, count: int, seed: int) -> Iterator[Batch]:
    """Inputs of the whole pass without texts: stages with one new text of random tokens each."""
    draw = np.random.default_rng(seed)
    length = min(TEXT_TOKENS, made.whole_pass.longest)
    vocabulary = len(made.encoder.weights.tokens)
    bundle = made.fused.bundle
    slots = np.arange(stages, dtype=np.int32)
    for _ in range(count):
        yield Batch(
            ids=draw.integers(vocabulary, size=stages * length, dtype=np.int32),
            lengths=np.full(stages, length, dtype=np.int32),
            slots=slots,
            numbers=draw.uniform(0, 8, (stages, made.whole_pass.numbers)).astype(np.float32),
            stage_group=draw.integers(bundle.info.stages, size=stages, dtype=np.int32),
            kind=draw.integers(-1, len(bundle.info.kinds), size=stages, dtype=np.int32),
            task_slot=slots,
            new_slot=slots[::-1].copy(),
        )


class Agreement(NamedTuple):
    """How far a fused predictor and its fp32 reference agree."""

    error: float  # ‖out - reference‖ / ‖reference‖ over all forecasts
    ranked: float  # share of stages on which no two models clearly apart change places
    identical: float  # share of stages with the very same ranking


def agreement(made: Served, asked: Sequence[StageQuery]) -> Agreement:
    """On these stages."""
    found, wanted = made.fused.table(asked), made.plain.table(asked)
    truth = _flat(wanted)
    labelled = ~np.isnan(truth)
    difference = (_flat(found) - truth)[labelled]
    error = float(np.linalg.norm(difference) / np.linalg.norm(truth[labelled]))
    known = ~np.isnan(wanted.confidence[0])  # models without labels are NaN in every row
    ranked, identical = same_ranking(found.confidence[:, known], wanted.confidence[:, known])
    return Agreement(error, ranked, identical)


def _flat(table: Table) -> NDArray[np.float64]:
    return np.concatenate([part.ravel() for part in vars(table).values()])


def same_ranking(found: NDArray[Any], wanted: NDArray[Any]) -> tuple[float, float]:
    """Shares of rows [B, M] that rank alike: but for values as good as equal, and exactly."""
    apart = wanted[:, :, None] - wanted[:, None, :]
    order = found[:, :, None] - found[:, None, :]
    swapped = ((apart > _RANKING_GAP) & ~(order > 0)).any((1, 2))
    other = (np.argsort(found, 1, "stable") != np.argsort(wanted, 1, "stable")).any(1)
    return float(1.0 - swapped.mean()), float(1.0 - other.mean())
