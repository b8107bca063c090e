"""Which rows count, how methods compare, and what a report says and writes."""

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from chimera_predictors import eval_cli, plots
from chimera_predictors.baselines import Prior
from chimera_predictors.evaluate import (
    EvalError,
    RowPredictions,
    data_digest,
    default_pairs,
    evaluate,
    out_of_fold,
    task_groups,
)
from chimera_predictors.options import Options
from chimera_predictors.records import StageLog, WorkflowLog
from chimera_predictors.report import Key, Report
from chimera_predictors.traces import Traces
from fake_traces import make_traces

LEVELS = (0.1, 0.5, 0.9)
PAIR = ("small", "large")


def oracle(traces: Traces, noise: float = 0.0, seed: int = 0) -> RowPredictions:
    """The truth, or something near it."""
    rng = np.random.default_rng(seed)
    wrong = noise * rng.normal(size=len(traces))
    factors = np.exp(noise * np.array([-1.28, 0.0, 1.28]))

    def lengths(tokens: np.ndarray) -> np.ndarray:
        return (tokens * np.exp(wrong))[:, None] * factors

    return RowPredictions(
        confidence=np.clip(traces.success + wrong, 0.0, 1.0),
        levels=LEVELS,
        stage_tokens=lengths(traces.output_tokens),
        remaining_tokens=lengths(traces.remaining_tokens),
    )


@pytest.fixture
def traces() -> Traces:
    return make_traces()


def test_the_truth_gets_the_best_figures(traces: Traces) -> None:
    report = evaluate({"oracle": oracle(traces)}, traces, [PAIR], bootstrap=20)
    best = {
        Key("router", "auc"): 1.0,
        Key("router", "ap", "model=small"): 1.0,
        Key("router_all", "brier"): 0.0,
        Key("router", "ece"): 0.0,
        Key("router", "gap_pearson", "pair=small:large"): 1.0,
        Key("remaining", "kendall"): 0.0,
        Key("remaining", "kendall", "stage=1"): 0.0,
        Key("stage", "kendall", "model=large"): 0.0,
        Key("remaining", "r2_log"): 1.0,
        Key("remaining", "pinball"): 0.0,
        Key("stage", "coverage"): 1.0,
    }
    assert {key: report.figure("oracle", key).value for key in best} == pytest.approx(best)
    assert report.figure("oracle", Key("router", "apgr", "pair=small:large")).value > 0.7


def test_the_median_is_measured_and_the_others_make_the_band(traces: Traces) -> None:
    wide = np.column_stack(
        [np.ones(len(traces)), traces.remaining_tokens, np.full(len(traces), 1e6)]
    )
    report = evaluate({"wide": replace(oracle(traces), remaining_tokens=wide)}, traces, bootstrap=5)
    assert report.figure("wide", Key("remaining", "kendall")).value == 0.0
    assert report.figure("wide", Key("remaining", "r2_log")).value == 1.0
    assert report.figure("wide", Key("remaining", "coverage")).value == 1.0
    assert report.figure("wide", Key("remaining", "pinball@0.5")).value == 0.0
    assert report.figure("wide", Key("remaining", "pinball")).value > 0.1


def test_quantiles_between_a_methods_levels_are_interpolated(traces: Traces) -> None:
    tokens = traces.remaining_tokens[:, None] * np.array([0.5, 0.8, 1.25, 2.0])
    other = RowPredictions(traces.success, (0.05, 0.4, 0.6, 0.9), tokens, tokens)
    report = evaluate({"other": other}, traces, bootstrap=5)
    assert report.figure("other", Key("remaining", "r2_log")).value == pytest.approx(1.0, abs=1e-3)
    assert report.figure("other", Key("remaining", "coverage")).value == 1.0


def test_stage_0_alone_makes_the_router_figures(traces: Traces) -> None:
    blind = oracle(traces)
    later_only = replace(
        blind, confidence=np.where(traces.stage == 0, 1 - traces.success, blind.confidence)
    )
    report = evaluate({"method": later_only}, traces, bootstrap=5)
    assert report.figure("method", Key("router", "auc")).value == 0.0
    assert 0.2 < report.figure("method", Key("router_all", "auc")).value < 0.8


