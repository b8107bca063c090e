"""Remote engines against a scripted server: faults, cancellation, slots, health and start."""

import asyncio
import gc
import json
import random
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines import openai, openai_forms
from chimera_daemon.engines.backend import BackendInfo, EngineStartError
from chimera_daemon.engines.host import Host
from chimera_daemon.engines.openai import RemoteBackend
from chimera_daemon.messages import (
    Api,
    EngineChunk,
    EngineFailed,
    EngineFinished,
    Profile,
    Run,
    Usage,
)
from tests.engines.conftest import Rig, chat
from tests.engines.fake_daemon import FakeDaemon, until
from tests.engines.fake_openai import (
    CONTEXT,
    DONE,
    FakeOpenAI,
    Script,
    chunk,
    event,
    hang,
    pieces,
    raw,
    reset,
    status,
)

# What every backend must do, with the fixture `rig` below.
from tests.engines.test_conformance import (  # noqa: F401
    test_all_of_an_openai_body_is_taken,
    test_bad_payload_is_refused_and_the_host_goes_on,
    test_broken_connection_begins_anew_under_another_incarnation,
    test_cancel_frees_the_slot_and_is_silent,
    test_cancel_of_unknown_and_of_ended,
    test_daemon_restart_cancels_and_registers_again,
    test_daemon_that_forgot_this_engine,
    test_garbage_from_the_daemon,
    test_more_than_fit_at_once,
    test_priority_is_honoured,
    test_prompt_over_the_context,
    test_registers_and_beats,
    test_runs_and_counts,
    test_shutdown,
    test_stop_lets_running_attempts_end,
    test_stream_is_the_text,
)

KEY = "sk-secret-1234567890"
SLOTS = 4
TEST_S = 60.0


@pytest.fixture
def server() -> FakeOpenAI:
    server = FakeOpenAI()
    server.step_s = 0.001
    return server


@pytest.fixture
def rig(server: FakeOpenAI, tmp_path: Path) -> Iterator[Rig]:
    with asyncio.Runner() as runner:
        runner.run(server.start())
        yield Rig(engine_of(server, health_s=0.05), runner, tmp_path)
        runner.run(server.stop())
        assert not server.active


def engine_of(server: FakeOpenAI, **args: Any) -> EngineConfig:
    args = {"model": server.model, "slots": SLOTS, "health_s": 60.0} | args
    return EngineConfig(name="r-1", model="here", kind="openai", path=server.url, args=args)


class Recorder:
    """Everything that a backend tells its host."""

    def __init__(self) -> None:
        self.chunks: dict[int, list[tuple[int, Any]]] = {}
        self.answers: dict[int, EngineFinished | EngineFailed] = {}
        self.payloads: dict[int, Any] = {}
        self.order: list[int] = []
        self.availability: list[str | BackendInfo] = []
        self.on_chunk: Callable[[int], None] = lambda attempt_id: None

    def emit(self, message: Any, payload: bytes | None = None) -> None:
        attempt_id = message.attempt_id
        if isinstance(message, EngineChunk):
            assert payload is not None
            found = self.chunks.setdefault(attempt_id, [])
            found.append((message.offset, json.loads(payload)))
            self.on_chunk(attempt_id)
            return
        assert attempt_id not in self.answers, "two answers"
        self.answers[attempt_id] = message
        self.order.append(attempt_id)
        if payload is not None:
            self.payloads[attempt_id] = json.loads(payload)

    def suspend(self, reason: str) -> None:
        self.availability.append(reason)

    def resume(self, info: BackendInfo) -> None:
        self.availability.append(info)

    def died(self, reason: str) -> None:
        raise AssertionError(reason)

    @property
    def events(self) -> int:
        return len(self.answers) + sum(map(len, self.chunks.values()))


