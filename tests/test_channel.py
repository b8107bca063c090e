"""Messages that leave together: order, batches, what does not fit, and what cannot be sent."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera_daemon.channel import Channel, Frames, Sent, Together, make_socket
from chimera_daemon.wire import BATCH, MAX_BATCH, pack, unpack

PATIENCE_S = 5.0
LIMIT = 64 << 10  # of a batch, with room to spare


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@contextmanager
def sockets(*kinds: int, hwm: int = 100_000) -> Iterator[list["zmq.Socket[bytes]"]]:
    """The first is bound, the others are connected to it, named a, b, ..."""
    context: zmq.Context[Any] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []
    try:
        for i, kind in enumerate(kinds):
            identity = bytes([ord("a") + i - 1]) if i else None
            made.append(make_socket(context, kind, hwm=hwm, identity=identity))
            if i:
                made[i].connect("inproc://here")
            else:
                made[i].bind("inproc://here")
        yield made
    finally:
        for socket in made:
            if not socket.closed:
                socket.close(linger=0)
        context.term()


async def heard(socket: "zmq.Socket[bytes]", messages: int) -> list[list[bytes]]:
    """What arrives at a bare socket, until so many messages are in it; a batch is as it came."""
    found: list[list[bytes]] = []
    while sum(len(each) for each in map(apart, found)) < messages:
        try:
            found.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            await asyncio.sleep(0.001)
    return found


def apart(frames: list[bytes]) -> list[list[bytes]]:
    """The messages in one of ZeroMQ's, without an identity."""
    if frames[0] != BATCH:
        return [frames]
    messages = unpack(frames[1])
    assert messages is not None
    return messages


# The form.


@given(
    st.lists(
        st.tuples(st.binary(max_size=50)) | st.tuples(st.binary(max_size=50), st.binary()),
        max_size=MAX_BATCH,
    )
)
def test_what_is_packed_is_unpacked(messages: list[tuple[bytes, ...]]) -> None:
    header, payload = pack(messages)
    assert header == BATCH
    assert unpack(payload) == [list(message) for message in messages]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc0",
        b"\x93",
        b"[" * 1000,
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        msgspec.msgpack.encode({"a": 1}),
        msgspec.msgpack.encode([b"a"]),
        msgspec.msgpack.encode([[]]),
        msgspec.msgpack.encode([["text"]]),
        msgspec.msgpack.encode([[b"a", b"b", b"c"]]),
        msgspec.msgpack.encode([[b"a"]] * (MAX_BATCH + 1)),
        msgspec.msgpack.encode([[b"a"]]) + b"\x00",
    ],
)
def test_what_is_no_batch(payload: bytes) -> None:
    assert unpack(payload) is None


# Leaving.


SIZES = st.one_of(st.integers(0, 100), st.integers(0, 40_000))


@settings(max_examples=50, deadline=None)
@given(
    posted=st.lists(st.tuples(st.sampled_from([b"a", b"b"]), SIZES), max_size=150),
    readers=st.sets(st.sampled_from([b"a", b"b"])),
)
def test_everything_arrives_in_order_in_batches_where_they_can_be_read(
    posted: list[tuple[bytes, int]], readers: set[bytes]
) -> None:
    async def test() -> None:
        with sockets(zmq.ROUTER, zmq.DEALER, zmq.DEALER) as (router, a, b):
            said: list[list[bytes]] = []
            channel = Channel(router, said.append)
            a.send(b"hello")
            b.send(b"hello")
            await until(lambda: len(said) == 2)
            for reader in readers:
                channel.batches(True, reader)
            messages = [(peer, b"%d" % i, b"x" * size) for i, (peer, size) in enumerate(posted)]
            for message in messages:
                channel.post(message)
            for peer, socket in ((b"a", a), (b"b", b)):
                mine = [list(message[1:]) for message in messages if message[0] == peer]
                found = await heard(socket, len(mine))
                assert [each for frames in found for each in apart(frames)] == mine
                batches = [frames for frames in found if frames[0] == BATCH]
                assert not batches or peer in readers
                for batch in batches:
                    assert len(batch[1]) < LIMIT
                    assert 2 <= len(apart(batch)) <= MAX_BATCH
                small = [message for message in mine if len(message[1]) <= 100]
                if peer in readers and small == mine:
                    assert len(found) <= len(mine) / MAX_BATCH + 1
            channel.close()

    run(test)


def test_a_dealer_sends_batches_to_who_reads_them() -> None:
    async def test() -> None:
        with sockets(zmq.ROUTER, zmq.DEALER) as (router, dealer):
            said: list[list[bytes]] = []
            at_router, channel = Channel(router, said.append), Channel(dealer, lambda _: None)
            channel.batches(True)
            for i in range(100):
                channel.post((b"%d" % i, b"payload") if i % 2 else (b"%d" % i,))
            await until(lambda: len(said) == 100)
            assert said[0] == [b"a", b"0"]
            assert said[99] == [b"a", b"99", b"payload"]
            assert [frames[1] for frames in said] == [b"%d" % i for i in range(100)]
            channel.batches(False)
            at_router.close()
            channel.post((b"x",))
            channel.post((b"y",))
            channel.close()

    run(test)


def test_one_message_is_no_batch() -> None:
    async def test() -> None:
        with sockets(zmq.ROUTER, zmq.DEALER) as (router, dealer):
            channel = Channel(dealer, lambda _: None)
            channel.batches(True)
            channel.post((b"x", b"y"))
            await asyncio.sleep(0.01)
            assert router.recv_multipart() == [b"a", b"x", b"y"]
            channel.close()

    run(test)


