"""A LangGraph agent: plan, solve, check, and solve once more if the check says no.

    python examples/langgraph_agent.py http://127.0.0.1:5700/v1

Start the system first with `chimera up`; it needs `pip install langgraph langchain-openai`.
"""

import sys
import uuid
from collections.abc import Callable
from typing import Any, TypedDict

from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openai import OpenAIError

TASKS = [
    ("Start with 7, then add 5, then multiply by 2. What is the result?", 24),
    ("Eva has 20 coins. Eva gives away 6. How many coins are there now?", 14),
    ("Start with 8, then multiply by 9, then divide by 4, then add 35. What is the result?", 53),
]


class State(TypedDict, total=False):
    task: str
    plan: str
    answer: str
    tries: int
    right: bool


class Workflow:
    """One run of the agent, as Chimera sees it: every call with this model is one of its stages."""

    def __init__(self, url: str) -> None:
        self.id = f"graph-{uuid.uuid4().hex}"
        self.model = ChatOpenAI(
            base_url=url,
            api_key="unused",
            model="auto",
            max_tokens=160,
            default_headers={"x-chimera-workflow-id": self.id, "x-chimera-kind": "math"},
        )

    def verdict(self, stage: int, right: bool) -> None:
        """Say whether a stage was right: Chimera learns from it, and it counts for the next one."""
        self._post("feedback", {"stage": stage, "verdict": right})

    def close(self, success: bool) -> None:
        """Say how it ended, which is what Chimera learns from."""
        self._post("outcome", {"success": success})

    def _post(self, what: str, body: dict[str, Any]) -> None:
        self.model.root_client.post(f"/workflows/{self.id}/{what}", body=body, cast_to=dict)


def build(workflow: Workflow, is_right: Callable[[str], bool]) -> Any:
    """The agent as a graph; ``is_right`` checks an answer, as a test suite or a compiler would."""

    def planner(state: State) -> State:
        plan = workflow.model.invoke([("user", f"Plan. {state['task']}")], temperature=0.0)
        return {"plan": plan.text, "tries": 0}

    def solver(state: State) -> State:
        messages = [
            ("user", f"Plan. {state['task']}"),
            ("assistant", state["plan"]),
            ("user", "Solve by the plan."),
        ]
        # At temperature 0 the second answer would be the first one again.
        answer = workflow.model.invoke(messages, temperature=float(state["tries"]))
        return {"answer": answer.text, "tries": state["tries"] + 1}

    def check(state: State) -> State:
        right = is_right(state["answer"])
        workflow.verdict(stage=state["tries"], right=right)
        return {"right": right}

    def what_next(state: State) -> str:
        return END if state["right"] or state["tries"] == 2 else "solver"

    graph = StateGraph(State)
    graph.add_node("planner", planner)
    graph.add_node("solver", solver)
    graph.add_node("check", check)
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "solver")
    graph.add_edge("solver", "check")
    graph.add_conditional_edges("check", what_next, ["solver", END])
    return graph.compile()


def solve(url: str, task: str, result: int) -> bool:
    """Run the agent on one task and print what the models say while they say it."""
    workflow = Workflow(url)
    agent = build(workflow, lambda text: text.endswith(f"answer {result}"))
    state: State = {}
    print(f"\n{task}", end="")
    message_id = None
    for mode, part in agent.stream({"task": task}, stream_mode=["messages", "values"]):
        if mode == "values":
            state = part
            continue
        token, about = part
        if isinstance(token, AIMessageChunk):
            if token.id != message_id:
                message_id = token.id
                print(f"\n  {about['langgraph_node']}: ", end="")
            print(token.text.replace("\n", ", "), end="", flush=True)
    workflow.close(success=state["right"])
    print(f"\n  {'right' if state['right'] else 'wrong'} after {state['tries']} of 2 tries")
    return state["right"]


def main(url: str) -> None:
    right = sum(solve(url, task, result) for task, result in TASKS)
    print(f"\n{right} of {len(TASKS)} right")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:5700/v1"
    try:
        main(url)
    except OpenAIError as error:
        sys.exit(f"{url}: {error}")
