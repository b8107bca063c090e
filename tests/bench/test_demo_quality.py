"""The demo's word on its own predictions: judged by what really happened, and by nothing else."""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from chimera_bench import quality, report
from chimera_bench.workload import Record
from chimera_predictors.records import Forecast, StageLog, StageQuery, WorkflowLog
from tests.bench.demo_records import failed, record, stage


def learned(number: int, confidence: float, source: str = "learned") -> Record:
    answered = msgspec.structs.replace(stage(), source=source, confidence={"m": confidence})
    return record(number, 1.0, True, answered)


def outcomes(right: Sequence[bool]) -> list[Record]:
    return [record(number, 1.0, success) for number, success in enumerate(right)]


def test_confidence_is_judged_by_the_runs_of_that_model_alone() -> None:
    ours = [learned(n, confidence) for n, confidence in enumerate((0.9, 0.2, 0.8, 0.1))]
    runs = {"chimera": [ours], "static:m": [outcomes((True, False, True, False))]}
    assert quality.router_auc("chimera", runs)["m"].value == 1.0
    runs["static:m"] = [outcomes((False, True, False, True))]
    assert quality.router_auc("chimera", runs)["m"].value == 0.0
    assert quality.router_auc("chimera", {"chimera": [ours]}) == {}


def test_what_was_not_predicted_or_not_answered_is_left_out() -> None:
    ours = [learned(0, 0.9), learned(1, 0.2), learned(2, 0.1, "fallback"), learned(3, 0.1)]
    theirs = [*outcomes((True, False, True)), failed(3, "engine_lost")]
    found = quality.router_auc("chimera", {"chimera": [ours], "static:m": [theirs]})
    assert found["m"].value == 1.0


class OneModel:
    """Predicts 10, 20 and 30 remaining tokens per stage that is still to come."""

    levels = (0.1, 0.5, 0.9)

    def predict(self, queries: Sequence[StageQuery]) -> list[dict[str, Forecast]]:
        return [{"m": self._forecast(2 - query.stage)} for query in queries]

    @staticmethod
    def _forecast(left: int) -> Forecast:
        remaining = (10.0 * left, 20.0 * left, 30.0 * left)
        return Forecast(0.5, 20.0, remaining, 20.0, remaining, float(left))


def test_lengths_are_judged_by_the_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chimera_predictors.predictor.load", lambda *_, **__: OneModel())
    lengths = ((20, 20), (25, 15), (95, 5))  # the last workflow is longer than foreseen
    logs = [
        WorkflowLog(f"w{n}", tuple(StageLog("m", f"text {n}", 5, tokens) for tokens in both))
        for n, both in enumerate(lengths)
    ]
    lines = [msgspec.json.encode(log).decode() for log in logs]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    ours = [learned(0, 0.9), learned(1, 0.5, "fallback")]
    found = quality.judge("chimera", "bundle", {"chimera": [ours]}, tmp_path)
    assert found.stages == 6
    assert found.coverage.value == pytest.approx(4 / 6)  # all but both stages of the last one
    assert found.remaining_kendall.value < 0.1  # ties are no order
    assert found.in_time == 0.5
    said = report.predictions(found)
    assert "covers 67" in said
    assert "50.0 % of stages in time" in said


def test_without_traces_nothing_is_claimed(tmp_path: Path) -> None:
    found = quality.judge("chimera", "bundle", {"chimera": [[]]}, tmp_path)
    assert math.isnan(found.in_time)
    assert math.isnan(found.coverage.value)
    assert "no static rows" in report.predictions(found)