class Remote:
    """A backend, its server and what the backend has told."""

    def __init__(self, server: FakeOpenAI, backend: RemoteBackend, info: BackendInfo) -> None:
        self.server, self.backend, self.info = server, backend, info
        self.told: Recorder
        self._next = 0

    def submit(
        self,
        payload: bytes | None = None,
        max_tokens: int = 8,
        *,
        stream: bool = True,
        api: Api = "text",
        priority: int = 0,
    ) -> int:
        self._next += 1
        payload = chat("x") if payload is None else payload
        self.backend.submit(Run(self._next, priority, max_tokens, stream, api=api), payload)
        return self._next

    async def answer(self, attempt_id: int) -> EngineFinished | EngineFailed:
        await until(lambda: attempt_id in self.told.answers, f"answer {attempt_id}")
        return self.told.answers[attempt_id]

    async def finished(self, attempt_id: int) -> EngineFinished:
        answer = await self.answer(attempt_id)
        assert isinstance(answer, EngineFinished), answer
        return answer

    async def failed(self, *scripts: Script, **run: Any) -> EngineFailed:
        """How an attempt fails that the server answers like this."""
        self.server.scripts.extend(scripts)
        answer = await self.answer(self.submit(**run))
        assert isinstance(answer, EngineFailed), answer
        assert not self.server.scripts
        return answer

    def text(self, attempt_id: int) -> str:
        """Of a stream, whose chunks must follow each other and make up the answer."""
        text = ""
        for offset, payload in self.told.chunks[attempt_id]:
            assert offset == len(text)
            text += payload["text"]
        assert self.told.payloads[attempt_id] == {"text": text}
        return text


Test = Callable[[Remote], Awaitable[None]]


def run(test: Test, *, listening: bool = True, **args: Any) -> None:
    asyncio.run(asyncio.wait_for(_run(test, FakeOpenAI(), args, listening), TEST_S))


async def _run(test: Test, server: FakeOpenAI, args: dict[str, Any], listening: bool) -> None:
    tasks_before = len(asyncio.all_tasks())
    await server.start()
    if not listening:
        await server.stop()
    backend, told = RemoteBackend(engine_of(server, **args)), Recorder()
    try:
        remote = Remote(server, backend, await backend.start(told))
        remote.told = told
        await test(remote)
    finally:
        await backend.close()
        seen = told.events
        await until(lambda: not server.active, "an idle server")
        await server.stop()
    assert told.events == seen
    assert not backend._attempts
    assert not backend._running
    assert backend.stats().waiting == 0
    await until(lambda: len(asyncio.all_tasks()) == tasks_before, "no task left")
    gc.collect()  # what is left open warns now


# Answers.


def test_text() -> None:
    async def test(remote: Remote) -> None:
        streamed, plain = remote.submit(), remote.submit(stream=False)
        for attempt_id in (streamed, plain):
            finished = await remote.finished(attempt_id)
            assert finished.usage.output_tokens == 8
            assert finished.usage.prompt_tokens > 5
            assert finished.finish_reason == "length"
        assert len(remote.text(streamed).split()) == 8
        assert remote.told.payloads[plain] == remote.told.payloads[streamed]
        assert plain not in remote.told.chunks
        assert remote.backend.stats().output_tokens == 16
        assert remote.server.bodies[0]["model"] == remote.server.model

    run(test)


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("usage", [False, True])
def test_openai_forms_streamed(api: Api, usage: bool) -> None:
    body: dict[str, Any] = {"model": "auto", "prompt": "x", "messages": [], "max_tokens": 5}
    if usage:
        body["stream_options"] = {"include_usage": True}

    async def test(remote: Remote) -> None:
        attempt_id = remote.submit(json.dumps(body).encode(), api=api)
        finished = await remote.finished(attempt_id)
        assert finished.usage.output_tokens == 5
        chunks = remote.told.chunks[attempt_id]
        assert [offset for offset, _ in chunks] == list(range(len(chunks)))
        assert {data["model"] for _, data in chunks} == {"here"}
        assert len(chunks) == 5 + (api == "chat") + usage
        assert ("usage" in chunks[-1][1]) is usage
        assert remote.told.payloads[attempt_id] == {"chunks": len(chunks)}
        last = chunks[-2 if usage else -1][1]["choices"][0]
        assert last["finish_reason"] == finished.finish_reason == "length"

    run(test)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_openai_forms_in_one_piece(api: Api) -> None:
    body = {"prompt": "x", "messages": [], "max_tokens": 5, "chimera": {}}

    async def test(remote: Remote) -> None:
        attempt_id = remote.submit(json.dumps(body).encode(), api=api, stream=False)
        finished = await remote.finished(attempt_id)
        payload = remote.told.payloads[attempt_id]
        assert finished.usage == Usage(*payload["usage"].values())
        assert payload["model"] == "here"
        assert payload["created"] == 7
        assert "chimera" not in remote.server.bodies[0]
        assert attempt_id not in remote.told.chunks

    run(test)


