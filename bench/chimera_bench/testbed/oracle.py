"""What a perfect model would answer at each stage, and solutions with one injected mistake.

Training text comes from here; nothing of it is ever shown to an engine. A mistake is carried
through the rest of the solution, as a model's own mistake would be.
"""

from __future__ import annotations

import random

from chimera_bench.testbed import arithmetic, listcode
from chimera_bench.testbed.steps import Step
from chimera_bench.testbed.tasks import Task
from chimera_bench.testbed.workflows import Shape


def outputs(task: Task, shape: Shape) -> list[str]:
    """The right answer of every stage of a workflow without mistakes."""
    by_stage = {
        "solve": solution(task),
        "plan": plan(task),
        "solve_plan": solution(task),
        "verify": acceptance(task),
        "revise": confirmation(task),
    }
    return [by_stage[stage] for stage in shape.stages]


def plan(task: Task) -> str:
    """The steps in the order they are run, in the plan's short words."""
    phrase = arithmetic.phrase if task.kind == "math" else listcode.phrase
    head = [f"start {task.start}"] if task.kind == "math" else []
    return ", ".join(head + [phrase(step) for step in task.steps])


def solution(task: Task) -> str:
    """The worked solution: equations and an answer, or the program."""
    if task.kind == "code":
        return f"return {listcode.program(task.steps)}"
    lines, value = [], task.start
    for step in task.steps:
        lines.append(arithmetic.equation(step, value))
        value = arithmetic.apply(step, value)
    return "\n".join([*lines, f"answer {value}"])


def acceptance(task: Task) -> str:
    """A verifier's text for a right solution: each step ticked, then `ok`."""
    return " ".join([*(f"{i + 1} ok," for i in range(len(task.steps))), "ok"])


def rejection(step_index: int, correction: str) -> str:
    """A verifier's text that accepts the steps before `step_index` and corrects that one."""
    return " ".join([*(f"{i + 1} ok," for i in range(step_index)), _wrong(step_index, correction)])


def _wrong(step_index: int, correction: str) -> str:
    return f"{step_index + 1} wrong: {correction}"


def confirmation(task: Task) -> str:
    """The last solver's text after an `ok`: short for math, the program again for code."""
    return f"answer {task.answer}" if task.kind == "math" else solution(task)


def spoil(task: Task, rng: random.Random) -> tuple[str, str]:
    """A solution with one mistake, and the verifier's text about it."""
    return _spoil_math(task, rng) if task.kind == "math" else _spoil_code(task, rng)


def _spoil_math(task: Task, rng: random.Random) -> tuple[str, str]:
    at = rng.randrange(len(task.steps))
    lines, value = [], task.start
    correction = ""
    for i, step in enumerate(task.steps):
        right = arithmetic.equation(step, value)
        result = arithmetic.apply(step, value)
        if i == at:
            correction = right
            wrong_step, result = _math_mistake(step, value, rng)
            right = f"{value}{arithmetic.SYMBOL[wrong_step.op]}{wrong_step.arg}={result}"
        lines.append(right)
        value = result
    return "\n".join([*lines, f"answer {value}"]), rejection(at, correction)


def _math_mistake(step: Step, value: int, rng: random.Random) -> tuple[Step, int]:
    """A wrong digit in the result (mostly), or a misread operation."""
    if rng.random() < 0.75:
        return step, _wrong_number(arithmetic.apply(step, value), rng)
    other = Step(step.op, max(1, step.arg + rng.choice((-10, -2, -1, 1, 2, 10))))
    if step.op in ("add", "sub") and rng.random() < 0.5:
        other = Step("sub" if step.op == "add" else "add", step.arg)
    result = max(0, arithmetic.apply(other, value))
    if other == step or result == arithmetic.apply(step, value):
        return step, _wrong_number(arithmetic.apply(step, value), rng)
    return other, result


def _wrong_number(value: int, rng: random.Random) -> int:
    """A near miss: one digit off, as a slip of carrying makes it."""
    wrong = value + rng.choice((-100, -10, -10, -2, -1, -1, 1, 1, 2, 10, 10, 100))
    return wrong if wrong >= 0 else value + rng.randint(1, 9)


def _spoil_code(task: Task, rng: random.Random) -> tuple[str, str]:
    steps = list(task.steps)
    choice = rng.random()
    at = rng.randrange(len(steps))
    if choice < 0.25 and len(steps) > 2:
        at = min(at, len(steps) - 2)
        del steps[at]
    elif choice < 0.5 and len(steps) > 2:
        at = rng.randrange(len(steps) - 2)
        steps[at : at + 2] = [steps[at + 1], steps[at]]
    else:
        steps[at] = _other_step(steps[at], rng)
    text = f"return {listcode.program(tuple(steps))}"
    return text, rejection(at, listcode.phrase(task.steps[at]))


def _other_step(step: Step, rng: random.Random) -> Step:
    """A different step that could stand at the same place."""
    reducing = step.op in listcode.REDUCERS
    pool = listcode.REDUCERS if reducing else listcode.LIST_OPS
    while True:
        other = listcode.with_argument(rng.choice(pool), rng)
        if rng.random() < 0.3 and step.arg:
            other = listcode.with_argument(step.op, rng)
        if other != step:
            return other
