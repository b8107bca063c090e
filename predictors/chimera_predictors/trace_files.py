"""Trace folders on disk: reads Parquet and JSONL into checked columns, writes Parquet.

Owns both file forms (docs/traces.md) and every check of what is in them; a `Part` that leaves here
is sound. Knows nothing of folds, queries or how several folders are joined (traces.py).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from chimera_predictors.records import StageLog, WorkflowLog

STAGES = "stages.parquet"
TASKS = "tasks.parquet"
MAX_COUNT = 1e9  # tokens or stages; also bounds a log-probability
# A missing name that some writer turned into text.
NO_NAMES = frozenset({"", "none", "nan", "null"})

Floats = NDArray[np.float64]


class TracesError(ValueError):
    """A trace folder that cannot be used: says which file and place, and what to do about it."""


class StageRow(Struct, frozen=True, gc=False):
    """A row of stages.parquet. None: not known; such a row trains nothing there."""

    workflow_id: str
    task_id: str
    domain: str | None
    model: str
    stage: int
    n_stages: int
    prompt_text: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    remaining_output_tokens: int | None = None
    success: float | None = None
    verdict: float | None = None
    logprob: float | None = None


class TaskRow(Struct, frozen=True, gc=False):
    """A row of tasks.parquet."""

    task_id: str
    domain: str | None
    task_text: str | None


@dataclass(frozen=True)
class Part:
    """The checked rows of one file form of one folder, in file order.

    Lists and arrays hold one item per row; in `numbers` (stage, n_stages, prompt_tokens,
    output_tokens, remaining_tokens, success, verdict, logprob) NaN means unknown, which stage and
    n_stages never are. `given_texts` holds what tasks.parquet, or a log that begins late, says of a
    task.
    """

    name: str  # of the folder, to tell tasks of several folders apart
    workflow: list[str]
    task: list[str]
    kind: list[str]
    model: list[str]
    text: list[str | None]
    numbers: dict[str, Floats]
    given_texts: dict[str, str]


def read_folder(folder: Path) -> list[Part]:
    """Read stages.parquet and/or all *.jsonl of a folder.

    Raises TracesError, with file and place, for anything that is not a sound trace.
    """
    if not folder.is_dir():
        raise TracesError(f"{folder}: no such folder; give a folder with {STAGES} or *.jsonl files")
    parts: list[Part] = []
    if (folder / STAGES).is_file():
        parts.append(_read_parquet(folder))
    if logs := sorted(folder.glob("*.jsonl")):
        parts.append(_read_jsonl(folder, logs))
    if not parts:
        raise TracesError(f"{folder}: neither {STAGES} nor *.jsonl files here; see docs/traces.md")
    parts = [part for part in parts if part.workflow]
    if not parts:
        raise TracesError(f"{folder}: no rows; remove the folder or record some workflows first")
    return parts


def normalised(text: str) -> str:
    """Return the text as compared between tasks: letter case and white space do not count."""
    return " ".join(text.casefold().split())


def write_traces(
    folder: Path, *, stages: Iterable[StageRow], tasks: Iterable[TaskRow] | None = None
) -> int:
    """Write stages.parquet and, where tasks are given, tasks.parquet; return the rows of stages.

    `verdict` and `logprob` become columns only where some row has one. Makes the folder.
    Raises TracesError if there are no rows or the folder cannot be written.
    """
    pa, parquet = _pyarrow()
    text, count, share = pa.large_string(), pa.int64(), pa.float64()
    rows = list(stages)
    if not rows:
        raise TracesError(f"{folder}: no stages to write")
    types = [text, text, text, text, count, count, text, count, count, count, share]
    names = list(StageRow.__struct_fields__)
    schema = dict(zip(names[: len(types)], types, strict=True))
    for name in ("verdict", "logprob"):
        if any(getattr(row, name) is not None for row in rows):
            schema[name] = share
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(_table(pa, schema, rows), folder / STAGES)
        if tasks is not None:
            schema = dict.fromkeys(TaskRow.__struct_fields__, text)
            parquet.write_table(_table(pa, schema, list(tasks)), folder / TASKS)
    except OSError as error:
        raise TracesError(f"{folder}: cannot be written: {error}") from error
    return len(rows)


def _table(pa: Any, schema: dict[str, Any], rows: Sequence[Struct]) -> Any:
    arrays = [
        pa.array([getattr(row, name) for row in rows], type=kind) for name, kind in schema.items()
    ]
    return pa.table(arrays, names=list(schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TracesError(
            f"{error}; Parquet traces need: pip install 'chimera-daemon[train]'"
        ) from error
    return pyarrow, pyarrow.parquet


# Parquet


class _Column:
    """One column of one Parquet file, turned into Python text or float64 with checks."""

    def __init__(self, path: Path, table: Any, name: str) -> None:
        self._pa, _ = _pyarrow()
        self._place = f"{path}: column {name!r}"
        self._values = table[name]

    def texts(self) -> list[str | None]:
        """All values; None where null."""
        types, values = self._pa.types, self._values
        if types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if types.is_null(values.type):
            return [None] * len(values)
        if not (types.is_string(values.type) or types.is_large_string(values.type)):
            raise TracesError(f"{self._place} holds {values.type}; it must hold text")
        try:
            return values.to_pylist()
        except UnicodeDecodeError as error:
            row = self._first_undecodable(values)
            raise TracesError(f"{self._at(row)}: text that is not UTF-8; re-encode it") from error

    def names(self, *, of_model: bool = False) -> list[str]:
        """All values, of which none may be missing or blank."""
        values = self.texts()
        bad = NO_NAMES if of_model else frozenset({""})
        for row, value in enumerate(values):
            if value is None or value.strip().lower() in bad:
                raise TracesError(f"{self._at(row)}: {value!r} is no name; fill it or drop the row")
        return [value for value in values if value is not None]

    def numbers(self, low: float, high: float, *, required: bool = False) -> Floats:
        """All values in [low, high]; NaN where null, whole and not null if `required`."""
        values = self._floats()
        unknown = np.isnan(values)
        with np.errstate(invalid="ignore"):
            bad = ~unknown & ~((values >= low) & (values <= high))
        if required:
            bad |= unknown | (values != np.floor(values))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            whole = "a whole number" if required else "a number or null,"
            raise TracesError(
                f"{self._at(row)}: {values[row]:g} where {whole} from {low:g} to {high:g} must be; "
                "correct the value or drop the row"
            )
        return values

    def _floats(self) -> Floats:
        types, kind = self._pa.types, self._values.type
        if types.is_null(kind):
            return np.full(len(self._values), np.nan)
        if types.is_boolean(kind):
            values = self._values.cast(self._pa.uint8())
        elif types.is_integer(kind) or types.is_floating(kind):
            values = self._values
        else:
            raise TracesError(f"{self._place} holds {kind}; it must hold numbers")
        numbers = values.cast(self._pa.float64(), safe=False).to_numpy()
        return np.array(numbers, dtype=np.float64)

    def _first_undecodable(self, values: Any) -> int:
        for row, value in enumerate(values):
            try:
                value.as_py()
            except UnicodeDecodeError:
                return row
        raise AssertionError("every value can be decoded one by one")

    def _at(self, row: int) -> str:
        return f"{self._place}, row {row} (counted from 0)"


def _read_parquet(folder: Path) -> Part:
    path = folder / STAGES
    required = StageRow.__struct_fields__[:-2]
    table = _load(path, required)

    def column(name: str) -> _Column:
        return _Column(path, table, name)

    part = Part(
        name=folder.resolve().name,
        workflow=column("workflow_id").names(),
        task=column("task_id").names(),
        kind=[kind or "" for kind in column("domain").texts()],
        model=column("model").names(of_model=True),
        text=column("prompt_text").texts(),
        numbers={
            "stage": column("stage").numbers(0, MAX_COUNT, required=True),
            "n_stages": column("n_stages").numbers(1, MAX_COUNT, required=True),
            "prompt_tokens": column("prompt_tokens").numbers(0, MAX_COUNT),
            "output_tokens": column("output_tokens").numbers(0, MAX_COUNT),
            "remaining_tokens": column("remaining_output_tokens").numbers(0, MAX_COUNT),
            "success": column("success").numbers(0, 1),
            "verdict": _optional(path, table, "verdict", 0.0, 1.0),
            "logprob": _optional(path, table, "logprob", -MAX_COUNT, 0.0),
        },
        given_texts=_read_tasks(folder / TASKS),
    )
    _check_workflows(path, part)
    return part


def _load(path: Path, required: Sequence[str]) -> Any:
    """Read the whole file; raise TracesError where it is no Parquet or a column is missing."""
    pa, parquet = _pyarrow()
    try:
        table = parquet.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise TracesError(f"{path}: cannot be read as Parquet: {error}") from error
    if missing := [name for name in required if name not in table.column_names]:
        raise TracesError(
            f"{path}: no column {', '.join(missing)}; add it (all null where nothing is known); "
            f"the file has {', '.join(table.column_names)}"
        )
    if len(set(table.column_names)) < len(table.column_names):
        raise TracesError(f"{path}: two columns have the same name; drop one")
    return table


def _optional(path: Path, table: Any, name: str, low: float, high: float) -> Floats:
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return _Column(path, table, name).numbers(low, high)


def _read_tasks(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    table = _load(path, ("task_id", "task_text"))
    names = _Column(path, table, "task_id").names()
    found: dict[str, str] = {}
    for name, text in zip(names, _Column(path, table, "task_text").texts(), strict=True):
        text = text or ""
        if found.setdefault(name, text) != text:
            raise TracesError(f"{path}: task_id {name!r} has two different texts; keep one")
    return {name: text for name, text in found.items() if text.strip()}


def _check_workflows(path: Path, part: Part) -> None:
    """Check what rows of one workflow must have in common, and the sums of their tokens."""
    numbers = part.numbers
    workflow, task = _codes(part.workflow), _codes(part.task)
    order = np.lexsort((numbers["stage"], workflow))
    earlier, later = order[:-1], order[1:]
    same = workflow[earlier] == workflow[later]

    def refuse(bad: NDArray[np.bool_], rows: NDArray[np.int64], what: str) -> None:
        if bad.any():
            row = int(rows[bad][0])
            raise TracesError(
                f"{path}: row {row} (counted from 0), workflow {part.workflow[row]!r}, "
                f"stage {numbers['stage'][row]:.0f}: {what}"
            )

    def differs(values: NDArray[Any]) -> NDArray[np.bool_]:
        return same & (values[earlier] != values[later])

    refuse(same & ~differs(numbers["stage"]), later, "this stage is there twice; drop one row")
    refuse(differs(task), later, "its task_id is not that of the stage before")
    refuse(differs(numbers["n_stages"]), later, "its n_stages is not that of the stage before")
    known = ~np.isnan(numbers["success"])
    both = known[earlier] & known[later]
    refuse(
        both & differs(numbers["success"]),
        later,
        "its success is not that of the stage before; success is of the whole workflow",
    )
    rows = np.arange(len(workflow))
    refuse(
        numbers["stage"] >= numbers["n_stages"],
        rows,
        "stages count from 0, so stage must be below n_stages",
    )
    with np.errstate(invalid="ignore"):
        refuse(
            numbers["remaining_tokens"] < numbers["output_tokens"],
            rows,
            "remaining_output_tokens is below output_tokens; it includes this stage",
        )


def _codes(names: list[str]) -> NDArray[np.int64]:
    known: dict[str, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)


# JSONL


def _read_jsonl(folder: Path, paths: Sequence[Path]) -> Part:
    logs = list(_distinct(_decoded(paths)))
    stages = [(log, number, stage) for log in logs for number, stage in _numbered(log)]

    def numbers(values: Iterable[float | None]) -> Floats:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    return Part(
        name=folder.resolve().name,
        workflow=[log.workflow_id for log, _, _ in stages],
        task=[task for log in logs for task in [_task_of(log)] * len(log.stages)],
        kind=[log.kind for log, _, _ in stages],
        model=[stage.model for _, _, stage in stages],
        text=[stage.prompt_text for _, _, stage in stages],
        numbers={
            "stage": numbers(number for _, number, _ in stages),
            "n_stages": numbers(_numbered(log)[-1][0] + 1 for log, _, _ in stages),
            "prompt_tokens": numbers(stage.prompt_tokens for _, _, stage in stages),
            "output_tokens": numbers(stage.output_tokens for _, _, stage in stages),
            "remaining_tokens": numbers(rest for log in logs for rest in _remaining(log)),
            "success": numbers(log.success for log, _, _ in stages),
            "verdict": numbers(stage.verdict for _, _, stage in stages),
            "logprob": numbers(stage.logprob for _, _, stage in stages),
        },
        given_texts=_texts_of_late_starts(logs),
    )


def _numbered(log: WorkflowLog) -> list[tuple[int, StageLog]]:
    """The stages with their numbers: the place of a stage is its number unless it says another."""
    return [
        (place if stage.stage is None else stage.stage, stage)
        for place, stage in enumerate(log.stages)
    ]


def _texts_of_late_starts(logs: Sequence[WorkflowLog]) -> dict[str, str]:
    """Task to text where a log begins later than at stage 0: its first text names the task."""
    return {
        _task_of(log): text
        for log in logs
        if _numbered(log)[0][0] > 0
        and not (log.task_id or "").strip()
        and (text := log.stages[0].prompt_text or "").strip()
    }


def _decoded(paths: Sequence[Path]) -> Iterator[tuple[str, bytes, WorkflowLog]]:
    """Yield (place, line, workflow) of each line that is not blank, in the order of file names."""
    decoder = msgspec.json.Decoder(WorkflowLog)
    for path in paths:
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        place = f"{path}: line {number}"
                        yield place, line.strip(), _decode(decoder, place, line.strip())
        except OSError as error:
            raise TracesError(f"{path}: cannot be read: {error}") from error


def _decode(decoder: "msgspec.json.Decoder[WorkflowLog]", place: str, line: bytes) -> WorkflowLog:
    try:
        log = decoder.decode(line)
    except UnicodeDecodeError as error:
        raise TracesError(f"{place}: text that is not UTF-8; re-encode the file") from error
    except msgspec.DecodeError as error:
        raise TracesError(
            f"{place} is no workflow: {error}; correct or remove the line (docs/traces.md)"
        ) from error
    if complaint := _complaint(log):
        raise TracesError(f"{place}: {complaint}; correct or remove the line")
    return log


def _complaint(log: WorkflowLog) -> str | None:
    """Say what is wrong with the values of a workflow, None if nothing is."""
    if not log.workflow_id.strip():
        return "workflow_id is blank"
    if not log.stages:
        return "stages is empty"
    if log.success is not None and not 0.0 <= log.success <= 1.0:
        return f"success is {log.success:g}, must be from 0 to 1"
    before = -1
    for number, stage in _numbered(log):
        if not before < number <= MAX_COUNT:
            return f"stage {number}: stages must be in order, each number above the one before"
        before = number
        if stage.model.strip().lower() in NO_NAMES:
            return f"stage {number}: model {stage.model!r} is no name"
        for name, low, high in (
            ("prompt_tokens", 0, MAX_COUNT),
            ("output_tokens", 0, MAX_COUNT),
            ("verdict", 0.0, 1.0),
            ("logprob", -MAX_COUNT, 0.0),
        ):
            value = getattr(stage, name)
            if value is not None and not low <= value <= high:
                return f"stage {number}: {name} is {value!r:.24}, must be from {low:g} to {high:g}"
    return None


def _distinct(logs: Iterable[tuple[str, bytes, WorkflowLog]]) -> Iterator[WorkflowLog]:
    """Make workflow ids unique and refuse copied lines.

    A client that starts anew may count its workflows from 1 again, so that an id alone proves no
    copy: a later workflow of the same id becomes `id#2`.
    """
    seen: dict[str, list[tuple[bytes, str]]] = {}
    for place, line, log in logs:
        same_id = seen.setdefault(log.workflow_id, [])
        digest = hashlib.blake2b(line, digest_size=16).digest()
        for other, where in same_id:
            if other == digest:
                raise TracesError(f"{place} is a copy of {where}; remove one of them")
        same_id.append((digest, place))
        if len(same_id) > 1:
            log = msgspec.structs.replace(log, workflow_id=f"{log.workflow_id}#{len(same_id)}")
        yield log


def _task_of(log: WorkflowLog) -> str:
    if log.task_id is not None and log.task_id.strip():
        return log.task_id
    if text := normalised(log.stages[0].prompt_text or ""):
        return f"text:{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
    return log.workflow_id


def _remaining(log: WorkflowLog) -> list[float | None]:
    """Tokens of each stage and all after it, None from the last stage of unknown size backwards."""
    rest: list[float | None] = []
    total: float | None = 0.0
    for stage in reversed(log.stages):
        if total is not None:
            total = None if stage.output_tokens is None else total + stage.output_tokens
        rest.append(total)
    return rest[::-1]
