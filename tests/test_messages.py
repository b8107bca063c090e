"""Wire messages through the typed decoders of `wire.py`: all there and back, and nothing else."""

import contextlib
import math
import typing
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_daemon import messages, wire
from chimera_daemon.messages import (
    Candidate,
    EngineStats,
    Hints,
    Profile,
    Receipt,
    Usage,
)

RECEIPT = Receipt("chimera", "prior", "m", "score", (Candidate("m", 0.5, 0.6, 1.5, 30.0),), 12.0)
MESSAGES = {
    wire.decode_front: [
        messages.Ping(v=1),
        messages.Submit("r", "w"),
        messages.Submit("r", "w", 3, "code", "m", 1, 9, True, True, Hints(5, 6, 7, {"m": 0.5})),
        messages.Cancel("r"),
        messages.CloseWorkflow("w"),
        messages.CloseWorkflow("w", 1.0),
        messages.Feedback("w", 3, 0.5),
        messages.GetStatus("r"),
    ],
    wire.decode_client: [
        messages.Pong("d", 0.5, 1 << 22),
        messages.Chunk("r", 7, 0),
        messages.Result("r", "m", "e", Usage(1, 2), "stop", RECEIPT),
        messages.Result("r", "m", "e", Usage(1, 2), "stop", RECEIPT, -0.25),
        messages.Failure("r", "no_engine", "none came", True, 1.5),
        messages.Failure("", "bad_request", "?"),
        messages.Closed("w"),
        messages.StatusReply("r"),
    ],
    wire.decode_back: [
        messages.Register("e", 1 << 53, "m", "vllm", 8, 4096, Profile(0.1, 0.2, 0.3), 1, 99),
        messages.Heartbeat("e", 1, EngineStats(1, 2, 0.5, 10.0, 7), {1: 5, 1 << 53: 0}),
        messages.Heartbeat("e", 1, EngineStats()),
        messages.EngineChunk(1, 0),
        messages.EngineFinished(1, Usage(0, 10_000_000), "length"),
        messages.EngineFinished(1, Usage(1, 1), "stop", -0.25),
        messages.EngineFailed(1, "engine_error", "x" * 4096, True),
        messages.Deregister("e", 1),
    ],
    wire.decode_engine: [
        messages.Run(1, -(1 << 63), 5, False),
        messages.Run(1, 0, 5, True, True),
        messages.Abort(1),
        messages.DaemonBeat("d", True, 0.5),
        messages.Shutdown("stopping"),
    ],
}
DECODERS = list(MESSAGES)
CASES = [
    pytest.param(decode, message, id=f"{type(message).__name__}-{i}")
    for decode, group in MESSAGES.items()
    for i, message in enumerate(group)
]
Decode = Callable[[bytes], Any]


def raw(message: msgspec.Struct) -> dict[str, Any]:
    """The map that goes over the wire."""
    return msgspec.msgpack.decode(wire.encode(message))


@pytest.mark.parametrize(("decode", "message"), CASES)
def test_messages_come_back_as_they_were(decode: Decode, message: msgspec.Struct) -> None:
    header = wire.encode(message)
    assert decode(header) == message
    assert len(header) <= wire.MAX_HEADER_BYTES
    assert isinstance(raw(message)["type"], str)


def test_every_wire_message_is_tested() -> None:
    for union, group in zip(
        (messages.ToFront, messages.ToClient, messages.FromEngine, messages.ToEngine),
        MESSAGES.values(),
        strict=True,
    ):
        assert set(typing.get_args(union)) == {type(m) for m in group}


@pytest.mark.parametrize(("decode", "message"), CASES)
def test_each_missing_field_is_refused_or_has_a_default(
    decode: Decode, message: msgspec.Struct
) -> None:
    required = {f.encode_name for f in msgspec.structs.fields(message) if f.required} | {"type"}
    for name in raw(message):
        fields = {k: v for k, v in raw(message).items() if k != name}
        if name in required:
            with pytest.raises(msgspec.ValidationError):
                decode(msgspec.msgpack.encode(fields))
        else:
            decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(("decode", "message"), CASES)
