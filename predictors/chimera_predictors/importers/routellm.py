"""RouteLLM's benchmark answers (lm-sys/RouteLLM, `routellm/evals`): right or wrong, per model.

gsm8k_responses.csv and mmlu_SUBJECT.csv: a column `prompt`, a True/False column per model, and for
GSM8K the answers as MODEL_response, which are cut and so have no lengths.
"""

import csv
from collections.abc import Collection, Iterator
from pathlib import Path

from chimera_predictors.importers import count_tokens
from chimera_predictors.trace_files import StageRow, TaskRow, TracesError

VALUES = {"True": 1.0, "False": 0.0}


def read(path: Path, models: Collection[str] = ()) -> tuple[list[StageRow], list[TaskRow]]:
    """Read all answers below a folder, of the named models or of all.

    Raises TracesError for another layout.
    """
    files = sorted([*path.rglob("gsm8k_responses.csv"), *path.rglob("mmlu_*.csv")])
    if not files:
        raise TracesError(
            f"{path}: neither gsm8k_responses.csv nor mmlu_*.csv below it; "
            "give RouteLLM's folder routellm/evals"
        )
    stages: list[StageRow] = []
    tasks: list[TaskRow] = []
    for file in files:
        dataset, kind = _dataset(file)
        for number, (prompt, results) in enumerate(_lines(file)):
            task = TaskRow(f"routellm/{dataset}/{number}", kind, prompt)
            tasks.append(task)
            stages += (
                _stage(model, task, success)
                for model, success in results.items()
                if not models or model in models
            )
    if not stages:
        raise TracesError(f"{path}: no answers of the models asked for: {', '.join(models)}")
    return stages, tasks


def _dataset(file: Path) -> tuple[str, str]:
    """Name the file's data set and the kind of its tasks."""
    if file.name == "gsm8k_responses.csv":
        return "gsm8k", "gsm8k"
    subject = file.stem.removeprefix("mmlu_")
    return f"mmlu/{subject}", subject


def _lines(file: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each prompt with success per model."""
    csv.field_size_limit(1 << 24)
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            columns = reader.fieldnames or []
            models = [name for name in columns if name != "prompt" and "_response" not in name]
            if "prompt" not in columns or not models:
                raise TracesError(f"{file}: no columns `prompt` and MODEL in its first line")
            for line in reader:
                if any(line[model] not in VALUES for model in models):
                    raise TracesError(
                        f"{file}: line {reader.line_num}: neither True nor False in the columns "
                        f"{', '.join(models)}; get the file anew"
                    )
                yield line["prompt"], {model: VALUES[line[model]] for model in models}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TracesError(f"{file}: cannot be read as CSV in UTF-8: {error}") from error


def _stage(model: str, task: TaskRow, success: float) -> StageRow:
    return StageRow(
        workflow_id=f"{task.task_id}|{model}",
        task_id=task.task_id,
        domain=task.domain,
        model=model,
        stage=0,
        n_stages=1,
        prompt_tokens=count_tokens(task.task_text or ""),
        success=success,
    )
