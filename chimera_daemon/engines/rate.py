"""Tokens per second over the last few seconds, from a counter that only grows."""

from collections import deque

WINDOW_S = 5.0


class Rate:
    """Read at every heartbeat; compares with the oldest reading inside the window."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque(maxlen=4096)

    def read(self, now: float, total: int) -> float:
        """Note the counter's value and return its growth per second."""
        readings = self._readings
        readings.append((now, total))
        while readings[0][0] < now - WINDOW_S:
            readings.popleft()
        since, before = readings[0]
        return (total - before) / (now - since) if now > since else 0.0
