"""Small traces with a known signal, made in memory: what tests of evaluation and training share."""

from collections.abc import Sequence

import numpy as np

from chimera_predictors.traces import Traces

MODELS = ("large", "small")
KINDS = ("code", "chat")


def make_traces(
    tasks: int = 60, models: Sequence[str] = MODELS, stages: int = 2, seed: int = 0
) -> Traces:
    """Each task is solved once by each model in so many stages.

    A task is easy or hard, which its text says and its kind does not. Hard ones take four times the
    tokens and defeat the small models (all but the first); chat doubles the tokens of stage 0.
    """
    rng = np.random.default_rng(seed)
    hard = rng.random(tasks) < 0.5
    kinds = rng.integers(len(KINDS), size=tasks)
    texts = [
        f"{'difficult proof' if hard[task] else 'simple sum'} number {rng.integers(1000)} of {task}"
        for task in range(tasks)
    ]
    shape = (tasks, len(models), stages)
    task, model, stage = (index.ravel() for index in np.indices(shape))
    workflow = task * len(models) + model
    chance = np.where(hard[:, None], np.where(np.arange(len(models)) == 0, 0.8, 0.1), 0.9)
    success = (rng.random((tasks, len(models))) < chance).astype(float)
    mean = 40.0 * np.where(hard[task], 4.0, 1.0) * np.where((stage == 0) & (kinds[task] == 1), 2, 1)
    output = np.round(mean * rng.lognormal(0.0, 0.3, size=len(task)))
    remaining = np.flip(np.cumsum(np.flip(output.reshape(shape), 2), axis=2), 2).ravel()
    return Traces(
        workflow=workflow,
        task=task,
        kind=np.array(KINDS, dtype=object)[kinds[task]],
        model=model,
        stage=stage,
        n_stages=np.full(len(task), stages),
        prompt_tokens=20 + 100 * stage,
        output_tokens=output,
        remaining_tokens=remaining,
        success=success[task, model],
        verdict=np.full(len(task), np.nan),
        logprob=np.full(len(task), np.nan),
        new_text=[texts[t] if s == 0 else "observation" for t, s in zip(task, stage, strict=True)],
        workflow_ids=[f"workflow {number}" for number in range(tasks * len(models))],
        workflow_text=[texts[number // len(models)] for number in range(tasks * len(models))],
        task_ids=[f"task {number}" for number in range(tasks)],
        task_text=texts,
        models=tuple(models),
    )
