"""How long something takes, counted in buckets that grow by a fifth: quantiles from little memory.

Counting is a logarithm and an addition, so that it may be done for every stage. Knows no clock.
"""

from collections.abc import Sequence
from math import log2
from typing import Any

_PER_OCTAVE = 4
_SHORTEST_S = 1e-6
_BUCKETS = 26 * _PER_OCTAVE  # up to a minute, nearly; what is longer counts as that
_PER_S = 1.0 / _SHORTEST_S


class Durations:
    """Seconds seen so far."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_s = 0.0
        self._buckets = [0] * _BUCKETS

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count += 1
        self.sum_s += seconds
        ticks = seconds * _PER_S
        index = int(_PER_OCTAVE * log2(ticks)) + 1 if ticks > 1.0 else 0
        self._buckets[index if index < _BUCKETS else _BUCKETS - 1] += 1

    def snapshot(self) -> dict[str, Any]:
        """For `chimera status` and metrics."""
        return {
            "count": self.count,
            "sum_s": self.sum_s,
            "p50_s": quantile(self._buckets, 0.5),
            "p99_s": quantile(self._buckets, 0.99),
            "buckets": self._buckets.copy(),
        }


def quantile(buckets: Sequence[int], level: float) -> float:
    """In seconds, at most a fifth too high; 0 if nothing was seen."""
    wanted, seen = level * sum(buckets), 0
    for index, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            return _bound_s(index)
    return 0.0


def octaves(buckets: Sequence[int]) -> list[tuple[float, int]]:
    """(bound in seconds, how many were no longer), for bounds that double."""
    seen, told = 0, list[tuple[float, int]]()
    for index, count in enumerate(buckets):
        seen += count
        if index % _PER_OCTAVE == 0:
            told.append((_bound_s(index), seen))
    return told


def _bound_s(index: int) -> float:
    return _SHORTEST_S * 2.0 ** (index / _PER_OCTAVE)
