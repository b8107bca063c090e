"""Progress of long work: one live bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from typing import Any, TextIO

_EVERY_S = 5.0


class Progress:
    """One phase after the other. Use it as a context manager so that the terminal is left clean."""

    def __init__(self, output: TextIO | None = None) -> None:
        self._output = output or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._name = ""
        self._total = 0.0
        self._said_s = 0.0
        self._began_s = 0.0

    def __enter__(self) -> "Progress":
        if self._output.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:<26}"),
                BarColumn(30),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self._output),
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def phase(self, name: str, total: float) -> None:
        """Begin a phase of ``total`` units; the one before is over."""
        self._name, self._total = name, total
        self._began_s = self._said_s = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, note="")
        else:
            self._say("begins")

    def update(self, done: float, note: str = "") -> None:
        """Units done so far, and a few words."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, self._total), note=note)
        elif time.monotonic() - self._said_s >= _EVERY_S:
            self._say(f"{min(1.0, done / self._total):4.0%}  {note}")

    def end(self, note: str = "") -> None:
        """The phase is complete."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._total, note=note)
        else:
            self._say(f"done  {note}")

    def _say(self, text: str) -> None:
        self._said_s = time.monotonic()
        elapsed_s = self._said_s - self._began_s
        print(f"{self._name:<26} {elapsed_s:5.1f} s  {text}", file=self._output, flush=True)
