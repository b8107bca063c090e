"""What the daemon makes of predictors: late ones, broken ones, and what it tells them."""

import logging
from pathlib import Path

import pytest

from chimera_daemon.config import Config
from chimera_daemon.messages import (
    Cancel,
    Closed,
    CloseWorkflow,
    Prediction,
    Stage,
    Usage,
    WorkflowEnded,
)
from chimera_daemon.prior import Deliver, PriorPredictor
from tests.daemon.harness import ASK, World, body, run, until


class Deferred(PriorPredictor):
    """Answers when told to."""

    def __init__(self) -> None:
        super().__init__(Config())
        self.asked: list[tuple[Stage, Deliver]] = []
        self.cancelled: list[Stage] = []

    def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
        self.asked.append((stage, deliver))

    def deliver_all(self) -> None:
        asked, self.asked = self.asked, []
        for stage, deliver in asked:
            super().predict(stage, b"", deliver)

    def cancel(self, stage: Stage) -> None:
        self.cancelled.append(stage)


class Broken(PriorPredictor):
    """Fails in every way."""

    def __init__(self) -> None:
        super().__init__(Config())

    def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
        raise RuntimeError("predict")


class Deaf(PriorPredictor):
    """Cannot be told anything."""

    def __init__(self) -> None:
        super().__init__(Config())

    def observe_stage(self, stage: Stage, model: str, usage: Usage, logprob: float | None) -> None:
        raise RuntimeError("observe_stage")

    def observe_workflow(self, ended: WorkflowEnded) -> None:
        raise RuntimeError("observe_workflow")


def test_late_prediction(tmp_path: Path) -> None:
    async def test() -> None:
        predictor = Deferred()
        async with World(tmp_path, predictor=predictor) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r")
            raw.submit("r")  # attaches to the first
            await raw.pong()
            assert len(predictor.asked) == 1
            assert world.core.idle
            predictor.deliver_all()
            await raw.result("r")
            await raw.pong()
            assert len(raw.answers("r")) == 1
            world.check_empty()

    run(test())


def test_other_body_before_the_prediction(tmp_path: Path) -> None:
    async def test() -> None:
        predictor = Deferred()
        async with World(tmp_path, predictor=predictor) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r", body("one"))
            raw.submit("r", body("two"))
            await raw.failure("r", "conflict")
            predictor.deliver_all()
            await raw.answer("r", 2)
            world.check_empty()

    run(test())


def test_cancel_before_the_prediction(tmp_path: Path) -> None:
    async def test() -> None:
        predictor = Deferred()
        async with World(tmp_path, predictor=predictor) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r")
            raw.say(Cancel("r"))
            await raw.failure("r", "cancelled")
            assert [stage.request_id for stage in predictor.cancelled] == ["r"]
            predictor.deliver_all()
            await raw.pong()
            assert len(raw.answers("r")) == 1
            assert world.counter("submitted") == 0
            world.check_empty()

    run(test())


def test_cancel_of_a_repetition_before_its_prediction(tmp_path: Path) -> None:
    """The first is at work; both are one request, and it is cancelled."""

    async def test() -> None:
        predictor = Deferred()
        async with World(tmp_path, predictor=predictor) as world:
            host = await world.join(step_s=0.02, reply_tokens=(1000, 1000))
            raw = world.raw()
            raw.submit("r", max_tokens=1000)
            await until(lambda: predictor.asked)
            predictor.deliver_all()
            await until(lambda: host.running)
            raw.submit("r", max_tokens=1000)
            raw.say(Cancel("r"))
            await raw.failure("r", "cancelled")
            predictor.deliver_all()
            await until(lambda: not host.running)
            await raw.pong()
            assert len(raw.answers("r")) == 1
            world.check_empty()

    run(test())


def test_close_before_the_prediction(tmp_path: Path) -> None:
    async def test() -> None:
        predictor = Deferred()
        async with World(tmp_path, predictor=predictor) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r")
            raw.submit("other", workflow_id="other")
            raw.say(CloseWorkflow("w"))
            await raw.next(Closed)
            await raw.failure("r", "cancelled")
            predictor.deliver_all()
            await raw.result("other")
            world.check_empty()

    run(test())


def test_client_gone_before_the_prediction(tmp_path: Path) -> None:
    async def test() -> None:
        predictor = Deferred()
        async with World(tmp_path, predictor=predictor, client_timeout_s=0.1) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r")
            await until(lambda: world.daemon._predicting)
            await until(lambda: not world.daemon._clients)
            predictor.deliver_all()
            world.check_empty()
            assert world.counter("submitted") == 0

    run(test())


