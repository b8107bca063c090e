"""What can go wrong, as exceptions: one class per error code of the protocol, and the client's own.

Knows the codes, not when they arise. Every error says whether the same request may simply be sent
again (``retryable``) and, if the daemon knows it, after how many seconds.
"""

from typing import ClassVar

from chimera_daemon.messages import ErrorCode, Failure


class ChimeraError(Exception):
    """Base of all errors of the client.

    ``code`` is stable and meant for programs, the message for people. ``retryable``: the same
    request may succeed when sent again. ``retry_after_s``: the daemon's advice, if it gave one.
    """

    code: ClassVar[str] = "error"
    retryable: bool = False
    retry_after_s: float | None = None

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        if retryable is not None:
            self.retryable = retryable
        self.retry_after_s = retry_after_s


# Said by the daemon.


class BadRequest(ChimeraError):
    """The message or the payload cannot be used as it is."""

    code = "bad_request"


class VersionMismatch(ChimeraError):
    """The daemon speaks another version of the protocol: install the same release on both sides."""

    code = "version"


class TooLarge(ChimeraError):
    """The payload is over the daemon's ``max_payload_bytes``; also raised before sending."""

    code = "too_large"


class UnknownModel(ChimeraError):
    """No engine serves this model and none is configured to."""

    code = "unknown_model"


class Conflict(ChimeraError):
    """The request id was seen before with another body."""

    code = "conflict"


class Overloaded(ChimeraError):
    """A bound of the daemon, or the client's own ``max_pending``, is reached."""

    code = "overloaded"
    retryable = True


class Draining(ChimeraError):
    """The daemon is stopping and takes nothing new."""

    code = "draining"
    retryable = True


class WorkflowClosed(ChimeraError):
    """A stage of a workflow that has ended; also raised before anything is sent."""

    code = "workflow_closed"


class Cancelled(ChimeraError):
    """The request was cancelled: by `Call.cancel`, or because its workflow was closed."""

    code = "cancelled"


class EngineLost(ChimeraError):
    """The engine went away and the stage could not be started again."""

    code = "engine_lost"
    retryable = True


class EngineFailed(ChimeraError):
    """The engine failed on this stage."""

    code = "engine_error"


class SlowReader(ChimeraError):
    """This client did not read its stream in time."""

    code = "slow_reader"
    retryable = True


class NoEngine(ChimeraError):
    """The stage waited too long without any engine for it."""

    code = "no_engine"
    retryable = True


class Declined(ChimeraError):
    """An optional stage is not worth its cost on any model, as things are: give the task up."""

    code = "declined"


# Found by the client itself.


class DaemonUnreachable(ChimeraError, ConnectionError):
    """No daemon answers at the address, or it has been away for too long."""

    code = "unreachable"
    retryable = True


class RequestTimeout(ChimeraError, TimeoutError):
    """No answer within the time that the caller gave; the request was cancelled."""

    code = "timeout"
    retryable = True


class StreamInterrupted(ChimeraError):
    """A stream had to start again after text was delivered, and ``restart`` was not asked for."""

    code = "interrupted"
    retryable = True


class ProtocolError(ChimeraError):
    """The daemon's answer to this request could not be read."""

    code = "protocol"


class ClientClosed(ChimeraError):
    """The client was closed before the answer came, or is used after it was closed."""

    code = "client_closed"


_BY_CODE: dict[ErrorCode, type[ChimeraError]] = {
    "bad_request": BadRequest,
    "version": VersionMismatch,
    "too_large": TooLarge,
    "unknown_model": UnknownModel,
    "conflict": Conflict,
    "overloaded": Overloaded,
    "draining": Draining,
    "workflow_closed": WorkflowClosed,
    "cancelled": Cancelled,
    "engine_lost": EngineLost,
    "engine_error": EngineFailed,
    "slow_reader": SlowReader,
    "no_engine": NoEngine,
    "declined": Declined,
}


def from_failure(failure: Failure) -> ChimeraError:
    """The daemon's `Failure` as the exception of its code."""
    kind = _BY_CODE[failure.code]
    # An error that is retryable by its nature stays so; the daemon can only add to it.
    return kind(
        failure.message,
        retryable=failure.retryable or kind.retryable,
        retry_after_s=failure.retry_after_s,
    )
