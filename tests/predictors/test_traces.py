"""Trace folders: what is read, joined, split and refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chimera_predictors.records import PastStage, StageQuery
from chimera_predictors.traces import (
    StageRow,
    TaskRow,
    Traces,
    TracesError,
    read_traces,
    write_traces,
)


def row(workflow: str, stage: int = 0, n_stages: int = 1, **values: Any) -> StageRow:
    given: dict[str, Any] = {
        "task_id": f"task {workflow}",
        "domain": "code",
        "model": "small",
    } | values
    return StageRow(workflow_id=workflow, stage=stage, n_stages=n_stages, **given)


def three_stages() -> list[StageRow]:
    """One workflow of two models whose middle stage is of unknown length, out of order."""
    return [
        row("w", 2, 3, prompt_text="again", prompt_tokens=30, output_tokens=4,
            remaining_output_tokens=4, success=1.0),
        row("w", 0, 3, prompt_tokens=10, output_tokens=5, success=1.0, verdict=0.0, logprob=-0.5),
        row("w", 1, 3, prompt_text="wrong", prompt_tokens=20, success=1.0, model="large"),
    ]  # fmt: skip


def rewrite(folder: Path, column: str, values: Any) -> None:
    """Replace a column of a written folder by any array."""
    table = pq.read_table(folder / "stages.parquet")
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, values), folder / "stages.parquet")


def log_lines(folder: Path, *logs: dict[str, Any], name: str = "log.jsonl") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(log) + "\n" for log in logs))


def stage_log(**values: Any) -> dict[str, Any]:
    return {"model": "small", "prompt_tokens": 10} | values


def many_tasks(folder: Path, texts: list[str], order: int = 1) -> Traces:
    """A workflow per text, in the given or the reversed order of rows."""
    rows = [row(f"w{i}", task_id=f"t{i}", success=1.0) for i in range(len(texts))]
    tasks = [TaskRow(f"t{i}", None, text) for i, text in enumerate(texts)]
    write_traces(folder, stages=rows[::order], tasks=tasks)
    return read_traces(folder)


def test_queries_know_the_task_and_the_earlier_stages_alone(tmp_path: Path) -> None:
    write_traces(tmp_path, stages=three_stages(), tasks=[TaskRow("task w", "code", "Add 1 and 2")])
    traces = read_traces(tmp_path)

    first, second, third = traces.queries()

    earlier = PastStage("small", 10, 5, verdict=0.0, logprob=-0.5)
    assert first == StageQuery("code", 0, "Add 1 and 2", "Add 1 and 2", 10)
    assert second == StageQuery("code", 1, "Add 1 and 2", "wrong", 20, (earlier,))
    assert third.past == (earlier, PastStage("large", 20))
    assert traces.models == ("large", "small")
    assert traces.remaining_stages.tolist() == [2.0, 1.0, 0.0]


def test_absent_labels_are_nan_and_absent_text_is_empty(tmp_path: Path) -> None:
    write_traces(tmp_path, stages=[row("w", domain=None)])
    traces = read_traces(tmp_path)
    for name in ("output_tokens", "remaining_tokens", "success", "verdict", "logprob"):
        assert math.isnan(getattr(traces, name)[0])
    assert traces.queries() == [StageQuery()]


def test_without_a_task_file_the_text_is_that_of_the_workflows_own_stage_0(tmp_path: Path) -> None:
    rows = [
        row("a", 0, 2, task_id="t", prompt_text="plan it"),
        row("a", 1, 2, task_id="t"),
        row("b", 0, 1, task_id="t", prompt_text="do it"),
        row("c", 1, 2, task_id="t", prompt_text="go on"),
        row("d", 0, 1, task_id="t", prompt_text=" "),
    ]
    write_traces(tmp_path, stages=rows)
    traces = read_traces(tmp_path)
    assert [query.task_text for query in traces.queries()] == ["plan it"] * 2 + ["do it"] * 3
    assert [query.new_text for query in traces.queries()] == [
        "plan it",
        "",
        "do it",
        "go on",
        "do it",
    ]
    assert traces.task_text == ["do it"]


def test_gaps_are_legal_and_shorten_the_past(tmp_path: Path) -> None:
    rows = three_stages()
    write_traces(tmp_path, stages=[rows[0], rows[1]])
    queries = read_traces(tmp_path).queries()
    assert [(query.stage, len(query.past)) for query in queries] == [(0, 0), (2, 1)]


def test_jsonl_sums_remaining_tokens_where_all_later_ones_are_known(tmp_path: Path) -> None:
    sizes = [7, None, 5, 3]
    log = {
        "workflow_id": "w",
        "kind": "code",
        "success": 0.5,
        "stages": [stage_log(output_tokens=size, prompt_text=f"text {size}") for size in sizes],
    }
    log_lines(tmp_path, log)
    traces = read_traces(tmp_path)
    np.testing.assert_array_equal(traces.remaining_tokens, [np.nan, np.nan, 8, 3])
    np.testing.assert_array_equal(traces.output_tokens, [7, np.nan, 5, 3])
    assert traces.success.tolist() == [0.5] * 4
    assert traces.n_stages.tolist() == [4] * 4
    assert traces.queries()[2].task_text == "text 7"


def test_jsonl_stages_that_name_their_number_leave_gaps(tmp_path: Path) -> None:
    """A stage that was never answered is not listed; its text may still be the task's."""
    gap = {
        "workflow_id": "gap",
        "stages": [
            stage_log(output_tokens=7, prompt_text="Add 1"),
            stage_log(output_tokens=5, prompt_text="wrong", stage=2),
        ],
    }
    late = {
        "workflow_id": "late",
        "stages": [
            stage_log(output_tokens=2, prompt_text="Add 2", stage=1),
            stage_log(output_tokens=1, prompt_text="wrong", stage=2),
        ],
    }
    log_lines(tmp_path, gap, late)
    traces = read_traces(tmp_path)
    assert [(q.stage, q.task_text, len(q.past)) for q in traces.queries()] == [
        *[(0, "Add 1", 0), (2, "Add 1", 1)],
        *[(1, "Add 2", 0), (2, "Add 2", 1)],
    ]
    assert traces.n_stages.tolist() == [3] * 4
    assert traces.remaining_tokens.tolist() == [12, 5, 3, 1]


