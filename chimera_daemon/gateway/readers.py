"""Clients that are being written to, and what becomes of those that do not read.

A write waits in two places: in the connection's own buffer, which is small and blocks whoever
writes, and meanwhile in the client library, where chunks gather. Owns the bounds on both.
"""

import asyncio
from types import TracebackType
from typing import Protocol

from aiohttp import web


class Unread(Protocol):
    """Where chunks gather."""

    unread_bytes: int


class Reader:
    """``async with readers.of(request)`` around the writes of an answer, ``blocked()`` before each.

    Raises `TimeoutError` out of the block when the client is given up.
    """

    __slots__ = ("_limit", "_readers", "_request", "_stream", "blocked_since")

    def __init__(self, readers: "Readers", request: web.BaseRequest, stream: Unread | None) -> None:
        self._readers = readers
        self._limit = asyncio.timeout(None)
        self._request = request
        self._stream = stream
        self.blocked_since: float | None = None

    async def __aenter__(self) -> "Reader":
        await self._limit.__aenter__()
        self._readers.all.add(self)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._readers.all.discard(self)
        await self._limit.__aexit__(exc_type, exc, traceback)

    def blocked(self) -> None:
        """A write begins, which may have to wait."""
        self.blocked_since = self._readers.now()

    def unblocked(self) -> None:
        """The write has ended."""
        self.blocked_since = None

    @property
    def gathered_bytes(self) -> int:
        """Of a stream, what has come since the write began."""
        return self._stream.unread_bytes if self._stream else 0

    @property
    def waiting_bytes(self) -> int:
        """All that this client has not read."""
        transport = self._request.transport
        return self.gathered_bytes + (transport.get_write_buffer_size() if transport else 0)

    def give_up(self, now: float) -> None:
        """End its block."""
        self.blocked_since = None
        self._limit.reschedule(now)


class Readers:
    """All clients that are being written to; ``watch`` is called now and then."""

    def __init__(self, max_unread_bytes: int, slow_s: float) -> None:
        self.now = asyncio.get_running_loop().time
        self.all: set[Reader] = set()
        self.waiting_bytes = 0
        self.cut = 0
        self._max_unread_bytes = max_unread_bytes
        self._slow_s = slow_s

    def of(self, request: web.BaseRequest, stream: Unread | None = None) -> Reader:
        """The reader of the answer to a request."""
        return Reader(self, request, stream)

    def watch(self) -> None:
        """Give up who blocks for too long, or has too much waiting."""
        now = self.now()
        waiting = 0
        for reader in list(self.all):
            since = reader.blocked_since
            if since is None:
                continue
            waiting += reader.waiting_bytes
            if now - since > self._slow_s or reader.gathered_bytes > self._max_unread_bytes:
                self.cut += 1
                reader.give_up(now)
        self.waiting_bytes = waiting
