"""Seeded tasks of two kinds with exact checks. The one place that knows a task's truth.

A task's split is a hash of its canonical problem (wording left out), so the splits are disjoint by
construction. Standard library and msgspec only: clients and simulators import this without torch.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from chimera_bench.testbed import arithmetic, listcode
from chimera_bench.testbed.safe_eval import EvalError, evaluate
from chimera_bench.testbed.steps import Step

Kind = Literal["math", "code"]
Split = Literal["train", "validation", "demo"]

KINDS: tuple[Kind, ...] = ("math", "code")
DIFFICULTIES = (1, 2, 3, 4, 5, 6)
_VALIDATION_SHARE = 10  # percent of the problems
_DEMO_SHARE = 15
_MAX_ANSWER_CHARS = 4096
_ANSWER = re.compile(r"answer (-?[0-9]{1,12})(?![0-9])")


class Case(msgspec.Struct, frozen=True):
    """One hidden test of a code task: the list given and the integer expected."""

    xs: tuple[int, ...]
    expected: int


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One problem. Only `prompt` (and `kind`) may be shown to models, engines or predictors."""

    task_id: str
    kind: Kind
    difficulty: int
    prompt: str
    start: int = 0
    steps: tuple[Step, ...]
    answer: int | None = None
    cases: tuple[Case, ...] = ()


def generate(
    split: Split,
    count: int,
    seed: int = 0,
    kinds: Sequence[Kind] = KINDS,
    difficulties: Sequence[int] = DIFFICULTIES,
) -> list[Task]:
    """`count` tasks of a split, kinds and difficulties uniform; the same for the same seed."""
    tasks = stream(split, seed, kinds, difficulties)
    return [next(tasks) for _ in range(count)]


def stream(
    split: Split,
    seed: int = 0,
    kinds: Sequence[Kind] = KINDS,
    difficulties: Sequence[int] = DIFFICULTIES,
    limits: tuple[int, ...] = arithmetic.TASK_LIMITS,
) -> Iterator[Task]:
    """Tasks of a split without end; `generate` takes from the front of this stream.

    `limits` bounds the operands of math tasks; only training passes other than the tasks' own.
    """
    rng = random.Random(f"{split}:{seed}")
    number = 0
    while True:
        kind, difficulty = rng.choice(kinds), rng.choice(difficulties)
        task = _draw(rng, kind, difficulty, limits, f"{split}-{seed}-{number}")
        if split_of(task) == split:
            number += 1
            yield task


def _draw(
    rng: random.Random, kind: Kind, difficulty: int, limits: tuple[int, ...], task_id: str
) -> Task:
    if kind == "math":
        start, steps = arithmetic.draw(rng, difficulty, limits)
        return Task(
            task_id=task_id,
            kind=kind,
            difficulty=difficulty,
            prompt=arithmetic.word(rng, start, steps, difficulty),
            start=start,
            steps=steps,
            answer=arithmetic.trace(start, steps)[-1],
        )
    steps, cases = listcode.draw(rng, difficulty)
    return Task(
        task_id=task_id,
        kind=kind,
        difficulty=difficulty,
        prompt=listcode.word(rng, steps, difficulty),
        steps=steps,
        cases=tuple(Case(xs, expected) for xs, expected in cases),
    )


def canonical(task: Task) -> str:
    """The problem without its wording: equal for two tasks exactly when they ask the same thing."""
    chain = " ".join(f"{step.op}{step.arg}" for step in task.steps)
    return f"{task.kind} {task.start} {chain}"


def split_of(task: Task) -> Split:
    """The split a problem belongs to, whatever its wording or seed."""
    digest = hashlib.blake2b(canonical(task).encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 100
    if bucket < _VALIDATION_SHARE:
        return "validation"
    return "demo" if bucket < _VALIDATION_SHARE + _DEMO_SHARE else "train"


def check(task: Task, text: str) -> bool:
    """Whether `text` solves the task: exact for math, all hidden cases pass for code.

    Any text is safe to pass; what is not an answer is False.
    """
    if len(text) > _MAX_ANSWER_CHARS:
        return False
    return _check_math(task, text) if task.kind == "math" else _check_code(task, text)


def _check_math(task: Task, text: str) -> bool:
    """The last `answer N` of the text counts."""
    found = _ANSWER.findall(text)
    return bool(found) and int(found[-1]) == task.answer


def _check_code(task: Task, text: str) -> bool:
    """What follows the last `return ` counts, and must be an expression that passes every case."""
    _, mark, expression = text.rpartition("return ")
    if not mark:
        return False
    try:
        return all(_same(evaluate(expression.strip(), c.xs), c.expected) for c in task.cases)
    except EvalError:
        return False


def _same(value: object, expected: int) -> bool:
    return type(value) is int and value == expected
