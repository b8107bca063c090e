"""What is known of every running workflow: its texts, and how its stages have gone so far.

Predictions are made from it, and traces written from it once a workflow has ended. Belongs to the
loop's thread, but for `Texts`, which the thread that reads payloads fills. Bounded in workflows,
stages and bytes: what is over a bound is forgotten, oldest first. Knows no files and no models.
"""

from collections import OrderedDict
from collections.abc import Callable

import msgspec
from msgspec import Struct

from chimera_daemon.messages import Stage, Usage, WorkflowEnded
from chimera_predictors.records import PastStage, StageLog, WorkflowLog

# As many as the core remembers; of a longer workflow, the first.
_MAX_STAGES = 256
_MAX_TEXT_BYTES = 64 << 20


class Texts(Struct, eq=False):
    """New texts of a workflow's stages. The first stage's is the task; others may not be kept."""

    keep_all: bool
    task: str = ""
    task_stage: int | None = None
    of_stage: dict[int, str] = {}
    size: int = 0  # bytes kept

    def add(self, stage: int, text: str) -> None:
        """A stage's new text has been read, perhaps again, perhaps after a later stage's."""
        if self.task_stage is None or stage <= self.task_stage:
            self.task, self.task_stage = text, stage
            if not self.keep_all:
                self.size = text.__sizeof__()
        if self.keep_all and len(self.of_stage) < _MAX_STAGES:
            before = self.of_stage.get(stage)
            self.size += text.__sizeof__() - (0 if before is None else before.__sizeof__())
            self.of_stage[stage] = text


class Known(Struct, eq=False):
    """One workflow."""

    texts: Texts
    stages: dict[int, PastStage] = {}
    unread: int = 0  # stages whose text is still to come
    counted_bytes: int = 0  # what the memory's sum has of its texts
    overflowed: bool = False
    ended: WorkflowEnded | None = None

    def past(self, stage: int) -> tuple[PastStage, ...]:
        """Answered stages before this one, in order."""
        return tuple(self.stages[n] for n in sorted(self.stages) if n < stage)


class WorkflowMemory:
    """All running workflows. ``on_log`` gets every ended one that is known as a whole."""

    def __init__(
        self,
        max_workflows: int,
        on_log: Callable[[WorkflowLog], None] | None = None,
        max_text_bytes: int = _MAX_TEXT_BYTES,
    ) -> None:
        self._max_workflows = max_workflows
        self._max_text_bytes = max_text_bytes
        self._on_log = on_log
        self._workflows: OrderedDict[str, Known] = OrderedDict()  # longest untouched first
        self._text_bytes = 0
        self.forgotten = 0  # workflows, over a bound
        self.incomplete = 0  # ended ones of which there is no trace, since part was forgotten

    def __len__(self) -> int:
        return len(self._workflows)

    @property
    def text_bytes(self) -> int:
        """Of all texts kept."""
        return self._text_bytes

    def begin(self, stage: Stage) -> Known:
        """A stage is submitted. Call `read` with the result once its text is there, or never is."""
        known = self._workflows.get(stage.workflow_id)
        if known is None:
            known = Known(Texts(self._on_log is not None))
            self._workflows[stage.workflow_id] = known
            if len(self._workflows) > self._max_workflows:
                self._forget_oldest()
        else:
            self._workflows.move_to_end(stage.workflow_id)
        known.unread += 1
        return known

    def read(self, stage: Stage, known: Known) -> None:
        """The text of this stage has been added, or will never be."""
        known.unread -= 1
        if known.ended is not None:
            if not known.unread:
                self._log(known, known.ended)
        elif self._workflows.get(stage.workflow_id) is known:
            self._text_bytes += known.texts.size - known.counted_bytes
            known.counted_bytes = known.texts.size
            while self._text_bytes > self._max_text_bytes and self._workflows:
                self._forget_oldest()

    def answered(self, stage: Stage, model: str, usage: Usage, logprob: float | None) -> None:
        """A stage was answered; of several with one number, the last counts."""
        known = self._workflows.get(stage.workflow_id)
        if known is None:
            return
        self._workflows.move_to_end(stage.workflow_id)
        if stage.stage not in known.stages and len(known.stages) >= _MAX_STAGES:
            known.overflowed = True
            return
        # The size of the prompt as the stage was predicted with: an estimate unless the client gave
        # it. What is learned from must be what is known when it is needed.
        known.stages[stage.stage] = PastStage(
            model, stage.prompt_tokens, usage.output_tokens, logprob=logprob
        )

    def judged(self, workflow_id: str, stage: int, verdict: float) -> None:
        """The client's verdict on a stage; nothing if that is not known."""
        known = self._workflows.get(workflow_id)
        past = None if known is None else known.stages.get(stage)
        if known is not None and past is not None:
            known.stages[stage] = msgspec.structs.replace(past, verdict=verdict)

    def ended(self, ended: WorkflowEnded) -> None:
        """Forget a workflow; its trace is written once all its texts are there."""
        known = self._workflows.pop(ended.workflow_id, None)
        if known is None:
            self.incomplete += self._on_log is not None and bool(ended.stages)
            return
        self._text_bytes -= known.counted_bytes
        known.ended = ended
        if not known.unread:
            self._log(known, ended)

    def _forget_oldest(self) -> None:
        _, known = self._workflows.popitem(last=False)
        self._text_bytes -= known.counted_bytes
        self.forgotten += 1

    def _log(self, known: Known, ended: WorkflowEnded) -> None:
        if self._on_log is None or not ended.stages:
            return
        if known.overflowed or sorted(known.stages) != sorted(s.stage for s in ended.stages):
            self.incomplete += 1
            return
        stages = tuple(
            StageLog(
                past.model,
                known.texts.of_stage.get(number) or None,
                past.prompt_tokens,
                past.output_tokens,
                past.verdict,
                past.logprob,
                None if number == place else number,
            )
            for place, (number, past) in enumerate(sorted(known.stages.items()))
        )
        self._on_log(WorkflowLog(ended.workflow_id, stages, kind=ended.kind, success=ended.success))
