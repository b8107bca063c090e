"""The tasks of a simulation: recorded runs with one for every model, or made-up ones.

Tasks come from trace folders (docs/traces.md) or are made up in the shapes of the paper. Owns the
halves that knobs are chosen and reported on. Knows no policy and no prediction; all of it follows
from its seeds.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from random import Random
from statistics import NormalDist, median
from typing import Literal, NamedTuple

import numpy as np
from msgspec import Struct

from chimera_bench.sim_input import Run, StageTruth, Workflow
from chimera_predictors.traces import Traces, TracesError, read_traces

Half = Literal["tune", "test"]

_BYTES_PER_TOKEN = 4
_MIN_MAX_TOKENS = 256


# Tasks.


class Task(Struct, frozen=True, forbid_unknown_fields=True):
    """A task with one run per model. Texts are for predictions; the simulator needs none."""

    task_id: str
    kind: str
    prompt_tokens: int  # of the first stage
    runs: dict[str, Run]
    text: str = ""
    new_texts: dict[str, tuple[str, ...]] = {}  # per model, of each stage of its run


class Gaps(Struct, frozen=True, forbid_unknown_fields=True):
    """How long tools take between stages: lognormal, one draw per task and stage number.

    All models share the draw, so that it adds no difference between them. Traces of agents rarely
    have times; the defaults are an assumption.
    """

    mean_s: float = 1.0
    sigma: float = 1.0  # standard deviation of the logarithm
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.mean_s) and self.mean_s >= 0.0):
            raise ValueError(f"`mean_s` of the tool gaps must be 0 or more, not {self.mean_s}")
        if not (isfinite(self.sigma) and self.sigma >= 0.0):
            raise ValueError(f"`sigma` of the tool gaps must be 0 or more, not {self.sigma}")

    def draw(self, task_id: str, stage: int) -> float:
        """Seconds between the end of this stage and the beginning of the next one."""
        if not self.mean_s:
            return 0.0
        normal = Random(f"gap {self.seed} {stage} {task_id}").gauss(0.0, self.sigma)
        return self.mean_s * math.exp(normal - 0.5 * self.sigma**2)


class TaskSet(Struct, frozen=True, forbid_unknown_fields=True):
    """The tasks that every model of the cluster has run, and what could not be used."""

    tasks: tuple[Task, ...]
    left_out: int = 0  # tasks without a usable run of each model
    lacking: dict[str, int] = {}  # model -> those of them that lack its run
    unusable: dict[str, int] = {}  # why -> workflows


class _Key(NamedTuple):
    """Runs of one task under different programs are different tasks."""

    task_id: str
    kind: str


def read_tasks(folder: Path, models: Sequence[str], gaps: Gaps | None = None) -> TaskSet:
    """Tasks of a trace folder for these models; see `tasks_of`. Raises `ValueError`."""
    return tasks_of(read_traces(folder), models, gaps, str(folder))


def tasks_of(
    traces: Traces, models: Sequence[str], gaps: Gaps | None = None, where: str = "the traces"
) -> TaskSet:
    """Tasks with the runs of these models exactly as recorded, in the order of their ids.

    A run counts if one model did all of it and every stage is there with its length; of several of
    one task and model, the first by workflow id. Output and new tokens of every stage are the
    recorded ones; as a workflow begins before it has a model, its first prompt is the median over
    its runs, which differ by what their tokenizers make of one text. Unknown prompt sizes are
    estimated from texts. Raises `ValueError` where no workflow is by one of the models, naming
    ``where`` and the model, and where no task is left.
    """
    wanted = list(dict.fromkeys(models))
    if not wanted:
        raise ValueError("the cluster serves no model")
    for model in wanted:
        if model not in traces.models:
            raise ValueError(
                f"{where}: no workflow by model {model!r}, which the cluster serves; "
                f"there are: {', '.join(traces.models)}"
            )
    found, unusable = _runs_by_task(traces, wanted, gaps or Gaps())
    lacking = Counter[str]()
    tasks: list[Task] = []
    for key in sorted(found):
        runs = found[key]
        missing = [model for model in wanted if model not in runs]
        lacking.update(missing)
        if not missing:
            tasks.append(_task(key, {model: runs[model] for model in wanted}))
    if not tasks:
        lack = ", ".join(f"{model} in {number}" for model, number in sorted(lacking.items()))
        why = "; unusable: " + ", ".join(f"{w} ({n})" for w, n in sorted(unusable.items()))
        raise ValueError(
            f"{where}: none of {len(found)} tasks has a usable run of each model; lacking: {lack}"
            + (why if unusable else "")
        )
    return TaskSet(tuple(tasks), len(found) - len(tasks), dict(lacking), dict(unusable))


class _Recorded(NamedTuple):
    """One usable run."""

    prompt_tokens: int  # of its first stage
    run: Run
    text: str
    new_texts: tuple[str, ...]


def _runs_by_task(
    traces: Traces, wanted: Sequence[str], gaps: Gaps
) -> tuple[dict[_Key, dict[str, _Recorded]], Counter[str]]:
    found: dict[_Key, dict[str, _Recorded]] = {}
    unusable = Counter[str]()
    for rows in _workflows(traces):
        key = _Key(traces.task_ids[int(traces.task[rows[0]])], str(traces.kind[rows[0]]))
        runs = found.setdefault(key, {})
        model = traces.models[int(traces.model[rows[0]])]
        if complaint := _complaint(traces, rows):
            unusable[complaint] += 1
        elif model in runs:
            unusable["another run of the same task and model"] += 1
        elif model in wanted:
            runs[model] = _recorded(traces, rows, key, gaps)
    return found, unusable


def _workflows(traces: Traces) -> Iterator[range]:
    """Rows of each workflow."""
    starts = [0, *(np.flatnonzero(np.diff(traces.workflow)) + 1).tolist(), len(traces)]
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        yield range(start, end)


def _complaint(traces: Traces, rows: range) -> str:
    """Why a workflow is no run that can be replayed; empty if it is."""
    at = slice(rows.start, rows.stop)
    if len(set(traces.model[at].tolist())) > 1:
        return "changes models"
    if traces.stage[at].tolist() != list(range(int(traces.n_stages[rows.start]))):
        return "stages are missing"
    if np.isnan(traces.output_tokens[at]).any():
        return "output tokens are unknown"
    return ""


def _recorded(traces: Traces, rows: range, key: _Key, gaps: Gaps) -> _Recorded:
    at = slice(rows.start, rows.stop)
    texts = tuple(traces.new_text[at])
    outputs = [max(1, round(tokens)) for tokens in traces.output_tokens[at].tolist()]
    prompts = _prompts(traces.prompt_tokens[at].tolist(), outputs, texts)
    stages: list[StageTruth] = []
    for number, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        verdict = float(traces.verdict[row])
        judged = None if math.isnan(verdict) else verdict
        if number + 1 == len(rows):
            stages.append(StageTruth(output, verdict=judged))
            break
        # A context smaller than the prompt before was rewritten, and nothing of it can be reused.
        # One that lacks a part of the last answer is an estimate of tokens that was off.
        keeps = prompts[number + 1] >= prompts[number]
        known = prompts[number] + output if keeps else 0
        new = max(0, prompts[number + 1] - known)
        stages.append(StageTruth(output, new, gaps.draw(key.task_id, number), keeps, judged))
    success = float(traces.success[rows.start])
    run = Run(tuple(stages), None if math.isnan(success) else success)
    return _Recorded(prompts[0], run, traces.workflow_text[int(traces.workflow[rows.start])], texts)


def _prompts(recorded: Sequence[int], outputs: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Tokens of each stage's context; those not known (0) from the text that comes in new."""
    prompts: list[int] = []
    before = 0
    for prompt, output, text in zip(recorded, outputs, texts, strict=True):
        new = -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)
        prompts.append(prompt or max(1, before + new))
        before = prompts[-1] + output
    return prompts