def test_all_methods_are_measured_on_the_same_rows(traces: Traces) -> None:
    good, partial = oracle(traces, 0.3), oracle(traces, 0.3)
    unknown = traces.model == 1
    partial = replace(
        partial,
        confidence=np.where(unknown, np.nan, partial.confidence),
        stage_tokens=np.where(unknown[:, None], np.nan, partial.stage_tokens),
        remaining_tokens=np.where(unknown[:, None], np.nan, partial.remaining_tokens),
    )
    report = evaluate({"good": good, "partial": partial}, traces, bootstrap=5)
    assert report.about["counted"]["router"] == 60
    assert report.about["left_out"]["partial"]["remaining"] == 120
    assert report.about["unknown_models"] == {"good": {}, "partial": {"small": 120}}
    for key in (Key("router", "brier"), Key("remaining", "kendall")):
        assert report.figure("good", key) == report.figure("partial", key)
    assert np.isnan(report.figure("good", Key("router", "auc", "model=small")).value)
    assert any("does not know these models: small (120 rows)" in line for line in report.notes())


def test_a_method_without_lengths_takes_no_rows_from_the_others(traces: Traces) -> None:
    nothing = np.full((len(traces), 3), np.nan)
    router = replace(oracle(traces), stage_tokens=nothing, remaining_tokens=nothing)
    report = evaluate({"router": router, "all": oracle(traces)}, traces, bootstrap=5)
    assert report.figure("all", Key("remaining", "kendall")).value == 0.0
    assert np.isnan(report.figure("router", Key("remaining", "kendall")).value)
    assert report.about["left_out"]["router"] == {"router": 0, "router_all": 0}


def test_unknown_labels_are_masked(traces: Traces) -> None:
    lost = np.arange(len(traces)) % 3 == 0
    masked = replace(
        traces,
        success=np.where(lost, np.nan, traces.success),
        remaining_tokens=np.full(len(traces), np.nan),
    )
    report = evaluate({"oracle": oracle(traces)}, masked, bootstrap=5)
    assert report.about["counted"]["router_all"] == int((~lost).sum())
    assert report.figure("oracle", Key("router", "auc")).value == 1.0
    assert np.isnan(report.figure("oracle", Key("remaining", "kendall")).value)
    assert report.figure("oracle", Key("stage", "kendall")).value == 0.0


def test_paired_difference_sees_what_intervals_hide(traces: Traces) -> None:
    sharp, blunt = oracle(traces, 0.5, seed=1), oracle(traces, 0.6, seed=1)
    report = evaluate({"sharp": sharp, "blunt": blunt}, traces, bootstrap=200)
    key = Key("remaining", "kendall")
    assert report.difference("sharp", "blunt", key).high < 0
    assert report.figure("sharp", key).high > report.figure("blunt", key).low


def test_figures_repeat_with_the_seed(traces: Traces) -> None:
    first, again, other = (
        evaluate({"m": oracle(traces, 0.4)}, traces, seed=seed, bootstrap=50).figure(
            "m", Key("router", "auc")
        )
        for seed in (1, 1, 2)
    )
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert first.value == other.value


def test_tasks_of_one_text_are_one_to_the_bootstrap(traces: Traces) -> None:
    texts = ["Same  text", " same text\n", "", "", *traces.task_text[4:]]
    group = task_groups(replace(traces, task_text=texts))
    of_task = [int(group[traces.task == task][0]) for task in range(4)]
    assert of_task[0] == of_task[1]
    assert len(set(of_task)) == 3


def test_digest_follows_the_data(traces: Traces) -> None:
    changed = traces.success.copy()
    changed[3] = 1 - changed[3]
    assert data_digest(traces) == data_digest(make_traces())
    assert data_digest(traces) != data_digest(replace(traces, success=changed))
    assert data_digest(traces) != data_digest(traces.without_kind())


def test_default_pairs_go_from_the_worst_to_the_best() -> None:
    traces = make_traces(200, models=("best", "worse", "worst"))
    success = np.where(traces.model == 2, 0.0, traces.success)
    pairs = default_pairs(replace(traces, success=success))
    assert pairs == [("worst", "best"), ("worst", "worse"), ("worse", "best")]
    assert default_pairs(replace(traces, success=np.full(len(traces), np.nan))) == []
    assert default_pairs(make_traces(10)) == []  # too few tasks in common


def test_an_unknown_model_of_a_pair_is_named(traces: Traces) -> None:
    with pytest.raises(EvalError, match="'huge'.*large, small"):
        evaluate({"m": oracle(traces)}, traces, [("small", "huge")])


