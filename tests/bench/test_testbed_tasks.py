"""Tasks: seeded, disjoint splits, exact checks that no text can hang, crash or fool."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_bench.testbed import arithmetic, listcode, oracle
from chimera_bench.testbed.safe_eval import MAX_CHARS, EvalError, evaluate
from chimera_bench.testbed.tasks import DIFFICULTIES, Kind, canonical, check, generate, split_of

TASKS = generate("validation", 200, seed=7)
MATH = next(t for t in TASKS if t.kind == "math")
CODE = next(t for t in TASKS if t.kind == "code")
CODE_LETTERS = "xs[]()+-*%<>=!:, 0123456789forinifsumlenmaxminsorted"


def test_same_seed_gives_the_same_tasks_and_another_seed_others():
    assert generate("demo", 50, seed=3) == generate("demo", 50, seed=3)
    assert generate("demo", 50, seed=3) != generate("demo", 50, seed=4)


def test_a_longer_draw_begins_with_the_shorter_one():
    assert generate("train", 60, seed=1)[:20] == generate("train", 20, seed=1)


def test_splits_share_no_problem():
    seen = {
        split: {canonical(t) for t in generate(split, 400, seed=5)}
        for split in ("train", "validation", "demo")
    }
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["demo"]
    assert not seen["validation"] & seen["demo"]


def test_split_does_not_depend_on_the_wording():
    reworded = msgspec.structs.replace(MATH, prompt="other words", task_id="other")
    assert split_of(reworded) == split_of(MATH)


def test_difficulty_is_the_number_of_steps_and_shows_in_the_prompt():
    steps: tuple[tuple[Kind, int], ...] = (("math", 0), ("code", 1))
    for kind, extra in steps:
        lengths = []
        for difficulty in DIFFICULTIES:
            tasks = generate("validation", 40, 2, (kind,), (difficulty,))
            assert {len(t.steps) for t in tasks} == {difficulty + extra}
            lengths.append(sum(len(t.prompt) for t in tasks) / len(tasks))
        assert lengths == sorted(lengths)


def test_the_prompt_holds_no_truth_that_the_checker_holds():
    for task in TASKS:
        assert "answer" not in task.prompt
        assert "return sum(" not in task.prompt


def test_tasks_survive_a_json_round_trip():
    decoder = msgspec.json.Decoder(type(MATH))
    for task in TASKS[:20]:
        assert decoder.decode(msgspec.json.encode(task)) == task


def test_oracle_solutions_pass():
    for task in TASKS:
        assert check(task, oracle.solution(task))
        assert check(task, oracle.confirmation(task))


def test_injected_math_mistakes_are_mostly_wrong_and_name_the_first_bad_step():
    rng = random.Random(0)
    tasks = [t for t in TASKS if t.kind == "math"]
    wrong = 0
    for task in tasks:
        text, note = oracle.spoil(task, rng)
        assert "wrong: " in note
        assert text != oracle.solution(task)
        wrong += not check(task, text)
    assert wrong > 0.9 * len(tasks)


def test_code_answers_that_differ_in_meaning_fail_and_in_form_pass():
    task = msgspec.structs.replace(
        CODE, cases=tuple(msgspec.structs.replace(c, expected=sum(c.xs)) for c in CODE.cases)
    )
    assert check(task, "return sum(xs)")
    assert check(task, "thinking\nreturn sum([x for x in xs][::-1])")
    assert not check(task, "return sum(xs[1:])")
    assert not check(task, "return len(xs)")
    assert not check(task, "sum(xs)")


def test_no_constant_passes_a_code_task():
    for task in (t for t in TASKS if t.kind == "code"):
        assert not any(check(task, f"return {case.expected}") for case in task.cases)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("answer {a}", True),
        ("1+1=2\nanswer {a}", True),
        ("answer 1234567\nanswer {a}", True),
        ("answer {a}\nanswer 1234567", False),
        ("answer {a}0", False),
        ("{a}", False),
        ("", False),
        ("answer", False),
        ("answer " + "9" * 4000, False),
        ("answer {a}" + " " * 5000, False),
    ],
)
def test_math_check_reads_the_last_answer_exactly(text, passes):
    assert check(MATH, text.format(a=MATH.answer)) is passes


@given(st.text(max_size=200))
def test_garbage_is_wrong_and_harmless(text):
    assert check(CODE, text) is False
    assert check(CODE, "return " + text) is False
    assert check(MATH, text) is False


@given(st.text(alphabet=CODE_LETTERS, max_size=120))
def test_garbage_in_the_languages_own_letters_raises_only_eval_errors(text):
    try:
        value = evaluate(text, (1, 2, 3))
    except EvalError:
        return
    assert isinstance(value, int | list)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "xs.__class__",
        "(lambda: 1)()",
        "open(xs)",
        "sum(xs, xs)",
        "sum(*xs)",
        "[x for x in xs for x in xs]",
        "[xs for x in xs]",
        "9**9**9",
        "sum(xs)*" * 20 + "999999999",
        "999999999*999999999",
        "(" * 400 + ")" * 400,
        "-" * 500 + "1",
        "xs+xs",
        "xs*999999",
        "xs[::0]",
        "xs[99]",
        "1%0",
        "max([x for x in xs if x>99])",
        "x",
        "1if 1else 2",
        "True",
        "1.5",
        "xs[0]and 1",
        "sum([sum([sum([sum(xs) for x in xs]) for x in xs]) for x in xs])",
        "x" * (MAX_CHARS + 1),
        "\x00",
        "１",
        "",
    ],
)
def test_hostile_expressions_are_refused(text):
    items = tuple(range(100)) if text.startswith("sum([sum") else (1, 2, 3)
    with pytest.raises(EvalError):
        evaluate(text, items)


def test_evaluator_agrees_with_python_on_reference_programs():
    rng = random.Random(1)
    for _ in range(200):
        steps, cases = listcode.draw(rng, rng.randint(1, 6))
        text = listcode.program(steps)
        for xs, expected in cases:
            assert eval(text, {"__builtins__": {}}, _python_names(xs)) == expected  # noqa: S307


def _python_names(xs):
    return {
        "xs": list(xs),
        "sum": sum,
        "len": len,
        "max": max,
        "min": min,
        "sorted": sorted,
    }


def test_arithmetic_stays_within_bounds():
    for task in (t for t in TASKS if t.kind == "math"):
        values = arithmetic.trace(task.start, task.steps)
        assert all(0 < v <= arithmetic.MAX_VALUE for v in values)
        assert values[-1] == task.answer
