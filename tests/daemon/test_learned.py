"""Learned predictions in a real daemon: what the model is asked, and all that can go wrong."""

import asyncio
import json
import logging
import math
import sys
import threading
import types
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chimera_daemon import predict as predict_module
from chimera_daemon.client import Client
from chimera_daemon.config import Config, ConfigError, EngineConfig, PredictorConfig
from chimera_daemon.messages import (
    Cancel,
    CloseWorkflow,
    EngineFinished,
    Feedback,
    Hints,
    Stage,
    Usage,
)
from chimera_daemon.pace import Pace
from chimera_daemon.predict import LearnedPredictor, load_model, make_predictor
from chimera_daemon.prior import PriorPredictor
from chimera_daemon.reading import text_of, to_predictions
from chimera_daemon.status import render
from chimera_predictors.records import (
    Forecast,
    PastStage,
    StageLog,
    StageQuery,
    WorkflowLog,
)
from tests.daemon.harness import ASK, World, body, run, sessions, until
from tests.daemon.learned import TOKENS, FakeModel, Learned, forecast

# What the model is asked, and what becomes of its answer.


def test_the_model_decides(tmp_path: Path) -> None:
    model = FakeModel()

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r", body("What is 6 * 7?"), kind="math", prompt_tokens=12)
            receipt = (await raw.result("r")).receipt
            assert (receipt.source, receipt.predicted_tokens_p50) == ("learned", TOKENS)
            assert receipt.candidates[0].confidence == 0.75
            query = StageQuery("math", 0, "What is 6 * 7?", "What is 6 * 7?", 12, ())
            assert model.batches == [[query]]
            assert world.counter("predictions") == world.counter("decided_learned") == 1
            world.check_empty()

    run(test())


def test_later_stages_know_what_happened(tmp_path: Path) -> None:
    model = FakeModel()

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            host = world.raw_host()
            host.register()
            await until(world.daemon.engines_of)
            raw = world.raw()
            chat: list[dict[str, str]] = []
            for number, logprob in enumerate((-0.5, None, -0.125)):
                chat.append({"role": "user", "content": f"step {number}"})
                payload = json.dumps({"messages": chat}).encode()
                raw.submit(f"r{number}", payload, stage=number, prompt_tokens=10 * (number + 1))
                attempt = (await host.runs(number + 1))[-1].attempt_id
                finished = EngineFinished(attempt, Usage(99, 7), "stop", logprob)
                host.say(finished, b'{"text":"x"}')
                assert (await raw.result(f"r{number}")).logprob == logprob
                raw.say(Feedback("w", number, number / 4))
                chat.append({"role": "assistant", "content": "x"})
            raw.say(Feedback("w", 9, 1.0))
            raw.say(Feedback("no such workflow", 0, 1.0))
            raw.submit("r9", stage=9, prompt_tokens=50)
            await until(lambda: len(model.queries) == 4)
            past = (
                PastStage("m", 10, 7, 0.0, -0.5),
                PastStage("m", 20, 7, 0.25, None),
                PastStage("m", 30, 7, 0.5, -0.125),
            )
            assert [q.past for q in model.queries] == [(), past[:1], past[:2], past]
            assert [q.task_text for q in model.queries] == ["step 0"] * 4
            assert [q.new_text for q in model.queries][:3] == ["step 0", "step 1", "step 2"]
            assert [q.stage for q in model.queries] == [0, 1, 2, 9]
            raw.say(CloseWorkflow("w"))
            await raw.failure("r9", "cancelled")
            assert len(world.predictor._memory) == 0

    run(test())


def test_parallel_stages_and_an_id_that_is_used_again(tmp_path: Path) -> None:
    model = FakeModel()

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join()
            raw = world.raw()
            for i, number in enumerate((3, 0, 1, 0)):
                raw.submit(f"r{i}", body(f"text {number}"), stage=number)
                await raw.result(f"r{i}")
            assert [q.task_text for q in model.queries] == ["text 3", "text 0", "text 0", "text 0"]
            assert [len(q.past) for q in model.queries] == [0, 0, 1, 0]
            async with world.client() as client:
                for _ in range(2):
                    workflow = client.workflow(workflow_id="again")
                    await workflow.generate(ASK)
                    await workflow.close()
                    world.core._closed.clear()  # as if that were long ago
            assert [len(q.past) for q in model.queries[4:]] == [0, 0]

    run(test())


