"""Learned predictions: the `Predictor` that asks a bundle, and the only door to torch.

The class runs on the loop's thread, the model on the `Reader`'s; a third loads bundles. Rules:
- A stage that is asked for is in ``_waiting`` until it is delivered, once: with what the model
  said, or with the prior's numbers when the deadline passes, the model fails, or too much waits.
- Each such fall-back is counted, and "fallback" in the receipt. Late answers are dropped.
- Without a model (only traces are wanted) every stage gets the prior's prediction at once.
"""

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from chimera_daemon.config import Config, ConfigError, PredictorConfig
from chimera_daemon.memory import WorkflowMemory
from chimera_daemon.messages import (
    LEVELS,
    ModelPrediction,
    Prediction,
    Stage,
    StageKey,
    Usage,
    WorkflowEnded,
)
from chimera_daemon.pace import Pace
from chimera_daemon.prior import Deliver, PriorPredictor, hinted
from chimera_daemon.reading import Batch, Job, Model, Reader, completed
from chimera_daemon.recorder import Recorder
from chimera_predictors.records import StageQuery, WorkflowLog

log = logging.getLogger("chimera.predict")

Load = Callable[[], Model]

# After so many failures in a row the model is left alone for a while, doubling each time.
_MAX_FAILURES = 3
_FIRST_REST_S = 1.0
_LONGEST_REST_S = 60.0
# A batch that takes longer than this hangs: nobody waits for it until it is back.
_HANGING_S = 1.0
# A stage that would be predicted later than this part of its deadline is not asked for: it would
# wait in vain, and make those behind it late.
_HOPEFUL = 0.75
_QUIET_S = 30.0  # between two complaints about the model
_CLOSE_S = 2.0
_RELOAD_NICENESS = 10  # loading a bundle must not slow the one that is serving


def make_predictor(config: Config, prior: PriorPredictor) -> "LearnedPredictor":
    """The predictor of this configuration; loads its bundle, which takes seconds.

    Raises `ConfigError` if the bundle or the folder for traces cannot be used.
    """
    chosen = config.predictor
    model = None if chosen.bundle is None else load_model(chosen)
    recorder = None if chosen.record is None else Recorder(chosen.record)
    predictor = LearnedPredictor(config, prior, recorder=recorder)
    if model is not None:
        predictor.use(model, lambda: load_model(chosen))
    return predictor


def load_model(config: PredictorConfig) -> Model:
    """Load a bundle and warm it up; any thread. Raises `ConfigError`, saying what to do."""
    try:
        from chimera_predictors.predictor import BundleError, load
    except ImportError as error:
        raise ConfigError(
            f"a bundle needs more than is installed ({error}): "
            "pip install 'chimera-daemon[predict]'"
        ) from error
    try:
        model: Model = load(config.bundle or "", device=config.device, threads=config.threads)
    except BundleError as error:
        raise ConfigError(f"`predictor.bundle`: {error}") from error
    except Exception as error:
        raise ConfigError(_unusable(config, "cannot be loaded", error)) from error
    missing = [level for level in LEVELS if level not in model.levels]
    if missing:
        raise ConfigError(
            f"`predictor.bundle`: {config.bundle} has no quantiles at {missing}; train it again"
        )
    try:
        _warm_up(model, config.max_batch)
    except Exception as error:
        raise ConfigError(_unusable(config, "was loaded but cannot predict", error)) from error
    return model


def _unusable(config: PredictorConfig, how: str, error: Exception) -> str:
    return f"`predictor.bundle`: {config.bundle} {how}: {type(error).__name__}: {error}"


def _warm_up(model: Model, max_batch: int) -> None:
    """The first calls allocate and compile; no stage shall wait for that."""
    for size in (1, 1, max_batch):
        text = "How many primes are there below one hundred? "
        queries = [
            StageQuery(task_text=text, new_text=f"{text * 4}{n}", prompt_tokens=50)
            for n in range(size)
        ]
        model.predict(queries)


class _Waiting(Struct, eq=False):
    """A stage that has been asked for and not been delivered."""

    job: Job
    deliver: Deliver
    due_s: float