def test_jsonl_tasks_without_an_id_are_told_apart_by_their_first_text(tmp_path: Path) -> None:
    texts = ["Add 1", "add  1\n", "Add 2", None, None]
    logs = [
        {"workflow_id": f"w{i}", "stages": [stage_log(prompt_text=text)]}
        for i, text in enumerate(texts)
    ]
    log_lines(tmp_path, *logs)
    traces = read_traces(tmp_path)
    names = [traces.task_ids[code] for code in traces.task]
    assert names[0] == names[1]
    assert len(set(names)) == 4
    assert names[3:] == ["w3", "w4"]


def test_a_client_that_counts_anew_makes_other_workflows_but_a_copied_line_is_refused(
    tmp_path: Path,
) -> None:
    first = {"workflow_id": "1", "stages": [stage_log(output_tokens=1)]}
    second = {"workflow_id": "1", "stages": [stage_log(output_tokens=2)]}
    log_lines(tmp_path, first, name="a.jsonl")
    log_lines(tmp_path, second, name="b.jsonl")
    assert read_traces(tmp_path).workflow_ids == ["1", "1#2"]
    log_lines(tmp_path, second, first, name="b.jsonl")
    with pytest.raises(TracesError, match=r"b\.jsonl: line 2 is a copy of .*a\.jsonl: line 1"):
        read_traces(tmp_path)


def test_folders_are_joined_and_only_clashing_tasks_are_renamed(tmp_path: Path) -> None:
    for name, other in (("a", "red"), ("b", "blue")):
        rows = [row(f"w{i}", task_id=f"t{i}", model=name) for i in range(3)]
        tasks = [TaskRow("t0", None, "same"), TaskRow("t1", None, other)]
        write_traces(tmp_path / name, stages=rows, tasks=tasks)

    traces = read_traces([tmp_path / "a", tmp_path / "b"])

    assert traces.task_ids == ["b/t1", "t0", "t1", "t2"]
    assert traces.task_text == ["blue", "same", "red", ""]
    assert traces.workflow_ids == ["b/w0", "b/w1", "b/w2", "w0", "w1", "w2"]
    assert [traces.models[code] for code in traces.model] == ["b"] * 3 + ["a"] * 3


def test_both_file_forms_of_one_folder_are_read(tmp_path: Path) -> None:
    write_traces(tmp_path, stages=[row("p", task_id="t", prompt_text="Add")])
    log_lines(
        tmp_path,
        {"workflow_id": "j", "task_id": "t", "stages": [stage_log(prompt_text="add")]},
    )
    traces = read_traces(tmp_path)
    assert traces.workflow_ids == ["j", "p"]
    assert traces.task_ids == ["t"]


def test_a_selection_keeps_models_and_drops_tasks_and_workflows(tmp_path: Path) -> None:
    rows = [row("a", model="x", prompt_text="A"), row("b", model="y", prompt_text="B")]
    write_traces(tmp_path, stages=rows)
    traces = read_traces(tmp_path)
    chosen = traces.select(traces.model == 1)
    assert chosen.models == ("x", "y")
    assert chosen.model.tolist() == [1]
    assert (chosen.task_ids, chosen.task_text) == (["task b"], ["B"])
    assert (chosen.workflow_ids, chosen.workflow.tolist()) == (["b"], [0])
    assert chosen.queries() == traces.queries()[1:]
    with pytest.raises(ValueError, match="a mask of 2 booleans"):
        traces.select(np.array([1]))


