"""Math problems: a start value and a chain of exact integer operations, put into words.

Owns the vocabulary, the generator, the wording and the equations. Values stay within
(0, MAX_VALUE] at every step, so each step alone is easy and the chain's length is what is hard.
"""

from __future__ import annotations

import random

from chimera_bench.testbed.steps import Step

MAX_VALUE = 99
# Largest operand of + and - by difficulty 1..6, so that size shows as well as count.
TASK_LIMITS = (9, 9, 9, 20, 20, 20)
# What models see first in training: sums beyond the tasks', so that the tasks' own come easier.
WIDE_LIMITS = (9, 9, 30, 30, 60, 60)
SYMBOL = {"add": "+", "sub": "-", "mul": "*", "div": "/"}

_PLAIN = {
    "add": ("add {k}", "increase it by {k}", "plus {k}"),
    "sub": ("subtract {k}", "decrease it by {k}", "take away {k}"),
    "mul": ("multiply by {k}", "make it {k} times as large"),
    "div": ("divide by {k}", "split it into {k} equal parts and keep one"),
}
_STORY = {
    "add": ("{who} buys {k} more.", "{who} finds {k} more.", "A friend brings {k} more."),
    "sub": ("{who} gives away {k}.", "{who} loses {k}.", "A friend takes {k}."),
    "mul": ("The pile grows to {k} times its size.", "Then there are {k} times as many."),
    "div": ("{who} makes {k} equal shares and keeps one.", "Only one of {k} equal parts is left."),
}
_DISTRACTORS = (
    "It is {k} degrees outside.",
    "A shop nearby has {k} chairs.",
    "{who} is {k} years old.",
)
_NAMES = ("Ann", "Bob", "Eva", "Tom", "Mia", "Sam")
_THINGS = ("apples", "books", "coins", "cards", "stones", "shells")


def apply(step: Step, value: int) -> int:
    """Value after one step; a division is exact or floors (a wrong start may make it inexact)."""
    if step.op == "add":
        return value + step.arg
    if step.op == "sub":
        return value - step.arg
    if step.op == "mul":
        return value * step.arg
    return value // step.arg


def trace(start: int, steps: tuple[Step, ...]) -> list[int]:
    """The value after each step."""
    values = []
    for step in steps:
        start = apply(step, start)
        values.append(start)
    return values


def _draw_step(rng: random.Random, value: int, limit: int) -> Step:
    """One step that keeps the value within bounds."""
    while True:
        op = rng.choice(("add", "add", "sub", "sub", "mul", "div"))
        step = Step(op, rng.randint(2, {"mul": 9, "div": 5}.get(op, limit)))
        if op == "div" and value % step.arg:
            continue
        if 0 < apply(step, value) <= MAX_VALUE:
            return step


def drill(
    rng: random.Random, count: int, limits: tuple[int, ...] = TASK_LIMITS
) -> list[tuple[str, str]]:
    """`count` single equations, each cut behind its equals sign: (`47+35=`, `82`)."""
    rows = []
    for _ in range(count):
        value = rng.randint(1, MAX_VALUE)
        step = _draw_step(rng, value, rng.choice((limits[0], limits[3], limits[5], limits[5])))
        text = equation(step, value)
        left, _, result = text.partition("=")
        rows.append((f"{left}=", result))
    return rows


def draw(
    rng: random.Random, difficulty: int, limits: tuple[int, ...] = TASK_LIMITS
) -> tuple[int, tuple[Step, ...]]:
    """A start value and `difficulty` steps."""
    limit = limits[difficulty - 1]
    start = rng.randint(2, limit)
    value, steps = start, []
    for _ in range(difficulty):
        steps.append(_draw_step(rng, value, limit))
        value = apply(steps[-1], value)
    return start, tuple(steps)


def phrase(step: Step) -> str:
    """The step as a plan says it, for example `add 35`."""
    return f"{step.op} {step.arg}"


def equation(step: Step, value: int) -> str:
    """The step worked out from `value`, for example `47+35=82`."""
    return f"{value}{SYMBOL[step.op]}{step.arg}={apply(step, value)}"


def _plain(rng: random.Random, start: int, steps: tuple[Step, ...]) -> str:
    parts = [rng.choice(_PLAIN[s.op]).format(k=s.arg) for s in steps]
    return f"Start with {start}, then " + ", then ".join(parts) + ". What is the result?"


def _story(rng: random.Random, start: int, steps: tuple[Step, ...], difficulty: int) -> str:
    who, things = rng.choice(_NAMES), rng.choice(_THINGS)
    parts = [rng.choice(_STORY[s.op]).format(k=s.arg, who=who) for s in steps]
    if difficulty >= 3 and rng.random() < 0.5:
        noise = rng.choice(_DISTRACTORS).format(k=rng.randint(2, 99), who=rng.choice(_NAMES))
        parts.insert(rng.randint(0, len(parts) - 1), noise)
    return f"{who} has {start} {things}. " + " ".join(parts) + f" How many {things} are there now?"


def _formula(start: int, steps: tuple[Step, ...]) -> str:
    text = str(start)
    for i, step in enumerate(steps):
        text = f"{text}{SYMBOL[step.op]}{step.arg}"
        text = f"({text})" if i < len(steps) - 1 else text
    return f"Compute {text}."


def word(rng: random.Random, start: int, steps: tuple[Step, ...], difficulty: int) -> str:
    """The problem in words, in one of three styles."""
    style = rng.random()
    if style < 0.4:
        return _plain(rng, start, steps)
    if style < 0.8:
        return _story(rng, start, steps, difficulty)
    return _formula(start, steps)