def test_wrong_tags_are_refused(decode: Decode, message: msgspec.Struct) -> None:
    for tag in ("", "unknown", type(message).__name__ + "!", 1, None, [], {}):
        with pytest.raises(msgspec.ValidationError):
            decode(msgspec.msgpack.encode(raw(message) | {"type": tag}))


@pytest.mark.parametrize(
    ("decode", "message"), [p for p in CASES if p.values[0] in (DECODERS[0], DECODERS[2])]
)
def test_fields_that_the_daemon_does_not_know_are_refused(
    decode: Decode, message: msgspec.Struct
) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `extra`"):
        decode(msgspec.msgpack.encode(raw(message) | {"extra": 1}))


SUBMIT = raw(messages.Submit("r", "w", 1, "code", "m", 1, 1, True, True, Hints(1, 1, 1, {"m": 1})))
REGISTER = raw(messages.Register("e", 1, "m", "vllm", 8, 4096, Profile(), 1, 99))
HEARTBEAT = raw(messages.Heartbeat("e", 1, EngineStats(), {1: 1}))
FINISHED = raw(messages.EngineFinished(1, Usage(1, 1), "stop"))
FAILED = raw(messages.EngineFailed(1, "engine_error", "x"))
NOT_A_PROBABILITY = [-0.1, 1.1, math.nan, math.inf, "1", True]


@pytest.mark.parametrize(
    ("decode", "header", "path", "values"),
    [
        (wire.decode_front, SUBMIT, "request_id", ["", "x" * 129, 7, None, b"r"]),
        (wire.decode_front, SUBMIT, "workflow_id", ["", "x" * 129, 7, None]),
        (wire.decode_front, SUBMIT, "stage", [-1, 100_001, 1.5, "1", True]),
        (wire.decode_front, SUBMIT, "kind", ["x" * 65, 7]),
        (wire.decode_front, SUBMIT, "model", ["", "x" * 129]),
        (wire.decode_front, SUBMIT, "max_tokens", [0, -1, 1_000_001, 1 << 63, None]),
        (wire.decode_front, SUBMIT, "prompt_tokens", [-1, 10_000_001]),
        (wire.decode_front, SUBMIT, "stream", [0, 1, "yes", None]),
        (wire.decode_front, SUBMIT, "hints.output_tokens", [-1, 10_000_001, 0.5]),
        (wire.decode_front, SUBMIT, "hints.remaining_tokens", [-1, 10_000_001]),
        (wire.decode_front, SUBMIT, "hints.remaining_stages", [-1, 10_001]),
        (wire.decode_front, SUBMIT, "hints.confidence.m", NOT_A_PROBABILITY),
        (wire.decode_front, SUBMIT, "hints.luck", [1]),
        (
            wire.decode_front,
            raw(messages.CloseWorkflow("w", 1.0)),
            "success",
            NOT_A_PROBABILITY,
        ),
        (
            wire.decode_front,
            raw(messages.Feedback("w", 3, 0.5)),
            "verdict",
            [*NOT_A_PROBABILITY, None],
        ),
        (wire.decode_front, raw(messages.Feedback("w", 3, 0.5)), "stage", [-1, 100_001, None]),
        (wire.decode_back, REGISTER, "max_inflight", [0, -1, 100_001]),
        (wire.decode_back, REGISTER, "incarnation", [-1, (1 << 53) + 1]),
        (wire.decode_back, REGISTER, "context_tokens", [-1, 10_000_001]),
        (wire.decode_back, REGISTER, "model", ["", "x" * 129]),
        (wire.decode_back, REGISTER, "profile.step_s", [-1.0, 1e10, math.nan, math.inf]),
        (wire.decode_back, REGISTER, "profile.extra", [1.0]),
        (wire.decode_back, HEARTBEAT, "stats.running", [-1, (1 << 53) + 1, math.nan]),
        (wire.decode_back, HEARTBEAT, "stats.kv_use", NOT_A_PROBABILITY),
        (wire.decode_back, HEARTBEAT, "stats.tokens_per_s", [-1.0, math.nan, math.inf]),
        (wire.decode_back, HEARTBEAT, "progress", [{1: -1}, {1: 10_000_001}, {"a": 1}, []]),
        (wire.decode_back, FINISHED, "attempt_id", [-1, (1 << 53) + 1, "1"]),
        (wire.decode_back, FINISHED, "usage.output_tokens", [-1, 10_000_001]),
        (wire.decode_back, FINISHED, "finish_reason", ["x" * 65, None]),
        (wire.decode_back, FINISHED, "logprob", [0.1, -1e7, math.nan, -math.inf, "0"]),
        (wire.decode_back, FAILED, "message", ["x" * 4097]),
        (wire.decode_back, FAILED, "code", ["", "oops", None]),
    ],
)
def test_values_out_of_range_are_refused_by_path(
    decode: Decode, header: dict[str, Any], path: str, values: list[Any]
) -> None:
    decode(msgspec.msgpack.encode(header))
    for value in values:
        changed = msgspec.msgpack.decode(msgspec.msgpack.encode(header))
        *parents, name = path.split(".")
        inner = changed
        for parent in parents:
            inner = inner[parent]
        inner[name] = value
        with pytest.raises(msgspec.ValidationError):
            decode(msgspec.msgpack.encode(changed))


