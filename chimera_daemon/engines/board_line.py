"""An engine host's line on the congestion board, where there is a board that it can reach.

Owns when the line is written. Knows no engine: its values come from a function. Whatever is wrong
with the board is logged once, and the host goes on without it.
"""

import asyncio
import logging
from collections.abc import Callable

from chimera_daemon.board import BEAT_S, Board, BoardError, Line, Values, Writer

log = logging.getLogger("chimera.engine")

_RETRY_S = 5.0


class BoardLine:
    """Keeps the line of this engine up to date. ``read`` gives its six values."""

    def __init__(self, engine_id: str, read: Callable[[], Values]) -> None:
        self._engine_id = engine_id
        self._read = read
        self._loop = asyncio.get_running_loop()
        self._path = ""
        self._retry_at = 0.0
        self._open: tuple[Board, Writer, Line] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def use(self, path: str) -> None:
        """Write on the board at this path from now on; empty: on none. Cheap where it is open."""
        if path == self._path and (self._open is not None or self._loop.time() < self._retry_at):
            return
        told, self._path = self._path == path, path
        self.close()
        if not path:
            return
        try:
            board = Board.open(path)
            try:
                writer = board.writer("engine", self._engine_id)
                self._open = board, writer, writer.line(self._engine_id)
            except BaseException:
                board.close()
                raise
        except (BoardError, OSError, ValueError) as error:
            self._retry_at = self._loop.time() + _RETRY_S
            if not told:
                log.info("%s: works without the congestion board: %s", self._engine_id, error)
            return
        self._write()

    def close(self) -> None:
        """Leave the board. Idempotent; `use` comes back to it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._open is not None:
            self._open[0].close()
            self._open = None

    def _write(self) -> None:
        if self._open is None:
            return
        _, writer, line = self._open
        try:
            line.set(*self._read())
            writer.beat()
        except (BoardError, OSError, ValueError) as error:
            log.warning("%s: left the congestion board: %s", self._engine_id, error)
            self._retry_at = self._loop.time() + _RETRY_S
            self.close()
            return
        self._timer = self._loop.call_later(BEAT_S, self._write)
