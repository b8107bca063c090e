"""What the baselines read from traces: numbers, words, kinds, and rows by model.

Everything is known before the row's stage runs; nothing here looks at a label of the row itself.
"""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from chimera_predictors.evaluate import EvalError
from chimera_predictors.metrics import Array, Ints

if TYPE_CHECKING:
    from chimera_predictors.traces import Traces

Key = tuple[str | int, ...]

_MAX_WORDS = 50_000  # columns
_MAX_CHARACTERS = 20_000  # of a text: more costs time and says little to TF-IDF


def row_numbers(traces: "Traces") -> Array:
    """What is known in numbers before each stage runs [R, 9]; NaN where it is not.

    Stage, log prompt tokens, log growth of the prompt, log characters of the new and of the task's
    text, log tokens produced so far and by the last stage, last verdict, last log-probability.
    """
    rows = np.arange(len(traces.model))
    first = np.append(True, traces.workflow[1:] != traces.workflow[:-1])[: len(rows)]
    last = np.where(first, 0, rows - 1)
    start = np.maximum.accumulate(np.where(first, rows, 0))
    tokens = np.nan_to_num(traces.output_tokens)
    produced = np.append(0.0, np.cumsum(tokens))

    def before(values: Array) -> Array:
        return np.where(first, np.nan, values[last]) if len(rows) else values

    prompt = traces.prompt_tokens.astype(np.float64)
    sizes = np.array([len(text) for text in traces.task_text], dtype=np.float64)
    return np.column_stack(
        [
            traces.stage.astype(np.float64),
            np.log1p(prompt),
            np.log1p(np.maximum(prompt - before(prompt), 0.0)),
            np.log1p(np.array([len(text) for text in traces.new_text], dtype=np.float64)),
            np.log1p(sizes[traces.task]),
            np.log1p(produced[rows] - produced[start]),
            np.log1p(before(traces.output_tokens)),
            before(traces.verdict),
            before(traces.logprob),
        ]
    )


class _Words:
    """TF-IDF of words and word pairs, fitted on some texts; no column at all if these are empty."""

    def __init__(self, texts: Sequence[str]) -> None:
        text = library("sklearn.feature_extraction.text")
        enough = 2 if len(texts) >= 50 else 1
        self._vectorizer = text.TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, min_df=enough, max_features=_MAX_WORDS,
            token_pattern=r"(?u)\b\w+\b", dtype=np.float32,
        )  # fmt: skip
        try:
            self._vectorizer.fit(_cut(texts))
        except ValueError:  # "empty vocabulary": no words in any text
            self._vectorizer = None

    def __call__(self, texts: Sequence[str]) -> Any:
        """Sparse matrix [n, words]."""
        if self._vectorizer is None:
            return library("scipy.sparse").csr_matrix((len(texts), 0), dtype=np.float32)
        return self._vectorizer.transform(_cut(texts))


def _cut(texts: Sequence[str]) -> list[str]:
    return [text[:_MAX_CHARACTERS] for text in texts]


class TaskWords:
    """Sparse features of a row's task: TF-IDF of its text and one column per kind."""

    def __init__(self, train: "Traces") -> None:
        self._words = _Words(train.task_text)
        self._kinds = codes_of(train.kind.tolist())

    def __call__(self, traces: "Traces") -> Any:
        """Sparse matrix [R, words + kinds]."""
        sparse = library("scipy.sparse")
        words = self._words(traces.task_text)[traces.task]
        return sparse.hstack(
            [words, sparse.csr_matrix(one_hot(self._kinds, traces.kind.tolist()))]
        ).tocsr()


class StageFeatures:
    """Dense features of a stage: numbers, kind, and a truncated SVD of its text's TF-IDF."""

    def __init__(self, train: "Traces", components: int, seed: int) -> None:
        self._kinds = codes_of(train.kind.tolist())
        self._words = _Words(train.new_text)
        counted = self._words(train.new_text)
        width = min(components, counted.shape[1] - 1, counted.shape[0] - 1)
        self._reduce = None
        if width >= 1:
            decomposition = library("sklearn.decomposition")
            self._reduce = decomposition.TruncatedSVD(width, random_state=seed).fit(counted)

    def __call__(self, traces: "Traces") -> Array:
        """[R, F]."""
        numbers = np.nan_to_num(row_numbers(traces), nan=-1.0)
        parts = [numbers, one_hot(self._kinds, traces.kind.tolist())]
        if self._reduce is not None:
            parts.append(self._reduce.transform(self._words(traces.new_text)))
        return np.hstack(parts)


def library(name: str) -> Any:
    """Import an optional library; raises EvalError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EvalError(
            f"{error}; the baselines need: pip install 'chimera-daemon[baselines]'"
        ) from error


def model_names(traces: "Traces") -> list[str]:
    """Name of each row's model: codes differ between traces."""
    return [traces.models[code] for code in traces.model]


def cell_keys(traces: "Traces", depth: int) -> list[Key]:
    """(model, stage, kind) of each row, or its first parts."""
    columns = (model_names(traces), traces.stage.tolist(), traces.kind)
    return list(zip(*columns[:depth], strict=True))


def rows_by_model(traces: "Traces", rows: Ints) -> list[tuple[str, Ints]]:
    """Those of the given rows that belong to each model, for models that have any."""
    own = ((name, rows[traces.model[rows] == code]) for code, name in enumerate(traces.models))
    return [(name, members) for name, members in own if len(members)]


def codes_of(labels: Sequence[str]) -> dict[str, int]:
    """Number the distinct labels."""
    return {label: code for code, label in enumerate(sorted(set(labels)))}


def one_hot(codes: dict[str, int], labels: Sequence[str]) -> Array:
    """[n, codes]; a row of zeros for a label without a code."""
    table = np.zeros((len(labels), len(codes)), dtype=np.float32)
    known = [(row, codes[label]) for row, label in enumerate(labels) if label in codes]
    if known:
        table[tuple(np.array(known).T)] = 1.0
    return table