def test_a_batch_is_what_waits(tmp_path: Path) -> None:
    model = FakeModel()
    model.gate.clear()

    async def test() -> None:
        async with Learned(tmp_path, model, max_batch=4) as world:
            await world.join()
            raw = world.raw()
            raw.submit("first", workflow_id="first")
            await until(lambda: model.batches)
            for number in range(10):
                raw.submit(f"r{number}", body(f"{number}"), workflow_id=f"w{number}")
            await raw.pong()
            await until(lambda: world.status_of_predictor["waiting"] == 11)
            assert world.core.idle
            model.gate.set()
            for number in range(10):
                assert (await raw.result(f"r{number}")).receipt.source == "learned"
            assert [len(batch) for batch in model.batches] == [1, 4, 4, 2]
            assert [q.new_text for q in model.queries[1:]] == [str(n) for n in range(10)]
            world.check_empty()

    run(test())


def test_models_that_the_bundle_does_not_know(tmp_path: Path) -> None:
    model = FakeModel("small", "elsewhere")

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join("s", "small")
            await world.join("l", "large")
            raw = world.raw()
            raw.submit("free", workflow_id="a")
            raw.submit("pinned", workflow_id="b", model="large")
            receipt = (await raw.result("free")).receipt
            assert receipt.source == "learned"
            assert {c.model: c.confidence for c in receipt.candidates} == {
                "small": 0.75,
                "large": 0.5,
            }
            assert (await raw.result("pinned")).receipt.source == "prior"
            assert world.counter("models_unpredicted") == 2
            assert world.status_of_predictor["models_unknown"] == ["large"]

    run(test())


def test_all_of_it_may_be_left_to_the_prior(tmp_path: Path) -> None:
    model = FakeModel()
    model.answers = [{}]

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join()
            assert (await world.serves()).receipt.source == "prior"
            assert world.counter("decided_prior") == world.counter("models_unpredicted") == 1
            assert world.counter("predictions") == 0

    run(test())


def test_the_client_knows_better(tmp_path: Path) -> None:
    model = FakeModel("m", "n")

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join()
            await world.join("n", "n")
            raw = world.raw()
            raw.submit("r", hints=Hints(output_tokens=3, confidence={"m": 0.125}))
            receipt = (await raw.result("r")).receipt
            assert (receipt.source, receipt.predicted_tokens_p50) == ("learned", 3)
            assert {c.model: c.confidence for c in receipt.candidates} == {"m": 0.125, "n": 0.75}

    run(test())


# Payloads.

PAYLOADS = [
    b"",
    b"\0",
    b"not JSON",
    b"[]",
    b"{}",
    b'{"messages": 3}',
    b'{"messages": [{"role": 1}]}',
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": ' + b"[" * 100_000,
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_a_payload_that_cannot_be_read_is_an_empty_text(tmp_path: Path, payload: bytes) -> None:
    model = FakeModel()

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join()
            raw = world.raw()
            raw.submit("bad", payload)
            raw.submit("good", stage=1)
            await raw.answer("bad")
            await raw.result("good")
            bad, good = model.queries
            assert (bad.new_text, bad.task_text) == ("", "")
            assert good.new_text == "2 + 2 = ?"
            assert world.counter("payloads_unreadable") == 1
            world.check_empty()

    run(test())


def test_texts_are_read_from_any_chat() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "text", "text": "what is "},
        {"type": "text", "text": "this?"},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {"role": "user", "content": parts, "name": "somebody"},
    ]
    text = text_of(json.dumps({"messages": messages, "tools": [], "x": {}}).encode())
    assert "what is this?" in text
    assert "old" not in text
    assert text_of(b'{"messages": []}') == ""


def test_texts_are_read_from_completions() -> None:
    assert text_of(b'{"prompt": "Once upon"}') == text_of(body("Once upon"))
    assert "a time" in text_of(b'{"prompt": ["Once upon", "a time"]}')
    with pytest.raises(ValueError, match="got `int`"):
        text_of(b'{"prompt": [1, 2, 3]}')  # token ids


