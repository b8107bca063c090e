"""Engines and clients that go, hang and come back, on one loop; nothing is lost or done twice."""

import asyncio
import time
from pathlib import Path

import pytest

from chimera_daemon.client import ChimeraError, Draining, EngineLost, Reply
from chimera_daemon.messages import (
    Abort,
    Cancel,
    DaemonBeat,
    Deregister,
    EngineChunk,
    EngineFailed,
    EngineFinished,
    EngineStats,
    Heartbeat,
    Ping,
    Result,
    Run,
    Shutdown,
    Usage,
)
from tests.daemon.harness import ASK, World, body, run, sessions, until

SLOW = {"step_s": 0.02, "reply_tokens": (1000, 1000)}
FAST = {"step_s": 0.001, "reply_tokens": (2, 20)}


def test_engine_that_goes_silent(tmp_path: Path) -> None:
    """Its stage goes elsewhere; what it says later is dropped; then it may register again."""

    async def test() -> None:
        async with World(tmp_path, engine_timeout_s=0.2) as world:
            silent = world.raw_host()
            silent.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("r")
            (started,) = await silent.runs()
            await until(lambda: not world.daemon.engines_of())
            await world.join("good", "m")
            result = await raw.result("r")
            assert result.engine == "good"
            assert result.receipt.attempts == 2
            silent.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b'{"text":"late"}')
            silent.say(Heartbeat("raw", 1, EngineStats()))
            assert not (await silent.next(DaemonBeat, 2)).known
            silent.register()
            assert (await silent.next(DaemonBeat, 3)).known
            await raw.pong()
            assert len(raw.answers("r")) == 1
            assert world.counter("late_answers") == 1
            world.check_empty()

    run(test())


def test_every_word_of_an_engine_is_a_sign_of_life(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, engine_timeout_s=0.3) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("r", stream=True)
            (started,) = await host.runs()
            end = asyncio.get_running_loop().time() + 0.6
            offset = 0
            while asyncio.get_running_loop().time() < end:
                host.say(EngineChunk(started.attempt_id, offset), b'{"text":"x"}')
                offset += 1
                await asyncio.sleep(0.01)
            host.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b'{"text":"x"}')
            await raw.result("r")
            assert world.counter("engines_lost") == 0

    run(test())


def test_daemon_that_stood_still_blames_nobody(tmp_path: Path) -> None:
    """Stopped or starved for longer than the timeouts: it has not read what the others sent."""

    async def test() -> None:
        async with World(tmp_path, engine_timeout_s=0.2, client_timeout_s=0.2) as world:
            host = await world.join(**SLOW)
            async with world.client() as client:
                call = client.workflow().submit(ASK, max_tokens=20)
                await until(lambda: host.running)
                for _ in range(3):
                    time.sleep(0.5)  # blocks the loop
                    await asyncio.sleep(0.05)
                await call
            assert world.counter("engines_lost") == 0
            assert world.counter("failed") == 0

    run(test())


def test_engine_lost_under_load(tmp_path: Path) -> None:
    """One of two goes without a word, again and again: each stage is answered once."""

    async def test() -> None:
        async with World(tmp_path, engine_timeout_s=0.3, max_attempts=10) as world:
            await world.join("stays", "m", slots=4, **FAST)
            await world.join("goes", "m", slots=4, **FAST)
            async with world.client() as client:
                load = asyncio.ensure_future(sessions(client, 40, stages=5, max_tokens=20))
                for _ in range(3):
                    done = world.counter("completed")
                    await until(lambda done=done: world.counter("completed") > done + 10)
                    await world.kill("goes")
                    await world.join("goes", "m", slots=4, **FAST)
                outcomes = await load
            assert len(outcomes) == 200
            assert all(isinstance(o, Reply) for o in outcomes)
            assert len({o.request_id for o in outcomes}) == 200
            assert world.counter("completed") == 200
            world.check_empty()

    run(test())


def test_last_attempt_lost(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, max_attempts=1, engine_timeout_s=0.3) as world:
            host = await world.join(**SLOW)
            async with world.client() as client:
                call = client.workflow().submit(ASK, max_tokens=1000)
                await until(lambda: host.running)
                await world.kill("e")
                with pytest.raises(EngineLost, match="no heartbeat") as caught:
                    await call
                assert caught.value.retryable
            world.check_empty()

    run(test())


