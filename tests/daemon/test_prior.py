"""The running averages behind the first predictions."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_daemon import prior as prior_module
from chimera_daemon.config import Config, EngineConfig, ModelConfig
from chimera_daemon.messages import (
    LEVELS,
    Hints,
    ModelPrediction,
    Prediction,
    Stage,
    StageOutcome,
    Usage,
    WorkflowEnded,
)
from chimera_daemon.prior import PriorPredictor

MODELS = (
    ModelConfig("small", confidence=0.4, output_tokens=50),
    ModelConfig("large", confidence=0.8, output_tokens=100),
)


def stage(kind: str = "", number: int = 0, hints: Hints | None = None) -> Stage:
    return Stage(b"c", "r", "w", number, kind, None, 10, 256, 40, 0, False, False, hints)


def predict(prior: PriorPredictor, *args: Any, **named: Any) -> Prediction:
    """What it says; it answers at once."""
    got: list[Prediction] = []
    prior.predict(stage(*args, **named), b"", lambda _, prediction: got.append(prediction))
    return got[0]


def observe(prior: PriorPredictor, model: str, tokens: int, n: int = 1, kind: str = "") -> None:
    for _ in range(n):
        prior.observe_stage(stage(kind), model, Usage(10, tokens), None)


def ended(success: float | None, *stages: tuple[str, int], kind: str = "") -> WorkflowEnded:
    outcomes = tuple(StageOutcome(i, m, 10, tokens) for i, (m, tokens) in enumerate(stages))
    return WorkflowEnded("w", kind, success, outcomes)


@pytest.fixture
def prior() -> PriorPredictor:
    return PriorPredictor(Config(models=MODELS))


def test_starts_from_the_configuration(prior: PriorPredictor) -> None:
    prediction = predict(prior)
    assert prediction.source == "prior"
    assert prediction.models.keys() == {"small", "large"}
    assert prediction.of("small").confidence == 0.4
    assert prediction.of("large").stage_tokens_mean == 100
    assert prediction.of("unheard of") == prediction.other
    assert prediction.other.confidence == ModelConfig("x").confidence


def test_models_of_engines_are_known() -> None:
    engines = (EngineConfig("e", "m", "echo"),)
    assert predict(PriorPredictor(Config(engines=engines))).models.keys() == {"m"}


def test_model_that_joins(prior: PriorPredictor) -> None:
    predict(prior)
    prior.add_model("new")
    assert "new" in predict(prior).models
    observe(prior, "new", 10, 100)
    assert predict(prior).of("new").stage_tokens_mean < 20


def test_little_is_trusted_little(prior: PriorPredictor) -> None:
    """One value moves the mean a little, many move it nearly all the way."""
    observe(prior, "large", 10)
    after_one = predict(prior).of("large").stage_tokens_mean
    assert 70 < after_one < 100
    observe(prior, "large", 10, 200)
    assert 10 <= predict(prior).of("large").stage_tokens_mean < 12
    assert predict(prior).of("small").stage_tokens_mean == 50


def test_stage_without_a_kind_counts_once(prior: PriorPredictor) -> None:
    prior.observe_stage(stage(""), "small", Usage(10, 10), None)
    assert {cell.stage.seen for cell in prior._cells.values()} == {1}


def test_backs_off_from_stage_to_kind_to_model(prior: PriorPredictor) -> None:
    for _ in range(300):
        prior.observe_stage(stage("code", 0), "small", Usage(10, 400), None)
        prior.observe_stage(stage("code", 1), "small", Usage(10, 200), None)
        prior.observe_stage(stage("math", 0), "small", Usage(10, 20), None)

    def tokens(kind: str, number: int) -> float:
        return predict(prior, kind, number).of("small").stage_tokens_mean

    assert tokens("code", 0) > 380
    assert 190 < tokens("code", 1) < 220
    assert 280 < tokens("code", 7) < 320  # a stage never seen: the kind
    assert tokens("math", 0) < 30
    assert 180 < tokens("poem", 0) < 230  # a kind never seen: the model
    assert predict(prior, "code").of("large").stage_tokens_mean == 100  # another model: nothing


def test_late_stages_are_taken_together(prior: PriorPredictor) -> None:
    for number in (15, 40, 99_999):
        prior.observe_stage(stage("k", number), "small", Usage(10, 10), None)
    assert len(prior._cells) == 3
    assert predict(prior, "k", 500) is predict(prior, "k", 15)


def test_workflow_teaches_remaining_work(prior: PriorPredictor) -> None:
    for _ in range(300):
        prior.observe_workflow(ended(None, ("small", 100), ("large", 50), ("small", 10), kind="k"))
    first = predict(prior, "k", 0).of("small")
    assert 155 < first.remaining_tokens_mean < 161
    assert 1.9 < first.remaining_stages <= 2.0
    last = predict(prior, "k", 2).of("small")
    assert last.remaining_tokens_mean < 15
    assert last.remaining_stages < 0.1
    assert predict(prior, "k", 1).of("large").remaining_tokens_mean < 65
    assert first.confidence == pytest.approx(0.4)  # no outcome was given


def test_success_counts_for_all_models_of_the_workflow(prior: PriorPredictor) -> None:
    for _ in range(200):
        prior.observe_workflow(ended(1.0, ("small", 5), ("small", 5)))
        prior.observe_workflow(ended(0.0, ("large", 5)))
    assert predict(prior).of("small").confidence > 0.95
    assert predict(prior).of("large").confidence < 0.05
    # A workflow is one outcome, however many stages it had.
    assert prior._cells["small", "", -1].success.seen == 200


def test_old_values_are_forgotten(prior: PriorPredictor) -> None:
    observe(prior, "small", 1000, 5000)
    observe(prior, "small", 10, 5000)
    assert predict(prior).of("small").stage_tokens_mean < 30
    assert predict(prior).of("small").stage_tokens[2] < 30


def test_what_is_learned_shows_soon(prior: PriorPredictor) -> None:
    """Predictions are cached; at first for no new value, later for few."""
    before = predict(prior)
    assert predict(prior) is before
    observe(prior, "small", 10)
    assert predict(prior) is not before
    observe(prior, "small", 10, 10_000)
    cached = predict(prior)
    observe(prior, "small", 500, 64)
    assert predict(prior) is cached
    observe(prior, "small", 500, 1)
    assert predict(prior).of("small").stage_tokens_mean > cached.of("small").stage_tokens_mean


def ordered(predicted: ModelPrediction) -> bool:
    return all(
        0 <= low <= middle <= high
        for low, middle, high in (predicted.stage_tokens, predicted.remaining_tokens)
    )


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["", "a", "b"]), st.integers(0, 20), st.integers(0, 10**7)),
            st.tuples(
                st.one_of(st.none(), st.floats(0, 1)), st.lists(st.integers(0, 10**7), max_size=4)
            ),
        ),
        max_size=60,
    )
)
def test_predictions_make_sense(events: list[tuple[Any, ...]]) -> None:
    prior = PriorPredictor(Config(models=MODELS))
    for event in events:
        if len(event) == 3:
            prior.observe_stage(stage(event[0], event[1]), "small", Usage(10, event[2]), None)
        else:
            prior.observe_workflow(ended(event[0], *(("small", n) for n in event[1])))
        for kind in ("", "a", "never"):
            prediction = predict(prior, kind, 1)
            for predicted in (*prediction.models.values(), prediction.other):
                assert ordered(predicted)
                assert 0.0 <= predicted.confidence <= 1.0
                assert 0.0 <= predicted.stage_tokens_mean <= 10**7
                assert predicted.remaining_stages >= 0.0


def test_hints_replace(prior: PriorPredictor) -> None:
    hints = Hints(500, 700, 3, {"small": 0.9, "unheard of": 0.1})
    prediction = predict(prior, hints=hints)
    small, large = prediction.of("small"), prediction.of("large")
    assert small.confidence == 0.9
    assert large.confidence == 0.8
    for predicted in (small, large, prediction.other):
        assert predicted.stage_tokens_mean == 500
        assert predicted.stage_tokens == (500, 500, 500)  # certain
        assert predicted.remaining_tokens_mean == 700
        assert predicted.remaining_tokens == (700, 700, 700)
        assert predicted.remaining_stages == 3
    assert predict(prior).of("small").stage_tokens_mean == 50  # of this stage only


def test_hints_in_part(prior: PriorPredictor) -> None:
    plain = predict(prior).of("small")
    assert predict(prior, hints=Hints()).of("small") == plain
    # What remains is never less than this stage.
    long = predict(prior, hints=Hints(output_tokens=1000)).of("small")
    assert long.remaining_tokens_mean == 1000
    assert long.remaining_tokens == (1000, 1000, 1000)
    short = predict(prior, hints=Hints(output_tokens=1)).of("small")
    assert short.remaining_tokens_mean == plain.remaining_tokens_mean
    none = predict(prior, hints=Hints(output_tokens=0, remaining_tokens=0)).of("small")
    assert none.stage_tokens == none.remaining_tokens == (0, 0, 0)


def test_kinds_cannot_fill_the_memory(prior: PriorPredictor) -> None:
    for number in range(5000):
        prior.observe_stage(stage(f"kind {number}", number), "small", Usage(10, 10), None)
        predict(prior, f"kind {number}", number)
    assert len(prior._kinds) <= prior_module._MAX_KINDS + 1
    assert len(prior._cells) <= 1 + 65 * 17
    assert len(prior._cache) <= prior_module._MAX_KINDS * 16 + 1
    assert predict(prior, "yet another", 3).of("small").stage_tokens_mean < 20


def test_models_cannot_fill_the_memory(prior: PriorPredictor) -> None:
    for number in range(3000):
        prior.add_model(f"model {number}")
        observe(prior, f"model {number}", 10)
    assert len(prior._models) == prior_module._MAX_MODELS
    assert len(prior._cells) <= 2 * prior_module._MAX_MODELS
    assert predict(prior).of("model 2999") == predict(prior).other


@given(values=st.lists(st.integers(0, 20) | st.floats(0.0, 1e6), max_size=400))
def test_quantiles_are_those_of_the_last_values(values: list[float]) -> None:
    lengths = prior_module._Lengths()
    for value in values:
        lengths.add(value)
    if not values:
        assert lengths.quantiles((1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)
        return
    ordered = sorted(values[-128:])
    weight = lengths.seen / (lengths.seen + prior_module._TRUST)
    expected = [weight * ordered[round(level * (len(ordered) - 1))] for level in LEVELS]
    assert lengths.quantiles((0.0, 0.0, 0.0)) == pytest.approx(expected)
