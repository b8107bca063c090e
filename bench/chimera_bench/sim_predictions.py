"""What the simulated daemon is told before each stage: the prior, a bundle, or known to be so good.

A `Source` answers per task and models that ran its stages so far; nothing here depends on load or
time, so answers are made once and shared by all simulations of the same tasks. Only the prior, the
daemon's own, learns as workflows end. Knows no policy; torch comes in with bundles alone.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from chimera_bench.sim_input import Run, StageTruth, Workflow
from chimera_bench.sim_workload import Sample, Task, contexts
from chimera_bench.simulator import Outcome, first_workflow_id, mean_outcome
from chimera_daemon.config import Config
from chimera_daemon.messages import (
    LEVELS,
    ModelPrediction,
    Prediction,
    Stage,
    Usage,
    WorkflowEnded,
)
from chimera_daemon.prior import Deliver, Predictor, PriorPredictor
from chimera_daemon.reading import Model, completed, to_predictions
from chimera_predictors.options import Options, Progress
from chimera_predictors.records import PastStage, StageQuery

if TYPE_CHECKING:
    from chimera_predictors.encoder import Encoder
    from chimera_predictors.predictor import BundlePredictor
    from chimera_predictors.traces import Traces

History = tuple[str, ...]  # models of the stages answered so far
Models = dict[str, ModelPrediction]
Answers = dict[tuple[str, str, History], Models]  # by task id, kind and models so far

_BATCH = 256
_UNKNOWN = 0.5  # confidence where no success is known
_FORMAT = 1  # of the kept folds: another one is trained anew


class Predicting(Predictor, Protocol):
    """One simulation's predictions: `prediction` is its `Predict`, the whole an observer of it."""

    def prediction(self, stage: Stage) -> Prediction:
        """Of a stage that is about to enter the core."""
        ...


class Source(Protocol):
    """Where predictions come from. Begin anew for every simulation."""

    def begin(self, sample: Sample, config: Config) -> Predicting:
        """Predictions for these workflows, none of which has begun."""
        ...


class Prior:
    """The daemon's own prior; it begins with what the configuration says and learns online."""

    def begin(self, sample: Sample, config: Config) -> Predicting:
        """See `Source`."""
        return PriorPredictor(config)


class _Recalling:
    """A `Predicting`: knows who ran the stages of each workflow, asks for the rest."""

    wants_logprobs = False

    def __init__(self, sample: Sample, answer: "Callable[[Task, History], Prediction]") -> None:
        self._tasks = sample.tasks
        self._answer = answer
        self._histories: dict[str, History] = {}

    def prediction(self, stage: Stage) -> Prediction:
        """See `Predicting`."""
        workflow = stage.workflow_id
        task = self._tasks[first_workflow_id(workflow)]
        return self._answer(task, self._histories.get(workflow, ()))

    def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
        """See `Predictor`. The payload is not looked at."""
        deliver(stage, self.prediction(stage))

    def cancel(self, stage: Stage) -> None:
        """See `Predictor`. Nothing ever waits here."""

    def add_model(self, model: str) -> None:
        """See `Predictor`. The models are those of the tasks."""

    def observe_stage(self, stage: Stage, model: str, usage: Usage, logprob: float | None) -> None:
        """See `Predictor`."""
        history = self._histories.get(stage.workflow_id, ())
        assert stage.stage == len(history), "stages are answered one after the other"
        self._histories[stage.workflow_id] = (*history, model)

    def observe_feedback(self, workflow_id: str, stage: int, verdict: float) -> None:
        """See `Predictor`. A verdict follows from who ran the stage."""

    def observe_workflow(self, ended: WorkflowEnded) -> None:
        """See `Predictor`."""
        self._histories.pop(ended.workflow_id, None)

    def snapshot(self) -> dict[str, Any]:
        """See `Predictor`."""
        return {}


class _Cached:
    """A `Source` whose answers per (task, history) are made once."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str, History], Prediction] = {}

    def begin(self, sample: Sample, config: Config) -> Predicting:
        """See `Source`."""
        return _Recalling(sample, self.answer)

    def answer(self, task: Task, history: History) -> Prediction:
        """The prediction of a task's next stage once these models have run the ones before."""
        key = (task.task_id, task.kind, history)
        found = self._answers.get(key)
        if found is None:
            models = self._predict(task, history)
            found = Prediction(models, _average(models.values()), "learned")
            self._answers[key] = found
        return found

    def _predict(self, task: Task, history: History) -> Models:
        raise NotImplementedError