def test_visible_stream_is_not_restarted(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("no", stream=True)
            raw.submit("yes", body("yes"), stream=True, restart=True)
            for attempt in await host.runs(2):
                host.say(EngineChunk(attempt.attempt_id, 0), b'{"text":"x"}')
            await until(lambda: raw.chunks("no") and raw.chunks("yes"))
            host.say(Deregister("raw", 1))
            for attempt in host.of(Run):
                host.say(EngineFailed(attempt.attempt_id, "engine_lost", "stopping", True))
            assert (await raw.failure("no", "engine_lost")).retryable
            assert not raw.answers("yes")
            await world.join("good", "m")
            await raw.result("yes")
            numbers = [chunk.attempt_id for chunk, _ in raw.chunks("yes")]
            assert numbers == sorted(numbers)
            assert len(set(numbers)) == 2
            world.check_empty()

    run(test())


def test_failing_engine(tmp_path: Path) -> None:
    """Retryable failures are tried elsewhere, up to `max_attempts`; every stage has one answer."""

    async def test() -> None:
        async with World(tmp_path, max_attempts=2) as world:
            await world.join("good", "m", slots=4, **FAST)
            await world.join("bad", "m", slots=4, fail_rate=1.0, **FAST)
            raw = world.raw()
            for number in range(100):
                raw.submit(f"r{number}", body(str(number)), workflow_id=f"w{number}")
            for number in range(100):
                await raw.answer(f"r{number}")
            await raw.pong()
            answers = [a for n in range(100) for a in raw.answers(f"r{n}")]
            assert len(answers) == 100
            failed = [a for a in answers if not isinstance(a, Result)]
            assert all(f.code == "engine_error" and f.retryable for f in failed)
            assert world.counter("requeued") > 0
            world.check_empty()

    run(test())


def test_another_process_takes_the_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            old, new = world.raw_host(), world.raw_host()
            old.register(incarnation=1)
            await old.next(DaemonBeat)
            raw = world.raw()
            raw.submit("r")
            (started,) = await old.runs()
            new.register(incarnation=2)
            assert "took its name" in (await old.next(Shutdown)).reason
            old.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b'{"text":"old"}')
            old.say(Deregister("raw", 1))
            (again,) = await new.runs()
            assert again.attempt_id > started.attempt_id
            new.say(EngineFinished(again.attempt_id, Usage(1, 1), "stop"), b'{"text":"new"}')
            await raw.result("r")
            await raw.pong()
            assert raw.text("r") == "new"
            world.check_empty()

    run(test())


def test_engine_leaves_politely(tmp_path: Path) -> None:
    """It ends what it runs and gets nothing new."""

    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("r")
            (started,) = await host.runs()
            host.say(Deregister("raw", 1))
            await until(lambda: world.core.snapshot()["engines"][0]["draining"])
            await world.join("good", "m")
            raw.submit("s")
            assert (await raw.result("s")).engine == "good"
            host.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b'{"text":"x"}')
            assert (await raw.result("r")).engine == "raw"
            world.check_empty()

    run(test())


def test_silent_client(tmp_path: Path) -> None:
    """Its work is cancelled; when it comes back its request may be tried again."""

    async def test() -> None:
        async with World(tmp_path, client_timeout_s=0.2) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw(b"me")
            raw.submit("r")
            (started,) = await host.runs()
            assert (await host.next(Abort)).attempt_id == started.attempt_id
            await until(lambda: not world.daemon._clients)
            raw.submit("r")
            failures = await raw.answer("r", 2)
            assert failures == raw.answers("r")[0]
            assert failures.code == "cancelled"  # type: ignore[union-attr]
            assert failures.retryable  # type: ignore[union-attr]
            world.check_empty()

    run(test())


def test_client_that_pings_is_not_silent(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, client_timeout_s=0.2) as world:
            await world.join(step_s=0.05, reply_tokens=(10, 10))
            async with world.client() as client, client.workflow() as workflow:
                await workflow.generate(ASK, max_tokens=10)
            assert world.counter("failed") == 0

    run(test())


@pytest.mark.parametrize("finished", [False, True])
def test_client_reconnects_under_its_name(tmp_path: Path, finished: bool) -> None:
    """It asks again and gets the answer, given meanwhile (replay) or not yet (attach)."""

    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            first = world.raw(b"me")
            first.submit("r")
            (started,) = await host.runs()
            finish = EngineFinished(started.attempt_id, Usage(1, 1), "stop")
            first.close()
            if finished:
                host.say(finish, b'{"text":"x"}')
                await until(lambda: world.counter("completed"))
            second = world.raw(b"me")
            second.submit("r")
            await second.pong()
            if not finished:
                host.say(finish, b'{"text":"x"}')
            await second.result("r")
            assert len(second.answers("r")) == 1
            assert len(host.of(Run)) == 1
            assert world.counter("repeated") == 1
            world.check_empty()

    run(test())