def test_folds_split_by_text_are_balanced_and_do_not_depend_on_row_order(tmp_path: Path) -> None:
    texts = [f"task {i}" for i in range(20)] + ["Task  3", "TASK 3\n"]
    traces = many_tasks(tmp_path / "a", texts)
    folds = traces.fold_of(5, seed=1)
    by_id = dict(zip([traces.task_ids[code] for code in traces.task], folds.tolist(), strict=True))
    assert by_id["t3"] == by_id["t20"] == by_id["t21"]
    assert sorted(np.bincount(folds).tolist()) == [4, 4, 4, 4, 6]

    reversed_rows = many_tasks(tmp_path / "b", texts, order=-1)
    np.testing.assert_array_equal(reversed_rows.fold_of(5, seed=1), folds)
    assert (traces.fold_of(5, seed=2) != folds).any()


def test_the_held_out_tasks_stay_when_others_come(tmp_path: Path) -> None:
    texts = [f"task {i}" for i in range(400)]
    whole = many_tasks(tmp_path / "a", texts)
    part = many_tasks(tmp_path / "b", texts[:100])
    held = dict(zip(whole.workflow_ids, whole.holdout(0.3).tolist(), strict=True))
    assert 0.2 < np.mean(list(held.values())) < 0.4
    assert [held[name] for name in part.workflow_ids] == part.holdout(0.3).tolist()


def test_too_few_tasks_to_split_is_an_error(tmp_path: Path) -> None:
    traces = many_tasks(tmp_path, ["one"])
    with pytest.raises(TracesError, match="1 distinct tasks cannot be split into 2 folds"):
        traces.fold_of(2)
    with pytest.raises(TracesError, match="too few to hold 30% of them out"):
        traces.holdout(0.3)


def test_without_kind_nothing_else_changes(tmp_path: Path) -> None:
    write_traces(tmp_path, stages=[row("w", prompt_text="A")])
    traces = read_traces(tmp_path).without_kind()
    assert traces.queries() == [StageQuery("", 0, "A", "A", 0)]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("stage", pa.array(["one", "two"]), "column 'stage' holds string; it must hold numbers"),
        ("model", pa.array([1, 2]), "column 'model' holds int64; it must hold text"),
        ("model", pa.array(["small", None]), "column 'model', row 1 .*: None is no name"),
        ("model", pa.array(["None", "small"]), "column 'model', row 0 .*: 'None' is no name"),
        ("task_id", pa.array([" ", "t"]), "column 'task_id', row 0 .*: ' ' is no name"),
        ("output_tokens", pa.array([-1, 2]), "column 'output_tokens', row 0 .*: -1 where"),
        ("output_tokens", pa.array([1.0, math.inf]), "'output_tokens', row 1 .*: inf where"),
        ("prompt_tokens", pa.array([1, 10**12]), "'prompt_tokens', row 1 .*: 1e\\+12 where"),
        ("stage", pa.array([0.0, math.nan]), "column 'stage', row 1 .*: nan where a whole number"),
        ("stage", pa.array([0.5, 0.0]), "column 'stage', row 0 .*: 0.5 where a whole number"),
        ("n_stages", pa.array([2, 0]), "column 'n_stages', row 1 .*: 0 where"),
        ("success", pa.array([1.5, 0.0]), "column 'success', row 0 .*: 1.5 where"),
        ("stage", pa.array([0, 0]), "row 1 .*, workflow 'w', stage 0: this stage is there twice"),
        ("stage", pa.array([0, 2]), "stage 2: stages count from 0, so stage must be below"),
        ("n_stages", pa.array([2, 3]), "stage 1: its n_stages is not that of the stage before"),
        ("task_id", pa.array(["t", "u"]), "stage 1: its task_id is not that of the stage before"),
        ("success", pa.array([0.0, 1.0]), "stage 1: its success is not that of the stage before"),
        ("remaining_output_tokens", pa.array([3, 3]), "stage 0: remaining_output_tokens is below"),
    ],
)
def test_bad_columns_are_refused_with_their_place(
    tmp_path: Path, column: str, values: Any, message: str
) -> None:
    rows = [row("w", i, 2, output_tokens=5 - i, remaining_output_tokens=9 - 5 * i) for i in (0, 1)]
    write_traces(tmp_path, stages=rows)
    assert len(read_traces(tmp_path)) == 2
    rewrite(tmp_path, column, values)
    with pytest.raises(TracesError, match=r"stages\.parquet: .*" + message):
        read_traces(tmp_path)