def test_what_cannot_leave_is_handed_back_message_by_message() -> None:
    async def test() -> None:
        unsent: list[tuple[Frames, Sent]] = []
        with sockets(zmq.ROUTER, zmq.DEALER, hwm=2) as (router, dealer):
            channel = Channel(router, lambda _: None, lambda *each: unsent.append(each))
            at_dealer = Channel(dealer, lambda _: None)
            at_dealer.send((b"hello",))
            for peer in (b"a", b"gone"):
                channel.batches(True, peer)
            channel.post((b"gone", b"1"))
            channel.post((b"gone", b"2", b"payload"))
            channel.post((b"gone", b"3"), droppable=True)
            await until(lambda: unsent)
            assert unsent == [
                ((b"gone", b"1"), Sent.GONE),
                ((b"gone", b"2", b"payload"), Sent.GONE),
            ]
            assert channel.dropped == 1
            at_dealer.close()  # the queue of a peer that does not read
            unsent.clear()
            large = b"x" * 10_000
            sent = [(b"a", b"%d" % i, large) for i in range(60)]
            with sockets(zmq.ROUTER, zmq.DEALER, hwm=2) as (router, dealer):
                channel.close()
                channel = Channel(router, lambda _: None, lambda *each: unsent.append(each))
                channel.batches(True, b"a")
                dealer.send(b"hello")
                await asyncio.sleep(0.01)
                for message in sent:
                    channel.post(message)
                await until(lambda: unsent)
                assert {why for _, why in unsent} == {Sent.FULL}
                arrived = [each for f in await heard(dealer, 60 - len(unsent)) for each in apart(f)]
                # Those that left and those that came back, in order, are all there were.
                back = [tuple(frames[1:]) for frames, _ in unsent]
                assert [*map(tuple, arrived), *back] == [message[1:] for message in sent]
                channel.close()

    run(test)


# Arriving.


def test_a_handler_that_fails_does_not_cost_the_messages_behind() -> None:
    async def test() -> None:
        heard: list[bytes] = []
        problems: list[Any] = []

        def on_frames(frames: list[bytes]) -> None:
            if frames[0] == b"2":
                raise RuntimeError("a fault")
            heard.append(frames[0])

        asyncio.get_running_loop().set_exception_handler(lambda _, what: problems.append(what))
        with sockets(zmq.DEALER, zmq.DEALER) as (one, other):
            channel = Channel(one, on_frames)
            other.send_multipart(pack([(b"1",), (b"2",), (b"3",)]))
            await until(lambda: heard == [b"1", b"3"])
            assert [str(problem["exception"]) for problem in problems] == ["a fault"]
            channel.close()

    run(test)


def test_a_broken_batch_goes_on_as_it_is() -> None:
    async def test() -> None:
        heard: list[list[bytes]] = []
        with sockets(zmq.DEALER, zmq.DEALER) as (one, other):
            channel = Channel(one, heard.append)
            other.send_multipart((BATCH, b"\x91\x90"))
            other.send_multipart((BATCH,))
            other.send_multipart((BATCH, *pack([(b"x",)])))
            await until(lambda: len(heard) == 3)
            assert heard == [[BATCH, b"\x91\x90"], [BATCH], [BATCH, *pack([(b"x",)])]]
            channel.close()

    run(test)


def test_nothing_is_handled_after_a_handler_has_closed_the_channel() -> None:
    async def test() -> None:
        heard: list[list[bytes]] = []
        with sockets(zmq.DEALER, zmq.DEALER) as (one, other):

            def on_frames(frames: list[bytes]) -> None:
                heard.append(frames)
                channel.close()

            channel = Channel(one, on_frames)
            other.send_multipart(pack([(b"1",), (b"2",)]))
            await until(lambda: heard)
            await asyncio.sleep(0.01)
            assert heard == [[b"1"]]

    run(test)


def test_answers_to_a_large_batch_leave_in_parts() -> None:
    """Who comes next need not wait until all of it is handled."""

    async def test() -> None:
        with sockets(zmq.ROUTER, zmq.DEALER) as (router, dealer):
            together = Together()
            handled, left = 0, list[int]()

            def on_frames(frames: list[bytes]) -> None:
                nonlocal handled
                handled += 1
                channel.post((frames[0], b"answer"))

            channel = Channel(router, on_frames, together=together)
            flush = channel.flush

            def watched() -> None:
                left.append(handled)
                flush()

            channel.flush = watched
            dealer.send_multipart(pack([(b"%d" % i,) for i in range(64)]))
            await heard(dealer, 64)
            assert left[:2] == [32, 64]
            channel.close()

    run(test)


def test_others_get_their_turn_between_many_batches() -> None:
    async def test() -> None:
        handled, at_turn, loop = 0, list[int](), asyncio.get_running_loop()

        def on_frames(frames: list[bytes]) -> None:
            nonlocal handled
            if not handled:
                loop.call_soon(lambda: at_turn.append(handled))
            handled += 1

        with sockets(zmq.DEALER, zmq.DEALER) as (one, other):
            for _ in range(40):
                other.send_multipart(pack([(b"x",)] * MAX_BATCH))
            channel = Channel(one, on_frames)
            await until(lambda: handled == 40 * MAX_BATCH)
            assert at_turn[0] < 10 * MAX_BATCH
            channel.close()

    run(test)
