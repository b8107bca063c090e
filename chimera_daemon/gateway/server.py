"""The gateway: OpenAI's API over HTTP, as a client of the daemon and nothing else.

Owns the life of the server, the routes and the answers to whoever asks about the system. Requests
for text are `Relay`'s. Schedules nothing, and reads no message of a conversation.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

import msgspec
from aiohttp import web

from chimera_daemon import __version__
from chimera_daemon.client import ChimeraError, Client
from chimera_daemon.config import Config, GatewayConfig
from chimera_daemon.gateway.bodies import read_request
from chimera_daemon.gateway.connections import HttpServer, error_response
from chimera_daemon.gateway.counts import Counts
from chimera_daemon.gateway.errors import HttpError, from_chimera
from chimera_daemon.gateway.forms import read_outcome, read_verdict
from chimera_daemon.gateway.identity import identity_of
from chimera_daemon.gateway.readers import Readers
from chimera_daemon.gateway.relay import Relay, echo_of
from chimera_daemon.gateway.snapshots import (
    AUTO,
    Snapshots,
    board_path,
    models_of,
    unless_away,
    why_unhealthy,
)
from chimera_daemon.metrics import render

log = logging.getLogger("chimera.gateway")

# Requests wait for a daemon that restarts; then they fail, and new ones at once, until it is back.
GIVE_UP_S = 10.0
_LOOK_S = 0.02  # between looks whether they have ended
_LAST_S = 1.0  # for connections without a request
_BEAT_S = 0.1
_BOARD_S = 5.0  # between looks for a board, which a daemon that restarts makes anew
_BACKLOG = 1024
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_JSON = "application/json"

_encode = msgspec.json.Encoder().encode

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class GatewayError(Exception):
    """The gateway cannot start; the message says what to change."""


class Gateway:
    """Serves between ``start`` and ``close``, or inside of ``async with Gateway(...)``.

    ``connect`` is the daemon's front address; the daemon need not be there yet. ``reuse_port``: the
    port is shared with other gateways.
    """

    def __init__(
        self,
        config: GatewayConfig,
        connect: str,
        *,
        reuse_port: bool = False,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        self.config = config
        self._connect = connect
        self._reuse_port = reuse_port
        self._give_up_s = give_up_s
        self._started = int(time.time())
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completions},
            "/v1/models": {"GET": self._models},
            "/health": {"GET": self._health},
            "/metrics": {"GET": self._metrics},
            "/version": {"GET": self._version},
        }

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen; raises `GatewayError`."""
        self._loop = asyncio.get_running_loop()
        try:
            listener = _listen(self.config.listen, self._reuse_port)
        except ValueError as error:
            raise GatewayError(str(error)) from error
        try:
            self.client = Client(self._connect, give_up_s=self._give_up_s)
        except ValueError as error:
            listener.close()
            raise GatewayError(str(error)) from error
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self.readers = Readers(self.config.max_unread_bytes, self.config.slow_reader_s)
        self.relay = Relay(self.config, self.client, self.readers)
        self._snapshots = Snapshots(self.client)
        self._counts = Counts()
        self.server = HttpServer(
            self._handle,
            limit=self.config.max_connections,
            keep_alive_s=self.config.keep_alive_s,
        )
        self._runner = web.ServerRunner(self.server, shutdown_timeout=_LAST_S)
        await self._runner.setup()
        self._site = web.SockSite(self._runner, listener, backlog=_BACKLOG)
        await self._site.start()
        self._beat_timer = self._loop.call_later(_BEAT_S, self._beat)
        self._board_task = asyncio.ensure_future(self._follow_board())
        log.info("gateway: http://%s:%d/v1, daemon %s", *self.address, self._connect)

    async def close(self) -> None:
        """Take nothing new, let requests under way end, at most for ``drain_s``, then stop."""
        await self._site.stop()
        self.server.pre_shutdown()
        end = self._loop.time() + self.config.drain_s
        while self.relay.in_flight and self._loop.time() < end:
            await asyncio.sleep(_LOOK_S)
        if self.relay.in_flight:
            self.cut()
        await self._runner.cleanup()
        self._beat_timer.cancel()
        self._board_task.cancel()
        with suppress(asyncio.CancelledError):
            await self._board_task
        self._snapshots.close()
        self._counts.close()
        await self.client.close()

    def cut(self) -> None:
        """End all connections at once, which cancels their requests."""
        for connection in self.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    # One request.

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            handler = self._route(request)
            return await handler(request)
        except HttpError as error:
            failure = error
        except ChimeraError as error:
            failure = from_chimera(error)
        failure.headers |= echo_of(request)
        return error_response(failure)

    def _route(self, request: web.BaseRequest) -> Handler:
        path, _, _ = request.raw_path.partition("?")
        methods = self._routes.get(path) or self._of_one(path)
        if methods is None:
            raise HttpError(
                HTTPStatus.NOT_FOUND,
                f"there is no {path[:200]} here; there are: {', '.join(self._routes)}, "
                "/v1/workflows/ID/outcome, /v1/workflows/ID/feedback",
                code="not_found",
                retryable=False,
            )
        method = "GET" if request.method == "HEAD" else request.method
        handler = methods.get(method)
        if handler is not None:
            return handler
        allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
        if method == "OPTIONS":
            return _answering(web.Response(status=204, headers={"Allow": allowed}))
        raise HttpError(
            HTTPStatus.METHOD_NOT_ALLOWED,
            f"{path[:200]} does not know {method[:20]}; it knows {allowed}",
            code="method_not_allowed",
            retryable=False,
            headers={"Allow": allowed},
        )

    def _of_one(self, path: str) -> dict[str, Handler] | None:
        """Routes below the name of a model or a workflow, which may have slashes in it."""
        if path.startswith("/v1/models/"):
            return {"GET": self._model}
        if path.startswith("/v1/workflows/"):
            if path.endswith("/outcome"):
                return {"POST": self._outcome}
            if path.endswith("/feedback"):
                return {"POST": self._feedback}
        return None

    @property
    def _max_bytes(self) -> int:
        # Until the daemon has said it, its default.
        return self.client.max_payload_bytes or Config().max_payload_bytes

    async def _chat(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self.relay.handle(request, "chat", self._max_bytes)

    async def _completions(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self.relay.handle(request, "completions", self._max_bytes)

    async def _read(self, request: web.BaseRequest) -> bytes:
        return await read_request(request, self._max_bytes, self.config.body_timeout_s)

    # Workflows.

    async def _outcome(self, request: web.BaseRequest) -> web.StreamResponse:
        """The end of a workflow."""
        raw, workflow_id = _workflow_of(request, "/outcome")
        success = read_outcome(await self._read(request))
        await self.client.close_workflow(workflow_id, success)
        self.relay.stages.forget(workflow_id)
        return _json(request, {"workflow_id": raw, "closed": True, "success": success})

    async def _feedback(self, request: web.BaseRequest) -> web.StreamResponse:
        """A verdict on one stage. The daemon never answers it, so it is accepted, no more."""
        raw, workflow_id = _workflow_of(request, "/feedback")
        stage, verdict = read_verdict(await self._read(request))
        self.client.feedback(workflow_id, stage, verdict)
        return _json(
            request,
            {"workflow_id": raw, "stage": stage, "verdict": verdict},
            HTTPStatus.ACCEPTED,
        )

    # About the system.

    async def _models(self, request: web.BaseRequest) -> web.StreamResponse:
        names = [AUTO, *models_of(await self._snapshots.get())]
        return _json(request, {"object": "list", "data": [self._describe(n) for n in names]})

    async def _model(self, request: web.BaseRequest) -> web.StreamResponse:
        name = unquote(request.raw_path.partition("?")[0].removeprefix("/v1/models/"))
        names = [AUTO, *models_of(await self._snapshots.get())]
        if name not in names:
            raise HttpError(
                HTTPStatus.NOT_FOUND,
                f"no model {name[:128]!r}; there are: {', '.join(names)}",
                code="model_not_found",
                param="model",
                retryable=False,
            )
        return _json(request, self._describe(name))

    def _describe(self, model: str) -> dict[str, Any]:
        created = self._started
        return {"id": model, "object": "model", "created": created, "owned_by": "chimera"}

    async def _health(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            workers = await self._snapshots.get()
            reason = why_unhealthy(workers)
        except ChimeraError as error:
            workers, reason = [], str(error)
        if reason is not None:
            status = {"status": "unavailable", "reason": reason}
            return _json(request, status, HTTPStatus.SERVICE_UNAVAILABLE)
        return _json(request, {"status": "ok", "models": models_of(workers)})

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        workers = await unless_away(self._snapshots, 1.0)
        text = render(workers, self._counts.rows())
        headers = {"Content-Type": _METRICS_TYPE} | echo_of(request)
        return web.Response(body=text.encode(), headers=headers)

    async def _version(self, request: web.BaseRequest) -> web.StreamResponse:
        return _json(request, {"version": __version__})

    # Now and then.

    def _beat(self) -> None:
        self._beat_timer = self._loop.call_later(_BEAT_S, self._beat)
        self.readers.watch()
        relay = self.relay
        self._counts.write(
            (
                self.server.open,
                relay.in_flight,
                relay.streams,
                relay.requests,
                relay.failures,
                self.readers.waiting_bytes,
            )
        )

    async def _follow_board(self) -> None:
        while True:
            workers = await unless_away(self._snapshots, _BOARD_S)
            if workers:
                self._counts.follow(board_path(workers))
            await asyncio.sleep(_BOARD_S if workers else _BEAT_S)


def _listen(address: str, reuse_port: bool) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"`listen` must be HOST:PORT, such as 127.0.0.1:5700, not {address!r}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, int(port)))
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {address}: {error}; stop what is there, or set another address "
            "(`listen`)"
        ) from error
    return listener


def _answering(response: web.StreamResponse) -> Handler:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return response

    return answer


def _workflow_of(request: web.BaseRequest, end: str) -> tuple[str, str]:
    """The id in the path, in the client's own words and as the daemon knows it."""
    path = request.raw_path.partition("?")[0]
    raw = unquote(path.removeprefix("/v1/workflows/").removesuffix(end))
    if not raw:
        raise HttpError(
            HTTPStatus.NOT_FOUND,
            f"the id of a workflow is missing: /v1/workflows/ID{end}",
            code="not_found",
            retryable=False,
        )
    identity = identity_of(raw)
    return identity.echo, identity.workflow_id


def _json(request: web.BaseRequest, value: Any, status: int = HTTPStatus.OK) -> web.Response:
    return web.Response(
        body=_encode(value), status=status, headers=echo_of(request), content_type=_JSON
    )
