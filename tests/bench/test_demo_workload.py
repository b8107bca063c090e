"""The demo's workload: the same for the same seed, and every ending written down."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from chimera_bench import workload
from chimera_bench.testbed import tasks, workflows
from chimera_daemon.client import ChimeraError, Client, EngineLost, Reply, RequestTimeout, Usage
from chimera_daemon.messages import Receipt


class FakeWorkflow:
    def __init__(self, owner: "FakeClient", kind: str) -> None:
        self.owner, self.kind, self.stage = owner, kind, 0

    async def __aenter__(self) -> "FakeWorkflow":
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def generate(self, messages: list[dict[str, str]], **options: Any) -> Reply:
        await asyncio.sleep(0)
        self.owner.seen.append((self.kind, self.stage, messages, options))
        self.stage += 1
        text = self.owner.answer(messages)
        receipt = Receipt("p", "prior", "m", "score", (), queue_s=0.1, service_s=0.2, attempts=1)
        return Reply(text, "m", "e", Usage(5, 7), "stop", receipt, "r1", 0.3, self.stage - 1)

    async def feedback(self, stage: int, verdict: bool) -> None:
        self.owner.judged.append((stage, verdict))

    async def close(self, success: float | bool | None = None) -> None:
        self.owner.closed.append(success)


class FakeClient:
    """Answers what it is told to; knows no sockets."""

    def __init__(self, answer: Callable[[list[dict[str, str]]], str]) -> None:
        self.answer = answer
        self.seen: list[tuple[str, int, list[dict[str, str]], dict[str, Any]]] = []
        self.closed: list[float | bool | None] = []
        self.judged: list[tuple[int, bool]] = []

    def workflow(self, kind: str) -> FakeWorkflow:
        return FakeWorkflow(self, kind)


def run(client: FakeClient, todo: list[workload.Job], check: workload.Check = tasks.check) -> Any:
    quick = [
        workload.Job(j.number, j.task, j.shape, 0.0, tuple(0.0 for _ in j.gaps_s)) for j in todo
    ]
    return asyncio.run(workload.run_open(cast(Client, client), quick, check))


def test_the_seed_decides_everything() -> None:
    first, again = workload.jobs(200, 5.0, seed=7), workload.jobs(200, 5.0, seed=7)
    assert first == again
    assert workload.jobs(200, 5.0, seed=8) != first
    assert workload.jobs(50, 5.0, seed=7) == first[:50]
    assert {job.shape for job in first} == set(workflows.SHAPES)
    assert {job.task.kind for job in first} == {"math", "code"}
    assert all(tasks.split_of(job.task) == "demo" for job in first)
    assert all(len(j.gaps_s) == len(workflows.shape(j.shape).stages) - 1 for j in first)


def test_another_rate_only_stretches_time() -> None:
    slow, fast = workload.jobs(400, 2.0, seed=1), workload.jobs(400, 8.0, seed=1)
    assert [j.task for j in slow] == [j.task for j in fast]
    assert [j.gaps_s for j in slow] == [j.gaps_s for j in fast]
    assert slow[-1].arrive_s == pytest.approx(4.0 * fast[-1].arrive_s)
    assert slow[-1].arrive_s == pytest.approx(400 / 2.0, rel=0.2)
    assert [j.arrive_s for j in slow] == sorted(j.arrive_s for j in slow)


def test_a_workflow_sees_its_answers_and_reports_its_outcome() -> None:
    client = FakeClient(lambda messages: f"text {len(messages)}")
    todo = [j for j in workload.jobs(30, 5.0, seed=1) if len(j.gaps_s) == 3][:1]
    (found,) = run(client, todo, lambda task, text: text == "text 7")
    assert [len(messages) for _, _, messages, _ in client.seen] == [1, 3, 5, 7]
    assert client.seen[-1][2][1] == {"role": "assistant", "content": "text 1"}
    assert {options["temperature"] for *_, options in client.seen} == {0.0}
    assert client.seen[0][0] == f"{todo[0].task.kind}-planner_solver_verifier"
    assert client.closed == [True]
    assert found.success
    assert found.submitted == len(found.stages) == 4
    assert found.output_tokens == 28
    assert found.stages[0].queue_s == 0.1
    assert not found.lost


def test_the_truth_never_leaves() -> None:
    client = FakeClient(lambda messages: "")
    todo = workload.jobs(40, 5.0, seed=2)
    run(client, todo)
    prompts = {job.task.prompt for job in todo}
    for _, _, messages, options in client.seen:
        assert set(options) == {"max_tokens", "temperature", "timeout_s", "model"}
        assert options["model"] is None  # that is the policy's choice
        said = messages[0]["content"]
        assert any(said.endswith(prompt) for prompt in prompts)


@pytest.mark.parametrize(
    ("error", "lost"),
    [(EngineLost("gone", retryable=True), False), (RequestTimeout("silence"), True)],
)
def test_an_error_ends_the_workflow_and_is_written_down(error: ChimeraError, lost: bool) -> None:
    def answer(messages: list[dict[str, str]]) -> str:
        raise error

    client = FakeClient(answer)
    (found,) = run(client, workload.jobs(1, 5.0, seed=1))
    assert found.error == error.code
    assert found.retryable
    assert found.latency_s is None
    assert not found.success
    assert found.lost is lost
    assert found.submitted == 1
    assert client.closed == [False]


def test_closed_loop_keeps_so_many_at_work_and_gives_up_the_rest() -> None:
    client = FakeClient(lambda messages: "text")
    records = asyncio.run(workload.run_closed(cast(Client, client), 1, 4, 0.3))
    assert any(r.latency_s is not None for r in records)
    unfinished = [r for r in records if r.latency_s is None]
    assert len(unfinished) <= 4
    assert all(tasks.split_of(t) == "validation" for t in tasks.generate("validation", 5, 1))


def test_closed_loop_passes_bugs_on() -> None:
    def answer(messages: list[dict[str, str]]) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(workload.run_closed(cast(Client, FakeClient(answer)), 1, 2, 5.0))