def test_drain_before_the_prediction(tmp_path: Path) -> None:
    async def test() -> None:
        predictor = Deferred()
        async with World(tmp_path, predictor=predictor, drain_s=0.05) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r")
            await until(lambda: world.daemon._predicting)
            await world.daemon.drain()
            world.daemon.give_up()
            assert (await raw.failure("r", "draining")).retryable
            predictor.deliver_all()
            world.check_empty()

    run(test())


def test_broken_predictor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The prior, which has learned alongside, stands in; the receipt and a counter say so."""
    caplog.set_level(logging.CRITICAL)

    async def test() -> None:
        async with World(tmp_path, predictor=Broken()) as world:
            await world.join(reply_tokens=(7, 7))
            async with world.client() as client, client.workflow() as workflow:
                for _ in range(30):
                    reply = await workflow.generate(ASK, max_tokens=50)
                    assert reply.receipt.source == "fallback"
                assert 7 <= reply.receipt.predicted_tokens_p50 < 40
            assert world.counter("decided_fallback") == 30
            assert world.counter("predictor_errors") == 30
            world.check_empty()

    run(test())


def test_predictor_that_cannot_learn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everything is answered; the errors are counted."""
    caplog.set_level(logging.CRITICAL)

    async def test() -> None:
        async with World(tmp_path, predictor=Deaf()) as world:
            await world.join()
            await world.serves()
            await world.serves()
            assert world.daemon.counters["internal_errors"] == 4
            world.daemon.counters["internal_errors"] = 0
            world.check_empty()

    run(test())


@pytest.mark.parametrize("where", ["handle", "submit", "act"])
def test_error_of_our_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    """It is logged with its traceback and counted, its request is told, and all others go on."""

    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()

            def fails(*_: object) -> None:
                raise ZeroDivisionError("on purpose")

            with monkeypatch.context() as patch:
                if where == "handle":
                    patch.setattr(world.core, "_submitted", fails)
                elif where == "submit":
                    patch.setattr(world.daemon._prior, "predict", fails)
                else:
                    patch.setattr(world.daemon, "_replay", fails)
                raw = world.raw()
                raw.submit("r")
                if where == "act":
                    await raw.result("r")
                    raw.submit("r")
                    await raw.pong()
                else:
                    await raw.failure("r", "engine_error")
            assert world.daemon.counters["internal_errors"] == 1
            assert "ZeroDivisionError" in caplog.text
            world.daemon.counters["internal_errors"] = 0
            raw.submit("next")
            await raw.result("next")
            await world.serves()
            world.check_empty()

    run(test())


def test_deliver_twice(tmp_path: Path) -> None:
    async def test() -> None:
        predictor = Deferred()
        async with World(tmp_path, predictor=predictor) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r")
            await until(lambda: predictor.asked)
            twice = predictor.asked * 2
            predictor.asked = twice
            predictor.deliver_all()
            await raw.result("r")
            await raw.pong()
            assert len(raw.answers("r")) == 1
            world.check_empty()

    run(test())


def test_predictor_hears_of_everything(tmp_path: Path) -> None:
    heard: list[object] = []

    class Listener(PriorPredictor):
        def add_model(self, model: str) -> None:
            heard.append(model)

        def observe_stage(
            self, stage: Stage, model: str, usage: Usage, logprob: float | None
        ) -> None:
            heard.append((stage.stage, model, usage.output_tokens, logprob))

        def observe_feedback(self, workflow_id: str, stage: int, verdict: float) -> None:
            heard.append((workflow_id, stage, verdict))

        def observe_workflow(self, ended: WorkflowEnded) -> None:
            heard.append((ended.kind, ended.success, len(ended.stages)))

        def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
            def learned(stage: Stage, prediction: Prediction) -> None:
                deliver(stage, Prediction(prediction.models, prediction.other, "learned"))

            super().predict(stage, payload, learned)

    async def test() -> None:
        async with World(tmp_path, predictor=Listener(Config())) as world:
            await world.join("e", "m", reply_tokens=(3, 3))
            async with world.client() as client, client.workflow(kind="k") as workflow:
                first = await workflow.generate(ASK)
                assert first.receipt.source == "learned"
                await workflow.feedback(first, True)
                await workflow.generate(ASK)
                await workflow.feedback(1, 0.25)
                await workflow.close(success=0.5)
            assert heard == [
                "m",
                (0, "m", 3, None),
                (workflow.id, 0, 1.0),
                (1, "m", 3, None),
                (workflow.id, 1, 0.25),
                ("k", 0.5, 2),
            ]

    run(test())
