"""How much work a cluster can take: the definition of capacity, which loads are fractions of.

Knows no policy and no time.
"""

from collections.abc import Sequence

from msgspec import Struct

from chimera_bench.sim_input import EngineSetup
from chimera_bench.sim_workload import Task, contexts


class Work(Struct, frozen=True, forbid_unknown_fields=True):
    """What a workflow asks of one model in the mean over tasks, if that does all of it."""

    stages: float
    prompt_tokens: float  # of all stages, contexts read again and again
    new_prompt_tokens: float  # of them, not part of the context of the stage before
    output_tokens: float
    held_tokens: float  # that a decoding sequence holds in memory, in the mean over its time
    gap_s: float
    success: float | None  # None: not known of every run


def mean_work(tasks: Sequence[Task], model: str) -> Work:
    """Means over the tasks' runs by this model."""
    stages = prompts = new = outputs = held = gap_s = 0.0
    successes: list[float] = []
    for task in tasks:
        run = task.runs[model]
        stages += len(run.stages)
        gap_s += sum(stage.gap_s for stage in run.stages)
        if run.success is not None:
            successes.append(run.success)
        sizes = contexts(task.prompt_tokens, run.stages)
        for stage, (prompt, shared) in zip(run.stages, sizes, strict=True):
            prompts += prompt
            new += prompt - shared
            outputs += stage.output_tokens
            held += stage.output_tokens * (prompt + 0.5 * stage.output_tokens)
    n = len(tasks)
    success = sum(successes) / n if len(successes) == n else None
    return Work(stages / n, prompts / n, new / n, outputs / n, held / outputs, gap_s / n, success)


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """One engine's part of a capacity."""

    engine: str
    model: str
    batch: int  # sequences at work when it is full
    workflow_s: float  # of the full engine's time per workflow
    per_s: float  # workflows that it can do alone


class Capacity(Struct, frozen=True, forbid_unknown_fields=True):
    """Workflow rates at which a cluster is full; loads are fractions of `uniform_per_s`."""

    uniform_per_s: float
    whole_per_s: float
    engines: tuple[Part, ...]


def capacity(
    engines: Sequence[EngineSetup], tasks: Sequence[Task], *, cached: float = 1.0
) -> Capacity:
    """Rates at which uniform routing and at which the whole cluster saturates.

    Engine e, full, works at B_e sequences at once and needs per workflow

        s_e = read tokens · prefill_s_per_token + output tokens · step_e(B_e, B_e·held) / B_e

    seconds, with means over the tasks' runs by its model (`Work`). Read are the prompt tokens but
    for the share ``cached`` of those that were the context of the stage before; without a prefix
    cache all of them. B_e is the least of its slots, what the core may give it, and how many
    sequences its memory holds. Of E engines under uniform routing each gets 1/E of the workflows,
    so the slowest is full at ``uniform = E · min 1/s_e``. If every engine gets what it can do, all
    are full at ``whole = Σ 1/s_e``: a policy that sends each model the tasks it is short at may
    pass that by a little.

    The default is for workflows that stay with one engine and find their contexts again. That ends
    where queues grow: waiting workflows push each other out of the cache, and the rate falls to
    that of ``cached`` 0. So does part of it where stages of a workflow go to several engines.
    """
    if not engines or not tasks:
        raise ValueError("a capacity needs engines and tasks")
    if not 0.0 <= cached <= 1.0:
        raise ValueError(f"`cached` must be from 0 to 1, not {cached}")
    parts = tuple(_part(setup, mean_work(tasks, setup.model), cached) for setup in engines)
    rates = [part.per_s for part in parts]
    return Capacity(len(parts) * min(rates), sum(rates), parts)


def _part(setup: EngineSetup, work: Work, cached: float) -> Part:
    profile = setup.profile
    most = min(profile.slots, setup.max_inflight or profile.slots)
    batch = max(1, min(most, int(profile.kv_tokens / work.held_tokens)))
    found = cached if profile.prefix_cache else 0.0
    read = work.prompt_tokens - found * (work.prompt_tokens - work.new_prompt_tokens)
    step_s = profile.step(batch, round(batch * work.held_tokens))
    workflow_s = read * profile.prefill_s_per_token + work.output_tokens * step_s / batch
    return Part(setup.name, setup.model, batch, workflow_s, 1.0 / workflow_s)
