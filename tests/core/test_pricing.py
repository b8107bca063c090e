"""The learned price: what is judged late, when, and that the target is kept."""

from collections.abc import Callable
from math import exp
from random import Random
from typing import Any

import pytest

from chimera_daemon.messages import Dispatch, Fail, Profile, WorkflowClosed
from chimera_daemon.pricing import LearnedPrice
from chimera_daemon.state import Workflow
from core_harness import Watched, of, predict, prediction

Make = Callable[..., Watched]

START = 0.1
LATE, IN_TIME = 0.95, -0.05  # steps of log price


def price(s: Watched) -> float:
    """As it is."""
    return s.core.snapshot()["price"]["now"]


def after(*steps: float) -> Any:
    """The price after these, which shrink as they begin with the first workflow."""
    return pytest.approx(START * exp(sum(10 / (10 + n) * x for n, x in enumerate(steps, 1))))


@pytest.fixture
def served(scheduler: Make) -> Watched:
    """A target of 10 s, and an engine with a slot for everyone."""
    s = scheduler(p95_target_s=10.0, price=START, reply_keep_s=1e6)
    s.join(slots=100)
    return s


@pytest.mark.parametrize(
    "config", [{}, {"p95_target_s": 0.0}, {"p95_target_s": 9.0, "policy": "paper"}]
)
def test_without_a_target_or_a_price_nothing_is_learned(
    scheduler: Make, config: dict[str, Any]
) -> None:
    s = scheduler(**config)
    s.join()
    s.submit()
    s.finish(1)
    assert s.core.snapshot()["price"] is None


def test_the_price_falls_a_little_with_each_workflow_in_time(served: Watched) -> None:
    for number in range(1, 4):
        served.submit(workflow_id=f"w{number}")
        served.now += 10.0
        served.finish(number)
        served.handle(WorkflowClosed(f"w{number}", 1.0))
        assert price(served) == after(*[IN_TIME] * number)


def test_a_late_workflow_counts_once_as_soon_as_it_is_late(served: Watched) -> None:
    served.submit(workflow_id="w")
    served.now = 10.0
    served.report("e", {})
    assert price(served) == START
    served.now = 10.1
    served.report("e", {})
    assert price(served) == after(LATE)
    served.finish(1)
    served.submit(workflow_id="w", stage=1)
    served.finish(2)
    served.handle(WorkflowClosed("w", 1.0))
    assert price(served) == after(LATE)
    assert served.core.snapshot()["price"] == {
        "now": after(LATE), "p95_target_s": 10.0, "within": 0, "over": 1,
    }  # fmt: skip


def test_a_workflow_that_its_client_closes_late_or_never_is_in_time(served: Watched) -> None:
    for name in ("late", "never"):
        served.submit(workflow_id=name)
        served.finish(served.last_attempt)
    served.now = 10.1
    served.handle(WorkflowClosed("late", 1.0))
    assert price(served) == after(IN_TIME, IN_TIME)


def test_a_workflow_that_goes_on_after_its_time_is_late_after_all(served: Watched) -> None:
    served.submit(workflow_id="w")
    served.finish(1)
    served.now = 10.1
    served.report("e", {})
    assert price(served) == after(IN_TIME)
    for number in (2, 3):
        served.submit(workflow_id="w", stage=number)
        assert price(served) == after(LATE)  # the step back, and the one up
        served.finish(number)
    shown = served.core.snapshot()["price"]
    assert (shown["within"], shown["over"]) == (0, 1)


def test_a_workflow_without_an_answer_tells_nothing(scheduler: Make) -> None:
    s = scheduler(p95_target_s=10.0, price=1.0)
    s.join()
    s.join("dear", "large", profile=Profile(100.0, 0.0, 0.0))
    hopeless = prediction(small=predict(1e5, 0.1), large=predict(1e5, 0.1))
    assert of(s.submit(hopeless, workflow_id="w", optional=True), Fail)
    s.handle(WorkflowClosed("w", 0.0))
    s.submit(workflow_id="left", request_id="given up")
    s.cancel("given up")
    s.sleep(20.0)
    s.handle(WorkflowClosed("left", None))
    shown = s.core.snapshot()["price"]
    assert (shown["now"], shown["within"], shown["over"]) == (1.0, 0, 0)


@pytest.mark.parametrize(("start", "bound"), [(0.0, 0.003), (1e-9, 0.003), (50.0, 1.0)])
def test_it_starts_within_its_bounds(scheduler: Make, start: float, bound: float) -> None:
    s = scheduler(p95_target_s=10.0, price=start)
    assert s.core.snapshot()["price"]["now"] == bound


def test_a_target_that_cannot_be_kept_does_not_wind_it_up() -> None:
    learned = LearnedPrice(START, 10.0)
    fed = _Fed(learned)
    for _ in range(1000):
        fed.one(late=True)
    assert learned.price == 1.0
    fed.one(late=False)
    assert learned.price == pytest.approx(exp(-0.005))
    for _ in range(10_000):
        fed.one(late=False)
    assert learned.price == 0.003


def test_it_finds_the_price_at_which_five_percent_are_late() -> None:
    """A workflow is late with chance .05 at a price of .2, more below, less above."""
    learned, draw = LearnedPrice(0.02, 10.0), Random(1)
    fed, late = _Fed(learned), 0
    for number in range(6000):
        over = draw.random() < min(0.05 * 0.2 / learned.price, 1.0)
        fed.one(late=over)
        late += over and number >= 1000
    assert late / 5000 == pytest.approx(0.05, abs=0.004)
    assert 0.1 < learned.price < 0.4


def test_it_moves_the_choice_of_models(scheduler: Make) -> None:
    """The large model is three times as slow and somewhat better; nobody is in time with it."""
    s = scheduler(p95_target_s=3.0, price=START)
    s.join("a", "small", slots=50)
    s.join("b", "large", slots=50, profile=Profile(0.03, 0.003, 0.0003))
    told = prediction(small=predict(100.0, 0.5), large=predict(100.0, 0.8))
    models: list[str] = []
    for _ in range(60):
        (sent,) = of(s.submit(told), Dispatch)
        models.append(sent.receipt.model)
        s.now += 1.0 if sent.receipt.model == "small" else 3.1
        s.finish(sent.attempt_id)
        s.handle(WorkflowClosed(f"w{len(models)}", 1.0))
    assert models[0] == "large"
    assert models.count("small") > 30


class _Fed:
    """Feeds workflows of one stage, one after the other."""

    def __init__(self, learned: LearnedPrice) -> None:
        self.learned = learned
        self.now = 0.0

    def one(self, *, late: bool) -> None:
        workflow = Workflow("w", "code")
        self.learned.begin(workflow, self.now)
        self.now += 10.1 if late else 5.0
        workflow.live["k"] = None  # pyright: ignore
        self.learned.pass_time(self.now)
        workflow.live.clear()
        workflow.outcomes.append(None)  # pyright: ignore
        self.learned.end(workflow)
        self.learned.check({})