# Predictions of known quality.


class Constant(_Cached):
    """Per model the same for all tasks and stages: its averages over the given tasks.

    What is left of prediction when nothing is known of a task. Lengths are pooled over stages.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("there is no task to take averages of")
        names = tasks[0].runs
        self.models: Models = {name: _averages([t.runs[name] for t in tasks]) for name in names}

    def _predict(self, task: Task, history: History) -> Models:
        return self.models


class Oracle(_Cached):
    """The truth: lengths and outcome if a model does all the rest of the workflow.

    Outcomes are those of the simulation: give both the same function. A true length gives away a
    bit of the outcome, and nothing real is as good: this bounds what predictions are worth.
    """

    def __init__(self, outcome: Outcome = mean_outcome) -> None:
        super().__init__()
        self._outcome = outcome

    def _predict(self, task: Task, history: History) -> Models:
        return {model: _exactly(self.truth(task, history, model)) for model in task.runs}

    def truth(self, task: Task, history: History, model: str) -> "_Truth":
        """What comes if this model does the rest."""
        stages = task.runs[model].stages
        left = stages[min(len(history), len(stages) - 1) :]
        done = Workflow("", 0.0, task.prompt_tokens, task.runs, task.kind)
        success = self._outcome(done, [*history, *[model] * len(left)])
        lengths = [stage.output_tokens for stage in left]
        return _Truth(_UNKNOWN if success is None else success, lengths[0], sum(lengths), len(left))


class Noisy(Oracle):
    """The truth seen through noise of strength S, and read as well as that can be.

    Lengths: the truth times exp(S·z) is the median, with quantiles as wide as the noise is.
    Outcome y: y + S·z is seen, and the confidence is the chance of success that follows with the
    model's share ``p`` of solved tasks: logit p + (y + S·z − 1/2)/S². As a router S has an AUC of
    Φ(1/(√2·S)) per model: .92 at 0.5, .76 at 1, .64 at 2. There are two draws z for each task and
    model, the same at every stage, so that asking again tells nothing new. ``tasks`` give p.
    """

    def __init__(
        self, strength: float, tasks: Sequence[Task], seed: int, outcome: Outcome = mean_outcome
    ) -> None:
        super().__init__(outcome)
        if not (math.isfinite(strength) and strength > 0.0):
            raise ValueError(f"the strength of the noise must be more than 0, not {strength}")
        self._strength = strength
        self._seed = seed
        self._shares = {n: m.confidence for n, m in Constant(tasks).models.items()}

    def _predict(self, task: Task, history: History) -> Models:
        return {model: self._blurred(task, history, model) for model in task.runs}

    def _blurred(self, task: Task, history: History, model: str) -> ModelPrediction:
        truth, noise = self.truth(task, history, model), self._strength
        draw = Random(f"noise {self._seed} {model} {task.kind} {task.task_id}")
        factor = math.exp(noise * draw.gauss(0.0, 1.0))
        seen = truth.success + noise * draw.gauss(0.0, 1.0)
        share = min(max(self._shares[model], 1e-6), 1.0 - 1e-6)
        logit = math.log(share / (1.0 - share)) + (seen - 0.5) / noise**2
        stage, remaining = truth.stage_tokens * factor, truth.remaining_tokens * factor
        widths = [math.exp(noise * NormalDist().inv_cdf(level)) for level in LEVELS]
        to_mean = math.exp(0.5 * noise**2)
        return ModelPrediction(
            _sigmoid(logit),
            stage * to_mean,
            _three([stage * width for width in widths]),
            remaining * to_mean,
            _three([remaining * width for width in widths]),
            truth.stages - 1.0,
        )


class _Truth(NamedTuple):
    """What a model will need for the rest of a workflow, and what comes of it."""

    success: float
    stage_tokens: int
    remaining_tokens: int
    stages: int  # the one to predict included


def _exactly(truth: _Truth) -> ModelPrediction:
    stage, remaining = float(truth.stage_tokens), float(truth.remaining_tokens)
    return ModelPrediction(
        truth.success,
        stage,
        (stage, stage, stage),
        remaining,
        (remaining, remaining, remaining),
        truth.stages - 1.0,
    )


def _averages(runs: Sequence[Run]) -> ModelPrediction:
    stage = [s.output_tokens for run in runs for s in run.stages]
    remaining = [r for run in runs for r in np.cumsum(_lengths(run)[::-1]).tolist()]
    after = [n for run in runs for n in range(len(run.stages))]
    successes = [run.success for run in runs if run.success is not None]
    return ModelPrediction(
        float(np.mean(successes)) if successes else _UNKNOWN,
        float(np.mean(stage)),
        _three(np.quantile(stage, LEVELS).tolist()),
        float(np.mean(remaining)),
        _three(np.quantile(remaining, LEVELS).tolist()),
        float(np.mean(after)),
    )


def _lengths(run: Run) -> list[int]:
    return [stage.output_tokens for stage in run.stages]


def _average(predictions: Iterable[ModelPrediction]) -> ModelPrediction:
    """For a model that no task was run with: all others' mean."""
    rows = [
        (p.confidence, p.stage_tokens_mean, *p.stage_tokens, p.remaining_tokens_mean,
         *p.remaining_tokens, p.remaining_stages)
        for p in predictions
    ]  # fmt: skip
    confidence, stage, *rest = np.mean(rows, axis=0).tolist()
    return ModelPrediction(confidence, stage, _three(rest[:3]), rest[3], _three(rest[4:7]), rest[7])


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = values
    return low, middle, high


