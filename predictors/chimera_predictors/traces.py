"""Traces in memory: checked columns of stages, the queries made of them, splits by task.

Rows are stages in the order of (workflow, stage). What is on disk and how it is checked belongs to
trace_files.py; nothing here knows features or models' tensors.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chimera_predictors.records import PastStage, StageQuery
from chimera_predictors.trace_files import (
    Part,
    StageRow,
    TaskRow,
    TracesError,
    normalised,
    read_folder,
    write_traces,
)

__all__ = ["StageRow", "TaskRow", "Traces", "TracesError", "read_traces", "write_traces"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Traces:
    """Stages of finished workflows, column by column; R rows, W workflows, T tasks, M models.

    Float columns are NaN where a value is not known: such a row trains nothing there.
    """

    workflow: Ints  # [R] index into workflow_ids, ascending
    task: Ints  # [R] index into task_ids
    kind: NDArray[np.object_]  # [R] of str, "" where none was declared
    model: Ints  # [R] index into models
    stage: Ints  # [R] from 0, ascending within a workflow; gaps are legal
    n_stages: Ints  # [R] stages of the whole workflow
    prompt_tokens: Ints  # [R] the whole context; 0 where unknown
    output_tokens: Floats  # [R] of this stage
    remaining_tokens: Floats  # [R] of this and all later stages
    success: Floats  # [R] in [0, 1], of the whole workflow
    verdict: Floats  # [R] in [0, 1], the client's, on this stage
    logprob: Floats  # [R] <= 0, mean over the answer's tokens
    new_text: list[str]  # [R] of this stage; at stage 0 the task's where the stage has none
    workflow_ids: list[str]  # [W]
    workflow_text: list[str]  # [W] the task's text as this workflow saw it
    task_ids: list[str]  # [T]
    task_text: list[str]  # [T] "" where unknown
    models: tuple[str, ...]  # [M] sorted

    def __len__(self) -> int:
        return len(self.workflow)

    @property
    def remaining_stages(self) -> Floats:
        """Stages that come after each row, [R]."""
        return (self.n_stages - 1 - self.stage).astype(np.float64)

    def queries(self) -> list[StageQuery]:
        """Return what is known just before each row's stage runs, one query per row.

        The past is taken from the rows that are here: ask before `select`, not after it, where
        a selection leaves earlier stages out.
        """
        found: list[StageQuery] = []
        past: tuple[PastStage, ...] = ()
        before = -1
        for row, stage in enumerate(self._past_stages()):
            workflow = int(self.workflow[row])
            if workflow != before:
                past, before = (), workflow
            found.append(
                StageQuery(
                    kind=self.kind[row],
                    stage=int(self.stage[row]),
                    task_text=self.workflow_text[workflow],
                    new_text=self.new_text[row],
                    prompt_tokens=stage.prompt_tokens,
                    past=past,
                )
            )
            past = (*past, stage)
        return found

    def select(self, mask: Mask) -> "Traces":
        """Return the rows where the boolean mask [R] is true.

        Workflows and tasks that are left without rows go, codes of the others change; `models`
        and its codes stay, so that selections can be compared.
        """
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != self.workflow.shape:
            raise ValueError(f"a mask of {len(self)} booleans is needed, not {mask.shape}")
        workflows, workflow = np.unique(self.workflow[mask], return_inverse=True)
        tasks, task = np.unique(self.task[mask], return_inverse=True)
        columns = {name: getattr(self, name)[mask] for name in _COLUMNS}
        return replace(
            self,
            **columns,
            workflow=workflow.astype(np.int64),
            task=task.astype(np.int64),
            new_text=[self.new_text[row] for row in np.flatnonzero(mask)],
            workflow_ids=[self.workflow_ids[code] for code in workflows],
            workflow_text=[self.workflow_text[code] for code in workflows],
            task_ids=[self.task_ids[code] for code in tasks],
            task_text=[self.task_text[code] for code in tasks],
        )

    def without_kind(self) -> "Traces":
        """Return the same rows as if no client had declared a kind."""
        return replace(self, kind=np.full(len(self), "", dtype=object))

    def fold_of(self, k: int, seed: int = 0) -> Ints:
        """Return the fold 0..k-1 of each row, [R]: tasks of the same text share one.

        Tasks are dealt out in the order of a hash, so folds differ by at most one distinct task
        and depend on the set of tasks and the seed alone. Raises TracesError where there are
        fewer distinct tasks than folds.
        """
        if k < 1:
            raise ValueError(f"{k} folds")
        groups = self._groups()
        order = sorted(set(groups), key=lambda group: _hash(f"fold {seed}", group))
        if len(order) < k:
            raise TracesError(
                f"{len(order)} distinct tasks cannot be split into {k} folds; "
                "ask for fewer folds or add traces of other tasks"
            )
        fold = {group: number % k for number, group in enumerate(order)}
        return np.array([fold[group] for group in groups], dtype=np.int64)[self.task]

    def holdout(self, share: float) -> Mask:
        """Return [R] true for the rows of about `share` of the tasks, always the same ones.

        A task's side depends on its own text alone (or its id, where it has no text), so that it
        stays when others come. Raises TracesError where one side is empty.
        """
        if not 0.0 < share < 1.0:
            raise ValueError(f"a share of {share} tasks cannot be held out; use 0 < share < 1")
        groups = self._groups()
        held = np.array([_hash("holdout", group) < share * 2.0**64 for group in groups])
        if held.all() or not held.any():
            raise TracesError(
                f"{len(set(groups))} distinct tasks are too few to hold {share:.0%} of them out; "
                "add traces of other tasks"
            )
        return held[self.task]

    def _groups(self) -> list[str]:
        """What must not be torn apart, per task: its text, or its id where it has none."""
        texts = (normalised(text) for text in self.task_text)
        return [
            f"text {text}" if text else f"id {name}"
            for text, name in zip(texts, self.task_ids, strict=True)
        ]

    def _past_stages(self) -> Iterable[PastStage]:
        columns = (self.prompt_tokens, self.output_tokens, self.verdict, self.logprob)
        rows = zip(*(column.tolist() for column in (self.model, *columns)), strict=True)
        for model, prompt_tokens, output_tokens, verdict, logprob in rows:
            yield PastStage(
                model=self.models[model],
                prompt_tokens=prompt_tokens,
                output_tokens=None if output_tokens != output_tokens else round(output_tokens),
                verdict=None if verdict != verdict else verdict,
                logprob=None if logprob != logprob else logprob,
            )


# Plain columns: one array item per row that a selection just picks.
_COLUMNS = (
    "kind",
    "model",
    "stage",
    "n_stages",
    "prompt_tokens",
    "output_tokens",
    "remaining_tokens",
    "success",
    "verdict",
    "logprob",
)


def read_traces(folders: str | Path | Sequence[str | Path]) -> Traces:
    """Read one trace folder or join several (docs/traces.md).

    A task of the same id and text in two folders is one task; where the texts differ, the later
    one is renamed to `FOLDER/task_id`. Workflows of the same id in two folders are always two.
    Raises TracesError, with file and place, for anything that is not a sound trace.
    """
    given = [folders] if isinstance(folders, str | Path) else list(folders)
    paths = [Path(folder) for folder in given]
    if not paths:
        raise TracesError("no trace folder given")
    if len({path.resolve() for path in paths}) < len(paths):
        raise TracesError("the same trace folder is given twice")
    return _joined([part for path in paths for part in read_folder(path)])


def _joined(parts: Sequence[Part]) -> Traces:
    workflow_names: list[str] = []
    task_names: list[str] = []
    texts: dict[str, str] = {}  # of tasks, over all parts
    given: dict[str, str] = {}  # those of them that tasks.parquet has
    taken: set[str] = set()
    for part in parts:
        workflows = _renamed(part.workflow, taken, part.name)
        taken.update(workflows.values())
        workflow_names += [workflows[name] for name in part.workflow]
        own_texts = _texts_of(part)
        tasks = _renamed_tasks(part, own_texts, texts)
        task_names += [tasks[name] for name in part.task]
        for name, text in own_texts.items():
            texts.setdefault(tasks[name], text)
            if name in part.given_texts:
                given.setdefault(tasks[name], text)
    return _assembled(parts, workflow_names, task_names, texts, given)


def _texts_of(part: Part) -> dict[str, str]:
    """Text per task of a part: the given one, else that of a stage 0, the same in any row order."""
    found: dict[str, str] = {}
    for task, text, stage in zip(part.task, part.text, part.numbers["stage"], strict=True):
        if stage == 0 and text and text.strip():
            found[task] = min(found.get(task, text), text)
    tasks = set(part.task)
    return found | {name: text for name, text in part.given_texts.items() if name in tasks}


def _renamed(names: Iterable[str], taken: set[str], prefix: str) -> dict[str, str]:
    """Map each name to itself, or to a prefixed one that is free where it is taken."""
    own = dict.fromkeys(names)
    found: dict[str, str] = {}
    for name in own:
        new, number = name, 1
        while new in taken or (new != name and new in own):
            new = f"{prefix}/{name}" if number == 1 else f"{prefix}#{number}/{name}"
            number += 1
        found[name] = new
    return found


def _renamed_tasks(
    part: Part, own_texts: Mapping[str, str], texts: Mapping[str, str]
) -> dict[str, str]:
    """Map the part's task ids to the joined ones: prefixed where the same id has another text."""
    clashing = {
        name
        for name, text in own_texts.items()
        if name in texts and normalised(texts[name]) != normalised(text)
    }
    prefixed = _renamed(clashing, set(texts) | set(part.task), part.name)
    return {name: prefixed.get(name, name) for name in part.task}


