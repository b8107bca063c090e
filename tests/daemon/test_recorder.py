"""The file of traces: whole lines, whatever the queue and the disk do."""

import errno
import os
import stat
import threading
import time
from pathlib import Path

import msgspec
import pytest

from chimera_daemon.config import ConfigError
from chimera_daemon.recorder import Recorder
from chimera_predictors.records import StageLog, WorkflowLog

LOG = WorkflowLog("w", (StageLog("m", "2 + 2 = ?", 10, 5, 1.0, -0.25),), kind="k", success=1.0)


def lines(folder: Path) -> list[WorkflowLog]:
    decode = msgspec.json.Decoder(WorkflowLog).decode
    paths = sorted(folder.glob("workflows-*.jsonl"))
    return [decode(line) for path in paths for line in path.read_bytes().splitlines()]


def test_one_line_per_workflow_with_an_id_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    for _ in range(2):  # in the same second, as like as not
        recorder = Recorder(folder)
        assert recorder.path is None
        for _ in range(50):
            recorder.put(LOG)
        recorder.close()
        assert recorder.snapshot() == {
            "path": str(recorder.path),
            "written": 50,
            "dropped": 0,
            "failed": 0,
        }
    files = list(folder.iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    got = lines(folder)
    assert len({log.workflow_id for log in got}) == 100
    assert {msgspec.structs.replace(log, workflow_id="w") for log in got} == {LOG}
    assert all(log.workflow_id.startswith("w@") for log in got)


def test_nothing_is_written_before_the_first_workflow(tmp_path: Path) -> None:
    Recorder(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_queue_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: gate.wait(30) and write(file, data))
    recorder = Recorder(tmp_path, max_queued=3)
    while not recorder.dropped:
        recorder.put(LOG)
    taken = recorder.dropped
    gate.set()
    recorder.close()
    assert taken == 1
    assert recorder.written == len(lines(tmp_path)) in (3, 4)  # one may have been under way


def test_a_full_disk_leaves_whole_lines_and_is_outlived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = os.write
    room = [300]

    def limited(file: int, data: bytes) -> int:
        part = data[: min(room[0], 64)]
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(part)
        return write(file, part)

    monkeypatch.setattr(os, "write", limited)
    recorder = Recorder(tmp_path)
    for _ in range(5):
        recorder.put(LOG)
    while recorder.written + recorder.failed < 5:
        time.sleep(0.001)
    assert recorder.failed >= 3
    room[0] = 1 << 20
    recorder.put(LOG)
    recorder.close()
    assert len(lines(tmp_path)) == recorder.written == 6 - recorder.failed
    assert caplog.text.count("could not be written") == 1


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="predictor.record"):
        Recorder(tmp_path / "file" / "below")
