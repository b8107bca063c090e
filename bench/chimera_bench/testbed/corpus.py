"""Training conversations: messages, and which assistant turns are worth learning from.

Half of the verifier workflows carry an injected mistake. The mistaken solution is context, never
target: a model learns to see mistakes, not to make them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec

from chimera_bench.testbed import oracle, workflows
from chimera_bench.testbed.arithmetic import TASK_LIMITS
from chimera_bench.testbed.tasks import Task, stream
from chimera_bench.testbed.workflows import Message

_SHAPE_WEIGHTS = {"solver": 0.35, "planner_solver": 0.2, "planner_solver_verifier": 0.45}
_MISTAKE_SHARE = 0.5


class Conversation(msgspec.Struct, frozen=True):
    """A whole workflow as messages; `learn[i]` says whether assistant turn i is a target."""

    messages: list[Message]
    learn: tuple[bool, ...]


def conversations(seed: int, limits: tuple[int, ...] = TASK_LIMITS) -> Iterator[Conversation]:
    """Training conversations without end, from the train split; `limits` bounds the operands."""
    rng = random.Random(f"corpus:{seed}")
    for task in stream("train", seed, limits=limits):
        name = rng.choices(list(_SHAPE_WEIGHTS), list(_SHAPE_WEIGHTS.values()))[0]
        yield conversation(task, name, rng)


def conversation(task: Task, shape_name: str, rng: random.Random) -> Conversation:
    """One workflow's conversation, with a mistake in it by chance if there is a verifier."""
    shape = workflows.shape(shape_name)
    answers = oracle.outputs(task, shape)
    learn = [True] * len(answers)
    if "verify" in shape.stages and rng.random() < _MISTAKE_SHARE:
        at = shape.stages.index("verify")
        answers[at - 1], answers[at] = oracle.spoil(task, rng)
        answers[at + 1] = oracle.solution(task)
        learn[at - 1] = False
    last = len(answers) - 1
    messages = workflows.messages_for(last, task, shape, answers[:last])
    messages.append({"role": "assistant", "content": answers[last]})
    return Conversation(messages, tuple(learn))
