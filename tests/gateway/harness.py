"""A daemon, echo engines and a gateway on one loop, and clients down to the bare socket."""

import asyncio
import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp

from chimera_daemon.config import GatewayConfig
from chimera_daemon.daemon import Daemon
from chimera_daemon.gateway.server import Gateway
from chimera_daemon.prior import PriorPredictor
from tests.daemon.harness import WAIT_S, World, until

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def chat(text: str = "2 + 2 = ?", **fields: Any) -> bytes:
    """A chat body."""
    return json.dumps({"messages": [{"role": "user", "content": text}]} | fields).encode()


class Answer(NamedTuple):
    """An HTTP answer; ``headers`` have lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in it, whose form is checked."""
        assert self.headers["content-type"].startswith("application/json")
        (error,) = self.json.values()
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"]
        assert error["code"]
        return error

    @property
    def events(self) -> list[str]:
        """Data of server-sent events, comments left out."""
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        return [b.removeprefix("data: ") for b in blocks if b.startswith("data: ")]


class Door:
    """``async with Door(tmp_path, step_s=0.01) as door``: the state is checked at the end.

    ``engine`` are options of the one echo engine, ``daemon`` and ``gateway`` parts of their
    configurations.
    """

    def __init__(
        self,
        folder: Path,
        *,
        gateway: dict[str, Any] | None = None,
        daemon: dict[str, Any] | None = None,
        board: str = "",
        give_up_s: float = WAIT_S,
        drain_s: float = 1.0,
        **engine: Any,
    ) -> None:
        self.folder = folder
        self.daemon_settings = daemon or {}
        self.world = World(folder, **self.daemon_settings)
        if board:
            config = self.world.config
            self.world.daemon = Daemon(config, prior=PriorPredictor(config), board=board)
            self.world.core = self.world.daemon._core
        self.engine = engine
        settings: dict[str, Any] = {"listen": "127.0.0.1:0"} | (gateway or {})
        self.gateway = Gateway(
            GatewayConfig(drain_s=drain_s, **settings), self.world.config.front, give_up_s=give_up_s
        )
        self._lines: list[Line] = []

    async def __aenter__(self) -> Self:
        await self.world.__aenter__()
        await self.world.join("e", "m", **self.engine)
        await self.gateway.start()
        host, port = self.gateway.address
        self.url = f"http://{host}:{port}"
        self.session = aiohttp.ClientSession(self.url)
        await until(lambda: self.gateway.client.connected, "the gateway's connection")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for line in self._lines:
            line.close()
        await self.session.close()
        if exc is None:
            await self.quiet()
        await self.gateway.close()
        await self.world.__aexit__(exc_type, exc, traceback)

    async def quiet(self) -> None:
        """Nothing is under way, and nothing is left of what was."""
        gateway, world = self.gateway, self.world
        await until(lambda: gateway.relay.in_flight == 0, "requests to end")
        await until(lambda: world.core.idle and not world.daemon._predicting, "the daemon to idle")
        await until(lambda: all(h.running == 0 for h, _ in world.hosts.values()), "free slots")
        await until(lambda: not world.daemon._events, "events")
        assert gateway.client.pending == 0
        assert gateway.relay.streams == 0
        assert not gateway.readers.all
        world.check_empty()

    async def restart_daemon(self) -> None:
        """Another daemon takes the place of the first, which is gone without a word."""
        hosts = self.world.hosts
        self.world.daemon.close()
        self.world = World(self.folder, **self.daemon_settings)
        self.world.hosts = hosts
        await self.world.daemon.start()

    async def ask(
        self,
        path: str = CHAT,
        body: bytes | None = None,
        method: str | None = None,
        **headers: str,
    ) -> Answer:
        """One request; ``_`` in names of headers is ``-``."""
        method = method or ("GET" if body is None else "POST")
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(
            method, path, data=body, headers=(JSON if body is not None else {}) | names
        ) as response:
            got = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, got, await response.read())

    async def line(self) -> "Line":
        """A bare connection."""
        reader, writer = await asyncio.open_connection(*self.gateway.address)
        line = Line(reader, writer)
        self._lines.append(line)
        return line


class Line:
    """A bare connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def close(self) -> None:
        self.writer.close()

    def cut(self) -> None:
        """Gone, without waiting for anything."""
        self.writer.transport.abort()

    async def answer(self) -> Answer:
        """The next answer, read by the rules of HTTP."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        status = int(head[0].split(" ")[1])
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            assert await self.reader.readline() == b"\r\n"
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif status == 204:
            body = b""
        else:
            body = await self.reader.read()
        return Answer(status, headers, body)

    async def closed(self) -> bytes:
        """What is still sent until the gateway closes the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


def request(body: bytes, *lines: str, path: str = CHAT) -> bytes:
    """The bytes of a POST."""
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body
