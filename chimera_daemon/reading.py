"""The thread between the loop and the model: payloads become texts, texts predictions, in batches.

A batch is whatever waits when the thread becomes free, so nothing waits for company. Whatever a
payload holds or a model raises ends up in the `Batch` that is handed back; the thread never ends
over it. Knows no event loop, no prior and no deadlines.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from msgspec import Struct

from chimera_daemon.memory import Known
from chimera_daemon.messages import LEVELS, ModelPrediction, Stage
from chimera_predictors.records import Forecast, PastStage, StageQuery
from chimera_predictors.text import cut, new_text

# More than any encoder takes: a longer text is of no use, neither now nor to train on.
_TEXT_BYTES = 8192
# Stages that are only read, not predicted, fill no place in a batch; but it has an end with them.
_UNASKED = 4


class Model(Protocol):
    """What is needed of a bundle that has been loaded."""

    @property
    def models(self) -> frozenset[str]:
        """Names it may predict for."""
        ...

    @property
    def levels(self) -> tuple[float, ...]:
        """Of its quantiles, ascending; `LEVELS` among them."""
        ...

    @property
    def digest(self) -> str:
        """Which bundle it is."""
        ...

    @property
    def runs_on(self) -> str:
        """The device and the kernels, for people."""
        ...

    @property
    def counters(self) -> dict[str, int]:
        """What it has counted itself; may be read while it predicts."""
        ...

    def predict(self, queries: Sequence[StageQuery]) -> Sequence[dict[str, Forecast]]:
        """Blocks. One answer per query; models that it had better not predict are left out."""
        ...


class Job(Struct, eq=False):
    """One stage to read, and to predict if ``asked``. The loop may take either back meanwhile."""

    stage: Stage
    payload: bytes
    known: Known
    past: tuple[PastStage, ...]
    asked: bool
    wanted: bool = True  # False: the client gave up, not even the text is needed
    text: str = ""

    def query(self) -> StageQuery:
        """Once its text, and those of the stages before it, have been read."""
        stage, texts = self.stage, self.known.texts
        return StageQuery(
            stage.kind, stage.stage, texts.task, self.text, stage.prompt_tokens, self.past
        )


class Batch(Struct, eq=False):
    """Jobs that are done. ``predictions`` is for ``predicted``; empty if ``error`` says why."""

    jobs: list[Job]
    predicted: list[Job] = []
    predictions: list[dict[str, ModelPrediction]] = []
    error: Exception | None = None
    unreadable: int = 0  # payloads that were no chat
    took_s: float = 0.0


class _Part(Struct):
    text: str = ""


class _Message(Struct):
    role: str = ""
    content: str | list[_Part] | None = None


class _Chat(Struct):
    messages: list[_Message] | None = None
    prompt: str | list[str] | None = None  # of a completion that is no chat


_decode = msgspec.json.Decoder(_Chat).decode


def text_of(payload: bytes) -> str:
    """What a body adds to its workflow, cut. Raises `ValueError` or `RecursionError`.

    Reads roles and texts and nothing else: the engine will say what is wrong with the rest.
    """
    body = _decode(payload)
    if body.messages is not None:
        messages = [(m.role, _content(m.content)) for m in body.messages]
    elif body.prompt is not None:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        messages = [("user", prompt) for prompt in prompts]
    else:
        raise ValueError("neither messages nor a prompt")
    return cut(new_text(messages), _TEXT_BYTES)


def _content(content: str | list[_Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def to_predictions(
    model: Model, forecasts: Sequence[dict[str, Forecast]], queries: int
) -> list[dict[str, ModelPrediction]]:
    """At the levels that messages have, without models of which nothing is known.

    A part that is not known, as the model was trained without labels of it, stays NaN: see
    `completed`. Raises `ValueError` for what no policy could use.
    """
    if len(forecasts) != queries:
        raise ValueError(f"{len(forecasts)} answers of the model to {queries} queries")
    at = [model.levels.index(level) for level in LEVELS]
    return [
        {name: made for name, f in each.items() if (made := _prediction(f, at)) is not None}
        for each in forecasts
    ]


def completed(learned: ModelPrediction, prior: ModelPrediction) -> ModelPrediction:
    """The same with the prior's confidence or lengths where that part is not known."""
    if math.isnan(learned.confidence):
        return msgspec.structs.replace(learned, confidence=prior.confidence)
    if math.isnan(learned.stage_tokens_mean):
        return msgspec.structs.replace(prior, confidence=learned.confidence)
    return learned


