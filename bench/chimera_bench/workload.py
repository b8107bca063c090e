"""The demo's workload: seeded workflows of the testbed, sent by a clock or as fast as they end.

Owns what is sent and what is written down about it. Knows a daemon only through its client, and
the answers' truth only through ``check``, which nothing on the other side of the socket can see.
"""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from msgspec import Struct

from chimera_bench.testbed import feedback, tasks, workflows
from chimera_bench.testbed.tasks import Split, Task
from chimera_daemon.client import ChimeraError, Client
from chimera_daemon.client import Workflow as ClientWorkflow

Check = Callable[[Task, str], bool]

# No stage of the demo takes so long; one that does counts as lost, which fails the demo.
STAGE_TIMEOUT_S = 150.0
# Errors by which the client itself ended a request: its outcome at the daemon is unknown.
LOST_CODES = frozenset({"timeout", "unreachable", "protocol", "client_closed"})
_LATE_S = 0.05


class Job(Struct, frozen=True):
    """One workflow to send. ``arrive_s`` counts from the start of the run."""

    number: int
    task: Task
    shape: str
    arrive_s: float
    gaps_s: tuple[float, ...]  # after each stage but the last
    models: tuple[str, ...] = ()  # of each stage; empty: the policy chooses

    @property
    def kind(self) -> str:
        """The label that the client declares: which program this is, as an agent would know it."""
        return f"{self.task.kind}-{self.shape}"


class StageRecord(Struct, frozen=True):
    """One answered stage. ``latency_s`` as the client saw it, the other times from the receipt."""

    model: str
    engine: str
    prompt_tokens: int
    output_tokens: int
    queue_s: float
    service_s: float
    latency_s: float
    end_s: float  # from the start of the run
    attempts: int
    reason: str
    source: str = "prior"  # of the prediction
    confidence: dict[str, float] = {}  # predicted per candidate, where the policy looked at it


class Record(Struct):
    """One workflow and how it went. Times in seconds from the start of the run.

    ``latency_s`` runs from the planned arrival to the last answer, tool gaps included, so a client
    that is late cannot hide waiting. It is None where a stage failed.
    """

    number: int
    task_id: str
    kind: str
    difficulty: int
    arrive_s: float
    latency_s: float | None = None
    success: bool = False
    stages: list[StageRecord] = []
    late_s: float = 0.0  # of the client's own clock, at the arrival
    submitted: int = 0  # stages sent
    error: str | None = None  # code of the client's error
    error_message: str | None = None
    retryable: bool = False

    @property
    def output_tokens(self) -> int:
        """Of all answered stages."""
        return sum(stage.output_tokens for stage in self.stages)

    @property
    def lost(self) -> bool:
        """A stage got no answer and no explicit error."""
        return self.latency_s is None and (self.error is None or self.error in LOST_CODES)

    @property
    def end_s(self) -> float | None:
        """When the last answer came."""
        return None if self.latency_s is None else self.arrive_s + self.latency_s


def jobs(number: int, rate_per_s: float, seed: int, split: Split = "demo") -> list[Job]:
    """The first ``number`` workflows of a Poisson stream; all of it follows from the seed.

    Kind and difficulty of the tasks and the three shapes are uniform. Another rate only stretches
    the arrival times.
    """
    stream = _endless(seed, split)
    arrival_s = 0.0
    arrivals = random.Random(f"arrivals:{seed}")
    made: list[Job] = []
    for _ in range(number):
        arrival_s += arrivals.expovariate(1.0) / rate_per_s
        made.append(next(stream)(arrival_s))
    return made


def _endless(seed: int, split: Split) -> Iterator[Callable[[float], Job]]:
    shapes = random.Random(f"shapes:{seed}")
    for number, task in zip(count(), tasks.stream(split, seed), strict=False):
        name = shapes.choice(workflows.SHAPES)
        stages = len(workflows.shape(name).stages)
        gaps_s = tuple(workflows.tool_gap_s(task, i, seed) for i in range(stages - 1))
        yield lambda at, n=number, t=task, s=name, g=gaps_s: Job(n, t, s, at, g)