WORDS = event(chunk("häl")) + event(chunk("lö"))
END = event(chunk("!", reason="stop"))
STREAMS: dict[str, tuple[bytes, ...]] = {
    "as it should be": (WORDS, END, DONE),
    "byte by byte": tuple(bytes([b]) for b in WORDS + END + DONE),
    "carriage returns": ((WORDS + END + DONE).replace(b"\n", b"\r\n"),),
    "comments": (b": hello\n\n", WORDS, b": still here\n\n", END, b"retry: 3\n\n", DONE),
    "several lines": (WORDS.replace(b', "', b',\ndata:"'), END, DONE),
    "no blank line": (WORDS, END, b"data: [DONE]"),
    "no end": (WORDS, END),
    "no end and no blank line": (WORDS, END.rstrip()),
    "more after the end": (WORDS, END, DONE, b"data: nonsense\n\n"),
    "empty chunks": (WORDS, event({"choices": []}), event({}), END, DONE),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_read_however_they_come(name: str) -> None:
    async def test(remote: Remote) -> None:
        remote.server.scripts.append(pieces(*STREAMS[name]))
        attempt_id = remote.submit()
        assert (await remote.finished(attempt_id)).finish_reason == "stop"
        assert remote.text(attempt_id) == "hällö!"
        await remote.finished(remote.submit())

    run(test)


# Faults.


EARLY: dict[str, tuple[Script, str]] = {
    "cut": (pieces(b""), "ended before its answer"),
    "done at once": (pieces(DONE), "ended before its answer"),
    "not a stream": (raw(b'{"choices":[]}'), "ended before its answer"),
    "garbage": (pieces(b"data: {nope\n\n", DONE), "garbage"),
    "error": (pieces(event({"error": {"message": "out of memory"}})), "out of memory"),
    "silent": (hang(begun=False), "nothing came in time"),
    "silent after the header": (hang(), "nothing came in time"),
    "huge": (pieces(b"data: " + b"x" * 5000), "larger than"),
}
BROKEN = {
    "cut": pieces(WORDS),
    "garbage": pieces(WORDS, b"data: {nope\n\n", DONE),
    "half an event": pieces(WORDS, b'data: {"choices": [{"de'),
    "error": pieces(WORDS, event({"error": "out of memory"})),
    "silent": hang(WORDS),
    "reset": reset(WORDS),
    "huge": pieces(WORDS, b"data: " + b"x" * 5000),
}
EARLY_S: dict[str, Any] = {"first_byte_timeout_s": 0.2}
IDLE_S: dict[str, Any] = {"idle_timeout_s": 0.2}


@pytest.fixture
def small_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "MAX_ANSWER_BYTES", 4000)
    monkeypatch.setattr(openai_forms, "MAX_ANSWER_BYTES", 4000)


@pytest.mark.usefixtures("small_answers")
@pytest.mark.parametrize("name", EARLY)
def test_faults_before_the_first_token(name: str) -> None:
    script, says = EARLY[name]

    async def test(remote: Remote) -> None:
        failed = await remote.failed(script)
        assert (failed.code, failed.retryable) == ("engine_error", True)
        assert says in failed.message
        await remote.finished(remote.submit())

    run(test, **EARLY_S)


@pytest.mark.usefixtures("small_answers")
@pytest.mark.parametrize("api", ["text", "chat"])
@pytest.mark.parametrize("name", BROKEN)
def test_faults_after_the_first_token(name: str, api: Api) -> None:
    async def test(remote: Remote) -> None:
        failed = await remote.failed(BROKEN[name], api=api)
        assert (failed.code, failed.retryable) == ("engine_lost", True)
        assert "in the middle of its answer" in failed.message
        assert len(remote.told.chunks[failed.attempt_id]) == 2
        await remote.finished(remote.submit())

    run(test, **IDLE_S)


@pytest.mark.usefixtures("small_answers")
@pytest.mark.parametrize(
    ("script", "says"),
    [
        (raw(b"{nope"), "garbage"),
        (raw(b"{}"), "no choices"),
        (raw(b"x" * 5000), "larger than"),
        (raw(b'{"error":{"message":"out of memory"}}'), "out of memory"),
        (hang(b'{"choices":'), "nothing came in time"),
        (reset(b'{"choices":'), "the connection broke"),
    ],
)
def test_faults_of_an_answer_in_one_piece(script: Script, says: str) -> None:
    async def test(remote: Remote) -> None:
        failed = await remote.failed(script, stream=False)
        assert (failed.code, failed.retryable) == ("engine_error", True)
        assert says in failed.message
        await remote.finished(remote.submit(stream=False))

    run(test, **IDLE_S)


