"""Whatever comes in at the sockets gets a clear error or is dropped, and the daemon goes on."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chimera_daemon.messages import (
    PROTOCOL_VERSION,
    Cancel,
    CloseWorkflow,
    DaemonBeat,
    Deregister,
    EngineChunk,
    EngineFailed,
    EngineFinished,
    EngineStats,
    Failure,
    GetStatus,
    Heartbeat,
    Ping,
    Profile,
    Result,
    Run,
    Shutdown,
    Submit,
    Usage,
)
from chimera_daemon.wire import BATCH, MAX_HEADER_BYTES, encode, pack
from tests.daemon.harness import REGISTER, World, body, run, until

PING = encode(Ping(v=PROTOCOL_VERSION))
SUBMIT = encode(Submit("r", "w"))
GARBAGE = [
    pytest.param((b"",), id="empty"),
    pytest.param((b"", b""), id="two empty"),
    pytest.param((b"\xff\xfe garbage",), id="bytes"),
    pytest.param((b"\xc1",), id="no msgpack"),
    pytest.param((PING[:-1],), id="cut"),
    pytest.param((PING + b"\x00",), id="trailing"),
    pytest.param((b"\x91" * 5000,), id="deep"),
    pytest.param((b"\xdd\xff\xff\xff\xff",), id="long array"),
    pytest.param((b"\x81\x80\x01",), id="unhashable key"),
    pytest.param((b"\xd9\x04\xff\xff\xff\xff",), id="no utf-8"),
    pytest.param((b"GET / HTTP/1.1\r\n\r\n",), id="http"),
    pytest.param(tuple(b"12345"[i : i + 1] for i in range(5)), id="five frames"),
    pytest.param((b"x", *[b""] * 1000), id="many frames"),
    pytest.param((BATCH,), id="batch without messages"),
    pytest.param((BATCH, b"\x91\x90"), id="batch of nothing"),
    pytest.param((BATCH, b"\xdd\xff\xff\xff\xff"), id="batch of too much"),
    pytest.param(pack([(BATCH, *pack([(PING,)]))]), id="batch in a batch"),
]


def message(type_: str, **fields: Any) -> bytes:
    """A header of any fields."""
    return msgspec.msgpack.encode({"type": type_} | fields)


@pytest.mark.parametrize("frames", GARBAGE)
def test_garbage_at_the_front(tmp_path: Path, frames: tuple[bytes, ...]) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw()
            raw.frames(*frames)
            assert (await raw.failure("", "bad_request")).request_id == ""
            assert world.counter("unreadable_from_clients") == 1
            raw.submit("r")
            await raw.result("r")
            await world.serves()

    run(test())


@pytest.mark.parametrize("frames", GARBAGE)
def test_garbage_at_the_back(tmp_path: Path, frames: tuple[bytes, ...]) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw_host()
            raw.frames(*frames)
            await until(lambda: world.counter("unreadable_from_engines") == 1)
            await world.serves()
            raw.register(engine_id="late")  # the same peer may still come to its senses
            assert (await raw.next(DaemonBeat)).known

    run(test())


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (message("submit"), "request_id"),
        (message("submit", request_id="r"), "workflow_id"),
        (message("submit", request_id="r", workflow_id="w", colour=1), "colour"),
        (message("no such type", request_id="r"), "no such type"),
        (msgspec.msgpack.encode({"request_id": "r"}), "type"),
        (message("submit", request_id="", workflow_id="w"), "request_id"),
        (message("submit", request_id="x" * 129, workflow_id="w"), "request_id"),
        (message("submit", request_id=7, workflow_id="w"), "request_id"),
        (message("submit", request_id="r", workflow_id="w", stage=-1), "stage"),
        (message("submit", request_id="r", workflow_id="w", stage=10**9), "stage"),
        (message("submit", request_id="r", workflow_id="w", stage=1.5), "stage"),
        (message("submit", request_id="r", workflow_id="w", max_tokens=0), "max_tokens"),
        (message("submit", request_id="r", workflow_id="w", max_tokens=2**63), "max_tokens"),
        (message("submit", request_id="r", workflow_id="w", prompt_tokens=-5), "prompt_tokens"),
        (message("submit", request_id="r", workflow_id="w", kind="k" * 65), "kind"),
        (message("submit", request_id="r", workflow_id="w", stream="yes"), "stream"),
        (message("submit", request_id="r", workflow_id="w", hints={"speed": 1}), "speed"),
        (
            message("submit", request_id="r", workflow_id="w", hints={"output_tokens": -1}),
            "output_tokens",
        ),
        (
            message("submit", request_id="r", workflow_id="w", hints={"confidence": {"m": 1.5}}),
            "confidence",
        ),
        (
            message(
                "submit", request_id="r", workflow_id="w", hints={"confidence": {"m": float("nan")}}
            ),
            "confidence",
        ),
        (message("close", workflow_id="w", success=float("inf")), "success"),
        (message("close", workflow_id="w", success=-0.1), "success"),
        (message("cancel"), "request_id"),
        (message("status"), "request_id"),
        (message("ping"), "`v`"),
    ],
)
def test_fields_that_cannot_be(tmp_path: Path, header: bytes, says: str) -> None:
    """The error names the field, and the request where one can be made out."""

    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw()
            raw.frames(header, body())
            failure = await raw.next(Failure)
            assert failure.code == "bad_request"
            assert says in failure.message
            assert not failure.retryable
            request_id = msgspec.msgpack.decode(header).get("request_id")
            assert failure.request_id == (request_id[:128] if isinstance(request_id, str) else "")
            await world.serves()

    run(test())


@pytest.mark.parametrize("payload", [(), (b"", b""), (b"",) * 4])
def test_submit_of_other_frames(tmp_path: Path, payload: tuple[bytes, ...]) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw()
            raw.frames(SUBMIT, *payload)
            assert "2 frames" in (await raw.failure("r", "bad_request")).message
            await world.serves()

    run(test())


@pytest.mark.parametrize("payload", [b"", b"{}", b"\xff", b'{"messages":[]}', b"[" * 3000])
def test_payload_that_engines_cannot_use(tmp_path: Path, payload: bytes) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r", payload)
            assert not (await raw.failure("r", "bad_request")).retryable
            await world.serves()
            world.check_empty()

    run(test())


def test_other_version_at_the_front(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw()
            raw.say(Ping(v=PROTOCOL_VERSION + 1))
            failure = await raw.failure("", "version")
            assert f"version {PROTOCOL_VERSION}" in failure.message
            await world.serves()

    run(test())


def test_other_version_at_the_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw_host()
            raw.register(engine_id="new", v=PROTOCOL_VERSION + 1)
            assert f"version {PROTOCOL_VERSION}" in (await raw.next(Shutdown)).reason
            assert world.daemon.engines_of() == ["e"]
            await world.serves()

    run(test())


def test_unknown_model(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join("e", "m")
            raw = world.raw()
            raw.submit("r", model="qwen-900b")
            failure = await raw.failure("r", "unknown_model")
            assert "qwen-900b" in failure.message
            assert "there are: m" in failure.message
            await world.serves()
            world.check_empty()

    run(test())


def test_payload_over_the_limit(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, max_payload_bytes=10_000) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r", b"x" * 10_001)
            assert "10000" in (await raw.failure("r", "too_large")).message
            raw.submit("exact", body("x" * (10_000 - len(body("")))))
            await raw.result("exact")
            await world.serves()
            world.check_empty()

    run(test())


def test_payload_far_over_the_limit_cuts_the_connection(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path, max_payload_bytes=10_000) as world:
            await world.join()
            raw = world.raw()
            raw.submit("r", b"x" * 1_000_000)
            await raw.pong()  # after it has come back by itself
            assert not raw.answers("r")
            await world.serves()

    run(test())


def test_header_over_the_limit(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw()
            raw.frames(message("submit", request_id="r", x=b"x" * MAX_HEADER_BYTES), body())
            assert str(MAX_HEADER_BYTES) in (await raw.failure("", "too_large")).message
            await world.serves()

    run(test())


def test_same_id_with_another_body(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("r", body("one"))
            raw.submit("r", body("two"))
            await raw.failure("r", "conflict")
            (started,) = await host.runs()
            host.say(EngineFinished(started.attempt_id, Usage(1, 1), "stop"), b'{"text":"x"}')
            assert isinstance(await raw.answer("r", 2), Result)  # the first is not hurt
            raw.submit("r", body("one"), max_tokens=5)  # another header is another body
            assert isinstance(await raw.answer("r", 3), Failure)
            world.check_empty()

    run(test())


@pytest.mark.parametrize(
    "fields",
    [
        {"max_inflight": 0},
        {"max_inflight": -1},
        {"max_inflight": 1 << 40},
        {"context_tokens": -1},
        {"incarnation": -1},
        {"engine_id": ""},
        {"model": ""},
        {"profile": {"step_s": -1.0}},
        {"profile": {"step_s": float("nan")}},
        {"profile": {"step_s": float("inf")}},
        {"colour": "red"},
    ],
)
def test_registration_that_cannot_be(tmp_path: Path, fields: dict[str, Any]) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            raw = world.raw_host()
            raw.frames(msgspec.msgpack.encode(msgspec.to_builtins(REGISTER) | fields))
            await until(lambda: world.counter("unreadable_from_engines") == 1)
            assert world.daemon.engines_of() == ["e"]
            await world.serves()

    run(test())


def test_engine_that_says_nothing_of_itself(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register(context_tokens=0, profile=Profile(0.0, 0.0, 0.0))
            assert (await host.next(DaemonBeat)).known
            raw = world.raw()
            raw.submit("r")
            (started,) = await host.runs()
            host.say(EngineFinished(started.attempt_id, Usage(0, 0), ""), b'{"text":""}')
            await raw.result("r")
            world.check_empty()

    run(test())


def test_words_of_strangers_about_attempts(tmp_path: Path) -> None:
    """Only the engine that runs an attempt can end it, and only once."""

    async def test() -> None:
        async with World(tmp_path) as world:
            host, stranger = world.raw_host(), world.raw_host()
            host.register()
            stranger.register(engine_id="other", model="other")
            await until(lambda: len(world.daemon.engines_of()) == 2)
            raw = world.raw()
            raw.submit("r", model="m")
            (started,) = await host.runs()
            number = started.attempt_id
            finished = EngineFinished(number, Usage(1, 1), "stop")
            for message in (
                EngineChunk(number, 0),
                finished,
                EngineFailed(number, "engine_error", "no"),
                EngineFinished(12345, Usage(1, 1), "stop"),
            ):
                stranger.say(message, b'{"text":"wrong"}')
            stranger.register(engine_id="other", model="other")
            await stranger.next(DaemonBeat, 2)
            for _ in range(2):
                host.say(finished, b'{"text":"right"}')
            await raw.result("r")
            await raw.pong()
            assert raw.text("r") == "right"
            assert len(raw.got) == 2  # with the pong
            assert world.counter("late_answers") == 4
            assert world.counter("late_chunks") == 1
            world.check_empty()

    run(test())


def test_heartbeat_of_a_stranger(tmp_path: Path) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            host = await world.join()
            raw = world.raw_host()
            raw.say(Heartbeat("e", host.incarnation, EngineStats(running=1000)))
            assert not (await raw.next(DaemonBeat)).known
            raw.say(Deregister("e", host.incarnation))
            raw.say(Heartbeat("nobody", 1, EngineStats()))
            await raw.next(DaemonBeat, 2)
            (engine,) = world.core.snapshot()["engines"]
            assert not engine["draining"]
            assert engine["reported"]["running"] == 0

    run(test())


@pytest.mark.parametrize("change", [{"engine_id": "new"}, {"incarnation": 2}, {"model": "other"}])
def test_host_that_registers_as_another(tmp_path: Path, change: dict[str, Any]) -> None:
    """What it ran before is lost, or goes on; either way the request is answered."""

    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            raw.submit("r")
            await host.runs()
            host.register(**change)
            await host.next(DaemonBeat, 2)
            world.check()
            assert len(world.daemon.engines_of()) == 1
            await world.join("good", "m")
            for attempt in host.of(Run):
                host.say(EngineFinished(attempt.attempt_id, Usage(1, 1), "stop"), b'{"text":"x"}')
            await raw.result("r")
            assert len(raw.answers("r")) == 1

    run(test())


def test_bad_answers_of_an_engine(tmp_path: Path) -> None:
    """No payload, or more frames than there should be: the stage is answered all the same."""

    async def test() -> None:
        async with World(tmp_path) as world:
            host = world.raw_host()
            host.register()
            await until(lambda: world.daemon.engines_of())
            raw = world.raw()
            for n, payload in enumerate(((), (b"1", b"2", b"3"))):
                raw.submit(f"r{n}", stream=True)
                number = (await host.runs(n + 1))[n].attempt_id
                host.say(EngineChunk(number, 0), *payload)
                host.say(EngineFinished(number, Usage(1, 1), "stop"), *payload)
                await raw.result(f"r{n}")
                assert not raw.chunks(f"r{n}")
            world.check_empty()

    run(test())


MESSAGES = [
    PING,
    SUBMIT,
    encode(Cancel("r")),
    encode(CloseWorkflow("w", 1.0)),
    encode(GetStatus("s")),
    encode(REGISTER),
    encode(Heartbeat("raw", 1, EngineStats(), {1: 1})),
    encode(EngineChunk(1, 0)),
    encode(EngineFinished(1, Usage(1, 1), "stop")),
    encode(EngineFailed(1, "engine_error", "x", True)),
    encode(Deregister("raw", 1)),
]


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A message with bytes changed, cut or added."""
    raw = bytearray(draw(st.sampled_from(MESSAGES)))
    for place, value in draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)))):
        raw[place % len(raw)] = value
    return bytes(raw)[: draw(st.integers(0, 300))] + draw(st.binary(max_size=3))


FRAMES = st.lists(
    st.binary(max_size=60) | changed() | st.sampled_from(MESSAGES), min_size=1, max_size=5
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.booleans(), FRAMES), max_size=30))
def test_nothing_stops_the_daemon(tmp_path: Path, messages: list[tuple[bool, list[bytes]]]) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            front, back = world.raw(), world.raw_host()
            await front.pong()
            for at_front, frames in messages:
                (front if at_front else back).frames(*frames)
            back.register(engine_id="last", model="last")
            await until(lambda: "last" in world.daemon.engines_of())
            await front.pong()
            world.check()
            await world.join("good", "good")
            await asyncio.sleep(0)
            raw = world.raw()
            raw.submit("r", workflow_id="new", model="good")
            await raw.result("r")

    run(test())
