"""What a prediction is made from and what it says: the nouns of this package.

Training reads trace rows into these records and serving reads the daemon's stages into the same
ones, so that features cannot differ between the two. Knows neither files nor sockets nor tensors.
"""

from msgspec import Struct


class PastStage(Struct, frozen=True, gc=False):
    """One finished stage of the workflow, as known at a later stage. None: not known."""

    model: str
    prompt_tokens: int
    output_tokens: int | None = None
    verdict: float | None = None  # the client's, in [0, 1]: was this stage's answer right?
    logprob: float | None = None  # mean natural log-probability of the answer's tokens, <= 0


class StageQuery(Struct, frozen=True):
    """One stage to predict, with all that is known just before it runs."""

    kind: str = ""  # declared by the client; "" where it was not
    stage: int = 0  # number within the workflow, from 0
    task_text: str = ""  # new text of the workflow's first stage
    new_text: str = ""  # added since the stage before; at stage 0 the task text again
    prompt_tokens: int = 0  # the whole context
    past: tuple[
        PastStage, ...
    ] = ()  # earlier stages, in order; shorter than `stage` if some are lost


class Forecast(Struct, frozen=True, gc=False):
    """One model's part of a prediction. Token quantiles are at the bundle's levels, ascending.

    The confidence is NaN, or all the rest is, where training had no labels of it for this model.
    """

    confidence: float  # calibrated probability that the workflow succeeds with this model, [0, 1]
    stage_tokens_mean: float  # output tokens of this stage
    stage_tokens: tuple[float, ...]
    remaining_tokens_mean: float  # of this stage and all later ones
    remaining_tokens: tuple[float, ...]
    remaining_stages: float  # expected number of stages after this one


class StageLog(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One stage of a `WorkflowLog`. None: not known, trains nothing there."""

    model: str
    prompt_text: str | None = None  # new text of this stage, see `StageQuery.new_text`
    prompt_tokens: int | None = None  # the whole context
    output_tokens: int | None = None
    verdict: float | None = None
    logprob: float | None = None
    stage: int | None = None  # its number; None: its place in `WorkflowLog.stages`, from 0


class WorkflowLog(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One finished workflow: a line of a JSONL trace, as the daemon records it."""

    workflow_id: str
    stages: tuple[StageLog, ...]
    task_id: str | None = None  # what several runs have in common; None: from the first text
    kind: str = ""
    success: float | None = None  # 0..1
