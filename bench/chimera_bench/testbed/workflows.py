"""The workflow shapes of the paper: solver, planner→solver, planner→solver→verifier→solver.

A workflow is one conversation: every stage adds a user turn that names its job and the engine's
answer, so each stage sees all that came before and may reuse its prefix. Pure functions; no clock,
no models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from chimera_bench.testbed.tasks import Task

Message = dict[str, str]

TOOL_GAP_MEDIAN_S = 0.08
_TOOL_GAP_SIGMA = 0.6  # of the log; the mean is about 96 ms
_TOOL_GAP_MAX_S = 1.0


class Shape(msgspec.Struct, frozen=True):
    """A workflow's shape: its stages in order and each stage's bound on output tokens."""

    name: str
    stages: tuple[str, ...]
    max_tokens: tuple[int, ...]


INSTRUCTION = {
    "solve": "Solve.",
    "plan": "Plan.",
    "solve_plan": "Solve by the plan.",
    "verify": "Verify.",
    "revise": "Revise.",
}
_SHAPES = {
    "solver": Shape("solver", ("solve",), (160,)),
    "planner_solver": Shape("planner_solver", ("plan", "solve_plan"), (64, 160)),
    "planner_solver_verifier": Shape(
        "planner_solver_verifier",
        ("plan", "solve_plan", "verify", "revise"),
        (64, 160, 64, 160),
    ),
}
SHAPES: tuple[str, ...] = tuple(_SHAPES)


def shape(name: str) -> Shape:
    """The shape of that name; raises KeyError where there is none."""
    return _SHAPES[name]


def messages_for(
    stage_index: int, task: Task, shape: Shape, outputs_so_far: Sequence[str]
) -> list[Message]:
    """The OpenAI chat messages of one stage, given the outputs of all stages before it.

    Raises ValueError where the number of outputs is not the stage's number.
    """
    if len(outputs_so_far) != stage_index or stage_index >= len(shape.stages):
        have = len(outputs_so_far)
        raise ValueError(f"stage {stage_index} of {shape.name} cannot follow {have} outputs")
    messages = [_user(f"{INSTRUCTION[shape.stages[0]]} {task.prompt}")]
    for stage, output in zip(shape.stages[1:], outputs_so_far, strict=False):
        messages += [{"role": "assistant", "content": output}, _user(INSTRUCTION[stage])]
    return messages


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def tool_gap_s(task: Task, stage_index: int, seed: int = 0) -> float:
    """Seconds between the answer of stage `stage_index` and the next submission: a tool runs.

    Log-normal, and the same for the same task, stage and seed.
    """
    rng = random.Random(f"{seed}:{task.task_id}:{stage_index}")
    gap_s = TOOL_GAP_MEDIAN_S * rng.lognormvariate(0.0, _TOOL_GAP_SIGMA)
    return min(gap_s, _TOOL_GAP_MAX_S)


def final_answer(outputs: Sequence[str]) -> str:
    """The text to check: the last stage's answer."""
    return outputs[-1]


def verdict(output: str) -> bool:
    """Whether a verifier's text accepts the solution before it."""
    return "wrong" not in output
