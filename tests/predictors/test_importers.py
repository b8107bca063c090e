"""Importers and `chimera traces`, on tiny hand-written samples in the layout of each release."""

import argparse
import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera_predictors import traces_cli
from chimera_predictors.importers import count_tokens, mint, mmlu_pro, routellm, share_out
from chimera_predictors.trace_files import StageRow, TracesError, write_traces
from chimera_predictors.traces import read_traces

PREAMBLE = "Instructions.\n\n---\n\nTask:\nA solved example.\n\n\n---\n\nTask:\n"


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    traces_cli.add(parser.add_subparsers())
    parsed = parser.parse_args(["traces", *map(str, arguments)])
    return parsed.run(parsed)


def mint_run(*messages: str, task_id: int | str = 3, **state: Any) -> dict[str, Any]:
    """A run whose messages alternate between user and assistant."""
    roles = ("user", "assistant")
    history = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    known = {"history": history, "finished": True, "success": False, "error": None}
    task = {"task_name": "reasoning", "task_id": task_id, "prompt": "What is 1 + 2?"}
    return {"state": known | state, "task": task | {"reference": 3, "metadata": {}}}


def mint_folder(root: Path, *runs: dict[str, Any], model: str = "small-7b") -> Path:
    folder = root / model / "F=None/max5_p2+tool+cd/reasoning/gsm8k"
    folder.mkdir(parents=True)
    text = "\n".join(json.dumps(run) for run in runs)
    (folder / "results.jsonl").write_text(text + "\n")
    return root


def test_mint_becomes_stages_with_scaled_tokens_and_verdicts(tmp_path: Path) -> None:
    run = mint_run(
        PREAMBLE + "What is 1 + 2?\n",
        "Assistant:\nThe answer is <solution> 4 </solution>.\n",
        "Observation:\nYour answer is wrong.\nYou have 4 steps left.\n",
        "Assistant:\nSo it is <solution> 3 </solution>, I am quite sure of that now.\n",
        success=True,
        token_counter={"prompt_tokens": 1000, "completion_tokens": 61, "total_tokens": 1061},
    )
    stages, tasks = mint.read(mint_folder(tmp_path, run))

    first, second = stages
    assert first.workflow_id == "mint|small-7b|F=None|max5_p2+tool+cd|gsm8k/3"
    assert (first.task_id, first.domain, first.model) == ("gsm8k/3", "mint_gsm8k", "small-7b")
    assert first.prompt_text == "What is 1 + 2?\n"
    assert (second.prompt_text or "").startswith("Observation:\nYour answer is wrong.")
    assert (first.verdict, second.verdict) == (0.0, None)
    assert (first.success, second.success) == (1.0, 1.0)
    outputs = [stage.output_tokens or 0 for stage in stages]
    assert sum(outputs) == first.remaining_output_tokens == 61
    assert outputs[1] == second.remaining_output_tokens
    assert outputs[0] < outputs[1]
    contexts = [stage.prompt_tokens or 0 for stage in stages]
    assert sum(contexts) == 1000
    assert contexts[0] < contexts[1]
    assert [(task.task_id, task.task_text) for task in tasks] == [("gsm8k/3", "What is 1 + 2?")]


def test_mint_leaves_out_runs_with_errors_and_lengths_that_nobody_reported(tmp_path: Path) -> None:
    root = mint_folder(
        tmp_path,
        mint_run("Task:\nAdd.", "Assistant:\nNo", "Observation:\nFull.", error="context length"),
        mint_run("Task:\nAdd.", "Assistant:\nNo", task_id=4),
    )
    stages, _ = mint.read(root)
    assert [(stage.task_id, stage.output_tokens) for stage in stages] == [("gsm8k/4", None)]


def test_mint_keeps_the_end_of_a_long_observation_and_the_models_asked_for(tmp_path: Path) -> None:
    long = "Observation:\n" + "x" * 3000 + "\nYou have 4 steps left.\n"
    mint_folder(tmp_path, mint_run("Task:\nAdd.", "A", long, "B"))
    mint_folder(tmp_path, mint_run("Task:\nAdd.", "A"), model="other")
    stages, _ = mint.read(tmp_path, ["small-7b"])
    assert {stage.model for stage in stages} == {"small-7b"}
    text = stages[1].prompt_text or ""
    assert len(text) == 2000
    assert text.endswith("You have 4 steps left.\n")
    with pytest.raises(TracesError, match=r"models here: other, small-7b"):
        mint.read(tmp_path, ["large"])


def test_a_bad_line_of_mint_is_named(tmp_path: Path) -> None:
    root = mint_folder(tmp_path, mint_run("Task:\nAdd.", "A"), {"state": {}})
    with pytest.raises(TracesError, match=r"results\.jsonl: line 2 is no run of MINT"):
        mint.read(root)


