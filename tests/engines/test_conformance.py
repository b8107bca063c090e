"""What every backend behind every host must do; the same tests for echo and for a real vLLM."""

import json

import pytest

from chimera_daemon.engines.host import EXIT_OK, Host
from chimera_daemon.messages import PROTOCOL_VERSION, EngineFailed, EngineFinished
from tests.engines.conftest import VLLM_WARNINGS, Rig, chat, is_bad_request
from tests.engines.fake_daemon import FakeDaemon, until

pytestmark = [pytest.mark.filterwarnings(w) for w in VLLM_WARNINGS]


def test_registers_and_beats(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        register = await daemon.ready()
        assert register.engine_id == rig.engine.name
        assert register.model == rig.engine.model
        assert register.kind == rig.engine.kind
        assert register.incarnation == host.incarnation
        assert register.max_inflight == rig.max_inflight
        assert register.context_tokens == 2048
        assert register.v == PROTOCOL_VERSION
        assert daemon.identity == f"{rig.engine.name}:{host.incarnation}".encode()
        beat = await daemon.beat()
        assert (beat.engine_id, beat.incarnation) == (register.engine_id, register.incarnation)
        assert (beat.stats.running, beat.stats.waiting, beat.progress) == (0, 0, {})
        assert len(daemon.registers) == 1

    rig.run(test)
    assert rig.codes[-1] == EXIT_OK


def test_runs_and_counts(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        attempt = daemon.submit(chat("one two three"), 12)
        finished = await attempt.finished()
        assert finished.usage.output_tokens == 12
        assert finished.usage.prompt_tokens > 0
        assert finished.finish_reason == "length"
        assert attempt.text
        assert not attempt.chunks
        assert finished.logprob is None  # it was not asked for
        longer = await daemon.submit(chat("one two three " * 10), 1).finished()
        assert longer.usage.prompt_tokens > finished.usage.prompt_tokens
        assert longer.usage.output_tokens == 1
        assert (await daemon.beat()).stats.output_tokens >= 13

    rig.run(test)


def test_stream_is_the_text(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        streamed = daemon.submit(chat("tell me"), 40, stream=True)
        await streamed.finished()
        assert "".join(text for _, text in streamed.chunks) == streamed.text
        offset = 0
        for begin, text in streamed.chunks:
            assert begin == offset
            assert text
            offset += len(text)
        whole = daemon.submit(chat("tell me"), 40)
        await whole.finished()
        assert whole.text == streamed.text  # same payload, same text
        assert not rig.clocked or len(streamed.chunks) > 5

    rig.run(test)


def test_logprobs_are_given_where_they_can_be_had(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        daemon.logprobs = True
        attempts = [daemon.submit(chat("how sure?"), 10, stream=s) for s in (False, True)]
        whole, streamed = [(await attempt.finished()).logprob for attempt in attempts]
        if rig.engine.kind == "echo":
            assert whole is streamed is None
        else:
            assert whole is not None
            assert -20 < whole < 0  # random weights: of no token is it sure
            assert streamed == pytest.approx(whole, rel=0.01)

    rig.run(test)


def test_more_than_fit_at_once(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        attempts = [
            daemon.submit(chat(f"number {i}"), 5 + i, stream=i % 2 == 0)
            for i in range(rig.max_inflight * 3)
        ]
        for i, attempt in enumerate(attempts):
            assert (await attempt.finished()).usage.output_tokens == 5 + i
        assert sorted(daemon.order) == [a.attempt_id for a in attempts]

    rig.run(test)


def test_progress_and_load_are_reported(rig: Rig) -> None:
    if not rig.clocked:
        pytest.skip("answers at once")

    async def test(daemon: FakeDaemon, host: Host) -> None:
        many = [daemon.submit(chat(f"long {i}"), 1500) for i in range(rig.max_inflight + 2)]
        await until(
            lambda: daemon.beats and len(daemon.beats[-1].progress) >= rig.max_inflight, "progress"
        )
        await until(lambda: max(daemon.beats[-1].progress.values(), default=0) > 20, "tokens")
        await until(lambda: daemon.beats[-1].stats.tokens_per_s > 0.0, "a token rate")
        stats = daemon.beats[-1].stats
        assert stats.running == rig.max_inflight
        assert stats.waiting == 2
        assert 0.0 < stats.kv_use <= 1.0
        before = dict(daemon.beats[-1].progress)
        await daemon.beat()
        after = daemon.beats[-1].progress
        assert all(after[a] >= n for a, n in before.items() if a in after)
        for attempt in many:
            daemon.abort(attempt.attempt_id)
        await until(lambda: daemon.beats[-1].stats.running == 0, "an idle engine")

    rig.run(test)


def test_priority_is_honoured(rig: Rig) -> None:
    if not rig.clocked:
        pytest.skip("answers at once")

    async def test(daemon: FakeDaemon, host: Host) -> None:
        fillers = [daemon.submit(chat(f"f {i}"), 1500) for i in range(rig.max_inflight - 1)]
        short = daemon.submit(chat("short filler"), 150)
        await until(
            lambda: daemon.beats and daemon.beats[-1].stats.running == rig.max_inflight, "full"
        )
        late = daemon.submit(chat("later"), 60, priority=10)
        soon = daemon.submit(chat("sooner"), 60, priority=1)
        await late.finished()
        assert daemon.order == [short.attempt_id, soon.attempt_id, late.attempt_id]
        for filler in fillers:
            daemon.abort(filler.attempt_id)

    rig.run(test)


def test_cancel_frees_the_slot_and_is_silent(rig: Rig) -> None:
    if not rig.clocked:
        pytest.skip("answers at once")

    async def test(daemon: FakeDaemon, host: Host) -> None:
        running = [
            daemon.submit(chat(f"r {i}"), 1500, stream=True) for i in range(rig.max_inflight)
        ]
        waiting = daemon.submit(chat("waiting"), 1500, stream=True)
        await until(lambda: all(a.chunks for a in running), "chunks of all that run")
        for attempt in (*running, waiting):
            daemon.abort(attempt.attempt_id)
        after = daemon.submit(chat("after"), 30)
        # Messages are in order: what the host still said of the cancelled ones is here by now.
        await daemon.beat()
        seen = [a.events for a in (*running, waiting)]
        await after.finished()
        await until(lambda: daemon.beats[-1].stats.running == 0, "free slots")
        assert daemon.beats[-1].progress == {}
        assert [a.events for a in (*running, waiting)] == seen
        assert not any(a.answers for a in (*running, waiting))
        assert waiting.events == 0

    rig.run(test)


def test_cancel_of_unknown_and_of_ended(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        daemon.abort(999_999)
        attempt = daemon.submit(chat("x"), 3)
        await attempt.finished()
        daemon.abort(attempt.attempt_id)
        daemon.abort(attempt.attempt_id)
        await daemon.submit(chat("y"), 3).finished()
        assert attempt.events == 1

    rig.run(test)


BAD = {
    "not json": (b"{", "JSON"),
    "empty": (b"", ""),
    "not utf-8": (b'{"messages":[{"role":"user","content":"\xff"}]}', ""),
    "no messages": (b"{}", "messages"),
    "no message": (b'{"messages":[]}', "messages"),
    "wrong role": (json.dumps({"messages": [{"role": 3, "content": "x"}]}).encode(), "role"),
    "image": (
        json.dumps(
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}
        ).encode(),
        "content",
    ),
    "unknown field": (chat("x", logit_bias={}), "logit_bias"),
    "wrong type": (chat("x", temperature="hot"), "temperature"),
    "out of range": (chat("x", top_p=7.0), "top_p"),
    "several answers": (chat("x", n=2), "`$.n`"),
    "nested": (b'{"messages":' + b"[" * 100_000, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_payload_is_refused_and_the_host_goes_on(rig: Rig, name: str) -> None:
    payload, says = BAD[name]

    async def test(daemon: FakeDaemon, host: Host) -> None:
        answer = await daemon.submit(payload, stream=True).answer()
        assert is_bad_request(answer)
        assert isinstance(answer, EngineFailed)
        assert says in answer.message
        await daemon.submit(chat("good"), 3).finished()

    rig.run(test)


def test_all_of_an_openai_body_is_taken(rig: Rig) -> None:
    payload = chat(
        "x",
        model="m",
        stream=True,
        max_tokens=7,
        user="u",
        n=1,
        top_p=0.9,
        top_k=5,
        seed=3,
        stop=["\0never\0"],
        presence_penalty=0.1,
        frequency_penalty=0.1,
    )
    parts = json.dumps(
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ]
        }
    ).encode()

    async def test(daemon: FakeDaemon, host: Host) -> None:
        assert (await daemon.submit(payload, 5).finished()).usage.output_tokens == 5
        assert isinstance(await daemon.submit(parts, 5).answer(), EngineFinished)

    rig.run(test)


def test_prompt_over_the_context(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        answer = await daemon.submit(chat("x" * 30_000), 3).answer()
        assert is_bad_request(answer)
        assert isinstance(answer, EngineFailed)
        assert "2048" in answer.message
        fits = await daemon.submit(chat("hello"), 1_000_000).finished()
        assert fits.usage.prompt_tokens + fits.usage.output_tokens == 2048
        assert fits.finish_reason == "length"

    rig.run(test)


GARBAGE: dict[str, tuple[bytes, ...]] = {
    "empty": (b"",),
    "not msgpack": (b"\xc1\xff",),
    "not a message": (b"\x01",),
    "unknown type": (b"\x81\xa4type\xa3huh",),
    "run without payload": (
        b"\x85\xa4type\xa3run\xaaattempt_id\x01\xa8priority\x00\xaamax_tokens\x05\xa6stream\xc2",
    ),
    "deep": (b"\x91" * 100_000,),
    "many frames": (b"\x80",) * 50,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_from_the_daemon(rig: Rig, name: str) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        daemon.raw(*GARBAGE[name])
        await daemon.submit(chat("good"), 3).finished()

    rig.run(test)


def test_daemon_restart_cancels_and_registers_again(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        old = daemon.submit(chat("old"), 1500) if rig.clocked else None
        await until(lambda: not old or daemon.beats and daemon.beats[-1].progress, "progress")
        daemon.restart("daemon-2")
        await daemon.ready(2)
        new = daemon.submit(chat("new"), 5)
        await new.finished()
        beat = await daemon.beat()
        assert (beat.stats.running, beat.progress) == (0, {})
        assert old is None or not old.answers
        assert daemon.registers[-1].incarnation == host.incarnation

    rig.run(test)


def test_broken_connection_begins_anew_under_another_incarnation(rig: Rig) -> None:
    """Runs and answers under way are lost with a connection; the daemon must learn of it."""

    async def test(daemon: FakeDaemon, host: Host) -> None:
        first = daemon.registers[-1]
        daemon.submit(chat("lost"), 1500 if rig.clocked else 5, stream=True)
        daemon.stop()
        await until(lambda: host.incarnation != first.incarnation, "another incarnation")
        assert not host.running
        daemon.start()
        await until(lambda: daemon.registers[-1].incarnation == host.incarnation)
        await daemon.submit(chat("new"), 5).finished()

    rig.run(test)


def test_daemon_that_forgot_this_engine(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        old = daemon.submit(chat("old"), 1500) if rig.clocked else None
        await until(lambda: not old or daemon.beats and daemon.beats[-1].progress, "progress")
        daemon.known.clear()
        await daemon.ready(2)
        await daemon.submit(chat("new"), 5).finished()
        await until(lambda: daemon.beats[-1].stats.running == 0, "an idle engine")
        assert old is None or not old.answers

    rig.run(test)


def test_shutdown(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        running = daemon.submit(chat("x"), 1500) if rig.clocked else None
        await daemon.beat()
        daemon.shutdown()
        await until(lambda: daemon.deregisters, "a goodbye")
        if running is not None:
            failed = await running.failed()
            assert failed.code == "engine_lost"
            assert failed.retryable

    rig.run(test)
    assert rig.codes[-1] == EXIT_OK


def test_stop_lets_running_attempts_end(rig: Rig) -> None:
    async def test(daemon: FakeDaemon, host: Host) -> None:
        running = daemon.submit(chat("x"), 200)
        await until(lambda: host.running or running.answers)
        host.stop(20.0)
        await until(lambda: daemon.deregisters, "a goodbye")
        await running.finished()
        assert len(daemon.registers) == 1

    rig.run(test)
    assert rig.codes[-1] == EXIT_OK
