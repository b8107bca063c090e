"""Encoding of wire messages and addresses of sockets. The only file that knows frames' bytes.

A message is one header frame (msgpack map, tagged by ``type``) and for some types one payload
frame, which is passed on as it is. Encoders and typed decoders are made once.

Small messages that leave together for one peer may go as a batch, one message of ZeroMQ: instead of
the header `BATCH`, then a msgpack array of messages, each an array of its one or two frames.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from chimera_daemon.messages import FromEngine, ToClient, ToEngine, ToFront

encode = msgspec.msgpack.Encoder().encode
decode_front = msgspec.msgpack.Decoder(ToFront).decode
decode_client = msgspec.msgpack.Decoder(ToClient).decode
decode_back = msgspec.msgpack.Decoder(FromEngine).decode
decode_engine = msgspec.msgpack.Decoder(ToEngine).decode

MAX_WORKERS = 64  # of a daemon

BATCH = b"\xc0"  # nil, which is no header
MAX_BATCH = 64  # messages in one
_Frames = Annotated[list[bytes], Meta(min_length=1, max_length=2)]
_decode_batch = msgspec.msgpack.Decoder(Annotated[list[_Frames], Meta(max_length=MAX_BATCH)]).decode

# Headers are small by construction; a longer one is refused before it is decoded.
MAX_HEADER_BYTES = 64 << 10

_ADDRESS = re.compile(r"^(tcp://[^:/\s]+:\d{1,5}|tcp://\[[0-9a-fA-F:]+\]:\d{1,5}|ipc://.+)$")


class WireError(ValueError):
    """A peer sent something that is not a message of this protocol."""


def pack(messages: Sequence[Sequence[bytes]]) -> tuple[bytes, bytes]:
    """The frames of a batch; at most `MAX_BATCH` messages."""
    return BATCH, encode(messages)


def unpack(payload: bytes) -> list[list[bytes]] | None:
    """The messages of a batch, from its second frame; None if it is none."""
    try:
        return _decode_batch(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def check_address(address: str) -> str:
    """Return the address, or raise `ValueError` with the forms that are accepted."""
    port = address.rpartition(":")[2] if address.startswith("tcp://") else "0"
    if not _ADDRESS.match(address) or int(port) > 65535:
        raise ValueError(
            f"address {address!r} is not usable; write tcp://HOST:PORT or ipc:///PATH/TO/SOCKET"
        )
    return address


def worker_address(address: str, worker: int) -> str:
    """Where this worker listens, given the address of worker 0: two ports further on for each.

    Raises `ValueError` if the port would be above 65535.
    """
    if worker == 0:
        return address
    if address.startswith("ipc://"):
        return f"{address}.{worker}"
    host, _, port = address.rpartition(":")
    return check_address(f"{host}:{int(port) + 2 * worker}")


def worker_of(workflow_id: str, workers: int) -> int:
    """The worker that all stages of this workflow belong to."""
    return zlib.crc32(workflow_id.encode()) % workers if workers > 1 else 0


def request_id_of(header: bytes) -> str:
    """The request id in a header that could not be decoded, so that the error has an address."""
    try:
        raw: object = msgspec.msgpack.decode(header)
    except msgspec.DecodeError:
        return ""
    except (UnicodeDecodeError, ValueError, RecursionError):
        return ""
    if not isinstance(raw, dict):
        return ""
    value: object = raw.get("request_id")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return value[:128] if isinstance(value, str) else ""
