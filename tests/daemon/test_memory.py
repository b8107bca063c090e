"""What is remembered of running workflows: order, bounds, and what becomes a trace."""

import msgspec
import pytest

from chimera_daemon.memory import Known, WorkflowMemory
from chimera_daemon.messages import Stage, StageOutcome, Usage, WorkflowEnded
from chimera_predictors.records import PastStage, StageLog, WorkflowLog


def stage(workflow: str = "w", number: int = 0, prompt_tokens: int = 10) -> Stage:
    return Stage(b"c", f"r{number}", workflow, number, "k", None, prompt_tokens, 256, 40, 0)


class Memory(WorkflowMemory):
    """With the texts of stages read at once, and the traces it gives."""

    def __init__(self, max_workflows: int = 10, max_text_bytes: int = 1 << 20) -> None:
        self.logs: list[WorkflowLog] = []
        super().__init__(max_workflows, self.logs.append, max_text_bytes)

    def submit(self, submitted: Stage, text: str) -> Known:
        known = self.begin(submitted)
        known.texts.add(submitted.stage, text)
        self.read(submitted, known)
        return known

    def run(self, submitted: Stage, text: str, output_tokens: int = 5) -> Known:
        known = self.submit(submitted, text)
        self.answered(submitted, "m", Usage(99, output_tokens), -0.5)
        return known


def ended(*numbers: int, workflow: str = "w", success: float | None = 1.0) -> WorkflowEnded:
    outcomes = tuple(StageOutcome(n, "m", 99, 5) for n in numbers)
    return WorkflowEnded(workflow, "k", success, outcomes)


PAST = PastStage("m", 10, 5, None, -0.5)


def test_history_grows_with_what_becomes_known() -> None:
    memory = Memory()
    known = memory.run(stage(), "task")
    assert known.past(0) == ()
    assert known.past(1) == (PAST,)
    memory.judged("w", 0, 0.25)
    memory.judged("w", 1, 1.0)  # not answered yet
    memory.judged("unknown", 0, 1.0)
    memory.run(stage(number=1, prompt_tokens=30), "more")
    assert known.past(2) == (
        msgspec.structs.replace(PAST, verdict=0.25),
        msgspec.structs.replace(PAST, prompt_tokens=30),
    )
    assert known.texts.task == "task"


def test_stages_out_of_order_with_gaps_and_twice() -> None:
    memory = Memory()
    known = memory.submit(stage(number=5), "five")
    assert known.texts.task == "five"  # the first that is known
    memory.submit(stage(number=2), "two")
    assert known.texts.task == "two"
    memory.submit(stage(number=7), "seven")
    assert known.texts.task == "two"
    for number in (7, 2, 5):
        memory.answered(stage(number=number), f"m{number}", Usage(1, number), None)
    assert [p.model for p in known.past(9)] == ["m2", "m5", "m7"]
    assert [p.model for p in known.past(5)] == ["m2"]
    memory.answered(stage(number=5), "again", Usage(1, 5), None)
    assert [p.model for p in known.past(9)] == ["m2", "again", "m7"]


def test_a_trace_numbers_the_stages_that_are_not_where_their_place_says() -> None:
    memory = Memory()
    for number in (0, 1, 3):
        memory.run(stage(number=number), f"text {number}")
    memory.submit(stage(number=2), "never answered")
    memory.ended(ended(0, 1, 3))
    (log,) = memory.logs
    assert [s.stage for s in log.stages] == [None, None, 3]
    assert [s.prompt_text for s in log.stages] == ["text 0", "text 1", "text 3"]


def test_an_ended_workflow_is_forgotten_and_its_id_begins_anew() -> None:
    memory = Memory()
    memory.run(stage(), "task")
    memory.ended(ended(0))
    assert (len(memory), memory.text_bytes) == (0, 0)
    again = memory.run(stage(number=1), "other")
    assert again.texts.task == "other"
    assert again.past(1) == ()
    memory.ended(ended(1, success=None))
    first, second = memory.logs
    assert first == WorkflowLog("w", (StageLog("m", "task", 10, 5, None, -0.5),), None, "k", 1.0)
    assert (second.stages[0].prompt_text, second.stages[0].stage) == ("other", 1)
    assert second.success is None


def test_the_trace_waits_for_texts_that_are_still_being_read() -> None:
    memory = Memory()
    first, second = stage(), stage(number=1)
    known = memory.begin(first)
    assert memory.begin(second) is known
    for number in (0, 1):
        memory.answered(stage(number=number), "m", Usage(1, 5), None)
    memory.ended(ended(0, 1))
    other = memory.run(stage(), "of another workflow of that name")
    known.texts.add(0, "zero")
    memory.read(first, known)
    assert memory.logs == []
    known.texts.add(1, "one")
    memory.read(second, known)
    assert [s.prompt_text for s in memory.logs[0].stages] == ["zero", "one"]
    assert memory.text_bytes == other.texts.size


def test_nothing_is_logged_of_what_is_not_known_as_a_whole() -> None:
    memory = Memory(max_workflows=2)
    for name in ("a", "b", "c"):
        memory.run(stage(name), name)
    assert (len(memory), memory.forgotten) == (2, 1)
    memory.run(stage("a", 1), "its later part")
    memory.ended(ended(0, 1, workflow="a"))
    memory.ended(ended(0, workflow="b"))  # forgotten when `a` came again
    memory.run(stage("twice"), "first")
    memory.run(stage("twice"), "second")
    memory.ended(ended(0, 0, workflow="twice"))
    assert memory.logs == []
    assert memory.incomplete == 3
    memory.submit(stage("failed"), "no answer")
    memory.ended(ended(workflow="failed"))
    memory.ended(ended(workflow="never seen"))
    assert memory.logs == []
    assert memory.incomplete == 3


def test_a_workflow_without_end_is_bounded() -> None:
    memory = Memory()
    for number in range(1000):
        known = memory.run(stage(number=number), "x" * 100)
    assert len(known.stages) == len(known.texts.of_stage) == 256
    memory.ended(ended(*range(256)))
    assert (memory.logs, memory.incomplete, memory.text_bytes) == ([], 1, 0)


@pytest.mark.parametrize("keep_all", [False, True])
def test_texts_are_bounded_in_bytes(keep_all: bool) -> None:
    limit = 50_000
    logs: list[WorkflowLog] = []
    memory = WorkflowMemory(1000, logs.append if keep_all else None, limit)
    sizes: list[int] = []
    for number in range(300):
        for at in range(3):
            submitted = stage(f"w{number}", at)
            known = memory.begin(submitted)
            known.texts.add(at, "\N{SNOWMAN}" * 500)
            memory.read(submitted, known)
            sizes.append(memory.text_bytes)
    assert max(sizes) <= limit
    assert memory.forgotten > 200
    assert len(memory) + memory.forgotten == 300
    assert len(memory) == limit // ((1 + 2 * keep_all) * ("\N{SNOWMAN}" * 500).__sizeof__())
    for number in range(300):
        memory.ended(ended(0, 1, 2, workflow=f"w{number}"))
    assert (len(memory), memory.text_bytes) == (0, 0)
