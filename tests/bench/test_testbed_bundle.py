"""The committed bundle: small, complete in itself, and better than knowing nothing."""

from pathlib import Path

import pytest

from chimera_bench import demo, workload
from chimera_bench.testbed import tasks, workflows
from chimera_daemon import config as configuration
from chimera_predictors.records import StageQuery
from chimera_predictors.text import new_text

FOLDER = Path(tasks.__file__).parent / "predictor"


@pytest.fixture(scope="module")
def predictor():  # noqa: ANN201 - its class needs torch
    pytest.importorskip("torch")
    from chimera_predictors.predictor import load

    return load(FOLDER, device="cpu")


def queries(difficulties: tuple[int, ...]) -> list[StageQuery]:
    shape = workflows.shape("planner_solver")
    made = tasks.generate("validation", 60, seed=9, difficulties=difficulties)
    texts = [workflows.messages_for(0, task, shape, [])[0]["content"] for task in made]
    return [
        StageQuery(f"{task.kind}-{shape.name}", 0, text, text, len(text) // 4)
        for task, text in zip(made, texts, strict=True)
    ]


def test_the_testbed_uses_it() -> None:
    config = configuration.load(demo._TESTBED)
    assert config.predictor.bundle == str(FOLDER)
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 1_500_000
    # No weights from elsewhere are needed: a fresh machine may have no network.
    assert (FOLDER / "encoder" / "model.safetensors").is_file()


def test_it_knows_models_and_kinds_of_the_demo(predictor) -> None:  # noqa: ANN001
    config = configuration.load(demo._TESTBED)
    assert predictor.models == {engine.model for engine in config.engines}
    assert set(predictor.bundle.info.kinds) == {job.kind for job in workload.jobs(200, 1.0, 1)}
    assert all(gate.confidence and gate.lengths for gate in predictor.bundle.info.gates)


def test_it_tells_easy_from_hard_and_small_from_large(predictor) -> None:  # noqa: ANN001
    easy, hard = predictor.predict(queries((1, 2))), predictor.predict(queries((5, 6)))

    def mean(forecasts: list, model: str, field: str) -> float:
        return sum(getattr(f[model], field) for f in forecasts) / len(forecasts)

    assert mean(easy, "testbed-s", "confidence") > mean(hard, "testbed-s", "confidence") + 0.3
    assert mean(hard, "testbed-l", "confidence") > mean(hard, "testbed-s", "confidence") + 0.4
    for model in predictor.models:
        longer = mean(hard, model, "remaining_tokens_mean")
        assert longer > 1.5 * mean(easy, model, "remaining_tokens_mean")


def test_training_saw_the_text_that_the_daemon_sees() -> None:
    """A later stage adds its instruction alone: the answers before it are not new."""
    shape = workflows.shape("planner_solver_verifier")
    (task,) = tasks.generate("validation", 1, seed=1)
    messages = workflows.messages_for(2, task, shape, ["plan", "solution"])
    assert new_text([(m["role"], m["content"]) for m in messages]) == "Verify."
