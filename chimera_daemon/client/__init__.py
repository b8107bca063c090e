"""The client of a Chimera daemon: asyncio (`connect`) and plain threads (`connect_sync`).

Imports msgspec, pyzmq and the standard library only: this is all that an agent framework needs.
`docs/protocol.md` describes the wire for other languages.

    async with connect("tcp://127.0.0.1:5570") as client:
        async with client.workflow(kind="math") as workflow:
            reply = await workflow.generate([{"role": "user", "content": "2 + 2 = ?"}])
            await workflow.close(success=reply.text.strip() == "4")
"""

from chimera_daemon.client.aio import Client, connect
from chimera_daemon.client.calls import Call, RawCall, RawReply, RawStream, Reply, Stream
from chimera_daemon.client.errors import (
    BadRequest,
    Cancelled,
    ChimeraError,
    ClientClosed,
    Conflict,
    DaemonUnreachable,
    Declined,
    Draining,
    EngineFailed,
    EngineLost,
    NoEngine,
    Overloaded,
    ProtocolError,
    RequestTimeout,
    SlowReader,
    StreamInterrupted,
    TooLarge,
    UnknownModel,
    VersionMismatch,
    WorkflowClosed,
)
from chimera_daemon.client.sync import SyncClient, SyncStream, SyncWorkflow, connect_sync
from chimera_daemon.client.workflow import Workflow
from chimera_daemon.messages import Hints, Receipt, Usage

__all__ = [
    "BadRequest",
    "Call",
    "Cancelled",
    "ChimeraError",
    "Client",
    "ClientClosed",
    "Conflict",
    "DaemonUnreachable",
    "Declined",
    "Draining",
    "EngineFailed",
    "EngineLost",
    "Hints",
    "NoEngine",
    "Overloaded",
    "ProtocolError",
    "RawCall",
    "RawReply",
    "RawStream",
    "Receipt",
    "Reply",
    "RequestTimeout",
    "SlowReader",
    "Stream",
    "StreamInterrupted",
    "SyncClient",
    "SyncStream",
    "SyncWorkflow",
    "TooLarge",
    "UnknownModel",
    "Usage",
    "VersionMismatch",
    "Workflow",
    "WorkflowClosed",
    "connect",
    "connect_sync",
]