def test_nothing_stays_of_what_was_refused(tmp_path: Path) -> None:
    model = FakeModel()

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join()
            raw = world.raw()
            for number in range(3):
                raw.submit(f"r{number}", workflow_id=f"w{number}", model="never")
                await raw.failure(f"r{number}", "unknown_model")
            predictor = world.daemon.status()["predictor"]
            assert (predictor["workflows"], predictor["text_bytes"]) == (0, 0)
            world.check_empty()

    run(test())


def test_long_texts_are_cut_where_they_are_read() -> None:
    text = "begin" + "x" * 10_000_000 + "end"
    cut = text_of(body(text))
    assert len(cut) <= 8192
    assert cut.startswith("begin")
    assert cut.endswith("end")


# Late, broken, too much.


def test_a_late_prediction_is_not_waited_for(tmp_path: Path) -> None:
    model = FakeModel()
    model.gate.clear()

    async def test() -> None:
        async with Learned(tmp_path, model, deadline_s=0.02) as world:
            await world.join()
            raw = world.raw()
            for number in range(3):
                raw.submit(f"r{number}", workflow_id=f"w{number}", hints=Hints(output_tokens=5))
            for number in range(3):
                receipt = (await raw.result(f"r{number}")).receipt
                assert (receipt.source, receipt.predicted_tokens_p50) == ("fallback", 5)
            assert world.counter("predictions_late") == world.counter("decided_fallback") == 3
            raw.submit("r0", workflow_id="w0", hints=Hints(output_tokens=5))  # is replayed
            await raw.answer("r0", 2)
            model.gate.set()
            await world.idle()
            # What was late when its turn came was read, for its workflow's sake, and not predicted.
            assert len(model.queries) < 4
            assert [len(raw.answers(f"r{n}")) for n in range(3)] == [2, 1, 1]
            assert world.counter("predictions") == 0
            world.check_empty()

    run(test())


