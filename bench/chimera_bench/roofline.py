"""What a GPU must move and compute for an encoder, the time that takes at least, and a picture.

Formulas and plot of `chimera bench kernels`; needs neither torch nor a GPU.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_OPERAND_BYTES = 2  # bf16
_INDEX_BYTES = 4  # a token's id, its position, a boundary of sequences
_MARKERS = "os^DvPX*<>"
_COLOURS = ("#c0392b", "#e59866", "#2471a3", "#1e8449", "#7d3c98", "#7f8c8d", "#b7950b", "#117a65")


class Model(NamedTuple):
    """Sizes of an encoder, named as in `chimera_kernels.reference`."""

    family: str
    width: int
    inner: int
    heads: int
    layers: int
    vocabulary: int
    longest: int

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far a token sees to either side in each layer; None: everywhere."""
        if self.family == "bert":
            return (None,) * self.layers
        return tuple(64 if layer % 3 else None for layer in range(self.layers))


MODELS = {
    "minilm": Model("bert", 384, 1536, 12, 6, 30_522, 512),
    "bert-base": Model("bert", 768, 3072, 12, 12, 30_522, 512),
    "modernbert-large": Model("modernbert", 1024, 2624, 16, 28, 50_368, 8192),
    # For Triton's interpreter, which takes seconds for each layer of the others.
    "tiny": Model("bert", 48, 72, 3, 2, 97, 80),
    "tiny-modernbert": Model("modernbert", 64, 40, 2, 4, 97, 200),
}


class Shape(NamedTuple):
    """A batch for one model; written "minilm:32x128", and "minilm:32x16..128" for mixed lengths."""

    model: str
    sequences: int
    shortest: int
    longest: int

    def __str__(self) -> str:
        mixed = "" if self.shortest == self.longest else f"{self.shortest}.."
        return f"{self.model}:{self.sequences}x{mixed}{self.longest}"

    @property
    def sizes(self) -> Model:
        return MODELS[self.model]

    def lengths(self, seed: int) -> list[int]:
        """Tokens of each sequence, the same ones for the same seed."""
        draw = random.Random(f"{self}:{seed}")
        return [draw.randint(self.shortest, self.longest) for _ in range(self.sequences)]


def parse_shape(text: str) -> Shape:
    """The inverse of `str`; raises ValueError."""
    name, _, batch = text.partition(":")
    sequences, _, tokens = batch.partition("x")
    low, _, high = tokens.partition("..")
    try:
        shape = Shape(name, int(sequences), int(low), int(high or low))
    except ValueError:
        raise ValueError(f"{text!r}: write MODEL:SEQUENCESxTOKENS, such as minilm:32x128") from None
    if name not in MODELS:
        raise ValueError(f"{text!r}: no model {name!r}; there are {', '.join(MODELS)}")
    if shape.sequences < 1 or not 1 <= shape.shortest <= shape.longest <= shape.sizes.longest:
        raise ValueError(f"{text!r}: sequences of 1 to {shape.sizes.longest} tokens, 1 or more")
    return shape


class Cost(NamedTuple):
    """The fewest bytes of device memory to move, and the floating-point operations to do."""

    bytes: int
    flops: int


class Ceilings(NamedTuple):
    """Of one card, measured."""

    bytes_per_s: float  # read and written, of a large copy
    flops_per_s: float  # of a large bf16 matrix product


def encoder_cost(model: Model, lengths: Sequence[int]) -> Cost:
    """Of one pass over T tokens, with D wide, N inner, U = N or, gated, 2 N.

    FLOPs: 2 T (4 D² + U D + N D) per layer for the linears, and 4 D per pair of tokens that see
    each other for attention. Bytes: all matrices of the layers and each token's embedding (and, in
    BERT, the positions') once in bf16, ids and positions in int32, T D results in bf16. Left out
    are layer norms, biases and activations, less than a hundredth of either.
    """
    tokens, width, inner = sum(lengths), model.width, model.inner
    up = inner if model.family == "bert" else 2 * inner
    matrices = 4 * width**2 + up * width + inner * width
    pairs = sum(seen_pairs(n, window) for window in model.windows for n in lengths)
    flops = model.layers * 2 * tokens * matrices + 4 * width * pairs
    positions = max(lengths) if model.family == "bert" else 0
    elements = model.layers * matrices + (2 * tokens + positions) * width
    return Cost(_OPERAND_BYTES * elements + _INDEX_BYTES * (2 * tokens + len(lengths) + 1), flops)


def seen_pairs(tokens: int, window: int | None) -> int:
    """Pairs (i, j) of `tokens` with |i - j| <= window: n (2 w + 1) - w (w + 1), n² without one."""
    if window is None or window >= tokens:
        return tokens**2
    return tokens * (2 * window + 1) - window * (window + 1)


def floor_us(cost: Cost, ceilings: Ceilings) -> float:
    """The longer of moving the bytes and doing the operations, at the measured ceilings."""
    return 1e6 * max(cost.bytes / ceilings.bytes_per_s, cost.flops / ceilings.flops_per_s)


def draw(path: Path, rows: Sequence[Mapping[str, Any]], ceilings: Ceilings, title: str) -> None:
    """Write a PNG of rows that have "shape", "contestant", "bytes", "flops" and "p50_us"."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots()
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    marker = {shape: _MARKERS[n % len(_MARKERS)] for n, shape in enumerate(shapes)}
    colour = {name: _COLOURS[n % len(_COLOURS)] for n, name in enumerate(contestants)}
    for row in rows:
        at = row["flops"] / row["bytes"], 1e-6 * row["flops"] / row["p50_us"]
        axes.plot(*at, marker[row["shape"]], color=colour[row["contestant"]], markersize=7,
                  alpha=0.85)  # fmt: skip
    _ceilings(axes, [row["flops"] / row["bytes"] for row in rows], ceilings)
    axes.set_xlabel("operations per byte that has to be moved, FLOP/B (log)")
    axes.set_ylabel("rate reached, TFLOP/s (log; up is better)")
    axes.grid(alpha=0.3, which="both")
    names = [Line2D([], [], ls="", marker="o", color=colour[n], label=n) for n in contestants]
    marks = [Line2D([], [], ls="", marker=marker[s], color="#555555", label=s) for s in shapes]
    figure.legend(handles=[*names, *marks], loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _ceilings(axes: Any, intensities: Sequence[float], ceilings: Ceilings) -> None:
    """Both lines, over the marks and the place where they meet."""
    top, slope = 1e-12 * ceilings.flops_per_s, 1e-12 * ceilings.bytes_per_s
    knee = top / slope
    low, high = min([*intensities, knee]) / 4, max([*intensities, knee]) * 2
    axes.loglog([low, knee, high], [low * slope, top, top], color="#333333", linewidth=1.2)
    axes.annotate(f"{top:.0f} TFLOP/s, bf16 product", (knee, top), xytext=(4, 4),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.annotate(f"{slope:.2f} TB/s, copy", (low, low * slope), xytext=(10, -4),
                  textcoords="offset points", fontsize=8)  # fmt: skip
