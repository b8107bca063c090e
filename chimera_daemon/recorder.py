"""Writes traces of ended workflows, one JSON line each, from a thread of its own.

Owns the file and the queue before it. Never makes the daemon wait or fail: what the queue or the
disk does not take is dropped and counted. The file holds prompts, so only its owner can read it.
"""

import logging
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from chimera_daemon.config import ConfigError
from chimera_predictors.records import WorkflowLog

log = logging.getLogger("chimera.recorder")

_MAX_QUEUED = 4096
_CLOSE_S = 2.0
_QUIET_S = 60.0  # between two complaints about the disk


class Recorder:
    """Appends to ``FOLDER/workflows-<start>.jsonl``, which begins with the first workflow.

    Raises `ConfigError` if the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, max_queued: int = _MAX_QUEUED) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"`predictor.record`: {folder}: {error}") from error
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise ConfigError(f"`predictor.record`: {folder}: this folder cannot be written to")
        self._started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self._queue: queue.Queue[WorkflowLog | None] = queue.Queue(max_queued)
        self._encode = msgspec.json.Encoder().encode
        self._file: int | None = None
        self._size = 0  # of the whole lines in the file
        self._complained_s = float("-inf")
        self.written = 0
        self.dropped = 0  # the queue was full
        self.failed = 0  # the disk did not take them
        self.path: Path | None = None
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def put(self, workflow: WorkflowLog) -> None:
        """Write it some time soon, or count it as dropped. Any thread; never blocks."""
        try:
            self._queue.put_nowait(workflow)
        except queue.Full:
            self.dropped += 1

    def snapshot(self) -> dict[str, Any]:
        """For `chimera status`."""
        return {
            "path": str(self.path or self._folder),
            "written": self.written,
            "dropped": self.dropped,
            "failed": self.failed,
        }

    def close(self) -> None:
        """Write what is queued, for at most some seconds, and close the file."""
        try:
            self._queue.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (workflow := self._queue.get()) is not None:
            try:
                self._append(workflow)
                self.written += 1
            except Exception as error:
                self.failed += 1
                self._complain(error)
        if self._file is not None:
            os.close(self._file)

    def _append(self, workflow: WorkflowLog) -> None:
        file = self._file if self._file is not None else self._open()
        # Ids are the clients' and may come again, in a later run or the same: a trace's may not.
        unique = f"{workflow.workflow_id}@{self._session}.{self.written + self.failed}"
        line = self._encode(msgspec.structs.replace(workflow, workflow_id=unique)) + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.write(file, line[written:])
        except OSError:
            os.ftruncate(file, self._size)  # no half line before the next one
            raise
        self._size += len(line)

    def _open(self) -> int:
        """A new file: another daemon may have started in the same second."""
        for attempt in range(100):
            session = f"{self._started}-{attempt}" if attempt else self._started
            path = self._folder / f"workflows-{session}.jsonl"
            try:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
                self._file = os.open(path, flags, 0o600)
            except FileExistsError:
                continue
            self.path, self._session = path, session
            return self._file
        raise FileExistsError(f"{self._folder} has too many files of {self._started}")

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained_s >= _QUIET_S:
            self._complained_s = now
            log.error("a trace could not be written (%d so far): %s", self.failed, error)
