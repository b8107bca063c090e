"""Workflow shapes: stages, growing conversations, gaps, verdicts."""

from __future__ import annotations

import random
import statistics

import pytest

from chimera_bench.testbed import corpus, oracle, workflows
from chimera_bench.testbed.tasks import check, generate

TASKS = generate("validation", 60, seed=11)


def test_shapes_are_the_papers():
    assert [len(workflows.shape(name).stages) for name in workflows.SHAPES] == [1, 2, 4]
    for name in workflows.SHAPES:
        form = workflows.shape(name)
        assert form.name == name
        assert len(form.max_tokens) == len(form.stages)
    with pytest.raises(KeyError):
        workflows.shape("unknown")


@pytest.mark.parametrize("name", workflows.SHAPES)
def test_every_stage_extends_the_conversation_before_it(name):
    form = workflows.shape(name)
    for task in TASKS[:10]:
        outputs = oracle.outputs(task, form)
        before: list[dict[str, str]] = []
        for i in range(len(form.stages)):
            messages = workflows.messages_for(i, task, form, outputs[:i])
            assert messages[: len(before)] == before
            assert messages[-1]["role"] == "user"
            assert [m["content"] for m in messages if m["role"] == "assistant"] == outputs[:i]
            assert task.prompt in messages[0]["content"]
            before = messages


def test_a_stage_needs_all_outputs_before_it():
    form = workflows.shape("planner_solver")
    with pytest.raises(ValueError, match="stage 1"):
        workflows.messages_for(1, TASKS[0], form, [])
    with pytest.raises(ValueError, match="stage 2"):
        workflows.messages_for(2, TASKS[0], form, ["a", "b"])


@pytest.mark.parametrize("name", workflows.SHAPES)
def test_oracle_workflows_pass(name):
    form = workflows.shape(name)
    for task in TASKS:
        outputs = oracle.outputs(task, form)
        assert check(task, workflows.final_answer(outputs))
        if "verify" in form.stages:
            assert workflows.verdict(outputs[form.stages.index("verify")])


def test_tool_gaps_are_seeded_bounded_and_about_100_ms():
    gaps = [workflows.tool_gap_s(t, i, seed=2) for t in generate("demo", 300) for i in range(3)]
    again = [workflows.tool_gap_s(t, i, seed=2) for t in generate("demo", 300) for i in range(3)]
    assert gaps == again
    assert all(0 < gap <= 1.0 for gap in gaps)
    assert 0.05 < statistics.mean(gaps) < 0.15


def test_training_conversations_never_teach_a_mistake():
    rng = random.Random(3)
    mistakes = 0
    for task in generate("train", 100, seed=9):
        talk = corpus.conversation(task, "planner_solver_verifier", rng)
        answers = [m["content"] for m in talk.messages if m["role"] == "assistant"]
        assert len(answers) == len(talk.learn) == 4
        assert check(task, answers[3])
        mistakes += not talk.learn[1]
        assert talk.learn[1] == workflows.verdict(answers[2])
        if talk.learn[1]:
            assert check(task, answers[1])
    assert 30 < mistakes < 70
