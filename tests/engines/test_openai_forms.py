"""Bodies, answers and event streams of OpenAI-compatible servers, without a server."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_daemon.engines.openai_forms import (
    EventStream,
    OpenAIAnswer,
    RemoteError,
    Target,
    TextAnswer,
    pause_of,
    refusal,
    translate,
)
from chimera_daemon.engines.payload import PayloadError
from chimera_daemon.messages import NO_LIMIT, Run, Usage
from tests.engines.fake_openai import chunk, whole

TARGET = Target("here", "there", 2048, "max_tokens", priority=False)


def encode(data: object) -> bytes:
    return json.dumps(data).encode()


# Streams of events.


@given(
    events=st.lists(
        st.lists(st.text("aä:€ ", max_size=5).filter(lambda s: s[:1] != " "), min_size=1),
        max_size=6,
    ),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    extra=st.lists(st.sampled_from(["", ": comment", "event: x", "id: 3"]), min_size=1),
    space=st.booleans(),
    cuts=st.lists(st.integers(1, 7), min_size=1),
)
def test_events_however_they_are_cut(
    events: list[list[str]], end: str, extra: list[str], space: bool, cuts: list[int]
) -> None:
    lines: list[str] = []
    for i, event in enumerate(events):
        lines += [
            extra[i % len(extra)],
            *(f"data:{' ' if space else ''}{x}" for x in event),
            "",
        ]
    stream = "".join(line + end for line in lines).encode()
    parser, found, begin = EventStream(1 << 20), list[bytes](), 0
    for i in range(len(stream)):
        after = begin + cuts[i % len(cuts)]
        found += parser.feed(stream[begin:after])
        begin = after
    assert found + parser.close() == ["\n".join(event).encode() for event in events]


def feed_all(parser: EventStream, parts: list[bytes]) -> None:
    for part in parts:
        parser.feed(part)


def test_a_line_end_that_is_cut_in_two() -> None:
    parser = EventStream(100)
    parts = (b"data: 1\r", b"\n", b"\r\n", b"data: 2\r", b"\n\r", b"\ndata: 3\n", b"\ndata: 4")
    assert [parser.feed(part) for part in parts] == [[], [], [b"1"], [], [b"2"], [], [b"3"]]
    assert parser.close() == [b"4"]
    assert [parser.feed(part) for part in (b"data: 5\r", b"\n", b"\n")] == [[], [], [b"5"]]
    assert parser.close() == []


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_event_is_bounded_and_a_stream_is_not(size: int) -> None:
    stream = (b": comment\n\n" + b"data: " + b"x" * 50 + b"\n\n") * 100
    parser = EventStream(100)
    for i in range(0, len(stream), size):
        parser.feed(stream[i : i + size])
    for endless in (b"data: " + b"x" * 1000, b": " + b"x" * 1000, b"data: x\n" * 100):
        parts = [endless[i : i + size] for i in range(0, len(endless), size)]
        with pytest.raises(RemoteError, match="larger than"):
            feed_all(EventStream(100), parts)


# Bodies.


def body_of(payload: object, **run: Any) -> dict[str, Any]:
    attempt = Run(**{"attempt_id": 1, "priority": 5, "max_tokens": 9, "stream": False} | run)
    return json.loads(translate(attempt, encode(payload), TARGET).body)


def test_text_becomes_a_chat_body() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    payload: dict[str, Any] = {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": parts}],
    }
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1, "user": "u"}
    settings |= {"presence_penalty": 0.1, "frequency_penalty": 0.2, "ignore_eos": True}
    ignored = {"model": "x", "max_tokens": 3, "stream": True, "n": 1}
    payload |= settings | ignored | {"stop": "end"}
    expected = settings | {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "bc"}],
        "model": "there",
        "max_tokens": 9,
        "stop": ["end"],
    }
    assert body_of(payload) == expected
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert body_of(payload, stream=True) == expected | streamed


def test_settings_that_are_not_given_are_not_sent() -> None:
    payload = {"messages": [{"role": "user", "content": "a"}]}
    assert body_of(payload, max_tokens=NO_LIMIT) == payload | {"model": "there"}
    assert "max_tokens" not in body_of(payload, max_tokens=2048)  # as many as fit


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_openai_bodies_pass_as_they_are(api: str) -> None:
    payload = {
        "model": "auto",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "max_completion_tokens": 7,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": [1.50, 2]}}}],
        "anything": {"nested": [None, True, 123456789012345678901234567890]},
    }
    ours = {"chimera": {"kind": "plan"}, "priority": -3}
    assert body_of(payload | ours, api=api) == payload | {"model": "there"}
    run = Run(1, 5, 9, False, api=api)  # pyright: ignore[reportArgumentType]
    exact = b'{"x": [1.50,\t1e400, "\\u00e4\xc3\xa4"]}'
    assert translate(run, exact, TARGET).body.startswith(b'{"x":[1.50,\t1e400, "\\u00e4\xc3\xa4"]')
    path = "/chat/completions" if api == "chat" else "/completions"
    assert translate(run, exact, TARGET).path == path


def test_priority_goes_where_it_is_taken() -> None:
    target = Target("here", "there", 2048, "max_completion_tokens", priority=True)
    payload = encode({"messages": [{"role": "user", "content": "a"}]})
    for api in ("text", "chat"):
        run = Run(1, 5, 9, False, api=api)
        assert json.loads(translate(run, payload, target).body)["priority"] == 5
    text = json.loads(translate(Run(1, 5, 9, False), payload, target).body)
    assert text["max_completion_tokens"] == 9
    assert "max_tokens" not in text


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (None, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"other": 1}, {"other": 1, "include_usage": True}),
        ("wrong", "wrong"),  # for the server to refuse
    ],
)
def test_usage_is_asked_for(given: object, sent: object) -> None:
    body = body_of({"stream": False, "stream_options": given}, api="chat", stream=True)
    assert (body["stream"], body["stream_options"]) == (True, sent)
    assert body_of({"stream": True}, api="chat")["stream"] is False


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"{", b"[]", b"3", b"\xff", b'{"x":"\xff"}', b'{"x":nope}', b'{"x":1}y'),
        *(b'{"x":' + b"[" * 100_000, b'{"n":"\\q"}'),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_payload_that_is_no_object(payload: bytes, stream: bool) -> None:
    with pytest.raises(PayloadError, match="JSON object"):
        translate(Run(1, 5, 9, stream, api="chat"), payload, TARGET)


# Answers.


def openai_answer(choices: int = 1, keep_usage: bool = False) -> OpenAIAnswer:
    return OpenAIAnswer(100, 'he"re', keep_usage=keep_usage, choices=choices)


def test_a_stream_with_several_choices_has_ended_when_all_have() -> None:
    def of(index: int, reason: str | None) -> bytes:
        data = chunk("x", reason=reason)
        data["choices"][0]["index"] = index
        return encode(data)

    for wanted, reasons in ((2, [(0, "stop")]), (1, [(0, "stop"), (1, None)]), (1, [(0, None)])):
        answer = openai_answer(wanted)
        for index, reason in reasons:
            answer.read_chunk(of(index, reason))
        with pytest.raises(RemoteError, match="ended before"):
            answer.end_of_stream(done=False)
        assert json.loads(answer.end_of_stream(done=True)) == {"chunks": len(reasons)}
        answer.read_chunk(of(0, "stop"))
        answer.read_chunk(of(1, "length"))
        assert json.loads(answer.end_of_stream(done=False)) == {"chunks": len(reasons) + 2}
        assert answer.finish_reason == "stop"


def test_an_end_without_a_beginning() -> None:
    with pytest.raises(RemoteError, match="ended before"):
        TextAnswer(0).end_of_stream(done=True)


def test_the_name_of_the_model_is_ours() -> None:
    theirs = chunk('"model":"m"', model="m") | {"usage": None, "nested": {"model": "m"}}
    payload = openai_answer().read_chunk(encode(theirs))
    expected = theirs | {"model": 'he"re'}
    del expected["usage"]
    assert payload is not None
    assert json.loads(payload) == expected
    answer = whole("x", "m") | {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    kept = openai_answer(keep_usage=True).read_whole(encode(answer))
    assert json.loads(kept) == answer | {"model": 'he"re'}


def test_chunks_with_output_are_counted() -> None:
    answer = openai_answer()
    tool = {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    silent = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    for data in (chunk(None), chunk("a"), chunk("b", chat=False), tool, thought, silent):
        answer.read_chunk(encode(data))
    assert answer.tokens == 4
    assert answer.usage == Usage(25, 4)  # nobody said


@pytest.mark.parametrize(
    ("said", "usage"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4)),
        ({"prompt_tokens": -3, "completion_tokens": 1 << 60}, Usage(0, 10_000_000)),
        ({"prompt_tokens": None}, Usage(25, 10)),
        (None, Usage(25, 10)),
    ],
)
def test_usage_is_what_the_server_says_or_a_guess(said: object, usage: Usage) -> None:
    answer = TextAnswer(100)
    answer.read_whole(encode(whole("x" * 40, "m") | {"usage": said}))
    assert answer.usage == usage


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b'{"choices":[3]}', b"[" * 100_000, b""])
def test_garbage(data: bytes) -> None:
    for answer in (TextAnswer(0), openai_answer()):
        for read in (answer.read_chunk, answer.read_whole):
            with pytest.raises(RemoteError, match="garbage") as raised:
                read(data)
            assert raised.value.code == "engine_error"
            assert raised.value.retryable


def test_an_answer_without_choices() -> None:
    with pytest.raises(RemoteError, match="no choices"):
        TextAnswer(0).read_whole(b"{}")


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        ({"message": "too long", "code": 400}, "bad_request", False),
        ({"message": "too long", "code": "context"}, "engine_error", True),
        ("too long", "engine_error", True),
        ({"message": "too long", "code": 429}, "engine_error", True),
    ],
)
def test_an_error_inside_an_answer(error: object, code: str, retryable: bool) -> None:
    with pytest.raises(RemoteError, match="too long") as raised:
        TextAnswer(0).read_chunk(encode({"error": error}))
    assert (raised.value.code, raised.value.retryable) == (code, retryable)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error":{"message":"no\\n such  thing"}}', "no such thing"),
        (b'{"error":"no such thing"}', "no such thing"),
        (b'{"object":"error","message":"no such thing"}', "no such thing"),
        (b'{"detail":[{"loc":["body"]}]}', '[{"loc":["body"]}]'),
        (b"<html>no such thing", "<html>no such thing"),
        (b"", "no reason given"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[" * 100_000, "[" * 500),
    ],
)
def test_the_words_of_a_refusal(body: bytes, words: str) -> None:
    assert refusal(400, body).message == f"the remote refused it (400): {words}"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        (" 2.5 ", 2.5),
        ("0", 0.0),
        ("-4", 0.0),
        ("1e99", 3600.0),
        ("inf", 3600.0),
        ("nan", 1.0),
        ("soon", 1.0),
        ("", 1.0),
        (None, 1.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
        ("Thu, 01 Jan 99999999999 00:00:10 GMT", 1.0),
    ],
)
def test_how_long_a_server_wants_to_be_left_alone(header: str | None, seconds: float) -> None:
    assert pause_of(header, now_s=60.0) == seconds
