"""What the daemon says about itself, asked once for all who want to know at about the same time."""

import asyncio
from typing import Any

from chimera_daemon.client import ChimeraError, Client, DaemonUnreachable

AUTO = "auto"
_ANSWER_S = 2.0


class Snapshots:
    """``await get(max_age_s)`` gives the daemon's workers, one dict (`Daemon.status`) each."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._taken_at = -1e9
        self._latest: list[dict[str, Any]] = []
        self._asking: asyncio.Task[list[dict[str, Any]]] | None = None

    async def get(self, max_age_s: float = 1.0) -> list[dict[str, Any]]:
        """Raises a `ChimeraError` if the daemon does not answer."""
        if not self._client.connected:
            raise DaemonUnreachable(f"no daemon answers at {self._client.address}")
        if self._loop.time() - self._taken_at > max_age_s:
            if self._asking is None:
                self._asking = asyncio.ensure_future(self._ask())
                self._asking.add_done_callback(self._asked)
            # Whoever goes away must not take the answer from the others.
            return await asyncio.shield(self._asking)
        return self._latest

    async def _ask(self) -> list[dict[str, Any]]:
        status = await self._client.status(_ANSWER_S)
        several = status.get("workers")
        self._latest = several if isinstance(several, list) else [status]
        self._taken_at = self._loop.time()
        return self._latest

    def _asked(self, task: "asyncio.Task[list[dict[str, Any]]]") -> None:
        self._asking = None
        if not task.cancelled():
            task.exception()  # whoever waited has it

    def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()


def models_of(workers: list[dict[str, Any]]) -> list[str]:
    """Names of the models that the daemon knows."""
    return sorted({m["name"] for worker in workers for m in worker["core"]["models"]})


def why_unhealthy(workers: list[dict[str, Any]]) -> str | None:
    """None if there is an engine to send work to."""
    if not workers:
        return "no worker of the daemon answers"
    if all(worker["core"]["draining"] for worker in workers):
        return "the daemon is stopping"
    if not any(worker["core"]["engines"] for worker in workers):
        return "no engine is registered"
    return None


def board_path(workers: list[dict[str, Any]]) -> str:
    """Where the congestion board is; empty if there is none."""
    for worker in workers:
        board: dict[str, Any] | None = worker.get("board")
        if board and board.get("path"):
            return str(board["path"])
    return ""


async def unless_away(snapshots: Snapshots, max_age_s: float) -> list[dict[str, Any]]:
    """As `Snapshots.get`, but nothing where the daemon is away."""
    try:
        return await snapshots.get(max_age_s)
    except ChimeraError:
        return []
