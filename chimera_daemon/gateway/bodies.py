"""Reading the body of a request: its type, its size and its time are checked, nothing else."""

import asyncio
from http import HTTPStatus

from aiohttp import ClientPayloadError, web

from chimera_daemon.gateway.errors import HttpError

_JSON = "application/json"
_CODINGS = frozenset(("", "identity", "gzip", "deflate"))


async def read_request(request: web.BaseRequest, limit: int, timeout_s: float) -> bytes:
    """The whole body, decompressed, of at most ``limit`` bytes within ``timeout_s`` seconds.

    Raises `HttpError`. Only JSON is taken: a web page of another origin can send a body of any
    other type to a gateway on its reader's machine without asking, but not this one.
    """
    headers = request.headers
    kind = headers.get("Content-Type", "")
    if kind != _JSON and kind.partition(";")[0].strip().lower() != _JSON:
        raise _unsupported("the header Content-Type must be application/json")
    if headers.get("Content-Encoding", "").lower() not in _CODINGS:
        raise _unsupported("the body may be compressed with gzip or deflate, with nothing else")
    content = request.content
    try:
        if content.is_eof():  # the usual case: all of it came with the headers
            payload = content.read_nowait()
        elif (request.content_length or 0) > limit:
            raise _too_large(limit)
        else:
            payload = await _read_slowly(request, limit, timeout_s)
    except (ClientPayloadError, web.RequestPayloadError) as error:
        text = f"the body could not be read: {str(error).partition(chr(10))[0][:200]}"
        raise HttpError(
            HTTPStatus.BAD_REQUEST, text, code="bad_request", retryable=False, close=True
        ) from None
    if len(payload) > limit:
        raise _too_large(limit)
    return payload


async def _read_slowly(request: web.BaseRequest, limit: int, timeout_s: float) -> bytes:
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while part := await request.content.readany():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise HttpError(
            HTTPStatus.REQUEST_TIMEOUT,
            f"the body did not arrive within {timeout_s:g} s",
            code="timeout",
            retryable=True,
            close=True,
        ) from None
    return b"".join(parts)


def _too_large(limit: int) -> HttpError:
    return HttpError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the body may have {limit} bytes at most (`max_payload_bytes` of the daemon)",
        code="too_large",
        retryable=False,
        close=True,
    )


def _unsupported(message: str) -> HttpError:
    return HttpError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message, code="bad_request", retryable=False, close=True
    )