def _sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0.0 else 1.0 - _sigmoid(-logit)


# Bundles.


class Learned(_Cached):
    """What trained bundles say, asked as the daemon asks them.

    ``model_of`` gives each task its bundle: one that has not seen it (`Folds`), or always the same.
    Workflows that keep to one model are predicted at once, in batches (``made``, to be handed to
    others of the same tasks and bundles); those that change models when they come up, one by one,
    so that nothing depends on their order. Parts of a prediction
    that a bundle knows nothing of are `Constant`'s over ``tasks``, as the daemon takes its prior's.
    Raises `ValueError` where a bundle does not know a model of the tasks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        model_of: Callable[[Task], Model],
        progress: Progress = lambda what, share: None,
        made: Answers | None = None,
    ) -> None:
        super().__init__()
        self._constant = Constant(tasks)
        self._model_of = model_of
        self.made: Answers = self._make(tasks, progress) if made is None else made

    def _make(self, tasks: Sequence[Task], progress: Progress) -> Answers:
        made: Answers = {}
        groups: dict[int, tuple[Model, list[tuple[Task, History]]]] = {}
        for task in tasks:
            model = self._checked(task)
            groups.setdefault(id(model), (model, []))[1].extend(
                (task, history) for history in _faithful(task)
            )
        batches = [
            (model, asked[start : start + _BATCH])
            for model, asked in groups.values()
            for start in range(0, len(asked), _BATCH)
        ]
        for number, (model, asked) in enumerate(batches):
            progress("predictions", number / len(batches))
            for (task, history), found in zip(asked, _asked(model, asked), strict=True):
                made[task.task_id, task.kind, history] = found
        return made

    def _checked(self, task: Task) -> Model:
        model = self._model_of(task)
        for name in task.runs:
            if name not in model.models:
                raise ValueError(
                    f"the bundle does not know model {name!r}, which the cluster serves; it knows: "
                    f"{', '.join(sorted(model.models))}"
                )
        return model

    def _predict(self, task: Task, history: History) -> Models:
        found = self.made.get((task.task_id, task.kind, history))
        if found is None:
            (found,) = _asked(self._model_of(task), [(task, history)])
        constant = self._constant.models
        return {
            name: completed(found[name], constant[name]) if name in found else constant[name]
            for name in task.runs
        }


def _faithful(task: Task) -> list[History]:
    """All histories of a workflow that one model does, from none at all."""
    later = [
        (model,) * done for model, run in task.runs.items() for done in range(1, len(run.stages))
    ]
    return [(), *later]


def _asked(model: Model, asked: Sequence[tuple[Task, History]]) -> list[Models]:
    queries = [query(task, history) for task, history in asked]
    return to_predictions(model, model.predict(queries), len(queries))


def query(task: Task, history: History) -> StageQuery:
    """What the daemon would know of a task's next stage after these models ran the ones before.

    The text that is new comes from the run of the last of them: its tools' answer. No engine here
    tells log-probabilities.
    """
    done = [_stage_of(task.runs[model], number) for number, model in enumerate(history)]
    # What comes after the last of these is not known: any stage stands for it.
    sizes = list(contexts(task.prompt_tokens, [*done, StageTruth(1)]))
    past = tuple(
        PastStage(model, prompt, stage.output_tokens, stage.verdict)
        for model, stage, (prompt, _) in zip(history, done, sizes, strict=False)
    )
    number = len(history)
    new_text = task.text
    if number:
        texts = task.new_texts.get(history[-1], ())
        new_text = texts[number] if number < len(texts) else ""
    return StageQuery(task.kind, number, task.text, new_text, sizes[-1][0], past)


def _stage_of(run: Run, number: int) -> StageTruth:
    return run.stages[min(number, len(run.stages) - 1)]


class Folds(NamedTuple):
    """Bundles trained on all tasks but those of one fold each."""

    models: "tuple[BundlePredictor, ...]"
    fold_of: Mapping[str, int]  # by task id

    def model_of(self, task: Task) -> "BundlePredictor":
        """The bundle that has not seen this task, nor one of the same text."""
        return self.models[self.fold_of[task.task_id]]


def train_folds(
    traces: "Traces",
    encoder: "Encoder",
    options: Options,
    *,
    folds: int = 5,
    keep: Path | None = None,
    progress: Progress = lambda what, share: None,
) -> Folds:
    """Train one bundle per fold on the tasks of the others; folds go by task text.

    With ``keep``, bundles are written to that folder and found there the next time, if nothing that
    they depend on has changed. Raises `TracesError` for too few tasks, `TrainError` and
    `BundleError`.
    """
    from chimera_predictors.bundle import read_bundle, write_bundle
    from chimera_predictors.predictor import BundlePredictor
    from chimera_predictors.trainer import train_bundle, training_cache

    fold = traces.fold_of(folds, options.seed)
    cache, digest = training_cache(encoder), _digest(traces, encoder, options, folds)
    models: list[BundlePredictor] = []
    for number in range(folds):
        kept = None if keep is None else keep / f"{digest}-fold-{number}"
        if kept is not None and kept.is_dir():
            bundle = read_bundle(kept)
        else:
            what, began = f"fold {number + 1} of {folds}", number / folds
            bundle = train_bundle(
                traces.select(fold != number), cache, options,
                lambda _, share, what=what, began=began: progress(what, began + share / folds),
            )  # fmt: skip
            if kept is not None:
                write_bundle(bundle, kept)
        models.append(BundlePredictor(bundle, cache))
    fold_of = {traces.task_ids[t]: f for t, f in zip(traces.task.tolist(), fold, strict=True)}
    return Folds(tuple(models), fold_of)


def _digest(traces: "Traces", encoder: "Encoder", options: Options, folds: int) -> str:
    """Of all that trained folds depend on, for a folder's name."""
    import msgspec

    from chimera_predictors.evaluate import data_digest

    digest = hashlib.blake2b(digest_size=8)
    for values in (traces.verdict, traces.logprob, traces.remaining_tokens, traces.n_stages):
        digest.update(np.nan_to_num(np.asarray(values, dtype="<f8"), nan=-1.0).tobytes())
    texts = [data_digest(traces), encoder.digest, str(encoder.max_tokens), f"{folds} {_FORMAT}"]
    digest.update("\0".join(texts).encode() + msgspec.json.encode(options))
    return digest.hexdigest()


# By name.


def degraded(
    name: str, tasks: Sequence[Task], seed: int, outcome: Outcome = mean_outcome
) -> Source:
    """The source called "prior", "constant", "oracle" or "noise:S"; bundles need `Learned`.

    ``tasks`` are those that averages are taken of; use the half that knobs are chosen on. Raises
    `ValueError` for any other name.
    """
    if name == "prior":
        return Prior()
    if name == "constant":
        return Constant(tasks)
    if name == "oracle":
        return Oracle(outcome)
    what, _, strength = name.partition(":")
    try:
        noise = float(strength) if what == "noise" else None
    except ValueError:
        noise = None
    if noise is None:
        raise ValueError(
            f"no predictions {name!r}; there are: prior, constant, oracle, noise:S (S a number "
            "above 0, such as noise:1)"
        )
    return Noisy(noise, tasks, seed, outcome)
