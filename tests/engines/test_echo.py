"""The echo engine on a clock that the test moves."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import AttemptEvent, BackendInfo, EngineStartError
from chimera_daemon.engines.echo import EchoBackend, EchoOptions
from chimera_daemon.messages import (
    Completion,
    EngineChunk,
    EngineFailed,
    EngineFinished,
    Run,
    Usage,
)


class ManualTimer:
    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when, self.callback, self.cancelled = when, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock:
    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[ManualTimer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object], /) -> ManualTimer:
        timer = ManualTimer(when, callback)
        self.timers.append(timer)
        return timer

    def run_until(self, end: float) -> None:
        while due := [t for t in self.timers if not t.cancelled and t.when <= end + 1e-9]:
            timer = min(due, key=lambda t: t.when)
            self.timers.remove(timer)
            self.now = max(self.now, timer.when)
            timer.callback()
        self.now = end


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[AttemptEvent, bytes | None]] = []
        self.on_emit: Callable[[AttemptEvent], None] | None = None

    def emit(self, message: AttemptEvent, payload: bytes | None = None) -> None:
        self.events.append((message, payload))
        if self.on_emit is not None:
            self.on_emit(message)

    def suspend(self, reason: str) -> None:
        raise AssertionError(reason)

    def resume(self, info: BackendInfo) -> None:
        raise AssertionError(info)

    def died(self, reason: str) -> None:
        raise AssertionError(reason)

    def of(self, kind: type) -> list[int]:
        return [m.attempt_id for m, _ in self.events if isinstance(m, kind)]


def started(options: EchoOptions) -> tuple[EchoBackend, ManualClock, Recorder]:
    backend, clock, events = EchoBackend(options, ManualClock()), ManualClock(), Recorder()
    backend = EchoBackend(options, clock)
    try:
        backend.start(events).send(None)  # starts without waiting for anything
    except StopIteration:
        return backend, clock, events
    raise AssertionError("start() waited")


def body(text: str = "hello") -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


def test_a_token_per_step() -> None:
    backend, clock, events = started(EchoOptions(step_s=0.01, reply_tokens=(3, 3)))
    backend.submit(Run(1, 0, 99, True), body())
    clock.run_until(0.025)
    assert events.of(EngineChunk) == [1, 1]
    assert backend.progress() == {1: 2}
    clock.run_until(0.03)
    assert events.of(EngineFinished) == [1]
    assert clock.timers == []  # no work, no clock


def test_step_and_prefill_times_are_those_of_the_profile() -> None:
    options = EchoOptions(
        step_s=0.01, step_per_seq_s=0.001, prefill_s_per_token=0.1, reply_tokens=(2, 2)
    )
    backend, clock, events = started(options)
    for attempt_id in (1, 2):
        backend.submit(Run(attempt_id, 0, 99, False), body("x" * 36))  # 10 prompt tokens
    # The first step began with one of them: 10 prefill tokens and one sequence.
    first = 0.01 + 0.001 + 1.0
    second = 0.01 + 0.002 + 1.0
    clock.run_until(first + second - 0.001)
    assert events.of(EngineFinished) == []
    clock.run_until(first + second)
    assert events.of(EngineFinished) == [1]
    clock.run_until(first + second + 0.011)
    assert events.of(EngineFinished) == [1, 2]


def test_slots_and_priority() -> None:
    backend, clock, events = started(EchoOptions(step_s=1.0, slots=1, reply_tokens=(2, 2)))
    for attempt_id, priority in ((1, 5), (2, 5), (3, 1), (4, 5)):
        backend.submit(Run(attempt_id, priority, 99, False), body())
    assert (backend.stats().running, backend.stats().waiting) == (1, 3)
    clock.run_until(8.0)
    assert events.of(EngineFinished) == [1, 3, 2, 4]


def test_cancel_while_waiting_running_and_emitting() -> None:
    backend, clock, events = started(EchoOptions(step_s=1.0, slots=2, reply_tokens=(9, 9)))
    for attempt_id in (1, 2, 3, 4):
        backend.submit(Run(attempt_id, 0, 99, True), body())
    backend.cancel(3)

    def cancel_the_other(message: AttemptEvent) -> None:
        if isinstance(message, EngineChunk) and message.attempt_id == 1:
            backend.cancel(2)

    events.on_emit = cancel_the_other
    clock.run_until(30.0)
    assert events.of(EngineFinished) == [1, 4]
    assert 2 not in events.of(EngineChunk)
    assert 3 not in events.of(EngineChunk)
    stats = backend.stats()
    assert (stats.running, stats.waiting, backend.progress()) == (0, 0, {})


def test_many_cancelled_while_waiting_leave_nothing_behind() -> None:
    backend, clock, events = started(EchoOptions(step_s=1.0, slots=1, reply_tokens=(5, 5)))
    for attempt_id in range(1, 1002):
        backend.submit(Run(attempt_id, 0, 99, False), body())
    for attempt_id in range(2, 1001):
        backend.cancel(attempt_id)
    assert backend.stats().waiting == 1
    clock.run_until(20.0)
    assert events.of(EngineFinished) == [1, 1001]


def test_failures_are_seeded() -> None:
    def failed(seed: int) -> list[int]:
        backend, _, events = started(EchoOptions(fail_rate=0.3, seed=seed))
        for attempt_id in range(500):
            backend.submit(Run(attempt_id, 0, 99, False), body())
        return events.of(EngineFailed)

    assert failed(1) == failed(1)
    assert failed(1) != failed(2)
    assert 100 < len(failed(1)) < 200


def test_lengths_differ_by_payload_within_their_bounds() -> None:
    backend, _, events = started(EchoOptions(reply_tokens=(3, 50)))
    for i in range(300):
        backend.submit(Run(i, 0, 99, False), body(str(i)))
    lengths = [m.usage.output_tokens for m, _ in events.events if isinstance(m, EngineFinished)]
    assert min(lengths) == 3
    assert max(lengths) == 50
    assert all(m.finish_reason == "stop" for m, _ in events.events if isinstance(m, EngineFinished))


@given(st.integers(1, 5000), st.integers(1, 5000), st.text(max_size=50))
def test_usage_counts_the_words(reply: int, max_tokens: int, text: str) -> None:
    import msgspec

    backend, _, events = started(EchoOptions(reply_tokens=(reply, reply)))
    backend.submit(Run(1, 0, max_tokens, False), body(text))
    (finished, payload), *rest = events.events
    assert isinstance(finished, EngineFinished)
    assert payload is not None
    assert not rest
    words = msgspec.json.decode(payload, type=Completion).text.split()
    assert len(words) == finished.usage.output_tokens == min(reply, max_tokens)
    assert finished.finish_reason == ("stop" if reply <= max_tokens else "length")


def openai(**body: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hello"}], **body}).encode()


def test_a_chunk_per_token_and_choice() -> None:
    backend, clock, events = started(EchoOptions(step_s=1.0, reply_tokens=(3, 3)))
    payload = openai(n=2, stream_options={"include_usage": True}, unknown_field=[1])
    backend.submit(Run(1, 0, 99, True, api="chat"), payload)
    clock.run_until(2.0)
    assert events.of(EngineChunk) == [1] * 4
    assert backend.progress() == {1: 4}
    clock.run_until(3.0)
    *chunks, (finished, streamed) = events.events
    assert finished == EngineFinished(1, Usage(2, 6), "stop")
    assert streamed == b'{"chunks":7}'
    seen = [json.loads(payload or b"") for _, payload in chunks]
    assert [m.offset for m, _ in chunks if isinstance(m, EngineChunk)] == list(range(7))
    assert [c["choices"][0]["index"] for c in seen[:-1]] == [0, 1] * 3
    assert [c["choices"][0]["delta"].get("role") for c in seen[:3]] == ["assistant"] * 2 + [None]
    assert [c["choices"][0]["finish_reason"] for c in seen[:-1]] == [None] * 4 + ["stop"] * 2
    assert seen[-1]["choices"] == []
    assert seen[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


def test_cancelled_between_the_choices_of_a_step() -> None:
    backend, clock, events = started(EchoOptions(step_s=1.0, reply_tokens=(9, 9)))
    backend.submit(Run(1, 0, 99, True, api="completions"), b'{"prompt":["a","b","c"]}')
    events.on_emit = lambda _: backend.cancel(1)
    clock.run_until(5.0)
    assert len(events.events) == 1
    assert backend.progress() == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": ["x"] * 600, "n": 2}, "1200 choices; at most 1024"),
        ({"prompt": []}, "$.prompt"),
        ({"prompt": ["x"], "n": 0}, "$.n"),
        ({"messages": [], "prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    ],
)
def test_what_completions_refuse(body: dict[str, object], says: str) -> None:
    backend, _, events = started(EchoOptions())
    backend.submit(Run(1, 0, 9, False, api="completions"), json.dumps(body).encode())
    ((failed, _),) = events.events
    assert isinstance(failed, EngineFailed)
    assert failed.code == "bad_request"
    assert says in failed.message


def test_an_odd_tool_choice_is_refused() -> None:
    backend, _, events = started(EchoOptions())
    backend.submit(Run(1, 0, 9, False, api="chat"), openai(tool_choice="maybe"))
    ((failed, _),) = events.events
    assert isinstance(failed, EngineFailed)
    assert "auto, none, required or a tool" in failed.message


def test_names_are_escaped() -> None:
    name = 'a "quoted" \\ name'
    engine = EngineConfig(name="e", model=name, kind="echo")
    backend, events = EchoBackend.from_config(engine), Recorder()
    backend._clock = ManualClock()
    with pytest.raises(StopIteration):
        backend.start(events).send(None)
    tools = [{"type": "function", "function": {"name": name}}]
    backend.submit(Run(1, 0, 9, False, api="chat"), openai(tools=tools, tool_choice="required"))
    answer = json.loads(events.events[0][1] or b"")
    assert answer["model"] == name
    (choice,) = answer["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": name, "arguments": "{}"}
    assert choice["finish_reason"] == "tool_calls"


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 4), st.booleans())
def test_usage_counts_the_words_of_all_choices(
    reply: int, max_tokens: int, n: int, stream: bool
) -> None:
    backend, _, events = started(EchoOptions(reply_tokens=(reply, reply)))
    payload = openai(max_completion_tokens=max_tokens, max_tokens=1, n=n)
    backend.submit(Run(1, 0, 1, stream, api="chat"), payload)
    *chunks, (finished, last) = events.events
    assert isinstance(finished, EngineFinished)
    objects = [json.loads(payload or b"") for _, payload in chunks] or [json.loads(last or b"")]
    said = [c.get("delta") or c["message"] for o in objects for c in o["choices"]]
    words = [len(part["content"].split()) for part in said]
    assert words == [min(reply, max_tokens)] * n
    assert finished.usage.output_tokens == sum(words)
    assert finished.finish_reason == ("stop" if reply <= max_tokens else "length")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"speed": 1}, "speed"),
        ({"slots": 0}, "slots"),
        ({"step_s": "fast"}, "step_s"),
        ({"reply_tokens": [9, 3]}, "lower first"),
        ({"fail_rate": 2.0}, "fail_rate"),
    ],
)
def test_wrong_options_say_what_to_write(args: dict[str, object], says: str) -> None:
    with pytest.raises(EngineStartError, match=says):
        EchoBackend.from_config(EngineConfig(name="e", model="m", kind="echo", args=args))