def test_nothing_to_compare_is_an_error(traces: Traces) -> None:
    unknown = np.full(len(traces), np.nan)
    bare = replace(traces, success=unknown, output_tokens=unknown, remaining_tokens=unknown)
    with pytest.raises(EvalError, match="nothing to compare"):
        evaluate({"m": oracle(traces)}, bare)


class Counting:
    """Predicts for each row how many rows it was trained on."""

    name = "counting"

    def fit(self, train: Traces) -> None:
        self.tasks = set(train.task_ids)

    def predict(self, test: Traces) -> RowPredictions:
        assert not self.tasks & set(test.task_ids)
        tokens = np.repeat(test.output_tokens[:, None], 3, axis=1)
        return RowPredictions(test.success, LEVELS, tokens, tokens)


def test_out_of_fold_rows_come_back_in_their_order(traces: Traces) -> None:
    lines: list[str] = []
    found = out_of_fold(Counting(), traces, traces.fold_of(4, seed=1), lines.append)
    assert (found.stage_tokens[:, 1] == traces.output_tokens).all()
    assert (found.confidence == traces.success).all()
    assert lines[-1] == "counting: fold 4 of 4"


@pytest.fixture
def report(traces: Traces) -> Report:
    methods = {"first": oracle(traces, 0.3), "second": oracle(traces, 0.9, seed=2)}
    return evaluate(methods, traces, [PAIR], bootstrap=60)


def test_report_prints_figures_intervals_and_differences(report: Report) -> None:
    written = io.StringIO()
    console = Console(file=written, width=200)
    for table in report.tables():
        console.print(table)
    text = written.getvalue()
    low, high = report.figure("first", Key("router", "auc"))[1:]
    assert f"[{low:.3f}, {high:.3f}]".replace("0.", ".") in text
    assert "APGR: small → large" in text
    assert "first minus the others" in text
    assert "Kendall: stage 1" in text


def test_report_is_json_with_null_for_undefined(report: Report, traces: Traces) -> None:
    one_outcome = replace(traces, success=np.ones(len(traces)))
    report = evaluate({"first": oracle(one_outcome, 0.1)}, one_outcome, bootstrap=10)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["methods"]["first"]["router"]["auc"]["all"]["value"] is None
    assert content["methods"]["first"]["remaining"]["coverage"]["stage=0"]["high"] <= 1
    assert content["undefined"]["first"] >= 3
    assert content["about"]["seed"] == 0
    assert any("undefined" in line for line in report.notes())


def test_differences_are_written_too(report: Report) -> None:
    differences = report.to_dict()["differences"]
    assert isinstance(differences, dict)
    assert differences["first - second"]["remaining"]["kendall"]["all"]["high"] < 0


def test_plots_are_written(tmp_path: Path, traces: Traces) -> None:
    near = oracle(traces, 0.4)
    nothing = np.full(len(traces), np.nan)
    plots.reliability(
        tmp_path / "a.png", {"near": near.confidence, "none": nothing}, traces.success
    )
    low, middle, high = near.remaining_tokens.T
    plots.length_scatter(tmp_path / "b.png", {"near": (low, middle, high)}, traces.remaining_tokens)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(EvalError, match="cannot write"):
        plots.reliability(tmp_path / "no" / "a.png", {"m": near.confidence}, traces.success)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    eval_cli.add(parser.add_subparsers())
    return parser.parse_args(["eval", *arguments])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--traces", "t"],
        ["--traces", "t", "--folds", "1"],
        ["--traces", "t", "--holdout", "1.5"],
        ["--traces", "t", "--folds", "3", "--bundle", "b"],
        ["--traces", "t", "--folds", "3", "--baselines", "tfidf,forrest"],
    ],
)
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*wrong)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_user_errors_are_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    for arguments, message in (
        (["--traces", missing, "--folds", "3"], missing),
        (["--traces", missing, "--bundle", "b", "--baselines", "all"], "--train-traces"),
        (["--traces", missing, "--folds", "3", "--train-traces", "x"], "--train-traces"),
        (["--traces", missing, "--folds", "3", "--json", f"{missing}/a.json"], "does not exist"),
    ):
        chosen = parse(*arguments)
        assert chosen.run(chosen) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("chimera: ")
        assert message in last