def _prediction(forecast: Forecast, at: list[int]) -> ModelPrediction | None:
    stage, remaining = forecast.stage_tokens, forecast.remaining_tokens
    made = ModelPrediction(
        forecast.confidence,
        forecast.stage_tokens_mean,
        (stage[at[0]], stage[at[1]], stage[at[2]]),
        forecast.remaining_tokens_mean,
        (remaining[at[0]], remaining[at[1]], remaining[at[2]]),
        forecast.remaining_stages,
    )
    lengths = (
        made.stage_tokens_mean,
        *made.stage_tokens,
        made.remaining_tokens_mean,
        *made.remaining_tokens,
        made.remaining_stages,
    )
    known = not math.isnan(made.confidence)
    known_lengths = not all(math.isnan(n) for n in lengths)
    wrong = known and not 0.0 <= made.confidence <= 1.0
    if wrong or (known_lengths and not all(0.0 <= n < math.inf for n in lengths)):
        raise ValueError(f"the model gave numbers that cannot be: {forecast}")
    return made if known or known_lengths else None


class Reader:
    """The thread. ``done`` is called on it with every batch; ``model`` may be set at any time."""

    def __init__(self, max_batch: int, done: Callable[[Batch], None]) -> None:
        self.model: Model | None = None
        self._max_batch = max_batch
        self._done = done
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._began_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="predictor", daemon=True)

    def start(self) -> None:
        """Begin; jobs may have been put before."""
        self._thread.start()

    def put(self, job: Job) -> None:
        """Queue a job; the caller bounds how many there are."""
        self._queue.put(job)

    def close(self, wait_s: float) -> None:
        """End after the batch under way, which nobody waits for longer than this."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(wait_s)

    @property
    def busy_s(self) -> float:
        """For how long it has been at the batch under way; 0 if it is idle."""
        began_s = self._began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def _run(self) -> None:
        while True:
            jobs = self._take()
            if jobs is None:
                return
            self._began_s = began_s = time.monotonic()
            batch = self._work(jobs)
            self._began_s = None
            batch.took_s = time.monotonic() - began_s
            self._done(batch)
            del jobs, batch  # nothing of them is kept while there is nothing to do

    def _take(self) -> list[Job] | None:
        """What waits, at least one; None at the end."""
        jobs: list[Job] = []
        asked = 0
        try:
            while asked < self._max_batch and len(jobs) < _UNASKED * self._max_batch:
                job = self._queue.get(block=not jobs)
                if job is None:
                    return None
                jobs.append(job)
                asked += job.asked
        except queue.Empty:
            pass
        return jobs

    def _work(self, jobs: list[Job]) -> Batch:
        batch = Batch(jobs)
        for job in jobs:
            if job.wanted:
                self._read(job, batch)
            job.payload = b""
        model = self.model
        asked = [job for job in jobs if job.asked and job.wanted]
        if model is None or not asked:
            return batch
        batch.predicted = asked
        try:
            forecasts = model.predict([job.query() for job in asked])
            batch.predictions = to_predictions(model, forecasts, len(asked))
        except Exception as error:
            batch.error = error
        return batch

    def _read(self, job: Job, batch: Batch) -> None:
        try:
            job.text = text_of(job.payload)
        except (ValueError, RecursionError):  # msgspec's errors and UnicodeDecodeError among them
            batch.unreadable += 1
        job.known.texts.add(job.stage.stage, job.text)