def _task(key: _Key, recorded: Mapping[str, _Recorded]) -> Task:
    return Task(
        key.task_id,
        key.kind,
        round(median(each.prompt_tokens for each in recorded.values())),
        {model: each.run for model, each in recorded.items()},
        next(iter(recorded.values())).text,
        {model: each.new_texts for model, each in recorded.items()},
    )


def verdicts_from_texts(traces: Traces, wrong: str) -> Traces:
    """The same traces, with verdict 0 on each stage that the next one's new text calls wrong.

    For folders without verdicts whose tools say so in words: ``wrong`` is how such a text begins.
    Verdicts that are there stay. Use it before training and before `tasks_of`, so that both know
    the same.
    """
    verdict = traces.verdict.copy()
    workflow, stage = traces.workflow.tolist(), traces.stage.tolist()
    for row in range(len(traces) - 1):
        follows = workflow[row + 1] == workflow[row] and stage[row + 1] == stage[row] + 1
        if follows and math.isnan(verdict[row]) and traces.new_text[row + 1].startswith(wrong):
            verdict[row] = 0.0
    return replace(traces, verdict=verdict)


def half(traces: Traces, tasks: Sequence[Task], which: Half) -> list[Task]:
    """Tasks of one half: "tune" to choose by, "test" to report on.

    Sides are those of `Traces.holdout`: they depend on a task's text alone, and tasks of one text
    are never torn apart. Raises `TracesError` where one half is empty.
    """
    held = traces.holdout(0.5)
    tested = {traces.task_ids[code] for code in set(traces.task[held].tolist())}
    chosen = [task for task in tasks if (task.task_id in tested) == (which == "test")]
    if not chosen:
        raise TracesError(f"no task falls into the half {which!r}; add traces of other tasks")
    return chosen


