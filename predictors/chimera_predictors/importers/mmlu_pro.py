"""MMLU-Pro's answers (TIGER-AI-Lab/MMLU-Pro, `eval_results`): one question, one answer.

A model is an archive model_outputs_MODEL_5shots.zip of JSON lists (or such a list unpacked), or a
folder of CATEGORY_result.json files.
"""

import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from chimera_predictors.importers import count_tokens
from chimera_predictors.trace_files import StageRow, TaskRow, TracesError

_OUTPUTS = re.compile(r"model_outputs_(.+?)(?:_\d+shots?)?(?:\.json)?\.(?:zip|json)")
FULL_NAMES = {"gpt4o": "gpt-4o-2024-05-13"}
NO_MODEL = "merged"  # a folder that repeats others
# Whose answers are whole; what other models wrote may be cut where a new question began.
WITH_LENGTHS = (
    "gpt-4o-2024-05-13",
    "Meta-Llama-3_1-8B-Instruct",
    "Meta-Llama-3_1-70B-Instruct",
)


class _Answer(Struct):
    question_id: int | str
    question: str
    options: list[str]
    answer: str
    category: str
    pred: object = None
    model_outputs: object = None
    response: object = None  # as the API runs call it


def read(path: Path, models: Collection[str] = ()) -> tuple[list[StageRow], list[TaskRow]]:
    """Read all answers below a folder, of the named models or of all.

    An answer without a choice counts as wrong (upstream guesses at random). Raises TracesError for
    another layout.
    """
    decoder = msgspec.json.Decoder(list[_Answer])
    stages: dict[str, StageRow] = {}
    tasks: dict[str, TaskRow] = {}
    seen: set[str] = set()
    for name, place, data in _lists(path):
        model = FULL_NAMES.get(name, name)
        seen.add(model)
        if models and model not in models:
            continue
        try:
            answers = decoder.decode(data)
        except ValueError as error:  # DecodeError and UnicodeDecodeError
            raise TracesError(f"{place} is no list of MMLU-Pro answers: {error}") from error
        for answer in answers:
            task = _task(answer)
            tasks.setdefault(task.task_id, task)
            row = _stage(model, tasks[task.task_id], answer)
            stages.setdefault(row.workflow_id, row)
    if not stages:
        raise TracesError(
            f"{path}: no answers of the models asked for; give MMLU-Pro's folder eval_results "
            f"(models here: {', '.join(sorted(seen)) or 'none'})"
        )
    return list(stages.values()), list(tasks.values())


def _lists(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (short name of the model, place, JSON) of every list of answers below the folder."""
    for file in sorted(path.rglob("model_outputs_*")):
        if not (match := _OUTPUTS.fullmatch(file.name)):
            continue
        if file.suffix == ".zip":
            yield from ((match[1], place, data) for place, data in _members(file))
        else:
            yield match[1], str(file), file.read_bytes()
    for file in sorted(path.rglob("*_result.json")):
        folder = file.parent.name
        if file.parent != path and folder != NO_MODEL:
            yield folder, str(file), file.read_bytes()


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(file) as archive:
            for name in sorted(archive.namelist()):
                # macOS adds a shadow of each file.
                if name.endswith(".json") and not name.startswith("__MACOSX/"):
                    yield f"{file}: {name}", archive.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        raise TracesError(f"{file}: cannot be unpacked: {error}; get the file anew") from error


def _task(answer: _Answer) -> TaskRow:
    options = [option for option in answer.options if option != "N/A"]
    choices = [f"({chr(ord('A') + index)}) {option}" for index, option in enumerate(options)]
    text = "\n".join([answer.question.strip(), "Options:", *choices])
    return TaskRow(f"mmlupro/{answer.question_id}", answer.category, text)


def _stage(model: str, task: TaskRow, answer: _Answer) -> StageRow:
    text = answer.model_outputs or answer.response
    tokens = None
    if isinstance(text, str) and model in WITH_LENGTHS:
        tokens = count_tokens(text)
    return StageRow(
        workflow_id=f"{task.task_id}|{model}",
        task_id=task.task_id,
        domain=task.domain,
        model=model,
        stage=0,
        n_stages=1,
        prompt_tokens=count_tokens(task.task_text or ""),
        output_tokens=tokens,
        remaining_output_tokens=tokens,
        success=float(answer.pred == answer.answer),
    )
