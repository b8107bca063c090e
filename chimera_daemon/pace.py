"""How long a model takes for a batch, learned while it serves: so much at once, so much per stage.

A straight line through the batches seen, the newest counting most. Tells beforehand whether a stage
that comes now would be predicted in time. Knows neither clocks nor threads.
"""

_KEPT = 0.98  # what a batch counts after the next one
# As long as all batches have had the same size there is no slope to see: it is taken for zero.
_BATCHES_TO_BELIEVE = 0.5


class Pace:
    """Nothing is known at first: any wait is taken for short."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._stages = 0.0  # means
        self._seconds = 0.0
        self._spread = 0.0  # sums over batches, of squares and products about the means
        self._joint = 0.0

    def observe(self, stages: int, seconds: float) -> None:
        """A batch of so many stages took so long."""
        self._weight = _KEPT * self._weight + 1.0
        off_stages, off_seconds = stages - self._stages, seconds - self._seconds
        self._stages += off_stages / self._weight
        self._seconds += off_seconds / self._weight
        self._spread = _KEPT * self._spread + off_stages * (stages - self._stages)
        self._joint = _KEPT * self._joint + off_stages * (seconds - self._seconds)

    def wait_s(self, waiting: int) -> float:
        """Seconds until the last of so many is predicted, the batch under way among them."""
        per_stage = max(0.0, self._joint / (self._spread + _BATCHES_TO_BELIEVE))
        per_batch = max(0.0, self._seconds - per_stage * self._stages)
        return 2.0 * per_batch + per_stage * waiting
