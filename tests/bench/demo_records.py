"""Records as a demo would have written them."""

from chimera_bench.workload import Record, StageRecord


def stage(model: str = "m", output_tokens: int = 10, attempts: int = 1) -> StageRecord:
    return StageRecord(model, model, 20, output_tokens, 0.1, 0.2, 0.3, 0.5, attempts, "score")


def record(
    number: int, latency_s: float = 1.0, success: bool = True, *stages: StageRecord
) -> Record:
    answered = list(stages) or [stage()]
    return Record(
        number=number,
        task_id=f"t{number}",
        kind="math-solver",
        difficulty=1,
        arrive_s=0.1 * number,
        latency_s=latency_s,
        success=success,
        stages=answered,
        submitted=len(answered),
    )


def failed(number: int, code: str, retryable: bool = True) -> Record:
    return Record(
        number=number,
        task_id=f"t{number}",
        kind="math-solver",
        difficulty=1,
        arrive_s=0.1 * number,
        submitted=1,
        error=code,
        error_message="it broke",
        retryable=retryable,
    )
