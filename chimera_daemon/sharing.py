"""One worker's side of the congestion board: what it has at the engines, and what the others have.

Translates between lines of the board and the scheduler's terms. Knows no sockets and no time; the
daemon says when to write and when to read. A board that cannot be used is done without.
"""

import logging
from typing import Any

from chimera_daemon.board import (
    ENGINE_KEY,
    MODEL_KEY,
    Board,
    BoardError,
    BoardFull,
    Line,
    Row,
    Writer,
)
from chimera_daemon.core import Scheduler
from chimera_daemon.messages import PeerQueue, PeersReported

log = logging.getLogger("chimera.daemon")


class Sharing:
    """``path`` is the board's file; None, or one that cannot be opened: nothing is shared."""

    def __init__(self, path: str | None, worker: int, core: Scheduler) -> None:
        self._core = core
        self._name = f"worker-{worker}"
        self._board: Board | None = None
        self._writer: Writer | None = None
        self._lines: dict[str, Line] = {}
        self._seen: PeersReported | None = None
        if path is not None:
            try:
                self._board = Board.open(path)
                self._writer = self._board.writer("worker", self._name)
            except (OSError, BoardError) as error:
                self._give_up(error)

    @property
    def path(self) -> str:
        """Of the board; empty without one."""
        return "" if self._board is None else self._board.path

    def write(self) -> None:
        """Put down what is in flight and waiting, and that this worker lives."""
        if self._writer is None:
            return
        try:
            used: dict[str, Line] = {}
            for engine_id, attempts, owed in self._core.in_flight():
                line = used[ENGINE_KEY + engine_id] = self._line(ENGINE_KEY + engine_id)
                line.set(attempts, round(owed))
            for name, queue in self._core.queues():
                line = used[MODEL_KEY + name] = self._line(MODEL_KEY + name)
                line.set(queue.waiting, round(queue.waiting_tokens), queue.running)
            for key in self._lines.keys() - used.keys():
                self._lines.pop(key).set()  # an engine that has gone
            self._writer.beat()
        except BoardFull:
            self._start_over()
        except (OSError, BoardError) as error:
            self._give_up(error)

    def read(self) -> PeersReported | None:
        """What the other workers have together; None if that is what it was the last time."""
        if self._board is None:
            return None
        engines: dict[str, int] = {}
        models: dict[str, PeerQueue] = {}
        for row in self.rows():
            if row.role != "worker" or row.name == self._name:
                continue
            if row.key.startswith(ENGINE_KEY):
                engine_id = row.key.removeprefix(ENGINE_KEY)
                engines[engine_id] = engines.get(engine_id, 0) + row.values[0]
            else:
                name = row.key.removeprefix(MODEL_KEY)
                waiting, tokens, running = row.values[:3]
                sum_ = models.get(name, PeerQueue())
                models[name] = PeerQueue(
                    sum_.waiting + waiting, sum_.waiting_tokens + tokens, sum_.running + running
                )
        seen = PeersReported(engines, models)
        if seen == self._seen:
            return None
        self._seen = seen
        return seen

    def rows(self) -> list[Row]:
        """All lines of living writers."""
        if self._board is None:
            return []
        try:
            return self._board.read()
        except (OSError, BoardError) as error:
            self._give_up(error)
            return []

    def snapshot(self) -> dict[str, Any]:
        """For `chimera status`; ``path`` is None without a board."""
        return {"path": self.path or None, "rows": [row._asdict() for row in self.rows()]}

    def close(self) -> None:
        """Leave the board. Idempotent."""
        if self._board is not None:
            self._board.close()
        self._board = self._writer = None

    def _line(self, key: str) -> Line:
        line = self._lines.get(key)
        if line is None:
            assert self._writer is not None
            line = self._lines[key] = self._writer.line(key)
        return line

    def _start_over(self) -> None:
        """Keys stay with a writer, those of engines long gone too; a new one has room again."""
        assert self._board is not None
        assert self._writer is not None
        self._writer.close()
        self._lines.clear()
        try:
            self._writer = self._board.writer("worker", self._name)
        except (OSError, BoardError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("going on without the congestion board: %s", error)
        self.close()
