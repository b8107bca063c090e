"""What can go wrong between an HTTP client and the daemon, in the form of OpenAI's API.

Owns the status, type and code of every error, and the headers that tell a client whether and when
to try again. Knows nothing of sockets.
"""

import math
from collections.abc import Mapping
from http import HTTPStatus

import msgspec

from chimera_daemon.client.errors import ChimeraError

_encode = msgspec.json.Encoder().encode

# Statuses of the client's error codes; what is not named here is a fault on our side of the wire.
_STATUS: dict[str, HTTPStatus] = {
    "bad_request": HTTPStatus.BAD_REQUEST,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unknown_model": HTTPStatus.NOT_FOUND,
    "conflict": HTTPStatus.CONFLICT,
    "workflow_closed": HTTPStatus.CONFLICT,
    "cancelled": HTTPStatus.CONFLICT,  # its workflow was closed: nobody else can cancel it
    "declined": HTTPStatus.CONFLICT,
    "overloaded": HTTPStatus.TOO_MANY_REQUESTS,
    "engine_lost": HTTPStatus.BAD_GATEWAY,
    "engine_error": HTTPStatus.BAD_GATEWAY,
    "interrupted": HTTPStatus.BAD_GATEWAY,
    "protocol": HTTPStatus.BAD_GATEWAY,
    "version": HTTPStatus.BAD_GATEWAY,
    "draining": HTTPStatus.SERVICE_UNAVAILABLE,
    "no_engine": HTTPStatus.SERVICE_UNAVAILABLE,
    "slow_reader": HTTPStatus.SERVICE_UNAVAILABLE,
    "unreachable": HTTPStatus.SERVICE_UNAVAILABLE,
    "client_closed": HTTPStatus.SERVICE_UNAVAILABLE,
    "timeout": HTTPStatus.GATEWAY_TIMEOUT,
}
# Codes that OpenAI's own clients know by another name.
_CODE = {"unknown_model": "model_not_found"}


class HttpError(Exception):
    """An answer other than 200.

    ``param`` names the field of the body that is wrong. ``retryable``: None leaves the decision to
    the client. ``close``: the connection cannot be used any further, as part of a request may still
    be under way on it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = int(status)
        self.message = message
        self.code = code
        self.param = param
        self.close = close
        self.headers = dict(headers or {})
        if retryable is not None:
            self.headers["x-should-retry"] = "true" if retryable else "false"
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(math.ceil(retry_after_s))

    def body(self) -> bytes:
        """``{"error": {...}}`` as JSON."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        elif self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind = "server_error"
        else:
            kind = "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return _encode({"error": error})


def from_chimera(error: ChimeraError, headers: Mapping[str, str] | None = None) -> HttpError:
    """An error of the daemon, or of the connection to it, as an HTTP client is told."""
    return HttpError(
        _STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR),
        str(error),
        code=_CODE.get(error.code, error.code),
        param="model" if error.code == "unknown_model" else None,
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        headers=headers,
    )
