"""This gateway's line on the congestion board. Nothing fails because of the board."""

import logging
import os

from chimera_daemon.board import GATEWAY_KEY, Board, BoardError, Line, Row, Values, Writer

log = logging.getLogger("chimera.gateway")


class Counts:
    """``follow`` a board by its path, ``write`` the counts now and then, ``rows`` of everybody."""

    def __init__(self) -> None:
        self._path = ""
        self._board: Board | None = None
        self._writer: Writer | None = None
        self._line: Line | None = None

    def follow(self, path: str) -> None:
        """Use this board from now on; an empty path is none."""
        if path == self._path:
            return
        self.close()
        self._path = path
        if not path:
            return
        try:
            self._board = Board.open(path)
            self._writer = self._board.writer("gateway", f"gateway-{os.getpid()}")
            self._line = self._writer.line(GATEWAY_KEY)
        except (BoardError, OSError, ValueError) as error:
            log.warning("going on without the congestion board: %s", error)

    def write(self, values: Values) -> None:
        """Six counts, as `board.GATEWAY_VALUES` names them."""
        if self._line is not None and self._writer is not None:
            self._line.set(*values)
            self._writer.beat()

    def rows(self) -> list[Row]:
        """What all living processes wrote."""
        if self._board is None:
            return []
        try:
            return self._board.read()
        except (BoardError, OSError, ValueError) as error:
            log.warning("the congestion board cannot be read: %s", error)
            return []

    def close(self) -> None:
        """Take the line away."""
        if self._board is not None:
            self._board.close()
        self._board = self._writer = self._line = None
        self._path = ""