@pytest.mark.parametrize(
    ("code", "says", "expected"),
    [
        (400, "scripted", ("bad_request", False)),
        (404, "scripted", ("bad_request", False)),
        (422, "scripted", ("bad_request", False)),
        (401, "refused the key", ("engine_error", False)),
        (403, "refused the key", ("engine_error", False)),
        (302, "redirects", ("engine_error", False)),
        (408, "scripted", ("engine_error", True)),
        (425, "scripted", ("engine_error", True)),
        (429, "scripted", ("engine_error", True)),
        (500, "scripted", ("engine_error", True)),
        (503, "scripted", ("engine_error", True)),
        (202, "scripted", ("engine_error", True)),
    ],
)
def test_status(code: int, says: str, expected: tuple[str, bool]) -> None:
    async def test(remote: Remote) -> None:
        for stream in (False, True):
            failed = await remote.failed(status(code, Location="/elsewhere"), stream=stream)
            assert (failed.code, failed.retryable) == expected
            assert says in failed.message
        await remote.finished(remote.submit())
        assert remote.told.availability == []

    run(test)


@pytest.mark.parametrize(
    ("code", "headers", "wanted"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (503, {"Retry-After": "0.5"}, 0.5),
        (429, {}, 1.0),
        (500, {"Retry-After": "7"}, None),
        (400, {"Retry-After": "7"}, None),
    ],
)
def test_a_server_that_has_too_much_to_do_is_left_alone(
    code: int, headers: dict[str, str], wanted: float | None
) -> None:
    async def test(remote: Remote) -> None:
        failed = await remote.failed(status(code, **headers))
        assert failed.retry_after_s == wanted

    run(test)


def test_what_a_server_quotes_is_cut_and_cleaned(tmp_path: Path) -> None:
    async def test(remote: Remote) -> None:
        message = f"I was sent {KEY} and a-long-header and short"
        failed = await remote.failed(status(400, message + "x" * 10_000))
        assert "I was sent *** and *** and short" in failed.message
        assert len(failed.message) < 1000
        for code in (401, 500):
            assert KEY not in (await remote.failed(status(code, message))).message
        sent = remote.server.headers[0]
        assert sent["Authorization"] == f"Bearer {KEY}"
        assert (sent["x-secret"], sent["x-short"]) == ("a-long-header", "short")

    (tmp_path / "key").write_text(f" {KEY}\n")
    headers = {"x-secret": "a-long-header", "x-short": "short"}
    run(test, api_key_file=str(tmp_path / "key"), headers=headers)


def test_only_an_idle_connection_that_was_closed_is_tried_again() -> None:
    async def test(remote: Remote) -> None:
        server = remote.server
        await remote.finished(remote.submit())
        server.scripts.append(reset())
        await remote.finished(remote.submit())
        assert len(server.bodies) == 3
        # The connection was used before, the one of the second try was not.
        failed = await remote.failed(reset(), reset())
        assert (failed.code, failed.retryable) == ("engine_error", True)
        assert len(server.bodies) == 5
        await remote.failed(reset())
        assert len(server.bodies) == 6

    run(test)


def test_connections_are_used_again() -> None:
    async def test(remote: Remote) -> None:
        for stream in (True, False) * 10:
            await remote.finished(remote.submit(stream=stream))
        await remote.failed(status(500))
        remote.server.scripts.append(pieces(WORDS, END, DONE))  # its last bytes come later
        await remote.finished(remote.submit())
        await until(lambda: not remote.backend.stats().running)
        await remote.finished(remote.submit())
        assert len(remote.server.connections) == 1

    run(test)


# Cancellation and slots.


