"""Backends that answer at once with canned text, as processes: an HTTP server with OpenAI's form of
chat, and a ZeroMQ socket that speaks the front protocol.

What `chimera bench overhead` holds all front doors against: the least that an answer can cost. Each
event of a stream is written by itself, as engines do. They are no language models.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import httptools
import msgspec
import uvloop
import zmq
from msgspec import Struct

from chimera_daemon import wire
from chimera_daemon.channel import Channel, make_socket
from chimera_daemon.engines.payload import encode_completion
from chimera_daemon.messages import (
    Chunk,
    Ping,
    Pong,
    Receipt,
    Result,
    Streamed,
    Submit,
    Usage,
)

MODEL = "static"
WORDS = tuple(f"w{i}" for i in range(16))
TEXT = " ".join(WORDS)
_PROMPT_TOKENS = 48
USAGE = Usage(_PROMPT_TOKENS, len(WORDS))
_HWM = 100_000
_MAX_PAYLOAD_BYTES = 1 << 20
_HEARTBEAT_S = 1.0
_json = msgspec.json.Encoder().encode


class _StreamOptions(Struct):
    include_usage: bool = False


class _Body(Struct):
    """What decides which of the canned answers it is."""

    stream: bool = False
    stream_options: _StreamOptions | None = None


_decode_body = msgspec.json.Decoder(_Body).decode


def completion() -> bytes:
    """The answer to a request that does not stream: a `chat.completion`."""
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return _json(_named("chat.completion", [choice]) | {"usage": _usage()})


def chunks(include_usage: bool = False) -> list[bytes]:
    """The `chat.completion.chunk` objects of a stream: the role, a word each, the end."""
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word if i == 0 else f" {word}"} for i, word in enumerate(WORDS)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    made = [_json(_named("chat.completion.chunk", [choice])) for choice in choices]
    if include_usage:
        made.append(_json(_named("chat.completion.chunk", []) | {"usage": _usage()}))
    return made


def _named(kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": "chatcmpl-0", "object": kind, "created": 0, "model": MODEL, "choices": choices}


def _usage() -> dict[str, int]:
    prompt, output = USAGE.prompt_tokens, USAGE.output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }


def _response(body: bytes, status: str = "200 OK") -> bytes:
    return (
        b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (status.encode(), len(body), body)
    )  # fmt: skip


def _events(include_usage: bool) -> list[bytes]:
    """A stream as it goes out: the head, then each event as a chunk of HTTP's own."""
    events = [b"data: %b\n\n" % chunk for chunk in (*chunks(include_usage), b"[DONE]")]
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return [head, *(b"%x\r\n%b\r\n" % (len(e), e) for e in events), b"0\r\n\r\n"]


class _Answers:
    """Everything there is to say, made once."""

    def __init__(self) -> None:
        listed = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bench"}]}
        self.plain = _response(completion())
        self.streams = {usage: _events(usage) for usage in (False, True)}
        self.get = {b"/health": _response(b"{}"), b"/v1/models": _response(_json(listed))}
        error = {"error": {"message": "not here", "type": "invalid_request_error"}}
        self.missing = _response(_json(error), "404 Not Found")
        self.unreadable = _response(_json(error), "400 Bad Request")


class _Connection(asyncio.Protocol):
    """One HTTP connection, kept open between requests."""

    def __init__(self, answers: _Answers) -> None:
        self._answers = answers
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._url, self._body = b"", []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        answers, write = self._answers, self._transport.write
        if self._parser.get_method() != b"POST":
            write(answers.get.get(self._url, answers.missing))
        elif self._url != b"/v1/chat/completions":
            write(answers.missing)
        else:
            try:
                body = _decode_body(b"".join(self._body))
            except msgspec.DecodeError:
                write(answers.unreadable)
                return
            if not body.stream:
                write(answers.plain)
                return
            options = body.stream_options
            for piece in answers.streams[options is not None and options.include_usage]:
                write(piece)


async def serve_http(on_port: Callable[[int], object], port: int = 0) -> None:
    """Serve on the loopback until cancelled; ``on_port`` is told the port (0: a free one)."""
    answers = _Answers()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(answers), "127.0.0.1", port, backlog=4096)
    async with server:
        on_port(server.sockets[0].getsockname()[1])
        await server.serve_forever()


class _Front:
    """Answers a stage at once where a daemon would choose an engine for it.

    ``stamps``: with the time of its arrival, as `static_engines.StaticBackend`.
    """

    def __init__(self, context: "zmq.Context[Any]", address: str, stamps: bool) -> None:
        self._stamps = stamps
        socket = make_socket(context, zmq.ROUTER, hwm=_HWM)
        socket.bind(address)
        self._channel = Channel(socket, self._on_frames)
        self._plain, self._chunks = completion(), chunks()
        self._streamed = _json(Streamed(len(self._chunks)))
        self._receipt = Receipt("none", "prior", MODEL, "no choice", ())

    def close(self) -> None:
        self._channel.close()

    def _on_frames(self, frames: list[bytes]) -> None:
        identity, message = frames[0], wire.decode_front(frames[1])
        send = self._channel.post
        if isinstance(message, Ping):
            self._channel.batches(message.batches, identity)
            pong = Pong(MODEL, _HEARTBEAT_S, _MAX_PAYLOAD_BYTES, batches=True)
            send((identity, wire.encode(pong)))
        elif isinstance(message, Submit):
            answer = self._plain
            if self._stamps:
                answer = encode_completion(str(time.perf_counter()))
            elif message.stream:
                for i, chunk in enumerate(self._chunks):
                    send((identity, wire.encode(Chunk(message.request_id, 1, i)), chunk))
                answer = self._streamed
            result = Result(message.request_id, MODEL, MODEL, USAGE, "stop", self._receipt)
            send((identity, wire.encode(result), answer))


async def serve_zmq(address: str, *, stamps: bool = False) -> None:
    """Serve until cancelled at this address."""
    context: zmq.Context[Any] = zmq.Context()
    front = _Front(context, address, stamps)
    try:
        await asyncio.Event().wait()
    finally:
        front.close()
        context.term()


def main(argv: Sequence[str] | None = None) -> None:
    """Serve HTTP and print the port, or ZeroMQ at an address, until a signal ends the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--zmq", metavar="ADDRESS", help="speak the front protocol there instead")
    parser.add_argument("--stamps", action="store_true", help="answer with the time of arrival")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    arguments = parser.parse_args(argv)
    if arguments.zmq is not None:
        uvloop.run(serve_zmq(arguments.zmq, stamps=arguments.stamps))
    else:
        uvloop.run(serve_http(lambda port: print(port, flush=True), arguments.port))


if __name__ == "__main__":
    sys.exit(main())
