"""Durations in buckets: quantiles within a fifth, and sums that fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_daemon.durations import Durations, octaves, quantile


def test_nothing_seen() -> None:
    durations = Durations()
    snapshot = durations.snapshot()
    assert (snapshot["count"], snapshot["p99_s"]) == (0, 0.0)


@given(st.lists(st.floats(1e-6, 30.0), min_size=1, max_size=200), st.sampled_from([0.1, 0.5, 0.99]))
def test_quantiles_are_at_most_a_fifth_too_high(seconds: list[float], level: float) -> None:
    durations = Durations()
    for value in seconds:
        durations.add(value)
    exact = sorted(seconds)[max(0, -int(-level * len(seconds) // 1) - 1)]
    assert exact * 0.999 <= quantile(durations.snapshot()["buckets"], level) <= exact * 1.2


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 1e9])
def test_what_fits_no_bucket_is_counted_at_the_ends(seconds: float) -> None:
    durations = Durations()
    durations.add(seconds)
    snapshot = durations.snapshot()
    assert snapshot["count"] == sum(snapshot["buckets"]) == 1
    assert snapshot["p50_s"] > 0.0


def test_octaves_are_cumulative() -> None:
    durations = Durations()
    for value in (1.5e-6, 3e-6, 1e-3):
        durations.add(value)
    counts = dict(octaves(durations.snapshot()["buckets"]))
    bounds = sorted(counts)
    assert all(counts[a] <= counts[b] for a, b in zip(bounds, bounds[1:], strict=False))
    assert counts[bounds[-1]] == 3
    assert sum(counts[b] for b in bounds if 2e-6 <= b < 2.1e-6) == 1
