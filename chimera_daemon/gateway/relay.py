"""Requests for text: from the body of a client to the daemon, and the answer back as it comes.

Nothing is done per token but to pass frames on: what has arrived since goes out in one write.
"""

import asyncio
from contextlib import aclosing
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from aiohttp import HttpVersion11, web
from aiohttp.http_writer import StreamWriter
from msgspec import Struct

from chimera_daemon.client import ChimeraError, Client, RawReply, RawStream
from chimera_daemon.config import GatewayConfig
from chimera_daemon.gateway.bodies import read_request
from chimera_daemon.gateway.connections import SmallAnswer
from chimera_daemon.gateway.errors import HttpError, from_chimera
from chimera_daemon.gateway.forms import Extension, read_body, read_kind, read_stage
from chimera_daemon.gateway.identity import (
    WORKFLOW_HEADER,
    Identity,
    StageCounter,
    find_identity,
    is_printable,
)
from chimera_daemon.gateway.readers import Reader, Readers
from chimera_daemon.messages import Api

# A client that was given up may still take the news for so long.
_LAST_WORDS_S = 1.0
# Larger answers are watched while they are written; these fit into any buffer that is empty.
_SMALL_BYTES = 32 << 10
_MAX_MODEL = 128
_NO_EXTENSION = Extension()


class Task(Struct, frozen=True, gc=False):
    """A request as it goes to the daemon, and the headers that its answer will have."""

    payload: bytes
    stream: bool
    settings: dict[str, Any]  # of `Client.request` and `Client.relay`
    headers: dict[str, str]


class Relay:
    """Owns what is under way and its counts. ``handle`` answers one HTTP request."""

    def __init__(self, config: GatewayConfig, client: Client, readers: Readers) -> None:
        self._config = config
        self._client = client
        self._readers = readers
        self.stages = StageCounter()
        self.in_flight = 0
        self.streams = 0
        self.requests = 0
        self.failures = 0

    async def handle(
        self, request: web.BaseRequest, api: Api, max_bytes: int
    ) -> web.StreamResponse:
        """Answer a request for text; raises `HttpError`. Cancelling it cancels the request."""
        self.requests += 1
        self.in_flight += 1
        try:
            payload = await read_request(request, max_bytes, self._config.body_timeout_s)
            task = self._task(request, api, payload)
            try:
                if task.stream:
                    return await self._stream(request, task)
                return await self._answer(request, task)
            except ChimeraError as error:
                raise from_chimera(error, task.headers) from None
        except BaseException:
            self.failures += 1
            raise
        finally:
            self.in_flight -= 1

    def _task(self, request: web.BaseRequest, api: Api, payload: bytes) -> Task:
        body, payload = read_body(payload)
        extension = body.chimera or _NO_EXTENSION
        headers = request.headers
        kind = headers.get("x-chimera-kind", extension.kind)
        number = headers.get("x-chimera-stage")
        stage = extension.stage if number is None else read_stage(number)
        model = body.wanted_model
        if model is not None and len(model) > _MAX_MODEL:
            raise _no_such_model()
        identity = find_identity(headers, extension.workflow_id, body.sections)
        last = identity is None
        if identity is None:
            workflow_id = self._client.new_workflow_id()
            identity = Identity(workflow_id, workflow_id)
            stage = stage or 0
        else:
            stage = self.stages.take(identity.workflow_id, stage)
        settings = {
            "api": api,
            "workflow_id": identity.workflow_id,
            "stage": stage,
            "kind": None if kind is None else read_kind(kind),
            "model": model,
            "max_tokens": body.most_tokens,
            "hints": body.hints,
            "tries": extension.tries,
            "optional": extension.optional,
            "last": last,
        }
        echo = {WORKFLOW_HEADER: identity.echo, "x-chimera-stage": str(stage)}
        return Task(payload, bool(body.stream), settings, echo | echo_of(request))

    def _receipt_id(self, request_id: str) -> str:
        """Request ids are counted per client."""
        return f"{self._client.client_id[:12]}-{request_id}"

    # The whole answer at once.

    async def _answer(self, request: web.BaseRequest, task: Task) -> web.StreamResponse:
        reply = await self._client.request(task.payload, **task.settings)
        headers = task.headers
        headers["x-chimera-model"] = _in_header(reply.model)
        headers["x-chimera-engine"] = _in_header(reply.engine)
        headers["x-chimera-receipt-id"] = self._receipt_id(reply.request_id)
        transport = request.transport
        unread = transport is not None and transport.get_write_buffer_size() > 0
        if len(reply.payload) <= _SMALL_BYTES and not unread and request.version == HttpVersion11:
            return SmallAnswer(reply.payload, headers)
        response = web.Response(
            body=reply.payload, headers=headers, content_type="application/json"
        )
        await self._write_watched(request, response)
        return response

    async def _write_watched(self, request: web.BaseRequest, response: web.Response) -> None:
        try:
            async with self._readers.of(request) as reader:
                reader.blocked()
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the client does not read its answer") from None

    # A stream.

    async def _stream(self, request: web.BaseRequest, task: Task) -> web.StreamResponse:
        stream = self._client.relay(task.payload, **task.settings)
        self.streams += 1
        try:
            async with self._readers.of(request, stream) as reader:
                return await self._write(request, task, stream, reader)
        except ChimeraError:  # among them is a `TimeoutError`
            raise
        except TimeoutError:
            await _say_goodbye(request)
            raise ConnectionResetError("the client does not read its stream") from None
        finally:
            stream.cancel()
            self.streams -= 1

    async def _write(
        self, request: web.BaseRequest, task: Task, stream: RawStream, reader: Reader
    ) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        rest = b""
        try:
            async with aclosing(aiter(stream)) as parts:
                async for frames in parts:
                    events = b"data: " + b"\n\ndata: ".join(frames) + b"\n\n"
                    if stream.ended:
                        rest = events  # and what follows it, in one write
                        continue
                    reader.blocked()
                    if response is None:
                        response = await _begin(request, task, self._receipt_id(stream.request_id))
                    await response.write(events)
                    reader.unblocked()
            rest += _end_of(stream.reply)
        except ChimeraError as error:
            if response is None and not rest:
                raise
            self.failures += 1
            rest += _event_of(from_chimera(error))
        reader.blocked()
        if response is None:
            response = await _begin(request, task, self._receipt_id(stream.request_id))
        await response.write_eof(rest)
        return response


