"""Numeric features: finite for anything, and telling what they are named after."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_predictors import features
from chimera_predictors.records import PastStage, StageQuery

tokens = st.integers(-5, 10**12)
past_stages = st.builds(
    PastStage,
    model=st.text(max_size=3),
    prompt_tokens=tokens,
    output_tokens=st.none() | tokens,
    verdict=st.none() | st.floats(),
    logprob=st.none() | st.floats(),
)
queries = st.builds(
    StageQuery,
    kind=st.text(max_size=5),
    stage=st.integers(-3, 10**6),
    task_text=st.text(max_size=50),
    new_text=st.text(max_size=50),
    prompt_tokens=tokens,
    past=st.lists(past_stages, max_size=4).map(tuple),
)


@given(st.lists(queries, max_size=3))
def test_any_query_gives_finite_numbers(given: list[StageQuery]) -> None:
    table = features.numbers(given)
    assert table.shape == (len(given), len(features.NAMES))
    assert np.isfinite(table).all()
    assert all(0 <= features.stage_group(query) < features.STAGES for query in given)


def number(query: StageQuery, name: str) -> float:
    return float(features.numbers([query])[0, features.NAMES.index(name)])


def test_later_signals_change_what_is_named_after_them_only() -> None:
    past = PastStage("m", 100, 50)
    judged = PastStage("m", 100, 50, verdict=0.0, logprob=-0.25)
    plain, later = (StageQuery(stage=1, prompt_tokens=200, past=(p,)) for p in (past, judged))
    differing = np.flatnonzero(features.numbers([plain])[0] != features.numbers([later])[0])
    names = {features.NAMES[index] for index in differing}
    assert names == {
        "verdict_known", "verdict_last", "verdicts_bad",
        "logprob_known", "logprob_last", "logprob_mean",
    }  # fmt: skip
    assert number(later, "verdict_last") == -0.5
    assert number(later, "logprob_last") == pytest.approx(0.5)


def test_an_unknown_signal_is_not_a_good_one() -> None:
    good = StageQuery(stage=1, past=(PastStage("m", 1, 1, verdict=1.0),))
    unknown = StageQuery(stage=1, past=(PastStage("m", 1, 1),))
    assert number(good, "verdict_known") == 1.0
    assert number(unknown, "verdict_known") == 0.0


def test_text_beyond_what_traces_keep_changes_nothing() -> None:
    short, long = (StageQuery(task_text="7" * 2000 + rest) for rest in ("", "x, 1" * 1000))
    assert (features.numbers([short]) == features.numbers([long])).all()


def test_new_text_counts_from_the_second_stage_on() -> None:
    assert number(StageQuery(stage=0, new_text="1 2 3"), "new_digits") == 0.0
    assert number(StageQuery(stage=1, new_text="1 2 3"), "new_digits") == pytest.approx(np.log1p(3))
