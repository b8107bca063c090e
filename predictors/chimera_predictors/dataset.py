"""Traces as the arrays that training works on: numbers, codes, labels, vectors of distinct texts.

Built from `StageQuery`s by the same code that serves. Knows no heads and no optimiser.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from chimera_kernels.reference_heads import HeadInputs
from chimera_predictors import features
from chimera_predictors.records import StageQuery
from chimera_predictors.traces import Traces

Floats = NDArray[np.float32]
Array = NDArray[np.float64]
Ints = NDArray[np.int64]

Encode = Callable[[Sequence[str]], Floats]


@dataclass(frozen=True)
class Described:
    """What is known of R stages just before they run, their U different texts as they are."""

    numbers: Floats  # [R, N]
    stage_group: Ints  # [R]
    kind: Ints  # [R] index into the kinds, -1 where not declared or not among them
    task: Ints  # [R] number of the text, -1 without one
    new: Ints  # [R] number of the text, -1 at stage 0 and without one
    texts: list[str]  # [U]


@dataclass(frozen=True)
class Inputs:
    """As `Described`, with vectors instead of texts."""

    numbers: Floats  # [R, N]
    stage_group: Ints  # [R]
    kind: Ints  # [R]
    task: Ints  # [R] row of `texts`, -1 without a text
    new: Ints  # [R] row of `texts`, -1 at stage 0 and without a text
    texts: Floats  # [U, D] unit vectors

    def vectors(self, which: Ints) -> Floats:
        """[R, D] of text numbers [R]; zeros for -1."""
        if not len(self.texts):
            return np.zeros((len(which), self.texts.shape[1]), dtype=np.float32)
        return np.where((which >= 0)[:, None], self.texts[which], np.float32(0.0))


@dataclass(frozen=True)
class Labels:
    """What happened then; NaN where it is not known."""

    model: Ints  # [R]
    success: Array  # [R] 0..1
    stage: Array  # [R] log(1 + output tokens of the stage)
    remaining: Array  # [R] the same of it and all later ones
    after: Array  # [R] stages after it

    def only(self, rows: NDArray[np.bool_]) -> "Labels":
        """The same with the labels of other rows taken away."""
        columns = (self.success, self.stage, self.remaining, self.after)
        return Labels(self.model, *(np.where(rows, column, np.nan) for column in columns))


def describe(queries: Sequence[StageQuery], kinds: Sequence[str]) -> Described:
    """Features of the queries, and which texts they have."""
    number_of: dict[str, int] = {}
    task = np.full(len(queries), -1, dtype=np.int64)
    new = np.full(len(queries), -1, dtype=np.int64)
    for row, query in enumerate(queries):
        if query.task_text:
            task[row] = number_of.setdefault(query.task_text, len(number_of))
        if query.new_text and query.stage > 0:
            new[row] = number_of.setdefault(query.new_text, len(number_of))
    code = {kind: number for number, kind in enumerate(kinds)}
    return Described(
        features.numbers(queries),
        np.array([features.stage_group(query) for query in queries], dtype=np.int64),
        np.array([code.get(query.kind, -1) for query in queries], dtype=np.int64),
        task,
        new,
        list(number_of),
    )


def inputs_of(stages: Described, encode: Encode) -> Inputs:
    """The same stages with vectors; each different text is encoded once."""
    return Inputs(
        stages.numbers, stages.stage_group, stages.kind, stages.task, stages.new,
        encode(stages.texts),
    )  # fmt: skip


def labels_of(traces: Traces) -> Labels:
    """Labels of the rows of these traces."""
    known = ~np.isnan(traces.remaining_tokens)
    return Labels(
        traces.model,
        traces.success,
        np.log1p(traces.output_tokens),
        np.log1p(traces.remaining_tokens),
        np.where(known | ~np.isnan(traces.success), traces.remaining_stages, np.nan),
    )


def tensors_of(inputs: Inputs) -> HeadInputs:
    """The same inputs as tensors, text vectors spread over the rows."""
    return HeadInputs(
        torch.from_numpy(inputs.numbers),
        torch.from_numpy(inputs.stage_group),
        torch.from_numpy(inputs.kind),
        torch.from_numpy(inputs.vectors(inputs.task)),
        torch.from_numpy(inputs.vectors(inputs.new)),
    )