@pytest.mark.parametrize(
    ("script", "stream", "chunks"),
    [
        (hang(begun=False), False, 0),
        (hang(b"{"), False, 0),
        (hang(begun=False), True, 0),
        (hang(), True, 0),
        (hang(WORDS), True, 2),
    ],
)
def test_cancel_closes_the_connection(script: Script, stream: bool, chunks: int) -> None:
    async def test(remote: Remote) -> None:
        server = remote.server
        server.scripts.extend([script] * SLOTS)
        running = [remote.submit(stream=stream) for _ in range(SLOTS)]
        waiting = remote.submit()
        await until(lambda: server.active == SLOTS and not server.scripts)
        await until(lambda: remote.told.events == SLOTS * chunks)
        for attempt_id in (*running, waiting, 999):
            remote.backend.cancel(attempt_id)
        seen = remote.told.events
        await until(lambda: server.aborted == SLOTS, "all aborted")
        await remote.finished(remote.submit())
        assert remote.told.events == seen + 9
        assert waiting not in remote.told.answers
        assert (remote.backend.stats().waiting, remote.backend.progress()) == (0, {})

    run(test)


def test_cancel_before_it_has_begun() -> None:
    async def test(remote: Remote) -> None:
        for _ in range(3 * SLOTS):
            remote.backend.cancel(remote.submit())
        await remote.finished(remote.submit())
        assert len(remote.server.bodies) == 1
        await until(lambda: remote.backend.stats().running == 0)

    run(test)


def test_cancel_from_inside_emit() -> None:
    async def test(remote: Remote) -> None:
        remote.told.on_chunk = remote.backend.cancel
        remote.server.scripts.append(pieces(WORDS + WORDS, WORDS))
        attempt_id = remote.submit()
        await until(lambda: remote.server.bodies and not remote.backend.stats().running)
        assert len(remote.told.chunks[attempt_id]) == 1
        assert not remote.told.answers

    run(test)


def test_an_id_may_come_again() -> None:
    """As after a restart of the daemon."""

    async def test(remote: Remote) -> None:
        remote.server.scripts.append(hang())
        run = Run(1, 0, 8, True)
        remote.backend.submit(run, chat("x"))
        await until(lambda: remote.server.active)
        remote.backend.cancel(1)
        remote.backend.submit(run, chat("x"))
        await remote.finished(1)

    run(test)


def test_slots_bound_requests_and_connections() -> None:
    async def test(remote: Remote) -> None:
        attempts = [remote.submit() for _ in range(10 * SLOTS)]
        assert remote.backend.stats().waiting == 9 * SLOTS
        for attempt_id in attempts:
            await remote.finished(attempt_id)
        assert remote.server.most_active == SLOTS
        assert len(remote.server.connections) <= SLOTS + 1

    run(test)


def test_the_waiting_go_by_priority_then_arrival() -> None:
    async def test(remote: Remote) -> None:
        first = remote.submit(priority=9)
        later = [remote.submit(priority=p) for p in (3, 1, 3, 1, -2)]
        for attempt_id in later:
            await remote.finished(attempt_id)
        order = (4, 1, 3, 0, 2)
        assert remote.told.order == [first, *(later[i] for i in order)]

    run(test, slots=1)


def test_stats_and_progress() -> None:
    async def test(remote: Remote) -> None:
        remote.server.scripts.append(hang(WORDS))
        attempt_id = remote.submit()
        remote.backend.stats()
        await until(lambda: remote.backend.progress() == {attempt_id: 2})
        stats = remote.backend.stats()
        assert (stats.running, stats.output_tokens) == (1, 2)
        assert stats.tokens_per_s > 0.0

    run(test)


def test_close_while_everything_is_going_on() -> None:
    async def test(remote: Remote) -> None:
        remote.server.scripts.extend([hang(begun=False), hang(), hang(WORDS)])
        for _ in range(3 * SLOTS):
            remote.submit(max_tokens=500)
        await until(lambda: remote.told.chunks)

    run(test, health_s=0.001)


def test_a_storm_of_faults() -> None:
    """Whatever happens, each attempt ends once and its slot is free again."""
    chance = random.Random(7)
    faults = [script for script, _ in EARLY.values()] + [*BROKEN.values(), reset()]

    async def test(remote: Remote) -> None:
        server, cancelled = remote.server, set[int]()
        attempts: list[int] = []
        for _ in range(200):
            if chance.random() < 0.4:
                server.scripts.append(chance.choice(faults))
            attempts.append(remote.submit(stream=chance.random() < 0.7))
            if chance.random() < 0.2:
                await asyncio.sleep(0.002)
                cancelled.add(attempts[-1])
                remote.backend.cancel(attempts[-1])
        ended = remote.told.answers
        await until(lambda: all(a in ended for a in attempts if a not in cancelled), "all ended")
        server.scripts.clear()
        await remote.finished(remote.submit())
        await until(lambda: not remote.backend.stats().running and not server.active)
        assert any(isinstance(answer, EngineFailed) for answer in ended.values())

    run(test, first_byte_timeout_s=0.1, idle_timeout_s=0.1, health_s=0.02)