def mmlu_answer(number: int, pred: str | None, **texts: str) -> dict[str, Any]:
    return {
        "question_id": number,
        "question": " What is 1 + 2?",
        "options": ["4", "3", "N/A"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": "",
        "category": "math",
        "src": "hand",
        "pred": pred,
    } | texts


def test_mmlu_pro_reads_archives_and_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model_outputs_Phi-3-mini_5shots.zip", "w") as archive:
        answers = [mmlu_answer(70, "B", model_outputs="It is (B)."), mmlu_answer(71, None)]
        archive.writestr("model_outputs_Phi-3-mini_5shots.json", json.dumps(answers))
        archive.writestr("__MACOSX/._model_outputs_Phi-3-mini_5shots.json", b"\x00")
    for folder in ("gpt4o", "merged"):
        (tmp_path / folder).mkdir()
        answers = [mmlu_answer(70, "A", response="The answer is (A).")]
        (tmp_path / folder / "math_result.json").write_text(json.dumps(answers))
    (tmp_path / "business_result.json").write_text("[]")

    stages, tasks = mmlu_pro.read(tmp_path)

    found = [(stage.workflow_id, stage.success, stage.output_tokens) for stage in stages]
    assert found == [
        ("mmlupro/70|Phi-3-mini", 1.0, None),
        ("mmlupro/71|Phi-3-mini", 0.0, None),
        ("mmlupro/70|gpt-4o-2024-05-13", 0.0, count_tokens("The answer is (A).")),
    ]
    assert {stage.domain for stage in stages} == {"math"}
    assert [task.task_id for task in tasks] == ["mmlupro/70", "mmlupro/71"]
    assert tasks[0].task_text == "What is 1 + 2?\nOptions:\n(A) 4\n(B) 3"


def test_mmlu_pro_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(TracesError, match="models here: none"):
        mmlu_pro.read(tmp_path)
    archive = tmp_path / "model_outputs_m_5shots.zip"
    archive.write_bytes(b"PK")
    with pytest.raises(TracesError, match="cannot be unpacked"):
        mmlu_pro.read(tmp_path)
    archive.rename(tmp_path / "model_outputs_m_5shots.json")
    with pytest.raises(TracesError, match="is no list of MMLU-Pro answers"):
        mmlu_pro.read(tmp_path)


def write_csv(path: Path, *lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def test_routellm_becomes_single_stages_without_lengths(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "gsm8k/gsm8k_responses.csv",
        ["prompt", "mixtral", "gpt-4", "mixtral_response", "gpt-4_response"],
        ["Two lines,\nof a prompt", "False", "True", "It is 1", "It is 2"],
    )
    write_csv(
        tmp_path / "mmlu/responses/mmlu_anatomy.csv",
        ["prompt", "mixtral", "gpt-4"],
        ["Where?\nAnswer:", "True", "True"],
    )
    stages, tasks = routellm.read(tmp_path)
    assert [(stage.workflow_id, stage.domain, stage.success) for stage in stages] == [
        ("routellm/gsm8k/0|mixtral", "gsm8k", 0.0),
        ("routellm/gsm8k/0|gpt-4", "gsm8k", 1.0),
        ("routellm/mmlu/anatomy/0|mixtral", "anatomy", 1.0),
        ("routellm/mmlu/anatomy/0|gpt-4", "anatomy", 1.0),
    ]
    assert {stage.output_tokens for stage in stages} == {None}
    assert tasks[0].task_text == "Two lines,\nof a prompt"
    only, _ = routellm.read(tmp_path, ["gpt-4"])
    assert {stage.model for stage in only} == {"gpt-4"}


def test_routellm_names_the_line_of_a_bad_value(tmp_path: Path) -> None:
    with pytest.raises(TracesError, match=r"neither gsm8k_responses\.csv nor"):
        routellm.read(tmp_path)
    write_csv(tmp_path / "mmlu_law.csv", ["prompt", "m"], ["a", "True"], ["b", "maybe"])
    with pytest.raises(TracesError, match=r"mmlu_law\.csv: line 3: neither True nor False"):
        routellm.read(tmp_path)
    write_csv(tmp_path / "mmlu_law.csv", ["question", "m"])
    with pytest.raises(TracesError, match="no columns `prompt`"):
        routellm.read(tmp_path)


def test_shares_sum_to_the_total() -> None:
    assert share_out(10, [1, 1, 1]) == [4, 3, 3]
    assert share_out(7, [0, 0]) == [4, 3]
    assert share_out(3, [1, 5]) == [1, 2]


def test_tokens_are_counted_by_words_digits_and_punctuation() -> None:
    assert count_tokens("Add 12345 and x_1!!\n\n") == 9
    assert count_tokens("") == 0


def test_an_import_can_be_read_and_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mint_run(
        "Task:\nAdd.", "Assistant:\nNo", "Observation:\nYour answer is wrong.\n", "Assistant:\nYes",
        success=True, token_counter={"completion_tokens": 10},
    )  # fmt: skip
    source = mint_folder(tmp_path / "source", run)
    assert command("import", "mint", source, "--out", tmp_path / "out") == 0
    assert "2 stages of 1 tasks" in capsys.readouterr().out

    traces = read_traces(tmp_path / "out")
    np.testing.assert_array_equal(traces.verdict, [0.0, np.nan])
    assert command("info", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "workflows  1, at most 2 stages" in shown
    assert "kinds      mint_gsm8k 2" in shown
    assert "success 100%, lengths 100%, remaining 100%, text 100%, verdict 50%" in shown
    assert shown.splitlines()[-1].split() == ["small-7b", "2", "1", "1.000", "5", "10"]


def test_success_in_the_table_counts_a_workflow_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [StageRow("long", "t", None, "m", i, 3, success=0.0) for i in range(3)]
    write_traces(tmp_path, stages=[*rows, StageRow("short", "u", None, "m", 0, 1, success=1.0)])
    assert command("info", tmp_path) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].split() == ["m", "4", "2", "0.500", "-", "-"]
    assert "(none) 4" in shown


def test_user_errors_are_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("info", tmp_path) == 2
    assert command("import", "routellm", tmp_path / "none", "--out", tmp_path / "o") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("chimera: ") for line in errors)
    assert not (tmp_path / "o").exists()
