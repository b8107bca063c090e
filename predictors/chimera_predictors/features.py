"""Numbers that the heads see beside the text vectors, in training and serving alike.

A number that is not known is 0 and has a flag beside it; all are finite for any query. Knows
nothing of text vectors or of what is predicted.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chimera_predictors.records import PastStage, StageQuery

STAGES = 6  # stages of their own; the last one stands for all later ones
# Traces keep so much of a text: sizes beyond it would look different in training and serving.
_SEEN_CHARACTERS = 2000
_MAX_TOKENS = 1e7

# Bytes that say what a text is made of. Deleting a set with `bytes.translate` counts it quickly.
_DIGITS = b"0123456789"
_CAPITALS = bytes(range(ord("A"), ord("Z") + 1))
_MARKS = bytes(c for c in range(33, 127) if not chr(c).isalnum())
_SYMBOLS = b"\\$^=_{}+<>*/"
_MADE_OF = (
    "digits",
    "digit_share",
    "capital_share",
    "marks",
    "symbols",
    "words",
    "lines",
    "commas",
)

NAMES = (
    "prompt_tokens",
    "past_output_tokens",
    "last_output_tokens",
    "prompt_growth",
    "mean_output_tokens",
    "task_characters",
    "new_characters",
    "stage",
    *(f"stage_{number}" for number in range(STAGES)),
    *(f"task_{name}" for name in _MADE_OF),
    *(f"new_{name}" for name in _MADE_OF),
    "past_known",
    "verdict_known",
    "verdict_last",
    "verdicts_bad",
    "logprob_known",
    "logprob_last",
    "logprob_mean",
)


def stage_group(query: StageQuery) -> int:
    """Which of the STAGES groups the stage belongs to."""
    return min(max(query.stage, 0), STAGES - 1)


def numbers(queries: Sequence[StageQuery]) -> NDArray[np.float32]:
    """The numeric features [B, len(NAMES)] of B queries; token counts and sizes as log(1 + x)."""
    table = np.zeros((len(queries), len(NAMES)), dtype=np.float32)
    for row, query in zip(table, queries, strict=True):
        row[:] = _numbers(query)
    return table


def _numbers(query: StageQuery) -> list[float]:
    past = query.past
    written = [stage.output_tokens for stage in past if stage.output_tokens is not None]
    total = sum(written)
    last = past[-1] if past else None
    growth = 0
    if last is not None:
        growth = query.prompt_tokens - last.prompt_tokens - (last.output_tokens or 0)
    group = stage_group(query)
    return [
        _log(query.prompt_tokens),
        _log(total),
        _log(last.output_tokens or 0) if last is not None else 0.0,
        _log(growth),
        _log(total / len(written)) if written else 0.0,
        _log(min(len(query.task_text), _SEEN_CHARACTERS)),
        _log(min(len(query.new_text), _SEEN_CHARACTERS)) if query.stage > 0 else 0.0,
        min(query.stage, 8) / 4.0,
        *(1.0 if group == number else 0.0 for number in range(STAGES)),
        *_made_of(query.task_text),
        *(_made_of(query.new_text) if query.stage > 0 else _NOTHING),
        1.0 if past else 0.0,
        *_verdicts(past),
        *_logprobs(past),
    ]


_NOTHING = (0.0,) * len(_MADE_OF)


def _made_of(text: str) -> tuple[float, ...]:
    """What `_MADE_OF` names, of as much of a text as traces keep."""
    if not text:
        return _NOTHING
    data = text[:_SEEN_CHARACTERS].encode(errors="replace")
    size = len(data)
    digits, capitals, marks, symbols = (
        size - len(data.translate(None, some)) for some in (_DIGITS, _CAPITALS, _MARKS, _SYMBOLS)
    )
    return (
        math.log1p(digits),
        digits / size,
        capitals / size,
        math.log1p(marks),
        math.log1p(symbols),
        math.log1p(len(data.split())),
        math.log1p(data.count(b"\n")),
        math.log1p(data.count(b",")),
    )


def _verdicts(past: Sequence[PastStage]) -> tuple[float, float, float]:
    known = [stage.verdict for stage in past if stage.verdict is not None]
    if not known:
        return 0.0, 0.0, 0.0
    bad = sum(verdict < 0.5 for verdict in known)
    return 1.0, _within(known[-1], 0.0, 1.0) - 0.5, math.log1p(bad)


def _logprobs(past: Sequence[PastStage]) -> tuple[float, float, float]:
    known = [_within(s.logprob, -10.0, 0.0) for s in past if s.logprob is not None]
    if not known:
        return 0.0, 0.0, 0.0
    # The square root spreads confident answers, which lie close to 0, apart.
    roots = [math.sqrt(-logprob) for logprob in known]
    return 1.0, roots[-1], sum(roots) / len(roots)


def _log(count: float) -> float:
    return math.log1p(_within(count, 0.0, _MAX_TOKENS))


def _within(value: float, low: float, high: float) -> float:
    """The value cut to a range; what is not a number becomes the lower end."""
    return min(max(value, low), high) if value == value else low
