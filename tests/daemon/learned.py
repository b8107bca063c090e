"""A daemon that asks a model which tests hold in their hand. No torch, no bundle."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from chimera_daemon.config import Config, PredictorConfig
from chimera_daemon.predict import LearnedPredictor
from chimera_daemon.prior import PriorPredictor
from chimera_daemon.reading import Model
from chimera_daemon.recorder import Recorder
from chimera_predictors.records import Forecast, StageQuery
from tests.daemon.harness import World, until

TOKENS = 40.0


def forecast(confidence: float = 0.75, tokens: float = TOKENS) -> Forecast:
    # A bundle may have more levels than messages carry.
    quantiles = (tokens / 4, tokens / 2, tokens, 2 * tokens)
    return Forecast(confidence, tokens, quantiles, 2 * tokens, quantiles, 1.0)


class FakeModel:
    """Knows some models; waits at `gate`; fails with `error`; remembers what it was asked."""

    levels: tuple[float, ...] = (0.1, 0.25, 0.5, 0.9)

    def __init__(self, *models: str, digest: str = "fake") -> None:
        self.models = frozenset(models or ("m",))
        self.digest = digest
        self.runs_on = "fake"
        self.counters: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.answers: Sequence[dict[str, Forecast]] | None = None
        self.batches: list[list[StageQuery]] = []

    @property
    def queries(self) -> list[StageQuery]:
        return [query for batch in self.batches for query in batch]

    def predict(self, queries: Sequence[StageQuery]) -> Sequence[dict[str, Forecast]]:
        self.batches.append(list(queries))
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        if self.answers is not None:
            return self.answers
        return [{name: forecast() for name in self.models} for _ in queries]


class Learned(World):
    """A `World` with such a model (or none), whose deadline is never met unless it is asked for."""

    predictor: LearnedPredictor

    def __init__(
        self,
        folder: Path,
        model: Model | None = None,
        *,
        record: Path | None = None,
        settings: dict[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        def make(config: Config, prior: PriorPredictor) -> LearnedPredictor:
            recorder = None if record is None else Recorder(record)
            self.predictor = LearnedPredictor(config, prior, recorder=recorder)
            if model is not None:
                self.predictor.use(model)
            return self.predictor

        chosen = msgspec.convert({"deadline_s": 1000.0} | limits, PredictorConfig)
        super().__init__(folder, make_predictor=make, limits=chosen, **settings or {})

    async def __aenter__(self) -> Self:
        self.predictor.start()
        return await super().__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            await self.idle()
            assert self.predictor._queued_bytes == 0
            assert not self.predictor._waiting
        await super().__aexit__(exc_type, exc, traceback)
        self.predictor.close()

    async def idle(self) -> None:
        """Wait until the reader has handed everything back."""
        await until(lambda: not self.predictor._queued, "an idle reader")

    @property
    def status_of_predictor(self) -> dict[str, Any]:
        return self.daemon.status()["predictor"]

    @property
    def as_bundle(self) -> dict[str, Any]:
        """The same with a path, as it is when a bundle was configured."""
        return self.status_of_predictor | {"bundle": "/a/bundle"}

    def counter(self, name: str) -> int:
        return super().counter(name) + self.predictor.counters[name]