@pytest.mark.parametrize(
    "fault", ["raises", "too few", "nan", "infinite", "negative", "certain", "short"]
)
def test_a_model_that_fails(tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its batches fall back; after three it is left alone for a while, and then tried again."""
    model = FakeModel()
    good = forecast()
    broken = {
        "nan": msgspec.structs.replace(good, stage_tokens=(math.nan, 1.0, 2.0, 3.0)),
        "infinite": msgspec.structs.replace(good, remaining_tokens_mean=math.inf),
        "negative": msgspec.structs.replace(good, stage_tokens=(-1.0, 1.0, 2.0, 3.0)),
        "certain": msgspec.structs.replace(good, confidence=1.5),
        "short": msgspec.structs.replace(good, remaining_tokens=(1.0,)),
    }
    if fault == "raises":
        model.error = RuntimeError("on purpose")
    else:
        model.answers = [] if fault == "too few" else [{"m": broken[fault]}]

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join()
            for number in range(6):
                assert (await world.serves()).receipt.source == "fallback"
                assert world.status_of_predictor["resting"] == (number >= 2)
            assert len(model.batches) == 3
            assert world.counter("predictions_failed") == 3
            assert world.counter("predictions_bypassed") == 3
            assert "RESTING" in render(world.daemon.status() | {"predictor": world.as_bundle})
            rest_s = world.predictor._rest_until_s - world.daemon._loop.time()
            world.predictor._rest_until_s = 0.0
            assert (await world.serves()).receipt.source == "fallback"  # still broken: rests longer
            assert world.predictor._rest_until_s - world.daemon._loop.time() > rest_s
            world.predictor._rest_until_s = 0.0
            model.error = model.answers = None
            assert (await world.serves()).receipt.source == "learned"
            assert world.predictor._failures == 0
            world.check_empty()

    caplog.set_level(logging.ERROR)
    run(test())
    assert caplog.text.count("the model failed") == 1


def test_a_model_that_hangs_is_bypassed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_module, "_HANGING_S", 0.05)
    model = FakeModel()
    model.gate.clear()

    async def test() -> None:
        async with Learned(tmp_path, model, deadline_s=0.01) as world:
            await world.join()
            assert (await world.serves()).receipt.source == "fallback"
            await until(lambda: world.predictor._reader.busy_s > 0.05)
            for _ in range(5):
                assert (await world.serves()).receipt.source == "fallback"
            assert world.counter("predictions_late") == 1
            assert world.counter("predictions_bypassed") == 5
            model.gate.set()
            await until(lambda: world.predictor._reader.busy_s == 0.0)
            world.predictor._limits = PredictorConfig(deadline_s=1000.0)
            assert (await world.serves()).receipt.source == "learned"

    run(test())


@pytest.mark.parametrize("limit", ["stages", "bytes"])
def test_what_waits_is_bounded(tmp_path: Path, limit: str) -> None:
    model = FakeModel()
    model.gate.clear()
    size = len(body())
    limits: dict[str, Any] = {"max_waiting": 5} if limit == "stages" else {}
    settings = (
        {} if limit == "stages" else {"max_queued_bytes": 5 * size, "max_payload_bytes": size}
    )

    async def test() -> None:
        async with Learned(tmp_path, model, settings=settings, **limits) as world:
            await world.join()
            raw = world.raw()
            for number in range(9):
                raw.submit(f"r{number}", workflow_id=f"w{number}")
            for number in range(5, 9):
                assert (await raw.result(f"r{number}")).receipt.source == "fallback"
            assert world.counter("predictions_refused") == world.counter("texts_skipped") == 4
            model.gate.set()
            for number in range(5):
                assert (await raw.result(f"r{number}")).receipt.source == "learned"
            world.check_empty()

    run(test())


def test_what_would_be_late_is_not_asked_for(tmp_path: Path) -> None:
    """It is read for its workflow's sake, and takes no place in a batch."""
    model = FakeModel()

    async def test() -> None:
        async with Learned(tmp_path, model, deadline_s=100.0, max_batch=3) as world:
            await world.join()
            raw = world.raw()
            model.gate.clear()
            raw.submit("first", workflow_id="first")
            await until(lambda: model.batches)
            world.predictor._pace.observe(1, 90.0)
            for number in range(5):
                raw.submit(f"s{number}", body(f"task {number}"), workflow_id=f"w{number}")
                assert (await raw.result(f"s{number}")).receipt.source == "fallback"
            assert world.counter("predictions_shed") == 5
            world.predictor._pace = Pace()
            for number in range(5):
                raw.submit(f"r{number}", stage=1, workflow_id=f"w{number}")
            await until(lambda: len(world.predictor._waiting) == 6)
            model.gate.set()
            for number in range(5):
                assert (await raw.result(f"r{number}")).receipt.source == "learned"
            assert [len(batch) for batch in model.batches] == [1, 3, 2]
            queries = sorted(model.queries[1:], key=lambda q: q.task_text)
            assert [q.task_text for q in queries] == [f"task {n}" for n in range(5)]
            assert {len(q.past) for q in queries} == {1}
            world.predictor._pace.observe(1, 1e6)
            assert (await world.serves()).receipt.source == "learned"  # alone: it is tried
            world.check_empty()

    run(test())


def unknown_lengths(known: Forecast) -> Forecast:
    nan, nans = math.nan, (math.nan,) * 4
    return Forecast(known.confidence, nan, nans, nan, nans, nan)


def test_what_a_model_has_not_learned_comes_from_the_prior(tmp_path: Path) -> None:
    """Confidence or lengths, each by itself; a model of which nothing is known is left out."""
    good = forecast(confidence=0.875)
    model = FakeModel("m", "n", "o")
    both = msgspec.structs.replace(unknown_lengths(good), confidence=math.nan)
    model.answers = [
        {
            "m": msgspec.structs.replace(good, confidence=math.nan),
            "n": unknown_lengths(good),
            "o": both,
        }
    ]

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            for name in ("m", "n", "o"):
                await world.join(name, name)
            assert (await world.serves()).receipt.source == "learned"
            (made,) = to_predictions(model, model.answers or [], 1)
            stage = Stage(b"c", "r", "w", 0, "", None, 10, 256, 40, 0)
            prior = world.predictor._prior.prediction(stage)
            merged = world.predictor._merged(stage, made)
            assert merged.of("m").confidence == prior.of("m").confidence
            assert merged.of("m").stage_tokens_mean == TOKENS
            assert merged.of("n").confidence == 0.875
            assert merged.of("n") == msgspec.structs.replace(prior.of("n"), confidence=0.875)
            assert merged.of("o") == prior.of("o")
            for counter in ("confidences", "lengths", "models"):
                assert world.counter(f"{counter}_unpredicted") == 2  # served once, merged once
            assert world.counter("predictions_failed") == 0
            world.check_empty()

    run(test())


# Given up, in every state.


@pytest.mark.parametrize("how", ["cancel", "close", "gone", "drain"])
def test_given_up_before_its_prediction(tmp_path: Path, how: str) -> None:
    """One stage is with the model and one waits behind it; the second is never asked for."""
    model = FakeModel()
    model.gate.clear()
    settings = {"client_timeout_s": 0.1} if how == "gone" else {"drain_s": 0.05}

    async def test() -> None:
        async with Learned(tmp_path, model, settings=settings) as world:
            await world.join()
            raw = world.raw()
            raw.submit("a")
            await until(lambda: model.batches)
            raw.submit("b", body("never mind"), stage=1)
            await until(lambda: len(world.predictor._waiting) == 2)
            if how == "cancel":
                raw.say(Cancel("a"))
                raw.say(Cancel("b"))
            elif how == "close":
                raw.say(CloseWorkflow("w"))
            elif how == "gone":
                await until(lambda: not world.daemon._clients)
            else:
                await world.daemon.drain()
                world.daemon.give_up()
            await until(lambda: world.counter("predictions_cancelled") == 2)
            assert not world.predictor._waiting
            raw.submit("a", body("the same id"), workflow_id="another")
            if how != "drain":
                await until(lambda: len(world.predictor._waiting) == 1)
            model.gate.set()
            await world.idle()
            assert "never mind" not in [q.new_text for q in model.queries]
            if how != "drain":
                await until(lambda: [a for a in raw.answers("a") if not hasattr(a, "code")])
            assert len(raw.answers("a")) <= 2
            assert len(raw.answers("b")) == 1
            await raw.pong()
            world.check_empty()

    run(test())


def test_the_loop_goes_on_while_the_model_is_busy(tmp_path: Path) -> None:
    """A stream that runs keeps flowing to its end while another stage is being predicted."""
    model = FakeModel()

    async def test() -> None:
        async with Learned(tmp_path, model) as world:
            await world.join(step_s=0.001, reply_tokens=(50, 50))
            async with world.client() as client, client.workflow() as workflow:
                async with workflow.stream(ASK, max_tokens=50) as stream:
                    await until(lambda: stream.unread)
                    model.gate.clear()
                    second = workflow.submit(ASK)
                    await until(lambda: len(model.batches) == 2)
                    pieces = [piece async for piece in stream]
                assert "".join(pieces) == stream.reply.text
                assert not second.done()
                model.gate.set()
                assert (await second).receipt.source == "learned"

    run(test())


# Bundles come and go.


def test_reload_under_load_drops_nothing(tmp_path: Path) -> None:
    models = [FakeModel(digest=f"d{number}") for number in range(20)]
    waiting = list(models)

    async def swap(world: Learned, load: "asyncio.Future[Any]") -> None:
        """To the next model, and on until it has served."""
        model = waiting[0]
        world.predictor.reload()
        await until(lambda: model.batches or load.done())

    async def test() -> None:
        async with Learned(tmp_path, waiting.pop(0)) as world:
            world.predictor._load = lambda: waiting.pop(0)
            await world.join()
            async with world.client() as client:
                load = asyncio.ensure_future(sessions(client, 32, stages=40))
                while waiting and not load.done():
                    await swap(world, load)
                outcomes = await load
            assert len(outcomes) == 32 * 40
            assert {outcome.receipt.source for outcome in outcomes} == {"learned"}
            assert sum(len(model.queries) for model in models) == 32 * 40
            used = [model.digest for model in models if model.batches]
            assert world.status_of_predictor["digest"] in used[-1:]
            assert len(used) > 3

    run(test())


def test_a_bundle_that_cannot_be_loaded_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = FakeModel(digest="old"), FakeModel(digest="new")
    gate = threading.Event()
    loads: list[object] = [ConfigError("it is torn"), MemoryError("it is huge"), new]

    def load() -> Any:
        assert gate.wait(60)
        loaded = loads.pop(0)
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    async def test() -> None:
        async with Learned(tmp_path, old) as world:
            world.predictor._load = load
            await world.join()
            world.predictor.reload()
            assert (await world.serves()).receipt.source == "learned"  # while it is being loaded
            for _ in range(5):
                world.predictor.reload()  # all of these are one
            gate.set()
            await until(lambda: world.counter("reloads_failed") == 2)
            assert (await world.serves()).receipt.source == "learned"
            assert world.status_of_predictor["digest"] == "old"
            assert len(old.queries) == 2
            assert [w for w in ("it is torn", "it is huge") if w not in caplog.text] == []
            world.predictor.reload()
            await until(lambda: world.counter("reloads") == 1)
            await world.serves()
            assert (len(old.queries), len(new.queries)) == (2, 1)
            assert "digest new" in render(world.daemon.status() | {"predictor": world.as_bundle})

    caplog.set_level(logging.ERROR)
    run(test())


def test_without_a_model_there_is_nothing_to_reload(tmp_path: Path) -> None:
    async def test() -> None:
        async with Learned(tmp_path, None, record=tmp_path / "traces") as world:
            world.predictor.reload()
            assert not world.predictor._loading

    run(test())


class BundleError(ValueError):
    """Stands for the one of `chimera_predictors.predictor`, which needs torch."""


def fake_package(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    package = types.ModuleType("chimera_predictors.predictor")
    package.__dict__.update(load=load, BundleError=BundleError)
    monkeypatch.setitem(sys.modules, package.__name__, package)


CHOSEN = PredictorConfig(bundle="/a/bundle", device="cpu", threads=2, max_batch=7)


def test_a_bundle_is_loaded_as_configured_and_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    model = FakeModel()

    def load(path: str, **options: Any) -> FakeModel:
        asked.append((path, options))
        return model

    fake_package(monkeypatch, load)
    assert load_model(CHOSEN) is model
    assert asked == [("/a/bundle", {"device": "cpu", "threads": 2})]
    assert max(len(batch) for batch in model.batches) == 7


@pytest.mark.parametrize("what", ["bundle", "device", "levels", "warm-up", "torch", "package"])
def test_a_bundle_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    model = FakeModel()

    def load(path: str, **options: Any) -> FakeModel:
        if what == "bundle":
            raise BundleError("/a/bundle: heads.safetensors is cut off; train it again")
        if what == "device":
            raise RuntimeError("no such device")
        if what == "levels":
            model.levels = (0.25, 0.5, 0.75)
        if what == "warm-up":
            model.error = IndexError("no such row")
        return model

    fake_package(monkeypatch, load)
    if what in ("torch", "package"):
        monkeypatch.setitem(sys.modules, "chimera_predictors.predictor", None)
    with pytest.raises(ConfigError) as raised:
        load_model(CHOSEN)
    expected = {
        "bundle": "`predictor.bundle`: /a/bundle: heads.safetensors is cut off",
        "device": "/a/bundle cannot be loaded: RuntimeError: no such device",
        "levels": "no quantiles at [0.1, 0.9]",
        "warm-up": "cannot predict: IndexError",
        "torch": "pip install 'chimera-daemon[predict]'",
        "package": "pip install 'chimera-daemon[predict]'",
    }
    assert expected[what] in str(raised.value)


def test_a_missing_bundle_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chimera_daemon.cli import main

    def load(path: str, **options: Any) -> FakeModel:
        raise BundleError(f"{path}: there is no bundle.json; give the folder of `chimera train`")

    fake_package(monkeypatch, load)
    assert main(["daemon", "--bundle", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"chimera: `predictor.bundle`: {tmp_path}/none: there is no bundle.json; "
        "give the folder of `chimera train`"
    )


def test_models_of_the_configuration_that_a_bundle_does_not_know(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_package(monkeypatch, lambda path, **options: FakeModel("known"))
    engines = tuple(EngineConfig(name, name, "echo") for name in ("known", "foreign"))
    config = Config(engines=engines, predictor=CHOSEN)
    predictor = make_predictor(config, PriorPredictor(config))
    assert isinstance(predictor, LearnedPredictor)
    assert "does not know: foreign" in caplog.text
    predictor.add_model("later")
    predictor.add_model("known")
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    predictor.close()


# Traces.


async def conversation(client: Client, kind: str, name: str, stages: int, success: float) -> None:
    """A chat that grows, with a verdict on every second answer."""
    async with client.workflow(kind) as workflow:
        chat = [{"role": "system", "content": "Be brief."}]
        for number in range(stages):
            chat.append({"role": "user", "content": f"{name}, step {number}: {'x' * number}"})
            reply = await workflow.generate(chat, max_tokens=9)
            chat.append({"role": "assistant", "content": reply.text})
            if number % 2:
                await workflow.feedback(reply, number / stages)
        await workflow.close(success)


def test_what_is_recorded_is_what_was_asked(tmp_path: Path) -> None:
    """Read back for training, a trace gives the very queries that the model was asked."""
    traces = pytest.importorskip("chimera_predictors.traces")
    model = FakeModel()

    async def test() -> None:
        async with Learned(tmp_path, model, record=tmp_path / "traces") as world:
            await world.join(reply_tokens=(2, 9))
            async with world.client() as client:
                for number in range(5):
                    await conversation(client, "k" * number, f"task {number}", number + 1, 0.5)
                    await world.idle()
            await until(lambda: world.status_of_predictor["traces"]["written"] == 5)
            assert world.status_of_predictor["text_bytes"] == len(world.predictor._memory) == 0
            shown = render(world.daemon.status())
            assert "written 5  dropped 0  failed 0  incomplete 0" in shown

    run(test())
    read = traces.read_traces(tmp_path / "traces")
    assert sorted(read.queries(), key=repr) == sorted(model.queries, key=repr)
    assert len(model.queries) == 15
    assert set(read.success) == {0.5}
    assert sum(not math.isnan(verdict) for verdict in read.verdict) == 6


def test_traces_without_a_bundle(tmp_path: Path) -> None:
    """Predictions are the prior's, at once; texts are read for the traces alone."""
    record = tmp_path / "traces"

    async def test() -> None:
        async with Learned(tmp_path, None, record=record) as world:
            await world.join()
            raw = world.raw()
            raw.submit("a", body("one"), kind="k", prompt_tokens=5)
            receipt = (await raw.result("a")).receipt
            assert receipt.source == "prior"
            raw.submit("b", b"garbage", stage=1, prompt_tokens=6)
            await raw.failure("b", "bad_request")
            raw.submit("c", body("two"), stage=1, prompt_tokens=7, hints=Hints(output_tokens=3))
            assert (await raw.result("c")).receipt.predicted_tokens_p50 == 3
            raw.say(Feedback("w", 1, 0.0))
            raw.say(CloseWorkflow("w", 1.0))
            raw.submit("d", workflow_id="never ended")
            await raw.result("d")
            await until(lambda: world.status_of_predictor["traces"]["written"])
            assert world.counter("decided_prior") == 4
            assert world.counter("payloads_unreadable") == 1
            assert not any(name.startswith("predictions") for name in world.predictor.counters)

    run(test())
    (path,) = record.iterdir()
    (line,) = path.read_bytes().splitlines()
    log = msgspec.json.decode(line, type=WorkflowLog)
    assert log.workflow_id.startswith("w@")
    assert msgspec.structs.replace(log, workflow_id="w") == WorkflowLog(
        "w",
        (StageLog("m", "one", 5, 4), StageLog("m", "two", 7, 4, verdict=0.0)),
        kind="k",
        success=1.0,
    )


def test_engines_are_asked_for_logprobs_by_whoever_learns_from_them(tmp_path: Path) -> None:
    async def asked(world: World) -> bool:
        async with world:
            host = world.raw_host()
            host.register()
            await until(world.daemon.engines_of)
            raw = world.raw()
            raw.submit("r")
            (started,) = await host.runs()
            host.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b'{"text":"x"}')
            await raw.result("r")
            return started.logprobs

    assert run(asked(Learned(tmp_path, FakeModel())))
    assert not run(asked(World(tmp_path)))