class LearnedPredictor:
    """A `Predictor`. Call `start` on the loop before the first stage, and `close` at the end."""

    wants_logprobs = True

    def __init__(
        self, config: Config, prior: PriorPredictor, *, recorder: Recorder | None = None
    ) -> None:
        self._limits = config.predictor
        self._hopeful_s = _HOPEFUL * self._limits.deadline_s
        self._max_queued_bytes = config.max_queued_bytes
        self._prior = prior
        self._recorder = recorder
        on_log: Callable[[WorkflowLog], None] | None = None if recorder is None else recorder.put
        self._memory = WorkflowMemory(config.max_workflows, on_log)
        self._reader = Reader(self._limits.max_batch, self._post_batch)
        self._models = {m.name for m in config.models} | {e.model for e in config.engines}
        self._model: Model | None = None
        self._loaded_at = ""
        self._load: Load | None = None
        self._loading = self._load_again = self._closed = False
        self._waiting: OrderedDict[StageKey, _Waiting] = OrderedDict()  # oldest first
        self._timer: asyncio.TimerHandle | None = None  # the oldest's deadline, or an earlier one
        self._pace = Pace()
        self._queued = 0  # jobs that the reader has not handed back
        self._queued_bytes = 0
        self._failures = 0  # in a row
        self._rest_until_s = 0.0
        self._complained_s = float("-inf")
        self.counters: Counter[str] = Counter()

    def start(self) -> None:
        """Begin, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._reader.start()

    def close(self) -> None:
        """End the threads, without waiting long for any; what is queued for traces is written."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._reader.close(_CLOSE_S)
        if self._recorder is not None:
            self._recorder.close()

    # The bundle.

    def use(self, model: Model, load: Load | None = None) -> None:
        """Predict with this model from the next batch on; ``load`` makes the one after it."""
        self._model = self._reader.model = model
        self._load = load or self._load
        self._loaded_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._pace = Pace()
        self._failures = 0
        self._rest_until_s = 0.0
        log.info("bundle %s, on %s", model.digest[:16], model.runs_on)
        unknown = sorted(self._models - model.models)
        if unknown:
            log.warning(
                "the bundle does not know: %s; the prior predicts these", ", ".join(unknown)
            )

    def reload(self) -> None:
        """Load the bundle again in the background. One that cannot be used changes nothing."""
        if self._load is None:
            return
        if self._loading:
            self._load_again = True
            return
        self._loading = True
        args = (self._load,)
        threading.Thread(target=self._reload, args=args, name="reload", daemon=True).start()

    def _reload(self, load: Load) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not everywhere a thread has its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _RELOAD_NICENESS)
        try:
            loaded: Model | Exception = load()
        except Exception as error:
            loaded = error
        self._post(self._reloaded, loaded)

    def _reloaded(self, loaded: Model | Exception) -> None:
        self._loading = False
        if isinstance(loaded, Exception):
            self.counters["reloads_failed"] += 1
            log.error("the bundle was not reloaded, the one before stays: %s", loaded)
        else:
            self.counters["reloads"] += 1
            self.use(loaded)
            log.info("the bundle was reloaded: %s", loaded.digest)
        if self._load_again:
            self._load_again = False
            self.reload()

    # Before a stage.

    def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
        """See `Predictor`."""
        if self._full(stage):
            self.counters["texts_skipped"] += 1
            self._do_without(stage, payload, deliver, "predictions_refused")
            return
        why_not = self._why_not()
        job = self._put(stage, payload, asked=not why_not)
        if why_not:
            self._do_without(stage, payload, deliver, why_not)
        else:
            self._wait(_Waiting(job, deliver, self._loop.time() + self._limits.deadline_s))

    def _full(self, stage: Stage) -> bool:
        size = self._queued_bytes + stage.payload_bytes
        return size > self._max_queued_bytes or self._queued >= self._limits.max_waiting

    def _put(self, stage: Stage, payload: bytes, *, asked: bool) -> Job:
        known = self._memory.begin(stage)
        job = Job(stage, payload, known, known.past(stage.stage), asked)
        self._queued += 1
        self._queued_bytes += stage.payload_bytes
        self._reader.put(job)
        return job

    def _why_not(self) -> str:
        """The counter of the reason why the model is not asked; empty if it is."""
        if self._model is None:
            return "predictions_without_model"
        if self._loop.time() < self._rest_until_s or self._reader.busy_s > _HANGING_S:
            return "predictions_bypassed"
        # One at a time is always tried: without batches nobody would see that they are fast again.
        if self._waiting and self._pace.wait_s(len(self._waiting) + 1) > self._hopeful_s:
            return "predictions_shed"
        return ""

    def _do_without(self, stage: Stage, payload: bytes, deliver: Deliver, counter: str) -> None:
        """Where there is no model the prior is no fall-back, but what was asked for."""
        if self._model is None:
            self._prior.predict(stage, payload, deliver)
        else:
            self._fall_back(stage, deliver, counter)

    def cancel(self, stage: Stage) -> None:
        """See `Predictor`."""
        waiting = self._waiting.pop(stage.key, None)
        if waiting is not None:
            waiting.job.wanted = False
            self.counters["predictions_cancelled"] += 1

    def _wait(self, waiting: _Waiting) -> None:
        self._waiting[waiting.job.stage.key] = waiting
        if self._timer is None:
            self._timer = self._loop.call_at(waiting.due_s, self._on_due)

    def _on_due(self) -> None:
        """Nobody waits longer. One timer: those that came later are due later."""
        self._timer = None
        now = self._loop.time()
        try:
            while self._waiting:
                key, waiting = next(iter(self._waiting.items()))
                if waiting.due_s > now:
                    break
                del self._waiting[key]
                waiting.job.asked = False
                self._fall_back(waiting.job.stage, waiting.deliver, "predictions_late")
        finally:
            if self._waiting and not self._closed:
                due_s = next(iter(self._waiting.values())).due_s
                self._timer = self._loop.call_at(due_s, self._on_due)

    def _fall_back(self, stage: Stage, deliver: Deliver, counter: str) -> None:
        self.counters[counter] += 1
        prediction = msgspec.structs.replace(self._prior.prediction(stage), source="fallback")
        deliver(stage, prediction if stage.hints is None else hinted(prediction, stage.hints))

    # From the other threads.

    def _post(self, callback: Callable[[Any], None], value: object) -> None:
        if not self._closed:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(callback, value)

    def _post_batch(self, batch: Batch) -> None:
        self._post(self._batch_done, batch)

    def _batch_done(self, batch: Batch) -> None:
        self._queued -= len(batch.jobs)
        for job in batch.jobs:
            self._queued_bytes -= job.stage.payload_bytes
            self._memory.read(job.stage, job.known)
        self.counters["payloads_unreadable"] += batch.unreadable
        if batch.error is not None:
            self._failed(batch, batch.error)
        elif batch.predicted:
            self._failures = 0
            self.counters["batches"] += 1
            self._pace.observe(len(batch.predicted), batch.took_s)
            for job, models in zip(batch.predicted, batch.predictions, strict=True):
                deliver = self._take(job)
                if deliver is not None:
                    deliver(job.stage, self._merged(job.stage, models))

    def _take(self, job: Job) -> Deliver | None:
        """Whoever waits for this job; nobody if it was late or cancelled."""
        key = job.stage.key
        waiting = self._waiting.get(key)
        if waiting is None or waiting.job is not job:
            return None
        del self._waiting[key]
        return waiting.deliver

    def _merged(self, stage: Stage, learned: dict[str, ModelPrediction]) -> Prediction:
        """What was learned, else the prior, and above all what the client knows."""
        prior = self._prior.prediction(stage)
        candidates = prior.models if stage.model is None else (stage.model,)
        missing = sum(1 for name in candidates if name not in learned)
        self.counters["models_unpredicted"] += missing
        if missing == len(candidates):
            merged = prior
        else:
            self.counters["predictions"] += 1
            self._count_parts([learned[name] for name in candidates if name in learned])
            models = {name: completed(p, prior.of(name)) for name, p in learned.items()}
            merged = Prediction({**prior.models, **models}, prior.other, "learned")
        return merged if stage.hints is None else hinted(merged, stage.hints)

    def _count_parts(self, learned: list[ModelPrediction]) -> None:
        """Parts that the prior has to fill in."""
        confidences = sum(1 for p in learned if math.isnan(p.confidence))
        lengths = sum(1 for p in learned if math.isnan(p.stage_tokens_mean))
        self.counters["confidences_unpredicted"] += confidences
        self.counters["lengths_unpredicted"] += lengths

    def _failed(self, batch: Batch, error: Exception) -> None:
        self._failures += 1
        now = self._loop.time()
        beyond = self._failures - _MAX_FAILURES
        if beyond >= 0:
            self._rest_until_s = now + min(_FIRST_REST_S * 2.0 ** min(beyond, 30), _LONGEST_REST_S)
        if now - self._complained_s >= _QUIET_S:
            self._complained_s = now
            log.error("the model failed, the prior stands in", exc_info=error)
        for job in batch.predicted:
            deliver = self._take(job)
            if deliver is not None:
                self._fall_back(job.stage, deliver, "predictions_failed")

    # After things have happened.

    def add_model(self, model: str) -> None:
        """See `Predictor`."""
        if model in self._models:
            return
        self._models.add(model)
        if self._model is not None and model not in self._model.models:
            log.warning("the bundle does not know the model %s; the prior predicts it", model)

    def observe_stage(self, stage: Stage, model: str, usage: Usage, logprob: float | None) -> None:
        """See `Predictor`."""
        self._memory.answered(stage, model, usage, logprob)

    def observe_feedback(self, workflow_id: str, stage: int, verdict: float) -> None:
        """See `Predictor`."""
        self.counters["verdicts"] += 1
        self._memory.judged(workflow_id, stage, verdict)

    def observe_workflow(self, ended: WorkflowEnded) -> None:
        """See `Predictor`."""
        self._memory.ended(ended)

    def snapshot(self) -> dict[str, Any]:
        """See `Predictor`."""
        model = self._model
        return {
            "bundle": self._limits.bundle,
            "digest": "" if model is None else model.digest,
            "loaded_at": self._loaded_at,
            "runs_on": "" if model is None else model.runs_on,
            "model_counters": {} if model is None else dict(model.counters),
            "models_unknown": [] if model is None else sorted(self._models - model.models),
            "resting": self._loop.time() < self._rest_until_s,
            "waiting": len(self._waiting),
            "workflows": len(self._memory),
            "text_bytes": self._memory.text_bytes,
            "workflows_forgotten": self._memory.forgotten,
            "counters": dict(self.counters),
            "traces": None
            if self._recorder is None
            else {**self._recorder.snapshot(), "incomplete": self._memory.incomplete},
        }
