"""What a client can say about an answer between two stages, from the answer alone.

A program that does not run, a sum that a calculator finds wrong, a verifier's word. Never sees a
task's truth: the hidden cases and the right number belong to `tasks.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from chimera_bench.testbed import workflows
from chimera_bench.testbed.safe_eval import EvalError, evaluate
from chimera_bench.testbed.workflows import Shape

# Long enough for every slice that a prompt may ask for.
_SAMPLE = (7, 42, 3, 28, 15, 36, 9, 50, 21, 14, 33, 6, 47, 12)
_EQUATION = re.compile(r"(\d{1,6})([-+*/])(\d{1,6})=(\d{1,9})")
_ANSWER = re.compile(r"answer (-?[0-9]{1,12})")
_SOLVERS = frozenset({"solve", "solve_plan", "revise"})


def verdicts(kind: str, shape: Shape, outputs: Sequence[str]) -> list[tuple[int, bool]]:
    """(stage, right?) of what the last of ``outputs`` tells; empty where it tells nothing.

    A solution that cannot be right is False; one that can is not judged, since nobody knows yet.
    A verifier judges the solution before it, unless that was found wrong already.
    """
    number = len(outputs) - 1
    stage = shape.stages[number]
    if stage in _SOLVERS:
        return [] if plausible(kind, outputs[number]) else [(number, False)]
    if stage == "verify" and plausible(kind, outputs[number - 1]):
        return [(number - 1, workflows.verdict(outputs[number]))]
    return []


def plausible(kind: str, solution: str) -> bool:
    """Whether a solution stands the checks that need no truth: it runs, or its sums are right."""
    return _runs(solution) if kind == "code" else _adds_up(solution)


def _runs(solution: str) -> bool:
    _, mark, expression = solution.rpartition("return ")
    if not mark:
        return False
    try:
        evaluate(expression.strip(), _SAMPLE)
    except EvalError:
        return False
    return True


def _adds_up(solution: str) -> bool:
    """Equations, if any, hold and go on from each other, and the answer is the last result."""
    answers = _ANSWER.findall(solution)
    value: int | None = None
    for left, symbol, right, result in _EQUATION.findall(solution):
        start, reached = int(left), int(result)
        if value not in (None, start) or not _holds(start, symbol, int(right), reached):
            return False
        value = reached
    return bool(answers) and value in (None, int(answers[-1]))


def _holds(a: int, symbol: str, b: int, result: int) -> bool:
    match symbol:
        case "+":
            return a + b == result
        case "-":
            return a - b == result
        case "*":
            return a * b == result
        case _:
            return a == b * result