@pytest.mark.parametrize("index", range(len(DECODERS)))
@given(data=st.data())
def test_garbage_raises_nothing_but_value_errors(index: int, data: st.DataObject) -> None:
    header = data.draw(
        st.binary(max_size=64)
        | st.sampled_from([wire.encode(m) for m in MESSAGES[DECODERS[index]]]).flatmap(mangled)
    )
    # msgspec's own errors, and UnicodeDecodeError, which it lets through, are ValueErrors.
    with contextlib.suppress(ValueError):
        DECODERS[index](header)
    assert isinstance(wire.request_id_of(header), str)


def mangled(header: bytes) -> st.SearchStrategy[bytes]:
    """The header cut somewhere, with one byte changed, or with something behind it."""
    at = st.integers(0, len(header) - 1)
    byte = st.binary(min_size=1, max_size=1)
    return (
        at.map(lambda i: header[:i])
        | st.builds(lambda i, b: header[:i] + b + header[i + 1 :], at, byte)
        | st.binary(min_size=1, max_size=4).map(lambda b: header + b)
    )


def test_the_request_id_is_found_in_headers_that_cannot_be_used() -> None:
    def found(value: Any) -> str:
        return wire.request_id_of(msgspec.msgpack.encode(value))

    assert found({"type": "unknown", "request_id": "r7"}) == "r7"
    assert found({"request_id": "x" * 500}) == "x" * 128
    assert found({"request_id": 7}) == found({"request_id": b"r"}) == ""
    assert found({}) == found([1, 2]) == found("request_id") == found(None) == ""
    assert found({1: 2, "request_id": "r"}) == "r"


def test_the_request_id_of_garbage_is_empty() -> None:
    deep = b"\x91" * 100_000 + b"\xc0"
    surrogate = b"\x81\xaarequest_id\xa3\xed\xa0\x80"
    unhashable_key = b"\x81\x90\x01"
    for header in (b"", b"\xc1", b"\x81", deep, surrogate, unhashable_key, b"\xdf\xff\xff\xff\xff"):
        assert wire.request_id_of(header) == ""


@pytest.mark.parametrize("decode", DECODERS)
def test_nesting_without_end_and_sizes_that_lie_are_refused(decode: Decode) -> None:
    for header in (
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\x90\x01",
    ):
        with pytest.raises(msgspec.DecodeError):
            decode(header)


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:5570", "tcp://host.name:1", "tcp://[::1]:5570", "ipc:///tmp/x", "ipc://@x"],
)
def test_usable_addresses_are_accepted(address: str) -> None:
    assert wire.check_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "5570",
        "host:5570",
        "http://host:80",
        "tcp://host",
        "tcp://:5570",
        "tcp://h:5570 ",
        "ipc://",
    ],
)
def test_other_addresses_are_refused_with_the_forms_that_are_usable(address: str) -> None:
    with pytest.raises(ValueError, match="tcp://HOST:PORT or ipc:"):
        wire.check_address(address)
