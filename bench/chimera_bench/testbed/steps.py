"""A problem of either kind is a start value and a list of steps; this file owns that shape."""

from __future__ import annotations

import msgspec


class Step(msgspec.Struct, frozen=True):
    """One step of a problem: an operation of its kind's vocabulary and an integer argument.

    `arg` is 0 where the operation takes none.
    """

    op: str
    arg: int = 0
