"""What a simulation is given: engines, workflows with their truth, faults; and what makes no sense.

Knows neither clock nor core.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import inf, isfinite

from msgspec import Struct

from chimera_bench.sim_engine import EngineProfile
from chimera_daemon.messages import Profile


class EngineSetup(Struct, frozen=True, forbid_unknown_fields=True):
    """An engine of the cluster. What it says of itself may differ from what it is."""

    name: str
    model: str
    profile: EngineProfile
    max_inflight: int | None = None  # attempts that the core may give it; None: its slots
    believed: Profile | None = None  # None: what measuring it would give


class StageTruth(Struct, frozen=True, forbid_unknown_fields=True):
    """A stage as one model does it, and what lies between it and the next one."""

    output_tokens: int
    new_tokens: int = 0  # that join the context before the next stage: what the tool says
    gap_s: float = 0.0  # until the client submits the next stage
    keeps_context: bool = True  # else the next prompt is the new tokens alone
    verdict: float | None = None  # what the client says of this stage's answer


class Run(Struct, frozen=True, forbid_unknown_fields=True):
    """A task as one model does it from beginning to end."""

    stages: tuple[StageTruth, ...]
    success: float | None = None  # 0 to 1


class Workflow(Struct, frozen=True, forbid_unknown_fields=True):
    """A workflow to come, with a run for every model of the cluster."""

    workflow_id: str
    arrival_s: float
    prompt_tokens: int  # of its first stage
    runs: dict[str, Run]
    kind: str = ""
    max_tokens: int = 1024  # of every stage
    unseen: tuple[str, ...] = ()  # models whose failure at this task the client does not see


class Fault(Struct, frozen=True, forbid_unknown_fields=True):
    """An engine dies with all its work and may come back empty."""

    engine: str
    killed_s: float
    back_s: float = inf
    noticed_s: float = 0.0  # from its death until the daemon knows


def check_engines(engines: Sequence[EngineSetup]) -> None:
    """Raises `ValueError`, naming the place, as all checks here do."""
    if not engines:
        raise ValueError("the cluster has no engine")
    for name, times in Counter(setup.name for setup in engines).items():
        if times > 1:
            raise ValueError(f"engine {name!r}: the name is used {times} times")
    for setup in engines:
        if setup.max_inflight is not None and setup.max_inflight < 1:
            raise ValueError(f"engine {setup.name!r}: `max_inflight` must be at least 1")


def check_policy(policy: str, engines: Sequence[EngineSetup]) -> None:
    """The core knows the names of policies, but not which models its engines will serve."""
    model = policy.removeprefix("static:")
    models = sorted({setup.model for setup in engines})
    if model != policy and model not in models:
        raise ValueError(
            f"policy {policy!r}: no engine serves {model!r}; there are: {', '.join(models)}"
        )


def check_workflows(workflows: Sequence[Workflow], engines: Sequence[EngineSetup]) -> None:
    """Each has another id, and a run that can be for every model that is served."""
    if not workflows:
        raise ValueError("there is no workflow to simulate")
    seen = set[str]()
    good = set[tuple[int, int]]()  # runs are shared by the repetitions of a task
    for number, workflow in enumerate(workflows):
        where = f"workflow {number} ({workflow.workflow_id!r})"
        if workflow.workflow_id in seen:
            raise ValueError(f"{where}: the id is used twice")
        seen.add(workflow.workflow_id)
        if not (isfinite(workflow.arrival_s) and workflow.arrival_s >= 0.0):
            raise ValueError(f"{where}: `arrival_s` must be 0 or more, not {workflow.arrival_s}")
        if workflow.prompt_tokens < 1:
            raise ValueError(f"{where}: `prompt_tokens` must be at least 1")
        for setup in engines:
            if setup.model not in workflow.runs:
                raise ValueError(
                    f"{where}: no run of model {setup.model!r}, which engine {setup.name!r} serves"
                )
        for model, run in workflow.runs.items():
            checked = (id(run), workflow.max_tokens)
            if checked not in good:
                _check_run(run, workflow.max_tokens, f"{where}, model {model!r}")
                good.add(checked)


def _check_run(run: Run, max_tokens: int, where: str) -> None:
    if not run.stages:
        raise ValueError(f"{where}: the run has no stage")
    if run.success is not None and not 0.0 <= run.success <= 1.0:
        raise ValueError(f"{where}: `success` must be from 0 to 1, not {run.success}")
    for number, stage in enumerate(run.stages):
        place = f"{where}, stage {number}"
        if not 1 <= stage.output_tokens <= max_tokens:
            raise ValueError(
                f"{place}: {stage.output_tokens} output tokens; from 1 to {max_tokens} are possible"
            )
        if not stage.gap_s >= 0.0 or stage.gap_s == inf:
            raise ValueError(
                f"{place}: the next stage begins {stage.gap_s} s after its end; stages that "
                "overlap cannot be simulated"
            )
        if stage.new_tokens < 0 or not (stage.keeps_context or stage.new_tokens):
            raise ValueError(f"{place}: the next stage would have {stage.new_tokens} new tokens")


def check_faults(faults: Sequence[Fault], engines: Sequence[EngineSetup]) -> None:
    """An engine that is there dies, and does not die again before it is back."""
    names = [setup.name for setup in engines]
    for fault in faults:
        if fault.engine not in names:
            raise ValueError(f"fault: no engine {fault.engine!r}; there are: {', '.join(names)}")
        if not (0.0 <= fault.killed_s < fault.back_s and 0.0 <= fault.noticed_s < inf):
            raise ValueError(
                f"fault of engine {fault.engine!r}: killed at {fault.killed_s}, back at "
                f"{fault.back_s}, noticed after {fault.noticed_s} s"
            )
    for name in names:
        of_it = sorted((f for f in faults if f.engine == name), key=lambda f: f.killed_s)
        for before, after in pairwise(of_it):
            if after.killed_s <= before.back_s:
                raise ValueError(
                    f"fault of engine {name!r}: killed at {after.killed_s} s while it is gone"
                )
