"""The straight line through the batches seen."""

import pytest

from chimera_daemon.pace import Pace


def test_nothing_is_known_at_first() -> None:
    assert Pace().wait_s(1000) == 0.0


def test_one_size_says_nothing_of_others() -> None:
    pace = Pace()
    for _ in range(1000):
        pace.observe(1, 0.005)
    assert pace.wait_s(1) == pace.wait_s(500) == pytest.approx(2 * 0.005)


def test_a_line_is_found_and_followed() -> None:
    pace = Pace()
    for number in range(200):
        size = 1 + number % 30
        pace.observe(size, 0.004 + 0.001 * size)
    assert pace.wait_s(40) == pytest.approx(2 * 0.004 + 40 * 0.001, rel=0.01)
    for number in range(400):  # the machine has become busy
        size = 1 + number % 30
        pace.observe(size, 0.010 + 0.002 * size)
    assert pace.wait_s(40) == pytest.approx(2 * 0.010 + 40 * 0.002, rel=0.01)


def test_larger_batches_that_were_faster_by_chance() -> None:
    pace = Pace()
    for _ in range(50):
        pace.observe(1, 0.010)
        pace.observe(2, 0.001)
    assert 0.0 < pace.wait_s(1) <= pace.wait_s(10_000) < 0.05