def echo_of(request: web.BaseRequest) -> dict[str, str]:
    """The client's own name for a request, to be given back to it if that can do no harm."""
    name = request.headers.get("x-request-id")
    return {"x-request-id": name} if name is not None and is_printable(name) else {}


class _EventStream(web.StreamResponse):
    """Whose head leaves together with the first events."""

    _send_headers_immediately = False


async def _begin(request: web.BaseRequest, task: Task, receipt_id: str) -> web.StreamResponse:
    # Model and engine are known only with the answer.
    headers = task.headers | {
        "x-chimera-receipt-id": receipt_id,
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }
    response = _EventStream(headers=headers)
    await response.prepare(request)
    return response


def _end_of(reply: RawReply) -> bytes:
    names = f"model={_in_header(reply.model)} engine={_in_header(reply.engine)}"
    return f": chimera {names}\n\ndata: [DONE]\n\n".encode()


def _event_of(error: HttpError) -> bytes:
    return b"data: " + error.body() + b"\n\n"


async def _say_goodbye(request: web.BaseRequest) -> None:
    """Try to tell a client that does not read, without waiting for it to read that."""
    transport, writer = request.transport, request.writer
    if transport is None:
        return
    if writer.output_size > 0 and isinstance(writer, StreamWriter):
        text = "the stream was not read fast enough"
        error = HttpError(503, text, code="slow_reader", retryable=True)
        await writer.write(_event_of(error), drain=False)
    asyncio.get_running_loop().call_later(_LAST_WORDS_S, transport.abort)


@lru_cache(maxsize=1024)
def _in_header(name: str) -> str:
    """The name of a model or an engine, of which any characters are legal."""
    return quote(name, safe="!#$&'()*+,/:;=?@[]~|<>{}^` ")


def _no_such_model() -> HttpError:
    return HttpError(
        404,
        f"no model has a name of more than {_MAX_MODEL} characters",
        code="model_not_found",
        param="model",
        retryable=False,
    )
