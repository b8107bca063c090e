"""What a well-behaved client gets: answers, streams, receipts, status; and what engines get."""

import asyncio
from pathlib import Path

import pytest

from chimera_daemon.client import Cancelled, Hints
from chimera_daemon.client import WorkflowClosed as WorkflowClosedError
from chimera_daemon.config import Config
from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Abort,
    Cancel,
    Closed,
    CloseWorkflow,
    EngineFinished,
    EngineStats,
    GetStatus,
    Heartbeat,
    Ping,
    Result,
    Run,
    Stage,
    StatusReply,
    Usage,
)
from chimera_daemon.prior import Deliver, PriorPredictor
from tests.daemon.harness import ASK, RawClient, World, body, run, until

SLOW = {"step_s": 0.02, "reply_tokens": (1000, 1000)}


def test_stage(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join("e", "m", reply_tokens=(4, 4))
            async with world.client() as client, client.workflow(kind="math") as workflow:
                for _ in range(3):
                    reply = await workflow.generate(ASK, max_tokens=8)
                    assert len(reply.text.split()) == 4
                    assert (reply.model, reply.engine) == ("m", "e")
                    assert reply.usage == Usage(prompt_tokens=3, output_tokens=4)
                    assert reply.finish_reason == "stop"
                await workflow.close(success=True)
                with pytest.raises(WorkflowClosedError):
                    await workflow.generate(ASK)
            await until(lambda: not world.core.snapshot()["workflows"])
            world.check_empty()

    run(test())


def test_receipt(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join("e", "m", reply_tokens=(4, 4))
            await world.join("f", "n", reply_tokens=(4, 4))
            async with world.client() as client, client.workflow() as workflow:
                hints = Hints(output_tokens=6, confidence={"n": 1.0, "m": 0.0})
                receipt = (await workflow.generate(ASK, hints=hints)).receipt
                assert receipt.policy == "chimera"
                assert receipt.source == "prior"
                assert receipt.model == "n"
                assert {c.model for c in receipt.candidates} == {"m", "n"}
                assert receipt.predicted_tokens_p50 == 6.0
                assert receipt.actual_tokens == 4
                assert receipt.attempts == 1
                assert receipt.queue_s is not None
                assert receipt.service_s is not None

    run(test())


def test_stream(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join(reply_tokens=(50, 50), step_s=0.001)
            async with world.client() as client, client.workflow() as workflow:
                async with workflow.stream(ASK) as stream:
                    parts = [text async for text in stream]
                assert len(parts) > 1
                assert "".join(parts) == stream.reply.text
                assert stream.reply.usage.output_tokens == 50
            world.check_empty()

    run(test())


def test_chunks_come_in_order_before_the_result(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join(reply_tokens=(20, 20), step_s=0.001)
            raw = world.raw()
            raw.submit("r", stream=True, max_tokens=20)
            await raw.result("r")
            offsets = [chunk.offset for chunk, _ in raw.chunks("r")]
            assert offsets == sorted(set(offsets))
            assert len(offsets) == 20
            assert isinstance(raw.got[-1][0], Result)

    run(test())


def test_pinned_model(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join("e", "m")
            await world.join("f", "n")
            async with world.client() as client, client.workflow() as workflow:
                for model in ("n", "m", "n"):
                    assert (await workflow.generate(ASK, model=model)).model == model

    run(test())


def test_cancel_running(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join(**SLOW)
            async with world.client() as client, client.workflow() as workflow:
                call = workflow.submit(ASK, max_tokens=1000)
                await until(lambda: host.running == 1)
                call.cancel()
                with pytest.raises(Cancelled):
                    await call
                await until(lambda: host.running == 0)
            world.check_empty()

    run(test())


def test_cancel_queued(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join(max_inflight=1, **SLOW)
            async with world.client() as client, client.workflow() as workflow:
                first = workflow.submit(ASK, max_tokens=1000)
                second = workflow.submit(ASK, max_tokens=1000)
                await until(lambda: world.stages["waiting"] == 1 == host.running)
                second.cancel()
                await until(lambda: world.stages["waiting"] == 0)
                assert host.running == 1
                first.cancel()
            await until(lambda: host.running == 0)
            world.check_empty()

    run(test())


def test_cancel_of_what_is_not_there(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw()
            raw.say(Cancel("nobody"))
            raw.submit("r")
            await raw.result("r")
            raw.say(Cancel("r"))
            await raw.pong()
            assert len(raw.answers("r")) == 1
            assert not raw.answers("nobody")

    run(test())


def test_cancelled_request_gets_one_failure(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join(**SLOW)
            raw = world.raw()
            raw.submit("r", max_tokens=1000)
            await until(lambda: host.running)
            raw.say(Cancel("r"))
            await raw.failure("r", "cancelled")
            await until(lambda: not host.running)
            await raw.pong()
            assert len(raw.answers("r")) == 1

    run(test())


def test_close_cancels_and_is_acknowledged(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join(**SLOW)
            raw = world.raw()
            raw.submit("r", max_tokens=1000)
            await until(lambda: host.running)
            raw.say(CloseWorkflow("w", 1.0))
            assert (await raw.next(Closed)).workflow_id == "w"
            await raw.failure("r", "cancelled")
            raw.submit("late")
            await raw.failure("late", "workflow_closed")
            raw.say(CloseWorkflow("w", 0.0))
            raw.say(CloseWorkflow("never seen"))
            assert (await raw.next(Closed, 3)).workflow_id == "never seen"
            await until(lambda: not host.running)
            world.check_empty()

    run(test())


def test_ping(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            pong = await world.raw().pong()
            assert pong.v == PROTOCOL_VERSION
            assert pong.daemon_id == world.daemon.daemon_id
            assert pong.heartbeat_s == world.config.heartbeat_s
            assert pong.max_payload_bytes == world.config.max_payload_bytes

    run(test())


def test_status(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join(**SLOW)
            raw = world.raw()
            raw.submit("r", max_tokens=1000)
            await until(lambda: host.running)
            raw.say(GetStatus("s"))
            status = await raw.status()
            assert (await raw.next(StatusReply)).request_id == "s"
            assert status["daemon_id"] == world.daemon.daemon_id
            assert status["clients"] == 1
            assert status["core"]["stages"]["running"] == 1
            assert [e["engine"] for e in status["core"]["engines"]] == ["e"]
            assert status["core"]["counters"]["submitted"] == 1

    run(test())


def test_stage_without_engine_waits_for_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            raw = world.raw()
            raw.submit("r")
            await until(lambda: world.stages["without_engine"] == 1)
            await world.join()
            await raw.result("r")
            world.check_empty()

    run(test())


def test_no_engine_in_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, no_engine_s=0.05) as world:
            raw = world.raw()
            raw.submit("r")
            assert (await raw.failure("r", "no_engine")).retryable
            world.check_empty()

    run(test())


def test_repeated_request_attaches_and_replays(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("r")
            raw.submit("r")
            (started,) = await host.runs()
            await raw.pong()
            assert len(host.of(Run)) == 1
            host.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b'{"text":"x"}')
            await raw.result("r")
            await raw.pong()
            assert len(raw.answers("r")) == 1
            raw.submit("r")
            again = await raw.answer("r", 2)
            assert again == raw.answers("r")[0]
            assert len(host.of(Run)) == 1

    run(test())


def test_answers_are_kept_for_a_while_only(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, reply_keep=3) as world:
            await world.join()
            raw = world.raw()
            for number in range(10):
                raw.submit(f"r{number}", workflow_id=f"w{number}")
                await raw.result(f"r{number}")
                world.check()
                assert len(world.daemon._answers) <= 3
            raw.submit("r0", workflow_id="w0")  # forgotten: runs again
            await raw.answer("r0", 2)

    run(test())


def test_answers_are_forgotten_with_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, reply_keep_s=0.05) as world:
            await world.join()
            await world.serves()
            await until(lambda: not world.daemon._answers)
            world.check_empty()

    run(test())


def test_priorities_reach_the_engine(tmp_path: Path) -> None:
    """Lower runs first: a stage of which less is to come gets the lower number."""

    async def test() -> None:
        async with World(tmp_path, aging_tokens_per_s=1e-6) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            for name, tokens in (("long", 500), ("short", 5)):
                raw.submit(name, max_tokens=600, hints=Hints(remaining_tokens=tokens))
            long, short = await host.runs(2)
            assert long.max_tokens == 600
            assert short.priority < long.priority
            assert short.attempt_id > long.attempt_id > 1 << 22

    run(test())


def test_queue_order_is_by_remaining_work(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, aging_tokens_per_s=1e-6) as world:
            host = world.raw_host()
            host.register(max_inflight=1)
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            for name, tokens in (("first", 900), ("long", 500), ("short", 5), ("middle", 50)):
                raw.submit(name, body(name), hints=Hints(remaining_tokens=tokens))
            seen: list[str] = []
            for n in range(4):
                attempt = (await host.runs(n + 1))[n]
                seen.append(next(p.decode() for m, p in host.got if m == attempt))
                finished = EngineFinished(attempt.attempt_id, Usage(1, 1), "stop")
                host.say(finished, b'{"text":"x"}')
            assert [text.split('"')[-2] for text in seen] == ["first", "short", "middle", "long"]

    run(test())


class Recorder(PriorPredictor):
    """Remembers the sizes that it was asked with."""

    def __init__(self) -> None:
        super().__init__(Config())
        self.prompt_tokens: list[int] = []

    def predict(self, stage: Stage, payload: bytes, deliver: Deliver) -> None:
        self.prompt_tokens.append(stage.prompt_tokens)
        super().predict(stage, payload, deliver)


def test_estimate_of_prompt_tokens_learns(tmp_path: Path) -> None:
    async def test() -> None:
        recorder = Recorder()
        async with World(tmp_path, predictor=recorder) as world:
            await world.join(reply_tokens=(1, 1))
            raw = world.raw()
            payload = body("x" * 4)  # two tokens of an echo engine
            for number in range(300):
                raw.submit(f"r{number}", payload, workflow_id=f"w{number}")
            await until(lambda: len(raw.of(Result)) == 300)
            raw.submit("estimated", payload)
            raw.submit("said", payload, prompt_tokens=7)
            await raw.result("said")
            first, *_, estimated, said = recorder.prompt_tokens
            assert 2 <= estimated < first
            assert said == 7

    run(test())


def test_progress_moves_what_is_due(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("r", max_tokens=100, hints=Hints(output_tokens=100))
            (started,) = await host.runs()
            host.say(Heartbeat("raw", 1, EngineStats(running=1), {started.attempt_id: 60}))
            await until(lambda: 35 < world.core.snapshot()["engines"][0]["predicted_tokens"] < 45)
            raw.say(Cancel("r"))
            assert (await host.next(Abort)).attempt_id == started.attempt_id

    run(test())


def test_clients_do_not_share_request_ids(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            one, two = world.raw(), world.raw()
            one.submit("r", body("one"))
            two.submit("r", body("two, another body"))
            await one.result("r")
            await two.result("r")
            assert world.counter("repeated") == 0

    run(test())


def test_many_clients_many_stages(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            for name, model in (("a", "m"), ("b", "m"), ("c", "n")):
                await world.join(name, model, slots=8, step_s=0.001, reply_tokens=(1, 8))
            raws = [world.raw() for _ in range(10)]
            for raw in raws:
                raw.say(Ping(v=PROTOCOL_VERSION))
                for number in range(50):
                    raw.submit(f"r{number}", body(str(number)), workflow_id=f"{id(raw)}-{number}")
            await asyncio.gather(*(_all_answered(raw, 50) for raw in raws))
            world.check_empty()
            assert world.counter("completed") == 500

    run(test())


async def _all_answered(raw: RawClient, n: int) -> None:
    for number in range(n):
        await raw.result(f"r{number}")
        assert len(raw.answers(f"r{number}")) == 1