def write_folder(folder: Path, traces: Traces) -> Path:
    """The traces as JSONL, which keeps all that the evaluation looks at."""
    folder.mkdir()
    lines: list[bytes] = []
    for workflow in range(len(traces.workflow_ids)):
        rows = np.flatnonzero(traces.workflow == workflow)
        log = WorkflowLog(
            workflow_id=traces.workflow_ids[workflow],
            task_id=traces.task_ids[traces.task[rows[0]]],
            kind=str(traces.kind[rows[0]]),
            success=float(traces.success[rows[0]]),
            stages=tuple(
                StageLog(
                    model=traces.models[traces.model[row]],
                    prompt_text=traces.new_text[row],
                    prompt_tokens=int(traces.prompt_tokens[row]),
                    output_tokens=int(traces.output_tokens[row]),
                )
                for row in rows
            ),
        )
        lines.append(msgspec.json.encode(log))
    (folder / "runs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


class Learned(Prior):
    """Takes the place of the trained model, which other tests are about."""

    name = "joint"

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.seed = options.seed


class Loaded(Prior):
    """Takes the place of a bundle that does not know the small model."""

    name = "bundle"

    def __init__(self, bundle: Traces) -> None:
        super().__init__()
        self.fit(bundle)

    def predict(self, test: Traces) -> RowPredictions:
        found = super().predict(test)
        known = test.model != test.models.index("small")
        return replace(found, confidence=np.where(known, found.confidence, np.nan))


class Stored(Prior):
    """Takes the place of a bundle's prior."""

    def __init__(self, bundle: Traces) -> None:
        super().__init__()
        self.fit(bundle)


@pytest.fixture
def _learned(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from chimera_predictors import predictor, trainer

    monkeypatch.setattr(trainer, "JointMethod", Learned)
    monkeypatch.setattr(trainer, "BundleMethod", Loaded)
    monkeypatch.setattr(trainer, "PriorMethod", Stored)
    monkeypatch.setattr(predictor, "load", lambda path: make_traces(seed=9))


@pytest.mark.usefixtures("_learned")
@pytest.mark.parametrize("way", [["--folds", "3"], ["--holdout", "0.4", "--hide-kind"]])
def test_the_command_trains_and_evaluates_out_of_fold(
    way: list[str], tmp_path: Path, traces: Traces, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "traces", traces)
    written = tmp_path / "figures.json"
    options = ["--baselines", "tfidf", "--bootstrap", "10", "--pairs", "small:large"]
    chosen = parse(
        *["--traces", str(folder), *way, *options],
        *["--json", str(written), "--plots", str(tmp_path / "plots")],
    )
    assert chosen.run(chosen) == 0
    content = json.loads(written.read_text())
    assert list(content["methods"]) == ["joint", "prior", "tfidf"]
    counted = content["about"]["counted"]["router"]
    assert counted == 120 if "--folds" in way else 30 < counted < 70
    assert content["hide_kind"] == ("--hide-kind" in way)
    shown = capsys.readouterr()
    assert "joint minus the others" in shown.out
    assert "tfidf: " in shown.err
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "reliability.png",
        "length.png",
    }


@pytest.mark.usefixtures("_learned")
def test_the_command_evaluates_a_bundle_beside_its_prior(
    tmp_path: Path, traces: Traces, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "traces", traces)
    other = write_folder(tmp_path / "others", make_traces(30, seed=5))
    written = tmp_path / "figures.json"
    chosen = parse(
        *["--traces", str(folder), "--bundle", "b", "--json", str(written), "--bootstrap", "5"],
        *["--baselines", "tfidf", "--train-traces", str(other)],
    )
    assert chosen.run(chosen) == 0
    content = json.loads(written.read_text())
    assert list(content["methods"]) == ["bundle", "prior", "tfidf"]
    assert content["about"]["counted"]["router"] == 60
    assert content["about"]["left_out"]["bundle"]["router"] == 60
    shown = capsys.readouterr()
    assert "bundle says nothing for some rows (60 of router" in shown.out
    assert "warning" not in shown.err

    chosen.train_traces = [folder]
    assert chosen.run(chosen) == 0
    assert "warning: 60 of the 60 tasks are also in --train-traces" in capsys.readouterr().err


def test_pairs_of_names_with_colons() -> None:
    models = ("qwen:7b", "qwen:72b")
    assert eval_cli.parse_pairs(["qwen:7b:qwen:72b"], models) == [models]
    with pytest.raises(EvalError, match="SMALL:LARGE"):
        eval_cli.parse_pairs(["qwen:7b:gpt"], models)
