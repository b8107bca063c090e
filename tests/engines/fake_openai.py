"""A small OpenAI-compatible server: answers with words, or does what a test has scripted.

By default a chat or completion gets as many words as it asks for, the same for the same prompt. A
`Script` takes the place of one answer; scripts are used up in order.
"""

import asyncio
import json
import zlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

CONTEXT = 2048
DONE = b"data: [DONE]\n\n"
Script = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeOpenAI:
    """Listens at ``url`` between `start` and `stop`; can be started again on the same port."""

    def __init__(self) -> None:
        self.port = 0
        self.model = "remote-model"
        self.step_s = 0.0
        self.key: str | None = None
        self.models: Script | None = None  # in place of the list
        self.scripts: deque[Script] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.looks = 0  # at the list of models
        self.active = 0  # requests for an answer that are being answered
        self.most_active = 0
        self.aborted = 0  # of those whose client went away
        self.connections: set[Any] = set()  # all that brought a request for an answer
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _list(self, request: web.Request) -> web.StreamResponse:
        self.looks += 1
        if self.models is not None:
            return await self.models(request)
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": f"not {self.key}"}}, status=401)
        return web.json_response({"data": [{"id": self.model, "max_model_len": CONTEXT}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        self.connections.add(request.transport)
        try:
            self.bodies.append(await request.json())
            self.headers.append(request.headers.copy())
            if self.scripts:
                return await self.scripts.popleft()(request)
            return await self._words(request)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.active -= 1

    async def _words(self, request: web.Request) -> web.StreamResponse:
        body, chat = self.bodies[-1], request.path.endswith("/chat/completions")
        prompt = json.dumps(body["messages"] if chat else body["prompt"])
        prompt_tokens = len(prompt) // 4
        room = CONTEXT - prompt_tokens
        wanted = body.get("max_tokens", room)
        if room < 1 or wanted > room:
            return refuse(400, f"the context of {CONTEXT} tokens is too small")
        first = zlib.crc32(prompt.encode()) % 1000
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": wanted}
        if body.get("stream"):
            return await self._stream(request, body, chat, first, wanted, usage)
        await asyncio.sleep(self.step_s * wanted)
        text = " ".join(f"w{first + i}" for i in range(wanted))
        return web.json_response(whole(text, body["model"], chat=chat) | {"usage": usage})

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        chat: bool,
        first: int,
        wanted: int,
        usage: dict[str, int],
    ) -> web.StreamResponse:
        response = await begin(request)
        if chat:
            await response.write(event(chunk(None, body["model"])))
        for i in range(wanted):
            await asyncio.sleep(self.step_s)
            text = f"{' ' if i else ''}w{first + i}"
            reason = "length" if i == wanted - 1 else None
            await response.write(event(chunk(text, body["model"], chat=chat, reason=reason)))
        if body.get("stream_options", {}).get("include_usage"):
            last = chunk(None, body["model"]) | {"choices": [], "usage": usage}
            await response.write(event(last))
        await response.write(DONE)
        await response.write_eof()
        return response


def whole(text: str, model: str, *, chat: bool = True) -> dict[str, Any]:
    """A response object."""
    said: dict[str, Any] = {"text": text}
    if chat:
        said = {"message": {"role": "assistant", "content": text}}
    choice = {"index": 0, "finish_reason": "length", "logprobs": None} | said
    kind = "chat.completion" if chat else "text_completion"
    return {"id": "r-1", "object": kind, "created": 7, "model": model, "choices": [choice]}


def chunk(
    text: str | None, model: str = "m", *, chat: bool = True, reason: str | None = None
) -> dict[str, Any]:
    """A chunk object; without text that of the role."""
    said: dict[str, Any] = {"text": text or ""}
    if chat:
        said = {"delta": {"role": "assistant"} if text is None else {"content": text}}
    kind = "chat.completion.chunk" if chat else "text_completion"
    choice = {"index": 0, "finish_reason": reason} | said
    return {"id": "r-1", "object": kind, "created": 7, "model": model, "choices": [choice]}


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def refuse(status: int, message: str, **headers: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


async def begin(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


# Scripts.


def status(code: int, message: str = "scripted", **headers: str) -> Script:
    async def script(request: web.Request) -> web.StreamResponse:
        return refuse(code, message, **headers)

    return script


def raw(body: bytes, content_type: str = "application/json") -> Script:
    async def script(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers={"Content-Type": content_type})

    return script


def pieces(*parts: bytes) -> Script:
    """A stream of these bytes, each on its own way through the socket."""

    async def script(request: web.Request) -> web.StreamResponse:
        response = await begin(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.002)
        await response.write_eof()
        return response

    return script


def hang(*parts: bytes, begun: bool = True) -> Script:
    """These bytes and then nothing, for ever."""

    async def script(request: web.Request) -> web.StreamResponse:
        if begun:
            response = await begin(request)
            for part in parts:
                await response.write(part)
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    return script


def reset(*parts: bytes) -> Script:
    """These bytes and then a broken connection; without any, broken before the answer."""

    async def script(request: web.Request) -> web.StreamResponse:
        response = await begin(request) if parts else web.StreamResponse()
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.002)
        assert request.transport is not None
        request.transport.abort()
        return response

    return script
