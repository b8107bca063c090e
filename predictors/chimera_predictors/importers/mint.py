"""MINT's runs (xingyaoww/mint-bench, `data/outputs`): up to five turns with tools, no critic.

A file is MODEL/F=None/max5_p2+tool+cd/KIND/DATASET/results.jsonl, a line one run of one task.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from chimera_predictors.importers import count_tokens, share_out
from chimera_predictors.trace_files import StageRow, TaskRow, TracesError

FEEDBACK = "F=None"
SETTING = "max5_p2+tool+cd"
TASK_MARK = "---\n\nTask:\n"  # before it: the instructions and one solved example
WRONG = "Observation:\nYour answer is wrong."
MAX_TEXT = 2000  # characters; the end of an observation says most


class _Message(Struct):
    role: str
    content: str


class _State(Struct):
    history: list[_Message]
    success: bool
    token_counter: dict[str, int] = {}
    error: str | None = None


class _Task(Struct):
    task_id: int | str
    prompt: str


class _Run(Struct):
    state: _State
    task: _Task


def read(path: Path, models: Collection[str] = ()) -> tuple[list[StageRow], list[TaskRow]]:
    """Read all runs below a folder, of the named models or of all.

    Runs that ended in an error (mostly a full context) are left out. Tokens per turn are estimated
    and scaled so that a run sums to its reported totals. Raises TracesError for another layout.
    """
    decoder = msgspec.json.Decoder(_Run)
    stages: list[StageRow] = []
    tasks: dict[str, TaskRow] = {}
    for file in _files(path, models):
        model, dataset = file.parts[-6], file.parts[-2]
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            try:
                run = decoder.decode(line)
            except ValueError as error:  # DecodeError and UnicodeDecodeError
                raise TracesError(
                    f"{file}: line {number} is no run of MINT: {error}; get the file anew"
                ) from error
            if run.state.error is None:
                task = TaskRow(f"{dataset}/{run.task.task_id}", f"mint_{dataset}", run.task.prompt)
                tasks.setdefault(task.task_id, task)
                stages += _stages(model, task, run.state)
    return stages, list(tasks.values())


def _files(path: Path, models: Collection[str]) -> list[Path]:
    found = sorted(path.rglob(f"{FEEDBACK}/{SETTING}/*/*/results.jsonl"))
    chosen = [file for file in found if not models or file.parts[-6] in models]
    if not chosen:
        names = sorted({file.parts[-6] for file in found})
        raise TracesError(
            f"{path}: no MODEL/{FEEDBACK}/{SETTING}/*/*/results.jsonl of the models asked for; "
            f"give mint-bench's folder data/outputs (models here: {', '.join(names) or 'none'})"
        )
    return chosen


def _stages(model: str, task: TaskRow, state: _State) -> Iterator[StageRow]:
    """Yield one row per assistant message."""
    turns = _turns(state.history)
    contexts = _scaled([context for context, _, _, _ in turns], state, "prompt_tokens")
    outputs = _scaled(
        [count_tokens(answer) for _, _, answer, _ in turns], state, "completion_tokens"
    )
    for stage, (context, text, _, wrong) in enumerate(turns):
        yield StageRow(
            workflow_id=f"mint|{model}|{FEEDBACK}|{SETTING}|{task.task_id}",
            task_id=task.task_id,
            domain=task.domain,
            model=model,
            stage=stage,
            n_stages=len(turns),
            prompt_text=text[-MAX_TEXT:],
            prompt_tokens=contexts[stage] if contexts else context,
            output_tokens=outputs[stage] if outputs else None,
            remaining_output_tokens=sum(outputs[stage:]) if outputs else None,
            success=float(state.success),
            verdict=0.0 if wrong else None,
        )


def _turns(history: list[_Message]) -> list[tuple[int, str, str, bool]]:
    """Per assistant message: tokens before it, new text, answer, was it told to be wrong?"""
    turns: list[tuple[int, str, str, bool]] = []
    context, new = 0, ""
    for message in history:
        if message.role == "assistant":
            turns.append((context, new.rpartition(TASK_MARK)[2], message.content, False))
            new = ""
        else:
            new += message.content
            if turns and message.content.startswith(WRONG):
                turns[-1] = (*turns[-1][:3], True)
        context += count_tokens(message.content)
    return turns


def _scaled(counts: list[int], state: _State, name: str) -> list[int]:
    """Share the reported total out over the turns; empty where none was reported."""
    total = state.token_counter.get(name, 0)
    return share_out(total, counts) if total > 0 else []