def mean_stages() -> float:
    """Stages per workflow where all shapes are equally frequent."""
    return sum(len(workflows.shape(s).stages) for s in workflows.SHAPES) / len(workflows.SHAPES)


async def run_open(
    client: Client,
    todo: Sequence[Job],
    check: Check = tasks.check,
    on_end: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Start every workflow at its time, whatever the others do; returns when all have ended."""
    loop = asyncio.get_running_loop()
    start_s = loop.time() + 0.05

    async def one(job: Job) -> Record:
        await asyncio.sleep(start_s + job.arrive_s - loop.time())
        record = await run_workflow(client, job, check, start_s)
        on_end(record)
        return record

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(one(job)) for job in todo]
    return [task.result() for task in running]


async def run_closed(
    client: Client,
    seed: int,
    in_flight: int,
    duration_s: float,
    on_end: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Keep ``in_flight`` workflows at work for so long, then give up what has not ended.

    Returns a record of every workflow, those given up included. Tasks are of the validation split,
    so that nothing here is seen again in a measurement.
    """
    loop = asyncio.get_running_loop()
    stream = _endless(seed, "validation")
    start_s = loop.time()
    records: list[Record] = []

    async def keep_going() -> None:
        while True:
            job = next(stream)(loop.time() - start_s)
            record = new_record(job)
            records.append(record)
            await run_workflow(client, job, tasks.check, start_s, record)
            on_end(record)

    running = [asyncio.create_task(keep_going()) for _ in range(in_flight)]
    try:
        await asyncio.wait(running, timeout=duration_s, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in running:
            task.cancel()
        results = await asyncio.gather(*running, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):  # which a cancellation is not
            raise result
    return records


def new_record(job: Job) -> Record:
    """Before the first stage."""
    return Record(job.number, job.task.task_id, job.kind, job.task.difficulty, job.arrive_s)


async def run_workflow(
    client: Client, job: Job, check: Check, start_s: float, record: Record | None = None
) -> Record:
    """Run the stages one after the other and report the outcome to the daemon.

    An error ends the workflow and is written down; nothing is tried again.
    """
    loop = asyncio.get_running_loop()
    record = record or new_record(job)
    late_s = loop.time() - start_s - job.arrive_s
    record.late_s = late_s if late_s > _LATE_S else 0.0
    async with client.workflow(kind=job.kind) as workflow:
        try:
            answer = await _stages(workflow, job, record, start_s)
        except ChimeraError as error:
            record.error, record.error_message = error.code, str(error)
            record.retryable = error.retryable
        else:
            record.latency_s = loop.time() - start_s - job.arrive_s
            record.success = check(job.task, answer)
        try:
            await workflow.close(success=record.success)
        except ChimeraError as error:
            record.error_message = f"its end was not acknowledged: {error}"
    return record


async def _stages(workflow: ClientWorkflow, job: Job, record: Record, start_s: float) -> str:
    loop = asyncio.get_running_loop()
    shape = workflows.shape(job.shape)
    outputs: list[str] = []
    for number, max_tokens in enumerate(shape.max_tokens):
        if number:
            await asyncio.sleep(job.gaps_s[number - 1])
        messages = workflows.messages_for(number, job.task, shape, outputs)
        record.submitted += 1
        reply = await workflow.generate(
            messages,
            max_tokens=max_tokens,
            temperature=0.0,
            model=job.models[number] if job.models else None,
            timeout_s=STAGE_TIMEOUT_S,
        )
        outputs.append(reply.text)
        for stage, verdict in feedback.verdicts(job.task.kind, shape, outputs):
            await workflow.feedback(stage, verdict)
        receipt = reply.receipt
        record.stages.append(
            StageRecord(
                model=reply.model,
                engine=reply.engine,
                prompt_tokens=reply.usage.prompt_tokens,
                output_tokens=reply.usage.output_tokens,
                queue_s=receipt.queue_s or 0.0,
                service_s=receipt.service_s or 0.0,
                latency_s=reply.latency_s,
                end_s=loop.time() - start_s,
                attempts=receipt.attempts,
                reason=receipt.reason,
                source=receipt.source,
                confidence={c.model: round(c.confidence, 4) for c in receipt.candidates},
            )
        )
    return workflows.final_answer(outputs)