def test_nan_labels_and_dictionary_text_are_read(tmp_path: Path) -> None:
    write_traces(tmp_path, stages=[row("a"), row("b")])
    rewrite(tmp_path, "success", pa.array([math.nan, 1.0]))
    rewrite(tmp_path, "model", pa.array(["x", "x"]).dictionary_encode())
    traces = read_traces(tmp_path)
    np.testing.assert_array_equal(traces.success, [np.nan, 1.0])
    assert traces.models == ("x",)


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    write_traces(tmp_path, stages=[row("a"), row("b")])
    offsets = pa.py_buffer(np.array([0, 1, 3], dtype=np.int64).tobytes())
    text = pa.Array.from_buffers(pa.large_string(), 2, [None, offsets, pa.py_buffer(b"a\xff\xfe")])
    rewrite(tmp_path, "prompt_text", text)
    with pytest.raises(TracesError, match="'prompt_text', row 1 .*: text that is not UTF-8"):
        read_traces(tmp_path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"workflow_id": ["w"], "stage": [0]}), tmp_path / "stages.parquet")
    with pytest.raises(
        TracesError, match="no column task_id, domain, model, n_stages, prompt_text"
    ):
        read_traces(tmp_path)


def test_folders_without_rows_or_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TracesError, match="missing: no such folder"):
        read_traces(tmp_path / "missing")
    with pytest.raises(TracesError, match=r"neither stages\.parquet nor \*\.jsonl"):
        read_traces(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(TracesError, match="no rows"):
        read_traces(tmp_path)
    (tmp_path / "stages.parquet").write_bytes(b"no parquet")
    with pytest.raises(TracesError, match="cannot be read as Parquet"):
        read_traces(tmp_path)
    write_traces(tmp_path, stages=[row("w")])
    pq.write_table(
        pq.read_table(tmp_path / "stages.parquet").slice(0, 0), tmp_path / "stages.parquet"
    )
    with pytest.raises(TracesError, match="no rows"):
        read_traces(tmp_path)
    with pytest.raises(TracesError, match="given twice"):
        read_traces([tmp_path, str(tmp_path)])
    with pytest.raises(TracesError, match="no trace folder given"):
        read_traces([])


def test_a_task_with_two_texts_is_refused(tmp_path: Path) -> None:
    tasks = [TaskRow("t", None, "one"), TaskRow("t", None, "two")]
    write_traces(tmp_path, stages=[row("w", task_id="t")], tasks=tasks)
    with pytest.raises(TracesError, match=r"tasks\.parquet: task_id 't' has two different texts"):
        read_traces(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"workflow_id": "w", "sta', "is no workflow: Input data was truncated"),
        (b'{"workflow_id": "w"}', "is no workflow: Object missing required field `stages`"),
        (b'{"workflow_id": "w", "stages": [], "sucess": 1}', "unknown field `sucess`"),
        (b'{"workflow_id": "\xff", "stages": []}', "text that is not UTF-8"),
        (b'{"workflow_id": " ", "stages": [{"model": "m"}]}', "workflow_id is blank"),
        (b'{"workflow_id": "w", "stages": []}', "stages is empty"),
        (b'{"workflow_id": "w", "stages": [{"model": "nan"}]}', "stage 0: model 'nan' is no name"),
        (
            b'{"workflow_id": "w", "success": 2, "stages": [{"model": "m"}]}',
            "success is 2, must be from 0 to 1",
        ),
        (
            b'{"workflow_id": "w", "stages": [{"model": "m", "output_tokens": -3}]}',
            "stage 0: output_tokens is -3, must be from 0 to",
        ),
        (
            b'{"workflow_id": "w", "stages": [{"model": "m", "prompt_tokens": 1%s}]}'
            % (b"0" * 999),
            "stage 0: prompt_tokens is 10+, must be from 0 to",
        ),
        (
            b'{"workflow_id": "w", "stages": [{"model": "m", "logprob": 0.5}]}',
            "stage 0: logprob is 0.5, must be from -1e\\+09 to 0",
        ),
        (
            b'{"workflow_id": "w", "stages": [{"model": "m", "stage": 1}, {"model": "m"}]}',
            "stage 1: stages must be in order, each number above the one before",
        ),
        (
            b'{"workflow_id": "w", "stages": [{"model": "m", "stage": -1}]}',
            "stage -1: stages must be in order",
        ),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path: Path, line: bytes, message: str) -> None:
    good = b'{"workflow_id": "good", "stages": [{"model": "m"}]}'
    (tmp_path / "log.jsonl").write_bytes(good + b"\n\n" + line + b"\n")
    with pytest.raises(TracesError, match=rf"log\.jsonl: line 3.*{message}"):
        read_traces(tmp_path)
