"""A LangGraph agent, the one of the examples, on the testbed's tasks with their exact checks."""

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from chimera_bench.testbed import tasks
from tests.clients.testbed import ROOT, Testbed

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("langgraph")
    pytest.importorskip("langchain_openai")
    spec = importlib.util.spec_from_file_location("agent", ROOT / "examples/langgraph_agent.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_run_is_one_workflow_with_its_kind(testbed: Testbed, example: ModuleType) -> None:
    before = testbed.workflows()
    for task in tasks.generate("demo", 4, kinds=("math",), difficulties=(1, 2, 3)):
        workflow = example.Workflow(testbed.url)
        agent = example.build(workflow, lambda text, task=task: tasks.check(task, text))
        state = agent.invoke({"task": task.prompt})
        assert testbed.workflows() == before + 1
        workflow.close(success=state["right"])
        assert testbed.workflows() == before

        assert state["plan"].startswith("start ")
        assert "answer " in state["answer"]
        assert state["right"] == tasks.check(task, state["answer"])
        (trace,) = testbed.traces(workflow.id)
        assert trace.kind == "math"
        assert trace.success == float(state["right"])
        assert len(trace.stages) == 1 + state["tries"]
        assert trace.stages[-1].verdict == float(state["right"])
        assert task.prompt in (trace.stages[0].prompt_text or "")


def test_it_goes_back_once_and_streams_every_answer(testbed: Testbed, example: ModuleType) -> None:
    workflow = example.Workflow(testbed.url)
    verdicts = iter((False, True))
    agent = example.build(workflow, lambda text: next(verdicts))
    said: dict[str, str] = {}
    pieces, state = 0, {}
    task = "Start with 7, then add 5. What is the result?"
    for mode, part in agent.stream({"task": task}, stream_mode=["messages", "values"]):
        if mode == "values":
            state = part
        elif isinstance(part[0], example.AIMessageChunk):
            said[part[0].id] = said.get(part[0].id, "") + part[0].text
            pieces += bool(part[0].text)
    assert (state["tries"], state["right"]) == (2, True)
    plan, _, answer = said.values()
    assert (plan, answer) == (state["plan"], state["answer"])
    assert pieces > 3 * len(said)
    workflow.close(success=True)
    (trace,) = testbed.traces(workflow.id)
    assert [stage.verdict for stage in trace.stages] == [None, 0.0, 1.0]
    assert trace.success == 1.0


def test_it_never_goes_back_twice(testbed: Testbed, example: ModuleType) -> None:
    workflow = example.Workflow(testbed.url)
    asked: list[Any] = []
    agent = example.build(workflow, lambda text: bool(asked.append(text)))
    state = agent.invoke({"task": "Start with 7, then add 5. What is the result?"})
    assert (state["tries"], state["right"], len(asked)) == (2, False, 2)
    workflow.close(success=False)
    assert testbed.traces(workflow.id)[0].success == 0.0