class Sample(Struct, frozen=True, forbid_unknown_fields=True):
    """Workflows to simulate, and the task of each, by its id."""

    workflows: list[Workflow]
    tasks: dict[str, Task]


def sample(
    tasks: Sequence[Task], arrivals_s: Sequence[float], seed: int, seen: float = 1.0
) -> Sample:
    """Workflows that do tasks drawn at random at these times.

    ``seen`` is the chance that a client would see a model's failure at its task.

    No task comes twice while there are enough; else they are drawn with replacement. The draw does
    not depend on the times. Every stage may be as long as the longest of ``tasks``, up to the next
    power of two.
    """
    if not tasks:
        raise ValueError("there is no task to sample from")
    if not 0.0 <= seen <= 1.0:
        raise ValueError(f"the share of failures seen is from 0 to 1, not {seen}")
    draw, number, eyes = Random(f"tasks {seed}"), len(arrivals_s), Random(f"seen {seed}")
    drawn = draw.sample(tasks, number) if number <= len(tasks) else draw.choices(tasks, k=number)
    longest = max(s.output_tokens for t in tasks for run in t.runs.values() for s in run.stages)
    bound = max(_MIN_MAX_TOKENS, 1 << (longest - 1).bit_length())
    workflows = [
        Workflow(
            str(n),
            at,
            task.prompt_tokens,
            task.runs,
            task.kind,
            bound,
            tuple(model for model in task.runs if eyes.random() >= seen),
        )
        for n, (at, task) in enumerate(zip(arrivals_s, drawn, strict=True))
    ]
    return Sample(workflows, {w.workflow_id: t for w, t in zip(workflows, drawn, strict=True)})


def contexts(prompt_tokens: int, stages: Sequence[StageTruth]) -> Iterator[tuple[int, int]]:
    """(tokens of the prompt, of these part of the stage before's context) for each of the stages.

    The simulator's rule: a context grows by the answer and by what is new, or is rewritten.
    """
    shared = 0
    for stage in stages:
        yield prompt_tokens, shared
        shared = prompt_tokens + stage.output_tokens if stage.keeps_context else 0
        prompt_tokens = shared + stage.new_tokens


# Workflows made up in the shapes of the paper.


class _Role(NamedTuple):
    """An agent: the median length of its answer, the tokens of what it is told."""

    output_tokens: float
    instruction_tokens: int