def test_daemon_restarts_on_one_loop(tmp_path: Path) -> None:
    """The same engines register with the next one, and clients ask again by themselves."""

    async def test() -> None:
        first = World(tmp_path)
        await first.__aenter__()
        host = await first.join("e", "m", slots=4, step_s=0.002, reply_tokens=(10, 30))
        async with first.client() as client:
            load = asyncio.ensure_future(sessions(client, 20, stages=4, max_tokens=30))
            await until(lambda: first.counter("completed") > 10)
            first.daemon.close()
            async with World(tmp_path) as second:
                outcomes = await load
                assert all(isinstance(o, Reply) for o in outcomes), outcomes
                assert len(outcomes) == 80
                assert second.core.has_engine("e", host.incarnation)
                assert min(second.core._engines["e"].running, default=1 << 22) >= 1 << 22
                second.check_empty()
        await first.kill("e")

    run(test())


def test_drain(tmp_path: Path) -> None:
    """What is there is answered, what is new is refused with a time to come back."""

    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join(max_inflight=1, step_s=0.005, reply_tokens=(20, 20))
            async with world.client() as client:
                calls = [client.workflow().submit(ASK, max_tokens=20) for _ in range(3)]
                await until(lambda: host.running and world.stages["waiting"] == 2)
                drained = asyncio.ensure_future(world.daemon.drain())
                await until(lambda: world.core.snapshot()["draining"])
                with pytest.raises(Draining) as caught:
                    await client.workflow().generate(ASK)
                assert caught.value.retryable
                assert caught.value.retry_after_s
                assert len(await asyncio.gather(*calls)) == 3
                await drained
                world.check_empty()

    run(test())


def test_drain_gives_up_in_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, drain_s=0.1) as world:
            host = await world.join(max_inflight=1, **SLOW)
            async with world.client() as client:
                calls = [client.workflow().submit(ASK, max_tokens=1000) for _ in range(3)]
                await until(lambda: host.running and world.stages["waiting"] == 2)
                await world.daemon.drain()
                world.daemon.give_up()
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(o, Draining) and o.retryable for o in outcomes)
                await until(lambda: not host.running)
                world.check_empty()

    run(test())


def test_mixed_run_leaves_nothing(tmp_path: Path) -> None:
    """Cancels, closes, failures, lost engines and timeouts at once; then all books are empty."""

    async def test() -> None:
        settings = {"reply_keep": 50, "max_queued_stages": 60, "client_timeout_s": 1.0}
        async with World(tmp_path, engine_timeout_s=0.2, **settings) as world:
            await world.join("a", "m", slots=4, fail_rate=0.2, **FAST)
            await world.join("b", "n", slots=4, **FAST)
            raw = world.raw()

            async def abuse(n: int) -> None:
                for number in range(40):
                    name = f"{n}-{number}"
                    raw.submit(name, body(name), workflow_id=f"w{n}", stream=bool(number % 2))
                    if number % 3 == 0:
                        raw.say(Cancel(name))
                    if number % 7 == 0:
                        await asyncio.sleep(0.005)
                    raw.say(Ping(v=1))

            async with world.client() as client:
                load = asyncio.ensure_future(
                    sessions(client, 30, stages=3, max_tokens=20, timeout_s=5.0, retries=20)
                )
                await asyncio.gather(*map(abuse, range(10)))
                await world.kill("b")
                await world.join("c", "n", slots=4, **FAST)
                outcomes = await load
                assert all(isinstance(o, Reply) or _fair(o) for o in outcomes), outcomes
            names = [f"{n}-{number}" for n in range(10) for number in range(40)]
            await until(lambda: all(raw.answers(name) for name in names))
            await raw.pong()
            assert all(len(raw.answers(name)) == 1 for name in names)
            await until(lambda: world.core.idle)
            world.check_empty()
            assert len(world.daemon._answers) <= 50
            raw.close()
            await until(lambda: not world.daemon._clients)

    run(test())


def _fair(outcome: object) -> bool:
    return isinstance(outcome, ChimeraError) and outcome.retryable
