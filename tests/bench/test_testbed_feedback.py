"""What a client may say of an answer: from the answer alone, and never that a solution is right."""

import pytest

from chimera_bench.testbed import feedback, oracle, tasks, workflows

VERIFIED = workflows.shape("planner_solver_verifier")


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_perfect_answers_are_never_blamed(kind: tasks.Kind) -> None:
    for task in tasks.generate("validation", 150, seed=5, kinds=[kind]):
        outputs = oracle.outputs(task, VERIFIED)
        said = [feedback.verdicts(kind, VERIFIED, outputs[: n + 1]) for n in range(4)]
        assert said == [[], [], [(1, True)], []]


@pytest.mark.parametrize(
    ("kind", "solution", "plausible"),
    [
        ("math", "3+4=7\n7*2=14\nanswer 14", True),
        ("math", "3+4=8\n8*2=16\nanswer 16", False),  # the sum
        ("math", "3+4=7\n9*2=18\nanswer 18", False),  # does not go on from there
        ("math", "3+4=7\nanswer 8", False),
        ("math", "15/5=3\nanswer 3", True),
        ("math", "15/4=3\nanswer 3", False),
        ("math", "answer 3", True),  # nothing to check
        ("math", "", False),
        ("code", "return sum(xs[2:])", True),  # of whatever was asked: nobody knows
        ("code", "return sum(xs[2:]", False),
        ("code", "sum(xs)", False),
        ("code", "return max([x for x in xs if x>99])", False),  # fails on the sample
    ],
)
def test_plausible(kind: str, solution: str, plausible: bool) -> None:
    assert feedback.plausible(kind, solution) is plausible


def test_a_verifier_is_believed_only_where_nothing_is_known() -> None:
    right, broken = "3+4=7\nanswer 7", "3+4=9\nanswer 9"
    assert feedback.verdicts("math", VERIFIED, ["p", right, "1 wrong: 3+4=8"]) == [(1, False)]
    assert feedback.verdicts("math", VERIFIED, ["p", broken]) == [(1, False)]
    assert feedback.verdicts("math", VERIFIED, ["p", broken, "1 ok, ok"]) == []