# Shapes are the paper's; lengths are assumptions.
_ROLES = {
    "planner": _Role(180.0, 60),
    "coder": _Role(350.0, 80),
    "qa": _Role(150.0, 80),
    "solver": _Role(300.0, 60),
    "verifier": _Role(150.0, 80),
}
SHAPES = {
    "code-4": ("planner", "coder", "qa", "coder"),
    "code-2": ("planner", "coder"),
    "code-1": ("coder",),
    "math-4": ("planner", "solver", "verifier", "solver"),
    "math-2": ("planner", "solver"),
    "math-1": ("solver",),
}
_TASK_TOKENS = 250.0  # median size of a task's text
_SIGMA = 0.6  # of the logarithm of lengths
_OWN_SIGMA = 0.2  # of it, what models differ by on one stage
_LUCK = 0.5  # of a run, beside a task's difficulty with spread 1
_HARDER_IS_LONGER = 0.25  # logarithm of length per unit of difficulty
_TAIL = 1.5  # index of the Pareto tail: finite mean, infinite variance
_LONGEST = 4096


def synthetic_tasks(
    skills: Mapping[str, float],
    number: int,
    seed: int,
    *,
    tail: Literal["lognormal", "pareto"] = "lognormal",
    gaps: Gaps | None = None,
) -> TaskSet:
    """Tasks in the paper's shapes (section 5: one, two and four agents), uniform over `SHAPES`.

    ``skills`` gives the share of tasks that each model solves. A task has a difficulty d ~ N(0, 1);
    a run succeeds where ``a + 0.5 ε > d`` with ε ~ N(0, 1) and a chosen for that share, so a better
    model mostly solves what a worse one does. Lengths are lognormal about each role's median, or
    with ``tail`` "pareto" of the same median but a tail of index 1.5, cut at 4096; a draw of the
    task's is shared by all models, and harder tasks take more. The context is kept from stage to
    stage. Without texts. Raises `ValueError`.
    """
    if not skills or number < 1:
        raise ValueError("synthetic tasks need at least one model and one task")
    for model, skill in skills.items():
        if not 0.0 < skill < 1.0:
            raise ValueError(f"model {model!r}: its skill must be between 0 and 1, not {skill}")
    if tail not in ("lognormal", "pareto"):
        raise ValueError(f"no tail {tail!r}; there are: lognormal, pareto")
    draw, gaps = Random(f"synthetic {seed}"), gaps or Gaps()
    made = (_synthetic(f"synthetic-{n}", skills, draw, tail, gaps) for n in range(number))
    return TaskSet(tuple(made))


def _synthetic(
    task_id: str, skills: Mapping[str, float], draw: Random, tail: str, gaps: Gaps
) -> Task:
    kind = draw.choice(list(SHAPES))
    roles = [_ROLES[role] for role in SHAPES[kind]]
    difficulty = draw.gauss(0.0, 1.0)
    medians = [
        role.output_tokens * math.exp(_HARDER_IS_LONGER * difficulty) * _spread(draw, tail)
        for role in roles
    ]
    prompt = _TASK_TOKENS * math.exp(draw.gauss(0.0, _SIGMA)) + roles[0].instruction_tokens
    told = [*(role.instruction_tokens for role in roles[1:]), 0]
    gaps_s = [*(gaps.draw(task_id, stage) for stage in range(len(roles) - 1)), 0.0]
    runs: dict[str, Run] = {}
    for model, skill in skills.items():
        outputs = (tokens * math.exp(draw.gauss(0.0, _OWN_SIGMA)) for tokens in medians)
        lengths = [min(_LONGEST, max(1, round(tokens))) for tokens in outputs]
        able = NormalDist(0.0, math.hypot(1.0, _LUCK)).inv_cdf(skill)
        success = able + _LUCK * draw.gauss(0.0, 1.0) > difficulty
        stages = tuple(map(StageTruth, lengths, told, gaps_s))
        runs[model] = Run(stages, float(success))
    return Task(task_id, kind, round(prompt), runs)


def _spread(draw: Random, tail: str) -> float:
    """A factor with median 1."""
    if tail == "lognormal":
        return math.exp(draw.gauss(0.0, _SIGMA))
    return draw.paretovariate(_TAIL) / 2.0 ** (1.0 / _TAIL)