# Health.


def down(remote: Remote) -> str:
    last = remote.told.availability[-1] if remote.told.availability else None
    return last if isinstance(last, str) else ""


async def recovers(remote: Remote) -> None:
    told = remote.told.availability
    await until(lambda: isinstance(told[-1], BackendInfo), "resume")
    await remote.finished(remote.submit())


def test_what_the_server_says_of_itself() -> None:
    async def test(remote: Remote) -> None:
        assert remote.info == BackendInfo(SLOTS, CONTEXT, Profile(0.02, 0.0002, 0.00005))
        assert remote.told.availability == []

    run(test)


def test_what_is_configured_counts_more() -> None:
    async def test(remote: Remote) -> None:
        assert remote.info == BackendInfo(SLOTS, 100, Profile(step_s=0.5))

    run(test, context_tokens=100, profile={"step_s": 0.5})


def test_the_server_comes_later_and_goes_and_comes() -> None:
    async def test(remote: Remote) -> None:
        assert remote.server.url in down(remote)
        assert remote.info.context_tokens == openai.DEFAULT_CONTEXT_TOKENS
        for _ in range(2):
            await remote.server.start()
            await recovers(remote)
            info = remote.told.availability[-1]
            assert isinstance(info, BackendInfo)
            assert info.context_tokens == CONTEXT
            await remote.server.stop()
            await until(lambda: down(remote), "suspended")
            failed = await remote.failed()
            assert (failed.code, failed.retryable) == ("engine_error", True)
            assert "ConnectorError" in failed.message

    run(test, listening=False, health_s=0.02)


def test_the_daemon_sees_an_engine_only_while_its_server_is_there(
    rig: Rig, server: FakeOpenAI
) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        for times in (1, 2):
            await server.stop()
            await until(lambda times=times: len(daemon.deregisters) == times, "a goodbye")
            await server.start()
            await daemon.ready(times + 1)
            await daemon.submit(chat("x"), 3).finished()

    rig.run(test)


