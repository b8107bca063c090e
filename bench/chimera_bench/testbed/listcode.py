"""Code problems: a pipeline over a list of integers in words, to be written as a Python expression.

Owns the vocabulary, the generator, the wording and the reference program. That program nests the
steps inside out, so a writer must reverse and bracket them: the longer the pipeline, the harder.
"""

from __future__ import annotations

import random

from chimera_bench.testbed.safe_eval import EvalError, evaluate
from chimera_bench.testbed.steps import Step

_CODE = {
    "even": "[x for x in {e} if x%2==0]",
    "odd": "[x for x in {e} if x%2==1]",
    "above": "[x for x in {e} if x>{k}]",
    "below": "[x for x in {e} if x<{k}]",
    "plus": "[x+{k} for x in {e}]",
    "minus": "[x-{k} for x in {e}]",
    "times": "[x*{k} for x in {e}]",
    "reverse": "{e}[::-1]",
    "sort": "sorted({e})",
    "first": "{e}[:{k}]",
    "skip": "{e}[{k}:]",
    "last": "{e}[-{k}:]",
    "cut": "{e}[:-{k}]",
    "sum": "sum({e})",
    "max": "max({e})",
    "min": "min({e})",
    "count": "len({e})",
}
_WORDS = {
    "even": ("keep the even items", "drop the odd items"),
    "odd": ("keep the odd items", "drop the even items"),
    "above": ("keep the items above {k}", "keep the items greater than {k}"),
    "below": ("keep the items below {k}", "keep the items less than {k}"),
    "plus": ("add {k} to each item", "raise each item by {k}"),
    "minus": ("subtract {k} from each item", "lower each item by {k}"),
    "times": ("multiply each item by {k}", "scale each item by {k}"),
    "reverse": ("reverse the list", "turn the list around"),
    "sort": ("sort the list", "put the items in order"),
    "first": ("keep the first {k} items", "take {k} items from the start"),
    "skip": ("drop the first {k} items", "skip {k} items at the start"),
    "last": ("keep the last {k} items", "take {k} items from the end"),
    "cut": ("drop the last {k} items", "skip {k} items at the end"),
    "sum": ("the sum", "the total"),
    "max": ("the largest item", "the maximum"),
    "min": ("the smallest item", "the minimum"),
    "count": ("the number of items", "how many items are left"),
}
REDUCERS = ("sum", "sum", "max", "min", "count")
LIST_OPS = tuple(op for op in _CODE if op not in REDUCERS)
_ARG_RANGE = {
    "above": (2, 20),
    "below": (25, 60),
    "plus": (2, 20),
    "minus": (2, 20),
    "times": (2, 9),
    "first": (2, 6),
    "skip": (1, 4),
    "last": (2, 6),
    "cut": (1, 4),
}
_CASES = 6


def with_argument(op: str, rng: random.Random) -> Step:
    """The operation with an argument drawn from its range."""
    low_high = _ARG_RANGE.get(op)
    return Step(op, rng.randint(*low_high)) if low_high else Step(op)


def program(steps: tuple[Step, ...]) -> str:
    """The reference program: the steps nested inside out around `xs`."""
    text = "xs"
    for step in steps:
        text = _CODE[step.op].format(e=text, k=step.arg)
    return text


def phrase(step: Step) -> str:
    """The step as a plan says it, for example `times 3`."""
    return f"{step.op} {step.arg}" if step.op in _ARG_RANGE else step.op


def run_cases(steps: tuple[Step, ...], inputs: list[tuple[int, ...]]) -> list[int] | None:
    """The reference program's outputs, or None where it fails (an empty list has no maximum)."""
    text = program(steps)
    try:
        results = [evaluate(text, xs) for xs in inputs]
    except EvalError:
        return None
    return [r for r in results if isinstance(r, int)]


def _draw_steps(rng: random.Random, difficulty: int) -> tuple[Step, ...]:
    steps: list[Step] = []
    while len(steps) < difficulty:
        step = with_argument(rng.choice(LIST_OPS), rng)
        if not steps or steps[-1].op != step.op:
            steps.append(step)
    return (*steps, Step(rng.choice(REDUCERS)))


def draw(
    rng: random.Random, difficulty: int
) -> tuple[tuple[Step, ...], list[tuple[tuple[int, ...], int]]]:
    """`difficulty` list steps, one reducing step, and hidden (input, output) cases.

    Drawn again until the outputs differ enough that no constant passes.
    """
    while True:
        steps = _draw_steps(rng, difficulty)
        inputs = [
            tuple(rng.randint(0, 50) for _ in range(rng.randint(9, 14))) for _ in range(_CASES)
        ]
        outputs = run_cases(steps, inputs)
        if outputs is not None and len(set(outputs)) >= 3:
            return steps, list(zip(inputs, outputs, strict=True))


def word(rng: random.Random, steps: tuple[Step, ...], difficulty: int) -> str:
    """The pipeline in words; from difficulty 3 on, sometimes with two steps told out of order."""
    parts = [rng.choice(_WORDS[s.op]).format(k=s.arg) for s in steps[:-1]]
    if difficulty >= 3 and rng.random() < 0.4:
        i = rng.randrange(len(parts) - 1)
        parts[i : i + 2] = [f"{parts[i + 1]} but before that {parts[i]}"]
    goal = rng.choice(_WORDS[steps[-1].op])
    return "Given the list xs, " + ", then ".join(parts) + f", and return {goal}."
