"""What is estimated in closed form before any network: priors, kind of a text, kernel regression.

Everything here is plain numpy on arrays of rows and masks missing labels (NaN). It knows no traces
and no files. Shapes: R rows, D text vector, K kinds, S stage groups, M models, C centres.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

_TRUST = 8.0  # a cell counts as much as the level above it once it has seen so many rows
_JITTER = 1e-4
_TEXT_LENGTH = 5.0


def kernel(x: Array, centres: Array, width: float) -> Array:
    """exp((x zᵀ - 1) / width) of unit vectors [R, D] and [C, D]: [R, C], 1 where they are equal."""
    return np.exp((x @ centres.T - 1.0) / width).astype(np.float64)


def choose_centres(x: Array, most: int, seed: int) -> Array:
    """At most so many of the texts [U, D], at random: [C, D]; one of zeros if there are none."""
    if not len(x):
        return np.zeros((1, x.shape[1]))
    chosen = np.random.default_rng(seed).permutation(len(x))[:most]
    return x[np.sort(chosen)]


def kernel_ridge(
    x: Array,
    centres: Array,
    group: Ints,
    model: Ints,
    residual: Array,
    models: int,
    width: float,
    shared_noise: float,
    own_noise: float,
) -> Array:
    """Regress `residual` [R] on texts, first what models share, then what each adds: [C, M].

    `x` [U, D] holds one vector per distinct text and `group` [R] says which text a row has. The
    prediction is ``kernel(text, centres, width) @ result``. The mean residual of a text is worth at
    most `1 / shared_noise` rows, because its models fail together. Both noises are relative to the
    variance of what is looked for.
    """
    known = ~np.isnan(residual)
    group, model, residual = group[known], model[known], residual[known]
    if not len(group):
        return np.zeros((len(centres), models))
    used, place = np.unique(group, return_inverse=True)
    # Nyström: in this basis the kernel's prior is the identity.
    gram = kernel(centres, centres, width) + _JITTER * np.eye(len(centres))
    basis = np.linalg.inv(np.linalg.cholesky(gram)).T
    near = kernel(x[used], centres, width) @ basis
    count = np.bincount(place, minlength=len(used)).astype(np.float64)
    mean = np.bincount(place, residual, minlength=len(used)) / count
    shared = _solve(near, mean, count / (1.0 + shared_noise * count), 1.0)
    rest = residual - (near @ shared)[place]
    weights = np.repeat(shared[:, None], models, axis=1)
    for number in range(models):
        mine = model == number
        if mine.any():
            at, index = np.unique(place[mine], return_inverse=True)
            times = np.bincount(index).astype(np.float64)
            value = np.bincount(index, rest[mine]) / times
            weights[:, number] += _solve(near[at], value, times, own_noise)
    return basis @ weights


def _solve(features: Array, target: Array, weight: Array, noise: float) -> Array:
    """Weighted ridge regression's coefficients [C]."""
    weighted = features * weight[:, None]
    normal = weighted.T @ features + noise * np.eye(features.shape[1])
    return np.linalg.solve(normal, weighted.T @ target).astype(np.float64)


def projection(x: Array, width: int) -> tuple[Array, Array]:
    """Mean [D] and the leading principal directions [D, P] of texts [U, D], P <= width.

    Scaled so that a projected text has length √P, at most 5, in the mean: the directions keep their
    relative sizes, which is what tells signal from noise, and many do not drown the numbers.
    """
    mean = x.mean(axis=0)
    width = min(width, len(x) - 1, x.shape[1])
    if width < 1:
        return mean, np.zeros((x.shape[1], 1))
    values, vectors = np.linalg.eigh(np.cov(x - mean, rowvar=False))
    directions = vectors[:, ::-1][:, :width]
    length = np.sqrt(max(values[::-1][:width].sum(), 1e-12))
    return mean, directions * (min(np.sqrt(width), _TEXT_LENGTH) / length)


def kind_classifier(x: Array, kind: Ints, kinds: int, noise: float = 0.02) -> tuple[Array, Array]:
    """Weights [D, K] and biases [K] of a softmax classifier of texts [U, D] with labels [U].

    Ridge regression on the labels, then one temperature that minimises the log loss under
    leave-one-out: closed form, the same at every run. Labels of -1 (not declared) are left out.
    """
    known = kind >= 0
    if not known.any() or kinds < 2:
        return np.zeros((x.shape[1], kinds)), np.zeros(kinds)
    x, kind = x[known], kind[known]
    mean = x.mean(axis=0)
    centred = x - mean
    normal = centred.T @ centred + noise * len(x) / kinds * np.eye(x.shape[1])
    inverse = np.linalg.inv(normal)
    target = np.eye(kinds)[kind] - 1.0 / kinds
    offset = target.mean(axis=0)
    weights = inverse @ centred.T @ (target - offset)
    leverage = np.einsum("ud,de,ue->u", centred, inverse, centred)[:, None].clip(0.0, 0.99)
    fitted = centred @ weights
    left_out = (fitted - leverage * (target - offset)) / (1.0 - leverage) + offset
    scale = min(2.0 ** np.arange(0.0, 6.1, 0.5), key=lambda s: _log_loss(s * left_out, kind))
    return scale * weights, scale * (offset - mean @ weights)


def _log_loss(logits: Array, label: Ints) -> float:
    top = logits.max(axis=1, keepdims=True)
    normal = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((normal - logits[np.arange(len(label)), label]).mean())


def refine(values: Array, cells: Ints, parent: Array) -> Array:
    """Means of `values` [R] per cell, drawn towards `parent` [cells]; NaN rows count nowhere."""
    known = ~np.isnan(values)
    count = np.bincount(cells[known], minlength=len(parent))
    total = np.bincount(cells[known], values[known], minlength=len(parent))
    return (total + _TRUST * parent) / (count + _TRUST)