def _assembled(
    parts: Sequence[Part],
    workflow_names: list[str],
    task_names: list[str],
    texts: Mapping[str, str],
    given: Mapping[str, str],
) -> Traces:
    """Sort the rows of all parts, code their names and fill texts in."""
    workflow_ids, workflow = _coded(workflow_names)
    task_ids, task = _coded(task_names)
    models, model = _coded([name for part in parts for name in part.model])
    numbers = {
        name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers
    }
    order = np.lexsort((numbers["stage"], workflow))
    rows: list[int] = order.tolist()
    numbers = {name: values[order] for name, values in numbers.items()}
    workflow, task = workflow[order], task[order]
    own_texts = [text for part in parts for text in part.text]
    kinds = [kind for part in parts for kind in part.kind]
    task_text = [texts.get(name, "") for name in task_ids]
    workflow_text = [""] * len(workflow_ids)
    new_text: list[str] = []
    for row, code, its_task, stage in zip(rows, workflow, task, numbers["stage"], strict=True):
        text = own_texts[row] or ""
        if not workflow_text[code]:  # the first row of the workflow that is here
            own = text if stage == 0 and text.strip() else task_text[its_task]
            workflow_text[code] = given.get(task_ids[its_task], own)
        new_text.append(workflow_text[code] if stage == 0 and not text.strip() else text)
    return Traces(
        workflow=workflow,
        task=task,
        kind=np.array([kinds[row] for row in rows], dtype=object),
        model=model[order],
        stage=numbers["stage"].astype(np.int64),
        n_stages=numbers["n_stages"].astype(np.int64),
        prompt_tokens=np.nan_to_num(numbers["prompt_tokens"]).round().astype(np.int64),
        output_tokens=numbers["output_tokens"],
        remaining_tokens=numbers["remaining_tokens"],
        success=numbers["success"],
        verdict=numbers["verdict"],
        logprob=numbers["logprob"],
        new_text=new_text,
        workflow_ids=workflow_ids,
        workflow_text=workflow_text,
        task_ids=task_ids,
        task_text=task_text,
        models=tuple(models),
    )


def _coded(names: Sequence[str]) -> tuple[list[str], Ints]:
    """Sort the distinct names and give each item its number among them."""
    distinct = sorted(set(names))
    code = {name: number for number, name in enumerate(distinct)}
    return distinct, np.array([code[name] for name in names], dtype=np.int64)


def _hash(salt: str, text: str) -> int:
    """Return 64 bits that depend on salt and text alone, on every machine."""
    data = f"{salt}\0{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