def test_a_server_that_is_slow_to_answer_does_not_hold_up_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its port is open, and nothing comes."""
    monkeypatch.setattr(openai, "_FIRST_LOOK_S", 0.05)

    async def test() -> None:
        server, told = FakeOpenAI(), Recorder()
        server.models = hang(begun=False)
        await server.start()
        backend = RemoteBackend(engine_of(server))
        await backend.start(told)
        assert "has not answered yet" in str(told.availability)
        await backend.close()
        await server.stop()

    asyncio.run(test())


def test_requests_that_cannot_connect_suspend_too() -> None:
    async def test(remote: Remote) -> None:
        await remote.server.stop()
        for _ in range(2):
            await remote.failed()
        await remote.server.start()
        await remote.finished(remote.submit())
        await remote.server.stop()
        for _ in range(openai.MAX_CONNECT_FAILURES):
            assert not down(remote)
            await remote.failed()
        assert "3 requests in a row failed" in down(remote)

    run(test)


def test_one_look_that_fails_means_nothing() -> None:
    async def test(remote: Remote) -> None:
        server = remote.server

        async def every_other(request: Any) -> Any:
            script = status(500) if server.looks % 2 else served(server.model)
            return await script(request)

        server.models = every_other
        seen = server.looks
        await until(lambda: server.looks > seen + 10)
        assert remote.told.availability == []
        server.models = status(500, "on fire")
        await until(lambda: "on fire" in down(remote))

    run(test, health_s=0.002)


def served(*names: str, context: int | None = CONTEXT) -> Script:
    models = [{"id": name, "max_model_len": context} for name in names]
    return raw(json.dumps({"data": models}).encode())


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (served("a", "b"), "does not serve `remote-model` but a, b; set `model`"),
        (served(*"abcdefghij"), "h and 2 more"),
        (served(), "but nothing"),
        (raw(b"<html>"), "garbage"),
        (raw(b"x" * (5 << 20)), "larger than"),
        (status(500, "on fire"), "on fire"),
        (status(302), "redirects"),
        (reset(), "ServerDisconnectedError"),
    ],
)
def test_a_server_that_cannot_be_used(models: Script, says: str) -> None:
    async def test(remote: Remote) -> None:
        remote.server.models = models
        await until(lambda: says in down(remote), says)
        remote.server.models = None
        await recovers(remote)

    run(test, health_s=0.02)


@pytest.mark.parametrize("code", [404, 405, 429, 501])
def test_a_server_without_a_list_of_models_is_alive(code: int) -> None:
    async def test(remote: Remote) -> None:
        remote.server.models = status(code)
        seen = remote.server.looks
        await until(lambda: remote.server.looks > seen + 5)
        assert remote.told.availability == []

    run(test, health_s=0.002)


def test_a_server_that_comes_back_with_another_context_says_so() -> None:
    async def test(remote: Remote) -> None:
        remote.server.models = served(remote.server.model, context=512)
        await until(lambda: remote.told.availability)
        reason, info = remote.told.availability
        assert "context has changed" in str(reason)
        assert isinstance(info, BackendInfo)
        assert info.context_tokens == 512

    run(test, health_s=0.02)


def test_a_wrong_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(remote: Remote) -> None:
        remote.server.key = "right"
        await until(lambda: "refused the key" in down(remote))
        remote.server.key = KEY
        await recovers(remote)
        assert KEY not in str(remote.told.availability)

    (tmp_path / "key").write_text(KEY)
    caplog.set_level("DEBUG")
    run(test, api_key_file=str(tmp_path / "key"), health_s=0.02)
    assert KEY not in caplog.text


# Start.


def refused(path: str | None = "http://127.0.0.1:9/v1", **args: Any) -> str:
    engine = EngineConfig(name="r-1", model="here", kind="openai", path=path, args=args)

    async def start() -> None:
        backend = RemoteBackend(engine)
        try:
            await backend.start(Recorder())
        finally:
            await backend.close()

    with pytest.raises(EngineStartError) as raised:
        asyncio.run(start())
    assert "r-1" in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (None, "base URL"),
        ("", "base URL"),
        ("host:8000", "base URL"),
        ("ftp://host/v1", "base URL"),
        ("http://", "base URL"),
        ("http://host:99999/v1", "Port out of range"),
        ("http://host:0/v1", "base URL"),
        ("http://host:x/v1", "base URL"),
        ("http://[::1/v1", "base URL"),
        ("http://ho st/v1", "base URL"),
        ("http://host/v1?x=1", "nothing after it"),
        ("http://host/v1/chat/completions", "leave `/chat/completions` away"),
        (f"http://user:{KEY}@host/v1", "api_key_file"),
    ],
)
def test_bad_urls(path: str | None, says: str) -> None:
    message = refused(path)
    assert says in message
    assert KEY not in message


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"api_key": KEY}, "did you mean `api_key_file`"),
        ({"slot": 3}, "did you mean `slots`"),
        ({"slots": 0}, "$.slots"),
        ({"slots": "many"}, "$.slots"),
        ({"profile": {"step": 1}}, "$.profile"),
        ({"idle_timeout_s": 0}, "$.idle_timeout_s"),
        ({"headers": {"x y": "z"}}, "`x y`"),
        ({"headers": {"x": f"{KEY}\r\ny: z"}}, "`x`"),
        ({"headers": {"Content-Length": "3"}}, "not for you"),
        ({"limit_field": "limit"}, "$.limit_field"),
    ],
)
def test_bad_args(args: dict[str, Any], says: str) -> None:
    message = refused(**args)
    assert says in message
    assert KEY not in message


def test_bad_keys(tmp_path: Path) -> None:
    file = tmp_path / "key"
    assert str(file) in refused(api_key_file=str(file))
    assert "cannot be read" in refused(api_key_file=str(tmp_path))
    for content in (b"", b" \n", f"{KEY}\n{KEY}".encode(), b"\xff\xfe", f"{KEY} x".encode()):
        file.write_bytes(content)
        message = refused(api_key_file=str(file))
        assert str(file) in message
        assert KEY not in message
    file.write_text(KEY)
    both = refused(api_key_file=str(file), headers={"authorization": "x"})
    assert "not both" in both


def test_aiohttp_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert "pip install 'chimera-daemon[gateway]'" in refused()
