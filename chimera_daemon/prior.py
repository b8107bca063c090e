"""The prior: predictions from running averages per model and kind, learned while serving.

Also defines what any predictor looks like to the daemon. Knows no sockets and no tensors. Estimates
back off from (model, kind, stage) over (model, kind) to the model and at last to the configuration;
each level is drawn towards the next as long as it has seen little.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from chimera_daemon.config import Config
from chimera_daemon.messages import (
    LEVELS,
    Hints,
    ModelPrediction,
    Prediction,
    Stage,
    Usage,
    WorkflowEnded,
)

Deliver = Callable[[Stage, Prediction], None]

_WINDOW = 1024  # averages forget what is older than about so many values
_RING = 128  # values kept for quantiles
_STALE = 64  # values after which a prediction is made anew at the latest
_TRUST = 8.0  # a level counts as much as its parent once it has seen so many values
_MAX_STAGE = 15  # later stages are taken together
_MAX_KINDS = 64  # further kinds are taken together, so that labels cannot fill the memory
_OTHER_KINDS = "other"
_MAX_MODELS = 1024  # further models get what the configuration says
# Before anything is seen: a workflow has this many stages after the current one, and lengths
# spread about their mean like this (10 %, 50 %, 90 %).
_STAGES_AFTER = 1.0
_SPREAD = (0.3, 0.8, 1.9)


class Predictor(Protocol):
    """What the daemon asks: before a stage enters the core, and after things have happened."""

    wants_logprobs: bool  # engines are asked for them only then: they cost speed

    def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
        """Call ``deliver(stage, prediction)`` once, now or later, on the daemon's loop."""
        ...

    def cancel(self, stage: Stage) -> None:
        """The prediction of this stage is not wanted any more; delivering it does no harm."""
        ...

    def add_model(self, model: str) -> None:
        """An engine of this model joined."""
        ...

    def observe_stage(self, stage: Stage, model: str, usage: Usage, logprob: float | None) -> None:
        """A stage was answered; ``logprob`` per token, None where the engine does not say."""
        ...

    def observe_feedback(self, workflow_id: str, stage: int, verdict: float) -> None:
        """A client said whether a stage's answer was right (0 to 1); any stage, known or not."""
        ...

    def observe_workflow(self, ended: WorkflowEnded) -> None:
        """A workflow has ended; ``success`` is None where the client did not say."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """What `chimera status` shows of it, as plain values; empty: nothing."""
        ...


class _Mean:
    """Average of about the last `_WINDOW` values."""

    __slots__ = ("mean", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self.mean = 0.0

    def add(self, value: float) -> None:
        seen = self.seen
        if seen < _WINDOW:
            self.seen = seen = seen + 1
        self.mean += (value - self.mean) / seen

    def towards(self, parent: float) -> float:
        return (self.mean * self.seen + parent * _TRUST) / (self.seen + _TRUST)


class _Lengths(_Mean):
    """Mean and quantiles of token counts."""

    __slots__ = ("_fresh", "_ordered", "_ring")

    def __init__(self) -> None:
        super().__init__()
        self._ring: deque[float] = deque(maxlen=_RING)
        self._ordered: list[float] = []  # the same values, if ``_fresh``
        self._fresh = True

    def add(self, value: float) -> None:
        seen = self.seen  # as above: a call of it would cost more than it
        if seen < _WINDOW:
            self.seen = seen = seen + 1
        self.mean += (value - self.mean) / seen
        self._ring.append(value)
        self._fresh = False

    def quantiles(self, parent: tuple[float, float, float]) -> tuple[float, float, float]:
        if not self.seen:
            return parent
        if not self._fresh:
            self._fresh = True
            self._ordered = sorted(self._ring)
        ordered = self._ordered
        weight = self.seen / (self.seen + _TRUST)
        rest, last = 1.0 - weight, len(ordered) - 1
        low, middle, high = LEVELS
        return (
            weight * ordered[round(low * last)] + rest * parent[0],
            weight * ordered[round(middle * last)] + rest * parent[1],
            weight * ordered[round(high * last)] + rest * parent[2],
        )


class _Cell:
    """All averages of one (model), (model, kind) or (model, kind, stage)."""

    __slots__ = ("after", "remaining", "stage", "success")

    def __init__(self) -> None:
        self.success = _Mean()
        self.stage = _Lengths()  # output tokens of a stage
        self.remaining = _Lengths()  # of it and all later ones
        self.after = _Mean()  # stages after it

    def refine(self, parent: ModelPrediction) -> ModelPrediction:
        return ModelPrediction(
            self.success.towards(parent.confidence),
            self.stage.towards(parent.stage_tokens_mean),
            self.stage.quantiles(parent.stage_tokens),
            self.remaining.towards(parent.remaining_tokens_mean),
            self.remaining.quantiles(parent.remaining_tokens),
            self.after.towards(parent.remaining_stages),
        )


_Key = tuple[str, str, int]  # kind "" and stage -1 stand for all


def _keys(model: str, kind: str, stage: int) -> tuple[_Key, ...]:
    """From the coarsest level to the finest. Stages without a kind have no level of their own."""
    finest = (model, kind, min(stage, _MAX_STAGE))
    if not kind:
        return (model, "", -1), finest
    return (model, "", -1), (model, kind, -1), finest


class PriorPredictor:
    """A `Predictor` that answers at once; without hints by a look-up in a dictionary."""

    wants_logprobs = False

    def __init__(self, config: Config) -> None:
        self._config = config
        self._models = {m.name for m in config.models} | {e.model for e in config.engines}
        self._cells: dict[_Key, _Cell] = {}
        self._found: dict[_Key, tuple[_Cell, ...]] = {}  # by stage: its cells on all levels
        self._kinds: set[str] = set()
        self._observed = 0
        self._cache: dict[tuple[str, int], tuple[int, Prediction]] = {}

    def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
        """See `Predictor`. The payload is not looked at."""
        prediction = self.prediction(stage)
        deliver(stage, prediction if stage.hints is None else hinted(prediction, stage.hints))

    def prediction(self, stage: Stage) -> Prediction:
        """As `predict` delivers it, before the client's hints; has every model that is known."""
        key = (stage.kind, min(stage.stage, _MAX_STAGE))
        cached = self._cache.get(key)
        # Refreshed after every new value at first, later only once 1/16 more have been seen.
        if cached is None or self._observed - cached[0] > min(self._observed // 16, _STALE):
            cached = self._refresh(key)
        return cached[1]

    def cancel(self, stage: Stage) -> None:
        """See `Predictor`. Nothing ever waits here."""

    def add_model(self, model: str) -> None:
        """See `Predictor`."""
        if model not in self._models and len(self._models) < _MAX_MODELS:
            self._models.add(model)
            self._cache.clear()

    def observe_stage(self, stage: Stage, model: str, usage: Usage, logprob: float | None) -> None:
        """See `Predictor`."""
        self._observed += 1
        for cell in self._levels(model, stage.kind, stage.stage):
            cell.stage.add(usage.output_tokens)

    def observe_feedback(self, workflow_id: str, stage: int, verdict: float) -> None:
        """See `Predictor`. Only outcomes of whole workflows count here."""

    def observe_workflow(self, ended: WorkflowEnded) -> None:
        """See `Predictor`. A success counts for every model that ran a stage."""
        remaining = 0
        for after, stage in enumerate(reversed(ended.stages)):
            remaining += stage.output_tokens
            for cell in self._levels(stage.model, ended.kind, stage.stage):
                cell.remaining.add(remaining)
                cell.after.add(after)
        if ended.success is None:
            return
        for model in {stage.model for stage in ended.stages}:
            numbers = {s.stage for s in ended.stages if s.model == model}
            cells = {id(c): c for n in numbers for c in self._levels(model, ended.kind, n)}
            for cell in cells.values():
                cell.success.add(ended.success)
        self._observed += 1

    def snapshot(self) -> dict[str, Any]:
        """See `Predictor`."""
        return {}

    def _levels(self, model: str, kind: str, stage: int) -> tuple[_Cell, ...]:
        """The cells that learn of this stage; none for a model that could not be remembered."""
        stage = min(stage, _MAX_STAGE)
        found = self._found.get((model, kind, stage))
        if found is not None:
            return found
        if model not in self._models:
            return ()
        known = self._known_kind(kind)
        self._kinds.add(known)
        cells = self._cells
        keys = _keys(model, known, stage)
        found = tuple([cells.get(key) or cells.setdefault(key, _Cell()) for key in keys])
        if known == kind:
            self._found[model, kind, stage] = found
        return found

    def _known_kind(self, kind: str) -> str:
        if kind in self._kinds or len(self._kinds) < _MAX_KINDS:
            return kind
        return _OTHER_KINDS

    def _refresh(self, key: tuple[str, int]) -> tuple[int, Prediction]:
        kind, stage = key
        models: dict[str, ModelPrediction] = {}
        for model in sorted(self._models):
            predicted = self._unseen(model)
            for level in _keys(model, self._known_kind(kind), stage):
                cell = self._cells.get(level)
                if cell is not None:
                    predicted = cell.refine(predicted)
            models[model] = predicted
        if len(self._cache) > _MAX_KINDS * (_MAX_STAGE + 1):
            self._cache.clear()
        cached = (self._observed, Prediction(models, self._unseen("")))
        self._cache[key] = cached
        return cached

    def _unseen(self, model: str) -> ModelPrediction:
        """What the configuration says."""
        known = self._config.model(model)
        mean = known.output_tokens
        low, middle, high = (mean * s for s in _SPREAD)
        all_of_it = 1.0 + _STAGES_AFTER
        return ModelPrediction(
            known.confidence,
            mean,
            (low, middle, high),
            mean * all_of_it,
            (low * all_of_it, middle * all_of_it, high * all_of_it),
            _STAGES_AFTER,
        )


def hinted(prediction: Prediction, hints: Hints) -> Prediction:
    """Replace what the client knows better. A hinted length is taken as certain."""
    confidence = hints.confidence or {}
    models = {
        name: _hinted_model(predicted, hints, confidence.get(name))
        for name, predicted in prediction.models.items()
    }
    return Prediction(models, _hinted_model(prediction.other, hints, None), prediction.source)


def _hinted_model(
    predicted: ModelPrediction, hints: Hints, confidence: float | None
) -> ModelPrediction:
    stage, stages = predicted.stage_tokens_mean, predicted.stage_tokens
    remaining, remainings = predicted.remaining_tokens_mean, predicted.remaining_tokens
    if hints.output_tokens is not None:
        stage = float(hints.output_tokens)
        stages = (stage, stage, stage)
        if remaining < stage:
            remaining, remainings = stage, (stage, stage, stage)
    if hints.remaining_tokens is not None:
        remaining = float(hints.remaining_tokens)
        remainings = (remaining, remaining, remaining)
    after = predicted.remaining_stages
    if hints.remaining_stages is not None:
        after = float(hints.remaining_stages)
    known = predicted.confidence if confidence is None else confidence
    return ModelPrediction(known, stage, stages, remaining, remainings, after)
